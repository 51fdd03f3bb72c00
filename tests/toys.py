"""Small stand-ins that several test files share: a network, an audio encoder, a VAE, a clip."""
from dataclasses import replace

import numpy as np
import torch

from data import Clip
from dit import DiTConfig
from tiny.model import TinyDiT
from vae import VAEConfig, WanVAE

SMALL = DiTConfig(dim=48, ffn_dim=64, heads=4, layers=2, channels=24, audio_layers=2, audio_dim=3,
                  audio_tokens=2, audio_hidden=16)
SMALL_VAE = VAEConfig(dim=8, z_dim=24, dim_mult=(1, 1, 2, 2), num_res_blocks=1,
                      latents_mean=(0.0,) * 24, latents_std=(1.0,) * 24)


class FakeAudioEncoder:
    """Features that can be checked: the loudness of a frame, begin and end of the window."""
    layers, dim, window, model = 2, 3, None, torch.nn.Linear(1, 1)

    def features(self, audio, start, frames):
        out = torch.zeros(frames, 2, 3)
        sound = np.zeros((start + frames) * 640, np.float32)
        sound[:len(audio)] = audio[:len(sound)]
        out[:, 0, 0] = torch.from_numpy(np.abs(sound.reshape(-1, 640)).mean(1)[start:])
        out[:, 1, 1] = max(0, start + frames - 200)
        out[:, 1, 2] = start + frames
        return out


def make_vae():
    torch.manual_seed(0)
    return WanVAE(SMALL_VAE).eval().requires_grad_(False)


def make_clip(folder, name, length, seed):
    """A bright disc wanders over a coloured ground; the "face" is the upper left quarter.

    The sound is noise that swells and fades."""
    rng, store = np.random.default_rng(seed), folder / name
    store.mkdir(parents=True)
    t = np.arange(length)[:, None, None]
    y, x = np.mgrid[:32, :32]
    disc = (y - 16 - 6 * np.sin(t / 5 + seed)) ** 2 + (x - 16) ** 2 < 40
    frames = np.where(disc[..., None], 220, rng.integers(0, 120, 3)).astype(np.uint8)
    mask = np.zeros((length, 8, 8), np.uint8)
    mask[:, :4, :4] = 255
    loudness = np.abs(np.sin(np.arange(length) / 3))[:, None]
    audio = (rng.normal(size=(length, 640)) * 3000 * loudness).astype(np.int16).ravel()
    for what, array in {"frames": frames, "audio": audio, "mask": mask}.items():
        np.save(store / f"{what}.npy", array)
    return Clip(name, name, folder / f"{name}.mp4", store, length)


def make_network(seed=0, edm_skip=0.0, **changes):
    """A random network. Wan starts the head at zero: nothing would depend on anything."""
    torch.manual_seed(seed)
    model = TinyDiT(replace(SMALL, **changes), edm_skip)
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    return model
