"""What the shipped small weights need to run, beyond the paper: infer.py loads this file for them.

TinyDiT          adds a multiple of the noisy input to the network's output, so that the noise need
                 not pass through a narrow network (an EDM skip)
guided_velocity  audio guidance only where the audio matters, and guidance away from the still
                 portrait elsewhere; for the teacher's sampler and for the real score of stage 2

tiny/README.md says what each of them bought, as measured.
"""
from functools import partial

import torch
import torch.nn.functional as nnf

from dit import AudioDiT, per_sample


def linear_velocity(x, sigma, variance):
    """The part of the velocity that is a multiple of x = x_sigma, if the references leave a
    `variance` > 0 of the data unexplained.

    For data m + d, with d of that variance and independent of m, the best linear estimate is
    E[v | x, m] = a x - b m; this is a x. The network then has to predict what depends on m, which
    it can look up, and little of the noise. a is 1 at sigma 1, where v = x - x0, larger in between
    if variance < 1 (1.48 at 0.5 for 0.15), and -1 at 0. It is c_skip of Karras et al. (EDM, 2022,
    Table 1) for this path, with sigma_data^2 = `variance`."""
    sigma = per_sample(sigma, x)
    slope = (sigma - variance * (1 - sigma)) / (sigma ** 2 + variance * (1 - sigma) ** 2)
    return slope * x


class TinyDiT(AudioDiT):
    """AudioDiT with an EDM skip; edm_skip is linear_velocity's variance, 0 for none."""

    def __init__(self, config, edm_skip=0.0):
        super().__init__(config)
        self.edm_skip = edm_skip

    def forward(self, latents, t, identity, audio):
        """As AudioDiT's."""
        v = super().forward(latents, t, identity, audio)                # (B, C, F, h, w)
        if not self.edm_skip:
            return v
        return v + linear_velocity(latents.float(), t / 1000, self.edm_skip)


def guidance_mask(difference, sharpness):
    """Where in the picture the audio matters, 0 to 1: (B, C, F, h, w) -> (B, 1, 1, h, w).

    difference: conditional minus unconditional velocity. At lips and chin it is 5 to 20 times its
    mean square over the picture, elsewhere mostly 0.03 to 1.5 times. One value for a token, 2 x 2
    latents, the same for the whole chunk. sharpness 0: 1 everywhere."""
    energy = difference.square().mean((1, 2))[:, None]                  # (B, 1, h, w)
    energy = nnf.avg_pool2d(energy, 2)                                  # (B, 1, h/2, w/2)
    relative = (energy / energy.mean((2, 3), keepdim=True).clamp(min=1e-12)).square()
    mask = relative / (relative + sharpness) if sharpness else torch.ones_like(relative)
    return nnf.interpolate(mask, scale_factor=2)[:, :, None]


def guided_velocity(v_cond, v_uncond, guidance, *, x, sigma, identity, loss_mask,
                    sharpness=0.0, motion_guidance=1.0):
    """v + (guidance - 1) mask (v - v_uncond) + (motion_guidance - 1) (1 - mask) (v - v_still).

    The last term acts at sigma >= 0.8 only; v_still is the velocity towards the portrait as it is,
    `identity`. Velocities and x (B, C, F, h, w); sigma a number or (B,); loss_mask (B or 1, 1, F,
    1, 1) is 0 at kappa. sharpness 0 and motion_guidance 1 is classifier-free guidance.

    Guidance everywhere tears faces of a small teacher: in noise the two predictions differ by
    chance, token by token, also where the audio has no effect. And its heads move a third of what
    they should, hence the last term, guidance away from the portrait, of pose but of colour too."""
    difference = loss_mask * (v_cond - v_uncond)
    sigma = per_sample(sigma, x)
    mask = guidance_mask(difference, sharpness)
    motion = loss_mask * (1 - mask) * (v_cond - (x - identity) / sigma) * (sigma >= 0.8)
    return v_cond + (guidance - 1) * mask * difference + (motion_guidance - 1) * motion


def make_guide(guidance_sharpness, motion_guidance):
    """-> a rule of guidance for dit.sample_teacher and for stage 2's real score."""
    return partial(guided_velocity, sharpness=guidance_sharpness, motion_guidance=motion_guidance)
