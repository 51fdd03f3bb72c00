"""Properties of the plumbing that all programs share: files, devices, flags, errors, pictures.

What a resumed training run needs of it is in test_train_teacher.py."""
import errno
import importlib
import json
import os
import re
import signal
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image, ImageCms
from safetensors import safe_open

import common
from media import HOP, SAMPLE_RATE, read_video, sound_blocks

# -------------------------------------------------------------------------------------------- files


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    """Property: a write that fails leaves the old file whole, and nothing beside it."""
    path = tmp_path / "folder" / "a.txt"
    common.write_aside(path, lambda part: part.write_text("old"))

    def full_disk(part):
        part.write_text("half")
        raise OSError("no space left")
    with pytest.raises(OSError, match="a.txt was not written: no space left"):
        common.write_aside(path, full_disk)
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
    common.write_aside(path, lambda part: part.write_text("new"))
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


def test_a_full_disk_costs_one_picture_not_the_run(tmp_path, capsys):
    """Property: a sample picture or a log line that cannot be written is a warning."""
    (tmp_path / "file").write_text("not a folder")
    common.save_image(tmp_path / "file" / "sample.png", Image.new("RGB", (2, 2)))
    common.log(tmp_path / "file" / "log.jsonl", {"step": 1})
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and all(line.startswith("warning: ") for line in warnings)
    common.save_image(tmp_path / "sample.png", Image.new("RGB", (2, 2)))
    with Image.open(tmp_path / "sample.png") as image:
        assert image.size == (2, 2)


def test_only_the_first_process_writes_tensors(tmp_path):
    """Property: {} is what other processes than the first have; it makes no file."""
    common.write_safetensors(tmp_path / "none.safetensors", {}, {})
    assert not list(tmp_path.iterdir())
    tensors = common.full_state({"a": torch.ones(2, 3).T}, torch.float16)
    common.write_safetensors(tmp_path / "one.safetensors", tensors, {"step": "5"})
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        assert file.metadata() == {"step": "5"}
        assert torch.equal(file.get_tensor("a"), torch.ones(3, 2, dtype=torch.float16))


def test_a_resumed_log_has_every_step_once(tmp_path):
    """Property: lines of steps that will run again go, and so does a line cut short by a kill."""
    path = tmp_path / "log.jsonl"
    for step in range(4):
        common.log(path, {"step": step})
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    common.trim_log(path, 3)
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [0, 1, 2]
    common.trim_log(path, 0)
    assert path.read_text() == ""

# ------------------------------------------------------------------------------------------ devices


def test_bfloat16_only_where_it_is_fast(monkeypatch):
    """Property: "auto" is float32 on a CPU without bfloat16 units: there it is 10 x faster."""
    units = {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
    assert common.select_device("cpu") == ("cpu", torch.float32)
    assert not torch.is_autocast_enabled("cpu")
    with common.bf16_autocast("cpu"):
        assert not torch.is_autocast_enabled("cpu")
    units["amx_bf16"] = True
    assert common.select_device("cpu") == ("cpu", torch.bfloat16)
    with common.bf16_autocast("cpu"):
        assert torch.is_autocast_enabled("cpu")
    with common.bf16_autocast("cpu", wanted=False):
        assert not torch.is_autocast_enabled("cpu")
    assert common.select_device("cpu", "float32") == ("cpu", torch.float32)


def test_auto_is_the_best_device_that_is_here(monkeypatch):
    """Property: cuda before mps before cpu; asking for one that is not here is an error."""
    here = {"cuda": True, "mps": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here["cuda"])
    monkeypatch.setattr(torch.mps, "is_available", lambda: here["mps"], raising=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: here["mps"])
    assert common.select_device() == ("cuda", torch.bfloat16)
    here["cuda"] = False
    assert common.select_device() == ("mps", torch.float32)
    here["mps"] = False
    assert common.select_device("auto", "float32") == ("cpu", torch.float32)
    for device in ("cuda", "mps"):
        with pytest.raises(ValueError, match=f"no {device} device"):
            common.select_device(device)


def test_a_stopwatch_adds_up_by_stage():
    """Property: seconds of a stage are a sum over its blocks; a function can be wrapped, too."""
    clock = common.Stopwatch()
    for _ in range(2):
        with clock("a"):
            pass
    first = clock["a"]
    double = clock("b")(lambda x: 2 * x)
    assert double(2) == 4 and double(3) == 6
    assert first > 0 and clock["b"] > 0 and set(clock) == {"a", "b"} and clock["a"] == first


def test_peak_memory_is_in_words():
    """Property: keeping freed memory can be asked for twice; the peak is a number with its unit."""
    common.keep_freed_memory()
    common.keep_freed_memory()
    assert re.fullmatch(r"\d+ MiB|unknown", common.peak_memory())

# -------------------------------------------------------------------------------------------- a run


def test_the_learning_rate_rises_stays_and_falls():
    """Property: linear warm-up from 1 / warmup, level at 1, linear decay to 0 at the last step."""
    cfg = SimpleNamespace(steps=100, warmup=10, decay=0.5)
    factors = [common.learning_rate_factor(step, cfg) for step in range(101)]
    assert factors[0] == 0.1 and factors[9:51] == [1] * 42 and factors[100] == 0
    assert factors[75] == pytest.approx(0.5)
    no_decay = [common.learning_rate_factor(step, SimpleNamespace(steps=100, warmup=1, decay=0))
                for step in range(100)]
    assert no_decay == [1] * 100


def test_ema_weights_swap_in_and_out():
    """Property: swapping twice gives both sets of weights back, bit for bit."""
    model = torch.nn.Linear(3, 3)
    own = {k: p.detach().clone() for k, p in model.named_parameters()}
    ema = {k: torch.randn_like(p) for k, p in own.items()}
    average = {k: p.clone() for k, p in ema.items()}
    common.swap_ema(model, ema)
    assert all(torch.equal(p, average[k]) for k, p in model.named_parameters())
    common.swap_ema(model, ema)
    assert all(torch.equal(p, own[k]) for k, p in model.named_parameters())
    assert all(torch.equal(ema[k], average[k]) for k in ema)


def test_one_process_needs_no_group():
    """Property: without torchrun, averages over processes are the numbers themselves."""
    assert common.init_distributed("cpu") == (0, 1)
    assert common.all_reduce_mean([torch.tensor(1.5), torch.tensor(2.0)]) == [1.5, 2.0]
    model = torch.nn.Linear(2, 2)
    assert common.shard(model, "cpu", 1) is model


def folder_of(run, resume=False, overwrite=False):
    return common.run_folder(SimpleNamespace(run_dir=run, resume=resume, overwrite=overwrite))


def test_a_forgotten_flag_costs_no_run(tmp_path):
    """Property: a folder that holds a run is refused, continued or replaced: the user says which.

    A run that made nothing leaves no folder."""
    run = tmp_path / "runs" / "a"
    with pytest.raises(ValueError, match="typing error"), folder_of(run):
        raise ValueError("typing error")
    assert not list(tmp_path.iterdir())
    with folder_of(run):
        common.log(run / "log.jsonl", {"step": 0})
        (run / "checkpoint.safetensors").write_bytes(b"hours of work")
    with pytest.raises(ValueError, match="holds a run .*--resume .*--overwrite"), folder_of(run):
        raise AssertionError
    with folder_of(run, resume=True):
        assert (run / "checkpoint.safetensors").read_bytes() == b"hours of work"
    with pytest.raises(ValueError, match="not both"), folder_of(run, True, True):
        raise AssertionError
    with folder_of(run, overwrite=True):
        assert not list(run.iterdir())


@pytest.mark.skipif(common.fcntl is None, reason="no locks on Windows")
def test_two_programs_do_not_share_a_run(tmp_path, monkeypatch, capsys):
    """Property: the second is refused while the first runs, and welcome after it, even a killed one
    (the lock is the system's, not a file that stays behind). Where there are no locks, as on some
    network file systems, a line says so, and the run goes on."""
    with folder_of(tmp_path):
        with pytest.raises(ValueError, match="another process"), folder_of(tmp_path, resume=True):
            raise AssertionError
    with folder_of(tmp_path, resume=True):
        assert not list(tmp_path.iterdir())

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(common.fcntl, "flock", no_locks)
    with folder_of(tmp_path, resume=True):
        assert "cannot be locked" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_umask_decides_who_may_read(tmp_path):
    """Property: colleagues can read weights, checkpoints and logs where the system allows it."""
    before = os.umask(0o027)
    try:
        common.write_safetensors(tmp_path / "a.safetensors", {"a": torch.ones(1)}, {})
        common.write_json(tmp_path / "a.json", {})
        writer = common.VideoWriter(tmp_path / "a.mp4", 32, clip(1)[1])
        writer.write(clip(1)[0])
        writer.close()
    finally:
        assert os.umask(before) == 0o027
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_a_checkpoint_fits_its_own_options_only(tmp_path):
    """Property: a run resumes with the options it was made with, those apart that may change."""
    cfg = Config()
    path = tmp_path / "step.safetensors"
    common.save_checkpoint(path, {"w": torch.ones(2)}, 7, cfg, data="abc")
    tensors = {"w": torch.zeros(2)}
    assert common.load_checkpoint(path, tensors, cfg, (), data="abc") == 7
    assert torch.equal(tensors["w"], torch.ones(2))
    longer = replace(cfg, steps=20)
    assert common.load_checkpoint(path, tensors, longer, ("steps",), data="abc") == 7
    with pytest.raises(ValueError, match="steps 10 -> 20"):
        common.load_checkpoint(path, tensors, longer, (), data="abc")
    with pytest.raises(ValueError, match="has made 7 steps already: --steps 5"):
        common.load_checkpoint(path, tensors, replace(cfg, steps=5), ("steps",), data="abc")
    with pytest.raises(ValueError, match="data abc -> xyz"):
        common.load_checkpoint(path, tensors, cfg, (), data="xyz")

# ----------------------------------------------------------------------------------------- programs


@dataclass(frozen=True)
class Files:
    data: Path                      # folder of clips
    preset: str = "small"           # which set of defaults


@dataclass(frozen=True)
class Config:
    steps: int = 10                 # updates in all
    betas: tuple[float, float] = (0.9, 0.95)        # of AdamW
    hidden: common.PresetOnly[int] = 3              # no flag


PRESETS = {"small": Config(), "large": Config(steps=1000, hidden=5)}


def test_flags_are_made_from_a_dataclass(capsys):
    """Property: a preset gives the defaults, a flag overrides one, a field's comment is help."""
    files, cfg = common.parse_args("doc", Files, PRESETS, ["--data", "clips"])
    assert files == Files(Path("clips")) and cfg == PRESETS["small"]
    files, cfg = common.parse_args("doc", Files, PRESETS, ["--preset", "large", "--data", "clips"])
    assert files.preset == "large" and cfg == PRESETS["large"]
    _, cfg = common.parse_args("doc", Files, PRESETS, ["--data=x", "--preset=large", "--steps=5"])
    assert asdict(cfg) == {"steps": 5, "betas": (0.9, 0.95), "hidden": 5}
    with pytest.raises(SystemExit) as stopped:
        common.parse_args("The manual.", Files, PRESETS, ["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and "The manual." in text
    assert "folder of clips" in text and "updates in all" in text and "hidden" not in text


@pytest.mark.parametrize("arguments", [["--data", "x", "--setps", "5"], ["--steps", "5"],
                                       ["--data", "x", "--steps", "many"],
                                       ["--data", "x", "--hidden", "5"]])
def test_a_mistyped_flag_is_an_error(arguments, capsys):
    """Property: no flag is ignored; a message names it and the exit code is 2."""
    with pytest.raises(SystemExit) as stopped:
        common.parse_args("doc", Files, PRESETS, arguments)
    error = capsys.readouterr().err
    wrong = "--data" if "--data" not in arguments else arguments[2]
    assert stopped.value.code == 2 and wrong in error and "Traceback" not in error


def test_bad_input_is_one_line_and_a_stop_is_another(capsys):
    """Property: exit codes are 2 for bad input, 130 for Ctrl-C, kill and a closed terminal; a bug
    keeps its traceback. What nohup has ignored stays ignored."""
    handlers = {stop: signal.getsignal(stop) for stop in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with common.one_line_errors("x.py"):
        signal.raise_signal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for error in (ValueError("bad"), FileNotFoundError("gone"), FloatingPointError("NaN")):
        with pytest.raises(SystemExit) as stopped, common.one_line_errors("x.py"):
            raise error
        assert stopped.value.code == 2 and capsys.readouterr().err == f"x.py: {error}\n"
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal.SIGINT, signal.default_int_handler)    # nohup has it ignored
        with pytest.raises(SystemExit) as stopped, common.one_line_errors("x.py", "stopped; bye"):
            signal.raise_signal(stop)
        assert stopped.value.code == 130 and capsys.readouterr().err == "x.py: stopped; bye\n"
    with pytest.raises(ZeroDivisionError), common.one_line_errors("x.py"):
        print(1 // 0)
    for stop, handler in handlers.items():
        signal.signal(stop, handler)


@pytest.mark.parametrize("closed", [False, True])
def test_printing_decides_nothing(monkeypatch, capsys, closed):
    """Property: what was made stays made: exit code 0.

    Also if its name has letters that stdout has not, which are then printed as escapes, or if
    stdout is a pipe that nobody reads any more, or a full disk."""
    reader, writer = os.pipe()
    if closed:
        os.close(reader)
    monkeypatch.setattr(sys, "stdout", open(writer, "w", encoding="cp1252"))
    with common.one_line_errors("x.py"):
        common.say("video: \u4e2d.mp4")
    sys.stdout.close()                          # as Python does at the end: no error here, either
    assert ("warning" in capsys.readouterr().err) == closed
    if not closed:
        with open(reader, encoding="cp1252") as file:
            assert file.read() == "video: \\u4e2d.mp4\n"


PROGRAMS = ["infer", "train_teacher", "distill_student", "evaluate", "data", "prepare_data",
            "synthetic.puppet", "tiny.train_vae", "tiny.train_decoder", "tiny.train_audio",
            "tiny.teacher", "tiny.student"]


def descriptions(text):
    """What a program prints for --help -> {flag: its description}"""
    lines = [line.strip(" │|") for line in text[text.index("-h, --help"):].splitlines()]
    found = {}
    for line, next_line in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("-"):
            flag, _, words = line.partition("  ")
            found[flag] = words.strip() or next_line            # beside a long flag is no room
    return found


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_describes_every_flag(program, capsys, monkeypatch):
    """Property: `--help` is enough to use a program: every flag has words of its own."""
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit):
        importlib.import_module(program).main(["--help"])
    found = descriptions(capsys.readouterr().out)
    assert len(found) > 2
    hint = re.compile(r"\((default|required|repeatable|fixed).*")
    own = {flag: hint.sub("", words).split() for flag, words in found.items()}
    assert not [flag for flag, words in own.items() if len(words) < 2]

# ----------------------------------------------------------------------------------------- pictures


def picture(mode, path, size=(48, 64), **options):
    """A file of random pixels"""
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


@pytest.mark.parametrize("mode, name", [("CMYK", "a.jpg"), ("P", "b.png"), ("L", "c.png"),
                                        ("RGBA", "d.png"), ("LA", "e.png"), ("P", "f.gif"),
                                        ("RGB", "g.webp"), ("1", "h.png")])
def test_every_kind_of_picture(tmp_path, mode, name):
    """Property: CMYK, palette, grey, transparent and black-and-white pictures are fine, too."""
    x = common.load_image(picture(mode, tmp_path / name), 32)
    assert x.shape == (1, 3, 32, 32) and x.dtype == torch.float32
    assert x.min() >= -1 and x.max() <= 1 and x.std() > 0.05


def test_the_centre_square_is_taken(tmp_path):
    """Property: a wide picture loses its left and right ends, and is not squeezed."""
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert (common.load_image(tmp_path / "wide.png", 32) == 1).all()


def test_deep_pictures_are_scaled_not_cut(tmp_path):
    """Property: 16 and 32 bits a pixel become 8 by scaling; no grey level is lost at the ends."""
    grey = np.tile(np.linspace(0, 255, 32).round(), (32, 1))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray((grey / 255).astype(np.float32)).save(tmp_path / "deep.tiff")
    for name in ("deep.png", "deep.tiff"):
        x = common.load_image(tmp_path / name, 32)
        np.testing.assert_allclose(x[0, 0].numpy(), grey / 127.5 - 1, atol=0.02)


def test_transparent_is_white(tmp_path):
    """Property: a cut-out portrait stands on white, not on black."""
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (common.load_image(tmp_path / "clear.png", 32) == 1).all()


def swapped_profile():
    """The ICC profile of a screen whose red is sRGB's green, and the other way round."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    at = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile = bytearray(profile)
    profile[at[0]:at[0] + 4], profile[at[1]:at[1] + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_converted_to_srgb(tmp_path, mode):
    """Property: an embedded colour profile is followed, for portraits and training pictures alike.

    A damaged profile counts as none, as in browsers."""
    red = Image.new("RGB", (32, 32), (204, 51, 0)).convert(mode)
    for profile, expected in ((swapped_profile(), (51, 204, 0)), (b"no profile", (204, 51, 0))):
        red.save(tmp_path / "a.png", icc_profile=profile)
        found = common.load_image(tmp_path / "a.png", 32)[0, :, 5, 5].numpy()
        np.testing.assert_allclose(127.5 * (found + 1), expected, atol=2)
        np.testing.assert_allclose(next(read_video(tmp_path / "a.png"))[5, 5], expected, atol=2)


def test_exif_says_which_way_is_up(tmp_path):
    """Property: a phone's portrait is turned upright before it is cropped."""
    half = Image.new("RGB", (32, 32))
    half.paste((255, 255, 255), (0, 0, 32, 16))                 # white above, black below
    exif = Image.Exif()
    exif[0x0112] = 3                                            # "turned by 180 degrees"
    half.save(tmp_path / "turned.jpg", exif=exif)
    x = common.load_image(tmp_path / "turned.jpg", 32)
    assert x[..., :14, :].mean() < -0.9 and x[..., 18:, :].mean() > 0.9


def test_what_is_no_picture_is_a_clear_error(tmp_path):
    """Property: a missing, damaged, huge or tiny picture, or a program, is named in one line."""
    (tmp_path / "text.png").write_text("not a picture", encoding="utf-8")
    whole = picture("RGB", tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])
    picture("RGB", tmp_path / "dot.png", (1, 1))
    Image.new("1", (30000, 30000)).save(tmp_path / "huge.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "drawing.png", "EPS")    # PostScript is a program
    for name, words in (("gone.png", "no such picture"), ("text.png", "not a picture"),
                        ("cut.png", "cannot be read"), ("dot.png", "only 1 x 1"),
                        ("huge.png", "scale it down"), ("drawing.png", "not a picture"),
                        (".", "no such picture")):
        with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
            common.load_image(tmp_path / name, 32)
        assert "\n" not in str(error.value)

# --------------------------------------------------------------------------------------------- mp4


def clip(frames):
    """Grey frames that get lighter, uint8 (T, 32, 32, 3), and noise float32 (640 T,)"""
    levels = np.arange(frames) * 8
    pixels = np.broadcast_to(levels[:, None, None, None], (frames, 32, 32, 3)).astype(np.uint8)
    sound = np.random.default_rng(0).normal(size=frames * HOP) * 0.2
    return pixels, sound.astype(np.float32)


def read(path):
    """-> (frames, their mean grey levels, sound, seconds of both tracks)"""
    with av.open(str(path)) as file:
        grey = [frame.to_ndarray(format="gray").mean() for frame in file.decode(video=0)]
        seconds = [float(stream.duration * stream.time_base) for stream in file.streams]
    with av.open(str(path)) as file:
        sound = np.concatenate([frame.to_ndarray()[0] for frame in file.decode(audio=0)])
    return len(grey), np.array(grey), sound, seconds


def lag(a, b):
    """Samples by which a is later than b"""
    size = len(a) + len(b)
    product = np.fft.rfft(a, size) * np.fft.rfft(b, size).conj()
    best = int(np.fft.irfft(product, size).argmax())
    return best - size if best > size // 2 else best


@pytest.mark.parametrize("piece", [1, 7, 25])
def test_a_video_and_its_sound_are_in_step(tmp_path, piece):
    """Property: frame i and samples 640 i to 640 (i + 1) are at the same time in the file.

    That does not depend on how many frames come at once."""
    frames, sound = clip(25)
    writer = common.VideoWriter(tmp_path / "a.mp4", 32, sound)
    for start in range(0, 25, piece):
        writer.write(frames[start:start + piece])
    assert not (tmp_path / "a.mp4").exists()                    # not before close()
    writer.close()
    count, grey, decoded, seconds = read(tmp_path / "a.mp4")
    assert count == writer.frames == 25 and abs(seconds[0] - seconds[1]) <= 0.04
    assert (np.diff(grey) > 0).all()
    assert abs(lag(decoded[:len(sound)], sound)) <= 16          # samples: 1 ms
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def recording(path, rate, channels):
    """A second of noise, loud in the first channel, softer in the second."""
    sound = np.random.default_rng(1).normal(size=(rate, 1)) * [0.2, 0.1][:channels]
    soundfile.write(path, sound, rate, subtype="PCM_24")
    return path


H264 = ["h264", "aac"]


@pytest.mark.parametrize("ending, codecs, rate", [
    (".mp4", H264, 44100), (".mov", H264, 48000), (".MKV", H264, 8000),
    (".webm", ["vp9", "opus"], 44100), (".gif", ["gif"], 44100)])
def test_the_name_is_the_container_and_the_sound_is_the_recordings(tmp_path, ending, codecs, rate):
    """Property: the ending that was asked for is what is written, and the network's 16 kHz mono are
    not what a viewer gets: rate and channels are the recording's, in step with the pictures."""
    path = tmp_path / f"a{ending}"
    frames, _ = clip(25)
    writer = common.VideoWriter(path, 32, recording(tmp_path / "a.wav", rate, 2))
    for start in (0, 10):
        writer.write(frames[start:start + 10])
    writer.close()                              # stopped after 20 of 25 frames
    with av.open(str(path)) as file:
        assert [stream.codec.canonical_name for stream in file.streams] == codecs
        assert ending.lower().strip(".").replace("mkv", "matroska") in file.format.name
        assert abs(sum(1 for _ in file.decode(video=0)) - 20) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a.wav", path.name])
    if len(codecs) == 2:
        blocks = [block for *_, block in sound_blocks(path)]
        decoded, original = np.concatenate(blocks), soundfile.read(tmp_path / "a.wav")[0]
        with av.open(str(path)) as file:
            track = file.streams.audio[0]
            expected = 48000 if ending == ".webm" else rate
            assert (track.rate, track.channels) == (expected, 2)
        seconds = len(decoded) / expected
        assert 0.8 <= seconds < 0.94            # with the end of the last block
        if expected == rate:
            assert abs(lag(decoded[:, 0], original[:, 0])) <= rate / 1000
            loudness = np.square(decoded).mean(0) ** 0.5
            assert abs(loudness[0] / loudness[1] - 2) < 0.2


def test_a_name_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    """Property: another ending, a folder, too long a name: one line. The longest name works."""
    (tmp_path / "folder.mp4").mkdir()
    for name, words in (("a.avi", "ends in .mp4"), ("a", "ends in .mp4"), ("folder.mp4", "cannot"),
                        ("no/a.mp4", "cannot write"), ("n" * 252 + ".mp4", "name too long")):
        with pytest.raises(ValueError, match=words) as error:
            common.check_output(tmp_path / name)
        assert "\n" not in str(error.value)
    longest = tmp_path / ("n" * 251 + ".mp4")
    writer = common.VideoWriter(longest, 32, clip(3)[1])
    writer.write(clip(3)[0])
    writer.close()
    assert read(longest)[0] == 3


def test_a_link_stays_a_link(tmp_path):
    """Property: what a link points to is written, not the link: a disk with room, a shared file."""
    (tmp_path / "disk").mkdir()
    for name in ("a.mp4", "a.json"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    common.write_json(tmp_path / "a.json", {"a": 1})
    writer = common.VideoWriter(tmp_path / "a.mp4", 32, clip(3)[1])
    writer.write(clip(3)[0])
    writer.close()
    assert all((tmp_path / name).is_symlink() for name in ("a.mp4", "a.json"))
    assert read(tmp_path / "disk" / "a.mp4")[0] == 3
    assert json.loads((tmp_path / "disk" / "a.json").read_text()) == {"a": 1}
    assert len(list((tmp_path / "disk").iterdir())) == 2


def test_a_video_says_that_it_is_synthetic(tmp_path):
    """Property: a viewer of the file can find out that a machine made it."""
    frames, sound = clip(2)
    writer = common.VideoWriter(tmp_path / "a.mp4", 32, sound)
    writer.write(frames)
    writer.close()
    with av.open(str(tmp_path / "a.mp4")) as file:
        assert "Synthetic video" in file.metadata["comment"]


def test_a_stopped_video_is_kept_whole_or_not_at_all(tmp_path):
    """Property: close() makes a file that plays from any number of frames but 0, close(False) none.

    An older file of that name stays until then."""
    frames, sound = clip(25)
    path = tmp_path / "a.mp4"
    path.write_bytes(b"older")
    writer = common.VideoWriter(path, 32, sound)
    writer.close()
    assert path.read_bytes() == b"older"
    writer = common.VideoWriter(path, 32, sound)
    writer.write(frames[:10])
    writer.close(keep=False)
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]
    writer = common.VideoWriter(path, 32, sound)
    writer.write(frames[:10])
    writer.close()
    count, _, decoded, _ = read(path)
    assert count == 10 and len(decoded) < 12 * HOP and list(tmp_path.iterdir()) == [path]


def test_a_video_may_be_longer_than_its_sound(tmp_path):
    """Property: frames after the end of the recording are silent."""
    frames, sound = clip(10)
    writer = common.VideoWriter(tmp_path / "a.mp4", 32, sound[:4 * HOP])
    writer.write(frames)
    writer.close()
    assert read(tmp_path / "a.mp4")[0] == 10


def test_a_clip_is_written_the_same_every_time(tmp_path):
    """Property: write_mp4 is a function of its input, bit for bit, and its sound begins at 0."""
    frames, sound = clip(25)
    sound = (sound * 32767).clip(-32768, 32767).astype(np.int16)
    for name in ("a.mp4", "b.mp4"):
        common.write_mp4(tmp_path / name, frames, sound)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    count, grey, decoded, seconds = read(tmp_path / "a.mp4")
    assert count == 25 and (np.diff(grey) > 0).all() and abs(seconds[0] - seconds[1]) <= 0.04
    assert abs(lag(decoded[:len(sound)], sound / 32768)) <= 16
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "b.mp4"}
    assert SAMPLE_RATE == 25 * HOP
