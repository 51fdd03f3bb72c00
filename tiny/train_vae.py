"""Trains the small VAE on folders of clips and pictures, and measures it. Not in the paper.

    python -m tiny.train_vae --data PUPPETS GRID PORTRAITS                    about 2 h of two cores
    python -m tiny.train_vae --data PUPPETS GRID --init weights/tiny --steps 4000 --lr 8e-4
    python -m tiny.train_vae --data PUPPETS GRID --evaluate --out weights/tiny

With --init training continues from trained weights, and their latents change. train_decoder.py goes
on from here: a sharper decoder for latents that stay. --evaluate measures held-out clips, into
OUT/vae_metrics.json. Training writes vae.safetensors (averaged weights, float16) and the "vae" part
of config.json into OUT.

The curriculum goes from easy to hard: pictures first, where only the last tap of every temporal
kernel acts (an image autoencoder: many diverse faces a second), then short clips, then long ones.
Wan trains in the same order (Wan report, arXiv 2503.20314, section 4.1).

Shapes: B batch, T pixel frames, F latent frames, C channels, H W pixels, h w latent grid.
"""
import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image
from safetensors import safe_open

from common import (
    PresetOnly,
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
from data import ClipFolder, names_of, one_per_folder, to_tensor, to_uint8
from tiny.linear import principal_components
from tiny.muon import Muon
from vae import CausalConv3d, ResidualBlock, VAEConfig, WanVAE, load_vae

# ------------------------------------------------------------------------------------------ config

SIZE = 256                                  # side of the clips, pixels
TINY = VAEConfig(dim=16, z_dim=24, dim_mult=(1, 2, 4, 6), num_res_blocks=1, patch=2,
                 latents_mean=(0.0,) * 24, latents_std=(1.0,) * 24)


@dataclass(frozen=True)
class Files:
    data: tuple[Path, ...]                  # folders of clips and pictures, see data.py
    cache: tuple[Path, ...] = ()            # where data.py keeps frames, one for each of --data
    init: Path | None = None                # start from this folder's VAE
    out: Path = Path("runs/vae/weights")    # folder of the weights
    run_dir: Path = Path("runs/vae")        # folder of the checkpoint and the sample grid
    resume: bool = False                    # go on from the checkpoint
    overwrite: bool = False                 # replace the run that --run-dir holds
    evaluate: bool = False                  # no training: measure --out on held-out clips
    clips: int = 20                         # clips of a folder that --evaluate measures


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 2400                       # optimiser steps
    lr: float = 2e-3                        # peak, after the warm-up; then linearly to zero
    warmup: int = 50                        # steps to the peak learning rate
    edges: float = 0.5                      # weight of the spatial-gradient loss (L1)
    square: float = 10.0                    # weight of the squared error
    flicker: float = 20.0                   # weight of the squared error of frame differences
    colour: float = 1.0                     # weight of the error of means over 16 x 16 pixels
    kl: float = 1e-4                        # weight of the KL divergence, a mean over latents
    target: float = 1.0                     # weight of latents' distance from principal components
    cycle: float = 1.0                      # weight of the distance of output's and clip's latents
    motion_channels: PresetOnly[int] = 8    # the last latent channels, for motion inside a latent
    mouth_crop_prob: float = 0.0            # share of crops cut around the mouth of a centred face
    ema: float = 0.999                      # decay of the averaged weights, which are the result
    bf16: bool = True                       # bfloat16 autocast
    compile: bool = False                   # a third faster, after three minutes a stage
    save_minutes: float = 5.0               # from one checkpoint and sample grid to the next
    seed: int = 0                           # of everything random


# Stages of a curriculum: (share of the steps at which it ends, frames, side of a crop, clips of a
# batch). Small crops cost little, and the network is convolutional: whole frames work as well.
CURRICULUM = ((0.15, 1, 128, 16), (0.70, 9, 128, 4), (1.00, 25, 128, 2))
FINETUNE_CURRICULUM = ((0.50, 17, 128, 4), (1.00, 41, 128, 2))    # with --init
MOUTH = 0.58, 0.84, 0.32, 0.68              # top, bottom, left, right in a face-centred clip

# -------------------------------------------------------------------------------------------- data


def crop_around_mouth(H, W, side, rand):
    """-> top, left of a crop whose middle is within 8 pixels of where centred faces have a mouth"""
    middle_y, middle_x = (MOUTH[0] + MOUTH[1]) / 2 * H, W / 2
    top = round(middle_y) - side // 2 + rand(17) - 8
    left = round(middle_x) - side // 2 + rand(17) - 8
    return min(max(top, 0), H - side), min(max(left, 0), W - side)


def training_batch(folders, frames, side, size, generator, mouth_crop_prob=0.0):
    """Folders, lists of clips -> (B, 3, T, side, side) in [-1, 1].

    Random place and time, mirrored, brightness, contrast and colour changed a little. Every folder
    has the same share, however small."""
    def rand(n):
        return int(torch.randint(n, (), generator=generator))

    def uniform(*shape):
        return torch.rand(shape, generator=generator)

    batch = []
    while len(batch) < size:
        clips = folders[rand(len(folders))]
        video = clips[rand(len(clips))].frames                      # uint8 (N, H, W, 3)
        if len(video) < frames:
            continue
        H, W = video.shape[1:3]
        start, top, left = rand(len(video) - frames + 1), rand(H - side + 1), rand(W - side + 1)
        if mouth_crop_prob and uniform() < mouth_crop_prob:
            top, left = crop_around_mouth(H, W, side, rand)
        crop = video[start:start + frames, top:top + side, left:left + side]
        crop = to_tensor(crop)[0]                                   # (3, T, side, side)
        if rand(2):
            crop = crop.flip(-1)
        contrast = 1 + 0.4 * (uniform(3, 1, 1, 1) - 0.5) * uniform()
        brightness = 0.4 * (uniform() - 0.5) * uniform()
        batch.append((crop * contrast + brightness).clamp(-1, 1))
    return torch.stack(batch)


class ReplayBuffer:
    """Clips that the VAE has already reconstructed, with their first inputs as targets.

    A long video is decoded and encoded again at every chunk border, and small errors add up: 30
    round trips cost 11 dB without this. So now and then the last clip of a batch is an earlier
    *output* of the VAE, whose target is that clip's *first* input: the network learns to undo the
    error of the last pass. It costs nothing, since a step's output is a later step's input. Only
    a quarter of all inputs are such: when all were, training never saw a true clip and diverged."""

    def __init__(self, size=8, oldest=20, share=0.25):
        self.size, self.oldest, self.share = size, oldest, share
        self.slot = None                    # of this step's clip, None if it is not stored
        self.tensors = {}                   # "now", "first" (size, 3, T, H, W), "age" (size,)

    def replace_last(self, video, generator):
        """video (B, 3, T, H, W) -> inputs, targets of this step; `video` itself if not replaced.

        The slot is drawn. One whose clip is too old takes the batch's last clip instead."""
        if not self.tensors or self.tensors["now"].shape[1:] != video.shape[1:]:
            now = torch.zeros(self.size, *video.shape[1:], dtype=torch.float16)
            age = torch.full((self.size,), self.oldest)
            self.tensors = {"now": now, "first": now.clone(), "age": age}   # a new stage
        slot = int(torch.randint(self.size, (), generator=generator))
        if torch.rand((), generator=generator) >= self.share * len(video):
            self.slot = None
            return video, video
        self.slot = slot
        inputs, targets = video.clone(), video.clone()
        if self.tensors["age"][slot] >= self.oldest:
            self.tensors["age"][slot] = 0
            self.tensors["first"][slot] = video[-1]
        else:
            inputs[-1] = self.tensors["now"][slot]
            targets[-1] = self.tensors["first"][slot]
        return inputs, targets

    def store(self, output):
        if self.slot is not None:
            self.tensors["now"][self.slot] = output[-1].detach().clamp(-1, 1)
            self.tensors["age"][self.slot] += 1

    def load(self, path):
        """From a checkpoint: their shape is that of the stage in which it was written."""
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith("replay.")]
            self.tensors = {name.removeprefix("replay."): file.get_tensor(name) for name in names}

# ----------------------------------------------------------------------------------- first weights


@torch.no_grad()
def initialise(vae):
    """Make a new VAE a nearly linear image autoencoder, in place.

    Residual branches are zero, and so are the past taps of all kernels; time is halved by keeping
    the last frame and doubled by repeating it. The posterior is narrow: with one as wide as the
    latents themselves the decoder learns nothing in the first thousand steps."""
    vae.conv1.bias[vae.config.z_dim:] = -6.0                        # log-variance
    for name, layer in vae.named_modules():
        if isinstance(layer, ResidualBlock):
            layer.residual[-1].weight.zero_()
            layer.residual[-1].bias.zero_()
        if isinstance(layer, CausalConv3d) and layer.kernel_size[0] == 3:
            layer.weight[:, :, :-1] = 0
            if name.endswith("time_conv"):
                layer.weight.zero_()
                layer.bias.zero_()
                copies = layer.out_channels // layer.in_channels    # 2 when time is doubled
                layer.weight[:, :, -1, 0, 0] = torch.eye(layer.in_channels).repeat(copies, 1)


def new_vae(cfg, config, folders):
    """-> WanVAE with its first weights, and the target of its latents, see principal_components"""
    vae = WanVAE(config)
    initialise(vae)
    _, frames, side, _ = CURRICULUM[1]
    batches = []
    for i in range(24):
        generator = torch.Generator().manual_seed(cfg.seed + i)
        batches.append(training_batch(folders, frames, side, 16, generator, cfg.mouth_crop_prob))
    channels = config.z_dim - cfg.motion_channels
    return vae, principal_components(batches, channels, cfg.motion_channels, config.patch)


def trained_vae(cfg, folder):
    """-> WanVAE of that folder, ready to be trained on; how many of its channels are for motion"""
    vae = load_vae(folder).requires_grad_(True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return vae, config.get("tiny", {}).get("motion_channels", 0)

# -------------------------------------------------------------------------------------------- loss


def spatial_gradient(x):
    """(..., H, W) -> vertical and horizontal differences, each (..., H - 1, W - 1)"""
    corner = x[..., :-1, :-1]
    return x[..., 1:, :-1] - corner, x[..., :-1, 1:] - corner


def reconstruction_losses(output, video):
    """Two videos (B, 3, T, H, W) -> {name: loss}.

    l1 asks for the median, and the median of an uncertain motion is to stand still: with l1 alone,
    in space and time, lips moved a third of what they should within a latent's four frames. square
    and flicker ask for the mean. colour weighs what l1 gives up first: green hair became grey."""
    l1 = (output - video).abs().mean()
    pairs = zip(spatial_gradient(output), spatial_gradient(video))
    edges = sum((a - b).abs().mean() for a, b in pairs)
    square = (output - video).square().mean()
    flicker = l1 * 0
    if video.shape[2] > 1:
        flicker = (output.diff(dim=2) - video.diff(dim=2)).square().mean()
    colour = nnf.avg_pool3d(output - video, (1, 16, 16)).abs().mean()
    return {"l1": l1, "square": square, "edges": edges, "flicker": flicker, "colour": colour}


def vae_loss(vae, inputs, video, cfg, generator, target=None):
    """inputs, video (B, 3, T, H, W) -> loss, {name: its parts}, output (B, 3, T, H, W).

    Beside the reconstruction losses:
    kl      keeps the latents in a smooth, bounded region (latent diffusion, arXiv 2112.10752);
            its weight is so small that the noise it asks for cannot be seen
    target  squared distance of the latents from target(video), if given
    cycle   squared distance of the output's latents from those of `video`: frames that are encoded
            again at every chunk border must give the latents that they were decoded from"""
    mu, logvar = vae.posterior(inputs)
    mu, logvar = mu.float(), logvar.float().clamp(-20, 10)          # (B, C, F, h, w)
    eps = torch.randn(mu.shape, generator=generator)
    z = mu + eps * torch.exp(0.5 * logvar)
    output = vae.decoder(vae.conv2(z)).float()

    losses = reconstruction_losses(output, video)
    losses["kl"] = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean()
    losses["target"] = (mu - target(video)).square().mean() if target else mu.mean() * 0
    losses["cycle"] = losses["l1"] * 0
    if cfg.cycle:
        wanted = mu.detach().clone()
        if inputs is not video:
            # The last input is a replayed clip, its latents should be those of the first input.
            # After the computation of mu: autocast keeps its casts, here without gradients.
            with torch.no_grad():
                wanted[-1:] = vae.posterior(video[-1:])[0].float()
        again = vae.posterior(output.clamp(-1, 1))[0].float()
        losses["cycle"] = (again - wanted).square().mean()
    weighted = sum(getattr(cfg, name) * loss for name, loss in losses.items() if name != "l1")
    return losses["l1"] + weighted, losses, output

# -------------------------------------------------------------------------------------------- loop


def with_weights(config, weights):
    """A second VAE with these (averaged) weights. A compiled one would compile for new shapes."""
    vae = WanVAE(config).eval()
    vae.load_state_dict(weights)
    return vae


@torch.no_grad()
def save_sample_grid(path, vae, clips):
    """Input above reconstruction, for eight clips: look at it before you believe a number."""
    columns = []
    for clip in clips[:: max(1, len(clips) // 8)][:8]:
        T = min(9, (len(clip.frames) - 1) // 4 * 4 + 1)
        video = to_tensor(clip.frames[:T])
        output = vae.decode(vae.encode(video))
        columns.append(torch.cat([video[0, :, -1], output[0, :, -1]], 1))       # (3, 2H, W)
    grid = torch.cat(columns, 2)                                                # (3, 2H, 8W)
    save_image(path, Image.fromarray(to_uint8(grid[:, None])[0]))


@torch.no_grad()
def latent_statistics(vae, clips, motion_channels):
    """-> mean, standard deviation of the latents' channels, each (C,). Every clip counts the same.

    Motion channels are almost zero where nothing moves, which is nearly everywhere. Their standard
    deviation is that around the mouth, so that there they are as large as the others."""
    means, squares = [], []                                         # of a frame and of its mouth
    for clip in clips[:: max(1, len(clips) // 128)]:
        T = min(17, (len(clip.frames) - 1) // 4 * 4 + 1)
        mu = vae.posterior(to_tensor(clip.frames[:T]))[0].double()  # (1, C, F, h, w)
        y0, y1, x0, x1 = (round(part * mu.shape[-1]) for part in MOUTH)
        regions = [mu, mu[..., y0:y1, x0:x1]]
        regions = [region.transpose(0, 1).flatten(1) for region in regions]     # (C, n)
        means.append(torch.stack([x.mean(1) for x in regions], 1))
        squares.append(torch.stack([x.square().mean(1) for x in regions], 1))
    mean = torch.stack(means).mean(0)                               # (C, 2)
    std = (torch.stack(squares).mean(0) - mean ** 2).sqrt()         # (C, 2)
    is_motion = torch.arange(len(std)) >= len(std) - motion_channels
    return mean[:, 0], std[:, 1].where(is_motion, std[:, 0])


def as_many_of_each(folders):
    """Clips (no pictures) from every folder, of each as many as the smallest one has."""
    clips = [[clip for clip in folder if len(clip.frames) > 1] for folder in folders]
    fewest = min(len(folder) for folder in clips if folder)
    return sum((folder[:fewest] for folder in clips), [])


def export(folder, vae, clips, motion_channels):
    """vae.safetensors (float16) and its part of config.json; the rest of that file stays.

    The latents' statistics are those of the clips; without clips they stay, too."""
    config = asdict(vae.config)
    if clips:
        mean, std = latent_statistics(vae, clips, motion_channels)
        config["latents_mean"] = [round(x, 4) for x in mean.tolist()]
        config["latents_std"] = [round(x, 4) for x in std.tolist()]
    tensors = {name: tensor.half().contiguous() for name, tensor in vae.state_dict().items()}
    write_safetensors(folder / "vae.safetensors", tensors, {"class": "WanVAE"})
    path = folder / "config.json"
    whole = {"size": SIZE, "audio": "whisper"}
    if path.exists():
        whole = json.loads(path.read_text(encoding="utf-8"))
    tiny = whole.get("tiny", {}) | {"motion_channels": motion_channels}
    write_json(path, whole | {"vae": config, "tiny": tiny})


def make_muon(named_parameters, lr, cfg):
    return Muon(named_parameters, lr)


def train(cfg, config, folders, out, run_dir, resume=False, init=None):
    """Folders, lists of clips -> weights in `out`. config: of a new VAE; init: a trained one's.

    Everything that a step draws depends on its number only, so a resumed run is the same run."""
    torch.manual_seed(cfg.seed)
    if init:
        vae, motion_channels = trained_vae(cfg, init)
        target, curriculum = None, FINETUNE_CURRICULUM
    else:
        vae, target = new_vae(cfg, config, folders)
        motion_channels, curriculum = cfg.motion_channels, CURRICULUM
    state, replay = TrainState({"vae": vae}, {"vae": cfg.lr}, "vae", cfg, make_muon), ReplayBuffer()
    optimizer = state.optimizers["vae"]
    if cfg.compile:
        vae.encoder.compile(dynamic=False)
        vae.decoder.compile(dynamic=False)
    path, start = run_dir / "checkpoint.safetensors", 0
    if resume and path.exists():
        may_change = "steps", "save_minutes", "compile"
        start = load_checkpoint(path, state.tensors, cfg, may_change, init=str(init))
        replay.load(path)
    seen, last_save, clock = 0, time.time(), time.time()
    for step in range(start, cfg.steps + 1):
        # PLUMBING save
        if step == cfg.steps or time.time() - last_save > 60 * cfg.save_minutes:
            replayed = {f"replay.{name}": tensor for name, tensor in replay.tensors.items()}
            save_checkpoint(path, state.tensors | replayed, step, cfg, init=str(init))
            averaged = with_weights(vae.config, state.ema)
            save_sample_grid(run_dir / "samples.png", averaged, sum(folders, []))
            last_save = time.time()
        if step == cfg.steps:
            break

        # TRAIN
        generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
        _, frames, side, size = next(s for s in curriculum if step < s[0] * cfg.steps)
        video = training_batch(folders, frames, side, size, generator, cfg.mouth_crop_prob)
        inputs = video
        if frames > 1:
            inputs, video = replay.replace_last(video, generator)
        lr = cfg.lr * min(1, (step + 1) / cfg.warmup) * (1 - step / cfg.steps)
        optimizer.param_groups[0]["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16, enabled=cfg.bf16):
            loss, losses, output = vae_loss(vae, inputs, video, cfg, generator, target)
        if not torch.isfinite(loss):
            raise ValueError(f"loss is {loss.item()} at step {step}; "
                             f"the last good checkpoint is {path}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = clip_gradients(vae, 1.0)
        optimizer.step()
        if frames > 1:
            replay.store(output)
        state.update_ema(cfg.ema, step)

        # PLUMBING log
        seen += size * frames
        if step % 50 == 0:
            speed = seen / (time.time() - clock)
            parts = " ".join(f"{name} {value.item():.4f}" for name, value in losses.items())
            print(f"step {step:5d}/{cfg.steps} | loss {loss.item():.4f} | {parts} | norm {norm:.2f}"
                  f" | lr {lr:.1e} | {frames} x {side} px | {speed:.0f} frames/s", flush=True)
            clock, seen = time.time(), 0
    export(out, with_weights(vae.config, state.ema), as_many_of_each(folders), motion_channels)

# ---------------------------------------------------------------------------------------- evaluate


def psnr(a, b):
    """Two videos (..., H, W) in [-1, 1] -> decibels, peak 2."""
    return 10 * torch.log10(4 / (a - b).square().mean().clamp_min(1e-10)).item()


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of two videos (1, 3, T, H, W) in [-1, 1].

    11 x 11 Gaussian window of 1.5 px, mean over frames and channels."""
    g = torch.exp(-(torch.arange(11.0) - 5) ** 2 / (2 * 1.5 ** 2))
    window = (g[:, None] * g / g.sum() ** 2)[None, None]            # (1, 1, 11, 11)

    def blur(x):
        return nnf.conv2d(x, window)

    a, b = (((x + 1) / 2)[0].flatten(0, 1).unsqueeze(1) for x in (a, b))        # (3T, 1, H, W)
    ma, mb = blur(a), blur(b)
    va, vb = blur(a * a) - ma ** 2, blur(b * b) - mb ** 2
    cov = blur(a * b) - ma * mb
    same = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4)
    return (same / ((ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4))).mean().item()


def flicker(a, b):
    """Two videos (B, 3, T, H, W) -> mean difference of their frame differences, grey levels."""
    return (a.diff(dim=2) - b.diff(dim=2)).abs().mean().item() * 127.5


def measure(vae, frames):
    """A clip's frames, uint8 (T, H, W, 3) -> {name: figure}, its latents (1, C, F, h, w).

    psnr_round_N: the last nine frames, decoded and encoded N times, as a long video does it."""
    def frame_by_frame(times):
        pictures = [vae.decode(vae.encode(video[:, :, t:t + 1])) for t in times]
        return torch.cat(pictures, 2)

    video = to_tensor(frames)
    z = vae.encode(video)
    out = vae.decode(z)
    y0, y1, x0, x1 = (round(m * video.shape[-1]) for m in MOUTH)
    begin = video[:, :, :9]
    row = {
        "psnr": psnr(out, video),
        "ssim": ssim(out, video),
        "psnr_single_frame": psnr(frame_by_frame(range(0, video.shape[2], 8)), video[:, :, ::8]),
        "psnr_mouth": psnr(out[..., y0:y1, x0:x1], video[..., y0:y1, x0:x1]),
        "flicker": flicker(out[:, :, :9], begin),
        "flicker_frame_by_frame": flicker(frame_by_frame(range(9)), begin)}
    x = tail = video[:, :, -9:]
    for i in range(1, 31):
        x = vae.decode(vae.encode(x))
        if i in (1, 2, 5, 10, 20, 30):
            row[f"psnr_round_{i}"] = psnr(x, tail)
    return row, z


@torch.no_grad()
def decode_seconds(vae, dtype):
    """Seconds to decode 81 frames of 256 x 256 as a stream, the best of three."""
    z = torch.randn(1, vae.config.z_dim, 21, 16, 16)
    vae.decoder.to(dtype)
    vae.conv2.to(dtype)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        list(vae.decode_stream(z))
        seconds.append(time.perf_counter() - start)
    vae.decoder.float()
    vae.conv2.float()
    return min(seconds)


@torch.no_grad()
def evaluate(weights, folders, names, n):
    """n held-out clips of every folder -> figures, printed and written to vae_metrics.json."""
    vae = load_vae(weights)
    figures, latents = {}, []
    for name, clips in zip(names, folders):
        rows = []
        for clip in [clip for clip in clips if len(clip.frames) >= 41][:n]:
            T = min(73, (len(clip.frames) - 1) // 4 * 4 + 1)
            row, z = measure(vae, clip.frames[:T])
            rows.append(row)
            latents.append(z)
        figures[name] = {"clips": len(rows)}
        for key in rows[0] if rows else ():
            figures[name][key] = round(float(np.mean([row[key] for row in rows])), 4)
    if not latents:
        raise ValueError("no held-out clip has 41 frames")
    z = torch.cat(latents, 2)                                       # (1, C, F of all clips, h, w)
    mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))           # (C,)
    figures |= {
        "latents_mean_worst": round(mean.abs().max().item(), 4),
        "latents_std": [round(std.min().item(), 4), round(std.max().item(), 4)],
        "decode_81_frames_seconds": {
            "float32": round(decode_seconds(vae, torch.float32), 3),
            "bfloat16": round(decode_seconds(vae, torch.bfloat16), 3)},
        "parameters": sum(p.numel() for p in vae.parameters()),
        "threads": torch.get_num_threads()}
    print(json.dumps(figures, indent=1))
    write_json(weights / "vae_metrics.json", figures)

# -------------------------------------------------------------------------------------------- main


def check(files, cfg):
    """ValueError for options that make no sense, before anything is read."""
    one_per_folder(files, "cache")
    if not 0 <= cfg.mouth_crop_prob <= 1:
        raise ValueError(f"--mouth-crop-prob {cfg.mouth_crop_prob} is a share, 0 to 1")
    if min(cfg.steps, cfg.warmup) < 1:
        raise ValueError("--steps and --warmup must be at least 1")


def run(files, cfg):
    check(files, cfg)
    trained = files.out if files.evaluate else files.init           # its own size, not a new VAE's
    size = SIZE * load_vae(trained).config.patch // TINY.patch if trained else SIZE
    split, folders = "val" if files.evaluate else "train", []
    for i, folder in enumerate(files.data):
        cache = files.cache[i] if files.cache else None
        folders.append(ClipFolder(folder, size, split, cache, need_audio=False).clips)
    if files.evaluate:
        evaluate(files.out, folders, names_of(files.data), files.clips)
        return
    curriculum = FINETUNE_CURRICULUM if files.init else CURRICULUM
    longest = max(frames for _, frames, _, _ in curriculum)
    if not any(len(clip.frames) >= longest for clip in sum(folders, [])):
        raise ValueError(f"no clip in {' '.join(map(str, files.data))} has the {longest} frames "
                         "that the curriculum asks for")
    print(f"{[len(clips) for clips in folders]} clips | {json.dumps(asdict(cfg))}", flush=True)
    train(cfg, TINY, folders, files.out, files.run_dir, files.resume, files.init)


def main(argv=None):
    files, cfg = parse_args(__doc__, Files, {"tiny": TrainConfig()}, argv)
    stopped = "stopped; --resume goes on from the last checkpoint"
    ours = nullcontext() if files.evaluate else run_folder(files)
    with one_line_errors("tiny.train_vae", stopped), ours:
        run(files, cfg)


if __name__ == "__main__":
    main()
