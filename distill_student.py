"""Stage 2: the student, by Asymmetric Knowledge Distillation (AKD).

Paper section 3.4 and Appendix C; Equations 6 to 15.

    python distill_student.py --data CLIPS [CLIPS ...]      runs/teacher/weights -> runs/student
    python distill_student.py --data CLIPS --preset debug   overfit one video: does it learn here?
    python distill_student.py --data CLIPS --resume         continue a killed run, bit for bit
    python distill_student.py --data CLIPS --teacher-continuity gen     Table 4, symmetric-gen
    python distill_student.py --data CLIPS --student-continuity gt      Table 4, symmetric-gt
    python distill_student.py --data CLIPS --steps 0        no distillation: the teacher in 4 steps
    torchrun --nproc_per_node=8 distill_student.py --preset wan-1.3b --weights DIR --data CLIPS

Three networks start as the teacher and look at the same chunk, but not after the same frames:

    student  generates it in 4 steps from noise, after its *own* last frames (kappa_gen), as at
             inference;
             trained by Eq. 8
    critic   estimates the score of what the student generates after such frames;
             trained by Eq. 15, more often than the student
    teacher  estimates the score of real chunks after the *ground-truth* frames (kappa_gt); frozen

The student follows the difference of the two scores (Eq. 13). From a face that has drifted, that
leads back to where the ground-truth video continues. Others call a bidirectional teacher with a
causal student asymmetric; here the networks are alike, and the *context* is asymmetric.

Each row of a batch is a video in progress (RolloutBuffer): a clip's portrait and audio, and the
student's frames so far. A step generates the next chunk of each row and trains on it; after K
chunks, or at the clip's end, another video begins, as infer.py begins. So kappa_gen costs one
decode, not a new roll-out. In a first chunk both kappas are the portrait: nothing is asymmetric.

Of the S steps that generate a chunk, one is drawn for each row, the exit step. Its prediction of x0
is the sample of Eq. 9 that the losses see; it is repeated with gradient, the others are input.

Shapes: B batch, T pixel frames, F = 1 + (T-1)/4 latent frames, C channels, H W pixels,
        h w latent grid, m continuity latents = n = 4m - 3 frames, S the student's steps.
Everything random depends on (seed, step, row) alone: a resumed run, or one on more processes, draws
what the first would.
"""
import copy
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from PIL import Image
from tqdm import tqdm

import dit
import infer
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
from data import (
    ClipFolder,
    chunks_left,
    encode_clips,
    to_tensor,
    to_uint8,
    training_set_hash,
)
from dit import (
    add_noise,
    classifier_free_guidance,
    score_from_velocity,
    shift_sigma,
    student_sigmas,
    velocity,
    x0_from_velocity,
)
from tre import continuity_reference, overwrite_continuity, temporal_reference_encoding

# ------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class Files:
    data: tuple[Path, ...] = ()             # folders of clips; those under two chunks are left out
    preset: Literal["nano", "debug", "wan-1.3b"] = "nano"   # defaults of what follows
    weights: Path = Path("runs/teacher/weights")    # folder with the teacher
    run_dir: Path = Path("runs/student")    # checkpoint, log, samples
    out: Path | None = None                 # the finished folder of weights [RUN_DIR/weights]
    resume: bool = False                    # continue from the checkpoint in RUN_DIR
    overwrite: bool = False                 # replace the run that RUN_DIR holds
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: a GPU if there is one
    plan_memory: tuple[int, int, int] | None = None     # GPUs, pixels, frames: print memory, end


# PresetOnly: set by the preset, no flag. "not in our copy": see train_teacher.py.
@dataclass(frozen=True)
class StudentConfig:
    steps: int = 240                        # critic updates (paper: 1,600, of which is not said)
    critic_updates: int = 2                 # per student update (Self-Forcing, FlashHead: 5)
    batch: int = 4                          # videos in progress, one chunk of each per step (4)
    micro_batch: int = 4                    # rows per network call; gradients add up
    rollout_chunks: int = 10                # K, chunks of a video (paper: not given; FlashHead: 5)
    denoising_steps: int = 4                # S, steps from noise to a chunk (paper: 4)
    timestep_shift: float = 5.0             # of these steps: 1, 0.94, 0.83, 0.63 (paper: not given)
    lr: float = 1e-4                        # of the student's AdamW (paper: not given)
    lr_critic: float = 2e-4                 # of the critic's (paper: not given)
    betas: PresetOnly[tuple[float, float]] = (0.0, 0.999)   # of AdamW, as in Self-Forcing
    weight_decay: PresetOnly[float] = 0.01  # of AdamW, as in Self-Forcing
    grad_clip: PresetOnly[float] = 10.0     # largest norm of a gradient, as in Self-Forcing
    warmup: PresetOnly[int] = 10            # steps to the peak learning rates (not given)
    decay: PresetOnly[float] = 0.5          # last share of the steps: they fall to 0 (not given)
    ema: float = 0.95                       # decay of the exported average (not given)
    score_shift: float = 5.0                # of the noise levels of the scores (not given)
    guidance: float | None = None           # of the real score; 1: none [the teacher's] (not given)
    teacher_continuity: Literal["gt", "gen"] = "gt"     # what the teacher sees (Table 4)
    student_continuity: Literal["gt", "gen"] = "gen"    # what student and critic see (Table 4)
    lambda_reg: float = 1.0                 # weight of Eq. 7 in Eq. 8 (not in our copy)
    huber_delta: float = 1.0                # of Eq. 7, in normalised latents (not in our copy)
    continuity_frames: int | None = None    # n; only the teacher's is accepted [the teacher's]
    frames: PresetOnly[int | None] = None   # T of a chunk, the teacher's
    identity: PresetOnly[str | None] = None     # tre or etr, the teacher's
    offsets: PresetOnly[int] = 2            # as in stage 1, whose encoded chunks are used again
    references: PresetOnly[int] = 3         # as in stage 1; a video can begin with so many chunks
    encode_bf16: PresetOnly[bool] = False   # the chunks were encoded in bfloat16
    overfit: PresetOnly[int] = 0            # use only so many clips, also for validation; 0: all
    bf16: bool = True                       # bfloat16 autocast where the processor has it
    checkpointing: PresetOnly[bool] = False     # recompute blocks in the backward pass
    compile: bool = False                   # torch.compile, block by block
    val_every: PresetOnly[int] = 40         # steps from one validation to the next
    val_videos: PresetOnly[int] = 4         # validation videos
    save_minutes: PresetOnly[float] = 5.0   # from one checkpoint to the next
    seed: int = 0                           # of everything random


PRESETS = {
    "nano": StudentConfig(),
    "debug": StudentConfig(
        steps=40, critic_updates=1, batch=2, micro_batch=2, rollout_chunks=2, lr=3e-4,
        lr_critic=6e-4, warmup=5, decay=0.0, ema=0.9, guidance=1.0, offsets=1, references=1,
        overfit=1, val_every=20, val_videos=1, save_minutes=1.0),
    "wan-1.3b": StudentConfig(
        steps=1600, critic_updates=5, batch=64, micro_batch=1, rollout_chunks=5, lr=2e-6,
        lr_critic=4e-7, warmup=20, decay=0.0, ema=0.99, guidance=4.0, lambda_reg=0.1,
        checkpointing=True, val_every=100, save_minutes=30.0),
}
MAY_CHANGE = ("steps", "lr", "lr_critic", "micro_batch", "bf16", "checkpointing", "compile",
              "val_every", "val_videos", "save_minutes")            # at --resume

# ---------------------------------------------------------- who sees which continuity reference


def choose_kappas(kappa_gt, kappa_gen, cfg):
    """Section 3.4, the asymmetry -> kappa_teacher, kappa_student, each (B, C, m, h, w).

    kappa_gt   encodes the last n frames of the *ground-truth* chunk before
    kappa_gen  encodes the last n frames of the *student's own* chunk before: decoded and encoded
               again, exactly as infer.py does
    The frozen teacher sees kappa_gt; student and critic see kappa_gen (AKD, Eq. 6). Table 4's
    symmetric rows are the other choices."""
    kappa = {"gt": kappa_gt, "gen": kappa_gen}
    return kappa[cfg.teacher_continuity], kappa[cfg.student_continuity]


def forward(model, x, sigma, batch, kappa, audio=None):
    """Velocity at x (B, C, F, h, w), sigma (B,), after kappa has overwritten the first latents.

    In a first chunk only one latent is overwritten, the portrait's: loss_mask says which."""
    x = torch.where(batch["loss_mask"] > 0, x, overwrite_continuity(x, kappa))
    audio = batch["audio"] if audio is None else audio
    return model(x, 1000 * sigma, batch["identity"], audio)


def next_kappa_gen(vae, x0, n):
    """kappa_gen of the chunk after x0 (B, C, F, h, w): all of it is decoded, its last n frames are
    encoded again, as infer.py does -> (B, C, m, h, w)."""
    with torch.no_grad():
        return continuity_reference(vae, vae.decode(x0), n)

# ----------------------------------------------------------------------------------------- roll-out


@torch.no_grad()
def rollout(student, batch, sigmas):
    """Section 3.4: the student's steps, as dit.sample_student, with one kappa and noise a row.

    -> its inputs and its x0 predictions at all S steps, (B, S, C, F, h, w) each; the last
    prediction is the chunk."""
    kappa = batch["kappa_student"]
    x = batch["noise"][:, 0]                                        # (B, C, F, h, w)
    inputs, predictions = [], []
    for step, sigma in enumerate(sigmas):
        v = forward(student, x, torch.full((len(x),), sigma, device=x.device), batch, kappa)
        x0 = x0_from_velocity(x, v, sigma)
        x0 = torch.where(batch["loss_mask"] > 0, x0, overwrite_continuity(x0, kappa))
        inputs.append(x)
        predictions.append(x0)
        if step + 1 < len(sigmas):
            x = add_noise(x0, batch["noise"][:, step + 1], sigmas[step + 1])
    return torch.stack(inputs, 1), torch.stack(predictions, 1)


def draw_noise(cfg, step, row, shape, device):
    """Row `row` of step `step`: noise (S + 2, C, F, h, w) for the student's S steps, Eq. 11 and
    Eq. 14; sigma (2,) of those two, in [0.02, 0.98] as in Self-Forcing; exit_step () in 0..S-1."""
    seed = np.random.SeedSequence((cfg.seed, step, row)).generate_state(1, np.uint64)[0]
    generator = torch.Generator(device).manual_seed(int(seed >> np.uint64(1)))
    noise = torch.randn(cfg.denoising_steps + 2, *shape, generator=generator, device=device)
    u = torch.rand(3, generator=generator, device=device)
    sigma = shift_sigma(u[1:], cfg.score_shift).clamp(0.02, 0.98)
    return {"noise": noise, "sigma": sigma, "exit_step": (u[0] * cfg.denoising_steps).long()}


def load_chunk(start, index, cfg):
    """Chunk `index` of the video that begins with the data.Chunk `start`, without a batch axis.

    The portrait is the video's first frame; consecutive chunks lie in consecutive rows of the
    cache. loss_mask (1, F, 1, 1) is 0 at the latents that kappa overwrites."""
    latents = start.tensor("latents", start.row + index)            # (C, F, h, w)
    identity = start.tensor("identity", start.row)                  # (C, F, h, w), Eq. 3
    if cfg.identity == "etr":
        identity = identity[:, :1].expand_as(identity)              # Eq. 29
    m = 1 + (cfg.continuity_frames - 1) // 4
    given = m if index else 1
    mask = (torch.arange(latents.shape[1]) >= given).float()
    return {"latents": latents, "identity": identity,
            "audio": start.tensor("audio", start.row + index),      # (T, L, A)
            "loss_mask": mask.view(1, -1, 1, 1),
            "is_first": torch.full((1, 1, 1, 1), index == 0)}


class RolloutBuffer:
    """The videos in progress, one a row: where each stands, and the kappa_gen made for it.

    `cursor` (B, 3): which start, chunks made, chunks to make; `kappa_gen` (B, C, m, h, w). Both are
    part of the checkpoint. This process's rows are in `calls`, cfg.micro_batch a call; the cursor
    is alike on all processes, kappa_gen is kept by each for its own rows."""

    def __init__(self, starts, cfg, device, rank=0, world=1, weights=None):
        """starts: list of data.Chunk that a video can begin with; weights: how often, one each."""
        if not starts:
            T, n = cfg.frames, cfg.continuity_frames
            raise ValueError("no clip is long enough: a roll-out needs two chunks, "
                             f"{2 * T - n} frames, and sound")
        weights = np.ones(len(starts)) if weights is None else np.asarray(weights, float)
        self.starts, self.cfg, self.device = starts, cfg, device
        self.probs = weights / weights.sum()
        self.data_hash = training_set_hash(starts, weights)
        micro = cfg.micro_batch
        self.calls = [range(row, row + micro)
                      for row in range(rank * micro, cfg.batch, micro * world)]
        C, _, h, w = starts[0].array("latents").shape[1:]
        m = 1 + (cfg.continuity_frames - 1) // 4
        self.cursor = torch.zeros(cfg.batch, 3, dtype=torch.long)
        self.kappa_gen = torch.zeros(cfg.batch, C, m, h, w, device=device)
        for row in range(cfg.batch):
            self.restart(row, step=0)
            self.cursor[row, 2] = 1 + row % self.cursor[row, 2]     # so that rows differ in age

    def restart(self, row, step):
        rng = np.random.default_rng((self.cfg.seed, step, row))
        start = int(rng.choice(len(self.starts), p=self.probs))
        length = min(self.cfg.rollout_chunks, chunks_left(self.starts[start], self.cfg))
        self.cursor[row] = torch.tensor([start, 0, length])

    @torch.no_grad()
    def batch(self, rows, step):
        """-> load_chunk's and draw_noise's tensors with a batch axis; kappa_teacher and
        kappa_student (B, C, m, h, w)."""
        places = [self.cursor[row].tolist() for row in rows]
        loaded = [load_chunk(self.starts[start], index, self.cfg) for start, index, _ in places]
        batch = {k: torch.stack([chunk[k] for chunk in loaded]).to(self.device) for k in loaded[0]}
        shape = batch["latents"].shape[1:]
        drawn = [draw_noise(self.cfg, step, row, shape, self.device) for row in rows]
        batch |= {k: torch.stack([one[k] for one in drawn]) for k in drawn[0]}
        m = self.kappa_gen.shape[2]
        portrait = batch["identity"][:, :, :m]                      # a first chunk uses one latent
        kappa_gt = batch["latents"][:, :, :m]
        kappa_gen = torch.where(batch["is_first"], portrait, self.kappa_gen[list(rows)])
        kappa_teacher, kappa_student = choose_kappas(kappa_gt, kappa_gen, self.cfg)
        return batch | {"kappa_teacher": kappa_teacher, "kappa_student": kappa_student}

    def advance(self, kappas, step):
        """After a step, every row goes on with the kappa_gen made for it, or starts again."""
        for rows, kappa in kappas:
            self.kappa_gen[list(rows)] = kappa
        self.cursor[:, 1] += 1
        for row in torch.where(self.cursor[:, 1] == self.cursor[:, 2])[0].tolist():
            self.restart(row, step + 1)

    def share(self):
        """Every process gets the kappa_gen of all rows, for the checkpoint."""
        if dist.is_initialized():
            own = [row for rows in self.calls for row in rows]
            others = torch.ones(len(self.kappa_gen), dtype=torch.bool)
            others[own] = False
            self.kappa_gen[others.to(self.kappa_gen.device)] = 0
            dist.all_reduce(self.kappa_gen)

# --------------------------------------------------------------------------------------------- loss


def masked_mean(x, loss_mask):
    """Mean of x (B, C, F, h, w) over the latents where loss_mask (B, 1, F, 1, 1) is 1 -> (B,)."""
    weight = loss_mask.expand_as(x)
    return (x * weight).sum((1, 2, 3, 4)) / weight.sum((1, 2, 3, 4))


def dmd_gradient(x0, x, v_real, v_fake, sigma, loss_mask):
    """Eq. 13, w(t) (s_fake - s_real) -> (B, C, F, h, w). The student's x0 descends along it.

    x is x0 with noise sigma (B,); v_real, v_fake are the teacher's and the critic's velocities
    there; the scores are Eq. 12's. With x0_real = x - sigma v_real, the weight
    w(sigma) = sigma^2 / (1 - sigma) / mean |x0 - x0_real| turns their difference into
    x0_fake - x0_real in units of the teacher's correction, row by row."""
    distance = (x0 - x0_from_velocity(x, v_real, sigma)).abs()
    correction = masked_mean(distance, loss_mask).clamp(min=1e-6)               # (B,)
    weight = sigma ** 2 / (1 - sigma) / correction                              # (B,)
    s_fake = score_from_velocity(x, v_fake, sigma)
    s_real = score_from_velocity(x, v_real, sigma)
    return loss_mask * weight[:, None, None, None, None] * (s_fake - s_real)


def dmd_loss(x0, gradient, loss_mask):
    """A loss with the gradient of Eq. 13: 0.5 (x0 - sg(x0 - g))^2 -> (B,), as in DMD2."""
    return 0.5 * masked_mean((x0 - (x0 - gradient).detach()).square(), loss_mask)


def regression_loss(x0, truth, delta, loss_mask):
    """Eq. 7: Huber distance to the true latents: e^2 / 2 up to delta, linear beyond -> (B,)."""
    error = nnf.huber_loss(x0, truth, reduction="none", delta=delta)
    return masked_mean(error, loss_mask)


def student_loss(student, critic, teacher, batch, cfg, guide=classifier_free_guidance,
                 reg_weight=torch.ones_like):
    """Eq. 8: L_DMD + lambda_reg L_reg -> (B,), and numbers to log, (B,) each.

    The student repeats its exit step, this time with gradient; earlier steps are input only.
    reg_weight: exit step (B,) -> weight of Eq. 7 in each row, 1 in the paper."""
    mask, sigma = batch["loss_mask"], batch["sigma"][:, 0]
    truth = batch["latents"]

    # PAPER Eq. 9: the student's sample
    x_t = batch["exit_input"]
    v = forward(student, x_t, batch["exit_sigma"], batch, batch["kappa_student"])
    x0 = x0_from_velocity(x_t, v, batch["exit_sigma"])                          # (B, C, F, h, w)

    with torch.no_grad():
        # PAPER Eq. 11: noise it again
        x = add_noise(x0, batch["noise"][:, -2], sigma)
        # PAPER Eq. 12: two scores, under two continuity references
        v_fake = forward(critic, x, sigma, batch, batch["kappa_student"])
        v_real = forward(teacher, x, sigma, batch, batch["kappa_teacher"])
        if cfg.guidance != 1:
            no_audio = torch.zeros_like(batch["audio"])
            v_uncond = forward(teacher, x, sigma, batch, batch["kappa_teacher"], no_audio)
            v_real = guide(v_real, v_uncond, cfg.guidance,
                           x=x, sigma=sigma, identity=batch["identity"], loss_mask=mask)
        # PAPER Eq. 13
        gradient = dmd_gradient(x0, x, v_real, v_fake, sigma, mask)

    # PAPER Eq. 7, 8
    weight = reg_weight(batch["exit_step"].float())                             # (B,)
    regression = weight * regression_loss(x0, truth, cfg.huber_delta, mask)
    loss = dmd_loss(x0, gradient, mask) + cfg.lambda_reg * regression

    # PLUMBING: the sizes of the two gradients on x0; their ratio says which term dominates
    reg_gradient = cfg.lambda_reg * (x0 - truth).detach().clamp(-cfg.huber_delta, cfg.huber_delta)
    return loss, {"regression": regression,
                  "dmd_grad": masked_mean(gradient.square(), mask).sqrt(),
                  "reg_grad": weight * masked_mean(reg_gradient.square(), mask).sqrt()}


def critic_loss(critic, x0, batch):
    """Eq. 15: the critic learns flow matching on the student's x0 (B, C, F, h, w) -> (B,)."""
    x0, eps, sigma = x0.detach(), batch["noise"][:, -1], batch["sigma"][:, 1]
    x = add_noise(x0, eps, sigma)                                               # Eq. 14
    v = forward(critic, x, sigma, batch, batch["kappa_student"])
    return masked_mean((v - velocity(x0, eps)).square(), batch["loss_mask"])

# --------------------------------------------------------------------------------------------- loop


@torch.no_grad()
def validate(student, vae, starts, cfg, autocast, device, path):
    """Fixed videos with fixed noise, as infer.py generates -> figures by chunk; a picture.

    error: mean |student - truth| of the latents; colour: |mean colour - the portrait's|, mean over
    channels, in 1/255; seam: frame difference across a border over that inside a chunk, 1 is
    invisible. All must stay level over the chunks of a video."""
    n = cfg.continuity_frames
    count = len(starts)
    own = replace(cfg, seed=1, batch=count, micro_batch=count, student_continuity="gen")
    buffer = RolloutBuffer(starts, own, device)
    buffer.cursor[:, 0] = torch.arange(count)
    sigmas = student_sigmas(cfg.denoising_steps, cfg.timestep_shift)
    error, colour, border, inside, pictures = [], [], [], [], []
    last = portrait = None
    for index in range(min(cfg.rollout_chunks, *(chunks_left(s, cfg) for s in starts))):
        buffer.cursor[:, 1] = index
        batch = buffer.batch(range(count), index)
        with autocast:
            z = rollout(student, batch, sigmas)[1][:, -1]
        video = vae.decode(z)                                       # (B, 3, T, H, W)
        buffer.kappa_gen.copy_(continuity_reference(vae, video, n))
        begin = index * (cfg.frames - n)
        truth = torch.cat([to_tensor(s.clip.frames[s.start + begin:][:cfg.frames]) for s in starts])
        if index == 0:
            portrait = truth[:, :, 0].to(device)                    # (B, 3, H, W)
        else:
            border.append((video[:, :, n] - last).abs().mean().item())
        new = video[:, :, n:]                                       # the first n are repeated
        last = video[:, :, -1]
        error.append(masked_mean((z - batch["latents"]).abs(), batch["loss_mask"]).mean().item())
        tint = (new.mean((2, 3, 4)) - portrait.mean((2, 3))).abs()
        colour.append(127.5 * tint.mean().item())
        inside.append(new.diff(dim=2).abs().mean().item())
        both = torch.stack([truth, video.cpu()], 1)                 # (B, 2, 3, T, H, W)
        pictures.append(both[:, :, :, [cfg.frames // 2, -1]])
    if path:                                                        # None: another process saves it
        save_image(path, contact_sheet(torch.cat(pictures, 3)))
    seam = float(np.mean(border) / np.mean(inside))
    return {"error": np.round(error, 4).tolist(), "colour": np.round(colour, 4).tolist(),
            "seam": round(seam, 4)}


def contact_sheet(videos):
    """(B, 2, 3, K, H, W) in [-1, 1] -> a picture of 2 B lines of K frames: truth, student, ..."""
    lines = videos.permute(2, 0, 1, 4, 3, 5).flatten(4).flatten(1, 3)   # (3, 2 B H, K W)
    return Image.fromarray(to_uint8(lines[:, None])[0])


def is_student_step(step, cfg):
    """One step in every cfg.critic_updates, at a random place of each block of so many.

    Roll-outs restart at a fixed rhythm; a fixed place would never train on chunks of some ages."""
    block, place = divmod(step, cfg.critic_updates)
    return place == np.random.default_rng((cfg.seed, block)).integers(cfg.critic_updates)


def train(cfg, networks, teacher, vae, buffer, val, run, resume=False, device="cpu", rank=0,
          rollout=rollout, make_optimizer=make_adamw, **tricks):
    """The loop -> TrainState, list of the critic's losses.

    networks {"student": ..., "critic": ...} on their device (sharded under torchrun); val: list of
    data.Chunk that validation videos begin with. rollout, make_optimizer and `tricks` (guide and
    reg_weight of student_loss) are where tiny/student.py puts its own."""
    # PLUMBING
    run.mkdir(parents=True, exist_ok=True)
    for net in (*networks.values(), teacher):
        net.gradient_checkpointing = cfg.checkpointing
        if cfg.compile:
            for block in net.blocks:
                block.compile(dynamic=False)
    peaks = {"student": cfg.lr, "critic": cfg.lr_critic}
    extra = {"buffer.cursor": buffer.cursor, "buffer.kappa_gen": buffer.kappa_gen}
    state = TrainState(networks, peaks, "student", cfg, make_optimizer, extra)
    checkpoint = run / "checkpoint.safetensors"
    start = 0
    if resume and checkpoint.exists():
        start = load_checkpoint(checkpoint, state.tensors, cfg, MAY_CHANGE, data=buffer.data_hash)
    if rank == 0:
        trim_log(run / "log.jsonl", start)
    autocast = bf16_autocast(device, cfg.bf16)
    losses = []
    began = clock = last_save = time.time()
    steps = range(start, cfg.steps + 1)
    for step in tqdm(steps, initial=start, total=cfg.steps, disable=None if rank == 0 else True):
        record = {"step": step}
        is_last = step == cfg.steps

        # EVALUATE AND SAMPLE
        if step % cfg.val_every == 0 or is_last:
            path = run / "samples.png" if rank == 0 else None
            with state.ema_weights():
                student = networks["student"]
                record["val"] = validate(student, vae, val, cfg, autocast, device, path)

        # SAVE
        age = torch.tensor(time.time() - last_save, device=device)
        if all_reduce_mean([age])[0] > 60 * cfg.save_minutes or is_last:    # alike on all processes
            buffer.share()
            save_checkpoint(checkpoint, state.tensors, step, cfg, data=buffer.data_hash)
            last_save = time.time()

        # TRAIN
        if not is_last:
            factor = learning_rate_factor(step, cfg)
            for name, optimizer in state.optimizers.items():
                optimizer.param_groups[0]["lr"] = peaks[name] * factor
            record |= {"lr": peaks["student"] * factor, "lr_critic": peaks["critic"] * factor}
            record |= train_step(state, teacher, vae, buffer, cfg, step, autocast, run, rank,
                                 rollout, tricks)
            losses.append(record["critic"])

        # LOG
        if rank == 0:
            record["seconds"] = round(time.time() - clock, 3)
            clock = time.time()
            log(run / "log.jsonl", record)
            if "val" in record or step % 50 == 0:
                tqdm.write(log_line(record, cfg.steps, cfg.batch, step + 1 - start, began))
    return state, losses


def train_step(state, teacher, vae, buffer, cfg, step, autocast, run, rank, rollout, tricks):
    """Every video grows by a chunk; the critic learns from it and, at its turn, the student."""
    student, critic = state.networks["student"], state.networks["critic"]
    student_turn = is_student_step(step, cfg)
    trained = ["student", "critic"] if student_turn else ["critic"]
    sigmas = student_sigmas(cfg.denoising_steps, cfg.timestep_shift)
    calls = len(buffer.calls)
    parts, kappas = {}, []
    for optimizer in state.optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    for rows in buffer.calls:
        batch = buffer.batch(rows, step)
        # PAPER: the next chunk of every video. Each loss below has its own autocast block, for the
        # copies of the weights made here, without gradient, would be used again within a block.
        with autocast:
            inputs, predictions = rollout(student, batch, sigmas)
        exits = torch.arange(len(rows), device=inputs.device), batch["exit_step"]
        batch["exit_input"] = inputs[exits]                         # a random step of each row
        batch["exit_sigma"] = torch.tensor(sigmas, device=inputs.device)[batch["exit_step"]]
        new = {}
        if student_turn:                                            # Eq. 8
            with autocast:
                loss, new = student_loss(student, critic, teacher, batch, cfg, **tricks)
            (loss.mean() / calls).backward()
        with autocast:                                              # Eq. 15
            new["critic"] = critic_loss(critic, predictions[exits], batch)
        (new["critic"].mean() / calls).backward()
        if cfg.student_continuity == "gen":                         # the video goes on
            last = predictions[:, -1]
            kappas.append((rows, next_kappa_gen(vae, last, cfg.continuity_frames)))
        for k, v in new.items():
            parts[k] = parts.get(k, 0) + v.detach().mean() / calls
    # PLUMBING
    if kappas:                                                      # about 1; more: divergence
        parts["kappa_rms"] = torch.cat([kappa for _, kappa in kappas]).square().mean().sqrt()
    norms = {f"norm_{k}": clip_gradients(state.networks[k], cfg.grad_clip) for k in trained}
    numbers = dict(zip(parts, all_reduce_mean(parts.values()))) | norms
    if not np.isfinite(sum(numbers.values())):                      # before the weights are touched
        places = [buffer.cursor[row, 0] for rows in buffer.calls for row in rows]
        names = ", ".join(buffer.starts[place].clip.name for place in places)
        raise FloatingPointError(
            f"{numbers} at step {step}, in the clips {names} (of process {rank}); the weights were "
            f"not changed, the last checkpoint is in {run}")
    for name in trained:
        state.optimizers[name].step()
    if student_turn:
        state.update_ema(cfg.ema, step // cfg.critic_updates)
    buffer.advance(kappas, step)
    return {k: round(v, 6) for k, v in numbers.items()}

# --------------------------------------------------------------------------------------------- main


def check(cfg, world):
    """ValueError, in one line, for options that make no sense together."""
    if cfg.teacher_continuity == "gen" and cfg.student_continuity == "gt":
        raise ValueError("--teacher-continuity gen --student-continuity gt is no row of Table 4: "
                         "the student would be corrected for a drift that it never sees")
    counts = (cfg.batch, cfg.micro_batch, cfg.critic_updates, cfg.rollout_chunks - 1,
              cfg.denoising_steps, cfg.timestep_shift, cfg.score_shift)
    if not 1 <= min(counts) <= max(counts) < np.inf or cfg.batch % (cfg.micro_batch * world):
        raise ValueError(f"--batch {cfg.batch} must be a multiple of --micro-batch "
                         f"{cfg.micro_batch} x {world} processes; --rollout-chunks at least 2, "
                         "counts and shifts at least 1")
    if cfg.steps < 0 or not 0 < cfg.huber_delta < np.inf or not 0 <= cfg.lambda_reg < np.inf:
        raise ValueError(f"--steps {cfg.steps} and --lambda-reg {cfg.lambda_reg} must be 0 or "
                         f"more, --huber-delta {cfg.huber_delta} over 0")


def with_teachers_values(cfg, models):
    """The config with what the teacher's weights decide. ValueError if it says otherwise."""
    for name in ("continuity_frames", "frames", "identity"):
        wanted, given = getattr(cfg, name), getattr(models, name)
        if wanted is not None and wanted != given:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {wanted}, but the teacher was trained with {given}")
    guidance = models.guidance if cfg.guidance is None else cfg.guidance
    return replace(cfg, continuity_frames=models.continuity_frames, frames=models.frames,
                   identity=models.identity, guidance=guidance)


def find_starts(files, cfg, models, device, rank, world):
    """Folders of clips -> chunks that a roll-out can begin with, those of validation videos."""
    two_chunks = 2 * cfg.frames - cfg.continuity_frames

    def starts_of(clips):
        clips = [clip for clip in clips if clip.length >= two_chunks and len(clip.audio)]
        clips = clips[:cfg.overfit or None]
        if not clips:
            return []
        chunks = encode_clips(clips, models.vae, models.audio, temporal_reference_encoding,
                              files.run_dir.parent / "cache", cfg, device, rank, world)
        return [c for c in chunks if c.row < len(c.pictures) - 1 and chunks_left(c, cfg) > 1]

    parts = ("all", "all") if cfg.overfit else ("train", "val")
    train_clips, val_clips = (ClipFolder(files.data, models.size, part).clips for part in parts)
    starts = starts_of(train_clips)
    held_out = [chunk for chunk in starts_of(val_clips) if chunk.row == 0] or starts[:1]
    return starts, longest(held_out, cfg)[:cfg.val_videos]


def longest(starts, cfg):
    """Those that last for K chunks, or as long as any: the shortest one limits all."""
    if not starts:
        return starts
    most = min(cfg.rollout_chunks, max(chunks_left(start, cfg) for start in starts))
    return [start for start in starts if chunks_left(start, cfg) >= most]


def export(files, ema, cfg):
    """RUN_DIR/weights, or --out: a folder with all that infer.py needs."""
    config = json.loads((files.weights / "config.json").read_text(encoding="utf-8"))
    config["student"] = {"steps": cfg.denoising_steps, "timestep_shift": cfg.timestep_shift}
    out = files.out or files.run_dir / "weights"
    export_weights(files.weights, out, "student", ema, cfg, config)
    return out


def decode_like_inference(vae, device, bf16):
    """The decoder in infer.py's dtype, so that kappa_gen is what inference hands over."""
    dtype = select_device(device)[1] if bf16 else torch.float32
    vae.decoder.to(dtype)
    vae.conv2.to(dtype)


def load_networks(models, device, world):
    """The frozen teacher and two copies of it, student and critic."""
    networks = {name: copy.deepcopy(models.dit).requires_grad_(True)
                for name in ("student", "critic")}
    networks = {name: shard(net, device, world) for name, net in networks.items()}
    return networks, shard(models.dit, device, world)


def run(files, cfg, **tricks):
    """Load, train, export, report. tricks: what train() is given beside the paper's."""
    device, _ = select_device(files.device)
    rank, world = init_distributed(device)
    models = infer.load(files.weights, "teacher", device, "float32")
    cfg = with_teachers_values(cfg, models)
    starts, val = find_starts(files, cfg, models, device, rank, world)
    buffer = RolloutBuffer(starts, cfg, device, rank, world)
    networks, teacher = load_networks(models, device, world)
    decode_like_inference(models.vae, device, cfg.bf16)
    millions = sum(p.numel() for p in teacher.parameters()) / 1e6
    print(f"{cfg}\nparameters: 3 x {millions:.1f} M\nroll-outs can start at {len(starts)} "
          f"chunks; validation videos: {len(val)}")
    state, losses = train(cfg, networks, teacher, models.vae, buffer, val, files.run_dir,
                          files.resume, device, rank, **tricks)
    out = export(files, state.ema, cfg)
    loss = np.mean(losses[-50:] or [np.nan])
    student_updates = sum(is_student_step(step, cfg) for step in range(cfg.steps))
    say(f"critic_updates: {cfg.steps}\nstudent_updates: {student_updates}\n"
        f"critic_loss: {loss:.4f}\nweights: {out / 'student.safetensors'}")


def main(argv=None):
    files, cfg = parse_args(__doc__, Files, PRESETS, argv)
    stopped = "stopped; --resume continues from the last checkpoint"
    with one_line_errors("distill_student.py", stopped):
        check(cfg, int(os.environ.get("WORLD_SIZE", 1)))
        if files.plan_memory:                           # looks at no file, touches no run
            with torch.device("meta"):
                model = dit.AudioDiT(dit.PRESETS[files.preset])
            per_parameter = 20 + 16 + 4                 # student with EMA, critic without, teacher
            print(memory_plan(model, per_parameter, cfg, *files.plan_memory))
            return
        if not files.data:
            raise ValueError("--data is missing: one or more folders of clips")
        with run_folder(files):
            run(files, cfg)


if __name__ == "__main__":
    main()
