"""Reads videos for evaluate.py, a segment of 5 s at a time, so ten minutes need no more memory
than five seconds; and makes the rows of the scale: VAE only, frozen, blurred.

Frames are uint8 (H, W, 3) RGB, squares at 25 frames a second; sound is float32 (samples,) at
16 kHz in [-1, 1].
"""
import json
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from common import VideoWriter
from data import FPS, HOP, read_audio, read_video, square_crop, to_tensor, to_uint8
from measure.pixels import phones_of
from media import default_track, open_media

SEGMENT = 125                                           # frames measured at a time, 5 s


def probe(path):
    """-> seconds of picture, seconds of sound (0: none), remarks on what is unusual about it."""
    with open_media(path) as file:
        video, sound = default_track(file, "video"), default_track(file, "audio")
        if video is None:
            raise ValueError("no video in it")

        def length(stream):
            own = float((stream.duration or 0) * stream.time_base)
            return own or (file.duration or 0) / 1e6
        seconds = length(video)
        sound_seconds = length(sound) if sound else 0
        rate = float(video.average_rate or FPS)
    notes = []
    if abs(rate - FPS) > 0.01:
        notes.append(f"{rate:.2f} frames a second, read as {FPS}")
    if not sound:
        notes.append("no audio")
    elif abs(sound_seconds - seconds) > 0.2:
        notes.append(f"{sound_seconds:.2f} s of sound for {seconds:.2f} s of picture")
    return seconds, sound_seconds, notes


def sidecar(path):
    """NAME.json beside a video -> dict, {} if there is none."""
    with suppress(OSError, ValueError):
        found = json.loads(Path(path).with_suffix(".json").read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def side_of(path):
    """-> pixels along each side of the square that is cut out of a video or picture."""
    return min(next(read_video(Path(path))).shape[:2])


def squares(path, size):
    """Yields uint8 (size, size, 3) at 25 frames a second: the largest square in the middle."""
    for picture in read_video(Path(path)):
        height, width = picture.shape[:2]
        if (height, width) != (size, size):
            box = square_crop(width, height)
            lanczos = Image.Resampling.LANCZOS
            picture = np.asarray(Image.fromarray(picture).resize((size, size), lanczos, box))
        yield picture


def sound_of(path, seconds):
    """The sound of a video, a second longer than its picture; (0,) if it has none."""
    frames = int(np.ceil(seconds * FPS)) + FPS
    return read_audio(Path(path), frames * HOP) / np.float32(32768)


def segments(frames):
    """Frames -> uint8 (125, H, W, 3) as they come; a rest shorter than half of that joins the
    segment before it. No more than two segments are in memory."""
    held = []
    new = []
    for frame in frames:
        new.append(frame)
        if len(new) == SEGMENT:
            if held:
                yield np.stack(held)
            held, new = new, []
    if held and len(new) >= SEGMENT // 2:
        yield np.stack(held)
        held = []
    if held or new:
        yield np.stack(held + new)


def long_recording(paths, first, seconds):
    """Recordings of several clips, one after another -> sound (samples,), sidecar {"person",
    "clips": [[name, frames]], "phones": None if a clip has none}."""
    total = round(seconds * FPS)
    sound = []
    clips = []
    phones = []
    done = 0
    while done < total:
        path = paths[(first + len(clips)) % len(paths)]
        n = min(round(probe(path)[0] * FPS), total - done)
        sound.append(sound_of(path, n / FPS)[:n * HOP])
        clips.append([path.stem, n])
        own = phones_of(path)
        if own is None or phones is None:
            phones = None
        else:
            shift = done / FPS
            phones += [[a + shift, min(b, n / FPS) + shift, p] for a, b, p in own if a < n / FPS]
        done += n
    about = {"person": paths[first % len(paths)].stem, "clips": clips, "phones": phones}
    return np.concatenate(sound), about


# ----------------------------------------------------------------------------- rows of the scale


def frozen(path, size):
    """The first frame all along: a flawless picture with no motion."""
    first = next(squares(path, size))
    return (first for _ in squares(path, size))


def vae_only(vae, frames, length):
    """Frames encoded and decoded in chunks of `length`, side by side: no generator that makes
    latents of this VAE can be better."""
    def reconstruct(chunk):
        full = chunk + chunk[-1:] * (-(len(chunk) - 1) % 4)  # 4k + 1 of them
        video = to_tensor(np.stack(full)).to(vae.stats.device)
        with torch.no_grad():
            return to_uint8(vae.decode(vae.encode(video))[0])[:len(chunk)]
    chunk = []
    for frame in frames:
        chunk.append(frame)
        if len(chunk) == length:
            yield from reconstruct(chunk)
            chunk = []
    if chunk:
        yield from reconstruct(chunk)


def as_written(frames, size):
    """Frames as they come out of the file that a generated video is kept in: H.264 leaves grain,
    which counts as a quarter more sharpness."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        writer = VideoWriter(path, size, np.zeros(0, np.float32))
        writer.write(frames)
        writer.close()
        yield from squares(path, size)


def blurred(frames, radius):
    """Gaussian blur with a standard deviation of `radius` pixels -> uint8 (T, H, W, 3)."""
    blur = ImageFilter.GaussianBlur(radius)
    return np.stack([np.asarray(Image.fromarray(frame).filter(blur)) for frame in frames])
