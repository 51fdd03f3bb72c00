"""Damaged files: a truncated download, a flipped bit, a wrong length.

    python tests/test_fuzz.py                       300 mutated pictures, 300 recordings and videos
    python tests/test_fuzz.py --first 17 --last 18  the same mutant again, with its whole traceback

Every mutant goes through common.load_image, audio.load_audio and data.decode, in a child process
with 2 GB. Allowed is success, or an error that the programs print in one line (for data.decode,
whose callers make a report line of any error, Pillow's own errors too). Not allowed: 10 s of work,
a crash, a Python warning.
"""
import argparse
import faulthandler
import io
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from conftest import ROOT
from PIL import Image, PngImagePlugin, features

import data
from audio import load_audio
from common import load_image

CLEAN = ValueError, OSError, av.error.FFmpegError           # what the programs print in one line
PILLOW = SyntaxError, RuntimeError, Image.DecompressionBombError    # what data.py reports
SECONDS = 10                                                # of one file's work
MEMORY = 2 << 30                                            # bytes beyond the libraries' own
LINUX = sys.platform == "linux"

# ---------------------------------------------------------------------------------- healthy files


def pictures():
    """Small healthy picture files, name -> bytes: all formats, parts with their own parsers."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)).resize((60, 50))
    exif, text = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112], exif[0x010E] = 6, "a face"                # turned; a description
    text.add_text("who", "nobody", zip=True)
    deep = Image.fromarray(rng.integers(0, 65535, (50, 60)).astype(np.uint16))
    many = {"save_all": True, "append_images": [rgb.rotate(90)], "duration": 100}
    kinds = {"rgb.png": (rgb, {"exif": exif}),
             "palette.png": (rgb.convert("P"), {"transparency": 3, "pnginfo": text}),
             "deep.png": (deep, {}),
             "exif.jpg": (rgb, {"exif": exif, "dpi": (72, 72)}),
             "cmyk.jpg": (rgb.convert("CMYK"), {}),
             "slow.jpg": (rgb, {"progressive": True}),
             "lossy.webp": (rgb, {"exif": exif}),
             "moves.webp": (rgb.convert("RGBA"), many),
             "moves.gif": (rgb.convert("P"), many),
             "rgb.bmp": (rgb, {}),
             "few.bmp": (rgb.convert("P"), {}),
             "raw.tiff": (rgb, {"exif": exif}),
             "lzw.tiff": (rgb, {"compression": "tiff_lzw"}),
             "jpeg.tiff": (rgb, {"compression": "jpeg"}),
             "float.tiff": (rgb.convert("F"), {})}
    if features.check("avif"):
        kinds["rgb.avif"] = rgb, {}
    files = {}
    for name, (image, options) in kinds.items():
        kind = name.split(".")[1].replace("jpg", "jpeg")
        image.save(file := io.BytesIO(), kind, **options)
        files[name] = file.getvalue()
    return files


def add_tone(out, voice, rate):
    """0.6 s of a tone into stream `voice` of an open container."""
    tone = (0.3 * np.sin(np.arange(int(0.6 * rate)) * 0.1)).astype(np.float32)
    frame = av.AudioFrame.from_ndarray(tone[None], "fltp", "mono")
    frame.sample_rate = rate
    frame_size = voice.codec_context.frame_size or 1024
    resampler = av.AudioResampler(voice.format.name, "mono", rate, frame_size)
    for part in resampler.resample(frame) + resampler.resample(None):
        out.mux(voice.encode(part))
    out.mux(voice.encode())


def media_file(container, video=None, audio=None, rate=16000):
    """0.6 s of moving noise and a tone in one of FFmpeg's containers -> bytes"""
    rng, fps = np.random.default_rng(1), 25
    with av.open(file := io.BytesIO(), "w", format=container) as out:
        if video:
            stream = out.add_stream(video, fps, pix_fmt="yuv420p", width=64, height=48)
            stream.gop_size = 6
        if audio:
            add_tone(out, out.add_stream(audio, rate, layout="mono"), rate)
        ground = rng.integers(0, 255, (60, 80, 3), np.uint8)
        for i in range(15 if video else 0):
            picture = ground[i // 3:i // 3 + 48, i:i + 64]
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))))
        if video:
            out.mux(stream.encode())
    return file.getvalue()


def recordings():
    """Small healthy sound and video files, name -> bytes."""
    sound = 0.3 * np.sin(np.arange(9600) * 0.1)
    stereo, files = np.stack([sound, sound], 1), {}
    for name in ("pcm.wav", "float.wav", "a.flac", "a.ogg", "a.mp3"):
        options = {"subtype": "FLOAT"} if name == "float.wav" else {}
        kind = name.split(".")[1]
        soundfile.write(file := io.BytesIO(), stereo, 16000, format=kind, **options)
        files[name] = file.getvalue()
    return files | {"a.m4a": media_file("ipod", None, "aac"),
                    "a.mp4": media_file("mp4", "libx264", "aac"),
                    "a.mov": media_file("mov", "mpeg4", "pcm_s16le"),
                    "a.mpg": media_file("mpeg", "mpeg1video", "mp2", 44100),
                    "a.avi": media_file("avi", "mpeg4", "mp2", 44100),
                    "a.mkv": media_file("matroska", "libx264", "aac"),
                    "a.webm": media_file("webm", "libvpx", "libopus", 48000)}

# --------------------------------------------------------------------------------------- mutants

NUMBERS = 0, 1, 2, 255, 0xFFFF, 0x10000, 0x01000000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF
TAG = re.compile(rb"[A-Za-z][A-Za-z0-9]{2}[A-Za-z0-9 ]")    # moov, IHDR, "fmt ", stts ...


def write_length(file, tags, rng):
    """A wrong number behind a tag, or anywhere in front."""
    if rng.random() < 0.7:
        at = int(rng.choice(tags)) + int(rng.integers(-8, 24))
    else:
        at = int(rng.integers(min(len(file), 256)))
    number = int(rng.choice(NUMBERS))
    at = min(max(at, 0), len(file) - 4)
    file[at:at + 4] = struct.pack(rng.choice(["<I", ">I"]), number)


def mutate(file, rng):
    """bytes -> other bytes: one to three things that disks, networks and attackers do to a file."""
    file = bytearray(file)
    tags = [m.end() for m in TAG.finditer(file)][:200] or [0]
    kinds = ["flip", "cut", "zero", "swap", "header", "length", "length", "repeat"]
    for _ in range(rng.integers(1, 4)):
        n = len(file)
        a, size = int(rng.integers(n)), int(rng.integers(1, max(2, n // 8)))
        match rng.choice(kinds):
            case "flip":
                for at in rng.integers(0, n, 1 << rng.integers(0, 6)):
                    file[at] ^= 1 << rng.integers(8)
            case "cut":
                del file[max(a, 16):]
            case "zero":
                file[a:a + size] = bytes(len(file[a:a + size]))
            case "swap":
                b = int(rng.integers(n))
                file[a:a + size], file[b:b + size] = file[b:b + size], file[a:a + size]
            case "header":
                file[int(rng.integers(min(n, 96)))] = int(rng.integers(256))
            case "length":
                write_length(file, tags, rng)
            case "repeat":
                file[a:a] = file[a:a + size]
        if len(file) < 20:
            break
    is_png = file[:4] == b"\x89PNG"
    return repair_checksums(file) if is_png and rng.random() < 0.7 else bytes(file)


def repair_checksums(file):
    """Every chunk of a PNG gets the checksum it should have.

    With a wrong checksum Pillow would stop there, and what is behind it would never be tested."""
    at = 8
    while at + 12 <= len(file):
        end = at + 8 + struct.unpack(">I", file[at:at + 4])[0]
        if end + 4 > len(file):
            break
        file[end:end + 4] = struct.pack(">I", zlib.crc32(file[at + 4:end]))
        at = end + 4
    return bytes(file)


def mutants(first, last, step=1):
    """Yields (number, name, bytes): even numbers are pictures, odd ones recordings and videos.

    The same number is always the same mutant."""
    healthy = list(pictures().items()), list(recordings().items())
    for i in range(first, last, step):
        files = healthy[i % 2]
        name, file = files[i // 2 % len(files)]
        yield i, f"{i} {name}", mutate(file, np.random.default_rng(i))

# --------------------------------------------------------------------------------------- the run


def status(name):
    """A figure of this process in bytes, on Linux; else 0."""
    text = Path("/proc/self/status").read_text(encoding="utf-8") if LINUX else ""
    found = re.search(rf"{name}:\s+(\d+)", text)
    return int(found[1]) << 10 if found else 0


def reset_peak():
    if LINUX:
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        except OSError:
            pass                                            # not permitted: the peak of all so far


def examine(path):
    """One file through every reader that takes it -> what is wrong with that, as text, or ""."""
    wrong = ""
    readers = {"load_image": lambda: load_image(path, 32), "load_audio": lambda: load_audio(path)}
    if path.suffix in data.VIDEOS | data.PICTURES:
        readers["data.decode"] = lambda: data.decode(path, 32)
    for name, reader in readers.items():
        allowed = CLEAN + PILLOW if name == "data.decode" else CLEAN
        reset_peak()
        before, begin = status("VmHWM"), time.process_time()
        try:
            reader()
        except BaseException as error:                      # anything else is what is looked for
            message = str(error).strip()
            if not isinstance(error, allowed):
                wrong += f"{name}: {traceback.format_exc()}"
            elif not message or "\n" in message:
                wrong += f"{name}: an error of no or many lines: {error!r}\n"
        spent, used = time.process_time() - begin, status("VmHWM") - before
        if spent > SECONDS:
            wrong += f"{name}: {spent:.0f} s of work\n"
        if used > MEMORY // 4:
            wrong += f"{name}: {used >> 20} MiB for a file of {path.stat().st_size} bytes\n"
    return wrong


def work(first, last, step):
    """The child: a JSON line before and after every mutant.

    So the parent knows which mutant a crash belongs to."""
    report, noise = os.dup(1), tempfile.TemporaryFile()
    os.dup2(noise.fileno(), 1)
    os.dup2(noise.fileno(), 2)                              # what C libraries print, too
    if LINUX:
        from resource import RLIMIT_AS, setrlimit
        limit = status("VmSize") + MEMORY
        setrlimit(RLIMIT_AS, (limit, limit))
    with tempfile.TemporaryDirectory() as folder:
        for i, name, file in mutants(first, last, step):
            os.write(report, json.dumps([i, name, None]).encode() + b"\n")
            path = Path(folder, name)
            path.write_bytes(file)
            faulthandler.dump_traceback_later(6 * SECONDS, exit=True, file=noise)
            wrong = examine(path)
            faulthandler.cancel_dump_traceback_later()
            path.unlink()
            noise.seek(0)
            printed = noise.read().decode(errors="replace")
            if re.search(r"Traceback|\.py:\d+", printed):   # libtiff's and mpg123's notes are fine
                wrong += f"printed: {printed[:2000]}\n"
            noise.seek(0)
            noise.truncate()
            os.write(report, json.dumps([i, name, wrong]).encode() + b"\n")


def fuzz(first, last, step=1):
    """Mutants first to last - 1 -> (how many ran, {name: what was wrong})"""
    ran, broken = 0, {}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    while first < last:
        command = [sys.executable, __file__, "--work", *map(str, (first, last, step))]
        child = subprocess.run(command, stdout=subprocess.PIPE, env=environment)
        lines = [json.loads(line) for line in child.stdout.splitlines()]
        done = [line for line in lines if line[2] is not None]
        broken |= {name: wrong for _, name, wrong in done if wrong}
        ran += len(done)
        if 2 * len(done) == len(lines) and child.returncode == 0:
            break
        if not lines:
            raise RuntimeError(f"the child did not start: {child.returncode}")
        i, name, _ = lines[-1]
        broken[name] = f"the process died or hung: exit {child.returncode}"
        ran, first = ran + 1, i + step
    return ran, broken

# ----------------------------------------------------------------------------------------- tests


def test_a_damaged_file_is_one_line_never_a_traceback():
    """Property: whatever happens to a file, a reader takes it or explains in one line why not.

    60 mutants; FUZZ=600 in the environment runs as many as the command."""
    count = int(os.environ.get("FUZZ", 60))
    ran, broken = fuzz(0, count)
    assert ran == count and not broken, "\n".join(f"{k}: {wrong}" for k, wrong in broken.items())


def remux(file, container, late, first=0):
    """The packets of a media file in another container, with other time stamps.

    late: {"video": s, "audio": s}, how much later each kind of stream is from packet `first` on."""
    out = io.BytesIO()
    with av.open(io.BytesIO(file)) as old, av.open(out, "w", format=container) as new:
        streams = {stream: new.add_stream_from_template(stream) for stream in old.streams}
        count = dict.fromkeys(old.streams, 0)
        for packet in old.demux():
            if packet.dts is None:
                continue
            stream, shift = packet.stream, 0
            if count[stream] >= first:
                shift = round(late.get(stream.type, 0) / packet.time_base)
            count[stream] += 1
            packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
            packet.stream = streams[stream]
            new.mux(packet)
    return out.getvalue()


def test_wrong_time_stamps_cost_no_memory(tmp_path):
    """Property: a flipped bit in a time stamp does not become hours of silence or of one frame.

    Mutants found this: 16 GB each."""
    day = 24 * 3600
    broadcast = media_file("matroska", "mpeg4", "mp2", 44100)
    video = media_file("matroska", "mpeg4", "aac")
    for name, kind, late in (("both.ts", "mpegts", {"video": day, "audio": day}),
                             ("sound.mkv", "matroska", {"audio": day})):
        (tmp_path / name).write_bytes(remux(broadcast, kind, late))
        seconds = len(load_audio(tmp_path / name)) / 16000
        assert 0.5 < seconds < 1.0              # a broadcast's clock begins anywhere: no silence
    for kind in ("video", "audio"):
        path = tmp_path / f"gap in {kind}.mkv"
        path.write_bytes(remux(video, "matroska", {kind: day}, 5))
        with pytest.raises(ValueError, match=f"damaged {kind}"):
            data.decode(path, 32)
    path = tmp_path / "2 s.mkv"
    path.write_bytes(remux(video, "matroska", {"audio": 2}))
    assert 2.5 < len(load_audio(path)) / 16000 < 2.8        # a sound may begin a little later
    soundfile.write(tmp_path / "slow.wav", np.zeros(40000), 1)
    with pytest.raises(ValueError, match="1 samples a second"):
        load_audio(tmp_path / "slow.wav")                   # at 16 kHz: 640 million samples


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")   # as media.py does
def test_what_once_broke_a_reader(tmp_path):
    """Property: faults that were found once stay mended.

    An unknown codec, a picture of 2^31 pixels, nonsense as EXIF data, a broken AVIF: each was a
    traceback or a warning once."""
    path = tmp_path / "unknown.mp4"
    path.write_bytes(recordings()["a.mp4"].replace(b"avc1", b"zzzz"))
    with pytest.raises(ValueError, match="known kind"):
        data.decode(path, 32)
    assert len(load_audio(path))
    huge = bytearray(pictures()["palette.png"])
    huge[16:24] = struct.pack(">II", 1 << 16, 1 << 15)
    path = tmp_path / "huge.png"
    path.write_bytes(repair_checksums(huge))
    for reader in (load_image, data.decode):
        with pytest.raises(ValueError, match="too many pixels"):
            reader(path, 32)
    Image.new("1", (12000, 12000)).save(tmp_path / "large.png")             # Pillow only warns
    with pytest.raises(ValueError, match="too many"):
        data.decode(tmp_path / "large.png", 32)
    exif = pictures()["exif.jpg"]
    at = exif.find(b"Exif\0\0") + 6
    path = tmp_path / "exif.jpg"
    path.write_bytes(exif[:at + 10] + b"\xff" * 20 + exif[at + 30:])
    assert examine(path) == ""
    if features.check("avif"):
        path = tmp_path / "rgb.avif"
        path.write_bytes(pictures()["rgb.avif"][:-40] + bytes(40))
        assert examine(path) == ""

# ------------------------------------------------------------------------------------------ main


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, default=600)
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--work", nargs=3, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(*args.work)
    begin = time.time()
    ran, broken = fuzz(args.first, args.last, args.step)
    for name, wrong in broken.items():
        print(f"--- {name}\n{wrong}")
    print(f"mutants: {ran}\nbroken: {len(broken)}\nseconds: {time.time() - begin:.0f}")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
