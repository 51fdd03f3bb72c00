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
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import asdict
from fractions import Fraction
from itertools import chain, islice, product
from pathlib import Path
from typing import Annotated, TypeVar

import av
import numpy as np
import torch
import torch.distributed as dist
import tyro
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from media import (
    FPS,
    PICTURES,
    SAMPLE_RATE,
    SOUNDS,
    VIDEOS,
    clip_names,
    default_track,
    known_layout,
    media_files,
    note_unread,
    open_media,
    print_any_name,
    read_picture,
    resampled,
    sound_blocks,
)

try:
    import fcntl
except ImportError:                             # on Windows
    fcntl = None

# -------------------------------------------------------------------------------------------- files


def write_aside(path, save):
    """Call save(part) with a name beside `path`, then rename. OSError in one line if it fails.

    A link stays a link. Who may read the file is what umask says: safetensors would say nobody."""
    real = os.path.realpath(path)
    part = Path(f"{real}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        save(part)
        os.umask(umask := os.umask(0))                              # it can only be read by setting
        part.chmod(0o666 & ~umask)
        os.replace(part, real)
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


def kept_in_block(dim, hidden, bf16):
    """Bytes a token that autograd keeps inside a block of the DiT: counted, see the test."""
    return 72 * dim + 4 * hidden if bf16 else 90 * dim + 8 * hidden


def memory_plan(model, per_parameter, cfg, gpus, size, frames):
    """What training needs on each GPU -> lines to print. Computed, not measured.

    model: an AudioDiT on the meta device; per_parameter: bytes of weights, gradient, moments and
    averages for each of its parameters, which the GPUs share; cfg: micro_batch, bf16 and
    checkpointing. A token has 16 x 16 pixels, as with every VAE of patch = 1 (Wan2.1's, those of
    the presets). ValueError for sizes that no chunk has."""
    if gpus < 1 or size < 16 or size % 16 or frames % 4 != 1:
        raise ValueError(f"--plan-memory {gpus} {size} {frames}: it takes the number of GPUs, "
                         "pixels of a side (16 k), frames of a chunk (4 k + 1)")
    D, hidden, layers = model.config.dim, model.config.ffn_dim, model.config.layers
    parameters = sum(p.numel() for p in model.parameters())
    tokens = cfg.micro_batch * (1 + (frames - 1) // 4) * (size // 16) ** 2
    inside = tokens * kept_in_block(D, hidden, cfg.bf16)
    blocks = 1 if cfg.checkpointing else layers                     # whose insides are kept at once
    parts = {"weights_and_optimizers": per_parameter * parameters / gpus,
             "inputs_of_blocks": 4 * D * tokens * layers if cfg.checkpointing else 0,
             "inside_blocks": inside * blocks}
    parts["total"] = sum(parts.values())
    lines = [f"memory of each of {gpus} GPUs, computed, not measured; {size} x {size} pixels, "
             f"{frames} frames, {cfg.micro_batch} rows a call, {parameters / 1e9:.3f} B parameters"]
    lines += [f"{name}: {value / 2**30:.1f} GiB" for name, value in parts.items()]
    copies, temporary = 2 * parameters / 2**30, 4 * parameters / gpus / 2**30
    return "\n".join([*lines, f"not counted: bfloat16 copies under autocast ({copies:.1f} GiB a "
                      f"network), what AdamW's step needs on a GPU ({temporary:.1f} GiB, its "
                      "foreach), the frozen VAE and audio encoder, the decode of Eq. 16 and 17"])


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


@contextmanager
def run_folder(files):
    """files.run_dir is ours inside `with`: an old run in it is refused, a second one kept out.

    ValueError if it holds a run and neither --resume nor --overwrite is given, or if another
    process trains in it. Folders that stay empty are removed. torchrun: the first process looks."""
    run = files.run_dir
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    if files.resume and files.overwrite:
        raise ValueError("--resume continues the run in RUN_DIR, --overwrite replaces it: not both")
    old = [run / name for name in ("checkpoint.safetensors", "log.jsonl") if (run / name).exists()]
    if old and not files.resume and not files.overwrite:
        raise ValueError(f"{run} holds a run ({', '.join(path.name for path in old)}): --resume "
                         "continues it, --overwrite replaces it, another --run-dir keeps it")
    new = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(run)
    try:
        if files.overwrite:
            for path in old:                    # else a kill before the first save would leave the
                path.unlink()                   # old one to --resume
        yield
    finally:
        if lock is not None:
            os.close(lock)
        for folder in new:
            with suppress(OSError):
                folder.rmdir()


def lock_folder(folder):
    """-> a handle that locks the folder until it is closed or the process ends; None on Windows."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"another process is training in {folder}") from None
    except OSError as error:                                        # some network file systems
        print(f"warning: {folder} cannot be locked: {error}", file=sys.stderr)
    return handle


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
        step = int(file.metadata()["step"])
        if step > cfg.steps:
            raise ValueError(f"{path} has made {step} steps already: --steps {cfg.steps} are less")
        for name, tensor in tensors.items():
            new = file.get_tensor(name).to(tensor.device)
            if hasattr(tensor, "full_tensor"):                      # a shard of FSDP
                from torch.distributed.tensor import distribute_tensor
                new = distribute_tensor(new, tensor.device_mesh, tensor.placements)
            tensor.copy_(new)
        return step


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
    """Bad input ends in one line and exit code 2; Ctrl-C, kill, a closed terminal in 130."""
    for name in ("SIGTERM", "SIGHUP"):                              # Windows has no SIGHUP,
        number = getattr(signal, name, None)                        # nohup ignores it
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    print_any_name()
    bad_input = OSError, ValueError, KeyError, FloatingPointError, SafetensorError, av.FFmpegError
    try:
        yield
    except bad_input as error:
        with suppress(OSError):                                     # if the terminal is gone
            print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        with suppress(OSError):
            print(f"{program}: {when_stopped}", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def say(text):
    """Print what was made. A full disk or a closed pipe there does not make it a failure."""
    try:
        print(text, flush=True)
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)                  # else Python tries it again at
        os.dup2(nowhere, sys.stdout.fileno())                       # the end, and exits with 120
        print(f"warning: cannot print: {error}\n{text}", file=sys.stderr)

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


H264 = {"crf": "18", "preset": "veryfast"}
VP9 = {"crf": "28", "b": "0", "deadline": "realtime", "cpu-used": "7"}
CONTAINERS = {".mp4": ("libx264", H264, "aac"), ".mov": ("libx264", H264, "aac"),
              ".mkv": ("libx264", H264, "aac"), ".webm": ("libvpx-vp9", VP9, "libopus"),
              ".gif": ("gif", {}, None)}                            # codecs of picture and sound


def check_output(path, endings=tuple(CONTAINERS)):
    """ValueError, before any work is done, for a name that no video can be written to."""
    path = Path(path)
    if path.suffix.lower() not in endings:
        raise ValueError(f"{path} cannot be written: a name that ends in {', '.join(endings)} can")
    real = Path(os.path.realpath(path))
    try:
        is_other = real.lstat() and not real.is_file()
    except FileNotFoundError:
        is_other = False
    except OSError as error:                                        # such as: name too long
        raise ValueError(f"cannot write to {path}: {error.strerror}") from None
    if is_other or not os.access(real.parent, os.W_OK):
        raise ValueError(f"cannot write to {path}")


# sRGB <-> linear light <-> CIE XYZ <-> CIE Lab, in which equal distances look about equal.
RGB_TO_XYZ = torch.tensor([[0.4124564, 0.3575761, 0.1804375],
                           [0.2126729, 0.7151522, 0.0721750],
                           [0.0193339, 0.1191920, 0.9503041]])
WHITE = RGB_TO_XYZ.sum(1)                                           # XYZ of r = g = b = 1 (D65)
LAB_LINEAR, LAB_SLOPE = 0.008856, 903.3                             # a cube root, linear near black


def rgb_to_lab(rgb):
    """(..., 3) in [0, 1] -> (..., 3): L in 0..100, a and b around 0"""
    light = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = light @ RGB_TO_XYZ.T.to(rgb) / WHITE.to(rgb)
    root = xyz.clamp(min=LAB_LINEAR) ** (1 / 3)
    x, y, z = torch.where(xyz > LAB_LINEAR, root, (LAB_SLOPE * xyz + 16) / 116).unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def lab_to_rgb(lab):
    """The inverse; colours that no screen has are clamped to [0, 1]."""
    L, a, b = lab.unbind(-1)
    y = (L + 16) / 116
    root = torch.stack([y + a / 500, y, y - b / 200], -1)
    xyz = torch.where(root ** 3 > LAB_LINEAR, root ** 3, (116 * root - 16) / LAB_SLOPE)
    light = (xyz * WHITE.to(lab)) @ RGB_TO_XYZ.inverse().T.to(lab)
    curved = 1.055 * light.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(light > 0.0031308, curved, 12.92 * light).clamp(0, 1)


def match_colours(video, portrait):
    """Give every frame the portrait's mean and deviation of L, a and b, over all pixels.

    video (B, 3, T, H, W), portrait (B, 3, H, W), in [-1, 1] -> (B, 3, T, H, W). Colours can then
    not drift; nor can the light change. As SoulX-FlashHead does with every chunk."""
    lab = rgb_to_lab(video.permute(0, 2, 3, 4, 1) / 2 + 0.5)        # (B, T, H, W, 3)
    goal = rgb_to_lab(portrait[:, :, None].permute(0, 2, 3, 4, 1) / 2 + 0.5)
    std, mean = torch.std_mean(lab, (2, 3), correction=0, keepdim=True)
    goal_std, goal_mean = torch.std_mean(goal, (2, 3), correction=0, keepdim=True)
    scale = torch.where(std > 1e-6, goal_std / std, 1.0)            # a flat frame stays flat
    return lab_to_rgb((lab - mean) * scale + goal_mean).permute(0, 4, 1, 2, 3) * 2 - 1


class VideoWriter:
    """Pictures and sound, written as frames come, under a temporary name until close().

    The name's ending is the container. Memory does not grow with the length."""

    def __init__(self, path, size, sound):
        """sound: a recording, whose own sound goes along, or float32 (samples,) at 16 kHz."""
        check_output(path)
        ending = Path(path).suffix.lower()
        self.path, self.frames = Path(os.path.realpath(path)), 0    # a link stays a link
        name = f".{self.path.stem[:40]}.{os.getpid()}.part{ending}"
        self.part = self.path.with_name(name)
        options = {"movflags": "faststart"} if ending in (".mp4", ".mov") else {}
        self.container = av.open(f"file:{self.part}", "w", options=options)
        self.container.metadata["comment"] = MADE_BY
        codec, options, sound_codec = CONTAINERS[ending]
        self.video = self.container.add_stream(codec, FPS, options=options)
        self.video.width = self.video.height = size
        self.video.pix_fmt = "pal8" if ending == ".gif" else "yuv420p"
        self.palette = palette_filter(size) if ending == ".gif" else None
        self.sound = None
        if sound_codec:
            self.add_sound(sound, sound_codec)

    def add_sound(self, sound, codec):
        """The sound's own rate and channels, where the codec has them."""
        if isinstance(sound, np.ndarray):
            blocks = iter([(SAMPLE_RATE, "mono", sound[:, None])])
        else:
            blocks = known_layout(sound_blocks(Path(sound)))
        first = next(blocks, (SAMPLE_RATE, "mono", np.zeros((0, 1), np.float32)))
        self.rate, layout, _ = first
        if self.rate not in av.Codec(codec, "w").audio_rates:
            self.rate = 48000
        if av.AudioLayout(layout).nb_channels > 2:                  # one that every player has
            layout = "stereo"
        self.sound = self.container.add_stream(codec, self.rate, layout=layout)
        self.sound.bit_rate = 96000 * (1 + self.sound.channels)     # 192 or 288 kbit/s
        self.blocks = resampled(chain([first], blocks), layout, self.rate)
        self.held = np.zeros((0, self.sound.channels), np.float32)  # read, but not written yet
        self.samples = 0                                            # written so far

    def write(self, frames):
        """frames uint8 (T, H, W, 3)"""
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))
            picture.pts, picture.time_base = self.frames, Fraction(1, FPS)
            if self.palette:
                self.palette.push(picture)
                picture = self.palette.pull()
                picture.pts, picture.time_base = self.frames, Fraction(1, FPS)
            self.container.mux(self.video.encode(picture))
            self.frames += 1
            if self.sound:
                self.write_sound(round(self.frames * self.rate / FPS) - self.samples)

    def write_sound(self, count):
        """The next `count` samples, or what there is."""
        while len(self.held) < count and (block := next(self.blocks, None)) is not None:
            self.held = np.concatenate([self.held, block])
        piece, self.held = self.held[:count], self.held[count:]
        if len(piece):
            packed = np.ascontiguousarray(piece).reshape(1, -1)
            block = av.AudioFrame.from_ndarray(packed, "flt", self.sound.layout.name)
            block.sample_rate, block.time_base = self.rate, Fraction(1, self.rate)
            block.pts = self.samples
            self.container.mux(self.sound.encode(block))
            self.samples += len(piece)

    def close(self, keep=True):
        """keep=True leaves a playable file, also after Ctrl-C; keep=False leaves none."""
        keep = keep and self.frames > 0
        try:
            if keep:
                self.container.mux(self.video.encode(None))
                if self.sound:
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
    with open_media(video) as file:
        shown = islice(file.decode(default_track(file, "video")), 0, seconds * FPS, 2)
        frames = [frame.to_image() for frame in shown]
    write_aside(path, lambda part: frames[0].save(
        part, "WEBP", save_all=True, append_images=frames[1:], duration=2000 // FPS, loop=0,
        quality=80))


def palette_filter(size):
    """A graph of filters that gives every picture of a GIF 256 colours of its own."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=size, height=size, format="rgb24", time_base=Fraction(1, FPS))
    split, use = graph.add("split"), graph.add("paletteuse", "new=1:dither=sierra2_4a")
    colours, sink = graph.add("palettegen", "stats_mode=single"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(colours, 1, 0)
    colours.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return graph


def write_mp4(path, frames, audio):
    """frames uint8 (T, S, S, 3) at 25 fps and sound int16 (640 T,) -> an H.264 and AAC file.

    One thread, so that the same input gives the same bytes."""
    part = path.with_suffix(".part")
    options = {"crf": "15", "preset": "veryfast", "threads": "1"}
    with av.open(f"file:{part}", "w", format="mp4") as file:
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

# --------------------------------------------------------------------- several videos of infer.py


def is_batch(options):
    """Can these flags ask for several videos?"""
    return len(options.audio) > 1 or options.image.is_dir() or options.audio[0].is_dir()


def list_videos(options):
    """Flags -> {recording: {photo: video to write}}. ValueError for an impossible output.

    The folder of several videos is not made yet."""
    def files(path, endings):
        return media_files(path, endings) if path.is_dir() else [path]

    photos = files(options.image, PICTURES)
    recordings = [file for path in options.audio for file in files(path, SOUNDS | VIDEOS)]
    pairs, outs, is_new = list(product(recordings, photos)), [options.out], False
    if not pairs:
        raise ValueError("no picture or no recording is in the folder")
    if is_batch(options):
        is_new = not options.out.exists()
        if options.out.suffix.lower() in CONTAINERS and not options.out.is_dir():
            raise ValueError(f"several videos need a folder, --out DIR, not {options.out}")
        if is_new and not os.access(options.out.absolute().parent, os.W_OK):
            raise ValueError(f"cannot write to {options.out}")
        me, said = clip_names(photos), clip_names(recordings)
        outs = [options.out / f"{me[photo]}-{said[sound]}.mp4" for sound, photo in pairs]
    inputs = {path.resolve() for path in photos + recordings}
    for out in outs:
        if out.resolve() in inputs or outs.count(out) > 1:
            raise ValueError(f"{out} is one of the inputs, or two videos: choose another name")
        if not is_new:
            check_output(out)
    if options.preview:
        if len(outs) > 1:
            raise ValueError(f"--preview is of one video, not of {len(outs)}")
        if options.preview.resolve() in inputs:
            raise ValueError(f"{options.preview} is one of the inputs: choose another name")
        check_output(options.preview, (".webp",))            # so it is not the video either
    read = {options.image: PICTURES}                                # what of which folder
    for path in options.audio:
        read[path] = read.get(path, set()) | SOUNDS | VIDEOS
    for path in filter(Path.is_dir, read):
        note_unread(path, read[path])
    videos = {sound: {} for sound in recordings}
    for (sound, photo), out in zip(pairs, outs):
        videos[sound][photo] = out
    return videos


class Skipped:
    """`with skipped: ...` of several videos counts and prints what cannot be read or made."""

    def __init__(self, is_batch):
        self.is_batch, self.count = is_batch, 0

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        skip = self.is_batch and isinstance(error, (OSError, ValueError, av.FFmpegError))
        if skip:
            self.count += 1
            print(f"skipped {self.count}: {error}", file=sys.stderr)
        return skip
