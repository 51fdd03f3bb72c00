"""Properties of prepare_data.py, Appendix F: which raw footage becomes clips, and the report.

All videos are made here.
"""
import csv
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_data import talking, write_clip

import data
import prepare_data
from common import write_mp4
from data import HOP
from prepare_data import Config, failures, prepare, scenes_of, small_grey, visual_hash

DEFAULTS = Config(Path("raw"), Path("clips"))


def test_a_visual_hash_is_shared_by_copies_only(tmp_path):
    """Property (Eq. 19): a smaller, re-encoded copy has almost the same hash, others have not."""
    def hash_of(pictures):
        clip = write_clip(tmp_path / "x.mp4", pictures, sound=np.zeros(9999))
        return visual_hash(small_grey(data.decode(clip, 64)[0], 16))
    pictures, _ = talking(50, seed=1)
    small = [np.asarray(Image.fromarray(p).resize((48, 48))) for p in pictures]
    assert hash_of(pictures) @ hash_of(small) > 0.97
    assert hash_of(pictures) @ hash_of(talking(50, seed=2)[0]) < 0.5
    assert hash_of(pictures) @ hash_of(pictures[::-1]) < 0.9


def test_scenes_are_cut_where_the_picture_jumps():
    """Property (Eq. 20): a hard cut ends a scene, fast motion does not; long scenes are divided."""
    rng = np.random.default_rng(0)
    one, two = rng.integers(0, 255, (2, 16, 16)).astype(np.float32)
    slow = np.stack([one + 3 * i for i in range(30)])
    with_a_cut = np.concatenate([slow, np.stack([two] * 20)])
    assert scenes_of(with_a_cut, 12, 500) == [(0, 30), (30, 50)]
    fast = np.stack([one + 20 * np.sin(i) for i in range(60)])
    assert scenes_of(fast, 12, 500) == [(0, 60)]
    assert scenes_of(slow, 12, 10) == [(0, 10), (10, 20), (20, 30)]


def test_conditions_of_equation_22():
    """Property (Eq. 21, 22): rho, q and Sync-C must reach their thresholds, Sync-D stay below its.

    What was not measured passes."""
    good = {"seconds": 4, "rho": 0.95, "sharpness": 99, "sync_c": 6.0, "sync_d": 8.0}
    assert failures(good, DEFAULTS) == [] == failures({}, DEFAULTS)
    assert failures(good | {"rho": 0.5}, DEFAULTS) == ["rho 0.5 < 0.9"]
    bad_sync = good | {"sync_c": 1.0, "sync_d": 12.0}
    assert failures(bad_sync, DEFAULTS) == ["sync_c 1 < 3", "sync_d 12 > 10"]
    assert failures(good, replace(DEFAULTS, min_rho=0.96)) == ["rho 0.95 < 0.96"]
    pictures, sound = talking(90)
    boxes = [None, np.zeros(4)] * 9
    figures = prepare_data.measure_scene(pictures, np.int16(sound * 32767), boxes)
    assert figures["rho"] == 0.5
    assert "rho" not in prepare_data.measure_scene(pictures, np.int16(sound * 32767), [])


def test_what_breaks_in_the_second_pass_is_a_row(monkeypatch):
    """Property: an error after the first look costs one video, not the report."""
    grey, sound = np.zeros((50, 16, 16), np.float32), np.zeros(50 * HOP, np.int16)
    monkeypatch.setattr(prepare_data, "look_through", lambda *_: ((0, 0, 32, 32), grey, sound))
    rows = prepare_data.prepare_video(Path("no.mp4"), "no", DEFAULTS, {}, None, None)
    assert len(rows) == 1 and rows[0]["reason"].startswith("unreadable: ")


def test_every_rejected_scene_is_a_row_with_its_reason(tmp_path, monkeypatch, capsys):
    """Property: the report has the figures and the reason of each scene; kept ones are plain clips.

    Without a SyncNet there is one line."""
    raw, clean = tmp_path / "räw", tmp_path / "clean"
    raw.mkdir()
    pictures, sound = talking(90, seed=1)
    larger = [np.asarray(Image.fromarray(p).resize((80, 80))) for p in pictures]
    still = np.repeat(pictures[:1], 90, axis=0)
    other, _ = talking(90, seed=2)
    blurred = [np.asarray(Image.fromarray(p).resize((4, 4)).resize((64, 64))) for p in other]
    wide = np.concatenate([talking(90, seed=3)[0]] * 2, axis=2)
    two_scenes = np.concatenate([wide, 255 - wide[:, ::-1]])
    write_clip(raw / "a good.mp4", pictures, sound=sound)
    write_clip(raw / "b copy.mkv", larger, sound=sound)
    write_clip(raw / "frozen.mp4", still, sound=sound)
    write_clip(raw / "black.mp4", talking(90, seed=4)[0] // 32, sound=sound)
    write_clip(raw / "quiet.mp4", talking(90, seed=5)[0], sound=sound * 0.001)
    write_clip(raw / "clipped.mp4", talking(90, seed=6)[0], sound=np.sign(sound) * 1.2)
    write_clip(raw / "blurred.mp4", blurred, sound=sound)
    write_clip(raw / "short.mp4", talking(30, seed=7)[0], sound=sound)
    write_clip(raw / "two scenes.mp4", two_scenes, sound=np.tile(sound, 2))
    (raw / "broken.mp4").write_bytes(b"oh")

    prepare_data.main([str(raw), str(clean), "--size", "64", "--crop", "none"])
    printed = capsys.readouterr()
    assert printed.out.count("no SyncNet given: Sync-C/D not filtered") == 1
    assert "clips kept: 3 of 11" in printed.out
    with open(clean / "report.csv", encoding="utf-8", newline="") as file:
        rows = {row["clip"]: row for row in csv.DictReader(file)}
    for name, word in (("b copy_000", "duplicate of a good.mp4"), ("frozen_000", "frozen 0.9"),
                       ("black_000", "black 1"), ("quiet_000", "loudness -7"),
                       ("clipped_000", "clipping 0."), ("blurred_000", "sharpness"),
                       ("short_000", "seconds 1.2 < 3.24"), ("broken", "unreadable")):
        assert word in rows[name]["reason"], rows[name]
        assert name == "broken" or float(rows[name]["loudness"]) < 0
    assert float(rows["quiet_000"]["loudness"]) < -60
    assert float(rows["two scenes_001"]["start"]) == 3.6
    kept = data.ClipFolder(clean, 32, "all")
    assert [c.name for c in kept.clips] == ["a good_000", "two scenes_000", "two scenes_001"]
    assert [c.identity for c in kept.clips] == ["a good", "two scenes", "two scenes"]
    assert all(c.length == 90 for c in kept.clips) and not kept.skipped


def red_square(picture):
    """Stands in for a face detector: x0 y0 x1 y1 of what is red, or None."""
    y, x = np.nonzero((picture[..., 0] > 180) & (picture[..., 1] < 90))
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) if len(x) > 50 else None


def test_faces_and_lip_sync_are_judged_by_the_networks_you_give(tmp_path, monkeypatch):
    """Property: a face detector decides crop, rho and box; a SyncNet scores what else passed."""
    monkeypatch.setattr(prepare_data, "face_detector", lambda: red_square)
    raw = tmp_path / "raw"
    raw.mkdir()
    for name, frames_with_face in (("always", 90), ("half", 50)):
        pictures = talking(90, seed=frames_with_face)[0] // 3 + 80
        pictures = np.tile(pictures, (1, 2, 4, 1))                          # 256 x 128
        pictures[:, 40:82, 170:200] = 76, 76, 76            # the same grey: no cut where it begins
        pictures[:frames_with_face, 40:82, 170:200] = 255, 0, 0
        write_clip(raw / f"{name}.mp4", pictures, sound=talking(90)[1])
    calls, scores = [], [(5.0, 8.0), (1.0, 8.0)]

    def sync_score(frames, audio):
        calls.append((frames.shape, audio.shape, audio.dtype.name))
        return scores[len(calls) - 1]

    always, half = prepare(Config(raw, tmp_path / "out", size=64), sync_score)
    assert always["rho"] == 1 and always["sync_c"] == 5 and always["reason"] == ""
    assert abs(half["rho"] - 5 / 9) < 0.06 and "rho" in half["reason"]
    assert calls == [((90, 64, 64, 3), (90 * HOP,), "float32")]
    box = np.load(tmp_path / "out" / "always_000.npz")["box"] / 64
    assert np.allclose([box[1], box[3], box[[0, 2]].mean()], [0.18, 0.88, 0.5], atol=0.04)
    clip = data.ClipFolder(tmp_path / "out", 32, "all").clips[0]
    assert clip.mask[0, 4, 4] == 255 and clip.mask[0, 4, 0] == clip.mask[0, 0, 4] == 0
    second = prepare(Config(raw, tmp_path / "second", size=64), sync_score)
    assert second[0]["reason"] == "sync_c 1 < 3"

    def too_short(frames, audio):
        raise ValueError("too short for a SyncNet")
    third = prepare(Config(raw, tmp_path / "third", size=64), too_short)
    assert third[0]["reason"] == "too short for a SyncNet"


def test_syncnet_is_loaded_only_if_its_weights_are_given(tmp_path, monkeypatch):
    """Property: the SyncNet's file is imported for --syncnet and for nothing else."""
    monkeypatch.setattr(prepare_data, "face_detector", lambda: None)
    raw = tmp_path / "raw"
    raw.mkdir()
    pictures, sound = talking(90, seed=1)
    write_clip(raw / "a.mp4", pictures, sound=sound)
    monkeypatch.setitem(sys.modules, "measure.sync", None)                  # an import would fail
    prepare_data.main([str(raw), str(tmp_path / "without"), "--size", "64"])
    paths = []

    def syncnet_scorer(path):
        paths.append(str(path))
        return lambda frames, audio: (2.0, 9.0)
    stand_in = SimpleNamespace(syncnet_scorer=syncnet_scorer)
    monkeypatch.setitem(sys.modules, "measure.sync", stand_in)
    out = tmp_path / "with"
    prepare_data.main([str(raw), str(out), "--size", "64", "--syncnet", "my weights"])
    assert paths == ["my weights"]
    assert "sync_c 2 < 3" in (out / "report.csv").read_text(encoding="utf-8")


def test_the_first_good_copy_is_kept(tmp_path, monkeypatch):
    """Property (Eq. 19): a bad first copy does not cost the good second one.

    A common "source" in the sidecars makes a copy; a common name does not: of a.mov and a.mp4 with
    other pictures both stay, under two names."""
    monkeypatch.setattr(prepare_data, "face_detector", lambda: None)
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
    rows = prepare(Config(raw, tmp_path / "out", size=64))
    reasons = {row["clip"]: row["reason"] for row in rows}
    assert "loudness" in reasons.pop("1 quiet_000")
    assert reasons == {"2 good_000": "", "3 copy_000": "duplicate of 2 good.mp4", "a.mov_000": "",
                       "a.mp4_000": "", "x_000": "", "y_000": "duplicate of x.mp4", "z_000": ""}
    clips = data.ClipFolder(tmp_path / "out", 32, "all").clips
    assert [c.name for c in clips] == ["2 good_000", "a.mov_000", "a.mp4_000", "x_000", "z_000"]
    assert [c.identity for c in clips][1:3] == ["a", "a"]


def test_memory_is_that_of_one_scene(tmp_path, monkeypatch):
    """Property: a video of an hour is cut with the memory of a scene, not of 16 GB of pictures.

    Four times as many scenes must not take twice the memory."""
    monkeypatch.setattr(prepare_data, "face_detector", lambda: None)
    sound = np.ones(160 * HOP, np.int16)
    monkeypatch.setattr(prepare_data, "read_audio", lambda path, samples: sound[:samples])
    scenes = [0]

    def read_video(path):
        for i in range(10 * scenes[0]):
            yield np.full((64, 64, 3), 80 + 100 * (i // 10 % 2) + i % 3, np.uint8)
    monkeypatch.setattr(data, "read_video", read_video)
    (tmp_path / "lone.mp4").touch()
    peaks = []
    for scenes[0] in (4, 16):
        tracemalloc.start()
        rows = prepare(Config(tmp_path, tmp_path / "out", size=128))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(rows) == scenes[0] and all("seconds 0.4 <" in row["reason"] for row in rows)
    assert peaks[1] < 2 * peaks[0] < 10e6, peaks


def test_a_written_clip_is_read_back_in_step(tmp_path):
    """Property: a flash and a click of one frame come back as they were.

    An AAC encoder that gets no time stamp begins 64 ms late, which is 1.6 frames."""
    pictures, sound = np.zeros((50, 64, 64, 3), np.uint8), np.zeros(50 * HOP, np.int16)
    pictures[30], sound[30 * HOP + 320] = 255, 30000
    write_mp4(tmp_path / "x.mp4", pictures, sound)
    frames, audio, _ = data.decode(tmp_path / "x.mp4", 64)
    assert frames.mean((1, 2, 3)).argmax() == 30
    assert abs(np.abs(audio.astype(int)).argmax() - (30 * HOP + 320)) <= 16


def test_two_runs_are_never_mixed(tmp_path, capsys):
    """Property: a folder that holds clips, RAW among them, is refused before anything is written.

    A folder of a run that kept no clip may be used again."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    out.mkdir()
    pictures, sound = talking(10)
    clip = write_clip(raw / "a.mp4", pictures, sound=sound)
    for clips in (raw, raw / ".." / "raw"):
        with pytest.raises(SystemExit) as end:
            prepare_data.main([str(raw), str(clips)])
        assert end.value.code == 2 and "holds clips already" in capsys.readouterr().err
    assert list(raw.iterdir()) == [clip]
    cfg = Config(raw, out, size=64)
    rows = prepare(cfg) + prepare(cfg)
    assert [row["reason"] != "" for row in rows] == [True] * 2
    for left in ("old_000.mp4", "old_000.npz"):
        (out / left).write_bytes(b"")
        with pytest.raises(ValueError, match="holds clips already"):
            prepare(cfg)
        (out / left).unlink()


def test_a_wrong_call_is_one_line_and_exit_code_2(tmp_path, capsys):
    """Property: bad input never ends in a traceback, and nothing is written."""
    here, none, new = str(tmp_path), str(tmp_path / "nowhere"), str(tmp_path / "new")
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    for argv, word in (([none, here], "nowhere"), ([here, new], "no video in"),
                       ([here, new, "--size", "0"], "size"), ([here, new, "--size", "-8"], "size"),
                       ([here, new, "--longest", "0"], "longest"),
                       ([here, new, "--longest", "inf"], "longest"),
                       ([here, new, "--syncnet", "no.model"], "no.model")):
        with pytest.raises(SystemExit) as end:
            prepare_data.main(argv)
        lines = capsys.readouterr().err.strip().splitlines()
        assert end.value.code == 2 and len(lines) == 1, argv
        assert lines[0].startswith("prepare_data.py: ") and word in lines[0], argv
    for unknown in ("--min-sync-e", "--sync-c"):
        with pytest.raises(SystemExit) as end:
            prepare_data.main([here, new, unknown, "3"])
        assert end.value.code == 2
    assert not (tmp_path / "new").exists()
