"""The measures of evaluate.py that need no training: SyncNet, MFCC, Frechet distance, identity, and what can be read off the pixels.

Official networks come as files that the user has fetched himself; nothing is ever downloaded here:
    SyncNet       syncnet_v2.model, a pickled state dict: read with weights_only=True, so no code in it can run. Chung and Zisserman 2016
    Inception     inception-2015-12-05.pt, TorchScript of StyleGAN's authors: 2048 features a frame, for FID. Heusel et al. 2017
    I3D           i3d_torchscript.pt, TorchScript of StyleGAN-V's authors: 400 logits of 16 frames, for FVD. Unterthiner et al. 2018
    ArcFace       w600k_r50.onnx (needs onnxruntime) or any TorchScript recogniser: 512 features of an aligned face. Deng et al. 2019
A proxy (proxies.py) is a small network of our own of the same kind. Its figures are called so and compare with nothing outside this program.

Shapes: T frames, H W pixels; frames uint8 (T, H, W, 3) RGB at 25 a second; sound float32 (samples,) at 16 kHz in [-1, 1]; N windows, D features.
A box is where the face is, x0 y0 x1 y1 from brow to chin, in fractions of the square's side. Offsets are in frames; > 0: the picture is late.
"""
import hashlib
import pickle
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn as nn
from PIL import Image

from data import FACE_BOX, FORMATS, HOP, RATE
from puppet import BROKEN

KNOWN = {                   # sha256 of the official files
    "syncnet": "961e8696f888fce4f3f3a6c3d5b3267cf5b343100b238e79b2659bff2c605442",      # syncnet_v2.model
    "fid": "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",          # inception-2015-12-05.pt
    "fvd": "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2",          # i3d_torchscript.pt
    "identity": "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43"}     # w600k_r50.onnx of buffalo_l (research use only)

# ---------------------------------------------------------------------------------------------------------------- crops


@lru_cache(maxsize=4096)
def box_of(path):
    """The face's box in a video or picture, fractions of its side: its sidecar's NAME.npz "box" (pixels), else where data.py puts faces."""
    try:
        with np.load(Path(path).with_suffix(".npz"), allow_pickle=False) as npz:
            box = np.float64(npz["box"])
        if Path(path).suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"):
            with Image.open(path, formats=FORMATS) as picture:
                size = picture.size
        else:
            with av.open(str(path)) as container:
                size = container.streams.video[0].width, container.streams.video[0].height
        return tuple(box / size[0]) if size[0] == size[1] and box.shape == (4,) else FACE_BOX
    except (OSError, IndexError, *BROKEN, av.FFmpegError):
        return FACE_BOX


def square(frames, x, y, side, size, fill=110):
    """Cut the square of `side` around (x, y), fractions of the width, out of every frame -> uint8 (T, size, size, 3). Outside: grey."""
    width = frames.shape[2]
    half, x, y = side * width / 2, x * width, y * width
    pad = max(0, int(np.ceil(max(half - x, half - y, x + half - width, y + half - frames.shape[1]))))
    corner = (x - half + pad, y - half + pad, x + half + pad, y + half + pad)
    if pad:
        frames = np.pad(frames, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=fill)
    cut = [Image.fromarray(frame).resize((size, size), Image.Resampling.BILINEAR, corner) for frame in frames]
    return np.stack([np.asarray(image) for image in cut])


def syncnet_square(frames, box, size):
    """SyncNet's crop: the face with 40 % around it and more below. The original follows a detector frame by frame; here the box stands still."""
    x0, y0, x1, y1 = box
    s = max(x1 - x0, y1 - y0) / 2
    return square(frames, (x0 + x1) / 2, (y0 + y1) / 2 + 0.4 * s, 2.8 * s, size)


def mouth_square(frames, box, size):
    """The lower half of the face: lips, jaw, cheeks."""
    x0, y0, x1, y1 = box
    return square(frames, (x0 + x1) / 2, y0 + 0.76 * (y1 - y0), 0.5 * (y1 - y0), size)


def face_square(frames, box, size, shift=(0.0, 0.0), scale=1.0):
    """The face, tightly; shift (fractions of its height) and scale are for training."""
    x0, y0, x1, y1 = box
    h = y1 - y0
    return square(frames, (x0 + x1) / 2 + shift[0] * h, (y0 + y1) / 2 + shift[1] * h, 1.02 * h * scale, size)


# ----------------------------------------------------------------------------------------------------------------- MFCC


def mel_filters(count, nfft):
    """Triangles on the mel scale from 0 Hz to half the rate, corners at whole bins of the spectrum. -> (count, nfft/2 + 1)"""
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    hertz = 700 * (10 ** (np.linspace(0, top, count + 2) / 2595) - 1)
    corner = np.floor((nfft + 1) * hertz / RATE)
    bins, filters = np.arange(nfft // 2 + 1), np.zeros((count, nfft // 2 + 1))
    for row, (a, b, c) in zip(filters, zip(corner, corner[1:], corner[2:])):
        rise, fall = (bins >= a) & (bins < b), (bins >= b) & (bins < c)
        row[rise], row[fall] = (bins[rise] - a) / (b - a), (c - bins[fall]) / (c - b)
    return filters


def mfcc(samples):
    """13 cepstra every 10 ms of int16 samples (n,) -> (columns, 13), SyncNet's ears: windows of 25 ms without taper, pre-emphasis 0.97,
    512 bins, 26 filters, lifter 22, the log energy in place of the first. (python_speech_features.mfcc with its defaults.)"""
    x = np.float64(samples)
    x = np.append(x[:1], x[1:] - 0.97 * x[:-1])
    columns = 1 + max(0, -(-(len(x) - 400) // 160))
    x = np.pad(x, (0, max(0, (columns - 1) * 160 + 400 - len(x))))
    windows = np.lib.stride_tricks.sliding_window_view(x, 400)[::160][:columns]
    power = np.abs(np.fft.rfft(windows, 512)) ** 2 / 512                            # (columns, 257)
    positive = lambda v: np.where(v == 0, np.finfo(float).eps, v)                   # a log comes next
    bands = np.log(positive(power @ mel_filters(26, 512).T))                        # (columns, 26)
    k, n = np.arange(13)[:, None], np.arange(26)
    dct = np.sqrt(2 / 26) * np.cos(np.pi * k * (2 * n + 1) / 52)                    # type II, orthonormal
    dct[0] /= np.sqrt(2)
    cepstra = bands @ dct.T * (1 + 11 * np.sin(np.pi * np.arange(13) / 22))
    cepstra[:, 0] = np.log(positive(power.sum(1)))
    return cepstra


# -------------------------------------------------------------------------------------------------------------- SyncNet


@dataclass(frozen=True)
class SyncNetConfig:                    # defaults: the official network
    size: int = 224                                     # pixels along each side of the lip pictures
    lips: tuple = (96, 256, 256, 256, 256, 512)         # channels of the lip branch
    sound: tuple = (64, 192, 384, 256, 256, 512)        # channels of the sound branch
    out: int = 1024                                     # features
    crop: str = "face"                                  # syncnet_square; "mouth": mouth_square


SMALL = SyncNetConfig(size=80, lips=(16, 32, 48, 48, 48, 64), sound=(16, 32, 48, 48, 48, 64), out=64, crop="mouth")


class SyncNet(nn.Module):
    """Two networks, one sees 0.2 s of lips, one hears them; matching moments land close together. Parameter names are the official ones."""

    def __init__(self, cfg=SyncNetConfig()):                                        # noqa: B008, frozen
        super().__init__()
        self.config, v, a = cfg, cfg.lips, cfg.sound
        conv3 = lambda i, o, k, s=1, p=0: [nn.Conv3d(i, o, (5 if i == 3 else 1, k, k), (1, s, s), (0, p, p)), nn.BatchNorm3d(o), nn.ReLU()]
        pool3 = lambda p=0: [nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, p, p))]
        conv2 = lambda i, o, k=3, p=1: [nn.Conv2d(i, o, k, 1, p), nn.BatchNorm2d(o), nn.ReLU()]
        head = lambda n: nn.Sequential(nn.Linear(n, n), nn.BatchNorm1d(n), nn.ReLU(), nn.Linear(n, cfg.out))
        left = cfg.size
        for kernel, padding in ((7, 0), (3, 0), (5, 1), (3, 1), (3, 0)):            # what the strides leave of the picture: 224 -> 6
            left = (left + 2 * padding - kernel) // 2 + 1
        self.netcnnlip = nn.Sequential(                                             # (N, 3, 5, S, S) -> (N, 512, 1, 1, 1)
            *conv3(3, v[0], 7, 2), *pool3(), *conv3(v[0], v[1], 5, 2, 1), *pool3(1), *conv3(v[1], v[2], 3, 1, 1),
            *conv3(v[2], v[3], 3, 1, 1), *conv3(v[3], v[4], 3, 1, 1), *pool3(), *conv3(v[4], v[5], left))
        self.netcnnaud = nn.Sequential(                                             # (N, 1, 13, 20) -> (N, 512, 1, 1)
            *conv2(1, a[0]), nn.MaxPool2d(1, 1), *conv2(a[0], a[1]), nn.MaxPool2d(3, (1, 2)), *conv2(a[1], a[2]),
            *conv2(a[2], a[3]), *conv2(a[3], a[4]), nn.MaxPool2d(3, 2), *conv2(a[4], a[5], (5, 4), 0))
        self.netfclip, self.netfcaud = head(v[5]), head(a[5])

    def see(self, lips):                                                            # (N, 3, 5, S, S) BGR, 0..255 -> (N, D)
        return self.netfclip(self.netcnnlip(lips).flatten(1))

    def hear(self, cepstra):                                                        # (N, 1, 13, 20) -> (N, D)
        return self.netfcaud(self.netcnnaud(cepstra).flatten(1))


def load_syncnet(path, device="cpu"):
    """The official syncnet_v2.model, a pickled state dict -> SyncNet. ValueError for anything else; code in the file is never run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        net = SyncNet()
        net.load_state_dict(state)
    except (RuntimeError, pickle.UnpicklingError, EOFError, TypeError, AttributeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no SyncNet state dict: {' '.join(str(error).split())[:150]}") from None
    return net.eval().requires_grad_(False).to(device)


def lip_windows(pictures):
    """uint8 (T, S, S, 3) RGB -> the T - 4 windows of 5 frames as SyncNet wants them: (T - 4, 3, 5, S, S) float BGR, a view."""
    video = torch.from_numpy(np.ascontiguousarray(pictures[..., ::-1])).permute(3, 0, 1, 2).float()
    return video.unfold(1, 5, 1).permute(1, 0, 4, 2, 3)


def sound_windows(sound):
    """float32 (samples,) in [-1, 1] -> the windows of 0.2 s that begin with a frame: (windows, 1, 13, 20), a view."""
    columns = torch.from_numpy(mfcc(np.round(np.clip(sound, -1, 1) * 32767)).T).float()
    return columns.unfold(1, 20, 4).permute(1, 0, 2)[:, None]


@torch.no_grad()
def sync_features(net, frames, sound, box, batch=20):
    """-> features of lips and of sound, each (N, D), N = min(T, samples // 640) - 5. ValueError under 7 frames."""
    device, crop = next(net.parameters()).device, {"face": syncnet_square, "mouth": mouth_square}[net.config.crop]
    n = min(len(frames), len(sound) // HOP) - 5
    if n < 2:
        raise ValueError(f"{len(frames)} frames and {len(sound) / RATE:.2f} s of sound: SyncNet wants 7 frames at least")
    lips, heard = lip_windows(crop(frames[:n + 4], box, net.config.size)), sound_windows(sound)[:n]
    run = lambda f, x: torch.cat([f(part.to(device)) for part in x.split(batch)]).cpu()
    return run(net.see, lips), run(net.hear, heard)


def sync_distances(lips, sound, reach=15, padded=True):
    """Mean distance of lips (N, D) and sound (N, D) for shifts -reach..reach -> (2 reach + 1,). Past the ends of the sound the original compares
    with zeros, which favours offset 0 in clips of a few seconds; padded=False (the proxy) leaves those frames out and reaches N / 2 at most."""
    n, reach = len(lips), reach if padded else min(reach, len(lips) // 2)
    if padded:
        sound = nn.functional.pad(sound, (0, 0, reach, reach))
        pairs = [(lips, sound[k:k + n]) for k in range(2 * reach + 1)]
    else:
        pairs = [(lips[max(0, -k):n - max(0, k)], sound[max(0, k):n + min(0, k)]) for k in range(-reach, reach + 1)]
    return torch.stack([(a - b + 1e-6).square().sum(1).sqrt().mean() for a, b in pairs])


def sync_scores(lips, sound, reach=15, padded=True):
    """-> Sync-C = median - min, Sync-D = min, the offset in frames, and the confidence at offset 0. Sync-C and -D are taken at the best
    offset: they do not punish a constant delay, so the offset must be read with them, or sync_now = median - distance at 0."""
    d = sync_distances(lips, sound, reach, padded)
    best, middle = int(d.argmin()), len(d) // 2
    return {"sync_c": float(d.median() - d[best]), "sync_d": float(d[best]), "sync_offset": middle - best, "sync_now": float(d.median() - d[middle])}


def syncnet_scorer(path):
    """For data.py: weights -> function (frames uint8 (T, H, W, 3), sound float32) -> (Sync-C, Sync-D). A .safetensors is the proxy."""
    if Path(path).suffix == ".safetensors":
        from proxies import load_network
        print(f"note: {path} is the small proxy: its Sync-C/D have a scale of their own, see {Path(path).parent / 'proxies.json'}")
        net, padded = load_network(path), False
    else:
        net, padded = load_syncnet(path), True

    def score(frames, sound):
        scores = sync_scores(*sync_features(net, frames, sound, FACE_BOX), padded=padded)
        return scores["sync_c"], scores["sync_d"]
    return score


# ------------------------------------------------------------------------------------------------------ Frechet distance


class Gaussian:
    """Mean and covariance of features that come a few at a time: memory does not grow with their number."""

    def __init__(self):
        self.n, self.total, self.outer = 0, 0.0, 0.0

    def add(self, features):                                                        # (n, D)
        x = np.float64(features)
        self.n, self.total, self.outer = self.n + len(x), self.total + x.sum(0), self.outer + x.T @ x

    def moments(self):
        """-> mean (D,), covariance (D, D). ValueError for fewer than two features."""
        if self.n < 2:
            raise ValueError(f"{self.n} features make no covariance")
        mean = self.total / self.n
        return mean, (self.outer - self.n * np.outer(mean, mean)) / (self.n - 1)


def frechet(a, b):
    """Frechet distance of two Gaussians, |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), float64. (Dowson and Landau 1982.)

    tr (S1 S2)^(1/2) is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), symmetric: no matrix root that fails, no
    complex numbers. A covariance of fewer samples than features is singular: allowed, but the distance is then biased upwards."""
    (m1, s1), (m2, s2) = a.moments(), b.moments()
    if min(a.n, b.n) <= len(m1):
        warnings.warn(f"Frechet distance of {a.n} and {b.n} samples in {len(m1)} dimensions: singular, biased upwards", stacklevel=2)
    value, vector = np.linalg.eigh(s1)
    root = (vector * np.sqrt(value.clip(0))) @ vector.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root).clip(0)).sum()
    return max(0.0, float((m1 - m2) @ (m1 - m2) + np.trace(s1) + np.trace(s2) - 2 * cross))


# ------------------------------------------------------------------------------------------------------- official files


def check_file(path, kind):
    """FileNotFoundError if it is missing; a note on stdout if it is not the official file this program knows. -> its sha256"""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file of {kind} weights: {path}")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != KNOWN[kind]:
        print(f"note: {path} is not the known official file ({kind}: sha256 {digest[:16]}, known {KNOWN[kind][:16]}): say so where you quote it")
    return digest


def load_script(path, device):
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is no TorchScript file: {' '.join(str(error).split())[:150]}") from None


def inception_features(path, device="cpu"):
    """-> function frames (T, H, W, 3) -> (T, 2048). The script scales to 299 and to [-1, 1] itself."""
    net = load_script(path, device)

    @torch.no_grad()
    def features(frames):
        x = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).to(device)
        return torch.cat([net(part, return_features=True) for part in x.split(16)]).cpu().numpy()
    return features


def i3d_features(path, device="cpu"):
    """-> function frames (T, H, W, 3) -> (T // 16, 400), one row for every 16 frames: logits, as FVD wants them."""
    net = load_script(path, device)

    @torch.no_grad()
    def features(frames):
        clips = torch.from_numpy(np.ascontiguousarray(frames[:len(frames) // 16 * 16])).unflatten(0, (-1, 16)).permute(0, 4, 1, 2, 3)
        return torch.cat([net(c[None].to(device), rescale=True, resize=True, return_features=True) for c in clips]).cpu().numpy()
    return features


TEMPLATE = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]])     # of 112 px
MEAN_FACE = np.array([[.27, .37], [.73, .37], [.5, .58], [.315, .74], [.685, .74]])    # eyes, nose, corners of the mouth in a box


def similarity(src, dst):
    """The rotation, scale and shift that bring points src (k, 2) closest to dst (k, 2), least squares. -> (2, 3)"""
    a, b = src[:, 0] + 1j * src[:, 1], dst[:, 0] + 1j * dst[:, 1]                   # in complex numbers: b = m a + c
    m = np.vdot(a - a.mean(), b - b.mean()) / np.vdot(a - a.mean(), a - a.mean()).real
    c = b.mean() - m * a.mean()
    return np.array([[m.real, -m.imag, c.real], [m.imag, m.real, c.imag]])


def aligned(frames, box, points=None):
    """ArcFace's view: five points go to its template -> uint8 (T, 112, 112, 3). points (5, 2) in fractions of the side; without them
    (no detector here) the mean face in the box stands in: the same for reference and video, but coarser than the original."""
    x0, y0, x1, y1 = box
    points = MEAN_FACE * [x1 - x0, y1 - y0] + [x0, y0] if points is None else points
    back = similarity(TEMPLATE, np.asarray(points) * frames.shape[2])               # where in the frame a pixel of the result lies
    turn = lambda f: Image.fromarray(f).transform((112, 112), Image.Transform.AFFINE, back.ravel(), Image.Resampling.BILINEAR)
    return np.stack([np.asarray(turn(frame)) for frame in frames])


def arcface(path, device="cpu"):
    """-> function aligned faces uint8 (T, 112, 112, 3) -> unit vectors (T, 512). ValueError if the file or onnxruntime does not load."""
    if Path(path).suffix == ".onnx":
        try:
            import onnxruntime
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:          # noqa: BLE001, its exceptions have no common root
            raise ValueError(f"cannot load {path}: {' '.join(str(error).split())[:120]} (pip install onnxruntime)") from None
        net = lambda x: session.run(None, {session.get_inputs()[0].name: x})[0]
    else:
        script = load_script(path, device)
        net = lambda x: script(torch.from_numpy(x).to(device)).detach().cpu().numpy()

    def features(faces):
        x = np.ascontiguousarray((np.float32(faces) - 127.5).transpose(0, 3, 1, 2) / 127.5)
        y = np.concatenate([net(x[i:i + 1]) for i in range(len(x))])                # the ONNX file takes any batch, a script may not
        return y / np.linalg.norm(y, axis=1, keepdims=True)
    return features


# ---------------------------------------------------------------------------------------------------- read off the pixels


def grey(frames):
    return np.float32(frames) @ np.float32([0.299, 0.587, 0.114])                   # (T, H, W), 0..255


def cut_box(frames, box):
    x0, y0, x1, y1 = (min(max(round(v * frames.shape[2]), 0), frames.shape[2]) for v in box)
    return frames[:, y0:y1, x0:x1]


def sharpness(frames, box):
    """Variance of the Laplacian over the face, mean of the frames, grey levels squared. It halves when a face blurs a little."""
    g = grey(cut_box(frames, box))
    return float((4 * g[:, 1:-1, 1:-1] - g[:, 2:, 1:-1] - g[:, :-2, 1:-1] - g[:, 1:-1, 2:] - g[:, 1:-1, :-2]).var((1, 2)).mean())


def colour(frames, box):
    """Mean colour of the face -> (3,), 0..255."""
    return cut_box(frames, box).mean((0, 1, 2), dtype=np.float64)


def head_shift(frames, box):
    """How far the head is from where it is in the middle frame: (T, 2), x and y in fractions of the face's height, by phase correlation
    of eyes, nose and forehead (the mouth would move it). No network; turning the head shifts the features, so it is seen as well."""
    x0, y0, x1, y1 = box
    upper = (x0 + 0.1 * (x1 - x0), y0, x1 - 0.1 * (x1 - x0), y0 + 0.68 * (y1 - y0))
    g = grey(cut_box(frames, upper))
    h, w = g.shape[1:]
    window = np.hanning(h)[:, None] * np.hanning(w)
    spectrum = np.fft.rfft2((g - g.mean((1, 2), keepdims=True)) * window)
    cross = spectrum * spectrum[len(g) // 2].conj()
    fy, fx = np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)
    cross *= np.exp(-(fx ** 2 + fy ** 2) / (2 * 0.12 ** 2)) / (np.abs(cross) + 1e-9)    # whitened; a peak a few pixels wide
    map_ = np.fft.irfft2(cross, (h, w))
    out = np.zeros((len(g), 2))
    for i, m in enumerate(map_):
        y, x = np.unravel_index(m.argmax(), m.shape)
        for axis, (at, n, line) in enumerate(((x, w, m[y]), (y, h, m[:, x]))):      # a parabola through the peak and its neighbours
            a, b, c = line[at - 1], line[at], line[(at + 1) % n]
            out[i, axis] = (at + n // 2) % n - n // 2 + 0.5 * (a - c) / (a - 2 * b + c - 1e-12)
    return out / ((y1 - y0) * frames.shape[2])


def correlation(seen, true, use, lag=0):
    """Pearson correlation of seen[i + lag] and true[i] over the frames i with use[i]. What does not move correlates with nothing: 0; nan if the
    truth does not move, or for fewer than 12 frames."""
    i = np.flatnonzero(use)
    i = i[(i + lag >= 0) & (i + lag < len(seen)) & (i < len(true))]
    if len(i) < 12:
        return float("nan")
    x, y = np.float64(seen[i + lag]), np.float64(true[i])
    if y.std() < 1e-6:
        return float("nan")
    return float(((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std())) if x.std() > 1e-6 else 0.0


def picture_row(frames, before, start, box, tint, chunk=81, overlap=9):
    """What can be read off the pixels of one piece. before: the frame before it, or None; start: the number of its first frame; tint (3,): the
    colour of the reference. A seam is the step into the first new frame of a chunk, against the mean step inside chunks."""
    g = np.float32(frames if before is None else np.concatenate([before[None], frames])).mean(-1)
    change = np.abs(np.diff(g, axis=0)).mean((1, 2))                                # change[i] leads to frame number[i]
    number = np.arange(len(change)) + start + (before is None)
    border = (number >= chunk) & ((number - chunk) % (chunk - overlap) == 0)
    inside = float(change[~border].mean()) if (~border).any() else float("nan")
    return {"sharpness": sharpness(frames, box), "colour": float(np.abs(colour(frames, box) - tint).max()), "motion": inside,
            "seam": float(change[border].mean() / inside) if border.any() and inside > 0.01 else float("nan"),
            "head": 100 * float(np.sqrt(head_shift(frames, box).var(0).sum()))}
