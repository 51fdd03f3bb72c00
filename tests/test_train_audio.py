"""Laws of train_audio.py: labels lie where the sound lies, both halves of the loss teach, training can be interrupted."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import puppet
import train_audio
from audio import HOP, RATE, AudioEncoder, whisper_states
from data import ClipFolder
from puppet import lip_opening, mouth_curves, read_phones
from train_audio import AudioConfig, start_from

EARS = Path(train_audio.__file__).parent / "weights" / "tiny" / "whisper"
pytestmark = pytest.mark.usefixtures("one_thread")


def test_where_nothing_is_known_nothing_is_learnt():
    """Silence that no table tells of has weight 0; a batch of it alone has no loss, and not the loss 0 / 0."""
    guess = torch.zeros(1, 4, len(train_audio.PHONES) + 1, requires_grad=True)
    loss, error = train_audio.loss_of(guess, torch.zeros(1, 4, len(train_audio.PHONES)), torch.rand(1, 4), torch.zeros(1, 4), 1.0)
    loss.backward()
    assert loss == error == 0 and not guess.grad.any()


def test_viseme_classes_cover_every_phone_once():
    """Every phone belongs to one mouth shape."""
    assert set(train_audio.PHONES) == set(puppet.PHONES)
    assert len(train_audio.PHONES) == len(set(train_audio.PHONES)) == 41 and train_audio.PHONES[0] == "sil"
    assert train_audio.VISEME_OF[train_audio.PHONES.index("m")] == train_audio.VISEME_OF[train_audio.PHONES.index("b")]
    assert train_audio.VISEME_OF[train_audio.PHONES.index("f")] != train_audio.VISEME_OF[train_audio.PHONES.index("b")]


def write_tones(folder, speakers=8):
    """Recordings in a language of four phones, each a tone of its own: the least that can be learnt."""
    rng = np.random.default_rng(0)
    (folder / "speech").mkdir()
    (folder / "phones").mkdir()
    for speaker in range(speakers):
        spoken = rng.integers(0, 4, 40)
        hertz = np.repeat(np.array([0, 300, 900, 2700])[spoken], RATE // 10)
        wave = 0.3 * np.sin(2 * np.pi * hertz * np.arange(len(hertz)) / RATE)
        wave += 0.003 * rng.standard_normal(len(hertz))
        soundfile.write(folder / "speech" / f"{speaker}-a.flac", wave, RATE)
        names = [("sil", "m", "ə", "s")[phone] for phone in spoken]
        lines = [f"{i / 10:.2f}\t{i / 10 + 0.1:.2f}\t{name}\t0.90" for i, name in enumerate(names)]
        (folder / "phones" / f"{speaker}-a.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "speech", folder / "phones"


def test_labels_lie_where_the_sound_lies(tmp_path):
    """After a change of speed, label and sound of a training frame must still be at the same place."""
    takes = train_audio.load_speech(*write_tones(tmp_path, 2))
    wave, target, opening, weight = train_audio.training_batch(takes, [], AudioConfig(frames=200), np.random.default_rng(0))
    assert target.shape[:2] == weight.shape == (wave.shape[0], wave.shape[1] // HOP)
    torch.testing.assert_close(target.sum(-1), torch.ones_like(weight))
    spectrum = torch.fft.rfft(wave.unflatten(1, (-1, HOP))).abs()           # (B, T, 321), 25 Hz apart
    high = spectrum[..., 88:132].square().sum(-1) / spectrum.square().sum(-1)       # 2.2 to 3.3 kHz
    s, m = target[..., train_audio.PHONES.index("s")] == 1, target[..., train_audio.PHONES.index("m")] == 1
    assert s.sum() > 10 and high[s].median() > 3 * high[m].median()
    vowel = target[..., train_audio.PHONES.index("ə")] == 1
    assert opening[vowel].median() > 0.2 > 0.05 > opening[m].median()       # and lips are open where a vowel is, shut at an m


def test_opening_is_what_a_puppet_shows(tmp_path):
    """The curve at 100 Hz that ears learn is, in the middle of a video frame, the one at 25 Hz that a puppet's lips follow."""
    take = train_audio.load_speech(*write_tones(tmp_path, 1))[0]
    said = read_phones(tmp_path / "phones" / "0-a.tsv")
    seen = lip_opening(mouth_curves(said, 100))                             # (100,), frame i at (i + 0.5) / 25 s: between ticks 4i + 1 and 4i + 2
    heard = (take.opening[1::4] + take.opening[2::4]) / 2
    assert len(heard) == 100 and np.abs(seen - heard).mean() < 0.01
    assert np.abs(np.roll(seen, 1) - heard).mean() > 0.03                   # a frame late is seen


@pytest.mark.parametrize("kind", ["whisper", "wav2vec2"])
def test_who_starts_from_trained_ears_starts_with_what_they_know(tmp_path, kind):
    """The layers that are kept say what they said, 8 s is all that is kept of a Whisper's places, and only those are not trained."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model, WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder
    if kind == "whisper":
        model = WhisperEncoder(WhisperConfig(d_model=16, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=16))
    else:
        model = Wav2Vec2Model(Wav2Vec2Config(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, conv_dim=(8,) * 7,
                                             num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2))
    norm = model.layer_norm if kind == "whisper" else torch.nn.Identity()
    if kind == "whisper":
        torch.nn.init.uniform_(norm.weight)
    model.save_pretrained(tmp_path)
    whole, cut = AudioEncoder(tmp_path), start_from(AudioEncoder(tmp_path), AudioConfig(layers=2, dropout=0.5))
    wave = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 8 * RATE), np.float32))
    say = whisper_states if kind == "whisper" else train_audio.encode       # 50 a second, as the last one is normed before two make a frame
    before, after = (say(model.eval(), wave) for model in (whole.model, cut))
    assert len(after) == 2 and torch.equal(before[0], after[0]) and torch.equal(norm(before[1]), after[1])
    assert {name for name, p in cut.named_parameters() if not p.requires_grad} == ({"embed_positions.weight"} if kind == "whisper" else set())
    assert len(cut.embed_positions.weight) == 400 if kind == "whisper" else not hasattr(cut, "embed_positions")
    torch.manual_seed(0)
    assert not torch.equal(say(cut.train(), wave)[0], after[0])                # and some of it is dropped now
    cut.save_pretrained(tmp_path / "cut")
    heard = torch.stack(train_audio.encode(cut.eval(), train_audio.normalise(wave)), 2)[0]
    assert AudioEncoder(tmp_path / "cut").layers == 2 and torch.equal(AudioEncoder(tmp_path / "cut").features(wave[0], 0, 200), heard)
    still = start_from(AudioEncoder(tmp_path), AudioConfig(layers=0, dropout=0.0)).train()
    assert len(say(still, wave)) == 3 and torch.equal(say(still, wave)[2], before[2])         # 0: all; and nothing is dropped


def test_both_halves_of_the_loss_teach():
    """A right phone with wrong lips costs; so do right lips with a wrong phone; what has no weight costs nothing."""
    target = torch.nn.functional.one_hot(torch.tensor([[0, 1]]), len(train_audio.PHONES)).float()
    opening, weight = torch.tensor([[0.0, 0.5]]), torch.tensor([[1.0, 1.0]])
    right = torch.cat([20 * target, opening[..., None]], -1)
    cost = lambda guess, weight=weight: train_audio.loss_of(guess, target, opening, weight, 1.0)[0].item()
    lips, phone = right.clone(), right.clone()
    lips[0, 1, -1] = 0.0
    phone[0, 1, :-1] = 20 * target[0, 0]
    assert cost(right) < 1e-3 < 0.5 < min(cost(lips), cost(phone))
    none = torch.tensor([[1.0, 0.0]])
    assert max(cost(lips, none), cost(phone, none)) < 1e-3
    one, two = (train_audio.loss_of(lips, target, opening, weight, factor)[0].item() for factor in (1.0, 2.0))
    assert abs(two - 2 * one) < 1e-3                                        # lips: the factor of the second half


def test_twenty_steps_learn_and_a_kill_changes_nothing(tmp_path, monkeypatch):
    """Training finds four tones in 20 steps, and a run that was killed and resumed ends in the same bits."""
    takes = train_audio.load_speech(*write_tones(tmp_path))
    cfg = AudioConfig(steps=20, every=10, frames=50, bf16=0, lr=5e-5, dropout=0.1)
    start = lambda: start_from(AudioEncoder(EARS), cfg)
    losses = train_audio.train(cfg, start(), takes, [], tmp_path / "a", tmp_path / "run_a")
    assert losses[0] > 4 and np.mean(losses[-3:]) < 3.2                 # chance among 41 phones: log 41 = 3.7, and 1 or so of the opening
    figures = train_audio.evaluate(tmp_path / "a", takes)
    assert figures["opening_correlation"] > 0.3                         # a tone of its own opens the mouth: even 20 steps hear that
    head = load_file(tmp_path / "a" / "head.safetensors")
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    save_file({name: torch.cat([tensor[:-1], -tensor[-1:]]) for name, tensor in head.items()}, tmp_path / "c" / "head.safetensors")
    opposite = train_audio.evaluate(tmp_path / "c", takes)              # the last row it is, and nothing else
    assert abs(opposite["opening_correlation"] + figures["opening_correlation"]) < 1e-3
    assert opposite["phone_accuracy"] == figures["phone_accuracy"]
    batch = train_audio.training_batch

    def killed(takes, clips, cfg, rng):
        if np.random.default_rng((cfg.seed, 13)).bit_generator.state == rng.bit_generator.state:
            raise KeyboardInterrupt
        return batch(takes, clips, cfg, rng)
    monkeypatch.setattr(train_audio, "training_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        train_audio.train(cfg, start(), takes, [], tmp_path / "b", tmp_path / "run_b")
    monkeypatch.setattr(train_audio, "training_batch", batch)
    assert train_audio.train(cfg, start(), takes, [], tmp_path / "b", tmp_path / "run_b", resume=True) == losses[10:]
    for name in ("model.safetensors", "head.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(ValueError, match="other options"):
        train_audio.train(AudioConfig(steps=21), start(), takes, [], tmp_path / "b", tmp_path / "run_b", resume=True)


def test_who_is_held_out_is_not_heard(tmp_path, monkeypatch):
    """Speakers that puppet.py holds out, and clips that a folder holds out, are measured, never taught; clips have their share of a batch."""
    speech, phones = write_tones(tmp_path, 12)
    folder = tmp_path / "puppets"
    puppet.main(["--portraits", "drawn", "--out", str(folder), "--clips", "6", "--seconds", "1", "--size", "32"])
    taught, measured = [], []
    monkeypatch.setattr(train_audio, "train", lambda cfg, encoder, takes, clips, *rest: taught.extend([takes, clips]))
    monkeypatch.setattr(train_audio, "evaluate", lambda out, takes, device: measured.append(takes) or {"viseme_percent": []})
    monkeypatch.setattr(train_audio, "VISEMES", {})
    train_audio.main(["--speech", str(speech), "--phones", str(phones), "--clips", str(folder), "--out", str(tmp_path), "--init", str(EARS)])
    new = set(puppet.divide([str(i) for i in range(12)], str, np.random.default_rng(0))[0])
    assert {take.speaker for take in measured[0]} == new and {take.speaker for take in taught[0]} == {str(i) for i in range(12)} - new
    assert (len(taught[1]), len(measured[1])) == (5, 1)                     # of 6 puppets the last is "val"
    held_out = np.array(ClipFolder(folder, 128, "val").clips[0].audio, int)
    assert np.abs(measured[1][0].audio - held_out).max() <= 1               # its own sound, not another clip's
    batch = lambda share: train_audio.training_batch(taught[0], taught[1], AudioConfig(frames=200, share=share), np.random.default_rng(0))[1]
    tones = torch.tensor([train_audio.PHONES.index(phone) for phone in ("sil", "m", "ə", "s")])
    assert batch(0.0)[..., tones].sum() == batch(0.0).sum() and batch(1.0)[..., tones].sum() < batch(1.0).sum()


def test_the_command_trains_measures_and_refuses(tmp_path, capsys):
    """python train_audio.py end to end: it leaves a folder that AudioEncoder loads, and figures in metrics.json."""
    speech, phones = map(str, write_tones(tmp_path, 12))
    common = ["--speech", speech, "--phones", phones, "--out", str(tmp_path / "w"), "--init", str(EARS)]
    train_audio.main([*common, "--run-dir", str(tmp_path / "run"), "--steps", "2", "--frames", "50", "--bf16", "0"])
    assert AudioEncoder(tmp_path / "w").layers == 3
    figures = json.loads((tmp_path / "w" / "metrics.json").read_text(encoding="utf-8"))
    assert 0 <= figures["phone_accuracy"] <= figures["viseme_accuracy"] <= 1 < figures["parameters"]
    assert "viseme_accuracy: " in capsys.readouterr().out
    nowhere = str(tmp_path / "no")
    (tmp_path / "phones" / "0-a.tsv").write_text("0.0\t1.0\tzz\n", encoding="utf-8")         # no confidence is fine, no such phone is not
    for wrong in ([], ["--speech", nowhere], ["--out", nowhere, "--evaluate"], ["--clips", nowhere], ["--cache", nowhere],
                  ["--resume", "--run-dir", nowhere], ["--init", nowhere], ["--layers", "9"], ["--layers", "-1"], ["--every", "0"]):
        with pytest.raises(SystemExit) as stop:
            train_audio.main([*common, *wrong])
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.startswith("train_audio.py: ") and message.count("\n") == 1
