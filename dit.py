"""Wan2.1's diffusion transformer, driven by audio instead of text, and the flow matching it lives by.

Paper sections 3.1, 3.3, 3.4: Equations 1, 2, 4, 12 and the few-step sampler. Nothing runs here:
train_teacher.py and distill_student.py train this network, infer.py samples from it. It is Wan2.1's, but
    patch_embedding   takes 2C channels, [noisy latents | identity reference] (Eq. 4), instead of C
    cross_attn        the tokens of latent f see the S audio tokens of latent f; Wan's see a whole prompt
    audio_proj        is new, text_embedding is gone
Every other parameter has Wan2.1's name and shape, so official text-to-video checkpoints load (last function).

Shapes: B batch, T pixel frames, F latent frames, C latent channels, h w latent grid, D width, d = D / heads,
        S audio tokens of a latent, N = F * h/2 * w/2 tokens; audio (B, T, L, A), L layers, A numbers each.
Time:   sigma = 0 is data, 1 is noise; the network predicts eps - x0 and is told t = 1000 sigma, in float32.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as nnf
from torch.utils.checkpoint import checkpoint

from audio import AudioProjection

# ----------------------------------------------------------------------------------------------------- config

PATCH = (1, 2, 2)               # latents per token along time, height, width: the same in every Wan model


@dataclass(frozen=True)
class DiTConfig:                # defaults: Wan2.1-T2V-1.3B, hearing through wav2vec2-base-960h
    dim: int = 1536             # D, width of a token (14B: 5120)
    ffn_dim: int = 8960         # hidden width of the feed-forward layers (14B: 13824)
    heads: int = 12             # attention heads (14B: 40), 128 wide in Wan; even and at least 6
    layers: int = 30            # blocks (14B: 40)
    channels: int = 16          # C of the latents: reads 2C (Wan: C), writes C
    freq_dim: int = 256         # length of the sinusoid that encodes the time (Wan: the same)
    eps: float = 1e-6           # of every norm (Wan: the same)
    audio_layers: int = 12      # L, hidden states of the audio encoder (Wan has no audio)
    audio_dim: int = 768        # A, width of one hidden state
    audio_tokens: int = 32      # S, audio tokens of a latent (Wan: 512 text tokens for the whole video)
    audio_hidden: int = 512     # hidden width of the MLP that makes them
    skip: float = 0.0           # variance for linear_velocity, which is then added; ours; 0 = no such thing, as in Wan


PRESETS = {
    "tiny": DiTConfig(dim=256, ffn_dim=1024, heads=4, layers=6, channels=24, skip=0.15,
                      audio_layers=3, audio_dim=384, audio_tokens=8, audio_hidden=128),
    "wan-1.3b": DiTConfig(),
    "wan-14b": DiTConfig(dim=5120, ffn_dim=13824, heads=40, layers=40),
}

# ----------------------------------------------------------------------------------- flow matching, equations


def per_sample(sigma, x):
    """A number, or one number a sample (B,), shaped so that it multiplies x (B, ...)."""
    return torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.dim() - 1))


def shift_sigma(u, shift):
    """Even steps u in [0, 1] -> sigma, crowded towards noise if shift > 1. Wan2.1 and its students use 5."""
    return shift * u / (1 + (shift - 1) * u)


def add_noise(x0, eps, sigma):
    """Eq. 1 (also 11, 14): x_sigma = (1 - sigma) x0 + sigma eps, on the straight line from data to noise."""
    sigma = per_sample(sigma, x0)
    return (1 - sigma) * x0 + sigma * eps


def velocity(x0, eps):
    """Eq. 1 and 2, the network's target: d x_sigma / d sigma = eps - x0, the same all along the line."""
    return eps - x0


def linear_velocity(x, sigma, variance):
    """What of the velocity x = x_sigma itself should say, if the references leave a `variance` > 0 of the data open.

    The best linear guess: data m + d, d of that variance and unrelated to m, gives E[v | x, m] = a x - b m; this is a x.
    So the network has to say m, which it can look up, and, where sigma is large, little noise. a is 1 at sigma 1, where
    v = x - x0, larger in between if variance < 1 (1.48 at 0.5 for 0.15), and -1 at 0. It is c_skip of Karras et al.
    (EDM, 2022, Table 1) for our path, sigma_data^2 = `variance`."""
    sigma = per_sample(sigma, x)
    return (sigma - variance * (1 - sigma)) / (sigma ** 2 + variance * (1 - sigma) ** 2) * x


def x0_from_velocity(x, v, sigma):
    """Where the line through x = x_sigma with slope v meets sigma = 0."""
    return x - per_sample(sigma, x) * v


def eps_from_velocity(x, v, sigma):
    """Where it meets sigma = 1."""
    return x + (1 - per_sample(sigma, x)) * v


def score_from_velocity(x, v, sigma):
    """Eq. 12, Phi: the score of p(x_sigma) that the velocity implies, -eps / sigma. sigma must not be 0."""
    return -eps_from_velocity(x, v, sigma) / per_sample(sigma, x)


def replace_head(x, kappa):
    """Section 3.2: the first m latents of x (B, C, F, h, w) become the clean kappa (B, C, m, h, w)."""
    return torch.cat([kappa, x[:, :, kappa.shape[2]:]], 2)

# ------------------------------------------------------------------------------------------------------ parts


class WanRMSNorm(nn.Module):
    """x / rms(x) * weight over all D channels, all heads together, computed in float32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return nnf.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps)


def sinusoid(t, dim):
    """t (B,) in [0, 1000], fractions too -> (B, dim) float32: cosines, then sines, of 10000^(-i/half) t."""
    half, wide = dim // 2, torch.float32 if t.device.type == "mps" else torch.float64  # mps has no float64
    angle = t.to(wide)[:, None] * 10000 ** (-torch.arange(half, dtype=wide, device=t.device) / half)
    return torch.cat([angle.cos(), angle.sin()], 1).float()


def rope_table(F, h, w, d):
    """exp(i angle) for rotary positions in 3D -> complex64 (F*h*w, 1, d/2), tokens in the order (f, h, w).

    The d/2 channel pairs of a head go to the three axes; pair k of n turns by position * 10000^(-k/n)."""
    pairs = (d // 2 - 2 * (d // 6), d // 6, d // 6)                     # 22, 21, 21 at d = 128
    grid = torch.cartesian_prod(torch.arange(F), torch.arange(h), torch.arange(w)).double()  # (N, 3)
    freqs = [10000 ** (-torch.arange(n).double() / n) for n in pairs]
    angle = torch.cat([torch.outer(grid[:, axis], freqs[axis]) for axis in range(3)], 1)  # (N, d/2)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)[:, None]


def rotate(x, table):
    """Channels (2k, 2k+1) of a head are one complex number: turn it. x (B, N, heads, d) float32."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * table).flatten(-2)


class Attention(nn.Module):
    """Attention with normalised queries and keys: x to itself is (x, x, rope), x to audio is (x, tokens)."""

    def __init__(self, dim, heads, eps):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = WanRMSNorm(dim, eps), WanRMSNorm(dim, eps)

    def forward(self, x, context, rope=None):                           # (B, N, D), (B, M, D)
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (q, k, v))  # (B, N or M, heads, d)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = (y.transpose(1, 2).to(v.dtype) for y in (q, k, v))    # back to bfloat16 if v is
        y = nnf.scaled_dot_product_attention(q, k, v)                   # (B, heads, N, d), no mask
        return self.o(y.transpose(1, 2).flatten(2))                     # (B, N, D)


def modulate(x, shift, scale, eps):
    """LayerNorm without weights of its own, then the scale and shift that the time dictates."""
    return torch.addcmul(shift, nnf.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


class Block(nn.Module):
    """Self-attention over the chunk, cross-attention latent by latent, feed-forward. x stays float32."""

    def __init__(self, cfg):
        super().__init__()
        D, self.eps = cfg.dim, cfg.eps
        self.self_attn = Attention(D, cfg.heads, cfg.eps)
        self.norm3 = nn.LayerNorm(D, cfg.eps)                           # norm1 and norm2: no parameters
        self.cross_attn = Attention(D, cfg.heads, cfg.eps)
        self.ffn = nn.Sequential(nn.Linear(D, cfg.ffn_dim), nn.GELU("tanh"), nn.Linear(cfg.ffn_dim, D))
        self.modulation = nn.Parameter(torch.randn(1, 6, D) / D ** 0.5)

    def forward(self, x, e, rope, audio):       # (B, N, D), (B, 6, D), (N, 1, d/2), (B, F, S, D) -> (B, N, D)
        B, F = audio.shape[:2]
        matrix = self.ffn[0].weight.dtype                               # float32, or see cast_matrices
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (self.modulation + e).chunk(6, 1)  # (B, 1, D)
        y = modulate(x, shift_a, scale_a, self.eps).to(matrix)
        x = torch.addcmul(x, gate_a, self.self_attn(y, y, rope))        # x + gate * y
        y = self.norm3(x).to(matrix).reshape(B * F, -1, x.shape[2])     # (B*F, h/2*w/2, D), every latent ...
        y = self.cross_attn(y, audio.to(matrix).flatten(0, 1))          # ... with its own (B*F, S, D)
        x = x + y.view_as(x)                                            # no gate, no modulation
        return torch.addcmul(x, gate_f, self.ffn(modulate(x, shift_f, scale_f, self.eps).to(matrix)))


class Head(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.eps = cfg.eps
        self.head = nn.Linear(cfg.dim, math.prod(PATCH) * cfg.channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, cfg.dim) / cfg.dim ** 0.5)

    def forward(self, x, e):                                            # (B, N, D), (B, D) -> (B, N, 4C)
        shift, scale = (self.modulation + e[:, None]).chunk(2, 1)
        return self.head(modulate(x, shift, scale, self.eps))

# ------------------------------------------------------------------------------------------------------ model


class AudioDiT(nn.Module):
    """Noisy latents, time, identity reference and audio -> velocity.

    gradient_checkpointing = True recomputes every block in the backward pass: less memory, more time."""

    def __init__(self, cfg):
        super().__init__()
        if cfg.dim % cfg.heads or (cfg.dim // cfg.heads) % 2 or cfg.dim // cfg.heads < 6:
            raise ValueError(f"dim {cfg.dim} over {cfg.heads} heads: a head must be even and at least 6 wide")
        self.config = cfg
        D = cfg.dim
        self.patch_embedding = nn.Conv3d(2 * cfg.channels, D, PATCH, PATCH)
        self.time_embedding = nn.Sequential(nn.Linear(cfg.freq_dim, D), nn.SiLU(), nn.Linear(D, D))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.audio_proj = AudioProjection(cfg.audio_layers, cfg.audio_dim, D, cfg.audio_tokens,
                                          cfg.audio_hidden)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.head = Head(cfg)
        self.gradient_checkpointing = False
        self.rope = {}                        # grid -> table; not a buffer, because .to(dtype) would round it
        self.init_weights()

    def init_weights(self):
        """Wan's. The head starts at zero, so an untrained network predicts velocity 0 everywhere."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))  # a matrix from 4 * 2C numbers to D
        for i in (0, 2):
            nn.init.normal_(self.time_embedding[i].weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def cast_matrices(self, dtype):
        """Keeps the blocks' matrices in `dtype` for good: autocast without its casts and its second copy.

        Time path, modulation, norms, patch embedding and head stay float32, as in Wan2.1. Returns self."""
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Linear):
                layer.to(dtype)
        return self

    def rope_for(self, *grid, device):
        if (grid, device) not in self.rope:
            with torch.inference_mode(False):                           # else no training could reuse it
                table = rope_table(*grid, self.config.dim // self.config.heads)
                self.rope[grid, device] = table.to(device)
        return self.rope[grid, device]

    def embed_time(self, t):
        """t (B,) = 1000 sigma -> e (B, D) for the head, e0 (B, 6, D) for the blocks; always in float32."""
        if t.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(f"t is {t.dtype}, which turns 937.5 into 936: keep it float32")
        with torch.autocast(t.device.type, enabled=False):
            e = self.time_embedding(sinusoid(t, self.config.freq_dim))
            return e, self.time_projection(e).unflatten(1, (6, -1))

    def forward(self, latents, t, identity, audio):
        """Eq. 2's v_theta, with the identity reference fused as in Eq. 4.

        latents   (B, C, F, h, w)  noisy, except for the clean continuity latents at their head; h and w even
        t         (B,)             1000 sigma, in [0, 1000], float32
        identity  (B, C, F, h, w)  z_id of tre.py
        audio     (B, T, L, A)     hidden states of the T = 4F - 3 frames; zeros mean "no audio"
        Returns the velocity eps - x0, (B, C, F, h, w) float32. Raises ValueError if the shapes do not fit."""
        B, C, F, h, w = latents.shape
        layers, dim = self.config.audio_layers, self.config.audio_dim
        if identity.shape != latents.shape or C != self.config.channels or h % 2 or w % 2:
            raise ValueError(f"latents {tuple(latents.shape)} and identity {tuple(identity.shape)} must have "
                             f"one shape (B, {self.config.channels}, F, h, w), h and w even")
        if audio.shape != (B, 4 * F - 3, layers, dim):
            wanted = (B, 4 * F - 3, layers, dim)
            raise ValueError(f"audio {tuple(audio.shape)} must be {wanted} beside {F} latents")
        h, w = h // 2, w // 2
        with torch.autocast(latents.device.type, enabled=False):        # latents are data: never rounded
            x = self.patch_embedding(torch.cat([latents, identity], 1).float()) # (B, D, F, h/2, w/2), Eq. 4
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
            x = self.head(x, e)                                         # (B, N, 4C), a token's 4C = (2, 2, C)
        x = x.view(B, F, h, w, 2, 2, C).permute(0, 6, 1, 2, 4, 3, 5)    # (B, C, F, h/2, 2, w/2, 2)
        x = x.reshape(B, C, F, 2 * h, 2 * w)
        return x + linear_velocity(latents.float(), t / 1000, self.config.skip) if self.config.skip else x

# --------------------------------------------------------------------------------------------------- samplers


def student_sigmas(steps=4, shift=5.0):
    """The student's steps, pure noise first. Wan's shift of 5: 1, 0.9375, 0.8333, 0.625, so t = 1000, 937.5, 833.33, 625."""
    return [shift_sigma(1 - i / steps, shift) for i in range(steps)]


def predict(model, x, sigma, identity, audio):
    """One network call on a batch that shares its sigma -> velocity. t is made in float32."""
    t = torch.full((len(x),), 1000 * sigma, dtype=torch.float32, device=x.device)
    return model(x, t, identity, audio)


@torch.no_grad()
def sample_student(model, noise, identity, audio, kappa, sigmas, generator, callback=None):
    """Section 3.4, the few-step student, a consistency sampler: guess x0, put fresh noise on it, guess again.

    noise (B, C, F, h, w) ~ N(0, 1); kappa (B, C, m, h, w) clean; sigmas falling, the first of them 1.
    `generator` draws the fresh noise, on its own device. Let it be the one that drew `noise`: a new one with
    the same seed would draw that very noise again.
    callback(step, x0) sees every guess. Returns clean latents (B, C, F, h, w)."""
    x = noise
    for step, sigma in enumerate(sigmas):
        x = replace_head(x, kappa)                               # the head is clean in every network call ...
        x0 = x0_from_velocity(x, predict(model, x, sigma, identity, audio), sigma)
        x0 = replace_head(x0, kappa)                                    # ... and in what comes out
        if callback is not None:
            callback(step, x0)
        if step + 1 < len(sigmas):
            fresh = torch.randn(x.shape, generator=generator, device=generator.device).to(x)
            x = add_noise(x0, fresh, sigmas[step + 1])
    return x0


def heard(difference, focus):
    """Where in the picture the sound is heard, 0 to 1: difference (B, C, F, h, w) of velocities -> (B, 1, 1, h, w).

    What the sound changes is large at lips and chin, 5 to 20 times its mean square over the picture; elsewhere mostly
    0.03 to 1.5 times that (LOG.md). One value for a token, 2 x 2 latents, the same for the whole chunk. It is relative:
    if the sound changes nothing anywhere, the mask is faint chance, or 0."""
    energy = nnf.avg_pool2d(difference.square().mean((1, 2))[:, None], 2)                        # (B, 1, h/2, w/2)
    loud = (energy / energy.mean((2, 3), keepdim=True).clamp(min=1e-12)).square()
    return nnf.interpolate(loud / (loud + focus) if focus else torch.ones_like(loud), scale_factor=2)[:, :, None]


def guided_velocity(v, deaf, x, sigma, identity, predicted, guidance, focus=0.0, liveliness=1.0):
    """v + (guidance - 1) where (v - deaf) + (liveliness - 1) (1 - where) (v - still), the last at sigma >= 0.8 only.

    v, deaf: velocities with the sound and without; still: that to the portrait as it is, `identity`; where: `heard`.
    All, and x, are (B, C, F, h, w), sigma is a number or (B,), predicted (B or 1, 1, F, 1, 1) is 0 at kappa.
    focus 0: where is 1 everywhere. That is usual guidance, and leaves nothing to liveliness. Ours tears faces that way:
    in noise the two answers differ by chance, token by token, also where the sound has no say. Nor are its films
    lively: a head moves a third of what it should, we think since it sees little of it in noise. Hence the last term,
    guidance away from the portrait, of whatever differs from it: pose, but colour, too. Both are ours, see LOG.md."""
    difference, sigma = predicted * (v - deaf), per_sample(sigma, x)
    where = heard(difference, focus)
    livelier = predicted * (1 - where) * (v - (x - identity) / sigma) * (sigma >= 0.8)
    return v + (guidance - 1) * where * difference + (liveliness - 1) * livelier


@torch.no_grad()
def sample_teacher(model, noise, identity, audio, kappa, steps=50, shift=5.0, guidance=3.0, focus=0.0, liveliness=1.0,
                   callback=None):
    """Euler steps along dx/dsigma = v, from noise to data, v guided by the sound, see guided_velocity.

    guidance is on the conventional scale: 1 = none (and no liveliness), at half the cost. Deaf is zeroed features.
    Shapes as in sample_student. callback(step, x) sees the state after every step. Returns clean latents."""
    sigmas = [shift_sigma(1 - i / steps, shift) for i in range(steps + 1)]  # 1 ... 0
    x = replace_head(noise, kappa)
    predicted = replace_head(torch.ones_like(noise[:1, :1, :, :1, :1]), torch.zeros_like(kappa[:1, :1, :, :1, :1]))
    for step in range(steps):
        v = predict(model, x, sigmas[step], identity, audio)
        if guidance != 1:
            deaf = predict(model, x, sigmas[step], identity, torch.zeros_like(audio))
            v = guided_velocity(v, deaf, x, sigmas[step], identity, predicted, guidance, focus, liveliness)
        x = replace_head(x + (sigmas[step + 1] - sigmas[step]) * v, kappa)
        if callback is not None:
            callback(step, x)
    return x

# ------------------------------------------------------------------------------------------- other checkpoints


def widen(state_dict, own):
    """An AudioDiT's weights for latents of fewer channels into `own`, the fresh ones of a network for more -> state dict; of equal ones, as they are.

    The new channels are the last. Their velocity begins at 0, like that of a new network. What reads them begins at random: were it 0, too,
    neither would have a gradient until the other has grown (LOG.md)."""
    ready = dict(state_dict)
    for name, dim, groups in (("patch_embedding.weight", 1, 2), ("head.head.weight", 0, 4), ("head.head.bias", 0, 4)):   # [noisy | identity]; a patch
        old, new = (x[name].movedim(dim, -1).unflatten(-1, (groups, -1)) for x in (state_dict, own))         # (..., groups, C)
        ready[name] = torch.cat([old, new[..., old.shape[-1]:].to(old)], -1).flatten(-2).movedim(-1, dim)
    return ready


def load_wan_checkpoint(model, state_dict):
    """Fills `model` from an official Wan2.1 text-to-video state dict and returns a report in words.

    Every tensor that has a home is loaded. patch_embedding.weight (D, C, 1, 2, 2) is widened to 2C channels
    with zeros, so that at first the identity reference has no effect; audio_proj.* is new and stays as it was
    initialised; text_embedding.* is not used. A tensor that is missing or has a wrong shape raises ValueError
    with its name, and the model is left as it was."""
    own, ready, widened = model.state_dict(), {}, []
    for name, target in own.items():
        if name.startswith("audio_proj."):
            continue
        if name not in state_dict:
            raise ValueError(f"not a Wan2.1 checkpoint of this size: {name} is missing")
        tensor, C = state_dict[name], model.config.channels
        if name == "patch_embedding.weight" and tensor.shape[1:] == (C, *PATCH):
            tensor = torch.cat([tensor, torch.zeros_like(tensor)], 1)   # (D, 2C, 1, 2, 2), [noisy | identity]
            widened.append(name)
        if tensor.shape != target.shape:
            shapes = f"{tuple(state_dict[name].shape)} in the checkpoint, {tuple(target.shape)} in the model"
            raise ValueError(f"{name} is {shapes}")
        ready[name] = tensor
    model.load_state_dict(ready, strict=False)
    new = [name for name in own if name not in ready]
    unused = [name for name in state_dict if name not in ready]
    return "\n".join([f"loaded as they are: {len(ready) - len(widened)} tensors",
                      f"widened with zeros for the identity reference: {', '.join(widened) or 'none'}",
                      f"new, left as initialised ({len(new)}): {', '.join(new)}",
                      f"in the checkpoint but not used ({len(unused)}): {', '.join(unused) or 'none'}"])
