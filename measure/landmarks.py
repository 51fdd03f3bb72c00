"""478 points of a face by Google's face landmarker: lips, blinks, gaze and head pose of a video.

What it is    Three small networks, as in MediaPipe: BlazeFace finds a face in the picture, the face
              mesh puts 478 points on a crop of it, an MLP-Mixer turns points into 52 blendshapes.
Source        face_landmarker.task (MediaPipe), converted once by measure/convert_landmarker.py.
              Same numbers in PyTorch, so every point has a gradient with respect to the pixels.
Licence       Apache-2.0, Google: weights/landmarker/NOTICE. Shipped, 3.5 MB in float16.
Scale         Real video at 128 px (GRID): lips at p, b, m 0.007 eye distances apart (median), in
              open vowels 0.19; shut told from open with AUC 0.978 (20 clips of one man; 0.987 on 30
              clips of ten people). 126 of 126 generated portraits are found at 128 px.
Limits        Points of a still head jitter by 0.2 px at 128 px, pitch by 0.3 degrees. Opening the
              lips by 0.2 eye distances moves pitch by 0.6 degrees.

    landmarker = Landmarker()
    points, presence = landmarker.points(frames)       # uint8 (T, H, W, 3) -> (T, 478, 3), (T,)
    gap = lip_gap(points)                              # (T,) eye distances
    blinks = count_blinks(blink_score(landmarker.blendshapes(points)))

As a loss: `lip_gap(landmarker.mesh(crop(pictures, regions)))` is differentiable; the regions come
from the points of the ground truth, `regions_of(points)`.

Papers: Bazarevsky et al. 2019 (BlazeFace, 1907.05047); Kartynnik et al. 2019 (face mesh,
1907.06724); Grishchenko et al. 2020 (attention mesh, iris, 2006.10962).
Pixels: x to the right, y down, 0 is the left or upper edge, so pixel centres are at +0.5. z has
the unit of x; smaller is nearer. Left and right are those of the picture, but blendshapes have the
person's, as their names go.
"""
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as nnf
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

WEIGHTS = Path(__file__).parent.parent / "weights" / "landmarker" / "landmarker.safetensors"
CROP = 256              # pixels of the mesh's input
MARGIN = 1.5            # side of the crop, in longest sides of the points' box
PRESENT = 0.5           # least certainty that there is a face
BLINK = 0.45            # a blink is a rise of the blink score over this

# Numbers of the points. Corners of the eyes, from left to right, and the irises.
LEFT_EYE = (33, 133)
RIGHT_EYE = (362, 263)
LEFT_IRIS = 468
RIGHT_IRIS = 473
NOSE_TIP = 4
MOUTH_CORNERS = (61, 291)
UPPER_LIP = (82, 13, 312)       # inner edge
LOWER_LIP = (87, 14, 317)

BLENDSHAPES = (
    "_neutral browDownLeft browDownRight browInnerUp browOuterUpLeft browOuterUpRight cheekPuff "
    "cheekSquintLeft cheekSquintRight eyeBlinkLeft eyeBlinkRight eyeLookDownLeft eyeLookDownRight "
    "eyeLookInLeft eyeLookInRight eyeLookOutLeft eyeLookOutRight eyeLookUpLeft eyeLookUpRight "
    "eyeSquintLeft eyeSquintRight eyeWideLeft eyeWideRight jawForward jawLeft jawOpen jawRight "
    "mouthClose mouthDimpleLeft mouthDimpleRight mouthFrownLeft mouthFrownRight mouthFunnel "
    "mouthLeft mouthLowerDownLeft mouthLowerDownRight mouthPressLeft mouthPressRight mouthPucker "
    "mouthRight mouthRollLower mouthRollUpper mouthShrugLower mouthShrugUpper mouthSmileLeft "
    "mouthSmileRight mouthStretchLeft mouthStretchRight mouthUpperUpLeft mouthUpperUpRight "
    "noseSneerLeft noseSneerRight").split()

# The 146 points that the blendshapes network takes: brows, eyes, irises, lips, oval.
BLENDSHAPE_POINTS = [
    0, 1, 4, 5, 6, 7, 8, 10, 13, 14, 17, 21, 33, 37, 39, 40, 46, 52, 53, 54, 55, 58, 61, 63, 65, 66,
    67, 70, 78, 80, 81, 82, 84, 87, 88, 91, 93, 95, 103, 105, 107, 109, 127, 132, 133, 136, 144,
    145, 146, 148, 149, 150, 152, 153, 154, 155, 157, 158, 159, 160, 161, 162, 163, 168, 172, 173,
    176, 178, 181, 185, 191, 195, 197, 234, 246, 249, 251, 263, 267, 269, 270, 276, 282, 283, 284,
    285, 288, 291, 293, 295, 296, 297, 300, 308, 310, 311, 312, 314, 317, 318, 321, 323, 324, 332,
    334, 336, 338, 356, 361, 362, 365, 373, 374, 375, 377, 378, 379, 380, 381, 382, 384, 385, 386,
    387, 388, 389, 390, 397, 398, 400, 402, 405, 409, 415, 454, 466, 468, 469, 470, 471, 472, 473,
    474, 475, 476, 477]

# ------------------------------------------------------------------------------------ BlazeFace


class BlazeBlock(nn.Module):
    """Depthwise 3x3, pointwise, and the input added: halved and filled with zeros if need be."""

    def __init__(self, inside, outside, stride=1):
        super().__init__()
        self.stride = stride
        self.fill = outside - inside
        self.depthwise = nn.Conv2d(inside, inside, 3, stride, groups=inside)
        self.pointwise = nn.Conv2d(inside, outside, 1)

    def forward(self, x):                                               # (N, C, H, W)
        # TensorFlow pads at the right and the bottom only where the stride is 2
        padded = nnf.pad(x, (0, 1, 0, 1) if self.stride == 2 else (1, 1, 1, 1))
        y = self.pointwise(self.depthwise(padded))
        skip = nnf.max_pool2d(x, 2) if self.stride == 2 else x
        return nnf.relu(nnf.pad(skip, (0, 0, 0, 0, 0, self.fill)) + y)


class BlazeFace(nn.Module):
    """(N, 3, 128, 128) in [-1, 1] -> logits (N, 896), boxes and key points (N, 896, 16).

    A candidate is cx, cy, w, h and six points x, y in pixels from the middle of its cell.
    """
    fine = ((24, 1), (28, 1), (32, 2), (36, 1), (42, 1), (48, 2),       # channels, stride
            (56, 1), (64, 1), (72, 1), (80, 1), (88, 1))
    coarse = ((96, 2), (96, 1), (96, 1), (96, 1), (96, 1))

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 5, 2)
        inside = [24] + [channels for channels, _ in self.fine + self.coarse]
        blocks = [BlazeBlock(i, o, s) for i, (o, s) in zip(inside, self.fine + self.coarse)]
        self.blocks = nn.ModuleList(blocks)
        self.score_fine = nn.Conv2d(88, 2, 1)
        self.score_coarse = nn.Conv2d(96, 6, 1)
        self.place_fine = nn.Conv2d(88, 2 * 16, 1)
        self.place_coarse = nn.Conv2d(96, 6 * 16, 1)

    def forward(self, x):
        x = nnf.relu(self.stem(nnf.pad(x, (1, 2, 1, 2))))               # (N, 24, 64, 64)
        for block in self.blocks[:len(self.fine)]:
            x = block(x)
        fine = x                                                        # (N, 88, 16, 16)
        for block in self.blocks[len(self.fine):]:
            x = block(x)                                                # (N, 96, 8, 8)

        def rows(y, width):                                             # -> (N, candidates, width)
            return y.permute(0, 2, 3, 1).reshape(len(y), -1, width)

        scores = torch.cat([rows(self.score_fine(fine), 1), rows(self.score_coarse(x), 1)], 1)
        places = torch.cat([rows(self.place_fine(fine), 16), rows(self.place_coarse(x), 16)], 1)
        return scores[..., 0], places

    @staticmethod
    def anchors():
        """Centres of the candidates' cells: two a cell of 8 px, six a cell of 16. -> (896, 2)"""
        middles = []
        for cell, count in ((8, 2), (16, 6)):
            at = torch.arange(cell / 2, 128, cell)
            grid = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)
            middles.append(grid.reshape(-1, 2).repeat_interleave(count, 0))
        return torch.cat(middles)


# ------------------------------------------------------------------------------------ face mesh


class MeshBlock(nn.Module):
    """A bottleneck: reduce, depthwise 3x3, expand, and the input added."""

    def __init__(self, inside, bottleneck, outside, stride=1):
        super().__init__()
        self.stride = stride
        self.fill = outside - inside
        self.reduce = nn.Conv2d(inside, bottleneck, stride, stride)
        self.act = nn.PReLU(bottleneck)
        self.depthwise = nn.Conv2d(bottleneck, bottleneck, 3, 1, 1, groups=bottleneck, bias=False)
        self.expand = nn.Conv2d(bottleneck, outside, 1)
        self.act_out = nn.PReLU(outside)

    def forward(self, x):                                               # (N, C, H, W)
        y = self.expand(self.depthwise(self.act(self.reduce(x))))
        skip = nnf.max_pool2d(x, 2) if self.stride == 2 else x
        return self.act_out(nnf.pad(skip, (0, 0, 0, 0, 0, self.fill)) + y)


class FaceMesh(nn.Module):
    """(N, 3, 256, 256) in [0, 1] -> points in pixels of the crop (N, 478, 3), logits (N,)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2)
        self.act = nn.PReLU(16)
        blocks = [MeshBlock(16, 8, 16) for _ in range(4)]
        inside = 16
        for outside in (32, 64, 128, 128, 128, 128):                    # 64, 32, 16, 8, 4, 2 pixels
            bottleneck = min(64, outside // 2)
            blocks.append(MeshBlock(inside, bottleneck, outside, stride=2))
            blocks += [MeshBlock(outside, bottleneck, outside) for _ in range(4)]
            inside = outside
        self.blocks = nn.Sequential(*blocks)
        self.presence = nn.Conv2d(128, 1, 2)
        self.points = nn.Conv2d(128, 478 * 3, 2)

    def forward(self, x):
        x = self.act(self.stem(nnf.pad(x, (0, 1, 0, 1))))               # (N, 16, 128, 128)
        x = self.blocks(x)                                              # (N, 128, 2, 2)
        return self.points(x).view(-1, 478, 3), self.presence(x).flatten()


# ---------------------------------------------------------------------------------- blendshapes


class MixerLayer(nn.Module):
    """Tolstikhin et al. 2021: an MLP across the tokens, then one across the channels."""

    def __init__(self, tokens=97, dim=64):
        super().__init__()
        self.norm_tokens = nn.LayerNorm(dim, eps=1e-6, bias=False)
        self.tokens = nn.Sequential(nn.Linear(tokens, 384), nn.ReLU(), nn.Linear(384, tokens))
        self.norm_dim = nn.LayerNorm(dim, eps=1e-6, bias=False)
        self.dim = nn.Sequential(nn.Linear(dim, 256), nn.ReLU(), nn.Linear(256, dim))

    def forward(self, x):                                               # (N, 97, 64)
        x = x + self.tokens(self.norm_tokens(x).mT).mT
        return x + self.dim(self.norm_dim(x))


class Blendshapes(nn.Module):
    """146 points (N, 146, 2), in any unit -> 52 expressions in [0, 1] (N, 52)."""

    def __init__(self):
        super().__init__()
        self.embed_points = nn.Linear(146, 96)
        self.embed_xy = nn.Linear(2, 64)
        self.token = nn.Parameter(torch.zeros(1, 1, 64))
        self.layers = nn.Sequential(*[MixerLayer() for _ in range(4)])
        self.out = nn.Linear(64, 52)

    def forward(self, x):
        x = x - x.mean(1, keepdim=True)
        x = x / x.norm(dim=2, keepdim=True).mean(1, keepdim=True) / 2   # size and place are gone
        x = self.embed_xy(self.embed_points(x.mT).mT)                   # (N, 96, 64)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)        # (N, 97, 64)
        return self.out(self.layers(x)[:, 0]).sigmoid()


# ------------------------------------------------------------------------------------- regions


def regions_of(points):
    """Squares around faces for the next crop, upright in the face's own frame.

    points (N, K, 3) pixels -> (N, 4): middle x, y, side in pixels, roll in radians.
    """
    axis = points[:, RIGHT_EYE[1], :2] - points[:, LEFT_EYE[0], :2]
    angle = torch.atan2(axis[:, 1], axis[:, 0])
    turn = rotation(angle)                                              # (N, 2, 2)
    upright = points[..., :2] @ turn                                    # turned back by the roll
    low = upright.amin(1)
    high = upright.amax(1)
    middle = (turn @ ((low + high) / 2)[..., None])[..., 0]             # (N, 2)
    side = MARGIN * (high - low).amax(1)
    return torch.cat([middle, side[:, None], angle[:, None]], 1)


def rotation(angle):
    """Clockwise by angle (N,), radians. -> (N, 2, 2)"""
    cos = angle.cos()
    sin = angle.sin()
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)


def crop(pictures, regions):
    """Cut regions (N, 4) out of pictures (N, 3, H, W). -> (N, 3, 256, 256), differentiable.

    Outside of the picture its edge is repeated. Large regions are averaged before they are sampled.
    """
    factor = max(1, int(regions[:, 2].min() / CROP))
    if factor > 1:
        pictures = nnf.avg_pool2d(pictures, factor)
        regions = torch.cat([regions[:, :3] / factor, regions[:, 3:]], 1)
    height, width = pictures.shape[2:]
    at = torch.arange(0.5, CROP, device=pictures.device)
    grid = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)       # (256, 256, 2)
    grid = grid.reshape(1, -1, 2).expand(len(pictures), -1, -1)
    grid = to_picture(grid, regions) / grid.new_tensor([width, height]) * 2 - 1
    grid = grid.unflatten(1, (CROP, CROP))
    return nnf.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def to_picture(points, regions):
    """Points (N, K, 2 or 3) in pixels of crops of 256 -> in pixels of the pictures."""
    scale = regions[:, 2, None, None] / CROP
    turn = rotation(regions[:, 3])
    xy = (points[..., :2] - CROP / 2) @ turn.mT * scale + regions[:, None, :2]
    return torch.cat([xy, points[..., 2:] * scale], -1)


class Face(NamedTuple):
    """One face that the detector found, in pixels of the picture."""
    score: float
    box: torch.Tensor           # (4,) x0, y0, x1, y1: brows to chin
    keypoints: torch.Tensor     # (6, 2) left and right eye, nose tip, mouth, left and right ear

    def moved(self, x, y):
        """The same face, x to the right and y down."""
        by = self.box.new_tensor([x, y])
        return Face(self.score, self.box + by.repeat(2), self.keypoints + by)

    def region(self):
        """-> (1, 4), as regions_of."""
        low, high = self.box.view(2, 2)
        axis = self.keypoints[1] - self.keypoints[0]
        side = MARGIN * (high - low).amax()
        return torch.cat([(low + high) / 2, side[None], torch.atan2(axis[1], axis[0])[None]])[None]


# ---------------------------------------------------------------------------------------- whole


class Landmarker(nn.Module):
    """Detector, mesh and blendshapes, frozen. ValueError if `path` holds something else."""

    def __init__(self, path=WEIGHTS, device="cpu"):
        super().__init__()
        self.detector = BlazeFace()
        self.face_mesh = FaceMesh()
        self.expressions = Blendshapes()
        try:
            state = load_file(path)
            state = {k: v.float() for k, v in state.items() if not k.startswith("head.")}
            self.load_state_dict(state)
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:150]
            raise ValueError(f"{path} is no face landmarker: {reason}") from None
        self.requires_grad_(False)
        self.to(device, memory_format=torch.channels_last)              # 1.5 x as fast on a CPU

    @property
    def device(self):
        return self.face_mesh.stem.weight.device

    def pictures(self, frames):
        """uint8 (T, H, W, 3) -> float (T, 3, H, W) in [0, 1] on the device."""
        return torch.from_numpy(np.array(frames)).to(self.device).permute(0, 3, 1, 2).float() / 255

    @torch.no_grad()
    def detect(self, image, threshold=PRESENT):
        """Faces of an image uint8 (H, W, 3) -> [Face], the most certain first.

        A face must be as high as a seventh of the longer side: the network sees 128 x 128 px.
        """
        return self._detect(self.pictures(image[None]), threshold)

    def _detect(self, picture, threshold):
        height, width = picture.shape[2:]
        longer = max(height, width)
        top = (longer - height) // 2
        left = (longer - width) // 2
        square = nnf.pad(picture, (left, longer - width - left, top, longer - height - top))
        square = nnf.interpolate(square, (128, 128), mode="bilinear", antialias=True)
        logits, places = self.detector(square * 2 - 1)
        scores = logits[0].sigmoid()
        places = places[0].view(-1, 8, 2)                               # middle, size, six points
        middles = BlazeFace.anchors().to(places)[:, None]
        keypoints = places[:, 2:] + middles
        corners = places[:, :1] + middles + places[:, 1:2] * places.new_tensor([[-.5], [.5]])
        marks = torch.cat([corners, keypoints], 1) * longer / 128       # (896, 8, 2)
        marks = marks - marks.new_tensor([left, top])
        return merge_overlapping(scores[scores > threshold], marks[scores > threshold])

    @torch.no_grad()
    def points(self, frames):
        """Track one face. uint8 (T, H, W, 3) -> points (T, 478, 3), presence (T,).

        float32 tensors on the CPU; points in pixels of the frames. A frame is cropped by the points
        of the one before, the first frame by the detector. No face: points nan, presence 0.
        """
        all_points = torch.full((len(frames), 478, 3), torch.nan)
        all_presence = torch.zeros(len(frames))
        region = None
        for t, frame in enumerate(frames):
            picture = self.pictures(frame[None])                        # (1, 3, H, W)
            found = self._look(picture, region) if region is not None else None
            if found is None:
                found = self._search(picture)
            region = None
            if found is not None:
                points, presence = found
                region = regions_of(points)
                all_points[t] = points[0].cpu()
                all_presence[t] = presence[0].cpu()
        return all_points, all_presence

    def _look(self, picture, region):
        """-> points (1, 478, 3) in pixels of the picture, presence (1,); None without a face."""
        points, logits = self.face_mesh(crop(picture, region))
        presence = logits.sigmoid()
        return (to_picture(points, region), presence) if presence > PRESENT else None

    def _search(self, picture):
        """Detect, then _look twice, so that the detector's box matters little. -> as _look"""
        faces = self._detect(picture, PRESENT)
        return self._refine(picture, faces[0]) if faces else None

    def _refine(self, picture, face):
        found = self._look(picture, face.region())
        return found and self._look(picture, regions_of(found[0]))

    @torch.no_grad()
    def refine(self, image, face):
        """A detected face of uint8 (H, W, 3) -> points (478, 3), presence; None if it is none."""
        found = self._refine(self.pictures(image[None]), face)
        return found and (found[0][0].cpu(), found[1].item())

    def mesh(self, crops):
        """Faces float (N, 3, 256, 256) in [0, 1] -> points (N, 478, 3) in pixels of the crop.

        Differentiable. The face should be upright and fill two thirds of the crop, see regions_of.
        """
        return self.face_mesh(crops)[0]

    def blendshapes(self, points):
        """(..., 478, 3) -> (..., 52) in [0, 1], names in BLENDSHAPES. nan where the points are."""
        points = torch.as_tensor(points)
        chosen = points[..., BLENDSHAPE_POINTS, :2].to(self.device)
        return self.expressions(chosen.reshape(-1, 146, 2)).view(*points.shape[:-2], 52)


def merge_overlapping(scores, marks, overlap=0.3):
    """Candidates of one face become one, weighted by their scores, as MediaPipe does.

    scores (K,), marks (K, 8, 2): two corners and six key points. -> [Face], surest first.
    """
    order = scores.argsort(descending=True)
    scores = scores[order]
    marks = marks[order]
    low = marks[:, 0]
    high = marks[:, 1]
    area = (high - low).clamp(min=0).prod(1)
    faces = []
    while len(scores):
        shared = (torch.minimum(high, high[0]) - torch.maximum(low, low[0])).clamp(min=0).prod(1)
        same = shared / (area + area[0] - shared) > overlap
        same[0] = True
        weights = scores[same, None, None] / scores[same].sum()
        merged = (marks[same] * weights).sum(0)
        faces.append(Face(float(scores[0]), merged[:2].flatten(), merged[2:]))
        scores, marks, area, low, high = (x[~same] for x in (scores, marks, area, low, high))
    return faces


# ------------------------------------------------------------------------ figures from the points
# Pure, differentiable functions of points (..., 478, 3), tensors or arrays.


def eye_centres(points):
    """Middles of the corners of each eye, left one first. -> (..., 2, 3) pixels"""
    points = torch.as_tensor(points)
    return torch.stack([points[..., eye, :].mean(-2) for eye in (LEFT_EYE, RIGHT_EYE)], -2)


def eye_distance(points):
    """Distance of the eye centres in 3-D, so that turning the head changes it little. -> pixels"""
    left, right = eye_centres(points).unbind(-2)
    return (left - right).norm(dim=-1)


def lip_gap(points):
    """Opening of the inner lips: mean of 82-87, 13-14, 312-317. -> (...,) eye distances.

    Shut lips measure about 0.007, open vowels 0.1 to 0.3; shut is under 0.03.
    """
    points = torch.as_tensor(points)
    gaps = (points[..., UPPER_LIP, :] - points[..., LOWER_LIP, :]).norm(dim=-1)
    return gaps.mean(-1) / eye_distance(points)


def lip_width(points):
    """Distance of the corners of the mouth. -> (...,) eye distances"""
    points = torch.as_tensor(points)
    left, right = points[..., MOUTH_CORNERS, :].unbind(-2)
    return (left - right).norm(dim=-1) / eye_distance(points)


def blink_score(blendshapes):
    """How far the eyelids are down: mean of eyeBlinkLeft and eyeBlinkRight. (..., 52) -> (...,)

    Open eyes rest at about 0.12, shut ones reach 0.6 to 0.8.
    """
    blendshapes = torch.as_tensor(blendshapes)
    both = [BLENDSHAPES.index("eyeBlinkLeft"), BLENDSHAPES.index("eyeBlinkRight")]
    return blendshapes[..., both].mean(-1)


def count_blinks(score):
    """How often the blink score (T,) rises over BLINK. nan is no blink. -> int"""
    shut = torch.as_tensor(score) > BLINK
    return int((shut[1:] & ~shut[:-1]).sum())


def gaze(points):
    """Where the irises are between the corners of the eyes, mean of both. -> (..., 2)

    x > 0 to the right of the picture, y > 0 down, in widths of the eye.
    """
    points = torch.as_tensor(points)[..., :2]
    both = []
    for (left, right), iris in ((LEFT_EYE, LEFT_IRIS), (RIGHT_EYE, RIGHT_IRIS)):
        axis = points[..., right, :] - points[..., left, :]
        shift = points[..., iris, :] - (points[..., left, :] + points[..., right, :]) / 2
        along = (shift * axis).sum(-1)
        across = axis[..., 0] * shift[..., 1] - axis[..., 1] * shift[..., 0]
        both.append(torch.stack([along, across], -1) / axis.square().sum(-1, keepdim=True))
    return (both[0] + both[1]) / 2


class HeadPose(NamedTuple):
    yaw: torch.Tensor           # (...,) degrees, > 0: the nose points to the right of the picture
    pitch: torch.Tensor         # (...,) degrees, > 0: up
    roll: torch.Tensor          # (...,) degrees, > 0: clockwise
    position: torch.Tensor      # (..., 2) point between the eyes of the fitted head, pixels
    scale: torch.Tensor         # (...,) eye distance of the fitted head, pixels


@lru_cache(maxsize=1)
def frontal_head(path=WEIGHTS):
    """MediaPipe's frontal head in our axes -> vertices (468, 3), weights of a rigid fit (468,)."""
    with safe_open(path, "pt") as file:
        vertices = file.get_tensor("head.vertices")
        weights = file.get_tensor("head.weights")
    return vertices * torch.tensor([1.0, -1.0, -1.0]), weights / weights.sum()


def head_pose(points):
    """Rotation, scale and place of a frontal head that fit the points best. -> HeadPose

    Weighted least squares (Kabsch 1976) over 33 points that move little when somebody speaks.
    nan where the points are.
    """
    points = torch.as_tensor(points).float()
    vertices, weights = (x.to(points.device) for x in frontal_head())
    bad = points.isnan().flatten(-2).any(-1)
    points = torch.where(bad[..., None, None], 0.0, points)
    use = weights > 0
    weights = weights[use, None]
    middle = (points[..., :468, :][..., use, :] * weights).sum(-2, keepdim=True)
    middle_head = (vertices[use] * weights).sum(0)
    shape = points[..., :468, :][..., use, :] - middle                  # (..., 33, 3)
    shape_head = vertices[use] - middle_head
    u, s, vt = torch.linalg.svd(shape.mT @ (shape_head * weights))
    flip = torch.ones_like(s)
    flip[..., 2] = (u @ vt).det().sign()
    turn = u * flip[..., None, :] @ vt                                  # (..., 3, 3)
    scale = (s * flip).sum(-1) / (shape_head.square() * weights).sum()
    yaw = torch.atan2(-turn[..., 0, 2], turn[..., 2, 2])
    pitch = torch.atan2(turn[..., 1, 2], torch.hypot(turn[..., 0, 2], turn[..., 2, 2]))
    roll = torch.atan2(turn[..., 1, 0], turn[..., 1, 1])
    between = eye_centres(vertices).mean(0) - middle_head
    position = middle[..., 0, :] + scale[..., None] * (turn @ between)
    degrees = [torch.where(bad, torch.nan, angle.rad2deg()) for angle in (yaw, pitch, roll)]
    position = torch.where(bad[..., None], torch.nan, position[..., :2])
    scale = torch.where(bad, torch.nan, scale * eye_distance(vertices))
    return HeadPose(*degrees, position, scale)


def five_points(points):
    """Irises, tip of the nose, corners of the mouth, to align a face by. -> (..., 5, 2) pixels"""
    points = torch.as_tensor(points)
    return points[..., (LEFT_IRIS, RIGHT_IRIS, NOSE_TIP, *MOUTH_CORNERS), :2]
