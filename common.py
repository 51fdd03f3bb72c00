"""Plumbing that all programs share. Nothing of the paper is in this file; skip it at first.

files        written aside and then renamed, so that a kill leaves the old file or the new one
devices      which processor, how much memory, torchrun and FSDP
a run        learning rate, EMA, log, checkpoint, the exported folder of weights
programs     flags made from a dataclass, one clear line for bad input
pictures     a portrait in, an mp4 out

Tensors are kept as .safetensors and the rest as .json; nothing pickled is loaded.
"""
import argparse
import ctypes
import json
import os
import shutil
import signal
import sys
import time
import warnings
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Annotated, TypeVar

import av
import numpy as np
import torch
import torch.distributed as dist
import tyro
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data import FORMATS, FPS, HOP, MAX_PIXELS, SAMPLE_RATE

# -------------------------------------------------------------------------------------------- files


def write_aside(path, save):
    """Call save(part) with a name beside `path`, then rename. OSError in one line if it fails."""
    part = Path(f"{path}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        save(part)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{path} was not written: {error}") from None


@contextmanager
def warn_on_oserror():
    """A full disk costs one file, not the run: OSError becomes a warning."""
    try:
        yield
    except OSError as error:
        print(f"warning: {error}", file=sys.stderr)


def write_safetensors(path, tensors, metadata):
    """{name: tensor} -> file. An empty dict, which all processes but the first have, is skipped."""
    if tensors:
        write_aside(path, lambda part: save_file(tensors, part, metadata))


def write_json(path, data):
    text = json.dumps(data, indent=1)
    write_aside(path, lambda part: part.write_text(text, encoding="utf-8"))


def save_image(path, image):
    """Pillow image -> PNG; a failure is a warning."""
    with warn_on_oserror():
        write_aside(path, lambda part: image.save(part, "PNG"))

# ------------------------------------------------------------------------------------------ devices


def select_device(device="auto", dtype="auto"):
    """"auto" -> the best there is; returns (device name, torch dtype).

    bfloat16 only where the processor multiplies in it. ValueError for a device that is not here."""
    if device == "auto":
        has_mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    elif device != "cpu" and not getattr(torch, device).is_available():
        raise ValueError(f"there is no {device} device here: try --device cpu")
    if dtype == "auto":
        can = getattr(torch.cpu, "get_capabilities", dict)()
        fast_cpu = device == "cpu" and (can.get("avx512_bf16") or can.get("amx_bf16"))
        dtype = "bfloat16" if device == "cuda" or fast_cpu else "float32"
    return device, getattr(torch, dtype)


def bf16_autocast(device, wanted=True):
    """torch.autocast to bfloat16 where `wanted` and fast: some CPUs are 10 x slower in it."""
    kind = torch.device(device).type
    fast = select_device(kind)[1] is torch.bfloat16
    return torch.autocast(kind, torch.bfloat16, enabled=wanted and fast)


def keep_freed_memory():
    """Tell glibc to keep freed buffers; a tenth to a fifth of the decoding time is saved.

    By default it returns big buffers to the system and gets them again page by page, zeroed."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        m_mmap_threshold, m_trim_threshold = -3, -1
        accepted = libc.mallopt(m_mmap_threshold, 1 << 30)
        if accepted or libc.mallopt(m_mmap_threshold, 32 << 20):    # an older glibc's maximum
            libc.mallopt(m_trim_threshold, 1 << 30)


def peak_memory():
    """Largest resident size of this process so far, in words."""
    try:
        from resource import RUSAGE_SELF, getrusage  # not on Windows
    except ImportError:
        return "unknown"
    unit = 2**20 if sys.platform == "darwin" else 2**10             # macOS counts bytes, Linux KiB
    return f"{getrusage(RUSAGE_SELF).ru_maxrss / unit:.0f} MiB"


class Stopwatch(defaultdict):
    """Seconds by stage: `with clock("decode"): ...`"""

    def __init__(self):
        super().__init__(float)

    @contextmanager
    def __call__(self, stage):
        start = self.now()
        yield
        self[stage] += self.now() - start

    @staticmethod
    def now():
        if torch.cuda.is_available():
            torch.cuda.synchronize()                               # a GPU returns before it is done
        return time.perf_counter()


def init_distributed(device):
    """Join the process group that torchrun made -> (rank, number of processes), else (0, 1)."""
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return dist.get_rank(), dist.get_world_size()


def shard(model, device, world):
    """FSDP: every process keeps 1 / world of the weights and fetches a block when it needs it."""
    if world == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(torch.device(device).type, (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def whole(tensor):
    """FSDP's shard of a tensor -> the whole tensor, on every process; others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_state(tensors, dtype=None):
    """{name: tensor or shard} -> whole ones on the CPU of the first process, {} on the others."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    state = {}
    for name, tensor in tensors.items():
        tensor = whole(tensor)                                      # every process takes part
        if first:
            state[name] = tensor.to("cpu", dtype).contiguous()
    return state


def all_reduce_mean(numbers):
    """Scalar tensors -> list of floats, averaged over the processes."""
    numbers = torch.stack(list(numbers))
    if dist.is_initialized():
        dist.all_reduce(numbers)
        numbers /= dist.get_world_size()
    return numbers.tolist()

# -------------------------------------------------------------------------------------------- a run


def learning_rate_factor(step, cfg):
    """Share of the peak: linear warm-up, level, linear decay to zero over the last cfg.decay."""
    rise = (step + 1) / cfg.warmup
    fall = (1 - step / cfg.steps) / max(cfg.decay, 1e-9)
    return min(1, rise, fall)


def make_adamw(named_parameters, lr, cfg):
    """AdamW with the moments made now, so that the names in a checkpoint are always complete."""
    parameters = list(named_parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr, cfg.betas, weight_decay=cfg.weight_decay)
    for p in parameters:
        mean, square = (torch.zeros_like(p.detach()) for _ in range(2))
        optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": mean, "exp_avg_sq": square}
    return optimizer


class TrainState:
    """Networks, their optimisers and one EMA: all that a resumed run needs, as named tensors.

    networks {name: module}; lrs {name: peak learning rate}, one optimiser each; `averaged` names
    the network that has an EMA; make_optimizer(named_parameters, lr, cfg); extra {name: tensor}."""

    def __init__(self, networks, lrs, averaged, cfg, make_optimizer=make_adamw, extra=None):
        self.networks, self.averaged, self.optimizers = networks, networks[averaged], {}
        self.ema = {k: p.detach().clone() for k, p in self.averaged.named_parameters()}
        self.tensors = dict(extra or {})
        self.tensors |= {f"ema.{k}": tensor for k, tensor in self.ema.items()}
        for name, lr in lrs.items():
            named = dict(networks[name].named_parameters())
            optimizer = self.optimizers[name] = make_optimizer(named, lr, cfg)
            self.tensors |= {f"{name}.{k}": p.detach() for k, p in named.items()}
            for k, p in named.items():
                moments = optimizer.state[p].items()
                self.tensors |= {f"{name}.optimizer.{key}.{k}": value for key, value in moments}

    @torch.no_grad()
    def update_ema(self, decay, updates):
        """EMA of the averaged network. `updates` made before this one: a short memory at first."""
        decay = min(decay, (1 + updates) / (10 + updates))
        for k, p in self.averaged.named_parameters():
            self.ema[k].lerp_(p.detach(), 1 - decay)

    @contextmanager
    def ema_weights(self):
        """Inside `with` the averaged network has its EMA weights, afterwards its own again."""
        swap_ema(self.averaged, self.ema)
        yield
        swap_ema(self.averaged, self.ema)


@torch.no_grad()
def swap_ema(model, ema):
    """Exchange a network's weights with their average."""
    for k, p in model.named_parameters():
        own = p.clone()
        p.copy_(ema[k])
        ema[k].copy_(own)


def clip_gradients(model, limit):
    """Scale all gradients so that their norm is at most `limit` -> the norm before, a float."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    return whole(norm).item()


def trim_log(path, start):
    """Drop the lines of a log that a run resumed at step `start` will write again."""
    lines = path.read_text(encoding="utf-8").splitlines(True) if path.exists() and start else []
    complete = [line for line in lines if line.endswith("}\n")]     # a kill can cut the last line
    kept = "".join(line for line in complete if json.loads(line)["step"] < start)
    write_aside(path, lambda part: part.write_text(kept, encoding="utf-8"))


def log(path, record):
    """Append one JSON line; the file is opened anew each time, so that a kill loses nothing."""
    with warn_on_oserror(), open(path, "a", encoding="utf-8") as file:
        print(json.dumps(record), file=file)


def log_line(record, steps, batch, done, began):
    """A log record in words, with speed and the time that is left. done: steps since `began`."""
    pace = (time.time() - began) / max(1, done)                     # seconds a step, all in all
    left = pace * (steps - record["step"]) / 3600
    numbers = [f"{k} {v}" for k, v in record.items() if k not in ("step", "seconds")]
    return " | ".join([f"step {record['step']:5d}/{steps}", *numbers,
                       f"{batch / pace:.2f} samples/s", f"{left:.1f} h left"])


def save_checkpoint(path, tensors, step, cfg, **more):
    """One .safetensors, written by the first process. A failure is a warning: the run goes on."""
    tensors = full_state(tensors)
    with warn_on_oserror():
        metadata = {"step": str(step), "config": json.dumps(asdict(cfg))} | more
        write_safetensors(path, tensors, metadata)


def check_options(path, metadata, cfg, may_change, **more):
    """ValueError if a checkpoint was made with options other than cfg, but for `may_change`."""
    old = json.loads(metadata["config"])
    new = json.loads(json.dumps(asdict(cfg)))                       # tuples become lists
    other = [f"{k} {old.get(k)} -> {v}" for k, v in new.items()
             if k not in may_change and old.get(k) != v]
    other += [f"{k} {metadata.get(k)} -> {v}" for k, v in more.items() if metadata.get(k) != v]
    if other:
        raise ValueError(f"{path} was made with other options: {', '.join(other)}")


@torch.no_grad()
def load_checkpoint(path, tensors, cfg, may_change, **more):
    """Fill `tensors`, for any number of processes -> steps done. ValueError: see check_options."""
    with safe_open(path, "pt") as file:
        check_options(path, file.metadata(), cfg, may_change, **more)
        for name, tensor in tensors.items():
            new = file.get_tensor(name).to(tensor.device)
            if hasattr(tensor, "full_tensor"):                      # a shard of FSDP
                from torch.distributed.tensor import distribute_tensor
                new = distribute_tensor(new, tensor.device_mesh, tensor.placements)
            tensor.copy_(new)
        return int(file.metadata()["step"])


def export_weights(source, out, network, ema, cfg, config, leave=()):
    """Make OUT a folder that infer.py runs: NETWORK.safetensors (float16) and all it needs.

    If OUT is another folder, what SOURCE holds beside is copied (VAE, audio encoder), but for names
    that match `leave`. config: what goes into config.json, all that inference must know."""
    tensors = full_state(ema, torch.float16)
    if not tensors:                                                 # not the first process
        return
    source, out = Path(source), Path(out)
    if source.resolve() != out.resolve():
        ignore = shutil.ignore_patterns(f"{network}*", "*.part", "evaluation*", *leave)
        shutil.copytree(source, out, ignore=ignore, dirs_exist_ok=True)
    about = {"class": "AudioDiT", "trained": "yes", "steps": str(cfg.steps),
             "config": json.dumps(asdict(cfg))}
    write_safetensors(out / f"{network}.safetensors", tensors, about)
    write_json(out / "config.json", config)

# ----------------------------------------------------------------------------------------- programs

T = TypeVar("T")
PresetOnly = Annotated[T, tyro.conf.Fixed, tyro.conf.Suppress]      # a field that is not a flag


def parse_args(doc, files, presets, argv=None):
    """Command line -> (files, config), both made by tyro from their dataclasses.

    files: class of a dataclass with a field `preset`; presets: {name: config}, the first is the
    default. A field's comment is its help. Unknown names end with one message and exit code 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset")
    preset = early.parse_known_args(argv)[0].preset
    default = presets.get(preset, next(iter(presets.values())))

    def both(files: tyro.conf.OmitArgPrefixes[files],
             config: tyro.conf.OmitArgPrefixes[type(default)] = default):
        return files, config

    return tyro.cli(both, args=argv, description=doc, config=(tyro.conf.FlagCreatePairsOff,))


@contextmanager
def one_line_errors(program, when_stopped="stopped"):
    """Bad input ends in one line and exit code 2, Ctrl-C and kill in one line and 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # kill is Ctrl-C
    bad_input = OSError, ValueError, KeyError, FloatingPointError, SafetensorError, av.FFmpegError
    try:
        yield
    except bad_input as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{program}: {when_stopped}", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

# ----------------------------------------------------------------------------------------- pictures

MADE_BY = ("Synthetic video: a machine animated one picture to one recording "
           "(AsymTalker, arXiv 2605.02948).")


def load_image(path, size):
    """A picture -> float32 (1, 3, size, size) in [-1, 1]: its centre square. See read_picture."""
    return centre_square(read_picture(path), size)


def centre_square(image, size):
    """Pillow RGB image -> float32 (1, 3, size, size) in [-1, 1]"""
    image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def read_picture(path):
    """Any of FORMATS, also CMYK, palette, transparent or turned by EXIF -> Pillow image, RGB.

    FileNotFoundError, or ValueError for what is no picture, under 16 px or over 100 megapixels."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such picture: {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                         # the size limit is our own
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{path} has {image.width} x {image.height} pixels: "
                                     "scale it down first")
                image = to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        raise ValueError(f"{path} has far too many pixels: scale it down first") from None
    except UnidentifiedImageError:
        formats = ", ".join(FORMATS)
        raise ValueError(f"{path} is not a picture that can be read: {formats}") from None
    except (OSError, SyntaxError, EOFError, RuntimeError, MemoryError) as error:
        reason = str(error) or type(error).__name__                 # Pillow's, for damaged files
        raise ValueError(f"{path} cannot be read as a picture: {reason}") from None
    if min(image.size) < 16:
        size = f"{image.width} x {image.height}"
        raise ValueError(f"{path} is only {size} pixels: a face needs more")
    return image


def to_rgb(image):
    """Any Pillow image -> RGB, on white where it is transparent."""
    if image.mode.startswith(("I", "F")):                           # Pillow would clip 16 bits
        image = Image.fromarray(deep_to_uint8(np.asarray(image, np.float32)))
    if image.mode in ("P", "PA", "LA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def deep_to_uint8(x):
    """Grey values (H, W) of more than 8 bits -> uint8, by the 16-bit scale if they fit it."""
    sixteen_bits = x.min() >= 0 and 255 < x.max() <= 65535
    low, high = (0, 65535) if sixteen_bits else (np.nanmin(x), np.nanmax(x))
    unit = np.nan_to_num(np.clip((x - low) / max(high - low, 1e-9), 0, 1))
    return np.uint8(255 * unit)


class Mp4Writer:
    """H.264 and AAC, written as frames come, under a temporary name until close()."""

    def __init__(self, path, size, audio):
        """audio (samples,) float32 at 16 kHz goes along, frame by frame: memory does not grow."""
        self.path, self.audio, self.frames = Path(path), audio, 0
        self.part = self.path.with_name(f".{self.path.stem}.{os.getpid()}.part.mp4")
        self.container = av.open(str(self.part), "w", options={"movflags": "faststart"})
        self.container.metadata["comment"] = MADE_BY
        options = {"crf": "18", "preset": "veryfast"}
        self.video = self.container.add_stream("libx264", FPS, options=options)
        self.video.width = self.video.height = size
        self.video.pix_fmt = "yuv420p"
        self.sound = self.container.add_stream("aac", SAMPLE_RATE, layout="mono")
        self.sound.bit_rate = 64000

    def write(self, frames):
        """frames uint8 (T, H, W, 3)"""
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))
            self.container.mux(self.video.encode(picture))
            piece = self.audio[self.frames * HOP:(self.frames + 1) * HOP]
            if len(piece):
                piece = np.ascontiguousarray(piece[None], np.float32)
                block = av.AudioFrame.from_ndarray(piece, "fltp", "mono")
                block.sample_rate, block.pts = SAMPLE_RATE, self.frames * HOP
                self.container.mux(self.sound.encode(block))
            self.frames += 1

    def close(self, keep=True):
        """keep=True leaves a playable file, also after Ctrl-C; keep=False leaves none."""
        keep = keep and self.frames > 0
        try:
            if keep:
                self.container.mux(self.video.encode(None))
                self.container.mux(self.sound.encode(None))
            self.container.close()
            if keep:
                os.replace(self.part, self.path)
        finally:
            self.part.unlink(missing_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        """A video that Ctrl-C stopped is kept, a failed one is not."""
        self.close(keep=error in (None, KeyboardInterrupt))


def write_preview(path, video, seconds=4):
    """The first seconds of a video file -> an animated WebP, at half the rate, for a README."""
    with av.open(str(video)) as file:
        frames = [frame.to_image() for frame in islice(file.decode(video=0), 0, seconds * FPS, 2)]
    write_aside(path, lambda part: frames[0].save(
        part, "WEBP", save_all=True, append_images=frames[1:], duration=2000 // FPS, loop=0,
        quality=80))


def write_mp4(path, frames, audio):
    """frames uint8 (T, S, S, 3) at 25 fps and sound int16 (640 T,) -> an H.264 and AAC file.

    One thread, so that the same input gives the same bytes."""
    part = path.with_suffix(".part")
    options = {"crf": "15", "preset": "veryfast", "threads": "1"}
    with av.open(str(part), "w", format="mp4") as file:
        video = file.add_stream("libx264", FPS, options=options)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        voice = file.add_stream("aac", SAMPLE_RATE, layout="mono")
        voice.bit_rate = 96000
        for picture in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            file.mux(video.encode(picture))
        sound = av.AudioFrame.from_ndarray(audio[None], format="s16", layout="mono")
        sound.sample_rate = SAMPLE_RATE
        sound.time_base, sound.pts = Fraction(1, SAMPLE_RATE), 0    # without a time it begins late
        file.mux([*video.encode(), *voice.encode(sound), *voice.encode()])
    part.replace(path)
