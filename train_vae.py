"""Trains the small VAE of vae.py on folders of clips and pictures, and measures it.

    python vae.py --data PUPPETS GRID PORTRAITS --out weights/tiny          two cores: about 2 hours; runs/vae holds checkpoint and strip
    python vae.py --init weights/tiny --steps 4000 --lr 8e-4 --data ...     from trained weights: longer, steadier
    python vae.py --init weights/tiny --decoder-only ...                    from trained weights, their latents left as they are
    python vae.py --init weights/narrow --widen 8 --out weights/moving ...  from trained weights, and channels for what moves within a latent
    python vae.py --evaluate --data PUPPETS GRID --out weights/tiny         held-out clips -> the figures of vae_metrics.json

The course goes from easy to real: pictures first, where only the last tap of every temporal kernel acts (an image autoencoder: many
diverse faces a second), then short clips, then long ones. Wan trains in the same order (Wan report, arXiv 2503.20314, section 4.1).
Reads what data.py reads; writes vae.safetensors (averaged weights, float16) and the "vae" part of config.json.
"""
import argparse
import inspect
import json
import re
import signal
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open

from checkpoint import check_options, write_json, write_safetensors
from chunks import names_of, one_per_folder, pixels
from data import ClipFolder
from linear import principal_components
from muon import Muon
from vae import PRESETS, CausalConv3d, ResidualBlock, WanVAE, load_vae

# ------------------------------------------------------------------------------------------------------------------ loss


def spatial_gradient(x):
    return x[..., 1:, :-1] - x[..., :-1, :-1], x[..., :-1, 1:] - x[..., :-1, :-1]


def vae_loss(vae, inputs, video, cfg, generator, linear=None):
    """inputs, video (B, 3, T, H, W) -> loss, its parts, output. L1 and L2 + L1 of spatial gradients and of 8 x 8 means, L2 of motion + a small KL
    + squared distance of the latents' mean from the `linear` codec's + that of the output's own latents from the video's.

    L1 asks for the median, and the median of a motion that is not certain is to stand still: with L1 alone, in space and time, lips moved a
    third of what they should between a latent's four frames. L2 asks for the mean. Means over 8 x 8 pixels weigh colour, which L1 gives away
    first: green hair came out grey. The last term is what a long video lives by: frames that are encoded again at every chunk border must
    come out as the latents they were. KL only keeps the latents in a smooth, bounded cloud (latent diffusion, arXiv 2112.10752): its weight
    is so small that the noise it asks for stays below what the eye sees."""
    mu, logvar = vae.posterior(inputs)
    mu, logvar = mu.float(), logvar.float().clamp(-20, 10)
    eps = torch.randn(mu.shape, generator=generator)
    z = mu + eps * torch.exp(0.5 * logvar)
    out = vae.decoder(vae.conv2(z)).float()
    anchor = (mu - linear(video)).square().mean() if linear else mu.mean() * 0
    l1 = (out - video).abs().mean()
    edges = sum((a - b).abs().mean() for a, b in zip(spatial_gradient(out), spatial_gradient(video)))
    square = (out - video).square().mean()
    flicker = (out.diff(dim=2) - video.diff(dim=2)).square().mean() if video.shape[2] > 1 else l1 * 0
    colour = F.avg_pool3d(out - video, (1, 8, 8)).abs().mean()
    goal = mu.detach().clone()
    if cfg.cycle and inputs is not video:                                       # a batch's last clip came round: it is asked for its first latents
        with torch.no_grad():                                                   # (after mu: autocast keeps casts, those made here without gradient)
            goal[-1:] = vae.posterior(video[-1:])[0].float()
    cycle = (vae.posterior(out.clamp(-1, 1))[0].float() - goal).square().mean() if cfg.cycle else l1 * 0
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean()
    parts = dict(square=square, edges=edges, flicker=flicker, colour=colour, kl=kl, anchor=anchor, cycle=cycle)
    return l1 + sum(getattr(cfg, name) * part for name, part in parts.items()), dict(l1=l1) | parts, out


# ------------------------------------------------------------------------------------------------------------------ data

MOUTH = (0.58, 0.84, 0.32, 0.68)                                                # top, bottom, left, right: where face-centred clips have it


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 2400               # optimiser steps
    lr: float = 2e-3                # peak, after the warm-up; then linearly to zero
    warmup: int = 50                # steps
    edges: float = 0.5              # weight of the spatial-gradient term
    square: float = 10.0            # weight of the squared error
    flicker: float = 20.0           # weight of the squared error of frame differences
    colour: float = 1.0             # weight of the term for means over 8 x 8 pixels
    kl: float = 1e-4                # weight of the KL term, mean over latents
    anchor: float = 1.0             # weight of the distance from principal components
    cycle: float = 1.0              # weight of the distance between the video's latents and the output's own; costs half a step more
    widen: int = 0                  # with --init: so many latent channels more, for what moves within four frames
    lips: float = 0.0               # share of the crops that are cut around the mouth of a face-centred clip
    ema: float = 0.999              # decay of the averaged weights that are shipped
    seed: int = 0                   # of everything random
    minutes: float = 5.0            # between checkpoints
    decoder_only: bool = False      # with --init: latents stay what they are, so that what was trained on them goes on working
    compile: bool = False           # torch.compile: a third faster, after three minutes for every stage of the course


# The course of training: (share of the steps, frames, side of the crop, clips a batch). Pictures first, because with one frame only the
# last tap of every temporal kernel acts: an image autoencoder, many diverse faces a second. Then motion, small crops before whole frames.
COURSE = ((0.15, 1, 64, 16), (0.70, 9, 64, 4), (1.00, 25, 64, 2))
POLISH = ((0.50, 17, 64, 4), (1.00, 41, 64, 2))                                 # with --init: clips, longer clips, and clips that come round again


class Rounds:
    """Clips on their way round and round the codec: what came out the last time, and what went in the first time.

    A long video is decoded and encoded again at every chunk border, and small errors add up: 30 rounds cost 11 dB before this. The cure
    is to train on them: now and then a batch's last clip is one that has been through the codec before, and its *first* input is asked
    for again, so that a pass learns to undo the last one's error. It costs nothing: a step's output is a later step's input.
    A quarter of all inputs, no more: asked of every one, training never saw a true clip and fell apart."""

    def __init__(self, size=8, oldest=20, share=0.25):
        self.size, self.oldest, self.share, self.pool = size, oldest, share, {}

    def send(self, video, generator):
        """video (B, 3, T, H, W) -> inputs, targets of this step. The place in the pool is drawn; a clip too old makes room for a fresh one."""
        if not self.pool or self.pool["now"].shape[1:] != video.shape[1:]:      # the first step of a stage of the course
            empty = torch.zeros(self.size, *video.shape[1:], dtype=torch.float16)
            self.pool = dict(now=empty, first=empty.clone(), age=torch.full((self.size,), self.oldest))
        self.place = int(torch.randint(self.size, (), generator=generator))
        if torch.rand((), generator=generator) >= self.share * len(video):
            self.place = None
            return video, video
        now, first, age = (self.pool[k] for k in ("now", "first", "age"))
        inputs, targets = video.clone(), video.clone()
        if age[self.place] >= self.oldest:
            age[self.place], first[self.place] = 0, video[-1]
        else:
            inputs[-1], targets[-1] = now[self.place], first[self.place]
        return inputs, targets

    def receive(self, out):
        if self.place is not None:
            self.pool["now"][self.place] = out[-1].detach().clamp(-1, 1)
            self.pool["age"][self.place] += 1


def training_batch(folders, frames, side, size, generator, lips=0.0):
    """-> (B, 3, T, side, side) in [-1, 1]: random place and time, mirrored, brightness, contrast and colour changed a little. lips: TrainConfig."""
    def rand(n):
        return int(torch.randint(n, (), generator=generator))
    out = []
    while len(out) < size:
        clips = folders[rand(len(folders))]                                     # every folder is heard equally, however small
        video = clips[rand(len(clips))].frames                                  # uint8 (N, H, W, 3), memory-mapped
        if len(video) < frames:
            continue
        f, y, x = rand(len(video) - frames + 1), rand(video.shape[1] - side + 1), rand(video.shape[2] - side + 1)
        if lips and torch.rand((), generator=generator) < lips:                 # the crop's middle within 8 pixels of the mouth's
            middle = (MOUTH[0] + MOUTH[1]) / 2 * video.shape[1], video.shape[2] / 2
            y, x = (min(max(round(m) - side // 2 + rand(17) - 8, 0), n - side) for m, n in zip(middle, video.shape[1:3]))
        v = torch.from_numpy(np.array(video[f:f + frames, y:y + side, x:x + side])).permute(3, 0, 1, 2) / 127.5 - 1
        v = v.flip(-1) if rand(2) else v
        a = 1 + 0.4 * (torch.rand((3, 1, 1, 1), generator=generator) - 0.5) * torch.rand((), generator=generator)
        b = 0.4 * (torch.rand((), generator=generator) - 0.5) * torch.rand((), generator=generator)
        out.append((v * a + b).clamp(-1, 1))
    return torch.stack(out)


# ----------------------------------------------------------------------------------------------------------------- train


def save_checkpoint(path, vae, ema, opt, rounds, step, cfg, init):
    tensors = {f"{name}.{k}": v for name, part in (("model", vae.state_dict()), ("ema", ema), ("rounds", rounds.pool)) for k, v in part.items()}
    for i, state in opt.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    about = {"step": str(step), "config": json.dumps(asdict(cfg)), "init": str(init)}
    write_safetensors(path, {k: v.contiguous() for k, v in tensors.items()}, about)


def load_checkpoint(path, vae, ema, opt, rounds, cfg, init):
    """-> the step to go on with. Everything else a step depends on is drawn from its number. ValueError if other options made it."""
    with safe_open(path, "pt") as f:
        check_options(path, f.metadata(), cfg, ("steps", "minutes", "compile"), init=str(init))
        tensors, step = {k: f.get_tensor(k) for k in f.keys()}, int(f.metadata()["step"])
    part = lambda name: {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}
    vae.load_state_dict(part("model."))
    ema.update(part("ema."))
    rounds.pool, state = part("rounds."), {}
    for k, v in part("optimizer.").items():
        state.setdefault(int(k.split(".")[0]), {})[k.split(".")[1]] = v
    opt.load_state_dict({"state": state, "param_groups": opt.state_dict()["param_groups"]})
    return step


def export(folder, vae, ema, clips):
    """Measure mean and std of the clips' latents (no clips: keep them), then write vae.safetensors (float16) and the "vae" part of config.json.

    Channels for what moves are almost nothing where nothing moves: they are made as loud as others *around a mouth*, by their std there."""
    averaged = WanVAE(vae.config).eval()                                        # (a compiled network would compile again for these shapes)
    averaged.load_state_dict(ema)
    means, squares = [], []                                                     # of a clip's latents, and of those of its mouth: (C, 2) each
    with torch.no_grad():
        for clip in clips[:: max(1, len(clips) // 128)]:
            T = min(17, (len(clip.frames) - 1) // 4 * 4 + 1)
            mu = averaged.posterior(pixels(clip.frames[:T]))[0].double()
            y0, y1, x0, x1 = (round(part * mu.shape[-1]) for part in MOUTH)
            both = [mu.transpose(0, 1).flatten(1), mu[..., y0:y1, x0:x1].transpose(0, 1).flatten(1)]
            means.append(torch.stack([x.mean(1) for x in both], 1)), squares.append(torch.stack([x.square().mean(1) for x in both], 1))
    config = asdict(vae.config)
    if clips:
        mean, square = (torch.stack(x).mean(0) for x in (means, squares))       # (C, 2); clips count alike
        std = (square - mean ** 2).sqrt()
        still = torch.arange(len(std)) < len(std) - vae.config.moving
        mean, std = mean[:, 0], std[:, 0].where(still, std[:, 1])
        config |= {"latents_mean": [round(x, 4) for x in mean.tolist()], "latents_std": [round(x, 4) for x in std.tolist()]}
    write_safetensors(folder / "vae.safetensors", {k: v.half().contiguous() for k, v in ema.items()}, {"class": "WanVAE"})
    path = folder / "config.json"
    every = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"size": 128, "audio": "whisper"}
    write_json(path, every | {"vae": config})


def vae_and_goal(cfg, config, folders, init=None):
    """A VAE to train, a new one of `config` or that of the folder `init`, and what to ask its encoder for, as matrices (None: nothing)."""
    draw = lambda: [training_batch(folders, *COURSE[1][1:3], 16, torch.Generator().manual_seed(cfg.seed + i), cfg.lips) for i in range(24)]
    if not init:
        vae = WanVAE(config)
        begin(vae)
        return vae, principal_components(draw(), config.z_dim - config.moving, config.moving)
    trained = load_vae(init)
    vae = WanVAE(wider(trained.config, cfg.widen))
    widen(vae, trained)
    if not cfg.widen:
        return vae, None
    first = torch.no_grad()(lambda video: trained.posterior(video)[0].float())
    return vae, principal_components(draw(), trained.config.z_dim, cfg.widen, first)


def train(cfg, config, folders, out, resume, init=None):
    torch.manual_seed(cfg.seed)
    (vae, linear), course, rounds = vae_and_goal(cfg, config, folders, init), POLISH if init else COURSE, Rounds()
    if cfg.decoder_only:
        vae.encoder.requires_grad_(False), vae.conv1.requires_grad_(False)
    opt = Muon({name: p for name, p in vae.named_parameters() if p.requires_grad}, cfg.lr)
    ema = {k: v.clone() for k, v in vae.state_dict().items()}
    if cfg.compile:
        vae.encoder.compile(dynamic=False)
        vae.decoder.compile(dynamic=False)
    path = Path("runs/vae/checkpoint.safetensors")
    start = load_checkpoint(path, vae, ema, opt, rounds, cfg, init) if resume and path.exists() else 0
    seen, last_save = 0, (clock := time.time())
    for step in range(start, cfg.steps + 1):
        # ------------------------------------------------------------------------------------------------ save
        if step == cfg.steps or time.time() - last_save > 60 * cfg.minutes:
            save_checkpoint(path, vae, ema, opt, rounds, step, cfg, init)
            strip(vae, ema, sum(folders, []), Path("runs/vae/strip.png"))
            last_save = time.time()
        if step == cfg.steps:
            break
        # ----------------------------------------------------------------------------------------------- TRAIN
        generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)  # by step: a resumed run draws what the killed one would
        frames, side, size = next(stage[1:] for stage in course if step < stage[0] * cfg.steps)
        video = training_batch(folders, frames, side, size, generator, cfg.lips)    # (B, 3, T, side, side)
        inputs, video = rounds.send(video, generator) if frames > 1 else (video, video)
        lr = cfg.lr * min(1, (step + 1) / cfg.warmup) * (1 - step / cfg.steps)
        opt.param_groups[0]["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16):
            loss, parts, output = vae_loss(vae, inputs, video, cfg, generator, linear)
        if not torch.isfinite(loss):
            raise ValueError(f"loss is {loss.item()} at step {step}; the last good checkpoint is {path}")
        opt.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        opt.step()
        if frames > 1:
            rounds.receive(output)
        decay = min(cfg.ema, (1 + step) / (10 + step))
        for k, v in vae.state_dict().items():
            ema[k].lerp_(v, 1 - decay)
        # ------------------------------------------------------------------------------------------------- log
        seen += size * frames
        if step % 50 == 0:
            text = " ".join(f"{k} {v.item():.4f}" for k, v in parts.items())
            print(f"step {step:5d}/{cfg.steps} | loss {loss.item():.4f} | {text} | norm {norm:.2f} | lr {lr:.1e} | "
                  f"{frames} x {side} px | {seen / (time.time() - clock):.0f} frames/s", flush=True)
            clock, seen = time.time(), 0
    moving = [[c for c in clips if len(c.frames) > 1] for clips in folders]     # the statistics are those of clips, from every folder alike
    least = min(len(clips) for clips in moving if clips)
    export(out, vae, ema, [] if cfg.decoder_only else sum((clips[:least] for clips in moving), []))


def begin(vae):
    """Start as a nearly linear image autoencoder: silent residual branches, past taps zero, time halved by 'keep the last', doubled by 'repeat'.

    The posterior begins narrow: one as wide as the latents themselves tells the decoder nothing for the first thousand steps."""
    with torch.no_grad():
        vae.conv1.bias[vae.config.z_dim:] = -6.0
        for name, layer in vae.named_modules():
            if isinstance(layer, ResidualBlock):
                layer.residual[-1].weight.zero_()
                layer.residual[-1].bias.zero_()
            if isinstance(layer, CausalConv3d) and layer.kernel_size[0] == 3:
                layer.weight[:, :, :-1] = 0
                if name.endswith("time_conv"):
                    layer.weight.zero_()
                    layer.bias.zero_()
                    layer.weight[:, :, -1, 0, 0] = torch.eye(layer.in_channels).repeat(layer.out_channels // layer.in_channels, 1)


def wider(config, more):
    """The config with so many latent channels more, of what moves; their statistics are not known yet."""
    return replace(config, z_dim=config.z_dim + more, moving=config.moving + more,
                   latents_mean=config.latents_mean + (0.0,) * more, latents_std=config.latents_std + (1.0,) * more)


@torch.no_grad()
def widen(vae, trained):
    """A trained VAE's weights into one with as many latent channels or more: the first stay what they were, the decoder does not know the others."""
    C, more = trained.config.z_dim, vae.config.z_dim
    both = np.r_[:C, more:more + C]                                             # of means, then log-variances
    for name, own in vae.state_dict().items():
        old = trained.state_dict()[name]
        if own.shape != old.shape and not name.startswith("encoder"):           # new rows of the encoder's head stay random
            own.zero_()
        own[np.ix_(*(range(m) if m == n else both if n == 2 * more else range(C) for m, n in zip(old.shape, own.shape)))] = old
    for layer in (vae.conv1, vae.conv2):
        layer.weight[C:more, C:more, 0, 0, 0] = torch.eye(more - C)
    vae.conv1.bias[more + C:] = -6.0                                            # as in begin()


@torch.no_grad()
def strip(vae, ema, clips, path):
    """Input above reconstruction for eight clips, with the averaged weights: look at it before believing a number."""
    averaged = WanVAE(vae.config).eval()
    averaged.load_state_dict(ema)
    columns = []
    for clip in clips[:: max(1, len(clips) // 8)][:8]:
        T = min(9, (len(clip.frames) - 1) // 4 * 4 + 1)
        video = pixels(clip.frames[:T])
        columns.append(torch.cat([video[0, :, -1], averaged.decode(averaged.encode(video))[0, :, -1]], 1))      # (3, 2H, W)
    image = ((torch.cat(columns, 2).permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    Image.fromarray(image).save(path)


# -------------------------------------------------------------------------------------------------------------- evaluate


def psnr(a, b):
    """Two videos (..., H, W) in [-1, 1] -> decibels, peak 2."""
    return 10 * torch.log10(4 / (a - b).square().mean().clamp_min(1e-10)).item()


def ssim(a, b):
    """Structural similarity (Wang et al. 2004): 11 x 11 Gaussian window of 1.5 px, mean over frames and channels. (1, 3, T, H, W) in [-1, 1]."""
    g = torch.exp(-(torch.arange(11.0) - 5) ** 2 / (2 * 1.5 ** 2))
    window = (g[:, None] * g / g.sum() ** 2)[None, None]
    a, b = (((x + 1) / 2)[0].flatten(0, 1).unsqueeze(1) for x in (a, b))         # (3T, 1, H, W) in [0, 1]
    blur = lambda x: F.conv2d(x, window)
    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma ** 2, blur(b * b) - mb ** 2, blur(a * b) - ma * mb
    return ((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4))).mean().item()


def measure(vae, frames):
    """One clip's frames uint8 (T, H, W, 3) -> dict of figures, its latents (1, C, F, h, w)."""
    video = pixels(frames)
    z = vae.encode(video)
    out = vae.decode(z)
    pictures = lambda times: torch.cat([vae.decode(vae.encode(video[:, :, t:t + 1])) for t in times], 2)     # each frame by itself
    alone, per_frame = pictures(range(0, video.shape[2], 8)), pictures(range(9))
    top, bottom, left, right = (round(m * video.shape[-1]) for m in MOUTH)
    lips = (..., slice(top, bottom), slice(left, right))
    flicker = lambda x, y: (x.diff(dim=2) - y.diff(dim=2)).abs().mean().item() * 127.5      # in grey levels
    row = dict(psnr=psnr(out, video), ssim=ssim(out, video), psnr_single_frame=psnr(alone, video[:, :, ::8]), psnr_mouth=psnr(out[lips], video[lips]),
               flicker=flicker(out[:, :, :9], video[:, :, :9]), flicker_frame_by_frame=flicker(per_frame, video[:, :, :9]))
    x = tail = video[:, :, -9:]
    for i in range(1, 31):                                                      # what a long video does to its continuity frames
        x = vae.decode(vae.encode(x))
        if i in (1, 2, 5, 10, 20, 30):
            row[f"psnr_round_{i}"] = psnr(x, tail)
    return row, z


def decode_seconds(vae, dtype):
    """Seconds to decode 81 frames at 128 x 128 as a stream, the best of three."""
    z, best = torch.randn(1, vae.config.z_dim, 21, 16, 16), 1e9
    vae.decoder.to(dtype), vae.conv2.to(dtype)
    for _ in range(3):
        start = time.perf_counter()
        for _ in vae.decode_stream(z):
            pass
        best = min(best, time.perf_counter() - start)
    vae.decoder.float(), vae.conv2.float()
    return best


@torch.no_grad()
def evaluate(weights, folders, names, n):
    """Held-out clips of every folder -> figures printed and written to vae_metrics.json beside the weights."""
    vae, figures, latents = load_vae(weights), {}, []
    for name, clips in zip(names, folders):
        clips = [c for c in clips if len(c.frames) >= 41][:n]
        rows = []
        for clip in clips:
            length = min(73, (len(clip.frames) - 1) // 4 * 4 + 1)
            row, z = measure(vae, clip.frames[:length])
            rows.append(row), latents.append(z)
        figures[name] = {"clips": len(rows)} | {k: round(float(np.mean([r[k] for r in rows])), 4) for k in (rows[0] if rows else {})}
    z = torch.cat(latents, 2)                                                   # (1, C, all the latent frames, h, w)
    figures |= {"latents_mean_worst": round(z.mean((0, 2, 3, 4)).abs().max().item(), 4),
                "latents_std": [round(f(z.std((0, 2, 3, 4))).item(), 4) for f in (torch.min, torch.max)],
                "decode_81_frames_seconds": {str(d)[6:]: round(decode_seconds(vae, d), 3) for d in (torch.float32, torch.bfloat16)},
                "parameters": sum(p.numel() for p in vae.parameters()), "threads": torch.get_num_threads()}
    print(json.dumps(figures, indent=1))
    write_json(Path(weights) / "vae_metrics.json", figures)


def main(argv=None):
    signal.signal(signal.SIGTERM, signal.default_int_handler)                   # kill is Ctrl-C
    parser = argparse.ArgumentParser(prog="vae.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="folders of clips and pictures")
    parser.add_argument("--cache", nargs="*", help="where the decoded frames are kept, one for every data folder (FOLDER/.cache-SIZE)")
    parser.add_argument("--out", type=Path, default=Path("weights/tiny"), help="where the weights go (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from runs/vae")
    parser.add_argument("--init", type=Path, help="start from this folder's VAE, with a course of its own: clips, and longer ones of 41 frames")
    parser.add_argument("--evaluate", action="store_true", help="measure the weights in --out on the held-out clips instead")
    parser.add_argument("--clips", type=int, default=20, help="clips of a folder that --evaluate looks at (%(default)s)")
    meaning = dict(re.findall(r"    (\w+): .*?# (.*)", inspect.getsource(TrainConfig)))
    for field in fields(TrainConfig):
        kind = {"action": "store_true"} if field.default is False else {"type": type(field.default), "default": field.default}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **kind, help=f"{meaning[field.name]} [{field.default}]")
    args = parser.parse_args(argv)
    try:
        one_per_folder(args, "cache")
        if not 0 <= args.lips <= 1:
            raise ValueError(f"--lips {args.lips} is a share, 0 to 1")
        if min(args.steps, args.warmup) < 1 or args.decoder_only and not args.init:
            raise ValueError("--steps and --warmup must be at least 1, and --decoder-only needs a trained VAE, --init")
        if args.widen and (not args.init or args.decoder_only or args.widen < 0 or args.widen & (args.widen - 1)):
            raise ValueError(f"--widen {args.widen}: 1, 2, 4, 8, ... channels more for the VAE of --init, and not with --decoder-only")
        folders = [ClipFolder(folder, 128, "val" if args.evaluate else "train", args.cache[i] if args.cache else None, need_audio=False).clips
                   for i, folder in enumerate(args.data)]
        if not any(folders):
            raise ValueError(f"no clips in {args.data}")
        if args.evaluate:
            return evaluate(args.out, folders, names_of(args.data), args.clips)
        cfg = TrainConfig(**{f.name: getattr(args, f.name) for f in fields(TrainConfig)})
        longest = max(stage[1] for stage in (POLISH if args.init else COURSE))
        if not any(len(c.frames) >= longest for f in folders for c in f):
            raise ValueError(f"no clip in {args.data} has the {longest} frames that the course of training asks for")
        print(f"{[len(f) for f in folders]} clips | {cfg}", flush=True)
        train(cfg, PRESETS["tiny"], [f for f in folders if f], args.out, args.resume, args.init)
    except (ValueError, OSError, KeyError, SafetensorError) as error:
        parser.exit(2, f"vae.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "vae.py: stopped; --resume goes on from the last checkpoint\n")


if __name__ == "__main__":
    main()
