"""Laws of the report: bounds are bounds, pieces lose nothing, bad input is a row or a line, and the same videos give the same figures."""
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import evaluate as E
import infer
import metrics
import proxies
import train_proxies
from data import HOP, ClipFolder, write_mp4
from report import summarise

SIDE = 64


def test_films_are_guided_as_asked(tmp_path, monkeypatch):
    """What evaluate.py is told of guidance reaches infer.py."""
    seen = {}
    monkeypatch.setattr(infer, "generate", lambda *given, **told: seen.update(told, seed=given[4]) or iter([np.zeros((3, SIDE, SIDE, 3), np.uint8)]))
    args = SimpleNamespace(continuity_frames=9, guidance=2.0, guidance_focus=7.0, liveliness=3.0)
    models = SimpleNamespace(audio=SimpleNamespace(device="cpu"), size=SIDE)
    E.make_video(models, tmp_path, "film", np.zeros((SIDE, SIDE, 3), np.uint8), torch.zeros(3 * HOP), 4, 5, args)
    assert seen == {"guidance": 2.0, "guidance_focus": 7.0, "liveliness": 3.0, "seed": 5}


def talker(path, seed, frames=80, tint=0.0, labels=True):
    """A film of a flat face: its mouth opens as its sound gets louder, its skin reddens by `tint` a second; a puppet's sidecars beside it."""
    rng = np.random.default_rng(seed)
    opening = np.clip(np.convolve(rng.random(frames + 2), np.ones(3) / 3, "valid") * 2 - 0.5, 0, 1)
    texture = np.kron(rng.integers(90, 160, (8, 8, 3)), np.ones((SIDE // 8, SIDE // 8, 1)))
    film = np.clip(texture + (np.arange(frames) / 25 * tint)[:, None, None, None] * [1, 0, 0], 0, 255).astype(np.uint8)
    for picture, h in zip(film, opening):
        picture[int(SIDE * (0.71 - 0.1 * h)):int(SIDE * (0.71 + 0.1 * h)), int(0.4 * SIDE):int(0.6 * SIDE)] = 10
    audio = (rng.standard_normal(frames * HOP) * np.repeat(opening, HOP) * 5000).clip(-32768, 32767).astype(np.int16)
    write_mp4(path, film, audio)
    if labels:
        np.savez(path.with_suffix(".npz"), gap=np.float32(0.27 * opening), blink=np.zeros(frames, np.float32), box=np.array(metrics.FACE_BOX) * SIDE)
        text = {"identity": path.stem, "phones": [[0, frames / 25 - 0.4, "ɑ"], [frames / 25 - 0.4, frames / 25, "sil"]]}
        path.with_suffix(".json").write_text(json.dumps(text), encoding="utf-8")


def by_darkness(net, frames, box):
    """Stands in for the trained face proxy: the dark part of the middle column is the mouth."""
    dark = (frames[:, :, int(0.45 * frames.shape[2]):int(0.55 * frames.shape[2])].mean((2, 3)) < 40).mean(1)
    return dark, np.zeros(len(frames)), np.ones(len(frames))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """real/ with three talkers, copy/ with the same; proxies/ with random networks: their figures mean nothing, their plumbing does."""
    root = tmp_path_factory.mktemp("shelf")
    for name in ("real", "copy", "proxies"):
        (root / name).mkdir()
    for seed in range(3):
        talker(root / "real" / f"t{seed}.mp4", seed)
        shutil.copy(root / "real" / f"t{seed}.mp4", root / "copy")
    torch.manual_seed(0)
    small = metrics.SyncNetConfig(80, (4,) * 6, (4,) * 6, 4, "mouth")
    save_file(metrics.SyncNet(small).state_dict(), root / "proxies" / "sync.safetensors", {"proxy": "sync", "config": json.dumps(asdict(small))})
    for kind in ("identity", "face"):
        save_file(proxies.CLASSES[kind]().state_dict(), root / "proxies" / f"{kind}.safetensors", {"proxy": kind, "config": "{}"})
    return root


def report(shelf, out, *words):
    E.main([*map(str, words), "--proxies", str(shelf / "proxies"), "--size", str(SIDE), "--out", str(out), "--device", "cpu"])
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def test_real_is_the_upper_bound_and_frozen_the_lower(shelf, tmp_path, monkeypatch):
    """Every table has its scale: the real clip has the truth's mouth; a frozen face has a flawless picture, and no mouth and no motion."""
    monkeypatch.setattr(proxies, "read_faces", by_darkness)
    (tmp_path / "late").mkdir()
    for clip in (shelf / "real").glob("*.mp4"):                                 # a system whose pictures come 1 frame late
        film, sound = np.stack(list(E.squares(clip, SIDE))), E.sound_of(clip, 3.2)[:80 * HOP]
        write_mp4(tmp_path / "late" / clip.name, np.concatenate([film[:1], film[:-1]]), (sound * 32767).astype(np.int16))
    found = report(shelf, tmp_path / "out", "--generated", tmp_path / "late", "--real", shelf / "real")
    real, frozen, late = (found["systems"][k] for k in ("real", "frozen", "late"))
    assert real["mouth"]["mean"] > 0.95 and frozen["mouth"]["mean"] == 0 and late["mouth"]["mean"] < 0.8 < late["mouth_late"]["mean"]
    assert frozen["motion"]["mean"] < 0.2 and frozen["head"]["mean"] < 1e-3 and frozen["colour"]["mean"] < 0.5
    assert real["mouth"]["n"] == 3 and real["mouth"]["sd"] is not None and found["seed"] == 0 and found["commit"]
    for name in ("report.md", "videos.csv", "pieces.csv", "drift.png", "sheet.png"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    table = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| metric | real | frozen | late |" in table and "FID is left out" in table and "| FID" not in table


def test_same_videos_same_figures(shelf, tmp_path):
    """A report is a function of its videos: a difference between two runs is a difference between two systems."""
    one, two = (report(shelf, tmp_path / name, "--generated", shelf / "copy", "--real", shelf / "real") for name in "ab")
    assert one["systems"] == two["systems"] and one["drift"] == two["drift"]
    assert one["systems"]["frozen"].keys() >= {"proxy_sync_now", "proxy_identity", "proxy_frechet", "faces"}


def test_drift_is_read_at_its_time(shelf, tmp_path):
    """A face that reddens by half a grey level a second has reddened by 1.25 in the 5 s that end at 5, by 23.75 in those that end at 50."""
    (tmp_path / "red").mkdir()
    talker(tmp_path / "red" / "long.mp4", 5, 1250, tint=0.5, labels=False)
    drift = report(shelf, tmp_path / "out", "--generated", tmp_path / "red", "--real", shelf / "real")["drift"]["red"]
    assert set(drift) == {"5", "50"} and abs(drift["50"]["colour"]["mean"] - drift["5"]["colour"]["mean"] - 22.5) < 2
    assert "Drift" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_pieces_lose_no_frame_and_hold_few():
    """Ten minutes go through in pieces of 5 s; never are more than two of them in memory. A short rest joins its neighbour."""
    alive, most = set(), 0

    class Frame(np.ndarray):
        def __del__(self):
            alive.discard(self.number) if getattr(self, "number", None) is not None else None

    def film(n):
        nonlocal most
        for i in range(n):
            frame = np.full((1, 1, 3), i % 251, np.uint8).view(Frame)
            frame.number = i
            alive.add(i)
            most = max(most, len(alive))
            yield frame
    for n in (1, 81, 125, 130, 187, 250, 15000):
        sizes, values = [], []
        for piece in E.pieces(film(n)):
            sizes.append(len(piece)), values.append(np.asarray(piece[:, 0, 0, 0]))
        assert np.array_equal(np.concatenate(values), np.arange(n) % 251) and max(sizes) < 125 + 63 and (n < 62 or min(sizes) >= 62)
    assert most < 3 * 125


def test_bad_videos_are_rows_that_say_so(shelf, tmp_path):
    """No video stops the report, and none is passed over in silence: rubbish, no sound, another rate, another length, no partner."""
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "rubbish.mp4").write_bytes(b"no video")
    with av.open(str(bad / "t0.mp4"), "w") as file:                             # 30 frames a second, no sound, too short
        stream = file.add_stream("libx264", 30)
        stream.width = stream.height = SIDE
        for i in range(60):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((SIDE, SIDE, 3), 2 * i, np.uint8))))
        file.mux(stream.encode(None))
    talker(bad / "stranger.mp4", 9, 40, labels=False)
    found = report(shelf, tmp_path / "out", "--generated", bad, "--real", shelf / "real")
    notes = [n for n in found["notes"] if n.startswith("bad: ")]
    said = "\n".join(notes)
    for words in ("not measured: ", "30.00 frames a second, read as 25", "no audio; the real clip's sound is used", "50 frames, 80 in the truth",
                  "no real clip of this name"):
        assert words in said, (words, said)


def test_a_picture_without_a_face_is_called_so(shelf, tmp_path, monkeypatch):
    """Fog must not get a good sync score unseen."""
    monkeypatch.setattr(proxies, "read_faces", lambda net, frames, box: (np.zeros(len(frames)),) * 3)
    found = report(shelf, tmp_path / "out", "--generated", shelf / "copy", "--real", shelf / "real")
    assert any("no face in 100 % of the frames" in note for note in found["notes"])


@pytest.mark.parametrize("words, line", [
    (("--generated", "EMPTY", "--real", "REAL"), "no video in"), (("--generated", "REAL", "--real", "EMPTY"), "no video in"),
    (("--generated", "NO", "--real", "REAL"), "no such folder"), (("--generated", "REAL"), "either --generated"),
    (("--data", "REAL"), "either --generated"), (("--generated", "REAL", "--real", "REAL", "--fid-weights", "NO"), "no such file"),
    (("--generated", "REAL", "--real", "REAL", "--syncnet-weights", "FILE"), "no SyncNet"), (("train-proxies", "--data", "EMPTY"), "no train clip")])
def test_bad_input_is_one_line_and_exit_2(shelf, tmp_path, capsys, words, line):
    """A mistake is told in one line, before anything is computed."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    places = {"EMPTY": tmp_path / "empty", "REAL": shelf / "real", "NO": tmp_path / "no", "FILE": tmp_path / "file"}
    with pytest.raises(SystemExit) as stop:
        E.main([str(places.get(w, w)) for w in words] + ([] if words[0] == "train-proxies" else ["--out", str(tmp_path / "out")]))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and line in error.splitlines()[-1]


def test_generating_first(shelf, tmp_path, monkeypatch):
    """--weights and --data: held-out clips speak again through the network, also another's words and silence, and one for long; all in one table."""
    from audio import AudioEncoder
    from dit import PRESETS as DIT
    from dit import AudioDiT
    from vae import PRESETS as VAE
    from vae import WanVAE
    torch.manual_seed(0)
    weights, heard = tmp_path / "weights", ROOT / "weights" / "tiny" / "whisper"
    weights.mkdir()
    encoder = AudioEncoder(heard)
    vae = replace(VAE["tiny"], dim=8, dim_mult=(1, 1, 2, 2))
    dit = replace(DIT["tiny"], dim=48, ffn_dim=64, layers=1, audio_layers=encoder.layers, audio_dim=encoder.dim, audio_hidden=16)
    save_file(WanVAE(vae).state_dict(), weights / "vae.safetensors")
    save_file(AudioDiT(dit).state_dict(), weights / "student.safetensors", {"trained": "no"})
    config = {"vae": asdict(vae), "dit": asdict(dit), "audio": str(heard), "size": 32, "frames": 33}
    (weights / "config.json").write_text(json.dumps(config), encoding="utf-8")
    clips = Path(shutil.copytree(shelf / "real", tmp_path / "clips"))
    (clips / "split.json").write_text('{"train": ["t2"], "val": ["t0", "t1"]}', encoding="utf-8")
    command = ["--weights", str(weights), "--data", str(clips), "--controls", "--student-steps", "1", "--proxies", str(shelf / "proxies")]
    with pytest.raises(SystemExit, match="2"):
        E.main([*command, "--clips", "1", "--out", str(tmp_path / "one")])          # no other clip, no other's words
    overlaps, row = [], metrics.picture_row
    monkeypatch.setattr(metrics, "picture_row", lambda *given: overlaps.append(given[-1]) or row(*given))
    E.main([*command, "--clips", "2", "--long", "5.2", "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert set(overlaps) == {0, 9} and overlaps.count(0) == 2                       # seams are looked for where they are: the VAE's chunks abut
    found = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert list(found["systems"]) == ["real", "vae", "frozen", "student", "student-other-sound", "student-silence", "student-long"]
    assert found["systems"]["student"]["fps"]["mean"] > 0 and set(found["drift"]) == {"student-long"}
    assert any("teacher is left out" in n for n in found["notes"]) and any("is untrained" in n for n in found["notes"])
    assert len(list(E.squares(tmp_path / "out" / "videos" / "student-long" / "long_0.mp4", 32))) == 130
    assert not any("not measured" in n for n in found["notes"])
    assert infer.CHUNK == 81 and found["systems"]["student-long"].keys() >= {"seam", "proxy_identity"}


def test_the_other_sound_is_half_a_list_away(monkeypatch, tmp_path):
    """Names sort alike sentences together (GRID: bbaf2n, bbaf3s, "bin blue at F ..."); whoever says nearly the same is no control. Every face has
    noise of its own, and keeps it in the controls."""
    paths, said, seeds = [tmp_path / f"{k}.mp4" for k in range(5)], {}, {}
    monkeypatch.setattr(infer, "load", lambda *_: SimpleNamespace(trained=True, size=32))
    monkeypatch.setattr(E, "probe", lambda path: (1.0, 1.0, []))
    monkeypatch.setattr(E, "sound_of", lambda path, seconds: np.full(25 * HOP, int(path.stem), np.float32))
    monkeypatch.setattr(E, "squares", lambda path, size: iter([np.zeros((32, 32, 3), np.uint8)]))
    monkeypatch.setattr(E, "make_video", lambda models, folder, name, picture, sound, steps, seed, args:
                        said.update({(folder.name, int(name)): sound[0]}) or seeds.update({(folder.name, int(name)): seed}) or {})
    args = SimpleNamespace(seed=3, networks=["student"], weights=None, device="cpu", student_steps=4, controls=True, long=0, out=tmp_path)
    E.generate(args, paths, SimpleNamespace(notes=[]))
    assert [said["student", k] for k in range(5)] == [0, 1, 2, 3, 4]
    assert [said["student-other-sound", k] for k in range(5)] == [2, 3, 4, 0, 1] and not any(said["student-silence", k] for k in range(5))
    assert all(seed == 3 + k for (_, k), seed in seeds.items())


def test_proxies_are_trained_by_one_command(shelf, tmp_path, capsys):
    """From a folder of clips to weights, their settings and their scale, in one program; the same seed gives the same weights. To measure them
    again trains nothing and changes no word of how they were trained."""
    clips = Path(shutil.copytree(shelf / "real", tmp_path / "clips"))
    talker(clips / "t3.mp4", 3)
    (clips / "split.json").write_text('{"train": ["t0", "t1"], "val": ["t2", "t3"]}', encoding="utf-8")
    command = ["train-proxies", "--data", str(clips), "--cache", str(tmp_path / "cache"), "--coded", "1"]
    for out in ("a", "b"):
        E.main([*command, "--out", str(tmp_path / out), "--sync-steps", "1", "--identity-steps", "2", "--face-steps", "1"])
    one, two = (proxies.load_proxies(tmp_path / out) for out in "ab")
    assert set(one) == {"sync", "identity", "face"}
    for kind in one:
        assert all(torch.equal(a, b) for a, b in zip(one[kind].state_dict().values(), two[kind].state_dict().values()))
        stored = load_file(tmp_path / "a" / f"{kind}.safetensors")                  # 16 bits for weights; variances of batch norm would overflow
        assert all((v.dtype == torch.float16) == (v.ndim > 1) for v in stored.values())
    said = json.loads((tmp_path / "a" / "proxies.json").read_text(encoding="utf-8"))
    assert said["training"]["face"] == {"steps": 1, "coded": 1, "lr": 2e-3, "seed": 0, "clips": 2} and said["training"]["identity"]["steps"] == 2
    assert set(said["scale"]["clips"]) == {"sync", "identity", "face"} and "mouth_correlation_vae" in said["scale"]["clips"]["face"]
    before = {f.name: f.read_bytes() for f in (tmp_path / "a").glob("*.safetensors")}
    E.main([*command, "--out", str(tmp_path / "a"), "--scale-only", "--coded", "0"])
    again = json.loads((tmp_path / "a" / "proxies.json").read_text(encoding="utf-8"))
    assert again["training"] == said["training"] and "mouth_correlation_vae" not in again["scale"]["clips"]["face"]
    assert before == {f.name: f.read_bytes() for f in (tmp_path / "a").glob("*.safetensors")}
    for wrong in (["--out", str(tmp_path / "none"), "--scale-only"], ["--coded", "-1"], ["--clips", "1"]):
        with pytest.raises(SystemExit) as stop:
            E.main([*command, "--out", str(tmp_path / "a"), *wrong])
        assert stop.value.code == 2 and capsys.readouterr().err.strip().splitlines()[-1].startswith("evaluate.py train-proxies: ")


def test_the_bound_goes_through_the_same_file(tmp_path):
    """A generated video has been H.264 before it is measured, and its grain counts as sharpness. So the VAE's frames are written and read, too."""
    rng = np.random.default_rng(0)
    soft = np.kron(rng.integers(60, 200, (20, 8, 8, 3)), np.ones((1, SIDE // 8, SIDE // 8, 1))).astype(np.uint8)
    bench = SimpleNamespace(args=SimpleNamespace(size=SIDE), vae=None, chunk=33)
    talker(tmp_path / "real.mp4", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proxies, "vae_frames", lambda vae, frames, length: iter(soft))
        seen = np.stack(list(E.Bench.frames(bench, E.Item("real", tmp_path / "real.mp4", how="vae"))))
    writer = infer.Mp4Writer(tmp_path / "made.mp4", SIDE, np.zeros(20 * HOP, np.float32))
    writer.write(soft)
    writer.close()
    written = np.stack(list(E.squares(tmp_path / "made.mp4", SIDE)))
    off = lambda frames: np.abs(np.float32(seen) - frames).mean()                   # the encoder is not the same to the last bit every time
    assert off(written) < 0.1 < 0.5 < off(soft)


class Dimmer(torch.nn.Module):
    """Stands in for the VAE: what comes out is half as bright, so that one sees which frames went through it, and in what company."""

    def __init__(self):
        super().__init__()
        self.register_buffer("stats", torch.zeros(1))
        self.seen = []

    def encode(self, video):
        self.seen.append(video.shape[2])
        return video

    def decode(self, latents):
        return (latents - 1) / 2


def test_proxies_see_what_the_codec_leaves(shelf, tmp_path):
    """A coded copy has the frames that come out of the VAE, in chunks as they are generated; its sound, mask and truth are the clip's. Made once."""
    clips, vae = ClipFolder(shelf / "real", SIDE, "all", tmp_path).clips, Dimmer()
    copy, = train_proxies.coded_copies(clips, 1, vae, 33)
    assert vae.seen == [33, 33, 17] and copy.path == clips[0].path and copy.length == clips[0].length == 80     # 80 - 66 = 14, made 4k + 1
    assert np.abs(np.float32(copy.frames) - np.float32(clips[0].frames) / 2).max() <= 1
    assert np.array_equal(copy.audio, clips[0].audio) and np.array_equal(copy.mask, clips[0].mask)
    assert len(train_proxies.coded_copies(clips, 9, vae, 33)) == 3 and len(vae.seen) == 9           # the first one was there
    assert len(train_proxies.coded_copies([*clips, *clips[:2]], 4, vae, 33)) == 4
    vae.stats += 1                                                                  # another VAE: nothing of it is there yet
    assert len({c.store for v in (vae, Dimmer()) for c in train_proxies.coded_copies(clips, 3, v, 33)}) == 6
    parts = train_proxies.lessons([clips, clips[:1]], 1, vae, 33)
    assert [sum(c.store == clips[0].store for c in parts), len(parts)] == [1 + 3, 12]               # 3 + 3 copies of one; 3 x (1 + 1 copy)


def test_a_blink_is_seen_against_the_moments_around_it():
    """A narrow eye and a shut one look alike in one picture: the lids of a frame are read off the frames 0.16 s before and after it as well, the lips
    off the frame alone."""
    assert proxies.around(np.array([0, 5, 9]), 10).tolist() == [[0, 0, 4], [1, 5, 9], [5, 9, 9]]
    torch.manual_seed(0)
    net, film = proxies.FaceNet().eval(), np.random.default_rng(0).integers(0, 256, (20, SIDE, SIDE, 3), np.uint8)
    other = film.copy()
    other[10] = 255 - other[10]
    one, two = (proxies.read_faces(net, x, metrics.FACE_BOX) for x in (film, other))
    moved = [np.flatnonzero(np.abs(a - b) > 1e-6).tolist() for a, b in zip(one, two)]
    assert moved[1] == [6, 10, 14] and moved[2] == [10] and set(moved[0]) <= {10}
    assert proxies.blinks(np.array([0, .2, .9, 1, .4, .1, .7, .6])).tolist() == [2, 6]


def test_one_man_in_many_clips_is_one_person(monkeypatch):
    """Clips of one speaker are not strangers to each other: sameness is then two of his clips, otherness the clips of another folder."""
    def clip(who, colour):
        return SimpleNamespace(identity=who, path=Path("/no.mp4"), frames=np.full((10, 8, 8, 3), colour, np.uint8), length=10)
    red, blue = ([clip(name, np.roll([200 + 9 * k, 60, 10], turn)) for k in range(3)] for name, turn in (("red", 0), ("blue", 1)))
    monkeypatch.setattr(train_proxies, "read_identity", lambda net, frames, box: (frames.mean((1, 2)) / 255, frames.mean((1, 2))))
    alone, among = train_proxies.identity_scale(None, red, []), train_proxies.identity_scale(None, red, blue)
    assert "auc_same_above_other" not in alone and among["auc_same_above_other"] == 1 and (alone["people"], among["people"]) == (1, 2)
    shades = np.array([c.frames[0, 0, 0] for c in red]) / 255
    pairs = shades @ shades.T
    assert abs(among["same"] - pairs[~np.eye(3, dtype=bool)].mean()) < 1e-4     # never a clip with itself


def test_frechet_of_real_against_real_is_of_two_halves():
    """Real clips against themselves would be 0 and say nothing: the bound is one half of them against the other."""
    rng, sums = np.random.default_rng(0), {}
    for name, shift in (("real/0", 0), ("real/1", 0), ("real", 0), ("made", 3)):
        sums[name, "proxy_frechet", None] = metrics.Gaussian()
        sums[name, "proxy_frechet", None].add(rng.standard_normal((200, 4)) + shift)
    real, made = (summarise(name, [], sums)["proxy_frechet"]["mean"] for name in ("real", "made"))
    assert 0 < real < 0.5 and 30 < made < 42


def test_what_ears_say_is_read_off_their_last_row(tmp_path):
    """The sound's bound: one number a frame, by the head's last row; a piece does not hear what comes after it; foreign ears say nothing."""
    tiny = ROOT / "weights" / "tiny"
    shutil.copytree(tiny / "whisper", tmp_path / "whisper")
    config = json.loads((tiny / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    head = {"weight": torch.randn(42, 1152, generator=generator), "bias": torch.arange(42.0)}
    save_file(head, tmp_path / "whisper" / "head.safetensors")
    ears, sound = proxies.Ears(tmp_path), np.random.default_rng(0).standard_normal(100 * HOP).astype(np.float32) * 0.1
    said = ears.opening(sound, 100)
    expected = ears.encoder.features(sound, 81, 19).flatten(1) @ head["weight"][41] + 41
    assert said.shape == (100,) and np.abs(said[81:] - expected.numpy()).max() < 1e-3
    later = sound.copy()
    later[85 * HOP:] = 0
    assert np.array_equal(ears.opening(later, 100)[:81], said[:81]) and not np.allclose(ears.opening(later, 100)[81:], said[81:])
    save_file({name: tensor[:41].clone() for name, tensor in head.items()}, tmp_path / "whisper" / "head.safetensors")
    assert proxies.Ears(tmp_path).head is None                                  # it knows phones only
    (tmp_path / "whisper" / "head.safetensors").write_bytes(b"no head")
    with pytest.raises(ValueError, match="no head of train_audio.py"):
        proxies.Ears(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"audio": "facebook/wav2vec2-base-960h"}), encoding="utf-8")
    assert proxies.Ears(tmp_path).head is None
    (tmp_path / "config.json").write_text(json.dumps(config | {"audio": str(tiny / "whisper")}), encoding="utf-8")
    assert proxies.Ears(tmp_path).encoder.layers == 3                           # a path of its own is followed as infer.py does
