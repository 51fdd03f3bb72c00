"""The two references that hold a chunk in place. Paper section 3.3 and Appendix G (identity), section 3.2 and Appendix D (continuity).

identity    z_id    who is speaking: made once from the portrait, joined to the noise channel by channel in every chunk (Eq. 4, dit.py)
continuity  kappa   where the last chunk ended: its last n frames, encoded anew, laid over the first m = 1 + (n-1)/4 latents of the next

A reference only helps if it looks like what it is compared with. The VAE's first latent holds one frame and no history, a later one holds
four frames and up to 28 latents of history. So: TRE encodes a *film* of the still portrait, and gets latents of every role, drifting over
time as a real clip's would; encode-then-repeat, the usual way, hands the first-frame role to all of them. For the same reason the
continuity latents are decoded and encoded again: what was a tail must become a head. tests/test_tre.py shows both facts.

Shapes: image (B, 3, H, W) in [-1, 1]; video (B, 3, T, H, W); latents (B, C, F, h, w), F = 1 + (T-1)//4."""


def temporal_reference_encoding(vae, image, frames=81):
    """Eq. 3: z_id = E(Rep_L(I)). image (B, 3, H, W) in [-1, 1] -> (B, C, F, h, w). One pass, good for every chunk of this identity."""
    return vae.encode(image.unsqueeze(2).expand(-1, -1, frames, -1, -1))        # identical pixels, F different latents


def encode_then_repeat(vae, image, frames=81):
    """Eq. 29: z_etr = Rep_F(E(I)), the baseline of Table 3. image (B, 3, H, W) in [-1, 1] -> (B, C, F, h, w), constant in time."""
    return vae.encode(image.unsqueeze(2)).expand(-1, -1, 1 + (frames - 1) // 4, -1, -1)


IDENTITY = {"tre": temporal_reference_encoding, "etr": encode_then_repeat}


def continuity_reference(vae, video, n=9):
    """Section 3.2: kappa = E(tail_n(V)). video (B, 3, T, H, W) in [-1, 1], T >= n = 4k+1 -> clean latents (B, C, 1 + (n-1)/4, h, w).

    The same function makes kappa_gt from a true chunk and kappa_gen from a decoded one, in training as in inference."""
    return vae.encode(video[:, :, -n:])
