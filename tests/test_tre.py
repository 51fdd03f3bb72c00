"""Laws of the two references."""
import pytest
import torch

from tre import IDENTITY, continuity_reference, encode_then_repeat, temporal_reference_encoding
from vae import VAEConfig, WanVAE


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return WanVAE(VAEConfig(dim=8, z_dim=4, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)).eval()


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_tre_is_not_encode_then_repeat(vae, image):
    """A film of a still picture has latents that drift: the first has no history, the later ones have ever more."""
    with torch.no_grad():
        tre, etr = temporal_reference_encoding(vae, image), encode_then_repeat(vae, image)
    assert tre.shape == etr.shape == (1, 4, 21, 2, 2)
    torch.testing.assert_close(tre[:, :, :1], etr[:, :, :1], atol=1e-5, rtol=1e-5)          # one frame, no history: the same
    gap = (tre - etr).abs().mean((0, 1, 3, 4)) / etr.std()
    assert gap[1:].min() > 0.01                                                             # every later latent differs
    assert torch.equal(etr[:, :, 1:], etr[:, :, :-1]) and not torch.allclose(tre[:, :, 2], tre[:, :, 1], atol=1e-4)


def test_identity_needs_one_pass_for_any_length(vae, image):
    """By causality a shorter chunk's z_id is the head of a longer one's: one encoding serves every chunk."""
    with torch.no_grad():
        for make in IDENTITY.values():
            torch.testing.assert_close(make(vae, image, 9), make(vae, image, 41)[:, :, :3], atol=1e-5, rtol=1e-5)


def test_a_tail_latent_is_not_a_head_latent(vae):
    """Appendix D: the last latents of a chunk cannot stand at the head of the next; decoded and encoded anew they can."""
    video = torch.rand(1, 3, 41, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        tail = vae.encode(video)[:, :, -3:]
        kappa = continuity_reference(vae, video, 9)
        torch.testing.assert_close(kappa, vae.encode(video[:, :, -9:]))
    assert kappa.shape == tail.shape and (kappa - tail)[:, :, 0].abs().mean() / tail.std() > 0.05
