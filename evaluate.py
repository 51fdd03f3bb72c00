"""Measures talking-head videos: the paper's metrics (section 4.1, Figures 4 and 5), the mouth, the head, and drift over ten minutes.

    python evaluate.py --generated DIR --real DIR                        videos against the real ones of the same name -> report/
    python evaluate.py --weights weights/tiny --data CLIPS               generates for the held-out clips of a folder first
    python evaluate.py --weights weights/tiny --data CLIPS --long 600    and one video of ten minutes: the drift report
    python evaluate.py train-proxies --data CLIPS                        trains the stand-ins for official networks (train_proxies.py)

Every video goes through once, in pieces of 5 s, so ten minutes need no more memory than five seconds. Beside the videos stand their bounds, measured
alike: the real clips, the VAE's reconstruction of them (with --weights), and a frozen first frame, which an honest sync metric must punish.
FID, FVD, Sync-C/D and ArcFace need official files (--fid-weights ...); without them they are left out, never replaced. What our own small networks
say is called `proxy`: their scale is in weights/tiny/proxies/proxies.json. Mouth: the gap between the lips, seen by the face proxy in the generated
video, against the truth (a puppet's sidecar, else the same proxy on the real clip), over the frames in which somebody speaks.
Writes report.md (tables, notes), report.json, videos.csv, pieces.csv, drift.png, sheet.png.
"""
import argparse
import json
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import infer
import metrics
import proxies
import train_proxies
from checkpoint import write_json
from chunks import pixels
from data import FPS, HOP, PICTURES, VIDEOS, media_files, read_audio, read_video, sidecar_text, split_of, square_crop
from metrics import box_of
from report import METRICS, SHEET, WINDOWS, commit, contact_sheet, markdown, nanmean, plot, summarise, write, write_csv
from vae import load_vae

PIECE = 125                                                                     # frames measured at a time, 5 s
KINDS = ("fid", "fvd", "syncnet", "identity")

# --------------------------------------------------------------------------------------------------------------- videos


@dataclass(frozen=True)
class Item:
    """One video of one system, and what it is compared with."""
    name: str
    video: Path
    real: Path = None               # the real clip of this name
    reference: Path = None          # picture of the person; without it the first frame of the real clip, or of the video itself
    how: str = "as it is"           # "vae": encoded and decoded first; "frozen": its first frame all along


def squares(path, size):
    """Yields uint8 (size, size, 3) at 25 frames a second: the largest square in the middle."""
    for picture in read_video(Path(path)):
        height, width = picture.shape[:2]
        box = square_crop(width, height)
        same = (height, width) == (size, size)
        yield picture if same else np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS, box))


def as_written(frames, size):
    """Frames as they come out of the file that a generated video is kept in: H.264 leaves grain, a quarter more `sharpness` (LOG.md)."""
    with tempfile.TemporaryDirectory() as folder:
        writer = infer.Mp4Writer(path := Path(folder) / "vae.mp4", size, np.zeros(0, np.float32))
        writer.write(frames)
        writer.close()
        yield from squares(path, size)


def pieces(frames):
    """Frames -> uint8 (125, H, W, 3) as they come; a rest shorter than half of that joins the piece before it."""
    held, now = [], []
    for frame in frames:
        now.append(frame)
        if len(now) == PIECE:
            if held:
                yield np.stack(held)
            held, now = now, []
    if held and len(now) >= PIECE // 2:
        yield np.stack(held)
        held = []
    if held or now:
        yield np.stack(held + now)


def probe(path):
    """-> seconds of picture, seconds of sound (0: none), and remarks on what is unusual about the file."""
    with av.open(str(path)) as file:
        video, sound = file.streams.best("video"), file.streams.best("audio")
        if video is None:
            raise ValueError("no video in it")
        long = lambda s: float((s.duration or 0) * s.time_base) or (file.duration or 0) / 1e6
        seconds, rate, heard = long(video), float(video.average_rate or FPS), long(sound) if sound else 0
    notes = [f"{rate:.2f} frames a second, read as {FPS}"] if abs(rate - FPS) > 0.01 else []
    notes += ["no audio"] if not sound else [f"{heard:.2f} s of sound for {seconds:.2f} s of picture"] if abs(heard - seconds) > 0.2 else []
    return seconds, heard, notes


def sound_of(path, seconds):
    return read_audio(Path(path), int(np.ceil(seconds * FPS) + FPS) * HOP) / np.float32(32768)


# ----------------------------------------------------------------------------------------------------- one video, once


class Bench:
    """The networks that are there, the sums of their features by (system, metric, window), and frames for the contact sheet."""

    def __init__(self, args, notes):
        self.args, self.notes, self.sums, self.sheet, self.truths, self.half = args, notes, {}, {}, {}, None
        self.device, _ = infer.pick(args.device, "float32")
        paths = {kind: getattr(args, f"{kind}_weights") for kind in KINDS}
        for kind, path in paths.items():
            notes.append(f"{kind}: {path}, sha256 {metrics.check_file(path, kind)[:16]}" if path else
                         f"{kind.upper()} is left out: no --{kind}-weights given")
        make = {"fid": metrics.inception_features, "fvd": metrics.i3d_features, "syncnet": metrics.load_syncnet, "identity": metrics.arcface}
        self.net = {kind: make[kind](path, self.device) for kind, path in paths.items() if path}
        self.proxy = proxies.load_proxies(args.proxies, self.device)
        notes += [f"the {kind} proxy is left out: no {kind}.safetensors in {args.proxies}" for kind in proxies.CLASSES if kind not in self.proxy]
        self.vae = load_vae(args.weights, self.device) if args.weights else None
        self.ears = proxies.Ears(args.weights, self.device) if args.weights else None
        self.chunk = json.loads((Path(args.weights) / "config.json").read_text("utf-8")).get("frames", infer.CHUNK) if args.weights else infer.CHUNK
        notes += [] if self.vae else ["no --weights given: the VAE's bound is left out, seams are looked for between chunks of 81 frames"]

    def frames(self, item):
        frames = squares(item.video, self.args.size)
        if item.how == "frozen":
            first = next(frames)
            return (first for _ in squares(item.video, self.args.size))
        return as_written(proxies.vae_frames(self.vae, frames, self.chunk), self.args.size) if item.how == "vae" else frames

    def identity(self, frames, box):
        """-> what the identity networks see: {"identity": (T, 512), "proxy_identity": (T, 64)}, features (T, 96) or None."""
        out, features = {}, None
        if "identity" in self.net:
            out["identity"] = self.net["identity"](metrics.aligned(frames, box))
        if "identity" in self.proxy:
            out["proxy_identity"], features = proxies.read_identity(self.proxy["identity"], frames, box)
        return out, features

    def truth(self, item):
        """-> {"gap": true lip gap (N,), "phones"} of the real clip; for a long video without one, of the sidecar beside it."""
        path = item.real or item.video
        if path not in self.truths:
            curves = proxies.true_curves(path)
            gap = curves.get("gap")
            if gap is None and item.real and "face" in self.proxy:
                box = box_of(path)
                gap = np.concatenate([proxies.read_faces(self.proxy["face"], p, box)[0] for p in pieces(squares(path, self.args.size))])
            self.truths[path] = {"gap": gap, "phones": proxies.phones_of(path)}
        return self.truths[path]

    def add(self, system, metric, windows, features):
        keys = [(system, metric, window) for window in (None, *windows)] + ([(self.half, metric, None)] if self.half else [])
        for key in keys:
            self.sums.setdefault(key, metrics.Gaussian()).add(features)


def sync_row(bench, frames, sound, box):
    """-> figures of SyncNet and of its proxy, lip features of the proxy or None."""
    row, lips = {}, None
    nets = {"": bench.net.get("syncnet"), "proxy_": bench.proxy.get("sync")}
    for prefix, net in nets.items():
        if net is not None and len(sound) and len(frames) > 6:
            lips, heard = metrics.sync_features(net, frames, sound, box)
            s = metrics.sync_scores(lips, heard, padded=not prefix)             # the original pads; the proxy need not
            row |= {f"{prefix}{key}": s[key] for key in ("sync_c", "sync_d", "sync_now", "sync_offset")}
    return row, lips if nets["proxy_"] is not None else None


def measure_video(bench, system, item):
    """-> rows of its pieces, its own row. An error is a row with a note."""
    args, head = bench.args, {"system": system, "video": item.name}
    try:
        seconds, heard, notes = probe(item.video)
        silent = not heard and not item.real
        sound = np.zeros(0, np.float32) if silent else sound_of(item.video if heard else item.real, seconds)
        notes += ["the real clip's sound is used"] if not heard and len(sound) else []
        notes += ["no real clip of this name"] if not item.real else []
        truth, box = bench.truth(item), box_of(item.real or item.video)
        reference = next(squares(item.reference or item.real or item.video, args.size))[None]
        there = box_of(item.reference) if item.reference else box               # where the face is in the reference
        who, tint = bench.identity(reference, there)[0], metrics.colour(reference, there)
        rows, gaps, lids, before, start = [], [], [], None, 0
        for k, frames in enumerate(pieces(bench.frames(item))):
            voice = sound[start * HOP:(start + len(frames)) * HOP]
            windows = [t for t in WINDOWS if t * FPS == (k + 1) * PIECE and len(frames) >= PIECE]
            row, lips = sync_row(bench, frames, voice, box)
            row |= metrics.picture_row(frames, before, start, box, tint, bench.chunk, 0 if item.how == "vae" else args.continuity_frames)
            seen, features = bench.identity(frames[::args.every], box)
            row |= {key: float((vectors @ who[key][0]).mean()) for key, vectors in seen.items()}
            for metric, x in (("proxy_frechet", features), ("proxy_frechet_lips", lips)):
                if x is not None:
                    bench.add(system, metric, windows, x)
            for metric, x in (("fid", frames[::args.every]), ("fvd", frames)):
                if metric in bench.net and len(x) >= 16:
                    bench.add(system, metric, windows, bench.net[metric](x))
            if "face" in bench.proxy:
                gap, lid, face = proxies.read_faces(bench.proxy["face"], frames, box)
                gaps.append(gap), lids.append(lid)
                row["faces"] = float((face > 0.5).mean())
            bench.sheet.setdefault((item.name, system), {}).update(
                {t: frames[f - start] for t in SHEET if start <= (f := max(0, t * FPS - 1)) < start + len(frames)})
            rows.append(head | {"start": start / FPS, "frames": len(frames)} | row)
            before, start = frames[-1], start + len(frames)
        if not rows:
            raise ValueError("no frames")
    except Exception as error:                                                  # noqa: BLE001, a decoder trips over any rubbish: it is a row
        return [], head | {"note": f"not measured: {type(error).__name__}: {' '.join(str(error).split())[:150]}"}
    keys = [key for key in METRICS if any(key in r for r in rows)]
    video = head | {"frames": start} | {key: nanmean([r.get(key, np.nan) for r in rows]) for key in keys}
    if gaps:
        video |= proxies.whole_mouth(rows, np.concatenate(gaps), np.concatenate(lids), truth, sound)
        if system == "real" and truth["gap"] is not None and bench.ears and bench.ears.head:
            speech = proxies.speech_frames(truth["phones"], sound, n := min(start, len(truth["gap"])))
            video["mouth_heard"] = metrics.correlation(bench.ears.opening(sound, n, bench.chunk), truth["gap"][:n], speech)
        if video["faces"] < 0.5:
            notes.append(f"no face in {100 - 100 * video['faces']:.0f} % of the frames: what follows from the face means nothing")
        if truth["gap"] is not None and abs(len(truth["gap"]) - start) > 1:
            notes.append(f"{start} frames, {len(truth['gap'])} in the truth: the common part is compared")
    return rows, video | {"note": "; ".join(notes)}


# ---------------------------------------------------------------------------------------------------------- generation


def long_take(paths, first, seconds, bench):
    """The recordings of several clips, one after another -> sound (samples,), true gap (frames,) and phones, each None if a clip has none."""
    sound, gap, phones, frames = [], [], [], 0
    while frames < seconds * FPS:
        path = paths[(first + len(sound)) % len(paths)]
        truth = bench.truth(Item(path.stem, path, path))
        n = len(truth["gap"]) if truth["gap"] is not None else round(probe(path)[0] * FPS)
        sound.append(sound_of(path, n / FPS)[:n * HOP])
        gap.append(truth["gap"])
        said = truth["phones"]
        phones.append(said and [(s + frames / FPS, min(e, n / FPS) + frames / FPS, p) for s, e, p in said if s < n / FPS])
        frames += n
    n = round(seconds * FPS)
    return (np.concatenate(sound)[:n * HOP], None if any(g is None for g in gap) else np.concatenate(gap)[:n],
            sum(phones, []) if all(phones) else None)


def make_video(models, folder, name, picture, sound, steps, seed, args):
    """-> {"fps", "latency"}; writes folder/name.mp4."""
    begin, first, n = time.perf_counter(), None, 0
    writer, keep = infer.Mp4Writer(folder / f"{name}.mp4", models.size, sound), False
    try:
        for frames in infer.generate(models, pixels(picture[None])[:, :, 0], sound, steps, seed, args.continuity_frames, guidance=args.guidance,
                                     guidance_focus=args.guidance_focus, liveliness=args.liveliness):
            first = first or time.perf_counter() - begin
            writer.write(frames)
            n += len(frames)
        keep = True
    finally:
        writer.close(keep)
    return {"fps": n / (time.perf_counter() - begin), "latency": first}


def generate(args, paths, bench):
    """Every network speaks every clip's words with that clip's first frame; so it does with another clip's words, and in silence. -> folders"""
    if args.controls and len(paths) < 2:
        raise ValueError("--controls takes another clip's words: that needs two held-out clips")
    folders = []
    for network in args.networks:
        try:
            models = infer.load(args.weights, network, args.device)
        except FileNotFoundError as error:
            bench.notes.append(f"{network} is left out: {error}")
            continue
        if not models.trained:
            bench.notes.append(f"the {network} in {args.weights} is untrained: its videos are fog, and so are its figures")
        steps, jobs = args.teacher_steps if network == "teacher" else args.student_steps, []
        for k, path in enumerate(paths):                                        # seed + k: of one noise all would turn and blink alike
            sound = sound_of(path, n := probe(path)[0])[:round(n * FPS) * HOP]
            # half the list away: neighbours by name may say the same, GRID's spell their sentences
            other = np.resize(sound_of(p := paths[(k + len(paths) // 2) % len(paths)], probe(p)[0]), len(sound))
            controls = {f"{network}-other-sound": other, f"{network}-silence": sound * 0} if args.controls else {}
            jobs += [(system, path, path.stem, args.seed + k, heard, None) for system, heard in ({network: sound} | controls).items()]
        for k in range(args.long_videos if args.long else 0):
            sound, gap, phones = long_take(paths, k, args.long, bench)
            jobs.append((f"{network}-long", paths[k % len(paths)], f"long_{k}", args.seed + k, sound, {"gap": gap, "phones": phones}))
        timing = {}
        for system, path, name, seed, sound, truth in tqdm(jobs, f"generating, {network}", unit="video", disable=None):
            folder = args.out / "videos" / system
            folder.mkdir(parents=True, exist_ok=True)
            timing.setdefault(folder, {})[name] = make_video(models, folder, name, next(squares(path, models.size)), sound, steps, seed, args)
            if truth:                                                           # the truth of a long video lies beside it
                curves = {} if truth["gap"] is None else {"gap": truth["gap"]}
                np.savez(folder / f"{name}.npz", box=np.array(box_of(path)) * models.size, **curves)
                Image.fromarray(next(squares(path, models.size))).save(folder / f"{name}.png")
                write(folder / f"{name}.json", json.dumps({"identity": sidecar_text(path, "identity", path.stem), "phones": truth["phones"]}))
        for folder, rows in timing.items():
            write(folder / "timing.json", json.dumps(rows))
        folders += timing
    return folders


# ---------------------------------------------------------------------------------------------------------------- main


def held_out(folder, count):
    """The first `count` videos of a data folder that no training script has seen: data.py's "val"."""
    who = {path: sidecar_text(path, "identity", path.stem) for path in media_files(Path(folder), VIDEOS | PICTURES)}
    part = split_of(Path(folder), who)
    return [path for path in who if part[path] == "val" and path.suffix.lower() in VIDEOS][:count]


def list_systems(args, bench):
    """-> {system: [Item]}: real clips, their bounds, and every folder of generated videos (made first with --weights and --data)."""
    paths = held_out(args.data, args.clips) if args.data else media_files(args.real, VIDEOS)
    if not paths:
        raise ValueError(f"no {'held-out ' if args.data else ''}video in {args.data or args.real}")
    folders = [Path(f) for f in args.generated or generate(args, paths, bench)]
    real, pictures = {p.stem: p for p in paths}, {}
    for folder in [args.reference] if args.reference else folders:
        pictures[folder] = {p.stem: p for p in media_files(folder, PICTURES)}
    systems = {}
    for folder in folders:
        videos = media_files(folder, VIDEOS)
        if not videos:
            raise ValueError(f"no video in {folder}")
        known = pictures.get(args.reference or folder, {})
        systems[folder.resolve().name] = [Item(v.stem, v, real.get(v.stem), known.get(v.stem)) for v in videos]
    made = {item.name for items in systems.values() for item in items}
    some = [p for name, p in real.items() if name in made] or paths
    known = pictures.get(args.reference, {})
    clips = [Item(p.stem, p, p, known.get(p.stem)) for p in some]
    bounds = {"real": clips, "vae": [replace(i, how="vae") for i in clips] if bench.vae else [], "frozen": [replace(i, how="frozen") for i in clips]}
    return {name: items for name, items in (bounds | systems).items() if items}


def measure(args, bench):
    """-> rows of the pieces, rows of the videos."""
    systems, piece_rows, video_rows = list_systems(args, bench), [], []
    if clash := {"real", "vae", "frozen"} & {Path(f).resolve().name for f in args.generated or []}:
        raise ValueError(f"a folder of generated videos cannot be called {clash.pop()}: that name is a bound's")
    for system, items in systems.items():
        timing = items[0].video.parent / "timing.json"
        speed = json.loads(timing.read_text(encoding="utf-8")) if items[0].how == "as it is" and timing.is_file() else {}
        for k, item in enumerate(tqdm(items, f"measuring, {system}", unit="video", disable=None)):
            bench.half = f"real/{k % 2}" if system == "real" else None
            rows, video = measure_video(bench, system, item)
            piece_rows += rows
            video_rows.append(video | speed.get(item.name, {}))
    if not piece_rows:
        raise ValueError(f"no video could be measured: {video_rows[0].get('note')}")
    return piece_rows, video_rows


def build_report(args, argv, bench, piece_rows, video_rows):
    remarks = Counter((r["system"], r["note"]) for r in video_rows if r.get("note"))
    systems, drift = {}, {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in dict.fromkeys(r["system"] for r in video_rows):
            systems[name] = summarise(name, [r for r in video_rows if r["system"] == name], bench.sums)
            for t in WINDOWS:
                rows = [r for r in piece_rows if r["system"] == name and round(r["start"] * FPS) + PIECE == t * FPS and r["frames"] >= PIECE]
                if rows:
                    drift.setdefault(name, {})[str(t)] = summarise(name, rows, bench.sums, t)
    notes = [*bench.notes, *(f"{system}: {note} ({n} videos)" for (system, note), n in remarks.items())]
    notes += dict.fromkeys(str(w.message) for w in caught)
    return {"command": "python evaluate.py " + " ".join(map(str, argv)), "commit": commit(), "seed": args.seed, "systems": systems, "drift": drift,
            "machine": f"{bench.device}, {torch.get_num_threads()} threads, torch {torch.__version__}", "notes": notes}


def build_parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--generated", nargs="+", type=Path, metavar="DIR", help="folders of generated videos; a folder is a system, its name the column")
    p.add_argument("--real", type=Path, help="folder of the real videos, of the same names")
    p.add_argument("--reference", type=Path, help="folder of portraits, of the same names (default: first frames of the real videos)")
    p.add_argument("--weights", type=Path, help="folder of weights: generates with them, adds the VAE's bound, says how long a chunk is")
    p.add_argument("--data", type=Path, help="folder of clips: its held-out ones are generated and are the real ones")
    p.add_argument("--out", type=Path, default=Path("report"), help="where everything goes (default report)")
    p.add_argument("--networks", nargs="+", choices=["teacher", "student"], default=["teacher", "student"], help="which to generate with")
    p.add_argument("--clips", type=int, default=20, help="held-out clips to generate (default 20)")
    p.add_argument("--controls", action="store_true", help="generate with another clip's sound and in silence, too")
    p.add_argument("--long", type=float, default=0, help="seconds of a long video for the drift report: 600 (default none)")
    p.add_argument("--long-videos", type=int, default=1, help="how many of them (default 1)")
    p.add_argument("--teacher-steps", type=int, default=30, help="denoising steps of the teacher (default 30)")
    p.add_argument("--student-steps", type=int, default=4, help="... of the student (default 4)")
    p.add_argument("--guidance", type=float, default=4.0, help="audio guidance of the teacher (default 4)")
    p.add_argument("--guidance-focus", type=float, default=16.0, help="how narrowly, to where the sound is heard; 0: everywhere (default 16)")
    p.add_argument("--liveliness", type=float, default=1.4, help="factor on what else differs from the portrait, in noise (default 1.4; 1: none)")
    p.add_argument("--continuity-frames", type=int, default=9, help="frames handed from chunk to chunk; says where the seams are (default 9)")
    p.add_argument("--size", type=int, help="pixels along each side at which everything is measured (default: that of the weights, else 128)")
    p.add_argument("--every", type=int, default=5, help="every n-th frame goes into FID and identity (default 5)")
    p.add_argument("--proxies", type=Path, default=Path(__file__).parent / "weights" / "tiny" / "proxies", help="folder of the proxies")
    files = ("inception-2015-12-05.pt (TorchScript)", "i3d_torchscript.pt", "syncnet_v2.model", "ArcFace as .onnx or TorchScript")
    for kind, what in zip(KINDS, files):
        p.add_argument(f"--{kind}-weights", type=Path, metavar="FILE", help=f"official weights: {what}")
    p.add_argument("--seed", type=int, default=0, help="of the first clip's noise, the next one has the next (default 0)")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto: a GPU if there is one")
    return p


def run(args, argv):
    if bool(args.generated) == bool(args.data) or bool(args.generated) != bool(args.real) or args.data and not args.weights:
        raise ValueError("either --generated DIR --real DIR, or --weights DIR --data DIR")
    if min(args.clips, args.every, args.long_videos) < 1 or args.long < 0 or args.continuity_frames % 4 != 1:
        raise ValueError("--clips, --every and --long-videos must be at least 1, --long 0 or more, --continuity-frames 1, 5, 9 or 13")
    for folder in filter(None, [*(args.generated or []), args.real, args.data, args.reference]):
        if not folder.is_dir():
            raise FileNotFoundError(f"no such folder: {folder}")
    if args.size is None:
        config = args.weights / "config.json" if args.weights else Path()
        args.size = int(json.loads(config.read_text(encoding="utf-8")).get("size", 128)) if config.is_file() else 128
    if args.size < 32 or args.size % 8:
        raise ValueError(f"--size {args.size} must be 32, 40, 48, ...")
    begin = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(args, [])
    for note in bench.notes:
        print(f"note: {note}")
    piece_rows, video_rows = measure(args, bench)
    report = build_report(args, argv, bench, piece_rows, video_rows)
    write_json(args.out / "report.json", report)
    write(args.out / "report.md", markdown(report))
    write_csv(args.out / "pieces.csv", piece_rows)
    write_csv(args.out / "videos.csv", video_rows)
    plot(args.out / "drift.png", piece_rows)
    contact_sheet(args.out / "sheet.png", bench.sheet)
    print((args.out / "report.md").read_text(encoding="utf-8"))
    print(f"report: {args.out / 'report.md'}\nvideos: {len(video_rows)}\nsystems: {' '.join(report['systems'])}\n"
          f"minutes: {(time.perf_counter() - begin) / 60:.1f}\npeak_memory: {infer.peak_memory()}")


def main(argv=None):
    signal.signal(signal.SIGTERM, signal.default_int_handler)                   # kill is Ctrl-C
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train-proxies"]:
        return train_proxies.main(argv[1:])
    args = build_parser().parse_args(argv)
    try:
        run(args, argv)
    except (ValueError, OSError, av.error.FFmpegError, KeyboardInterrupt) as error:
        print(f"evaluate.py: {str(error) or 'stopped; videos generated so far are kept'}", file=sys.stderr)
        raise SystemExit(2 if str(error) else 130) from None


if __name__ == "__main__":
    main()
