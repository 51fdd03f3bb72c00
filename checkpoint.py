"""Files and processes of a training run, for both stages alike: written aside and renamed, resumed, averaged, shared out over GPUs.

Tensors are .safetensors, the rest .json; nothing pickled is loaded. Whoever kills a run, the last whole checkpoint is there.
"""
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def write_aside(path, save):
    """`save(part)` writes beside `path`, then `part` takes its name: whoever kills us, the old file or the new one is there.

    Full disk, read-only folder: OSError in one line, the old file stays."""
    part = Path(f"{path}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        save(part)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{path} was not written: {error}") from None


@contextmanager
def forgiven():
    """A full disk costs the file, not the run: OSError becomes a warning."""
    try:
        yield
    except OSError as error:
        print(f"warning: {error}", file=sys.stderr)


def write_safetensors(path, tensors, metadata):
    if tensors:                                                                 # {}: not the first process, see gather
        write_aside(path, lambda part: save_file(tensors, part, metadata))


def write_json(path, data):
    write_aside(path, lambda part: part.write_text(json.dumps(data, indent=1), encoding="utf-8"))


def join(device):
    """Under torchrun, one of its processes -> its rank, their number; else 0, 1."""
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return dist.get_rank(), dist.get_world_size()


def gather(tensors, dtype=None):
    """Tensors, or FSDP's shards of them -> whole ones on the CPU of the first process; the others have a part in it and get {}."""
    first, whole = not dist.is_initialized() or dist.get_rank() == 0, {}
    for name, tensor in tensors.items():
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        whole |= {name: tensor.to("cpu", dtype).contiguous()} if first else {}
    return whole


def mean(numbers):
    """Scalar tensors -> list of floats, means over the processes."""
    numbers = torch.stack(list(numbers))
    if dist.is_initialized():
        dist.all_reduce(numbers)
        numbers /= dist.get_world_size()
    return numbers.tolist()


def trim_log(path, start):
    """The log of a resumed run goes on at `start`: lines that will be written again are dropped."""
    lines = path.read_text(encoding="utf-8").splitlines(True) if path.exists() and start else []
    kept = "".join(line for line in lines if line.endswith("}\n") and json.loads(line)["step"] < start)
    write_aside(path, lambda part: part.write_text(kept, encoding="utf-8"))


def log(path, record):
    with forgiven(), open(path, "a", encoding="utf-8") as file:                 # opened anew every time: nothing is lost, whoever kills us
        print(json.dumps(record), file=file)


@torch.no_grad()
def swap(model, average):
    """The averaged weights go into the network and its own into `average`; once more, and all is as before, bit for bit."""
    for k, p in model.named_parameters():
        own = p.clone()
        p.copy_(average[k])
        average[k].copy_(own)


def save_checkpoint(path, tensors, step, cfg, **more):
    """One .safetensors, written by the first process. If that fails, a warning: the run goes on."""
    tensors = gather(tensors)
    with forgiven():
        write_safetensors(path, tensors, {"step": str(step), "config": json.dumps(asdict(cfg))} | more)


def save_picture(path, image):
    """A PNG, forgiven as well."""
    with forgiven():
        write_aside(path, lambda part: image.save(part, "PNG"))


def check_options(path, about, cfg, free, **more):
    """ValueError if other options made a checkpoint, whose metadata is `about`; those named in `free` may change."""
    old = asdict(type(cfg)()) | json.loads(about["config"])                     # an option that is newer than the file does nothing by default
    other = [f"{k} {old.get(k)} -> {v}" for k, v in asdict(cfg).items() if k not in free and old.get(k) != v]
    other += [f"{k} {about.get(k)} -> {v}" for k, v in more.items() if about.get(k) != v]
    if other:
        raise ValueError(f"{path} was made with other options: {', '.join(other)}")


@torch.no_grad()
def load_checkpoint(path, tensors, cfg, free, **more):
    """Fills `tensors`, also by another number of processes -> steps done. ValueError: see check_options."""
    with safe_open(path, "pt") as file:
        check_options(path, file.metadata(), cfg, free, **more)
        for name, tensor in tensors.items():
            new = file.get_tensor(name).to(tensor.device)
            tensor.copy_(distribute_tensor(new, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else new)
        return int(file.metadata()["step"])


def shard(model, device, world):
    """FSDP: every process keeps 1 / world of the weights, gradients and optimiser, and fetches a block's when it needs them."""
    if world == 1:
        return model
    mesh = init_device_mesh(torch.device(device).type, (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)            # True: also outside training only shards remain
