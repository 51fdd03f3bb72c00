"""Wan2.1's diffusion transformer, driven by audio instead of text, and flow matching.

Paper sections 3.1, 3.3, 3.4: Equations 1, 2, 4, 12 and the two samplers. Nothing runs here:
train_teacher.py and distill_student.py train this network, infer.py samples from it. The network
is Wan2.1's, with three differences:
    patch_embedding   takes 2C channels, [noisy latents | identity reference] (Eq. 4), instead of C
    cross_attn        tokens of latent f attend to the S audio tokens of latent f; Wan's attend to
                      a text prompt
    audio_proj        is new, text_embedding is gone
Every other parameter has Wan2.1's name and shape, so official text-to-video checkpoints load (last
function of this file).

Shapes: B batch, T pixel frames, F latent frames, C latent channels, h w latent grid, D width,
        d = D / heads, S audio tokens of a latent, N = F * h/2 * w/2 tokens;
        audio features (B, T, L, A), L layers of A numbers.
Time:   sigma = 0 is data, 1 is noise; the network predicts the velocity eps - x0 and is given
        t = 1000 sigma, in float32.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as nnf
from torch.utils.checkpoint import checkpoint

from audio import AudioProjection
from tre import overwrite_continuity

# ------------------------------------------------------------------------------------------- config

PATCH = (1, 2, 2)               # latents per token along time, height, width: as in every Wan model


@dataclass(frozen=True)
class DiTConfig:                # defaults: Wan2.1-T2V-1.3B with the features of wav2vec2-base-960h
    dim: int = 1536             # D, width of a token (14B: 5120)
    ffn_dim: int = 8960         # hidden width of the feed-forward layers (14B: 13824)
    heads: int = 12             # attention heads (14B: 40), 128 wide in Wan; even and at least 6
    layers: int = 30            # blocks (14B: 40)
    channels: int = 16          # C of the latents: reads 2C (Wan: C), writes C
    freq_dim: int = 256         # length of the sinusoid that encodes the time (Wan: the same)
    eps: float = 1e-6           # of every norm (Wan: the same)
    audio_layers: int = 12      # L, hidden states of the audio encoder (Wan has no audio)
    audio_dim: int = 768        # A, width of one hidden state
    audio_tokens: int = 32      # S, audio tokens of a latent (Wan: 512 text tokens for a video)
    audio_hidden: int = 512     # hidden width of the MLP that makes them


PRESETS = {
    "debug": DiTConfig(dim=192, ffn_dim=384, heads=4, layers=3, audio_tokens=4, audio_hidden=64),
    "nano": DiTConfig(dim=192, ffn_dim=768, heads=4, layers=4, audio_tokens=8, audio_hidden=128),
    "wan-1.3b": DiTConfig(),
    "wan-14b": DiTConfig(dim=5120, ffn_dim=13824, heads=40, layers=40),
}

# ------------------------------------------------------------------------- flow matching, equations


def per_sample(sigma, x):
    """A number, or one number a sample (B,), reshaped to multiply x (B, ...)."""
    return torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.dim() - 1))


def shift_sigma(u, shift):
    """Even steps u in [0, 1] -> sigma, denser near noise if shift > 1. Wan2.1 uses 5."""
    return shift * u / (1 + (shift - 1) * u)


def add_noise(x0, eps, sigma):
    """Eq. 1 (also 11, 14): x_sigma = (1 - sigma) x0 + sigma eps, a straight line to noise."""
    sigma = per_sample(sigma, x0)
    return (1 - sigma) * x0 + sigma * eps


def velocity(x0, eps):
    """Eq. 1 and 2, the network's target: d x_sigma / d sigma = eps - x0, constant in sigma."""
    return eps - x0


def x0_from_velocity(x, v, sigma):
    """Where the line through x = x_sigma with slope v meets sigma = 0."""
    return x - per_sample(sigma, x) * v


def eps_from_velocity(x, v, sigma):
    """Where it meets sigma = 1."""
    return x + (1 - per_sample(sigma, x)) * v


def score_from_velocity(x, v, sigma):
    """Eq. 12, Phi: the score of p(x_sigma) by the velocity, -eps / sigma. sigma must not be 0."""
    return -eps_from_velocity(x, v, sigma) / per_sample(sigma, x)


# -------------------------------------------------------------------------------------------- parts


class WanRMSNorm(nn.Module):
    """x / rms(x) * weight over all D channels, all heads together, computed in float32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return nnf.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps)


def sinusoid(t, dim):
    """t (B,) in [0, 1000] -> (B, dim) float32: cosines, then sines, of 10000^(-i/half) t."""
    half = dim // 2
    wide = torch.float32 if t.device.type == "mps" else torch.float64   # mps has no float64
    angle = t.to(wide)[:, None] * 10000 ** (-torch.arange(half, dtype=wide, device=t.device) / half)
    return torch.cat([angle.cos(), angle.sin()], 1).float()


def rope_table(F, h, w, d):
    """exp(i angle) for rotary positions in 3D -> complex64 (F*h*w, 1, d/2), in the order (f, h, w).

    The d/2 channel pairs of a head are shared out over the three axes; pair k of n is rotated by
    position * 10000^(-k/n)."""
    pairs = (d // 2 - 2 * (d // 6), d // 6, d // 6)                     # 22, 21, 21 at d = 128
    grid = torch.cartesian_prod(torch.arange(F), torch.arange(h), torch.arange(w)).double()
    freqs = [10000 ** (-torch.arange(n).double() / n) for n in pairs]
    angles = [torch.outer(grid[:, axis], freqs[axis]) for axis in range(3)]
    angle = torch.cat(angles, 1)                                        # (N, d/2)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)[:, None]


def rotate(x, table):
    """Rotate channels (2k, 2k+1) of a head as one complex number. x (B, N, heads, d) float32."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))             # (B, N, heads, d/2)
    return torch.view_as_real(pairs * table).flatten(-2)                # (B, N, heads, d)


class Attention(nn.Module):
    """Attention with normalised queries and keys. Self: (x, x, rope); cross: (x, audio tokens)."""

    def __init__(self, dim, heads, eps):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = WanRMSNorm(dim, eps), WanRMSNorm(dim, eps)

    def forward(self, x, context, rope=None):                           # (B, N, D), (B, M, D)
        q = self.norm_q(self.q(x))
        k = self.norm_k(self.k(context))
        v = self.v(context)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (q, k, v))    # (B, N or M, heads, d)
        if rope is not None:
            q = rotate(q, rope)
            k = rotate(k, rope)
        q, k, v = (y.transpose(1, 2).to(v.dtype) for y in (q, k, v))    # back to bfloat16 if v is
        y = nnf.scaled_dot_product_attention(q, k, v)                   # (B, heads, N, d), no mask
        return self.o(y.transpose(1, 2).flatten(2))                     # (B, N, D)


def modulate(x, shift, scale, eps):
    """LayerNorm without weights of its own, then scale and shift, which depend on the time."""
    return torch.addcmul(shift, nnf.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


class Block(nn.Module):
    """Self-attention over the chunk, cross-attention per latent, feed-forward. x stays float32."""

    def __init__(self, cfg):
        super().__init__()
        D = cfg.dim
        self.eps = cfg.eps
        self.self_attn = Attention(D, cfg.heads, cfg.eps)
        self.norm3 = nn.LayerNorm(D, cfg.eps)           # norm1 and norm2 have no parameters
        self.cross_attn = Attention(D, cfg.heads, cfg.eps)
        self.ffn = nn.Sequential(nn.Linear(D, cfg.ffn_dim), nn.GELU("tanh"),
                                 nn.Linear(cfg.ffn_dim, D))
        self.modulation = nn.Parameter(torch.randn(1, 6, D) / D ** 0.5)

    def forward(self, x, e, rope, audio):
        """x (B, N, D), time e (B, 6, D), rope (N, 1, d/2), audio (B, F, S, D) -> (B, N, D)."""
        B, F = audio.shape[:2]
        dtype = self.ffn[0].weight.dtype                # float32, or see cast_matrices
        modulation = self.modulation + e                                # (B, 6, D)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation.chunk(6, 1)     # (B, 1, D)

        y = modulate(x, shift_a, scale_a, self.eps).to(dtype)
        x = torch.addcmul(x, gate_a, self.self_attn(y, y, rope))        # x + gate * attention

        y = self.norm3(x).to(dtype).reshape(B * F, -1, x.shape[2])      # (B*F, h/2*w/2, D)
        y = self.cross_attn(y, audio.to(dtype).flatten(0, 1))           # each latent, its own audio
        x = x + y.view_as(x)                                            # no gate, no modulation

        y = modulate(x, shift_f, scale_f, self.eps).to(dtype)
        return torch.addcmul(x, gate_f, self.ffn(y))                    # x + gate * ffn


class Head(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.eps = cfg.eps
        self.head = nn.Linear(cfg.dim, math.prod(PATCH) * cfg.channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, cfg.dim) / cfg.dim ** 0.5)

    def forward(self, x, e):                            # (B, N, D), (B, D) -> (B, N, 4C)
        shift, scale = (self.modulation + e[:, None]).chunk(2, 1)
        return self.head(modulate(x, shift, scale, self.eps))

# -------------------------------------------------------------------------------------------- whole


class AudioDiT(nn.Module):
    """Noisy latents, time, identity reference and audio -> velocity.

    gradient_checkpointing = True recomputes every block in the backward pass: less memory,
    more time."""

    def __init__(self, cfg):
        super().__init__()
        if cfg.dim % cfg.heads or (cfg.dim // cfg.heads) % 2 or cfg.dim // cfg.heads < 6:
            raise ValueError(f"dim {cfg.dim} over {cfg.heads} heads: "
                             "a head must be even and at least 6 wide")
        self.config = cfg
        D = cfg.dim
        self.patch_embedding = nn.Conv3d(2 * cfg.channels, D, PATCH, PATCH)
        self.time_embedding = nn.Sequential(nn.Linear(cfg.freq_dim, D), nn.SiLU(), nn.Linear(D, D))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.audio_proj = AudioProjection(cfg.audio_layers, cfg.audio_dim, D,
                                          cfg.audio_tokens, cfg.audio_hidden)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.head = Head(cfg)
        self.gradient_checkpointing = False
        self.rope = {}                      # grid -> table; a buffer would be rounded by .to(dtype)
        self.init_weights()

    def init_weights(self):
        """Wan's. The head starts at zero: an untrained network predicts velocity 0 everywhere."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))     # a matrix (D, 2C * 4)
        for i in (0, 2):
            nn.init.normal_(self.time_embedding[i].weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def cast_matrices(self, dtype):
        """Keep the blocks' matrices in `dtype`: autocast without its casts and its second copy.

        Time path, modulation, norms, patch embedding and head stay float32, as in Wan2.1."""
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Linear):
                layer.to(dtype)
        return self

    def rope_for(self, *grid, device):
        if (grid, device) not in self.rope:
            with torch.inference_mode(False):           # else no training could reuse it
                table = rope_table(*grid, self.config.dim // self.config.heads)
                self.rope[grid, device] = table.to(device)
        return self.rope[grid, device]

    def embed_time(self, t):
        """t (B,) = 1000 sigma -> e (B, D) for the head, e0 (B, 6, D) for the blocks, in float32."""
        if t.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(f"t is {t.dtype}, which turns 937.5 into 936: keep it float32")
        with torch.autocast(t.device.type, enabled=False):
            e = self.time_embedding(sinusoid(t, self.config.freq_dim))
            return e, self.time_projection(e).unflatten(1, (6, -1))

    def forward(self, latents, t, identity, audio):
        """Eq. 2's v_theta, with the identity reference fused as in Eq. 4.

        latents   (B, C, F, h, w)  noisy, but for the first m, the clean continuity latents
        t         (B,)             1000 sigma, in [0, 1000], float32
        identity  (B, C, F, h, w)  z_id of tre.py
        audio     (B, T, L, A)     features of the T = 4F - 3 frames; zeros mean "no audio"
        Returns the velocity eps - x0, (B, C, F, h, w) float32. ValueError if shapes do not fit."""
        B, C, F, h, w = latents.shape
        self.check_shapes(latents, identity, audio)
        h, w = h // 2, w // 2
        with torch.autocast(latents.device.type, enabled=False):        # latents are never rounded
            x = torch.cat([latents, identity], 1).float()               # (B, 2C, F, 2h, 2w), Eq. 4
            x = self.patch_embedding(x)                                 # (B, D, F, h, w)
        x = x.flatten(2).transpose(1, 2).contiguous()                   # (B, N, D), order (f, h, w)
        e, e0 = self.embed_time(t)                                      # (B, D), (B, 6, D)
        rope = self.rope_for(F, h, w, device=x.device)                  # (N, 1, d/2)
        tokens = self.audio_proj(audio)                                 # (B, F, S, D)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, e0, rope, tokens, use_reentrant=False)
            else:
                x = block(x, e0, rope, tokens)                          # (B, N, D)
        with torch.autocast(x.device.type, enabled=False):
            x = self.head(x, e)                                         # (B, N, 4C), 4C = (2, 2, C)
        x = x.view(B, F, h, w, 2, 2, C).permute(0, 6, 1, 2, 4, 3, 5)    # (B, C, F, h, 2, w, 2)
        return x.reshape(B, C, F, 2 * h, 2 * w)

    def check_shapes(self, latents, identity, audio):
        B, C, F, h, w = latents.shape
        cfg = self.config
        if identity.shape != latents.shape or C != cfg.channels or h % 2 or w % 2:
            raise ValueError(f"latents {tuple(latents.shape)} and identity {tuple(identity.shape)} "
                             f"must have one shape (B, {cfg.channels}, F, h, w), h and w even")
        wanted = (B, 4 * F - 3, cfg.audio_layers, cfg.audio_dim)
        if audio.shape != wanted:
            raise ValueError(f"audio {tuple(audio.shape)} must be {wanted} beside {F} latents")

# ----------------------------------------------------------------------------------------- samplers


def student_sigmas(steps=4, shift=5.0):
    """The student's noise levels, pure noise first. Wan's shift of 5: 1, 0.9375, 0.8333, 0.625."""
    return [shift_sigma(1 - i / steps, shift) for i in range(steps)]


def predict(model, x, sigma, identity, audio):
    """One network call on a batch that shares its sigma -> velocity. t is made in float32."""
    t = torch.full((len(x),), 1000 * sigma, dtype=torch.float32, device=x.device)
    return model(x, t, identity, audio)


@torch.no_grad()
def sample_student(model, noise, identity, audio, kappa, sigmas, generator, callback=None):
    """Section 3.4, the few-step student: predict x0, add fresh noise, predict again.

    noise (B, C, F, h, w) ~ N(0, 1); kappa (B, C, m, h, w) clean; sigmas falling, the first is 1.
    `generator` draws the fresh noise on its own device. Use the one that drew `noise`: a new one
    with the same seed would draw the same noise again. callback(step, x0) is given every
    prediction. Returns clean latents (B, C, F, h, w)."""
    x = noise
    for step, sigma in enumerate(sigmas):
        x = overwrite_continuity(x, kappa)          # clean in every network call ...
        v = predict(model, x, sigma, identity, audio)
        x0 = x0_from_velocity(x, v, sigma)
        x0 = overwrite_continuity(x0, kappa)        # ... and in what comes out
        if callback is not None:
            callback(step, x0)
        if step + 1 < len(sigmas):
            fresh = torch.randn(x.shape, generator=generator, device=generator.device).to(x)
            x = add_noise(x0, fresh, sigmas[step + 1])
    return x0


def classifier_free_guidance(v_cond, v_uncond, guidance, **context):
    """The usual audio guidance on the conventional scale: 1 is none. Velocities (B, C, F, h, w).

    `context` (x, sigma, identity, loss_mask) is what another rule of guidance may look at."""
    return v_uncond + guidance * (v_cond - v_uncond)


@torch.no_grad()
def sample_teacher(model, noise, identity, audio, kappa, steps=50, shift=5.0, guidance=3.0,
                   guide=classifier_free_guidance, callback=None):
    """Euler steps along dx/dsigma = v, from noise to data, with audio guidance.

    Unconditional means zeroed audio features; guidance 1 needs no such call and costs half.
    Shapes as in sample_student. callback(step, x) is given the state after every step. Returns
    clean latents (B, C, F, h, w)."""
    sigmas = [shift_sigma(1 - i / steps, shift) for i in range(steps + 1)]      # 1 ... 0
    loss_mask = torch.ones_like(noise[:1, :1, :, :1, :1])                       # (1, 1, F, 1, 1)
    loss_mask[:, :, :kappa.shape[2]] = 0                                        # 0 at kappa
    x = overwrite_continuity(noise, kappa)
    for step in range(steps):
        sigma = sigmas[step]
        v = predict(model, x, sigma, identity, audio)
        if guidance != 1:
            v_uncond = predict(model, x, sigma, identity, torch.zeros_like(audio))
            v = guide(v, v_uncond, guidance,
                      x=x, sigma=sigma, identity=identity, loss_mask=loss_mask)
        x = x + (sigmas[step + 1] - sigma) * v
        x = overwrite_continuity(x, kappa)
        if callback is not None:
            callback(step, x)
    return x

# ----------------------------------------------------------------------------- official checkpoints


def load_wan_checkpoint(model, state_dict):
    """Fill `model` from an official Wan2.1 text-to-video state dict -> a report in words.

    Every tensor that has a home is loaded. patch_embedding.weight (D, C, 1, 2, 2) is widened to 2C
    channels with zeros, so that the identity reference has no effect at first; audio_proj.* is new
    and stays as it was initialised; text_embedding.* is not used. A tensor that is missing or has a
    wrong shape raises ValueError with its name, and the model is left as it was."""
    own = model.state_dict()
    ready, widened = {}, []
    for name, target in own.items():
        if name.startswith("audio_proj."):
            continue
        if name not in state_dict:
            raise ValueError(f"not a Wan2.1 checkpoint of this size: {name} is missing")
        tensor = state_dict[name]
        if name == "patch_embedding.weight" and tensor.shape[1:] == (model.config.channels, *PATCH):
            tensor = torch.cat([tensor, torch.zeros_like(tensor)], 1)   # [noisy | identity]
            widened.append(name)
        if tensor.shape != target.shape:
            raise ValueError(f"{name} is {tuple(state_dict[name].shape)} in the checkpoint, "
                             f"{tuple(target.shape)} in the model")
        ready[name] = tensor
    model.load_state_dict(ready, strict=False)
    new = [name for name in own if name not in ready]
    unused = [name for name in state_dict if name not in ready]
    return "\n".join([
        f"loaded as they are: {len(ready) - len(widened)} tensors",
        f"widened with zeros for the identity reference: {', '.join(widened) or 'none'}",
        f"new, left as initialised ({len(new)}): {', '.join(new)}",
        f"in the checkpoint but not used ({len(unused)}): {', '.join(unused) or 'none'}"])
