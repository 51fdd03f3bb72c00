"""Raw footage -> clean clips of talking heads. Appendix F, Eq. 18 to 22.

    python prepare_data.py RAW CLIPS                    every video of the folder RAW
    python prepare_data.py RAW CLIPS --syncnet FILE     filter by lip sync, too

    Eq. 18      the pool: all videos of RAW
    Eq. 19      of copies of one video, by source id or visual hash, the first good one is kept
    Eq. 20      squares around the face at 25 frames a second, 16 kHz sound, one scene a clip
    Eq. 21      rho, the share of frames with a face
    Eq. 22      the conditions that a clip must meet

CLIPS gets NAME_000.mp4, its face box NAME_000.npz, its identity NAME_000.json, and report.csv with
a row for every scene: its figures and, if it was rejected, the reason.
Left out: hands over the face (DWPose); learned quality (DOVER), which is the sharpness here.
"""
import csv
import importlib
import json
from collections import Counter
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from common import one_line_errors, say, write_aside, write_mp4
from data import (
    FACE_BOX,
    FPS,
    HOP,
    VIDEOS,
    clip_names,
    find_crop,
    media_files,
    note_unread,
    read_audio,
    read_squares,
    sidecar_text,
)


@dataclass(frozen=True)
class Config:
    raw: tyro.conf.Positional[Path]         # folder of raw videos
    clips: tyro.conf.Positional[Path]       # folder for the clips and report.csv; without clips yet
    syncnet: Path | None = None             # weights of a SyncNet; None: no filter by lip sync
    crop: Literal["face", "none"] = "face"  # none: centre squares, no check; for drawn faces
    size: int = 256                         # side of the clips, pixels
    longest: float = 20.0                   # longer scenes are divided, seconds
    cut: float = 5.0                        # change between frames that is a cut, grey levels
    alike: float = 0.95                     # Eq. 19: visual hashes closer than this are copies
    min_seconds: float = 3.24               # length, seconds; 3.24 is 81 frames
    min_rho: float = 0.9                    # Eq. 21: share of frames with a face
    min_sharpness: float = 30.0             # q of Eq. 22: variance of the Laplacian at 128 px
    max_frozen: float = 0.7                 # share of frames that equal the one before
    max_black: float = 0.1                  # share of black frames
    min_loudness: float = -45.0             # root mean square of the sound, dB of full scale
    max_clipping: float = 0.01              # share of samples at full scale
    min_sync_c: float = 3.0                 # Sync-C, with --syncnet
    max_sync_d: float = 10.0                # Sync-D, with --syncnet


CONDITIONS = [field.name for field in fields(Config) if field.name[:4] in ("min_", "max_")]
COLUMNS = ["clip", "source", "start", *(name[4:] for name in CONDITIONS), "reason"]

# ------------------------------------------------------------- duplicates and scenes, Eq. 19 and 20


def small_grey(frames, side):
    """uint8 (H, W, 3) each -> grey levels 0 to 255, float32 (N, side, side)"""
    grey = [Image.fromarray(f).convert("L") for f in frames]
    small = [g.resize((side, side), Image.Resampling.BOX) for g in grey]
    return np.stack([np.asarray(s, np.float32) for s in small])


def visual_hash(grey):
    """h(v) of Eq. 19: how nine moments of grey (N, 16, 16) differ from their mean -> (2304,)."""
    nine = grey[np.linspace(0, len(grey) - 1, 9).astype(int)]
    difference = nine - nine.mean(0)
    return difference.ravel() / max(1e-6, np.linalg.norm(difference))


def first_copy(source, h, kept, alike):
    """Eq. 19: the file name of a kept video with the same source id or visual hash, or None.

    kept: file name -> (source id, visual hash). An empty source id equals none."""
    for name, (other_source, other_h) in kept.items():
        if source != "" and source == other_source or h @ other_h > alike:
            return name
    return None


def scenes_of(grey, cut, longest):
    """Eq. 20, one scene a clip: grey (N, 16, 16) -> list of (first frame, last + 1).

    A cut is a change over `cut` and over 4 times the usual change around it. Scenes of more than
    `longest` frames are divided evenly."""
    change = np.abs(np.diff(grey, axis=0)).mean((1, 2))                         # (N - 1,)
    cuts = []
    for i in range(len(change)):
        usual = np.median(change[max(0, i - 12):i + 13])                        # in half a second
        if change[i] > max(cut, 4 * usual):
            cuts.append(i + 1)
    scenes = []
    for scene in np.split(np.arange(len(grey)), cuts):
        count = -(-len(scene) // max(1, int(longest)))
        scenes += [(int(part[0]), int(part[-1]) + 1) for part in np.array_split(scene, count)]
    return scenes

# -------------------------------------------------------------- faces and conditions, Eq. 21 and 22


def face_detector():
    """The face finder of infer.py as a function, or what a test puts in its place.

    uint8 (H, W, 3) -> x0 y0 x1 y1 in pixels: where the largest face has FACE_BOX, or None."""
    from measure.framing import find_faces, square_of

    def face_box(picture):
        faces = find_faces(picture, deeper=0)
        if not faces:
            return None
        square = square_of(faces[0].points)
        corner = square.x - square.side / 2, square.y - square.side / 2
        return np.array(corner * 2) + square.side * np.array(FACE_BOX)

    return face_box


def measure_scene(frames, audio, boxes):
    """The figures of Eq. 21 and 22 -> {name: number}.

    frames uint8 (T, H, W, 3), audio int16 (640 T,), boxes: the faces of some frames, None where
    there is no face; an empty list with --crop none, and then there is no rho."""
    grey, sound = small_grey(frames, 128), audio / 32768
    below, above = grey[:, 2:, 1:-1], grey[:, :-2, 1:-1]
    right, left = grey[:, 1:-1, 2:], grey[:, 1:-1, :-2]
    laplacian = 4 * grey[:, 1:-1, 1:-1] - below - above - right - left
    change = np.abs(np.diff(grey, axis=0)).mean((1, 2))
    figures = {"seconds": len(frames) / FPS,
               "sharpness": np.median(laplacian.var((1, 2))),
               "frozen": np.sum(change < 0.1) / len(grey),
               "black": np.mean(grey.mean((1, 2)) < 16),
               "clipping": np.mean(np.abs(sound) > 0.999),
               "loudness": 10 * np.log10(np.mean(sound ** 2) + 1e-10)}
    if boxes:
        figures["rho"] = np.mean([box is not None for box in boxes])            # Eq. 21
    return figures


def failures(figures, cfg):
    """Eq. 22: the conditions that a clip does not meet, in words. What was not measured passes."""
    reasons = []
    for condition in CONDITIONS:
        kind, name = condition[:3], condition[4:]
        limit = getattr(cfg, condition)
        value = figures.get(name, limit)
        if kind == "min" and value < limit:
            reasons.append(f"{name} {value:.3g} < {limit:g}")
        if kind == "max" and value > limit:
            reasons.append(f"{name} {value:.3g} > {limit:g}")
    return reasons


def judge(frames, audio, boxes, cfg, copy_of=None, sync_score=None):
    """A scene -> its figures, and the reasons to reject it: an empty list if it is good.

    Only what passes everything else is given to sync_score, which is slow."""
    figures = measure_scene(frames, audio, boxes)
    reasons = [f"duplicate of {copy_of}"] if copy_of else failures(figures, cfg)
    if sync_score and not reasons:
        try:
            figures["sync_c"], figures["sync_d"] = sync_score(frames, audio / np.float32(32768))
            reasons = failures(figures, cfg)
        except ValueError as error:                                             # too short for it
            reasons = [str(error)]
    return figures, reasons

# ------------------------------------------------------------------------------------- the command


def check(cfg, files):
    if cfg.size % 8 or cfg.size < 16 or not 0 < cfg.longest < np.inf:
        raise ValueError(f"size {cfg.size} must be 16, 24, ...; longest {cfg.longest} over 0")
    if not files:
        raise ValueError(f"no video in {cfg.raw}")
    if cfg.clips.is_dir() and media_files(cfg.clips, VIDEOS | {".npz"}):        # or CLIPS is RAW
        raise ValueError(f"{cfg.clips} holds clips already: give a new or empty folder")


def write_clip(base, frames, audio, boxes, about):
    """`base` + .json, .npz, .mp4: what is written about the clip, its face, itself."""
    Path(f"{base}.json").write_text(json.dumps(about), encoding="utf-8")
    faces = [box for box in boxes if box is not None]
    if faces:
        np.savez(f"{base}.npz", box=np.float32(np.median(faces, axis=0)))
    write_mp4(Path(f"{base}.mp4"), frames, audio)


def write_report(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)


def look_through(path, size, faces):
    """One pass of a video -> crop, grey float32 (N, 16, 16), audio int16 (640 N,).

    Errors of some kind for a bad file. No picture is kept: an hour takes 90 MB, and as much for
    its sound."""
    crop, *_ = find_crop(path, faces)
    grey = [small_grey([square], 16)[0] for square in read_squares(path, size, crop)]
    audio = read_audio(path, len(grey) * HOP)
    if len(grey) < 2 or not len(audio):
        raise ValueError("no audio" if len(grey) > 1 else f"{len(grey)} frames")
    return crop, np.stack(grey), audio


def prepare_video(path, name, cfg, kept, faces, sync_score):
    """Eq. 19 to 22 for one video, scene by scene -> the rows of its scenes."""
    rows = []
    try:
        crop, grey, audio = look_through(path, cfg.size, faces)                 # Eq. 20
        source, h = sidecar_text(path, "source", ""), visual_hash(grey)
        copy_of = first_copy(source, h, kept, cfg.alike)                        # Eq. 19
        squares = read_squares(path, cfg.size, crop)
        for k, (first, end) in enumerate(scenes_of(grey, cfg.cut, cfg.longest * FPS)):
            clip, start = f"{name}_{k:03d}", first / FPS
            scene = np.stack(list(islice(squares, end - first)))
            sound = audio[first * HOP:end * HOP]
            boxes = [faces(frame) for frame in scene[::5]] if faces else []     # 5 times a second
            figures, reasons = judge(scene, sound, boxes, cfg, copy_of, sync_score)
            row = {"clip": clip, "source": path.name, "start": start, "reason": "; ".join(reasons)}
            if not reasons:
                about = {"identity": sidecar_text(path, "identity", path.stem),
                         "video": source or path.stem, "start": start}
                write_clip(cfg.clips / clip, scene, sound, boxes, about)
                kept[path.name] = source, h
            rows.append(row | figures)
    except Exception as error:              # a decoder can raise anything for a damaged file
        reason = f"unreadable: {error!r}"
        rows.append({"clip": name, "source": path.name, "reason": reason})
    return rows


def prepare(cfg, sync_score=None):
    """Eq. 18 to 22: the videos of cfg.raw -> good clips and report.csv in cfg.clips.

    sync_score: function (frames, sound float32) -> (Sync-C, Sync-D). Returns the report's rows;
    the "reason" of a kept clip is empty. One scene is in memory at a time."""
    files = media_files(cfg.raw, VIDEOS)                                        # Eq. 18
    check(cfg, files)
    note_unread(cfg.raw)
    cfg.clips.mkdir(parents=True, exist_ok=True)
    faces, names = face_detector() if cfg.crop == "face" else None, clip_names(files)
    rows, kept = [], {}                     # kept: file name -> source id, visual hash
    for path in tqdm(files, "preparing", unit="video", disable=None):
        rows += prepare_video(path, names[path], cfg, kept, faces, sync_score)
    write_aside(cfg.clips / "report.csv", lambda part: write_report(part, rows))
    return rows


def main(argv=None):
    cfg = tyro.cli(Config, args=argv, description=__doc__)
    with one_line_errors("prepare_data.py"):
        if cfg.syncnet is None:
            print("no SyncNet given: Sync-C/D not filtered")
            sync_score = None
        else:
            sync = importlib.import_module("measure.sync")
            sync_score = sync.syncnet_scorer(cfg.syncnet)
        rows = prepare(cfg, sync_score)
        kept = [row["seconds"] for row in rows if not row["reason"]]
        say(f"clips kept: {len(kept)} of {len(rows)}  minutes: {sum(kept) / 60:.1f}")
        reasons = [reason for row in rows if row["reason"] for reason in row["reason"].split("; ")]
        count = Counter(reason.split()[0] for reason in reasons).most_common()
        say("rejected: " + ("  ".join(f"{word} {n}" for word, n in count) or "none"))


if __name__ == "__main__":
    main()
