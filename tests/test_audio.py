"""Properties of audio.py: features are causal, sound keeps its time, each latent gets its frames.

Also of tiny/whisper.py, which audio.AudioEncoder loads for the small preset."""
import io
import json
import os
import shutil
import socket
import struct
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from av.stream import Disposition
from PIL import Image

import audio
import media
from audio import AudioEncoder, AudioProjection, latent_windows, load_audio
from data import HOP, SAMPLE_RATE

WEIGHTS = Path(audio.__file__).parent / "weights" / "tiny" / "whisper"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def encoder():
    return AudioEncoder(WEIGHTS)


def speech(seconds, seed=0):
    """Something uneven, like speech: noise whose loudness and colour change."""
    rng = np.random.default_rng(seed)
    size = round(seconds * SAMPLE_RATE)
    wave = rng.standard_normal(size) * (1.2 + np.sin(np.arange(size) / 900))
    return (0.1 * np.convolve(wave, np.hanning(9) / 4, "same")).astype(np.float32)

# ---------------------------------------------------------------------------------------- recording


def tone_and_click(rate, channels):
    """1 s of a 440 Hz tone, silence, a click of 2 ms in the middle of 1.25 s, silence to 1.5 s."""
    t = np.arange(round(1.5 * rate)) / rate
    tone = 0.3 * np.sin(2 * np.pi * 440 * t) * (t < 1)
    click = 0.8 * np.exp(-0.5 * ((t - 1.25) / 5e-4) ** 2)
    return np.repeat((tone + click)[:, None], channels, 1).astype(np.float32)


def write_m4a(path, wave, rate, late=0.0):
    with av.open(str(path), "w", format="mp4") as file:
        layout = "stereo" if wave.shape[1] == 2 else "mono"
        stream = file.add_stream("aac", rate=rate, layout=layout)
        stream.bit_rate = 96000
        for start in range(0, len(wave), 1024):
            block = np.ascontiguousarray(wave[start:start + 1024].T)
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=stream.layout.name)
            frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
            frame.pts = start + round(late * rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def loudest(wave, after):
    """Time of the loudest sample after `after` s."""
    start = round(after * SAMPLE_RATE)
    return (start + np.argmax(np.abs(wave[start:]))) / SAMPLE_RATE


def pitch(wave):
    """Frequency in Hz of the tone between 0.2 and 0.8 s."""
    tone = wave[SAMPLE_RATE // 5:4 * SAMPLE_RATE // 5] * np.hanning(3 * SAMPLE_RATE // 5)
    return np.argmax(np.abs(np.fft.rfft(tone, 8 * SAMPLE_RATE))) / 8


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3", "m4a"])
@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_any_file_keeps_pitch_and_time(tmp_path, kind, rate):
    """Property: pitch and time of a sound do not depend on the file's rate, channels or codec."""
    for channels in (1, 2):
        path = tmp_path / f"x{channels}.{kind}"
        if kind == "m4a":
            write_m4a(path, tone_and_click(rate, channels), rate)
        else:
            soundfile.write(path, tone_and_click(rate, channels), rate)
        wave = load_audio(path)
        assert wave.dtype == np.float32 and wave.ndim == 1 and np.abs(wave).max() <= 1
        assert abs(pitch(wave) - 440) <= 0.25 and abs(loudest(wave, 1.1) - 1.25) <= 0.001
        padded = 0.002 if kind in ("wav", "flac", "ogg") else 0.12  # mp3, aac fill the last block
        assert abs(len(wave) / SAMPLE_RATE - 1.5) < padded


def test_what_16_khz_cannot_hold_is_removed(tmp_path):
    """Property: a 9 kHz tone vanishes at 16 kHz (sampling theorem).

    Without a low-pass it would come back as a tone of 7 kHz."""
    t = np.arange(44100) / 44100
    soundfile.write(tmp_path / "high.wav", 0.5 * np.sin(2 * np.pi * 9000 * t), 44100)
    assert np.abs(load_audio(tmp_path / "high.wav")[1000:-1000]).max() < 0.005


def write_video(path, sound_start, picture_start=0.0, seconds=2):
    """Dark pictures and the tone and click, each on its own clock."""
    with av.open(str(path), "w") as file:
        picture, voice = file.add_stream("mpeg4", rate=25), file.add_stream("aac", rate=16000)
        picture.width = picture.height = 16
        for i in range(25 * seconds):
            frame = av.VideoFrame(16, 16, "yuv420p")
            frame.pts, frame.time_base = i + round(25 * picture_start), Fraction(1, 25)
            file.mux(picture.encode(frame))
        file.mux(picture.encode(None))
        sound = np.ascontiguousarray(np.resize(tone_and_click(16000, 1).T, (2, 24000)))
        frame = av.AudioFrame.from_ndarray(sound, "fltp", "stereo")
        frame.sample_rate, frame.time_base = 16000, Fraction(1, 16000)
        frame.pts = round(sound_start * 16000)
        for part in av.AudioResampler("fltp", frame_size=1024).resample(frame):
            file.mux(voice.encode(part))
        file.mux(voice.encode(None))
    return path


def test_sound_is_as_late_as_its_picture_says(tmp_path):
    """Property: times are counted from the first picture, so that lips and sound share one clock.

    Sound before it is kept: it is speech. Sound without a picture begins at once, whatever its
    clock says: a piece of a broadcast, a part cut out of a recording."""
    for sound, picture, click in ((0.5, 0, 1.75), (7.5, 7.0, 1.75), (0.0, 0.4, 1.25)):
        path = write_video(tmp_path / "late.mkv", sound, picture)
        assert abs(loudest(load_audio(path), 1.1) - click) <= 0.002
    for late in (0.5, 0):                       # 64 ms are the encoder's, which this file keeps
        write_m4a(tmp_path / "late.m4a", tone_and_click(16000, 1), 16000, late)
        assert abs(loudest(load_audio(tmp_path / "late.m4a"), 1.1) - 1.25) <= 0.0645
    for kind in ("mka", "ts"):
        path = tmp_path / f"late.{kind}"
        with av.open(str(tmp_path / "late.m4a")) as old, av.open(str(path), "w") as new:
            track = old.streams.audio[0]
            copy = new.add_stream_from_template(track)
            for packet in old.demux(track):
                if packet.dts is not None:
                    packet.pts += round(90 / packet.time_base)
                    packet.dts, packet.stream = packet.pts, copy
                    new.mux(packet)
        assert abs(loudest(load_audio(path), 1.1) - 1.25) <= 0.0645


def as_bytes(wave, kind, rate=16000, **options):
    soundfile.write(file := io.BytesIO(), wave, rate, format=kind, **options)
    return file.getvalue()


def tone(hertz, seconds=1.2, rate=16000):
    return (0.4 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
            ).astype(np.float32)


def unbelievable_files():
    """Files whose header does not give their length -> {name: (bytes, seconds, tolerance)}"""
    first, second = tone(440), tone(880)
    wav, flac = bytearray(as_bytes(first, "WAV")), bytearray(as_bytes(first, "FLAC"))
    at = wav.find(b"data") + 4
    files = {}
    for size in (0, 0xFFFFFFFF):                # what programs write that do not know it yet
        wav[4:8] = wav[at:at + 4] = struct.pack("<I", size)
        files[f"size {size}.wav"] = bytes(wav), 1.2, 0
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)                      # samples in all: unknown
    files["pipe.flac"] = bytes(flac), 1.2, 0
    with av.open(file := io.BytesIO(), "w", format="mp3", options={"write_xing": "0"}) as out:
        stream = out.add_stream("libmp3lame", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(440, 3)[None], "fltp", "mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame) + stream.encode())
    files["no header.mp3"] = file.getvalue(), 3, 0.072                  # two blocks
    files["joined.mp3"] = as_bytes(first, "MP3") + as_bytes(second, "MP3"), 2.4, 0.18
    vorbis = [as_bytes(wave, "OGG") for wave in (first, second)]
    files["joined.ogg"] = b"".join(vorbis), 2.4, 0.02
    other = as_bytes(tone(880, rate=24000), "OGG", 24000, subtype="OPUS")
    files["joined opus.ogg"] = as_bytes(first, "OGG", subtype="OPUS") + other, 2.4, 0.02
    return files


def test_a_length_is_read_not_believed(tmp_path):
    """Property: a recording is read to its end, whatever its header claims, and begins at once.

    Streams, pipes and joined files have headers that know nothing, or only of the first part."""
    for name, (file, seconds, tolerance) in unbelievable_files().items():
        (tmp_path / name).write_bytes(file)
        wave = load_audio(tmp_path / name)
        assert 0 <= len(wave) / SAMPLE_RATE - seconds + 0.02 <= tolerance + 0.02, name
        assert np.abs(wave[:320]).max() > 0.2 and np.abs(wave[-1600:]).max() > 0.1, name
        if "joined" in name:
            halves = [np.abs(np.fft.rfft(half[:16000])) for half in (wave, wave[-16000:])]
            assert abs(halves[0].argmax() - 440) <= 1 and abs(halves[1].argmax() - 880) <= 8, name


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000, 96000])
def test_a_video_has_as_many_frames_as_its_recording_needs(tmp_path, rate):
    """Property: samples at 16 kHz are 16000 x seconds, rounded up: not one more or less.

    So there are ceil(25 x seconds) frames: 1 for a millisecond, 30 for 1.2 s."""
    for samples in (1, rate // 1000, rate * 6 // 5, rate * 6 // 5 + 1):
        soundfile.write(tmp_path / "a.wav", tone(440, samples / rate, rate), rate)
        assert len(load_audio(tmp_path / "a.wav")) == -(-samples * SAMPLE_RATE // rate)


def test_channels_that_cancel_are_not_mixed(tmp_path):
    """Property: the mix is FFmpeg's, but of channels that cancel each other one is taken.

    A balanced microphone plugged in wrongly: the right channel is minus the left one."""
    voice, other = tone(440), tone(660)
    noisy = 0.02 * other - 1.01 * voice
    for name, channels, expected in (("stereo", (voice, other), (voice + other) / 2),
                                     ("left", (voice, 0 * voice), voice / 2),
                                     ("wrong", (0.9 * voice, -voice), -voice),
                                     ("wrong, with noise", (voice, noisy), noisy),
                                     ("six microphones", [voice] * 6, voice)):
        path = tmp_path / f"{name}.flac"
        soundfile.write(path, np.stack(channels, 1), 16000, subtype="PCM_24")
        np.testing.assert_allclose(load_audio(path), expected, atol=0.02, err_msg=name)


def two_tracks(path, default):
    """A tone of 440 Hz and one of 880 Hz in two tracks."""
    with av.open(str(path), "w") as out:
        tracks = [out.add_stream("pcm_s16le", rate=16000, layout="mono") for _ in range(2)]
        tracks[1 - default].disposition = Disposition.original
        tracks[default].disposition = Disposition.default
        for track, hertz in zip(tracks, (440, 880), strict=True):
            frame = av.AudioFrame.from_ndarray(tone(hertz)[None], "fltp", "mono")
            frame.sample_rate = 16000
            out.mux(track.encode(frame) + track.encode())
    return path


def test_the_default_track_is_taken(tmp_path):
    """Property: of several tracks the one that players take, as in data.py: it is one reader."""
    for default in (0, 1):
        path = two_tracks(tmp_path / "a.mka", default)
        assert abs(pitch(load_audio(path)) - (440, 880)[default]) < 1
    broken = two_tracks(tmp_path / "b.mka", 1).read_bytes()
    at = broken.rfind(b"A_PCM/INT/LIT")
    (tmp_path / "b.mka").write_bytes(broken[:at] + b"A_NOT/INT/LIT" + broken[at + 13:])
    assert abs(pitch(load_audio(tmp_path / "b.mka")) - 440) < 1         # it cannot be played


def test_tags_names_and_covers_do_not_matter(tmp_path, monkeypatch):
    """Property: a tag that is no UTF-8, a colon in a name, an album cover change nothing."""
    wave = tone(440)
    with av.open(str(tmp_path / "a.mp3"), "w", metadata_encoding="latin-1") as out:
        out.metadata["title"] = "\u00fcber"
        voice = out.add_stream("libmp3lame", rate=16000, layout="mono")
        cover = out.add_stream("png", width=16, height=16, pix_fmt="rgb24")
        cover.disposition = Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(wave[None], "fltp", "mono")
        frame.sample_rate = 16000
        packets = cover.encode(av.VideoFrame(16, 16, "rgb24")) + cover.encode()
        out.mux(packets + voice.encode(frame) + voice.encode())
    assert abs(len(load_audio(tmp_path / "a.mp3")) - len(wave)) < 160
    monkeypatch.chdir(tmp_path)                             # without a folder it looks like a URL
    soundfile.write("take:hello.wav", wave, 16000)
    assert len(load_audio("take:hello.wav")) == len(wave)


def test_a_pipe_is_refused(tmp_path):
    """Property: files are opened several times, a pipe can be read once: one line, no waiting."""
    for name in ("pipe", "pipe.ogg", "pipe.mp4"):
        os.mkfifo(tmp_path / name)
    said = []

    def read(reader, path):
        with pytest.raises(ValueError, match="a folder or a pipe") as error:
            reader(path)
        said.append(str(error.value))
    for reader, name in ((load_audio, "pipe"), (load_audio, "pipe.ogg"),
                         (lambda path: next(media.read_video(path)), "pipe.mp4")):
        thread = threading.Thread(target=read, args=(reader, tmp_path / name), daemon=True)
        thread.start()
        thread.join(20)
    assert len(said) == 3


def test_an_overlap_is_played_once(tmp_path):
    """Property: where time stamps say that two blocks overlap, what follows stays on its time."""
    block = np.zeros(SAMPLE_RATE, np.int16)
    block[3 * SAMPLE_RATE // 4] = 30000                     # a click 0.75 s after its begin
    with av.open(str(tmp_path / "a.mka"), "w", format="matroska") as file:
        stream = file.add_stream("pcm_s16le", rate=SAMPLE_RATE, layout="mono")
        for start in (0, SAMPLE_RATE // 2):
            frame = av.AudioFrame.from_ndarray(block[None], "s16", "mono")
            frame.sample_rate, frame.time_base = SAMPLE_RATE, Fraction(1, SAMPLE_RATE)
            frame.pts = start
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    wave = load_audio(tmp_path / "a.mka")
    assert len(wave) == 1.5 * SAMPLE_RATE
    assert (np.flatnonzero(wave > 0.5) / SAMPLE_RATE).tolist() == [0.75, 1.25]


def bad_files(folder):
    nan, inf = np.array([0, np.nan, 0], np.float32), np.array([0, np.inf, 0], np.float32)
    soundfile.write(folder / "nan.wav", nan, SAMPLE_RATE, subtype="FLOAT")
    soundfile.write(folder / "inf.wav", inf, SAMPLE_RATE, subtype="FLOAT")
    soundfile.write(folder / "none.wav", np.zeros(0, np.float32), SAMPLE_RATE)
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is not a recording", encoding="utf-8")
    (folder / "noise.mp4").write_bytes(bytes(range(256)) * 8)
    Image.new("RGB", (8, 8)).save(folder / "picture.png")
    with av.open(str(folder / "no_sound.mp4"), "w") as video:
        stream = video.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 16
        video.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        video.mux(stream.encode(None))
    return [*sorted(folder.iterdir()), folder]


def test_bad_recordings_raise_one_clear_line(tmp_path):
    """Property: a wrong file ends in one line that names it, never in a decoder's traceback."""
    for path in bad_files(tmp_path):
        with pytest.raises(ValueError) as error:
            load_audio(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_audio(tmp_path / "missing.wav")

# ------------------------------------------------------------------------------------------ encoder


def test_features_do_not_depend_on_the_future(encoder):
    """Property: features of a chunk do not depend on sound after it, so it can be made live."""
    wave = speech(6)
    changed = wave.copy()
    changed[90 * HOP:] = speech(6, seed=1)[90 * HOP:]
    features = encoder.features(wave, 9, 81)
    assert features.shape == (81, encoder.layers, encoder.dim) and features.dtype == torch.float32
    assert torch.equal(features, encoder.features(changed, 9, 81))
    assert torch.equal(features, encoder.features(wave[:90 * HOP], 9, 81))
    assert not torch.equal(features, encoder.features(changed, 10, 81)[:81])


def test_features_depend_on_eight_seconds_and_no_more(encoder):
    """Property: the window is bounded, so a long recording costs no more than a short one."""
    wave = speech(14)
    changed = wave.copy()
    changed[:(300 - 200) * HOP] = 0                                 # all that lies before the 8 s
    features = encoder.features(wave, 219, 81)
    assert torch.equal(features, encoder.features(changed, 219, 81))
    changed[:101 * HOP] = 0
    assert not torch.equal(features, encoder.features(changed, 219, 81))


def test_features_have_no_state_and_no_randomness(encoder):
    """Property: same input, same output: no dropout, no masking, no use of the random state."""
    wave, before = speech(2), torch.get_rng_state()
    features = encoder.features(wave, 0, 50)
    encoder.features(speech(3, seed=2), 0, 75)
    assert torch.equal(features, encoder.features(torch.from_numpy(wave), 0, 50))
    assert torch.equal(before, torch.get_rng_state())


def test_silence_and_loudness(encoder):
    """Property: silence gives finite features, not 0/0, and loudness changes nothing."""
    assert torch.equal(audio.normalise(torch.zeros(1, 640)), torch.zeros(1, 640))
    assert encoder.features(np.zeros(5 * SAMPLE_RATE, np.float32), 44, 81).isfinite().all()
    assert encoder.features(np.zeros(0, np.float32), 500, 1).isfinite().all()   # after the end
    wave = speech(2)
    loud, soft = encoder.features(wave, 0, 50), encoder.features(0.5 * wave, 0, 50)
    torch.testing.assert_close(loud, soft, rtol=1e-2, atol=1e-2)
    for start, frames in ((0, 0), (0, 201), (-1, 5)):
        with pytest.raises(ValueError, match="frames"):
            encoder.features(wave, start, frames)


@pytest.mark.parametrize("large", [False, True])
def test_any_wav2vec2_fits(tmp_path, large):
    """Property: hidden states are transformers' own, for base-960h and for large models.

    Sizes come from the config."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC, Wav2Vec2Model
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        conv_dim=(8,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
        vocab_size=5, conv_bias=large, feat_extract_norm="layer" if large else "group",
        do_stable_layer_norm=large)
    Wav2Vec2ForCTC(config).save_pretrained(tmp_path)                # base-960h has such a head, too
    encoder = AudioEncoder(str(tmp_path))
    assert (encoder.layers, encoder.dim) == (3, 24)
    assert encoder.features(speech(4), 19, 81).shape == (81, 3, 24)
    wave = audio.normalise(torch.from_numpy(speech(1)))[None]
    theirs = Wav2Vec2Model.from_pretrained(tmp_path).eval()(wave, output_hidden_states=True)
    features = encoder.model.feature_extractor(wave).transpose(1, 2)
    ours = audio.transformer_states(encoder.model, features)
    expected = (*theirs.hidden_states[1:-1], theirs.last_hidden_state)
    for states, expected_states in zip(ours, expected, strict=True):
        torch.testing.assert_close(states, expected_states)


def random_whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration
    torch.manual_seed(0)
    encoder = dict(d_model=24, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=32,
                   max_source_positions=400, num_mel_bins=128)
    decoder = dict(decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=60,
                   pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    return WhisperForConditionalGeneration(WhisperConfig(**encoder, **decoder)).eval()


def test_any_whisper_fits(tmp_path):
    """Property: of a whole Whisper the encoder is loaded; a frame is the mean of two of its states.

    The states are those that transformers gives for as much audio as the model takes at once."""
    from transformers import WhisperFeatureExtractor
    whisper = random_whisper()
    whisper.save_pretrained(tmp_path)
    encoder = AudioEncoder(str(tmp_path))
    assert (encoder.layers, encoder.dim) == (3, 24)
    wave = audio.normalise(torch.from_numpy(speech(8)))             # 400 states
    extractor = WhisperFeatureExtractor(chunk_length=8, feature_size=128)
    mel = extractor(0.1 * wave.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt")
    theirs = whisper.model.encoder(mel["input_features"], output_hidden_states=True)
    ours = encoder.encode(wave[None])
    assert ours.shape == (1, 200, 3, 24)
    expected = (*theirs.hidden_states[1:3], theirs.last_hidden_state)
    for states, expected_states in zip(ours.unbind(2), expected, strict=True):
        torch.testing.assert_close(states[:, 20], expected_states[:, 40:42].mean(1))

    whisper.model.save_pretrained(tmp_path / "bare")                # its tensors have other names
    bare = AudioEncoder(tmp_path / "bare")
    assert torch.equal(bare.features(wave, 0, 9), encoder.features(wave, 0, 9))


def test_log_mel_stays_float32_in_training(tmp_path):
    """Property: what comes before the network is not computed in bfloat16 (else this raises)."""
    random_whisper().save_pretrained(tmp_path)
    encoder, wave = AudioEncoder(tmp_path), audio.normalise(torch.from_numpy(speech(8)))[None]
    with torch.autocast("cpu", torch.bfloat16):
        states = encoder.encode(wave)[:, :, 0].float()
    torch.testing.assert_close(states, encoder.encode(wave)[:, :, 0], rtol=0.1, atol=0.1)


def test_wrong_weights_raise_one_clear_line(tmp_path):
    """Property: a folder of something else is refused; no video is made with random features."""
    with pytest.raises(FileNotFoundError, match="no such folder"):
        AudioEncoder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        AudioEncoder(tmp_path)
    folder = tmp_path / "w"
    shutil.copytree(WEIGHTS, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for wrong, message in (({"encoder_layers": 6}, "lacks"), ({"d_model": 128}, "cannot load"),
                           ({"model_type": "bert"}, "it is a bert"),
                           ({"max_source_positions": 99}, "8 are needed")):
        text = json.dumps({**config, **wrong})
        (folder / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message) as error:
            AudioEncoder(folder)
        assert "\n" not in str(error.value)
    (folder / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ValueError, match="cannot load"):
        AudioEncoder(folder)


@pytest.fixture
def no_network(monkeypatch):
    """Hosts that were looked up in vain, and sleeps before another try."""
    lookups, sleeps = [], []

    def unreachable(host, *_, **__):
        lookups.append(host)
        raise socket.gaierror("no network")
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(time, "sleep", sleeps.append)
    return lookups, sleeps


def test_a_hub_name_without_a_network_fails_at_once(no_network):
    """Property: one clear line without a wait; from_pretrained would try for 40 s."""
    lookups, sleeps = no_network
    message = "cannot load an audio encoder from nobody/no-such-model: .*Connect"
    with pytest.raises(ValueError, match=message) as error:
        AudioEncoder("nobody/no-such-model")
    assert lookups and not sleeps and "\n" not in str(error.value)


def test_local_weights_need_no_network(no_network, monkeypatch, tmp_path):
    """Property: a folder asks nobody, and a hub name that was downloaded before loads offline."""
    import huggingface_hub
    lookups, _ = no_network
    here = AudioEncoder(WEIGHTS)
    assert not lookups
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached, commit = tmp_path / "models--somebody--whisper", "0" * 40
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit, encoding="utf-8")
    shutil.copytree(WEIGHTS, cached / "snapshots" / commit)
    downloaded, wave = AudioEncoder("somebody/whisper"), speech(1)
    assert torch.equal(downloaded.features(wave, 0, 9), here.features(wave, 0, 9))


def test_a_hub_name_is_downloaded(monkeypatch):
    """Property: of a hub name two files are fetched, and no pickled weights."""
    import huggingface_hub
    requests = []

    def download(name, allow_patterns):
        requests.append((name, allow_patterns))
        return str(WEIGHTS)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert AudioEncoder("somebody/whisper").layers == 3
    assert requests == [("somebody/whisper", ["config.json", "model.safetensors"])]


def test_shipped_weights_are_small(encoder):
    """Property: the small preset's encoder has at most 6.5 M parameters, of two bytes on disk."""
    assert sum(p.numel() for p in encoder.model.parameters()) <= 6.5e6
    assert (WEIGHTS / "model.safetensors").stat().st_size < 2.01 * 6.5e6


def test_config_names_the_encoder():
    """Property: "whisper" in config.json is the folder beside it; other names stay as they are."""
    weights = WEIGHTS.parent
    assert audio.encoder_path(weights, "whisper") == WEIGHTS
    assert audio.encoder_path(weights, "facebook/x") == Path("facebook/x")
    assert audio.load_audio_encoder(weights, "whisper").dim == 384

# --------------------------------------------------------------------------------------- projection


def test_a_latent_depends_on_its_frames_and_two_more_on_each_side():
    """Property: tokens of latent 0 depend on frames 0..2, of latent f on frames 4f-5..4f+2.

    Its own are frame 0 and frames 4f-3..4f; all clamped to the chunk."""
    torch.manual_seed(0)
    T, projection = 21, AudioProjection(2, 3, 16, tokens=4, hidden=8)
    features = torch.randn(1, T, 2, 3, requires_grad=True)
    first, rest = latent_windows(features)
    assert first.shape == (1, 5, 2, 3) and rest.shape == (1, 5, 8, 2, 3)
    tokens = projection(features)
    assert tokens.shape == (1, 6, 4, 16)
    for f in range(6):
        number = (tokens[0, f] * torch.randn(4, 16)).sum()
        gradient, = torch.autograd.grad(number, features, retain_graph=True)
        used = set(gradient[0].abs().sum((1, 2)).nonzero().flatten().tolist())
        own = range(4 * f - 3, 4 * f + 1) if f else [0]
        assert used == set(range(max(0, min(own) - 2), min(T, max(own) + 3)))
    with pytest.raises(ValueError, match="4F - 3"):
        latent_windows(features[:, :20])
