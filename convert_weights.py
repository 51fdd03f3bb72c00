"""Official checkpoints -> a folder of weights for infer.py and both stages.

    python convert_weights.py flashhead SRC OUT     SoulX-FlashHead's Model_Pro, which infer.py runs
    python convert_weights.py wan SRC OUT           Wan2.1's VAE; stage 1 starts from its network

SRC is a folder, or the name of a repository that huggingface_hub then fetches. To fetch by hand
(all Apache-2.0; read the model cards for their terms of use):

    hf download Soul-AILab/SoulX-FlashHead-1_3B --include "Model_Pro/*" "VAE_Wan/*" --local-dir SRC
    hf download Wan-AI/Wan2.1-T2V-1.3B config.json diffusion_pytorch_model.safetensors \\
        Wan2.1_VAE.pth --local-dir SRC
    hf download facebook/wav2vec2-base-960h --local-dir W2V     (or leave that to infer.py)

Model_Pro is this project's `wan-1.3b` under other names: five modules of audio_proj are renamed,
twelve tensors that its forward never reads are left out. Every tensor must be there, have the right
shape and be finite; else nothing is written. No code inside a file is run: .safetensors holds none,
and the official .pth is read with weights_only=True. One tensor is in memory at a time, but for the
VAE (0.5 GB).
"""
import json
import os
import re
import shutil
import struct
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from safetensors import safe_open

import dit
import vae
from audio import FILES as AUDIO_FILES
from common import one_line_errors, write_json

# ---------------------------------------------------------------------------- what is published

FILES = {
    "flashhead": ("Model_Pro/config.json", "Model_Pro/diffusion_pytorch_model.safetensors",
                  "VAE_Wan/Wan2.1_VAE.pth"),
    "wan": ("config.json", "diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth"),
}
FETCH = {
    "flashhead": 'hf download Soul-AILab/SoulX-FlashHead-1_3B --include "Model_Pro/*" "VAE_Wan/*"',
    "wan": f"hf download Wan-AI/Wan2.1-T2V-1.3B {' '.join(FILES['wan'])}",
}
LICENCES = {
    "flashhead": "SoulX-FlashHead-1_3B, Wan2.1's VAE and wav2vec2-base-960h: Apache-2.0",
    "wan": "Wan2.1-T2V-1.3B and wav2vec2-base-960h: Apache-2.0",
}
RENAMED = {"proj1": "first", "proj1_vf": "rest", "proj2": "shared.1", "proj3": "shared.3",
           "norm": "norm"}                          # FlashHead's modules in audio_proj -> ours
UNUSED = ("text_embedding.", "audio_emb.")          # FlashHead's forward reads neither
KINDS = (torch.float32, torch.float16, torch.bfloat16)      # of a tensor's numbers

# What inference must know (flash_head/configs/infer_params.yaml), beside the networks' sizes.
FLASHHEAD = {
    "size": 512, "frames": 33, "continuity_frames": 5, "identity": "tre",
    "audio_window": 8,                              # s; zeros on the left fill the first seconds
    "student": {"steps": 4, "timestep_shift": 5.0},
    # Model_Pro is the student. Copied to teacher.safetensors it can be stage 2's frozen teacher.
    "teacher": {"steps": 20, "timestep_shift": 5.0, "guidance": 1.5},
}

# -------------------------------------------------------------------------------------- reading


def find_source(name, model):
    """A folder or a Hugging Face name -> folder with FILES. FileNotFoundError, ValueError."""
    folder = Path(name)
    if not folder.exists() and not folder.is_absolute() and len(folder.parts) == 2:
        try:
            from huggingface_hub import snapshot_download
            folder = Path(snapshot_download(name, allow_patterns=list(FILES[model])))
        except Exception as error:                  # no network, no such repository, full disk ...
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{name} is no folder and cannot be fetched: {reason}") from None
    for file in FILES[model]:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing. To fetch it: {FETCH[model]} "
                                    f"--local-dir {folder}")
    return folder


def read_json_object(path):
    """A file -> dict. ValueError if it holds anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):            # RecursionError: thousands of brackets
        data = None
    if not isinstance(data, dict):
        raise ValueError(f"{path} is no JSON object")
    return data


def check_config(path, network, channels_in):
    """ValueError if a network's official config.json describes another one than `network`."""
    config = read_json_object(path)
    if config.get("in_dim") == 256:
        raise ValueError(f"{path} is Model_Lite: it makes latents of the LTX VAE, another network "
                         "under a licence of its own. Only Model_Pro is converted")
    wanted = {"dim": network.dim, "ffn_dim": network.ffn_dim, "num_heads": network.heads,
              "num_layers": network.layers, "in_dim": channels_in, "out_dim": network.channels}
    other = [f"{key} {config.get(key)} instead of {value}" for key, value in wanted.items()
             if config.get(key) != value]
    usual = {"freq_dim": network.freq_dim, "eps": network.eps}      # Wan's defaults: may be absent
    other += [f"{key} {config[key]} instead of {value}" for key, value in usual.items()
              if config.get(key, value) != value]
    if other:
        raise ValueError(f"{path} is another model: {', '.join(other)}")


def check_shapes(path, found, wanted):
    """{name: shape} of a file and of the network: ValueError that names the first difference."""
    for name in wanted:
        if name not in found:
            raise ValueError(f"{path} is another model: {name} is missing")
        if tuple(found[name]) != tuple(wanted[name]):
            raise ValueError(f"{path} is another model: {name} is {tuple(found[name])} instead of "
                             f"{tuple(wanted[name])}")
    extra = sorted(found.keys() - wanted.keys())
    if extra:
        raise ValueError(f"{path} is another model: it has {extra[0]}, unknown here")


def check_tensor(path, name, tensor):
    """ValueError for NaN and infinity, and for unusual kinds: fp8, sparse, meta ..."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.dtype not in KINDS or not tensor.isfinite().all():
        raise ValueError(f"{path} is damaged: {name} is not made of finite float32, float16 or "
                         "bfloat16 numbers")
    return tensor


def our_name(name):
    """FlashHead's name of a tensor -> ours. All but audio_proj's are Wan2.1's in both."""
    head, _, rest = name.partition(".")
    part, _, last = rest.partition(".")
    return f"{head}.{RENAMED.get(part, part)}.{last}" if head == "audio_proj" else name


def shapes_in(path):
    """.safetensors -> {name: shape}. ValueError if it is truncated, or none at all."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def read_network(path, wanted):
    """Official .safetensors -> iterator of (our name, tensor), one in memory at a time.

    wanted {our name: shape}: checked at once, before the first tensor is read."""
    shapes = shapes_in(path)
    names = [name for name in shapes if not name.startswith(UNUSED)]
    found = {our_name(name): shapes[name] for name in names}
    if len(found) < len(names):
        raise ValueError(f"{path} has a module of audio_proj under FlashHead's name and ours")
    check_shapes(path, found, wanted)

    def tensors():
        with safe_open(path, "pt") as file:
            for name in names:
                yield our_name(name), check_tensor(path, name, file.get_tensor(name))

    return tensors()


def read_vae(path, wanted):
    """Official .pth -> iterator of (name, tensor). Pickled code is refused, not run."""
    try:
        tensors = dict(torch.load(path, map_location="cpu", weights_only=True))
        found = {name: tensor.shape for name, tensor in tensors.items()}
    except Exception as error:                      # pickle, zip, truncated, not a dict ...
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{path} is no file of tensors alone: {reason}") from None
    check_shapes(path, found, wanted)
    return ((name, check_tensor(path, name, tensors[name])) for name in wanted)

# -------------------------------------------------------------------------------------- writing


def write_one_by_one(path, tensors, dtypes, shapes, metadata):
    """Iterator of (name, tensor) -> .safetensors. save_file would hold all of them twice."""
    codes = {torch.float32: "F32", torch.bfloat16: "BF16"}
    sizes = {name: shapes[name].numel() * dtype.itemsize for name, dtype in dtypes.items()}
    places, end = {}, 0
    header = {"__metadata__": metadata}
    for name, size in sizes.items():
        places[name] = end
        end += size
        header[name] = {"dtype": codes[dtypes[name]], "shape": list(shapes[name]),
                        "data_offsets": [places[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                 # tensors begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + end)
        for name, tensor in tensors:
            tensor = tensor.to(dtypes[name]).contiguous()
            file.seek(start + places[name])
            file.write(tensor.flatten().view(torch.uint8).numpy())


@contextmanager
def new_folder(out):
    """A hidden folder beside `out`, renamed to it at the end. On an error nothing is left."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        yield part
        part.chmod(0o755)
        os.rename(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise

# ----------------------------------------------------------------------------------- conversion


def write_vae(path, folder, config):
    """Wan2.1_VAE.pth -> vae.safetensors in float32, in which the encoder runs."""
    with torch.device("meta"):                      # names and shapes, no memory
        own = vae.WanVAE(config).state_dict()
    shapes = {name: tensor.shape for name, tensor in own.items()}
    dtypes = dict.fromkeys(shapes, torch.float32)
    write_one_by_one(folder / "vae.safetensors", read_vae(path, shapes), dtypes, shapes, {})


def write_audio(name, folder, network):
    """A Wav2Vec2's folder is copied, a Hugging Face name is kept -> "audio" of config.json.

    Of a folder the sizes, the names of the tensors and the length of the file are checked."""
    source = Path(name)
    if not source.is_dir():
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
            raise ValueError(f"--audio {name} is no folder, and no Hugging Face name (owner/model)")
        return name
    for file in AUDIO_FILES:
        if not (source / file).is_file():
            raise FileNotFoundError(f"--audio {source} holds no audio encoder: {file} is missing")
    config = read_json_object(source / "config.json")
    found = [config.get(key) for key in ("model_type", "num_hidden_layers", "hidden_size")]
    if found != ["wav2vec2", network.audio_layers, network.audio_dim]:
        raise ValueError(f"--audio {source} is another encoder: {found}")
    tensors = shapes_in(source / "model.safetensors")
    last = f"encoder.layers.{network.audio_layers - 1}.attention.q_proj.weight"
    if not tensors.keys() & {last, f"wav2vec2.{last}"}:             # with a head: the longer name
        raise ValueError(f"--audio {source} is another encoder: {last} is missing")
    (folder / "wav2vec2").mkdir()
    for file in AUDIO_FILES:
        shutil.copy(source / file, folder / "wav2vec2" / file)
    return "wav2vec2"


def convert_flashhead(source, folder, options, network, vae_config):
    """Model_Pro -> student.safetensors, and all that infer.py needs beside it."""
    config_file, weights_file, vae_file = (source / name for name in FILES["flashhead"])
    check_config(config_file, network, 2 * network.channels)
    with torch.device("meta"):                      # bfloat16 as infer.py casts: the same video
        own = dit.AudioDiT(network).cast_matrices(getattr(torch, options.dtype)).state_dict()
    shapes = {name: tensor.shape for name, tensor in own.items()}
    dtypes = {name: tensor.dtype for name, tensor in own.items()}
    tensors = read_network(weights_file, shapes)
    config = FLASHHEAD | {"audio": write_audio(options.audio, folder, network),
                          "vae": asdict(vae_config), "dit": asdict(network)}
    write_vae(vae_file, folder, vae_config)
    about = {"class": "AudioDiT", "trained": "yes", "source": "SoulX-FlashHead Model_Pro"}
    write_one_by_one(folder / "student.safetensors", tensors, dtypes, shapes, about)
    write_json(folder / "config.json", config)
    return (f"tensors: {len(shapes)}\n"
            f"run: python infer.py --weights {options.out} --image me.jpg --audio speech.wav "
            "--match-colour --crop none")


def convert_wan(source, folder, options, network, vae_config):
    """Wan2.1's VAE -> a folder that stage 1 starts from. Its network is checked and left there."""
    config_file, weights_file, vae_file = (source / name for name in FILES["wan"])
    check_config(config_file, network, network.channels)
    with torch.device("meta"):
        own = dit.AudioDiT(network).state_dict()
    shapes = {name: tensor.shape for name, tensor in own.items()
              if not name.startswith("audio_proj.")}
    D, C = network.dim, network.channels            # stage 1 widens it to 2C (load_wan_checkpoint)
    shapes["patch_embedding.weight"] = torch.Size([D, C, *dit.PATCH])
    for _ in read_network(weights_file, shapes):
        pass                                        # every tensor is finite
    write_vae(vae_file, folder, vae_config)
    audio = write_audio(options.audio, folder, network)
    write_json(folder / "config.json", {"size": 512, "audio": audio, "vae": asdict(vae_config)})
    return (f"tensors: {len(shapes)}\n"
            f"run: python train_teacher.py --preset wan-1.3b --weights {options.out} "
            f"--init {weights_file} --data CLIPS")

# ----------------------------------------------------------------------------------------- main

CONVERT = {"flashhead": convert_flashhead, "wan": convert_wan}


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Literal["flashhead", "wan"]]        # what is converted
    source: tyro.conf.Positional[str]       # folder of official files, or a Hugging Face name
    out: tyro.conf.Positional[Path]         # the new folder of weights
    dtype: Literal["float32", "bfloat16"] = "float32"   # of the blocks' matrices (flashhead only)
    audio: str = "facebook/wav2vec2-base-960h"          # Wav2Vec2: a folder, or a Hugging Face name


def convert(options, network=dit.PRESETS["wan-1.3b"], vae_config=vae.PRESETS["wan2.1"]):
    """Official files -> OUT, of exactly these sizes. -> what to run next, in words."""
    if os.path.lexists(options.out):                # before anything is fetched
        raise ValueError(f"{options.out} exists: choose another folder, or delete it")
    if options.model == "wan" and options.dtype != "float32":
        raise ValueError(f"wan writes no network: --dtype {options.dtype} would change nothing")
    source = find_source(options.source, options.model)
    with new_folder(options.out) as folder:
        return CONVERT[options.model](source, folder, options, network, vae_config)


def main(argv=None):
    options = tyro.cli(Options, args=sys.argv[1:] if argv is None else argv,
                       prog="convert_weights.py", description=__doc__)
    with one_line_errors("convert_weights.py"):
        report = convert(options)
        print(f"{report}\nlicences: {LICENCES[options.model]}\nweights: {options.out}")


if __name__ == "__main__":
    main()
