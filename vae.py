"""Wan2.1's 3D causal VAE: 1 + 4k frames of pixels <-> 1 + k latents, 8 x 8 smaller. Paper sections 3.1-3.3 ("E" and "D").

Same layers and parameter names as Wan2.1 (wan/modules/vae.py), so the official Wan2.1_VAE.pth loads with strict=True. The small
preset `tiny` is the same class with fewer channels; this file also trains and measures it:
    python vae.py --data DIR [DIR ...] --out weights/tiny           train on folders of clips and pictures
    python vae.py --evaluate --data DIR [DIR ...]                   PSNR, SSIM, flicker, re-encoding drift, speed -> vae_metrics.json

Two facts carry the whole project. (1) Causality: time is only ever padded in the past, so the first m latents of a clip are the
latents of its first 4m-3 frames, whatever follows. (2) The first latent is special: it holds one frame and has seen no motion; a later
one holds four. That is why a chunk's continuity latents are re-encoded and not cut off the end of the previous chunk (Appendix D).

Shapes: video (B, 3, T, H, W) in [-1, 1]; latents (B, C, F, h, w), normalised per channel; F = 1 + (T-1)//4, h = H/8, w = W/8.
"""
import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------- config

WAN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
WAN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
           3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


@dataclass(frozen=True)
class VAEConfig:
    dim: int = 96                                       # channels at full resolution
    z_dim: int = 16                                     # latent channels C
    dim_mult: tuple = (1, 2, 4, 4)                      # channels of the four resolutions, in units of dim
    num_res_blocks: int = 2                             # residual blocks a resolution (the decoder has one more)
    temporal_downsample: tuple = (False, True, True)    # which of the three downsamplings also halve time
    latents_mean: tuple = WAN_MEAN                      # of the encoder's output over the training set, per channel
    latents_std: tuple = WAN_STD


PRESETS = {"wan2.1": VAEConfig(),
           "tiny": VAEConfig(dim=16, dim_mult=(1, 2, 4, 6), num_res_blocks=1, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)}

# ----------------------------------------------------------------------------------------------------------------- parts
# Every layer that looks back in time takes a `cache`: a dict from the layer to the end of what it saw before. cache=None means "the
# clip starts here and this is all of it"; an empty dict means "it starts here and more will come". One code path serves both.


class CausalConv3d(nn.Conv3d):
    """Conv3d whose temporal padding lies entirely in the past: output t reads inputs t-2, t-1, t.

    A k x 3 x 3 convolution is the sum of k ordinary 3 x 3 convolutions, one for each tap in time, added with a shift. Written so,
    the zeros before the clip need not exist (a tap that would read them is skipped; a picture costs one tap), and on CPU it is
    1.1 to 15 times faster than F.conv3d, whose float32 path is slow for short clips."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=0):
        super().__init__(c_in, c_out, kernel, stride, padding)
        self.past = 2 * self.padding[0]                                         # frames of history that it reads

    def forward(self, x, cache=None):                                           # (B, C, T, H, W) -> (B, C', T', H', W')
        zeros, x = self.past, x.movedim(1, -1)                                  # frames of the past that are not there; (B, T, H, W, C)
        if self.past and cache is not None:
            if self in cache:
                x, zeros = torch.cat([cache[self], x], 1), self.past - cache[self].shape[1]
            cache[self] = x[:, -self.past:].clone()                             # clone: a view would keep all of x alive
        frames, (k, s) = x.movedim(-1, 2), (self.kernel_size[0], self.stride[0])            # (B, T, C, H, W)
        n = (x.shape[1] + zeros - k) // s + 1                                   # T', frames that come out
        out = None
        for tap in reversed(range(k)):                                          # the last tap reads the present, the others the past
            skip = max(0, zeros - tap)                                          # its first `skip` outputs would only read zeros
            if skip < n:
                seen = frames[:, skip * s + tap - zeros::s][:, :n - skip]       # (B, n - skip, C, H, W)
                y = F.conv2d(seen.flatten(0, 1), self.weight[:, :, tap], self.bias if out is None else None,
                             self.stride[1:], self.padding[1:]).unflatten(0, seen.shape[:2])
                if out is None:
                    out = y
                else:
                    out[:, skip:].add_(y)
        return out.transpose(1, 2)


class RMS_norm(nn.Module):
    """x / ||x|| * sqrt(C) * gamma over channels, at every pixel by itself."""

    def __init__(self, dim, images=False):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *((1,) * (2 if images else 3))))

    def forward(self, x):
        y = F.rms_norm(x.movedim(1, -1), (x.shape[1],), self.gamma.flatten().to(x.dtype), eps=1e-12)
        return y.movedim(-1, 1)


class ResidualBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.residual = nn.Sequential(RMS_norm(c_in), nn.SiLU(), CausalConv3d(c_in, c_out, 3, padding=1),
                                      RMS_norm(c_out), nn.SiLU(), nn.Dropout(0.0), CausalConv3d(c_out, c_out, 3, padding=1))
        self.shortcut = CausalConv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, cache=None):                                           # (B, c_in, T, H, W) -> (B, c_out, T, H, W)
        h = x
        for layer in self.residual:
            h = layer(h, cache) if isinstance(layer, CausalConv3d) else layer(h)
        return h + self.shortcut(x)


class AttentionBlock(nn.Module):
    """Single-head attention over the pixels of one frame. Frames never meet here: all mixing over time is convolution."""

    def __init__(self, dim):
        super().__init__()
        self.norm = RMS_norm(dim, images=True)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x, cache=None):
        B, C, T, H, W = x.shape
        h = self.norm(x.transpose(1, 2).flatten(0, 1))                          # (B*T, C, H, W)
        q, k, v = self.to_qkv(h).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)       # (B*T, 1, H*W, C)
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(B * T, C, H, W)
        return x + self.proj(h).unflatten(0, (B, T)).transpose(1, 2)


class Resample(nn.Module):
    """Halve or double H and W frame by frame; the 3d modes also halve or double time, except for the clip's very first frame."""

    def __init__(self, dim, mode):
        super().__init__()
        self.mode = mode
        if mode.startswith("up"):
            self.resample = nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, dim // 2, 3, padding=1))
        else:
            self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        if mode == "upsample3d":
            self.time_conv = CausalConv3d(dim, dim * 2, (3, 1, 1), padding=(1, 0, 0))
        elif mode == "downsample3d":
            self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1))

    def space(self, x):
        T = x.shape[2]
        x = self.resample(x.transpose(1, 2).flatten(0, 1))                      # frames fold into the batch: (B*T, C', H', W')
        return x.unflatten(0, (-1, T)).transpose(1, 2)

    def forward(self, x, cache=None):
        if self.mode == "upsample3d":
            x = self.double_time(x, cache)
        x = self.space(x)
        return self.halve_time(x, cache) if self.mode == "downsample3d" else x

    def double_time(self, x, cache):                                            # (B, C, F, h, w) -> (B, C, 2F-1 or 2F, h, w)
        first = cache is None or self not in cache                              # the first latent stays one frame and is not even
        head, x = (x[:, :, :1], x[:, :, 1:]) if first else (x[:, :, :0], x)     # part of what time_conv sees afterwards
        if cache is not None:
            cache[self] = True
        if x.shape[2] == 0:
            return head
        y = self.time_conv(x, {} if cache is None else cache)
        even, odd = y.chunk(2, 1)                                               # 2C channels = frame 2t and frame 2t+1
        return torch.cat([head, torch.stack([even, odd], 3).flatten(2, 3)], 2)

    def halve_time(self, x, cache):                                             # (B, C, T, h, w) -> 1+(T-1)/2 first, then T/2
        past = None if cache is None else cache.get(self)
        if cache is not None:
            cache[self] = x[:, :, -1:].clone()
        if past is not None:
            return self.time_conv(torch.cat([past, x], 2))
        return torch.cat([x[:, :, :1], self.time_conv(x)], 2) if x.shape[2] > 1 else x


# ----------------------------------------------------------------------------------------------------------------- whole


def run(layers, x, cache):
    """An nn.Sequential with the cache handed to the layers that want one."""
    for layer in layers:
        x = layer(x) if isinstance(layer, (RMS_norm, nn.SiLU)) else layer(x, cache)
    return x


class Encoder3d(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        dims = [cfg.dim * m for m in (1, *cfg.dim_mult)]
        self.conv1 = CausalConv3d(3, dims[0], 3, padding=1)
        layers = []
        for i, (c_in, c_out) in enumerate(zip(dims[:-1], dims[1:])):
            layers += [ResidualBlock(c_in if j == 0 else c_out, c_out) for j in range(cfg.num_res_blocks)]
            if i < len(cfg.dim_mult) - 1:
                layers.append(Resample(c_out, "downsample3d" if cfg.temporal_downsample[i] else "downsample2d"))
        self.downsamples = nn.Sequential(*layers)
        self.middle = nn.Sequential(ResidualBlock(c_out, c_out), AttentionBlock(c_out), ResidualBlock(c_out, c_out))
        self.head = nn.Sequential(RMS_norm(c_out), nn.SiLU(), CausalConv3d(c_out, 2 * cfg.z_dim, 3, padding=1))

    def forward(self, x, cache=None):                                           # (B, 3, T, H, W) -> (B, 2C, F, h, w)
        return run([self.conv1, *self.downsamples, *self.middle, *self.head], x, cache)


class Decoder3d(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        dims = [cfg.dim * m for m in (cfg.dim_mult[-1], *reversed(cfg.dim_mult))]
        up3d = cfg.temporal_downsample[::-1]
        self.conv1 = CausalConv3d(cfg.z_dim, dims[0], 3, padding=1)
        self.middle = nn.Sequential(ResidualBlock(dims[0], dims[0]), AttentionBlock(dims[0]), ResidualBlock(dims[0], dims[0]))
        layers = []
        for i, (c_in, c_out) in enumerate(zip(dims[:-1], dims[1:])):
            c_in = c_in // 2 if i else c_in                                     # the upsampling before has halved them
            layers += [ResidualBlock(c_in if j == 0 else c_out, c_out) for j in range(cfg.num_res_blocks + 1)]
            if i < len(cfg.dim_mult) - 1:
                layers.append(Resample(c_out, "upsample3d" if up3d[i] else "upsample2d"))
        self.upsamples = nn.Sequential(*layers)
        self.head = nn.Sequential(RMS_norm(c_out), nn.SiLU(), CausalConv3d(c_out, 3, 3, padding=1))

    def forward(self, z, cache=None):                                           # (B, C, F, h, w) -> (B, 3, T, H, W)
        return run([self.conv1, *self.middle, *self.upsamples, *self.head], z, cache)


class WanVAE(nn.Module):
    """encode, decode and decode_stream; everything else in this file trains or measures them."""

    def __init__(self, config=PRESETS["wan2.1"]):
        super().__init__()
        self.config = config
        self.encoder = Encoder3d(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1)        # "quant"
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, 1)                # "post-quant"
        self.decoder = Decoder3d(config)
        stats = torch.tensor([config.latents_mean, config.latents_std]).view(2, 1, -1, 1, 1, 1)
        self.register_buffer("stats", stats, persistent=False)                  # not in the state dict: Wan keeps them in code

    def posterior(self, video, cache=None):
        """video (B, 3, T, H, W) -> mean, log-variance of the raw latents, each (B, C, F, h, w)."""
        video = video.contiguous(memory_format=torch.channels_last_3d)          # 1.2 - 2 x faster convolutions on CPU, and folding
        return self.conv1(self.encoder(video, cache)).chunk(2, 1)               # frames into the batch costs no copy

    def encode(self, video):
        """video (B, 3, T, H, W) in [-1, 1], T = 4k+1, H and W multiples of 8 -> normalised latents (B, C, F, h, w).

        The posterior is never sampled: its mean is the latent. Without gradients the clip goes through in groups of frames, so that
        memory does not grow with T; the result is the same. ValueError for any other shape (Wan would drop frames silently)."""
        B, C, T, H, W = video.shape
        if C != 3 or T % 4 != 1 or H % 8 or W % 8:
            raise ValueError(f"encode wants (B, 3, 4k+1, 8i, 8j), not {tuple(video.shape)}")
        if torch.is_grad_enabled() or T == 1:
            mu = self.posterior(video)[0]
        else:
            cache = {}
            mu = torch.cat([self.posterior(x, cache)[0] for x in (video[:, :, :1], *video[:, :, 1:].split(16, 2))], 2)
        return (mu - self.stats[0]) / self.stats[1]

    def decode(self, latents):
        """latents (B, C, F, h, w) -> video (B, 3, 4(F-1)+1, 8h, 8w), clamped to [-1, 1] outside training."""
        if torch.is_grad_enabled():
            z = (latents * self.stats[1] + self.stats[0]).contiguous(memory_format=torch.channels_last_3d)
            return self.decoder(self.conv2(z))
        return torch.cat(list(self.decode_stream(latents)), 2)

    @torch.no_grad()
    def decode_stream(self, latents):
        """The same video in pieces as they come, (B, 3, 1, H, W) and then (B, 3, 4, H, W) each: O(1) memory, first frame at once."""
        cache = {}
        z = (latents * self.stats[1] + self.stats[0]).to(self.conv2.weight.dtype)           # the decoder may be bfloat16
        for piece in z.contiguous(memory_format=torch.channels_last_3d).split(1, 2):
            yield self.decoder(self.conv2(piece), cache).float().clamp(-1, 1)


def load_vae(folder, device="cpu"):
    """weights folder (config.json, vae.safetensors) -> WanVAE in float32, eval mode. FileNotFoundError / ValueError if unusable."""
    from safetensors.torch import load_file
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vae"]
    vae = WanVAE(VAEConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}))
    vae.load_state_dict(load_file(folder / "vae.safetensors"))
    return vae.float().eval().requires_grad_(False).to(device)


# ------------------------------------------------------------------------------------------------------------------ loss


def spatial_gradient(x):
    return x[..., 1:, :-1] - x[..., :-1, :-1], x[..., :-1, 1:] - x[..., :-1, :-1]


def vae_loss(vae, video, cfg, generator):
    """video (B, 3, T, H, W) -> loss, dict of its parts. L1 + L1 of the spatial and temporal gradients + a small KL.

    The gradient terms cost sharp edges and flicker more than plain L1 does; KL only keeps the latents in a smooth, bounded cloud
    (latent diffusion, arXiv 2112.10752): its weight is so small that the noise it asks for stays below what the eye sees."""
    mu, logvar = vae.posterior(video)
    mu, logvar = mu.float(), logvar.float().clamp(-20, 10)
    eps = torch.randn(mu.shape, generator=generator)
    z = mu + eps * torch.exp(0.5 * logvar)
    out = vae.decoder(vae.conv2(z)).float()
    l1 = (out - video).abs().mean()
    edges = sum((a - b).abs().mean() for a, b in zip(spatial_gradient(out), spatial_gradient(video)))
    flicker = ((out.diff(dim=2) - video.diff(dim=2)).abs().mean() if video.shape[2] > 1 else l1 * 0)
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean()
    loss = l1 + cfg.edges * edges + cfg.flicker * flicker + cfg.kl * kl
    return loss, dict(l1=l1, edges=edges, flicker=flicker, kl=kl)


# ------------------------------------------------------------------------------------------------------------------ data


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 9000               # optimiser steps
    lr: float = 1.5e-3              # peak, after the warm-up; then linearly to zero
    warmup: int = 300               # steps
    edges: float = 0.5              # weight of the spatial-gradient term
    flicker: float = 0.5            # weight of the temporal-gradient term
    kl: float = 1e-4                # weight of the KL term, mean over latents
    ema: float = 0.999              # decay of the averaged weights that are shipped
    seed: int = 0
    minutes: float = 5.0            # between checkpoints


# The course of training: (share of the steps, frames, side of the crop, clips a batch). Pictures first, because with one frame only the
# last tap of every temporal kernel acts: an image autoencoder, many diverse faces a second. Then motion, small crops before whole frames.
COURSE = ((0.45, 1, 64, 16), (0.55, 1, 128, 4), (0.83, 9, 64, 2), (0.93, 17, 64, 1), (1.00, 9, 128, 1))


def training_batch(clips, frames, side, size, generator):
    """-> (B, 3, T, side, side) in [-1, 1]: random place and time, mirrored, brightness, contrast and colour changed a little."""
    def rand(n):
        return int(torch.randint(n, (), generator=generator))
    out = []
    while len(out) < size:
        video = clips[rand(len(clips))].frames                                  # uint8 (N, H, W, 3), memory-mapped
        if len(video) < frames:
            continue
        f, y, x = rand(len(video) - frames + 1), rand(video.shape[1] - side + 1), rand(video.shape[2] - side + 1)
        v = torch.from_numpy(np.array(video[f:f + frames, y:y + side, x:x + side])).permute(3, 0, 1, 2) / 127.5 - 1
        v = v.flip(-1) if rand(2) else v
        a = 1 + 0.4 * (torch.rand((3, 1, 1, 1), generator=generator) - 0.5) * torch.rand((), generator=generator)
        b = 0.4 * (torch.rand((), generator=generator) - 0.5) * torch.rand((), generator=generator)
        out.append((v * a + b).clamp(-1, 1))
    return torch.stack(out)


# ----------------------------------------------------------------------------------------------------------------- train


def write_safetensors(path, tensors, metadata):
    """Write aside, then rename: whoever kills us, the old file or the new one is there, never half of one."""
    from safetensors.torch import save_file
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, f"{path}.part", metadata)
    os.replace(f"{path}.part", path)


def save_checkpoint(path, vae, ema, opt, step):
    tensors = {f"model.{k}": v for k, v in vae.state_dict().items()} | {f"ema.{k}": v for k, v in ema.items()}
    for name, p in vae.named_parameters():
        tensors |= {f"adam.{key}.{name}": v for key, v in opt.state[p].items()} if p in opt.state else {}
    write_safetensors(path, tensors, {"step": str(step)})


def load_checkpoint(path, vae, ema, opt):
    from safetensors import safe_open
    with safe_open(path, "pt") as f:
        tensors, step = {k: f.get_tensor(k) for k in f.keys()}, int(f.metadata()["step"])
    vae.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    ema.update({k[4:]: v for k, v in tensors.items() if k.startswith("ema.")})
    for name, p in vae.named_parameters():
        keys = [k for k in tensors if k.startswith("adam.") and k.endswith("." + name) and k.split(".", 2)[2] == name]
        if keys:
            opt.state[p] = {k.split(".", 2)[1]: tensors[k].to(memory_format=torch.preserve_format) for k in keys}
    return step


def export(folder, vae, ema, clips):
    """Measure mean and std of the latents, then write vae.safetensors (float16) and the "vae" part of config.json."""
    vae.load_state_dict(ema)
    total, square, n = 0, 0, 0
    with torch.no_grad():
        for clip in clips[:: max(1, len(clips) // 64)]:
            T = min(17, (len(clip.frames) - 1) // 4 * 4 + 1)
            mu = vae.posterior(pixels(clip.frames[:T]))[0].double()
            total, square, n = total + mu.sum((0, 2, 3, 4)), square + mu.square().sum((0, 2, 3, 4)), n + mu[:, 0].numel()
    mean = total / n
    std = (square / n - mean ** 2).sqrt()
    config = asdict(vae.config) | {"latents_mean": [round(x, 4) for x in mean.tolist()], "latents_std": [round(x, 4) for x in std.tolist()]}
    write_safetensors(folder / "vae.safetensors", {k: v.half() for k, v in ema.items()}, {"class": "WanVAE"})
    path = folder / "config.json"
    every = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    Path(f"{path}.part").write_text(json.dumps(every | {"vae": config}, indent=1), encoding="utf-8")
    os.replace(f"{path}.part", path)


def pixels(frames):
    """uint8 (T, H, W, 3) -> (1, 3, T, H, W) in [-1, 1]."""
    return (torch.from_numpy(np.array(frames)).permute(3, 0, 1, 2)[None] / 127.5 - 1)


def train(cfg, config, clips, out, resume):
    torch.manual_seed(cfg.seed)
    vae = WanVAE(config)
    inflate(vae)
    opt = torch.optim.AdamW(vae.parameters(), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.0)
    ema = {k: v.clone() for k, v in vae.state_dict().items()}
    path = Path("runs/vae/checkpoint.safetensors")
    start = load_checkpoint(path, vae, ema, opt) if resume and path.exists() else 0
    last_save = clock = time.time()
    seen = 0
    for step in range(start, cfg.steps + 1):
        # ------------------------------------------------------------------------------------------------ save
        if step == cfg.steps or time.time() - last_save > 60 * cfg.minutes:
            save_checkpoint(path, vae, ema, opt, step)
            strip(vae, ema, clips, Path("runs/vae/strip.png"))
            last_save = time.time()
        if step == cfg.steps:
            break
        # ----------------------------------------------------------------------------------------------- TRAIN
        generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)  # by step: a resumed run draws what the killed one would
        frames, side, size = next(stage[1:] for stage in COURSE if step < stage[0] * cfg.steps)
        video = training_batch(clips, frames, side, size, generator)            # (B, 3, T, side, side)
        lr = cfg.lr * min(1, (step + 1) / cfg.warmup) * (1 - step / cfg.steps)
        opt.param_groups[0]["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16):
            loss, parts = vae_loss(vae, video, cfg, generator)
        if not torch.isfinite(loss):
            raise SystemExit(f"loss is {loss.item()} at step {step}; the last good checkpoint is {path}")
        opt.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        opt.step()
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
    export(out, vae, ema, clips)


def inflate(vae):
    """Start as an image autoencoder: zero every past tap; let the temporal up- and downsampling begin as 'repeat' and 'keep the last'."""
    with torch.no_grad():
        for name, layer in vae.named_modules():
            if isinstance(layer, CausalConv3d) and layer.kernel_size[0] == 3:
                layer.weight[:, :, :-1] = 0
                if name.endswith("time_conv"):
                    layer.weight.zero_()
                    layer.bias.zero_()
                    layer.weight[:, :, -1, 0, 0] = torch.eye(layer.in_channels).repeat(layer.out_channels // layer.in_channels, 1)


@torch.no_grad()
def strip(vae, ema, clips, path):
    """Input above reconstruction for eight clips, with the averaged weights: look at it before believing a number."""
    from PIL import Image
    averaged = WanVAE(vae.config).eval()
    averaged.load_state_dict(ema)
    columns = []
    for clip in clips[:: max(1, len(clips) // 8)][:8]:
        T = min(9, (len(clip.frames) - 1) // 4 * 4 + 1)
        video = pixels(clip.frames[:T])
        both = torch.cat([video[0, :, -1], averaged.decode(averaged.encode(video))[0, :, -1]], 1)       # (3, 2H, W)
        columns.append(both)
    image = ((torch.cat(columns, 2).permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    Image.fromarray(image).save(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="folders of clips and pictures")
    parser.add_argument("--cache", nargs="*", help="where the decoded frames are kept, one per data folder")
    parser.add_argument("--out", type=Path, default=Path("weights/tiny"), help="where the weights go")
    parser.add_argument("--resume", action="store_true", help="go on from runs/vae")
    for field in fields(TrainConfig):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    args = parser.parse_args(argv)
    from data import ClipFolder
    clips = []
    for i, folder in enumerate(args.data):
        clips += ClipFolder(folder, 128, "train", args.cache[i] if args.cache else None, need_audio=False).clips
    cfg = TrainConfig(**{f.name: getattr(args, f.name) for f in fields(TrainConfig)})
    print(f"{len(clips)} clips | {cfg}", flush=True)
    train(cfg, PRESETS["tiny"], clips, args.out, args.resume)


if __name__ == "__main__":
    main()
