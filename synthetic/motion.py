"""How a face moves: mouth parameters and random motion -> the coefficients of warp.Puppet.

The mouth follows speech (phones.mouth_curves). Head, brows, eyes and eyelids move at random and
smoothly, a little more when the speech is loud: a model must not be able to win by freezing.
N frames at 25 fps; lengths in eye distances, angles in rad.
"""
import numpy as np

from data import FPS
from synthetic.mesh import smoothstep
from synthetic.phones import GAP, lip_opening


def coefficients(mouth, motion, articulation=1.0):
    """Mouth parameters (N, 6) and motion (dict of (N,)) -> what Puppet.render takes (dict of (N,)).

    articulation: how widely this person opens the mouth, about 1.
    """
    jaw, width, rounding, close, teeth, tongue = mouth.T
    opening = np.clip(lip_opening(mouth) * articulation, 0, 1)
    bite = teeth * (1 - close)          # f, v: the lower lip meets the upper teeth, which show
    gap = GAP * opening + 0.035 * bite
    return motion | dict(
        jaw=0.17 * articulation * jaw * (1 - 0.6 * close) - 0.012 * close,
        lower_lip=0.76 * gap - 0.02 * bite,
        upper_lip=0.24 * gap + 0.02 * bite,
        lip_width=0.055 * width - 0.14 * rounding - 0.05 * opening,
        lip_thickness=0.30 * rounding - 0.22 * close - 0.12 * bite,
        close_slit=np.ones_like(gap),
        tongue=tongue,
    )


def smooth_noise(rng, frames, seconds):
    """Noise of unit variance, smoothed by a Gaussian of `seconds` standard deviation. (frames,)"""
    half = int(4 * seconds * FPS)
    kernel = np.exp(-0.5 * (np.arange(-half, half + 1) / (seconds * FPS)) ** 2)
    noise = rng.standard_normal(frames + 2 * half)
    return np.convolve(noise, kernel / np.sqrt((kernel ** 2).sum()), "valid")


def blink_curve(rng, frames):
    """Blinks 2-8 s apart, 120-200 ms long, faster down than up. (frames,): 0 open, 1 shut."""
    times = (np.arange(frames) + 0.5) / FPS
    curve = np.zeros(frames)
    start = rng.uniform(0.3, 4)
    while start < frames / FPS:
        length = rng.uniform(0.16, 0.24)        # about 3/4 of it is visible
        t = (times - start) / length
        curve = np.maximum(curve, smoothstep(t, 0, 0.38) * smoothstep(t, 1, 0.52))
        start += rng.uniform(2, 8)
    return curve


def gaze_curve(rng, frames, yaw):
    """Saccades every 1.2 s on average, 2 of 3 near the centre; eyes turn against the head.

    Returns gaze_x, gaze_y, (frames,) each.
    """
    fixation = np.cumsum(rng.random(frames) < 1 / (1.2 * FPS))      # its number, for each frame
    distance = np.where(rng.random((frames, 1)) < 0.65, 0.15, 0.7)
    x, y = (rng.standard_normal((frames, 2)) * distance)[fixation].T
    return np.clip(x - 2 * yaw, -1, 1) * 0.05, np.clip(y, -1, 1) * 0.02


def random_motion(rng, frames, energy, yaw=0.0):
    """Smooth random motion of head, eyelids, brows and eyes.

    energy: of the speech, (frames,) in [0, 1]; yaw: how far the portrait is turned (a head tends
    to turn back). Returns a dict of (frames,): yaw pitch roll, eyelid (0-1), tx ty brow gaze_x
    gaze_y.
    """
    size = rng.uniform(0.1, 1.3)                # some people move more than others
    more = 0.75 + 0.5 * energy
    nod = 0.03 * (energy - energy.mean())

    def swing(amount, slow, fast, limit, bias=0.0):
        noise = smooth_noise(rng, frames, slow) + 0.35 * smooth_noise(rng, frames, fast)
        return np.clip(size * amount * more * noise + bias, -limit, limit)

    motion = dict(
        yaw=swing(0.085, 0.8, 0.25, 0.30, -0.35 * yaw),
        pitch=swing(0.05, 0.7, 0.2, 0.17, nod),
        roll=swing(0.04, 0.9, 0.3, 0.10),
        tx=swing(0.035, 1.0, 0.3, 0.08),
        ty=swing(0.025, 1.0, 0.3, 0.06),
        eyelid=blink_curve(rng, frames),
    )
    brow = 0.5 * smooth_noise(rng, frames, 0.35) + 0.6 * (energy - 0.4)
    motion["brow"] = 0.05 * np.clip(brow, -0.6, 1.2)
    motion["gaze_x"], motion["gaze_y"] = gaze_curve(rng, frames, motion["yaw"])
    return motion
