"""Stage 2: the student, Asymmetric Knowledge Distillation (AKD). Paper section 3.4 and Appendix C, Eq. 6-15.

    python distill_student.py --data CLIPS [CLIPS ...]             runs/student (checkpoint, log, strip.png) -> weights/tiny/student.safetensors
    python distill_student.py --data CLIPS --preset debug          one film by heart, two minutes on two cores: does everything still learn?
    python distill_student.py --data CLIPS --resume                goes on where a killed run was last saved, bit for bit
    python distill_student.py --plot                               runs/student/log.jsonl -> runs/student/curves.png
    python distill_student.py --data CLIPS --teacher-sees gen      Table 4, symmetric-gen; --student-sees gt instead: symmetric-gt
    python distill_student.py --data CLIPS --no-distill            no AKD: the teacher, as it is, in the student's 4 steps
    torchrun --nproc_per_node=8 distill_student.py --preset wan-1.3b --weights DIR --data CLIPS                           (FSDP)

Three networks, all of them the teacher at first, look at the same chunk:
    student   makes it in 4 steps from noise, after its *own* last frames (kappa_gen), as in use      Eq. 9, trained by Eq. 8
    critic    tells the score of what the student makes after such frames                             trained by Eq. 15, --ratio times as often
    teacher   tells the score of true chunks after the *true* frames before (kappa_gt)                frozen
The student moves by the difference of the two scores (Eq. 13). From a face that has drifted, that leads back to where the true film goes on.

Each row of a batch is a film in the making: a clip's portrait and sound, and the student's frames so far. A step makes the next chunk of each
and teaches with it; after K chunks the film starts again, cold, as infer.py starts. So kappa_gen costs one decode, not a new roll-out.
Shapes: B batch, T pixel frames, F = 1 + (T-1)/4 latent frames, C channels, H W pixels, h w latent grid, S the student's steps.
Everything random is drawn from (seed, step, row): a resumed run, or one on more processes, draws what the first one would."""
import argparse
import copy
import inspect
import json
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import infer
import report
from checkpoint import gather, join, load_checkpoint, log, mean, save_checkpoint, save_picture, shard, swap, trim_log, write_safetensors
from chunks import Streams, chunks_left, encode_clips, one_per_folder, pixels
from data import ClipFolder
from dit import add_noise, guided_velocity, score_from_velocity, student_sigmas, velocity, x0_from_velocity
from muon import Muon
from tre import IDENTITY, continuity_reference

# ---------------------------------------------------------------------------------------------------------------- config

@dataclass(frozen=True)
class StudentConfig:
    steps: int = 160                # critic updates; the student has one for every `ratio` of them (paper: 1,600, of which is not said)
    ratio: int = 2                  # critic updates for one of the student (paper: not given; Self-Forcing and FlashHead: 5)
    batch: int = 4                  # films in the making, over all processes; a step makes one chunk of each (paper: 4)
    micro: int = 4                  # chunks a network call of one process; gradients add up over the calls of a step
    rollout: int = 12               # K, chunks until a film starts again (paper: not given; FlashHead: 5)
    denoise: int = 4                # S, the student's steps from noise to a chunk (paper: 4)
    follow: int = 0                 # of them, how many after the first start from the noised truth, in training only; ours; 0 = the paper
    sample_shift: float = 5.0       # of the student's noise levels: 5, Wan's, is 1, 0.94, 0.83, 0.63; 2 is 1, 0.86, 0.67, 0.4 (paper: not given)
    optimizer: str = "muon"         # "muon" (muon.py), whose steps on matrices are ten times lr, or "adamw", as the paper
    lr: float = 1e-4                # learning rate of the student; full size: 2e-6, as Self-Forcing (paper: not given)
    lr_critic: float = 3e-4         # and of the critic; full size: 4e-7
    warmup: int = 10                # steps until they are reached
    decay: float = 0.5              # share of the steps, at the end, in which both fall to zero
    ema: float = 0.95               # memory of the student's averaged weights, which are the ones shipped
    shift: float = 5.0              # of the noise levels at which critic and teacher are asked; > 1 asks more in noise
    guidance: float = 2.0           # audio guidance of the teacher's score, 1 = none (paper: not given; Self-Forcing counts one less and has 3)
    guidance_focus: float = 0.0     # how narrowly it guides where the sound is heard (dit.guided_velocity), 0 = everywhere; ours; 0 = the paper
    liveliness: float = 1.0         # factor on all else that differs from the portrait, in noise; ours; 1 = the paper
    teacher_sees: str = "gt"        # continuity reference of the teacher: gt, gen
    student_sees: str = "gen"       # continuity reference of student and critic: gt, gen
    identity: str = "tre"           # identity reference, the teacher's: tre (Eq. 3), etr (Eq. 29)
    distill: bool = True            # --no-distill: no step is made, the student is the teacher
    lambda_reg: float = 10.0        # weight of the anchor in Eq. 8 (paper: lost)
    delta: float = 1.0              # of the anchor's Huber loss, in normalised latents: squares below, distances above (paper: lost)
    anchor_from: int = 1            # first of the student's steps that is anchored; the earlier can only guess a blur; ours; 0 = the paper
    head: int = 3                   # m, continuity latents = 4 m - 3 frames (paper: lost)
    tail: int = 0                   # latents decoded for those frames; 0 = all, as infer.py; 10 of 21 move kappa by 1 in 3,000, 5 of 9 by 1 in 6
    frames: int = 33                # of a chunk; full size: 81
    offsets: int = 1                # times a clip is cut into chunks, each time from a later frame on
    references: int = 1             # chunks of a clip that a film can start with: those whose first frame is a reference picture
    encode_bf16: bool = True        # the chunks were encoded in bfloat16
    films: int = 0                  # use so many clips only; 0 = all
    bf16: bool = True               # bfloat16 autocast, and a bfloat16 decoder, as in infer.py
    checkpointing: bool = False     # recompute the blocks in the backward pass: less memory, a third slower
    compile: bool = False           # torch.compile, block by block
    every: int = 40                 # steps from one validation, with its strip of samples, to the next
    minutes: float = 10.0           # from one checkpoint to the next
    val: int = 4                    # validation films; those too short for --rollout chunks are left out if others are not
    seed: int = 0                   # of everything random


PRESETS = {"tiny": StudentConfig(steps=140, rollout=28, follow=2, sample_shift=2.0, guidance=3.0, guidance_focus=16.0, liveliness=1.5,
                                 lambda_reg=4.0),
           "debug": StudentConfig(steps=40, ratio=1, batch=2, micro=2, rollout=2, tail=5, optimizer="adamw", lr=3e-4, lr_critic=6e-4,
                                  warmup=5, decay=0.0, ema=0.9, guidance=1.0, lambda_reg=1.0, anchor_from=0, films=1, encode_bf16=False, every=20,
                                  minutes=1.0, val=1),
           "wan-1.3b": StudentConfig(steps=1600, ratio=5, batch=64, micro=1, rollout=5, optimizer="adamw", lr=2e-6, lr_critic=4e-7,
                                     warmup=20, decay=0.0, ema=0.99, guidance=4.0, lambda_reg=0.1, anchor_from=0, frames=81, offsets=2,
                                     references=3, encode_bf16=False, checkpointing=True, every=100, minutes=30.0)}
CHOICES = {"teacher_sees": ("gt", "gen"), "student_sees": ("gt", "gen"), "identity": tuple(IDENTITY)}
FREE = ("steps", "lr", "lr_critic", "minutes", "every", "val", "micro", "checkpointing", "compile")          # may change in --resume

# ------------------------------------------------------------------------------------------------------------- equations

def masked_mean(x, predicted):
    """Mean of x (B, C, F, h, w) over the latents where predicted (B, 1, F, 1, 1) is 1, those that are not kappa -> (B,)."""
    weight = predicted.expand_as(x)
    return (x * weight).sum((1, 2, 3, 4)) / weight.sum((1, 2, 3, 4))


def dmd_gradient(x0, x, v_real, v_fake, sigma, predicted):
    """Eq. 13, w(t) (s_fake - s_real): the student's x0 descends along it, to the teacher and away from the critic. -> (B, C, F, h, w)

    x (B, C, F, h, w) is x0 with noise sigma (B,), the velocities are what teacher and critic say of it. The scores are Eq. 12's. The weight
    w(t) = t^2 / (1 - t) / mean |x0 - x0_real| makes of them x0_fake - x0_real in units of the teacher's correction, row by row."""
    correction = masked_mean((x0 - x0_from_velocity(x, v_real, sigma)).abs(), predicted)           # (B,)
    weight = sigma ** 2 / (1 - sigma) / correction.clamp(min=1e-6)
    difference = score_from_velocity(x, v_fake, sigma) - score_from_velocity(x, v_real, sigma)
    return predicted * weight[:, None, None, None, None] * difference


def anchor_loss(x0, truth, delta, predicted):
    """Eq. 7: Huber's distance to the true latents; e^2 / 2 up to delta, delta (|e| - delta / 2) beyond. -> (B,)"""
    return masked_mean(torch.nn.functional.huber_loss(x0, truth, reduction="none", delta=delta), predicted)


def ask(model, x, sigma, batch, who, audio=None):
    """Velocity at x, sigma (B,), with the continuity reference of `who` ("teacher", "student") laid over the head, section 3.2."""
    x = torch.where(batch["predicted"] > 0, x, batch[who])
    return model(x, 1000 * sigma, batch["identity"], batch["audio"] if audio is None else audio)


@torch.no_grad()
def rollout(student, batch, sigmas, follow=0):
    """Section 3.4: the student's steps as in dit.sample_student, but every row has its own kappa and its own fresh noise.

    follow: so many steps after the first are given the noised truth instead of the last answer (training only). That leaves the head where
    the true film has it, so that anchor and teacher ask for a face at its place. The price: in use the student meets its own answers only.
    -> what it was given and what it answered at every step, (B, S, C, F, h, w) each; the last answer is the chunk."""
    x, given, answers = batch["noise"][:, 0], [], []
    for step, sigma in enumerate(sigmas):
        v = ask(student, x, torch.full((len(x),), sigma, device=x.device), batch, "student")
        x0 = torch.where(batch["predicted"] > 0, x0_from_velocity(x, v, sigma), batch["student"])
        given, answers = [*given, x], [*answers, x0]
        basis = batch["latents"] if step < follow else x0
        x = add_noise(basis, batch["noise"][:, step + 1], sigmas[step + 1]) if step + 1 < len(sigmas) else None
    return torch.stack(given, 1), torch.stack(answers, 1)


def student_loss(student, critic, teacher, batch, cfg):
    """Eq. 8: L_DMD + lambda_reg L_reg -> (B,), and what to log, (B,) each. Only its gradient means anything: L_DMD is never computed.

    The student answers once more at its exit step, this time with gradient. What came before is input: nothing flows into earlier steps."""
    predicted, sigma = batch["predicted"], batch["sigma"][:, 0]
    v = ask(student, batch["given"], batch["exit_sigma"], batch, "student")
    x0 = x0_from_velocity(batch["given"], v, batch["exit_sigma"])                                  # Eq. 9
    with torch.no_grad():
        x = add_noise(x0, batch["noise"][:, -2], sigma)                                            # Eq. 11
        v_fake, v_real = ask(critic, x, sigma, batch, "student"), ask(teacher, x, sigma, batch, "teacher")
        if cfg.guidance != 1:
            v_deaf = ask(teacher, x, sigma, batch, "teacher", torch.zeros_like(batch["audio"]))
            guidance = cfg.guidance, cfg.guidance_focus, cfg.liveliness
            v_real = guided_velocity(v_real, v_deaf, x, sigma, batch["identity"], predicted, *guidance)
        g = dmd_gradient(x0, x, v_real, v_fake, sigma, predicted)                                  # Eq. 12, 13
        on = (batch["exit"] >= cfg.anchor_from).float()                                            # (B,), 0: these rows have no anchor
        pull = cfg.lambda_reg * (x0 - batch["latents"]).clamp(-cfg.delta, cfg.delta)               # the gradient of lambda_reg L_reg
        rms = {"dmd": masked_mean(g.square(), predicted).sqrt(), "pull": on * masked_mean(pull.square(), predicted).sqrt()}
    anchor = on * anchor_loss(x0, batch["latents"], cfg.delta, predicted)
    return masked_mean(g * x0, predicted) + cfg.lambda_reg * anchor, {"anchor": anchor} | rms      # d(g x0) = g


def critic_loss(critic, x0, batch):
    """Eq. 15: the critic learns the student's chunks x0 (B, C, F, h, w) as the teacher learnt true ones -> (B,)."""
    x0, eps, sigma = x0.detach(), batch["noise"][:, -1], batch["sigma"][:, 1]
    v = ask(critic, add_noise(x0, eps, sigma), sigma, batch, "student")                            # Eq. 14
    return masked_mean((v - velocity(x0, eps)).square(), batch["predicted"])


@torch.no_grad()
def self_generated(vae, z, cfg):
    """kappa_gen of the chunk after z (B, C, F, h, w), as in infer.py: decoded, and the last n frames encoded anew -> (B, C, m, h, w)."""
    return continuity_reference(vae, vae.decode(z[:, :, -cfg.tail:]), 4 * cfg.head - 3)

# ------------------------------------------------------------------------------------------------------------ checkpoint

class State:
    """Student and its average, critic, two optimisers, streams: all tensors under names, for one process or FSDP's shards alike."""

    def __init__(self, student, critic, streams, cfg):
        self.nets, self.streams, self.opt = {"student": student, "critic": critic}, streams, {}
        self.ema = {k: p.detach().clone() for k, p in student.named_parameters()}
        self.tensors = {"streams.place": streams.place, "streams.kappa": streams.kappa} | {f"ema.{k}": v for k, v in self.ema.items()}
        for who, lr in (("student", cfg.lr), ("critic", cfg.lr_critic)):
            named = dict(self.nets[who].named_parameters())
            prefix = "blocks." if cfg.optimizer == "muon" else None
            opt = self.opt[who] = Muon(named, lr, prefix, betas=(0.0, 0.999), weight_decay=0.01)
            self.tensors |= {f"{who}.{k}": p.detach() for k, p in named.items()}
            self.tensors |= {f"{who}.optimizer.{key}.{k}": v for k, p in named.items() for key, v in opt.state[p].items()}


def export(weights, out, ema, cfg, skip):
    """OUT/student.safetensors (float16). OUT, if not WEIGHTS itself, gets a copy of its other files, so that infer.py can use it."""
    if tensors := gather(ema, torch.float16):
        if out.resolve() != weights.resolve():
            shutil.copytree(weights, out, ignore=shutil.ignore_patterns("student*", "*.part"), dirs_exist_ok=True)
        about = {"class": "AudioDiT", "trained": "yes", "steps": str(cfg.steps * cfg.distill), "identity": cfg.identity, "skip": str(skip),
                 "config": json.dumps(asdict(cfg))}
        write_safetensors(out / "student.safetensors", tensors, about)

# ----------------------------------------------------------------------------------------------------------------- train

@torch.no_grad()
def validate(student, vae, films, cfg, autocast, device, path):
    """Fixed films with fixed noise, in use's conditions -> what must stay level over the chunks of a film; a picture of them at `path`.

    By chunk, error: mean |student - truth| of the latents; colour: mean over channels of |mean colour - the portrait's|, in 1/255.
    seam: mean frame difference across a border over that inside chunks; 1 is invisible."""
    pool = Streams([films], [1.0], replace(cfg, seed=1, batch=len(films), micro=len(films), student_sees="gen"), device)
    pool.place[:, 0] = torch.arange(len(films))
    error, colour, border, inside, strip, n = [], [], [], [], [], 4 * cfg.head - 3
    last = portrait = None
    for age in range(min(cfg.rollout, *(chunks_left(film, cfg) for film in films))):
        pool.place[:, 1] = age
        batch = pool.batch(range(len(films)), age)
        with autocast:
            z = rollout(student, batch, student_sigmas(cfg.denoise, cfg.sample_shift))[1][:, -1]
        video = vae.decode(z)                                                   # (B, 3, T, H, W)
        pool.kappa.copy_(continuity_reference(vae, video, n))
        begin = age * (cfg.frames - n)
        truth = torch.cat([pixels(film.clip.frames[film.start + begin:][:cfg.frames]) for film in films])          # (B, 3, T, H, W)
        portrait = truth[:, :, 0].to(device) if age == 0 else portrait          # (B, 3, H, W)
        error.append(masked_mean((z - batch["latents"]).abs(), batch["predicted"]).mean().item())
        colour.append(127.5 * (video[:, :, n:].mean((2, 3, 4)) - portrait.mean((2, 3))).abs().mean().item())
        inside.append(video[:, :, n:].diff(dim=2).abs().mean().item())
        border += [(video[:, :, n] - last).abs().mean().item()] if age else []
        last = video[:, :, -1]                                                  # (B, 3, H, W)
        strip += [torch.stack([truth, video.cpu()], 1)[:, :, :, [cfg.frames // 2, -1]]]             # (B, 2, 3, 2, H, W)
    if path:                                                                    # None: another process writes it
        image = torch.cat(strip, 3).permute(2, 0, 1, 4, 3, 5).flatten(4).flatten(1, 3)             # (3, B 2 H, 2 K W): truth, student, truth, ...
        save_picture(path, Image.fromarray(infer.to_uint8(image[:, None])[0]))
    return {"error": np.round(error, 4).tolist(), "colour": np.round(colour, 4).tolist(), "seam": round(float(np.mean(border) / np.mean(inside)), 4)}


def rise_and_fall(step, cfg):
    """Both learning rates in parts of their peaks: up, level, and down to zero if cfg.decay > 0."""
    return min(1, (step + 1) / cfg.warmup, (1 - step / cfg.steps) / max(cfg.decay, 1e-9))


def students_turn(step, cfg):
    """One step of every `ratio`, but not always the same one: films restart at a fixed rhythm, and each must be met at every age."""
    block, place = divmod(step, cfg.ratio)
    return place == np.random.default_rng((cfg.seed, block)).integers(cfg.ratio)


def train(cfg, state, teacher, vae, val, run, resume=False, device="cpu", rank=0, world=1):
    """The loop. state: networks on their device (sharded if world > 1) and streams; val: list of Chunk -> list of the critic's losses."""
    run.mkdir(parents=True, exist_ok=True)
    for net in (*state.nets.values(), teacher):
        net.gradient_checkpointing = cfg.checkpointing
        for block in net.blocks if cfg.compile else ():
            block.compile(dynamic=False)
    checkpoint, steps = run / "checkpoint.safetensors", cfg.steps * cfg.distill
    start = load_checkpoint(checkpoint, state.tensors, cfg, FREE, data=state.streams.data) if resume and checkpoint.exists() else 0
    if rank == 0:
        trim_log(run / "log.jsonl", start)
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=cfg.bf16)
    losses, began, clock, last_save = [], *[time.time()] * 3
    for step in tqdm(range(start, steps + 1), initial=start, total=steps, unit="step", disable=None if rank == 0 else True):
        record = {"step": step}
        # ------------------------------------------------------------------------------------- evaluate and sample
        if step % cfg.every == 0 or step == steps:
            swap(state.nets["student"], state.ema)
            record["val"] = validate(state.nets["student"], vae, val, cfg, autocast, device, run / "strip.png" if rank == 0 else None)
            swap(state.nets["student"], state.ema)
        # --------------------------------------------------------------------------------------------------- save
        if mean([torch.tensor(time.time() - last_save, device=device)])[0] > 60 * cfg.minutes or step == steps:     # a mean: the same everywhere
            state.streams.share()
            save_checkpoint(checkpoint, state.tensors, step, cfg, data=state.streams.data)
            last_save = time.time()
        # -------------------------------------------------------------------------------------------------- TRAIN
        if step < steps:
            for opt, peak in zip(state.opt.values(), (cfg.lr, cfg.lr_critic)):
                opt.param_groups[0]["lr"] = peak * rise_and_fall(step, cfg)
            record["lr"], record["lr_critic"] = (opt.param_groups[0]["lr"] for opt in state.opt.values())
            record |= train_step(state, teacher, vae, cfg, step, autocast, run, rank)
            losses.append(record["critic"])
        # ---------------------------------------------------------------------------------------------------- log
        if rank == 0:
            record["seconds"] = round(time.time() - clock, 3)
            log(run / "log.jsonl", record)
            if "val" in record or step % 50 == 0:
                pace = (time.time() - began) / (step + 1 - start)               # seconds a step, all in all
                tqdm.write(" | ".join([f"step {step:5d}/{steps}", *(f"{k} {v}" for k, v in record.items() if k not in ("step", "seconds")),
                                       f"{cfg.batch / pace:.2f} chunks/s", f"{pace * (steps - step) / 3600:.1f} h left"]))
            clock = time.time()
    return losses


def train_step(state, teacher, vae, cfg, step, autocast, run, rank):
    """Every film grows by a chunk; the critic learns it and, at its turn, the student from it. -> numbers for the log"""
    (student, critic), streams = state.nets.values(), state.streams
    who, sigmas = ["student", "critic"] if students_turn(step, cfg) else ["critic"], student_sigmas(cfg.denoise, cfg.sample_shift)
    parts, kappas = {}, []
    for opt in state.opt.values():
        opt.zero_grad(set_to_none=True)
    for rows in streams.calls:
        batch = streams.batch(rows, step)
        with autocast:                                                          # a block each: autocast keeps its casts of the weights to the
            given, answers = rollout(student, batch, sigmas, cfg.follow)        # end of a block, and those made here lead no gradient
        pick = torch.arange(len(rows), device=answers.device), batch["exit"]    # every row leaves at its own random step
        batch |= {"given": given[pick], "exit_sigma": torch.tensor(sigmas, device=answers.device)[batch["exit"]]}
        new = {}
        if "student" in who:
            with autocast:
                loss, new = student_loss(student, critic, teacher, batch, cfg)
            (loss.mean() / len(streams.calls)).backward()
        with autocast:
            new["critic"] = critic_loss(critic, answers[pick], batch)
        (new["critic"].mean() / len(streams.calls)).backward()
        for k, v in new.items():
            parts[k] = parts.get(k, 0) + v.detach().mean() / len(streams.calls)
        if cfg.student_sees == "gen":
            kappas.append((rows, self_generated(vae, answers[:, -1], cfg)))     # the film goes on with the last answer
    if kappas:                                                                  # its size, about 1: a film that runs away is seen here first
        parts["kappa"] = torch.cat([kappa for _, kappa in kappas]).square().mean().sqrt()
    norms = [torch.nn.utils.clip_grad_norm_(state.nets[k].parameters(), 10.0) for k in who]        # 10: as Self-Forcing
    norms = {f"norm_{k}": (v.full_tensor() if isinstance(v, DTensor) else v).item() for k, v in zip(who, norms)}
    numbers = dict(zip(parts, mean(parts.values()))) | norms
    if not np.isfinite(sum(numbers.values())):                                  # kappa, too: before the weights and the films are touched
        names = ", ".join(streams.starts[streams.place[row, 0]].clip.name for rows in streams.calls for row in rows)
        raise FloatingPointError(f"{numbers} at step {step}, in the clips {names} (of process {rank}); the weights were not changed, the last "
                                 f"checkpoint is in {run}")
    for k in who:
        state.opt[k].step()
    for k, p in student.named_parameters() if "student" in who else ():         # step // ratio: its updates before this one
        state.ema[k].lerp_(p.detach(), 1 - min(cfg.ema, (1 + step // cfg.ratio) / (10 + step // cfg.ratio)))
    streams.advance(kappas, step)
    return {k: round(v, 6) for k, v in numbers.items()}

# ------------------------------------------------------------------------------------------------------------------ main

def check(cfg, world):
    """ValueError, in one line, for options that make no sense together."""
    if cfg.teacher_sees == "gen" and cfg.student_sees == "gt":
        raise ValueError("--teacher-sees gen --student-sees gt is no row of Table 4: a student of true frames never meets the drift it is taught")
    counts = (cfg.batch, cfg.micro, cfg.ratio, cfg.rollout - 1, cfg.denoise, cfg.warmup, cfg.every, cfg.val, cfg.sample_shift)
    if not 1 <= min(counts) <= max(counts) < np.inf or cfg.batch % (cfg.micro * world):
        raise ValueError(f"batch {cfg.batch} must be a multiple of micro {cfg.micro} x {world} processes; rollout >= 2, sample_shift and counts >= 1")
    if cfg.distill and not 0 <= cfg.follow < max(1, cfg.denoise - 1):
        raise ValueError(f"follow {cfg.follow} must be under denoise - 1, {cfg.denoise - 1}, or 0: the last step gets the student's own answer")
    if not all(0 <= x < np.inf for x in (cfg.guidance_focus, cfg.liveliness)) or not 0 < cfg.delta < np.inf:
        raise ValueError(f"--guidance-focus {cfg.guidance_focus} and --liveliness {cfg.liveliness} must be 0 or more, --delta {cfg.delta} over 0")
    if cfg.liveliness != 1 and (cfg.guidance == 1 or cfg.guidance_focus == 0):
        raise ValueError(f"--liveliness {cfg.liveliness} needs --guidance other than 1 and a --guidance-focus over 0")
    if 0 < cfg.tail <= cfg.head:
        raise ValueError(f"tail {cfg.tail} must be 0 or more than head {cfg.head}: the first latent decoded gives one frame only")


def build_parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", nargs="+", help="folders of clips (see data.py); those of less than two chunks are left out")
    p.add_argument("--share", nargs="+", type=float, help="how often each folder is drawn (default: equally)")
    p.add_argument("--cache", nargs="+", help="where data.py's decoded frames lie, one per folder (default: FOLDER/.cache-SIZE)")
    p.add_argument("--weights", type=Path, default=Path("weights/tiny"), help="folder of config.json, teacher.safetensors and the rest (%(default)s)")
    p.add_argument("--out", type=Path, help="where student.safetensors goes (default: --weights)")
    p.add_argument("--run-dir", dest="run", type=Path, default=Path("runs/student"), help="checkpoint, log, pictures (%(default)s)")
    p.add_argument("--encoded", type=Path, default=Path("runs/teacher/cache"), help="encoded chunks, those of train_teacher.py (%(default)s)")
    p.add_argument("--preset", choices=PRESETS, default="tiny", help="what the options below are unless given (%(default)s)")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --run-dir")
    p.add_argument("--plot", action="store_true", help="draw the curves of --run-dir and stop")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto: a GPU if there is one")
    meaning = dict(re.findall(r"    (\w+): .*?# (.*)", inspect.getsource(StudentConfig)))
    for field in fields(StudentConfig):
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(field.default, bool) else {"type": type(field.default)}
        kind |= {"choices": CHOICES[field.name]} if field.name in CHOICES else {}
        p.add_argument(f"--{field.name.replace('_', '-')}", **kind, help=f"{meaning[field.name]} [{getattr(PRESETS['tiny'], field.name)}]")
    return p


def longest(films, cfg):
    """Those of a list of Chunk that last for K chunks, or as long as any: the shortest film sets how far all are followed, and drift shows late."""
    most = min(cfg.rollout, max(chunks_left(film, cfg) for film in films))
    return [film for film in films if chunks_left(film, cfg) >= most]


def prepare(args, cfg, device, rank, world):
    """The teacher and its two copies, the films -> State, teacher, vae, validation films"""
    models = infer.load(args.weights, "teacher", device, "float32")
    for name, mine, its in ("frames", cfg.frames, models.frames), ("identity", cfg.identity, models.identity):
        if mine != its:
            raise ValueError(f"--{name} {mine}, but the teacher in {args.weights} was trained with {its}")
    vae, two, found = models.vae, 2 * cfg.frames - 4 * cfg.head + 3, {"train": [], "val": []}
    for folder, cache in zip(args.data, args.cache or [None] * len(args.data), strict=True):
        for part, most in (("train", cfg.films), ("val", -(-cfg.val // len(args.data)))):
            clips = ClipFolder(folder, models.size, "all" if cfg.films else part, cache).clips      # all: validated on what is learnt by heart
            clips = [clip for clip in clips if clip.length >= two and len(clip.audio)][:most or None]
            chunks = encode_clips(clips, vae, models.audio, args.encoded, cfg, device, rank, world) if clips else []
            found[part].append([c for c in chunks if c.row < len(c.pictures) - 1 and chunks_left(c, cfg) > 1])
    if cfg.bf16:
        vae.decoder.to(torch.bfloat16)                                          # as infer.py does; the encoder stays float32
        vae.conv2.to(torch.bfloat16)
    nets = [shard(copy.deepcopy(models.dit).requires_grad_(True), device, world) for _ in range(2)]
    streams = Streams(found["train"], args.share or [1.0] * len(args.data), cfg, device, rank, world)
    held_out = [chunk for chunks in found["val"] for chunk in chunks if chunk.row == 0]
    val = longest(held_out or streams.starts[:1], cfg)
    print(f"films can start at: {[len(chunks) for chunks in found['train']]} chunks\n"
          f"validation films: {len(val)}{'' if held_out else ', of those that are trained on: no other has two chunks'}")
    return State(*nets, streams, cfg), shard(models.dit, device, world), vae, val


def main(argv=None):
    signal.signal(signal.SIGTERM, signal.default_int_handler)                   # kill is Ctrl-C
    args = build_parser().parse_args(argv)
    cfg = replace(PRESETS[args.preset], **{f.name: value for f in fields(StudentConfig) if (value := getattr(args, f.name)) is not None})
    try:
        if args.plot:
            return report.plot_student(args.run)
        if not args.data:
            raise ValueError("--data is needed: a folder of clips")
        one_per_folder(args, "share", "cache")
        check(cfg, int(os.environ.get("WORLD_SIZE", 1)))
        device, _ = infer.pick(args.device, "auto")
        rank, world = join(device)
        state, teacher, vae, val = prepare(args, cfg, device, rank, world)
        print(f"{cfg}\nparameters: 3 x {sum(p.numel() for p in teacher.parameters()) / 1e6:.1f} M")
        losses = train(cfg, state, teacher, vae, val, args.run, args.resume, device, rank, world)
        export(args.weights, args.out or args.weights, state.ema, cfg, state.nets["student"].config.skip)
        print(f"critic_updates: {cfg.steps * cfg.distill}\nstudent_updates: {sum(students_turn(k, cfg) for k in range(cfg.steps * cfg.distill))}\n"
              f"critic_loss: {np.mean(losses[-50:] or [np.nan]):.4f}\nweights: {(args.out or args.weights) / 'student.safetensors'}")
    except (OSError, ValueError, KeyError, FloatingPointError, SafetensorError, KeyboardInterrupt) as error:
        print(f"distill_student.py: {str(error) or 'stopped; --resume goes on from the last checkpoint'}", file=sys.stderr)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
