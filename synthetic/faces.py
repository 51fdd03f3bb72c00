"""Portraits for puppet.py: which ones can be animated, and how a few become many.

A face is a picture (H, H, 3) uint8 with its mesh, points (468, 3) in the picture's pixels.
Two faces that look alike are morphed into a third; each clip's face is also cropped and coloured
at random (jitter).
"""
import zlib
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image, ImageDraw, ImageFilter

from media import FORMATS
from synthetic.drawn import draw_face
from synthetic.mesh import BROWS, EYE_CORNERS, OVAL, smoothstep
from synthetic.warp import Puppet

NPZ_ERRORS = ValueError, KeyError, EOFError, BadZipFile, zlib.error     # np.load, of a broken file


# -------------------------------------------------------------------------------------- portraits
@dataclass
class Face:
    """A portrait that clips can be made of: a file with a mesh, or painted from a seed."""
    name: str
    path: Path | None = None
    points: np.ndarray | None = None        # its mesh (468, 3), in pixels
    seed: list[int] | int | None = None     # of draw_face, without a path
    yaw: float = 0.0                        # degrees
    pitch: float = 0.0                      # degrees
    sex: str = ""
    look: np.ndarray | float = 0.0          # see look_of

    def load(self):
        """-> image (H, H, 3) uint8, points (468, 3) in its pixels."""
        if self.path is None:
            return draw_face(self.seed)
        with Image.open(self.path, formats=FORMATS) as image:
            return np.asarray(image.convert("RGB")), self.points


def read_table(folder):
    """portraits.npz of a folder, in it or beside it -> {column: array}."""
    places = [place / "portraits.npz" for place in (folder, folder.parent)]
    table = next((path for path in places if path.is_file()), None)
    if table is None:
        raise FileNotFoundError(f"no portraits.npz in {folder} or beside it")
    try:
        with open(table, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = ("name", "lm", "gap", "yaw", "pitch", "eye_open")
            columns = {name: arrays[name] for name in names}
            unknown = np.full(len(columns["gap"]), "")
            columns["sex"] = arrays["sex_est"] if "sex_est" in arrays else unknown
            return columns
    except NPZ_ERRORS as error:
        raise ValueError(f"{table} is broken or no table of portraits: {error}") from None


def read_portraits(folder, lip_gap):
    """Usable portraits: lips apart by lip_gap = (from, below), eyes open, heads not turned far.

    Returns a list of Face. Raises FileNotFoundError without portraits.npz, ValueError if none of
    its portraits is usable.
    """
    table = read_table(folder)
    usable = (table["gap"] >= lip_gap[0]) & (table["gap"] < lip_gap[1])
    usable &= (np.abs(table["yaw"]) < 18) & (np.abs(table["pitch"]) < 18)
    usable &= table["eye_open"] > 0.20
    faces = []
    refused = 0
    for i in np.flatnonzero(usable):
        path = folder / str(table["name"][i])
        if not path.is_file():
            continue
        face = Face(path.stem, path, table["lm"][i].astype(float), yaw=float(table["yaw"][i]),
                    pitch=float(table["pitch"][i]), sex=str(table["sex"][i]))
        image, points = face.load()
        if can_move(image, points):
            face.look = look_of(image, points)
            faces.append(face)
        else:
            refused += 1
    why = "no clear mouth line, or brows on the eyelids"
    print(f"portraits: {len(faces)} ({refused} left out: {why})")
    if not faces:
        raise ValueError(f"no usable portrait in {folder}: lips must be {lip_gap[0]:g} to "
                         f"{lip_gap[1]:g} eye distances apart, eyes open")
    return faces


def can_move(image, points):
    """Whether the mouth line and the eyelids of a face are clear enough to be moved."""
    try:
        Puppet(image, points, 64, check=True)
    except ValueError:
        return False
    return True


def look_of(image, points):
    """Grey levels (432,) at the mesh points inside the oval: light, brows, beard, glasses.

    Blurred; mean 0, standard deviation 1.
    """
    blurred = Image.fromarray(image).convert("L").filter(ImageFilter.GaussianBlur(2))
    inside = np.delete(points, OVAL, 0)[:, :2]
    x, y = inside.round().astype(int).clip(0, len(image) - 1).T
    grey = np.asarray(blurred, float)[y, x]
    return (grey - grey.mean()) / (grey.std() + 1e-6)


def alike(a, b):
    """Whether two faces blend without ghosts: both frontal, of about one look, pose and sex."""
    if a is b or max(abs(a.yaw), abs(b.yaw)) >= 8:
        return False
    turned = abs(a.yaw - b.yaw) + abs(a.pitch - b.pitch)
    difference = np.abs(a.look - b.look).mean() + (0.02 * turned + 0.3 * (a.sex != b.sex))
    return difference < 0.62


# ------------------------------------------------------------------------------------------ morph
def spline_warp(image, target, source):
    """Warp image (H, H, 3) float32 so that points source (k, 2) go to target (k, 2).

    A thin-plate spline. Returns a tensor (1, 3, H, H).
    """
    side = len(image)
    target = target / side * 2 - 1
    source = source / side * 2 - 1

    def bend(at):
        r2 = ((at[:, None] - target) ** 2).sum(-1)
        return r2 * np.log(r2 + 1e-9)

    def plane(at):
        return np.concatenate([np.ones((len(at), 1)), at], 1)

    stiff = bend(target) + 1e-2 * np.eye(len(target))
    system = np.block([[stiff, plane(target)], [plane(target).T, np.zeros((3, 3))]])
    weights = np.linalg.solve(system, np.concatenate([source, np.zeros((3, 2))]))
    coarse = (np.arange(64) + 0.5) / 32 - 1
    at = np.stack(np.meshgrid(coarse, coarse), -1).reshape(-1, 2)
    grid = np.concatenate([bend(at), plane(at)], 1) @ weights
    grid = torch.tensor(grid.T.reshape(1, 2, 64, 64)).float()
    grid = nnf.interpolate(grid, (side, side), mode="bicubic", align_corners=False).movedim(1, -1)
    pixels = torch.from_numpy(image).movedim(-1, 0)[None]
    return nnf.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)


def blur(x, n):
    """Blur (1, C, H, H) to the detail of an n x n picture."""
    few = nnf.avg_pool2d(nnf.interpolate(x, (n, n), mode="area"), 3, 1, 1)
    return nnf.interpolate(few, x.shape[-2:], mode="bicubic", align_corners=False)


def inner_face(points, side):
    """Mask (1, 1, side, side) of the face without its rim; B's fringe stays outside."""
    oval = points[OVAL, :2]
    brow = points[BROWS[0][0] + BROWS[1][0], 1].min()
    shrink = np.where(oval[:, 1:] < brow, 0.75, 0.85)
    outline = oval.mean(0) + shrink * (oval - oval.mean(0))
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon([tuple(v) for v in outline], fill=1)
    return torch.from_numpy(np.float32(mask))[None, None]


def to_complex(xy):
    return xy[:, 0] + 1j * xy[:, 1]


def to_xy(z):
    return np.stack([z.real, z.imag], 1)


def morph(a, b, weight):
    """The face (1 - weight) A + weight B on the head of A. a, b and the result: image, points.

    Both are warped to the mixed mesh. B takes A's colour and shade, place by place. They blend in
    the inner face.
    """
    (image_a, points_a), (image_b, points_b) = a, b
    side = len(image_a)

    # a complex number is a position: a similarity puts B's eyes on A's
    left_a, right_a = (to_complex(points_a)[corners].mean() for corners in EYE_CORNERS)
    left_b, right_b = (to_complex(points_b)[corners].mean() for corners in EYE_CORNERS)
    turn = (right_a - left_a) / (right_b - left_b)
    flat = to_xy((to_complex(points_b) - left_b) * turn + left_a)
    aligned = np.concatenate([flat, points_b[:, 2:] * abs(turn)], 1)
    mixed = (1 - weight) * points_a + weight * aligned

    # warp, with the picture's rim held still
    edge = np.linspace(0, side, 8)
    rim = np.array([(x, y) for x in edge for y in edge if x in (0, side) or y in (0, side)])
    rim_b = to_xy((to_complex(rim) - left_a) / turn + left_b)
    target = np.concatenate([mixed[:, :2], rim])
    warped_a = spline_warp(np.float32(image_a), target, np.concatenate([points_a[:, :2], rim]))
    warped_b = spline_warp(np.float32(image_b), target, np.concatenate([points_b[:, :2], rim_b]))

    # blend
    inside = inner_face(mixed, side)
    area = blur(inside, 16) + 0.02
    shade_a, shade_b = (blur(x * inside, 16) / area for x in (warped_a, warped_b))
    mix = warped_a + weight * blur(inside, 32) * (warped_b - shade_b + shade_a - warped_a)
    return mix[0].movedim(0, -1).clamp(0, 255).round().byte().numpy(), mixed


# ----------------------------------------------------------------------------------------- jitter
def jitter(rng, image, points):
    """Vary crop, colour, exposure and background of a face. Returns image, points."""
    side = len(image)
    scale = rng.uniform(0.90, 1)
    x0, y0 = rng.uniform(0.15, 0.85, 2) * (1 - scale) * side
    box = (x0, y0, x0 + scale * side, y0 + scale * side)
    points = (points - [x0, y0, 0]) / scale
    crop = Image.fromarray(image).resize((side, side), Image.BICUBIC, box)
    x = np.asarray(crop, np.float32) / 255

    grey = x.mean(-1, keepdims=True)
    saturation = rng.uniform(0.75, 1.2)
    x = np.clip(grey + (x - grey) * saturation, 0, 1)
    gamma = rng.uniform(0.8, 1.25)
    exposure = rng.uniform(0.88, 1.1)
    white_balance = rng.uniform(0.95, 1.05, 3)
    x = x ** gamma * exposure * white_balance

    centre_x, centre_y = points[OVAL, :2].mean(0)
    reach = np.ptp(points[OVAL, 0])
    yy, xx = np.mgrid[:side, :side] + 0.5
    away = np.hypot(xx - centre_x, (yy - centre_y + 0.1 * reach) / 1.35) / reach
    background = smoothstep(away, 0.75, 1.25)[..., None]        # 0 on the head
    tint = rng.uniform(0.5, 1.15) * rng.uniform(0.85, 1.15, 3)
    x = x * (1 + background * (tint - 1))
    return (np.clip(x, 0, 1) * 255).round().astype(np.uint8), points
