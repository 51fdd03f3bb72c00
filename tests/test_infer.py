"""Laws of the chunk loop and of the program around it. The networks here are random and small: a law holds for any weights."""
import importlib
import json
import re
import signal
from dataclasses import asdict, replace

import av
import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file

import infer
from audio import AudioEncoder
from dit import PRESETS as DIT
from dit import AudioDiT
from vae import PRESETS as VAE
from vae import WanVAE

RATE = 16000


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of weights as infer.py wants it, for 32 x 32 pixels."""
    torch.manual_seed(0)
    folder, heard = tmp_path_factory.mktemp("weights"), ROOT / "weights" / "tiny" / "whisper"
    encoder = AudioEncoder(heard)
    vae_config = replace(VAE["tiny"], dim=8, dim_mult=(1, 1, 2, 2))
    dit_config = replace(DIT["tiny"], dim=48, ffn_dim=64, layers=2, audio_layers=encoder.layers, audio_dim=encoder.dim, audio_hidden=32)
    dit = AudioDiT(dit_config)
    torch.nn.init.normal_(dit.head.head.weight, std=0.5)                        # Wan starts it at zero: nothing would depend on anything
    save_file(WanVAE(vae_config).state_dict(), folder / "vae.safetensors")
    save_file(dit.state_dict(), folder / "student.safetensors")
    config = {"vae": asdict(vae_config), "dit": asdict(dit_config), "audio": str(heard), "size": 32}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def models(weights):
    return infer.load(weights, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def speech(seconds, seed=0):
    t = np.arange(round(seconds * RATE)) / RATE
    return (0.3 * np.sin(2 * np.pi * (150 + 50 * np.sin(7 * t)) * t) + 0.05 * np.random.default_rng(seed).normal(size=len(t))).astype(np.float32)


@pytest.fixture
def files(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "me.png")
    soundfile.write(tmp_path / "speech.wav", speech(0.5), RATE)
    return tmp_path


def video(models, image, audio, **options):
    return np.concatenate(list(infer.generate(models, image, torch.from_numpy(audio), **options)))


@pytest.mark.parametrize("seconds", [1 / RATE, 0.04, 3.24, 3.25, 3.2401, 20.3])
def test_number_of_frames_is_ceil_of_seconds_times_25(models, image, seconds):
    """Peers drop the last piece of the recording; here every sample has its frame, whatever the length."""
    audio = speech(seconds)
    assert len(video(models, image, audio)) == int(np.ceil(len(audio) / 640))


def test_same_seed_same_bytes(models, image):
    """A video is a function of picture, sound, weights and seed."""
    audio = speech(4)
    one = video(models, image, audio)
    assert np.array_equal(one, video(models, image, audio)) and not np.array_equal(one, video(models, image, audio, seed=1))
    assert one.dtype == np.uint8 and one.shape == (100, 32, 32, 3)


def test_sound_changes_nothing_before_its_chunk(models, image):
    """What is said at second 5 (frame 125, chunk 1: frames 72-152) cannot be seen in the frames of chunk 0, 0-80."""
    audio = speech(6)
    changed = audio.copy()
    changed[5 * RATE:] = 0
    a, b = video(models, image, audio), video(models, image, changed)
    assert np.array_equal(a[:81], b[:81]) and not np.array_equal(a[81:], b[81:])


def test_the_first_frame_is_the_portrait(models, image):
    """Cold start: kappa is the first latent of z_id, so frame 0 is the VAE's picture of the portrait, for any audio and seed."""
    with torch.no_grad():
        portrait = infer.to_uint8(models.vae.decode(models.vae.encode(image.unsqueeze(2)))[0])
    assert np.abs(video(models, image, speech(0.2), seed=5)[0].astype(int) - portrait[0]).max() <= 1


def test_a_chunk_begins_with_the_end_of_the_one_before(models, image, monkeypatch):
    """The n frames that a chunk repeats are dropped; they are D(E(last n frames)), not new ones. And kappa is their encoding."""
    seen, audio = [], speech(5)
    real = infer.sample_student

    def spy(dit, noise, z_id, heard, kappa, *rest):
        z = real(dit, noise, z_id, heard, kappa, *rest)
        assert torch.equal(z[:, :, :kappa.shape[2]], kappa)                     # the head comes out of the sampler untouched
        begin = 72 * len(seen)                                                  # chunk i hears its own 81 frames, not its neighbour's
        assert torch.equal(heard[0], models.audio.features(torch.from_numpy(audio), begin, 81))
        seen.append((z, kappa))
        return z
    monkeypatch.setattr(infer, "sample_student", spy)
    frames = video(models, image, audio)
    assert [kappa.shape[2] for _, kappa in seen] == [1, 3]
    with torch.no_grad():
        first = models.vae.decode(seen[0][0])
        torch.testing.assert_close(seen[1][1], models.vae.encode(first[:, :, -9:]), atol=1e-4, rtol=1e-4)
        second = infer.to_uint8(models.vae.decode(seen[1][0])[0])
    assert np.array_equal(frames[81:125], second[9:53])


def test_handing_latents_over_is_another_video(models, image):
    """Appendix D's comparison: identical up to the first hand-over, different after it."""
    a, b = video(models, image, speech(4)), video(models, image, speech(4), handover="latents")
    assert np.array_equal(a[:81], b[:81]) and not np.array_equal(a[81:], b[81:])


def test_the_teacher_is_guided_as_asked(models, image, monkeypatch):
    """What generate() is told of guidance reaches the teacher's sampler."""
    seen = {}
    monkeypatch.setattr(infer, "sample_teacher", lambda dit, noise, *rest, **options: seen.update(options) or noise)
    video(replace(models, network="teacher"), image, speech(0.1), guidance=2.0, guidance_focus=7.0, liveliness=3.0)
    assert seen == {"guidance": 2.0, "focus": 7.0, "liveliness": 3.0}


def test_mp4_holds_frames_and_sound_of_the_same_length(weights, files):
    """The file plays: H.264 and AAC, within one frame of each other, under the name that was asked for and no other."""
    audio = speech(3.25)
    soundfile.write(files / "speech.wav", audio, RATE)
    out = files / "mein Bild ü.mp4"
    infer.main(["--image", str(files / "me.png"), "--audio", str(files / "speech.wav"), "--out", str(out), "--weights", str(weights), "--bench"])
    with av.open(str(out)) as file:
        frames = sum(1 for _ in file.decode(video=0))
        lengths = [float(s.duration * s.time_base) for s in file.streams]
        assert frames == 82 and abs(lengths[0] - lengths[1]) <= 0.04 and "ynthetic" in file.metadata["comment"]
    with av.open(str(out)) as file:                                             # ... and in step: the sound stands where it stood
        heard = np.concatenate([f.to_ndarray()[0] for f in file.decode(audio=0)])[:len(audio)]
    size = len(audio) + len(heard)
    lag = np.fft.irfft(np.fft.rfft(heard, size) * np.fft.rfft(audio[:len(heard)], size).conj(), size).argmax()
    assert min(lag, size - lag) <= 16                                           # samples: 1 ms
    assert not list(files.glob("*.part*")) and not list(files.glob(".*part*"))


def test_silence_is_allowed(weights, files):
    """A silent recording is a recording."""
    soundfile.write(files / "speech.wav", np.zeros(8000), RATE)
    infer.main(["--image", str(files / "me.png"), "--audio", str(files / "speech.wav"), "--out", str(files / "o.mp4"), "--weights", str(weights)])
    assert (files / "o.mp4").stat().st_size > 1000


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_ctrl_c_and_kill_keep_what_was_made(weights, files, monkeypatch, capsys, name):
    """Stopped in the middle by Ctrl-C or `kill`, the file holds the frames made so far and plays; nothing half-written is beside it."""
    real, count = infer.to_uint8, []

    def stop(piece):
        count.append(1)
        if len(count) == 2:
            signal.raise_signal(signal.Signals[name])
        return real(piece)

    def unhandled(*_):
        raise AssertionError("the process would be gone, and a part file left")
    signal.signal(signal.SIGTERM, unhandled)
    signal.signal(signal.SIGINT, signal.default_int_handler)                    # a suite that was started with nohup ignores it
    monkeypatch.setattr(infer, "to_uint8", stop)
    with pytest.raises(SystemExit) as stopped:
        infer.main(["--image", str(files / "me.png"), "--audio", str(files / "speech.wav"), "--out", str(files / "o.mp4"), "--weights", str(weights)])
    assert stopped.value.code == 130 and capsys.readouterr().err.splitlines()[-1].startswith("infer.py: stopped")
    assert not list(files.glob("*part*")) and not list(files.glob(".*part*"))
    with av.open(str(files / "o.mp4")) as file:
        assert sum(1 for _ in file.decode(video=0)) == 1                        # the first piece is one frame, the next would be 16


def picture(mode, path, size=(48, 64), **options):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8))
    rgb.convert(mode).save(path, **options)
    return path


def test_every_kind_of_picture(tmp_path):
    """CMYK, palette, grey, transparent and 16-bit pictures are portraits too; EXIF says which way is up."""
    for mode, name in (("CMYK", "a.jpg"), ("P", "b.png"), ("L", "c.png"), ("RGBA", "d.png"), ("LA", "e.png"), ("P", "f.gif"),
                       ("RGB", "g.webp"), ("1", "h.png")):
        x = infer.load_image(picture(mode, tmp_path / name), 32)
        assert x.shape == (1, 3, 32, 32) and x.min() >= -1 and x.max() <= 1 and x.std() > 0.05, name
    grey = np.tile(np.linspace(0, 255, 32).round(), (32, 1))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")   # 16 bits a pixel
    Image.fromarray((grey / 255).astype(np.float32)).save(tmp_path / "deep.tiff")
    for name in ("deep.png", "deep.tiff"):
        np.testing.assert_allclose(infer.load_image(tmp_path / name, 32)[0, 0].numpy(), grey / 127.5 - 1, atol=0.02)
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert (infer.load_image(tmp_path / "clear.png", 32) == 1).all()            # what is transparent is white, not black
    half = Image.new("RGB", (32, 32))
    half.paste((255, 255, 255), (0, 0, 32, 16))                                 # white above, black below
    exif = Image.Exif()
    exif[0x0112] = 3                                                            # "turned by 180 degrees"
    half.save(tmp_path / "turned.jpg", exif=exif)
    x = infer.load_image(tmp_path / "turned.jpg", 32)
    assert x[..., :14, :].mean() < -0.9 and x[..., 18:, :].mean() > 0.9


def test_bad_input_is_one_line_and_exit_code_2(weights, files, capsys, monkeypatch):
    """Whatever is wrong: one clear line, exit code 2, and nothing under the output's name."""
    (files / "text.png").write_text("not a picture", encoding="utf-8")
    (files / "text.wav").write_text("not a recording", encoding="utf-8")
    for name in ("drawing.eps", "drawing.png"):                                 # PostScript is a program, Pillow would have it run by another
        Image.new("RGB", (32, 32)).save(files / name, "EPS")
    whole = picture("RGB", files / "whole.png").read_bytes()
    (files / "cut.png").write_bytes(whole[:len(whole) // 2])
    picture("RGB", files / "dot.png", (1, 1))
    Image.new("1", (30000, 30000)).save(files / "huge.png")
    soundfile.write(files / "empty.wav", np.zeros(0), RATE)
    soundfile.write(files / "nan.wav", np.full(800, np.nan), RATE, subtype="FLOAT")
    (files / "folder.mp4").mkdir()
    for folder, part, change in (("broken", "dit", {"dim": 96}), ("stats", "vae", {"latents_std": [1.0] * 4}), ("tall", "size", 36),
                                 ("even", "frames", 32)):
        (files / folder).mkdir()
        for name in ("vae.safetensors", "student.safetensors"):
            (files / folder / name).write_bytes((weights / name).read_bytes())
        config = json.loads((weights / "config.json").read_text(encoding="utf-8"))
        config[part] = config[part] | change if isinstance(change, dict) else change
        (files / folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flag, value, says in (("image", "nobody.png", "no such"), ("image", "text.png", "not a picture"), ("image", "cut.png", "cannot be read"),
                              ("image", "drawing.eps", "not a picture"), ("image", "drawing.png", "not a picture"),
                              ("image", "dot.png", "1 x 1"), ("image", "huge.png", "scale it down"), ("image", ".", "no such"),
                              ("audio", "nothing.wav", "no such"), ("audio", "text.wav", "text.wav"), ("audio", "empty.wav", "empty.wav"),
                              ("audio", "nan.wav", "nan.wav"), ("out", "folder.mp4", "cannot write"), ("out", "no/where.mp4", "cannot write"),
                              ("weights", "nowhere", "config.json is missing"), ("weights", "broken", "do not fit"),
                              ("out", "me.png", "inputs"), ("out", "speech.wav", "inputs"), ("steps", "0", "steps"), ("seed", "-1", "seed"),
                              ("weights", "stats", "entries"), ("weights", "tall", "multiple of 16"), ("weights", "even", "4k + 1"),
                              ("device", "cuda", "no cuda"),
                              ("continuity-frames", "8", "continuity"), ("continuity-frames", "81", "continuity"),
                              ("guidance-focus", "-1", "guidance_focus"), ("liveliness", "nan", "liveliness")):
        options = {"image": files / "me.png", "audio": files / "speech.wav", "out": files / "o.mp4", "weights": weights}
        options[flag] = files / value if flag in ("image", "audio", "out", "weights") else value
        with pytest.raises(SystemExit) as stopped:
            infer.main([x for k, v in options.items() for x in (f"--{k}", str(v))])
        error = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2 and says in error[-1], (flag, value, error)
        assert not any("Traceback" in line for line in error) and not (files / "o.mp4").exists() and not list(files.glob(".*part*"))
    assert (files / "me.png").read_bytes()[:4] == b"\x89PNG"                    # no input was written over


@pytest.mark.parametrize("command", ["infer", "train_audio", "swap_ears", "puppet", "data cache", "data prepare", "train_vae", "train_teacher",
                                     "distill_student", "evaluate", "evaluate train-proxies"])
def test_help_says_what_every_flag_does(command, capsys, monkeypatch):
    """`--help` is the manual of somebody who has read nothing else: every flag has words of its own, none a "(default: None)"."""
    monkeypatch.setenv("COLUMNS", "500")
    script, *words = command.split()
    with pytest.raises(SystemExit):
        importlib.import_module(script).main([*words, "--help"])
    text = re.sub(r"\n {10,}", "   ", capsys.readouterr().out)                  # a long flag's words stand on the next line
    flags = re.findall(r"^  (-\S+|[a-z]+)(.*)", text, re.M)
    for flag, words in flags:
        assert len(re.split(r" {2,}|\(default", words)[1:2][0].split()) > 1, f"{flag} says nothing"
    assert len(flags) > 4 and "None" not in text
