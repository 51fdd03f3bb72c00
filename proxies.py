"""Three small networks that stand in where official weights are missing, trained on our own clips. Their figures are always called `proxy`.

    python evaluate.py train-proxies --data PUPPETS GRID           train_proxies.py: trains them and measures what they are good for

sync      a small SyncNet (metrics.py) that sees the lower face: which sound belongs to these lips? The other moments of the same clip are the wrong
          answers, so that neither voice nor face helps. (Chung, Chung and Kang 2019, "Perfect Match".)
identity  64 features of a face: are these two pictures one person? NAME.json's "identity" says who; clips that name nobody are one person a folder.
face      what a face is doing: gap between the lips (eye distances), lids (0 open, 1 shut), and whether there is a face at all. The labels are
          the puppets' own (NAME.npz "gap", "blink"); real clips have none, and are measured all the same. Only the moments before and after tell a
          shut lid from a narrow eye, so lids are read off three frames (one frame: 0.58 instead of 0.88 correlation).

What they are good for is measured on the held-out clips and written beside the weights, proxies.json: real against late by 1, 2, 5 frames, another
clip's sound, another person, blur. A figure that cannot tell these apart proves nothing. A proxy trained on the same clips as a generator
knows the same faces and tricks: it finds faults, it does not replace the official networks.
"""
import csv
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from audio import AudioEncoder, encoder_path
from chunks import pixels
from data import FPS, HOP
from infer import to_uint8
from metrics import SyncNet, SyncNetConfig, correlation, face_square
from puppet import BROKEN, GAP, PHONES

CLOSED = 0.03                   # eye distances: lips closer than this are shut

# -------------------------------------------------------------------------------------------------------------- networks


def eye(*layers, inputs=3):
    """Convolutions of 3 x 3, each (channels, stride): (N, inputs, H, W) in [0, 1] -> (N, channels, H / strides, W / strides)."""
    parts = []
    for outputs, stride in layers:
        parts += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*parts)


FACE = (16, 2), (24, 2), (32, 1), (48, 2), (48, 1), (48, 2)     # a sixteenth of the side is left


class IdentityNet(nn.Module):
    size = 64

    def __init__(self):
        super().__init__()
        self.eye, self.head = eye(*FACE), nn.Linear(48 * 16, 64)

    def features(self, x):                                                          # (N, 3, 64, 64) -> (N, 96), for Frechet distances:
        y = self.eye(x)                                                             # mean and spread of every channel
        return torch.cat([y.mean((2, 3)), y.std((2, 3))], 1)

    def forward(self, x):                                                           # -> unit vectors (N, 64)
        return F.normalize(self.head(self.eye(x).flatten(1)), dim=1)


class FaceNet(nn.Module):
    """The whole face says how far the lips part; a strip with the eyes, now and 0.16 s before and after, says whether the lids are shut."""
    size = 96

    def __init__(self):
        super().__init__()
        self.eye, self.head = eye(*FACE), nn.Sequential(nn.Linear(48 * 36, 32), nn.ReLU(), nn.Linear(32, 2))
        self.lids = nn.Sequential(eye((16, 2), (24, 1), (32, 2), (32, 1), (32, 2), inputs=9), nn.Flatten(), nn.Linear(32 * 48, 1))

    def forward(self, x):                                                           # (N, 9, 96, 96) -> (N, 3): gap / GAP, logit of face, of lids
        return torch.cat([self.head(self.eye(x[:, 3:6]).flatten(1)), self.lids(x[:, :, 16:48])], 1)


CLASSES = {"sync": SyncNet, "identity": IdentityNet, "face": FaceNet}


def load_network(path, device="cpu"):
    """A proxy's .safetensors -> the network. FileNotFoundError, or ValueError if it is none."""
    try:
        with safe_open(path, "pt") as file:
            kind = file.metadata()["proxy"]
            config = json.loads(file.metadata().get("config", "{}"))
            tensors = {k: file.get_tensor(k).float() for k in file.keys()}
        tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        net = SyncNet(SyncNetConfig(**tuples)) if kind == "sync" else CLASSES[kind]()
        net.load_state_dict(tensors)
    except (SafetensorError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no proxy of this program: {' '.join(str(error).split())[:150]}") from None
    return net.eval().requires_grad_(False).to(device)


def load_proxies(folder, device="cpu"):
    """The networks of a folder that are there: {"sync": SyncNet, ...}, {} if none is."""
    return {kind: load_network(Path(folder) / f"{kind}.safetensors", device) for kind in CLASSES if (Path(folder) / f"{kind}.safetensors").is_file()}


def unit(pictures, net):                                                            # uint8 (N, S, S, C) -> float (N, C, S, S) in [0, 1]
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).to(next(net.parameters()).device).float() / 255


def around(i, frames):
    """Frame i (n,) of a clip of `frames`, and what stands beside it for FaceNet: 4 frames before, itself, 4 after, as far as there are any. (n, 3)"""
    return np.clip(np.asarray(i)[..., None] + [-4, 0, 4], 0, frames - 1)


@torch.no_grad()
def read_faces(net, frames, box):
    """FaceNet on frames uint8 (T, H, W, 3) -> gap (T,) in eye distances, lids (T,) 0 open 1 shut, face (T,) probability of a face."""
    faces = face_square(frames, box, net.size)
    parts = np.array_split(around(np.arange(len(faces)), len(faces)), -(-len(faces) // 64))
    y = torch.cat([net(unit(np.concatenate(list(faces[part.T]), -1), net)) for part in parts]).cpu()
    return (y[:, 0] * GAP).clamp(0).numpy(), torch.sigmoid(y[:, 2]).numpy(), torch.sigmoid(y[:, 1]).numpy()


def blinks(lids):
    """The frames at which lids (T,) close."""
    return np.flatnonzero(np.diff((lids > 0.5).astype(int)) == 1) + 1


@torch.no_grad()
def read_identity(net, frames, box):
    """IdentityNet on frames -> unit vectors (T, 64), features (T, 96)."""
    parts = [unit(part, net) for part in np.array_split(face_square(frames, box, net.size), -(-len(frames) // 64))]
    return torch.cat([net(x) for x in parts]).cpu().numpy(), torch.cat([net.features(x) for x in parts]).cpu().numpy()


# ------------------------------------------------------------------------------------------------- what a codec leaves


def vae_frames(vae, frames, length):
    """Frames encoded and decoded in chunks of `length`, side by side: what no generator that writes latents of this VAE can beat."""
    def reconstruct(chunk):
        full = chunk + chunk[-1:] * (-(len(chunk) - 1) % 4)                     # 4k + 1 of them
        with torch.no_grad():
            return to_uint8(vae.decode(vae.encode(pixels(full).to(vae.stats.device)))[0])[:len(chunk)]
    chunk = []
    for frame in frames:
        chunk.append(frame)
        if len(chunk) == length:
            yield from reconstruct(chunk)
            chunk = []
    if chunk:
        yield from reconstruct(chunk)


# ------------------------------------------------------------------------------------------------- what is said, and when


class Ears:
    """What one frame's hidden states tell a linear map of the lips' opening (train_audio.py's head, last row): how well a face of `weights` hears
    lips. A generator that samples what it does not hear follows, without guidance, by about the square of that. .head: None for ears without one."""

    def __init__(self, weights, device="cpu"):
        name = json.loads((Path(weights) / "config.json").read_text(encoding="utf-8")).get("audio", "")
        path = encoder_path(weights, name) / "head.safetensors"                 # ears from the hub have none
        try:
            head = load_file(path) if path.is_file() else {}
            knows = head and len(head["weight"]) == len(head["bias"]) == len(PHONES) + 1          # the phones, and the opening
        except (SafetensorError, LookupError) as error:
            raise ValueError(f"{path} is no head of train_audio.py's: {error}") from None
        self.head = {name: tensor[-1].float().to(device) for name, tensor in head.items()} if knows else None
        self.encoder = AudioEncoder(path.parent, device) if knows else None

    def opening(self, sound, frames, chunk=81):
        """sound float (samples,) -> (frames,), 0 shut to 1 open; heard in pieces of `chunk` frames, nothing after a piece."""
        return (self.encoder.in_chunks(sound, frames, chunk).flatten(1) @ self.head["weight"] + self.head["bias"]).cpu().numpy()


@lru_cache(maxsize=8)
def phone_table(path):
    table = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            table.setdefault(row["clip"], []).append((float(row["start"]), float(row["end"]), row["phone"]))
    return table


def phones_of(path):
    """[(start s, end s, IPA)] of a video: NAME.json "phones" beside it, else phones.tsv (clip, start, end, phone) here or one up, else None."""
    try:
        found = json.loads(Path(path).with_suffix(".json").read_text(encoding="utf-8"))["phones"]
        return [(float(s), float(e), str(p)) for s, e, p in found]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    table = next((d / "phones.tsv" for d in (Path(path).parent, Path(path).parent.parent) if (d / "phones.tsv").is_file()), None)
    try:
        return phone_table(table).get(Path(path).stem) if table else None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{table} needs columns clip, start, end, phone: {error!r}") from None


def speech_frames(phones, sound, frames):
    """Which of `frames` frames are spoken: by the phones if they are known, else those louder than a tenth of the loud ones. -> bool (frames,)"""
    t = (np.arange(frames) + 0.5) / FPS
    if phones:
        return np.any([(t >= s) & (t < e) for s, e, p in phones if p != "sil"] or [t < 0], axis=0)
    rms = np.sqrt(np.square(np.resize(np.append(sound, np.zeros(frames * HOP)), (frames, HOP))).mean(1)) if len(sound) else np.zeros(frames)
    return rms > max(0.1 * np.percentile(rms, 95), 1e-4)


@lru_cache(maxsize=4096)
def true_curves(path):
    """What a puppet's sidecar says: {"gap": (N,), "blink": (N,)}, {} where there is none."""
    try:
        with np.load(Path(path).with_suffix(".npz"), allow_pickle=False) as npz:
            return {k: np.float64(npz[k]) for k in ("gap", "blink") if k in npz}
    except (OSError, *BROKEN):
        return {}


def mouth_row(gap, truth, phones, speech, start=0):
    """The mouth of frames start, start + 1, ... : gap (T,) seen, truth (T,) or None, phones or None, speech bool (T,). -> figures by name

    Correlations are over speech frames only: silence, when every mouth is shut, inflates them. Closures: the smallest gap within a p, b or m."""
    row = {"mouth_sd": gap[speech].std() if speech.any() else np.nan,
           "mouth_sd_silence": gap[~speech].std() if (~speech).sum() > 4 else np.nan}
    if truth is not None:
        n = min(len(gap), len(truth))
        row |= {key: correlation(gap[:n], truth[:n], speech[:n], lag) for key, lag in (("mouth", 0), ("mouth_early", -1), ("mouth_late", 1))}
    t = (np.arange(len(gap)) + start + 0.5) / FPS
    shut = [gap[np.abs(t - (s + e) / 2) <= max((e - s) / 2, 1 / FPS)] for s, e, p in phones or [] if p in ("p", "b", "m")]
    shut = [x.min() for x in shut if len(x)]
    row |= {"gap_pbm": np.mean(shut), "closed_pbm": np.mean(np.less(shut, CLOSED))} if shut else {}
    return {k: float(v) for k, v in row.items()}


def whole_mouth(rows, gap, lids, truth, sound):
    """Mouth and blinks over the whole video -> its figures; every piece gets its own share into its row."""
    speech = speech_frames(truth["phones"], sound, len(gap))
    for row in rows:
        a, b = round(row["start"] * FPS), round(row["start"] * FPS) + row["frames"]
        row |= mouth_row(gap[a:b], None if truth["gap"] is None else truth["gap"][a:b], truth["phones"], speech[a:b], a)
    return mouth_row(gap, truth["gap"], truth["phones"], speech) | {"blinks": len(blinks(lids)) / (len(gap) / FPS / 60)}
