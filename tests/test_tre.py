"""Properties of the two references."""
import pytest
import torch

from tre import (
    IDENTITY,
    continuity_reference,
    encode_then_repeat,
    overwrite_continuity,
    temporal_reference_encoding,
)
from vae import VAEConfig, WanVAE


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    config = VAEConfig(dim=8, z_dim=4, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
    return WanVAE(config).eval()


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_tre_is_not_encode_then_repeat(vae, image):
    """Property: the latents of a still video drift: the first has no history, later ones have more
    and more. Encode-then-repeat gives all of them the first one's role."""
    with torch.no_grad():
        tre, etr = temporal_reference_encoding(vae, image), encode_then_repeat(vae, image)
    assert tre.shape == etr.shape == (1, 4, 21, 2, 2)
    torch.testing.assert_close(tre[:, :, :1], etr[:, :, :1], atol=1e-5, rtol=1e-5)  # no history
    gap = (tre - etr).abs().mean((0, 1, 3, 4)) / etr.std()
    assert gap[1:].min() > 0.01                             # every later latent differs
    assert torch.equal(etr[:, :, 1:], etr[:, :, :-1])
    assert not torch.allclose(tre[:, :, 2], tre[:, :, 1], atol=1e-4)


def test_identity_needs_one_pass_for_any_length(vae, image):
    """Property: by causality a shorter chunk's z_id is the beginning of a longer one's."""
    with torch.no_grad():
        for make in IDENTITY.values():
            short, long = make(vae, image, 9), make(vae, image, 41)
            torch.testing.assert_close(short, long[:, :, :3], atol=1e-5, rtol=1e-5)


def test_a_tail_latent_is_not_a_head_latent(vae):
    """Property (Appendix D): the last latents of a chunk cannot stand at the beginning of the next;
    decoded and encoded again, they can."""
    video = torch.rand(1, 3, 41, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        tail = vae.encode(video)[:, :, -3:]
        kappa = continuity_reference(vae, video, 9)
        torch.testing.assert_close(kappa, vae.encode(video[:, :, -9:]))
    assert kappa.shape == tail.shape
    assert (kappa - tail)[:, :, 0].abs().mean() / tail.std() > 0.05


def test_overwriting_touches_the_first_latents_only():
    """Property (section 3.2): kappa takes the place of the first m latents, the rest stays."""
    x, kappa = torch.randn(2, 4, 5, 2, 2), torch.randn(2, 4, 3, 2, 2)
    y = overwrite_continuity(x, kappa)
    assert torch.equal(y[:, :, :3], kappa) and torch.equal(y[:, :, 3:], x[:, :, 3:])
