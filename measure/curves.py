"""Curves of a training run: RUN_DIR/log.jsonl -> loss.png (stage 1) or curves.png (stage 2).

    python -m measure.curves runs/teacher

A line of the log is a JSON record with "step" and numbers. Every number gets a plot, as a mean over
some steps; every entry of "val" gets one, with a line for each of its values: noise levels in
stage 1, chunks from the first (blue) to the last (yellow) in stage 2.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from common import one_line_errors, write_aside

NO_CURVE = ("step", "seconds")


@dataclass(frozen=True)
class Options:
    run_dir: tyro.conf.Positional[Path]     # folder of a training run, with log.jsonl


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_log(path):
    """log.jsonl -> records. ValueError if a line is damaged or there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"no such log: {path}")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} line {number} is no log record: {error}") from None
        records.append(record)
    if not records:
        raise ValueError(f"{path} is empty")
    return records


def training_curves(records):
    """-> {name: (steps, values)}, smoothed over a tenth of the curve, 50 steps at most."""
    names = dict.fromkeys(k for r in records for k, v in r.items() if is_number(v))
    curves = {}
    for name in names:
        if name in NO_CURVE:
            continue
        own = [r for r in records if is_number(r.get(name))]
        steps = np.array([r["step"] for r in own])
        values = np.array([r[name] for r in own], float)
        n = 1 if name.startswith("lr") else max(1, min(50, len(values) // 10))
        curves[f"{name}, mean of {n}" if n > 1 else name] = (
            steps[n - 1:], np.convolve(values, np.ones(n) / n, "valid"))
    return curves


def validation_curves(records):
    """-> {name: {line: (steps, values)}}. Numbers of "val" share one plot, lists have one each."""
    plots = {}
    for record in records:
        for name, value in (record.get("val") or {}).items():
            if is_number(value):
                lines = {("validation", name): value}
            else:
                lines = {(f"validation, {name}", f"chunk {i}"): v for i, v in enumerate(value)}
            for (plot, line), v in lines.items():
                steps, values = plots.setdefault(plot, {}).setdefault(line, ([], []))
                steps.append(record["step"])
                values.append(v)
    return plots


def draw(records, path):
    """One picture of all curves."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    plots = {name: {name: curve} for name, curve in training_curves(records).items()}
    plots |= validation_curves(records)
    rows = max(1, -(-len(plots) // 3))
    figure = Figure((15, 4 * rows), layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False).flat
    for (name, lines), axis in zip(plots.items(), axes):
        for i, (line, (steps, values)) in enumerate(lines.items()):
            shade = colormaps["viridis"](i / max(1, len(lines) - 1))
            axis.plot(steps, values, color=shade, lw=0.8, label=line)
        axis.set(title=name, xlabel="step")
        if len(lines) > 1:
            axis.legend(fontsize=7)
    write_aside(path, lambda part: figure.savefig(part, format="png", dpi=110))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    options = tyro.cli(Options, args=argv, prog="measure.curves", description=__doc__)
    with one_line_errors("measure.curves"):
        records = read_log(options.run_dir / "log.jsonl")
        is_student = any("dmd" in record for record in records)
        path = options.run_dir / ("curves.png" if is_student else "loss.png")
        draw(records, path)
        print(f"curves: {path}")


if __name__ == "__main__":
    main()
