"""What evaluate.py found, as tables and pictures: report.md, report.json, videos.csv, segments.csv,
drift.png, sheet.jpg.

A row is a dict: "system", "video", and figures by the keys of METRICS (nan or absent: not
measured). A summary is {metric: {"mean", "sd", "n"}}: mean and standard deviation over n videos; a
distance between sets of pictures has no standard deviation, its n counts frames or clips.
"""
import csv
import io
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common import write_aside, write_json
from data import FPS
from measure.pixels import CLOSED

WINDOWS = (5, 50, 150, 300, 600)            # s: the 5 s that end there, as in Figures 4 and 5
SHEET = (0, 1, 3, 5, 10, 50, 150, 300, 600)             # s: columns of the contact sheet
METRICS = {                                             # key: (digits, name and unit)
    "fid": (1, "FID"),
    "fvd": (1, "FVD, 16 frames"),
    "sync_c": (3, "Sync-C"),
    "sync_d": (3, "Sync-D"),
    "sync_offset": (1, "Sync offset, frames"),
    "sync_now": (3, "SyncNet: median distance - distance at offset 0"),
    "arcface": (3, "identity similarity (ArcFace)"),
    "sface": (3, "identity distance (SFace)"),
    "sface_first": (3, "... of the first frame"),
    "sface_3s": (3, "... after 2.4 to 3.2 s"),
    "sface_worst": (3, "... of the worst frame"),
    "kid": (0, "KID x 1000 (Lite0)"),
    "perceptual": (3, "perceptual distance to the real frame (Lite0)"),
    "lip_sync": (3, "lip gap predicted from the sound, correlation at offset 0"),
    "lip_sync_best": (3, "... at the best offset"),
    "lip_sync_offset": (1, "... best offset, frames"),
    "lips": (3, "lip gap of the real clip, correlation in speech"),
    "lips_early": (3, "... 1 frame early"),
    "lips_late": (3, "... 1 frame late"),
    "closed_pbm": (3, f"share of p, b, m with a lip gap under {CLOSED}"),
    "gap_pbm": (4, "smallest lip gap at p, b, m, eye distances"),
    "lip_motion": (4, "lip motion in speech, sd, eye distances"),
    "lip_motion_silence": (4, "lip motion in silence"),
    "blinks": (1, "blinks a minute"),
    "head_turn": (2, "head rotation, sd, degrees"),
    "head_shift": (2, "head translation, sd, % of the face's height"),
    "faces": (3, "share of frames with a face"),
    "sharpness": (0, "sharpness of the face, variance of the Laplacian"),
    "colour": (2, "colour of the face against the reference, worst channel, of 255"),
    "motion": (3, "frame difference, grey levels"),
    "seam": (3, "frame difference at chunk borders / inside"),
    "fps": (2, "frames generated a second"),
    "latency": (3, "seconds to the first frame"),
}
DRIFT = ("fid", "arcface", "sface", "sface_worst", "sync_c", "lip_sync", "lips", "sharpness",
         "colour", "seam", "head_turn", "head_shift", "lip_motion")

# ---------------------------------------------------------------------------------------- tables


def measured(rows, key):
    """The values of a metric that are there and no nan."""
    values = [row[key] for row in rows if key in row]
    return np.array([v for v in values if v == v], float)


def nanmean(values):
    values = [v for v in values if v == v]
    return float(np.mean(values)) if values else float("nan")


def summarise_rows(rows):
    """Rows of one system -> {metric: {"mean", "sd", "n"}}"""
    out = {}
    for key in METRICS:
        values = measured(rows, key)
        if len(values):
            sd = float(values.std(ddof=1)) if len(values) > 1 else None
            out[key] = {"mean": float(values.mean()), "sd": sd, "n": len(values)}
    return out


def cell(figure, digits):
    if not figure:
        return "-"
    spread = "" if figure["sd"] is None else f" ± {figure['sd']:.{digits}f}"
    return f"{figure['mean']:.{digits}f}{spread} ({figure['n']})"


def table(head, summaries, keys):
    """A Markdown table: a metric a row, a summary a column; metrics nobody has are left out."""
    lines = ["| " + " | ".join([head, *summaries]) + " |", "|---|" + "---|" * len(summaries)]
    for key in keys:
        digits, label = METRICS[key]
        if any(key in summary for summary in summaries.values()):
            cells = [cell(summary.get(key), digits) for summary in summaries.values()]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def markdown(report):
    """The tables, ready to paste: mean ± standard deviation (n)."""
    seed = report["seed"]
    lines = [
        f"`{report['command']}`", "",
        f"commit {report['commit']}, seeds {seed}, {seed + 1}, ..., {report['machine']}.",
        "Mean ± standard deviation over videos (number of videos; of frames or clips for a",
        "distance between sets of pictures). What cannot be measured is -.", "",
        *table("metric", report["systems"], METRICS), "",
        "Scale: the same rulers on real clips, and on what is wrong with them. `real` (above)",
        "compares a clip with its own first frame, and as sets of pictures the first half of",
        "every 5 s with the second half. `other people`: another person's portrait; as sets, one",
        "half of the people with the other. `other audio`: another clip's sound and lips.", "",
        *table("metric", report["scale"], METRICS)]
    drift = {name: windows for name, windows in report["drift"].items() if len(windows) > 1}
    if not drift:
        lines += ["", f"No drift table: no video has {WINDOWS[1]} s."]
    for system, windows in drift.items():
        columns = {f"{t} s": windows[str(t)] for t in WINDOWS if str(t) in windows}
        lines += ["", f"Drift of {system}: the 5 s that end at the time given.", "",
                  *table("metric", columns, DRIFT)]
    return "\n".join([*lines, "", "Notes:", *(f"- {note}" for note in report["notes"]), ""])


def write(folder, report, segment_rows, video_rows, tiles):
    """All files of a report."""
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", markdown(report))
    write_csv(folder / "segments.csv", segment_rows)
    write_csv(folder / "videos.csv", video_rows)
    plot_drift(folder / "drift.png", segment_rows)
    contact_sheet(folder / "sheet.jpg", tiles)


def write_text(path, text):
    write_aside(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_csv(path, rows):
    names = list(dict.fromkeys(key for row in rows for key in row)) or ["system"]
    page = io.StringIO()
    writer = csv.DictWriter(page, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
    write_text(path, page.getvalue())


def commit():
    """Short hash of the repository, "with changes" if files differ from it, or "unknown"."""
    def git(*words):
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# -------------------------------------------------------------------------------------- pictures


def plot_drift(path, rows):
    """Each metric of DRIFT over time: mean of a system's videos and their spread."""
    from matplotlib.figure import Figure
    keys = [key for key in DRIFT if len(measured(rows, key))] or DRIFT[:1]
    lines = -(-len(keys) // 3)
    figure = Figure((13, 3 * lines), layout="constrained")
    axes = figure.subplots(lines, 3, squeeze=False).flat
    for key, axis in zip(keys, axes):
        for system in dict.fromkeys(row["system"] for row in rows):
            own = [row for row in rows if row["system"] == system]
            ends = sorted({row["start"] + row["frames"] / FPS for row in own})
            at = {end: measured([r for r in own if r["start"] + r["frames"] / FPS == end], key)
                  for end in ends}
            at = {end: values for end, values in at.items() if len(values)}
            mean = np.array([values.mean() for values in at.values()])
            sd = np.array([values.std() for values in at.values()])
            line, = axis.plot(list(at), mean, ".-", label=system, markersize=4)
            axis.fill_between(list(at), mean - sd, mean + sd, alpha=0.15, color=line.get_color())
        axis.set_title(METRICS[key][1], fontsize=8)
        axis.set_xlabel("seconds")
    axes = figure.axes
    axes[0].legend(fontsize=6)
    write_aside(path, lambda part: figure.savefig(part, format="png", dpi=110))


def contact_sheet(path, tiles, side=128, page_width=3200):
    """A block for every video: a row for every system, a column for every time that is reached,
    on each tile its identity distance.

    tiles: {video: {system: {seconds: (frame uint8 (H, W, 3), distance or None)}}}
    """
    margin, line = 80, 14
    blocks = []
    for video, systems in tiles.items():
        times = [t for t in SHEET if any(t in shots for shots in systems.values())]
        shape = (margin + side * len(times), 2 * line + side * len(systems))
        block = Image.new("RGB", shape, "white")
        draw = ImageDraw.Draw(block)
        draw.text((4, 1), video[:40], fill="black")
        for column, t in enumerate(times):
            draw.text((margin + side * column + 4, line), f"{t} s", fill="black")
        for row, (system, shots) in enumerate(systems.items()):
            top = 2 * line + side * row
            draw.text((4, top + side // 2), system[:12], fill="black")
            for column, t in enumerate(times):
                if t in shots:
                    paste_tile(block, (margin + side * column, top), side, *shots[t])
        blocks.append(block)
    page = pack(blocks, page_width)
    write_aside(path, lambda part: page.save(part, "JPEG", quality=90))


def paste_tile(block, place, side, frame, distance):
    block.paste(Image.fromarray(frame).resize((side, side)), place)
    if distance is not None:
        x, y = place
        draw = ImageDraw.Draw(block)
        draw.rectangle((x, y, x + 34, y + 12), fill="black")
        draw.text((x + 3, y), f"{distance:.2f}", fill="white")


def pack(blocks, width):
    """Blocks side by side, line by line -> one page."""
    columns = max(1, width // max(block.width for block in blocks))
    lines = [blocks[i:i + columns] for i in range(0, len(blocks), columns)]
    heights = [max(block.height for block in line) for line in lines]
    widest = max(sum(block.width for block in line) for line in lines)
    page = Image.new("RGB", (widest, sum(heights)), "white")
    y = 0
    for line, height in zip(lines, heights):
        x = 0
        for block in line:
            page.paste(block, (x, y))
            x += block.width
        y += height
    return page
