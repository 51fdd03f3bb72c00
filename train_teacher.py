"""Stage 1: the teacher, a full-step flow-matching model with ground-truth continuity. Paper section 3.4 and Appendix E, Eq. 1, 2, 5, 16, 17.

    python train_teacher.py --data CLIPS [CLIPS ...]               runs/teacher (checkpoint, log, strip.png) -> weights/tiny/teacher.safetensors
    python train_teacher.py --data CLIPS --preset debug            one chunk by heart, two minutes on two cores: does everything still learn?
    python train_teacher.py --data CLIPS --fresh 1 --window-side 8 faces are never seen twice alike, mouths and eyes more often: the small VAE only
    python train_teacher.py --data CLIPS --resume                  goes on where a killed run was last saved, bit for bit
    python train_teacher.py --plot                                 runs/teacher/log.jsonl -> runs/teacher/loss.png
    torchrun --nproc_per_node=8 train_teacher.py --preset wan-1.3b --weights DIR --init wan.safetensors --data CLIPS      (FSDP)

The VAE and the audio encoder are frozen, so every chunk is encoded once, into a cache (--fresh: at every draw, by two matrices).
A row of a batch is then
    z      latents of a true chunk                  z_id   TRE of another frame of the same clip (Eq. 3)
    audio  its hidden states, or zeros (p = 0.1)    kappa  z[:, :, :m]: the VAE is causal, so this *is* E(last n frames of the chunk before);
                                                           or that as rounds of the codec would have left it (--worn)
and the loss is Eq. 2 on what is not kappa, now and then with Eq. 16 and 17 on decoded frames of the predicted x0. The cold start (p = 0.1)
is what infer.py does in chunk 0: the reference picture is the chunk's own first frame, and kappa is that one latent.

Shapes: B batch, T pixel frames, F = 1 + (T-1)/4 latent frames, C channels, H W pixels, h w latent grid, L A audio layers and width.
Everything random is drawn from (seed, step, row): a resumed run, or one on more processes, draws what the first one would.
"""
import argparse
import inspect
import json
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import dit
import report
from audio import encoder_of
from checkpoint import gather, join, load_checkpoint, log, mean, save_checkpoint, save_picture, shard, swap, trim_log, write_json, write_safetensors
from chunks import Pools, collate, encode_clips, load_row, one_per_folder, pixels, shorten, wear_of
from data import ClipFolder
from dit import AudioDiT, DiTConfig, add_noise, load_wan_checkpoint, replace_head, sample_teacher, velocity, widen, x0_from_velocity
from infer import pick
from linear import LinearCodec
from muon import Muon
from tre import IDENTITY
from vae import load_vae

# ---------------------------------------------------------------------------------------------------------------- config

@dataclass(frozen=True)
class TeacherConfig:
    network: str = "tiny"           # size of the network: a preset of dit.py, or "debug"
    skip: float = 0.0               # > 0: linear_velocity (dit.py) of this variance is added to what the network says; ours; 0 = the paper
    steps: int = 6000               # optimiser steps (paper: 15,000)
    batch: int = 8                  # whole pictures' chunks a step, over all processes (paper: 4, whether of each GPU or of all is not said)
    micro: int = 8                  # chunks a network call of one process; gradients add up over the calls of a step
    optimizer: str = "muon"         # "muon" (muon.py) learns about twice as much a step; "adamw" is what the paper used
    lr: float = 1.5e-3              # peak of AdamW's learning rate, Muon's is ten times as high (paper: not given)
    warmup: int = 100               # steps until it is reached
    decay: float = 0.3              # share of the steps, at the end, in which it falls to zero
    ema: float = 0.99               # memory of the averaged weights, which are the ones shipped
    shift: float = 8.0              # of the noise levels, > 1 trains more on noise; full size: 5 (paper: not given)
    identity: str = "tre"           # identity reference: tre (Eq. 3), etr (Eq. 29, the baseline of Table 3)
    head: int = 3                   # m, continuity latents = 4 m - 3 frames (paper: lost)
    cold: float = 0.1               # share of rows that start cold, with the portrait as their first frame
    worn: int = 0                   # rounds of the codec that kappa_gt may have behind it, 0 to this many; ours; 0 = the paper
    deaf: float = 0.1               # share of rows whose audio is zeroed: what guidance compares with
    focus: float = 3.0              # extra weight of face latents in Eq. 2: a cheap stand-in for Eq. 17, ours; 0 = the paper
    eyes: float = 0.0               # extra weight of the latents around the eyes; ours; 0 = the paper
    lids: float = 0.0               # and of these, times how far they are from where they mostly are: a blink as a mouth with 20; ours; 0 = the paper
    blinks: float = 1.0             # how often, beside others, a chunk is drawn in which eyes shut (NAME.npz has "blink"); ours; 1 = the paper
    lips: float = 30.0              # extra weight of mouth latents: 5 in 100 latents, with all that the sound decides; ours; 0 = the paper
    temporal: float = 0.1           # lambda of Eq. 16 (paper: lost)
    face: float = 0.1               # lambda of Eq. 17 (paper: lost)
    pixel_every: int = 8            # steps from one that decodes frames for Eq. 16 and 17 to the next (paper: not said)
    pixel_sigma: float = 0.5        # only at noise levels below this: above, the predicted x0 is an average of many faces
    window: int = 3                 # latents decoded for them, at a random place of the chunk
    context: int = 2                # latents decoded to their left, whose frames are thrown away
    frames: int = 33                # longest chunk, full size: 81; shorter clips give one chunk of 4k+1 frames
    latents: int = 0                # train on the first so many latents of a chunk, 0 = all; of 81 frames, 9 of 21 cost a quarter
    window_side: int = 0            # latents of a side of what most steps see of a picture, (whole / this)^2 as many rows; 0 = whole pictures
    whole: int = 4                  # with it, steps from one that sees whole pictures to the next
    offsets: int = 1                # times a clip is cut into chunks, each time from a later frame on
    references: int = 1             # chunks of a clip whose first frame serves as a reference picture; the clip's last frame also does
    encode_bf16: bool = True        # encode the cache in bfloat16: 2.5 x faster, latents off by 1 part in 200
    chunks: int = 0                 # use so many chunks only; 0 = all
    bf16: bool = True               # bfloat16 autocast
    checkpointing: bool = False     # recompute the blocks in the backward pass: less memory, a third slower
    compile: bool = False           # torch.compile, block by block
    every: int = 500                # steps from one validation to the next
    minutes: float = 10.0           # from one checkpoint and strip of samples to the next
    val: int = 8                    # validation chunks
    seed: int = 0                   # of everything random


PRESETS = {"tiny": TeacherConfig(skip=0.15),
           "debug": TeacherConfig(network="debug", steps=150, batch=2, micro=2, lr=2e-3, warmup=20, ema=0.95, shift=2.0, cold=0.0, focus=0.0,
                                  lips=0.0, temporal=0.0, face=0.0, encode_bf16=False, chunks=1, every=100, minutes=1.0, val=1),
           "wan-1.3b": TeacherConfig(network="wan-1.3b", steps=15000, batch=64, micro=1, optimizer="adamw", lr=1e-5, warmup=500, decay=0.1,
                                     ema=0.9999, shift=5.0, focus=0.0, lips=0.0, frames=81, offsets=2, references=3, encode_bf16=False,
                                     checkpointing=True, every=500, minutes=30.0)}
NETWORKS = dit.PRESETS | {"debug": DiTConfig(dim=192, ffn_dim=384, heads=4, layers=3, audio_tokens=4, audio_hidden=64)}
CHOICES = {"network": tuple(NETWORKS), "optimizer": ("muon", "adamw"), "identity": tuple(IDENTITY)}
FREE = ("steps", "latents", "ema", "lips", "eyes", "lids", "minutes", "every", "val", "micro", "checkpointing", "compile")   # may change at --resume
BINS = (0.1, 0.3, 0.5, 0.7, 0.9)    # noise levels of the validation loss

# ------------------------------------------------------------------------------------------------------------- equations

def flow_matching_loss(v, x0, eps, weight):
    """Eq. 2. v, x0, eps (B, C, F, h, w); weight (B, 1, F, h, w), zero at the continuity latents -> (B,), a weighted mean of squares."""
    error = (v - velocity(x0, eps)).square().mean(1, keepdim=True)              # (B, 1, F, h, w)
    return (error * weight).sum((1, 2, 3, 4)) / weight.sum((1, 2, 3, 4))


def temporal_gradient_loss(made, true):
    """Eq. 16: how frames change, not what they are. Videos (B, 3, T, H, W), T > 1 -> (B,), mean absolute difference."""
    return (made.diff(dim=2) - true.diff(dim=2)).abs().mean((1, 2, 3, 4))


def face_loss(made, true, mask):
    """Eq. 17: only the face counts. Videos (B, 3, T, H, W), mask (B, 1, T, H, W) in 0..1 -> (B,)."""
    return (mask * (made - true).abs()).sum((1, 2, 3, 4)) / (3 * mask.sum((1, 2, 3, 4)) + 1e-6)


def decode_window(vae, latents, first, count, context):
    """Frames of latents [first, first + count), first >= 1, from latents (B, C, F, h, w) -> (B, 3, 4 count, H, W), frames 4 first - 3 on.

    The decoder looks back only: `context` >= 1 latents to the left are decoded along, instead of all."""
    begin = max(0, first - context)
    return vae.decode(latents[:, :, begin:first + count])[:, :, -4 * count:]


def pixel_losses(vae, x0, batch, cfg):
    """Eq. 16 and 17 for the rows that are clean enough; x0 (B, C, F, h, w) predicted -> two (B,), zero for the other rows, and which they are."""
    temporal, face, clean = (x0.new_zeros(len(x0)) for _ in range(3))
    for i, chunk in enumerate(batch["chunk"]):
        if batch["sigma"][i] >= cfg.pixel_sigma:
            continue
        clean[i] = 1
        first = max(1, min(int(batch["window"][i]), x0.shape[2] - cfg.window))
        count = min(cfg.window, x0.shape[2] - first)
        frames = slice(chunk.start + 4 * first - 3, chunk.start + 4 * (first + count) - 3)
        true = pixels(chunk.clip.frames[frames]).to(x0)                         # (1, 3, 4 count, H, W)
        mask = torch.from_numpy(np.array(chunk.clip.mask[frames]).repeat(4, 1).repeat(4, 2)).to(x0)[None, None] / 255   # (1, 1, 4 count, H, W)
        made = decode_window(vae, x0[i:i + 1], first, count, cfg.context).float()
        temporal[i], face[i] = temporal_gradient_loss(made, true)[0], face_loss(made, true, mask)[0]
    return temporal, face, clean


def teacher_loss(model, vae, batch, cfg, with_pixels):
    """Eq. 5: L_FM + lambda_temp L_temp + lambda_face L_face -> (B,), and its parts, (B,) each."""
    x0, eps, sigma = batch["latents"], batch["noise"], batch["sigma"]
    predicted = batch["predicted"][:, None, :, None, None]                      # (B, 1, F, 1, 1)
    x = torch.where(predicted > 0, add_noise(x0, eps, sigma), replace_head(x0, batch["kappa"]))    # Eq. 1, then kappa_gt over the head
    v = model(x, 1000 * sigma, batch["identity"], batch["audio"])
    parts = {"flow": flow_matching_loss(v, x0, eps, predicted * batch["weight"][:, None])}
    loss = parts["flow"]
    if with_pixels:
        x0_hat = torch.where(predicted > 0, x0_from_velocity(x, v, sigma), x0)
        parts["temporal"], parts["face"], parts["clean"] = pixel_losses(vae, x0_hat, batch, cfg)
        loss = loss + cfg.temporal * parts["temporal"] + cfg.face * parts["face"]
    return loss, parts

# ------------------------------------------------------------------------------------------------------------ checkpoint


class State:
    """Network, its average, the optimiser: all tensors under names, for one process or FSDP's shards alike."""

    def __init__(self, model, cfg):
        self.model, named = model, dict(model.named_parameters())
        prefix = "blocks." if cfg.optimizer == "muon" else None                 # first and last layer stay with AdamW
        self.opt = Muon(named, cfg.lr, prefix, weight_decay=0.01)
        self.ema = {k: p.detach().clone() for k, p in named.items()}
        self.tensors = {f"model.{k}": p.detach() for k, p in named.items()} | {f"ema.{k}": v for k, v in self.ema.items()}
        self.tensors |= {f"optimizer.{key}.{k}": v for k, p in named.items() for key, v in self.opt.state[p].items()}

    @torch.no_grad()
    def average(self, decay):
        for k, p in self.model.named_parameters():
            self.ema[k].lerp_(p, 1 - decay)


def export(out, config, ema, cfg, before=0):
    """OUT/teacher.safetensors (float16), and in OUT/config.json the "dit" part and the frames of a chunk. before: steps that --init had made."""
    path, tensors = out / "config.json", gather(ema, torch.float16)
    every = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not tensors:
        return
    frames = min(cfg.frames, 4 * cfg.latents - 3) if cfg.latents else cfg.frames
    if (out / "student.safetensors").exists() and ({"skip": 0.0} | every.get("dit", {}), every.get("frames", 81)) != (asdict(config), frames):
        print(f"warning: {out / 'student.safetensors'} was made for another network or chunk length: distil it anew", file=sys.stderr)
    write_safetensors(out / "teacher.safetensors", tensors, {"class": "AudioDiT", "trained": "yes", "steps": str(before + cfg.steps),
                                                          "identity": cfg.identity, "skip": str(config.skip), "config": json.dumps(asdict(cfg))})
    write_json(path, every | {"frames": frames, "dit": asdict(config)})

# ----------------------------------------------------------------------------------------------------------------- train

@torch.no_grad()
def validate(model, chunks, cfg, device):
    """Eq. 2 of fixed chunks with fixed noise at fixed noise levels -> {sigma: loss}. Only these curves can be compared between steps."""
    sums, plain = dict.fromkeys(BINS, 0.0), replace(cfg, focus=0.0, lips=0.0, eyes=0.0, lids=0.0)
    for i, chunk in enumerate(chunks):
        for sigma in BINS:
            row = load_row(chunk, plain, np.random.default_rng((1, i)), False, False, sigma)
            sums[sigma] += teacher_loss(model, None, collate([row], device), cfg, False)[0].item() / len(chunks)
    return sums


@torch.no_grad()
def strip(model, vae, chunks, cfg, device, path, steps=20, guidance=3.0):
    """A picture: truth above sample for four validation chunks, eight moments each; a first chunk, begun as infer.py begins it."""
    rows = []
    for i, chunk in enumerate(chunks[::max(1, len(chunks) // 4)][:4]):
        row = collate([load_row(chunk, cfg, np.random.default_rng((2, i)), cold=True, deaf=False, sigma=1.0)], device)
        z = sample_teacher(model, row["noise"], row["identity"], row["audio"], row["identity"][:, :, :1], steps, guidance=guidance, focus=16.0)
        start = row["chunk"][0].start
        for video in (pixels(chunk.clip.frames[start:start + chunk.length]), vae.decode(z).float().cpu()):
            picked = video[0, :, np.linspace(0, chunk.length - 1, 8).astype(int)]                   # (3, 8, H, W)
            rows.append(picked.permute(2, 1, 3, 0).flatten(1, 2))                                   # (H, 8 W, 3)
    if path:                                                                    # None: another process writes it
        save_picture(path, Image.fromarray(((torch.cat(rows) + 1) * 127.5).round().clamp(0, 255).byte().numpy()))


def learning_rate(step, cfg):
    """Up, level, and down to zero: a run can be made longer as long as the fall has not begun."""
    return cfg.lr * min(1, (step + 1) / cfg.warmup, (1 - step / cfg.steps) / cfg.decay)


def train(cfg, model, vae, pools, val, run, resume=False, device="cpu", rank=0, world=1):
    """The loop. model AudioDiT on its device (sharded if world > 1), val list of Chunk -> State, list of the losses of its steps."""
    run.mkdir(parents=True, exist_ok=True)
    model.gradient_checkpointing = cfg.checkpointing
    for block in model.blocks if cfg.compile else ():
        block.compile(dynamic=False)
    state = State(model, cfg)
    state.tensors |= {"wear": pools.wear} if cfg.worn else {}
    state.tensors |= {f"codec.{i}": matrix for i, matrix in enumerate(pools.codec.matrices)} if pools.codec else {}
    checkpoint = run / "checkpoint.safetensors"
    start = load_checkpoint(checkpoint, state.tensors, cfg, FREE, data=pools.data) if resume and checkpoint.exists() else 0
    if rank == 0:
        trim_log(run / "log.jsonl", start)
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=cfg.bf16)
    losses, began, clock, last_save = [], *[time.time()] * 3
    for step in tqdm(range(start, cfg.steps + 1), initial=start, total=cfg.steps, unit="step", disable=None if rank == 0 else True):
        record = {"step": step}
        # -------------------------------------------------------------------------------------------- evaluate
        if step % cfg.every == 0 or step == cfg.steps:
            swap(model, state.ema)
            with autocast:
                record["val"] = {str(k): round(v, 5) for k, v in validate(model, val, cfg, device).items()}
            swap(model, state.ema)
        # --------------------------------------------------------------------------------------- save and sample
        age = mean([torch.tensor(time.time() - last_save, device=device)])[0]   # the same on every process
        if age > 60 * cfg.minutes or step == cfg.steps:
            save_checkpoint(checkpoint, state.tensors, step, cfg, data=pools.data)
            swap(model, state.ema)
            with autocast:
                strip(model, vae, val, cfg, device, run / "strip.png" if rank == 0 else None)
            swap(model, state.ema)
            last_save = time.time()
        # ------------------------------------------------------------------------------------------------ TRAIN
        if step < cfg.steps:
            state.opt.param_groups[0]["lr"] = record["lr"] = learning_rate(step, cfg)
            record |= train_step(state, vae, pools, cfg, step, autocast, run, device, rank, world)
            state.average(min(cfg.ema, (1 + step) / (10 + step)))
            losses.append(record["loss"])
        # -------------------------------------------------------------------------------------------------- log
        if rank == 0:
            record["seconds"] = round(time.time() - clock, 3)
            log(run / "log.jsonl", record)
            if "val" in record or step % 50 == 0:
                pace = (time.time() - began) / (step + 1 - start)               # seconds a step, all in all
                tqdm.write(" | ".join([f"step {step:5d}/{cfg.steps}", f"loss {np.mean(losses[-50:] or [0]):.4f}",
                                       *(f"{k} {v}" for k, v in record.items() if k not in ("step", "seconds", "loss")),
                                       f"{cfg.batch / pace:.2f} samples/s", f"{pace * (cfg.steps - step) / 3600:.1f} h left"]))
            clock = time.time()
    return state, losses


def train_step(state, vae, pools, cfg, step, autocast, run, device, rank, world):
    """One optimiser step on cfg.batch rows, or more of windows, those of this process in groups of cfg.micro. -> numbers for the log"""
    with_pixels = (cfg.temporal > 0 or cfg.face > 0) and step % cfg.pixel_every == 0
    side = 0 if with_pixels or step % cfg.whole == 0 else cfg.window_side
    more = (pools.size // side) ** 2 if side else 1                             # a window costs less: so many more rows
    calls, micro, parts, names = cfg.batch // (cfg.micro * world), cfg.micro * more, {}, []
    state.opt.zero_grad(set_to_none=True)
    for call in range(calls):
        rows = range((call * world + rank) * micro, (call * world + rank + 1) * micro)
        batch = shorten(collate([pools.draw(cfg, step, row, side) for row in rows], device), cfg.latents)
        names += [chunk.name for chunk in batch["chunk"]]
        with autocast:
            loss, new = teacher_loss(state.model, vae, batch, cfg, with_pixels)
        (loss.mean() / calls).backward()
        for k, v in ({"loss": loss} | new).items():
            parts[k] = parts.get(k, 0) + v.detach().mean() / calls
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    parts = dict(zip(parts, mean(parts.values())))
    if not np.isfinite(parts["loss"] + norm.item()):                            # before the weights are touched
        raise FloatingPointError(f"loss {parts['loss']}, gradient norm {norm.item()} at step {step}, in the chunks {', '.join(names)} "
                                 f"(of process {rank}); the weights were not changed, the last checkpoint is in {run}")
    state.opt.step()
    loss, clean = parts.pop("loss"), parts.pop("clean", 0)                      # clean: share of rows that were decoded, the log has their mean
    for k in ("temporal", "face") if with_pixels else ():
        whole = parts.pop(k)
        parts |= {k: whole / clean} if clean else {}
    return {k: round(v, 6) for k, v in parts.items()} | {"loss": loss, "norm": round(norm.item(), 4)}

# ------------------------------------------------------------------------------------------------------------------ main


def check(cfg, args, world):
    """ValueError, in one line, for options that make no sense together."""
    if cfg.frames % 4 != 1 or cfg.frames <= 4 * cfg.head or 0 < cfg.latents <= cfg.head:
        raise ValueError(f"--frames {cfg.frames} (4k + 1) and --latents {cfg.latents} must leave latents to predict after --head {cfg.head}")
    if min(cfg.batch, cfg.micro) < 1 or cfg.batch % (cfg.micro * world):
        raise ValueError(f"batch {cfg.batch} is not a multiple of micro {cfg.micro} x {world} processes")
    bounds = {1: ("warmup", "head", "pixel_every", "window", "context", "offsets", "references", "every", "val", "whole", "blinks"),
              0: ("worn", "skip", "focus", "eyes", "lids", "lips", "temporal", "face")}
    for least, names in bounds.items():
        if wrong := [f"--{name.replace('_', '-')} {getattr(cfg, name)}" for name in names if not least <= getattr(cfg, name) < np.inf]:
            raise ValueError(f"{', '.join(wrong)} must be {least} or more, and finite")
    if not 0 < cfg.decay <= 1:
        raise ValueError(f"--decay {cfg.decay} must be over 0, and 1 at most")
    if cfg.window_side < 0 or cfg.window_side % 2:
        raise ValueError(f"--window-side {cfg.window_side} must be even, 0 or more: a token has 2 x 2 latents")
    one_per_folder(args, "share", "cache", "fresh")
    if not set(args.fresh or []) <= {0, 1}:
        raise ValueError(f"--fresh {args.fresh}: 0 or 1 for each folder")
    if any(args.fresh or []) and cfg.chunks:
        raise ValueError("--fresh: no clip is seen twice alike; --chunks learns a few by heart")


def build_parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", nargs="+", help="folders of clips (see data.py)")
    p.add_argument("--share", nargs="+", type=float, help="how often each folder is drawn (default: equally)")
    p.add_argument("--fresh", nargs="+", type=int, help="1: training clips of this folder are cut out and encoded anew at every draw (default: 0)")
    p.add_argument("--cache", nargs="+", help="where data.py's decoded frames lie, one per folder (default: FOLDER/.cache-SIZE)")
    p.add_argument("--weights", type=Path, default=Path("weights/tiny"), help="folder of config.json, vae.safetensors, whisper (%(default)s)")
    p.add_argument("--out", type=Path, help="where teacher.safetensors goes (default: --weights)")
    p.add_argument("--run-dir", dest="run", type=Path, default=Path("runs/teacher"), help="checkpoint, log, pictures, encoded chunks (%(default)s)")
    p.add_argument("--preset", choices=PRESETS, default="tiny", help="what the options below are unless given (%(default)s)")
    p.add_argument("--init", type=Path, help="start from a teacher.safetensors, or from an official Wan2.1 text-to-video checkpoint")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --run-dir")
    p.add_argument("--plot", action="store_true", help="draw the curves of --run-dir and stop")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto: a GPU if there is one")
    meaning = dict(re.findall(r"    (\w+): .*?# (.*)", inspect.getsource(TeacherConfig)))
    for field in fields(TeacherConfig):
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(field.default, bool) else {"type": type(field.default)}
        kind |= {"choices": CHOICES[field.name]} if field.name in CHOICES else {}
        p.add_argument(f"--{field.name.replace('_', '-')}", **kind, help=f"{meaning[field.name]} [{getattr(PRESETS['tiny'], field.name)}]")
    return p


def prepare(args, cfg, device, rank, world):
    """The frozen encoders, the network, the chunks -> model, vae, Pools, validation chunks"""
    config = json.loads((args.weights / "config.json").read_text(encoding="utf-8"))
    if missing := {"size", "audio"} - config.keys():
        raise ValueError(f"{args.weights / 'config.json'} lacks {' and '.join(sorted(missing))}")
    if cfg.window_side and config["size"] // 8 % cfg.window_side:
        raise ValueError(f"--window-side {cfg.window_side} must divide a picture's {config['size'] // 8} latents of a side")
    vae = load_vae(args.weights, device)
    encoder = encoder_of(args.weights, config["audio"], device)
    torch.manual_seed(cfg.seed)                                                 # the same first weights on every process
    model = AudioDiT(replace(NETWORKS[cfg.network], channels=vae.config.z_dim, audio_layers=encoder.layers, audio_dim=encoder.dim, skip=cfg.skip))
    if args.init:
        ours = "audio_proj.norm.weight" in (tensors := load_file(args.init))
        try:
            print(model.load_state_dict(widen(tensors, model.state_dict())) if ours else load_wan_checkpoint(model, tensors))
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"--init {args.init} is another network: {' '.join(str(error).split())[:200]}") from None
    parts, fresh = ("all", "all") if cfg.chunks else ("train", "val"), args.fresh or [0] * len(args.data)      # all: learnt by heart, validated
    found = [[ClipFolder(folder, config["size"], part, cache).clips[:cfg.chunks or None] for part in parts]     # on the same
             for folder, cache in zip(args.data, args.cache or [None] * len(args.data), strict=True)]
    new, folders, val = [clip for (clips, _), anew in zip(found, fresh) if anew for clip in clips], [], []
    few = (pixels(clip.frames[:min(cfg.frames, (clip.length - 1) // 4 * 4 + 1)]) for clip in new[::-(-len(new) // 48) or 1])
    codec = LinearCodec(vae, few, device) if new else None
    if new and codec.missing > 0.1:
        raise ValueError(f"--fresh: the encoder is not linear enough, {codec.missing:.0%} of its latents' variance would be missing")
    for (clips, held_out), anew in zip(found, fresh):
        held_out = held_out[::-(-len(held_out) * len(args.data) // cfg.val)]
        clips, held_out = (encode_clips(some, vae, encoder, args.run / "cache", cfg, device, rank, world, new)
                           for some, new in ((clips, anew), (held_out, False)))
        folders.append(clips[:cfg.chunks or None])
        val += [chunk for chunk in held_out if chunk.row == 0]
    often = lambda chunk: cfg.blinks if cfg.blinks != 1 and chunk.blinks(cfg.head) else 1.0
    some = sum(folders, [])
    if cfg.blinks != 1 and not any(often(chunk) > 1 for chunk in some):
        raise ValueError("--blinks: no clip's NAME.npz has a blink that could be drawn more often")
    wear = wear_of(vae, some[::-(-len(some) // 8)], cfg.head, device, codec) if cfg.worn else None
    return shard(model.to(device), device, world), vae, Pools(folders, args.share or [1.0] * len(folders), wear, codec, often), val


def made_by(path):
    """Of the weights to start from: steps that made them, and their --skip; 0 if they do not say. None: there are none."""
    if path is None:
        return 0, None
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
    return int(about.get("steps", 0)), float(about.get("skip", 0))


def main(argv=None):
    signal.signal(signal.SIGTERM, signal.default_int_handler)                   # kill is Ctrl-C
    args = build_parser().parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in fields(TeacherConfig) if getattr(args, f.name) is not None}
    cfg = replace(PRESETS[args.preset], **given)
    try:
        if args.plot:
            return report.plot_teacher(args.run, BINS)
        if not args.data:
            raise ValueError("--data is needed: a folder of clips")
        check(cfg, args, int(os.environ.get("WORLD_SIZE", 1)))
        device, _ = pick(args.device, "auto")
        rank, world = join(device)
        model, vae, pools, val = prepare(args, cfg, device, rank, world)
        print(f"{cfg}\nparameters: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M\nchunks of T frames: "
              f"{ {T: len(pool) for T, pool in pools.by_length.items()} }\nvalidation chunks: {len(val)}")
        before, skip = made_by(args.init)                                       # now: after days of training the file may be gone
        if skip not in (None, cfg.skip):
            print(f"note: --init {args.init} was made with --skip {skip:g}: what the network has to say is another thing with {cfg.skip:g}",
                  file=sys.stderr)
        state, losses = train(cfg, model, vae, pools, val, args.run, args.resume, device, rank, world)
        export(args.out or args.weights, model.config, state.ema, cfg, before)
        print(f"steps: {cfg.steps}\nloss: {np.mean(losses[-50:] or [np.nan]):.4f}\nweights: {(args.out or args.weights) / 'teacher.safetensors'}")
    except (OSError, ValueError, KeyError, FloatingPointError, SafetensorError) as error:
        sys.exit(print(f"train_teacher.py: {error}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("train_teacher.py: stopped; --resume goes on from the last checkpoint", file=sys.stderr) or 130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
