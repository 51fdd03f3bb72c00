"""Properties of tiny/train_decoder.py: sharp pictures from latents that stay as they are."""
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_tiny_vae import SMALL

import tiny.train_decoder as T
from tiny.linear import LinearEncoder
from tiny.train_vae import export
from vae import WanVAE, load_vae

CFG = T.DecoderConfig(steps=4, warmup=1, adversarial_from=2, perceptual=0.0, stills=0.5)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with a random small VAE of the old kind, patch = 1."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    export(folder, WanVAE(replace(SMALL, patch=1)).eval(), [], 0)
    return folder


@pytest.fixture(scope="module")
def vae(start):
    return T.new_decoder(start)


def make_rows(vae, clips):
    rows = []
    for clip in clips:
        z = vae.encode(T.to_tensor(clip.frames))[0].half()
        rows.append({"start": torch.tensor(0), "mirror": torch.tensor(0), "true": z,
                     "generated": z + 1})
    return rows


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (2, 33, 64, 64, 3)).astype(np.uint8)
    return [SimpleNamespace(frames=video, name=str(i)) for i, video in enumerate(frames)]


@pytest.fixture
def small_run(start, clips, monkeypatch, tmp_path):
    """-> run(cfg, name): train on two clips of noise, 64 x 64, without a generator's latents."""
    monkeypatch.setattr(T, "SIZE", 64)
    monkeypatch.setattr(T, "CROP", 2)
    monkeypatch.setattr(T.infer, "load", lambda *_: SimpleNamespace())
    monkeypatch.setattr(T, "all_latents", lambda _, some, models, cfg: make_rows(models.vae, some))
    stills = [SimpleNamespace(frames=clip.frames[:1]) for clip in clips]

    def run(cfg, name, **more):
        files = T.Files((), init=start, out=tmp_path / name, run_dir=tmp_path / "run", **more)
        T.train(cfg, files, clips, stills, clips[:1])
        return tmp_path / name
    return run


def test_the_latents_stay(small_run, start):
    """Property: only the decoder is trained. A generator of these latents needs no new training."""
    folder = small_run(CFG, "out")
    before, after = (load_file(f / "vae.safetensors") for f in (start, folder))
    same = [name for name in after if not name.startswith("decoder.")]
    assert same and all(torch.equal(before[name], after[name]) for name in same)
    config = json.loads((folder / "config.json").read_text())
    assert config["vae"]["patch"] == 2
    assert config["vae"]["latents_mean"] == json.loads(
        (start / "config.json").read_text())["vae"]["latents_mean"]
    assert load_vae(folder).decode(torch.zeros(1, 24, 1, 2, 2)).shape[3:] == (32, 32)


def test_a_killed_run_goes_on_bitwise(small_run, tmp_path, monkeypatch):
    """Property: 4 steps, or 3 and the rest after --resume, give the same bytes, the critic's
    power iterations included. Other options are refused."""
    path = tmp_path / "run/checkpoint.safetensors"
    small_run(CFG, "a")
    first = load_file(path)
    path.unlink()
    real = T.draw_batch
    calls = []

    def killed(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(T, "draw_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        small_run(replace(CFG, save_minutes=0), "b")
    monkeypatch.setattr(T, "draw_batch", real)
    with pytest.raises(ValueError, match="edges 0.5 -> 0.7"):
        small_run(replace(CFG, edges=0.7), "b", resume=True)
    small_run(CFG, "b", resume=True)
    second = load_file(path)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_layers_that_fit_are_taken_over(start, vae):
    """Property: the new decoder begins with the old one's layers up to a quarter of the side; the
    new residual blocks add nothing yet."""
    old = load_file(start / "vae.safetensors")
    new = vae.state_dict()
    taken = {name for name in old if name in new and torch.equal(old[name].float(), new[name])}
    assert {"decoder.conv1.weight", "decoder.middle.0.residual.2.weight"} <= taken
    assert not new["decoder.per_frame.1.residual.6.weight"].any()


def test_the_critic_pushes_as_hard_as_it_may(vae, clips):
    """Property: at the frames that it looks at, the critic's gradient has the stated share of all
    other losses' gradient, however steep the critic is. Elsewhere it changes nothing."""
    video = T.to_tensor(clips[0].frames[:5])
    true = vae.encode(video)
    linear = LinearEncoder(vae, [video])
    output = (0.9 * video).requires_grad_(True)
    cut = T.look(video, 2, torch.Generator().manual_seed(0))
    seen = cut(torch.arange(5.0).view(1, 1, 5, 1, 1).expand_as(video))[:, 0, 0, 0].tolist()
    found = {}
    for steep in (1.0, 100.0):
        torch.manual_seed(0)
        critic = T.Critic(8)
        args = output, video, true, linear, None
        _, _, plain = T.decoder_losses(*args, None, cut, CFG)
        _, _, both = T.decoder_losses(*args, lambda x, c=critic, s=steep: s * c(x), cut, CFG)
        found[steep] = both - plain
        share = cut(both - plain).norm() / cut(plain).norm()
        assert share.item() == pytest.approx(CFG.adversarial, rel=1e-3)
        rest = [t for t in range(5) if t not in seen]
        assert not found[steep][:, :, rest].any()
    torch.testing.assert_close(found[1.0], found[100.0], atol=1e-6, rtol=1e-3)


def test_a_batch_shows_the_frames_of_its_latents(vae, clips, monkeypatch):
    """Property: latents and frames of a row are of the same time and mirrored alike; `generated`
    decides which latents are given."""
    monkeypatch.setattr(T, "SIZE", 64)
    monkeypatch.setattr(T, "CROP", 4)
    for mirror in (0, 1):
        video = clips[0].frames[4:13, :, ::-1] if mirror else clips[0].frames[4:13]
        z = vae.encode(T.to_tensor(np.ascontiguousarray(video)))[0].half()
        row = {"start": torch.tensor(4), "mirror": torch.tensor(mirror), "true": z,
               "generated": z + 1}
        for share in (0.0, 1.0):
            given, true, frames = T.clip_batch(clips[:1], [row], 9, 1, replace(
                CFG, generated=share), torch.Generator().manual_seed(0))
            torch.testing.assert_close(vae.encode(frames), true, atol=2e-3, rtol=1e-2)
            torch.testing.assert_close(given, true + share, atol=1e-2, rtol=0)


def test_the_hinge_loss_is_zero_beyond_its_margin():
    """Property: a critic that is sure on both sides learns nothing more."""
    real, painted = torch.full((2, 3, 8, 8), 2.0), torch.full((2, 3, 8, 8), -2.0)
    assert T.critic_loss(lambda x: x, real, painted) == 0
    assert T.critic_loss(lambda x: x, painted, real) == 6


def test_options_that_make_no_sense_end_in_a_line(tmp_path, capsys):
    """Property: they are refused before anything is read or written."""
    with pytest.raises(SystemExit) as error:
        T.main(["--data", str(tmp_path), "--steps", "0"])
    assert error.value.code == 2
    assert "--steps" in capsys.readouterr().err
