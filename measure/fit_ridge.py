"""Fits the ridge of the public sync score: Whisper base's hidden states -> lip gap.

    python -m measure.fit_ridge CLIPS               writes weights/sync_ridge/

Fitted on real clips with their sound in sync (GRID speaker 1, 60 clips of 3 s, 4,500 frames) and
checked on the "val" clips of the same folder: correlation of predicted and measured lip gap by
offset, with the clip's own sound and with another clip's. The gap is the landmarker's.
"""
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import tyro

from common import one_line_errors, write_json, write_safetensors
from data import HOP, VIDEOS, media_files, split_of
from measure.landmarks import Landmarker, lip_gap
from measure.pixels import correlation
from measure.sync import RIDGE, WHISPER, WHISPER_NOTE, WhisperBase
from measure.video import probe, side_of, sound_of, squares

OFFSETS = range(-4, 5)                      # frames, of the check


@dataclass(frozen=True)
class Options:
    clips: tyro.conf.Positional[Path]       # folder of real clips with their sound in sync
    count: int = 60                         # clips of the training split that are fitted
    check: int = 20                         # clips of the "val" split that are checked
    penalty: float = 3000.0                 # lambda
    seed: int = 0                           # of the choice of clips
    out: Path = RIDGE.parent                # folder to write


def choose(folder, count, check, seed):
    """-> (clips to fit, clips to check). ValueError if there are too few."""
    files = media_files(folder, VIDEOS)
    part = split_of(folder, {path: path.stem for path in files})
    train = [path for path in files if part[path] == "train"]
    held_out = [path for path in files if part[path] == "val"][:check]
    if len(train) < count or len(held_out) < 2:
        raise ValueError(f"{folder} has {len(train)} clips to fit and {len(held_out)} to check: "
                         f"{count} and 2 are needed")
    chosen = np.random.default_rng(seed).choice(len(train), count, replace=False)
    return [train[i] for i in sorted(chosen)], held_out


def read(path, landmarker, whisper):
    """A clip -> states (T, 3584), gap (T,), nan without a face."""
    frames = np.stack(list(squares(path, side_of(path))))
    points, _ = landmarker.points(frames)
    sound = sound_of(path, probe(path)[0])[:len(frames) * HOP]
    return np.concatenate([*whisper.rows(sound, len(frames))]), lip_gap(points).numpy()


def fit(states, gap, penalty):
    """Ridge regression with a free intercept: states (T, D), gap (T,) -> weight (D,), bias."""
    seen = np.isfinite(gap)
    x = np.float64(states[seen])
    y = np.float64(gap[seen])
    mean = x.mean(0)
    x -= mean
    gram = x.T @ x + penalty * np.eye(x.shape[1])
    weight = np.linalg.solve(gram, x.T @ (y - y.mean()))
    return np.float32(weight), float(y.mean() - mean @ weight)


def check(clips, weight, bias):
    """[(states, gap)] -> {"own": mean correlation by offset, "other": with the next clip's
    sound}."""
    predicted = [states @ weight + bias for states, _ in clips]
    by_sound = {}
    for name, shift in (("own", 0), ("other", len(clips) // 2)):
        table = [[correlation(gap, predicted[(i + shift) % len(clips)], np.ones(len(gap), bool), k)
                  for k in OFFSETS] for i, (_, gap) in enumerate(clips)]
        by_sound[name] = {str(k): round(r, 3) for k, r in zip(OFFSETS, np.nanmean(table, 0))}
    return by_sound


def run(options):
    train, held_out = choose(options.clips, options.count, options.check, options.seed)
    if any(find_spec(package) is None for package in WHISPER):
        raise ValueError(WHISPER_NOTE)
    landmarker = Landmarker()
    whisper = WhisperBase()
    fitted = [read(path, landmarker, whisper) for path in train]
    states = np.concatenate([states for states, _ in fitted])
    gap = np.concatenate([gap for _, gap in fitted])
    weight, bias = fit(states, gap, options.penalty)
    figures = check([read(path, landmarker, whisper) for path in held_out], weight, bias)
    about = {"clips": [path.stem for path in train], "frames": len(gap),
             "penalty": options.penalty, "held_out": [path.stem for path in held_out],
             "correlation_by_offset": figures}
    tensors = {"weight": torch.from_numpy(weight), "bias": torch.tensor([bias])}
    write_safetensors(options.out / RIDGE.name, tensors, {"class": "sync ridge"})
    write_json(options.out / "sync_ridge.json", about)
    for name, row in figures.items():
        print(f"{name}: " + " ".join(f"{k}: {r}" for k, r in row.items()))
    print(f"ridge: {options.out / RIDGE.name}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    options = tyro.cli(Options, args=argv, prog="measure.fit_ridge", description=__doc__)
    with one_line_errors("measure.fit_ridge"):
        run(options)


if __name__ == "__main__":
    main()
