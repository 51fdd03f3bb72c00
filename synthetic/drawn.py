"""Painted portraits: a picture and its face mesh out of nothing, for clips without any download.

draw_face(seed) bends an average mesh into one person's proportions and paints wall, clothes, skin,
eyes, lips and hair at its points. faces.py and warp.py treat it like a photograph.

Coordinates are face coordinates: origin between the eyes, unit = distance of the eyes, y down.
p is a mesh (468, 3); colours are (3,) in [0, 1]; n is the side of the canvas in pixels.
"""
import base64
import colorsys
import zlib

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from synthetic.mesh import (
    BROWS,
    EYES,
    LOWER_LIP_INNER,
    LOWER_LIP_OUTER,
    OVAL,
    UPPER_LIP_INNER,
    UPPER_LIP_OUTER,
    relief,
)

SIDE = 256                      # pixels of the picture
FINE = 2                        # everything is painted this much larger, then averaged

# Symmetric mean mesh of 172 generated portraits.
# int8 (3, 468) in 1/98 eye distances; x, y - 0.44, z; zlib, base 85
MESH = (
    "c-pPh%Tp6~0KoCzCO{r81_+z?0|O0Gs0<W}60$)oP{0aP+9K7~;wUp}_15;#>7_mN*h|$J>`1Mhp-cxWwm^|lgch&`0z"
    "n>0Odu>9*gQ7L!sbQ7rp$QZ;6=ypfAG0{0RRyIzyq+SaEE1Pe9$quFfw${K6tImM2Cn~a(y8Z?!mFuKf|Max4p~8TQ16"
    "MyNk`w{o8Hq`YGtaJ=SHrkMM_SIv5IVIM*=qb$~f&=caYi(fil1-"
    "L;NA{MFg(CT`xjKV@ADcXr3{A3Q7l8y!x6U;p*)8@9Nub9}~ji!_Y^u(Z7PvweQ*?}t}Mz^ZEtj2gYaVH8;I@R1((hQt"
    "2U)I)jKu^t)&Vc-UUnp#>Mow-lqW2S$88SI?!c$|KG;qimMyH^KBrY)H3nv<f!6cLFMWMF83dyLnfTU1_~Rhn<8K9OB}"
    "v9%E9OVmPHK9|?5P^pje(1wpQHN|Jdf`d6ts)9phEyb;$?n4xaR+F6}N$0`vK0aS6SE>$PP-VgL{o2y3#&?cpi)E^+lk"
    "!H9<m`JjC0Zq~ttDCU8FHXr+AdFTsK3y1J|`)st-"
    "L7bjIdCbr%`^AT~MO0x@1s`Q_<qg4^#q8dxj7ZNwczFD{K~I%2ds;iYF43<h_m-"
    ")d&^3!iv+iZATD9p03D0e5|4AQk~(=T$T8uTp-"
    "{HBwUU}m{wi)mRL>0%+tk@KfckShRW*t#umA(XT`B%v5!woOghd#F`N0NXxR}Itr5YGsC1Z<=pX!X_&<HISf<zCLk52T"
    "uB&6HuUuCl)f@DP9yPR_sC&B-"
    "t*oj(1SwHeEmwx(Y2V+xbG*0XTl<D}+AZ+<HYw7z3{A>o3wYW*SGvf0_d}Lp?23YAu~?5HUtK<T<7=yV>GACJv~hOWtj"
    "!bU8b3PsMeV%r%g-f-s_Ob?RIe*l;4`L*;+fN1Zi2aTwyjS5K5`)EGP~&%sznRl2nvzZiIGR6<BKFt5Ke5xBaUQBMKYO"
    "U$!eQ3(u=Q7`Lf78#9iSt;B$O#<^^q@CvMy9+&b4ykYs=k(wlVLj29#Tn+IYshP9u|FA>GO)Mg|Y<IJ1b5tk=rfsV;Yh"
    "TBYfImwLA?~U*&zRb53^`$^bj(8-vLvIB`JF)Hf_9+|!-"
    "k>+e1h_jioACHkgb<H*sNiHM5qB$7&B3PaD7@Cnw&s>q6y@#5qiQz9(qw4zT>=2Hkp#m)?8+2x&_#OHVonW2Bun(sNGO"
    "uny$O^ahyzGXC0Q_sJHaI2I5)v?pa7BvYY`pWze1R!;Yb`xJIqgJfdq4sTr=Bj0V~eh33E6$?yFP2EOHNVSNIJ093SR>"
    "LEHZTO1-H"
)
HAIRS = np.array([(8, 6, 5), (20, 12, 7), (42, 26, 12), (72, 55, 30), (62, 61, 60), (50, 20, 8)])
IRISES = np.array([(25, 15, 8), (35, 24, 12), (30, 42, 55), (35, 45, 28), (40, 44, 46)])


def bend_mesh(rng):
    """A random face: the average mesh in other proportions and with closed lips. (468, 3)"""
    mesh = np.frombuffer(zlib.decompress(base64.b85decode(MESH)), np.int8)
    p = mesh.reshape(3, 468).T / 98 + [0, 0.44, 0]
    x = p[:, 0].copy()
    y = p[:, 1].copy()

    def near(cx, cy, rx, ry):
        """A bump of radii rx, ry on both sides of the face."""
        return np.exp(-((np.abs(x) - cx) / rx) ** 2 - ((y - cy) / ry) ** 2)

    face_width = rng.uniform(0.92, 1.06)
    jaw_width = rng.uniform(-0.10, 0.08)
    p[:, 0] *= face_width * (1 + jaw_width * np.clip(y - 0.2, 0, 1.5) / 1.5)
    chin = rng.uniform(-0.12, 0.10)
    p[:, 1] = np.where(y > 1.15, y + chin * (y - 1.15) / 0.55, y)
    nose_width = rng.uniform(-0.03, 0.04)
    p[:, 0] += np.sign(x) * nose_width * near(0.15, 0.6, 0.15, 0.2)
    mouth_width = rng.uniform(-0.12, 0.12)
    p[:, 0] += x * mouth_width * near(0, 1.08, 0.6, 0.18)
    lip_thickness = rng.uniform(-0.25, 0.6)
    p[:, 1] += (y - 1.085) * lip_thickness * near(0, 1.085, 0.4, 0.14)
    eye_opening = rng.uniform(0.0, 0.45)
    p[:, 1] += y * eye_opening * near(0.5, 0, 0.3, 0.09)
    closed = (p[LOWER_LIP_INNER] + p[UPPER_LIP_INNER]) / 2
    p[LOWER_LIP_INNER] = closed
    p[UPPER_LIP_INNER] = closed
    return p


def choose_palette(rng):
    """Colours of one person and place: {name: (3,) in [0, 1]}."""
    tone = rng.random()
    light_skin = np.array([0.94, 0.78, 0.68])
    to_dark_skin = np.array([0.58, 0.56, 0.53])
    skin = (light_skin - tone * to_dark_skin) * rng.uniform(0.92, 1.05, 3)

    def any_hue(saturation, brightness):
        hsv = rng.random(), rng.uniform(*saturation), rng.uniform(*brightness)
        return np.array(colorsys.hsv_to_rgb(*hsv))

    dark = tone > 0.5                                   # then only the first two, dark ones
    hair = HAIRS[rng.integers(2 if dark else len(HAIRS))] / 100
    iris = IRISES[rng.integers(2 if dark else len(IRISES))] / 100
    return dict(
        skin=skin,
        hair=hair,
        lips=skin * [0.99, 0.62, 0.62],
        iris=iris,
        wall=any_hue((0.1, 0.5), (0.35, 0.85)),
        wall2=any_hue((0.1, 0.6), (0.15, 0.75)),
        cloth=any_hue((0.2, 0.8), (0.2, 0.8)),
    )


class Canvas:
    """Soft shapes on a picture (n, n, 3) in [0, 1].

    unit: an eye distance in pixels of the final picture; origin: (2,), between the eyes, likewise.
    """

    def __init__(self, unit, origin):
        self.n = SIDE * FINE
        self.unit = unit * FINE
        self.origin = np.asarray(origin) * FINE
        v = np.arange(self.n) + 0.5
        self.x, self.y = np.meshgrid((v - self.origin[0]) / self.unit,
                                     (v - self.origin[1]) / self.unit)
        self.picture = np.ones((self.n, self.n, 3), np.float32)

    def shape(self, kind, points, soft=0.012, width=None):
        """Coverage (n, n) in [0, 1] of a shape with an edge of softness `soft`.

        kind: a rounded "polygon" or a "line" of `width`, points (k, 2 or more);
        an "ellipse" or a "rectangle", points (2, 2): its corners.
        """
        q = np.asarray(points, float)[:, :2]
        if kind == "polygon":
            q = catmull_rom(q)
        q = q * self.unit + self.origin
        far = (3 * soft + (width or 0)) * self.unit + 4
        top, bottom = q[:, 1].min() - far, q[:, 1].max() + far
        y0, y1 = np.clip([top, bottom], 0, self.n).astype(int)      # the rows that it can touch
        band = Image.new("L", (self.n, max(y1 - y0, 1)))
        options = {"width": round(width * self.unit)} if width else {}
        draw = getattr(ImageDraw.Draw(band), kind)
        draw((q - [0, y0]).ravel().tolist(), 255, **options)
        blurred = np.asarray(band.filter(ImageFilter.GaussianBlur(soft * self.unit)), np.float32)
        coverage = np.zeros((self.n, self.n), np.float32)
        coverage[y0:y1] = blurred[:y1 - y0] / 255
        return coverage

    def paint(self, coverage, colour, strength=1.0):
        rows = coverage.any(1)
        alpha = (coverage[rows] * strength)[..., None]
        colour = np.float32(np.clip(colour, 0, 1))
        self.picture[rows] += alpha * (colour - self.picture[rows])

    def draw(self, kind, points, colour, strength=1.0, soft=0.012, width=None):
        """Paint one shape."""
        self.paint(self.shape(kind, points, soft, width), colour, strength)


def catmull_rom(corners):
    """A closed smooth curve through the corners (k, 2), six points from each to the next."""
    before, here, after, second = (np.roll(corners, shift, 0)[:, None] for shift in (1, 0, -1, -2))
    t = np.arange(6)[:, None] / 6
    linear = after - before
    square = 2 * before - 5 * here + 4 * after - second
    cube = 3 * here - before - 3 * after + second
    return (here + 0.5 * t * (linear + t * (square + t * cube))).reshape(-1, 2)


def mirrored(half):
    """The right half of an outline, top to bottom, and its mirror image: a closed outline."""
    return half + [(-x, y) for x, y in half[::-1]]


def paint_background(canvas, p, colours, rng, volume):
    """Wall and things on it, the hair behind the head, neck and clothes."""
    chin = p[152, 1]
    width = np.abs(p[[234, 454], 0]).mean() + volume
    top = p[10, 1] - volume - 0.22
    skin = colours["skin"]

    canvas.picture[:] = colours["wall"]
    slope = rng.uniform(-1, 1)
    canvas.paint(np.clip(0.5 + 0.3 * (canvas.y + slope * canvas.x), 0, 1), colours["wall2"])
    for _ in range(rng.integers(0, 7)):
        x, y = rng.uniform(-2, 2, 2)
        r = rng.uniform(0.15, 0.6)
        kind = rng.choice(["ellipse", "rectangle"])
        corners = [(x - r, y - r), (x + r, y + r * rng.uniform(0.3, 2))]
        thing = canvas.shape(kind, corners, rng.uniform(0.01, 0.12))
        canvas.paint(thing, rng.random(3), rng.uniform(0.2, 0.7))

    length = rng.choice([0.2, 0.3, 0.9, 1.6, 2.0])
    hair = [(0.2, top), (width * 0.8, top + 0.35), (width, -0.1), (width, length),
            (0.5, length + 0.2)]
    canvas.draw("polygon", mirrored(hair), colours["hair"] * 0.75, soft=0.03)
    neck = mirrored([(0.5, chin - 0.5), (0.56, chin + 0.35), (0.85, 3)])
    neck = canvas.shape("polygon", neck, 0.02)
    canvas.paint(neck, skin * 0.80)
    chin_shadow = canvas.shape("polygon", p[OVAL] + [0, 0.14, 0], 0.10)
    canvas.paint(neck * chin_shadow, skin * 0.5, 0.7)
    collar = rng.uniform(0.4, 0.7)
    body = mirrored([(0.05, collar), (0.5, 0.3), (1.5, 0.55), (2.2, 1.1), (2.4, 3)])
    canvas.draw("polygon", np.add(body, [0, chin]), colours["cloth"], soft=0.02)


def paint_eye(canvas, p, colours, upper, lower):
    """White, iris, pupil, shadow, glint, lashes and crease of one eye."""
    skin, iris = colours["skin"], colours["iris"]
    ring = np.concatenate([p[upper], p[lower[-2:0:-1]]])
    opening = canvas.shape("polygon", ring, 0.006)
    centre = ring[:, :2].mean(0) - [0, 0.008]

    def disc(radius, at=centre):
        return opening * canvas.shape("ellipse", [at - radius, at + radius], 0.007)

    canvas.paint(opening, [0.93, 0.92, 0.90])
    canvas.paint(disc(0.105), iris * 0.5)
    canvas.paint(disc(0.085), iris)
    canvas.paint(disc(0.045), [0.03, 0.03, 0.03])
    shadow = canvas.shape("polygon", ring - [0, 0.055, 0], 0.03)
    canvas.paint(opening * shadow, [0.2, 0.15, 0.15], 0.35)
    canvas.paint(disc(0.018, centre + [0.03, -0.03]), [1, 1, 1])
    lashes = p[upper] - [0, 0.016, 0]
    canvas.draw("line", lashes, skin * 0.18, 0.95, soft=0.008, width=0.030)
    canvas.draw("line", p[lower], skin * 0.45, 0.6, soft=0.008, width=0.012)
    crease = p[upper[1:-1]] - [0, 0.085, 0]
    canvas.draw("line", crease, skin * 0.55, 0.6, soft=0.02, width=0.02)


def light(canvas, p, rng):
    """Lambertian shading (n, n) in [0, 1] of the face under a lamp from above."""
    step = 8                                            # the relief is smooth: one pixel of 8
    grid = slice(4, None, step)
    lamp = np.array([rng.uniform(-0.6, 0.6), -0.45, -1]) / 1.25
    depth = relief(p, canvas.x[grid, grid], canvas.y[grid, grid])
    gy, gx = np.gradient(depth, step / canvas.unit)
    lit = (gx * lamp[0] + gy * lamp[1] - lamp[2]) / np.sqrt(gx ** 2 + gy ** 2 + 1)
    lit = Image.fromarray(np.float32(np.clip(lit, 0, 1)))
    return np.asarray(lit.resize((canvas.n, canvas.n), Image.BICUBIC))


def paint_head(canvas, p, colours, rng):
    """Ears, skin in the light, beard, nostrils, lips, eyes and brows."""
    skin, hair, lips = (colours[name] for name in ("skin", "hair", "lips"))
    face = canvas.shape("polygon", p[OVAL])
    for ear in p[[234, 454], :2] * [1.02, 1] + [0, 0.17]:
        canvas.draw("ellipse", [ear - [0.12, 0.29], ear + [0.12, 0.29]], skin * 0.86)
    canvas.paint(face, skin)
    around_mouth = np.exp(-(canvas.x / 0.5) ** 4 - ((canvas.y - 1.08) / 0.17) ** 4)
    beard = np.clip((canvas.y - 0.95) / 0.25, 0, 1) * (1 - 0.8 * around_mouth)
    density = rng.uniform(0.35, 0.85)
    has_beard = rng.random() < 0.25
    canvas.paint(face * beard, hair, density * has_beard)
    lit = light(canvas, p, rng)
    canvas.picture *= 1 + (face * (0.62 * lit - 0.5))[..., None]

    for nostril in p[[48, 278], :2] * [0.62, 0] + [0, p[2, 1] - 0.015]:
        corners = [nostril - [0.05, 0.022], nostril + [0.05, 0.022]]
        canvas.draw("ellipse", corners, skin * 0.3, 0.85, soft=0.014)
    upper_lip = p[UPPER_LIP_OUTER + UPPER_LIP_INNER[-2:0:-1]]
    lower_lip = p[LOWER_LIP_OUTER + LOWER_LIP_INNER[-2:0:-1]]
    canvas.draw("polygon", upper_lip, lips * 0.80, soft=0.010)
    canvas.draw("polygon", lower_lip, lips * 0.95, soft=0.010)
    canvas.draw("line", p[UPPER_LIP_INNER], lips * 0.32, 0.9, soft=0.007, width=0.016)
    for (upper, lower), (brow_top, brow_bottom) in zip(EYES, BROWS):
        paint_eye(canvas, p, colours, upper, lower)
        brow = p[brow_top + brow_bottom[::-1]]
        canvas.draw("polygon", brow, hair * 0.7 + skin * 0.08, 0.9, soft=0.022)


def paint_hair(canvas, p, colours, rng, volume):
    """The hair in front of the head, with strands that start at the parting."""
    top = p[10, 1]
    line = top + rng.uniform(0.10, 0.36)
    parting = rng.uniform(-0.5, 0.5)
    width = np.abs(p[[127, 356], 0]).mean() + 0.06
    side = [(width * 0.75, top - volume * 0.9), (width + volume * 0.8, -0.45),
            (width + volume * 0.55, 0.15), (width - 0.04, -0.12), (width - 0.12, -0.45)]
    fringe = [(parting + 0.45, line), (parting, line - 0.06), (parting - 0.45, line + 0.03)]
    other_side = [(-x, y) for x, y in side[::-1]]
    outline = [(0, top - volume - 0.16), *side, *fringe, *other_side]
    hair = canvas.shape("polygon", outline, 0.03)
    canvas.paint(hair, colours["hair"])
    angle = np.arctan2(canvas.x - parting, canvas.y - top - 0.9)
    strands = np.sin(42 * angle + 2 * np.sin(5 * canvas.y))
    canvas.paint(hair * (0.5 + 0.5 * strands), colours["hair"] * 1.5 + 0.05, 0.35)


def draw_face(seed):
    """Paint a face. Returns a picture (256, 256, 3) uint8 and its mesh (468, 3) in pixels."""
    rng = np.random.default_rng(seed)
    p = bend_mesh(rng)
    colours = choose_palette(rng)
    volume = rng.uniform(0.16, 0.38)                    # of the hair
    unit = SIDE * rng.uniform(0.215, 0.25)
    origin = SIDE * np.array([rng.uniform(0.48, 0.52), rng.uniform(0.42, 0.46)])
    canvas = Canvas(unit, origin)
    paint_background(canvas, p, colours, rng, volume)
    paint_head(canvas, p, colours, rng)
    paint_hair(canvas, p, colours, rng, volume)
    grain = 1 + 0.02 * rng.standard_normal((SIDE, SIDE, 1))
    grain = grain.repeat(FINE, 0).repeat(FINE, 1)
    image = Image.fromarray(np.uint8(np.clip(canvas.picture * grain, 0, 1) * 255))
    return np.asarray(image.resize((SIDE, SIDE), Image.BOX)), p * unit + [*origin, 0]
