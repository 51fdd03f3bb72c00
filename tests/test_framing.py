"""A photo's face is found, framed as in training, and what was done is said."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from talking import landmarker

import common
import data
import prepare_data
from measure.framing import (
    COVERED,
    EYES_APART,
    EYES_HEIGHT,
    NO_FACE,
    SMALL,
    Found,
    Square,
    complaints,
    cut_out,
    find_faces,
    frame_face,
    square_of,
)
from measure.landmarks import eye_centres, rotation

pytestmark = pytest.mark.usefixtures("one_thread")
PORTRAIT = Image.open(ROOT / "assets" / "portrait.jpg").convert("RGB")


@pytest.fixture(scope="module")
def truth():
    """Points of the shipped portrait as it is. -> (478, 3)"""
    return landmarker().points(np.array(PORTRAIT)[None])[0][0]


def ground(width, height):
    """A landscape: sky, hills and meadow, nobody there."""
    y, x = np.mgrid[:height, :width] / height
    hill = y > 0.5 + 0.1 * np.sin(7 * x) + 0.03 * np.sin(31 * x)
    grass = 20 * np.sin(90 * x) * np.sin(70 * y)
    sky = np.stack([120 + 100 * y, 160 + 70 * y, 230 + 0 * y], -1)
    meadow = np.stack([60 + grass, 120 + grass, 50 + grass], -1)
    return Image.fromarray(np.where(hill[..., None], meadow, sky).clip(0, 255).astype(np.uint8))


def put(photo, points, side, middle, roll):
    """The portrait into a photo, turned clockwise by `roll` degrees. -> its points there"""
    face = PORTRAIT.resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")
    face = face.rotate(-roll, Image.Resampling.BICUBIC, expand=True)
    corner = middle[0] - face.width // 2, middle[1] - face.height // 2
    photo.paste(face, corner, face)
    moved = points * side / PORTRAIT.width
    turn = rotation(torch.tensor(math.radians(roll)))
    centre = torch.tensor([corner[0] + face.width / 2, corner[1] + face.height / 2])
    moved[:, :2] = (moved[:, :2] - side / 2) @ turn.T + centre
    return moved


def distance(square, other):
    """-> the largest difference in shares of the side, and in degrees"""
    a, b = np.array(square), np.array(other)
    return np.abs(a - b)[:3].max() / b[2], abs(a - b)[3]


@pytest.mark.parametrize("width, height, side, middle, roll", [
    (640, 480, 64, (500, 130), 12),                 # far away
    (270, 480, 90, (140, 60), 0),                   # somebody who stands
    (480, 640, 200, (100, 500), -20),               # cut by the photo's edge
    (640, 480, 300, (320, 240), 45),                # leaning over
    (1500, 1000, 330, (1100, 400), 20)], ids=lambda value: str(value).replace(", ", "-"))
def test_a_face_is_found_wherever_it_is(truth, width, height, side, middle, roll):
    """Property: place, size and roll of a face do not matter: the square is right within 5 % of its
    side and 3 degrees, and in what is cut out the eyes are level and where training had them."""
    photo = ground(width, height)
    expected = square_of(put(photo, truth, side, middle, roll))
    faces = find_faces(np.asarray(photo))
    assert len(faces) == 1
    off, degrees = distance(square_of(faces[0].points), expected)
    assert off < 0.05 and degrees < 3
    portrait, note, warnings = frame_face("photo", photo, 128)
    assert bool(warnings) == (faces[0].eyes < SMALL) and "cropped" in note
    left, right = eye_centres(landmarker().points(np.array(portrait)[None])[0][0])[:, :2]
    assert abs(right[1] - left[1]) < 0.05 * 128
    middle = (left + right) / 2 / 128
    assert abs(middle[0] - 0.5) < 0.05 and abs(middle[1] - EYES_HEIGHT) < 0.05
    assert abs((right - left).norm() / 128 - EYES_APART) < 0.05 * 0.5


def test_a_portrait_that_is_framed_is_taken_whole():
    """Property: the shipped portrait, framed like the training pictures, loses no pixel, so it
    makes the same video as with --crop none."""
    portrait, note, warnings = frame_face("photo", PORTRAIT, 128)
    whole = common.load_image(ROOT / "assets" / "portrait.jpg", 128)
    assert torch.equal(common.centre_square(portrait, 128), whole)
    assert "taken whole" in note and not warnings


def test_of_two_faces_the_larger_or_the_one_asked_for(truth):
    """Property: a second face is said; --face 2 takes it; a third one, or any in a landscape, is
    refused in one line."""
    photo = ground(640, 480)
    expected = [put(photo, truth, 250, (180, 260), 0), put(photo, truth, 180, (500, 200), 0)]
    faces = find_faces(np.asarray(photo))
    for face, points in zip(faces, expected):
        assert distance(square_of(face.points), square_of(points))[0] < 0.05
    first, _, warnings = frame_face("photo", photo, 64)
    assert len(warnings) == 1 and warnings[0].startswith("2 faces")
    second, _, warnings = frame_face("photo", photo, 64, 2)
    assert not warnings and np.abs(np.array(first, int) - np.array(second, int)).max() > 50
    with pytest.raises(ValueError, match="photo: there is no face 3, only 2"):
        frame_face("photo", photo, 64, 3)
    with pytest.raises(ValueError, match="photo: there is no face in it"):
        frame_face("photo", ground(320, 240), 64)


def test_the_edge_is_repeated_where_the_photo_ends():
    """Property: a square inside a photo is an ordinary crop; outside, the last row or column goes
    on; a roll is turned back."""
    x = np.tile(np.arange(100, dtype=np.uint8)[:, None], (80, 1, 3))
    photo = Image.fromarray(x)
    inside = np.array(cut_out(photo, Square(50, 40, 40, 0), 40))
    assert np.array_equal(inside, x[20:60, 30:70])
    outside = np.array(cut_out(photo, Square(90, 10, 40, 0), 40))
    assert np.array_equal(outside[0, :30], x[0, 70:]) and (outside[:, 30:] == 99).all()
    turned = np.array(cut_out(photo, Square(50, 40, 30, 90), 30)).astype(int)
    assert np.abs(turned[:, :, 0] - (64.5 - np.arange(30))[:, None]).max() <= 1     # right is up


def test_a_face_beyond_the_picture_is_none(truth, monkeypatch):
    """Property: a candidate whose square has nothing of the picture in it is passed over."""
    seen = SimpleNamespace(score=1.0, box=torch.zeros(4), moved=lambda x, y: seen)
    finder = SimpleNamespace(detect=lambda cut: [seen],
                             refine=lambda image, face: (truth + 10_000, 1.0))
    monkeypatch.setattr("measure.framing.shipped_landmarker", lambda: finder)
    assert find_faces(np.zeros((128, 128, 3), np.uint8)) == []


def test_what_makes_a_bad_video_is_said(truth):
    """Property: a small, turned, uncertain or second face is one sentence each."""
    assert not complaints(Found(truth, 1.0), 1)
    angle = math.radians(40)                                        # looks aside
    aside = truth - truth.mean(0)
    turn = torch.tensor([[math.cos(angle), 0, -math.sin(angle)], [0, 1, 0],
                         [math.sin(angle), 0, math.cos(angle)]])
    small = truth * (SMALL - 1) / Found(truth, 1.0).eyes
    for face, count, word in ((Found(small, 1.0), 1, "small"), (Found(aside @ turn, 1.0), 1, "40"),
                              (Found(truth, COVERED - 0.01), 1, "covered"),
                              (Found(truth, 1.0), 2, "2 faces")):
        sentence, = complaints(face, count)
        assert word in sentence
    assert NO_FACE < SMALL


def test_clips_are_cut_like_photos(truth):
    """Property: prepare_data.py cuts footage to the square that infer.py cuts a photo to."""
    photo = ground(640, 480)
    expected = square_of(put(photo, truth, 200, (300, 220), 0))
    box = prepare_data.face_detector()(np.asarray(photo))
    x0, y0, x1, y1 = data.square_crop(640, 480, box)
    assert distance(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, 0), expected)[0] < 0.05
    assert prepare_data.face_detector()(np.asarray(ground(160, 120))) is None
