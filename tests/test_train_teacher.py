"""Laws of the teacher's training. The networks here are random and small: a law holds for any weights."""
import copy
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import dit
import infer
import train_teacher as tt
from checkpoint import log, save_picture, swap
from chunks import EYES, MOUTH, Chunk, Pools, chunk_starts, collate, encode_clips, load_row, part_of, place_window, wear_of, worn
from data import Clip, write_mp4
from linear import LinearCodec, blocks
from vae import PRESETS as VAE
from vae import WanVAE

SMALL = replace(dit.PRESETS["tiny"], dim=48, ffn_dim=64, layers=2, audio_layers=2, audio_dim=3, audio_tokens=2, audio_hidden=16)
CFG = tt.TeacherConfig(steps=6, batch=4, micro=4, lr=1e-3, warmup=2, ema=0.9, frames=33, offsets=2, references=2, bf16=False, every=3,
                       minutes=1e9, val=1, pixel_every=1, pixel_sigma=0.7, encode_bf16=False)


class Ear:
    """Stands in for Wav2Vec2: every entry tells the loudness of its frame, and where the window it was heard in began and ended."""
    layers, dim, model = 2, 3, torch.nn.Linear(1, 1)

    def features(self, audio, start, frames):
        out = torch.zeros(frames, 2, 3)
        sound = np.zeros((start + frames) * 640, np.float32)
        sound[:len(audio)] = audio[:len(sound)]
        out[:, 0, 0] = torch.from_numpy(np.abs(sound.reshape(-1, 640)).mean(1)[start:])
        out[:, 1, 1], out[:, 1, 2] = max(0, start + frames - 200), start + frames
        return out


def make_clip(folder, name, length, seed):
    """A bright disc that wanders over a coloured ground, and as much noise as it is wide; the "face" is the upper left quarter."""
    rng, store = np.random.default_rng(seed), folder / name
    store.mkdir(parents=True)
    t, (y, x) = np.arange(length)[:, None, None], np.mgrid[:32, :32]
    disc = (y - 16 - 6 * np.sin(t / 5 + seed)) ** 2 + (x - 16) ** 2 < 40
    frames = np.where(disc[..., None], 220, rng.integers(0, 120, 3)).astype(np.uint8)
    mask = np.zeros((length, 8, 8), np.uint8)
    mask[:, :4, :4] = 255
    audio = (rng.normal(size=(length, 640)) * 3000 * np.abs(np.sin(np.arange(length) / 3))[:, None]).astype(np.int16).ravel()
    for what, array in {"frames": frames, "audio": audio, "mask": mask}.items():
        np.save(store / f"{what}.npy", array)
    return Clip(name, name, folder / f"{name}.mp4", store, length)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return WanVAE(replace(VAE["tiny"], dim=8, dim_mult=(1, 1, 2, 2))).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [make_clip(folder, "long", 70, 0), make_clip(folder, "other", 70, 1), make_clip(folder, "short", 31, 2)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def chunks(clips, vae, cache):
    return encode_clips(clips, vae, Ear(), cache, CFG)


@pytest.fixture
def pools(chunks):
    return Pools([[c for c in chunks if c.length == 33], [c for c in chunks if c.length == 29]], [1.0, 1.0])


def network(seed=0):
    torch.manual_seed(seed)
    model = dit.AudioDiT(SMALL)
    torch.nn.init.normal_(model.head.head.weight, std=0.1)                      # Wan starts it at zero: nothing would depend on anything
    return model


def run(folder, vae, pools, chunks, resume=False, model=None, **options):
    return tt.train(replace(CFG, **options), model or network(), vae, pools, chunks[:1], folder, resume)


# ---------------------------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("T, reference", [(81, "tre"), (33, "tre"), (33, "etr")])
def test_the_cache_holds_what_the_network_is_given_in_use(clips, vae, tmp_path, T, reference):
    """Law: training and inference see one world, at any chunk length, with either identity reference. Latents, references and audio are
    infer.py's own, rounded to half."""
    seen = []

    class Recorder(torch.nn.Module):
        def forward(self, x, t, identity, audio):
            seen.append((x, identity, audio))
            return torch.zeros_like(x)

    clip = make_clip(tmp_path, "whole", 2 * T - 2, 5)
    chunks = encode_clips([clip], vae, Ear(), tmp_path / "cache", replace(CFG, frames=T, offsets=1))
    assert [c.start for c in chunks] == [0, T - 9]                               # 9 frames shared, as in infer.py
    image = torch.from_numpy(np.array(clip.frames[0])).permute(2, 0, 1)[None] / 127.5 - 1
    sound = np.array(clip.audio[:(2 * T - 9) * 640]) / np.float32(32768)
    list(infer.generate(infer.Models(vae, Recorder(), Ear(), "teacher", 32, True, T, reference), image, sound, steps=1, guidance=1))
    for chunk, (x, identity, audio) in zip(chunks, seen, strict=True):
        row = load_row(chunk, replace(CFG, identity=reference), np.random.default_rng(0), cold=chunk.row == 0, deaf=False, sigma=0.5)
        assert torch.equal(row["audio"], audio[0].half().float())
        with torch.no_grad():
            truth = vae.encode(tt.pixels(clip.frames[chunk.start:chunk.start + T]))[0]
        assert torch.equal(row["latents"], truth.half().float())
        if chunk.row == 0:                                                      # the portrait is frame 0, and its first latent is kappa
            assert torch.equal(row["identity"], identity[0].half().float())
            assert torch.equal(row["latents"][:, :1], x[0, :, :1].half().float())


def test_the_cache_is_made_once_and_again_for_other_weights(clips, vae, cache, chunks, monkeypatch):
    """Law: the second run reads; other weights or another grid is another cache. The decoder's weights are none: it encodes nothing."""
    calls = []
    monkeypatch.setattr("chunks.encode_clip", lambda *a: calls.append(a) or {"latents": np.zeros(1)})
    assert encode_clips(clips, vae, Ear(), cache, CFG) == chunks and not calls
    def changed(part):
        other, ear = copy.deepcopy(vae), Ear()
        ear.model = copy.deepcopy(ear.model)
        next((ear.model if part == "ear" else getattr(other, part)).parameters()).data[0] += 1
        encode_clips(clips, other, ear, cache, CFG)
        return len(calls)

    assert changed("decoder") == changed("conv2") == 0
    assert [changed(part) for part in ("encoder", "conv1", "ear")] == [3, 6, 9]
    other = WanVAE(replace(vae.config, latents_std=(2.0,) * 24))
    other.load_state_dict(vae.state_dict())
    encode_clips(clips, other, Ear(), cache, CFG)
    encode_clips(clips, vae, Ear(), cache, replace(CFG, frames=29))
    assert len(calls) == 15
    encode_clips(clips, vae, Ear(), cache, CFG, fresh=True)                     # the sound alone
    assert len(calls) == 18


def test_chunks_tile_a_clip_several_times():
    """Law: chunks are one step apart, and again from later frames on; none leaves the clip, none comes twice."""
    assert chunk_starts(384, 81, 72, 2) == [0, 72, 144, 216, 288, 36, 108, 180, 252]
    assert chunk_starts(75, 73, 72, 3) == [0] and chunk_starts(73, 73, 72, 100) == [0]


# ---------------------------------------------------------------------------------------------------------------- batch


def test_rates_lengths_and_shares(pools):
    """Law: one row in ten starts cold, one in ten is deaf, a batch has one length, and folders are heard by share, not by size."""
    cfg, lengths, cold, deaf = replace(CFG, steps=200), [], 0, 0
    for step in range(200):
        rows = [pools.draw(cfg, step, row) for row in range(4)]
        assert len({row["chunk"].length for row in rows}) == 1
        lengths.append(rows[0]["chunk"].length)
        cold += sum(row["predicted"].sum() == len(row["predicted"]) - 1 for row in rows)
        deaf += sum(not row["audio"].any() for row in rows)
        for row in rows:
            if row["predicted"][1]:                                             # cold: the portrait is the first frame
                assert torch.equal(row["identity"][:, 0], row["latents"][:, 0])
                assert row["chunk"].start == row["chunk"].pictures[row["chunk"].row]
    assert 0.06 < cold / 800 < 0.14 and 0.06 < deaf / 800 < 0.14
    assert 0.4 < np.mean(np.array(lengths) == 33) < 0.6                         # though there are four times as many


def test_the_reference_is_not_in_the_chunk(chunks):
    """Law: the picture comes from elsewhere in the clip (Eq. 24), else the network would copy its mouth."""
    long = [c for c in chunks if c.clip.name == "long"]
    for chunk in long:
        outside = [j for j, f in enumerate(chunk.pictures) if not chunk.start <= f < chunk.start + 33]
        allowed = [torch.from_numpy(chunk.array("identity")[j].astype(np.float32)) for j in outside]
        for seed in range(8):
            row = load_row(chunk, CFG, np.random.default_rng(seed), cold=False, deaf=False, sigma=0.5)
            assert outside and any(torch.equal(row["identity"], z) for z in allowed)


def test_a_linear_encoder_is_its_own_codec(clips):
    """Law: of an encoder that is linear, LinearCodec is the encoder, of a portrait as well; of another one it is the nearest."""
    torch.manual_seed(0)
    first, rest = torch.randn(2, 768, 16).double() / 768 ** 0.5

    def encode(video):                                                          # (1, 3, T, H, W) -> (1, C, F, h, w)
        x = blocks(video).double()
        return (torch.cat([x[:, :1] @ first, x[:, 1:] @ rest], 1) + 0.5).float().movedim(-1, 1)
    videos = [torch.rand(1, 3, 33, 64, 64) * 2 - 1 for _ in range(5)]
    codec = LinearCodec(Namespace(encode=encode), videos)
    video = torch.rand(1, 3, 33, 32, 32) * 2 - 1
    still = video[:, :, :1].expand(-1, -1, 33, -1, -1)
    assert (codec.encode(video) - encode(video)[0]).abs().max() < 0.05          # 64 first blocks a clip for 768 numbers: nearly
    assert (codec.encode(video) - encode(video)[0])[:, 1:].abs().max() < 0.02
    assert torch.allclose(codec.still(video[:, :, :1], 9), codec.encode(still), atol=1e-5)
    bent = LinearCodec(Namespace(encode=lambda video: (9 * encode(video)).sin()), videos)
    assert codec.missing < 5e-3 < 0.5 < bent.missing < 1.01


def test_a_fresh_chunk_is_another_cut_at_every_draw(clips, vae, tmp_path):
    """Law: a fresh chunk looks different every time, its portrait is cut out as it is, its sound stays; the same draw is the same row."""
    chunks = encode_clips(clips[:1], vae, Ear(), tmp_path, CFG, fresh=True)
    assert {path.name for path in chunks[0].store.iterdir()} == {"audio.npy"}
    pools = Pools([chunks], [1.0], codec=LinearCodec(vae, [tt.pixels(clips[0].frames[:33])]))
    rows = [pools.draw(replace(CFG, cold=1.0, deaf=0.0), 0, row) for row in range(8)]
    again = pools.draw(replace(CFG, cold=1.0, deaf=0.0), 0, 3)
    assert all(torch.equal(rows[3][k], again[k]) for k in again if k != "chunk")
    assert len({row["latents"].sum().item() for row in rows}) == 8 and all(row["chunk"].name == "long*@" + str(row["chunk"].start) for row in rows)
    for row in rows:                                                            # cold: the portrait is the chunk's own first frame
        assert torch.allclose(row["identity"][:, 0], row["latents"][:, 0], atol=1e-4)
        assert torch.equal(row["audio"], torch.from_numpy(row["chunk"].array("audio")[row["chunk"].row].astype(np.float32)))


def test_windows_look_at_mouth_and_eyes():
    """Law: mouth and eyes are where a face has them, and nowhere without one; half of the windows go for the mouth, two of five for the eyes."""
    face = torch.zeros(2, 16, 16)
    face[:, 3:15, 4:12] = 1                                                     # rows 3-14, columns 4-11
    mouth, eyes, rng = part_of(face, *MOUTH), part_of(face, *EYES), np.random.default_rng(0)
    rows = lambda part: [sorted(set(part.nonzero()[:, axis].tolist())) for axis in (1, 2)]
    assert rows(mouth) == [[10, 11, 12, 13], [6, 7, 8, 9]] and rows(eyes) == [[5, 6, 7, 8], [5, 6, 7, 8, 9, 10]]
    assert not part_of(0 * face, *MOUTH).any()
    places = [place_window(mouth, eyes, 8, rng) for _ in range(400)]
    assert all(y % 2 == x % 2 == 0 and 0 <= y <= 8 and 0 <= x <= 8 for y, x in places)
    drawn = lambda luck, *parts: place_window(*parts, 4, Namespace(random=lambda: luck, integers=lambda n: 0 * n, uniform=lambda *a: np.zeros(2)))
    at_mouth, at_eyes, anywhere = (10, 6), (4, 6), (0, 0)                       # their middles: rows 12 and 7, column 8
    assert [drawn(luck, mouth, eyes) for luck in (0, 0.49, 0.51, 0.89, 0.91)] == [at_mouth, at_mouth, at_eyes, at_eyes, anywhere]
    assert drawn(0.2, 0 * mouth, eyes) == drawn(0.7, mouth, 0 * eyes) == anywhere
    assert len({place_window(0 * mouth, 0 * eyes, 8, rng) for _ in range(400)}) == 25              # no face: anywhere


def test_who_blinks_is_drawn_more_often(clips, chunks):
    """Law: a folder's share stays; in it, chunks in which eyes shut are drawn --blinks times as often. Without a word on blinks, nobody does."""
    folders = [[c for c in chunks if c.length == T] for T in (33, 29)]
    assert not any(c.blinks(2) for c in chunks)
    sidecar, first = clips[0].path.with_suffix(".npz"), folders[0][0]
    np.savez(sidecar, blink=np.arange(first.clip.length) == first.start + 4)
    try:
        assert not first.blinks(2) and first.blinks(1)                          # of m latents it is handed 4 m - 3 frames
        pools = Pools(folders, [3.0, 1.0], often=lambda chunk: 4.0 if chunk.blinks(1) else 1.0)
        np.savez(sidecar, blink=np.zeros(7))
        with pytest.raises(ValueError, match="the clip has"):
            first.blinks(1)
    finally:
        sidecar.unlink()
    shut = np.array([c.clip == first.clip and c.start < first.start + 4 < c.start + 33 for c in folders[0]])    # handed 1 frame, 32 are predicted
    assert pools.lengths == [33, 29] and np.allclose(pools.chance, [0.75, 0.25])
    assert 0 < shut.sum() < len(shut) and np.allclose(pools.weights[33] * (4 * shut.sum() + (~shut).sum()), np.where(shut, 4, 1))


def test_eyes_count_when_they_move(chunks, monkeypatch):
    """Law: --lids adds to the weight of eyes as far as they are from where they mostly are, and to nothing else; what is still gains nothing."""
    row = lambda **options: load_row(chunks[0], replace(CFG, lips=0.0, **options), np.random.default_rng(0), False, False, 0.5)
    plain, eyes, lids = row(), row(eyes=1.0)["weight"] - row()["weight"], row(lids=1.0)["weight"] - row()["weight"]
    z, there = plain["latents"], eyes > 0
    assert there.any() and not lids[~there].any()
    away = (z - z.median(1, keepdim=True).values).square().mean(0)
    for f in range(z.shape[1]):
        assert torch.allclose(lids[f][there[f]], away[f][there[f]].mean(), rtol=1e-3), f
    still = np.repeat(chunks[0].array("latents")[:, :, :1], z.shape[1], 2)
    still[:, :, 5] += 2                                                         # one latent frame is 2 from all others
    monkeypatch.setattr(Chunk, "array", lambda chunk, what, array=Chunk.array: still if what == "latents" else array(chunk, what))
    lids = row(lids=1.0)["weight"] - row()["weight"]
    assert torch.allclose(lids, 4.0 * eyes * (torch.arange(len(lids)) == 5)[:, None, None], atol=1e-2)


def test_a_step_on_windows_has_more_rows(pools, vae, chunks, tmp_path, monkeypatch):
    """Law: (whole / side)^2 as many rows for a window step, the same rows as ever for a step that sees whole pictures or decodes frames."""
    draw, seen = pools.draw, []
    monkeypatch.setattr(pools, "draw", lambda cfg, step, row, side: seen.append((step, row, side)) or draw(cfg, step, row, side))
    monkeypatch.setattr(tt, "strip", lambda *a: None)
    run(tmp_path, vae, pools, chunks, steps=4, micro=2, window_side=2, whole=4, pixel_every=3)
    assert seen == [(step, row, side) for step in range(4) for n, side in [(4, 0) if step in (0, 3) else (16, 2)] for row in range(n)]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_window_is_a_piece_of_the_picture(clips, vae, tmp_path, fresh):
    """Law: latents, portrait and weights of a window are those of the whole picture at one and the same place, where tokens begin."""
    chunk = encode_clips(clips[:1], vae, Ear(), tmp_path, CFG, fresh=fresh)[0]
    codec, cfg, places = LinearCodec(vae, [tt.pixels(clips[0].frames[:33])]), replace(CFG, eyes=5.0, focus=2.0), set()
    for seed in range(12):
        whole, part = (load_row(chunk, cfg, np.random.default_rng(seed), False, False, 0.5, codec, side) for side in (0, 2))
        for y, x in [(y, x) for y in (0, 2) for x in (0, 2)]:
            same = [torch.allclose(part[k], whole[k][..., y:y + 2, x:x + 2], atol=0.1) for k in ("latents", "identity")]
            if all(same) and torch.equal(part["weight"], whole["weight"][..., y:y + 2, x:x + 2]):
                places.add((y, x))
                break
        else:
            raise AssertionError(f"seed {seed}: no such place")
    assert len(places) > 1


# ------------------------------------------------------------------------------------------------------------ equations


def test_head_latents_are_clean_and_teach_nothing(pools, vae):
    """Law: the network sees kappa_gt without noise, and what it says about kappa has no gradient, with the pixel losses too."""
    cfg = replace(CFG, cold=0.5, pixel_sigma=1.1, focus=1.0)
    batch = collate([pools.draw(cfg, 1, row) for row in range(4)], "cpu")
    v = torch.zeros_like(batch["latents"], requires_grad=True)
    inputs = []
    loss, parts = tt.teacher_loss(lambda x, *rest: inputs.append((x, *rest)) or v, vae, batch, cfg, True)
    loss.sum().backward()
    head = batch["predicted"] == 0
    assert set(head.sum(1).tolist()) == {1, 3}                                  # cold rows and others in one batch
    for i in range(4):
        assert torch.equal(inputs[0][0][i][:, head[i]], batch["latents"][i][:, head[i]])
        assert not v.grad[i][:, head[i]].any() and (v.grad[i][:, ~head[i]] != 0).float().mean() > 0.99
        sigma, rest = batch["sigma"][i], ~head[i]
        noisy = (1 - sigma) * batch["latents"][i] + sigma * batch["noise"][i]
        assert torch.allclose(inputs[0][0][i][:, rest], noisy[:, rest], atol=1e-6)
    assert torch.equal(inputs[0][1], 1000 * batch["sigma"]) and (parts["face"] > 0).all() and (parts["temporal"] > 0).all()


def test_a_worn_kappa_is_what_the_codec_would_make_of_it(chunks, vae, pools):
    """Law: of a codec that is linear, k rounds are k rounds. What is worn is kappa only, never a portrait, and the truth stays the truth."""
    channels = np.random.default_rng(0).uniform(-0.2, 0.2, (24, 24)).astype(np.float32) + np.eye(24, dtype=np.float32)
    linear = Namespace(decode=lambda z: z / 1000, encode=lambda x: 1000 * torch.einsum("cd,bdfhw->bcfhw", torch.from_numpy(channels), x))
    wear = wear_of(linear, chunks[:4], 3)
    assert torch.allclose(wear, torch.from_numpy(channels), atol=1e-3)
    z = torch.randn(24, 3, 4, 4)
    twice = torch.einsum("cd,de,efhw->cfhw", wear, wear, z)
    assert torch.allclose(worn(z, wear, 2, 0 * z), twice, atol=1e-4) and torch.equal(worn(z, wear, 0, z), z)
    noise = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    once, thrice = (worn(0 * noise, wear, rounds, noise) for rounds in (1, 3))
    assert torch.allclose(thrice, 3 ** 0.5 * once)                              # noise adds up as it does: by its variance
    blotches = once - 0.3 * noise
    assert torch.allclose(blotches, blotches[:, :1], atol=1e-6)                 # they stay for all m latents, and are what white noise has least of:
    assert torch.nn.functional.avg_pool2d(blotches[:, 0], 8).std() > 2 * torch.nn.functional.avg_pool2d(0.3 * noise[:, 0], 8).std()
    rough = [(worn(0 * noise, wear, 1, noise, cells) - 0.3 * noise)[:, 0, :side, :side].diff(dim=1).square().mean() for noise, cells, side in
             ((noise, 4, 32), (noise[..., :16, :16], 2, 16), (noise[..., :16, :16], 4, 16))]
    assert 0.6 < rough[0] / rough[1] < 1.6 and rough[2] > 2 * rough[0]          # a blotch has one size, in a window as in the whole picture
    cfg, seen, inputs = replace(CFG, cold=0.3, worn=2), set(), []
    pools.wear = wear_of(vae, chunks[:2], 3)
    for row in range(8):
        one, other = (pools.draw(replace(CFG, cold=0.0, worn=k), 1, row, pools.size // 2) for k in (2, 0))
        assert any(torch.equal(one["kappa"], worn(other["kappa"], pools.wear, k, one["noise"][:, :3], 2)) for k in range(3))
    for row in range(24):
        one, other = pools.draw(cfg, 1, row), pools.draw(replace(cfg, worn=0), 1, row)
        rounds = [k for k in range(4) if torch.equal(one["kappa"], worn(other["kappa"], pools.wear, k, one["noise"][:, :3]))]
        seen.add((bool(one["predicted"][1]), *rounds))
        assert torch.equal(one["latents"], other["latents"]) and torch.equal(one["identity"], other["identity"])
        batch = collate([one], "cpu")
        tt.teacher_loss(lambda x, *rest: inputs.append(x) or x, vae, batch, cfg, False)
        head = batch["predicted"][0] == 0
        assert torch.equal(inputs[-1][0][:, head], one["kappa"][:, :int(head.sum())])
    assert seen == {(True, 0), (False, 0), (False, 1), (False, 2)}              # cold: never; else 0 to 2 rounds


def test_equation_2():
    """Law: the target is eps - x0; the loss is a mean of squares over the weighted latents only."""
    x0, eps, v = torch.full((1, 2, 3, 1, 1), 1.0), torch.full((1, 2, 3, 1, 1), 4.0), torch.full((1, 2, 3, 1, 1), 3.0)
    weight = torch.tensor([0.0, 1.0, 3.0]).view(1, 1, 3, 1, 1)
    assert tt.flow_matching_loss(v, x0, eps, weight).item() == 0
    v[:, :, 0], v[:, :, 1], v[:, :, 2] = 99, 5, 4                               # errors: not counted, 2, 1
    assert tt.flow_matching_loss(v, x0, eps, weight).item() == pytest.approx((1 * 4 + 3 * 1) / 4)


def test_equation_16_sees_changes_only():
    """Law: a constant colour offset costs nothing; a frame that jumps by 0.3 costs 0.3 twice, coming and going."""
    true = torch.rand(1, 3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    assert tt.temporal_gradient_loss(true + torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1, 1), true).item() < 1e-6
    made = true.clone()
    made[:, :, 2] += 0.3
    assert tt.temporal_gradient_loss(made, true).item() == pytest.approx(2 * 0.3 / 4, abs=1e-6)


def test_equation_17_sees_the_face_only():
    """Law: errors outside the mask cost nothing; inside, the mean over the face, however small it is."""
    true, mask = torch.zeros(1, 3, 2, 4, 4), torch.zeros(1, 1, 2, 4, 4)
    mask[..., 1, 1] = 1
    outside, inside = true + (1 - mask), true + 0.5 * mask
    assert tt.face_loss(outside, true, mask).item() == 0
    assert tt.face_loss(inside, true, mask).item() == pytest.approx(0.5, abs=1e-5)
    assert tt.face_loss(true + 1, true, mask * 0).item() == 0                   # no face at all: zero, not NaN


def test_a_decoded_window_is_a_piece_of_the_whole(vae, chunks):
    """Law: with enough context to its left a window decodes to the same frames as the whole chunk, and the frames are the right ones."""
    z = torch.from_numpy(chunks[0].array("latents")[:1].astype(np.float32))
    whole = torch.cat([vae.decode(z.clone().requires_grad_())], 2).detach()
    window = tt.decode_window(vae, z.requires_grad_(), 4, 3, 99)
    assert window.shape[2] == 12 and torch.allclose(window, whole[:, :, 4 * 4 - 3:4 * 7 - 3], atol=1e-5)


def test_pixel_losses_compare_with_the_right_frames(chunks, clips):
    """Law: with a perfect decoder the pixel losses of the true latents are zero, whatever chunk and window; noisy rows are left out."""
    class Perfect:
        def decode(self, z):                                                    # z carries the frame number of each latent's frames
            start, frames = int(z[0, 0, 0, 0, 0]), clips[0].frames
            return tt.pixels(frames[start:start + 4 * z.shape[2] - 3]) + 0.2 * z[0, 1, 0, 0, 0]

    for chunk in [c for c in chunks if c.clip.name == "long"]:
        for seed in range(4):
            rows = [load_row(chunk, CFG, np.random.default_rng(seed), False, False, sigma) for sigma in (0.1, 0.9)]
            batch, x0 = collate(rows, "cpu"), torch.zeros(2, 2, 9, 4, 4)
            # a window that begins at latent b is decoded as a clip of its own: one frame, then fours
            x0[:, 0] = (chunk.start + 4 * torch.arange(9))[:, None, None]
            temporal, face, clean = tt.pixel_losses(Perfect(), x0, batch, CFG)
            assert temporal.tolist() == [0, 0] and face.tolist() == [0, 0] and clean.tolist() == [1, 0]
            x0[:, 1] = 1
            temporal, face, _ = tt.pixel_losses(Perfect(), x0, batch, CFG)
            assert temporal[0] < 1e-6 and face[0] == pytest.approx(0.2, abs=1e-5) and face[1] == 0


# ----------------------------------------------------------------------------------------------------------------- loop


def test_accumulated_gradients_are_those_of_the_whole_batch(pools, vae, chunks, tmp_path):
    """Law: two calls of two rows are one call of four (Adam would hide a wrong scale: the norm does not); validation changes nothing."""
    a, la = run(tmp_path / "a", vae, pools, chunks, steps=2, every=9)
    b, lb = run(tmp_path / "b", vae, pools, chunks, steps=2, every=1, micro=2)
    assert np.allclose(la, lb, atol=1e-5)
    assert all(torch.allclose(a.tensors[k], b.tensors[k], atol=1e-5) for k in a.tensors)
    logs = [[json.loads(line) for line in (tmp_path / x / "log.jsonl").read_text(encoding="utf-8").splitlines()] for x in "ab"]
    assert [r["norm"] for r in logs[0][:2]] == pytest.approx([r["norm"] for r in logs[1][:2]], rel=1e-3)


def test_a_killed_run_goes_on_bit_for_bit(pools, vae, chunks, tmp_path, monkeypatch):
    """Law: killed at any step and resumed, a run has the same losses, weights, averages, optimiser and wear as one that was left alone."""
    pools.wear = torch.eye(24) + 0.1 * torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    whole, losses = run(tmp_path / "a", vae, pools, chunks, worn=2)
    step_of, save = tt.train_step, tt.save_checkpoint

    def killed(state, vae, pools, cfg, step, *rest):
        if step == 4:
            raise KeyboardInterrupt
        return step_of(state, vae, pools, cfg, step, *rest)

    monkeypatch.setattr(tt, "train_step", killed)
    monkeypatch.setattr(tt, "strip", lambda *a: None)
    monkeypatch.setattr(tt, "save_checkpoint", lambda path, tensors, step, cfg, **more: step <= 3 and save(path, tensors, step, cfg, **more))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", vae, pools, chunks, minutes=0.0, worn=2)                    # last saved before step 3, killed in step 4
    monkeypatch.setattr(tt, "train_step", step_of)
    monkeypatch.setattr(tt, "save_checkpoint", save)
    pools.wear = torch.eye(24)                                                  # measured anew, from other chunks perhaps: the checkpoint's counts
    resumed, rest = run(tmp_path / "b", vae, pools, chunks, resume=True, model=network(seed=9), worn=2)
    assert len(rest) == 3 and rest == losses[3:]
    assert all(torch.equal(whole.tensors[k], resumed.tensors[k]) for k in whole.tensors)
    steps = [json.loads(line)["step"] for line in (tmp_path / "b/log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert steps == list(range(7))                                              # no step is logged twice
    with pytest.raises(ValueError, match="lr 0.001 -> 0.1"):
        run(tmp_path / "b", vae, pools, chunks, resume=True, worn=2, lr=0.1)
    with pytest.raises(ValueError, match="made with other options: data "):    # bit for bit means: on the same clips, as often
        run(tmp_path / "b", vae, Pools([chunks[1:]], [1.0], torch.eye(24)), chunks, resume=True, worn=2)


def test_nan_stops_the_run_and_names_the_clips(clips, vae, pools, chunks, tmp_path, monkeypatch):
    """Law: a row that is not a number stops the run before the weights are touched; the last checkpoint is whole, the clip is named."""
    draw, model = pools.draw, network()

    def poisoned(cfg, step, row, side):
        got = draw(cfg, step, row, side)
        return got | {"latents": got["latents"] * (float("nan") if (step, row) == (3, 2) else 1)}

    monkeypatch.setattr(pools, "draw", poisoned)
    monkeypatch.setattr(tt, "strip", lambda *a: None)
    with pytest.raises(FloatingPointError, match=draw(CFG, 3, 2)["chunk"].name):
        run(tmp_path, vae, pools, chunks, minutes=0.0, model=model)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as file:
        assert file.metadata()["step"] == "3"
        assert torch.equal(file.get_tensor("model.head.head.weight"), model.head.head.weight)


def test_a_full_disk_costs_a_checkpoint_not_the_run(pools, vae, chunks, tmp_path, monkeypatch, capsys):
    """Law: when the new checkpoint cannot be written the old one stays, the half-written one goes, and training goes on."""
    run(tmp_path, vae, pools, chunks, steps=1)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("checkpoint.save_file", full)
    _, losses = run(tmp_path, vae, pools, chunks, steps=2)
    assert len(losses) == 2 and "No space left" in capsys.readouterr().err
    log(tmp_path, {"step": 0})                                                  # nor does a line of the log that cannot be written
    save_picture(tmp_path / "log.jsonl" / "strip.png", Image.new("RGB", (2, 2)))
    assert capsys.readouterr().err.count("warning: ") == 2
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before and not list(tmp_path.glob("*.part"))


def test_validation_is_fixed_and_leaves_no_trace(pools, vae, chunks):
    """Law: the validation loss has fixed noise, so it moves with the weights only; looking at the average does not change them."""
    state = tt.State(network(), CFG)
    before = {k: v.clone() for k, v in state.tensors.items()}
    for v in state.ema.values():
        v.add_(0.01)
    own = tt.validate(state.model, chunks[:2], CFG, "cpu")
    assert own == tt.validate(state.model, chunks[:2], CFG, "cpu") and list(own) == list(tt.BINS)
    weighed = replace(CFG, focus=9.0, lips=9.0, eyes=9.0, lids=9.0)             # nor with what training weighs
    assert own == tt.validate(state.model, chunks[:2], weighed, "cpu")
    swap(state.model, state.ema)
    assert tt.validate(state.model, chunks[:2], CFG, "cpu") != own
    swap(state.model, state.ema)
    assert all(torch.equal(v, before[k]) for k, v in state.tensors.items() if k.startswith("model."))


# -------------------------------------------------------------------------------------------------------------- program


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clips, vae):
    """A folder of clips and one of weights, as a user has them; the ears are the shipped ones."""
    top = tmp_path_factory.mktemp("user")
    for where in ("clips", "weights"):
        (top / where).mkdir()
    for clip in clips[:2]:
        write_mp4(top / "clips" / f"{clip.name}.mp4", np.array(clip.frames[:33]), np.array(clip.audio[:33 * 640]))
    save_file(vae.state_dict(), top / "weights" / "vae.safetensors")
    config = {"vae": asdict(vae.config), "audio": str(ROOT / "weights" / "tiny" / "whisper"), "size": 32}
    (top / "weights" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return top


def test_debug_preset_learns_a_chunk_by_heart(folder, capsys):
    """Law: `--preset debug` knows one chunk by heart. The best answer without knowing it costs about 1; below 0.3 it knows it."""
    for clip in (sidecars := [path.with_suffix(".npz") for path in (folder / "clips").glob("*.mp4")]):
        np.savez(clip, blink=np.ones(33))                                       # --blinks stops if nobody blinks
    tt.main(["--data", str(folder / "clips"), "--weights", str(folder / "weights"), "--run-dir", str(folder / "run"), "--preset", "debug",
             "--device", "cpu", "--steps", "120", "--blinks", "2"])
    for clip in sidecars:
        clip.unlink()
    assert float(capsys.readouterr().out.split("\nloss: ")[1].split()[0]) < 0.3
    with safe_open(folder / "weights/teacher.safetensors", "pt") as file:
        assert file.metadata()["trained"] == "yes" and file.get_tensor("head.head.weight").dtype == torch.float16
    models = infer.load(folder / "weights", "teacher", "cpu", "float32")        # what was exported can be used
    assert models.trained and models.dit.config.dim == tt.NETWORKS["debug"].dim and models.frames == 33
    assert (folder / "run/strip.png").exists()
    tt.main(["--plot", "--run-dir", str(folder / "run")])
    assert (folder / "run/loss.png").exists()


def test_bad_input_is_one_line(folder, capsys):
    """Law: what a user can get wrong ends in exit code 2 and one line."""
    clips, other = ["--data", str(folder / "clips")], folder / "other.safetensors"
    save_file({"audio_proj.norm.weight": torch.zeros(3)}, other)
    for bad in (["--data", str(folder / "nowhere")], [], [*clips, "--micro", "3"], [*clips, "--warmup", "0"], [*clips, "--decay", "0"],
                [*clips, "--every", "0"], [*clips, "--context", "0"], [*clips, "--init", str(other)], [*clips, "--worn", "-1"],
                [*clips, "--blinks", "0"], [*clips, "--blinks", "nan"], [*clips, "--blinks", "2"], [*clips, "--lids", "-1"],
                [*clips, "--lids", "inf"], [*clips, "--lips", "-1"], [*clips, "--skip", "-1"],
                [*clips, "--fresh", "1"], [*clips, "--fresh", "-1"], [*clips, "--fresh", "0", "0"],
                [*clips, "--window-side", "3"], [*clips, "--window-side", "8"], [*clips, "--share", "1", "1"]):
        with pytest.raises(SystemExit) as stop:
            tt.main([*bad, "--weights", str(folder / "weights"), "--run-dir", str(folder / "bad"), "--preset", "debug", "--device", "cpu"])
        text = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and text[-1].startswith("train_teacher.py: ")
    (folder / "half").mkdir()
    (folder / "half" / "config.json").write_text('{"size": 32}', encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        tt.main([*clips, "--weights", str(folder / "half"), "--run-dir", str(folder / "bad"), "--preset", "debug"])
    assert capsys.readouterr().err.splitlines()[-1].endswith("config.json lacks audio")
    with pytest.raises(SystemExit) as stop:
        tt.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"--{name.replace('_', '-')}" in text for name in asdict(CFG))


def test_a_skip_stays_with_the_weights(folder, capsys):
    """Law: what was trained with --skip is used with it, or not at all. Who trains on without is told, as is who has a student of another network."""
    weights, init = folder / "skip", folder / "init.safetensors"
    shutil.copytree(folder / "weights", weights)
    options = ["--data", str(folder / "clips"), "--weights", str(weights), "--preset", "debug", "--device", "cpu", "--steps", "1"]
    tt.main([*options, "--run-dir", str(weights / "run"), "--skip", "0.15"])
    assert infer.load(weights, "teacher", "cpu", "float32").dit.config.skip == 0.15
    shutil.copy(weights / "teacher.safetensors", init)
    (weights / "student.safetensors").touch()                                   # what made it had no skip; the word is younger than the file
    config = json.loads((weights / "config.json").read_text(encoding="utf-8"))
    del config["dit"]["skip"]
    (weights / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="skip 0.15"):
        infer.load(weights, "teacher", "cpu", "float32")
    said = []
    for more in ([], ["--skip", "0.15"]):
        capsys.readouterr()
        tt.main([*options, "--init", str(init), "--run-dir", str(weights / f"run{len(more)}"), *more])
        text = capsys.readouterr()
        said.append(("note: --init" in text.err, "distil it anew" in text.err))
    assert said == [(True, False), (False, True)]


def test_two_processes_have_the_losses_of_one(folder):
    """Law: FSDP changes where the numbers lie, not what they are; and its checkpoint is the one-process checkpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--data", str(folder / "clips"), "--weights", str(folder / "weights"), "--out", str(folder / "out"), "--preset", "debug",
               "--device", "cpu", "--steps", "2", "--chunks", "0", "--cold", "0.3", "--no-bf16", "--batch", "4", "--micro", "2",
               "--temporal", "0.1", "--worn", "2", "--window-side", "2", "--pixel-every", "2"]
    tt.main([*options, "--run-dir", str(folder / "run1")])
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train_teacher.py"), *options, "--run-dir", str(folder / "run2")]
    jobs = [subprocess.Popen(command, env=environment | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
            for rank in "01"]
    errors = [job.communicate(timeout=100)[1].decode() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], errors[0][-2000:]
    losses = {}
    for world in (1, 2):
        lines = (folder / f"run{world}/log.jsonl").read_text(encoding="utf-8").splitlines()
        losses[world] = [json.loads(line)["loss"] for line in lines[:2]]
    assert np.allclose(losses[1], losses[2], atol=1e-4)
    with safe_open(folder / "run1/checkpoint.safetensors", "pt") as one, safe_open(folder / "run2/checkpoint.safetensors", "pt") as two:
        assert set(one.keys()) == set(two.keys())
        assert all(torch.allclose(one.get_tensor(k), two.get_tensor(k), atol=1e-4) for k in one.keys() if k.startswith("ema."))


def test_fresh_clips_need_a_linear_encoder(folder, capsys, monkeypatch):
    """Law: two matrices that are not the encoder (a random one is bent) are refused before anything is encoded. Others are part of a checkpoint."""
    options = ["--data", str(folder / "clips"), "--weights", str(folder / "weights"), "--out", str(folder / "bent/out"), "--preset", "debug",
               "--device", "cpu", "--chunks", "0", "--fresh", "1", "--window-side", "2", "--worn", "2", "--batch", "2", "--steps", "1"]
    with pytest.raises(SystemExit) as stop:
        tt.main([*options, "--run-dir", str(folder / "bent")])
    assert stop.value.code == 2 and "not linear" in capsys.readouterr().err and not (folder / "bent").exists()
    monkeypatch.setattr(tt, "LinearCodec", type("Trusted", (LinearCodec,), {"missing": property(lambda self: 0, lambda self, value: None)}))
    tt.main([*options, "--run-dir", str(folder / "bent")])
    monkeypatch.setattr(tt, "train_step", None)                                 # the one step is made: resumed, there is nothing left to do
    tt.main([*options, "--run-dir", str(folder / "bent"), "--resume"])
    with safe_open(folder / "bent/checkpoint.safetensors", "pt") as file:
        assert [file.get_slice(f"codec.{i}").get_shape() for i in (0, 1)] == [[769, 24]] * 2


@pytest.mark.parametrize("script", ["train_teacher", "distill_student"])
def test_torchrun_passes_every_flag_on(script):
    """torchrun takes a flag that begins like one of its own for itself: `--run` was one of them."""
    from torch.distributed.run import parse_args
    flags = [flag for action in importlib.import_module(script).build_parser()._actions for flag in action.option_strings]
    for flag in flags:
        assert parse_args(["--nproc_per_node=2", f"{script}.py", flag]).training_script_args == [flag]
