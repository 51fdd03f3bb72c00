"""Portraits + speech -> synthetic talking-head clips, so that training needs no footage of real people.

A still portrait with its 468 face-mesh points becomes a puppet (drawn.py): the phones of a recording give six mouth parameters per frame, smooth
random motion moves head, brows, eyes and lids. Nothing here is learnt.
    python puppet.py --portraits DIR --speech DIR --out DIR --clips 300 --seconds 15.36 --workers 2
    python puppet.py --portraits drawn --out DIR --clips 20      drawn faces, synthesised speech: no downloads
What comes out: NAME.mp4 (25 fps, 16 kHz speech), NAME.json (who says what), NAME.npz (face mask, mouth, pose, blinks, per frame), split.json
(held-out faces and speakers). A second run makes only what is missing.
Portraits: a folder of *.jpg, with portraits.npz in it or beside it: name, lm (n, 468, 3) in pixels, gap (between the lips, eye distances), yaw,
pitch (degrees), eye_open (height / width).
Speech: a folder of SPEAKER-*.flac, with NAME.tsv (start s, end s, IPA label) in it or in `phones` beside it."""
import argparse
import json
import os
import signal
import sys
import time
import zlib
from multiprocessing import get_context
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from data import FORMATS, write_mp4
from drawn import BROWS, OVAL, Puppet, draw_face, smoothstep

# ----------------------------------------------------------------------------------------------------- config
FPS, RATE = 25, 16000           # frame i shows time (i + 0.5) / 25 s and has the samples [640 i, 640 (i + 1))
GAP = 0.27  # inner-lip gap at opening 1, eye distances (real speakers: 0.05-0.25 on open vowels)
SLIT = 0.12     # gap of a portrait's lips that drawn.py can close, eye distances
DRAWN = 400     # drawn faces to choose from; not a function of --clips, or more clips would change the first
BROKEN = ValueError, KeyError, EOFError, BadZipFile, zlib.error  # what np.load says of a file that is no .npz
PLANNED = ("identity", "speaker", "seed", "size", "frames")    # what tells a clip of one plan from another
KEYS = ("jaw_open", "lip_width", "lip_round", "lip_close", "teeth", "tongue")
# phone: KEYS, then weight = how strongly it pulls its neighbours. Textbook phonetics; jaw_open, weight moved halfway to what fits GRID speaker 1.
PHONES = {
    "sil": (0, 0, 0, .6, 0, 0, .45), "i": (.35, 1, 0, 0, 0, .3, .65), "ɪ": (.42, .65, 0, 0, 0, .2, .51), "ɛ": (.65, .55, 0, 0, 0, .15, .67),
    "æ": (.67, .6, 0, 0, 0, .15, .69), "ɑ": (.9, .2, 0, 0, 0, .05, .96), "ɔ": (.63, 0, .55, 0, 0, 0, .83), "ʊ": (.32, 0, .65, 0, 0, 0, .6),
    "u": (.25, 0, 1, 0, 0, 0, .91), "ʌ": (.5, .25, 0, 0, 0, .1, .46), "ə": (.4, .25, 0, 0, 0, .1, .3), "ɝ": (.3, .1, .5, 0, 0, .25, .6),
    "eɪ": (.68, .75, 0, 0, 0, .2, .79), "aɪ": (.81, .45, 0, 0, 0, .15, .91), "ɔɪ": (.6, .2, .5, 0, 0, .1, .9),
    "aʊ": (.61, .15, .35, 0, 0, .05, .69), "oʊ": (.45, 0, .8, 0, 0, 0, .91), "p": (.05, .3, 0, 1, 0, 0, 1.3), "b": (.05, .3, 0, 1, 0, 0, 1.3),
    "m": (.05, .3, 0, 1, 0, 0, 1.3), "f": (.12, .3, 0, 0, 1, 0, 1.06), "v": (.14, .3, 0, 0, 1, 0, 1.01), "θ": (.11, .35, 0, 0, 0, 1, .89),
    "ð": (.14, .35, 0, 0, 0, 1, .73), "t": (.26, .45, 0, 0, 0, .6, .33), "d": (.24, .4, 0, 0, 0, .6, .35), "n": (.25, .4, 0, 0, 0, .6, .29),
    "s": (.2, .6, 0, 0, 0, .3, .64), "z": (.15, .55, 0, 0, 0, .3, .62), "l": (.37, .4, 0, 0, 0, .8, .46), "ɹ": (.14, .05, .6, 0, 0, .3, .66),
    "ʃ": (.2, .05, .65, 0, 0, .2, .8), "ʒ": (.2, .05, .6, 0, 0, .2, .7), "t͡ʃ": (.26, .1, .6, 0, 0, .4, .76), "d͡ʒ": (.27, .1, .55, 0, 0, .4, .68),
    "k": (.39, .35, 0, 0, 0, .1, .32), "ɡ": (.29, .35, 0, 0, 0, .1, .34), "ŋ": (.35, .35, 0, 0, 0, .1, .3), "h": (.43, .3, 0, 0, 0, 0, .15),
    "w": (.14, 0, 1, 0, 0, 0, .86), "j": (.27, .8, 0, 0, 0, .3, .51)}
GLIDES = {"eɪ": "ɪ", "aɪ": "ɪ", "ɔɪ": "ɪ", "aʊ": "ʊ", "oʊ": "ʊ"}        # the second half of a diphthong


# ------------------------------------------------------------------------------------------------------ mouth
def mouth_curves(phones, frames, blur=0.03, fps=FPS):
    """Coarticulation: a phone pulls with its weight and a Gaussian tail of `blur` s at both ends. phones: [(start s, end s, label)]; returns
    (frames, 6) in [0, 1], columns KEYS, at times (i + 0.5) / fps. p, b, m get a real closure on top: 1 within the sound and at the frame nearest its
    middle, gone in 60 ms. Raises ValueError for a label that is not in PHONES."""
    t = (np.arange(frames) + .5) / fps
    pull, total, closed = np.zeros((frames, 6)), np.full((frames, 1), 1e-6), np.zeros(frames)
    outside = lambda a, b, reach: np.maximum(np.abs(t - (a + b) / 2) - reach, 0)  # s from a sound
    for start, end, label in phones:
        if label not in PHONES:
            raise ValueError(f"unknown phone {label!r}; known: {' '.join(PHONES)}")
        cut = start + .62 * (end - start) if label in GLIDES and end - start > .06 else end
        for a, b, name in [(start, cut, label), (cut, end, GLIDES.get(label))][:1 + (cut < end)]:
            k = PHONES[name][6] * np.exp(-.5 * (outside(a, b, max((b - a) / 2 - .01, 0)) / blur) ** 2) + 1e-9
            pull, total = pull + k[:, None] * PHONES[name][:6], total + k[:, None]
        if label in ("p", "b", "m"):
            closed = np.maximum(closed, 1 - outside(start, end, max((end - start) / 2, .5 / FPS)) / .06)
    m = pull / total
    m[:, 3] = np.maximum(m[:, 3], closed)
    return m.astype(np.float32)


def lip_opening(m):
    """How far the lips part, 0-1, by m (..., 6): the jaw opens; rounding, closure and f/v take some back."""
    jaw, _, round_, close, teeth, _ = np.moveaxis(m, -1, 0)
    return np.clip(jaw * (1 - .35 * round_) * (1 - np.clip(1.1 * close, 0, 1)) * (1 - .7 * teeth), 0, 1)


def coefficients(m, x, articulation=1.0):
    """Mouth parameters m (N, 6) and life x (dict of (N,)) -> what Puppet.render wants (dict of (N,))."""
    jaw, wide, round_, close, teeth, tongue = m.T
    opening = np.clip(lip_opening(m) * articulation, 0, 1)
    bite = teeth * (1 - close)  # f, v: the lower lip meets the upper teeth, which show
    gap = GAP * opening + .035 * bite
    return x | dict(jaw=.17 * articulation * jaw * (1 - .6 * close) - .012 * close, shut=np.ones_like(gap), tongue=tongue,
                    lower=.76 * gap - .02 * bite, upper=.24 * gap + .02 * bite,
                    wide=.055 * wide - .14 * round_ - .05 * opening, thick=.30 * round_ - .22 * close - .12 * bite)


# ------------------------------------------------------------------------------------------------------- life
def smooth_noise(rng, frames, seconds):
    """Noise of unit variance, smoothed by a Gaussian of `seconds` standard deviation. Returns (frames,)."""
    half = int(4 * seconds * FPS)
    kernel = np.exp(-.5 * (np.arange(-half, half + 1) / (seconds * FPS)) ** 2)
    x = rng.standard_normal(frames + 2 * half)
    return np.convolve(x, kernel / np.sqrt((kernel ** 2).sum()), "valid")


def blink_curve(rng, frames):
    """Blinks 2-8 s apart, 120-200 ms long, closing faster than opening. Returns (frames,): 0 open, 1 shut."""
    t, out, when = (np.arange(frames) + .5) / FPS, np.zeros(frames), rng.uniform(.3, 4)
    while when < frames / FPS:
        x = (t - when) / rng.uniform(.16, .24)              # foot to foot; seen for about 3/4 of it
        out = np.maximum(out, smoothstep(x, 0, .38) * smoothstep(x, 1, .52))
        when += rng.uniform(2, 8)
    return out


def life(rng, frames, energy, yaw=0.0):
    """Head, eyes and brows: smooth random motion that rises a little with speech energy (frames,) in [0, 1]. Returns a dict of (frames,): yaw pitch
    roll (rad), lid (0-1), tx ty brow gaze_x gaze_y (eye distances). `yaw` (rad): how far the portrait is turned; heads prefer to turn back."""
    size, more, nod = rng.uniform(.1, 1.3), .75 + .5 * energy, .03 * (energy - energy.mean())
    def motion(amount, slow, fast, limit, bias=0.0):
        noise = smooth_noise(rng, frames, slow) + .35 * smooth_noise(rng, frames, fast)
        return np.clip(size * amount * more * noise + bias, -limit, limit)
    x = dict(yaw=motion(.085, .8, .25, .30, -.35 * yaw), pitch=motion(.05, .7, .2, .17, nod),
             roll=motion(.04, .9, .3, .10), tx=motion(.035, 1., .3, .08), ty=motion(.025, 1., .3, .06), lid=blink_curve(rng, frames))
    x["brow"] = .05 * np.clip(.5 * smooth_noise(rng, frames, .35) + .6 * (energy - .4), -.6, 1.2)
    jump = np.cumsum(rng.random(frames) < 1 / (1.2 * FPS))  # a saccade every 1.2 s, 2 of 3 to the centre
    far = np.where(rng.random((frames, 1)) < .65, .15, .7)
    gaze = (rng.standard_normal((frames, 2)) * far)[jump].T - [2 * x["yaw"], 0 * x["yaw"]]
    x["gaze_x"], x["gaze_y"] = np.clip(gaze, -1, 1) * [[.05], [.02]]
    return x


# ------------------------------------------------------------------------------------------------------ faces
def read_portraits(folder, lips):
    """Usable portraits: gap between the lips in [lips[0], lips[1]), eyes open, heads not turned far. Dicts: path, name, lm, yaw, pitch, sex, look.
    Raises FileNotFoundError without portraits.npz, ValueError if nothing in it is usable."""
    table = next((d / "portraits.npz" for d in (folder, folder.parent) if (d / "portraits.npz").is_file()), 0)
    if not table:
        raise FileNotFoundError(f"no portraits.npz in {folder} or beside it")
    try:
        with open(table, "rb") as file, np.load(file, allow_pickle=False) as f:
            d = {k: f[k] for k in ("name", "lm", "gap", "yaw", "pitch", "eye_open")}
            d["sex"] = f["sex_est"] if "sex_est" in f else np.full(len(d["gap"]), "")
    except BROKEN as e:
        raise ValueError(f"{table} is broken or no table of portraits: {e}") from None
    keep = (d["gap"] >= lips[0]) & (d["gap"] < lips[1]) & (np.abs(d["yaw"]) < 18) & (np.abs(d["pitch"]) < 18) & (d["eye_open"] > .20)
    path = lambda i: folder / str(d["name"][i])
    some = [dict(path=path(i), name=path(i).stem, lm=d["lm"][i].astype(float), yaw=float(d["yaw"][i]), pitch=float(d["pitch"][i]),
                 sex=str(d["sex"][i])) for i in np.flatnonzero(keep) if path(i).is_file()]
    found = [face | {"look": look(*load_face(face))} for face in some if fits(*load_face(face))]
    print(f"portraits: {len(found)} ({len(some) - len(found)} left out: no clear mouth line, or brows on the lids)")
    if not found:
        raise ValueError(f"no usable portrait in {folder}: lips must be {lips[0]:g} to {lips[1]:g} eye distances apart, eyes open")
    return found


def load_face(face):
    """A face of a plan -> (image (H, H, 3) uint8, points (468, 3) in its pixels)."""
    if face["path"] is None:
        return draw_face(face["seed"])
    with Image.open(face["path"], formats=FORMATS) as image:
        return np.asarray(image.convert("RGB")), face["lm"]


def fits(image, points):
    """Whether the mouth line and the lids of a face are clear enough to be moved."""
    try:
        return bool(Puppet(image, points, 64, check=True))
    except ValueError:
        return False


def look(image, points):
    """Grey levels (432,) at the mesh points inside the oval, blurred, mean 0, deviation 1: light, brows, beard, glasses."""
    grey = np.asarray(Image.fromarray(image).convert("L").filter(ImageFilter.GaussianBlur(2)), float)
    x, y = np.delete(points, OVAL, 0)[:, :2].round().astype(int).clip(0, len(image) - 1).T
    return (grey[y, x] - grey[y, x].mean()) / (grey[y, x].std() + 1e-6)


def alike(a, b):
    """Whether two faces of a plan blend without ghosts: ahead, and of about the same look, pose and sex."""
    other = .02 * sum(abs(a[k] - b[k]) for k in ("yaw", "pitch")) + .3 * (a["sex"] != b["sex"])
    return a is not b and max(abs(a["yaw"]), abs(b["yaw"])) < 8 and np.abs(a["look"] - b["look"]).mean() + other < .62


def spline_warp(image, dst, src):
    """Warp image (H, H, 3) float32 so that points src (k, 2) go to dst (k, 2): a thin-plate spline. -> (1, 3, H, H)"""
    side, k = len(image), len(dst)
    dst, src = dst / side * 2 - 1, src / side * 2 - 1
    r2 = lambda a, b: ((a[:, None] - b) ** 2).sum(-1)
    bend = lambda a: r2(a, dst) * np.log(r2(a, dst) + 1e-9)
    plane = lambda a: np.concatenate([np.ones((len(a), 1)), a], 1)
    system = np.block([[bend(dst) + 1e-2 * np.eye(k), plane(dst)], [plane(dst).T, np.zeros((3, 3))]])
    weights = np.linalg.solve(system, np.concatenate([src, np.zeros((3, 2))]))
    at = np.stack(np.meshgrid(*[(np.arange(64) + .5) / 32 - 1] * 2), -1).reshape(-1, 2)
    grid = torch.tensor((np.concatenate([bend(at), plane(at)], 1) @ weights).T.reshape(1, 2, 64, 64)).float()
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False).movedim(1, -1)
    return F.grid_sample(torch.from_numpy(image).movedim(-1, 0)[None], grid, padding_mode="reflection", align_corners=False)


def morph(a, b, weight):
    """The face (1 - weight) A + weight B on the head of A. a, b, result: image (H, H, 3), points (468, 3). Both are warped to the mixed mesh; B takes
    A's colour and shade, place by place; they blend in the inner face."""
    (ia, pa), (ib, pb) = a, b
    side, z = len(ia), lambda p: p[:, 0] + 1j * p[:, 1]
    xy = lambda z: np.stack([z.real, z.imag], 1)
    (al, ar), (bl, br) = ((z(p)[[33, 133]].mean(), z(p)[[362, 263]].mean()) for p in (pa, pb))
    turn = (ar - al) / (br - bl)                            # the similarity that puts B's eyes on A's
    aligned = np.concatenate([xy((z(pb) - bl) * turn + al), pb[:, 2:] * abs(turn)], 1)
    mixed = (1 - weight) * pa + weight * aligned
    e = np.linspace(0, side, 8)
    rim = np.array([(x, y) for x in e for y in e if x in (0, side) or y in (0, side)])
    dst = np.concatenate([mixed[:, :2], rim])
    wa = spline_warp(np.float32(ia), dst, np.concatenate([pa[:, :2], rim]))
    wb = spline_warp(np.float32(ib), dst, np.concatenate([pb[:, :2], xy((z(rim) - al) / turn + bl)]))
    mask, oval, brow = Image.new("L", (side, side)), mixed[OVAL, :2], mixed[BROWS[0][0] + BROWS[1][0], 1].min()
    shrink = np.where(oval[:, 1:] < brow, .75, .85)         # B's fringe stays out
    ImageDraw.Draw(mask).polygon([tuple(v) for v in oval.mean(0) + shrink * (oval - oval.mean(0))], fill=1)
    inside = torch.from_numpy(np.float32(mask))[None, None]
    few = lambda x, n: F.avg_pool2d(F.interpolate(x, (n, n), mode="area"), 3, 1, 1)         # blurred, n x n
    blur = lambda x, n: F.interpolate(few(x, n), (side, side), mode="bicubic", align_corners=False)
    low = lambda x: blur(x * inside, 16) / (blur(inside, 16) + .02)
    mix = wa + weight * blur(inside, 32) * (wb - low(wb) + low(wa) - wa)
    return mix[0].movedim(0, -1).clamp(0, 255).round().byte().numpy(), mixed


def jitter(rng, image, points):
    """Crop, colour, exposure and background of a portrait. (H, H, 3) uint8 and (468, 3) in, the same out."""
    side, scale = len(image), rng.uniform(.90, 1)
    x0, y0 = rng.uniform(.15, .85, 2) * (1 - scale) * side
    box = (x0, y0, x0 + scale * side, y0 + scale * side)
    points = (points - [x0, y0, 0]) / scale
    x = np.asarray(Image.fromarray(image).resize((side, side), Image.BICUBIC, box), np.float32) / 255
    grey = x.mean(-1, keepdims=True)
    x = np.clip(grey + (x - grey) * rng.uniform(.75, 1.2), 0, 1)                        # saturation
    x = x ** rng.uniform(.8, 1.25) * rng.uniform(.88, 1.1) * rng.uniform(.95, 1.05, 3)  # exposure, white
    (cx, cy), reach = points[OVAL, :2].mean(0), np.ptp(points[OVAL, 0])
    yy, xx = np.mgrid[:side, :side] + .5
    away = np.hypot(xx - cx, (yy - cy + .1 * reach) / 1.35) / reach
    far = smoothstep(away, .75, 1.25)[..., None]            # 0 on the head, 1 in the background
    x = x * (1 + far * (rng.uniform(.5, 1.15) * rng.uniform(.85, 1.15, 3) - 1))
    return (np.clip(x, 0, 1) * 255).round().astype(np.uint8), points


# ----------------------------------------------------------------------------------------------------- voices
def read_phones(path):
    """Phone file (start s, end s, label, ...; tab-separated, no header) -> [(start, end, label)]."""
    try:
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [(float(r[0]), float(r[1]), r[2]) for r in rows]
    except (ValueError, IndexError):
        raise ValueError(f"{path}: a row is start s, end s, label, with tabs between") from None


def read_speech(folder):
    """{speaker: [(flac, tsv)]} of the recordings with phones. Raises FileNotFoundError if there is none."""
    speakers = {}
    for flac in sorted(folder.glob("*.flac")):
        places = (flac.with_suffix(".tsv"), folder.parent / "phones" / f"{flac.stem}.tsv")
        if tsv := next((p for p in places if p.is_file()), None):
            speakers.setdefault(flac.stem.split("-")[0], []).append((flac, tsv))
    if not speakers:
        raise FileNotFoundError(f"no *.flac with phones (NAME.tsv beside it or in ../phones) in {folder}")
    return speakers


def assemble_speech(rng, recordings, frames):
    """One speaker's recordings from some pause on, one after another with short pauses, `frames` long. Returns audio (frames * 640,) float32,
    phones, and the pieces [(file, start in it, place in the clip)], s. Raises ValueError for a recording that is not 16 kHz mono."""
    audio, phones, pieces, at = np.zeros(frames * RATE // FPS, np.float32), [], [], 0  # at: samples so far
    order = rng.permutation(len(recordings))
    while at < len(audio):
        flac, tsv = recordings[order[len(pieces) % len(order)]]
        wave, rate = soundfile.read(flac, dtype="float32")
        if rate != RATE or wave.ndim != 1 or not len(wave):
            raise ValueError(f"{flac} is empty or not 16 kHz mono")
        said, long = read_phones(tsv), len(wave) / RATE
        pauses = [(s + e) / 2 for s, e, p in said if p == "sil" and e - s > .1 and e < long - 2]
        start = 0.0 if pieces else round(float(rng.choice([0.0, *pauses])), 2)
        piece, now = wave[round(start * RATE):][:len(audio) - at], at / RATE
        audio[at:at + len(piece)] = piece
        pieces.append((flac.name, start, round(now, 4)))
        phones += [(max(s - start, 0) + now, e - start + now, p) for s, e, p in said if e > start]
        at, pause = at + len(piece), round(rng.uniform(.3, .9) * RATE)
        hiss = 2 * np.sort(np.abs(wave))[len(wave) // 10]   # the room does not fall silent
        audio[at:at + pause] = hiss * rng.standard_normal(len(audio[at:at + pause]))
        phones.append((at / RATE, (at + pause) / RATE, "sil"))
        at += pause
    audio *= .1 * 10 ** rng.uniform(-.3, .1) / (np.sqrt((audio ** 2).mean()) + 1e-6)
    end = frames / FPS
    return np.clip(audio, -1, 1), [(s, min(e, end), p) for s, e, p in phones if s < end], pieces


def loudness(audio, frames):
    """Speech energy per frame in [0, 1], smoothed over about 0.2 s. audio: (frames * 640,)."""
    rms = np.sqrt((audio.reshape(frames, -1) ** 2).mean(1))
    x = np.clip(rms / (np.percentile(rms, 95) + 1e-6), 0, 1)
    return np.convolve(np.pad(x, 3, "edge"), np.array([1, 3, 5, 6, 5, 3, 1]) / 24, "valid")


# ------------------------------------------------------------------------------------------------------ clips
def make_clip(job):
    """Make one clip; job: an entry of plan(). Runs in a worker process."""
    torch.set_num_threads(1)
    rng, frames, size = np.random.default_rng([job["seed"], job["index"], 1]), job["frames"], job["size"]
    faces = [load_face(f) for f in job["faces"]]
    face, weight = morph(*faces, job["weight"]) if len(faces) == 2 else faces[0], job["weight"]
    if weight and not fits(*face):                          # a morph whose mouth line is lost: A alone
        face, weight = faces[0], 0.0
    image, points = jittered if fits(*(jittered := jitter(rng, *face))) else face
    audio, phones, pieces = assemble_speech(rng, job["recordings"], frames)
    m, puppet = mouth_curves(phones, frames), Puppet(image, points, size)
    x = life(rng, frames, loudness(audio, frames), job["yaw"])
    video, mask, gap = puppet.render(coefficients(m, x, rng.uniform(.85, 1.2)))
    pose = np.stack([x[k] for k in ("yaw", "pitch", "roll", "tx", "ty")], 1)
    (x0, y0), (x1, y1) = (f(points[OVAL, :2], 0) * size / len(image) for f in (np.min, np.max))
    if job["mirror"]:
        video, mask, pose = video[:, :, ::-1], mask[:, :, ::-1], pose * [-1, 1, -1, -1, 1]
        x0, x1 = size - x1, size - x0
    portraits = [[f["name"], w] for f, w in zip(job["faces"], (round(1 - weight, 2), weight))]
    meta = {k: job[k] for k in PLANNED} | dict(
        mirror=job["mirror"], fps=FPS, recording=pieces[0][0], start=pieces[0][1], portraits=portraits, mouth=KEYS, pieces=pieces,
        phones=[(round(s, 3), round(e, 3), p) for s, e, p in phones])
    arrays = dict(mouth=m, opening=np.clip(gap / GAP, 0, 1), gap=gap, pose=pose, blink=x["lid"], box=[x0, y0, x1, y1])
    base, part = (Path(job["out"]) / name for name in (job["name"], "." + job["name"]))      # hidden: data.py passes over what is half written
    np.savez_compressed(part.with_suffix(".npz"), mask=mask, **{k: np.asarray(v, np.float32) for k, v in arrays.items()})
    part.with_suffix(".json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")
    write_mp4(part.with_suffix(".mp4"), video, (audio * 32767).round().astype(np.int16))
    base.with_suffix(".mp4").unlink(missing_ok=True)        # an old video never stands under new labels
    for end in (".npz", ".json", ".mp4"):                   # the mp4 last: a clip that has one is complete
        os.replace(part.with_suffix(end), base.with_suffix(end))


def is_made(base, job):
    """Whether the clip at base (a path without its ending) is complete and is the one that job asks for."""
    if not all(base.with_suffix(end).is_file() for end in (".mp4", ".json", ".npz")):
        return False
    try:
        meta = json.loads(base.with_suffix(".json").read_text(encoding="utf-8"))
        return all(meta.get(k) == job[k] for k in PLANNED)
    except (ValueError, AttributeError):
        raise ValueError(f"{base}.json does not describe a clip: remove it") from None


def divide(items, name, rng):
    """-> who is held out and who is not, each shuffled: names with a hash in the lowest 8 %. Neither a seed nor who else is there has a say, or one
    folder would train on whom another holds out. Only where no hash is that low, the lowest is taken: at least 1 of 2."""
    rank = {name(x): zlib.crc32(name(x).encode()) for x in items}
    items, few = sorted(items, key=lambda x: rank[name(x)]), sum(h < .08 * 2 ** 32 for h in rank.values())
    few = min(max(few, 1), len(items) - 1)
    return [[part[i] for i in rng.permutation(len(part))] for part in (items[:few], items[few:])]


def plan(args, faces, speakers):
    """Decide clip k from the seed and k alone: more clips leave the first as they are. Returns (jobs, split). Every 12th is validation, with faces
    and speakers of its own (divide). A face with look-alikes (alike, in its part of the split) is morphed in half of its clips."""
    rng, jobs, split = np.random.default_rng(args.seed), [], {"train": [], "val": []}
    (new_faces, faces), (new_voices, voices) = divide(faces, lambda face: face["name"], rng), divide(speakers, str, rng)
    for k in range(args.clips):
        part = "val" if k % 12 == 5 and new_faces and new_voices else "train"
        pool, said = (new_faces, new_voices) if part == "val" else (faces, voices)
        n, r = len(split[part]), np.random.default_rng([args.seed, k, 0])
        a = pool[n % len(pool)]
        others = [pool[i] for i in r.permutation(len(pool)) if alike(a, pool[i])]
        chosen, weight = [a], 0.0
        if others and r.random() < .5:
            chosen, weight = [a, others[0]], round(r.uniform(.3, .7), 2)
        turned = sum(f["yaw"] * w for f, w in zip(chosen, (1 - weight, weight)))
        jobs.append(dict(
            index=k, name=f"puppet_{k:05d}", out=str(args.out), seed=args.seed, size=args.size, frames=round(args.seconds * FPS), faces=chosen,
            identity="+".join(f["name"] for f in chosen) + (f"@{weight}" if weight else ""), weight=weight, yaw=np.deg2rad(turned),
            mirror=bool(r.random() < .5), speaker=said[n % len(said)], recordings=speakers[said[n % len(said)]]))
        split[part].append(jobs[-1]["name"])
    return jobs, split


def report(out, jobs):
    """Print how much the puppets move: a model must not be able to win by freezing. Raises ValueError for a broken NAME.npz."""
    got = []
    for path in (out / f"{job['name']}.npz" for job in jobs):
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as f:
                got.append([f[k] for k in ("pose", "blink", "gap")])
        except BROKEN as e:
            raise ValueError(f"{path} is broken ({e}): remove it and run again") from None
    pose, blink, gap = (np.concatenate(v) for v in zip(*got))
    spread = lambda v, form: ", ".join(f"{p} % {np.percentile(v, p):{form}}" for p in (5, 25, 50, 75, 95))
    for i, name in enumerate(("yaw", "pitch", "roll")):
        print(f"{name}_degrees: {spread(np.rad2deg(pose[:, i]), '.1f')}")
    print(f"shift_eye_distances: {spread(np.hypot(pose[:, 3], pose[:, 4]), '.3f')}")
    shut = sum(int((np.diff((b > .5).astype(int)) == 1).sum()) for _, b, _ in got)
    print(f"blinks_per_minute: {shut / len(blink) * FPS * 60:.1f}")
    print(f"gap_eye_distances: {spread(gap, '.3f')}\nlips_closed_share: {(gap < .01).mean():.3f}")


def run(args):
    """Plan, make what is missing, report. Raises OSError or ValueError for bad input."""
    speakers = read_speech(args.speech)
    drawn = lambda i: dict(path=None, seed=[args.seed, i], name=f"drawn{args.seed}_{i}", yaw=0., pitch=0., sex="", look=0.)
    faces = map(drawn, range(DRAWN)) if args.portraits == "drawn" else read_portraits(Path(args.portraits), args.lips)
    jobs, split = plan(args, list(faces), speakers)
    if args.part != "all" and not (jobs := [job for job in jobs if job["name"] in split[args.part]]):
        raise ValueError(f"--part {args.part}: none of {args.clips} clips; every 12th, from the 6th on, is val, of two faces and voices or more")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "split.json.part").write_text(json.dumps(split), encoding="utf-8")
    os.replace(args.out / "split.json.part", args.out / "split.json")
    todo = [j for j in jobs if not is_made(args.out / j["name"], j)]
    start, bar = time.time(), dict(total=len(todo), unit="clip", desc="puppets")
    if args.workers == 1:
        list(tqdm(map(make_clip, todo), **bar))
    else:
        with get_context("spawn").Pool(args.workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:        # Ctrl-C is the parent's
            list(tqdm(pool.imap_unordered(make_clip, todo), **bar))
    print(f"clips: {len(jobs)} ({len(todo)} made now, {sum(job['name'] in split['val'] for job in jobs)} for validation)")
    if todo:
        print(f"frames_per_second: {len(todo) * jobs[0]['frames'] / (time.time() - start):.1f} (with {args.workers} workers)")
    report(args.out, jobs)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--portraits", default="drawn", help="folder of portraits and portraits.npz, or `drawn`: painted ones")
    parser.add_argument("--speech", type=Path, default=Path(__file__).resolve().parent / "assets" / "speech", help="folder of *.flac with phones")
    parser.add_argument("--out", required=True, type=Path, default=argparse.SUPPRESS, help="folder for the clips")
    parser.add_argument("--clips", type=int, default=100, help="number of clips in the end, those already there included (of both parts, see --part)")
    parser.add_argument("--seconds", type=float, default=15.36, help="length of a clip; 15 s hold 15 chunks of 33 frames")
    parser.add_argument("--part", choices=("all", "train", "val"), default="all", help="make only the clips of this part of the plan")
    parser.add_argument("--lips", type=float, nargs=2, default=(0, SLIT), metavar=("FROM", "TO"), help="which portraits: lip gap, eye distances")
    parser.add_argument("--size", type=int, default=128, help="pixels of the square frame, a multiple of 8")
    parser.add_argument("--seed", type=int, default=0, help="decides everything: same seed, same clips")
    parser.add_argument("--workers", type=int, default=1, help="processes; the clips do not depend on it")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if min(args.clips, args.workers) < 1 or args.seed < 0 or not 1 <= args.seconds <= 3600 or args.size < 32 or args.size % 8:
        parser.error("need --clips, --workers >= 1, --seconds 1-3600, --seed >= 0, --size 32, 40, 48, ...")
    if not 0 <= args.lips[0] < args.lips[1] <= SLIT:
        parser.error(f"--lips FROM TO must rise, from 0 to {SLIT}: wider gaps cannot be closed")
    try:
        run(args)
    except (OSError, ValueError, KeyError, soundfile.SoundFileError) as e:
        sys.exit(print(f"puppet.py: {e}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("puppet.py: stopped; the same command goes on", file=sys.stderr) or 130)


if __name__ == "__main__":
    main()
