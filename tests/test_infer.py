"""Properties of the chunk loop and of the program around it.

The networks are random and small, the weights folder is the paper's kind (no "tiny" block, a
Wav2Vec2): each property holds for any weights."""
import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import av
import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

import common
import infer
from data import HOP, SAMPLE_RATE, to_uint8
from dit import AudioDiT, DiTConfig, classifier_free_guidance, student_sigmas
from vae import VAEConfig, WanVAE

DIT = DiTConfig(dim=48, ffn_dim=64, heads=4, layers=2, channels=24, audio_layers=2, audio_dim=16,
                audio_tokens=8, audio_hidden=32)
VAE = VAEConfig(dim=8, z_dim=24, dim_mult=(1, 1, 2, 2), num_res_blocks=1,
                latents_mean=(0.0,) * 24, latents_std=(1.0,) * 24)
CONFIG = {"size": 32, "frames": 81, "continuity_frames": 9, "identity": "tre", "audio": "wav2vec2",
          "vae": asdict(VAE), "dit": asdict(DIT), "student": {"steps": 4, "timestep_shift": 5.0},
          "teacher": {"steps": 10, "timestep_shift": 5.0, "guidance": 4.0}}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of weights as infer.py needs it, for 32 x 32 pixels."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
    Wav2Vec2Model(config).save_pretrained(folder / "wav2vec2")
    dit = AudioDiT(DIT)
    torch.nn.init.normal_(dit.head.head.weight, std=0.5)    # zeros: no input would have an effect
    save_file(WanVAE(VAE).state_dict(), folder / "vae.safetensors")
    for network in ("student", "teacher"):
        save_file(dit.state_dict(), folder / f"{network}.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def models(weights):
    return infer.load(weights, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def speech(seconds, seed=0):
    """A tone of changing pitch with some noise, float32 (samples,)"""
    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    tone = 0.3 * np.sin(2 * np.pi * (150 + 50 * np.sin(7 * t)) * t)
    noise = 0.05 * np.random.default_rng(seed).normal(size=len(t))
    return (tone + noise).astype(np.float32)


@pytest.fixture
def files(tmp_path):
    """A folder with a picture and half a second of sound."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "me.png")
    soundfile.write(tmp_path / "speech.wav", speech(0.5), SAMPLE_RATE)
    return tmp_path


def variant(weights, folder, change):
    """A copy of a weights folder in which change(config) has edited config.json."""
    shutil.copytree(weights, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(config)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def video(models, image, audio, **options):
    """All frames of generate(), uint8 (T, H, W, 3)"""
    return np.concatenate(list(infer.generate(models, image, torch.from_numpy(audio), **options)))


def command(files, weights, *more):
    """Arguments of the program"""
    return ["--image", str(files / "me.png"), "--audio", str(files / "speech.wav"),
            "--out", str(files / "o.mp4"), "--weights", str(weights), "--crop", "none",
            *map(str, more)]


def part_files(folder):
    return list(folder.glob("*.part*")) + list(folder.glob(".*part*"))

# --------------------------------------------------------------------------------------------- loop


@pytest.mark.parametrize("seconds", [1 / SAMPLE_RATE, 0.04, 3.24, 3.25, 3.2401, 20.3])
def test_number_of_frames_is_ceil_of_seconds_times_25(models, image, seconds):
    """Property: every sample has its frame, whatever the length.

    Other programs drop the last piece of the recording."""
    audio = speech(seconds)
    assert len(video(models, image, audio)) == math.ceil(len(audio) / HOP)


def test_same_seed_same_bytes(models, image):
    """Property: a video is a function of picture, sound, weights and seed."""
    audio = speech(4)
    one = video(models, image, audio)
    assert one.dtype == np.uint8 and one.shape == (100, 32, 32, 3)
    assert np.array_equal(one, video(models, image, audio))
    assert not np.array_equal(one, video(models, image, audio, seed=1))


def test_audio_changes_nothing_before_its_chunk(models, image):
    """Property: a frame depends on no audio after its chunk.

    Second 5 is frame 125, in chunk 1 (frames 72 to 152): frames 0 to 80 of chunk 0 stay."""
    audio = speech(6)
    changed = audio.copy()
    changed[5 * SAMPLE_RATE:] = 0
    a = video(models, image, audio)
    b = video(models, image, changed)
    assert np.array_equal(a[:81], b[:81]) and not np.array_equal(a[81:], b[81:])


def test_the_first_frame_is_the_portrait(models, image):
    """Property: kappa of the first chunk is the first latent of z_id.

    So frame 0 is the VAE's picture of the portrait, for any audio and seed."""
    with torch.no_grad():
        portrait = to_uint8(models.vae.decode(models.vae.encode(image.unsqueeze(2)))[0])
    first = video(models, image, speech(0.2), seed=5)[0]
    assert np.abs(first.astype(int) - portrait[0]).max() <= 1


def test_a_chunk_begins_with_the_end_of_the_one_before(models, image, monkeypatch):
    """Property: a later chunk's kappa is E(last n frames of the chunk before).

    The n frames that it repeats are dropped: they are D(E(last n frames)), not new ones."""
    audio = speech(5)
    chunks = []
    real = infer.sample_student

    def spy(dit, noise, z_id, features, kappa, *rest):
        z = real(dit, noise, z_id, features, kappa, *rest)
        assert torch.equal(z[:, :, :kappa.shape[2]], kappa)     # the sampler leaves kappa as it is
        begin = 72 * len(chunks)                                # audio of its own 81 frames
        own = models.audio.features(torch.from_numpy(audio), begin, 81)
        assert torch.equal(features[0], own)
        chunks.append((z, kappa))
        return z
    monkeypatch.setattr(infer, "sample_student", spy)
    frames = video(models, image, audio)
    assert [kappa.shape[2] for _, kappa in chunks] == [1, 3]
    with torch.no_grad():
        first = models.vae.decode(chunks[0][0])
        kappa = models.vae.encode(first[:, :, -9:])
        second = to_uint8(models.vae.decode(chunks[1][0])[0])
    torch.testing.assert_close(chunks[1][1], kappa, atol=1e-4, rtol=1e-4)
    assert np.array_equal(frames[81:125], second[9:53])


def test_continuity_mode_latents_is_another_video(models, image, monkeypatch):
    """Property: the comparison of Appendix D takes the last latents of a chunk as they are.

    The videos are equal up to the first hand-over and different after it."""
    chunks = []
    real = infer.sample_student

    def spy(dit, noise, z_id, features, kappa, *rest):
        chunks.append((kappa, real(dit, noise, z_id, features, kappa, *rest)))
        return chunks[-1][1]
    monkeypatch.setattr(infer, "sample_student", spy)
    a = video(models, image, speech(4))
    b = video(models, image, speech(4), continuity_mode="latents")
    assert np.array_equal(a[:81], b[:81]) and not np.array_equal(a[81:], b[81:])
    assert torch.equal(chunks[3][0], chunks[2][1][:, :, -3:])


def test_live_frames_are_those_of_the_whole_recording(models, image):
    """Property: sound that comes block by block makes the same frames, each chunk as soon as the
    sound of its own 81 frames is there, and not before."""
    audio = speech(4.01)
    taken = []

    def microphone():
        for begin in range(0, len(audio), 1000):
            taken.append(begin + 1000)
            yield audio[begin:begin + 1000]
    pieces, when = [], []
    for frames in infer.generate(models, image, microphone()):
        pieces.append(frames)
        when.append(taken[-1])
    assert np.array_equal(np.concatenate(pieces), video(models, image, audio))
    assert 81 * HOP <= when[0] < 81 * HOP + 1000 and max(when) >= len(audio)
    assert not list(infer.generate(models, image, iter([])))    # nobody spoke


def test_the_clock_counts_every_stage_and_changes_nothing(models, image):
    """Property: five stages are timed, and timing is not part of the method."""
    clock = common.Stopwatch()
    timed = video(models, image, speech(4), clock=clock)
    assert set(clock) == {"identity", "audio", "dit", "decode", "re-encode"}
    assert min(clock.values()) > 0
    assert np.array_equal(timed, video(models, image, speech(4)))


def test_a_nan_ends_the_video(models, image, monkeypatch):
    """Property: broken weights make an error, not a black video."""
    monkeypatch.setattr(infer, "sample_student", lambda dit, noise, *rest: noise * math.nan)
    with pytest.raises(ValueError, match="NaN"):
        video(models, image, speech(0.1))

# --------------------------------------------------------------------------- what the weights say


def calls(monkeypatch):
    """-> a list that records each sampler call as (student or teacher, kappa, *the rest)"""
    seen = []
    for name in ("student", "teacher"):
        def record(dit, noise, z_id, features, kappa, *rest, name=name):
            seen.append((name, kappa, *rest))
            return noise
        monkeypatch.setattr(infer, f"sample_{name}", record)
    return seen


def test_the_folder_says_how_to_use_it(weights, image, tmp_path, monkeypatch):
    """Property: n, T, steps, timestep shift, guidance and size come from config.json.

    infer.py has no defaults of its own: another number in the folder is another video."""
    def change(config):
        config["continuity_frames"] = 5
        config["frames"] = 33
        config["size"] = 48
        config["student"] = {"steps": 3, "timestep_shift": 2.0}
        config["teacher"] = {"steps": 7, "timestep_shift": 4.0, "guidance": 1.5}
    folder = variant(weights, tmp_path / "other", change)
    student = infer.load(folder, "student", "cpu", "float32")
    teacher = infer.load(folder, "teacher", "cpu", "float32")
    seen = calls(monkeypatch)
    image = torch.zeros(1, 3, student.size, student.size)
    assert video(student, image, speech(1.4)).shape == (35, 48, 48, 3)
    video(teacher, image, speech(0.1))
    kappas = [kappa.shape[2] for _, kappa, *_ in seen]
    assert kappas == [1, 2, 1]                                  # 5 frames are 2 latents
    assert seen[0][2] == seen[1][2] == student_sigmas(3, 2.0)
    assert seen[2][2:] == (7, 4.0, 1.5, classifier_free_guidance)


def test_options_override_the_folder(weights, models, image, monkeypatch):
    """Property: steps and guidance of generate() go to the sampler in place of the folder's."""
    teacher = infer.load(weights, "teacher", "cpu", "float32")
    seen = calls(monkeypatch)
    video(models, image, speech(0.1), steps=2)
    video(teacher, image, speech(0.1), steps=3, guidance=2.0)
    video(replace(teacher, guide=max), image, speech(0.1))
    assert seen[0][2] == student_sigmas(2, 5.0)
    assert seen[1][2:] == (3, 5.0, 2.0, classifier_free_guidance)
    assert seen[2][2:] == (10, 5.0, 4.0, max)


def test_the_identity_reference_is_the_one_of_training(weights, image, tmp_path, monkeypatch):
    """Property: "identity" in config.json chooses z_id: Eq. 3, or Eq. 29, constant in time."""
    def change(config):
        config["identity"] = "etr"
    folder = variant(weights, tmp_path / "etr", change)
    constant = []

    def record(dit, noise, z_id, *rest):
        constant.append(torch.equal(z_id[:, :, :1].expand_as(z_id), z_id))
        return noise
    monkeypatch.setattr(infer, "sample_student", record)
    for source in (weights, folder):
        video(infer.load(source, "student", "cpu", "float32"), image, speech(0.1))
    assert constant == [False, True]


def test_a_folder_without_a_tiny_block_needs_no_room(weights):
    """Property: the paper's weights run on the ground floor alone; nothing of tiny/ is imported."""
    code = ("import sys, numpy, torch, infer\n"
            f"models = infer.load({str(weights)!r}, device='cpu', dtype='float32')\n"
            "sound = numpy.zeros(640, numpy.float32)\n"
            "print(len(list(infer.generate(models, torch.zeros(1, 3, 32, 32), sound))))\n"
            "print([name for name in sys.modules if name.split('.')[0] == 'tiny'])")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.split("\n")[:2] == ["1", "[]"], run.stderr


def test_a_tiny_block_changes_network_and_guidance(weights, tmp_path, image):
    """Property: with a "tiny" block the same tensors make another network and another guide."""
    def change(config):
        config["tiny"] = {"edm_skip": 0.15, "guidance_sharpness": 16.0, "motion_guidance": 1.4}
    folder = variant(weights, tmp_path / "tiny", change)
    paper = infer.load(weights, "teacher", "cpu", "float32")
    tiny = infer.load(folder, "teacher", "cpu", "float32")
    assert type(paper.dit) is AudioDiT and paper.guide is classifier_free_guidance
    assert type(tiny.dit).__name__ == "TinyDiT" and tiny.dit.edm_skip == 0.15
    z = torch.randn(1, 24, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    given = z, torch.tensor([500.0]), z, torch.zeros(1, 9, 2, 16)
    assert not torch.equal(paper.dit(*given), tiny.dit(*given))
    v = torch.randn(2, *z.shape, generator=torch.Generator().manual_seed(1))
    context = {"x": z, "sigma": 0.9, "identity": z, "loss_mask": torch.ones(1, 1, 3, 1, 1)}
    expected = infer.load(folder, "teacher", "cpu", "float32").guide(*v, 4.0, **context)
    assert torch.equal(tiny.guide(*v, 4.0, **context), expected)
    assert not torch.equal(paper.guide(*v, 4.0, **context), expected)


def test_loading_keeps_time_path_and_encoder_in_float32(weights):
    """Property: bfloat16 is for matrices and decoder only.

    A rounded encoder would round every kappa, and the video would drift."""
    models = infer.load(weights, device="cpu", dtype="bfloat16")
    assert models.dit.blocks[0].ffn[0].weight.dtype == torch.bfloat16
    assert models.vae.decoder.conv1.weight.dtype == torch.bfloat16
    assert models.dit.time_embedding[0].weight.dtype == torch.float32
    assert {p.dtype for p in models.vae.encoder.parameters()} == {torch.float32}

# ------------------------------------------------------------------------------------------ program


def test_mp4_holds_frames_and_sound_of_the_same_length(weights, files, capsys):
    """Property: the file plays: H.264 and AAC, within one frame of each other and in step.

    Its sound has the channels of the recording. It stands under the name that was asked for, with
    nothing beside it."""
    audio = speech(3.25)
    soundfile.write(files / "speech.wav", np.stack([audio, audio], 1), SAMPLE_RATE)
    out = files / "mein Bild ü.mp4"
    infer.main(command(files, weights, "--out", out, "--bench", "--preview", files / "begin.webp"))
    with Image.open(files / "begin.webp") as preview:
        assert preview.n_frames == 41 and preview.size == (32, 32)  # every second one
    with av.open(str(out)) as file:
        frames = sum(1 for _ in file.decode(video=0))
        lengths = [float(s.duration * s.time_base) for s in file.streams]
        assert frames == 82 and abs(lengths[0] - lengths[1]) <= 0.04
        assert "ynthetic" in file.metadata["comment"] and file.streams.audio[0].channels == 2
    with av.open(str(out)) as file:
        decoded = np.concatenate([f.to_ndarray()[0] for f in file.decode(audio=0)])[:len(audio)]
    size = len(audio) + len(decoded)
    product = np.fft.rfft(decoded, size) * np.fft.rfft(audio[:len(decoded)], size).conj()
    lag = np.fft.irfft(product, size).argmax()
    assert min(lag, size - lag) <= 16                           # samples: 1 ms
    assert not part_files(files)
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert printed["frames"] == "82" and printed["seconds"] == "3.28"
    for stage in ("identity", "audio", "dit", "decode", "re-encode", "write"):
        assert 0 <= float(printed[f"{stage}_share"]) <= 1
    for name in ("frames_per_second", "load_seconds", "first_frame_seconds", "peak_memory"):
        assert name in printed


def test_silence_is_allowed(weights, files):
    """Property: a silent recording is a recording."""
    soundfile.write(files / "speech.wav", np.zeros(8000), SAMPLE_RATE)
    infer.main(command(files, weights))
    assert (files / "o.mp4").stat().st_size > 1000


def test_each_photo_with_each_recording(weights, files, capsys, monkeypatch):
    """Property: folders and lists of inputs make one video a pair, in a new folder; a video is a
    recording, too. Each file is read once; a bad one is one counted line, and exit code 2."""
    for folder in ("photos", "sounds"):
        (files / folder).mkdir()
    for name in "ab":
        shutil.copy(files / "me.png", files / "photos" / f"{name}.png")
    for name in ("one.wav", "one.flac"):
        soundfile.write(files / "sounds" / name, speech(0.2), SAMPLE_RATE)
    for bad in ("photos/bad.png", "sounds/bad.wav", "sounds/unknown.xyz"):
        (files / bad).write_text("neither", encoding="utf-8")
    frames = np.zeros((10, 32, 32, 3), np.uint8)
    common.write_mp4(files / "two.mp4", frames, np.int16(speech(0.4) * 32767))
    inputs = ["--image", files / "photos", "--audio", files / "sounds", files / "two.mp4"]
    made, never, read = files / "v1.0", files / "never", []
    for name in ("read_picture", "load_audio"):
        real = getattr(infer, name)
        monkeypatch.setattr(infer, name, lambda path, real=real: read.append(path) or real(path))
    with pytest.raises(SystemExit) as ended:
        infer.main(command(files, weights, *inputs, "--out", made))
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out.count("video: ") == 6
    note, photo, sound, end = [line for line in printed.err.splitlines() if "sk" in line
                               or "note" in line]
    assert note.endswith("sounds: .xyz 1") and end == "infer.py: 2 skipped, see above"
    assert photo.startswith("skipped 1: ") and "bad.png" in photo
    assert sound.startswith("skipped 2: ") and "bad.wav" in sound
    assert len(read) == len(set(read)) == 7
    lengths = {}
    for path in made.iterdir():
        with av.open(str(path)) as file:
            lengths[path.name] = sum(1 for _ in file.decode(video=0))
    for name in "ab":                           # one.wav and one.flac: the ending is in the name
        assert lengths.pop(f"{name}-one.wav.mp4") == lengths.pop(f"{name}-one.flac.mp4") == 5
        assert lengths.pop(f"{name}-two.mp4") in (10, 11, 12)       # AAC comes in blocks of 64 ms
    assert not lengths
    (files / "sounds" / "unknown.xyz").unlink()                     # its note is another line
    (files / "empty").mkdir()
    for wrong, words in ((["--out", files / "o.mp4"], "--out DIR"),
                         (["--audio", files / "empty"], "no recording"),
                         (["--preview", files / "p.webp"], "of one video, not of 12"),
                         (["--weights", files / "empty"], "config.json is missing"),
                         (["--audio", *[files / "two.mp4"] * 2], "two")):
        wrong = wrong if "--out" in wrong else [*wrong, "--out", never]
        assert words in refuse(command(files, weights, *inputs, *wrong), capsys)
    assert not never.exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_ctrl_c_and_kill_keep_what_was_made(weights, files, monkeypatch, capsys, name):
    """Property: a stopped run leaves a file that plays, with the frames made so far.

    Nothing half-written is beside it."""
    real = infer.to_uint8
    pieces = []

    def stop(piece):
        pieces.append(piece)
        if len(pieces) == 2:
            signal.raise_signal(signal.Signals[name])
        return real(piece)

    def unhandled(*_):
        raise AssertionError("the process would be gone, and a part file left")
    signal.signal(signal.SIGTERM, unhandled)
    signal.signal(signal.SIGHUP, unhandled)
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a suite under nohup ignores it
    monkeypatch.setattr(infer, "to_uint8", stop)
    with pytest.raises(SystemExit) as stopped:
        infer.main(command(files, weights))
    assert stopped.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("infer.py: stopped")
    assert not part_files(files)
    with av.open(str(files / "o.mp4")) as file:
        assert sum(1 for _ in file.decode(video=0)) == 1        # pieces are of 1 frame, then 16


def test_an_error_leaves_no_file(weights, files, monkeypatch, capsys):
    """Property: a video that cannot be finished is not kept; only a user who stops it keeps it."""
    pieces = []

    def fail(piece):
        pieces.append(piece)
        if len(pieces) == 2:
            raise ValueError("broken")
        return to_uint8(piece)
    monkeypatch.setattr(infer, "to_uint8", fail)
    with pytest.raises(SystemExit) as stopped:
        infer.main(command(files, weights))
    assert stopped.value.code == 2 and capsys.readouterr().err.endswith("infer.py: broken\n")
    assert not part_files(files) and not (files / "o.mp4").exists()


def test_notes_are_one_line_each(weights, files, capsys, monkeypatch):
    """Property: other steps than the student's, or an untrained network, is a note and no error."""
    seen = calls(monkeypatch)
    tensors = load_file(weights / "student.safetensors")
    folder = variant(weights, files / "untrained", lambda config: None)
    save_file(tensors, folder / "student.safetensors", {"trained": "no"})
    notes = {}
    for name, arguments in (("plain", [weights]), ("same", [weights, "--steps", 4]),
                            ("other", [weights, "--steps", 2]), ("untrained", [folder]),
                            ("teacher", [weights, "--network", "teacher", "--steps", 2])):
        infer.main(command(files, *arguments))
        error = capsys.readouterr().err.splitlines()
        notes[name] = [line for line in error if line.startswith("note: ")]
    assert notes["plain"] == notes["same"] == notes["teacher"] == []
    assert len(notes["other"]) == 1 and "4 steps" in notes["other"][0]
    assert len(notes["untrained"]) == 1 and "untrained" in notes["untrained"][0]
    assert len(seen[2][2]) == 2                                 # the flag is followed


def test_help_says_where_a_default_comes_from(capsys):
    """Property: no flag of infer.py is a "(default: None)": such a default is the weights'."""
    with pytest.raises(SystemExit):
        infer.main(["--help"])
    text = capsys.readouterr().out
    assert "None" not in text and text.count("(default: as in the weights)") == 2


def refuse(arguments, capsys):
    """Run the program on bad input -> the one line that it prints."""
    with pytest.raises(SystemExit) as stopped:
        infer.main(arguments)
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and not any("Traceback" in line for line in error)
    assert len(error) == 1 and error[0].startswith("infer.py: "), error
    return error[0]


BAD_FLAGS = [
    ("image", "nobody.png", "no such"), ("image", "text.png", "not a picture"),
    ("image", "cut.png", "cannot be read"), ("image", "drawing.eps", "not a picture"),
    ("image", "drawing.png", "not a picture"), ("image", "dot.png", "1 x 1"),
    ("image", "huge.png", "scale it down"), ("image", ".", "--out DIR"),
    ("audio", "nothing.wav", "no such"), ("audio", "text.wav", "text.wav"),
    ("audio", "empty.wav", "empty.wav"), ("audio", "nan.wav", "nan.wav"),
    ("out", "folder.mp4", "cannot write"), ("out", "no/where.mp4", "cannot write"),
    ("out", "o.avi", "ends in .mp4"), ("out", "n" * 252 + ".mp4", "name too long"),
    ("out", "me.png", "inputs"), ("out", "speech.wav", "inputs"),
    ("preview", "p.gif", "ends in .webp"), ("preview", "no/where.webp", "cannot write"),
    ("preview", "me.png", "inputs"), ("crop", "face", "me.png: there is no face in it"),
    ("weights", "nowhere", "config.json is missing"),
    ("steps", "0", "steps"), ("seed", "-1", "seed"), ("device", "cuda", "no cuda"),
    ("guidance", "2", "the student takes no --guidance")]


def test_bad_input_is_one_line_and_exit_code_2(weights, files, capsys, monkeypatch):
    """Property: whatever is wrong, there is one clear line, exit code 2, and no output file."""
    (files / "text.png").write_text("not a picture", encoding="utf-8")
    (files / "text.wav").write_text("not a recording", encoding="utf-8")
    for name in ("drawing.eps", "drawing.png"):         # PostScript: Pillow would start a program
        Image.new("RGB", (32, 32)).save(files / name, "EPS")
    picture = (files / "me.png").read_bytes()
    (files / "cut.png").write_bytes(picture[:len(picture) // 2])
    Image.new("RGB", (1, 1)).save(files / "dot.png")
    Image.new("1", (30000, 30000)).save(files / "huge.png")
    soundfile.write(files / "empty.wav", np.zeros(0), SAMPLE_RATE)
    soundfile.write(files / "nan.wav", np.full(800, np.nan), SAMPLE_RATE, subtype="FLOAT")
    (files / "folder.mp4").mkdir()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loaded, load = [], infer.load
    monkeypatch.setattr(infer, "load", lambda *args: loaded.append(args) or load(*args))
    for flag, value, expected in BAD_FLAGS:
        is_path = flag in ("image", "audio", "out", "preview", "weights")
        value = files / value if is_path else value
        line = refuse(command(files, weights, f"--{flag}", value), capsys)
        assert expected in line, (flag, value, line)
        assert not (files / "o.mp4").exists() and not part_files(files)
        assert not loaded or flag in ("steps", "seed", "device", "guidance")    # else known before
    assert (files / "me.png").read_bytes() == picture           # no input was written over


def test_weights_that_do_not_fit_together_are_one_line(weights, files, capsys):
    """Property: a folder whose parts contradict each other is refused before any frame is made."""
    changes = {
        "dit": ({"dim": 96}, "do not fit"), "vae": ({"latents_std": [1.0] * 4}, "entries"),
        "size": (36, "multiple of 16"), "frames": (32, "4k + 1"), "identity": ("id", "tre or etr"),
        "continuity_frames": (81, "fewer than frames"), "audio": ("nowhere", "no such folder"),
        "student": ({"steps": 0}, "steps must be 1"), "tiny": ({"edm_skip": 0}, "sharpness"),
        "teacher": ({"timestep_shift": 0.5}, "timestep_shift must be 1")}
    for key, (value, expected) in changes.items():
        def change(config, key=key, value=value):
            is_block = isinstance(value, dict)
            config[key] = config.get(key, {}) | value if is_block else value
        folder = variant(weights, files / f"broken-{key}", change)
        network = "teacher" if key == "teacher" else "student"
        line = refuse(command(files, folder, "--network", network), capsys)
        assert expected in line and not (files / "o.mp4").exists(), line
    folder = variant(weights, files / "even", lambda config: config.update(continuity_frames=8))
    assert "4k + 1" in refuse(command(files, folder), capsys)


def test_parts_of_other_networks_are_one_line(weights, files, capsys):
    """Property: the network must read what VAE and audio encoder make; no tensor need be wrong."""
    for key, value in (("audio_layers", 3), ("audio_dim", 24), ("channels", 16)):
        config = replace(DIT, **{key: value})

        def change(old, config=config):
            old["dit"] = asdict(config)
        folder = variant(weights, files / key, change)
        save_file(AudioDiT(config).state_dict(), folder / "student.safetensors")
        line = refuse(command(files, folder), capsys)
        assert "do not fit" in line and str(value) in line


@pytest.mark.parametrize("key", ["size", "frames", "continuity_frames", "identity", "audio", "vae",
                                 "dit", "student", "student.steps", "student.timestep_shift",
                                 "teacher.guidance"])
def test_a_missing_key_is_named(weights, tmp_path, key):
    """Property: config.json must hold all that inference needs; the error names what is missing."""
    *block, name = key.split(".")
    network = "teacher" if "teacher" in block else "student"

    def change(config):
        for part in block:
            config = config[part]
        del config[name]
    folder = variant(weights, tmp_path / "less", change)
    words = "no usable VAE.*" if name == "vae" else "config.json has no "
    with pytest.raises(ValueError, match=f"{words}'{name}'") as error:
        infer.load(folder, network, "cpu", "float32")
    assert "\n" not in str(error.value)
