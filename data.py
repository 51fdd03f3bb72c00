"""A folder of clips -> chunks: what both training stages read. Appendix F, Eq. 20, 23 and 24.

    python data.py CLIPS --size 128     decode every file once; the stages do it too

    a file      of any size, rate and codec -> squares at 25 frames a second, 16 kHz mono sound.
                Frame i shows the moment (i + 0.5) / 25 s; its sound is samples [640 i, 640 (i + 1))
    a folder    -> ClipFolder: each file is decoded once, into memory-mapped arrays. A picture is a
                silent clip of one frame: the VAE can train on it, but it makes no chunk
    chunks      of T frames, cut from the clips, encoded once by the frozen VAE and audio encoder

prepare_data.py makes such a folder from raw footage (Eq. 18 to 22). The vocal separation of Eq. 23
is left out.

Shapes: N frames of a clip, T of a chunk, F = 1 + (T - 1) / 4 latent frames, C channels, H W pixels,
h w latent grid, K chunks of a clip, R reference pictures, L A audio layers and their width.
"""
import csv
import hashlib
import json
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from math import ceil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import tyro
from PIL import Image, ImageDraw
from tqdm import tqdm

from media import (  # noqa: F401  other files take these constants from here
    FPS,
    HOP,
    PICTURES,
    SAMPLE_RATE,
    VIDEOS,
    clip_names,
    media_files,
    note_unread,
    print_any_name,
    read_audio,
    read_video,
)

FACE_BOX = 0.24, 0.18, 0.76, 0.88               # a face: x0 y0 x1 y1, shares of the side

# ------------------------------------------------------------------------------------------- pixels


def to_tensor(frames):
    """uint8 (T, H, W, 3) -> float32 (1, 3, T, H, W) in [-1, 1]"""
    return torch.from_numpy(np.array(frames)).permute(3, 0, 1, 2)[None] / 127.5 - 1


def to_uint8(video):
    """(3, T, H, W) in [-1, 1] -> uint8 (T, H, W, 3), a NumPy array"""
    levels = ((video + 1) * 127.5).round().clamp(0, 255).byte()
    return levels.permute(1, 2, 3, 0).cpu().numpy()

# ------------------------------------------------------------------------------------------- a file


def square_crop(width, height, box=None):
    """Eq. 20: the square that is cut out of a picture -> x0, y0, x1, y1 in pixels.

    Without a face box (x0 y0 x1 y1, pixels) the largest in the middle; else one in which the box is
    as high as FACE_BOX and where FACE_BOX is, if there is room."""
    side = min(width, height)
    x, y = width / 2, height / 2                # the centre
    if box is not None:
        face = max(box[2] - box[0], box[3] - box[1])
        side = min(side, face / (FACE_BOX[3] - FACE_BOX[1]))
        x = (box[0] + box[2]) / 2
        y = (box[1] + box[3]) / 2 - ((FACE_BOX[1] + FACE_BOX[3]) / 2 - 0.5) * side
    x0 = min(max(x - side / 2, 0), width - side)
    y0 = min(max(y - side / 2, 0), height - side)
    return x0, y0, x0 + side, y0 + side


def face_mask(frames, mask, box):
    """M of Eq. 23: the face in frames (N, H, W, 3) -> uint8 0 or 255, (N, H/4, W/4).

    The given `mask` uint8 (N, h, w) if there is one, else the ellipse in `box` (shares of the
    side). ValueError for a mask of another length."""
    side = frames.shape[1] // 4
    if mask is None:
        ellipse = Image.new("L", (side * 8, side * 8))
        ImageDraw.Draw(ellipse).ellipse([v * side * 8 for v in box], fill=255)
        mask = [np.asarray(ellipse)] * len(frames)
    if len(mask) != len(frames):
        raise ValueError(f"the sidecar has {len(mask)} masks for {len(frames)} frames")
    small = [Image.fromarray(m).resize((side, side), Image.Resampling.BOX) for m in mask]
    return (np.stack([np.asarray(m) for m in small]) >= 128).astype(np.uint8) * 255


def sidecar_arrays(path):
    """What there is of "mask" and "box" in NAME.npz beside a file."""
    if not path.with_suffix(".npz").exists():
        return {}
    with open(path.with_suffix(".npz"), "rb") as file, np.load(file, allow_pickle=False) as npz:
        return {key: npz[key] for key in ("mask", "box") if key in npz}


def sidecar_text(path, key, default):
    """A value of NAME.json beside a file, as text, or `default` if there is none."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        value = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))[key]
        return default if value is None else str(value)
    return default


def median_face(path, faces):
    """The face box of a video, by one look every 2 s, or None. faces: picture -> box or None."""
    looks = islice(read_video(path), 0, None, 2 * FPS)
    found = [box for box in map(faces, looks) if box is not None]
    return np.median(found, axis=0) if found else None


def find_crop(path, faces=None):
    """Eq. 20: what is cut out of a file -> crop, box, sidecar.

    crop x0 y0 x1 y1 in pixels: around the sidecar's face box, else around the face that `faces`
    finds, else in the middle; a square file with a sidecar is not cropped. box: the face in shares
    of the crop's side. ValueError if there is no picture."""
    sidecar = sidecar_arrays(path)
    box = sidecar.get("box")
    if faces and not sidecar:
        box = median_face(path, faces)
    picture = next(read_video(path), None)
    if picture is None:
        raise ValueError("0 frames")
    height, width = picture.shape[:2]
    cropped_already = sidecar and width == height
    crop = square_crop(width, height, None if cropped_already else box)
    if box is None:
        box = FACE_BOX
    else:                                       # pixels -> shares of the square
        box = [(v - crop[k % 2]) / (crop[2] - crop[0]) for k, v in enumerate(box)]
    return crop, box, sidecar


def read_squares(path, size, crop):
    """Yields uint8 (size, size, 3), 25 a second: the crop of every picture."""
    for picture in read_video(path):
        square = Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS, crop)
        yield np.asarray(square)


def decode(path, size):
    """A file -> frames, audio, mask. Raises an error of some kind if it is bad.

    frames uint8 (N, size, size, 3), cropped as find_crop says; audio int16 (640 N,), or (0,) if
    silent; mask uint8 (N, size/4, size/4)."""
    still = path.suffix.lower() in PICTURES
    crop, box, sidecar = find_crop(path)
    pixels = bytearray()
    for square in read_squares(path, size, crop):
        pixels += square.tobytes()
    frames = np.frombuffer(pixels, np.uint8).reshape(-1, size, size, 3)
    if len(frames) < (1 if still else 2):
        raise ValueError(f"{len(frames)} frames")
    audio = np.zeros(0, np.int16) if still else read_audio(path, len(frames) * HOP)
    return frames, audio, face_mask(frames, sidecar.get("mask"), box)

# ----------------------------------------------------------------------------------------- a folder


@dataclass(frozen=True)
class Clip:
    """A decoded clip of N frames. Its arrays are opened at every access: no file stays open."""
    name: str                                   # file name without its ending
    identity: str                               # "identity" of NAME.json, else the name
    path: Path                                  # the video
    store: Path                                 # folder of frames.npy, mask.npy, audio.npy
    length: int                                 # N

    frames = property(lambda self: self.pictures("frames"))         # uint8 (N, H, W, 3)
    mask = property(lambda self: self.pictures("mask"))             # uint8 (N, H/4, W/4)

    @property
    def audio(self):                            # int16 (640 N,), or (0,) if silent
        return np.load(self.store / "audio.npy", mmap_mode="r")

    def pictures(self, what):
        """"frames" or "mask", as an array or as something that is indexed like one."""
        return np.load(self.store / f"{what}.npy", mmap_mode="r")


def save_arrays(store, arrays):
    """{name: array} -> store/NAME.npy. Written aside, then renamed: whole, or not there."""
    with tempfile.TemporaryDirectory(dir=store.parent, prefix=".part-") as part:
        new = Path(part) / store.name
        new.mkdir()
        for name, array in arrays.items():
            np.save(new / f"{name}.npy", array)
        with suppress(OSError):                 # another process was faster, with the same arrays
            new.rename(store)


def decode_once(path, cache, size, part=None):
    """The folder of a file's arrays in `cache`; new files, sidecars and settings are decoded.

    part: see divided."""
    files = [file for file in (path, path.with_suffix(".npz")) if file.exists()]
    stamps = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = [1, str(path.resolve()), *stamps, size, None, None]       # as in older caches
    key += [part] if part else []
    store = cache / hashlib.sha256(repr(key).encode()).hexdigest()[:24]
    if not store.exists():
        frames, audio, mask = decode(path, size)
        keep = divided(len(frames), part) if part else slice(None)
        sound = slice(*(HOP * end for end in (keep.start, keep.stop))) if part else keep
        save_arrays(store, {"frames": frames[keep], "audio": audio[sound], "mask": mask[keep]})
    return store


def divided(length, part):
    """A lone clip of `length` frames -> the slice that is "train" or "val": its last fifth.

    ValueError for the "val" of less than 10 s, all of which is "train"."""
    if length < 10 * FPS:
        if part == "val":
            raise ValueError(f"{length / FPS:.1f} s of one person: too short to hold out its end")
        return slice(0, length)
    first = length - max(81, length // 5)       # the paper's chunk, at least
    return slice(0, first) if part == "train" else slice(first, length)


def is_first_process():
    return not dist.is_initialized() or dist.get_rank() == 0


def read_split(table):
    """split.json or split.tsv -> {clip name: "train" or "val"}. ValueError for another form."""
    try:
        text = table.read_text(encoding="utf-8")
        if table.suffix == ".tsv":
            rows = csv.DictReader(text.splitlines(), delimiter="\t")
            return {row["clip"]: row["split"] for row in rows}
        split = {}
        for part, names in json.loads(text).items():
            if not isinstance(names, list):
                raise TypeError(f"{part} is no list")
            split |= dict.fromkeys(names, part)
        return split
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        form = '{"train": [names], "val": [names]} or columns clip, split'
        raise ValueError(f"{table} needs {form}") from error


def split_table(folder):
    """The file that divides a folder, or None. GRID has it in the parent."""
    tables = folder / "split.json", folder / "split.tsv", folder.parent / "split.tsv"
    return next(filter(Path.exists, tables), None)


def split_of(folder, identities):
    """{path: identity} of a folder's files -> {path: "train", "val" or None}.

    As split.json or split.tsv says. Without them by a hash of the identity: 5 % of the people, at
    least 1 of 2, are "val". Of one person these are the last clips by name: 5 % of them, at least
    1 of 2. A lone clip is "divided" in time."""
    table = split_table(folder)
    if table is not None:
        split = read_split(table)
        return {path: split.get(path.stem) for path in identities}
    rank = {}                                   # of each identity, in [0, 1)
    for name in identities.values():
        rank[name] = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2 ** 32
    if len(rank) <= 1:
        videos = sorted(path for path in identities if path.suffix.lower() in VIDEOS)
        last = videos[-ceil(0.05 * len(videos)):] if videos else []
        part = "divided" if len(videos) == 1 else "val"
        return {path: part if path in last else "train" for path in identities}
    bound = max(0.05, min(rank.values()))
    return {path: "val" if rank[name] <= bound else "train" for path, name in identities.items()}


class ClipFolder:
    """The clips of one or more folders: .clips, and .skipped [(file name, reason)].

    Beside a file, NAME.json ("identity") and NAME.npz ("mask" uint8 (N, h, w), "box" x0 y0 x1 y1 in
    pixels) are used. FileNotFoundError for a missing folder, ValueError if no clip is left."""

    def __init__(self, folders, size=128, split="train", cache=None, need_audio=True, workers=1):
        if size % 8 or size < 16 or workers < 1 or split not in ("train", "val", "all"):
            raise ValueError(f"size {size} must be 16, 24, 32, ...; workers {workers} 1 or more; "
                             f"split {split} train, val or all")
        folders = [folders] if isinstance(folders, (str, Path)) else folders
        self.clips, self.skipped, jobs, of_one_person = [], [], [], []
        for folder in map(Path, folders):
            files = media_files(folder, VIDEOS | PICTURES)
            identities = {path: sidecar_text(path, "identity", path.stem) for path in files}
            parts = split_of(folder, identities)
            store = Path(cache or folder / f".cache-{size}")
            store.mkdir(parents=True, exist_ok=True)
            for path, identity in identities.items():
                if split in ("all", parts[path]) or parts[path] == "divided":
                    in_time = parts[path] == "divided" and split != "all"
                    jobs.append((path, identity, store, split if in_time else None))
                elif not parts[path]:
                    self.skipped.append((path.name, "in no split"))
            if is_first_process() and split != "val":
                note_unread(folder)
            if len(set(identities.values())) == 1 and split_table(folder) is None:
                of_one_person.append(folder)

        def load(job):
            path, identity, store, part = job
            try:
                store = decode_once(path, store, size, part)
                length = len(np.load(store / "mask.npy", mmap_mode="r"))
                clip = Clip(path.stem, identity, path, store, length)
                if need_audio and path.suffix.lower() in VIDEOS and not len(clip.audio):
                    raise ValueError("no audio")
                return clip
            except Exception as error:          # a decoder can raise anything for a damaged file
                return path.name, f"{type(error).__name__}: {error}"

        with ThreadPoolExecutor(workers) as pool:
            done = pool.map(load, jobs)
            for clip in tqdm(done, "decoding", len(jobs), unit="file", disable=None):
                (self.clips if isinstance(clip, Clip) else self.skipped).append(clip)
        if not self.clips:
            names = " ".join(map(str, folders))
            raise ValueError(f"no {split} clip in {names}; skipped: {self.skipped[:3]}")
        for folder in of_one_person:
            held_out = any(clip.path.parent == folder for clip in self.clips)
            if is_first_process() and split == "val" and held_out:
                print(f"note: {folder} shows one person: the end is held out for validation",
                      file=sys.stderr)
        if self.skipped and is_first_process():
            name, why = self.skipped[0]
            total = len(self.skipped) + len(self.clips)
            print(f"note: {len(self.skipped)} of {total} files skipped: {name} ({why})"
                  + ", ..." * (len(self.skipped) > 1), file=sys.stderr)

    def report(self):
        """One line of totals and one for every skipped file."""
        minutes = sum(clip.length for clip in self.clips) / FPS / 60
        head = f"clips: {len(self.clips)}  minutes: {minutes:.1f}  skipped: {len(self.skipped)}"
        return "\n".join([head, *(f"  {name}: {why}" for name, why in self.skipped)])

# ------------------------------------------------------------------------------------------- chunks


@dataclass(frozen=True)
class Chunk:
    """One training chunk of a clip, Eq. 24: where its frames, mask and encodings lie.

    Reference picture j < R - 1 is the first frame of chunk j; the last is the clip's last frame."""
    clip: Clip
    store: Path                                 # folder of the clip's encodings, see encode_clip
    row: int                                    # which of the clip's K chunks
    start: int                                  # its first frame
    length: int                                 # T
    pictures: tuple                             # frame numbers of the R reference pictures

    name = property(lambda self: f"{self.clip.name}@{self.start}")

    def array(self, what):
        """"latents", "identity" or "audio" of the whole clip, see encode_clip."""
        return np.load(self.store / f"{what}.npy", mmap_mode="r")

    def tensor(self, what, row):
        """One row of array(what), float32."""
        return torch.from_numpy(self.array(what)[row].astype(np.float32))


def chunk_starts(length, T, step, offsets):
    """First frames of a clip's chunks: `step` apart, and again `offsets` - 1 times, in between."""
    starts = []
    for offset in range(offsets):
        starts += range(offset * step // offsets, length - T + 1, step)
    return list(dict.fromkeys(starts))          # none twice


def chunk_grid(clip, store, cfg):
    """Eq. 24: the chunks of a clip, a list of Chunk; empty if it is silent or too short.

    Neighbours share n = cfg.continuity_frames. The VAE is causal, so kappa_gt, the encoding of
    those n frames alone, is the first 1 + (n - 1) / 4 latents of the later chunk. A clip of less
    than cfg.frames is one chunk of its own length, 4k + 1."""
    T = min(cfg.frames, (clip.length - 1) // 4 * 4 + 1)
    if T <= cfg.continuity_frames or not len(clip.audio):       # nothing would be left to generate
        return []
    starts = chunk_starts(clip.length, T, cfg.frames - cfg.continuity_frames, cfg.offsets)
    pictures = *starts[:cfg.references], clip.length - 1
    return [Chunk(clip, store, row, start, T, pictures) for row, start in enumerate(starts)]


def chunks_left(chunk, cfg):
    """How many chunks follow one another from here, this one included."""
    after = chunk.clip.length - chunk.length - chunk.start
    return 1 + after // (cfg.frames - cfg.continuity_frames)


def to_half(rows):
    return torch.cat(rows).half().cpu().numpy()


@torch.no_grad()
def encode_audio(chunks, audio_encoder):
    """The chunks of a clip -> float16 (K, T, L, A). No chunk depends on the sound after its end."""
    sound = np.array(chunks[0].clip.audio) / np.float32(32768)
    return to_half([audio_encoder.features(sound, c.start, c.length)[None] for c in chunks])


@torch.no_grad()
def encode_clip(chunks, vae, audio_encoder, identity_reference, device="cpu", bf16=False):
    """The chunks of a clip -> {name: float16 array}: what infer.py would compute, rounded.

    latents   (K, C, F, h, w)   z = E(V) of each chunk
    identity  (R, C, F, h, w)   z_id of each reference picture (Eq. 3)
    audio     (K, T, L, A)      hidden states of the audio encoder"""
    frames, T = chunks[0].clip.frames, chunks[0].length

    def encode(start):
        return vae.encode(to_tensor(frames[start:start + T]).to(device))        # (1, C, F, h, w)

    def encode_reference(i):
        image = to_tensor(frames[i:i + 1])[:, :, 0].to(device)                  # (1, 3, H, W)
        return identity_reference(vae, image, T)                                # (1, C, F, h, w)

    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
        latents = [encode(chunk.start) for chunk in chunks]
        identity = [encode_reference(i) for i in chunks[0].pictures]
    return {"latents": to_half(latents), "identity": to_half(identity),
            "audio": encode_audio(chunks, audio_encoder)}


def fingerprint(*models):
    """A hash of networks' weights: chunks that other weights encoded are other chunks."""
    weights = hashlib.sha256()
    for model in models:
        for name, tensor in model.state_dict().items():
            weights.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
    return weights.hexdigest()[:16]


def training_set_hash(chunks, weights):
    """A hash of what a run learns from: its chunks, and how often each is drawn."""
    names = [f"{chunk.store.name}@{chunk.row}" for chunk in chunks]
    return hashlib.sha256(repr([names, list(weights)]).encode()).hexdigest()[:16]


def encode_clips(clips, vae, audio_encoder, identity_reference, cache, cfg, device="cpu", rank=0,
                 world=1):
    """Clips -> list of Chunk. Those that the folder `cache` does not hold yet are encoded.

    identity_reference(vae, image, frames) is tre.temporal_reference_encoding. cfg: frames,
    continuity_frames, offsets, references, encode_bf16. A killed run goes on where it was; under
    torchrun each of `world` processes encodes its share. ValueError if there is no chunk."""
    key = [5, fingerprint(vae.encoder, vae.conv1), fingerprint(audio_encoder.model),
           vae.config.latents_mean, vae.config.latents_std, identity_reference.__qualname__,
           cfg.frames, cfg.continuity_frames, cfg.offsets, cfg.references, cfg.encode_bf16]
    if audio_encoder.window:                        # other features from the same weights
        key.append(audio_encoder.window)
    cache.mkdir(parents=True, exist_ok=True)
    chunks, jobs = [], []
    for number, clip in enumerate(clips):
        of_clip = repr([*key, clip.store.name, clip.length])
        store = cache / hashlib.sha256(of_clip.encode()).hexdigest()[:24]
        found = chunk_grid(clip, store, cfg)
        chunks += found
        if found and number % world == rank and not store.exists():
            jobs.append(found)
    if not chunks:
        least = cfg.continuity_frames + 3
        raise ValueError(f"none of {len(clips)} clips has sound and more than {least} frames")
    no_bar = None if rank == 0 else True        # None: tqdm draws its bar in a terminal only
    for job in tqdm(jobs, "encoding", unit="clip", disable=no_bar):
        arrays = encode_clip(job, vae, audio_encoder, identity_reference, device, cfg.encode_bf16)
        save_arrays(job[0].store, arrays)
    if world > 1:
        dist.barrier()
    return chunks


def collate(rows, device):
    """Rows of one length -> the same names with a batch axis; "chunk" stays a list."""
    batch = {key: [row[key] for row in rows] for key in rows[0]}
    return {k: v if k == "chunk" else torch.stack(v).to(device) for k, v in batch.items()}


def one_per_folder(args, *names, folders="data"):
    """ValueError if an option of these names is given without a value for each folder of --data."""
    count = len(getattr(args, folders))
    for name in names:
        values = getattr(args, name)
        if values and len(values) != count:
            raise ValueError(f"--{name} has {len(values)} values for the {count} folders "
                             f"of --{folders}")


def names_of(folders):
    """The names of folders, by which their figures are kept. ValueError if two are the same."""
    names = [Path(folder).resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"two of the folders have the same name: {' '.join(names)}")
    return names

# --------------------------------------------------------------------------------------------- main


@dataclass
class Config:
    folders: tyro.conf.Positional[tuple[Path, ...]]     # folders with the files directly in them
    size: int = 128                             # side of the squares, pixels
    cache: Path | None = None                   # where the arrays go; default FOLDER/.cache-SIZE
    workers: int = 1                            # files that are decoded at the same time


def main(argv=None):
    cfg = tyro.cli(Config, args=argv, description=__doc__)
    print_any_name()
    for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):       # kill is Ctrl-C
        signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        if not cfg.folders:
            raise ValueError("name one or more folders of clips")
        print(ClipFolder(split="all", **asdict(cfg)).report())
    except (OSError, ValueError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("data.py: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
