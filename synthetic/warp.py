"""A still portrait that moves: the renderer of the synthetic clips.

Face coordinates: origin between the eyes, unit = distance of the eyes, x right, y down.
A pixel's colour is found backwards, through two warps:
    q -> c   undo the head's pose: the face is a relief that turns and shifts
    c -> s   undo the expression: a sum of hand-made displacement fields
and the portrait is read at s.

Skin tears at two kinds of lines: the mouth line and the upper eyelids. So there are two expression
fields, each smooth everywhere. Layer 0 is the skull (upper lip, eyeballs). Layer 1 slides over it
(lower lip and jaw, upper eyelids). A pixel takes the layer on its side of the moved line.
The inside of the mouth and the skin of closing eyelids are painted.

Shapes: n frames, S pixels of a frame, K coefficients, (gh, gw) the grid of expression fields.
"""
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image, ImageDraw

from synthetic.mesh import (
    BROWS,
    EYE_CORNERS,
    EYES,
    LOWER_LIP_INNER,
    OVAL,
    UPPER_LIP_INNER,
    relief,
    smoothstep,
)

POSE_GRID = 64                  # the pose fields are POSE_GRID x POSE_GRID
EXPRESSION_GRID = (144, 112)    # (gh, gw)
LIP_TABLE = 160                 # points of a lip's edge, in a frame
EDGE_POINTS = 65                # points of a lip's edge, at rest


class Eyelid(NamedTuple):
    """The upper eyelid of one eye."""
    x: np.ndarray           # (33,) from corner to corner
    y: np.ndarray           # (33,) its edge when the eye is open, lashes included
    travel: np.ndarray      # (33,) how far down the edge goes until the eye is shut
    reach: float            # from the edge up to the brow


def f32(x):
    return torch.tensor(np.asarray(x), dtype=torch.float32)


def read_table(table, x, x0, x1):
    """Linear interpolation of tables (n, T), evenly spaced on [x0, x1], at x (n, h, w)."""
    last = table.shape[1] - 1
    position = ((x - x0) * (last / (x1 - x0))).clamp(0, last - 0.001).flatten(1)
    index = position.long()
    left = table.gather(1, index)
    right = table.gather(1, index + 1)
    return (left + (right - left) * (position - index)).view(x.shape)



class Puppet:
    """One portrait, ready to be moved.

    image: (H, H, 3) uint8; points: its mesh (468, 3) in pixels, smaller z = nearer.
    size: S, pixels of a rendered frame; drawn at twice that and averaged.
    check: stop when mouth line and eyelids are found (a cheap test of a portrait).
    Raises ValueError for another shape, for no dark line between the lips, for brows so low that a
    blink would smear them.
    """

    def __init__(self, image, points, size, check=False):
        image = np.asarray(image)
        points = np.asarray(points, np.float64)
        side = len(image)
        if image.shape != (side, side, 3) or points.shape != (468, 3):
            message = f"need a square RGB picture, 468 points, got {image.shape} and {points.shape}"
            raise ValueError(message)
        self.size = size
        self.define_coordinates(points, side)
        mask = Image.new("L", (side, side))
        ImageDraw.Draw(mask).polygon([tuple(v) for v in points[OVAL, :2]], fill=255)
        rgba = f32(np.dstack([image, mask]) / 255)
        self.texture = rgba.movedim(-1, 0).contiguous()[None]                # (1, 4, H, H)
        self.find_mouth_line()
        self.find_eyelids()
        if check:
            return
        self.build_pose_basis()
        self.build_expression_basis()
        self.build_lip_edges()
        self.choose_colours()

    # ---------------------------------------------------------------------------- coordinates
    def define_coordinates(self, points, side):
        """Set unit and origin (shares of the side), axes (rows: x, y), and points (468, 3)."""
        left, right = (points[corners, :2].mean(0) / side for corners in EYE_CORNERS)
        self.unit = float(np.linalg.norm(right - left))
        self.origin = (left + right) / 2
        x_axis = (right - left) / self.unit
        self.axes = np.stack([x_axis, [-x_axis[1], x_axis[0]]])
        depth = points[:, 2:] - points[OVAL, 2].mean()          # the ears lie at about 0
        flat = self.to_face(points[:, :2] / side)
        self.points = np.concatenate([flat, depth / side / self.unit * 0.8], 1)     # (468, 3)

    def to_face(self, xy):
        """Positions in the picture (..., 2), 0-1, to face coordinates."""
        return (xy - self.origin) @ self.axes.T / self.unit

    def to_picture(self, c):
        """Face coordinates, tensor (..., 2), to those of grid_sample, -1 to 1."""
        x_axis, y_axis = f32(self.axes * self.unit * 2)
        origin = f32(self.origin * 2 - 1)
        x, y = c.unbind(-1)
        return torch.stack([x * x_axis[i] + (y * y_axis[i] + origin[i]) for i in (0, 1)], -1)

    def pixel_centres(self, n):
        """Face coordinates (n, n, 2) of the pixel centres of the frame at n x n pixels."""
        xy = np.moveaxis(np.mgrid[:n, :n][::-1], 0, -1)
        return self.to_face((xy + 0.5) / n)

    def read(self, x, y):
        """Colours (n, 3) of the portrait at face coordinates x, y (n,)."""
        at = self.to_picture(f32(np.stack([x, y], 1)))[None, None]
        return nnf.grid_sample(self.texture[:, :3], at, align_corners=False)[0, :, 0].numpy().T

    # ------------------------------------------------------------------- mouth line and eyelids
    def mouth_u(self, x):
        """Position along the mouth: -1 and 1 are its corners.

        The two halves differ in width where the head is turned.
        """
        return (x - self.mouth_x) / np.where(x < self.mouth_x, *self.mouth_halves)

    def line_y(self, u):
        """Height of the mouth line at u; it goes on level beyond the corners."""
        return np.polyval(self.line, np.clip(u, -1, 1))

    def slit(self, u):
        """The slit between the lips of the portrait: its part above and below the mouth line."""
        inside = np.abs(u) < 1
        at = np.clip(u, -1, 1)
        return [np.clip(np.polyval(half, at), 0, 0.06) * inside for half in self.slits]

    def find_mouth_line(self):
        """Fit the mouth line, a polynomial in u, and the slit that the portrait shows along it.

        The mesh errs by a pixel: the line snaps to the dark between the lips.
        """
        p = self.points
        corners = (p[[61, 291], :2] + p[[78, 308], :2]) / 2
        self.mouth_x, self.mouth_y = corners.mean(0).tolist()
        self.mouth_halves = (float(self.mouth_x - corners[0, 0]),
                             float(corners[1, 0] - self.mouth_x))
        upper, lower = p[UPPER_LIP_INNER], p[LOWER_LIP_INNER]
        middle = (upper + lower) / 2
        self.line = np.polyfit(np.clip(self.mouth_u(middle[:, 0]), -1, 1), middle[:, 1], 4)
        self.slits = [np.polyfit(self.mouth_u(edge[:, 0]), np.abs(middle - edge)[:, 1], 4)
                      for edge in (upper, lower)]

        # the darkest of 37 heights, at 13 places
        u = np.linspace(-0.75, 0.75, 13)
        offset = np.linspace(-0.09, 0.09, 37)[:, None]
        x, y = np.broadcast_arrays(self.mouth_x + u * np.where(u < 0, *self.mouth_halves),
                                   np.polyval(self.line, u) + offset)
        grey = self.read(x.ravel(), y.ravel()).mean(-1).reshape(37, 13)
        far_is_bright = 0.25 * grey.mean() * (offset / 0.09) ** 2
        dark = offset[np.argmin(grey + far_is_bright, 0), 0]
        shift = np.polyfit(u, dark, 2, w=np.ptp(grey, 0) + 0.02)

        fitted = np.polyval(shift, u)
        dip = np.median(np.median(grey, 0) - grey.min(0)) / grey.mean()
        too_far = np.abs(fitted).max() > 0.085
        scattered = np.median(np.abs(fitted - dark)) > 0.012
        if too_far or scattered or not dip > 0.05:
            raise ValueError("no dark line between the lips near that of the mesh")
        to_zero_at_corners = [-1, 0, 1]                         # 1 - u^2
        self.line = np.polyadd(self.line, np.polymul(shift, to_zero_at_corners))

    def find_eyelids(self):
        self.eyelids = []
        along = np.abs(np.linspace(-1, 1, 33))
        for (upper, lower), (_, brow) in zip(EYES, BROWS):
            p = self.points
            x = np.linspace(p[upper[0], 0], p[upper[-1], 0], 33)

            def fit(edge, x=x):
                weight = [3] + [1] * 7 + [3]
                curve = np.polyfit(self.points[edge, 0] - x[16], self.points[edge, 1], 4, w=weight)
                return np.polyval(curve, x - x[16])

            y = fit(upper) - 0.012                              # takes the lashes along
            travel = np.maximum(fit(lower) + 0.045 - y, 0) * smoothstep(along, 1, 0.9)
            reach = p[upper[2:7], 1].mean() - p[brow, 1].mean()
            if reach < 0.15:
                raise ValueError("the brows are too near the eyelids: a blink would smear them")
            self.eyelids.append(Eyelid(x, y, travel, reach))

    # ----------------------------------------------------------------------------------- fields
    def build_pose_basis(self):
        """Set pose_basis (4, POSE_GRID^2): m x, m y, m z, m. The head's motion is linear in them.

        m is 1 on the head and falls to 0 at the frame's border, so that the border stays.
        """
        c = self.pixel_centres(POSE_GRID)                                    # (g, g, 2)
        v = (np.arange(POSE_GRID) + 0.5) / POSE_GRID
        oval = self.points[OVAL, :2]
        low = self.origin + oval.min(0) * self.unit
        high = self.origin + oval.max(0) * self.unit
        room = np.stack([low, 1 - high])[:, None].clip(0.08)                 # (2, 1, 2)
        t = np.clip(np.stack([v, 1 - v])[..., None] / room, 0, 1)            # (2, g, 2)
        mx, my = (t * (4 - t ** 3) / 3).prod(0).T               # nearly straight: least shear
        m = mx * my[:, None]
        x, y = c.transpose(2, 0, 1)
        z = relief(self.points, x, y) - 0.25                    # the pivot lies between the ears
        self.pose_basis = f32([m * x, m * (y - 0.8), m * z, m]).flatten(1)

    def build_expression_basis(self):
        """What each coefficient displaces, in both layers, on a grid around the face.

        Sets names (K) and expression_basis (K, 2 layers, 2 xy, gh, gw).
        """
        chin = float(self.points[OVAL, 1].max())
        gh, gw = EXPRESSION_GRID
        self.box = (self.mouth_x - 1.3, -0.95, self.mouth_x + 1.3, chin + 0.75)     # x0, y0, x1, y1
        x, y = np.meshgrid(self.box[0] + (np.arange(gw) + 0.5) / gw * 2.6,
                           self.box[1] + (np.arange(gh) + 0.5) / gh * (chin + 1.7))
        mouth = self.mouth_fields(x, y, chin)
        eyes = self.eye_fields(x, y)
        zero = np.zeros((gh, gw))

        def vertical(skull, skin):
            return [[zero, skull], [zero, skin]]

        slit_above, slit_below = mouth["slit"]
        fields = dict(
            jaw=vertical(mouth["jaw"], mouth["jaw"]),
            lower_lip=vertical(zero, mouth["lower_lip"]),
            upper_lip=vertical(-mouth["upper_lip"], zero),
            lip_thickness=vertical(mouth["thickness"], mouth["thickness"]),
            close_slit=vertical(slit_above, -slit_below),
            eyelid=vertical(zero, eyes["eyelid"]),
            brow=vertical(-eyes["brow"], -eyes["brow"]),
            lip_width=[[mouth["width"], zero], [mouth["width"], zero]],
            gaze_y=vertical(eyes["gaze"], zero),
            gaze_x=[[eyes["gaze"], zero], [zero, zero]],
        )
        self.names = list(fields)
        self.expression_basis = f32(list(fields.values()))

    def mouth_fields(self, x, y, chin):
        """Fields (gh, gw) of jaw and lips."""
        u = self.mouth_u(x)
        dx = x - self.mouth_x
        t = y - self.line_y(u)                                  # > 0: below the mouth line
        opening = np.clip(1 - np.abs(u) ** 2.3, 0, 1) ** 0.9    # shape of the open mouth
        reach_down = smoothstep(t, 0.38, 0.06) * smoothstep(t, -0.3, -0.15)
        reach_up = smoothstep(t, -0.3, -0.03)
        jaw = smoothstep(np.abs(dx), 0.95, 0.2) * smoothstep(y, chin + 0.7, chin - 0.05)
        jaw = jaw * smoothstep(t, 0.06, 0.38)
        jaw += 0.16 * np.exp(-(dx / 0.6) ** 4 - (t / 0.2) ** 2)
        near = np.exp(-(np.abs(dx / 0.62) ** 3 + np.abs(t / 0.30) ** 3))
        lips = t * np.exp(-(t / 0.12) ** 2) * np.clip(1 - np.abs(u / 1.05) ** 4, 0, 1)
        above, below = self.slit(u)
        return dict(
            jaw=jaw,
            lower_lip=opening * reach_down,
            upper_lip=opening * reach_up,
            thickness=lips,
            slit=(above * reach_up, below * reach_down),
            width=near * np.clip(u, -1.6, 1.6),
        )

    def eye_fields(self, x, y):
        """Fields (gh, gw) of eyelids, eyeballs and brows, both sides in one."""
        eyelid, gaze, brow = np.zeros((3, *x.shape))
        for lid, (_, brow_edge) in zip(self.eyelids, BROWS):
            t = y - np.interp(x, lid.x, lid.y)                  # > 0: below the eyelid's edge
            u = (x - lid.x.mean()) / (lid.x[-1] - lid.x[0]) * 2
            half = lid.travel.max() / 2
            travel = np.interp(x, lid.x, lid.travel, 0, 0)
            eyelid += travel * smoothstep(t, -0.8 * lid.reach, -0.01) * (t < 0.3)
            across = smoothstep(np.abs(t - half), half + 0.02, 0.03)
            gaze += smoothstep(np.abs(u), 1, 0.3) * across
            brow_x, brow_y, _ = self.points[brow_edge].mean(0)
            above_eye = smoothstep(t, -0.02, -0.16)
            below_hair = smoothstep(y, brow_y - 0.55, brow_y - 0.08)
            brow += np.exp(-((x - brow_x) / 0.42) ** 4) * above_eye * below_hair
        return dict(eyelid=eyelid, gaze=gaze, brow=brow)

    def build_lip_edges(self):
        """The inner edges of the lips, where the layers part, and how each coefficient moves them.

        Sets edge_x (65,), edge_y (2, 65) and edge_basis (K, 2 layers, 2 xy, 65).
        """
        u = np.linspace(-1.3, 1.3, EDGE_POINTS)
        above, below = self.slit(u)
        self.edge_x = self.mouth_x + u * np.where(u < 0, *self.mouth_halves)
        self.table_x = float(self.edge_x[0]), float(self.edge_x[-1])
        self.edge_y = self.line_y(u) + np.stack([-above, below])
        at = f32(np.stack(np.broadcast_arrays(self.edge_x, self.edge_y), -1))[None]
        moved = self.lookup(self.expression_basis.flatten(0, 2)[None], at)[0]
        moved = moved.unflatten(0, self.expression_basis.shape[:3])          # (K, 2, 2, 2, 65)
        self.edge_basis = np.stack([moved[:, i, :, i].numpy() for i in (0, 1)], 1)

    def lookup(self, fields, c, layer=None):
        """Read fields (n, k, gh, gw) at face coordinates c (n or 1, h, w, 2).

        With layer (n, h, w), 0 or 1: fields (n, k, 2 gh, gw) hold one layer above the other.
        """
        x0, y0, x1, y1 = self.box
        gx = (c[..., 0] - x0) * (2 / (x1 - x0)) - 1
        gy = (c[..., 1] - y0) * (2 / (y1 - y0)) - 1
        if layer is not None:
            gy = gy.clamp(-0.999, 0.999) * 0.5 + layer - 0.5
        at = torch.stack([gx, gy], -1)
        return nnf.grid_sample(fields, at, padding_mode="zeros", align_corners=False)

    # ---------------------------------------------------------------------------------- colours
    def choose_colours(self):
        """Colours of what the portrait does not show, taken from what it does: the light fits.

        Teeth take their white from the eyes; tongue and the mouth's inside their red from the lips.
        """
        white = np.concatenate([self.read(lid.x, lid.y + share * lid.travel)
                                for lid in self.eyelids for share in (0.35, 0.5, 0.65)])
        by_brightness = white[np.argsort(white.sum(1))]
        white = by_brightness[int(0.80 * len(white)):int(0.92 * len(white))].mean(0)
        skin = self.median_colour([50, 280, 205, 425, 199, 200])
        lip = self.median_colour([72, 302, 11, 15, 85, 315, 86, 316, 16])
        tint = 0.6 * white / white.mean() + 0.4 * skin / skin.mean()
        teeth = tint * max(white.mean(), 0.8 * skin.mean())
        colours = dict(
            teeth=teeth * [1.06, 1.03, 0.98],
            tongue=0.75 * lip + 0.05 * lip.mean(),
            inside=0.22 * lip,
        )
        self.colour = {name: f32(np.clip(rgb, 0.02, 0.92))[:, None, None]
                       for name, rgb in colours.items()}
        self.eyelid_skin = [self.skin_around(lid) for lid in self.eyelids]

    def median_colour(self, indices):
        return np.median(self.read(*self.points[indices, :2].T), 0)

    def skin_around(self, lid):
        """Skin above and below an eye, a parabola along it. Returns (1, 3, 2, 33)."""
        above = [lid.y - share * lid.reach for share in (0.3, 0.4, 0.5, 0.6)]
        below = [lid.y + lid.travel + down for down in (0.02, 0.05, 0.08, 0.11)]
        colours = [[self.read(lid.x[4:-4], y[4:-4]) for y in band] for band in (above, below)]
        rows = np.quantile(colours, 0.6, 1)                                  # (2, 25, 3)
        powers = np.vander(np.linspace(-1, 1, 33), 3)
        smooth = powers @ np.linalg.pinv(powers[4:-4]) @ rows                # (2, 33, 3)
        return f32(smooth).movedim(-1, 0)[None].clamp(0, 1)

    # ----------------------------------------------------------------------------------- frames
    def render(self, k, chunk=8):
        """Draw N frames. k: coefficients, a dict of (N,) arrays.

        In eye distances: jaw, lower_lip, upper_lip (how far they open), lip_width (how far the
        corners go outwards), brow, gaze_x, gaze_y, tx, ty.
        In rad: yaw, pitch, roll (> 0: right, up, clockwise).
        0-1: eyelid (1 = shut), tongue, close_slit (1 = lips that are a slit apart in the portrait
        meet). lip_thickness: about -0.3 to 0.3.
        Returns frames (N, S, S, 3) uint8, face mask (N, S/4, S/4) uint8 0/255, and the gap between
        the lips as drawn (N,), in eye distances.
        """
        k = {name: np.asarray(value, np.float32) for name, value in k.items()}
        parts = [self.render_chunk({name: value[i:i + chunk] for name, value in k.items()})
                 for i in range(0, len(k["jaw"]), chunk)]
        return [np.concatenate(arrays) for arrays in zip(*parts)]

    @torch.no_grad()
    def render_chunk(self, k):
        coefficients = np.stack([k[name] for name in self.names], 1)         # (n, K)
        c = self.undo_pose(k)                                                # (n, 2S, 2S, 2)
        layer = (c[..., 1] > self.mouth_y).float()                           # (n, 2S, 2S)

        # the moved lines decide which layer a pixel sees
        edges = self.lip_edges(coefficients)
        left, right = self.mouth_halves
        mouth = self.window(c, self.mouth_x - 1.25 * left, self.mouth_y - 0.35,
                            self.mouth_x + 1.25 * right, self.mouth_y + 0.55)
        c_mouth = c[mouth].clone()                                           # (n, h, w, 2)
        upper, lower = (read_table(edge, c_mouth[..., 0], *self.table_x) for edge in edges)
        layer[mouth] = (c_mouth[..., 1] > (upper + lower) / 2).float()
        eyes = []
        for lid in self.eyelids:
            eye = self.window(c, lid.x[0] - 0.05, lid.y.min() - lid.reach - 0.1,
                              lid.x[-1] + 0.05, (lid.y + lid.travel).max() + 0.1)
            c_eye = c[eye].clone()
            edge = f32(lid.y + 0.98 * k["eyelid"][:, None] * lid.travel)     # (n, 33)
            below = c_eye[..., 1] - read_table(edge, c_eye[..., 0], lid.x[0], lid.x[-1])
            layer[eye] = (below < 0).float()
            eyes.append((eye, c_eye, below))

        # read the portrait
        face = self.window(c, *self.box)
        displacement = self.undo_expression(f32(coefficients))
        c[face] += self.lookup(displacement, c[face].clone(), layer[face]).movedim(1, -1)
        texture = self.texture.expand(len(c), -1, -1, -1)
        rgba = nnf.grid_sample(texture, self.to_picture(c), padding_mode="border",
                               align_corners=False)                          # (n, 4, 2S, 2S)

        # paint what it does not show
        rgb = rgba[:, :3]
        self.paint_mouth(rgb[(slice(None), *mouth)], c_mouth, upper, lower, k)
        if k["eyelid"].max() > 0:
            closed = f32(k["eyelid"])[:, None, None]
            for i, (eye, c_eye, below) in enumerate(eyes):
                self.paint_eyelid(rgb[(slice(None), *eye)], i, c_eye, below, closed)

        small = nnf.avg_pool2d(rgba, 2)                                      # (n, 4, S, S)
        mask = nnf.avg_pool2d(small[:, 3:], 4)[:, 0] > 0.5
        frames = (small[:, :3] * 255).round().clamp(0, 255).byte().movedim(1, -1).contiguous()
        centre = slice(LIP_TABLE // 2 - 2, LIP_TABLE // 2 + 2)
        gap = (edges[1] - edges[0])[:, centre].mean(1).clamp(min=0)
        return frames.numpy(), (mask.byte() * 255).numpy(), gap.numpy()

    def window(self, c, x0, y0, x1, y1):
        """Index of the part of c (n, h, w, 2) that covers a box in every frame."""
        x, y = c[:, ::4, ::4].unbind(-1)                        # every 4th pixel will do
        inside = ((x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)).any(0)

        def span(used):
            index = used.nonzero()
            return slice(4 * max(int(index[0]) - 1, 0), 4 * (int(index[-1]) + 2))

        return slice(None), span(inside.any(1)), span(inside.any(0))

    def undo_pose(self, k):
        """Points of the unturned head under the pixels (n, 2S, 2S, 2).

        The fixed point of c = q - d(c), d being the pose's displacement.
        """
        cos_y, cos_p, cos_r = (np.cos(k[angle]) for angle in ("yaw", "pitch", "roll"))
        sin_y, sin_p, sin_r = (np.sin(k[angle]) for angle in ("yaw", "pitch", "roll"))
        # rows x and y of Rz(roll) Rx(pitch) Ry(yaw) - 1, z away from the camera; then translation
        row_x = np.stack([cos_r * cos_y - sin_r * sin_p * sin_y - 1, -sin_r * cos_p,
                          -cos_r * sin_y - sin_r * sin_p * cos_y, k["tx"]], 1)
        row_y = np.stack([sin_r * cos_y + cos_r * sin_p * sin_y, cos_r * cos_p - 1,
                          -sin_r * sin_y + cos_r * sin_p * cos_y, k["ty"]], 1)
        rows = torch.from_numpy(np.stack([row_x, row_y], 1))                 # (n, 2, 4)
        d = (rows @ self.pose_basis).unflatten(-1, (POSE_GRID, POSE_GRID))   # (n, 2, g, g)
        q = f32(self.pixel_centres(POSE_GRID))
        move = -d
        for _ in range(5):
            at = self.to_picture(q + move.movedim(1, -1))
            move = -nnf.grid_sample(d, at, padding_mode="border", align_corners=False)
        size = (2 * self.size, 2 * self.size)
        move = nnf.interpolate(move, size, mode="bilinear", align_corners=False)
        return move.movedim(1, -1) + f32(self.pixel_centres(2 * self.size))

    def undo_expression(self, coefficients):
        """Displacement c -> s for coefficients (n, K); layers one above the other (n, 2, 2 gh, gw).

        The inverse of the fields: Newton steps in y, fixed-point steps in x.
        """
        gh, gw = EXPRESSION_GRID
        x0, y0, x1, y1 = self.box
        d = (coefficients @ self.expression_basis.flatten(1)).view(-1, 2, gh, gw)   # (2 n, 2, ...)
        slope = (d[:, 1:, 2:] - d[:, 1:, :-2]) * (gh / (2 * (y1 - y0)))      # d dy / dy
        field = torch.cat([d, nnf.pad(slope, (0, 0, 1, 1))], 1)
        half_x = (x1 - x0) / gw / 2
        half_y = (y1 - y0) / gh / 2
        axes = (torch.linspace(x0 + half_x, x1 - half_x, gw),
                torch.linspace(y0 + half_y, y1 - half_y, gh))
        c = torch.stack(torch.meshgrid(*axes, indexing="xy"))                # (2, gh, gw)
        e = torch.zeros_like(d)
        for _ in range(7):
            f = self.lookup(field, (c + e).movedim(1, -1))                   # (2 n, 3, gh, gw)
            step = (e[:, 1:] + f[:, 1:2]) / (1 + f[:, 2:]).clamp(min=0.35)
            step = step.clamp(-0.08, 0.08)                      # an eyelid is steep: short steps
            e = torch.cat([-f[:, :1], e[:, 1:] - step], 1)
        return e.view(-1, 2, 2, gh, gw).transpose(1, 2).flatten(2, 3)

    def lip_edges(self, coefficients):
        """Inner edges of upper and lower lip: y at even x positions, two tables (n, LIP_TABLE)."""
        moved = np.einsum("nk,klap->lnap", coefficients, self.edge_basis)    # (2, n, 2 xy, 65)
        at = np.linspace(*self.table_x, LIP_TABLE)
        return [f32([np.interp(at, self.edge_x + dx, y + dy) for dx, dy in frames])
                for y, frames in zip(self.edge_y, moved)]

    # -------------------------------------------------------------------------------- the paint
    def paint_eyelid(self, rgb, i, c, below, closed):
        """Paint the skin of eyelid i into rgb (n, 3, h, w), in place: stretched make-up is streaky.

        The colour goes from that above the eye to that below it. c: (n, h, w, 2);
        below: (n, h, w), how far under the eyelid's edge; closed: (n, 1, 1), 1 = shut.
        """
        lid = self.eyelids[i]
        u = (c[..., 0] - float(lid.x.mean())) * (2 / float(lid.x[-1] - lid.x[0]))
        rest = read_table(f32(lid.y).expand(len(c), -1), c[..., 0], lid.x[0], lid.x[-1])
        v = (c[..., 1] - rest) / float(lid.travel.max())        # 0 at the open edge, 1 at the shut
        skin = nnf.grid_sample(self.eyelid_skin[i].expand(len(c), -1, -1, -1),
                               torch.stack([u, 1.3 * v - 0.3], -1), padding_mode="border",
                               align_corners=True)
        ends = ((1.05 - u.abs()) / 0.35).clamp(0, 1) * (2 * closed).clamp(0, 1)
        top = (v * float(lid.travel.max() / lid.reach) * 2.5 + 1.25).clamp(0, 1)
        fade = ((-below - 0.012) / 0.03).clamp(0, 1) * top
        rgb += (0.85 * ends * fade)[:, None] * (skin - rgb)
        lashes = 0.6 * ends * torch.exp(-((below + 0.008) / 0.014) ** 2)
        rgb *= 1 - lashes[:, None]

    def paint_mouth(self, rgb, c, upper, lower, k):
        """Blend the inside of the mouth into rgb (n, 3, h, w), in place.

        The lower teeth go with the jaw, the upper ones stay.
        c: (n, h, w, 2); upper, lower: (n, h, w), where the lips end.
        """
        pixel = 2 * self.size * self.unit                       # pixels in an eye distance

        def cover(distance):
            """1 where distance > 0, anti-aliased."""
            return (distance * pixel + 0.5).clamp(0, 1)

        def over(x, name, alpha, light):
            return x + alpha[:, None] * (self.colour[name] * light[:, None] - x)

        y = c[..., 1]
        dx = c[..., 0] - self.mouth_x
        u = torch.where(dx < 0, dx / self.mouth_halves[0], dx / self.mouth_halves[1])
        line = f32(np.polyval(self.line, np.linspace(-1, 1, 64)))
        rest = read_table(line.expand(len(c), -1), u, -1, 1)    # the mouth line at rest
        gap = (lower - upper).clamp(min=0)
        jaw, tip = (f32(k[name])[:, None, None] for name in ("jaw", "tongue"))

        # light
        deep = (1 - 0.80 * u ** 2).clamp(0.08, 1)               # the corners are dark
        shadow = 0.62 + 0.38 * ((y - upper) / 0.05).clamp(0, 1)             # of the upper lip
        wave = torch.sin(dx * (np.pi / 0.12)).abs()             # 0 between two teeth
        slits = 0.78 + 0.22 * (wave * 2.5).clamp(0, 1)

        # from back to front
        arch = 0.05 - 0.05 * u ** 2 + 0.012 * (wave - 1)        # teeth have round ends
        low_teeth = cover(y - (rest - arch + 0.9 * jaw + 0.035)) * cover(0.62 - u.abs())
        up_teeth = cover(rest + arch - y) * cover(0.8 - u.abs())
        tongue_top = (0.30 + 0.45 * tip) * gap * (1 - (u / 0.75) ** 2)
        tongue = cover(y - lower + tongue_top + 0.01) * cover(0.72 - u.abs())
        inside = self.colour["inside"] * deep[:, None]
        inside = over(inside, "teeth", low_teeth * 0.85, 0.78 * deep * slits)
        inside = over(inside, "tongue", tongue, deep * (0.75 + 0.25 * shadow))
        inside = over(inside, "teeth", up_teeth, 1.1 * shadow * deep * slits)

        alpha = cover(y - upper) * cover(lower - y) * (gap * pixel / 1.5).clamp(0, 1)
        alpha = alpha * ((0.98 - u.abs()) / 0.2).clamp(0, 1)    # none beside the corners
        rgb += alpha[:, None] * (inside - rgb)
