"""Properties of tiny/teacher.py: its tricks, and that they made the shipped teacher."""
import json
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import save_file
from test_train_teacher import read_log
from toys import FakeAudioEncoder, make_clip, make_network, make_vae

import train_teacher as tt
from common import write_mp4
from data import Chunk, collate, encode_clips, to_tensor
from tiny import teacher as tiny
from tiny.linear import LinearEncoder, blocks
from tre import temporal_reference_encoding as tre

CFG = tiny.TinyTeacherConfig(
    steps=3, batch=4, micro_batch=4, lr=1e-3, warmup=2, decay=0.3, ema=0.9, bf16=False, offsets=2,
    references=2, sample_steps=2, val_every=3, val_chunks=1, save_minutes=1e9,
    mouth_loss_weight=20.0, codec_roundtrips=3, window=2, blink_oversampling=1.0)


@pytest.fixture(scope="module")
def vae():
    return make_vae()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    lengths = enumerate({"long": 70, "other": 70, "short": 31}.items())
    return [make_clip(folder, name, length, i) for i, (name, length) in lengths]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def chunks(clips, vae, cache):
    return encode_clips(clips, vae, FakeAudioEncoder(), tre, cache, CFG)


@pytest.fixture(scope="module")
def augmented(clips, cache):
    return tiny.augmented_chunks(clips, FakeAudioEncoder(), cache, CFG)


@pytest.fixture(scope="module")
def linear(clips, vae):
    return LinearEncoder(vae, [to_tensor(clip.frames[:29]) for clip in clips])


def row(chunk, cfg, seed=0, tricks=None, side=0, is_first=False):
    tricks = tricks or tiny.Tricks(4, None, torch.eye(24))
    rng = np.random.default_rng(seed)
    return tiny.make_row(chunk, cfg, rng, is_first, False, 0.5, tricks, side)


@pytest.mark.parametrize("augment, losses", [
    (False, [0.8406028151512146, 0.6539158821105957, 0.5042914748191833]),
    (True, [0.8060171604156494, 0.6412438154220581, 0.47886255383491516])])
def test_the_training_step_of_the_shipped_teacher(chunks, augmented, vae, clips, tmp_path, augment,
                                                  losses):
    """Property: the steps that made the shipped teacher are these steps: the losses are those of
    the code that trained it, before it was moved to this room."""
    some = [c for c in (augmented if augment else chunks) if c.length == 33]
    linear = None
    if augment:
        linear = LinearEncoder(vae, [to_tensor(clip.frames[:29]) for clip in clips[:2]])
    matrix = tiny.roundtrip_matrix(vae, some[:4], 3, "cpu", linear)
    tricks = tiny.Tricks(4, linear, matrix)
    weights = tiny.sampling_weights([some[:4], some[4:]], [0.7, 0.3], CFG)
    model = make_network(edm_skip=0.15)
    _, got = tt.train(CFG, model, vae, tt.ChunkSampler(some, weights), chunks[:1], tmp_path,
                      make_batch=partial(tiny.make_batch, tricks=tricks),
                      make_optimizer=tiny.muon, extra=tiny.checkpoint_tensors(tricks))
    assert got == pytest.approx(losses, rel=1e-4)


def test_without_tricks_a_row_is_the_papers(chunks):
    """Property: with every trick off, tiny's row is train_teacher's row."""
    off = replace(CFG, face_loss_weight=0.0, mouth_loss_weight=0.0, eye_loss_weight=0.0,
                  eye_motion_weight=0.0, codec_roundtrips=0)
    for seed in range(4):
        ours = row(chunks[0], off, seed)
        papers = tt.make_row(chunks[0], off, np.random.default_rng(seed), False, False, 0.5)
        for key in papers:
            if key not in ("chunk", "loss_weight"):
                assert torch.equal(ours[key], papers[key]), key
        assert torch.equal(ours["loss_weight"], papers["loss_weight"].expand(-1, 4, 4))


def test_a_linear_encoder_is_reproduced(clips):
    """Property: LinearEncoder of an encoder that is linear is that encoder, for a still picture as
    well; for another it is the nearest, and `missing` says how far off."""
    torch.manual_seed(0)
    first, rest = torch.randn(2, 768, 16).double() / 768 ** 0.5

    def encode(video):                                      # (1, 3, T, H, W) -> (1, C, F, h, w)
        x = blocks(video).double()
        return (torch.cat([x[:, :1] @ first, x[:, 1:] @ rest], 1) + 0.5).float().movedim(-1, 1)

    videos = [torch.rand(1, 3, 33, 64, 64) * 2 - 1 for _ in range(5)]
    config = SimpleNamespace(patch=1)
    linear = LinearEncoder(SimpleNamespace(encode=encode, config=config), videos)
    video = torch.rand(1, 3, 33, 32, 32) * 2 - 1
    still = video[:, :, :1].expand(-1, -1, 33, -1, -1)
    error = (linear.encode(video) - encode(video)[0]).abs()
    assert error.max() < 0.05                               # 64 first blocks a clip, 768 numbers
    assert error[:, 1:].max() < 0.02
    assert torch.allclose(linear.still(video[:, :, :1], 9), linear.encode(still), atol=1e-5)
    bend = SimpleNamespace(encode=lambda video: (9 * encode(video)).sin(), config=config)
    bent = LinearEncoder(bend, videos)
    assert linear.missing < 5e-3 < 0.5 < bent.missing < 1.01


def test_an_augmented_chunk_is_another_crop_at_every_draw(augmented, linear):
    """Property: a chunk looks different at every draw, its reference picture is augmented alike,
    its audio stays; the same draw is the same row."""
    assert {path.name for path in augmented[0].store.iterdir()} == {"audio.npy"}
    tricks, cfg = tiny.Tricks(4, linear, None), replace(CFG, codec_roundtrips=0)
    rows = [row(augmented[0], cfg, seed, tricks, is_first=True) for seed in range(8)]
    again = row(augmented[0], cfg, 3, tricks, is_first=True)
    assert all(torch.equal(rows[3][k], again[k]) for k in again if k != "chunk")
    assert len({r["latents"].sum().item() for r in rows}) == 8
    for r in rows:                                          # the portrait is the first frame
        assert torch.allclose(r["identity"][:, 0], r["latents"][:, 0], atol=1e-4)
        assert torch.equal(r["audio"], augmented[0].tensor("audio", r["chunk"].row))


def test_an_augmented_clip_is_one_crop(clips):
    """Property: all frames of a copy are cropped alike, the mask with them, and mirrored copies are
    mirrored; colours of a mask do not change."""
    clip = clips[0]
    pictures = tiny.AugmentedPictures(clip.frames, clip.name, 2)
    mirrored = tiny.AugmentedPictures(clip.frames, clip.name, 3)
    assert len(pictures) == len(clip.frames) and pictures[:3].shape == (3, 32, 32, 3)
    assert np.array_equal(pictures[5:6], pictures[4:7][1:2])
    assert not np.array_equal(pictures[:1], clip.frames[:1])
    assert pictures.mirrored is False and mirrored.mirrored is True
    mask = tiny.AugmentedPictures(clip.mask, clip.name, 2)[:1]
    assert mask.max() == 255 and mask.shape == (1, 8, 8)


def test_windows_look_at_mouth_and_eyes():
    """Property: mouth and eyes are where a face has them, and nowhere without one; half of the
    windows go for the mouth, two of five for the eyes."""
    face = torch.zeros(2, 16, 16)
    face[:, 3:15, 4:12] = 1                                 # rows 3-14, columns 4-11
    mouth, eyes = tiny.face_region(face, *tiny.MOUTH), tiny.face_region(face, *tiny.EYES)

    def extent(region):
        return [sorted(set(region.nonzero()[:, axis].tolist())) for axis in (1, 2)]

    assert extent(mouth) == [[10, 11, 12, 13], [6, 7, 8, 9]]
    assert extent(eyes) == [[5, 6, 7, 8], [5, 6, 7, 8, 9, 10]]
    assert not tiny.face_region(0 * face, *tiny.MOUTH).any()
    rng = np.random.default_rng(0)
    places = [tiny.place_window(mouth, eyes, 8, rng) for _ in range(400)]
    assert all(y % 2 == x % 2 == 0 and 0 <= y <= 8 and 0 <= x <= 8 for y, x in places)

    def placed(choice, *regions):
        fixed = SimpleNamespace(random=lambda: choice, integers=lambda n: 0 * n,
                                uniform=lambda *a: np.zeros(2))
        return tiny.place_window(*regions, 4, fixed)

    at_mouth, at_eyes, anywhere = (10, 6), (4, 6), (0, 0)   # rows 12 and 7, column 8
    chosen = [placed(choice, mouth, eyes) for choice in (0, 0.49, 0.51, 0.89, 0.91)]
    assert chosen == [at_mouth, at_mouth, at_eyes, at_eyes, anywhere]
    assert placed(0.2, 0 * mouth, eyes) == placed(0.7, mouth, 0 * eyes) == anywhere
    assert len({tiny.place_window(0 * mouth, 0 * eyes, 8, rng) for _ in range(400)}) == 25


def test_blinks_are_drawn_more_often(clips, chunks):
    """Property: a folder's share stays; in it, chunks with a blink are drawn so much more often.
    Without a record of blinks there are none."""
    folders = [[c for c in chunks if c.length == T] for T in (33, 29)]
    assert not any(tiny.has_blink(c, 2) for c in chunks)
    sidecar, first = clips[0].path.with_suffix(".npz"), folders[0][0]
    np.savez(sidecar, blink=np.arange(first.clip.length) == first.start + 4)
    try:
        # of m latents, 4 m - 3 frames are given
        assert not tiny.has_blink(first, 2) and tiny.has_blink(first, 1)
        cfg = replace(CFG, continuity_frames=1, blink_oversampling=4.0)
        weights = tiny.sampling_weights(folders, [3.0, 1.0], cfg)
        np.savez(sidecar, blink=np.zeros(7))
        with pytest.raises(ValueError, match="the clip has"):
            tiny.has_blink(first, 1)
    finally:
        sidecar.unlink()
    blink = first.start + 4
    has = np.array([c.clip == first.clip and c.start < blink < c.start + 33 for c in folders[0]])
    own = np.array(weights[:len(has)])
    assert sum(weights[:len(has)]) == pytest.approx(3) and sum(weights) == pytest.approx(4)
    assert 0 < has.sum() < len(has)
    assert np.allclose(own / own.min(), np.where(has, 4, 1))


def test_eyes_weigh_more_when_they_move(chunks, monkeypatch):
    """Property: eye_motion_weight adds to eyes as far as they are from their median, and to nothing
    else; still eyes gain nothing."""
    base = replace(CFG, mouth_loss_weight=0.0, face_loss_weight=0.0, eye_loss_weight=0.0,
                   eye_motion_weight=0.0, codec_roundtrips=0, continuity_frames=1)

    def extra(**options):
        weights = [row(chunks[0], replace(base, **o))["loss_weight"] for o in (options, {})]
        return (weights[0] - weights[1])[1:]                # latent 0 is given

    z = chunks[0].tensor("latents", chunks[0].row)
    eyes, motion = extra(eye_loss_weight=1.0), extra(eye_motion_weight=1.0)
    at_eyes = eyes > 0
    assert at_eyes.any() and not motion[~at_eyes].any()
    away = (z - z.median(1, keepdim=True).values).square().mean(0)[1:]
    for f in range(len(away)):
        wanted = away[f][at_eyes[f]].mean()
        assert torch.allclose(motion[f][at_eyes[f]], wanted, rtol=1e-3), f
    still = chunks[0].array("latents")[:, :, :1].repeat(z.shape[1], 2)
    still[:, :, 5] += 2                                     # one latent frame is 2 from all others
    array = Chunk.array
    monkeypatch.setattr(Chunk, "array", lambda chunk, what: still if what == "latents"
                        else array(chunk, what))
    motion = extra(eye_motion_weight=1.0)
    moves = (torch.arange(1, z.shape[1]) == 5)[:, None, None]
    assert torch.allclose(motion, 4.0 * eyes * moves, atol=1e-2)


def test_a_step_on_windows_has_more_rows(chunks, monkeypatch):
    """Property: (whole / side)^2 as many rows for a window step, the usual rows for a step on whole
    pictures."""
    tricks, seen = tiny.Tricks(4, None, torch.eye(24)), []
    make_row = tiny.make_row
    monkeypatch.setattr(tiny, "make_row", lambda *a, tricks, side: seen.append(side) or make_row(
        *a, tricks=tricks, side=side))
    cfg, sampler = replace(CFG, whole_every=3), tt.ChunkSampler(chunks)
    sizes = [tiny.make_batch(sampler, cfg, step, range(2, 4), "cpu", tricks)["latents"].shape
             for step in range(4)]
    assert [shape[0] for shape in sizes] == [2, 8, 8, 2]
    assert [shape[-1] for shape in sizes] == [4, 2, 2, 4] and set(seen) == {0, 2}


@pytest.mark.parametrize("augment", [False, True])
def test_a_window_is_a_piece_of_the_picture(chunks, augmented, linear, augment):
    """Property: latents, portrait and weights of a window are those of the whole picture at one and
    the same place, where tokens begin."""
    chunk = (augmented if augment else chunks)[0]
    tricks, places = tiny.Tricks(4, linear, None), set()
    cfg = replace(CFG, eye_loss_weight=5.0, eye_motion_weight=0.0, codec_roundtrips=0)
    for seed in range(12):
        whole, part = (row(chunk, cfg, seed, tricks, side) for side in (0, 2))
        corners = [(y, x) for y in (0, 2) for x in (0, 2)]
        matches = [(y, x) for y, x in corners if all(
            torch.allclose(part[k], whole[k][..., y:y + 2, x:x + 2], atol=0.1)
            for k in ("latents", "identity", "loss_weight"))]
        assert matches, seed
        places.add(matches[0])
    assert len(places) > 1


def record_input(inputs, x, *rest):
    """A network that notes what it is given."""
    inputs.append(x)
    return x


def test_corrupted_kappa_is_what_a_linear_codec_would_leave(chunks, vae):
    """Property: for a codec that is linear, k round trips are k round trips; noise adds up by its
    variance. Only kappa is corrupted, never a portrait, and the target stays the truth."""
    random = np.random.default_rng(0).uniform(-0.2, 0.2, (24, 24)).astype(np.float32)
    channels = torch.from_numpy(random + np.eye(24, dtype=np.float32))
    codec = SimpleNamespace(
        decode=lambda z: z / 1000,
        encode=lambda x: 1000 * torch.einsum("cd,bdfhw->bcfhw", channels, x))
    matrix = tiny.roundtrip_matrix(codec, chunks[:4], 3)
    assert torch.allclose(matrix, channels, atol=1e-3)
    z = torch.randn(24, 3, 4, 4)
    twice = torch.einsum("cd,de,efhw->cfhw", matrix, matrix, z)
    assert torch.allclose(tiny.corrupt_kappa(z, matrix, 2, 0 * z), twice, atol=1e-4)
    assert torch.equal(tiny.corrupt_kappa(z, matrix, 0, z), z)
    noise = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    once, thrice = (tiny.corrupt_kappa(0 * noise, matrix, k, noise) for k in (1, 3))
    assert torch.allclose(thrice, 3 ** 0.5 * once)
    patches = once - 0.3 * noise
    assert torch.allclose(patches, patches[:, :1], atol=1e-6)   # equal for all m latents
    coarse = [nnf.avg_pool2d(x, 8).std() for x in (patches[:, 0], 0.3 * noise[:, 0])]
    assert coarse[0] > 2 * coarse[1]
    seen = set()
    tricks = tiny.Tricks(4, None, tiny.roundtrip_matrix(vae, chunks[:2], 3))
    for seed in range(24):
        is_first = seed % 4 == 0
        cfg = replace(CFG, codec_roundtrips=2)
        one = row(chunks[0], cfg, seed, tricks, is_first=is_first)
        other = row(chunks[0], replace(cfg, codec_roundtrips=0), seed, tricks, is_first=is_first)
        trips = [k for k in range(4) if torch.equal(one["kappa"], tiny.corrupt_kappa(
            other["kappa"], tricks.roundtrip, k, one["noise"][:, :3]))]
        seen.add((is_first, *trips))
        assert torch.equal(one["latents"], other["latents"])
        assert torch.equal(one["identity"], other["identity"])
        inputs = []
        recorder = partial(record_input, inputs)
        tt.teacher_loss(recorder, vae, collate([one], "cpu"), CFG, with_pixels=False)
        given = one["loss_weight"][:, 0, 0] == 0
        assert torch.equal(inputs[0][0][:, given], one["kappa"][:, :int(given.sum())])
    assert seen == {(True, 0), (False, 0), (False, 1), (False, 2)}


def test_validation_ignores_the_weights(chunks):
    """Property: the validation loss is Eq. 2 unweighted, whatever training weighs."""
    model = make_network()
    heavy = replace(CFG, mouth_loss_weight=90.0, eye_loss_weight=90.0)
    light, same = (tt.validate(model, chunks[:1], cfg, "cpu") for cfg in (CFG, heavy))
    assert light == same

# ------------------------------------------------------------------------------------------ program


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clips, vae):
    top = tmp_path_factory.mktemp("user")
    for where in ("clips", "weights"):
        (top / where).mkdir()
    for clip in clips[:2]:
        path = top / "clips" / f"{clip.name}.mp4"
        write_mp4(path, np.array(clip.frames[:33]), np.array(clip.audio[:33 * 640]))
    save_file(vae.state_dict(), top / "weights" / "vae.safetensors")
    encoder = str(ROOT / "weights" / "tiny" / "whisper")
    config = {"vae": asdict(vae.config), "audio": encoder, "size": 32}
    (top / "weights" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return top


def options(folder, *more, run="run"):
    return ["--data", str(folder / "clips"), "--weights", str(folder / "weights"),
            "--run-dir", str(folder / run), "--device", "cpu", "--no-bf16", "--batch", "2",
            "--micro-batch", "2", "--steps", "1", "--window", "2", "--blink-oversampling", "1",
            *more]


def test_only_a_nearly_linear_encoder_is_replaced(folder, capsys, monkeypatch):
    """Property: two matrices that are not the encoder (a random one is bent) are refused before
    anything is encoded. Trusted ones become part of the checkpoint, and a resumed run is done."""
    with pytest.raises(SystemExit) as stop:
        tiny.main(options(folder, run="bent"))
    assert stop.value.code == 2 and "not linear" in capsys.readouterr().err
    trusted = property(lambda self: 0, lambda self, value: None)
    monkeypatch.setattr(tiny, "LinearEncoder", type("Trusted", (LinearEncoder,),
                                                    {"missing": trusted}))
    tiny.main(options(folder, run="bent"))
    with safe_open(folder / "bent/checkpoint.safetensors", "pt") as file:
        shapes = [file.get_slice(f"linear.{i}").get_shape() for i in (0, 1)]
    assert shapes == [[769, 24]] * 2
    monkeypatch.setattr(tt, "train_step", None)             # resumed, there is nothing left to do
    tiny.main(options(folder, "--resume", run="bent"))
    assert [r["step"] for r in read_log(folder / "bent")] == [0, 1]
    config = json.loads((folder / "bent/weights/config.json").read_text(encoding="utf-8"))
    assert config["tiny"] == {"edm_skip": 0.15, **tiny.SAMPLING}


def test_bad_input_is_one_line(folder, capsys):
    """Property: what a user can get wrong ends in exit code 2 and one line."""
    for bad, word in ((["--window", "3"], "--window"), (["--window", "8"], "--window"),
                      (["--lambda-temp", "1"], "whole pictures"),
                      (["--shares", "1", "1"], "--shares"), (["--edm-skip", "-1"], "0 or more"),
                      (["--codec-roundtrips", "-1"], "0 or more"),
                      (["--data", str(folder / "nowhere")], "nowhere")):
        with pytest.raises(SystemExit) as stop:
            tiny.main(options(folder, *bad, run="bad"))
        text = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and text[-1].startswith("tiny.teacher: ") and word in text[-1]
