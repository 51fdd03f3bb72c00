"""Wan2.1's 3D causal VAE: 1 + 4k frames of pixels <-> 1 + k latents, 8 x 8 smaller. Paper sections 3.1-3.3 ("E" and "D").

Same layers and parameter names as Wan2.1 (wan/modules/vae.py), so the official Wan2.1_VAE.pth loads with strict=True. The small
preset `tiny` is the same class, narrower, with eight more latent channels. How it is trained and measured stands in train_vae.py,
and starts from here too:
    python vae.py --data DIR [DIR ...] --out weights/tiny           train on folders of clips and pictures
    python vae.py --evaluate --data DIR [DIR ...]                   PSNR, SSIM, flicker, re-encoding drift, speed -> vae_metrics.json

Two facts carry the whole project. (1) Causality: time is only ever padded in the past, so the first m latents of a clip are the
latents of its first 4m-3 frames, whatever follows. (2) The first latent is special: it holds one frame and has seen no motion; a later
one holds four. That is why a chunk's continuity latents are re-encoded and not cut off the end of the previous chunk (Appendix D).

Shapes: video (B, 3, T, H, W) in [-1, 1]; latents (B, C, F, h, w), normalised per channel; F = 1 + (T-1)//4, h = H/8, w = W/8.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

# ---------------------------------------------------------------------------------------------------------------- config

WAN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
WAN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
           3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


@dataclass(frozen=True)
class VAEConfig:
    dim: int = 96                                       # channels at full resolution
    z_dim: int = 16                                     # latent channels C
    moving: int = 0                                     # the last of them, for what moves within a latent's four frames: ours, see linear.py
    dim_mult: tuple = (1, 2, 4, 4)                      # channels of the four resolutions, in units of dim
    num_res_blocks: int = 2                             # residual blocks a resolution (the decoder has one more)
    temporal_downsample: tuple = (False, True, True)    # which of the three downsamplings also halve time
    latents_mean: tuple = WAN_MEAN                      # of the encoder's output over the training set, per channel
    latents_std: tuple = WAN_STD


PRESETS = {"wan2.1": VAEConfig(),
           "tiny": VAEConfig(dim=16, z_dim=24, moving=8, dim_mult=(1, 2, 4, 6), num_res_blocks=1, latents_mean=(0.0,) * 24, latents_std=(1.0,) * 24)}

# ----------------------------------------------------------------------------------------------------------------- parts
# Every layer that looks back in time takes a `cache`: a dict from the layer to the end of what it saw before. cache=None means "the
# clip starts here and this is all of it"; an empty dict means "it starts here and more will come". One code path serves both.


class CausalConv3d(nn.Conv3d):
    """Conv3d whose temporal padding, if any, lies entirely in the past: output t reads inputs t-2, t-1, t.

    A k x 3 x 3 convolution is the sum of k ordinary 3 x 3 convolutions, one for each tap in time, added with a shift. Written so,
    the zeros before the clip need not exist (a tap that would read them is skipped; a picture costs one tap), and on CPU it is
    1.1 to 28 times faster than F.conv3d, whose float32 path is slow for short clips."""

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
        y = self.time_conv(x, cache)
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


def one_by_one(x):
    """Whether the rows of a batch go through the VAE one after another: a CPU decodes 17 frames of four at once in 7 s, one by one in 2.5."""
    return x.device.type == "cpu" and not torch.is_grad_enabled()


class WanVAE(nn.Module):
    """Wan2.1's VAE: encode, decode, decode_stream. ValueError if the config's statistics are not one number a latent channel."""

    def __init__(self, config=PRESETS["wan2.1"]):
        super().__init__()
        if not len(config.latents_mean) == len(config.latents_std) == config.z_dim:
            raise ValueError(f"latents_mean and latents_std must have {config.z_dim} entries")
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
        if B > 1 and one_by_one(video):
            return torch.cat([self.encode(row) for row in video.split(1)])
        if torch.is_grad_enabled() or T == 1:
            mu = self.posterior(video)[0]
        else:
            cache = {}
            mu = torch.cat([self.posterior(x, cache)[0] for x in (video[:, :, :1], *video[:, :, 1:].split(16, 2))], 2)
        return (mu - self.stats[0]) / self.stats[1]

    def decode(self, latents):
        """latents (B, C, F, h, w) -> video (B, 3, 4(F-1)+1, 8h, 8w), clamped to [-1, 1] outside training."""
        if len(latents) > 1 and one_by_one(latents):
            return torch.cat([self.decode(row) for row in latents.split(1)])
        if torch.is_grad_enabled():
            z = (latents * self.stats[1] + self.stats[0]).contiguous(memory_format=torch.channels_last_3d)
            return self.decoder(self.conv2(z))
        return torch.cat(list(self.decode_stream(latents)), 2)

    @torch.no_grad()
    def decode_stream(self, latents):
        """The same video in pieces as they come, first (B, 3, 1, H, W) and then (B, 3, 16, H, W): O(1) memory, first frame at once.

        Four latents a piece: one at a time costs a sixth more (every layer copies the two frames it remembers in front of the new ones)."""
        cache = {}
        z = (latents * self.stats[1] + self.stats[0]).to(self.conv2.weight.dtype)           # the decoder may be bfloat16
        z = z.contiguous(memory_format=torch.channels_last_3d)
        for piece in (z[:, :, :1], *(z[:, :, 1:].split(4, 2) if z.shape[2] > 1 else ())):
            yield self.decoder(self.conv2(piece), cache).float().clamp(-1, 1)


def load_vae(folder, device="cpu"):
    """weights folder (config.json, vae.safetensors) -> WanVAE in float32, eval mode. ValueError if it is not one."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vae"]
        vae = WanVAE(VAEConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}))
        vae.load_state_dict(load_file(folder / "vae.safetensors"))
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise ValueError(f"no usable VAE in {folder}: {' '.join(str(error).split())[:200]}") from None
    return vae.float().eval().requires_grad_(False).to(device)


if __name__ == "__main__":
    from train_vae import main
    main()
