"""data.py - a folder of talking-head videos -> clips, decoded once; and the paper's Appendix F as a command.

    python data.py cache CLIPS --size 128    decode every video once (the training scripts do it too)
    python data.py prepare RAW CLIPS         Eq. 18-22: raw footage -> clean clips and CLIPS/report.csv

A video of any size and rate becomes squares at 25 frames a second and 16 kHz mono sound: frame i shows the moment (i + 0.5) / 25 s after the first
picture, its sound is samples [640 i, 640 (i + 1)). ClipFolder keeps them as memory-mapped arrays, chunks.py cuts the tuples of Eq. 24 from them.
Pictures are silent clips of one frame: the VAE can train on them, chunks.py passes over them.
Left out: vocal separation (Eq. 23), hands over the face (DWPose), learned quality (DOVER).
"""
import argparse
import csv
import hashlib
import json
import signal
import sys
import tempfile
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

FPS, RATE, HOP = 25, 16000, 640              # frames a second, samples a second, samples a frame
HOLE, MAX_PIXELS = 60, 100_000_000           # seconds without a frame, pixels of a picture: more is damage or an attack
VIDEOS, PICTURES = {".mp4", ".mpg", ".mpeg", ".mov", ".avi", ".mkv", ".webm"}, {".jpg", ".jpeg", ".png", ".webp"}
FORMATS = "JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF"             # all that is opened: of others (EPS) Pillow would start programs
FACE_BOX = (0.24, 0.18, 0.76, 0.88)          # a face in its square, fractions of the side: x0 y0 x1 y1
warnings.filterwarnings("ignore", module=r"PIL\.")                        # what Pillow has to say on odd EXIF data


# ---------- one file -> squares at 25 fps and sound at 16 kHz (Eq. 20) ----------
def filtered(container, stream, *filters, begin=None):
    """Yields the frames of a stream after ffmpeg's filters, (name, options) each. They fill holes, the one after `begin` s, too: up to HOLE."""
    graph, video = av.filter.Graph(), stream.type == "video"
    stream.codec_context.thread_count = 1                # the parallel work is one file per worker
    source = (graph.add_buffer if video else graph.add_abuffer)(template=stream)
    sink = graph.add("buffersink" if video else "abuffersink")
    graph.link_nodes(source, *(graph.add(*item) for item in filters), sink).configure()
    for frame in chain(container.decode(stream), [None]):            # None: give out what is left inside
        if frame is not None:
            if frame.is_corrupt or None not in (begin, frame.time) and frame.time - begin > HOLE:
                raise ValueError(f"damaged {stream.type} at {frame.time} s")
            begin = frame.time
        graph.push(frame)
        with suppress(BlockingIOError, EOFError):        # until it wants the next frame
            while True:
                yield graph.pull()


def read_video(path):
    """Yields uint8 (H, W, 3) at 25 fps: picture i is the one on screen (i + 0.5) / 25 s after the first. Bad: ValueError, av's or Pillow's error."""
    if path.suffix.lower() in PICTURES:
        with Image.open(path, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels are too many")
            yield np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
        return
    with av.open(str(path)) as container:
        n, stream = 0, container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise ValueError("no video" + " of a known kind" * (stream is not None))
        even = ("setpts", "PTS-STARTPTS"), ("fps", f"{FPS}:round=near")
        square = "scale", f"iw*{stream.sample_aspect_ratio or 1}:ih"             # pixels
        for frame in filtered(container, stream, *even, square):
            n += 1                                       # and turned as a phone's file says
            yield np.rot90(frame.to_ndarray(format="rgb24"), round((frame.rotation or 0) / 90))
        if n / FPS < 0.9 * float((stream.duration or 0) * stream.time_base) - 0.1:
            raise ValueError(f"truncated: only {n / FPS:.2f} s can be decoded")


def read_audio(path, samples):
    """A video's sound from its first picture on, padded or cut, late starts and holes kept. -> int16 (samples,) at 16 kHz, or (0,) if it has none"""
    with av.open(str(path)) as container:
        zero = next(container.decode(container.streams.best("video"))).time or 0.0
    with av.open(str(path)) as container:
        even = ("asetpts", f"PTS-{zero}/TB"), ("aresample", f"{RATE}:async=1:first_pts=0")
        mono, stream = ("aformat", "sample_fmts=s16:channel_layouts=mono"), container.streams.best("audio")
        parts = [p.to_ndarray()[0] for p in filtered(container, stream, *even, mono, begin=zero)] if stream and stream.codec_context else []
    return np.concatenate([*parts, np.zeros(samples, np.int16)])[:samples if parts else 0]


def square_crop(width, height, box=None):
    """Eq. 20: the largest square in the middle, or one where box x0 y0 x1 y1 is as high as FACE_BOX, if there is room. -> x0, y0, x1, y1 in pixels"""
    side, x, y = min(width, height), width / 2, height / 2
    if box is not None:
        side = min(side, max(box[2] - box[0], box[3] - box[1]) / (FACE_BOX[3] - FACE_BOX[1]))
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    x0, y0 = min(max(x - side / 2, 0), width - side), min(max(y - side / 2, 0), height - side)
    return x0, y0, x0 + side, y0 + side


def face_mask(frames, mask, box, parser):
    """M of Eq. 23 for (N, H, W, 3): the given `mask` (N, h, w), `parser`'s or the ellipse in `box` (of the side 1). -> uint8 0/255 (N, H/4, W/4)"""
    side = frames.shape[1] // 4
    if mask is None and parser is None:
        ellipse = Image.new("L", (side * 8, side * 8))
        ImageDraw.Draw(ellipse).ellipse([v * side * 8 for v in box], fill=255)
        mask = [np.asarray(ellipse)] * len(frames)
    mask = [parser(frame) for frame in frames] if mask is None else mask
    if len(mask) != len(frames):
        raise ValueError(f"the sidecar has {len(mask)} masks for {len(frames)} frames")
    mask = [np.asarray(Image.fromarray(m).resize((side, side), Image.Resampling.BOX)) for m in mask]
    return (np.stack(mask) >= 128).astype(np.uint8) * 255


def decode(path, size, parser=None, faces=None):
    """A file -> frames uint8 (N, size, size, 3), audio int16 (640 N,) or (0,) if silent, mask uint8 (N, size/4, size/4). The crop: around the
    sidecar's face box, else the one `faces` mostly finds, else in the middle; a square file with a sidecar stays whole. Raises if it is bad."""
    sidecar, crop, frames, still = {}, None, bytearray(), path.suffix.lower() in PICTURES
    if path.with_suffix(".npz").exists():
        with open(path.with_suffix(".npz"), "rb") as file, np.load(file, allow_pickle=False) as npz:
            sidecar = {key: npz[key] for key in ("mask", "box") if key in npz}
    box = sidecar.get("box")
    if faces and not sidecar:                # one look every 2 s
        found = [face for face in map(faces, islice(read_video(path), 0, None, 2 * FPS)) if face is not None]
        box = np.median(found, axis=0) if found else None
    for picture in read_video(path):
        height, width = picture.shape[:2]
        crop = crop or square_crop(width, height, None if sidecar and width == height else box)
        frames += Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS, crop).tobytes()
    frames = np.frombuffer(frames, np.uint8).reshape(-1, size, size, 3)
    if len(frames) < (1 if still else 2):
        raise ValueError(f"{len(frames)} frames")
    audio = np.zeros(0, np.int16) if still else read_audio(path, len(frames) * HOP)
    box = FACE_BOX if box is None else [(v - crop[k % 2]) / (crop[2] - crop[0]) for k, v in enumerate(box)]
    return frames, audio, face_mask(frames, sidecar.get("mask"), box, parser)


# ---------- a folder of files -> clips, decoded once ----------
class Copy:
    """Pictures uint8 (N, H, W, ...), of each the same part cut out, mirrored in every other copy, and brought back to its size, in another light;
    slice by slice.

    What a face looks like is learnt from few faces by heart, with the place and the side they were filmed from; a copy is another face, up to a
    quarter wider or a sixth longer."""

    def __init__(self, pictures, clip):
        rng = np.random.default_rng([*clip.name.encode(), clip.copy])           # of every name its own, always the same
        sides = rng.uniform((0.8, 0.85), 1)                                     # width and height, of the picture's; the mouth stays inside
        place = rng.uniform(0, 1 - sides)
        gamma = rng.uniform(0.7, 1.4) * rng.uniform(0.9, 1.1, 3)                # of red, green and blue: brighter or darker, warmer or colder
        self.pictures, self.mirrored, self.size = pictures, clip.copy % 2 == 1, pictures.shape[2:0:-1]
        self.box = *(place * self.size), *((place + sides) * self.size)
        self.filter, self.light = Image.Resampling.BILINEAR, None               # a mask must not ring, and has no colours
        if pictures.ndim == 4:
            self.filter, self.light = Image.Resampling.LANCZOS, (255 * np.linspace(0, 1, 256) ** gamma[:, None]).round().ravel().tolist()

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, part):
        return self.cut(part, 0, 0, 1)

    def cut(self, part, top, left, side):
        """Of pictures[part] the square at (top, left), all in parts of a picture's side: what else is in them is never made."""
        left, (x0, y0, x1, y1) = 1 - left - side if self.mirrored else left, self.box
        box = x0 + left * (x1 - x0), y0 + top * (y1 - y0), x0 + (left + side) * (x1 - x0), y0 + (top + side) * (y1 - y0)
        looks = (Image.fromarray(np.array(p)).resize([round(side * n) for n in self.size], self.filter, box) for p in self.pictures[part])
        return np.stack([np.asarray(p.point(self.light) if self.light else p)[:, ::-1 if self.mirrored else 1] for p in looks])


@dataclass(frozen=True)
class Clip:
    """A decoded clip of N frames. Its arrays are opened at every access: no open files, cheap to send."""
    name: str                                # file name without its ending
    identity: str                            # "identity" of NAME.json, else the name
    path: Path                               # the video
    store: Path                              # the folder of its three arrays
    length: int                              # N
    copy: int = 0                            # 0: as it was filmed; 1, 2, ...: otherwise, see Copy
    frames = property(lambda self: self.pictures("frames"))                     # uint8 (N, H, W, 3)
    mask = property(lambda self: self.pictures("mask"))                         # uint8 (N, H/4, W/4)
    audio = property(lambda self: np.load(self.store / "audio.npy", mmap_mode="r"))    # int16 (640 N,), (0,)

    def pictures(self, what):
        array = np.load(self.store / f"{what}.npy", mmap_mode="r")
        return Copy(array, self) if self.copy else array


def keep_arrays(store, arrays):
    """name -> array, into store/NAME.npy. Written aside, then renamed: two processes may do one."""
    with tempfile.TemporaryDirectory(dir=store.parent, prefix=".part-") as part:
        new = Path(part) / store.name
        new.mkdir()
        for name, array in arrays.items():
            np.save(new / f"{name}.npy", array)
        with suppress(OSError):         # another process was quicker: its arrays are the same
            new.rename(store)


def cached(path, cache, size, parser=None, faces=None):
    """The folder in `cache` of a file's arrays; new file, sidecar or settings: decoded."""
    sidecar = path.with_suffix(".npz")
    stamps = [(f.stat().st_size, f.stat().st_mtime_ns) for f in (path, sidecar) if f.exists()]
    key = [1, str(path.resolve()), *stamps, size, *(getattr(f, "__qualname__", f) for f in (parser, faces))]
    final = cache / hashlib.sha256(repr(key).encode()).hexdigest()[:24]
    if not final.exists():
        keep_arrays(final, dict(zip(("frames", "audio", "mask"), decode(path, size, parser, faces), strict=True)))
    return final


def sidecar_text(path, key, default):
    """A value of NAME.json beside a file, as text, or `default` if there is none."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        value = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))[key]
        return default if value is None else str(value)
    return default


def media_files(folder, endings):
    """The files with one of the endings that lie directly in a folder, by name."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in endings and not p.name.startswith("."))


def split_of(folder, who):
    """Path -> "train", "val" or None for a folder's files (path -> identity), as split.json or split.tsv (here or, GRID's, in the parent) says, else
    by hash: 5 % of the identities, at least 1 of 2, are "val". Raises ValueError for a table of another form."""
    table = next(filter(Path.exists, (folder / "split.json", folder / "split.tsv", folder.parent / "split.tsv")), None)
    if table is None:
        rank = {x: int(hashlib.sha256(x.encode()).hexdigest()[:8], 16) / 2 ** 32 for x in who.values()}
        bar = max(0.05, min(rank.values())) if len(rank) > 1 else 0.0
        return {path: "val" if rank[x] <= bar else "train" for path, x in who.items()}
    try:
        text = table.read_text(encoding="utf-8")
        if table.suffix == ".json":              # [] + names: a word is no list of names
            part = {name: part for part, names in json.loads(text).items() for name in [] + names}
        else:
            part = {row["clip"]: row["split"] for row in csv.DictReader(text.splitlines(), delimiter="\t")}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{table} needs {{"train": [names], "val": [names]}} or columns clip, split') from error
    return {path: part.get(path.stem) for path in who}


class ClipFolder:
    """The clips of one or more folders as .clips (list of Clip) and .skipped (list of (file name, reason)). Beside a file, NAME.json ("identity")
    and NAME.npz ("mask" uint8 (N, h, w), "box" x0 y0 x1 y1 in pixels) are used; without them `parser`, picture -> mask uint8 (h, w), and `faces`,
    picture -> box or None. Raises FileNotFoundError for a missing folder, ValueError if no clip is left."""

    def __init__(self, folders, size=128, split="train", cache=None, need_audio=True, workers=1, parser=None, faces=None):
        if size % 8 or size < 16 or workers < 1 or split not in ("train", "val", "all"):
            raise ValueError(f"size {size} must be 16, 24, 32, ...; workers {workers} 1 or more; split {split} train, val or all")
        self.clips, self.skipped, jobs = [], [], []
        for folder in map(Path, [folders] if isinstance(folders, (str, Path)) else folders):
            who = {path: sidecar_text(path, "identity", path.stem) for path in media_files(folder, VIDEOS | PICTURES)}
            store, part = Path(cache or folder / f".cache-{size}"), split_of(folder, who)
            store.mkdir(parents=True, exist_ok=True)
            jobs += [(path, who[path], store) for path in who if split in ("all", part[path])]
            self.skipped += [(path.name, "in no split") for path in who if split != "all" and not part[path]]

        def load(job):
            path, identity, store = job
            try:
                store = cached(path, store, size, parser, faces)
                clip = Clip(path.stem, identity, path, store, len(np.load(store / "mask.npy", mmap_mode="r")))
                if need_audio and path.suffix.lower() in VIDEOS and not len(clip.audio):
                    raise ValueError("no audio")
                return clip
            except Exception as error:       # noqa: BLE001, a decoder trips over any rubbish: it is a row
                return path.name, f"{type(error).__name__}: {error}"

        with ThreadPoolExecutor(workers) as pool:
            for clip in tqdm(pool.map(load, jobs), "decoding", len(jobs), unit="file", disable=None):
                (self.clips if isinstance(clip, Clip) else self.skipped).append(clip)
        if not self.clips:
            raise ValueError(f"no {split} clip in {folders}; skipped: {self.skipped[:3]}")

    def report(self):
        """One line of totals and one for every skipped file."""
        minutes = sum(clip.length for clip in self.clips) / FPS / 60
        head = f"clips: {len(self.clips)}  minutes: {minutes:.1f}  skipped: {len(self.skipped)}"
        return "\n".join([head, *(f"  {name}: {why}" for name, why in self.skipped)])


# ---------- raw footage -> clean clips (Appendix F) ----------
LIMITS = {                                   # name: (1 at least, -1 at most, 0 a setting; default; meaning)
    "size": (0, 256, "side of the clips, pixels"), "longest": (0, 20.0, "longer scenes are divided, seconds"),
    "cut": (0, 5.0, "change between two frames that begins a new scene, grey levels"),
    "alike": (0, 0.95, "Eq. 19: two visual hashes closer than this are one video"), "seconds": (1, 3.24, "length, seconds; 3.24: 81 frames"),
    "rho": (1, 0.9, "share of frames with a face, Eq. 21"), "sharpness": (1, 30.0, "q of Eq. 22, here: median variance of the Laplacian at 128 px"),
    "frozen": (-1, 0.7, "share of frames like the one before"), "black": (-1, 0.1, "share of black frames"),
    "loudness": (1, -45.0, "root mean square of the sound, dB of full scale"), "clipping": (-1, 0.01, "share of samples at full scale"),
    "sync_c": (1, 3.0, "Sync-C, with --syncnet"), "sync_d": (-1, 10.0, "Sync-D, with --syncnet")}


def small_grey(frames, side):
    """uint8 (N, H, W, 3) -> grey levels float32 (N, side, side)"""
    small = [Image.fromarray(f).convert("L").resize((side, side), Image.Resampling.BOX) for f in frames]
    return np.stack([np.asarray(f, np.float32) for f in small])


def visual_hash(grey):
    """h(v) of Eq. 19: how nine moments of grey (N, 16, 16) differ from their mean. -> unit vector (2304,)"""
    nine = grey[np.linspace(0, len(grey) - 1, 9).astype(int)]
    return (nine - nine.mean(0)).ravel() / max(1e-6, np.linalg.norm(nine - nine.mean(0)))


def scenes_of(grey, cut, longest):
    """Eq. 20, one scene a clip: grey (N, 16, 16) -> (first, last + 1) of each. A cut: over `cut` and 4 x the change around it. Longer: divided."""
    change = np.abs(np.diff(grey, axis=0)).mean((1, 2))
    cuts = [f + 1 for f, c in enumerate(change) if c > max(cut, 4 * np.median(change[max(0, f - 12):f + 13]))]
    return [(int(part[0]), int(part[-1]) + 1) for scene in np.split(np.arange(len(grey)), cuts)
            for part in np.array_split(scene, -(-len(scene) // max(1, int(longest))))]


def measure(frames, audio, boxes):
    """Figures of Eq. 21-22: frames uint8 (T, H, W, 3), sound int16 (640 T,), face boxes of some frames (None: no face; []: no detector). -> dict"""
    g, sound = small_grey(frames, 128), audio / 32768
    edge = 4 * g[:, 1:-1, 1:-1] - g[:, 2:, 1:-1] - g[:, :-2, 1:-1] - g[:, 1:-1, 2:] - g[:, 1:-1, :-2]
    figures = {"seconds": len(frames) / FPS, "sharpness": np.median(edge.var((1, 2))),
               "frozen": np.sum(np.abs(np.diff(g, axis=0)).mean((1, 2)) < 0.1) / len(g),
               "black": np.mean(g.mean((1, 2)) < 16), "clipping": np.mean(np.abs(sound) > 0.999),
               "loudness": 10 * np.log10(np.mean(sound ** 2) + 1e-10)}
    return figures | ({"rho": np.mean([box is not None for box in boxes])} if boxes else {})       # Eq. 21


def failures(figures, limits):
    """Eq. 22: the conditions a clip does not meet, in words. What was not measured is not judged."""
    return [f"{key} {figures[key]:.3g} {'>' if sign < 0 else '<'} {limits[key]:g}" for key, (sign, *_) in
            LIMITS.items() if key in figures and sign * (figures[key] - limits[key]) < 0]


def face_detector():
    """A function uint8 (H, W, 3) -> box x0 y0 x1 y1 (brow to chin, pixels) of the largest face, or None: OpenCV 4's Haar cascade. Without it None."""
    try:
        import cv2
        model, cascade = cv2.data.haarcascades + "haarcascade_frontalface_default.xml", cv2.CascadeClassifier
    except (ImportError, AttributeError):
        return print("warning: no face detector: centred crops, faces not checked. For one: pip install 'opencv-python-headless<5'", file=sys.stderr)

    def haar_face(picture):
        scale = max(1, min(picture.shape[:2]) // 240)
        grey = np.asarray(Image.fromarray(picture).convert("L").reduce(scale))
        found = cascade(model).detectMultiScale(grey, 1.1, 4, minSize=(40, 40))
        x, y, w, _ = max(found, key=lambda box: box[2], default=(0, 0, 0, 0))
        return scale * np.array([x + 0.1 * w, y + 0.01 * w, x + 0.9 * w, y + 1.08 * w]) if w else None
    return haar_face


def write_mp4(path, frames, audio):
    """frames uint8 (T, S, S, 3) at 25 fps and sound int16 (640 T,) -> an H.264 + AAC file. One thread: the same bytes every time."""
    part = path.with_suffix(".part")
    with av.open(str(part), "w", format="mp4") as file:
        video = file.add_stream("libx264", FPS, options={"crf": "15", "preset": "veryfast", "threads": "1"})
        voice = file.add_stream("aac", RATE, layout="mono")
        video.width, video.height, video.pix_fmt, voice.bit_rate = frames.shape[2], frames.shape[1], "yuv420p", 96000
        for picture in frames:
            file.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        sound = av.AudioFrame.from_ndarray(audio[None], format="s16", layout="mono")
        sound.sample_rate, sound.time_base, sound.pts = RATE, Fraction(1, RATE), 0      # without a time it would begin late
        file.mux([*video.encode(), *voice.encode(sound), *voice.encode()])
    part.replace(path)


def prepare(src, dst, syncnet=None, **limits):
    """Eq. 18-22: the videos of folder `src` -> good clips in `dst`, a row for every scene in dst/report.csv.
    `syncnet`: function (frames, sound float32) -> (Sync-C, Sync-D). -> the rows; no "reason": it was kept"""
    limits = {key: value[1] for key, value in LIMITS.items()} | limits
    if limits["size"] % 8 or limits["size"] < 16 or not 0 < limits["longest"] < np.inf or limits.keys() - LIMITS:
        raise ValueError(f"size {limits['size']} must be 16, 24, ...; longest {limits['longest']} > 0; unknown: {limits.keys() - LIMITS or 'none'}")
    if not (files := media_files(src, VIDEOS)):
        raise ValueError(f"no video in {src}")
    if dst.is_dir() and media_files(dst, VIDEOS | {".npz"}):     # of an earlier run, or dst is src
        raise ValueError(f"{dst} holds clips already: give a new or empty folder")
    dst.mkdir(parents=True, exist_ok=True)
    rows, seen, faces = [], {}, face_detector()
    taken = Counter(text.casefold() for path in files for text in (path.stem, path.name))
    for path in tqdm(files, "preparing", unit="video", disable=None):
        base = path.stem if taken[path.stem.casefold()] == 1 else path.name      # if a.mov and a.mp4 are here
        try:
            frames, audio, _ = decode(path, limits["size"], None, faces)
            if not len(audio):
                raise ValueError("no audio")
        except Exception as error:           # noqa: BLE001, as in ClipFolder
            rows.append({"clip": base, "source": path.name, "reason": f"unreadable: {error!r}"})
            continue
        grey, who = small_grey(frames, 16), sidecar_text(path, "source", "")
        h = visual_hash(grey)                # Eq. 19: the first good one of the same source id or hash is kept
        twin = next((name for name, (id_, g) in seen.items() if id_ == who != "" or g @ h > limits["alike"]), None)
        for k, (a, b) in enumerate(scenes_of(grey, limits["cut"], limits["longest"] * FPS)):
            part, sound, name = frames[a:b], audio[a * HOP:b * HOP], f"{base}_{k:03d}"
            boxes = [faces(frame) for frame in part[::5]] if faces else []     # 5 times a second
            figures = measure(part, sound, boxes)
            reasons = [f"duplicate of {twin}"] if twin else failures(figures, limits)
            if syncnet and not reasons:
                try:
                    figures["sync_c"], figures["sync_d"] = syncnet(part, sound / np.float32(32768))
                    reasons = failures(figures, limits)
                except ValueError as error:                                     # too short to be judged
                    reasons = [str(error)]
            rows.append({"clip": name, "source": path.name, "start": a / FPS, "reason": "; ".join(reasons)} | figures)
            if not reasons:
                seen[path.name], identity = (who, h), sidecar_text(path, "identity", path.stem)
                text = {"identity": identity, "video": who or path.stem, "start": a / FPS}
                (dst / f"{name}.json").write_text(json.dumps(text), encoding="utf-8")
                if found := [box for box in boxes if box is not None]:
                    np.savez(dst / f"{name}.npz", box=np.float32(np.median(found, axis=0)))
                write_mp4(dst / f"{name}.mp4", part, sound)
    with open(dst / "report.part", "w", encoding="utf-8", newline="") as f:
        table = csv.DictWriter(f, ["clip", "source", "start", *(k for k in LIMITS if LIMITS[k][0]), "reason"])
        table.writeheader()
        table.writerows(rows)
    (dst / "report.part").replace(dst / "report.csv")
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    cache = commands.add_parser("cache", help="decode the videos and pictures of folders once")
    cache.add_argument("folders", nargs="+", help="folders with the files directly in them")
    cache.add_argument("--size", type=int, default=128, help="side of the squares, pixels (default 128)")
    cache.add_argument("--cache", help="where the arrays go (default FOLDER/.cache-SIZE)")
    cache.add_argument("--workers", type=int, default=1, help="files decoded at the same time (default 1)")
    clean = commands.add_parser("prepare", help="Appendix F: raw footage -> clean clips and report.csv")
    clean.add_argument("src", type=Path, help="folder of raw videos")
    clean.add_argument("dst", type=Path, help="folder for the clips and report.csv; must not hold clips yet")
    clean.add_argument("--syncnet", help="weights of a SyncNet that measures Sync-C and Sync-D (default none: not filtered)")
    for key, (sign, value, text) in LIMITS.items():
        text = f"{('', 'at least this ', 'at most this ')[sign]}{text} (default {value})"
        clean.add_argument(f"--{key.replace('_', '-')}", type=type(value), default=value, help=text)
    args = vars(parser.parse_args(argv))
    signal.signal(signal.SIGTERM, signal.default_int_handler)                # `kill` ends as Ctrl-C does: nothing half-written stays in the cache
    try:
        if args.pop("command") == "cache":
            return print(ClipFolder(split="all", **args).report())
        if args["syncnet"]:
            from metrics import syncnet_scorer  # here: metrics.py stands above this file
            args["syncnet"] = syncnet_scorer(args["syncnet"])
        else:
            print("no SyncNet given: Sync-C/D not filtered")
        rows = prepare(**args)
        kept = [row["seconds"] for row in rows if not row["reason"]]
        print(f"clips kept: {len(kept)} of {len(rows)}  minutes: {sum(kept) / 60:.1f}")
        why = Counter(reason.split()[0] for row in rows for reason in row["reason"].split("; ") if reason)
        print("rejected:", "  ".join(f"{reason} {n}" for reason, n in why.most_common()) or "none")
    except (OSError, ValueError, KeyboardInterrupt) as error:
        sys.exit(print(f"data.py: {str(error) or 'stopped'}", file=sys.stderr) or (130 if isinstance(error, KeyboardInterrupt) else 2))


if __name__ == "__main__":
    main()
