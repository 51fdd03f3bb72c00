"""Properties of tiny/model.py: the EDM skip and the guidance that the shipped weights need."""
import json
from dataclasses import asdict

import torch
from conftest import ROOT
from test_dit import SMALL, inputs, network, rand

import dit
from dit import sample_teacher
from tiny.model import TinyDiT, guided_velocity, linear_velocity, make_guide
from tiny.teacher import NETWORK, SAMPLING, TinyTeacherConfig
from tre import overwrite_continuity


def test_the_linear_estimate_uses_up_the_noisy_input():
    """Property of least squares: data = known + open part. Once the linear estimate is subtracted
    from the velocity, the rest is uncorrelated with what the input shows of the open part."""
    known, opened, eps = (rand(2, 1, 1, 100, 100, seed=seed) for seed in range(3))
    sigma = torch.tensor([0.3, 0.9])
    x0 = known + 0.5 * opened                               # variance 0.25
    x, v = dit.add_noise(x0, eps, sigma), dit.velocity(x0, eps)
    seen = x - dit.add_noise(known, 0 * eps, sigma)         # the open part, and noise
    rest = v - linear_velocity(x, sigma, 0.25)
    assert (rest * seen).mean((1, 2, 3, 4)).abs().max() < 0.03
    assert (v * seen).mean((1, 2, 3, 4)).abs().min() > 0.1
    assert torch.equal(linear_velocity(x, 1.0, 0.25), x)
    assert torch.equal(linear_velocity(x, 0.0, 0.25), -x)


def test_the_skip_is_added_to_the_networks_output():
    """Property: with the same weights, TinyDiT's output is AudioDiT's plus the linear estimate."""
    latents, t, identity, audio = inputs()
    plain = network()
    with_skip = TinyDiT(SMALL, 0.15).eval()
    with_skip.load_state_dict(plain.state_dict())
    with torch.no_grad():
        difference = with_skip(latents, t, identity, audio) - plain(latents, t, identity, audio)
    wanted = linear_velocity(latents, t / 1000, 0.15)
    torch.testing.assert_close(difference, wanted, atol=1e-5, rtol=1e-4)


def test_the_shipped_weights_are_what_tiny_trains():
    """Property: tiny/teacher.py's network, skip and guidance are those of weights/tiny."""
    shipped = json.loads((ROOT / "weights/tiny/config.json").read_text(encoding="utf-8"))
    assert asdict(NETWORK) == shipped["dit"]
    assert shipped["tiny"].items() >= {"edm_skip": TinyTeacherConfig.edm_skip, **SAMPLING}.items()
    assert shipped["teacher"]["guidance"] == TinyTeacherConfig.guidance
    assert NETWORK.channels == shipped["vae"]["z_dim"]


def test_guidance_is_kept_to_where_audio_matters():
    """Property: where audio changes a token much, it is guided; where it changes it by chance,
    hardly; at kappa not at all. Sharpness 0 is guidance everywhere."""
    v, x, z = (rand(1, 2, 4, 16, 16, seed=seed) for seed in range(3))
    effect = 0.3 * torch.ones_like(v)
    effect[..., 6:8, 4:6] = 3.0                             # one token of 64: the lips
    mask = torch.tensor([0.0, 1, 1, 1]).view(1, 1, 4, 1, 1)
    context = {"x": x, "sigma": 0.7, "identity": z, "loss_mask": mask}
    added = guided_velocity(v, v - effect, 3.0, **context, sharpness=16) - v
    assert not added[:, :, 0].any()
    lips = added[:, :, 1:, 6:8, 4:6]
    torch.testing.assert_close(lips, torch.full((1, 2, 3, 2, 2), 6.0), atol=0.1, rtol=0)
    added[..., 6:8, 4:6] = 0
    assert 0 < added.abs().max() < 0.01                     # 0.6 by guidance everywhere
    everywhere = guided_velocity(v, v - effect, 3.0, **context, sharpness=0)
    torch.testing.assert_close(everywhere - v, 2 * mask * effect)


def test_without_tricks_it_is_classifier_free_guidance():
    """Property: sharpness 0 and motion guidance 1 is dit.classifier_free_guidance off kappa."""
    v, uncond, x, z = (rand(1, 2, 4, 16, 16, seed=seed) for seed in range(4))
    context = {"x": x, "sigma": 0.9, "identity": z, "loss_mask": torch.ones(1, 1, 4, 1, 1)}
    ours = guided_velocity(v, uncond, 3.0, **context)
    usual = dit.classifier_free_guidance(v, uncond, 3.0, **context)
    torch.testing.assert_close(ours, usual, atol=1e-5, rtol=1e-5)


def test_a_row_is_guided_by_its_own_audio_and_noise_level():
    """Property: rows of a batch are what each is alone, whatever their kappa; and the sampler's
    step is that of guided_velocity."""
    scale = 1 + 3 * torch.arange(3).view(3, 1, 1, 1, 1)
    v, uncond, x, z = (rand(3, 2, 4, 16, 16, seed=seed) * scale for seed in range(4))
    sigma, mask = torch.tensor([1.0, 0.85, 0.4]), torch.ones(3, 1, 4, 1, 1)
    mask[0, :, :1] = 0
    mask[1:, :, :3] = 0
    guide = make_guide(4.0, 2.0)
    together = guide(v, uncond, 3.0, x=x, sigma=sigma, identity=z, loss_mask=mask)
    for i in range(3):
        row = slice(i, i + 1)
        alone = guide(v[row], uncond[row], 3.0, x=x[row], sigma=sigma[i].item(), identity=z[row],
                      loss_mask=mask[row])
        torch.testing.assert_close(together[row], alone)
    model, (noise, _, identity, audio) = network(), inputs(1)
    kappa = identity[:, :, :1]
    x = overwrite_continuity(noise, kappa)
    free = torch.tensor([0.0, 1, 1]).view(1, 1, 3, 1, 1)
    with torch.no_grad():
        v, uncond = (dit.predict(model, x, 1.0, identity, sound) for sound in (audio, 0 * audio))
    guided = guide(v, uncond, 3.0, x=x, sigma=1.0, identity=identity, loss_mask=free)
    sampled = sample_teacher(model, noise, identity, audio, kappa, 1, guidance=3.0, guide=guide)
    torch.testing.assert_close(sampled, overwrite_continuity(x - guided, kappa))


def test_motion_guidance_enlarges_what_differs_from_the_still_portrait():
    """Property: a network that predicts half of a motion is corrected to the motion itself: only in
    noise, not at kappa, not where the audio matters."""
    z, motion, eps = (rand(1, 2, 4, 16, 16, seed=seed) for seed in range(3))
    effect, mask = torch.zeros_like(z), torch.tensor([0.0, 1, 1, 1]).view(1, 1, 4, 1, 1)
    effect[..., 6:8, 4:6] = 1.0
    half = torch.tensor(0.5)
    for sigma, share in ((1.0, 1.0), (0.8, 1.0), (0.79, 0.5)):
        x = dit.add_noise(z, eps, sigma)
        v = (x - (z + motion / 2)) / sigma
        guided = guided_velocity(v, v - effect, 1.0, x=x, sigma=sigma, identity=z, loss_mask=mask,
                                 sharpness=1e-6, motion_guidance=2.0)
        predicted = (dit.x0_from_velocity(x, guided, sigma) - z) / motion
        assert torch.allclose(predicted[:, :, 0], half, atol=1e-2)
        assert torch.allclose(predicted[..., 6:8, 4:6], half, atol=1e-2)
        assert torch.allclose(predicted[:, :, 1:, :6], torch.tensor(share), atol=1e-2)
