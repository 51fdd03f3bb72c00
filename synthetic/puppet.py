"""Portraits + speech -> synthetic talking-head clips: training needs no footage of real people.

A puppet is a still portrait that is animated by hand-made rules; nothing here is learnt. The phones
of a recording move its mouth (phones.py), smooth random motion its head, eyes and brows
(motion.py), and the portrait is warped by its face mesh (warp.py).

    python -m synthetic.puppet --out DIR --clips 20         painted faces, no downloads
    python -m synthetic.puppet --portraits DIR --speech DIR --out DIR --clips 300 --workers 2

Result: NAME.mp4 (25 fps, 16 kHz), NAME.json (who speaks, which phones), NAME.npz (per frame: face
mask, mouth, pose, blinks), and split.json (held-out faces and speakers). A second run makes only
what is missing.
Portraits: a folder of pictures, with portraits.npz in it or beside it: name, lm (n, 468, 3) in
pixels, gap (between the lips, eye distances), yaw, pitch (degrees), eye_open (height / width).
Speech: a folder of SPEAKER-*.flac, 16 kHz mono, with phone files (phones.py) beside them or in
../phones.
"""
import json
import os
import signal
import time
import zlib
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import torch
import tyro
from tqdm import tqdm

from common import one_line_errors, write_aside, write_mp4
from data import FPS, HOP, SAMPLE_RATE
from synthetic.faces import NPZ_ERRORS, Face, alike, can_move, jitter, morph, read_portraits
from synthetic.mesh import OVAL
from synthetic.motion import coefficients, random_motion
from synthetic.phones import GAP, KEYS, mouth_curves, read_phones
from synthetic.warp import Puppet

SPEECH = Path(__file__).resolve().parent.parent / "assets" / "speech"
WIDEST_GAP = 0.12               # of a portrait's lips that warp.py can close, eye distances
DRAWN_FACES = 400               # to choose from; fixed, or more clips would change the first ones
VAL_EVERY = 12                  # every 12th clip is for validation, from the 6th on
HELD_OUT = 0.08                 # share of faces and of speakers
PLANNED = ("identity", "speaker", "seed", "size", "frames")     # what two plans can differ in


@dataclass
class Config:
    out: Path                           # folder for the clips
    portraits: str = "drawn"            # folder of portraits, or `drawn`: painted ones
    speech: Path = SPEECH               # folder of *.flac with phone files
    # number of clips in the end; counts those already there, and both parts (see part)
    clips: int = 100
    seconds: float = 15.36              # length of a clip; 15 s hold 15 chunks of 33 frames
    part: Literal["all", "train", "val"] = "all"    # make only this part of the plan
    # which portraits: lips apart from A to below B, eye distances
    lip_gap: tuple[float, float] = (0.0, WIDEST_GAP)
    size: int = 256                     # pixels of the square frame, a multiple of 8
    seed: int = 0                       # decides everything: same seed, same clips
    workers: int = 1                    # processes; the clips do not depend on it


def check(cfg):
    """ValueError for values that make no clips."""
    if min(cfg.clips, cfg.workers) < 1 or cfg.seed < 0:
        raise ValueError("need --clips, --workers >= 1, --seed >= 0")
    if not 1 <= cfg.seconds <= 3600:
        raise ValueError("need --seconds 1-3600")
    if cfg.size < 32 or cfg.size % 8:
        raise ValueError("need --size 32, 40, 48, ...")
    low, high = cfg.lip_gap
    if not 0 <= low < high <= WIDEST_GAP:
        raise ValueError(f"--lip-gap must rise, from 0 to {WIDEST_GAP}: "
                         "wider gaps cannot be closed")


# ----------------------------------------------------------------------------------------- speech
def read_speech(folder):
    """{speaker: [(flac, phone file)]}. Raises FileNotFoundError if no recording has phones."""
    speakers = {}
    for flac in sorted(folder.glob("*.flac")):
        places = (flac.with_suffix(".tsv"), folder.parent / "phones" / f"{flac.stem}.tsv")
        phones = next((path for path in places if path.is_file()), None)
        if phones:
            speaker = flac.stem.split("-")[0]
            speakers.setdefault(speaker, []).append((flac, phones))
    if not speakers:
        message = f"no *.flac with phones (NAME.tsv beside it or in ../phones) in {folder}"
        raise FileNotFoundError(message)
    return speakers


def read_recording(flac):
    """-> (samples,) float32. Raises ValueError for what is not 16 kHz mono."""
    try:
        wave, rate = soundfile.read(flac, dtype="float32")
    except soundfile.SoundFileError as error:
        raise ValueError(str(error)) from None
    if rate != SAMPLE_RATE or wave.ndim != 1 or not len(wave):
        raise ValueError(f"{flac} is empty or not 16 kHz mono")
    return wave


def draw_start(rng, phones, seconds):
    """Where a clip begins in a recording: at 0 s or in the middle of some pause."""
    pauses = [(start + end) / 2 for start, end, label in phones
              if label == "sil" and end - start > 0.1 and end < seconds - 2]
    return round(float(rng.choice([0.0, *pauses])), 2)


def assemble_speech(rng, recordings, frames):
    """One speaker's recordings, from some pause on, one after another with short pauses.

    Returns audio (frames * 640,) float32, phones [(start s, end s, label)], and pieces
    [(file, start in it s, place in the clip s)].
    """
    audio = np.zeros(frames * HOP, np.float32)
    phones = []
    pieces = []
    filled = 0                                                  # samples
    order = rng.permutation(len(recordings))
    while filled < len(audio):
        flac, phone_file = recordings[order[len(pieces) % len(order)]]
        wave = read_recording(flac)
        spoken = read_phones(phone_file)
        start = 0.0 if pieces else draw_start(rng, spoken, len(wave) / SAMPLE_RATE)
        now = filled / SAMPLE_RATE
        piece = wave[round(start * SAMPLE_RATE):][:len(audio) - filled]
        audio[filled:filled + len(piece)] = piece
        pieces.append((flac.name, start, round(now, 4)))
        phones += [(max(a - start, 0) + now, b - start + now, label)
                   for a, b, label in spoken if b > start]
        filled += len(piece)

        pause = round(rng.uniform(0.3, 0.9) * SAMPLE_RATE)
        room_noise = 2 * np.sort(np.abs(wave))[len(wave) // 10]
        silence = audio[filled:filled + pause]
        silence[:] = room_noise * rng.standard_normal(len(silence))
        phones.append((filled / SAMPLE_RATE, (filled + pause) / SAMPLE_RATE, "sil"))
        filled += pause
    audio *= 0.1 * 10 ** rng.uniform(-0.3, 0.1) / (np.sqrt((audio ** 2).mean()) + 1e-6)
    end = frames / FPS
    phones = [(a, min(b, end), label) for a, b, label in phones if a < end]
    return np.clip(audio, -1, 1), phones, pieces


def speech_energy(audio, frames):
    """Loudness per frame in [0, 1], smoothed over about 0.2 s. audio: (frames * 640,)."""
    rms = np.sqrt((audio.reshape(frames, -1) ** 2).mean(1))
    energy = np.clip(rms / (np.percentile(rms, 95) + 1e-6), 0, 1)
    window = np.array([1, 3, 5, 6, 5, 3, 1]) / 24
    return np.convolve(np.pad(energy, 3, "edge"), window, "valid")


# ------------------------------------------------------------------------------------------- plan
@dataclass
class ClipPlan:
    """All that decides one clip."""
    index: int
    out: Path
    seed: int
    size: int
    frames: int
    faces: list             # of one Face, or of two that are morphed
    weight: float           # of the second face
    mirror: bool
    speaker: str
    recordings: list

    @property
    def name(self):
        return f"puppet_{self.index:05d}"

    @property
    def identity(self):
        names = "+".join(face.name for face in self.faces)
        return names + (f"@{self.weight}" if self.weight else "")

    @property
    def yaw(self):
        """How far the face is turned, rad."""
        weights = (1 - self.weight, self.weight)
        return np.deg2rad(sum(f.yaw * w for f, w in zip(self.faces, weights)))


def divide(items, name, rng):
    """Split items into (held out, the rest), each shuffled. Held out: the lowest 8 % of all hashes.

    A hash depends on the name alone. If the seed or the other items mattered, one folder would
    train on a face that another one holds out. If no hash is that low, the lowest is held out.
    """
    hashes = {name(item): zlib.crc32(name(item).encode()) for item in items}
    items = sorted(items, key=lambda item: hashes[name(item)])
    count = sum(value < HELD_OUT * 2 ** 32 for value in hashes.values())
    count = min(max(count, 1), len(items) - 1)
    parts = items[:count], items[count:]
    return [[part[i] for i in rng.permutation(len(part))] for part in parts]


def plan_clip(cfg, index, count, faces, speakers, recordings):
    """Plan one clip. count: how many clips of its part of the split come before it.

    A face that has look-alikes among `faces` is morphed with one of them in half of its clips.
    """
    rng = np.random.default_rng([cfg.seed, index, 0])
    face = faces[count % len(faces)]
    order = rng.permutation(len(faces))
    look_alikes = [faces[i] for i in order if alike(face, faces[i])]
    chosen, weight = [face], 0.0
    if look_alikes and rng.random() < 0.5:
        chosen = [face, look_alikes[0]]
        weight = round(rng.uniform(0.3, 0.7), 2)
    speaker = speakers[count % len(speakers)]
    return ClipPlan(
        index=index,
        out=cfg.out,
        seed=cfg.seed,
        size=cfg.size,
        frames=round(cfg.seconds * FPS),
        faces=chosen,
        weight=weight,
        mirror=bool(rng.random() < 0.5),
        speaker=speaker,
        recordings=recordings[speaker],
    )


def plan(cfg, faces, recordings):
    """Decide clip k from the seed and k alone: more clips leave the first ones as they are.

    recordings: see read_speech. Every 12th clip is for validation, with faces and speakers of its
    own. Returns ([ClipPlan], {"train": [name], "val": [name]}).
    """
    rng = np.random.default_rng(cfg.seed)
    val_faces, train_faces = divide(faces, lambda face: face.name, rng)
    val_speakers, train_speakers = divide(recordings, str, rng)
    pools = {"train": (train_faces, train_speakers), "val": (val_faces, val_speakers)}
    plans = []
    split = {"train": [], "val": []}
    for k in range(cfg.clips):
        is_val = k % VAL_EVERY == 5 and val_faces and val_speakers
        part = "val" if is_val else "train"
        clip = plan_clip(cfg, k, len(split[part]), *pools[part], recordings)
        plans.append(clip)
        split[part].append(clip.name)
    return plans, split


# ------------------------------------------------------------------------------------------ clips
def choose_face(rng, clip):
    """-> image, points, and the weight of the second face as used."""
    loaded = [face.load() for face in clip.faces]
    face, weight = loaded[0], 0.0
    if len(loaded) == 2:
        morphed = morph(*loaded, clip.weight)
        if can_move(*morphed):                  # else its mouth line is lost: the first face alone
            face, weight = morphed, clip.weight
    jittered = jitter(rng, *face)
    image, points = jittered if can_move(*jittered) else face
    return image, points, weight


def make_clip(clip):
    """Make the files of one ClipPlan. Runs in a worker process."""
    torch.set_num_threads(1)
    rng = np.random.default_rng([clip.seed, clip.index, 1])
    frames, size = clip.frames, clip.size
    image, points, weight = choose_face(rng, clip)
    audio, phones, pieces = assemble_speech(rng, clip.recordings, frames)
    mouth = mouth_curves(phones, frames)
    motion = random_motion(rng, frames, speech_energy(audio, frames), clip.yaw)
    articulation = rng.uniform(0.85, 1.2)
    puppet = Puppet(image, points, size)
    video, mask, gap = puppet.render(coefficients(mouth, motion, articulation))

    pose = np.stack([motion[name] for name in ("yaw", "pitch", "roll", "tx", "ty")], 1)
    x0, y0 = points[OVAL, :2].min(0) * size / len(image)
    x1, y1 = points[OVAL, :2].max(0) * size / len(image)
    if clip.mirror:
        video, mask = video[:, :, ::-1], mask[:, :, ::-1]
        pose = pose * [-1, 1, -1, -1, 1]
        x0, x1 = size - x1, size - x0
    arrays = dict(mouth=mouth, opening=np.clip(gap / GAP, 0, 1), gap=gap, pose=pose,
                  blink=motion["eyelid"], box=[x0, y0, x1, y1])
    arrays = {name: np.asarray(value, np.float32) for name, value in arrays.items()}
    about = {name: getattr(clip, name) for name in PLANNED} | dict(
        mirror=clip.mirror,
        fps=FPS,
        recording=pieces[0][0],
        start=pieces[0][1],
        portraits=[[f.name, w] for f, w in zip(clip.faces, (round(1 - weight, 2), weight))],
        mouth=KEYS,
        pieces=pieces,
        phones=[(round(a, 3), round(b, 3), label) for a, b, label in phones],
    )
    write_clip(clip, video, audio, arrays | dict(mask=mask), about)


def write_clip(clip, video, audio, arrays, about):
    """Write NAME.npz, .json and .mp4: the mp4 last, so a clip that has one is complete.

    They are made under hidden names, which data.py passes over, and then renamed.
    """
    done = clip.out / clip.name
    part = clip.out / f".{clip.name}"
    np.savez_compressed(part.with_suffix(".npz"), **arrays)
    text = json.dumps(about, ensure_ascii=False)
    part.with_suffix(".json").write_text(text, encoding="utf-8")
    samples = (audio * 32767).round().astype(np.int16)
    write_mp4(part.with_suffix(".mp4"), video, samples)
    done.with_suffix(".mp4").unlink(missing_ok=True)    # no old video stands under new labels
    for end in (".npz", ".json", ".mp4"):
        os.replace(part.with_suffix(end), done.with_suffix(end))


def is_made(clip):
    """Whether the files of a ClipPlan are there, and made by this plan."""
    path = clip.out / clip.name
    if not all(path.with_suffix(end).is_file() for end in (".mp4", ".json", ".npz")):
        return False
    try:
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return all(about.get(name) == getattr(clip, name) for name in PLANNED)
    except (ValueError, AttributeError):
        raise ValueError(f"{path}.json does not describe a clip: remove it") from None


# ------------------------------------------------------------------------------------------- main
def report_motion(plans):
    """Print how much the clips move. Raises ValueError for a broken NAME.npz."""
    rows = []
    for path in (clip.out / f"{clip.name}.npz" for clip in plans):
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                rows.append([arrays[name] for name in ("pose", "blink", "gap")])
        except NPZ_ERRORS as error:
            raise ValueError(f"{path} is broken ({error}): remove it and run again") from None
    pose, blink, gap = (np.concatenate(column) for column in zip(*rows))
    blinks = sum(int((np.diff((curve > 0.5).astype(int)) == 1).sum()) for _, curve, _ in rows)

    def spread(values, form):
        percents = (5, 25, 50, 75, 95)
        return ", ".join(f"{p} % {np.percentile(values, p):{form}}" for p in percents)

    for i, name in enumerate(("yaw", "pitch", "roll")):
        print(f"{name}_degrees: {spread(np.rad2deg(pose[:, i]), '.1f')}")
    print(f"shift_eye_distances: {spread(np.hypot(pose[:, 3], pose[:, 4]), '.3f')}")
    print(f"blinks_per_minute: {blinks / len(blink) * FPS * 60:.1f}")
    print(f"gap_eye_distances: {spread(gap, '.3f')}")
    print(f"lips_closed_share: {(gap < 0.01).mean():.3f}")


def make_all(plans, workers):
    progress = dict(total=len(plans), unit="clip", desc="puppets")
    if workers == 1:
        list(tqdm(map(make_clip, plans), **progress))
        return
    ignore_ctrl_c = (signal.SIGINT, signal.SIG_IGN)             # it is for the parent
    with get_context("spawn").Pool(workers, signal.signal, ignore_ctrl_c) as pool:
        list(tqdm(pool.imap_unordered(make_clip, plans), **progress))


def run(cfg):
    """Plan, make what is missing, report. Raises OSError or ValueError for bad input."""
    check(cfg)
    recordings = read_speech(cfg.speech)
    if cfg.portraits == "drawn":
        faces = [Face(f"drawn{cfg.seed}_{i}", seed=[cfg.seed, i]) for i in range(DRAWN_FACES)]
    else:
        faces = read_portraits(Path(cfg.portraits), cfg.lip_gap)
    plans, split = plan(cfg, faces, recordings)
    if cfg.part != "all":
        plans = [clip for clip in plans if clip.name in split[cfg.part]]
    if not plans:
        raise ValueError(f"--part {cfg.part}: none of {cfg.clips} clips; every {VAL_EVERY}th, from "
                         "the 6th on, is val, if there are two faces and two speakers or more")
    text = json.dumps(split)
    write_aside(cfg.out / "split.json", lambda part: part.write_text(text, encoding="utf-8"))
    todo = [clip for clip in plans if not is_made(clip)]
    start = time.time()
    make_all(todo, cfg.workers)
    seconds = time.time() - start
    val = sum(clip.name in split["val"] for clip in plans)
    print(f"clips: {len(plans)} ({len(todo)} made now, {val} for validation)")
    if todo:
        speed = len(todo) * plans[0].frames / seconds
        print(f"frames_per_second: {speed:.1f} (with {cfg.workers} workers)")
    report_motion(plans)


def main(argv=None):
    cfg = tyro.cli(Config, args=argv, description=__doc__)
    with one_line_errors("synthetic.puppet", "stopped; the same command goes on"):
        run(cfg)


if __name__ == "__main__":
    main()
