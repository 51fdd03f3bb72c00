"""Properties of data.py: what a folder of videos becomes before a network is trained on it.

All videos are made here. The encoders of the chunk tests are small stand-ins: the properties hold
for any VAE and any audio encoder.
"""
import contextlib
import copy
import json
import os
import signal
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
from data import FPS, HOP, SAMPLE_RATE


def write_clip(path, pictures, fps=25, times=None, sound=None, sound_start=0.0,
               sound_rate=SAMPLE_RATE, stretch=1):
    """A small H.264 + AAC file.

    pictures: uint8 (H, W, 3) each; times: seconds of every picture (default: constant rate);
    sound: float (samples,) at `sound_rate` from `sound_start` s on, None: no audio stream;
    stretch: width / height of a pixel. The index is in front, so that a truncated file opens."""
    fps = Fraction(fps).limit_denominator(1001)
    index = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=index) as file:
        options = {"crf": "10", "preset": "ultrafast"}
        video = file.add_stream("libx264", rate=fps, options=options)
        video.height, video.width = pictures[0].shape[:2]
        video.pix_fmt = "yuv420p"
        video.codec_context.sample_aspect_ratio = Fraction(stretch)
        tick = 1 / fps
        if times is not None:
            tick = video.codec_context.time_base = Fraction(1, 90000)
        if sound is not None:
            audio = file.add_stream("aac", rate=sound_rate, layout="mono")
        for i, picture in enumerate(pictures):
            picture = np.ascontiguousarray(picture)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.time_base = tick
            frame.pts = i if times is None else round(times[i] / tick)
            file.mux(video.encode(frame))
        file.mux(video.encode())
        if sound is not None:
            frame = av.AudioFrame.from_ndarray(np.float32(sound)[None], "fltp", "mono")
            frame.sample_rate = sound_rate
            frame.time_base = Fraction(1, sound_rate)
            frame.pts = round(sound_start * sound_rate)
            in_1024 = av.AudioResampler("fltp", "mono", sound_rate, frame_size=1024)
            for part in in_1024.resample(frame) + in_1024.resample(None):
                file.mux(audio.encode(part))
            file.mux(audio.encode())
    return path


def talking(n, seed=0, size=64):
    """n pictures of a textured square that moves on a textured ground, and a tone: a good clip."""
    rng = np.random.default_rng(seed)
    ground = rng.integers(0, 255, (size, size, 3))
    square = rng.integers(0, 255, (size // 2, size // 2, 3))
    steps = np.cumsum(rng.integers(-1, 2, (n, 2)), axis=0)
    corners = steps.clip(-size // 8, size // 8) + size // 4
    pictures = np.repeat(ground[None].astype(np.uint8), n, axis=0)
    for picture, (y, x) in zip(pictures, corners, strict=True):
        picture[y:y + size // 2, x:x + size // 2] = square
    return pictures, 0.3 * np.sin(np.arange(n * HOP) * 0.1)


def flash_and_click(path, shown, at, sound_rate=SAMPLE_RATE, sound_start=0.0, **more):
    """Dark pictures and silence; at `at` s three pictures are bright and the sound clicks.

    shown: seconds of every picture."""
    pictures = np.full((len(shown), 48, 64, 3), 30, np.uint8)
    first = np.searchsorted(shown, at + 1e-6) - 1
    pictures[first:first + 3] = 220
    sound = np.zeros(int((shown[-1] + 0.1 - sound_start) * sound_rate), np.float32)
    click = int((at - sound_start) * sound_rate)
    sound[click:click + sound_rate // 100] = 0.8
    return write_clip(path, pictures, sound=sound, sound_rate=sound_rate,
                      sound_start=sound_start, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four clips of two people: 50, 50, 40 and 12 frames, and a portrait."""
    path = tmp_path_factory.mktemp("clips with ä space")
    people = ("a ü", 50, "ann"), ("b", 50, "bob"), ("c", 40, "bob"), ("short", 12, "ann")
    for name, n, identity in people:
        pictures, sound = talking(n, seed=n + len(name))
        write_clip(path / f"{name}.mp4", pictures, sound=sound)
        text = json.dumps({"identity": identity})
        (path / f"{name}.json").write_text(text, encoding="utf-8")
    Image.fromarray(talking(1, size=100)[0][0]).save(path / "portrait.png")
    return path


# ------------------------------------------------------------------------------------------- pixels


def test_pixels_survive_the_way_to_a_tensor_and_back():
    """Property: 0 is -1, 255 is 1, every level comes back, and what is out of range is clipped."""
    frames = np.uint8(np.arange(5 * 4 * 6 * 3) % 256).reshape(5, 4, 6, 3)
    video = data.to_tensor(frames)
    assert video.shape == (1, 3, 5, 4, 6) and video.dtype == torch.float32
    assert video[0, 1, 2, 3, 5] == frames[2, 3, 5, 1] / 127.5 - 1
    assert video.min() == -1 and video.max() == 1
    assert (data.to_uint8(video[0]) == frames).all()
    assert (data.to_uint8(300 * video[0]) == np.where(frames < 128, 0, 255)).all()


# ------------------------------------------------------------------------------------------- a file


def test_sound_and_picture_stay_together_at_any_rate(tmp_path):
    """Property: what happens at one moment of a file is in one frame and its 640 samples.

    A flash and a click land within one 25-fps frame of each other and of that moment, for constant
    rates, a variable rate, an audio stream that starts late, and a video that starts late."""
    cases = []
    for fps in (24, 25, 29.97, 30):
        cases.append((f"{fps}.mp4", np.arange(int(2 * fps)) / fps, {"fps": fps}))
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
            assert abs(flash - int(25 * at)) <= 1, (name, at, flash)
            assert abs(click - 25 * at) < 0.1, (name, at, click)


def test_length_is_the_duration_at_25_fps(tmp_path):
    """Property: N = 25 x duration, rounded, at any rate; the sound is padded or cut to 640 N."""
    for fps, n, sound in ((24, 48, 10), (25, 50, 99999), (30, 45, 16000), (12.5, 25, 0)):
        silence = np.zeros(sound + 1024)
        clip = write_clip(tmp_path / "x.mp4", talking(n)[0], fps=fps, sound=silence)
        frames, audio, mask = data.decode(clip, 32)
        assert len(frames) == round(n / fps * 25) == len(mask) == len(audio) / HOP
        assert frames.shape[1:] == (32, 32, 3) and mask.shape[1:] == (8, 8)


def test_pictures_are_decoded_as_they_are_meant_to_be_shown(tmp_path):
    """Property: pixels that are not square are made square; a phone's video is turned upright."""
    pictures = np.zeros((5, 64, 96, 3), np.uint8)
    pictures[:, :, :48] = 200                               # the left half is bright
    wide = write_clip(tmp_path / "wide.mp4", pictures, stretch=2)
    assert next(data.read_video(wide)).shape == (64, 192, 3)


def with_matrix(path, a, b, c, d):
    """The same mp4 with another display matrix: pixel (x, y) is shown at (a x + c y, b x + d y)."""
    file = bytearray(path.read_bytes())
    at = file.find(b"tkhd") + 44                            # the matrix, in fixed point numbers
    numbers = a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30
    file[at:at + 36] = struct.pack(">9i", *numbers)
    path.write_bytes(file)


def test_a_turned_or_mirrored_video_is_shown_as_players_do(tmp_path):
    """Property: all eight ways to turn and mirror a picture are followed: phones turn it, the
    programs of front cameras mirror it."""
    pictures = np.full((3, 64, 96, 3), 20, np.uint8)
    pictures[:, :32, :48] = 220                             # stored at the top left
    x, y = np.array([-24, -16])                             # its middle, from that of the picture
    clip = write_clip(tmp_path / "phone.mp4", pictures)
    for one in (1, -1):
        for other in (1, -1):
            for a, b, c, d in ((one, 0, 0, other), (0, one, other, 0)):
                with_matrix(clip, a, b, c, d)
                shown = next(data.read_video(clip))
                height, width = shown.shape[:2]
                assert (width, height) == ((96, 64) if a else (64, 96))
                bright = np.argwhere(shown[..., 0] > 120).mean(0) + 0.5
                expected = height / 2 + b * x + d * y, width / 2 + a * x + c * y
                assert np.allclose(bright, expected, atol=2), (a, b, c, d)


def test_fields_become_frames_and_frames_stay(tmp_path):
    """Property: of interlaced video no comb is left where something moves; other video is not
    touched."""
    pictures = np.full((10, 64, 160, 3), 40, np.uint8)
    for i, picture in enumerate(pictures):                  # the lower field is half a frame later
        picture[::2, 12 * i:12 * i + 24] = picture[1::2, 12 * i + 6:12 * i + 30] = 200
    combs = {}
    for name, options in (("fields", {"flags": "+ildct+ilme", "x264-params": "tff=1"}),
                          ("frames", {})):
        with av.open(str(tmp_path / f"{name}.mkv"), "w") as file:
            stream = file.add_stream("libx264", 25, options={"crf": "1"} | options)
            stream.height, stream.width, stream.pix_fmt = 64, 160, "yuv420p"
            for picture in pictures:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
            file.mux(stream.encode())
        shown = np.stack(list(data.read_video(tmp_path / f"{name}.mkv"))).astype(float)
        combs[name] = np.abs(np.diff(shown[2:-2, 8:-8, :, 0], axis=1)).mean()
    with av.open(str(tmp_path / "frames.mkv")) as file:
        plain = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert (np.stack(plain) == shown).all()
    assert combs["fields"] < 0.2 * combs["frames"]


@pytest.mark.parametrize("transfer, name", [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused_with_its_name(tmp_path, transfer, name):
    """Property: a phone's HDR video is a row of the report, not a dark and colourless clip."""
    pictures, sound = talking(5)
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", 25)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.color_trc = transfer
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture)
            frame.color_trc = transfer
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    with pytest.raises(ValueError, match=f"HDR video .{name}.: convert it to SDR"):
        data.decode(tmp_path / "a.mp4", 32)


def test_training_pictures_are_read_as_portraits_are(tmp_path):
    """Property: 16 bits, a palette, transparency: one reader for both, so both see one picture."""
    grey = np.tile(np.linspace(0, 255, 32).round(), (32, 1))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    for name in ("deep", "clear"):
        picture = next(data.read_video(tmp_path / f"{name}.png"))
        portrait = data.to_uint8(common.load_image(tmp_path / f"{name}.png", 32)[0][:, None])[0]
        assert (picture == portrait).all()
    assert abs(next(data.read_video(tmp_path / "deep.png")).mean() - grey.mean()) < 2


def test_a_square_file_with_a_sidecar_is_not_cropped_again(tmp_path):
    """Property: a sidecar's box and mask belong to the whole square of a clip that was made here.

    In a wide file the box shows where the square is."""
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
    """Property (Eq. 20): the square is the largest in the middle, or it is around the face.

    There the face is as high as FACE_BOX and at its place, if there is room; the square never
    leaves the picture."""
    assert data.square_crop(160, 90) == (35, 0, 125, 90)
    x0, y0, x1, y1 = data.square_crop(1000, 800, (400, 300, 500, 440))
    assert np.allclose([x1 - x0, (x0 + x1) / 2, (y0 + y1) / 2], [140 / 0.70, 450, 370 - 0.03 * 200])
    for box in ((0, 0, 50, 70), (950, 700, 1000, 800), (0, 0, 1000, 800)):
        x0, y0, x1, y1 = data.square_crop(1000, 800, box)
        assert min(x0, y0) >= 0 and x1 <= 1000 and y1 <= 800 and np.isclose(x1 - x0, y1 - y0)


def test_the_face_mask_comes_from_the_sidecar_or_is_an_ellipse():
    """Property (Eq. 23): a given mask is kept, else an ellipse makes it."""
    frames = np.zeros((3, 64, 64, 3), np.uint8)
    given = np.zeros((3, 32, 32), np.uint8)
    given[1, :, :16] = 255
    assert (data.face_mask(frames, given, None)[:, 0, 0] == [0, 255, 0]).all()
    ellipse = data.face_mask(frames, None, (0.25, 0.0, 0.75, 1.0))
    assert ellipse.shape == (3, 16, 16) and ellipse[0, 8, 8] == 255 and ellipse[0, 0, 0] == 0
    assert abs(ellipse[0].mean() / 255 - np.pi / 4 * 0.5) < 0.05
    with pytest.raises(ValueError, match="2 masks for 3 frames"):
        data.face_mask(frames, given[:2], None)


def test_sound_begins_with_the_video_stream_that_is_read(tmp_path):
    """Property: of two video streams the best is read, and the sound is cut at *its* first picture.

    A cover picture in front of a late video would shift the sound by 0.4 s."""
    times = np.arange(50) / 25 + 0.4
    late = flash_and_click(tmp_path / "late.mkv", times, 0.4 + 1.13, times=times)
    cover = write_clip(tmp_path / "cover.mkv", np.full((1, 48, 64, 3), 99, np.uint8))
    both = tmp_path / "both.mkv"
    with av.open(str(both), "w") as file, av.open(str(cover)) as one, av.open(str(late)) as two:
        streams = {s: file.add_stream_from_template(s) for s in (*one.streams, *two.streams)}
        for packet in (packet for source in (one, two) for packet in source.demux()):
            if packet.dts is not None:
                packet.stream = streams[packet.stream]
                file.mux(packet)
    frames, audio, _ = data.decode(both, 16)
    click = np.flatnonzero(np.abs(audio) > 8000)[0] / HOP
    assert len(frames) == 50 and abs(click - 25 * 1.13) < 0.1


def test_a_bad_file_is_skipped_with_a_reason(tmp_path):
    """Property: no file of a folder can stop the program; each bad one is a line of the report.

    Truncated, empty, without sound, without pictures, of one frame, damaged, nonsense."""
    pictures, sound = talking(50)
    good = write_clip(tmp_path / "good.mp4", pictures, sound=sound)
    whole = good.read_bytes()
    truncated = [f"truncated {tenths}.mp4" for tenths in (1, 3, 5, 9)]
    for name, tenths in zip(truncated, (1, 3, 5, 9), strict=True):
        (tmp_path / name).write_bytes(whole[:len(whole) * tenths // 10])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "nonsense.avi").write_bytes(b"not a video" * 99)
    (tmp_path / "picture.png").write_bytes(b"not a picture")
    Image.fromarray(pictures[0]).save(tmp_path / "program.png", "EPS")  # Pillow would run programs
    write_clip(tmp_path / "silent.mp4", pictures)
    write_clip(tmp_path / "one.mp4", pictures[:1], sound=sound[:1024])
    with av.open(str(tmp_path / "no video.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        silence = np.zeros((1, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        file.mux(stream.encode(frame) + stream.encode())
    damaged = np.frombuffer(whole, np.uint8).copy()
    damaged[whole.find(b"mdat") + 5000::997] ^= 255
    (tmp_path / "damaged.mp4").write_bytes(damaged.tobytes())
    write_clip(tmp_path / "sidecar.mp4", pictures, sound=sound)
    np.savez(tmp_path / "sidecar.npz", mask=np.zeros((7, 8, 8), np.uint8))

    clips = data.ClipFolder(tmp_path, 32, "all")
    why = dict(clips.skipped)
    assert [clip.name for clip in clips.clips] == ["good"]
    assert why.keys() == {*truncated, "empty.mp4", "nonsense.avi", "picture.png", "program.png",
                          "silent.mp4", "one.mp4", "no video.mp4", "damaged.mp4", "sidecar.mp4"}
    for name, reason in (("silent", "no audio"), ("one", "1 frames"), ("no video", "no video"),
                         ("sidecar", "7 masks for 50")):
        assert reason in why[f"{name}.mp4"]
    assert "not a picture" in why["program.png"]
    assert all(name in clips.report() for name in why)
    for_the_vae = data.ClipFolder(tmp_path, 32, "all", need_audio=False)
    assert "silent" in [clip.name for clip in for_the_vae.clips]


# ----------------------------------------------------------------------------------------- a folder


@pytest.mark.parametrize("ending", ["m4v", "3gp", "ts", "flv", "mpg"])
def test_every_common_video_is_read(tmp_path, ending):
    """Property: what phones, cameras and screen recorders write is read, in step with its sound."""
    clip = flash_and_click(tmp_path / "a.mp4", np.arange(25) / 25, 0.51)
    with av.open(str(clip)) as old, av.open(str(tmp_path / f"b.{ending}"), "w") as new:
        if ending == "mpg":                                 # holds no H.264: encoded again
            picture, voice = new.add_stream("mpeg2video", 25), new.add_stream("mp2", 44100)
            picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
            for frame in old.decode():
                stream = picture if isinstance(frame, av.VideoFrame) else voice
                new.mux(stream.encode(frame))
            new.mux(picture.encode() + voice.encode())
        else:
            streams = {stream: new.add_stream_from_template(stream) for stream in old.streams}
            for packet in old.demux():
                if packet.dts is not None:
                    packet.stream = streams[packet.stream]
                    new.mux(packet)
    frames, audio, _ = data.decode(tmp_path / f"b.{ending}", 16)
    flash = np.flatnonzero(frames.mean((1, 2, 3)) > 120)[0]
    click = np.flatnonzero(np.abs(audio) > 8000)[0] / HOP
    assert abs(flash - 12) <= 1 and abs(click - 12.75) < 1  # 40 ms
    assert [path.name for path in data.media_files(tmp_path, data.VIDEOS)] == [
        "a.mp4", f"b.{ending}"]


def test_what_is_left_out_is_said_in_one_line(tmp_path, capsys):
    """Property: a folder never shrinks in silence: unread endings and skipped files have a line
    with a count each."""
    pictures, sound = talking(30)
    for name, who in (("a", "ann"), ("b", "bob")):
        write_clip(tmp_path / f"{name}.mp4", pictures, sound=sound)
        (tmp_path / f"{name}.json").write_text(json.dumps({"identity": who}))
    for name in ("c.mp4", "d.heic", "e.heic", "f.mxf", ".hidden.mxf"):
        (tmp_path / name).write_bytes(b"what is it?")
    (tmp_path / "more").mkdir()
    (tmp_path / "split.json").write_text('{"train": ["a", "c"], "val": ["b"]}')
    assert len(data.ClipFolder(tmp_path, 32, "train", cache=tmp_path / ".cache").clips) == 1
    unread, skipped = capsys.readouterr().err.splitlines()
    assert unread == f"note: not read in {tmp_path}: .heic 2, .mxf 1, folders 1"
    assert skipped.startswith("note: 1 of 2 files skipped: c.mp4 (")
    data.ClipFolder(tmp_path, 32, "val", cache=tmp_path / ".cache")
    assert capsys.readouterr().err == ""


def test_one_person_can_be_trained_on(tmp_path, capsys, monkeypatch):
    """Property: of one person's clips the last is held out, of a lone clip its end; that is said.

    A lone clip of less than 10 s is all training, and the reason is given."""
    def decode(path, *_):
        length = 300 if path.stem == "lone" else 30
        levels = np.arange(length)[:, None, None, None].astype(np.uint8)
        frames = np.broadcast_to(levels, (length, 16, 16, 3))
        return frames, np.arange(length * HOP).astype(np.int16), frames[:, :4, :4, 0]
    monkeypatch.setattr(data, "decode", decode)
    (tmp_path / "lone.mp4").touch()
    parts = {part: data.ClipFolder(tmp_path, 16, part).clips for part in ("train", "val", "all")}
    assert "shows one person" in capsys.readouterr().err
    (train,), (val,), (whole,) = parts.values()
    assert (train.length, val.length, whole.length) == (219, 81, 300)
    for what in ("frames", "audio", "mask"):
        together = np.concatenate([getattr(train, what), getattr(val, what)])
        assert (together == getattr(whole, what)).all()
    (tmp_path / "lone.mp4").unlink()
    for name in "abc":
        (tmp_path / f"{name}.mp4").touch()
        (tmp_path / f"{name}.json").write_text('{"identity": "me"}')
    for part, names in (("train", ["a", "b"]), ("val", ["c"])):
        assert [clip.name for clip in data.ClipFolder(tmp_path, 16, part).clips] == names
    (tmp_path / "b.mp4").unlink()
    (tmp_path / "c.mp4").unlink()
    assert data.ClipFolder(tmp_path, 16, "train").clips[0].length == 30
    assert "the end is held out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="too short to hold out its end"):
        data.ClipFolder(tmp_path, 16, "val")
    assert "held out" not in capsys.readouterr().err        # it was not


def test_only_an_edited_file_is_decoded_again(tmp_path):
    """Property: the cache is keyed by file, sidecar and settings; a second run only reads."""
    def clip(size=32):
        return data.ClipFolder(tmp_path, size, "all").clips[0]

    def write(level):
        pictures = np.full((30, 64, 64, 3), level, np.uint8)
        write_clip(tmp_path / "x.mp4", pictures, sound=np.zeros(20000))

    write(50)
    first = clip()
    stamp = (first.store / "frames.npy").stat().st_mtime_ns
    again = clip()
    assert again == first and (again.store / "frames.npy").stat().st_mtime_ns == stamp
    write(200)
    os.utime(tmp_path / "x.mp4", ns=(1, 1))
    edited = clip()
    assert edited.store != first.store and edited.frames.mean() > 150
    np.savez(tmp_path / "x.npz", box=np.float32([10, 10, 40, 50]))
    assert clip().store != edited.store
    assert clip(48).frames.shape == (30, 48, 48, 3)


def test_several_processes_may_fill_one_cache(folder, tmp_path):
    """Property: eight readers that start together get the same arrays; nothing is half-written."""
    def read(workers):
        return data.ClipFolder(folder, 32, "all", tmp_path, workers=workers).clips
    with ThreadPoolExecutor(8) as pool:
        all_clips = list(pool.map(read, [1, 2, 3, 4] * 2))
    assert all(clips == all_clips[0] for clips in all_clips)
    assert len(list(tmp_path.iterdir())) == len(all_clips[0]) == 5


def test_splits_keep_people_apart(folder, tmp_path):
    """Property: no identity is in both parts; split.json and GRID's split.tsv come first."""
    train, val = (data.ClipFolder(folder, 32, part).clips for part in ("train", "val"))
    assert len(train) + len(val) == 5 and train and val
    assert not {clip.identity for clip in train} & {clip.identity for clip in val}
    identities = {f"clip {i}": f"person {i % 500}" for i in range(2000)}
    parts = data.split_of(tmp_path, identities)
    assert 0.02 < np.mean([parts[name] == "val" for name in identities]) < 0.09
    table = "clip\tsplit\tframes\na\tval\t75\nb\ttrain\t75\n"
    (tmp_path / "split.tsv").write_text(table, encoding="utf-8")
    (tmp_path / "clips").mkdir()
    paths = {tmp_path / "clips" / f"{name}.mp4": name for name in "abc"}
    parts = data.split_of(tmp_path / "clips", paths)
    assert list(parts.values()) == ["val", "train", None]
    table = '{"train": ["a"], "val": ["c"]}'
    (tmp_path / "clips" / "split.json").write_text(table, encoding="utf-8")
    parts = data.split_of(tmp_path / "clips", paths)
    assert list(parts.values()) == ["train", None, "val"]


def test_a_file_that_no_split_names_is_reported(tmp_path):
    """Property: a clip that the split table forgot is skipped by name, not silently."""
    for name in "ab":
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
    (tmp_path / "split.json").write_text('{"train": ["a"]}', encoding="utf-8")
    clips = data.ClipFolder(tmp_path, 32, "train")
    assert [clip.name for clip in clips.clips] == ["a"]
    assert clips.skipped == [("b.png", "in no split")]
    assert len(data.ClipFolder(tmp_path, 32, "all").clips) == 2


@pytest.mark.parametrize("name, text", [
    ("json", "[1, 2]"), ("json", '{"train": 5}'), ("json", '{"train": "abc"}'),
    ("json", '{"train": [["a"]]}'), ("json", "{"), ("json", "3"),
    ("tsv", "name\tpart\na\ttrain\n"), ("tsv", "clip,split\na,val\n")])
def test_a_split_table_of_another_form_is_one_clear_line(tmp_path, capsys, name, text):
    """Property: the message has the table's name and the form that it must have."""
    (tmp_path / f"split.{name}").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        data.main([str(tmp_path)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and f"split.{name} needs " in lines[0]


def test_a_name_that_stdout_has_not_is_printed_as_an_escape(tmp_path, monkeypatch):
    """Property: a report about a file of any name is printed on a terminal of any encoding."""
    clips, out = tmp_path / "clips", tmp_path / "out.txt"
    clips.mkdir()
    (clips / "\u4e2d.mp4").touch()
    Image.new("RGB", (32, 32)).save(clips / "a.png")
    with open(out, "w", encoding="cp1252") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        data.main([str(clips), "--size", "32"])
    assert "\\u4e2d.mp4: " in out.read_text(encoding="cp1252")


def test_a_picture_is_a_clip_of_one_frame(folder):
    """Property: the VAE can train on still faces; they are silent, so they make no chunk."""
    clips = data.ClipFolder(folder, 32, "all").clips
    still = next(clip for clip in clips if clip.name == "portrait")
    assert still.frames.shape == (1, 32, 32, 3) and still.mask.shape == (1, 8, 8)
    assert len(still.audio) == 0 and data.chunk_grid(still, None, CFG) == []


def test_kill_ends_in_one_line_and_leaves_nothing_in_the_cache(tmp_path, capsys, monkeypatch):
    """Property: SIGTERM is Ctrl-C; what was half-written is gone, the rest is kept."""
    def killed(*_):
        signal.raise_signal(signal.SIGTERM)

    def unhandled(*_):
        raise AssertionError("the process would be gone, and its temporary folder left")

    def in_main_thread(workers):                            # only there do signals arrive
        return contextlib.nullcontext(SimpleNamespace(map=map))

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    signal.signal(signal.SIGTERM, unhandled)
    monkeypatch.setattr(data, "ThreadPoolExecutor", in_main_thread)
    monkeypatch.setattr(data, "decode", killed)
    with pytest.raises(SystemExit) as stop:
        data.main([str(tmp_path)])
    assert stop.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "data.py: stopped"
    assert list((tmp_path / ".cache-128").iterdir()) == []


def test_a_wrong_call_is_one_line_and_exit_code_2(tmp_path, capsys):
    """Property: bad input never ends in a traceback."""
    here, none = str(tmp_path), str(tmp_path / "nowhere")
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 64)).save(picture)
    for argv, word in (([none], "nowhere"), ([here, "--size", "33"], "size"),
                       ([here, "--size", "0"], "size"), ([here, "--size", "-8"], "size"),
                       ([here, "--workers", "0"], "workers 0 1 or more"), ([], "one or more")):
        with pytest.raises(SystemExit) as end:
            data.main(argv)
        lines = capsys.readouterr().err.strip().splitlines()
        assert end.value.code == 2 and len(lines) == 1, argv
        assert lines[0].startswith("data.py: ") and word in lines[0], argv
    picture.unlink()
    with pytest.raises(SystemExit) as end:
        data.main([here])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("data.py: no all clip in")
    with pytest.raises(SystemExit) as end:
        data.main([here, "--sise", "64"])
    assert end.value.code == 2


# ------------------------------------------------------------------------------------------- chunks

CFG = SimpleNamespace(frames=33, continuity_frames=9, offsets=2, references=2, encode_bf16=False)


class CausalVAE:
    """Stands in for vae.WanVAE: means of 8 x 8 pixels and of the frames of a latent."""

    def __init__(self, mean=0.0):
        self.config = SimpleNamespace(latents_mean=(mean,), latents_std=(1.0,))
        self.encoder, self.conv1, self.conv2 = (torch.nn.Linear(2, 2) for _ in range(3))
        self.decoder = torch.nn.Linear(2, 2)

    def encode(self, video):
        first, rest = video[:, :, :1], video[:, :, 1:].unflatten(2, (-1, 4)).mean(3)
        latents = torch.cat([first, rest], 2)                               # (B, 3, F, H, W)
        return torch.nn.functional.avg_pool3d(latents, (1, 8, 8))


class LoudnessEncoder:
    """Stands in for audio.AudioEncoder: each frame's loudness, and where the sound was cut off."""

    def __init__(self):
        self.model, self.window = torch.nn.Linear(1, 1), None

    def features(self, sound, start, frames):
        loudness = np.abs(sound[start * HOP:(start + frames) * HOP].reshape(-1, HOP)).mean(1)
        out = torch.full((frames, 2, 3), float(start + frames))             # (T, L, A)
        out[:, 0, 0] = torch.from_numpy(loudness)
        return out


def repeated(vae, image, frames):
    """Stands in for tre.temporal_reference_encoding, Eq. 3."""
    return vae.encode(image[:, :, None].expand(-1, -1, frames, -1, -1))


def make_clip(folder, name, length, seed=0):
    """A decoded clip of noise that gets louder, 32 x 32 pixels."""
    rng, store = np.random.default_rng(seed), folder / name
    store.mkdir(parents=True)
    sound = rng.normal(size=(length, HOP)) * np.arange(length)[:, None] * 100
    arrays = {"frames": rng.integers(0, 255, (length, 32, 32, 3), np.uint8),
              "mask": np.zeros((length, 8, 8), np.uint8),
              "audio": sound.astype(np.int16).ravel()}
    for what, array in arrays.items():
        np.save(store / f"{what}.npy", array)
    return data.Clip(name, name, folder / f"{name}.mp4", store, length)


@pytest.fixture
def clips(tmp_path):
    return [make_clip(tmp_path, "long", 70, 0), make_clip(tmp_path, "other", 70, 1),
            make_clip(tmp_path, "short", 31, 2)]


def encode(clips, cache, vae=None, audio_encoder=None, reference=repeated, cfg=CFG, **more):
    torch.manual_seed(0)                                    # the same stand-ins every time
    vae, audio_encoder = vae or CausalVAE(), audio_encoder or LoudnessEncoder()
    return data.encode_clips(clips, vae, audio_encoder, reference, cache, cfg, **more)


def test_chunks_tile_a_clip_several_times():
    """Property: chunks are one step apart, and again from later frames on; none leaves the clip."""
    starts = data.chunk_starts(384, 81, 72, 2)
    assert starts == [0, 72, 144, 216, 288, 36, 108, 180, 252]
    assert data.chunk_starts(75, 73, 72, 3) == [0]
    assert data.chunk_starts(73, 73, 72, 100) == [0]        # and none comes twice


def test_a_short_clip_is_one_chunk_of_its_own_length(tmp_path):
    """Property: a chunk has 4k + 1 frames and more than the n that it is given; sound is needed."""
    for length, expected in ((33, 33), (32, 29), (31, 29), (13, 13), (12, None), (1, None)):
        chunks = data.chunk_grid(make_clip(tmp_path, f"{length}", length), None, CFG)
        assert [chunk.length for chunk in chunks] == [expected] * (expected is not None), length
    silent = make_clip(tmp_path, "silent", 33)
    np.save(silent.store / "audio.npy", np.zeros(0, np.int16))
    assert data.chunk_grid(silent, None, CFG) == []
    with pytest.raises(ValueError, match="none of 1 clips has sound and more than 12 frames"):
        encode([silent], tmp_path / "cache")


def test_chunks_left_counts_the_chunks_of_a_rollout(clips):
    """Property: from chunk to chunk, n frames shared, exactly so many fit in the rest of a clip."""
    clip, step = replace(clips[0], length=105), CFG.frames - CFG.continuity_frames
    for chunk in data.chunk_grid(clip, None, CFG):
        last = chunk.start + (data.chunks_left(chunk, CFG) - 1) * step
        assert last + chunk.length <= clip.length < last + step + chunk.length
    assert [data.chunks_left(c, CFG) for c in data.chunk_grid(clip, None, CFG)[:4]] == [4, 3, 2, 1]


def test_a_chunk_holds_what_the_encoders_make_of_its_frames(clips, tmp_path):
    """Property (Eq. 24): a stored chunk is E(V), z_id and the audio features, rounded to half.

    Each is encoded by itself, as in inference: no frame and no sound after a chunk is in it."""
    vae, chunks = CausalVAE(), encode(clips, tmp_path / "cache")
    assert [c.start for c in chunks if c.clip.name == "long"] == [0, 24, 12, 36]
    for chunk in chunks:
        clip, end = chunk.clip, chunk.start + chunk.length
        latents = vae.encode(data.to_tensor(clip.frames[chunk.start:end]))
        assert torch.equal(chunk.tensor("latents", chunk.row), latents[0].half().float())
        audio = chunk.array("audio")[chunk.row]             # (T, L, A)
        sound = np.array(clip.audio) / np.float32(32768)
        loudness = np.abs(sound.reshape(-1, HOP)).mean(1)[chunk.start:end]
        assert (audio[:, 0, 0] == np.float16(loudness)).all() and (audio[:, 1] == end).all()
        assert chunk.pictures[-1] == clip.length - 1
        for j, picture in enumerate(chunk.pictures):
            still = data.to_tensor(np.repeat(clip.frames[picture][None], chunk.length, 0))
            z_id = vae.encode(still)
            assert (chunk.array("identity")[j] == z_id[0].half().numpy()).all()


def test_the_first_latents_of_a_chunk_are_its_continuity_reference(clips, tmp_path):
    """Property (section 3.2): with a causal VAE, kappa_gt need not be stored.

    The encoding of the n shared frames alone is the later chunk's first m latents."""
    vae = CausalVAE()
    n, m = CFG.continuity_frames, 1 + (CFG.continuity_frames - 1) // 4
    for chunk in encode(clips, tmp_path / "cache"):
        shared = chunk.clip.frames[chunk.start:chunk.start + n]
        kappa = vae.encode(data.to_tensor(shared))[0].half().numpy()
        assert (chunk.array("latents")[chunk.row][:, :m] == kappa).all()


def test_reference_pictures_are_the_first_frames_of_chunks(clips, tmp_path):
    """Property: picture j begins chunk j, so a first chunk has its own first frame as reference.

    The last picture is the clip's last frame: chunks that begin early have one outside."""
    for chunk in encode(clips[:2], tmp_path / "cache"):
        starts = [c.start for c in data.chunk_grid(chunk.clip, None, CFG)]
        assert chunk.pictures == (*starts[:CFG.references], 69)


def test_the_cache_is_made_once_and_again_for_other_weights(clips, tmp_path, monkeypatch):
    """Property: a second run reads. Other encoders, another grid, another reference: encoded again.

    The decoder's weights do not matter, for it encodes nothing."""
    calls, cache = [], tmp_path / "cache"
    chunks = encode(clips, cache)

    def count(*args):
        calls.append(args)
        return {"latents": np.zeros(1)}
    monkeypatch.setattr(data, "encode_clip", count)

    def calls_of(**changed):
        before = len(calls)
        result = encode(clips, cache, **changed)
        return len(calls) - before, result

    assert calls_of() == (0, chunks)
    torch.manual_seed(0)
    vae, audio_encoder = CausalVAE(), LoudnessEncoder()
    for part, times in (("decoder", 0), ("conv2", 0), ("encoder", 3), ("conv1", 3)):
        other = copy.deepcopy(vae)
        next(getattr(other, part).parameters()).data[0] += 1
        assert calls_of(vae=other, audio_encoder=audio_encoder)[0] == times, part
    other = copy.deepcopy(audio_encoder)
    next(other.model.parameters()).data[0] += 1
    assert calls_of(vae=vae, audio_encoder=other)[0] == 3
    windowed = copy.deepcopy(audio_encoder)
    windowed.window = 8                                     # the same weights, other features
    assert calls_of(vae=vae, audio_encoder=windowed)[0] == 3
    scaled = copy.deepcopy(vae)
    scaled.config.latents_std = (2.0,)
    assert calls_of(vae=scaled, audio_encoder=audio_encoder)[0] == 3

    def another_reference(vae, image, frames):
        return repeated(vae, image, frames)
    assert calls_of(reference=another_reference)[0] == 3
    for option in ({"frames": 29}, {"continuity_frames": 5}, {"offsets": 1}, {"references": 1}):
        assert calls_of(cfg=SimpleNamespace(**vars(CFG) | option))[0] == 3, option


def test_a_killed_run_goes_on_encoding_where_it_was(clips, tmp_path, monkeypatch):
    """Property: after a kill, finished clips are kept, and only the rest is encoded."""
    cache, done, encode_clip = tmp_path / "cache", [], data.encode_clip

    def killed_at_the_second(chunks, *args):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(chunks[0].clip.name)
        return encode_clip(chunks, *args)
    monkeypatch.setattr(data, "encode_clip", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        encode(clips, cache)
    assert done == ["long"] and len(list(cache.iterdir())) == 1

    def counted(chunks, *args):
        done.append(chunks[0].clip.name)
        return encode_clip(chunks, *args)
    monkeypatch.setattr(data, "encode_clip", counted)
    encode(clips, cache)
    assert done == ["long", "other", "short"] and len(list(cache.iterdir())) == 3


def test_processes_share_the_encoding(clips, tmp_path, monkeypatch):
    """Property: under torchrun every process gets all chunks and encodes its part of the clips."""
    monkeypatch.setattr(data.dist, "barrier", lambda: None)
    cache = tmp_path / "cache"
    first = encode(clips, cache, rank=0, world=2)
    assert len(list(cache.iterdir())) == 2
    assert encode(clips, cache, rank=1, world=2) == first
    assert len(list(cache.iterdir())) == 3


def test_a_subclass_of_clip_can_change_its_pictures(clips, tmp_path):
    """Property: frames and mask go through Clip.pictures, so that augmentation is one method."""
    class Mirrored(data.Clip):
        def pictures(self, what):
            return super().pictures(what)[:, :, ::-1]

    plain = clips[0]
    clip = Mirrored(**vars(plain))
    assert (clip.frames == plain.frames[:, :, ::-1]).all() and (clip.audio == plain.audio).all()
    chunk, other = encode([clip], tmp_path / "a")[0], encode([plain], tmp_path / "b")[0]
    # the mean of 8 pixels from the right is summed in another order
    difference = chunk.array("latents")[..., ::-1] - other.array("latents")
    assert np.abs(difference).max() < 2e-3


def test_a_training_set_has_one_hash(clips, tmp_path):
    """Property: the hash that a checkpoint keeps changes with the chunks and with their weights."""
    chunks = encode(clips, tmp_path / "cache")
    weights = [1.0] * len(chunks)
    same = data.training_set_hash(encode(clips, tmp_path / "cache"), weights)
    hashes = {data.training_set_hash(chunks, weights),
              data.training_set_hash(chunks[::-1], weights),
              data.training_set_hash(chunks[1:], weights[1:]),
              data.training_set_hash(chunks, [2.0] * len(chunks)),
              data.training_set_hash([replace(chunks[0], row=1), *chunks[1:]], weights),
              data.training_set_hash([replace(chunks[0], store=tmp_path), *chunks[1:]], weights)}
    assert len(hashes) == 6 and same in hashes


def test_rows_are_collated_by_name():
    """Property: every tensor of a row gets a batch axis; the chunks themselves stay a list."""
    rows = [{"latents": torch.full((2, 3), float(i)), "chunk": f"chunk {i}"} for i in range(4)]
    batch = data.collate(rows, "cpu")
    assert batch["chunk"] == ["chunk 0", "chunk 1", "chunk 2", "chunk 3"]
    assert batch["latents"].shape == (4, 2, 3) and (batch["latents"][3] == 3).all()


def test_options_of_several_folders_need_a_value_each():
    """Property: a forgotten value and two folders of one name are refused in words."""
    args = SimpleNamespace(data=["a", "b"], share=[1.0], cache=None)
    data.one_per_folder(args, "cache")
    with pytest.raises(ValueError, match="--share has 1 values for the 2 folders of --data"):
        data.one_per_folder(args, "cache", "share")
    assert data.names_of(["some/a", "some/b"]) == ["a", "b"]
    with pytest.raises(ValueError, match="same name: a a"):
        data.names_of(["some/a", "other/a"])


def test_frames_and_samples_fit():
    """Property: a frame has a whole number of samples; all programs count with these three."""
    assert FPS * HOP == SAMPLE_RATE == 16000
