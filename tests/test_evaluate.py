"""Properties of the report: the scale is a scale, segments lose nothing, bad input is a row or a
line, and the same videos give the same figures."""
import dataclasses
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import talking
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file

import evaluate
import infer
from common import VideoWriter, write_mp4
from data import HOP
from measure import fid, report, rulers, video
from measure.landmarks import eye_distance
from measure.rulers import Item

SIDE = 64


def talker(path, seed, frames=80, reddens=0.0, labels=True):
    """A video of a flat face: its mouth opens as its sound gets louder, its skin reddens by so
    many grey levels a second; beside it who it is and what is said."""
    rng = np.random.default_rng(seed)
    opening = np.convolve(rng.random(frames + 2), np.ones(3) / 3, "valid") * 2 - 0.5
    opening = np.clip(opening, 0, 1)
    texture = np.kron(rng.integers(90, 160, (8, 8, 3)), np.ones((SIDE // 8, SIDE // 8, 1)))
    shift = (np.arange(frames) / 25 * reddens)[:, None, None, None] * [1, 0, 0]
    pictures = np.clip(texture + shift, 0, 255).astype(np.uint8)
    for picture, h in zip(pictures, opening):
        top, bottom = int(SIDE * (0.71 - 0.1 * h)), int(SIDE * (0.71 + 0.1 * h))
        picture[top:bottom, int(0.4 * SIDE):int(0.6 * SIDE)] = 10
    sound = rng.standard_normal(frames * HOP) * np.repeat(opening, HOP) * 5000
    write_mp4(path, pictures, sound.clip(-32768, 32767).astype(np.int16))
    if labels:
        end = frames / 25
        about = {"identity": path.stem, "phones": [[0, end - 0.4, "ɑ"], [end - 0.4, end, "sil"]]}
        path.with_suffix(".json").write_text(json.dumps(about), encoding="utf-8")


class ByDarkness:
    """In place of the landmarker: one face that does not move, whose lips part as far as the
    middle of the picture is dark."""
    presence = 1.0

    def __init__(self, device="cpu"):
        self.device = device

    def points(self, frames):
        side = frames.shape[2]
        points = talking.portrait()[1] * (side / talking.SIDE)
        points = points.repeat(len(frames), 1, 1)
        middle = frames[:, :, int(0.45 * side):int(0.55 * side)].mean((2, 3))
        gap = torch.tensor((middle < 40).mean(1)) * eye_distance(points)
        for upper, lower in ((82, 87), (13, 14), (312, 317)):
            points[:, lower] = points[:, upper]
            points[:, lower, 1] += gap
        if not self.presence:
            points = points * torch.nan
        return points, torch.full((len(frames),), self.presence)

    def blendshapes(self, points):
        return torch.zeros(len(points), 52)


class Inception(torch.nn.Module):
    def forward(self, x, return_features: bool = False):
        return x.float().mean((2, 3))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """real/ with three talkers, copy/ with the same, a small network that is called FID's."""
    root = tmp_path_factory.mktemp("shelf")
    for name in ("real", "copy"):
        (root / name).mkdir()
    for seed in range(3):
        talker(root / "real" / f"t{seed}.mp4", seed)
        shutil.copy(root / "real" / f"t{seed}.mp4", root / "copy")
    torch.jit.script(Inception()).save(root / "fid.pt")
    return root


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """These tests are about the report: the networks are measured in test_measure.py."""
    monkeypatch.setattr(rulers, "Landmarker", ByDarkness)
    for module, name in ((rulers.identity, "sface"), (fid, "lite0"),
                         (rulers.sync, "lip_predictor")):
        monkeypatch.setattr(module, name, lambda device: None)


def make_report(out, *words):
    evaluate.main([*map(str, words), "--size", str(SIDE), "--out", str(out), "--device", "cpu"])
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------- report


def test_frozen_and_late_videos_are_punished(shelf, tmp_path):
    """Property: every table has its scale: a copy of the real clip has its lips; a frozen face has
    a flawless picture, and no lips and no motion; late lips match 1 frame late."""
    (tmp_path / "late").mkdir()
    for clip in (shelf / "real").glob("*.mp4"):
        frames = np.stack(list(video.squares(clip, SIDE)))
        sound = video.sound_of(clip, 3.2)[:80 * HOP]
        late = np.concatenate([frames[:1], frames[:-1]])
        write_mp4(tmp_path / "late" / clip.name, late, (sound * 32767).astype(np.int16))
    found = make_report(tmp_path / "out", "--generated", shelf / "copy", tmp_path / "late",
                        "--real", shelf / "real")
    frozen, copy, late = (found["systems"][name] for name in ("frozen", "copy", "late"))
    assert copy["lips"]["mean"] > 0.95 and frozen["lips"]["mean"] == 0
    assert late["lips"]["mean"] < 0.8 < late["lips_late"]["mean"]
    assert frozen["motion"]["mean"] < 0.2 and frozen["head_shift"]["mean"] < 1e-3
    assert frozen["colour"]["mean"] < 0.5
    assert copy["lips"]["n"] == 3 and copy["lips"]["sd"] is not None
    assert found["seed"] == 0 and found["commit"]
    for name in ("report.md", "videos.csv", "segments.csv", "drift.png", "sheet.jpg"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    table = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| metric | real | frozen | copy | late |" in table
    assert "FID is left out" in table and "| FID" not in table
    assert "| metric | other audio | blur 1 px |" in table


def test_a_missing_ruler_is_one_line(shelf, tmp_path):
    """Property: what is not installed is left out, in one line that says how to get it, and
    nothing takes its place."""
    found = make_report(tmp_path / "out", "--generated", shelf / "copy", "--real", shelf / "real")
    for how in (rulers.identity.NOTE, fid.LITE0_NOTE, rulers.sync.WHISPER_NOTE):
        assert len([note for note in found["notes"] if how in note]) == 1
    assert not {"sface", "kid", "perceptual", "lip_sync", "fid"} & set(found["systems"]["copy"])


def test_same_videos_same_figures(shelf, tmp_path):
    """Property: a report is a function of its videos: a difference between two reports is a
    difference between two systems. A copy has no distance to what it copies."""
    words = ["--generated", shelf / "copy", "--real", shelf / "real", "--fid-weights",
             shelf / "fid.pt"]
    one, two = (make_report(tmp_path / name, *words) for name in "ab")
    for part in ("systems", "scale", "drift"):
        assert one[part] == two[part]
    systems = one["systems"]
    assert systems["frozen"].keys() >= {"fid", "lips", "faces", "sharpness", "blinks"}
    assert systems["copy"]["fid"]["mean"] < 1e-6 < systems["frozen"]["fid"]["mean"]


def test_drift_is_read_at_its_time(shelf, tmp_path):
    """Property: a face that reddens by half a grey level a second has reddened by 1.25 in the 5 s
    that end at 5, by 23.75 in those that end at 50."""
    (tmp_path / "red").mkdir()
    talker(tmp_path / "red" / "long.mp4", 5, 1250, reddens=0.5, labels=False)
    drift = make_report(tmp_path / "out", "--generated", tmp_path / "red",
                        "--real", shelf / "real")["drift"]["red"]
    assert set(drift) == {"5", "50"}
    assert abs(drift["50"]["colour"]["mean"] - drift["5"]["colour"]["mean"] - 22.5) < 2
    assert "Drift of red" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_segments_lose_no_frame_and_hold_few():
    """Property: ten minutes go through in segments of 5 s; never are more than three of them in
    memory. A short rest joins its neighbour."""
    alive = set()
    most = 0

    class Frame(np.ndarray):
        number = None

        def __del__(self):
            alive.discard(self.number)

    def video_of(n):
        nonlocal most
        for i in range(n):
            frame = np.full((1, 1, 3), i % 251, np.uint8).view(Frame)
            frame.number = i
            alive.add(i)
            most = max(most, len(alive))
            yield frame
    for n in (1, 81, 125, 130, 187, 250, 15000):
        sizes, values = [], []
        for segment in video.segments(video_of(n)):
            sizes.append(len(segment))
            values.append(np.asarray(segment[:, 0, 0, 0]))
        assert np.array_equal(np.concatenate(values), np.arange(n) % 251)
        assert max(sizes) < 125 + 63 and (n < 62 or min(sizes) >= 62)
    assert most < 3 * 125


def test_bad_videos_are_rows_that_say_so(shelf, tmp_path):
    """Property: no video stops the report, and none is passed over in silence: rubbish, no sound,
    another rate, another length, no real clip."""
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "rubbish.mp4").write_bytes(b"no video")
    with av.open(str(bad / "t0.mp4"), "w") as file:     # 30 frames a second, no sound, too short
        stream = file.add_stream("libx264", 30)
        stream.width = stream.height = SIDE
        for i in range(60):
            picture = np.full((SIDE, SIDE, 3), 2 * i, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        file.mux(stream.encode(None))
    talker(bad / "unknown.mp4", 9, 40, labels=False)
    found = make_report(tmp_path / "out", "--generated", bad, "--real", shelf / "real")
    notes = "\n".join(note for note in found["notes"] if note.startswith("bad: "))
    for words in ("not measured: ", "30.00 frames a second, read as 25",
                  "no audio; the real clip's sound is used", "50 frames, 80 in the real clip",
                  "no real clip of this name"):
        assert words in notes, (words, notes)


def test_a_video_without_a_face_is_called_so(shelf, tmp_path, monkeypatch):
    """Property: noise must not get a good score unseen."""
    monkeypatch.setattr(ByDarkness, "presence", 0.0)
    found = make_report(tmp_path / "out", "--generated", shelf / "copy", "--real", shelf / "real")
    notes = "\n".join(found["notes"])
    assert "no face in 100 % of the frames" in notes and "no face in the reference" in notes
    assert found["systems"]["copy"]["faces"]["mean"] == 0
    assert "lips" not in found["systems"]["copy"]


# --------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("words, line", [
    (("--generated", "EMPTY", "--real", "REAL"), "no video in"),
    (("--generated", "REAL", "--real", "EMPTY"), "no video in"),
    (("--generated", "NO", "--real", "REAL"), "no such folder"),
    (("--generated", "REAL"), "either --generated"), (("--data", "REAL"), "either --generated"),
    (("--generated", "REAL", "--real", "REAL", "--clips", "0"), "at least 1"),
    (("--generated", "REAL", "--real", "REAL", "--size", "40"), "a multiple of 16"),
    (("--generated", "REAL", "--real", "REAL"), "cannot be called real"),
    (("--generated", "COPY", "--real", "REAL", "--fid-weights", "NO"), "no such file"),
    (("--generated", "COPY", "--real", "REAL", "--syncnet-weights", "FILE"), "no SyncNet")])
def test_bad_input_is_one_line_and_exit_2(shelf, tmp_path, capsys, words, line):
    """Property: a mistake ends in one line before anything is computed."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    places = {"EMPTY": tmp_path / "empty", "REAL": shelf / "real", "COPY": shelf / "copy",
              "NO": tmp_path / "no", "FILE": tmp_path / "file"}
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*(str(places.get(w, w)) for w in words), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and line in error[0], error
    assert not (tmp_path / "out" / "report.md").exists()


def test_flags_are_few_and_explained(capsys):
    """Property: a reader can read all of --help: at most 25 flags, each with a comment."""
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--help"])
    text = capsys.readouterr().out
    fields = dataclasses.fields(evaluate.Options)
    assert stop.value.code == 0 and len(fields) <= 25
    source = (ROOT / "evaluate.py").read_text(encoding="utf-8")
    for field in fields:
        assert f"--{field.name.replace('_', '-')}" in text
        assert any(line.startswith(f"    {field.name}:") and "  # " in line
                   for line in source.splitlines()), field.name


def test_settings_reach_the_generator(tmp_path, monkeypatch):
    """Property: what evaluate.py is told of steps, guidance and seed reaches infer.py; guidance is
    the teacher's alone."""
    seen = []

    def generate(models, image, audio, seed=0, steps=None, guidance=None):
        seen.append((models.network, tuple(image.shape), seed, steps, guidance))
        yield np.zeros((3, SIDE, SIDE, 3), np.uint8)
    monkeypatch.setattr(infer, "generate", generate)
    options = evaluate.Options(steps=7, guidance=2.0)
    picture, sound = np.zeros((SIDE, SIDE, 3), np.uint8), np.zeros(3 * HOP, np.float32)
    for network in ("teacher", "student"):
        models = SimpleNamespace(network=network, size=SIDE)
        evaluate.make_video(models, tmp_path / f"{network}.mp4", picture, sound, 5, options)
    shape = (1, 3, SIDE, SIDE)
    assert seen == [("teacher", shape, 5, 7, 2.0), ("student", shape, 5, 7, None)]


def test_a_broken_generation_leaves_no_half_video(tmp_path, monkeypatch):
    """Property: a video that stops half-way would be measured as a short one: it is not kept."""
    def generate(*_):
        yield np.zeros((3, SIDE, SIDE, 3), np.uint8)
        raise KeyboardInterrupt
    monkeypatch.setattr(infer, "generate", generate)
    models = SimpleNamespace(network="student", size=SIDE)
    picture, sound = np.zeros((SIDE, SIDE, 3), np.uint8), np.zeros(9 * HOP, np.float32)
    with pytest.raises(KeyboardInterrupt):
        path = tmp_path / "half.mp4"
        evaluate.make_video(models, path, picture, sound, 0, evaluate.Options())
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- generation


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of random weights of the smallest size; no teacher."""
    from audio import AudioEncoder
    from dit import PRESETS, AudioDiT
    from vae import VAEConfig, WanVAE
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    whisper = ROOT / "weights" / "tiny" / "whisper"
    encoder = AudioEncoder(whisper)
    vae = VAEConfig(dim=8, z_dim=8, dim_mult=(1, 1, 2, 2), num_res_blocks=1,
                    latents_mean=(0.0,) * 8, latents_std=(1.0,) * 8)
    dit = replace(PRESETS["debug"], dim=48, ffn_dim=64, heads=4, layers=1, channels=8,
                  audio_layers=encoder.layers, audio_dim=encoder.dim, audio_hidden=16)
    save_file(WanVAE(vae).state_dict(), folder / "vae.safetensors")
    save_file(AudioDiT(dit).state_dict(), folder / "student.safetensors", {"trained": "no"})
    config = {"size": 32, "frames": 33, "continuity_frames": 9, "identity": "tre",
              "audio": str(whisper), "vae": asdict(vae), "dit": asdict(dit),
              "student": {"steps": 1, "timestep_shift": 5.0},
              "teacher": {"steps": 1, "timestep_shift": 5.0, "guidance": 4.0}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_generating_first(shelf, weights, tmp_path, monkeypatch):
    """Property: with --weights and --data the network animates held-out clips, also to another
    clip's audio and in silence, and one for long; all in one table."""
    clips = Path(shutil.copytree(shelf / "real", tmp_path / "clips"))
    split = {"train": ["t2"], "val": ["t0", "t1"]}
    (clips / "split.json").write_text(json.dumps(split), encoding="utf-8")
    command = ["--weights", str(weights), "--data", str(clips), "--controls", "--device", "cpu"]
    with pytest.raises(SystemExit, match="2"):          # no other clip, no other audio
        evaluate.main([*command, "--clips", "1", "--out", str(tmp_path / "one")])
    overlaps, motion_row = [], rulers.pixels.motion_row

    def spy(frames, before, start, chunk, overlap):
        overlaps.append((chunk, overlap))
        return motion_row(frames, before, start, chunk, overlap)
    monkeypatch.setattr(rulers.pixels, "motion_row", spy)
    evaluate.main([*command, "--clips", "2", "--long", "5.2", "--out", str(tmp_path / "out")])
    assert set(overlaps) == {(33, 0), (33, 9)}          # the VAE's chunks do not overlap
    assert overlaps.count((33, 0)) == 2
    found = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert list(found["systems"]) == ["real", "VAE only", "frozen", "student",
                                      "student-other-audio", "student-silence", "student-long"]
    assert found["systems"]["student"]["fps"]["mean"] > 0
    assert set(found["drift"]) == {"student-long"}
    notes = "\n".join(found["notes"])
    assert "teacher is left out" in notes and "is untrained" in notes
    assert "not measured" not in notes
    long = tmp_path / "out" / "videos" / "student-long" / "long_0.mp4"
    assert len(list(video.squares(long, 32))) == 130
    assert found["systems"]["student-long"].keys() >= {"seam", "lips", "latency"}
    again = tmp_path / "again"                          # the same videos, measured by themselves
    folders = [str(tmp_path / "out" / "videos" / name) for name in ("student-long", "student")]
    evaluate.main(["--generated", *folders, "--real", str(clips), "--weights", str(weights),
                   "--out", str(again), "--device", "cpu"])
    second = json.loads((again / "report.json").read_text(encoding="utf-8"))
    for system in ("student", "student-long"):
        assert second["systems"][system] == found["systems"][system]


def test_the_other_audio_is_half_a_list_away(monkeypatch, tmp_path):
    """Property: names sort alike sentences together (GRID: bbaf2n, bbaf3s, "bin blue at F ...");
    a neighbour that says nearly the same is no control. Every clip has noise of its own, and keeps
    it in the controls."""
    paths = [tmp_path / f"{k}.mp4" for k in range(5)]
    monkeypatch.setattr(evaluate, "probe", lambda path: (1.0, 1.0, []))

    def sound_of(path, seconds):
        return np.full(25 * HOP, int(path.stem), np.float32)
    monkeypatch.setattr(evaluate, "sound_of", sound_of)
    jobs = evaluate.list_jobs("student", paths, evaluate.Options(seed=3, controls=True))
    sounds = {(system, int(name)): sound[0] for system, _, name, _, sound, _ in jobs}
    assert [sounds["student", k] for k in range(5)] == [0, 1, 2, 3, 4]
    assert [sounds["student-other-audio", k] for k in range(5)] == [2, 3, 4, 0, 1]
    assert not any(sounds["student-silence", k] for k in range(5))
    assert all(seed == 3 + int(name) for _, _, name, seed, *_ in jobs)


def test_a_long_video_is_compared_with_the_clips_it_was_made_of(shelf):
    """Property: the recording of a long video is clip after clip, from the clip whose face it
    shows; the real lips are those clips' lips, in that order."""
    paths = sorted((shelf / "real").glob("*.mp4"))
    sound, about = video.long_recording(paths, 1, 7.0)
    assert len(sound) == 175 * HOP and about["person"] == "t1"
    assert about["clips"] == [["t1", 80], ["t2", 80], ["t0", 15]]
    spoken = [phone for phone in about["phones"] if phone[2] == "ɑ"]
    assert np.allclose([phone[0] for phone in spoken], [0, 3.2, 6.4])
    assert about["phones"][-1][1] <= 7.0
    results = rulers.Results(gaps={f"t{k}": np.full(80, float(k)) for k in range(3)})
    clip = shelf / "long.mp4"
    clip.with_suffix(".json").write_text(json.dumps(about), encoding="utf-8")
    item = Item("long", clip)
    gap = rulers.real_gap(results, item)
    assert item.person == "t1" and item.clips == {"t0", "t1", "t2"}
    assert gap.tolist() == [1.0] * 80 + [2.0] * 80 + [0.0] * 15
    del results.gaps["t0"]
    assert rulers.real_gap(results, item) is None


# ----------------------------------------------------------------------------------------- scale


def test_one_man_in_many_clips_is_one_person(tmp_path):
    """Property: clips of one speaker are no different people: another person is one that NAME.json
    names otherwise, or that lies in another folder."""
    paths = []
    for folder, count in (("grid", 3), ("studio", 2)):
        (tmp_path / folder).mkdir()
        paths += [tmp_path / folder / f"{folder}{k}.mp4" for k in range(count)]
    paths[-1].with_suffix(".json").write_text('{"identity": "guest"}', encoding="utf-8")
    who = rulers.identities(paths)
    assert who == {"grid0": "grid", "grid1": "grid", "grid2": "grid", "studio0": "studio",
                   "studio1": "guest"}
    names = list(who)
    assert rulers.another(names, "grid0") == "grid2"
    assert rulers.another(names, "grid0", who) == "studio0"
    assert rulers.another(names[:3], "grid0", who) is None


def test_vae_only_goes_through_the_same_file(tmp_path, monkeypatch):
    """Property: a generated video has been H.264 before it is measured, and its grain counts as
    sharpness; so the VAE's frames are written and read, too."""
    rng = np.random.default_rng(0)
    soft = np.kron(rng.integers(60, 200, (20, 8, 8, 3)), np.ones((1, SIDE // 8, SIDE // 8, 1)))
    soft = soft.astype(np.uint8)
    tools = SimpleNamespace(options=SimpleNamespace(size=SIDE), vae=None, chunk=33)
    talker(tmp_path / "real.mp4", 0)
    monkeypatch.setattr(video, "vae_only", lambda vae, frames, length: iter(soft))
    item = Item("real", tmp_path / "real.mp4", how="VAE only")
    seen = np.stack(list(rulers.Rulers.frames(tools, item)))
    writer = VideoWriter(tmp_path / "made.mp4", SIDE, np.zeros(20 * HOP, np.float32))
    writer.write(soft)
    writer.close()
    written = np.stack(list(video.squares(tmp_path / "made.mp4", SIDE)))

    def off(frames):                    # the encoder is not the same to the last bit every time
        return np.abs(np.float32(seen) - frames).mean()
    assert off(written) < 0.1 < 0.5 < off(soft)


class Dimmer(torch.nn.Module):
    """In place of the VAE: what comes out is half as bright, so that it shows which frames went
    through it, and in what company."""

    def __init__(self):
        super().__init__()
        self.register_buffer("stats", torch.zeros(1))
        self.lengths = []

    def encode(self, video):
        self.lengths.append(video.shape[2])
        return video

    def decode(self, latents):
        return (latents - 1) / 2


def test_vae_only_takes_chunks_as_long_as_generated_ones():
    """Property: the bound is the VAE at the length of a chunk: all frames come back, in order, in
    chunks of 4k + 1."""
    vae = Dimmer()
    frames = np.random.default_rng(0).integers(0, 256, (80, 16, 16, 3), np.uint8)
    found = np.stack(list(video.vae_only(vae, iter(frames), 33)))
    assert vae.lengths == [33, 33, 17]                  # 80 - 66 = 14, made 4k + 1
    assert np.abs(np.float32(found) - np.float32(frames) / 2).max() <= 1


def test_the_contact_sheet_has_a_tile_for_every_system_and_time(tmp_path):
    """Property: faces of all videos can be looked at and counted on one page, each with its
    identity distance; a row is a system, a column a time."""
    frame = np.full((SIDE, SIDE, 3), 200, np.uint8)
    shots = {1: (frame, 0.25), 3: (frame, None)}
    tiles = {f"v{k}": {"real": shots, "student": shots} for k in range(5)}
    report.contact_sheet(tmp_path / "sheet.jpg", tiles, side=64, page_width=500)
    page = np.asarray(Image.open(tmp_path / "sheet.jpg").convert("L"))
    assert page.shape == (3 * (28 + 2 * 64), 2 * (80 + 2 * 64))
    with_number, without = page[28:28 + 64, 80:144], page[28:28 + 64, 144:208]
    assert (with_number < 50).any() and not (without < 150).any()


def test_a_cell_has_mean_spread_and_number():
    """Property: a figure in a table stands with its spread and with how many videos it is of."""
    rows = [{"lips": 0.5, "fps": np.nan}, {"lips": 0.7}, {"seam": 1.0}]
    summary = report.summarise_rows(rows)
    assert report.cell(summary["lips"], 2) == "0.60 ± 0.14 (2)"
    assert report.cell(summary["seam"], 1) == "1.0 (1)" and "fps" not in summary
    assert report.cell(None, 1) == "-"


def test_a_frame_without_a_face_is_as_far_away_as_can_be():
    """Property: a video cannot gain by losing its face: such a frame has distance 1."""
    frames, points = np.zeros((2, SIDE, SIDE, 3), np.uint8), ByDarkness().points
    points, _ = points(frames)
    points[1] = torch.nan
    tools = SimpleNamespace(sface=lambda faces: np.ones((len(faces), 4)) / 2, arcface=None)
    vectors = rulers.Rulers.embed(tools, frames, points)["sface"]
    away = rulers.identity.cosine_distance(vectors, np.ones((1, 4)) / 2)
    assert np.allclose(away, [0, 1])
