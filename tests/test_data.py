"""Laws of data.py: what a folder of videos becomes before a network sees it. The videos are made here."""
import contextlib
import csv
import json
import os
import signal
import struct
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

import data
import metrics

RATE, HOP = data.RATE, data.HOP


def write_clip(path, pictures, fps=25, times=None, sound=None, sound_start=0.0, sound_rate=RATE, stretch=1):
    """A small H.264 + AAC file. pictures: uint8 (H, W, 3) each; times: s of every picture (default: constant
    rate); sound: float (samples,) at `sound_rate`, beginning at `sound_start` s, None: no audio stream;
    stretch: width / height of a pixel. The index is in front: a file that is cut off can still be opened."""
    fps = Fraction(fps).limit_denominator(1001)
    index = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=index) as file:
        video = file.add_stream("libx264", rate=fps, options={"crf": "10", "preset": "ultrafast"})
        video.width, video.height, video.pix_fmt = pictures[0].shape[1], pictures[0].shape[0], "yuv420p"
        video.codec_context.sample_aspect_ratio = Fraction(stretch)
        tick = Fraction(1, 90000) if times is not None else 1 / fps
        if times is not None:
            video.codec_context.time_base = tick
        audio = None if sound is None else file.add_stream("aac", rate=sound_rate, layout="mono")
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.time_base, frame.pts = tick, i if times is None else round(times[i] / tick)
            file.mux(video.encode(frame))
        file.mux(video.encode())
        if audio is not None:
            frame = av.AudioFrame.from_ndarray(np.float32(sound)[None], format="fltp", layout="mono")
            frame.sample_rate, frame.time_base = sound_rate, Fraction(1, sound_rate)
            frame.pts = round(sound_start * sound_rate)
            in_1024 = av.AudioResampler("fltp", "mono", sound_rate, frame_size=1024)
            for part in in_1024.resample(frame) + in_1024.resample(None):
                file.mux(audio.encode(part))
            file.mux(audio.encode())
    return path


def talking(n, seed=0, size=64, face=0):
    """n pictures of a textured square that moves on a textured ground, and a tone: nothing to reject."""
    rng = np.random.default_rng(seed)
    ground, square = rng.integers(0, 255, (size, size, 3)), rng.integers(0, 255, (size // 2, size // 2, 3))
    path = np.cumsum(rng.integers(-1, 2, (n, 2)), axis=0).clip(-size // 8, size // 8) + size // 4
    pictures = np.repeat(ground[None].astype(np.uint8), n, axis=0)
    for picture, (y, x) in zip(pictures, path, strict=True):
        picture[y:y + size // 2, x:x + size // 2] = square
    return pictures, 0.3 * np.sin(np.arange(n * HOP) * 0.1)


def flash_and_click(path, shown, at, sound_rate=RATE, sound_start=0.0, **more):
    """Dark pictures and silence, but at `at` s the picture on screen and the next two are bright, and a click
    is heard. `shown`: s of every picture."""
    pictures = np.full((len(shown), 48, 64, 3), 30, np.uint8)
    first = np.searchsorted(shown, at + 1e-6) - 1
    pictures[first:first + 3] = 220
    sound = np.zeros(int((shown[-1] + 0.1 - sound_start) * sound_rate), np.float32)
    click = int((at - sound_start) * sound_rate)
    sound[click:click + sound_rate // 100] = 0.8
    return write_clip(path, pictures, sound=sound, sound_rate=sound_rate, sound_start=sound_start, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four clips of two people: 50, 50, 40 and 12 frames, and a portrait."""
    path = tmp_path_factory.mktemp("clips with ä space")
    for name, n, who in (("a ü", 50, "ann"), ("b", 50, "bob"), ("c", 40, "bob"), ("short", 12, "ann")):
        pictures, sound = talking(n, seed=n + len(name))
        write_clip(path / f"{name}.mp4", pictures, sound=sound)
        (path / f"{name}.json").write_text(json.dumps({"identity": who}), encoding="utf-8")
    Image.fromarray(talking(1, size=100)[0][0]).save(path / "portrait.png")
    return path


# --- reading a file ---

def test_sound_and_picture_stay_together_at_any_rate(tmp_path):
    """A flash and a click of one moment land within one 25-fps frame of each other and of that moment, for
    constant rates, a variable rate, an audio stream that starts late, and a video that starts late."""
    cases = [(f"{fps}.mp4", np.arange(int(2 * fps)) / fps, {"fps": fps}) for fps in (24, 25, 29.97, 30)]
    steps = np.cumsum(np.random.default_rng(0).uniform(1 / 60, 1 / 12, 40))
    steps, late = steps - steps[0], np.arange(50) / 25 + 0.4
    cases += [("variable.mp4", steps, {"times": steps}),
              ("late sound.mkv", np.arange(50) / 25, {"sound_start": 0.25, "sound_rate": 44100}),
              ("late video.mkv", late, {"times": late, "sound_start": 0.25})]
    for name, shown, more in cases:
        for at in (0.51, 1.13):
            clip = flash_and_click(tmp_path / name, shown, shown[0] + at, **more)
            frames, audio, _ = data.decode(clip, 16)
            flash = np.flatnonzero(frames.mean((1, 2, 3)) > 120)[0]
            click = np.flatnonzero(np.abs(audio) > 8000)[0] / HOP
            assert abs(flash - int(25 * at)) <= 1 and abs(click - 25 * at) < 0.1, (name, at, flash, click)


def test_length_is_the_duration_at_25_fps(tmp_path):
    """N = duration x 25, rounded, whatever the rate; the sound is padded or cut to 640 N samples."""
    for fps, n, sound in ((24, 48, 10), (25, 50, 99999), (30, 45, 16000), (12.5, 25, 0)):
        clip = write_clip(tmp_path / "x.mp4", talking(n)[0], fps=fps, sound=np.zeros(sound + 1024))
        frames, audio, mask = data.decode(clip, 32)
        assert len(frames) == round(n / fps * 25) == len(mask) == len(audio) / HOP
        assert frames.shape[1:] == (32, 32, 3) and mask.shape[1:] == (8, 8)


def test_pictures_are_seen_as_they_were_meant(tmp_path):
    """Pixels that are not square are made square, and a phone's video that lies on its side is stood up."""
    pictures = np.zeros((5, 64, 96, 3), np.uint8)
    pictures[:, :, :48] = 200                            # the left half is bright
    wide = write_clip(tmp_path / "wide.mp4", pictures, stretch=2)
    assert next(data.read_video(wide)).shape == (64, 192, 3)
    file = bytearray(write_clip(tmp_path / "phone.mp4", pictures).read_bytes())
    matrix = file.find(b"tkhd") + 44                     # a quarter turn clockwise, in fixed point numbers
    file[matrix:matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 64 << 16, 0, 1 << 30)
    (tmp_path / "phone.mp4").write_bytes(file)
    picture = next(data.read_video(tmp_path / "phone.mp4"))
    assert picture.shape == (96, 64, 3) and picture[:48].mean() > 190 and picture[48:].mean() < 10


def test_a_square_file_with_a_sidecar_is_not_cropped_again(tmp_path):
    """The box and the mask of puppet.py and `prepare` are in pixels of the whole square; in a wide file the
    box says where the square is."""
    pictures = talking(5, size=64)[0]
    square, wide = tmp_path / "square.mp4", tmp_path / "wide.mp4"
    write_clip(square, pictures, sound=np.zeros(9999))
    write_clip(wide, np.concatenate([pictures // 8, pictures], axis=2), sound=np.zeros(9999))
    whole = data.decode(square, 64)[0]
    np.savez(tmp_path / "square.npz", box=np.float32([10, 10, 30, 40]))
    np.savez(tmp_path / "wide.npz", box=np.float32([80, 10, 112, 55]))
    frames, _, mask = data.decode(square, 64)
    assert (frames == whole).all() and mask[0, 6, 5] == 255 and mask[0, 12, 12] == 0
    assert np.abs(data.decode(wide, 64)[0].astype(int) - whole).mean() < 3


def test_square_around_the_middle_or_the_face():
    """Eq. 20: the largest square in the middle; with a face box one in which the face is as high as FACE_BOX;
    always inside the picture."""
    assert data.square_crop(160, 90) == (35, 0, 125, 90)
    x0, y0, x1, y1 = data.square_crop(1000, 800, (400, 300, 500, 440))
    assert np.allclose([x1 - x0, (x0 + x1) / 2, (y0 + y1) / 2], [140 / 0.70, 450, 370])
    for box in ((0, 0, 50, 70), (950, 700, 1000, 800), (0, 0, 1000, 800)):
        x0, y0, x1, y1 = data.square_crop(1000, 800, box)
        assert min(x0, y0) >= 0 and x1 <= 1000 and y1 <= 800 and np.isclose(x1 - x0, y1 - y0)


def test_mask_is_the_sidecars_or_the_parsers_or_an_ellipse():
    """Eq. 23: a sidecar's mask is used as it is, else a parser is asked, else an ellipse fills the box."""
    frames = np.zeros((3, 64, 64, 3), np.uint8)
    given = np.zeros((3, 32, 32), np.uint8)
    given[1, :, :16] = 255
    assert (data.face_mask(frames, given, None, None)[:, 0, 0] == [0, 255, 0]).all()
    assert data.face_mask(frames, None, None, lambda frame: frame[:16, :16, 0] + 255).all()
    ellipse = data.face_mask(frames, None, (0.25, 0.0, 0.75, 1.0), None)
    assert ellipse.shape == (3, 16, 16) and ellipse[0, 8, 8] == 255 and ellipse[0, 0, 0] == 0
    assert abs(ellipse[0].mean() / 255 - np.pi / 4 * 0.5) < 0.05
    with pytest.raises(ValueError, match="2 masks for 3 frames"):
        data.face_mask(frames, given[:2], None, None)


def test_bad_files_are_rows_and_never_a_crash(tmp_path):
    """Truncated, empty, soundless, pictureless, one-frame and nonsense files are skipped with a reason."""
    pictures, sound = talking(50)
    good = write_clip(tmp_path / "good.mp4", pictures, sound=sound)
    whole = good.read_bytes()
    for share in (1, 3, 5, 9):
        (tmp_path / f"truncated {share}.mp4").write_bytes(whole[:len(whole) * share // 10])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "nonsense.avi").write_bytes(b"not a video" * 99)
    (tmp_path / "picture.png").write_bytes(b"not a picture")
    Image.fromarray(pictures[0]).save(tmp_path / "program.png", "EPS")       # Pillow would start another program for it
    write_clip(tmp_path / "silent.mp4", pictures)
    write_clip(tmp_path / "one.mp4", pictures[:1], sound=sound[:1024])
    with av.open(str(tmp_path / "no video.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = RATE
        file.mux(stream.encode(frame) + stream.encode())
    damaged = np.frombuffer(whole, np.uint8).copy()
    damaged[whole.find(b"mdat") + 5000::997] ^= 255
    (tmp_path / "damaged.mp4").write_bytes(damaged.tobytes())
    write_clip(tmp_path / "sidecar.mp4", pictures, sound=sound)
    np.savez(tmp_path / "sidecar.npz", mask=np.zeros((7, 8, 8), np.uint8))
    clips = data.ClipFolder(tmp_path, 32, "all")
    assert [clip.name for clip in clips.clips] == ["good"]
    assert {name for name, _ in clips.skipped} == {
        *(f"truncated {share}.mp4" for share in (1, 3, 5, 9)), "empty.mp4", "nonsense.avi", "picture.png", "program.png",
        "silent.mp4", "one.mp4", "no video.mp4", "damaged.mp4", "sidecar.mp4"}
    why = dict(clips.skipped)
    for name, reason in (("silent", "no audio"), ("one", "1 frames"), ("no video", "no video")):
        assert reason in why[f"{name}.mp4"]
    assert "7 masks for 50" in why["sidecar.mp4"] and "cannot identify" in why["program.png"] and all(name in clips.report() for name in why)
    assert "silent" in [clip.name for clip in data.ClipFolder(tmp_path, 32, "all", need_audio=False).clips]


def test_sound_begins_with_the_picture_that_is_read(tmp_path):
    """Of two video streams the best is read, the sound is cut at the first picture of that one, not of the other."""
    late = flash_and_click(tmp_path / "late.mkv", np.arange(50) / 25 + 0.4, 0.4 + 1.13, times=np.arange(50) / 25 + 0.4)
    cover = write_clip(tmp_path / "cover.mkv", np.full((1, 48, 64, 3), 99, np.uint8))
    with (av.open(str(tmp_path / "both.mkv"), "w") as file, av.open(str(cover)) as one, av.open(str(late)) as two):
        to = {stream: file.add_stream_from_template(stream) for stream in (*one.streams, *two.streams)}
        for packet in (packet for source in (one, two) for packet in source.demux() if packet.dts is not None):
            packet.stream = to[packet.stream]
            file.mux(packet)
    frames, audio, _ = data.decode(tmp_path / "both.mkv", 16)
    assert len(frames) == 50 and abs(np.flatnonzero(np.abs(audio) > 8000)[0] / HOP - 25 * 1.13) < 0.1


# --- a folder ---

def test_an_edited_file_is_decoded_again_and_others_are_not(tmp_path):
    """The cache is keyed on name, size, time and sidecar: a second run reads it, an edited file is new."""
    write_clip(tmp_path / "x.mp4", np.full((30, 64, 64, 3), 50, np.uint8), sound=np.zeros(20000))
    first = data.ClipFolder(tmp_path, 32, "all").clips[0]
    stamp = (first.store / "frames.npy").stat().st_mtime_ns
    again = data.ClipFolder(tmp_path, 32, "all").clips[0]
    assert again == first and (again.store / "frames.npy").stat().st_mtime_ns == stamp
    write_clip(tmp_path / "x.mp4", np.full((30, 64, 64, 3), 200, np.uint8), sound=np.zeros(20000))
    os.utime(tmp_path / "x.mp4", ns=(1, 1))
    edited = data.ClipFolder(tmp_path, 32, "all").clips[0]
    assert edited.store != first.store and edited.frames.mean() > 150
    np.savez(tmp_path / "x.npz", box=np.float32([10, 10, 40, 50]))
    assert data.ClipFolder(tmp_path, 32, "all").clips[0].store != edited.store
    assert data.ClipFolder(tmp_path, 48, "all").clips[0].frames.shape == (30, 48, 48, 3)


def test_two_processes_may_fill_one_cache(folder, tmp_path):
    """Eight readers that start together end with the same arrays and leave nothing half-written behind."""
    def read(workers):
        return data.ClipFolder(folder, 32, "all", tmp_path, workers=workers).clips
    with ThreadPoolExecutor(8) as pool:
        all_clips = list(pool.map(read, [1, 2, 3, 4] * 2))
    assert all(clips == all_clips[0] for clips in all_clips)
    assert len(list(tmp_path.iterdir())) == len(all_clips[0]) == 5


def test_splits_hold_people_apart(folder, tmp_path):
    """By hash no identity is on both sides; split.json and GRID's split.tsv are obeyed."""
    train, val = (data.ClipFolder(folder, 32, part).clips for part in ("train", "val"))
    assert len(train) + len(val) == 5 and train and val
    assert not {clip.identity for clip in train} & {clip.identity for clip in val}
    who = {f"clip {i}": f"person {i % 500}" for i in range(2000)}
    part = data.split_of(tmp_path, who)
    assert 0.02 < np.mean([part[name] == "val" for name in who]) < 0.09
    (tmp_path / "split.tsv").write_text("clip\tsplit\tframes\na\tval\t75\nb\ttrain\t75\n", encoding="utf-8")
    (tmp_path / "clips").mkdir()
    paths = {tmp_path / "clips" / f"{name}.mp4": name for name in "abc"}
    assert list(data.split_of(tmp_path / "clips", paths).values()) == ["val", "train", None]
    (tmp_path / "clips" / "split.json").write_text('{"train": ["a"], "val": ["c"]}', encoding="utf-8")
    assert list(data.split_of(tmp_path / "clips", paths).values()) == ["train", None, "val"]


def test_pictures_are_clips_of_one_frame(folder):
    """The VAE can train on still faces; having no sound, they make no chunk."""
    still = next(clip for clip in data.ClipFolder(folder, 32, "all").clips if clip.name == "portrait")
    assert still.frames.shape == (1, 32, 32, 3) and len(still.audio) == 0 and still.mask.shape == (1, 8, 8)


# --- Appendix F ---

def test_a_copy_is_the_same_clip_seen_otherwise(folder):
    """Picture and mask move alike, every other copy is mirrored, the sound stays, and what is asked for twice is the same."""
    clip = data.ClipFolder(folder, 64, "all").clips[0]
    one, two, other = replace(clip, copy=1), replace(clip, copy=2), replace(clip, name="another", copy=2)
    assert np.array_equal(one.frames[2:9][1:3], one.frames[3:5]) and len(one.frames) == clip.length and np.array_equal(one.audio, clip.audio)
    assert one.frames[:3].shape == clip.frames[:3].shape and one.mask[:3].shape == clip.mask[:3].shape
    quarter = np.zeros((2, 64, 64), np.uint8)
    quarter[:, :32, :32] = 255                               # upper left
    for copy, place in (one, (0, 63)), (two, (0, 0)):
        seen, mask = (data.Copy(x, copy)[:][0].astype(int) for x in (np.repeat(quarter[..., None], 3, 3), quarter[:, ::4, ::4]))
        assert seen[place].min() > 250 and seen[63, 0].max() == seen[63, 63].max() == seen[0, 63 - place[1]].max() == 0
        assert np.abs(seen.mean(2).reshape(16, 4, 16, 4).mean((1, 3)) - mask).mean() < 3           # edges do not fall on quarters
        part = copy.frames.cut(slice(2, 4), 0.25, 0.5, 0.5)   # a piece of it, without the rest
        assert np.abs(part.astype(int) - copy.frames[2:4][:, 16:48, 32:64]).max() <= 2
    grey = np.full((3, 64, 64, 3), 128, np.uint8)             # another light, one for all frames; black and white stay what they are
    lights = [data.Copy(grey, copy)[:] for copy in (one, two, other)]
    assert all((light == light[0, 0, 0]).all() for light in lights) and len({tuple(light[0, 0, 0]) for light in lights} | {(128,) * 3}) == 4
    assert not np.array_equal(two.frames[:1], other.frames[:1]) and not np.array_equal(two.frames[:1], clip.frames[:1])


def test_visual_hash_knows_a_copy_and_nothing_else(tmp_path):
    """Eq. 19: a re-encoded, smaller copy has (almost) the same hash; other clips have not."""
    def hash_of(pictures):
        clip = write_clip(tmp_path / "x.mp4", pictures, sound=np.zeros(9999))
        return data.visual_hash(data.small_grey(data.decode(clip, 64)[0], 16))
    pictures, _ = talking(50, seed=1)
    small = [np.asarray(Image.fromarray(p).resize((48, 48))) for p in pictures]
    assert hash_of(pictures) @ hash_of(small) > 0.97
    assert hash_of(pictures) @ hash_of(talking(50, seed=2)[0]) < 0.5
    assert hash_of(pictures) @ hash_of(pictures[::-1]) < 0.9


def test_scenes_are_cut_where_the_picture_jumps():
    """A hard cut ends a scene; motion, even fast, does not; a long scene is divided evenly."""
    rng = np.random.default_rng(0)
    one, two = rng.integers(0, 255, (2, 16, 16)).astype(np.float32)
    slow = np.stack([one + 3 * i for i in range(30)])
    assert data.scenes_of(np.concatenate([slow, np.stack([two] * 20)]), 12, 500) == [(0, 30), (30, 50)]
    fast = np.stack([one + 20 * np.sin(i) for i in range(60)])
    assert data.scenes_of(fast, 12, 500) == [(0, 60)]
    assert data.scenes_of(slow, 12, 10) == [(0, 10), (10, 20), (20, 30)]


def test_prepare_rejects_what_would_harm_and_says_why(tmp_path, monkeypatch, capsys):
    """Appendix F: every rejected clip is a row with its figures and reason; the kept ones are ordinary clips;
    without OpenCV there is exactly one warning, without a SyncNet exactly one line."""
    monkeypatch.setitem(sys.modules, "cv2", None)
    raw, clean = tmp_path / "räw", tmp_path / "clean"
    raw.mkdir()
    pictures, sound = talking(90, seed=1)
    other, _ = talking(90, seed=2)
    still = np.repeat(pictures[:1], 90, axis=0)
    blurred = [np.asarray(Image.fromarray(p).resize((4, 4)).resize((64, 64))) for p in other]
    wide = np.concatenate([talking(90, seed=3)[0]] * 2, axis=2)
    write_clip(raw / "a good.mp4", pictures, sound=sound)
    larger = [np.asarray(Image.fromarray(p).resize((80, 80))) for p in pictures]
    write_clip(raw / "b copy.mkv", larger, sound=sound)
    write_clip(raw / "frozen.mp4", still, sound=sound)
    write_clip(raw / "black.mp4", talking(90, seed=4)[0] // 32, sound=sound)
    write_clip(raw / "quiet.mp4", talking(90, seed=5)[0], sound=sound * 0.001)
    write_clip(raw / "clipped.mp4", talking(90, seed=6)[0], sound=np.sign(sound) * 1.2)
    write_clip(raw / "blurred.mp4", blurred, sound=sound)
    write_clip(raw / "short.mp4", talking(30, seed=7)[0], sound=sound)
    write_clip(raw / "two scenes.mp4", np.concatenate([wide, 255 - wide[:, ::-1]]), sound=np.tile(sound, 2))
    (raw / "broken.mp4").write_bytes(b"oh")
    data.main(["prepare", str(raw), str(clean), "--size", "64"])
    said = capsys.readouterr()
    assert said.err.count("no face detector") == 1
    assert said.out.count("no SyncNet given: Sync-C/D not filtered") == 1
    assert "clips kept: 3 of 11" in said.out
    with open(clean / "report.csv", encoding="utf-8", newline="") as file:
        rows = {row["clip"]: row for row in csv.DictReader(file)}
    for name, word in (("b copy_000", "duplicate of a good.mp4"), ("frozen_000", "frozen 0.9"),
                       ("black_000", "black 1"), ("quiet_000", "loudness -7"), ("clipped_000", "clipping 0."),
                       ("blurred_000", "sharpness"), ("short_000", "seconds 1.2 < 3.24"),
                       ("broken", "unreadable")):
        assert word in rows[name]["reason"], rows[name]
        assert name == "broken" or float(rows[name]["loudness"]) < 0
    assert float(rows["quiet_000"]["loudness"]) < -60 and float(rows["two scenes_001"]["start"]) == 3.6
    kept = data.ClipFolder(clean, 32, "all")
    assert [clip.name for clip in kept.clips] == ["a good_000", "two scenes_000", "two scenes_001"]
    assert not kept.skipped
    assert [clip.identity for clip in kept.clips] == ["a good", "two scenes", "two scenes"]
    assert all(clip.length == 90 for clip in kept.clips)


def test_thresholds_of_equation_22():
    """Eq. 21-22: a clip is kept if rho, q and Sync-C reach and Sync-D stays below their thresholds; what was
    not measured is not judged."""
    limits = {key: value[1] for key, value in data.LIMITS.items()}
    good = {"seconds": 4, "rho": 0.95, "sharpness": 99, "sync_c": 6.0, "sync_d": 8.0}
    assert data.failures(good, limits) == [] == data.failures({}, limits)
    assert data.failures(good | {"rho": 0.5}, limits) == ["rho 0.5 < 0.9"]
    assert data.failures(good | {"sync_c": 1.0, "sync_d": 12.0}, limits) == ["sync_c 1 < 3", "sync_d 12 > 10"]
    pictures, sound = talking(90)
    assert data.measure(pictures, np.int16(sound * 32767), [None, np.zeros(4)] * 9)["rho"] == 0.5


def test_faces_and_lips_are_judged_by_whom_you_bring(tmp_path, monkeypatch):
    """With a detector the crop is around the face, rho is measured and the box goes into the sidecar;
    a SyncNet is asked only about clips that passed everything else."""
    def red_square(picture):                 # x0 y0 x1 y1 of what is red, if anything is
        y, x = np.nonzero((picture[..., 0] > 180) & (picture[..., 1] < 90))
        return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) if len(x) > 50 else None
    monkeypatch.setattr(data, "face_detector", lambda: red_square)
    (tmp_path / "raw").mkdir()
    for name, seen in (("always", 90), ("half", 50)):
        pictures = np.tile(talking(90, seed=seen)[0] // 3 + 80, (1, 2, 4, 1))                    # 256 x 128
        pictures[:, 40:82, 170:200] = 76, 76, 76             # the same grey: no new scene where it begins
        pictures[:seen, 40:82, 170:200] = 255, 0, 0
        write_clip(tmp_path / "raw" / f"{name}.mp4", pictures, sound=talking(90)[1])
    asked, answers = [], [(5.0, 8.0), (1.0, 8.0)]
    def syncnet(frames, audio):
        asked.append((frames.shape, audio.shape, audio.dtype.name))
        return answers[len(asked) - 1]
    always, half = data.prepare(tmp_path / "raw", tmp_path / "out", syncnet, size=64)
    assert always["rho"] == 1 and always["sync_c"] == 5 and always["reason"] == ""
    assert abs(half["rho"] - 5 / 9) < 0.06 and "rho" in half["reason"]
    assert asked == [((90, 64, 64, 3), (90 * HOP,), "float32")]
    box = np.load(tmp_path / "out" / "always_000.npz")["box"] / 64
    assert np.allclose([box[1], box[3], box[[0, 2]].mean()], [0.15, 0.85, 0.5], atol=0.04)
    clip = data.ClipFolder(tmp_path / "out", 32, "all").clips[0]
    assert clip.mask[0, 4, 4] == 255 and clip.mask[0, 4, 0] == clip.mask[0, 0, 4] == 0
    assert data.prepare(tmp_path / "raw", tmp_path / "new", syncnet, size=64)[0]["reason"] == "sync_c 1 < 3"
    monkeypatch.setattr(metrics, "syncnet_scorer", lambda path: lambda frames, audio: (2.0, len(path)))
    data.main(["prepare", str(tmp_path / "raw"), str(tmp_path / "main"), "--size", "64", "--syncnet", "my weights"])
    assert "sync_c 2 < 3" in (tmp_path / "main" / "report.csv").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="sync_e"):
        data.prepare(tmp_path / "raw", tmp_path / "new", sync_e=3)


def test_a_good_copy_outlives_a_bad_first_file(tmp_path, monkeypatch):
    """Eq. 19 keeps the first GOOD one of a video's copies; a name alone makes no copy: of a.mov and a.mp4 with
    other pictures both stay, under two names; a common "source" in the sidecars makes one."""
    monkeypatch.setattr(data, "face_detector", lambda: None)
    pictures, sound = talking(90, seed=1)
    raw = tmp_path / "raw"
    raw.mkdir()
    write_clip(raw / "1 quiet.mp4", pictures, sound=sound * 0.001)
    write_clip(raw / "2 good.mp4", pictures, sound=sound)
    write_clip(raw / "3 copy.mp4", pictures, sound=sound)
    for seed, name in enumerate(("a.mov", "a.mp4", "x.mp4", "y.mp4", "z.mp4"), 2):
        write_clip(raw / name, talking(90, seed=seed)[0], sound=sound)
    for name, text in (("x", '{"source": 7}'), ("y", '{"source": 7}'), ("z", '{"source": null}'),
                       ("2 good", '{"source": null}')):
        (raw / f"{name}.json").write_text(text, encoding="utf-8")
    rows = {row["clip"]: row["reason"] for row in data.prepare(raw, tmp_path / "out", size=64)}
    assert "loudness" in rows.pop("1 quiet_000")
    assert rows == {"2 good_000": "", "3 copy_000": "duplicate of 2 good.mp4", "a.mov_000": "", "a.mp4_000": "",
                    "x_000": "", "y_000": "duplicate of x.mp4", "z_000": ""}
    clips = data.ClipFolder(tmp_path / "out", 32, "all").clips
    assert [clip.name for clip in clips] == ["2 good_000", "a.mov_000", "a.mp4_000", "x_000", "z_000"]
    assert [clip.identity for clip in clips][1:3] == ["a", "a"]


def test_what_is_written_is_read_in_step(tmp_path):
    """Law: a flash and a click of one frame come back as they were. An AAC encoder that is told no time begins 64 ms late, 1.6 frames."""
    pictures, sound = np.zeros((50, 64, 64, 3), np.uint8), np.zeros(50 * 640, np.int16)
    pictures[30], sound[30 * 640 + 320] = 255, 30000
    data.write_mp4(tmp_path / "x.mp4", pictures, sound)
    frames, audio, _ = data.decode(tmp_path / "x.mp4", 64)
    assert frames.mean((1, 2, 3)).argmax() == 30 and abs(np.abs(audio.astype(int)).argmax() - (30 * 640 + 320)) <= 16


def test_prepare_never_mixes_two_runs(tmp_path, capsys):
    """A folder that holds clips, the raw one among them, is refused before anything is written; one in which
    no clip was kept may be used again."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    for path in (raw, out):
        path.mkdir()
    clip = write_clip(raw / "a.mp4", talking(10)[0], sound=talking(10)[1])
    for dst in (raw, raw / ".." / "raw"):
        with pytest.raises(SystemExit) as end:
            data.main(["prepare", str(raw), str(dst)])
        assert end.value.code == 2 and "holds clips already" in capsys.readouterr().err
    assert list(raw.iterdir()) == [clip]
    assert [row["reason"] != "" for row in data.prepare(raw, out, size=64) + data.prepare(raw, out, size=64)] == [True] * 2
    for left in ("old_000.mp4", "old_000.npz"):
        (out / left).write_bytes(b"")
        with pytest.raises(ValueError, match="holds clips already"):
            data.prepare(raw, out, size=64)
        (out / left).unlink()


@pytest.mark.parametrize("name, text", [
    ("json", "[1, 2]"), ("json", '{"train": 5}'), ("json", '{"train": "abc"}'), ("json", '{"train": [["a"]]}'),
    ("json", "{"), ("json", "3"), ("tsv", "name\tpart\na\ttrain\n"), ("tsv", "clip,split\na,val\n")])
def test_a_split_table_of_another_form_is_named(tmp_path, capsys, name, text):
    """A wrong split.json or split.tsv is one line with its name and the form it must have."""
    (tmp_path / f"split.{name}").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        data.main(["cache", str(tmp_path)])
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(said) == 1 and f"split.{name} needs " in said[0]


def test_kill_ends_in_one_line_and_leaves_nothing_in_the_cache(tmp_path, capsys, monkeypatch):
    """SIGTERM is Ctrl-C: what was half written is gone, what was done is kept for the next run."""
    def killed(*_):
        signal.raise_signal(signal.SIGTERM)

    def unhandled(*_):
        raise AssertionError("the process would be gone, and its temporary folder left")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    signal.signal(signal.SIGTERM, unhandled)
    monkeypatch.setattr(data, "ThreadPoolExecutor", lambda workers: contextlib.nullcontext(Namespace(map=map)))    # signals reach the main thread
    monkeypatch.setattr(data, "decode", killed)
    with pytest.raises(SystemExit) as stop:
        data.main(["cache", str(tmp_path)])
    assert stop.value.code == 130 and capsys.readouterr().err.splitlines()[-1] == "data.py: stopped"
    assert list((tmp_path / ".cache-128").iterdir()) == []


def test_a_wrong_call_is_one_line_and_exit_code_2(tmp_path, capsys):
    """Bad input never ends in a traceback."""
    here, none, new = str(tmp_path), str(tmp_path / "nowhere"), str(tmp_path / "new")
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    for argv, word in ((["cache", none], "nowhere"), (["cache", here, "--size", "33"], "size"),
                       (["cache", here, "--size", "0"], "size"), (["cache", here, "--size", "-8"], "size"),
                       (["cache", here, "--workers", "0"], "workers 0 1 or more"), (["prepare", none, here], "nowhere"),
                       (["prepare", here, new], "no video in"), (["prepare", here, new, "--size", "0"], "size"),
                       (["prepare", here, new, "--size", "-8"], "size"),
                       (["prepare", here, new, "--longest", "0"], "longest"),
                       (["prepare", here, new, "--longest", "inf"], "longest"),
                       (["prepare", here, new, "--syncnet", "no.model"], "no.model")):
        with pytest.raises(SystemExit) as end:
            data.main(argv)
        said = capsys.readouterr().err.strip().splitlines()
        assert end.value.code == 2 and len(said) == 1 and said[0].startswith("data.py: ") and word in said[0], argv
    (tmp_path / "picture.png").unlink()
    for argv in (["cache", here], ["prepare", here, new]):
        with pytest.raises(SystemExit) as end:
            data.main(argv)
        assert end.value.code == 2 and capsys.readouterr().err.splitlines()[-1].startswith("data.py: ")
    assert not (tmp_path / "new").exists()
