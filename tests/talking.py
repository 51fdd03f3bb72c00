"""A talking portrait for tests: the shipped picture, its lips opened by the phones of a clip."""
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as nnf
from conftest import ROOT
from PIL import Image

from audio import load_audio
from measure.landmarks import Landmarker, eye_distance
from synthetic.drawn import draw_face
from synthetic.phones import GAP, lip_opening, mouth_curves, read_phones

SIDE = 128


@lru_cache(maxsize=1)
def landmarker():
    return Landmarker()


@lru_cache(maxsize=1)
def portrait():
    """-> uint8 (128, 128, 3), points (478, 3)"""
    image = Image.open(ROOT / "assets" / "portrait.jpg").resize((SIDE, SIDE))
    image = np.array(image)
    points, presence = landmarker().points(image[None])
    assert presence[0] > 0.9
    return image, points[0]


def open_mouth(gap):
    """The portrait with its lips parted by gap (T,), eye distances -> uint8 (T, 128, 128, 3).

    What is below the upper lip slides down, less towards the corners of the mouth and the neck.
    """
    image, points = portrait()
    middle = float(points[[13, 14], 1].mean())
    left, right = float(points[61, 0]), float(points[291, 0])
    chin = float(points[152, 1])
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    across = 1 - ((x - (left + right) / 2) / (0.45 * (right - left))) ** 2
    part = gap[:, None, None] * float(eye_distance(points)) * across.clip(0)    # (T, H, W) pixels
    below = y - middle
    fade = ((chin + 8 - y) / (chin + 8 - middle)).clip(0, 1)
    source = np.where(below > 0, np.maximum(y - part * fade, middle), y)
    grid = np.stack([np.broadcast_to(x, source.shape), source], -1) * 2 / SIDE - 1
    pictures = torch.from_numpy(image).permute(2, 0, 1).float().expand(len(gap), -1, -1, -1)
    moved = nnf.grid_sample(pictures, torch.from_numpy(grid).float(), padding_mode="border",
                            align_corners=False)
    inside = (np.minimum(below, part - below) + 0.5).clip(0, 1) * (part > 0)    # between the lips
    dark = inside[..., None]
    moved = moved.permute(0, 2, 3, 1).numpy() * (1 - dark) + dark * [50, 15, 15]
    return moved.round().clip(0, 255).astype(np.uint8)


@lru_cache(maxsize=4)
def talking(name="synth0000-0", frames=75):
    """-> frames uint8 (T, 128, 128, 3), sound float32 (640 T,), phones, gap (T,)"""
    phones = read_phones(ROOT / "assets" / "speech" / f"{name}.tsv")
    sound = load_audio(ROOT / "assets" / "speech" / f"{name}.flac")[:frames * 640]
    gap = GAP * lip_opening(mouth_curves(phones, frames))
    return open_mouth(gap), np.asarray(sound, np.float32), phones, gap


def other_person(frames=75):
    """A drawn face that does not move -> uint8 (T, 128, 128, 3)."""
    image = Image.fromarray(draw_face(3)[0]).resize((SIDE, SIDE))
    return np.stack([np.array(image)] * frames)


def smear(frames, strength=3.0, seed=0):
    """A smooth random warp of all frames alike: what drift does to a face."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 2, 8, 8, generator=rng) * strength
    flow = nnf.interpolate(coarse, (SIDE, SIDE), mode="bicubic", align_corners=False)
    y, x = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    grid = (torch.stack([x, y], -1) + flow[0].permute(1, 2, 0)) * 2 / SIDE - 1
    pictures = torch.from_numpy(frames.copy()).permute(0, 3, 1, 2).float()
    moved = nnf.grid_sample(pictures, grid.expand(len(frames), -1, -1, -1),
                            padding_mode="border", align_corners=False)
    return moved.permute(0, 2, 3, 1).round().clamp(0, 255).byte().numpy()
