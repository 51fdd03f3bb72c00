"""What evaluate.py found, as tables and pictures: report.md, report.json, videos.csv, pieces.csv, drift.png, sheet.png. At the end: --plot.

A row is a dict: "system", "video", and figures by the keys of METRICS (nan or absent: not measured). A figure is {"mean", "sd", "n"}: mean and
standard deviation over n videos; a Frechet distance has no standard deviation, its n counts frames or clips."""
import csv
import io
import json
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from checkpoint import write_aside
from data import FPS
from metrics import frechet
from proxies import CLOSED

WINDOWS = (5, 50, 150, 300, 600)                                                # s: the piece that ends there, as in the paper's Figures 4 and 5
SHEET = (0, 1, 2, 3, *WINDOWS)                                                  # s: columns of the contact sheet
METRICS = {                 # key: (digits, name and unit)
    "fid": (1, "FID"), "fvd": (1, "FVD, 16 frames"), "sync_c": (3, "Sync-C"), "sync_d": (3, "Sync-D"), "sync_offset": (1, "Sync offset, frames"),
    "sync_now": (3, "median - distance at offset 0, by SyncNet"),
    "identity": (4, "identity similarity (ArcFace)"),
    "mouth": (3, "mouth correlation (proxy), speech only"), "mouth_early": (3, "... 1 frame early"), "mouth_late": (3, "... 1 frame late"),
    "mouth_heard": (3, "... of what the ears say"),
    "gap_pbm": (4, "smallest lip gap at p, b, m (proxy), eye distances"), "closed_pbm": (3, f"share of p, b, m with a gap under {CLOSED} (proxy)"),
    "mouth_sd": (4, "mouth motion in speech (proxy), sd, eye distances"), "mouth_sd_silence": (4, "mouth motion in silence (proxy)"),
    "proxy_sync_now": (3, "sync (proxy): median - distance at offset 0"), "proxy_sync_c": (3, "sync (proxy): median - min"),
    "proxy_sync_d": (3, "sync (proxy): min"), "proxy_sync_offset": (1, "sync offset (proxy), frames"),
    "proxy_identity": (4, "identity (proxy), cosine with the reference"), "proxy_frechet": (4, "Frechet distance of face features (proxy)"),
    "proxy_frechet_lips": (4, "Frechet distance of 5-frame lip features (proxy)"), "faces": (3, "share of frames with a face (proxy)"),
    "blinks": (1, "blinks a minute (proxy)"), "head": (3, "head motion, sd, % of the face's height"), "motion": (3, "frame difference, grey levels"),
    "seam": (3, "frame difference at chunk borders / inside"), "sharpness": (1, "sharpness of the face, variance of the Laplacian"),
    "colour": (2, "colour of the face against the reference, worst channel, of 255"),
    "fps": (2, "frames generated a second"), "latency": (3, "seconds to the first frame")}
DRIFT = ("sharpness", "colour", "identity", "proxy_identity", "fid", "proxy_frechet", "mouth", "sync_c", "proxy_sync_now", "seam", "head", "mouth_sd")


# -------------------------------------------------------------------------------------------------------------- tables


def nanmean(values):
    values = [v for v in values if v == v]
    return float(np.mean(values)) if values else float("nan")


def write(path, text):
    """Aside, then renamed."""
    write_aside(path, lambda part: part.write_text(text, encoding="utf-8"))


def summarise(system, rows, sums, window=None):
    """Rows of one system -> {metric: {"mean", "sd", "n"}}; the Frechet distances of its features (in a window) to those of all real clips. The real
    clips themselves: every other clip against the rest."""
    out = {}
    for key in METRICS:
        values = np.array([r[key] for r in rows if r.get(key, np.nan) == r.get(key, np.nan) and key in r], float)
        if len(values):
            out[key] = {"mean": float(values.mean()), "sd": float(values.std(ddof=1)) if len(values) > 1 else None, "n": len(values)}
    for key in ("fid", "fvd", "proxy_frechet", "proxy_frechet_lips"):
        pair = ((system, key, window), ("real", key, None)) if system != "real" else (("real/0", key, window), ("real/1", key, window))
        a, b = (sums.get(name) for name in pair)
        if a and b and min(a.n, b.n) > 1:
            out[key] = {"mean": frechet(a, b), "sd": None, "n": a.n}
    return out


def cell(figure, digits):
    if not figure:
        return "-"
    spread = "" if figure["sd"] is None else f" ± {figure['sd']:.{digits}f}"
    return f"{figure['mean']:.{digits}f}{spread} ({figure['n']})"


def markdown(report):
    """The tables, ready to paste: mean ± standard deviation (n)."""
    where = f"commit {report['commit']}, seeds {report['seed']}, {report['seed'] + 1}, ..., {report['machine']}."
    lines = [f"`{report['command']}`", "", f"{where} Mean ± standard deviation over videos (number of videos; of frames or clips for a",
             "Frechet distance). `real` is real against real: its Frechet distances are one half of the clips against the other, its mouth",
             "is what the proxy sees against the truth. What cannot be measured is -.", ""]
    systems, drift = report["systems"], report["drift"]
    lines += ["| metric | " + " | ".join(systems) + " |", "|---|" + "---|" * len(systems)]
    for key, (digits, label) in METRICS.items():
        if any(key in s for s in systems.values()):
            lines.append(f"| {label} | " + " | ".join(cell(s.get(key), digits) for s in systems.values()) + " |")
    times = [t for t in WINDOWS if any(str(t) in d for d in drift.values())]
    lines += ["", "Drift: the 5 s that end at the time given.", "", "| system | metric | " + " | ".join(f"{t} s" for t in times) + " |",
              "|---|---|" + "---|" * len(times)] if times else ["", f"No drift table: no video has {WINDOWS[0]} s."]
    for system, windows in drift.items():
        for key in DRIFT if times else ():
            if any(key in w for w in windows.values()):
                row = " | ".join(cell(windows.get(str(t), {}).get(key), METRICS[key][0]) for t in times)
                lines.append(f"| {system} | {METRICS[key][1]} | {row} |")
    return "\n".join([*lines, "", "Notes:", *(f"- {note}" for note in report["notes"]), ""])


def write_csv(path, rows):
    table = io.StringIO()
    writer = csv.DictWriter(table, list(dict.fromkeys(key for row in rows for key in row)) or ["system"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write(path, table.getvalue())


def plot(path, rows):
    """Each metric of DRIFT over time, mean of the videos of a system and their spread."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    keys = [k for k in DRIFT if any(k in r for r in rows)]
    fig, axes = plt.subplots(-(-len(keys) // 3), 3, figsize=(13, 3 * -(-len(keys) // 3)), squeeze=False)
    for key, axis in zip(keys, axes.flat):
        for system in dict.fromkeys(r["system"] for r in rows):
            points = {}
            for r in rows:
                if r["system"] == system and r.get(key, np.nan) == r.get(key, np.nan) and key in r:
                    points.setdefault(r["start"] + r["frames"] / FPS, []).append(r[key])
            x = sorted(points)
            y, sd = np.array([np.mean(points[t]) for t in x]), np.array([np.std(points[t]) for t in x])
            line, = axis.plot(x, y, ".-", label=system, markersize=4)
            axis.fill_between(x, y - sd, y + sd, alpha=0.15, color=line.get_color())
        axis.set_title(METRICS[key][1], fontsize=8)
        axis.set_xlabel("seconds")
    axes.flat[0].legend(fontsize=6)
    fig.tight_layout()
    write_aside(path, lambda part: fig.savefig(part, format="png", dpi=110))
    plt.close(fig)


def contact_sheet(path, sheet, videos=4):
    """Figure 1's layout: a row for every system of the first videos, a column for every time they reach."""
    names = list(dict.fromkeys(name for name, _ in sheet))
    some = [*names[:videos], *(n for n in names[videos:] if n.startswith("long_"))]
    rows = [(name, system, shots) for name in some for (n, system), shots in sheet.items() if n == name]
    times, side = [t for t in SHEET if any(t in shots for *_, shots in rows)], 128
    page = Image.new("RGB", (130 + side * len(times), 14 + side * len(rows)), "white")
    draw = ImageDraw.Draw(page)
    for i, t in enumerate(times):
        draw.text((130 + side * i + 4, 1), f"{t} s", fill="black")
    for j, (name, system, shots) in enumerate(rows):
        draw.text((4, 14 + side * j + 50), f"{name[:20]}\n{system[:20]}", fill="black")
        for i, t in enumerate(times):
            if t in shots:
                page.paste(Image.fromarray(shots[t]).resize((side, side)), (130 + side * i, 14 + side * j))
    write_aside(path, lambda part: page.save(part, format="png"))


def commit():
    git = lambda *words: subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# -------------------------------------------------------------------------------------------------------------- curves


def plot_teacher(run, bins):
    """train_teacher.py --plot: run/log.jsonl -> run/loss.png: the smoothed loss, and the validation loss by noise level."""
    from matplotlib.figure import Figure
    axes = (figure := Figure((9, 6))).subplots()
    records = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    flow = np.array([r["flow"] for r in records if "flow" in r])
    n = max(1, min(100, len(flow) // 10))
    axes.plot(np.arange(n - 1, len(flow)), np.convolve(flow, np.ones(n) / n, "valid"), "k", lw=0.8, label=f"training, mean of {n} steps")
    for sigma in bins:
        axes.plot(*zip(*[(r["step"], r["val"][str(sigma)]) for r in records if "val" in r]), label=f"validation, sigma {sigma}")
    axes.set(xlabel="step", ylabel="Eq. 2", yscale="log")
    axes.legend()
    figure.savefig(run / "loss.png", dpi=120)


def plot_student(run):
    """distill_student.py --plot: run/log.jsonl -> run/curves.png: gradients on the student, losses, learning rates, what should stay level."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    records = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    axes = (figure := Figure((15, 8), layout="constrained")).subplots(2, 3).flat
    for name, axis in zip(("dmd", "pull", "critic", "anchor", "lr", "lr_critic"), axes[[0, 0, 1, 1, 2, 2]]):
        steps, values = np.array([(r["step"], r[name]) for r in records if name in r] or [(0, np.nan)]).T
        n = 1 if name.startswith("lr") else max(1, min(50, len(values) // 10))
        axis.plot(steps[n - 1:], np.convolve(values, np.ones(n) / n, "valid"), lw=0.8, label=f"{name}, mean of {n}")
    for name, axis in (("error", axes[3]), ("colour", axes[4]), ("seam", axes[5])):
        steps, values = zip(*[(r["step"], np.atleast_1d(r["val"][name])) for r in records if "val" in r])
        for i, curve in enumerate(zip(*values)):                                # blue to yellow: early chunks to late ones
            shade, ends = i / max(1, len(values[0]) - 1), i in (0, len(values[0]) - 1)
            label = name if len(values[0]) == 1 else f"{name}, chunk {i}" if ends else None
            axis.plot(steps, curve, color=colormaps["viridis"](shade), label=label)
        axis.set(xlabel="step")
    for axis in axes:
        axis.legend()
    figure.savefig(run / "curves.png", dpi=120)
