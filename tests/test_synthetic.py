"""Properties of synthetic/, on painted faces and synthesised speech only: nothing is downloaded."""
import io
import json
import signal
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch

import data
from synthetic import faces, mesh, motion, phones, puppet, speech, warp
from synthetic.drawn import draw_face

STILL = ("yaw", "pitch", "roll", "tx", "ty", "eyelid", "brow", "gaze_x", "gaze_y")
SMALL = ["--portraits", "drawn", "--seconds", "2", "--size", "64"]


@pytest.fixture(scope="module")
def face():
    return draw_face(3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three clips of two seconds, made by the command line."""
    out = tmp_path_factory.mktemp("clips")
    puppet.main([*SMALL, "--out", str(out), "--clips", "3"])
    return out


def render(face, size=64, **values):
    """Render a face. values: name = list over frames, of mouth parameters or of motion; others 0.

    Returns the Puppet, frames, mask, gap.
    """
    n = len(next(iter(values.values())))
    mouth = np.array([values.get(key, [0.0] * n) for key in phones.KEYS], np.float32).T
    moving = {key: np.array(values.get(key, [0.0] * n)) for key in STILL}
    portrait = warp.Puppet(*face, size)
    return portrait, *portrait.render(motion.coefficients(mouth, moving))


def in_picture(portrait, x, y, side):
    """Face coordinates -> position in a picture of side x side pixels."""
    return (portrait.origin + np.stack([x, y], -1) @ portrait.axes * portrait.unit) * side


def frame_times(frames):
    return (np.arange(frames) + 0.5) / 25


def stop_line(capsys, main, *args):
    """Run a command that must end with exit code 2 and one line on stderr; return that line."""
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    assert stop.value.code == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.strip() and "clip/s]" not in x]
    assert len(lines) == 1
    return lines[0]


# ------------------------------------------------------------------------------------------ mouth
def test_lips_close_on_p_b_m_and_open_on_vowels():
    """Property: lips shut within 1 frame of every p, b, m; vowels open the jaw 4 x as far."""
    closed_sounds = 0
    jaw_closed, jaw_open = [], []
    for path in sorted(puppet.SPEECH.glob("*.tsv")):
        rows = phones.read_phones(path)
        frames = int(rows[-1][1] * 25)
        mouth = phones.mouth_curves(rows, frames)
        opening, times = phones.lip_opening(mouth), frame_times(frames)
        for start, end, label in rows:
            inside = (times >= start) & (times < end)
            if label in ("p", "b", "m") and end < times[-1]:
                near = (times > start - 1 / 25) & (times < end + 1 / 25)
                assert opening[near].min() < 0.01
                closed_sounds += 1
                jaw_closed += mouth[inside, 0].tolist()
            if label in ("ɑ", "æ", "aɪ", "ɔ", "eɪ", "ɛ"):
                jaw_open += mouth[inside, 0].tolist()
    assert closed_sounds > 20
    assert np.mean(jaw_open) > 4 * np.mean(jaw_closed)


def test_silence_closes_the_mouth_and_sounds_begin_early():
    """Property: long silence shuts the lips; a vowel rounds them before it sounds.

    The second is called coarticulation.
    """
    mouth = phones.mouth_curves([(0, 1, "sil"), (1, 1.3, "u"), (1.3, 2, "sil")], 50)
    rounding = mouth[:, phones.KEYS.index("lip_round")]
    assert phones.lip_opening(mouth[5:15]).max() < 0.01
    assert rounding[23:25].max() > 0.05 and rounding[10] < 0.01
    with pytest.raises(ValueError, match="unknown phone"):
        phones.mouth_curves([(0, 1, "zzz")], 10)


def test_shipped_recordings_are_the_synthesisers(tmp_path):
    """Property: assets/speech holds no person's voice; the synthesiser makes the same samples."""
    speech.main(["--speech", str(tmp_path), "--recordings", "1"])
    for end in ("flac", "tsv"):
        name = f"synth0000-0.{end}"
        if end == "tsv":
            assert (tmp_path / name).read_bytes() == (puppet.SPEECH / name).read_bytes()
        else:
            made, shipped = (soundfile.read(place / name)[0] for place in (tmp_path, puppet.SPEECH))
            np.testing.assert_allclose(made, shipped, atol=2 / 32768)


# --------------------------------------------------------------------------------------- renderer
def extreme_coefficients(portrait, n=40):
    """Random mouths and expressions at the far end of what coefficients() and random_motion() give.

    Returns (n, K).
    """
    rng = np.random.default_rng(0)
    mouths = np.array([row[:6] for row in phones.PHONES.values()], np.float32)
    mouth = mouths[rng.integers(len(mouths), size=n)]
    moving = {key: np.zeros(n) for key in STILL} | dict(
        eyelid=rng.choice([0.0, 0.5, 1.0], n), brow=rng.uniform(-0.03, 0.06, n),
        gaze_x=rng.uniform(-0.05, 0.05, n), gaze_y=rng.uniform(-0.02, 0.02, n))
    k = motion.coefficients(mouth, moving, 1.2)
    return warp.f32(np.stack([k[name] for name in portrait.names], 1))


def jacobian(points):
    """Determinant of the derivative of a map on a pixel grid (n, 2, h, w), in grid steps."""
    dx = points[..., :-1, 1:] - points[..., :-1, :-1]
    dy = points[..., 1:, :-1] - points[..., :-1, :-1]
    return dx[:, 0] * dy[:, 1] - dx[:, 1] * dy[:, 0]


def test_warp_has_no_fold(face):
    """Property: a fold would show skin twice, so every warp has a Jacobian > 0.

    That holds for each layer, where it is used, and for the head's pose.
    """
    portrait = warp.Puppet(*face, 64)
    (x0, y0, x1, y1), (gh, gw) = portrait.box, warp.EXPRESSION_GRID
    step_x, step_y = (x1 - x0) / gw, (y1 - y0) / gh
    x, y = np.meshgrid(x0 + step_x * (0.5 + np.arange(gw)), y0 + step_y * (0.5 + np.arange(gh)))
    under_mouth_line = y > portrait.line_y(portrait.mouth_u(x))
    on_eyelid = np.zeros_like(under_mouth_line)
    for lid in portrait.eyelids:
        between = (x > lid.x[0]) & (x < lid.x[-1])
        on_eyelid |= between & (y > lid.y.min() - lid.reach) & (y < np.interp(x, lid.x, lid.y))
    moves = torch.einsum("nk,klahw->lnahw", extreme_coefficients(portrait),
                         portrait.expression_basis)
    moved = warp.f32(np.stack([x, y])) + moves
    layers = (~under_mouth_line & ~on_eyelid, under_mouth_line | on_eyelid)
    for points, used in zip(moved, layers):                                  # (n, 2, gh, gw) each
        whole = used[1:, :-1] & used[:-1, 1:] & used[:-1, :-1]
        assert (jacobian(points)[:, whole] / (step_x * step_y)).min() > 0.1
    k = motion.random_motion(np.random.default_rng(0), 600, np.full(600, 1.0))
    c = portrait.undo_pose({name: np.float32(values[::5]) for name, values in k.items()})
    assert jacobian(c.movedim(-1, 1)).min() * (portrait.unit * 128) ** 2 > 0.1


def test_background_at_the_border_stays(face):
    """Property: the frame's border is still, however the head turns, while the face moves."""
    _, frames, *_ = render(face, yaw=[0, 0.3, -0.3, 0], pitch=[0, 0.15, -0.15, 0],
                           roll=[0, 0.1, -0.1, 0.1], tx=[0, 0.08, 0, 0])
    moved = np.abs(frames[1:].astype(int) - frames[0])
    border = np.ones((64, 64), bool)
    border[1:-1, 1:-1] = False
    assert moved[:, border].mean() < 1.5 and moved[:, 20:44, 20:44].mean() > 8


def test_gap_is_drawn_as_asked(face):
    """Property: the inner-lip gap of the picture is GAP times the opening, and p shuts it."""
    *_, gap = render(face, jaw_open=[0, 0.4, 0.9, 0.9], lip_close=[0, 0, 0, 1])
    np.testing.assert_allclose(gap, [0, 0.4 * phones.GAP, 0.9 * phones.GAP, 0], atol=0.015)


def test_open_mouth_is_dark_between_unchanged_lips(face):
    """Property: paint lies only between the lips: dark inside, the lower lip keeps its colour."""
    portrait, frames, *_ = render(face, 128, jaw_open=[0, 0.9])

    def colour(frame, y):
        x, y = (in_picture(portrait, portrait.mouth_x, y, 128) - 0.5).round().astype(int)
        return frame[y, x].astype(int)

    lower_lip = portrait.points[[14, 17], 1].mean()
    down = 0.76 * phones.GAP * 0.9
    at_rest = colour(frames[0], lower_lip)
    assert np.abs(colour(frames[1], lower_lip + down) - at_rest).max() < 30
    assert colour(frames[1], portrait.mouth_y + 0.55 * down).sum() < 0.6 * at_rest.sum()


def test_f_and_v_show_the_upper_teeth(face):
    """Property: on f the lower lip rises to the upper teeth, a light band between the lips."""
    portrait, frames, _, gap = render(face, 128, jaw_open=[0, 0.12], teeth=[0, 1])
    assert 0.02 < gap[1] < 0.08
    mouth = np.float32([[0.12, 0, 0, 0, 0, 0], [0.12, 0, 0, 0, 1, 0]])
    k = motion.coefficients(mouth, {})
    assert k["lower_lip"][1] < k["lower_lip"][0] and k["upper_lip"][1] > k["upper_lip"][0]
    x, y = in_picture(portrait, portrait.mouth_x, portrait.mouth_y, 128).round().astype(int)
    middle = frames[:, y - 3:y + 3, x - 3:x + 3].astype(float)
    white = (middle.min(-1) / middle.max(-1)).max((1, 2))   # lips are red, teeth hardly coloured
    assert white[1] > white[0] + 0.15, white


def test_shut_eyelid_hides_the_eye(face):
    """Property: a blink covers the whole eye: its white is gone, and back when the eye opens."""
    portrait, frames, *_ = render(face, 128, eyelid=[0, 1, 0])
    lid = portrait.eyelids[0]
    top, bottom = (lid.y + 0.2 * lid.travel).min(), (lid.y + 0.8 * lid.travel).max()
    x0, y0 = in_picture(portrait, lid.x[0], top, 128).astype(int)
    x1, y1 = in_picture(portrait, lid.x[-1], bottom, 128).astype(int)
    eye = frames[:, y0:y1 + 1, x0:x1 + 1].min(-1).astype(int)                # white: R, G and B
    assert eye[0].max() - eye[1].max() > 40 and (eye[0] == eye[2]).all()


def test_shut_eyelid_is_skin_whatever_is_above_the_eye(face):
    """Property: make-up and lashes above an open eye do not smear over the shut one.

    The eyelid is painted with skin instead of being stretched.
    """
    image, points = face
    portrait = warp.Puppet(image, points, 128)
    lid = portrait.eyelids[0]

    def rows_and_columns(share, side):
        y = lid.y + share * lid.travel
        x, y = in_picture(portrait, lid.x[8:25], y[8:25], side).astype(int).T
        return y, x

    made_up = image.copy()
    for share in np.linspace(-0.35, 0, 20):
        made_up[rows_and_columns(share, 256)] = 0
    _, (shut,), *_ = render((made_up, points), 128, eyelid=[1])
    skin = image[rows_and_columns(-0.6, 256)].mean()
    eyelid = shut[rows_and_columns(0.4, 128)].mean()
    assert eyelid > 0.75 * skin, (eyelid, skin)


def test_a_portrait_without_a_mouth_line_is_refused(face):
    """Property: no dark line between the lips, or brows on the eyelids: it cannot be moved well."""
    image, points = face
    with pytest.raises(ValueError, match="dark line"):
        warp.Puppet(np.full_like(image, 128), points, 64)
    low_brows = points.copy()
    for _, brow_edge in mesh.BROWS:
        low_brows[brow_edge, 1] += 10
    assert faces.can_move(image, points) and not faces.can_move(image, low_brows)
    with pytest.raises(ValueError, match="468"):
        warp.Puppet(np.zeros((8, 8, 3), np.uint8), np.zeros((4, 3)), 64)


def test_motion_has_natural_blinks_and_does_not_freeze():
    """Property: blinks are 2-8 s apart and last 2-6 frames; the head moves by degrees.

    If it did not move, a model could win by freezing.
    """
    moving = motion.random_motion(np.random.default_rng(0), 25 * 300, np.full(25 * 300, 0.5))
    change = np.diff((moving["eyelid"] > 0.1).astype(int))
    starts, ends = np.flatnonzero(change == 1), np.flatnonzero(change == -1)
    apart = np.diff(starts)
    assert 2 * 25 - 6 < apart.min() and apart.max() < 8 * 25 + 6
    lengths = ends[:len(starts)] - starts[:len(ends)]
    assert 2 <= lengths.min() and lengths.max() <= 6
    yaw = np.rad2deg(moving["yaw"])
    assert 2 < yaw.std() < 9 and np.abs(yaw).max() < 18


def test_morph_keeps_the_mesh_on_the_face():
    """Property: weight 0 is face A, and a morph's mouth line is the dark line of its lips."""
    a, b = draw_face(1), draw_face(2)
    image, points = faces.morph(a, b, 0.0)
    np.testing.assert_allclose(points, a[1])
    assert np.abs(image.astype(int) - a[0]).mean() < 3
    image, points = faces.morph(a, b, 0.5)
    x, y = points[[13, 14], :2].mean(0)
    column = image[int(y) - 6:int(y) + 7, int(x)].astype(int).sum(-1)
    assert abs(int(column.argmin()) - 6) <= 2


# ------------------------------------------------------------------------------------------- plan
SPEAKERS = {f"s{i}": [] for i in range(30)}


def many_faces(n=60, **fields):
    return [faces.Face(f"f{i}", seed=i, **{k: value(i) for k, value in fields.items()})
            for i in range(n)]


def plan(some_faces, clips, seed=0):
    cfg = puppet.Config(out=Path(), clips=clips, seed=seed, seconds=2, size=64)
    return puppet.plan(cfg, some_faces, SPEAKERS)


def names_in(plans, names):
    """Faces and speakers of the clips with these names."""
    used = [clip for clip in plans if clip.name in names]
    return {face.name for clip in used for face in clip.faces}, {clip.speaker for clip in used}


def test_validation_shares_no_face_and_no_speaker_with_training():
    """Property: neither a held-out face (also not inside a morph) nor its speaker is trained on."""
    plans, split = plan(many_faces(), 100)
    assert len(split["val"]) == 8 and len(split["train"]) == 92
    train_faces, train_speakers = names_in(plans, split["train"])
    val_faces, val_speakers = names_in(plans, split["val"])
    assert not train_faces & val_faces and not train_speakers & val_speakers


def test_more_clips_leave_the_first_ones_as_they_are():
    """Property: clip k follows from the seed and k alone, so --clips can grow."""
    some_faces = many_faces(yaw=lambda i: i % 20 - 10.0)
    (few, few_split), (more, more_split) = (plan(some_faces, n) for n in (50, 100))
    assert few == more[:50]
    every_12th = {f"puppet_{k:05d}" for k in range(5, 50, 12)}
    assert set(few_split["val"]) == every_12th < set(more_split["val"])
    morphs = [clip.faces for clip in more if clip.weight]
    assert len(morphs) > 15 and max(abs(face.yaw) for pair in morphs for face in pair) < 8


def test_no_folder_trains_on_what_another_holds_out():
    """Property: the held-out faces and speakers are the same for all seeds and portraits.

    Several folders are trained on together; figures would be of known faces otherwise.
    """
    some_faces = many_faces()
    used = {"train": set(), "val": set()}
    for seed in range(4):
        plans, split = plan(some_faces[10 * seed:], 200, seed)
        for part, names in split.items():
            used[part] |= set.union(*names_in(plans, names))
    assert {name[0] for name in used["val"]} == {"f", "s"} and len(used["val"]) < 15
    assert not used["val"] & used["train"]


def test_a_single_face_is_trained_on():
    """Property: of two faces one is held out, of one none: a folder without training is useless."""
    for count, held_out in (1, 0), (2, 1), (200, 15):
        names = [f"face {i}" for i in range(count)]
        a, b = puppet.divide(names, str, np.random.default_rng(0))
        assert (len(a), len(b)) == (held_out, count - held_out)


def test_morphs_are_made_of_faces_that_look_alike():
    """Property: only look-alikes are morphed, in half of the clips.

    Two unlike faces (beard and none) would show through each other.
    """
    looks = [np.float64([1, -1] * 216), np.float64([-1, 1] * 216)]
    plans, _ = plan(many_faces(look=lambda i: looks[i % 2]), 400)
    pairs = [clip.faces for clip in plans if clip.weight]
    assert 0.42 < len(pairs) / len(plans) < 0.58
    assert all(a.look is b.look and a is not b for a, b in pairs)


# ------------------------------------------------------------------------------------------ clips
def test_files_of_a_clip_agree(folder):
    """Property: mp4, json and npz agree in length and hold what is promised; the mask is a face."""
    for name in ("puppet_00000", "puppet_00002"):
        with av.open(str(folder / f"{name}.mp4")) as file:
            assert sum(1 for _ in file.decode(video=0)) == 50
            assert file.streams.video[0].average_rate == 25
            assert file.streams.audio[0].rate == 16000
        about = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        promised = "identity speaker recording start seed fps size portraits mouth"
        assert set(promised.split()) <= set(about)
        with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
            arrays = dict(file)
        assert {key: array.shape for key, array in arrays.items()} == dict(
            mask=(50, 16, 16), mouth=(50, 6), opening=(50,), gap=(50,), pose=(50, 5), blink=(50,),
            box=(4,))
        mask = arrays["mask"]
        assert mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 255}
        x0, y0, x1, y1 = arrays["box"]
        ellipse = np.pi / 4 * (x1 - x0) * (y1 - y0) / 64 ** 2
        assert 0.8 * ellipse < (mask > 0).mean() < 1.2 * ellipse


def test_lips_are_drawn_shut_on_p_b_m(folder):
    """Property: in finished clips the drawn gap, too, closes within a frame of every p, b, m."""
    total = 0
    for path in sorted(folder.glob("puppet_*.json")):
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as file:
            gap = file["gap"]
        times = frame_times(len(gap))
        for start, end, label in json.loads(path.read_text(encoding="utf-8"))["phones"]:
            if label in ("p", "b", "m") and end < times[-1]:
                near = (times > start - 0.04) & (times < end + 0.04)
                assert gap[near].min() < 0.01, (path.name, start, label)
                total += 1
    assert total >= 3


@pytest.mark.parametrize("seed, start", [(2, 0.0), (0, 0.9)])
def test_phones_of_a_clip_are_where_its_sound_is(tmp_path, seed, start):
    """Property: a click inside a phone stays inside it, from a pause on and in the second piece."""
    rows = [(0, 0.5, "ɑ"), (0.5, 1.3, "sil"), (1.3, 2.5, "i"), (2.5, 2.6, "p"), (2.6, 4, "sil")]
    text = "".join(f"{a}\t{b}\t{label}\n" for a, b, label in rows)
    recordings = []
    for n in range(2):
        wave = np.zeros(16000 * 4, np.float32)
        wave[int(16000 * 2.55)] = 0.9
        flac, tsv = tmp_path / f"a-{n}.flac", tmp_path / f"a-{n}.tsv"
        soundfile.write(flac, wave, 16000)
        tsv.write_text(text, encoding="utf-8")
        recordings.append((flac, tsv))
    rng = np.random.default_rng(seed)
    audio, labels, pieces = puppet.assemble_speech(rng, recordings, 220)
    clicks = np.flatnonzero(np.abs(audio) > 0.5 * np.abs(audio).max()) / 16000
    p_sounds = [(a, b) for a, b, label in labels if label == "p"]
    assert len(clicks) == len(p_sounds) == 2 == len({name for name, *_ in pieces[:2]})
    assert [piece[1] for piece in pieces[:2]] == [start, 0]
    np.testing.assert_allclose(clicks, np.mean(p_sounds, 1), atol=0.001)
    np.testing.assert_allclose(clicks[0], 2.55 - start, atol=0.001)
    starts = [row[0] for row in labels]
    assert starts[0] == 0 and starts == sorted(starts) and labels[-1][1] <= 8.8


def test_mirrored_clips_mirror_everything(tmp_path, monkeypatch):
    """Property: video, mask, box and pose of a mirrored clip are a reflection of the plain one."""
    cfg = puppet.Config(out=tmp_path, clips=1, seconds=1, size=64)
    recordings = puppet.read_speech(puppet.SPEECH)
    (clip,), _ = puppet.plan(cfg, [faces.Face("f", seed=[0, 3])], recordings)
    videos, arrays = [], []

    def keep_video(path, frames, audio):
        videos.append(frames)
        path.touch()

    monkeypatch.setattr(puppet, "write_mp4", keep_video)
    for clip.mirror in (False, True):
        puppet.make_clip(clip)
        with np.load(tmp_path / "puppet_00000.npz", allow_pickle=False) as file:
            arrays.append(dict(file))
    plain, mirrored = arrays
    assert (videos[1] == videos[0][:, :, ::-1]).all() and (videos[1] != videos[0]).any()
    assert (mirrored["mask"] == plain["mask"][:, :, ::-1]).all()
    assert (mirrored["mask"] != plain["mask"]).any()
    np.testing.assert_allclose(mirrored["pose"], plain["pose"] * [-1, 1, -1, -1, 1], atol=1e-6)
    np.testing.assert_allclose(mirrored["box"][[0, 2]], 64 - plain["box"][[2, 0]], atol=1e-4)


# --------------------------------------------------------------------------------------- commands
def test_same_seed_same_bytes_and_a_restart_makes_only_what_is_missing(folder):
    """Property: a removed clip comes back byte for byte; another seed gives another clip."""
    kept, lost = folder / "puppet_00000.mp4", folder / "puppet_00001.mp4"
    before, stamp = lost.read_bytes(), kept.stat().st_mtime_ns
    arrays = (folder / "puppet_00001.npz").read_bytes()
    lost.unlink()
    puppet.main([*SMALL, "--out", str(folder), "--clips", "3"])
    assert lost.read_bytes() == before and kept.stat().st_mtime_ns == stamp
    with np.load(folder / "puppet_00001.npz") as new, np.load(io.BytesIO(arrays)) as old:
        assert all(new[key].tobytes() == old[key].tobytes() for key in old)
    other = folder / "other"
    other.mkdir()
    for end in ("mp4", "json", "npz"):                      # a clip of another plan does not count
        name = f"puppet_00000.{end}"
        (other / name).write_bytes((folder / name).read_bytes())
    puppet.main([*SMALL, "--out", str(other), "--clips", "1", "--seed", "1"])
    assert (other / "puppet_00000.mp4").read_bytes() != kept.read_bytes()


def test_workers_do_not_change_the_clips(folder, tmp_path):
    """Property: two processes write the same bytes as one."""
    puppet.main([*SMALL, "--out", str(tmp_path), "--clips", "3", "--workers", "2"])
    for k in range(3):
        for end in ("mp4", "json"):
            name = f"puppet_{k:05d}.{end}"
            assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_killed_run_leaves_no_old_video_under_new_labels(tmp_path, monkeypatch):
    """Property: when a clip replaces another plan's, the old mp4 goes first: no mix is left."""
    command = ["--seconds", "1", "--size", "32", "--clips", "1", "--out", str(tmp_path)]
    puppet.main(command)
    replace = puppet.os.replace

    def killed(a, b):
        if str(b).endswith("00.npz"):
            raise OSError("killed")
        replace(a, b)

    monkeypatch.setattr(puppet.os, "replace", killed)
    with pytest.raises(SystemExit):
        puppet.main([*command, "--seed", "1"])
    assert not (tmp_path / "puppet_00000.mp4").exists()


def test_what_kill_leaves_is_never_taken_for_a_clip(tmp_path, monkeypatch, capsys):
    """Property: `kill` ends like Ctrl-C, in one line; a half video is no clip for data.py."""
    def killed(path, frames, audio):
        path.with_suffix(".part").write_bytes(b"half a video")              # as write_mp4 does
        signal.raise_signal(signal.SIGTERM)

    def unhandled(*_):
        raise AssertionError("the process would be gone without a message")

    signal.signal(signal.SIGTERM, unhandled)
    monkeypatch.setattr(puppet, "write_mp4", killed)
    with pytest.raises(SystemExit) as stop:
        puppet.main(["--out", str(tmp_path), "--seconds", "1", "--size", "32", "--clips", "1"])
    assert stop.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("synthetic.puppet: stopped")
    assert list(tmp_path.glob(".*.part")) and data.media_files(tmp_path, data.VIDEOS) == []


def test_bad_input_is_one_clear_line(tmp_path, capsys):
    """Property: a user's mistake gives exit code 2, one line on stderr, and no files."""
    out = tmp_path / "out"
    for options, expected in (
        (("--speech", tmp_path), "no *.flac with phones"),
        (("--portraits", tmp_path), "no portraits.npz"),
        (("--part", "val", "--clips", 5), "none of 5 clips"),
        (("--clips", 0), "--clips, --workers >= 1"),
        (("--seed", -1), "--seed >= 0"),
        (("--seconds", "inf"), "--seconds 1-3600"),
        (("--size", 36), "--size 32, 40"),
        (("--lip-gap", 0.1, 0.05), "--lip-gap must rise"),
        (("--lip-gap", 0, 0.2), "--lip-gap must rise"),
    ):
        line = stop_line(capsys, puppet.main, "--out", out, *options)
        assert line.startswith("synthetic.puppet: ") and expected in line, options
    assert "--recordings" in stop_line(capsys, speech.main, "--speech", out, "--recordings", 0)
    assert not out.exists()


def test_broken_files_are_named(tmp_path, capsys):
    """Property: each broken input gives exit code 2 and one line with the file's name."""
    for name in ("speech", "faces", "out"):
        (tmp_path / name).mkdir()
    command = ["--out", tmp_path / "out", "--clips", 1, "--seconds", 1, "--size", 32]

    def line(*options):
        return stop_line(capsys, puppet.main, *command, *options)

    speech_option = ["--speech", tmp_path / "speech"]
    flac, tsv = (tmp_path / "speech" / f"a-0.{end}" for end in ("flac", "tsv"))
    flac.write_bytes(b"")
    tsv.write_text("0\t1\tsil\n", encoding="utf-8")
    assert "a-0.flac" in line(*speech_option)
    soundfile.write(flac, np.zeros(16000), 16000)
    tsv.write_text("0\n", encoding="utf-8")
    assert "a-0.tsv" in line(*speech_option)
    for content in (b"", b"PK\x03\x04 cut"):
        (tmp_path / "faces" / "portraits.npz").write_bytes(content)
        assert "portraits.npz" in line("--portraits", tmp_path / "faces")
    arrays = tmp_path / "out" / "puppet_00000.npz"
    for content in ("", "PK cut"):                          # what a full disk leaves of a clip
        puppet.main([str(arg) for arg in command])
        capsys.readouterr()
        arrays.write_text(content, encoding="utf-8")
        assert "puppet_00000.npz" in line()
        arrays.unlink()
    for end, content in (("mp4", ""), ("npz", ""), ("json", "[]")):
        (tmp_path / "out" / f"puppet_00000.{end}").write_text(content, encoding="utf-8")
    assert "puppet_00000.json" in line()
