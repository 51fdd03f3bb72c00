"""Stage 1: the teacher, a flow-matching model that is given ground-truth continuity.

Paper section 3.4 and Appendix E; Equations 1, 2, 5, 16, 17 and 24.

    python train_teacher.py --data CLIPS [CLIPS ...]        the nano preset -> runs/teacher/weights
    python train_teacher.py --data CLIPS --preset debug     overfit one chunk: does it learn here?
    python train_teacher.py --data CLIPS --resume           continue a killed run, bit for bit
    torchrun --nproc_per_node=8 train_teacher.py --preset wan-1.3b --weights DIR \\
        --init wan.safetensors --data CLIPS                 full size, with FSDP

The VAE and the audio encoder are frozen, so every chunk is encoded once, into a cache. One training
sample (a row of the batch, Eq. 24) is then

    z       latents of a ground-truth chunk
    z_id    identity reference: TRE of another frame of the same clip (Eq. 3)
    kappa   continuity reference kappa_gt: the first m latents of z. The VAE is causal, so these
            *are* the encoding of the last n frames of the chunk before
    audio   audio features of the chunk, zeroed in one row of ten: the unconditional case
    sigma, noise

and the loss is Eq. 5: Eq. 2 on all latents but kappa, plus Eq. 16 and 17 on decoded frames of the
predicted x0. One row of ten is a first chunk, as infer.py begins a video: the reference picture is
the chunk's own first frame, and kappa is that one latent.

Shapes: B batch, T pixel frames, F = 1 + (T-1)/4 latent frames, C channels, H W pixels,
        h w latent grid, L A audio layers and width.
Everything random depends on (seed, step, row) alone: a resumed run, or one on more processes, draws
what the first would.
"""
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

import dit
from audio import load_audio_encoder
from common import (
    PresetOnly,
    TrainState,
    all_reduce_mean,
    bf16_autocast,
    clip_gradients,
    export_weights,
    init_distributed,
    learning_rate_factor,
    load_checkpoint,
    log,
    log_line,
    make_adamw,
    memory_plan,
    one_line_errors,
    parse_args,
    run_folder,
    save_checkpoint,
    save_image,
    say,
    select_device,
    shard,
    trim_log,
)
from data import ClipFolder, collate, encode_clips, to_tensor, to_uint8, training_set_hash
from dit import (
    AudioDiT,
    add_noise,
    load_wan_checkpoint,
    sample_teacher,
    shift_sigma,
    velocity,
    x0_from_velocity,
)
from tre import overwrite_continuity, temporal_reference_encoding
from vae import load_vae

# ------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class Files:
    data: tuple[Path, ...] = ()             # folders of clips, see data.py
    preset: Literal["nano", "debug", "wan-1.3b"] = "nano"   # network and defaults of what follows
    weights: Path = Path("weights/tiny")    # folder with the VAE and the audio encoder
    init: Path | None = None                # start from these weights: ours, or official Wan2.1's
    run_dir: Path = Path("runs/teacher")    # checkpoint, log, samples; chunks: its ../cache
    out: Path | None = None                 # the finished folder of weights [RUN_DIR/weights]
    resume: bool = False                    # continue from the checkpoint in RUN_DIR
    overwrite: bool = False                 # replace the run that RUN_DIR holds
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: a GPU if there is one
    plan_memory: tuple[int, int, int] | None = None     # GPUs, pixels, frames: print memory, end


# PresetOnly: set by the preset, no flag. "not in our copy": the paper gives it, but we wrote from a
# text of the paper that has lost its formulas and most numbers inside sentences.
@dataclass(frozen=True)
class TeacherConfig:
    network: PresetOnly[str] = "nano"       # a preset of dit.py
    steps: int = 3000                       # optimiser steps (paper: 15,000)
    batch: int = 8                          # rows per step (paper: 4, of a GPU or in all)
    micro_batch: int = 8                    # rows per network call; gradients add up
    lr: float = 1e-3                        # peak learning rate of AdamW (paper: not given)
    betas: PresetOnly[tuple[float, float]] = (0.9, 0.99)    # of AdamW (paper: not given)
    weight_decay: float = 0.01              # of AdamW (paper: not given)
    grad_clip: PresetOnly[float] = 1.0      # largest norm of the gradient (paper: not given)
    warmup: PresetOnly[int] = 100           # steps to the peak learning rate (not given)
    decay: PresetOnly[float] = 0.3          # last share of the steps: falls to 0 (not given)
    ema: float = 0.99                       # decay of the exported average (not given)
    timestep_shift: float = 5.0             # of the noise levels; > 1: noisier (paper: not given)
    identity: Literal["tre", "etr"] = "tre"     # identity reference: Eq. 3 or Eq. 29 (Table 3)
    continuity_frames: int = 9              # n = 4k+1 frames of kappa (not in our copy)
    frames: int = 33                        # T = 4k+1, frames of a chunk (paper: 81)
    first_chunk_prob: float = 0.1           # share of rows that begin a video (not given)
    audio_drop_prob: float = 0.1            # share of rows without audio (not given)
    guidance: PresetOnly[float] = 3.0       # in sampling, kept with the weights (not given)
    sample_steps: PresetOnly[int] = 20      # in sampling, kept with the weights (paper: 1,000)
    lambda_temp: float = 0.1                # weight of Eq. 16 in Eq. 5 (not in our copy)
    lambda_face: float = 0.1                # weight of Eq. 17 in Eq. 5 (not in our copy)
    pixel_every: PresetOnly[int] = 4        # steps from one that decodes frames to the next ...
    pixel_rows: PresetOnly[int] = 1         # ... and rows of a call decoded; losses are rescaled
    pixel_window: PresetOnly[int] = 3       # latents decoded per such row, at a random place
    pixel_context: PresetOnly[int] = 2      # latents decoded to their left and thrown away
    offsets: PresetOnly[int] = 2            # times a clip is cut into chunks, each time shifted
    references: PresetOnly[int] = 3         # chunks of a clip whose first frame is a reference too
    encode_bf16: PresetOnly[bool] = False   # encode the cache in bfloat16
    overfit: PresetOnly[int] = 0            # use only so many chunks, also for validation; 0: all
    bf16: bool = True                       # bfloat16 autocast where it is fast (paper: yes)
    checkpointing: PresetOnly[bool] = False     # recompute blocks in the backward pass
    compile: bool = False                   # torch.compile, block by block
    val_every: PresetOnly[int] = 250        # steps from one validation to the next
    val_chunks: PresetOnly[int] = 8         # validation chunks
    save_minutes: PresetOnly[float] = 5.0   # from one checkpoint and sample grid to the next
    seed: int = 0                           # of everything random


PRESETS = {
    "nano": TeacherConfig(),
    "debug": TeacherConfig(
        network="debug", steps=150, batch=2, micro_batch=2, lr=2e-3, warmup=20, ema=0.95,
        timestep_shift=2.0, pixel_every=30, pixel_rows=2, offsets=1,
        references=1, overfit=1, val_every=100, val_chunks=1, save_minutes=1.0),
    "wan-1.3b": TeacherConfig(
        network="wan-1.3b", steps=15000, batch=64, micro_batch=1, lr=1e-5, betas=(0.9, 0.999),
        warmup=500, decay=0.1, ema=0.9999, frames=81, sample_steps=50, checkpointing=True,
        val_every=500, save_minutes=30.0),
}
MAY_CHANGE = ("steps", "ema", "micro_batch", "bf16", "checkpointing", "compile", "val_every",
              "val_chunks", "save_minutes")             # at --resume
VAL_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)                  # noise levels of the validation loss

# ------------------------------------------------------------------------------------------ one row


class ChunkSampler:
    """Draws training chunks. A batch has one length; chunks are equally likely unless weighted."""

    def __init__(self, chunks, weights=None):
        """chunks: list of data.Chunk; weights: one positive number a chunk."""
        weights = np.ones(len(chunks)) if weights is None else np.asarray(weights, float)
        self.pools = {}                                             # T -> [(chunk, weight), ...]
        for chunk, weight in zip(chunks, weights, strict=True):
            self.pools.setdefault(chunk.length, []).append((chunk, weight))
        total = {T: sum(weight for _, weight in pool) for T, pool in self.pools.items()}
        self.lengths = list(self.pools)
        self.length_probs = np.array(list(total.values())) / sum(total.values())
        self.chunk_probs = {T: np.array([w for _, w in pool]) / total[T]
                            for T, pool in self.pools.items()}
        self.data_hash = training_set_hash(chunks, weights)

    def draw(self, cfg, step, row):
        """-> a chunk for row `row` of step `step`, and the generator of its random choices."""
        per_step = np.random.default_rng((cfg.seed, step, 2**32 - 1))   # a row of no batch
        T = self.lengths[per_step.choice(len(self.lengths), p=self.length_probs)]
        rng = np.random.default_rng((cfg.seed, step, row))
        index = rng.choice(len(self.pools[T]), p=self.chunk_probs[T])
        return self.pools[T][index][0], rng


def choose_reference(chunk, is_first, rng):
    """-> chunk, number of its reference picture. A first chunk begins with its reference picture;
    any other has one from outside the chunk, unless there is none."""
    if is_first:
        row = chunk.row % (len(chunk.pictures) - 1)                 # pictures[-1] begins no chunk
        return replace(chunk, row=row, start=chunk.pictures[row]), row
    inside = range(chunk.start, chunk.start + chunk.length)
    outside = [j for j, frame in enumerate(chunk.pictures) if frame not in inside]
    return chunk, int(rng.choice(outside or len(chunk.pictures)))


def make_row(chunk, cfg, rng, is_first, drop_audio, sigma):
    """Eq. 24, encoded: one training sample, without a batch axis.

    latents, identity, noise (C, F, h, w); kappa (C, m, h, w); audio (T, L, A); sigma ();
    loss_weight (F, 1, 1), 0 at kappa and 1 elsewhere (tiny/ gives regions more); pixel_window (2,):
    first latent and number of latents that Eq. 16 and 17 would see."""
    chunk, picture = choose_reference(chunk, is_first, rng)
    m = 1 + (cfg.continuity_frames - 1) // 4
    latents = chunk.tensor("latents", chunk.row)                    # (C, F, h, w)
    identity = chunk.tensor("identity", picture)                    # (C, F, h, w), Eq. 3
    if cfg.identity == "etr":
        identity = identity[:, :1].expand_as(identity)              # Eq. 29: z_id's first latent
    audio = chunk.tensor("audio", chunk.row)                        # (T, L, A)
    F = latents.shape[1]
    given = 1 if is_first else m                                    # latents that are not generated
    loss_weight = (torch.arange(F) >= given).float()[:, None, None]     # (F, 1, 1)
    noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
    return {
        "latents": latents,
        "identity": identity,
        "kappa": latents[:, :m],                                    # kappa_gt, section 3.4
        "audio": torch.zeros_like(audio) if drop_audio else audio,
        "sigma": torch.tensor(sigma, dtype=torch.float32),
        "noise": noise,
        "loss_weight": loss_weight,
        "pixel_window": draw_pixel_window(given, F, cfg.pixel_window, rng),
        "chunk": chunk,
    }


def draw_pixel_window(given, F, length, rng):
    """A window of latents for Eq. 16 and 17 -> (2,): first latent, number of latents.

    It may begin before the first generated latent or end after the last, and is cut there, so that
    every generated latent is equally likely to be seen; pixel_losses weighs it by what is left."""
    start = int(rng.integers(given - length + 1, F))
    first = max(given, start)
    return torch.tensor([first, min(F, start + length) - first])


def draw_row(sampler, cfg, step, row, make_row=make_row):
    """Row `row` of step `step`."""
    chunk, rng = sampler.draw(cfg, step, row)
    is_first = rng.random() < cfg.first_chunk_prob
    drop_audio = rng.random() < cfg.audio_drop_prob
    sigma = shift_sigma(rng.random(), cfg.timestep_shift)
    return make_row(chunk, cfg, rng, is_first, drop_audio, sigma)


def make_batch(sampler, cfg, step, rows, device):
    """Rows `rows` (a range) of step `step`, stacked: every tensor gets a batch axis."""
    return collate([draw_row(sampler, cfg, step, row) for row in rows], device)

# --------------------------------------------------------------------------------------------- loss


def flow_matching_loss(v, x0, eps, weight):
    """Eq. 2 -> (B,), a weighted mean of squares.

    v, x0, eps (B, C, F, h, w); weight (B, 1, F, h, w), zero at the continuity latents."""
    error = (v - velocity(x0, eps)).square().mean(1, keepdim=True)          # (B, 1, F, h, w)
    return (error * weight).sum((1, 2, 3, 4)) / weight.sum((1, 2, 3, 4))


def temporal_gradient_loss(generated, truth):
    """Eq. 16: how frames change, not what they are. Videos (B, 3, T, H, W), T > 1 -> (B,)."""
    return (generated.diff(dim=2) - truth.diff(dim=2)).abs().mean((1, 2, 3, 4))


def face_loss(generated, truth, mask):
    """Eq. 17: only the face counts. Videos (B, 3, T, H, W), mask (B, 1, T, H, W) 0..1 -> (B,)."""
    error = (mask * (generated - truth).abs()).sum((1, 2, 3, 4))
    return error / (3 * mask.sum((1, 2, 3, 4)) + 1e-6)


def teacher_loss(model, vae, batch, cfg, with_pixels):
    """Eq. 5: L_FM + lambda_temp L_temp + lambda_face L_face -> (B,), and its parts, (B,) each."""
    x0, eps, sigma = batch["latents"], batch["noise"], batch["sigma"]
    weight = batch["loss_weight"].unsqueeze(1).expand_as(x0[:, :1])         # (B, 1, F, h, w)
    generated = weight > 0                                                  # False at kappa
    # PAPER Eq. 1 and section 3.2: noised latents, overwritten by the clean kappa_gt
    x = torch.where(generated, add_noise(x0, eps, sigma), overwrite_continuity(x0, batch["kappa"]))
    v = model(x, 1000 * sigma, batch["identity"], batch["audio"])           # (B, C, F, h, w)
    parts = {"flow": flow_matching_loss(v, x0, eps, weight)}                # Eq. 2
    loss = parts["flow"]
    if with_pixels:                                                         # PAPER Eq. 16 and 17
        x0_pred = torch.where(generated, x0_from_velocity(x, v, sigma), x0)
        parts["temporal"], parts["face"] = pixel_losses(vae, x0_pred, batch, cfg)
        every = cfg.pixel_every                                             # Eq. 5 on average
        loss = loss + every * cfg.lambda_temp * parts["temporal"]
        loss = loss + every * cfg.lambda_face * parts["face"]
    return loss, parts


def pixel_losses(vae, x0_pred, batch, cfg):
    """Eq. 16 and 17 of x0_pred (B, C, F, h, w) -> two (B,).

    A decode with gradient costs more than the network. So only the first cfg.pixel_rows rows are
    decoded, a window of each. Rows and windows are random; the weight keeps the mean over them."""
    B, _, F = x0_pred.shape[:3]
    rows = min(cfg.pixel_rows, B)
    temporal, face = x0_pred.new_zeros(B), x0_pred.new_zeros(B)
    for i in range(rows):
        chunk = batch["chunk"][i]
        first, count = batch["pixel_window"][i].tolist()
        begin = chunk.start + 4 * first - 3                         # latent f is frames 4f-3 .. 4f
        frames = slice(begin - 1, begin + 4 * count)                # and the frame before: the seam
        truth = to_tensor(chunk.clip.frames[frames]).to(x0_pred)    # (1, 3, 4 count + 1, H, W)
        mask = face_mask_at_full_size(chunk.clip.mask[frames]).to(x0_pred)
        generated = decode_window(vae, x0_pred[i:i + 1], first, count, cfg.pixel_context).float()
        free = int((batch["loss_weight"][i].amax((1, 2)) > 0).sum())    # latents that are generated
        windows = free + cfg.pixel_window - 1                       # that can be drawn
        weight = B / rows * count / cfg.pixel_window * windows / free
        temporal[i] = temporal_gradient_loss(generated, truth)[0] * weight      # 4 count changes
        face[i] = face_loss(generated[:, :, 1:], truth[:, :, 1:], mask[:, :, 1:])[0] * weight
    return temporal, face


def face_mask_at_full_size(mask):
    """uint8 (T, H/4, W/4) -> (1, 1, T, H, W) in 0..1"""
    return torch.from_numpy(np.array(mask).repeat(4, 1).repeat(4, 2))[None, None] / 255


def decode_window(vae, latents, first, count, context):
    """Frames of latents [first, first + count), first >= 1, and one before -> (B, 3, 4 count + 1,
    H, W), approximately.

    latents (B, C, F, h, w). The decoder looks back only, so `context` >= 1 latents to the left are
    decoded along, instead of all."""
    begin = max(0, first - context)
    return vae.decode(latents[:, :, begin:first + count])[:, :, -4 * count - 1:]

# --------------------------------------------------------------------------------------------- loop


@torch.no_grad()
def validate(model, chunks, cfg, device):
    """Eq. 2 on fixed chunks with fixed noise at fixed noise levels -> {sigma: loss}.

    Only these curves can be compared between steps."""
    losses = dict.fromkeys(VAL_SIGMAS, 0.0)
    for i, chunk in enumerate(chunks):
        for sigma in VAL_SIGMAS:
            row = make_row(chunk, cfg, np.random.default_rng((1, i)), False, False, sigma)
            loss, _ = teacher_loss(model, None, collate([row], device), cfg, with_pixels=False)
            losses[sigma] += loss.item() / len(chunks)
    return {str(sigma): round(loss, 5) for sigma, loss in losses.items()}


@torch.no_grad()
def sample_grid(model, vae, chunks, cfg, device, path):
    """A picture: truth above sample for four validation chunks, eight moments each."""
    lines = []
    for i, chunk in enumerate(chunks[::max(1, len(chunks) // 4)][:4]):
        row = make_row(chunk, cfg, np.random.default_rng((2, i)), is_first=True, drop_audio=False,
                       sigma=1.0)                                   # begun as infer.py begins
        row = collate([row], device)
        z = sample_teacher(model, row["noise"], row["identity"], row["audio"],
                           row["identity"][:, :, :1], cfg.sample_steps, cfg.timestep_shift,
                           cfg.guidance)
        start = row["chunk"][0].start
        truth = to_tensor(chunk.clip.frames[start:start + chunk.length])
        moments = np.linspace(0, chunk.length - 1, 8).astype(int)
        for video in (truth, vae.decode(z).float().cpu()):
            frames = to_uint8(video[0][:, moments])                 # (8, H, W, 3)
            lines.append(np.concatenate(list(frames), 1))
    if path:                                                        # None: another process saves it
        save_image(path, Image.fromarray(np.concatenate(lines)))


def train(cfg, model, vae, sampler, val, run, resume=False, device="cpu", rank=0, world=1,
          make_batch=make_batch, make_optimizer=make_adamw, extra=None):
    """The loop -> TrainState, list of the losses of its steps.

    model: AudioDiT on its device (sharded if world > 1); val: list of Chunk. make_batch and
    make_optimizer are where tiny/teacher.py puts its own; extra {name: tensor} joins the
    checkpoint."""
    # PLUMBING
    run.mkdir(parents=True, exist_ok=True)
    model.gradient_checkpointing = cfg.checkpointing
    if cfg.compile:
        for block in model.blocks:
            block.compile(dynamic=False)
    state = TrainState({"model": model}, {"model": cfg.lr}, "model", cfg, make_optimizer, extra)
    checkpoint = run / "checkpoint.safetensors"
    start = 0
    if resume and checkpoint.exists():
        start = load_checkpoint(checkpoint, state.tensors, cfg, MAY_CHANGE, data=sampler.data_hash)
    if rank == 0:
        trim_log(run / "log.jsonl", start)
    autocast = bf16_autocast(device, cfg.bf16)
    losses = []
    began = clock = last_save = time.time()
    steps = range(start, cfg.steps + 1)
    for step in tqdm(steps, initial=start, total=cfg.steps, disable=None if rank == 0 else True):
        record = {"step": step}
        is_last = step == cfg.steps

        # EVALUATE
        if step % cfg.val_every == 0 or is_last:
            with state.ema_weights(), autocast:
                record["val"] = validate(model, val, cfg, device)

        # SAVE AND SAMPLE
        age = torch.tensor(time.time() - last_save, device=device)
        if all_reduce_mean([age])[0] > 60 * cfg.save_minutes or is_last:    # alike on all processes
            save_checkpoint(checkpoint, state.tensors, step, cfg, data=sampler.data_hash)
            path = run / "samples.png" if rank == 0 else None
            with state.ema_weights(), autocast:
                sample_grid(model, vae, val, cfg, device, path)
            last_save = time.time()

        # TRAIN
        if not is_last:
            record["lr"] = cfg.lr * learning_rate_factor(step, cfg)
            state.optimizers["model"].param_groups[0]["lr"] = record["lr"]
            record |= train_step(state, vae, sampler, cfg, step, autocast, run, device, rank, world,
                                 make_batch)
            state.update_ema(cfg.ema, step)
            losses.append(record["loss"])

        # LOG
        if rank == 0:
            record["seconds"] = round(time.time() - clock, 3)
            clock = time.time()
            log(run / "log.jsonl", record)
            if "val" in record or step % 50 == 0:
                tqdm.write(log_line(record, cfg.steps, cfg.batch, step + 1 - start, began))
    return state, losses


def train_step(state, vae, sampler, cfg, step, autocast, run, device, rank, world, make_batch):
    """One optimiser step: this process's rows, in calls of cfg.micro_batch -> numbers to log."""
    model = state.averaged
    wanted = cfg.lambda_temp > 0 or cfg.lambda_face > 0
    with_pixels = wanted and step % cfg.pixel_every == 0
    calls = cfg.batch // (cfg.micro_batch * world)
    parts, names = {}, []
    state.optimizers["model"].zero_grad(set_to_none=True)
    for call in range(calls):
        first = (call * world + rank) * cfg.micro_batch
        batch = make_batch(sampler, cfg, step, range(first, first + cfg.micro_batch), device)
        names += [chunk.name for chunk in batch["chunk"]]
        with autocast:
            loss, new = teacher_loss(model, vae, batch, cfg, with_pixels)
        (loss.mean() / calls).backward()
        for k, v in ({"loss": loss} | new).items():
            parts[k] = parts.get(k, 0) + v.detach().mean() / calls
    norm = clip_gradients(model, cfg.grad_clip)
    parts = dict(zip(parts, all_reduce_mean(parts.values())))
    if not np.isfinite(parts["loss"] + norm):                       # before the weights are touched
        raise FloatingPointError(
            f"loss {parts['loss']}, gradient norm {norm} at step {step}, in the chunks "
            f"{', '.join(names)} (of process {rank}); the weights were not changed, the last "
            f"checkpoint is in {run}")
    state.optimizers["model"].step()
    loss = parts.pop("loss")
    rounded = {k: round(v, 6) for k, v in parts.items()}
    return rounded | {"loss": loss, "norm": round(norm, 4)}

# --------------------------------------------------------------------------------------------- main


def check(cfg, world):
    """ValueError, in one line, for options that make no sense together."""
    T, n = cfg.frames, cfg.continuity_frames
    if T % 4 != 1 or n % 4 != 1 or not 1 <= n < T - 3:
        raise ValueError(f"--frames {T} and --continuity-frames {n} must be 4k + 1 and leave "
                         "latents to generate")
    if cfg.steps < 1:
        raise ValueError(f"--steps {cfg.steps} must be 1 or more")
    if min(cfg.batch, cfg.micro_batch) < 1 or cfg.batch % (cfg.micro_batch * world):
        raise ValueError(f"--batch {cfg.batch} is not a multiple of --micro-batch "
                         f"{cfg.micro_batch} x {world} processes")
    for name in ("first_chunk_prob", "audio_drop_prob", "ema"):
        if not 0 <= getattr(cfg, name) <= 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(cfg, name)} must be between 0 and 1")
    for name in ("lr", "weight_decay", "lambda_temp", "lambda_face", "timestep_shift"):
        if not 0 <= getattr(cfg, name) < np.inf:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(cfg, name)} must be 0 or more, and finite")


def load_frozen(weights, device):
    """A folder of weights -> its config.json, VAE, audio encoder."""
    path = weights / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    missing = {"size", "audio", "vae"} - config.keys()
    if missing:
        raise ValueError(f"{path} lacks {' and '.join(sorted(missing))}")
    encoder = load_audio_encoder(weights, config["audio"], device, config.get("audio_window"))
    return config, load_vae(weights, device), encoder


def load_init(model, path):
    """Weights to start from: our own by their names, official Wan2.1's otherwise."""
    tensors = load_file(path)
    try:
        if "audio_proj.norm.weight" in tensors:
            model.load_state_dict(tensors)
        else:
            print(load_wan_checkpoint(model, tensors))
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--init {path} is another network: {reason}") from None


def find_chunks(files, cfg, size, vae, encoder, device, rank, world):
    """Folders of clips -> training chunks, validation chunks; encoded now if they are new."""
    def encode(clips):
        return encode_clips(clips, vae, encoder, temporal_reference_encoding,
                            files.run_dir.parent / "cache", cfg, device, rank, world)

    if cfg.overfit:
        chunks = encode(ClipFolder(files.data, size, "all").clips[:cfg.overfit])[:cfg.overfit]
        return chunks, chunks
    chunks = encode(ClipFolder(files.data, size, "train").clips)
    held_out = ClipFolder(files.data, size, "val").clips
    spread_out = held_out[::-(-len(held_out) // cfg.val_chunks)]
    val = [chunk for chunk in encode(spread_out) if chunk.row == 0]
    return chunks, val


def export(files, config, model, ema, cfg, **more):
    """RUN_DIR/weights, or --out: a folder with all that infer.py needs."""
    kept = {key: config[key] for key in ("size", "audio", "audio_window", "vae") if key in config}
    sampling = {"steps": cfg.sample_steps, "timestep_shift": cfg.timestep_shift,
                "guidance": cfg.guidance}
    new = {"frames": cfg.frames, "continuity_frames": cfg.continuity_frames,
           "identity": cfg.identity, "dit": asdict(model.config), "teacher": sampling}
    out = files.out or files.run_dir / "weights"
    export_weights(files.weights, out, "teacher", ema, cfg, kept | new | more, leave=["student*"])
    return out


def run(files, cfg):
    """Load, train, export, report."""
    device, _ = select_device(files.device)
    rank, world = init_distributed(device)
    config, vae, encoder = load_frozen(files.weights, device)
    torch.manual_seed(cfg.seed)                     # the same first weights on every process
    network = replace(dit.PRESETS[cfg.network], channels=vae.config.z_dim,
                      audio_layers=encoder.layers, audio_dim=encoder.dim)
    model = AudioDiT(network)
    if files.init:
        load_init(model, files.init)
    chunks, val = find_chunks(files, cfg, config["size"], vae, encoder, device, rank, world)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{cfg}\nparameters: {millions:.1f} M\nchunks: {len(chunks)} to train on, "
          f"{len(val)} for validation")
    model = shard(model.to(device), device, world)
    state, losses = train(cfg, model, vae, ChunkSampler(chunks), val, files.run_dir,
                          files.resume, device, rank, world)
    out = export(files, config, model, state.ema, cfg)
    loss = np.mean(losses[-50:] or [np.nan])
    say(f"steps: {cfg.steps}\nloss: {loss:.4f}\nweights: {out / 'teacher.safetensors'}")


def main(argv=None):
    files, cfg = parse_args(__doc__, Files, PRESETS, argv)
    stopped = "stopped; --resume continues from the last checkpoint"
    with one_line_errors("train_teacher.py", stopped):
        check(cfg, int(os.environ.get("WORLD_SIZE", 1)))
        if files.plan_memory:                           # looks at no file, touches no run
            with torch.device("meta"):
                model = AudioDiT(dit.PRESETS[cfg.network])
            per_parameter = 20                          # weight, gradient, two moments, EMA: 4 each
            print(memory_plan(model, per_parameter, cfg, *files.plan_memory))
            return
        if not files.data:
            raise ValueError("--data is missing: one or more folders of clips")
        with run_folder(files):
            run(files, cfg)


if __name__ == "__main__":
    main()
