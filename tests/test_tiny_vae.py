"""Properties of the small VAE's training and of its linear target and encoder."""
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import tiny.train_vae as T
from data import to_tensor
from tiny.linear import blocks, principal_components, temporal_residual
from vae import WanVAE, load_vae

SMALL = replace(T.TINY, dim=8, dim_mult=(1, 1, 2, 2), decoder_widths=(16, 8, 8))
CURRICULUM = ((0.5, 1, 32, 4), (1.0, 5, 32, 2))


def moving_clips(n=4):
    """A bright square that moves over a dark ground: learnable in seconds."""
    clips = []
    for i in range(n):
        frames = np.full((9, 32, 32, 3), 40, np.uint8)
        for t in range(9):
            frames[t, 4 + 2 * i:16 + 2 * i, 2 + t:14 + t] = (220, 120 + 30 * i, 60)
        clips.append(SimpleNamespace(frames=frames, name=f"clip{i}"))
    return clips


@pytest.fixture
def small_curriculum(monkeypatch):
    monkeypatch.setattr(T, "CURRICULUM", CURRICULUM)
    monkeypatch.setattr(T, "FINETUNE_CURRICULUM", CURRICULUM[1:])


def train(cfg, tmp_path, name, config=SMALL, **more):
    """Train on moving_clips, with the checkpoint in tmp_path/run -> folder of the weights."""
    T.train(cfg, config, [moving_clips()], tmp_path / name, tmp_path / "run", **more)
    return tmp_path / name

# ---------------------------------------------------------------------------------------- training


def test_a_killed_run_goes_on_bitwise(small_curriculum, tmp_path, monkeypatch):
    """Property: a step depends on its number and the weights only: 8 steps, or some and the rest
    after --resume, give the same bytes. Other options are refused."""
    cfg = T.TrainConfig(steps=8, warmup=2, bf16=False)
    path = tmp_path / "run/checkpoint.safetensors"
    train(cfg, tmp_path, "a")
    first = load_file(path)
    path.unlink()
    real, calls = T.vae_loss, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(T, "vae_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        train(replace(cfg, save_minutes=0), tmp_path, "b")
    monkeypatch.setattr(T, "vae_loss", real)
    with pytest.raises(ValueError, match="mouth_crop_prob 0.0 -> 0.5"):
        train(replace(cfg, mouth_crop_prob=0.5), tmp_path, "b", resume=True)
    with safe_open(path, "pt") as file:
        assert 0 < int(file.metadata()["step"]) < 7
        assert "replay.now" in file.keys()
    train(cfg, tmp_path, "b", resume=True)
    second = load_file(path)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_learns(small_curriculum, tmp_path, capsys):
    """Property: 120 steps on four clips bring the loss to less than 0.6 of that after the first."""
    train(T.TrainConfig(steps=120, warmup=10, lr=3e-3, bf16=False), tmp_path, "a")
    log = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    losses = [float(line.split("loss ")[1].split()[0]) for line in log]
    assert len(losses) == 3 and losses[-1] < 0.6 * losses[0], losses    # steps 0, 50, 100


def test_a_replayed_clip_comes_back_with_its_first_input():
    """Property: the replay buffer hands a clip's last output in and its very first input back as
    the target, until the clip is old and another takes its slot."""
    buffer = T.ReplayBuffer(size=1, oldest=3, share=0.5)

    def batch(i):
        return torch.full((2, 3, 5, 8, 8), i / 16)

    for i in range(8):
        inputs, targets = buffer.replace_last(batch(i), None)
        first, age = i - i % 3, i % 3
        assert torch.equal(inputs[:-1], batch(i)[:-1])
        assert torch.equal(targets[:-1], batch(i)[:-1])
        assert torch.equal(targets[-1], batch(first)[-1])
        assert torch.equal(inputs[-1], batch(first)[-1] - age / 16)
        buffer.store(inputs - 1 / 16)               # a codec that darkens a little in every pass
    other_shape = torch.zeros(2, 3, 5, 16, 16)
    inputs, _ = buffer.replace_last(other_shape, None)
    assert torch.equal(inputs, other_shape)         # a new stage begins with an empty buffer


def test_a_quarter_of_the_inputs_is_replayed():
    """Property: the share is of all inputs, whatever the batch; else inputs and targets are the
    batch itself."""
    for size in (1, 2, 4):
        buffer, generator = T.ReplayBuffer(), torch.Generator().manual_seed(0)
        video, replaced = torch.zeros(size, 3, 5, 8, 8), 0
        for _ in range(400):
            inputs, targets = buffer.replace_last(video, generator)
            replaced += inputs is not video
            assert (inputs is video) == (targets is video)
        assert replaced / (400 * size) == pytest.approx(0.25, abs=0.05)


@pytest.fixture
def two_steps(small_curriculum, tmp_path):
    """A folder with the weights of a VAE of 16 channels after two steps."""
    config = replace(SMALL, z_dim=16, latents_mean=(0.1,) * 16, latents_std=(1.5,) * 16)
    cfg = T.TrainConfig(steps=2, motion_channels=0, bf16=False)
    return train(cfg, tmp_path, "a", config)


def test_training_goes_on_from_trained_weights(two_steps, tmp_path):
    """Property: --init begins with the weights of that folder and asks for no principal components:
    at a learning rate of zero the network stays what it was, the encoder may change otherwise."""
    cfg = T.TrainConfig(steps=1, warmup=1, lr=0.0, bf16=False)
    before = load_file(two_steps / "vae.safetensors")
    after = load_file(train(cfg, tmp_path, "b", None, init=two_steps) / "vae.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    trained, motion_channels = T.trained_vae(cfg, two_steps)
    assert all(p.requires_grad for p in trained.parameters()) and motion_channels == 0
    after = load_file(train(replace(cfg, lr=1e-3), tmp_path, "c", None, init=two_steps)
                      / "vae.safetensors")
    assert not torch.equal(before["encoder.conv1.weight"], after["encoder.conv1.weight"])


def test_exported_weights_load_and_normalise(small_curriculum, tmp_path):
    """Property: what training writes is what load_vae reads. Its latents have mean 0 and standard
    deviation 1; motion channels, which mostly are zero, have it around a mouth."""
    folder = train(T.TrainConfig(steps=2), tmp_path, "a", replace(SMALL, patch=1))
    vae = load_vae(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["size"] == 256 and config["tiny"] == {"motion_channels": 8}
    with torch.no_grad():
        z = torch.cat([vae.encode(to_tensor(clip.frames)) for clip in moving_clips()])
    assert z.shape == (4, 24, 3, 4, 4)
    y0, y1, x0, x1 = (round(4 * part) for part in T.MOUTH)
    error = (z.std((0, 2, 3, 4)) - 1).abs()
    mouth_error = (z[..., y0:y1, x0:x1].std((0, 2, 3, 4)) - 1).abs()
    assert z.mean((0, 2, 3, 4)).abs().max() < 0.05
    assert error[:16].max() < 0.05
    assert mouth_error[16:].max() < 0.05 and error[16:].max() > 0.1

# -------------------------------------------------------------------------------------------- loss


def test_an_uncertain_motion_is_answered_by_its_mean():
    """Property: of ten clips three move. L1 would have every answer stand still, its median; the
    squared losses ask for 0.3, its mean."""
    video = torch.zeros(10, 3, 5, 16, 16)
    video[:3, :, 2:] = 1                                            # these jump at frame 2
    answers = torch.linspace(0, 1, 11)
    losses = {"l1": [], "flicker": [], "square": []}
    for answer in answers:
        output = torch.zeros_like(video)
        output[:, :, 2:] = answer
        parts = T.reconstruction_losses(output, video)
        for name, values in losses.items():
            values.append(parts[name])
    best = {name: answers[int(torch.stack(values).argmin())].item()
            for name, values in losses.items()}
    assert best["flicker"] == pytest.approx(0.3) and best["square"] == pytest.approx(0.3)
    assert best["l1"] == 0


def test_the_output_should_encode_to_the_latents_of_the_clip():
    """Property: `cycle` compares the output's latents with those of the target video, also when a
    replayed input went in; no gradient enters the latter."""
    torch.manual_seed(0)
    vae = WanVAE(SMALL)
    for p in vae.parameters():                                      # Wan starts some at zero
        if p.dim() > 1 and p.numel() > p.shape[0]:
            torch.nn.init.normal_(p, std=0.15)
    generator = torch.Generator().manual_seed(1)
    video = torch.rand(1, 3, 5, 32, 32, generator=generator) * 2 - 1
    weight, cfg = vae.encoder.conv1.weight, T.TrainConfig()
    for inputs in (video, (video + 0.3).clamp(-1, 1)):
        _, parts, output = T.vae_loss(vae, inputs, video, cfg, torch.Generator().manual_seed(0))
        with torch.no_grad():
            wanted = vae.posterior(video)[0]
        cycle = (vae.posterior(output.clamp(-1, 1))[0] - wanted).square().mean()
        assert parts["cycle"].item() == pytest.approx(cycle.item(), rel=1e-4)
        one = torch.autograd.grad(parts["cycle"], weight, retain_graph=True)[0]
        two = torch.autograd.grad(cycle, weight, retain_graph=True)[0]
        largest = two.abs().max().item()
        assert largest > 0 and torch.allclose(one, two, rtol=1e-3, atol=1e-6 * largest)


def test_crops_around_the_mouth_hold_it():
    """Property: with mouth_crop_prob 1 the place of a face-centred clip's mouth is in every crop;
    with 0, in as many as chance has it."""
    frames = np.zeros((9, 128, 128, 3), np.uint8)
    frames[:, 88:94, 61:67] = 255                                   # the middle of MOUTH
    folders, share = [[SimpleNamespace(frames=frames)]], {}
    for prob in (0.0, 1.0):
        generator = torch.Generator().manual_seed(0)
        crops = T.training_batch(folders, 1, 64, 40, generator, prob)       # (40, 3, 1, 64, 64)
        darkest = crops.amin((1, 2, 3, 4))[:, None, None, None]
        bright = (crops.amax(1) > darkest + 0.5).sum((1, 2, 3))             # of 36 pixels
        share[prob] = (bright == 36).float().mean().item()
    assert share[1.0] == 1 and 0.3 < share[0.0] < 0.95

# ------------------------------------------------------------------------------------------ linear


def random_videos():
    """Four batches of smooth noise."""
    noise = [torch.randn(4, 3, 9, 16, 16, generator=torch.Generator().manual_seed(i))
             for i in range(4)]
    return [x.cumsum(4).cumsum(3) / 20 for x in noise]


def unexplained(x, z):
    """What a least squares fit of z, with a constant, leaves of x: (n, P)"""
    x, z = x - x.mean(0), z - z.mean(0)
    return x - z @ torch.linalg.lstsq(z, x).solution


def test_principal_components_are_the_best_linear_code():
    """Property: no linear code of 16 numbers a block loses less than the discarded components;
    channels have the same size; a still clip has the same latent throughout."""
    videos = random_videos()
    encode = principal_components(videos, 16)
    z = torch.cat([encode(v).movedim(1, -1).flatten(0, 3) for v in videos])     # (n, 16)
    assert z.mean(0).abs().max() < 1e-4
    assert (z.square().mean(0) - 1).abs().max() < 1e-3
    x = torch.cat([blocks(v).flatten(0, 3) for v in videos])                    # (n, 768)
    x = x - x.mean(0)
    lost = (x - z @ torch.linalg.lstsq(z, x).solution).square().sum(1).mean()
    discarded = torch.linalg.svdvals(x)[16:].square().sum() / len(x)
    assert torch.isclose(lost, discarded, rtol=1e-3)
    still = encode(videos[0][:, :, :1].expand(-1, -1, 9, -1, -1))
    assert torch.allclose(still, still[:, :, :1].expand_as(still), atol=1e-5)


def test_motion_has_channels_of_its_own():
    """Property: of the change within four frames that the first channels leave no other 4 numbers
    hold more; what stands still is almost zero there."""
    videos = random_videos()
    x = torch.cat([blocks(v).flatten(0, 3) for v in videos])                    # (n, 768)
    first, encode = principal_components(videos, 8), principal_components(videos, 8, 4)
    both = torch.cat([encode(v).movedim(1, -1).flatten(0, 3) for v in videos])  # (n, 8 + 4)
    z, motion = both[:, :8], both[:, 8:]
    alone = torch.cat([first(v).movedim(1, -1).flatten(0, 3) for v in videos])
    assert torch.allclose(z, alone, atol=1e-4)
    assert (motion.square().mean(0) - 1).abs().max() < 1e-3
    left = temporal_residual(unexplained(x, z))
    lost = (left - motion @ torch.linalg.lstsq(motion, left).solution).square().sum(1).mean()
    discarded = torch.linalg.svdvals(left)[4:].square().sum() / len(x)
    assert torch.isclose(lost, discarded, rtol=1e-3)
    over_time = temporal_residual(x).unflatten(1, (3, 4, 64)).sum(2)
    assert torch.allclose(over_time, torch.zeros(1), atol=1e-4)
    still = encode(videos[0][:, :, :1].expand(-1, -1, 9, -1, -1))
    assert still[:, 8:].square().mean() < 0.1
    assert torch.allclose(still, still[:, :, :1].expand_as(still), atol=1e-5)


def test_channels_are_a_power_of_two():
    """Property: components are spread over channels by a Hadamard matrix, of which there is none
    for 12 channels here."""
    with pytest.raises(ValueError, match="12 channels are no power of two"):
        principal_components(random_videos(), 12)

# ------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize("options, named", [
    (["--mouth-crop-prob", "1.5"], "--mouth-crop-prob"), (["--warmup", "0"], "--warmup"),
    (["--steps", "0"], "--steps"),
    (["--cache", "a", "b"], "--cache"), ([], "nowhere")])
def test_options_that_make_no_sense_end_in_a_line(options, named, capsys):
    """Property: what makes no sense ends in one line that names the option, before anything is
    read."""
    with pytest.raises(SystemExit) as stop:
        T.main(["--data", "nowhere", *options])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and named in error
    assert error.startswith("tiny.train_vae: ") and error.count("\n") == 1
