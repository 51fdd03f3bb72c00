"""Properties of tiny/train_audio.py: labels fit the sound, both losses count, a run can resume."""
import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import synthetic.phones
from audio import AudioEncoder, normalise, wav2vec2_states
from data import HOP, SAMPLE_RATE, ClipFolder
from synthetic import puppet
from synthetic.phones import lip_opening, mouth_curves, read_phones
from tiny import train_audio
from tiny.train_audio import PHONES, VISEME_OF, AudioConfig, prepare_encoder
from tiny.whisper import states_at_50_hz

WEIGHTS = Path(__file__).resolve().parent.parent / "weights" / "tiny" / "whisper"
TONES = {"sil": 0, "m": 300, "ə": 900, "s": 2700}   # Hz: a language of four phones

pytestmark = pytest.mark.usefixtures("one_thread")


def write_tones(folder, speakers=8):
    """Recordings in which every phone is a tone of its own: the least that can be learnt."""
    rng = np.random.default_rng(0)
    (folder / "speech").mkdir()
    (folder / "phones").mkdir()
    for speaker in range(speakers):
        spoken = rng.integers(0, 4, 40)                             # 0.1 s each
        hertz = np.repeat(np.array(list(TONES.values()))[spoken], SAMPLE_RATE // 10)
        wave = 0.3 * np.sin(2 * np.pi * hertz * np.arange(len(hertz)) / SAMPLE_RATE)
        wave += 0.003 * rng.standard_normal(len(hertz))
        soundfile.write(folder / "speech" / f"{speaker}-a.flac", wave, SAMPLE_RATE)
        names = [list(TONES)[phone] for phone in spoken]
        lines = [f"{i / 10:.2f}\t{i / 10 + 0.1:.2f}\t{name}\t0.90" for i, name in enumerate(names)]
        table = folder / "phones" / f"{speaker}-a.tsv"
        table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "speech", folder / "phones"

# ------------------------------------------------------------------------------------------- labels


def test_every_phone_has_one_viseme():
    """Property: every phone of synthetic/phones.py belongs to one mouth shape."""
    assert set(PHONES) == set(synthetic.phones.PHONES)
    assert len(PHONES) == len(set(PHONES)) == len(VISEME_OF) == 41 and PHONES[0] == "sil"
    m, b, f = (VISEME_OF[PHONES.index(phone)] for phone in "mbf")
    assert m == b != f


def test_labels_fit_the_sound(tmp_path):
    """Property: after a change of speed, labels and sound of a frame still belong together."""
    recordings = train_audio.load_speech(*write_tones(tmp_path, 2))
    cfg, rng = AudioConfig(batch_frames=200), np.random.default_rng(0)
    wave, phones, opening, weight = train_audio.training_batch(recordings, [], cfg, rng)
    assert phones.shape[:2] == weight.shape == (wave.shape[0], wave.shape[1] // HOP)
    torch.testing.assert_close(phones.sum(-1), torch.ones_like(weight))
    power = torch.fft.rfft(wave.unflatten(1, (-1, HOP))).abs().square()     # 25 Hz apart
    high = power[..., 88:132].sum(-1) / power.sum(-1)                       # 2.2 to 3.3 kHz
    s, m, vowel = (phones[..., PHONES.index(phone)] == 1 for phone in ("s", "m", "ə"))
    assert s.sum() > 10 and high[s].median() > 3 * high[m].median()
    assert (high[s] > 3 * high[m].median()).all()                   # fails if 50 ms late
    assert opening[vowel].median() > 0.2 > 0.05 > opening[m].median()


def test_opening_is_that_of_a_synthetic_clip(tmp_path):
    """Property: the opening at 100 Hz is, in a frame's middle, that of synthetic clips at 25 Hz."""
    recording = train_audio.load_speech(*write_tones(tmp_path, 1))[0]
    phones = read_phones(tmp_path / "phones" / "0-a.tsv")
    clip = lip_opening(mouth_curves(phones, 100))                   # (100,), at (i + 0.5) / 25 s:
    label = (recording.opening[1::4] + recording.opening[2::4]) / 2     # ticks 4i + 1, 4i + 2
    assert len(label) == 100 and np.abs(clip - label).mean() < 0.01
    assert np.abs(np.roll(clip, 1) - label).mean() > 0.03           # one frame late is noticed


def test_phones_of_clips_are_found(tmp_path):
    """Property: NAME.json comes before phones.tsv, which may lie beside a clip or one folder up."""
    clips = tmp_path / "clips"
    clips.mkdir()
    table = "clip\tstart\tend\tphone\na\t0\t0.5\tm\na\t0.5\t1\ts\nb\t0\t1\tə\n"
    assert train_audio.clip_phones(clips / "a.mp4") is None
    (tmp_path / "phones.tsv").write_text(table, encoding="utf-8")
    assert train_audio.clip_phones(clips / "a.mp4") == [(0.0, 0.5, "m"), (0.5, 1.0, "s")]
    assert train_audio.clip_phones(clips / "other.mp4") is None
    (clips / "a.json").write_text('{"phones": [[0, 1, "sil"]]}', encoding="utf-8")
    assert train_audio.clip_phones(clips / "a.mp4") == [(0.0, 1.0, "sil")]
    (clips / "b.json").write_text('{"identity": "b"}', encoding="utf-8")
    assert train_audio.clip_phones(clips / "b.mp4") == [(0.0, 1.0, "ə")]
    (clips / "phones.tsv").write_text("clip\tstart\nb\t0\n", encoding="utf-8")
    with pytest.raises(ValueError, match="needs columns clip, start, end, phone"):
        train_audio.clip_phones(clips / "b.mp4")

# --------------------------------------------------------------------------------------------- loss


def test_both_parts_of_the_loss_count():
    """Property: a wrong phone or a wrong opening costs; frames of weight 0 cost nothing."""
    phones = torch.nn.functional.one_hot(torch.tensor([[0, 1]]), len(PHONES)).float()
    opening = torch.tensor([[0.0, 0.5]])

    def loss(predicted, weight=(1.0, 1.0), opening_loss_weight=1.0):
        weight = torch.tensor([weight])
        parts = train_audio.probe_loss(predicted, phones, opening, weight, opening_loss_weight)
        return parts[0].item()
    right = torch.cat([20 * phones, opening[..., None]], -1)
    wrong_opening, wrong_phone = right.clone(), right.clone()
    wrong_opening[0, 1, -1] = 0.0
    wrong_phone[0, 1, :-1] = 20 * phones[0, 0]
    assert loss(right) < 1e-3 < 0.5 < min(loss(wrong_opening), loss(wrong_phone))
    assert max(loss(wrong_opening, (1.0, 0.0)), loss(wrong_phone, (1.0, 0.0))) < 1e-3
    twice = loss(wrong_opening, opening_loss_weight=2.0)
    assert abs(twice - 2 * loss(wrong_opening)) < 1e-3


def test_frames_without_labels_have_no_loss():
    """Property: a batch of weight 0 alone gives loss 0 and no gradient, not 0 / 0."""
    predicted = torch.zeros(1, 4, len(PHONES) + 1, requires_grad=True)
    phones, opening, weight = torch.zeros(1, 4, len(PHONES)), torch.rand(1, 4), torch.zeros(1, 4)
    loss, opening_loss = train_audio.probe_loss(predicted, phones, opening, weight, 1.0)
    loss.backward()
    assert loss == opening_loss == 0 and not predicted.grad.any()

# ------------------------------------------------------------------------------------------ encoder


def save_random_encoder(kind, folder):
    from transformers import Wav2Vec2Config, Wav2Vec2Model, WhisperConfig, WhisperModel
    sizes = dict(encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=16,
                 decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, vocab_size=60,
                 pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    if kind == "wav2vec2":
        model = Wav2Vec2Model(Wav2Vec2Config(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
            conv_dim=(8,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2))
    else:
        model = WhisperModel(WhisperConfig(d_model=16, **sizes))
        torch.nn.init.uniform_(model.encoder.layer_norm.weight)
    if kind == "whisper encoder":
        model = model.encoder
    model.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["whisper", "whisper encoder", "wav2vec2"])
def test_training_starts_from_the_pretrained_layers(tmp_path, kind):
    """Property: the layers that are kept give what they gave before, also when saved and loaded.

    Dropout acts in training only. Of a Whisper's positions 8 s are kept; only they are frozen."""
    save_random_encoder(kind, tmp_path)
    is_whisper = kind != "wav2vec2"
    # of Whisper at 50 Hz: the last state is normed before two make a frame
    states_of = states_at_50_hz if is_whisper else wav2vec2_states
    whole = AudioEncoder(tmp_path).model
    encoder = prepare_encoder(AudioEncoder(tmp_path), AudioConfig(layers=2, dropout=0.5))
    cut = encoder.model
    wave = np.random.default_rng(0).standard_normal((1, 8 * SAMPLE_RATE), np.float32)
    wave = torch.from_numpy(wave)
    before, after = states_of(whole, wave), states_of(cut, wave)
    norm = whole.layer_norm if is_whisper else torch.nn.Identity()
    assert encoder.layers == len(after) == 2
    assert torch.equal(before[0], after[0]) and torch.equal(norm(before[1]), after[1])
    frozen = {name for name, p in cut.named_parameters() if not p.requires_grad}
    assert frozen == ({"embed_positions.weight"} if is_whisper else set())
    if is_whisper:
        assert len(cut.embed_positions.weight) == 400
    torch.manual_seed(0)
    assert not torch.equal(states_of(cut.train(), wave)[0], after[0])

    train_audio.export(tmp_path / "cut", *copy.deepcopy((cut, train_audio.make_head(encoder))))
    saved = AudioEncoder(tmp_path / "cut")
    cut.eval().half().float()                                       # as it is rounded in the file
    states = encoder.encode(normalise(wave))[0]                     # (200, 2, 16)
    assert saved.layers == 2 and torch.equal(saved.features(wave[0], 0, 200), states)
    uncut = prepare_encoder(AudioEncoder(tmp_path), AudioConfig(layers=0, dropout=0.0))
    again = states_of(uncut.model.train(), wave)                    # 0: all layers, no dropout
    assert len(again) == 3 and torch.equal(again[2], before[2])

# --------------------------------------------------------------------------------------------- loop


def flip_opening(source, target):
    """Copy an encoder and its head, whose last output, the opening, gets the opposite sign."""
    shutil.copytree(source, target)
    head = load_file(source / "head.safetensors")
    flipped = {name: torch.cat([tensor[:-1], -tensor[-1:]]) for name, tensor in head.items()}
    save_file(flipped, target / "head.safetensors")


def test_training_learns_and_a_resumed_run_is_the_same(tmp_path, monkeypatch):
    """Property: 20 steps find four tones, and a killed and resumed run ends in the same bits."""
    recordings = train_audio.load_speech(*write_tones(tmp_path))
    cfg = AudioConfig(steps=20, log_every=10, batch_frames=50, bf16=False, lr=5e-5, dropout=0.1)

    def train(name, cfg=cfg, **options):
        encoder = prepare_encoder(AudioEncoder(WEIGHTS), cfg)
        run_dir = tmp_path / f"run_{name}"
        return train_audio.train(cfg, encoder, recordings, [], tmp_path / name, run_dir, **options)
    losses = train("a")
    assert losses[0] > 4 and np.mean(losses[-3:]) < 3.2             # chance: log 41 = 3.7, and ~1
    figures = train_audio.evaluate(tmp_path / "a", recordings)
    assert figures["opening_correlation"] > 0.3
    flip_opening(tmp_path / "a", tmp_path / "flipped")              # it measures the last output
    opposite = train_audio.evaluate(tmp_path / "flipped", recordings)
    assert abs(opposite["opening_correlation"] + figures["opening_correlation"]) < 1e-3
    assert opposite["phone_accuracy"] == figures["phone_accuracy"]

    training_batch = train_audio.training_batch

    def killed_at_step_13(recordings, clips, cfg, rng):
        step_13 = np.random.default_rng((cfg.seed, 13))
        if step_13.bit_generator.state == rng.bit_generator.state:
            raise KeyboardInterrupt
        return training_batch(recordings, clips, cfg, rng)
    with monkeypatch.context() as patch:
        patch.setattr(train_audio, "training_batch", killed_at_step_13)
        with pytest.raises(KeyboardInterrupt):
            train("b")
    assert train("b", resume=True) == losses[10:]
    for name in ("model.safetensors", "head.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(ValueError, match="other options"):
        train("b", AudioConfig(steps=21), resume=True)
    recordings.pop()
    with pytest.raises(ValueError, match="other options: data"):
        train("b", resume=True)


def test_held_out_speakers_are_not_trained_on(tmp_path, monkeypatch):
    """Property: held-out speakers and clips are measured, never trained on.

    Held out are the speakers that synthetic/puppet.py holds out and the "val" clips of a folder;
    the other clips have their share of a batch."""
    speech, phones = write_tones(tmp_path, 12)
    folder = tmp_path / "clips"
    puppet.main(["--portraits", "drawn", "--out", str(folder), "--clips", "6", "--seconds", "1",
                 "--size", "32"])
    trained, measured = [], []

    def train(cfg, encoder, recordings, clips, *_):
        trained.extend([recordings, clips])

    def evaluate(out, recordings, device):
        measured.append(recordings)
        return {"viseme_percent": []}
    monkeypatch.setattr(train_audio, "train", train)
    monkeypatch.setattr(train_audio, "evaluate", evaluate)
    train_audio.main(["--speech", str(speech), "--phones", str(phones), "--clips", str(folder),
                      "--out", str(tmp_path), "--init", str(WEIGHTS)])
    everybody = {str(i) for i in range(12)}
    held_out = set(puppet.divide(sorted(everybody), str, np.random.default_rng(0))[0])
    assert {recording.speaker for recording in measured[0]} == held_out
    assert {recording.speaker for recording in trained[0]} == everybody - held_out
    assert (len(trained[1]), len(measured[1])) == (5, 1)            # of 6 clips the last is "val"
    audio = np.array(ClipFolder(folder, 128, "val").clips[0].audio, int)
    assert np.abs(measured[1][0].audio - audio).max() <= 1          # its own sound

    def phones_of_batch(clip_share):
        cfg = AudioConfig(batch_frames=200, clip_share=clip_share)
        return train_audio.training_batch(*trained, cfg, np.random.default_rng(0))[1]
    tones = torch.tensor([PHONES.index(phone) for phone in TONES])
    without, only = phones_of_batch(0.0), phones_of_batch(1.0)
    assert without[..., tones].sum() == without.sum() and only[..., tones].sum() < only.sum()


def test_the_command_trains_measures_and_refuses(tmp_path, capsys):
    """Property: the command leaves a folder that AudioEncoder loads, and its figures.

    Bad input ends in one line and exit code 2."""
    speech, phones = write_tones(tmp_path, 12)
    common = ["--speech", str(speech), "--phones", str(phones), "--out", str(tmp_path / "w"),
              "--init", str(WEIGHTS)]
    train_audio.main([*common, "--run-dir", str(tmp_path / "run"), "--steps", "2",
                      "--batch-frames", "50", "--no-bf16"])
    assert AudioEncoder(tmp_path / "w").layers == 3
    figures = json.loads((tmp_path / "w" / "metrics.json").read_text(encoding="utf-8"))
    assert 0 <= figures["phone_accuracy"] <= figures["viseme_accuracy"] <= 1 < figures["parameters"]
    assert "viseme_accuracy: " in capsys.readouterr().out

    head = tmp_path / "w" / "head.safetensors"
    save_file({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, head)
    nowhere = str(tmp_path / "no")
    no_such_phone = "0.0\t1.0\tzz\n"                                # a confidence need not be given
    errors = [["--evaluate"], ["--speech", nowhere], ["--out", nowhere, "--evaluate"],
              ["--clips", nowhere], ["--cache", nowhere], ["--resume", "--run-dir", nowhere],
              ["--init", nowhere], ["--layers", "9"], ["--layers", "-1"], ["--log-every", "0"], []]
    for wrong in errors:
        if not wrong:
            (phones / "0-a.tsv").write_text(no_such_phone, encoding="utf-8")
        with pytest.raises(SystemExit) as stop:
            train_audio.main([*common, *wrong])
        message = capsys.readouterr().err
        assert stop.value.code == 2, wrong
        assert message.startswith("tiny.train_audio: ") and message.count("\n") == 1
