"""Laws of audio.py: nothing is heard from the future, nothing moves in time."""
import json
import shutil
import socket
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import audio
from audio import HOP, RATE, AudioEncoder, AudioProjection, latent_windows, load_audio

WEIGHTS = Path(audio.__file__).parent / "weights" / "tiny" / "whisper"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def encoder():
    return AudioEncoder(WEIGHTS)


def speech(seconds, seed=0):
    """Something uneven, like speech: noise whose loudness and colour change."""
    rng = np.random.default_rng(seed)
    wave = rng.standard_normal(round(seconds * RATE)) * (1.2 + np.sin(np.arange(round(seconds * RATE)) / 900))
    return (0.1 * np.convolve(wave, np.hanning(9) / 4, "same")).astype(np.float32)

# -------------------------------------------------------------------------------------------------- recording


def tone_and_click(rate, channels):
    """1 s of a 440 Hz tone, silence, a click of 2 ms in the middle of 1.25 s, silence until 1.5 s."""
    t = np.arange(round(1.5 * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * 440 * t) * (t < 1) + 0.8 * np.exp(-0.5 * ((t - 1.25) / 5e-4) ** 2)
    return np.repeat(wave[:, None], channels, 1).astype(np.float32)


def write_m4a(path, wave, rate, late=0.0):
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=rate, layout="stereo" if wave.shape[1] == 2 else "mono")
        stream.bit_rate = 96000
        for start in range(0, len(wave), 1024):
            block = np.ascontiguousarray(wave[start:start + 1024].T)
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=stream.layout.name)
            frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
            frame.pts = start + round(late * rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def measure(wave):
    """-> frequency of the tone in Hz, time of the click in s."""
    tone = wave[RATE // 5:4 * RATE // 5] * np.hanning(3 * RATE // 5)
    spectrum = np.abs(np.fft.rfft(tone, 8 * RATE))
    return np.argmax(spectrum) / 8, (RATE + 1600 + np.argmax(np.abs(wave[RATE + 1600:]))) / RATE


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3", "m4a"])
@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_any_file_keeps_pitch_and_time(tmp_path, kind, rate):
    """Whatever the rate, the channels and the codec: a tone stays a tone and a click comes when it came."""
    for channels in (1, 2):
        path = tmp_path / f"x{channels}.{kind}"
        if kind == "m4a":
            write_m4a(path, tone_and_click(rate, channels), rate)
        else:
            soundfile.write(path, tone_and_click(rate, channels), rate)
        wave = load_audio(path)
        hertz, click = measure(wave)
        assert wave.dtype == np.float32 and wave.ndim == 1 and np.abs(wave).max() <= 1
        assert abs(hertz - 440) <= 0.25 and abs(click - 1.25) <= 0.001
        padded = 0.002 if kind in ("wav", "flac", "ogg") else 0.12          # mp3, aac fill their last block
        assert abs(len(wave) / RATE - 1.5) < padded


def test_what_16_khz_cannot_hold_is_removed(tmp_path):
    """Sampling theorem: a 9 kHz tone must vanish at 16 kHz; without a low-pass it comes back at 7 kHz."""
    t = np.arange(44100) / 44100
    soundfile.write(tmp_path / "high.wav", 0.5 * np.sin(2 * np.pi * 9000 * t), 44100)
    assert np.abs(load_audio(tmp_path / "high.wav")[1000:-1000]).max() < 0.005


def test_a_sound_track_that_starts_late_stays_late(tmp_path):
    """Sound is counted from the time 0 of the file: lips and sound of a clip share one clock."""
    write_m4a(tmp_path / "late.m4a", tone_and_click(16000, 1), 16000, late=0.5)
    wave = load_audio(tmp_path / "late.m4a")
    assert abs((2 * RATE - RATE // 2 + np.argmax(np.abs(wave[2 * RATE - RATE // 2:]))) / RATE - 1.75) <= 0.001


def bad_files(folder):
    soundfile.write(folder / "nan.wav", np.array([0, np.nan, 0], np.float32), RATE, subtype="FLOAT")
    soundfile.write(folder / "inf.wav", np.array([0, np.inf, 0], np.float32), RATE, subtype="FLOAT")
    soundfile.write(folder / "none.wav", np.zeros(0, np.float32), RATE)
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is not a recording", encoding="utf-8")
    (folder / "noise.mp4").write_bytes(bytes(range(256)) * 8)
    Image.new("RGB", (8, 8)).save(folder / "picture.png")
    with av.open(str(folder / "silent_film.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 16
        film.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        film.mux(stream.encode(None))
    return [*sorted(folder.iterdir()), folder]


def test_bad_recordings_raise_one_clear_line(tmp_path):
    """A wrong file is the commonest mistake: one line that names the file, never a decoder's traceback."""
    for path in bad_files(tmp_path):
        with pytest.raises(ValueError) as error:
            load_audio(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_audio(tmp_path / "missing.wav")

# ---------------------------------------------------------------------------------------------------- encoder


def test_features_never_hear_the_future(encoder):
    """A chunk's frames know nothing after its last frame: a chunk can be made as soon as it was spoken."""
    wave = speech(6)
    changed = wave.copy()
    changed[90 * HOP:] = speech(6, seed=1)[90 * HOP:]
    here, there = encoder.features(wave, 9, 81), encoder.features(changed, 9, 81)
    assert here.shape == (81, encoder.layers, encoder.dim) and here.dtype == torch.float32
    assert torch.equal(here, there) and torch.equal(here, encoder.features(wave[:90 * HOP], 9, 81))
    assert not torch.equal(here, encoder.features(changed, 10, 81)[:81])


def test_features_hear_eight_seconds_and_no_more(encoder):
    """The window is bounded, so a long recording costs no more memory than a short one."""
    wave = speech(14)
    changed = wave.copy()
    changed[:(300 - 200) * HOP] = 0                                         # all that lies before the 8 s
    here = encoder.features(wave, 219, 81)
    assert torch.equal(here, encoder.features(changed, 219, 81))
    changed[:101 * HOP] = 0
    assert not torch.equal(here, encoder.features(changed, 219, 81))


def test_features_have_no_state_and_no_chance(encoder):
    """Same input, same output: no dropout, no SpecAugment, and the global random state is left alone."""
    wave, before = speech(2), torch.get_rng_state()
    here = encoder.features(wave, 0, 50)
    encoder.features(speech(3, seed=2), 0, 75)
    assert torch.equal(here, encoder.features(torch.from_numpy(wave), 0, 50))
    assert torch.equal(before, torch.get_rng_state())


def test_silence_and_loudness(encoder):
    """Silence gives finite features (not 0/0), also after the end; a louder recording sounds the same."""
    assert torch.equal(audio.normalise(torch.zeros(1, 640)), torch.zeros(1, 640))
    assert encoder.features(np.zeros(5 * RATE, np.float32), 44, 81).isfinite().all()
    assert encoder.features(np.zeros(0, np.float32), 500, 1).isfinite().all()
    wave = speech(2)
    loud, soft = encoder.features(wave, 0, 50), encoder.features(0.5 * wave, 0, 50)
    torch.testing.assert_close(loud, soft, rtol=1e-2, atol=1e-2)
    for start, frames in ((0, 0), (0, 201), (-1, 5)):
        with pytest.raises(ValueError, match="frames"):
            encoder.features(wave, start, frames)


@pytest.mark.parametrize("large", [False, True])
def test_any_wav2vec2_can_be_put_in(tmp_path, large):
    """Sizes come from the config, hidden states are transformers' own: base-960h and large models fit too."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC, Wav2Vec2Model
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, vocab_size=5, conv_bias=large,
        feat_extract_norm="layer" if large else "group", do_stable_layer_norm=large)
    Wav2Vec2ForCTC(config).save_pretrained(tmp_path)                    # base-960h comes with a letter head
    encoder = AudioEncoder(str(tmp_path))
    assert (encoder.layers, encoder.dim) == (3, 24)
    assert encoder.features(speech(4), 19, 81).shape == (81, 3, 24)
    wave = audio.normalise(torch.from_numpy(speech(1)))[None]
    theirs = Wav2Vec2Model.from_pretrained(tmp_path).eval()(wave, output_hidden_states=True)
    ours = audio.transformer_states(encoder.model, encoder.model.feature_extractor(wave).transpose(1, 2))
    for a, b in zip(ours, (*theirs.hidden_states[1:-1], theirs.last_hidden_state), strict=True):
        torch.testing.assert_close(a, b)


def test_any_whisper_can_be_put_in(tmp_path):
    """Of a whole Whisper its encoder is taken; what it says of all it hears at once is what transformers makes it say; two states make a frame."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration
    torch.manual_seed(0)
    sizes = dict(d_model=24, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=32, max_source_positions=400, num_mel_bins=128)
    theirs = WhisperForConditionalGeneration(WhisperConfig(
        **sizes, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1))
    theirs.save_pretrained(tmp_path)
    encoder = AudioEncoder(str(tmp_path))
    assert (encoder.layers, encoder.dim) == (3, 24)
    wave = audio.normalise(torch.from_numpy(speech(8)))                     # 400 states: as much as this one hears at once
    mel = WhisperFeatureExtractor(chunk_length=8, feature_size=128)(0.1 * wave.numpy(), sampling_rate=RATE, return_tensors="pt")["input_features"]
    expected = theirs.eval().model.encoder(mel, output_hidden_states=True)
    ours = audio.encode(encoder.model, wave[None])
    assert [states.shape for states in ours] == 3 * [(1, 200, 24)]
    for mine, its in zip(ours, (*expected.hidden_states[1:3], expected.last_hidden_state), strict=True):
        torch.testing.assert_close(mine[:, 20], its[:, 40:42].mean(1))
    theirs.model.save_pretrained(tmp_path / "bare")                         # without its head for words the tensors have other names
    assert torch.equal(AudioEncoder(tmp_path / "bare").features(wave, 0, 9), encoder.features(wave, 0, 9))
    with torch.autocast("cpu", torch.bfloat16):                             # training: what comes before the network stays float32, or this raises
        torch.testing.assert_close(audio.encode(encoder.model, wave[None])[0].float(), ours[0], rtol=0.1, atol=0.1)


def test_wrong_weights_raise_one_clear_line(tmp_path):
    """A folder that holds something else says what is missing, before any video is made with random ears."""
    with pytest.raises(FileNotFoundError, match="no such folder"):
        AudioEncoder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        AudioEncoder(tmp_path)
    shutil.copytree(WEIGHTS, tmp_path / "w")
    config = json.loads((tmp_path / "w" / "config.json").read_text(encoding="utf-8"))
    for wrong, message in (({"encoder_layers": 6}, "lacks"), ({"d_model": 128}, "cannot load"), ({"model_type": "bert"}, "it is a bert"),
                           ({"max_source_positions": 99}, "8 are needed")):
        (tmp_path / "w" / "config.json").write_text(json.dumps({**config, **wrong}), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            AudioEncoder(tmp_path / "w")
    (tmp_path / "w" / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ValueError, match="cannot load"):
        AudioEncoder(tmp_path / "w")


def test_a_hub_name_without_a_network_fails_at_once_and_a_folder_asks_nobody(monkeypatch):
    """from_pretrained tries for 40 s to reach the hub; one question is enough to know that only what was fetched before can be loaded."""
    asked, slept = [], []

    def unreachable(host, *_, **__):
        asked.append(host)
        raise socket.gaierror("no network")
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(ValueError, match="cannot load an audio encoder from nobody/knows-this: .*connect") as error:
        AudioEncoder("nobody/knows-this")
    assert asked and not slept and "\n" not in str(error.value)
    asked.clear()
    AudioEncoder(WEIGHTS)
    assert not asked


def test_with_a_network_a_hub_name_may_be_downloaded(monkeypatch):
    """The question decides nothing else: if the hub answers, transformers looks for the files as it always does."""
    import huggingface_hub
    from transformers import AutoConfig, Wav2Vec2Config, Wav2Vec2Model
    seen = []
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name, local_files_only, **_: seen.append((name, local_files_only)) or Wav2Vec2Config())
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=lambda url, timeout: None))
    monkeypatch.setattr(Wav2Vec2Model, "from_pretrained", lambda name, **options: seen.append((name, options["local_files_only"])))
    with pytest.raises(ValueError):                                     # nothing comes back from this one
        AudioEncoder("nobody/knows-this")
    assert seen == 2 * [("nobody/knows-this", False)]


def test_shipped_weights_are_small(encoder):
    """The tiny preset's ears: at most 6.5 M parameters, in half precision on disk."""
    assert sum(p.numel() for p in encoder.model.parameters()) <= 6.5e6
    assert (WEIGHTS / "model.safetensors").stat().st_size < 2.01 * 6.5e6

# ------------------------------------------------------------------------------------------------- projection


def test_a_latent_hears_its_frames_and_two_more_on_each_side():
    """Latent 0 is frame 0, latent f is frames 4f-3..4f; its tokens know these and two more on each side."""
    torch.manual_seed(0)
    T, projection = 21, AudioProjection(2, 3, 16, tokens=4, hidden=8)
    features = torch.randn(1, T, 2, 3, requires_grad=True)
    first, rest = latent_windows(features)
    assert first.shape == (1, 5, 2, 3) and rest.shape == (1, 5, 8, 2, 3)
    tokens = projection(features)
    assert tokens.shape == (1, 6, 4, 16)
    for f in range(6):
        one_number = (tokens[0, f] * torch.randn(4, 16)).sum()
        gradient, = torch.autograd.grad(one_number, features, retain_graph=True)
        touched = set(gradient[0].abs().sum((1, 2)).nonzero().flatten().tolist())
        own = range(4 * f - 3, 4 * f + 1) if f else [0]
        assert touched == set(range(max(0, min(own) - 2), min(T, max(own) + 3)))
    with pytest.raises(ValueError, match="4F - 3"):
        latent_windows(features[:, :20])
