"""Laws of puppet.py and drawn.py, on drawn faces and synthesised speech only: nothing is downloaded."""
import io
import json
import signal
from argparse import Namespace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import data
import drawn
import puppet

SPEECH = Path(puppet.__file__).parent / "assets" / "speech"
STILL = dict.fromkeys(("yaw", "pitch", "roll", "tx", "ty", "lid", "brow", "gaze_x", "gaze_y"), 0.0)


def frames_of(face, size=64, **poses):
    """Render a drawn face; poses: name = list of values, of mouth parameters or of life(). Others rest."""
    n = len(next(iter(poses.values())))
    m = np.array([poses.get(k, [0.0] * n) for k in puppet.KEYS], np.float32).T
    x = {k: np.array(poses.get(k, [v] * n)) for k, v in STILL.items()}
    doll = drawn.Puppet(*face, size)
    return doll, *doll.render(puppet.coefficients(m, x))


@pytest.fixture(scope="module")
def face():
    return drawn.draw_face(3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three clips of two seconds, made by the command line."""
    out = tmp_path_factory.mktemp("clips")
    puppet.main(["--portraits", "drawn", "--out", str(out), "--clips", "3", "--seconds", "2", "--size", "64"])
    return out


def extreme_coefficients(doll, n=40):
    """Random mouth shapes and expressions at the far end of what coefficients() and life() give: (n, K)."""
    r = np.random.default_rng(0)
    m = np.array([v[:6] for v in puppet.PHONES.values()], np.float32)[r.integers(len(puppet.PHONES), size=n)]
    x = {k: np.zeros(n) for k in STILL} | dict(lid=r.choice([0., .5, 1.], n), brow=r.uniform(-.03, .06, n),
                                               gaze_x=r.uniform(-.05, .05, n), gaze_y=r.uniform(-.02, .02, n))
    k = puppet.coefficients(m, x, 1.2)
    return torch.tensor(np.stack([k[name] for name in doll.names], 1), dtype=torch.float32)


def jacobian(points):
    """Determinant of the derivative of a map given on a pixel grid (n, 2, h, w), per grid step squared."""
    dx, dy = points[..., :-1, 1:] - points[..., :-1, :-1], points[..., 1:, :-1] - points[..., :-1, :-1]
    return dx[:, 0] * dy[:, 1] - dx[:, 1] * dy[:, 0]


def test_closures_fall_on_p_b_m_and_vowels_are_open():
    """The lips are shut within 1 frame of every p, b, m; open vowels open the jaw 4 times as far."""
    shut, total, open_, closed = 0, 0, [], []
    for tsv in sorted(SPEECH.glob("*.tsv")):
        phones = puppet.read_phones(tsv)
        n = int(phones[-1][1] * puppet.FPS)
        m = puppet.mouth_curves(phones, n)
        lips, t = puppet.lip_opening(m), (np.arange(n) + .5) / puppet.FPS
        for start, end, label in phones:
            inside = (t >= start) & (t < end)
            if label in ("p", "b", "m") and end < t[-1]:
                near = (t > start - 1 / puppet.FPS) & (t < end + 1 / puppet.FPS)
                total, shut = total + 1, shut + (lips[near].min() < .01)
                closed += m[inside, 0].tolist()
            if label in ("ɑ", "æ", "aɪ", "ɔ", "eɪ", "ɛ"):
                open_ += m[inside, 0].tolist()
    assert total > 20 and shut == total
    assert np.mean(open_) > 4 * np.mean(closed)


def test_silence_is_a_closed_resting_mouth_and_sounds_begin_early():
    """Long silence shuts the lips; a rounded vowel rounds them before it sounds (coarticulation)."""
    m = puppet.mouth_curves([(0, 1, "sil"), (1, 1.3, "u"), (1.3, 2, "sil")], 50)
    assert puppet.lip_opening(m[5:15]).max() < .01
    assert m[23:25, 2].max() > .05 and m[10, 2] < .01
    with pytest.raises(ValueError, match="unknown phone"):
        puppet.mouth_curves([(0, 1, "zzz")], 10)


def test_warp_has_no_fold(face):
    """A fold shows skin twice. Each layer's warp (where it is used) and the head's have Jacobians > 0."""
    doll = drawn.Puppet(*face, 64)
    (x0, y0, x1, y1), (gh, gw) = doll.box, drawn.EXPR_GRID
    sx, sy = (x1 - x0) / gw, (y1 - y0) / gh
    x, y = np.meshgrid(x0 + sx * (.5 + np.arange(gw)), y0 + sy * (.5 + np.arange(gh)))
    under = y > np.polyval(doll.line, np.clip(doll.mouth_u(x), -1, 1))
    lids = np.zeros_like(under)
    for xs, top, _, reach in doll.lids:
        lids |= (x > xs[0]) & (x < xs[-1]) & (y > top.min() - reach) & (y < np.interp(x, xs, top))
    grid = drawn.f32(np.stack([x, y]))
    moved = grid + torch.einsum("nk,klahw->lnahw", extreme_coefficients(doll), doll.expr)
    for points, used in zip(moved, (~under & ~lids, under | lids)):     # (n, 2, gh, gw) each
        whole = used[1:, :-1] & used[:-1, 1:] & used[:-1, :-1]
        assert (jacobian(points)[:, whole] / (sx * sy)).min() > .1
    k = puppet.life(np.random.default_rng(0), 600, np.full(600, 1.0))
    c = doll.unpose({name: np.float32(v[::5]) for name, v in k.items()})
    assert jacobian(c.movedim(-1, 1)).min() * (doll.unit * 128) ** 2 > .1


def test_background_at_the_border_stays(face):
    """The frame's border does not swim, however the head turns, while the face does move."""
    poses = dict(yaw=[0, .3, -.3, 0], pitch=[0, .15, -.15, 0], roll=[0, .1, -.1, .1], tx=[0, .08, 0, 0])
    _, frames, *_ = frames_of(face, **poses)
    moved = np.abs(frames[1:].astype(int) - frames[0])
    rim = np.ones((64, 64), bool)
    rim[1:-1, 1:-1] = False
    assert moved[:, rim].mean() < 1.5 and moved[:, 20:44, 20:44].mean() > 8


def test_gap_is_drawn_as_meant(face):
    """The inner-lip gap of the picture is GAP times the opening of the mouth parameters, and p shuts it."""
    _, _, _, gap = frames_of(face, jaw_open=[0, .4, .9, .9], lip_close=[0, 0, 0, 1])
    np.testing.assert_allclose(gap, [0, .4 * puppet.GAP, .9 * puppet.GAP, 0], atol=.015)


def test_open_mouth_shows_a_dark_inside_between_unchanged_lips(face):
    """The paint lies between the lips: the mouth's middle is dark, the moved lower lip keeps its colour."""
    doll, frames, _, _ = frames_of(face, 128, jaw_open=[0, .9])
    def at(frame, y):
        px = (doll.origin + np.array([doll.mx, y]) @ doll.axes * doll.unit) * 128
        return frame[round(px[1] - .5), round(px[0] - .5)].astype(int)
    lip = doll.p[[14, 17], 1].mean()                                    # the middle of the lower lip
    down = .76 * puppet.GAP * .9
    assert np.abs(at(frames[1], lip + down) - at(frames[0], lip)).max() < 30
    assert at(frames[1], doll.my + .55 * down).sum() < .6 * at(frames[0], lip).sum()


def test_shut_lid_hides_the_eye(face):
    """A blink covers the whole eye: its whites are gone when the lid is down and back when it is up."""
    doll, frames, _, _ = frames_of(face, 128, lid=[0, 1, 0])
    xs, top, way, _ = doll.lids[0]
    corner = lambda x, y: (doll.origin + np.array([x, y]) * doll.unit) * 128
    (x0, y0), (x1, y1) = corner(xs[0], (top + .2 * way).min()), corner(xs[-1], (top + .8 * way).max())
    eye = frames[:, int(y0):int(y1) + 1, int(x0):int(x1) + 1].min(-1).astype(int)  # white: in R, G and B
    assert eye[0].max() - eye[1].max() > 40 and (eye[0] == eye[2]).all()


def test_shut_lid_is_skin_whatever_is_painted_above_the_eye(face):
    """Make-up and lashes above an open eye would be stretched to streaks over the shut one: the lid is painted with skin."""
    image, points = face
    doll = drawn.Puppet(image, points, 128)
    xs, top, way, _ = doll.lids[0]
    at = lambda f, side: ((doll.origin + np.stack([xs[8:25], (top + f * way)[8:25]], 1) @ doll.axes * doll.unit) * side).astype(int).T
    made_up = image.copy()
    for f in np.linspace(-.35, 0, 20):
        made_up[tuple(at(f, 256)[::-1])] = 0
    _, (shut,), *_ = frames_of((made_up, points), 128, lid=[1])
    skin, lid = image[tuple(at(-.6, 256)[::-1])].mean(), shut[tuple(at(.4, 128)[::-1])].mean()
    assert lid > .75 * skin, (lid, skin)


def test_life_has_natural_blinks_and_does_not_freeze():
    """Blinks are 2-8 s apart and last 2-6 frames; the head moves by degrees, or freezing would win."""
    x = puppet.life(np.random.default_rng(0), 25 * 300, np.full(25 * 300, .5))
    down = x["lid"] > .1
    starts, ends = (np.flatnonzero(np.diff(down.astype(int)) == s) for s in (1, -1))
    assert 2 * 25 - 6 < np.diff(starts).min() and np.diff(starts).max() < 8 * 25 + 6
    assert 2 <= (ends[:len(starts)] - starts[:len(ends)]).min() and (ends - starts[:len(ends)]).max() <= 6
    assert 2 < np.rad2deg(x["yaw"].std()) < 9 and np.rad2deg(np.abs(x["yaw"]).max()) < 18


def test_sidecar_describes_the_clip(folder):
    """mp4, json and npz agree in length and carry the promised keys; the mask covers the face box."""
    for name in ("puppet_00000", "puppet_00002"):
        with av.open(str(folder / f"{name}.mp4")) as f:
            assert sum(1 for _ in f.decode(video=0)) == 50
            assert f.streams.video[0].average_rate == 25 and f.streams.audio[0].rate == 16000
        meta = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        promised = "identity speaker recording start seed fps size portraits mouth"
        assert set(promised.split()) <= set(meta)
        with np.load(folder / f"{name}.npz", allow_pickle=False) as f:
            d = dict(f)
        assert {k: v.shape for k, v in d.items()} == dict(
            mask=(50, 16, 16), mouth=(50, 6), opening=(50,), gap=(50,), pose=(50, 5), blink=(50,), box=(4,))
        assert d["mask"].dtype == np.uint8 and set(np.unique(d["mask"])) == {0, 255}
        x0, y0, x1, y1 = d["box"]
        ellipse = np.pi / 4 * (x1 - x0) * (y1 - y0) / 64 ** 2
        assert .8 * ellipse < (d["mask"] > 0).mean() < 1.2 * ellipse


def test_same_seed_same_bytes_and_a_restart_makes_only_what_is_missing(folder):
    """A removed clip comes back byte for byte, the others are left alone; another seed gives another clip."""
    kept, lost = folder / "puppet_00000.mp4", folder / "puppet_00001.mp4"
    before, stamp = lost.read_bytes(), kept.stat().st_mtime_ns
    arrays = (folder / "puppet_00001.npz").read_bytes()
    lost.unlink()
    common = ["--portraits", "drawn", "--seconds", "2", "--size", "64"]
    puppet.main([*common, "--out", str(folder), "--clips", "3"])
    assert lost.read_bytes() == before and kept.stat().st_mtime_ns == stamp
    with np.load(folder / "puppet_00001.npz") as new:
        old = np.load(io.BytesIO(arrays))
        assert all(new[k].tobytes() == old[k].tobytes() for k in old)
    (folder / "other").mkdir()
    for end in ("mp4", "json", "npz"):      # a clip of another plan does not count
        (folder / "other" / f"puppet_00000.{end}").write_bytes((folder / f"puppet_00000.{end}").read_bytes())
    puppet.main([*common, "--out", str(folder / "other"), "--clips", "1", "--seed", "1"])
    assert (folder / "other" / "puppet_00000.mp4").read_bytes() != kept.read_bytes()


def test_validation_shares_no_face_and_no_speaker_with_training():
    """Held out means: neither the portrait (also not inside a morph) nor the voice occurs in training."""
    faces = [dict(path=None, seed=i, name=f"f{i}", yaw=0., pitch=0., sex="", look=0.) for i in range(60)]
    args = Namespace(seed=0, clips=100, seconds=2, size=64, out=Path())
    jobs, split = puppet.plan(args, faces, {f"s{i}": [] for i in range(30)})
    seen = {part: ({f["name"] for j in jobs if j["name"] in split[part] for f in j["faces"]},
                   {j["speaker"] for j in jobs if j["name"] in split[part]}) for part in split}
    assert len(split["val"]) == 8 and len(split["train"]) == 92
    assert not seen["train"][0] & seen["val"][0] and not seen["train"][1] & seen["val"][1]


def test_morph_keeps_the_mesh_on_the_face():
    """Weight 0 is A, and a morph's mesh lies on its picture: the mouth line is the dark line of the lips."""
    a, b = drawn.draw_face(1), drawn.draw_face(2)
    image, points = puppet.morph(a, b, 0.0)
    np.testing.assert_allclose(points, a[1])
    assert np.abs(image.astype(int) - a[0]).mean() < 3
    image, points = puppet.morph(a, b, 0.5)
    x, y = points[[13, 14], :2].mean(0)
    column = image[int(y) - 6:int(y) + 7, int(x)].astype(int).sum(-1)
    assert abs(int(column.argmin()) - 6) <= 2


def test_bad_input_is_one_clear_line(tmp_path, capsys):
    """No traceback for a user's mistake: exit code 2 and one line on stderr."""
    for extra in (["--speech", str(tmp_path)], ["--portraits", str(tmp_path)], ["--clips", "5", "--part", "val"]):
        with pytest.raises(SystemExit) as stop:
            puppet.main(["--out", str(tmp_path / "out"), *extra])
        assert stop.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
    for lips in ((".1", ".05"), ("0", ".2")):
        with pytest.raises(SystemExit) as stop:
            puppet.main(["--out", str(tmp_path / "out"), "--lips", *lips])
        assert stop.value.code == 2 and "--lips FROM TO must rise" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="468"):
        drawn.Puppet(np.zeros((8, 8, 3), np.uint8), np.zeros((4, 3)), 64)


def test_more_clips_leave_the_first_ones_as_they_are():
    """Clip k follows from the seed and k alone, so --clips can grow and a second run makes only the rest."""
    faces = [dict(path=None, seed=i, name=f"f{i}", yaw=i % 20 - 10., pitch=0., sex="", look=0.) for i in range(60)]
    plans = [puppet.plan(Namespace(seed=0, clips=n, seconds=2, size=64, out=Path()), faces,
                         {f"s{i}": [] for i in range(30)}) for n in (50, 100)]
    assert plans[0][0] == plans[1][0][:50]
    assert set(plans[0][1]["val"]) == {f"puppet_{k:05d}" for k in range(5, 50, 12)} < set(plans[1][1]["val"])
    morphs = [j["faces"] for j in plans[1][0] if j["weight"]]
    assert len(morphs) > 15 and max(abs(f["yaw"]) for pair in morphs for f in pair) < 8


def test_no_folder_trains_on_what_another_holds_out():
    """Folders of several seeds and choices of portraits are trained on together: who is held out by one must be by all, or figures are of faces
    known by heart."""
    faces = [dict(path=None, seed=i, name=f"f{i}", yaw=0., pitch=0., sex="", look=0.) for i in range(60)]
    seen = {"train": set(), "val": set()}
    for seed in range(4):
        args = Namespace(seed=seed, clips=200, seconds=2, size=64, out=Path())
        jobs, split = puppet.plan(args, faces[10 * seed:], {f"s{i}": [] for i in range(30)})
        for part, names in split.items():
            seen[part] |= {x for j in jobs if j["name"] in names for x in (j["speaker"], *(f["name"] for f in j["faces"]))}
    assert {x[0] for x in seen["val"]} == {"f", "s"} and len(seen["val"]) < 15 and not seen["val"] & seen["train"]


def test_a_single_face_is_trained_on():
    """Of two faces one is held out, of one none: a folder without training clips is of no use."""
    for count, held_out in (1, 0), (2, 1), (200, 15):
        a, b = puppet.divide([f"face {i}" for i in range(count)], str, np.random.default_rng(0))
        assert (len(a), len(b)) == (held_out, count - held_out)


def test_morphs_are_made_of_faces_that_look_alike():
    """Two unlike faces (beard and none) would show through each other: only look-alikes mix, half of the time."""
    looks = [np.float64([1, -1] * 216), np.float64([-1, 1] * 216)]
    faces = [dict(path=None, seed=i, name=f"f{i}", yaw=0., pitch=0., sex="", look=looks[i % 2]) for i in range(60)]
    jobs, _ = puppet.plan(Namespace(seed=0, clips=400, seconds=2, size=64, out=Path()), faces, {f"s{i}": [] for i in range(30)})
    pairs = [j["faces"] for j in jobs if j["weight"]]
    assert .42 < len(pairs) / len(jobs) < .58 and all(a["look"] is b["look"] and a is not b for a, b in pairs)


def test_a_killed_run_leaves_no_old_video_under_new_labels(tmp_path, monkeypatch):
    """When a clip replaces another plan's, the old mp4 goes first; whatever stops the run, no mix is left."""
    common = ["--portraits", "drawn", "--seconds", "1", "--size", "32", "--clips", "1", "--out", str(tmp_path)]
    puppet.main(common)
    replace = puppet.os.replace
    def killed(a, b):
        if str(b).endswith("00.npz"):
            raise OSError("killed")
        replace(a, b)
    monkeypatch.setattr(puppet.os, "replace", killed)
    with pytest.raises(SystemExit):
        puppet.main([*common, "--seed", "1"])
    assert not (tmp_path / "puppet_00000.mp4").exists()


def test_what_kill_leaves_is_never_taken_for_a_clip(tmp_path, monkeypatch, capsys):
    """`kill` ends as Ctrl-C does, in one line, and a video that is half written is none for data.py."""
    def killed(path, frames, audio):
        Path(path).with_suffix(".part").write_bytes(b"half a video")           # as write_mp4 does
        signal.raise_signal(signal.SIGTERM)

    def unhandled(*_):
        raise AssertionError("the process would be gone without a word")
    signal.signal(signal.SIGTERM, unhandled)
    monkeypatch.setattr(puppet, "write_mp4", killed)
    with pytest.raises(SystemExit) as stop:
        puppet.main(["--out", str(tmp_path), "--seconds", "1", "--size", "32", "--clips", "1"])
    assert stop.value.code == 130 and capsys.readouterr().err.splitlines()[-1].startswith("puppet.py: stopped")
    assert list(tmp_path.glob(".*.part")) and data.media_files(tmp_path, data.VIDEOS) == []


@pytest.mark.parametrize("seed, start", [(2, 0.0), (0, 0.9)])
def test_the_phones_of_a_clip_are_where_its_sound_is(tmp_path, seed, start):
    """A click in the middle of a known phone stays in it: from a pause on, and in the second piece too."""
    recordings = []
    for n in range(2):
        wave = np.zeros(16000 * 4, np.float32)
        wave[int(16000 * 2.55)] = .9
        puppet.soundfile.write(tmp_path / f"a-{n}.flac", wave, 16000)
        (tmp_path / f"a-{n}.tsv").write_text("0\t.5\tɑ\n.5\t1.3\tsil\n1.3\t2.5\ti\n2.5\t2.6\tp\n2.6\t4\tsil\n",
                                             encoding="utf-8")
        recordings.append((tmp_path / f"a-{n}.flac", tmp_path / f"a-{n}.tsv"))
    rng = np.random.default_rng(seed)
    audio, phones, pieces = puppet.assemble_speech(rng, recordings, 220)
    clicks = np.flatnonzero(np.abs(audio) > .5 * np.abs(audio).max()) / 16000
    said = [(s, e) for s, e, label in phones if label == "p"]
    assert len(clicks) == len(said) == 2 == len({name for name, *_ in pieces[:2]})
    assert [p[1] for p in pieces[:2]] == [start, 0]
    np.testing.assert_allclose(clicks, np.mean(said, 1), atol=.001)
    np.testing.assert_allclose(clicks[0], 2.55 - start, atol=.001)
    assert phones[0][0] == 0 and all(b[0] >= a[0] for a, b in zip(phones, phones[1:])) and phones[-1][1] <= 8.8


def test_mirrored_clips_mirror_everything(tmp_path, monkeypatch):
    """Video, mask, box and pose of a mirrored clip are the reflection of the same clip unmirrored."""
    faces = [dict(path=None, seed=[0, 3], name="f", yaw=0., pitch=0., sex="", look=0.)]
    speech = puppet.read_speech(SPEECH)
    args = Namespace(seed=0, clips=1, seconds=1, size=64, out=tmp_path)
    (job,), _ = puppet.plan(args, faces, speech)
    video, d = [], []
    monkeypatch.setattr(puppet, "write_mp4", lambda path, frames, audio: (video.append(frames), Path(path).touch()))
    for mirror in (False, True):
        puppet.make_clip(job | dict(mirror=mirror))
        with np.load(tmp_path / "puppet_00000.npz", allow_pickle=False) as f:
            d.append(dict(f))
    assert (video[1] == video[0][:, :, ::-1]).all() and (video[1] != video[0]).any()
    assert (d[1]["mask"] == d[0]["mask"][:, :, ::-1]).all() and (d[1]["mask"] != d[0]["mask"]).any()
    np.testing.assert_allclose(d[1]["pose"], d[0]["pose"] * [-1, 1, -1, -1, 1], atol=1e-6)
    np.testing.assert_allclose(d[1]["box"][[0, 2]], 64 - d[0]["box"][[2, 0]], atol=1e-4)


def test_f_and_v_bite(face):
    """f: the lower lip rises to the upper teeth, which show as a light band between the lips."""
    doll, frames, _, gap = frames_of(face, 128, jaw_open=[0, .12], teeth=[0, 1])
    assert .02 < gap[1] < .08
    k = puppet.coefficients(np.float32([[.12, 0, 0, 0, 0, 0], [.12, 0, 0, 0, 1, 0]]), {})
    assert k["lower"][1] < k["lower"][0] and k["upper"][1] > k["upper"][0]
    x, y = ((doll.origin + np.array([doll.mx, doll.my]) @ doll.axes * doll.unit) * 128).round().astype(int)
    mouth = frames[:, y - 3:y + 3, x - 3:x + 3].astype(float)
    white = (mouth.min(-1) / mouth.max(-1)).max((1, 2))                # lips are red, teeth hardly coloured
    assert white[1] > white[0] + .15, white


def test_lips_are_drawn_shut_on_p_b_m(folder):
    """In the finished clips the drawn gap, not only the curve, closes within a frame of every p, b, m."""
    total = 0
    for path in sorted(folder.glob("puppet_*.json")):
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as f:
            gap = f["gap"]
        t = (np.arange(len(gap)) + .5) / 25
        for start, end, label in json.loads(path.read_text(encoding="utf-8"))["phones"]:
            if label in ("p", "b", "m") and end < t[-1]:
                total += 1
                assert gap[(t > start - .04) & (t < end + .04)].min() < .01, (path.name, start, label)
    assert total >= 3


def test_workers_do_not_change_the_clips(folder, tmp_path):
    """Two processes write the same bytes as one."""
    puppet.main(["--portraits", "drawn", "--out", str(tmp_path), "--clips", "3", "--seconds", "2", "--size", "64",
                 "--workers", "2"])
    for k in range(3):
        for end in ("mp4", "json"):
            name = f"puppet_{k:05d}.{end}"
            assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_portrait_without_a_mouth_line_is_refused(face):
    """No dark line between the lips, or brows on the lids: such a portrait cannot be moved well."""
    image, points = face
    with pytest.raises(ValueError, match="dark line"):
        drawn.Puppet(np.full_like(image, 128), points, 64)
    low = points.copy()
    for _, ring in drawn.BROWS:
        low[ring, 1] += 10
    assert puppet.fits(image, points) and not puppet.fits(image, low)


def test_broken_files_are_named(tmp_path, capsys):
    """Each broken input: exit code 2 and one line with the file's name."""
    def line(*args, main=puppet.main):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in args])
        assert stop.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]
    for name in ("speech", "faces", "out"):
        (tmp_path / name).mkdir()
    out = ["--out", tmp_path / "out", "--clips", 1, "--seconds", 1, "--size", 32]
    assert "--seconds" in line(*out, "--seconds", "inf")
    speech, flac, tsv = ["--speech", tmp_path / "speech"], *(tmp_path / "speech" / f"a-0.{e}" for e in ("flac", "tsv"))
    flac.write_bytes(b"")
    tsv.write_text("0\t1\tsil\n", encoding="utf-8")
    assert "a-0.flac" in line(*out, *speech)
    puppet.soundfile.write(flac, np.zeros(16000), 16000)
    tsv.write_text("0\n", encoding="utf-8")
    assert "a-0.tsv" in line(*out, *speech)
    for content in (b"", b"PK\x03\x04 cut"):
        (tmp_path / "faces" / "portraits.npz").write_bytes(content)
        assert "portraits.npz" in line(*out, "--portraits", tmp_path / "faces")
    for content in ("", "PK cut"):      # what a full disk leaves of a finished clip
        puppet.main([*map(str, out)])
        (tmp_path / "out" / "puppet_00000.npz").write_text(content, encoding="utf-8")
        assert "puppet_00000.npz" in line(*out)
        (tmp_path / "out" / "puppet_00000.npz").unlink()
    for end, content in (("mp4", ""), ("npz", ""), ("json", "[]")):
        (tmp_path / "out" / f"puppet_00000.{end}").write_text(content, encoding="utf-8")
    assert "puppet_00000.json" in line(*out)
