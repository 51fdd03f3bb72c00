"""Damaged files. A reader meets what no test author thinks of: a cut download, a flipped bit, a length that lies.

    python tests/test_fuzz.py                        300 mutated pictures and 300 mutated recordings and videos, one line for each that broke
    python tests/test_fuzz.py --first 17 --last 18   the same mutant again, with the whole traceback

Every mutant goes through infer.load_image, audio.load_audio and data.decode, in a child process with 2 GB. Allowed is success or one of the errors
that the scripts print in one line (data.decode, whose callers make a row of any: Pillow's, too); not 10 s of work, a crash, or a Python warning.
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
import infer
from audio import load_audio

CLEAN = (ValueError, OSError, av.error.FFmpegError)                             # what infer.py prints in one line
PILLOWS = (SyntaxError, RuntimeError, Image.DecompressionBombError)              # what data.py makes a row of
SECONDS, MEMORY = 10, 2 << 30                                                   # of one file's work; bytes beyond the libraries' own

# --------------------------------------------------------------------------------------------------------------- seeds


def pictures():
    """Small healthy picture files, name -> bytes: every format and the parts of it that have parsers of their own."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)).resize((60, 50))
    exif, text = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112], exif[0x010E] = 6, "a face"                                    # turned; a description
    text.add_text("who", "nobody", zip=True)
    deep = Image.fromarray(rng.integers(0, 65535, (50, 60)).astype(np.uint16))
    many = {"save_all": True, "append_images": [rgb.rotate(90)], "duration": 100}
    kinds = {"rgb.png": (rgb, {"exif": exif}), "palette.png": (rgb.convert("P"), {"transparency": 3, "pnginfo": text}), "deep.png": (deep, {}),
             "exif.jpg": (rgb, {"exif": exif, "dpi": (72, 72)}), "cmyk.jpg": (rgb.convert("CMYK"), {}), "slow.jpg": (rgb, {"progressive": True}),
             "lossy.webp": (rgb, {"exif": exif}), "moves.webp": (rgb.convert("RGBA"), many), "moves.gif": (rgb.convert("P"), many),
             "rgb.bmp": (rgb, {}), "few.bmp": (rgb.convert("P"), {}), "raw.tiff": (rgb, {"exif": exif}),
             "lzw.tiff": (rgb, {"compression": "tiff_lzw"}), "jpeg.tiff": (rgb, {"compression": "jpeg"}), "float.tiff": (rgb.convert("F"), {})}
    if features.check("avif"):
        kinds["rgb.avif"] = rgb, {}
    files = {}
    for name, (image, options) in kinds.items():
        image.save(file := io.BytesIO(), name.split(".")[1].replace("jpg", "jpeg"), **options)
        files[name] = file.getvalue()
    return files


def film(container, video=None, audio=None, rate=16000):
    """0.6 s of moving noise and a tone in one of FFmpeg's containers -> bytes"""
    rng, fps = np.random.default_rng(1), 25
    with av.open(file := io.BytesIO(), "w", format=container) as out:
        if video:
            stream = out.add_stream(video, fps, pix_fmt="yuv420p", width=64, height=48)
            stream.gop_size = 6
        if audio:
            voice = out.add_stream(audio, rate, layout="mono")
            sound = (0.3 * np.sin(np.arange(int(0.6 * rate)) * 0.1)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(sound[None], "fltp", "mono")
            frame.sample_rate = rate
            for part in (fifo := av.AudioResampler(voice.format.name, "mono", rate, voice.codec_context.frame_size or 1024)).resample(frame):
                out.mux(voice.encode(part))
            for part in fifo.resample(None):
                out.mux(voice.encode(part))
            out.mux(voice.encode())
        ground = rng.integers(0, 255, (60, 80, 3), np.uint8)
        for i in range(15 if video else 0):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(ground[i // 3:][:48, i:][:, :64]))))
        if video:
            out.mux(stream.encode())
    return file.getvalue()


def recordings():
    """Small healthy sound and video files, name -> bytes."""
    sound, files = 0.3 * np.sin(np.arange(9600) * 0.1), {}
    for name, options in {"pcm.wav": {}, "float.wav": {"subtype": "FLOAT"}, "a.flac": {}, "a.ogg": {}, "a.mp3": {}}.items():
        soundfile.write(file := io.BytesIO(), np.stack([sound, sound], 1), 16000, format=name.split(".")[1], **options)
        files[name] = file.getvalue()
    return files | {"a.m4a": film("ipod", None, "aac"), "a.mp4": film("mp4", "libx264", "aac"), "a.mov": film("mov", "mpeg4", "pcm_s16le"),
                    "a.mpg": film("mpeg", "mpeg1video", "mp2", 44100), "a.avi": film("avi", "mpeg4", "mp2", 44100),
                    "a.mkv": film("matroska", "libx264", "aac"), "a.webm": film("webm", "libvpx", "libopus", 48000)}

# ------------------------------------------------------------------------------------------------------------- mutants


def mutate(file, rng):
    """bytes -> other bytes: one to three of what disks, networks, old programs and attackers do to a file."""
    file = bytearray(file)
    tags = [m.end() for m in re.finditer(rb"[A-Za-z][A-Za-z0-9]{2}[A-Za-z0-9 ]", file)][:200] or [0]           # moov, IHDR, "fmt ", stts ...
    for _ in range(rng.integers(1, 4)):
        n = len(file)
        a, size = int(rng.integers(n)), int(rng.integers(1, max(2, n // 8)))
        match rng.choice(["flip", "cut", "zero", "swap", "header", "length", "length", "repeat"]):
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
            case "length":                                                      # a number behind a tag, or anywhere in front
                at = int(rng.choice(tags)) + int(rng.integers(-8, 24)) if rng.random() < 0.7 else int(rng.integers(min(n, 256)))
                number = int(rng.choice([0, 1, 2, 255, 0xFFFF, 0x10000, 0x01000000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]))
                at = min(max(at, 0), n - 4)
                file[at:at + 4] = struct.pack(rng.choice(["<I", ">I"]), number)
            case "repeat":
                file[a:a] = file[a:a + size]
        if len(file) < 20:
            break
    return mend_png(file) if file[:4] == b"\x89PNG" and rng.random() < 0.7 else bytes(file)


def mend_png(file):
    """Every chunk of a PNG gets the checksum it should have: else the checksum hides what is behind it from every mutant."""
    at = 8
    while at + 12 <= len(file):
        end = at + 8 + struct.unpack(">I", file[at:at + 4])[0]
        if end + 4 > len(file):
            break
        file[end:end + 4] = struct.pack(">I", zlib.crc32(file[at + 4:end]))
        at = end + 4
    return bytes(file)


def mutants(first, last, step=1):
    """Yields (number, name, bytes): even numbers are pictures, odd ones recordings and videos. A number is a mutant, whenever it is asked for."""
    seeds = list(pictures().items()), list(recordings().items())
    for i in range(first, last, step):
        name, file = seeds[i % 2][i // 2 % len(seeds[i % 2])]
        yield i, f"{i} {name}", mutate(file, np.random.default_rng(i))

# ------------------------------------------------------------------------------------------------------------- the run


def peak():
    """Peak memory of this process in bytes since the last forget_peak(), where Linux tells; else 0."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8")) if sys.platform == "linux" else None
    return int(found[1]) << 10 if found else 0


def forget_peak():
    if sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        except OSError:
            pass                                                                # not allowed to: the peak of all so far


def examine(path):
    """One file through every reader that takes it -> what is wrong with that, as text, or ""."""
    wrong = ""
    readers = [lambda: infer.load_image(path, 32), lambda: load_audio(path)]
    if path.suffix in data.VIDEOS | data.PICTURES:
        readers.append(lambda: data.decode(path, 32))
    for reader, name in zip(readers, ("load_image", "load_audio", "data.decode")):
        forget_peak()
        before, begin = peak(), time.process_time()
        try:
            reader()
        except (CLEAN if name != "data.decode" else CLEAN + PILLOWS) as error:              # noqa: B030
            if not str(error).strip() or "\n" in str(error).strip():
                wrong += f"{name}: an error of no or many lines: {error!r}\n"
        except BaseException:                                                   # noqa: BLE001, that is what is looked for
            wrong += f"{name}: {traceback.format_exc()}"
        if (spent := time.process_time() - begin) > SECONDS:
            wrong += f"{name}: {spent:.0f} s of work\n"
        if (used := peak() - before) > MEMORY // 4:
            wrong += f"{name}: {used >> 20} MiB for a file of {path.stat().st_size} bytes\n"
    return wrong


def work(first, last, step):
    """The child: a JSON line before and after every mutant, so that the parent knows which one a crash belongs to."""
    talk, noise = os.dup(1), tempfile.TemporaryFile()
    os.dup2(noise.fileno(), 1)
    os.dup2(noise.fileno(), 2)                                                  # what C libraries print, too
    if sys.platform == "linux":
        from resource import RLIMIT_AS, setrlimit
        here = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1]) << 10
        setrlimit(RLIMIT_AS, (here + MEMORY, here + MEMORY))
    with tempfile.TemporaryDirectory() as folder:
        for i, name, file in mutants(first, last, step):
            os.write(talk, json.dumps([i, name, None]).encode() + b"\n")
            path = Path(folder, name)
            path.write_bytes(file)
            faulthandler.dump_traceback_later(6 * SECONDS, exit=True, file=noise)
            wrong = examine(path)
            faulthandler.cancel_dump_traceback_later()
            path.unlink()
            noise.seek(0)
            if re.search(r"Traceback|\.py:\d+", said := noise.read().decode(errors="replace")):               # a note of libtiff or mpg123 is none
                wrong += f"printed: {said[:2000]}\n"
            noise.seek(0)
            noise.truncate()
            os.write(talk, json.dumps([i, name, wrong]).encode() + b"\n")


def fuzz(first, last, step=1):
    """Mutants first .. last - 1 -> (how many ran, {name: what was wrong})"""
    ran, broken = 0, {}
    while first < last:
        child = subprocess.run([sys.executable, __file__, "--work", *map(str, (first, last, step))], stdout=subprocess.PIPE,
                               env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
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

# --------------------------------------------------------------------------------------------------------------- tests


def test_damaged_files_are_one_line_never_a_traceback():
    """Whatever happens to a file, a reader takes it or says why not. 60 mutants here; with FUZZ=600 in the environment all of them."""
    count = int(os.environ.get("FUZZ", 60))
    ran, broken = fuzz(0, count)
    assert ran == count and not broken, "\n".join(f"{name}: {wrong}" for name, wrong in broken.items())


def remuxed(file, container, late, first=0):
    """The packets of a film in another container, each kind of stream `late` = {"video": s, "audio": s} later from packet `first` on."""
    with av.open(io.BytesIO(file)) as old, av.open(out := io.BytesIO(), "w", format=container) as new:
        to, seen = {stream: new.add_stream_from_template(stream) for stream in old.streams}, dict.fromkeys(old.streams, 0)
        for packet in old.demux():
            if packet.dts is not None:
                stream = packet.stream
                shift = round(late.get(stream.type, 0) / packet.time_base) if seen[stream] >= first else 0
                packet.pts, packet.dts, packet.stream, seen[stream] = packet.pts + shift, packet.dts + shift, to[stream], seen[stream] + 1
                new.mux(packet)
    return out.getvalue()


def test_clocks_that_lie_cost_no_memory(tmp_path):
    """A flipped bit in a time stamp is hours of silence or of one frame, if one believes it: found by the mutants, 16 GB each."""
    day = 24 * 3600
    for name, kind, late in (("both.ts", "mpegts", {"video": day, "audio": day}), ("sound.mkv", "matroska", {"audio": day})):
        (tmp_path / name).write_bytes(remuxed(film("matroska", "mpeg4", "mp2", 44100), kind, late))
        assert 0.5 < len(load_audio(tmp_path / name)) / 16000 < 1.0             # a broadcast's clock begins anywhere: no silence in front
    for kind in ("video", "audio"):
        (path := tmp_path / f"hole in {kind}.mkv").write_bytes(remuxed(film("matroska", "mpeg4", "aac"), "matroska", {kind: day}, 5))
        with pytest.raises(ValueError, match=f"damaged {kind}"):
            data.decode(path, 32)
    (path := tmp_path / "2 s.mkv").write_bytes(remuxed(film("matroska", "mpeg4", "aac"), "matroska", {"audio": 2}))
    assert 2.5 < len(load_audio(path)) / 16000 < 2.8                            # a sound that begins a little later is waited for
    soundfile.write(tmp_path / "slow.wav", np.zeros(40000), 1)
    with pytest.raises(ValueError, match="1 samples a second"):
        load_audio(tmp_path / "slow.wav")                                       # as 16 kHz: 640 million samples


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")       # data.py ignores it, pytest forgets that
def test_what_else_once_broke_a_reader(tmp_path):
    """A coding nobody knows, a picture of 2^31 pixels, EXIF data that is none, a broken AVIF: each was a traceback or a warning once."""
    (path := tmp_path / "unknown.mp4").write_bytes(recordings()["a.mp4"].replace(b"avc1", b"zzzz"))
    with pytest.raises(ValueError, match="known kind"):
        data.decode(path, 32)
    assert len(load_audio(path))
    huge = bytearray(pictures()["palette.png"])
    huge[16:24] = struct.pack(">II", 1 << 16, 1 << 15)
    (path := tmp_path / "huge.png").write_bytes(mend_png(huge))
    with pytest.raises(ValueError, match="too many pixels"):
        infer.load_image(path, 32)
    with pytest.raises(Image.DecompressionBombError):
        data.decode(path, 32)
    Image.new("1", (12000, 12000)).save(tmp_path / "large.png")                 # Pillow would only warn
    with pytest.raises(ValueError, match="too many"):
        data.decode(tmp_path / "large.png", 32)
    exif = pictures()["exif.jpg"]
    at = exif.find(b"Exif\0\0") + 6
    (path := tmp_path / "exif.jpg").write_bytes(exif[:at + 10] + b"\xff" * 20 + exif[at + 30:])
    assert examine(path) == ""
    if features.check("avif"):
        file = pictures()["rgb.avif"]
        (path := tmp_path / "rgb.avif").write_bytes(file[:-40] + bytes(40))
        assert examine(path) == ""

# ---------------------------------------------------------------------------------------------------------------- main


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
