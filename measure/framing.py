"""Finds the face in a photo and cuts out the square that the networks were trained on.

    portrait, note, warnings = frame_face(path, image, size)    # Pillow image -> Pillow image

The face finder sees 128 x 128 pixels, so the photo is searched as a whole and then in tiles of half
the side, a quarter and so on, until there is a face. The 478 points of a face give the square: how
far apart the eyes are gives its side, where they are its place, how they slope its turn. Where the
photo ends, its edge is repeated.

A square photo that is framed already, within the spread of the training pictures, is taken whole.
Faces may be turned in the picture plane by any angle; looking up, down or aside by over 30 degrees
they are found less surely, and animate badly. Pixels: as in landmarks.py.
"""
import math
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from measure.landmarks import (
    LEFT_EYE,
    RIGHT_EYE,
    Landmarker,
    eye_centres,
    eye_distance,
    head_pose,
)

# The framing of the training pictures (medians of 1000), in shares of the square's side.
EYES_APART = 0.244          # distance of the eye centres, in 3-D: turning a head changes it little
EYES_HEIGHT = 0.44          # middle of the eyes below the upper edge; sideways it is in the middle

AS_FRAMED = 1.2             # "framed already": the side is right within this factor,
OFF_CENTRE = 0.05           # its middle within this share of the side,
UPRIGHT = 3.0               # and the roll within these degrees

SEARCHED = 1280             # longer side of the searched picture, pixels; larger ones are reduced
SMALLEST_TILE = 128         # pixels, what the detector sees: smaller ones would be enlarged
CANDIDATES = 8              # looked at closely in all tiles of a size: fur and leaves have many
NO_FACE = 12                # pixels between the outer eye corners; below, it is texture,
SMALL = 40                  # and below this a blur
TURNED = 30.0               # degrees of yaw or pitch
COVERED = 0.9               # presence; below, a hand, a mask or the picture's edge hides something


class Found(NamedTuple):
    """A face in a picture."""
    points: torch.Tensor    # (478, 3) pixels of the picture
    presence: float         # 0 to 1

    @property
    def eyes(self):
        """Distance of the outer corners of the eyes, pixels."""
        return float((self.points[RIGHT_EYE[1]] - self.points[LEFT_EYE[0]]).norm())


class Square(NamedTuple):
    """What is cut out of a picture, pixels and degrees."""
    x: float                # middle
    y: float
    side: float
    roll: float             # > 0: its content is turned clockwise, and will be turned back


@lru_cache(maxsize=1)
def shipped_landmarker():
    return Landmarker()


def corners_of_tiles(length, tile):
    """Where tiles begin along a side: they overlap by a third or more, and none sticks out."""
    count = max(1, math.ceil((length - tile) / (tile * 2 / 3)) + 1)
    return np.linspace(0, max(0, length - tile), count).round().astype(int).tolist()


def candidates(image, tile, landmarker):
    """Faces that the detector sees in tiles of uint8 (H, W, 3) -> [Face], the surest first."""
    faces = []
    for y in corners_of_tiles(image.shape[0], tile):
        for x in corners_of_tiles(image.shape[1], tile):
            cut = image[y:y + tile, x:x + tile]
            faces += [face.moved(x, y) for face in landmarker.detect(cut)]
    return sorted(faces, key=lambda face: -face.score)


def known(place, found):
    """Is a place (2,) inside a face that was found?"""
    return any(((face.points[:, :2].amin(0) < place) & (place < face.points[:, :2].amax(0))).all()
               for face in found)


def find_faces(image, deeper=1):
    """All faces of uint8 (H, W, 3) -> [Found], the largest first.

    Smaller and smaller tiles are searched until one has a face, and `deeper` sizes more: people far
    behind a face are not looked for."""
    landmarker = shipped_landmarker()
    scale = min(1, SEARCHED / max(image.shape[:2]))
    if scale < 1:
        size = round(image.shape[1] * scale), round(image.shape[0] * scale)
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
    tile = max(image.shape[:2])
    found = []
    while deeper >= 0:
        unknown = (face for face in candidates(image, tile, landmarker)
                   if not known(face.box.view(2, 2).mean(0), found))
        for face in islice(unknown, CANDIDATES):
            seen = landmarker.refine(image, face)
            if seen is None or known(seen[0][:, :2].mean(0), found):
                continue
            square = square_of(seen[0])
            if not touches(square, image.shape[1], image.shape[0]):
                continue
            portrait = cut_out(Image.fromarray(image), square, SMALLEST_TILE)
            if landmarker.detect(np.asarray(portrait)):             # fur and leaves fail here
                found.append(Found(*seen))
        tile //= 2
        if found or tile < SMALLEST_TILE:
            deeper -= 1
    found = [Found(face.points / scale, face.presence) for face in found]
    found = [face for face in found if face.eyes >= NO_FACE]
    return sorted(found, key=lambda face: -face.eyes)


def square_of(points):
    """Points (478, 3) -> the Square in which this face is framed as in training."""
    left, right = eye_centres(points)[:, :2]
    angle = torch.atan2(right[1] - left[1], right[0] - left[0])
    side = eye_distance(points) / EYES_APART
    down = side * (0.5 - EYES_HEIGHT) * torch.stack([-angle.sin(), angle.cos()])
    x, y = (left + right) / 2 + down
    return Square(*(float(value) for value in (x, y, side, angle.rad2deg())))


def touches(square, width, height):
    """Does a Square have a part of a picture of this size in it?"""
    half = square.side / 2
    return -half < square.x < width + half and -half < square.y < height + half


def is_framed(square, width, height):
    """Is a picture of this size about the square already?"""
    off = max(abs(square.x / width - 0.5), abs(square.y / height - 0.5))
    scale_is_right = 1 / AS_FRAMED < square.side / width < AS_FRAMED
    return width == height and scale_is_right and off < OFF_CENTRE and abs(square.roll) < UPRIGHT


def cut_out(image, square, size):
    """A Square of a Pillow image -> Pillow image (size, size), the edge repeated beyond the end."""
    turns = abs(math.sin(2 * math.radians(square.roll)))
    reach = square.side / 2 * math.sqrt(1 + turns)              # half the side of what is needed
    x0, y0 = math.floor(square.x - reach), math.floor(square.y - reach)
    x1, y1 = math.ceil(square.x + reach), math.ceil(square.y + reach)
    inside = max(x0, 0), max(y0, 0), min(x1, image.width), min(y1, image.height)
    pixels = np.asarray(image.crop(inside))
    beyond = ((inside[1] - y0, y1 - inside[3]), (inside[0] - x0, x1 - inside[2]), (0, 0))
    part = Image.fromarray(np.pad(pixels, beyond, "edge"))
    middle = square.x - x0, square.y - y0
    if abs(square.roll) >= 0.5:                                 # less is not worth the smoothing
        part = part.rotate(square.roll, Image.Resampling.BICUBIC, center=middle)
    half = square.side / 2
    box = middle[0] - half, middle[1] - half, middle[0] + half, middle[1] + half
    box = [min(max(v, 0), end) for v, end in zip(box, part.size * 2)]   # rounding
    return part.resize((size, size), Image.Resampling.LANCZOS, box)


def frame_face(path, image, size, number=None):
    """A portrait for the networks: Pillow RGB image -> (image of size x size, note, [warning]).

    number: which face, 1 is the largest; None: the largest, with a warning if there are more.
    note: what was done, in words. ValueError, about `path`, if there is no such face."""
    faces = find_faces(np.asarray(image))
    count = len(faces)
    if not count:
        raise ValueError(f"{path}: there is no face in it (a drawing is taken with --crop none)")
    if number is not None and not 1 <= number <= count:
        raise ValueError(f"{path}: there is no face {number}, only {count}; 1 is the largest")
    face = faces[(number or 1) - 1]
    square = square_of(face.points)
    if is_framed(square, image.width, image.height):
        side, done = image.width, "framed already, taken whole"
        portrait = image.resize((size, size), Image.Resampling.LANCZOS)
    else:
        side = round(square.side)
        done = f"cropped {side} x {side}"
        done += f", turned by {-square.roll:.0f} degrees" if abs(square.roll) >= 0.5 else ""
        portrait = cut_out(image, square, size)
    note = f"{face.eyes:.0f} px from eye to eye, {done}, enlarged {size / side:.2g} x"
    return portrait, note, complaints(face, count if number is None else 1)


def complaints(face, count):
    """What can make a bad video: sentences about a Found, one of `count` faces."""
    pose = head_pose(face.points)
    turn = max(abs(pose.yaw), abs(pose.pitch))
    wrong = {f"the face is small, {face.eyes:.0f} px from eye to eye: it will be blurred":
             face.eyes < SMALL,
             f"the face is turned by {turn:.0f} degrees: one that looks ahead is animated better":
             turn > TURNED,
             f"the face may be covered (certainty {face.presence:.2f})": face.presence < COVERED,
             f"{count} faces: the largest is taken, another one if asked for (--face 2)": count > 1}
    return [sentence for sentence, holds in wrong.items() if holds]
