"""The two references that hold a chunk in place: who speaks, and where the last chunk ended.

identity    z_id    made once from the portrait, joined to the noise channel by channel in every
                    chunk (Eq. 4, dit.py). Paper section 3.3, Appendix G
continuity  kappa   the last n frames of the previous chunk, encoded again, overwriting the first
                    m = 1 + (n-1)/4 latents of the next. Paper section 3.2, Appendix D

A reference must look like what it stands beside. The VAE's first latent holds one frame and no
history; a later latent holds four frames and up to 28 latents of history. Temporal Reference
Encoding (TRE) therefore encodes a *video* of the still portrait, whose latents play every role,
and change over time as those of a real clip do. Encode-then-repeat, the usual way, gives all of
them the first frame's role. The continuity latents are decoded and encoded again for the same
reason: what was a tail must become a head. tests/test_tre.py shows both facts.

Shapes: image (B, 3, H, W) in [-1, 1]; video (B, 3, T, H, W); latents (B, C, F, h, w) with
F = 1 + (T-1)//4.
"""
import torch


def temporal_reference_encoding(vae, image, frames=81):
    """Eq. 3: z_id = E(Rep_T(I)). image (B, 3, H, W) in [-1, 1] -> (B, C, F, h, w).

    One pass of the encoder serves every chunk of this person."""
    still_video = image.unsqueeze(2).expand(-1, -1, frames, -1, -1)     # (B, 3, T, H, W)
    return vae.encode(still_video)              # identical frames, F different latents


def encode_then_repeat(vae, image, frames=81):
    """Eq. 29: z_etr = Rep_F(E(I)), the baseline of Table 3. As Eq. 3, but constant in time."""
    first_latent = vae.encode(image.unsqueeze(2))                       # (B, C, 1, h, w)
    return first_latent.expand(-1, -1, 1 + (frames - 1) // 4, -1, -1)   # (B, C, F, h, w)


IDENTITY = {"tre": temporal_reference_encoding, "etr": encode_then_repeat}


def continuity_reference(vae, video, n=9):
    """Section 3.2: kappa = E(tail_n(V)). video (B, 3, T, H, W) in [-1, 1] -> (B, C, m, h, w).

    n = 4k+1 <= T frames, m = 1 + (n-1)/4 latents. The same function makes kappa_gt from a
    ground-truth chunk and kappa_gen from a generated one, in training as in inference."""
    return vae.encode(video[:, :, -n:])


def overwrite_continuity(x, kappa):
    """Section 3.2: the first m latents of x (B, C, F, h, w) become clean kappa (B, C, m, h, w)."""
    return torch.cat([kappa, x[:, :, kappa.shape[2]:]], 2)
