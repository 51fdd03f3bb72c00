"""What can be read off pixels and landmarks: sharpness, colour, seams; head and lips.

No network is called here: points come from landmarks.py. Scale of each figure: the rows `real`,
`VAE only`, `frozen` and `blur` of every report.

    sharpness   variance of the Laplacian over the face, at the video's own size
    colour      how far the mean colour of the face is from that of the reference
    seam        step into the first new frame of a chunk, against steps inside chunks; 1: no seam
    head        spread of the head's place and angles
    lips        lip gap (inner lips, in eye distances) against that of the real clip while somebody
                speaks, and whether the lips close at p, b, m: a gap under 0.03 in the middle half
                of the phone. Real video: 122 of 124 (GRID, one man), 11 of 12 (nine people); at
                random moments in speech 0.28. A closed mouth measures 0.007

Shapes: T frames, H W pixels; frames uint8 (T, H, W, 3) RGB at 25 a second; points (T, 478, 3) in
pixels, nan without a face. A box is x0, y0, x1, y1 from brow to chin, fractions of the side.
"""
import csv
import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from data import FACE_BOX, FPS, HOP

CLOSED = 0.03               # eye distances: lips closer than this are shut
BROWS = (70, 105, 334, 300)
CHIN = 152
CHEEKS = (234, 454)         # where the face ends at the left and the right

# --------------------------------------------------------------------------------------- picture


def face_box(points, side):
    """Where the face mostly is. points (T, 478, 3) in pixels of a square of `side` -> box.
    FACE_BOX if there is no face."""
    seen = np.asarray(points)[np.isfinite(np.asarray(points)[:, 0, 0])]
    if not len(seen):
        return FACE_BOX
    left, right = np.sort(np.median(seen[:, CHEEKS, 0], 0))
    top = np.median(seen[:, BROWS, 1].min(1))
    bottom = np.median(seen[:, CHIN, 1])
    return tuple(np.array([left, top, right, bottom]) / side)


def grey(frames):
    return np.float32(frames) @ np.float32([0.299, 0.587, 0.114])  # (T, H, W), 0..255


def cut_box(frames, box):
    side = frames.shape[2]
    x0, y0, x1, y1 = (min(max(round(v * side), 0), side) for v in box)
    return frames[:, y0:y1, x0:x1]


def sharpness(frames, box):
    """Variance of the Laplacian over the face, mean of the frames, grey levels squared."""
    g = grey(cut_box(frames, box))
    across = 2 * g[:, 1:-1, 1:-1] - g[:, 1:-1, 2:] - g[:, 1:-1, :-2]
    down = 2 * g[:, 1:-1, 1:-1] - g[:, 2:, 1:-1] - g[:, :-2, 1:-1]
    return float((across + down).var((1, 2)).mean())


def colour(frames, box):
    """Mean colour of the face -> (3,), 0..255."""
    return cut_box(frames, box).mean((0, 1, 2), dtype=np.float64)


def motion_row(frames, before, start, chunk=None, overlap=0):
    """Mean step from frame to frame, and the step at borders of chunks relative to the others.

    before: the frame before these, or None; start: number of the first; chunk, overlap: frames of
    a chunk and those it shares with the next (chunk None: no seam is looked for).
    -> {"motion": grey levels, "seam"}, nan where there is nothing to compare
    """
    video = frames if before is None else np.concatenate([before[None], frames])
    change = np.abs(np.diff(np.float32(video).mean(-1), axis=0)).mean((1, 2))
    number = np.arange(len(change)) + start + (before is None)  # change[i] leads to this frame
    border = np.zeros(len(change), bool)
    if chunk:
        border = (number >= chunk) & ((number - chunk) % (chunk - overlap) == 0)
    inside = float(change[~border].mean()) if (~border).any() else float("nan")
    measurable = border.any() and inside > 0.01
    seam = float(change[border].mean() / inside) if measurable else float("nan")
    return {"motion": inside, "seam": seam}


# ------------------------------------------------------------------------------------------ head


def head_row(pose, height):
    """Spread of the head over some frames. pose: landmarks.head_pose; height: the face's, pixels.

    -> {"head_turn": degrees, "head_shift": % of the face's height}: square root of the summed
    variances of yaw, pitch, roll, and of x, y between the eyes; nan under 2 frames with a face
    """
    angles = np.stack([np.asarray(a, float) for a in (pose.yaw, pose.pitch, pose.roll)], 1)
    seen = np.isfinite(angles).all(1)
    if seen.sum() < 2:
        return {"head_turn": float("nan"), "head_shift": float("nan")}
    place = np.asarray(pose.position, float)[seen] / height
    return {"head_turn": float(np.sqrt(angles[seen].var(0).sum())),
            "head_shift": 100 * float(np.sqrt(place.var(0).sum()))}


# ------------------------------------------------------------------------------------------ lips


def correlation(seen, true, use, lag=0):
    """Pearson correlation of seen[i + lag] and true[i] over the frames i with use[i].

    Frames that are nan in either are left out. What does not move correlates with nothing: 0.
    nan if the truth does not move, or for fewer than 12 frames.
    """
    i = np.flatnonzero(use)
    i = i[(i + lag >= 0) & (i + lag < len(seen)) & (i < len(true))]
    x = np.float64(seen)[i + lag]
    y = np.float64(true)[i]
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    if len(x) < 12 or y.std() < 1e-6:
        return float("nan")
    if x.std() < 1e-6:
        return 0.0
    return float(((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std()))


@lru_cache(maxsize=8)
def phone_table(path):
    table = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            phone = (float(row["start"]), float(row["end"]), row["phone"])
            table.setdefault(row["clip"], []).append(phone)
    return table


def phones_of(path):
    """[(start s, end s, IPA)] of a video, None if unknown: "phones" of NAME.json beside it, else
    its rows of phones.tsv (clip, start, end, phone) beside it or one folder up."""
    path = Path(path)
    try:
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["phones"]
        return [(float(start), float(end), str(phone)) for start, end, phone in found]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    tables = [folder / "phones.tsv" for folder in (path.parent, path.parent.parent)]
    table = next(filter(Path.is_file, tables), None)
    try:
        return phone_table(table).get(path.stem) if table else None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{table} needs columns clip, start, end, phone: {error!r}") from None


def speech_frames(phones, sound, frames):
    """Which frames are spoken: by the phones if they are known, else those louder than a tenth of
    the loud ones. -> bool (frames,)"""
    t = (np.arange(frames) + 0.5) / FPS
    if phones:
        spoken = np.zeros(frames, bool)
        for start, end, phone in phones:
            spoken |= (t >= start) & (t < end) & (phone != "sil")
        return spoken
    if not len(sound):
        return np.zeros(frames, bool)
    padded = np.append(sound, np.zeros(frames * HOP))[:frames * HOP]
    rms = np.sqrt(np.square(padded.reshape(frames, HOP)).mean(1))
    return rms > max(0.1 * np.percentile(rms, 95), 1e-4)


def closures(gap, phones, start=0):
    """Smallest gap in the middle half of every p, b, m, at least the frame in its middle.

    gap (T,) of the frames start, start + 1, ...; phones as of phones_of -> (closures,)
    """
    t = (np.arange(len(gap)) + start + 0.5) / FPS
    smallest = []
    for begin, end, phone in phones or []:
        if phone in ("p", "b", "m"):
            reach = max((end - begin) / 4, 0.5 / FPS) + 1e-9
            inside = gap[np.abs(t - (begin + end) / 2) <= reach]
            inside = inside[np.isfinite(inside)]
            if len(inside):
                smallest.append(inside.min())
    return np.array(smallest)


def lip_row(gap, truth, phones, speech, start=0):
    """Figures of the lips: gap (T,) of frames start, ...; truth (T,) the real clip's, or None;
    phones or None; speech bool (T,).

    Correlations are over speech frames only: in silence every mouth is shut, which inflates them.
    """
    def spread(values):
        values = values[np.isfinite(values)]
        return float(values.std()) if len(values) > 4 else float("nan")
    row = {"lip_motion": spread(gap[speech]), "lip_motion_silence": spread(gap[~speech])}
    if truth is not None:
        for key, lag in (("lips", 0), ("lips_early", -1), ("lips_late", 1)):
            row[key] = correlation(gap, truth, speech[:len(truth)], lag)
    smallest = closures(gap, phones, start)
    if len(smallest):
        row["closed_pbm"] = float((smallest < CLOSED).mean())
        row["gap_pbm"] = float(smallest.mean())
    return row
