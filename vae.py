"""Wan2.1's 3D causal VAE: 1 + 4k frames of pixels <-> 1 + k latents, 8 x 8 (16 x 16) smaller.

Paper sections 3.1-3.3 ("E" and "D"). Layers and parameter names are those of Wan2.1
(wan/modules/vae.py), so the official Wan2.1_VAE.pth loads with strict=True. The small VAE of
weights/tiny is the same class with other widths; tiny/train_vae.py trains and measures it.

1. Causality: time is padded only in the past, so the first m latents of a clip are the latents of
   its first 4m - 3 frames, whatever follows.
2. The first latent is special: it holds one frame and no motion, a later one holds four frames.
   Continuity latents are therefore re-encoded from pixels, not copied from the end of the chunk
   before (Appendix D).

A small VAE may leave Wan's way (patch = 2; Wan2.1: patch = 1): its encoder sees the means of
2 x 2 pixels, and its decoder stops at a quarter of the picture's side, where a pixel shuffle lays
out 4 x 4 pixels from each position. A video of 256 x 256 then has the 16 x 16 latents that Wan's
way gives to 128 x 128, and is decoded in less time.

Shapes: video (B, 3, T, H, W) in [-1, 1]; latents (B, C, F, h, w), normalised per channel;
F = 1 + (T - 1) / 4, h = H / (8 patch), w = W / (8 patch).
"""
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as nnf
from safetensors.torch import load_file

# ------------------------------------------------------------------------------------------ config

WAN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
WAN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
           3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


@dataclass(frozen=True)
class VAEConfig:
    dim: int = 96                                       # channels at full resolution
    z_dim: int = 16                                     # latent channels C
    dim_mult: tuple = (1, 2, 4, 4)                      # channels of the 4 resolutions, times dim
    num_res_blocks: int = 2                             # a resolution; the decoder has one more
    temporal_downsample: tuple = (False, True, True)    # which downsamplings also halve time
    patch: int = 1                                      # 2: means in, pixel shuffle out
    decoder_widths: tuple = (96, 64, 64)                # patch 2 only: channels at h, 2h and 4h
    latents_mean: tuple = WAN_MEAN                      # of the encoder's output over the
    latents_std: tuple = WAN_STD                        # training set, per channel


PRESETS = {"wan2.1": VAEConfig()}
LATENTS_AT_ONCE = 4                                     # in a stream; Wan: 1, a sixth slower
CPU_KERNEL = True                                       # use conv3d_by_taps on CPUs

# ------------------------------------------------------------------------------------------- parts
# A layer that looks back in time takes a `cache`, {layer: the end of its input so far}. An empty
# dict means "the clip starts here and more will come", None "and this is all of it". One code path
# serves both. (Wan numbers the layers and keeps their caches in a list.)


class CausalConv3d(nn.Conv3d):
    """Conv3d padded in time on the past side only: output t reads inputs t-2, t-1 and t."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=0):
        super().__init__(c_in, c_out, kernel, stride, padding)
        self.past = 2 * self.padding[0]                             # frames before t that it reads

    def forward(self, x, cache=None):                   # (B, C, T, H, W) -> (B, C', T', H', W')
        missing = self.past                             # zero frames to put in front
        if self.past and cache is not None:
            if self in cache:
                missing -= cache[self].shape[2]
                x = channels_last(torch.cat([cache[self], x], 2))
            cache[self] = x[:, :, -self.past:].clone()              # a view would keep all of x
        if CPU_KERNEL and x.device.type == "cpu":
            return conv3d_by_taps(x, missing, self)
        x = nnf.pad(x, (0, 0, 0, 0, missing, 0))
        return nnf.conv3d(x, self.weight, self.bias, self.stride, (0, *self.padding[1:]))


def conv3d_by_taps(x, missing, layer):
    """The two lines above, pad and convolve, 1.1 to 28 times as fast on a CPU in float32.

    A k x 3 x 3 convolution is the sum of k 3 x 3 convolutions, one for each tap in time. The
    zeros in front need not exist: a tap skips outputs for which it would read them."""
    frames = x.transpose(1, 2)                                      # (B, T, C, H, W)
    k, s = layer.kernel_size[0], layer.stride[0]
    n = (frames.shape[1] + missing - k) // s + 1                    # T'

    def convolve(tap, skip, bias=None):                             # -> (B, n - skip, C', H', W')
        y = frames[:, skip * s + tap - missing::s][:, :n - skip].flatten(0, 1)
        y = nnf.conv2d(y, layer.weight[:, :, tap], bias, layer.stride[1:], layer.padding[1:])
        return y.unflatten(0, (len(x), n - skip))

    out = convolve(k - 1, 0, layer.bias)                            # the present, then the past
    for tap in reversed(range(k - 1)):
        skip = max(0, missing - tap)
        if skip < n:
            out[:, skip:].add_(convolve(tap, skip))
    return out.transpose(1, 2)


class RMS_norm(nn.Module):
    """x / ||x|| * sqrt(C) * gamma over the channels of each pixel."""

    def __init__(self, dim, images=False):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *((1,) * (2 if images else 3))))

    def forward(self, x):
        gamma = self.gamma.flatten().to(x.dtype)                    # (C,)
        return nnf.rms_norm(x.movedim(1, -1), gamma.shape, gamma, eps=1e-12).movedim(-1, 1)


def norm_silu_conv(c_in, c_out, *between, taps=3):
    conv = CausalConv3d(c_in, c_out, (taps, 3, 3), padding=(taps // 2, 1, 1))
    return RMS_norm(c_in), nn.SiLU(), *between, conv


class ResidualBlock(nn.Module):
    """taps: frames that a convolution reads, 3 as in Wan or 1."""

    def __init__(self, c_in, c_out, taps=3):
        super().__init__()
        self.residual = nn.Sequential(
            *norm_silu_conv(c_in, c_out, taps=taps),
            *norm_silu_conv(c_out, c_out, nn.Dropout(0.0), taps=taps))
        self.shortcut = CausalConv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, cache=None):                   # (B, c_in, T, H, W) -> (B, c_out, T, H, W)
        return run(self.residual, x, cache) + self.shortcut(x)


class AttentionBlock(nn.Module):
    """Single-head attention over the pixels of one frame. Only convolutions mix frames."""

    def __init__(self, dim):
        super().__init__()
        self.norm = RMS_norm(dim, images=True)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x):
        B, C, T, H, W = x.shape
        h = self.norm(x.transpose(1, 2).flatten(0, 1))                          # (B*T, C, H, W)
        qkv = self.to_qkv(h).flatten(2).transpose(1, 2).unsqueeze(1)            # (B*T, 1, H*W, 3C)
        h = nnf.scaled_dot_product_attention(*qkv.chunk(3, -1))                 # (B*T, 1, H*W, C)
        h = h.squeeze(1).transpose(1, 2).reshape(B * T, C, H, W)
        return x + self.proj(h).unflatten(0, (B, T)).transpose(1, 2)


class Resample(nn.Module):
    """Halve or double H and W; with `time` also T, but a clip's first frame stays one frame."""

    def __init__(self, dim, up, time):
        super().__init__()
        self.up, self.time = up, time
        if up:
            self.resample = nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
                                          nn.Conv2d(dim, dim // 2, 3, padding=1))
        else:
            self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)),
                                          nn.Conv2d(dim, dim, 3, stride=2))
        if time and up:
            self.time_conv = CausalConv3d(dim, dim * 2, (3, 1, 1), padding=(1, 0, 0))
        elif time:
            self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x, cache=None):
        if self.time and self.up:
            x = self.double_time(x, cache)
        y = self.resample(x.transpose(1, 2).flatten(0, 1))                      # (B*T, C', H', W')
        y = y.unflatten(0, (-1, x.shape[2])).transpose(1, 2)
        return self.halve_time(y, cache) if self.time and not self.up else y

    def double_time(self, x, cache):                    # (B, C, F, h, w) -> 2F - 1 or 2F frames
        n = 1 if cache is None or self not in cache else 0
        first, x = x[:, :, :n], x[:, :, n:]             # time_conv never sees a clip's first latent
        if cache is not None:
            cache[self] = True
        if x.shape[2] == 0:
            return first
        even, odd = self.time_conv(x, cache).chunk(2, 1)            # frames 2t and 2t + 1
        return torch.cat([first, torch.stack([even, odd], 3).flatten(2, 3)], 2)

    def halve_time(self, x, cache):                     # (B, C, T, h, w) -> 1 + (T-1)/2 or T/2
        past = None if cache is None else cache.get(self)
        if cache is not None:
            cache[self] = x[:, :, -1:].clone()
        if past is not None:
            return self.time_conv(torch.cat([past, x], 2))
        if x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], self.time_conv(x)], 2)


# ------------------------------------------------------------------------------------------- whole


def run(layers, x, cache):
    """Apply the layers in turn, with the cache for those that look back in time."""
    for layer in layers:
        looks_back = isinstance(layer, (CausalConv3d, ResidualBlock, Resample))
        x = layer(x, cache) if looks_back else layer(x)
    return x


def middle(dim):
    return nn.Sequential(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


def resolutions(c, widths, blocks, up, time):
    """From c channels through all widths: residual blocks and, between two widths, a Resample."""
    layers = []
    for i, width in enumerate(widths):
        for _ in range(blocks):
            layers.append(ResidualBlock(c, width))
            c = width
        if i < len(time):
            layers.append(Resample(c, up, time[i]))
            c = c // 2 if up else c
    return nn.Sequential(*layers)


class Encoder3d(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        widths = [cfg.dim * m for m in cfg.dim_mult]
        self.conv1 = CausalConv3d(3, cfg.dim, 3, padding=1)
        self.downsamples = resolutions(cfg.dim, widths, cfg.num_res_blocks, up=False,
                                       time=cfg.temporal_downsample)
        self.middle = middle(widths[-1])
        self.head = nn.Sequential(*norm_silu_conv(widths[-1], 2 * cfg.z_dim))

    def forward(self, x, cache=None):                   # (B, 3, T, H, W) -> (B, 2C, F, h, w)
        return run([self.conv1, *self.downsamples, *self.middle, *self.head], x, cache)


class Decoder3d(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        widths = [cfg.dim * m for m in reversed(cfg.dim_mult)]
        self.conv1 = CausalConv3d(cfg.z_dim, widths[0], 3, padding=1)
        self.middle = middle(widths[0])
        self.upsamples = resolutions(widths[0], widths, cfg.num_res_blocks + 1, up=True,
                                     time=cfg.temporal_downsample[::-1])
        self.head = nn.Sequential(*norm_silu_conv(widths[-1], 3))

    def forward(self, z, cache=None, skip=0):           # (B, C, F, h, w) -> (B, 3, T - skip, H, W)
        x = run([self.conv1, *self.middle, *self.upsamples, *self.head], z, cache)
        return x[:, :, skip:]


class ShuffleDecoder3d(nn.Module):
    """The decoder of patch = 2: h -> 2h -> 4h, where each position becomes 4 x 4 pixels.

    At 4h no layer mixes frames. That takes a third of the time, and less still where the first
    `skip` frames are not wanted: only the layers before are computed for them."""

    def __init__(self, cfg):
        super().__init__()
        low, mid, high = cfg.decoder_widths
        self.conv1 = CausalConv3d(cfg.z_dim, low, 3, padding=1)
        self.middle = middle(low)
        self.upsamples = resolutions(low, (low, mid), cfg.num_res_blocks + 1, up=True,
                                     time=(True, True))
        self.per_frame = nn.Sequential(
            ResidualBlock(mid // 2, high, taps=1), ResidualBlock(high, high, taps=1),
            *norm_silu_conv(high, 3 * (2 * cfg.patch) ** 2, taps=1))
        self.shuffle = nn.PixelShuffle(2 * cfg.patch)

    def forward(self, z, cache=None, skip=0):           # (B, C, F, h, w) -> (B, 3, T - skip, H, W)
        x = run([self.conv1, *self.middle, *self.upsamples], z, cache)[:, :, skip:]
        x = run(self.per_frame, x, None)                            # (B, 48, T - skip, 4h, 4w)
        return self.shuffle(x.transpose(1, 2)).transpose(1, 2)


def channels_last(x):
    """Channels innermost in memory: the same numbers, 1.2 to 2 times as fast on a CPU."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def one_by_one(x):
    """Whether to take a batch row by row: a CPU decodes 4 x 17 frames in 2.5 s instead of 7 s."""
    return len(x) > 1 and x.device.type == "cpu" and not torch.is_grad_enabled()


def pieces(x, size):
    """(B, C, T, H, W) -> list of its first frame, then `size` frames at a time."""
    rest = x[:, :, 1:]
    return [x[:, :, :1], *rest.split(size, 2)] if rest.shape[2] else [x]


class WanVAE(nn.Module):
    """Wan2.1's VAE: encode, decode, decode_stream.

    ValueError if the config's statistics are not one number a latent channel."""

    def __init__(self, config=PRESETS["wan2.1"]):
        super().__init__()
        if not len(config.latents_mean) == len(config.latents_std) == config.z_dim:
            raise ValueError(f"latents_mean and latents_std must have {config.z_dim} entries")
        self.config = config
        self.encoder = Encoder3d(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1)        # "quant"
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, 1)                # "post-quant"
        self.decoder = (Decoder3d if config.patch == 1 else ShuffleDecoder3d)(config)
        stats = torch.tensor([config.latents_mean, config.latents_std]).view(2, 1, -1, 1, 1, 1)
        self.register_buffer("stats", stats, persistent=False)      # no tensor of Wan's state dict

    def posterior(self, video, cache=None):
        """video (B, 3, T, H, W) -> mean, log-variance of raw latents, each (B, C, F, h, w)."""
        patch = self.config.patch
        if patch > 1:
            video = nnf.avg_pool3d(video, (1, patch, patch))
        return self.conv1(self.encoder(channels_last(video), cache)).chunk(2, 1)

    def encode(self, video):
        """video (B, 3, T, H, W) in [-1, 1] -> normalised latents (B, C, F, h, w).

        T = 4k + 1, H and W multiples of 8 patch, else ValueError (Wan drops frames that are over).
        The latent is the posterior's mean, never a sample. Without gradients the clip goes
        through in pieces: the result is the same, and memory does not grow with T."""
        B, C, T, H, W = video.shape
        side = 8 * self.config.patch                                # pixels of a latent
        if C != 3 or T % 4 != 1 or H % side or W % side:
            raise ValueError(f"encode wants (B, 3, 4k+1, {side}i, {side}j), "
                             f"not {tuple(video.shape)}")
        if one_by_one(video):
            return torch.cat([self.encode(row) for row in video.split(1)])
        if torch.is_grad_enabled():
            mu = self.posterior(video)[0]
        else:
            cache, parts = {}, pieces(video, 4 * LATENTS_AT_ONCE)
            mu = torch.cat([self.posterior(part, cache)[0] for part in parts], 2)
        return (mu - self.stats[0]) / self.stats[1]

    def raw(self, latents):
        """Undo the normalisation, and cast: the decoder may be bfloat16."""
        z = latents * self.stats[1] + self.stats[0]
        return channels_last(z.to(self.conv2.weight.dtype))

    def decode(self, latents):
        """latents (B, C, F, h, w) -> video (B, 3, 4(F-1)+1, H, W), clamped to [-1, 1].

        With gradients it is not clamped."""
        if one_by_one(latents):
            return torch.cat([self.decode(row) for row in latents.split(1)])
        if torch.is_grad_enabled():
            return self.decoder(self.conv2(self.raw(latents)))
        return torch.cat(list(self.decode_stream(latents)), 2)

    @torch.no_grad()
    def decode_stream(self, latents, skip=0):
        """The same video in pieces: first (B, 3, 1, H, W), then (B, 3, 16, H, W) at a time.

        Memory does not grow with F, and the first frame comes at once. The first `skip` frames
        are left out of their pieces, which may have no frames then."""
        cache = {}
        end = 0                                                     # frames decoded so far
        for piece in pieces(self.raw(latents), LATENTS_AT_ONCE):
            begin = end
            end += 4 * piece.shape[2] - (3 if begin == 0 else 0)
            missing = min(max(0, skip - begin), end - begin)
            yield self.decoder(self.conv2(piece), cache, missing).float().clamp(-1, 1)


# ------------------------------------------------------------------------------- preview decoder
# TAEHV (github.com/madebyollin/taehv, MIT) decodes Wan2.1's latents with a 24th of the work, more
# softly. Its published file names the layers by their places in one list, hence the Identity.


class MemBlock(nn.Module):
    """relu(x + f(x, the frame before)). Frames are (T, C, H, W); the cache keeps the last one."""

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(2 * dim, dim, 3, padding=1), nn.ReLU(),
                                  nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(),
                                  nn.Conv2d(dim, dim, 3, padding=1))

    def forward(self, x, cache):
        before = cache.get(self, torch.zeros_like(x[:1]))
        cache[self] = x[-1:].clone()
        before = torch.cat([before, x[:-1]])                        # (T, C, H, W)
        return nnf.relu(x + self.conv(torch.cat([x, before], 1)))


class Grow(nn.Module):
    """(T, C, H, W) -> (times T, C, H, W)"""

    def __init__(self, dim, times):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim * times, 1, bias=False)

    def forward(self, x):
        return self.conv(x).reshape(-1, *x.shape[1:])


class PreviewDecoder(nn.Module):
    """decode_stream() of one video, instead of a WanVAE's."""

    def __init__(self, z_dim=16, widths=(256, 128, 64, 64)):
        super().__init__()
        layers = [nn.Identity(), nn.Conv2d(z_dim, widths[0], 3, padding=1), nn.ReLU()]
        for i, times in enumerate((1, 2, 2)):                       # 4 frames a latent
            c, c_out = widths[i:i + 2]
            layers += [MemBlock(c), MemBlock(c), MemBlock(c), nn.Upsample(scale_factor=2.0),
                       Grow(c, times), nn.Conv2d(c, c_out, 3, padding=1, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(widths[-1], 3, 3, padding=1))

    @torch.no_grad()
    def decode_stream(self, latents, skip=0):
        """latents (1, C, F, h, w), normalised -> pieces (1, 3, 1 or 16, 8h, 8w), as WanVAE's."""
        cache = {}
        end = 0                                                     # frames decoded so far
        for i, piece in enumerate(pieces(latents, LATENTS_AT_ONCE)):
            x = piece[0].transpose(0, 1).to(self.decoder[1].weight.dtype)       # (F', C, h, w)
            x = 3 * torch.tanh(x / 3)
            for layer in self.decoder:
                x = layer(x, cache) if isinstance(layer, MemBlock) else layer(x)
            x = x if i else x[3:]                                   # the first latent is one frame
            end += len(x)
            x = x[max(0, skip - end + len(x)):]
            yield x.float().clamp(0, 1).transpose(0, 1)[None] * 2 - 1


def load_preview_decoder(path, vae):
    """taew2_1.safetensors -> PreviewDecoder on the VAE's device, in its decoder's dtype.

    ValueError in one line for another file, or a VAE that is not Wan2.1's."""
    if (vae.config.latents_mean, vae.config.latents_std) != (WAN_MEAN, WAN_STD):
        raise ValueError("a preview decoder needs Wan2.1's latents: these weights have others")
    try:
        tensors = load_file(path)
        tensors = {k: v for k, v in tensors.items() if not k.startswith("encoder.")}
        decoder = PreviewDecoder()
        decoder.load_state_dict(tensors)
    except Exception as error:                          # missing, damaged, a .pth ...
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"no preview decoder in {path}: {reason}") from None
    like = vae.conv2.weight
    return decoder.eval().requires_grad_(False).to(like.device, like.dtype)

# ----------------------------------------------------------------------------------------- loading


def load_vae(folder, device="cpu"):
    """Weights folder (config.json, vae.safetensors) -> WanVAE in float32, eval mode, frozen.

    ValueError in one line if there is none."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vae"]
        config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        vae = WanVAE(VAEConfig(**config))
        vae.load_state_dict(load_file(folder / "vae.safetensors"))
    except Exception as error:                          # damaged files raise anything
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"no usable VAE in {folder}: {reason}") from None
    return vae.float().eval().requires_grad_(False).to(device)
