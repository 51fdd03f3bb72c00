"""Laws of swap_ears.py: new ears say what the old ones said, except where the old ones told the wrong lips; nothing else of the face changes."""
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import Wav2Vec2Config, Wav2Vec2Model

import audio
import infer
import puppet
import swap_ears
from audio import AudioProjection
from swap_ears import Reading

WEIGHTS = Path(audio.__file__).parent / "weights" / "tiny"


def test_what_is_put_right_is_read_right():
    """Tokens moved along their own line read as the gaps they were given; a gap that nobody knows moves nothing."""
    generator = torch.Generator().manual_seed(0)
    gaps = torch.rand(200, 8, 4, generator=generator)
    tokens = gaps @ torch.randn(4, 40, generator=generator) + 0.5 * torch.randn(200, 8, 40, generator=generator)
    reading = Reading(tokens, gaps)
    assert 0.5 < np.corrcoef(reading.read(tokens).flatten(), gaps.flatten())[0, 1] < 0.99
    right = reading.put_right(tokens, gaps)
    torch.testing.assert_close(reading.read(right).float(), gaps, atol=1e-4, rtol=0)
    unknown = gaps.clone()
    unknown[0] = torch.nan
    assert torch.equal(reading.put_right(tokens, unknown)[0], tokens[0])
    moved = (right - tokens).flatten(0, 1)
    assert torch.linalg.matrix_rank(moved, rtol=1e-4) == 4                      # along four lines, of 40 directions


def test_other_states_same_tokens():
    """Ears that say the same things by other numbers: after the fit, the tokens are the old ones."""
    torch.manual_seed(0)
    states, turn = torch.randn(100, 9, 2, 8), torch.linalg.qr(torch.randn(16, 16))[0]
    old, new = AudioProjection(2, 8, 16, 2, 32), AudioProjection(2, 8, 16, 2, 32)
    labels = swap_ears.project(old, states)
    others = (states.flatten(2) @ turn).unflatten(2, (2, 8))
    error = lambda: ((swap_ears.project(new, others) - labels).square().mean() / labels.var()).item()
    before = error()
    swap_ears.fit(new, others, labels, 400)
    assert before > 0.8 and error() < 0.15


def test_gaps_lie_with_their_latents():
    """Latent f of a chunk holds frames 4f - 3 to 4f: gaps come in these fours, of the first and the last chunk; what a sidecar lacks is nan."""
    clip = SimpleNamespace(path="clip", length=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swap_ears, "true_curves", lambda path: {"gap": np.arange(11.0)})     # a frame short
        first, last = swap_ears.openings([clip], 9)
    assert torch.equal(first, torch.arange(1.0, 9.0).view(2, 4))
    assert torch.equal(last[0], torch.arange(4.0, 8.0)) and last[1].isnan().tolist() == [False, False, False, True]
    encoder = SimpleNamespace(features=lambda sound, start, T: torch.full((T, 1, 1), float(start)))
    heard = swap_ears.hear(encoder, [SimpleNamespace(audio=np.zeros(9), length=12)], 9)
    assert heard[:, 0, 0, 0].tolist() == [0, 3]


def test_new_ears_are_taught_the_truth():
    """Old tokens that tell half of the lips, new states that know them: after the fit the tokens tell more of them."""
    torch.manual_seed(0)
    gaps = torch.rand(200, 2, 4)                                                # of latents 1 and 2, frames 1 to 8
    frames = torch.cat([torch.zeros(200, 1), gaps.flatten(1)], 1)[..., None, None]          # (N, T, 1, 1)
    states, dull = (torch.cat([frames + noise * torch.randn(200, 9, 1, 1), torch.randn(200, 9, 1, 7)], 3) for noise in (0.0, 0.3))
    old, new = AudioProjection(1, 8, 16, 2, 32), AudioProjection(1, 8, 16, 2, 32)
    labels = swap_ears.project(old, dull)
    reading = Reading(labels[:, 1:], gaps)
    right = labels.clone()
    right[:, 1:] = reading.put_right(labels[:, 1:], gaps)
    before = swap_ears.read_of(reading, labels[:, 1:], gaps)
    swap_ears.fit(new, states, right, 300, reading, gaps)
    assert before < 0.75 and swap_ears.read_of(reading, swap_ears.project(new, states)[:, 1:], gaps) > before + 0.1


@pytest.fixture(scope="module")
def puppets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("puppets")
    puppet.main(["--portraits", "drawn", "--out", str(folder), "--clips", "12", "--seconds", "1.5"])
    return folder


def test_a_face_with_other_ears(puppets, tmp_path, capsys):
    """The command makes a folder that infer.py loads; of the face only audio_proj is new; and bad input is one line."""
    ears = tmp_path / "ears"
    shutil.copytree(WEIGHTS / "whisper", ears)
    model = load_file(ears / "model.safetensors")
    name = "layer_norm.weight"                           # the same ears, but their last layer is louder by half
    swap_ears.write_safetensors(ears / "model.safetensors", model | {name: model[name] * 1.5}, {"format": "pt"})
    common = ["--data", str(puppets), "--ears", str(ears)]
    swap_ears.main([*common, "--out", str(tmp_path / "out"), "--steps", "30", "--device", "cpu"])
    figures = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert float(figures["tokens_changed"]) < 0.5 and -1 <= float(figures["lips_read_before"]) <= 1
    before, after = (load_file(folder / "teacher.safetensors") for folder in (WEIGHTS, tmp_path / "out"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith("audio_proj.") for key in changed) and before.keys() == after.keys()
    assert infer.load(tmp_path / "out", "teacher", "cpu").audio.dim == 384
    assert (tmp_path / "out" / "whisper" / "model.safetensors").read_bytes() == (ears / "model.safetensors").read_bytes()
    with safe_open(WEIGHTS / "teacher.safetensors", "pt") as one, safe_open(tmp_path / "out" / "teacher.safetensors", "pt") as two:
        assert one.metadata() == two.metadata()
    assert not list((tmp_path / "out").glob("student*"))
    assert json.loads((tmp_path / "out" / "config.json").read_text("utf-8")) == json.loads((WEIGHTS / "config.json").read_text("utf-8"))
    torch.manual_seed(0)                                                        # ears of another kind and another width
    Wav2Vec2Model(Wav2Vec2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=(8,) * 7,
                                 num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)).save_pretrained(tmp_path / "other")
    swap_ears.main(["--data", str(puppets), "--ears", str(tmp_path / "other"), "--out", str(tmp_path / "narrow"), "--steps", "2", "--device", "cpu"])
    narrow = infer.load(tmp_path / "narrow", "teacher", "cpu")
    assert (narrow.audio.dim, narrow.dit.config.audio_layers, narrow.dit.config.audio_dim) == (24, 2, 24)
    assert not (tmp_path / "narrow" / "whisper").exists() and "tokens_changed" in capsys.readouterr().out
    for wrong in (["--out", str(WEIGHTS)], ["--out", str(tmp_path / "x"), "--ears", str(tmp_path / "no")],
                  ["--out", str(tmp_path / "x"), "--data", str(tmp_path / "no")], ["--out", str(tmp_path / "x"), "--cache", "a", "b"]):
        with pytest.raises(SystemExit) as stop:
            swap_ears.main([*common, *wrong])
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.startswith("swap_ears.py: ") and message.count("\n") == 1
    assert not (tmp_path / "x").exists()
