"""How puppet.py draws: (1) a portrait that moves, warped by its mesh; (2) portraits painted out of nothing.

(1) Puppet. q is a point of the frame; face coordinates: origin between the eyes, unit = their distance, y down. Two warps are undone in turn: the
head's pose (q -> c, the rotation of a relief), then the expression (c -> s, a sum of hand-made displacement fields); the portrait is read at s.
Skin tears at the mouth line and the upper lids. So there are two expression fields, each smooth everywhere: layer 0 is the skull (upper lip,
eyeballs), layer 1 what slides over it (lower lip and jaw; upper lids). A pixel takes the layer on its side of the moved line. The inside of the
mouth is painted, and skin on closing lids.
(2) draw_face(seed) bends an average mesh and paints skin, eyes, lips, hair, clothes at its points: a picture and a mesh for the same Puppet.
"""
import base64
import colorsys
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter

# Indices into MediaPipe's 468-point face mesh; rows run from the left to the right of the picture.
UPPER_IN, LOWER_IN = [78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308], [78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308]     # inner, outer
UPPER_OUT, LOWER_OUT = [61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291], [61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291]    # edges of the lips
EYES = (([33, 246, 161, 160, 159, 158, 157, 173, 133], [33, 7, 163, 144, 145, 153, 154, 155, 133]),
        ([362, 398, 384, 385, 386, 387, 388, 466, 263], [362, 382, 381, 380, 374, 373, 390, 249, 263]))
BROWS = (([70, 63, 105, 66, 107], [46, 53, 52, 65, 55]), ([336, 296, 334, 293, 300], [285, 295, 282, 283, 276]))     # upper, lower edges
OVAL = [10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152, 148, 176, 149, 150, 136, 172, 58, 132, 93,
        234, 127, 162, 21, 54, 103, 67, 109]
POSE_GRID, EXPR_GRID, TABLE = 64, (144, 112), 160  # resolution of pose fields, expression fields, lip curves


def smoothstep(x, a, b):
    """0 up to a, 1 from b on, a cubic between; falling if a > b."""
    t = np.clip((x - a) / (b - a), 0, 1)
    return t * t * (3 - 2 * t)


def f32(x):
    return torch.tensor(np.asarray(x), dtype=torch.float32)


def relief(points, x, y, width=.11):
    """Depth at x, y (h, w): kernel regression of points (468, 3). The depth of the edge goes on outside."""
    d2 = (x[..., None] - points[:, 0]) ** 2 + (y[..., None] - points[:, 1]) ** 2        # (h, w, 468)
    w = np.exp(-(d2 - d2.min(-1, keepdims=True)) / (2 * width ** 2))
    return (w * points[:, 2]).sum(-1) / w.sum(-1)


# -------------------------------------------------------------------------------------- a portrait that moves
class Puppet:
    """One portrait ready to be moved.

    image: (H, H, 3) uint8; points: (468, 3) in its pixels, smaller z = nearer; size: pixels of a frame, drawn at twice that and averaged;
    check: stop after the mouth line and the lids. Raises ValueError for another shape, no dark line between the lips, brows on the lids."""

    def __init__(self, image, points, size, check=False):
        image, points, side = np.asarray(image), np.asarray(points, np.float64), len(image)
        if image.shape != (side, side, 3) or points.shape != (468, 3):
            raise ValueError(f"need a square RGB picture, 468 points, got {image.shape} and {points.shape}")
        left, right = points[[33, 133], :2].mean(0) / side, points[[362, 263], :2].mean(0) / side
        self.size, self.unit, self.origin = size, float(np.linalg.norm(right - left)), (left + right) / 2
        ex = (right - left) / self.unit
        self.axes = np.stack([ex, [-ex[1], ex[0]]])                                     # rows: face x, face y
        z = (points[:, 2:] - points[OVAL, 2].mean()) / side / self.unit * .8  # the ears lie at about 0
        self.p = np.concatenate([self.to_face(points[:, :2] / side), z], 1)             # (468, 3)
        mask = Image.new("L", (side, side))
        ImageDraw.Draw(mask).polygon([tuple(v) for v in points[OVAL, :2]], fill=255)
        self.texture = f32(np.dstack([image, mask]) / 255).movedim(-1, 0).contiguous()[None]  # (1, 4, H, H)
        self.curves()
        for build in () if check else (self.pose_fields, self.expression_fields, self.colours):
            build()

    def to_face(self, xy):
        """Positions in the picture (..., 2), 0-1, to face coordinates."""
        return (xy - self.origin) @ self.axes.T / self.unit

    def to_picture(self, c):
        """Face coordinates, tensor (..., 2), to those of grid_sample, -1 to 1."""
        (a, b), o = f32(self.axes * self.unit * 2), f32(self.origin * 2 - 1)
        return torch.stack([c[..., 0] * a[i] + (c[..., 1] * b[i] + o[i]) for i in (0, 1)], -1)

    def pixels(self, n):
        """Face coordinates (n, n, 2) of the pixel centres of the frame at n x n pixels."""
        return self.to_face((np.moveaxis(np.mgrid[:n, :n][::-1], 0, -1) + .5) / n)

    def read(self, at):
        """Colours (n, 3) of the portrait at face coordinates (n, 2)."""
        at = self.to_picture(f32(at))[None, None]
        return F.grid_sample(self.texture[:, :3], at, align_corners=False)[0, :, 0].numpy().T

    def mouth_u(self, x):
        """Position along the mouth: -1 and 1 are its corners (half a turned mouth is wider)."""
        return (x - self.mx) / np.where(x < self.mx, *self.half)

    def slit(self, u):
        """The slit that the picture shows between its lips: its part above and below the mouth line at u."""
        return [np.clip(np.polyval(s, np.clip(u, -1, 1)), 0, .06) * (np.abs(u) < 1) for s in self.slits]

    def curves(self):
        """Mouth line and lids as functions of x. The mesh errs by a pixel: the line snaps to the dark."""
        p = self.p
        ends = (p[[61, 291], :2] + p[[78, 308], :2]) / 2
        self.mx, self.my = ends.mean(0).tolist()
        self.half = (float(self.mx - ends[0, 0]), float(ends[1, 0] - self.mx))
        mid = (p[UPPER_IN] + p[LOWER_IN]) / 2
        self.line = np.polyfit(np.clip(self.mouth_u(mid[:, 0]), -1, 1), mid[:, 1], 4)
        self.slits = [np.polyfit(self.mouth_u(e[:, 0]), np.abs(mid - e)[:, 1], 4) for e in (p[UPPER_IN], p[LOWER_IN])]
        u, off = np.linspace(-.75, .75, 13), np.linspace(-.09, .09, 37)[:, None]
        x, y = np.broadcast_arrays(self.mx + u * np.where(u < 0, *self.half), np.polyval(self.line, u) + off)
        grey = self.read(np.stack([x.ravel(), y.ravel()], 1)).mean(-1).reshape(37, 13)
        dark = off[np.argmin(grey + .25 * grey.mean() * (off / .09) ** 2, 0), 0]
        shift = np.polyfit(u, dark, 2, w=np.ptp(grey, 0) + .02)
        fit, dip = np.polyval(shift, u), np.median(np.median(grey, 0) - grey.min(0)) / grey.mean()
        if np.abs(fit).max() > .085 or np.median(np.abs(fit - dark)) > .012 or not dip > .05:
            raise ValueError("no dark line between the lips near that of the mesh")
        self.line = np.polyadd(self.line, np.polymul(shift, [-1, 0, 1]))                # 0 at the corners
        self.lids = []  # (xs, y of the lid, way down, reach)
        for (upper, lower), (_, brow) in zip(EYES, BROWS):
            xs, weight = np.linspace(p[upper[0], 0], p[upper[-1], 0], 33), [3] + [1] * 7 + [3]
            top, bottom = (np.polyval(np.polyfit(p[i, 0] - xs[16], p[i, 1], 4, w=weight), xs - xs[16]) + shift
                           for i, shift in ((upper, -.012), (lower, .045)))  # takes the lashes along
            way = np.maximum(bottom - top, 0) * smoothstep(np.abs(np.linspace(-1, 1, 33)), 1, .9)
            reach = p[upper[2:7], 1].mean() - p[brow, 1].mean()
            if reach < .15:
                raise ValueError("the brows are too near the lids: a blink would smear them")
            self.lids.append((xs, top, way, reach))

    def pose_fields(self):
        """m x, m y, m z, m on a coarse grid; motion is linear in them. m: 1 on the head, 0 at the border."""
        c, v = self.pixels(POSE_GRID), (np.arange(POSE_GRID) + .5) / POSE_GRID          # c (g, g, 2)
        lo, hi = self.origin + np.array([f(self.p[OVAL, :2], 0) for f in (np.min, np.max)]) * self.unit
        t = np.clip(np.stack([v, 1 - v])[..., None] / np.stack([lo, 1 - hi])[:, None].clip(.08), 0, 1)
        mx, my = (t * (4 - t ** 3) / 3).prod(0).T  # nearly straight: least shear
        m, z = mx * my[:, None], relief(self.p, *c.transpose(2, 0, 1)) - .25  # pivot: between the ears
        self.pose_basis = f32([m * c[..., 0], m * (c[..., 1] - .8), m * z, m]).flatten(1)

    def expression_fields(self):
        """What each coefficient displaces, in both layers, on a grid around the face (K, 2, 2 xy, gh, gw)."""
        y1, (gh, gw) = float(self.p[OVAL, 1].max()), EXPR_GRID
        self.box = (self.mx - 1.3, -.95, self.mx + 1.3, y1 + .75)                       # x0, y0, x1, y1
        x, y = np.meshgrid(self.box[0] + (np.arange(gw) + .5) / gw * 2.6, self.box[1] + (np.arange(gh) + .5) / gh * (y1 + 1.7))
        u, dx = self.mouth_u(x), x - self.mx
        t = y - np.polyval(self.line, np.clip(u, -1, 1))  # > 0: below the mouth line
        lens = np.clip(1 - np.abs(u) ** 2.3, 0, 1) ** .9                                # shape of the opening
        low, up = smoothstep(t, .38, .06) * smoothstep(t, -.3, -.15), smoothstep(t, -.3, -.03)  # their reach
        jaw = smoothstep(np.abs(dx), .95, .2) * smoothstep(y, y1 + .7, y1 - .05) * smoothstep(t, .06, .38)
        jaw += .16 * np.exp(-(dx / .6) ** 4 - (t / .2) ** 2)
        near = np.exp(-(np.abs(dx / .62) ** 3 + np.abs(t / .30) ** 3)) * np.clip(u, -1.6, 1.6)
        lips = t * np.exp(-(t / .12) ** 2) * np.clip(1 - np.abs(u / 1.05) ** 4, 0, 1)
        above, below = self.slit(u)
        lid, gaze, brow, o = np.zeros((4, gh, gw))
        for (xs, top, way, reach), (_, ring) in zip(self.lids, BROWS):
            ty, e, deep = y - np.interp(x, xs, top), (x - xs.mean()) / (xs[-1] - xs[0]) * 2, way.max() / 2
            lid += np.interp(x, xs, way, 0, 0) * smoothstep(ty, -.8 * reach, -.01) * (ty < .3)
            gaze += smoothstep(np.abs(e), 1, .3) * smoothstep(np.abs(ty - deep), deep + .02, .03)
            bx, by, _ = self.p[ring].mean(0)
            brow += np.exp(-((x - bx) / .42) ** 4) * smoothstep(ty, -.02, -.16) * smoothstep(y, by - .55, by - .08)
        y_of = lambda layer0, layer1=None: [[o, layer0], [o, layer0 if layer1 is None else layer1]]
        fields = dict(jaw=y_of(jaw), lower=y_of(o, lens * low), upper=y_of(-lens * up, o), thick=y_of(lips), shut=y_of(above * up, -below * low),
                      lid=y_of(o, lid), brow=y_of(-brow), wide=[[near, o]] * 2, gaze_y=y_of(gaze, o), gaze_x=[[gaze, o], [o, o]])
        self.names, self.expr = list(fields), f32(list(fields.values()))
        # the inner edges of the lips, where the layers part, and how each coefficient moves them
        v = np.linspace(-1.3, 1.3, 65)
        above, below = self.slit(v)
        self.edge_x = self.mx + v * np.where(v < 0, *self.half)                         # (65,)
        self.table_x = float(self.edge_x[0]), float(self.edge_x[-1])
        self.edge_y = np.polyval(self.line, np.clip(v, -1, 1)) + np.stack([-above, below])    # (2, 65)
        at = f32(np.stack(np.broadcast_arrays(self.edge_x, self.edge_y), -1))[None]
        moved = self.lookup(self.expr.flatten(0, 2)[None], at)[0].unflatten(0, self.expr.shape[:3])
        self.edge_k = np.stack([moved[:, i, :, i].numpy() for i in (0, 1)], 1)  # (K, 2 layers, 2 xy, 65)

    def lookup(self, fields, c, side=None):
        """Read fields (n, k, gh, gw) at c (n or 1, h, w, 2); with side (n, h, w), 0 or 1: fields (n, k, 2 gh, gw), two layers of which side picks."""
        x0, y0, x1, y1 = self.box
        gx, gy = (c[..., 0] - x0) * (2 / (x1 - x0)) - 1, (c[..., 1] - y0) * (2 / (y1 - y0)) - 1
        if side is not None:
            gy = gy.clamp(-.999, .999) * .5 + side - .5
        return F.grid_sample(fields, torch.stack([gx, gy], -1), padding_mode="zeros", align_corners=False)

    def colours(self):
        """Teeth take their white from the eyes, tongue and cavity their red from the lips: the light fits."""
        white = self.read(np.concatenate([np.stack([xs, top + f * way], 1) for xs, top, way, _ in self.lids for f in (.35, .5, .65)]))
        white = white[np.argsort(white.sum(1))[int(.80 * len(white)):int(.92 * len(white))]].mean(0)
        self.lid_skin, v = [], np.vander(np.linspace(-1, 1, 33), 3)  # (1, 3, 2, 33): skin above and below each eye, a parabola along it
        for xs, top, way, reach in self.lids:
            bands = [top - f * reach for f in (.3, .4, .5, .6)], [top + way + f for f in (.02, .05, .08, .11)]
            rows = np.quantile([[self.read(np.stack([xs, y], 1)[4:-4]) for y in band] for band in bands], .6, 1)         # (2, 25, 3)
            self.lid_skin.append(f32(v @ np.linalg.pinv(v[4:-4]) @ rows).movedim(-1, 0)[None].clamp(0, 1))
        skin = np.median(self.read(self.p[[50, 280, 205, 425, 199, 200], :2]), 0)
        lip = np.median(self.read(self.p[[72, 302, 11, 15, 85, 315, 86, 316, 16], :2]), 0)
        teeth = (.6 * white / white.mean() + .4 * skin / skin.mean()) * max(white.mean(), .8 * skin.mean())
        self.colour = {k: f32(np.clip(v, .02, .92))[:, None, None] for k, v in dict(
            teeth=teeth * [1.06, 1.03, .98], tongue=.75 * lip + .05 * lip.mean(), cavity=.22 * lip).items()}

    def render(self, k, chunk=8):
        """Draw frames. k: dict of (N,) arrays. In eye distances: how far jaw, `lower` and `upper` lip open, how far the corners go `wide`, brow,
        gaze_x, gaze_y, tx, ty. In rad: yaw, pitch, roll (> 0: right, up, clockwise). 0-1: lid (1 shut), tongue, shut (1: lips a slit apart in the
        portrait meet), thick (lips).
        Returns frames (N, S, S, 3) uint8, face mask (N, S/4, S/4) uint8 0/255, inner-lip gap drawn (N,)."""
        k = {n: np.asarray(v, np.float32) for n, v in k.items()}
        parts = [self.render_chunk({n: v[i:i + chunk] for n, v in k.items()}) for i in range(0, len(k["jaw"]), chunk)]
        return [np.concatenate(v) for v in zip(*parts)]

    @torch.no_grad()
    def render_chunk(self, k):
        coef = np.stack([k[n] for n in self.names], 1)                                  # (n, K)
        n, c, (a, b) = len(coef), self.unpose(k), self.half                             # c (n, 2S, 2S, 2)
        edges, eyes = self.lip_tables(coef), []  # upper, lower (n, TABLE)
        side = (c[..., 1] > self.my).float()  # the layer of every pixel
        win = self.window(c, self.mx - 1.25 * a, self.my - .35, self.mx + 1.25 * b, self.my + .55)
        cm = c[win].clone()  # the mouth's pixels (n, h, w, 2)
        yu, yl = (self.read_table(y, cm[..., 0], *self.table_x) for y in edges)
        side[win] = (cm[..., 1] > (yu + yl) / 2).float()
        for xs, top, way, reach in self.lids:
            eye = self.window(c, xs[0] - .05, top.min() - reach - .1, xs[-1] + .05, (top + way).max() + .1)
            ce, lid = c[eye].clone(), f32(top + .98 * k["lid"][:, None] * way)          # lid (n, 33)
            edge = ce[..., 1] - self.read_table(lid, ce[..., 0], xs[0], xs[-1])         # > 0: below the lid
            side[eye], eyes = (edge < 0).float(), [*eyes, (eye, ce, edge)]
        face = self.window(c, *self.box)
        c[face] += self.lookup(self.unexpress(f32(coef)), c[face].clone(), side[face]).movedim(1, -1)
        rgb = F.grid_sample(self.texture.expand(n, -1, -1, -1), self.to_picture(c), "bilinear", "border", False)         # (n, 4, 2S, 2S)
        self.paint_mouth(rgb[:, :3][(slice(None), *win)], cm, yu, yl, k)
        for i, (eye, ce, edge) in enumerate(eyes if k["lid"].max() > 0 else []):
            self.paint_lid(rgb[:, :3][(slice(None), *eye)], i, ce, edge, f32(k["lid"])[:, None, None])
        small = F.avg_pool2d(rgb, 2)
        mask = F.avg_pool2d(small[:, 3:], 4)[:, 0] > .5
        frames = (small[:, :3] * 255).round().clamp(0, 255).byte().movedim(1, -1).contiguous()
        gap = (edges[1] - edges[0])[:, TABLE // 2 - 2:TABLE // 2 + 2].mean(1).clamp(min=0)
        return frames.numpy(), (mask.byte() * 255).numpy(), gap.numpy()

    def window(self, c, x0, y0, x1, y1):
        """Index of the part of c (n, h, w, 2) that holds the face coordinates of a box in every frame."""
        x, y = c[:, ::4, ::4].unbind(-1)  # every 4th pixel will do
        inside = ((x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)).any(0)
        runs = [inside.any(i).nonzero() for i in (1, 0)]
        return (slice(None), *(slice(4 * max(int(r[0]) - 1, 0), 4 * (int(r[-1]) + 2)) for r in runs))

    def unpose(self, k):
        """Points of the unturned head (n, 2S, 2S, 2) under the pixels: fixed point of c = q - d(c)."""
        (cy, cp, cr), (sy, sp, sr) = ([f(k[a]) for a in ("yaw", "pitch", "roll")] for f in (np.cos, np.sin))
        # rows of Rz(roll) Rx(pitch) Ry(yaw) - 1, z away from the camera, and the translation: (n, 4)
        rx = np.stack([cr * cy - sr * sp * sy - 1, -sr * cp, -cr * sy - sr * sp * cy, k["tx"]], 1)
        ry = np.stack([sr * cy + cr * sp * sy, cr * cp - 1, -sr * sy + cr * sp * cy, k["ty"]], 1)
        d = (torch.from_numpy(np.stack([rx, ry], 1)) @ self.pose_basis).unflatten(-1, (POSE_GRID, POSE_GRID))
        q, move = f32(self.pixels(POSE_GRID)), -d                                       # d (n, 2, g, g)
        for _ in range(5):
            move = -F.grid_sample(d, self.to_picture(q + move.movedim(1, -1)), "bilinear", "border", False)
        move = F.interpolate(move, (2 * self.size, 2 * self.size), mode="bilinear", align_corners=False)
        return move.movedim(1, -1) + f32(self.pixels(2 * self.size))

    def unexpress(self, coef):
        """Displacement c -> s for coefficients (n, K), layers one above the other (n, 2, 2 gh, gw): Newton steps in y, fixed-point steps in x."""
        (gh, gw), (x0, y0, x1, y1) = EXPR_GRID, self.box
        d = (coef @ self.expr.flatten(1)).view(-1, 2, gh, gw)                           # (2 n, 2, gh, gw)
        slope = F.pad((d[:, 1:, 2:] - d[:, 1:, :-2]) * (gh / (2 * (y1 - y0))), (0, 0, 1, 1))    # d dy / dy
        field, hx, hy = torch.cat([d, slope], 1), (x1 - x0) / gw / 2, (y1 - y0) / gh / 2
        axes = torch.linspace(x0 + hx, x1 - hx, gw), torch.linspace(y0 + hy, y1 - hy, gh)
        c, e = torch.stack(torch.meshgrid(*axes, indexing="xy")), torch.zeros_like(d)
        for _ in range(7):
            f = self.lookup(field, (c + e).movedim(1, -1))
            step = (e[:, 1:] + f[:, 1:2]) / (1 + f[:, 2:]).clamp(min=.35)
            e = torch.cat([-f[:, :1], e[:, 1:] - step.clamp(-.08, .08)], 1)     # a lid is steep: short steps
        return e.view(-1, 2, 2, gh, gw).transpose(1, 2).flatten(2, 3)

    def lip_tables(self, coef):
        """Inner edges of upper and lower lip in these frames: y at TABLE even x positions, two (n, TABLE)."""
        d = np.einsum("nk,klap->lnap", coef, self.edge_k)  # (2 layers, n, 2 xy, 65)
        x, ys, at = self.edge_x, self.edge_y, np.linspace(*self.table_x, TABLE)
        return [f32([np.interp(at, x + dx, y + dy) for dx, dy in lip]) for y, lip in zip(ys, d)]

    def read_table(self, table, x, x0, x1):
        """Linear interpolation of tables (n, T), even on [x0, x1], at x (n, h, w)."""
        pos = ((x - x0) * ((table.shape[1] - 1) / (x1 - x0))).clamp(0, table.shape[1] - 1.001).flatten(1)
        a = table.gather(1, i := pos.long())
        return (a + (table.gather(1, i + 1) - a) * (pos - i)).view(x.shape)

    def paint_lid(self, rgb, i, c, edge, shut):
        """Paint the lid of eye i into rgb (n, 3, h, w), in place, for stretched make-up is streaky: from the skin above the eye to that below it.
        c (n, h, w, 2); edge (n, h, w): how far below the lid's edge; shut (n, 1, 1): 1 shut."""
        xs, top, way, reach = self.lids[i]
        e = (c[..., 0] - float(xs.mean())) * (2 / float(xs[-1] - xs[0]))
        v = (c[..., 1] - self.read_table(f32(top).expand(len(c), -1), c[..., 0], xs[0], xs[-1])) / float(way.max())
        skin = F.grid_sample(self.lid_skin[i].expand(len(c), -1, -1, -1), torch.stack([e, 1.3 * v - .3], -1), "bilinear", "border", True)
        ends = ((1.05 - e.abs()) / .35).clamp(0, 1) * (2 * shut).clamp(0, 1)
        fade = ((-edge - .012) / .03).clamp(0, 1) * (v * float(way.max() / reach) * 2.5 + 1.25).clamp(0, 1)
        rgb += (.85 * ends * fade)[:, None] * (skin - rgb)
        rgb *= 1 - (.6 * ends * torch.exp(-((edge + .008) / .014) ** 2))[:, None]       # the lashes

    def paint_mouth(self, rgb, c, yu, yl, k):
        """Blend the inside of the mouth into rgb (n, 3, h, w), in place; c (n, h, w, 2); lips end at yu, yl. The lower teeth go with the jaw."""
        px = 2 * self.size * self.unit  # pixels per eye distance
        cover = lambda d: (d * px + .5).clamp(0, 1)                                     # anti-aliased d > 0
        over = lambda x, name, alpha, light: x + alpha[:, None] * (self.colour[name] * light[:, None] - x)
        y, dx = c[..., 1], c[..., 0] - self.mx
        u = torch.where(dx < 0, dx / self.half[0], dx / self.half[1])
        rest = self.read_table(f32(np.polyval(self.line, np.linspace(-1, 1, 64))).expand(len(c), -1), u, -1, 1)   # the mouth line at rest
        gap, deep = (yl - yu).clamp(min=0), (1 - .80 * u ** 2).clamp(.08, 1)            # the corners are dark
        shadow = .62 + .38 * ((y - yu) / .05).clamp(0, 1)                               # of the upper lip
        wave = torch.sin(dx * (np.pi / .12)).abs()                                      # 0 between two teeth
        slits, jaw, tip = .78 + .22 * (wave * 2.5).clamp(0, 1), f32(k["jaw"])[:, None, None], f32(k["tongue"])[:, None, None]
        arch = .05 - .05 * u ** 2 + .012 * (wave - 1)                                   # with round ends
        low = cover(y - (rest - arch + .9 * jaw + .035)) * cover(.62 - u.abs())
        inside = over(self.colour["cavity"] * deep[:, None], "teeth", low * .85, .78 * deep * slits)
        tongue = cover(y - yl + (.30 + .45 * tip) * gap * (1 - (u / .75) ** 2) + .01) * cover(.72 - u.abs())
        inside = over(inside, "tongue", tongue, deep * (.75 + .25 * shadow))
        inside = over(inside, "teeth", cover(rest + arch - y) * cover(.8 - u.abs()), 1.1 * shadow * deep * slits)
        alpha = cover(y - yu) * cover(yl - y) * (gap * px / 1.5).clamp(0, 1) * ((.98 - u.abs()) / .2).clamp(0, 1)     # no whiskers
        rgb += alpha[:, None] * (inside - rgb)


# ------------------------------------------------------------------------------------ a portrait from nothing
# Symmetric mean mesh of 172 generated portraits: int8 (3, 468), 1/98 eye distances, x y-0.44 z, zlib, base 85
MESH = (
    "c-pPh%Tp6~0KoCzCO{r81_+z?0|O0Gs0<W}60$)oP{0aP+9K7~;wUp}_15;#>7_mN*h|$J>`1Mhp-cxWwm^|lgch&`0zn>0Odu>9*gQ7L!sbQ7rp$QZ;6=ypfAG0{0RRyIzyq+SaEE1P"
    "e9$quFfw${K6tImM2Cn~a(y8Z?!mFuKf|Max4p~8TQ16MyNk`w{o8Hq`YGtaJ=SHrkMM_SIv5IVIM*=qb$~f&=caYi(fil1-L;NA{MFg(CT`xjKV@ADcXr3{A3Q7l8y!x6U;p*)8@9Nu"
    "b9}~ji!_Y^u(Z7PvweQ*?}t}Mz^ZEtj2gYaVH8;I@R1((hQt2U)I)jKu^t)&Vc-UUnp#>Mow-lqW2S$88SI?!c$|KG;qimMyH^KBrY)H3nv<f!6cLFMWMF83dyLnfTU1_~Rhn<8K9OB}"
    "v9%E9OVmPHK9|?5P^pje(1wpQHN|Jdf`d6ts)9phEyb;$?n4xaR+F6}N$0`vK0aS6SE>$PP-VgL{o2y3#&?cpi)E^+lk!H9<m`JjC0Zq~ttDCU8FHXr+AdFTsK3y1J|`)st-L7bjIdCb"
    "r%`^AT~MO0x@1s`Q_<qg4^#q8dxj7ZNwczFD{K~I%2ds;iYF43<h_m-)d&^3!iv+iZATD9p03D0e5|4AQk~(=T$T8uTp-{HBwUU}m{wi)mRL>0%+tk@KfckShRW*t#umA(XT`B%v5!wo"
    "Oghd#F`N0NXxR}Itr5YGsC1Z<=pX!X_&<HISf<zCLk52TuB&6HuUuCl)f@DP9yPR_sC&B-t*oj(1SwHeEmwx(Y2V+xbG*0XTl<D}+AZ+<HYw7z3{A>o3wYW*SGvf0_d}Lp?23YAu~?5H"
    "UtK<T<7=yV>GACJv~hOWtj!bU8b3PsMeV%r%g-f-s_Ob?RIe*l;4`L*;+fN1Zi2aTwyjS5K5`)EGP~&%sznRl2nvzZiIGR6<BKFt5Ke5xBaUQBMKYOU$!eQ3(u=Q7`Lf78#9iSt;B$O#"
    "<^^q@CvMy9+&b4ykYs=k(wlVLj29#Tn+IYshP9u|FA>GO)Mg|Y<IJ1b5tk=rfsV;YhTBYfImwLA?~U*&zRb53^`$^bj(8-vLvIB`JF)Hf_9+|!-k>+e1h_jioACHkgb<H*sNiHM5qB$7"
    "&B3PaD7@Cnw&s>q6y@#5qiQz9(qw4zT>=2Hkp#m)?8+2x&_#OHVonW2Bun(sNGOuny$O^ahyzGXC0Q_sJHaI2I5)v?pa7BvYY`pWze1R!;Yb`xJIqgJfdq4sTr=Bj0V~eh33E6$?yFP2"
    "EOHNVSNIJ093SR>LEHZTO1-H")
SIDE, FINE = 256, 2                     # pixels of the picture; everything is painted FINE times larger


def bend_mesh(rng):
    """A random face: the average mesh (468, 3), eye distances, in other proportions and with closed lips."""
    p = np.frombuffer(zlib.decompress(base64.b85decode(MESH)), np.int8).reshape(3, 468).T / 98 + [0, .44, 0]
    x, y = p[:, 0].copy(), p[:, 1].copy()
    near = lambda cx, cy, rx, ry: np.exp(-((np.abs(x) - cx) / rx) ** 2 - ((y - cy) / ry) ** 2)
    p[:, 0] *= rng.uniform(.92, 1.06) * (1 + rng.uniform(-.10, .08) * np.clip(y - .2, 0, 1.5) / 1.5)    # jaw
    p[:, 1] = np.where(y > 1.15, y + rng.uniform(-.12, .10) * (y - 1.15) / .55, y)      # chin
    p[:, 0] += np.sign(x) * rng.uniform(-.03, .04) * near(.15, .6, .15, .2)             # nose width
    p[:, 0] += x * rng.uniform(-.12, .12) * near(0, 1.08, .6, .18)                      # mouth width
    p[:, 1] += (y - 1.085) * rng.uniform(-.25, .6) * near(0, 1.085, .4, .14)            # lip thickness
    p[:, 1] += y * rng.uniform(.0, .45) * near(.5, 0, .3, .09)                          # eye opening
    p[LOWER_IN] = p[UPPER_IN] = (p[LOWER_IN] + p[UPPER_IN]) / 2
    return p


class Brush:
    """Soft shapes on a picture (n, n, 3) in [0, 1]; coordinates in eye distances, origin between the eyes."""

    def __init__(self, unit, origin):
        self.n, self.unit, self.origin = SIDE * FINE, unit * FINE, np.asarray(origin) * FINE
        v = np.arange(self.n) + .5
        self.x, self.y = np.meshgrid((v - self.origin[0]) / self.unit, (v - self.origin[1]) / self.unit)
        self.picture = np.ones((self.n, self.n, 3), np.float32)

    def shape(self, kind, points, soft=.012, width=None):
        """Coverage (n, n) of a rounded "polygon", a "line" (k, 2), an "ellipse" or "rectangle" (2, 2)."""
        q = np.asarray(points, float)[:, :2]
        if kind == "polygon":  # a periodic Catmull-Rom curve through the corners
            a, b, c, d, t = *(np.roll(q, s, 0)[:, None] for s in (1, 0, -1, -2)), np.arange(6)[:, None] / 6
            q = b + .5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * b - a - 3 * c + d)))
        q, far = q.reshape(-1, 2) * self.unit + self.origin, (3 * soft + (width or 0)) * self.unit + 4
        y0, y1 = np.clip([q[:, 1].min() - far, q[:, 1].max() + far], 0, self.n).astype(int)      # the rows that it can touch
        m, out = Image.new("L", (self.n, max(y1 - y0, 1))), np.zeros((self.n, self.n), np.float32)
        getattr(ImageDraw.Draw(m), kind)((q - [0, y0]).ravel().tolist(), 255, **({"width": round(width * self.unit)} if width else {}))
        out[y0:y1] = np.asarray(m.filter(ImageFilter.GaussianBlur(soft * self.unit)), np.float32)[:y1 - y0] / 255
        return out

    def paint(self, mask, colour, strength=1.0):
        rows = mask.any(1)
        self.picture[rows] += (mask[rows] * strength)[..., None] * (np.float32(np.clip(colour, 0, 1)) - self.picture[rows])


def palette(rng):
    """Colours of one person and place, each (3,) in [0, 1]."""
    tone = rng.random()
    skin = (np.array([.94, .78, .68]) - tone * np.array([.58, .56, .53])) * rng.uniform(.92, 1.05, 3)
    hue = lambda s, v: np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(*s), rng.uniform(*v)))
    hairs = np.array([(8, 6, 5), (20, 12, 7), (42, 26, 12), (72, 55, 30), (62, 61, 60), (50, 20, 8)]) / 100
    irises = np.array([(25, 15, 8), (35, 24, 12), (30, 42, 55), (35, 45, 28), (40, 44, 46)]) / 100
    hair, iris = hairs[rng.integers(2 if tone > .5 else 6)], irises[rng.integers(2 if tone > .5 else 5)]
    return dict(skin=skin, hair=hair, lips=skin * [.99, .62, .62], iris=iris, wall=hue((.1, .5), (.35, .85)), wall2=hue((.1, .6), (.15, .75)),
                cloth=hue((.2, .8), (.2, .8)))


def paint_scene(b, p, c, rng, volume):
    """Wall and things on it, the hair behind the head, neck and clothes."""
    chin, w, top = p[152, 1], np.abs(p[[234, 454], 0]).mean() + volume, p[10, 1] - volume - .22
    b.picture[:] = c["wall"]
    b.paint(np.clip(.5 + .3 * (b.y + rng.uniform(-1, 1) * b.x), 0, 1), c["wall2"])
    for _ in range(rng.integers(0, 7)):
        (x, y), r, kind = rng.uniform(-2, 2, 2), rng.uniform(.15, .6), rng.choice(["ellipse", "rectangle"])
        b.paint(b.shape(kind, [(x - r, y - r), (x + r, y + r * rng.uniform(.3, 2))], rng.uniform(.01, .12)), rng.random(3), rng.uniform(.2, .7))
    long, mirrored = rng.choice([.2, .3, .9, 1.6, 2.0]), lambda half: half + [(-x, y) for x, y in half[::-1]]
    b.paint(b.shape("polygon", mirrored([(.2, top), (w * .8, top + .35), (w, -.1), (w, long), (.5, long + .2)]), .03), c["hair"] * .75)
    b.paint(neck := b.shape("polygon", mirrored([(.5, chin - .5), (.56, chin + .35), (.85, 3)]), .02), c["skin"] * .80)
    b.paint(neck * b.shape("polygon", p[OVAL] + [0, .14, 0], .10), c["skin"] * .5, .7)    # the chin's shadow
    body = mirrored([(.05, rng.uniform(.4, .7)), (.5, .3), (1.5, .55), (2.2, 1.1), (2.4, 3)])
    b.paint(b.shape("polygon", np.add(body, [0, chin]), .02), c["cloth"])


def paint_eye(b, p, c, upper, lower):
    """White, iris, pupil, shadow, glint, lashes and crease of one eye."""
    ring = np.concatenate([p[upper], p[lower[-2:0:-1]]])
    opening, centre = b.shape("polygon", ring, .006), ring[:, :2].mean(0) - [0, .008]
    disc = lambda r, at=centre: b.shape("ellipse", [at - r, at + r], .007)
    b.paint(opening, [.93, .92, .90])
    for r, colour in ((.105, c["iris"] * .5), (.085, c["iris"]), (.045, [.03] * 3)):
        b.paint(opening * disc(r), colour)
    b.paint(opening * b.shape("polygon", ring - [0, .055, 0], .03), [.2, .15, .15], .35)
    b.paint(opening * disc(.018, centre + [.03, -.03]), [1, 1, 1])
    b.paint(b.shape("line", p[upper] - [0, .016, 0], .008, .030), c["skin"] * .18, .95)
    b.paint(b.shape("line", p[lower], .008, .012), c["skin"] * .45, .6)
    b.paint(b.shape("line", p[upper[1:-1]] - [0, .085, 0], .02, .02), c["skin"] * .55, .6)


def paint_head(b, p, c, rng, volume):
    """Ears, skin in the light, nose, lips, eyes, brows, and the hair in front. p: mesh (468, 3)."""
    face, skin = b.shape("polygon", p[OVAL]), c["skin"]
    for ear in p[[234, 454], :2] * [1.02, 1] + [0, .17]:
        b.paint(b.shape("ellipse", [ear - [.12, .29], ear + [.12, .29]]), skin * .86)
    b.paint(face, skin)
    beard = np.clip((b.y - .95) / .25, 0, 1) * (1 - .8 * np.exp(-(b.x / .5) ** 4 - ((b.y - 1.08) / .17) ** 4))
    b.paint(face * beard, c["hair"], rng.uniform(.35, .85) * (rng.random() < .25))
    grid, lamp = slice(4, None, 8), np.array([rng.uniform(-.6, .6), -.45, -1]) / 1.25       # Lambert's law
    gy, gx = np.gradient(relief(p, b.x[grid, grid], b.y[grid, grid]), 8 / b.unit)
    lit = np.clip((gx * lamp[0] + gy * lamp[1] - lamp[2]) / np.sqrt(gx ** 2 + gy ** 2 + 1), 0, 1)
    lit = np.asarray(Image.fromarray(np.float32(lit)).resize((b.n, b.n), Image.BICUBIC))
    b.picture *= 1 + (face * (.62 * lit - .5))[..., None]
    for nostril in p[[48, 278], :2] * [.62, 0] + [0, p[2, 1] - .015]:
        b.paint(b.shape("ellipse", [nostril - [.05, .022], nostril + [.05, .022]], .014), skin * .3, .85)
    for outer, inner, shade in ((UPPER_OUT, UPPER_IN, .80), (LOWER_OUT, LOWER_IN, .95)):
        b.paint(b.shape("polygon", p[outer + inner[-2:0:-1]], .010), c["lips"] * shade)
    b.paint(b.shape("line", p[UPPER_IN], .007, .016), c["lips"] * .32, .9)
    for (upper, lower), (top, under) in zip(EYES, BROWS):
        paint_eye(b, p, c, upper, lower)
        b.paint(b.shape("polygon", p[top + under[::-1]], .022), c["hair"] * .7 + skin * .08, .9)
    top, line, part = p[10, 1], p[10, 1] + rng.uniform(.10, .36), rng.uniform(-.5, .5)
    w, v = np.abs(p[[127, 356], 0]).mean() + .06, volume
    side = [(w * .75, top - v * .9), (w + v * .8, -.45), (w + v * .55, .15), (w - .04, -.12), (w - .12, -.45)]
    front = [(0, top - v - .16), *side, (part + .45, line), (part, line - .06), (part - .45, line + .03)]
    hair = b.shape("polygon", front + [(-x, y) for x, y in side[::-1]], .03)
    b.paint(hair, c["hair"])
    strands = np.sin(42 * np.arctan2(b.x - part, b.y - top - .9) + 2 * np.sin(5 * b.y))
    b.paint(hair * (.5 + .5 * strands), c["hair"] * 1.5 + .05, .35)


def draw_face(seed):
    """Paint a face. Returns a picture (256, 256, 3) uint8 and its mesh (468, 3) in pixels, z too."""
    rng = np.random.default_rng(seed)
    p, c, volume, unit = bend_mesh(rng), palette(rng), rng.uniform(.16, .38), SIDE * rng.uniform(.215, .25)
    b = Brush(unit, origin := SIDE * np.array([rng.uniform(.48, .52), rng.uniform(.42, .46)]))
    paint_scene(b, p, c, rng, volume)
    paint_head(b, p, c, rng, volume)
    grain = 1 + .02 * rng.standard_normal((SIDE, SIDE, 1)).repeat(FINE, 0).repeat(FINE, 1)
    image = Image.fromarray(np.uint8(np.clip(b.picture * grain, 0, 1) * 255))
    return np.asarray(image.resize((SIDE, SIDE), Image.BOX)), p * unit + [*origin, 0]
