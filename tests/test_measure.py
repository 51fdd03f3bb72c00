"""Properties of the rulers: the official ones are rebuilt to the letter, and each ruler punishes
what the eye punishes."""
import json
import pickle
import struct

import numpy as np
import pytest
import talking
import torch
from conftest import ROOT
from PIL import Image
from safetensors.numpy import load_file

from data import FACE_BOX, HOP, SAMPLE_RATE
from measure import curves, fid, fit_ridge, identity, landmarks, pixels, rulers, sync, video

# --------------------------------------------------------------------------------------- SyncNet


def test_syncnet_is_the_official_one_by_name_and_size():
    """Property: official weights load only into a network with exactly their names and shapes: 24
    layers with weights, 13,631,616 parameters."""
    shapes = {name: tuple(p.shape) for name, p in sync.SyncNet().named_parameters()}
    three = (256, 256, 1, 3, 3)
    lips = {0: (96, 3, 5, 7, 7), 4: (256, 96, 1, 5, 5), 8: three, 11: three, 14: three,
            18: (512, 256, 1, 6, 6)}
    sound = {0: (64, 1, 3, 3), 4: (192, 64, 3, 3), 8: (384, 192, 3, 3), 11: (256, 384, 3, 3),
             14: (256, 256, 3, 3), 18: (512, 256, 5, 4)}
    want = {}
    for part, layers in (("netcnnlip", lips), ("netcnnaud", sound)):
        for i, shape in layers.items():         # a convolution, then its batch norm
            want[f"{part}.{i}.weight"] = shape
            for name in (f"{i}.bias", f"{i + 1}.weight", f"{i + 1}.bias"):
                want[f"{part}.{name}"] = shape[:1]
    for part in ("netfclip", "netfcaud"):
        want |= {f"{part}.0.weight": (512, 512), f"{part}.3.weight": (1024, 512)}
        want[f"{part}.3.bias"] = (1024,)
        want |= {f"{part}.{name}": (512,) for name in ("0.bias", "1.weight", "1.bias")}
    assert shapes == want

    def count(prefix):
        named = sync.SyncNet().named_parameters()
        return sum(p.numel() for name, p in named if name.startswith(prefix))
    assert (count("netcnnaud"), count("netcnnlip"), count("netfclip")) == (
        4_875_712, 7_177_920, 788_992)
    assert count("net") == 13_631_616


def test_syncnet_layers_have_the_published_sizes():
    """Property: every layer's output has the size of the published table: a wrong padding would
    still run, and give other numbers."""
    network = sync.SyncNet().eval()
    seen = {}

    def record(key):
        return lambda module, x, y: seen.__setitem__(key, tuple(y.shape[1:]))
    for part in ("netcnnlip", "netcnnaud"):
        for i, layer in enumerate(getattr(network, part)):
            layer.register_forward_hook(record((part, i)))
    with torch.no_grad():
        assert network.encode_lips(torch.zeros(1, 3, 5, 224, 224)).shape == (1, 1024)
        assert network.encode_sound(torch.zeros(1, 1, 13, 20)).shape == (1, 1024)
    lips = {0: (96, 1, 109, 109), 3: (96, 1, 54, 54), 4: (256, 1, 26, 26), 7: (256, 1, 13, 13),
            17: (256, 1, 6, 6), 18: (512, 1, 1, 1)}
    sound = {0: (64, 13, 20), 3: (64, 13, 20), 4: (192, 13, 20), 7: (192, 11, 9),
             11: (256, 11, 9), 17: (256, 5, 4), 18: (512, 1, 1)}
    assert all(seen["netcnnlip", i] == shape for i, shape in lips.items())
    assert all(seen["netcnnaud", i] == shape for i, shape in sound.items())


def test_a_weights_file_cannot_run_code(tmp_path):
    """Property: syncnet_v2.model is a pickle, and a pickle can hold a program: read as tensors
    only, it loads, and a poisoned one is refused."""
    network = sync.SyncNet()
    torch.save(network.state_dict(), tmp_path / "good.model")
    again = sync.load_syncnet(tmp_path / "good.model").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in network.state_dict().items())

    class Poison:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()
    (tmp_path / "bad.model").write_bytes(pickle.dumps(Poison()))
    torch.save({"netcnnaud.0.weight": Poison()}, tmp_path / "worse.model")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.model")
    for name in ("bad", "worse", "other"):
        with pytest.raises(ValueError, match="no SyncNet"):
            sync.load_syncnet(tmp_path / f"{name}.model")
    assert not (tmp_path / "ran").exists()


def test_mfcc_is_that_of_python_speech_features():
    """Property: SyncNet was trained on one library's cepstra; an almost equal recipe (another
    window, another lifter) is another input."""
    reference = pytest.importorskip("python_speech_features")
    rng = np.random.default_rng(0)
    sound = 3000 * rng.standard_normal(SAMPLE_RATE * 2) * np.linspace(0, 1, SAMPLE_RATE * 2)
    sound = sound.astype(np.int16)
    for samples in (sound, sound[:SAMPLE_RATE], sound[:300], np.zeros(4000, np.int16)):
        want = reference.mfcc(samples, SAMPLE_RATE)
        assert sync.mfcc(samples).shape == want.shape
        assert np.abs(sync.mfcc(samples) - want).max() < 1e-4


def test_a_frame_owns_four_columns_of_the_sound():
    """Property: picture and sound stay together because 640 samples are a frame and four steps of
    10 ms: window i begins with frame i."""
    sound = np.zeros(50 * HOP, np.float32)
    sound[20 * HOP + 260:20 * HOP + 290] = 0.5          # in columns 80 and 81 only
    windows = sync.sound_windows(sound)
    energy = windows[:, 0, 0]
    loud = energy.amax(1) > energy.amin() + 5
    assert windows.shape[1:] == (1, 13, 20)
    assert loud.nonzero().flatten().tolist() == [16, 17, 18, 19, 20]


def test_too_short_for_syncnet():
    """Property: six frames hold one window: nothing to search in, said in one line."""
    frames = np.zeros((6, 64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match="7 frames"):
        sync.sync_features(sync.SyncNet(), frames, np.zeros(6 * HOP, np.float32), FACE_BOX)


# ---------------------------------------------------------------------------------------- offset


@pytest.mark.parametrize("late", range(-10, 11))
def test_the_offset_found_is_the_offset_made(late):
    """Property: late pictures have a positive offset, and the search is right to the frame."""
    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    lips = x[20 - late:80 - late]
    sound = x[20:80] + 0.3
    assert sync.sync_scores(lips, sound)["sync_offset"] == late


def test_sync_c_forgives_a_delay_and_sync_now_does_not():
    """Property: Sync-C and Sync-D take the best offset: a video 5 frames late scores as well as a
    good one. Read the offset, or sync_now, beside them."""
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    good = sync.sync_scores(x[20:380], x[20:380])
    late = sync.sync_scores(x[15:375], x[20:380])
    assert late["sync_c"] > 0.95 * good["sync_c"] and late["sync_offset"] == 5
    assert late["sync_now"] < 0.1 * good["sync_now"]


class ByHand(torch.nn.Module):
    """A SyncNet nobody trained: how much of the picture is dark, and how loud the sound is, in
    each of its five frames."""
    size = 48

    def __init__(self):
        super().__init__()
        self.here = torch.nn.Parameter(torch.zeros(1))

    def encode_lips(self, lips):                        # (N, 3, 5, S, S) -> (N, 5), the opening
        return (lips.mean(1) < 80).float().mean((2, 3)) * 20

    def encode_sound(self, cepstra):                    # (N, 1, 13, 20) -> (N, 5), the loudness
        return (cepstra[:, 0, 0] / 2).exp().unflatten(1, (5, 4)).mean(2) / (0.2 * 32767 * 20)


def loud_mouth(seed, frames=75, side=64):
    """Frames whose dark mouth opens as their sound gets louder -> frames, sound."""
    rng = np.random.default_rng(seed)
    opening = np.convolve(rng.random(frames + 4), np.ones(3) / 3, "valid")[:frames]
    opening = (opening - opening.min()) / np.ptp(opening)
    pictures = np.full((frames, side, side, 3), rng.integers(120, 220, 3), np.uint8)
    for picture, h in zip(pictures, opening):
        half = 0.1 * side * h
        top, bottom = round(0.71 * side - half), round(0.71 * side + half)
        picture[top:bottom, int(0.36 * side):int(0.64 * side)] = (40, 10, 10)
    sound = rng.standard_normal(frames * HOP) * np.repeat(opening, HOP) * 0.2
    return pictures, np.float32(np.clip(sound, -1, 1))


@pytest.mark.parametrize("late", range(-10, 11))
def test_lips_and_sound_keep_their_time_on_the_way_to_the_offset(late):
    """Property: from pixels and samples: pictures moved by -10 to 10 frames are found to be moved
    by that. One column or frame lost on the way shifts all."""
    frames, sound = loud_mouth(100, 100)
    late_frames = frames[10 - late:90 - late]
    pair = sync.sync_features(ByHand(), late_frames, sound[10 * HOP:90 * HOP], FACE_BOX)
    assert sync.sync_scores(*pair)["sync_offset"] == late


def test_sync_ranks_real_above_late_above_other_audio():
    """Property: a sync measure orders: in time, 2 frames late, 5 frames late or other audio; a
    frozen picture has none."""
    now = {}
    for seed in range(200, 206):
        frames, sound = loud_mouth(seed)
        _, other = loud_mouth(seed + 50)
        lips, own = sync.sync_features(ByHand(), frames, sound, FACE_BOX)
        _, wrong = sync.sync_features(ByHand(), frames, other, FACE_BOX)
        pairs = {"real": (lips, own), "late 2": (lips[:-2], own[2:]), "other": (lips, wrong),
                 "late 5": (lips[:-5], own[5:]), "frozen": (lips[:1].expand_as(lips), own)}
        for name, pair in pairs.items():
            now.setdefault(name, []).append(sync.sync_scores(*pair)["sync_now"])
    worst_real = min(now["real"])
    mean = {name: np.mean(values) for name, values in now.items()}
    assert mean["real"] > 2 * max(value for name, value in mean.items() if name != "real")
    assert worst_real > max(now["late 2"])


# ----------------------------------------------------------------------------- public sync score


def whisper_or_skip():
    predict = sync.lip_predictor()
    if predict is None:
        pytest.skip(sync.WHISPER_NOTE)
    return predict


class Ramp(sync.WhisperBase):
    """Whisper without Whisper: the state of a frame is the value of its first sample."""

    def __init__(self):
        self.windows = 0

    def states(self, sound):
        self.windows += 1
        whole = np.zeros(sync.WINDOW, np.float32)
        whole[:len(sound[::HOP])] = sound[::HOP]
        return whole[:, None]


@pytest.mark.parametrize("frames", [1, 75, 749, 750, 751, 1400, 15000])
def test_windows_of_sound_lose_no_frame(frames):
    """Property: ten minutes are encoded 30 s at a time; every frame comes once, in its place, and
    with a second of sound around it wherever there is a cut."""
    sound = np.repeat(np.arange(frames, dtype=np.float32), HOP)
    ramp = Ramp()
    parts = list(ramp.rows(sound, frames))
    assert np.array_equal(np.concatenate(parts)[:, 0], np.arange(frames))
    assert ramp.windows <= 1 + frames / 700


def test_a_ctranslate2_model_is_read_as_it_is_written():
    """Property: names, shapes and values come back; a cut file and another one are refused."""
    def text(name):
        return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"
    kernel = np.arange(6, dtype=np.float16).reshape(2, 3)
    head = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, 2)
    body = text("decoder/x") + struct.pack("<BIBI", 1, 1, 0, 4) + struct.pack("<f", 1)
    body += text("encoder/w") + struct.pack("<BIIBI", 2, 2, 3, 4, 12) + kernel.tobytes()
    found = sync.read_ctranslate2(head + body, "encoder/")
    assert list(found) == ["encoder/w"] and np.array_equal(found["encoder/w"], kernel)
    whole = head + body
    for bad in (whole[:-3], whole.replace(b"WhisperSpec", b"AnotherSpec"), b"\5" + whole[1:], b""):
        with pytest.raises(ValueError, match="no CTranslate2 model"):
            sync.read_ctranslate2(bad, "encoder/")


def test_the_shipped_ridge_is_one_weight_a_state():
    """Property: the sync score is a linear map that a reader can look at: 3,584 weights and an
    intercept, and what it reached on clips that it was not fitted on is written beside it."""
    tensors = load_file(sync.RIDGE)
    assert {name: t.shape for name, t in tensors.items()} == {"weight": (3584,), "bias": (1,)}
    about = json.loads((sync.RIDGE.parent / "sync_ridge.json").read_text(encoding="utf-8"))
    assert len(about["clips"]) == 60 and not set(about["clips"]) & set(about["held_out"])
    own = about["correlation_by_offset"]["own"]
    other = about["correlation_by_offset"]["other"]
    assert max(own, key=own.get) == "0" and own["0"] > 0.85 > 0.5 > max(other.values())


def test_a_ridge_finds_a_linear_map():
    """Property: a ridge with a small penalty recovers the map that made its data, intercept
    included; frames without a face are left out."""
    rng = np.random.default_rng(0)
    states = rng.standard_normal((400, 8)) + 3
    weight = rng.standard_normal(8)
    gap = states @ weight + 0.5
    gap[::7] = np.nan
    found, bias = fit_ridge.fit(np.float32(states), gap, 1e-6)
    assert np.abs(found - weight).max() < 1e-4 and abs(bias - 0.5) < 1e-3


def test_lip_sync_orders_right_late_other_and_silent_audio():
    """Property: the public sync score prefers lips in time to late lips, other audio, silence and
    a frozen face, and it finds the delay."""
    predict = whisper_or_skip()
    frames, sound, _, _ = talking.talking(frames=150)
    points, _ = talking.landmarker().points(frames)
    seen = landmarks.lip_gap(points).numpy()
    own = predict(sound, len(seen))
    other = predict(talking.talking("synth0001-1", 150)[1], len(seen))
    silent = predict(np.zeros(0, np.float32), len(seen))
    right = sync.lip_sync(seen, own)
    late = sync.lip_sync(np.roll(seen, 5), own)
    assert right["lip_sync"] > 0.5 and abs(right["lip_sync_offset"]) <= 1
    assert abs(late["lip_sync_offset"] - 5) <= 1
    for wrong in (late, sync.lip_sync(seen, other), sync.lip_sync(seen, silent)):
        assert wrong["lip_sync"] < right["lip_sync"] - 0.2
    still = sync.lip_sync(np.full_like(seen, 0.1), own)
    assert still["lip_sync"] == 0 and np.isnan(still["lip_sync_offset"])


# ------------------------------------------------------------------------------- sets of pictures


def gaussian(x):
    g = fid.Gaussian()
    for part in np.array_split(x, 3):                   # a few at a time is as good as all at once
        g.add(part)
    return g


def reference_distance(a, b):
    """The same distance without a matrix root: tr (S1 S2)^(1/2) is the nuclear norm of the product
    of the centred samples."""
    x = a - a.mean(0)
    y = b - b.mean(0)
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    cross /= np.sqrt((len(x) - 1) * (len(y) - 1))
    variances = (x ** 2).sum() / (len(x) - 1) + (y ** 2).sum() / (len(y) - 1)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + variances - 2 * cross


@pytest.mark.parametrize("n,D", [(400, 12), (50, 50), (20, 64)])
def test_frechet_equals_a_reference_in_float64(n, D):
    """Property: also with fewer samples than features, where a matrix square root fails or returns
    complex numbers; then it warns."""
    rng = np.random.default_rng(D)
    a = rng.standard_normal((n, D))
    b = rng.standard_normal((n + 7, D)) @ rng.standard_normal((D, D)) / 4 + 0.5
    if n <= D:
        with pytest.warns(UserWarning, match="singular"):
            found = fid.frechet(gaussian(a), gaussian(b))
    else:
        found = fid.frechet(gaussian(a), gaussian(b))
    assert abs(found - reference_distance(a, b)) < 1e-6 * max(1, found)


def test_frechet_in_one_dimension_is_textbook():
    """Property: (m1 - m2)^2 + (s1 - s2)^2; nothing against itself."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((500, 1))
    b = rng.standard_normal((500, 1)) * 3 + 2
    want = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert abs(fid.frechet(gaussian(a), gaussian(b)) - want) < 1e-9
    assert fid.frechet(gaussian(a), gaussian(a)) < 1e-9


def test_the_kernel_distance_is_unbiased():
    """Property: two samples of one distribution are at distance 0 on average, however few; another
    distribution is further away, whatever the sizes."""
    rng = np.random.default_rng(0)
    same = [fid.kernel_distance(*rng.standard_normal((2, 8, 16))) for _ in range(300)]
    moved = [fid.kernel_distance(rng.standard_normal((8, 16)), rng.standard_normal((20, 16)) + 1)
             for _ in range(50)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(300)
    assert np.mean(moved) > 5 * np.std(same)
    with pytest.raises(ValueError, match="two of each"):
        fid.kernel_distance(np.zeros((1, 4)), np.zeros((5, 4)))


def test_the_kernel_distance_of_two_points_by_hand():
    """Property: the estimator leaves the diagonal out: x = 0, 2 and y = 1, 1 in one dimension give
    1 + 8 - (1 + 27)."""
    x = np.array([[0.0], [2.0]])
    y = np.array([[1.0], [1.0]])
    assert abs(fid.kernel_distance(x, y) - (1 + 8 - 28)) < 1e-9


def test_a_sample_is_fair_and_does_not_grow():
    """Property: of ten minutes of features a fixed number is kept, early ones as often as late."""
    sample = fid.Sample(128)
    for start in range(0, 1250, 10):
        sample.add(np.arange(start, start + 10)[:, None])
    values = np.array(sample.rows)[:, 0]
    assert len(values) == 128 and len(set(values)) == 128
    assert 0.35 < (values < 625).mean() < 0.65


def features_of(people, shift):
    rng = np.random.default_rng(people + 10 * shift)
    return 0.3 * rng.standard_normal((60, 8)) + 0.5 * people + 0.2 * shift


def test_sets_compare_the_same_people():
    """Property: a system that shows half of the people is compared with real frames of that half:
    a perfect copy has no distance, though its people are others than the rest."""
    results = rulers.Results()
    for person in range(4):
        results.sample("real", f"p{person}", features_of(person, 0))
        if person < 2:
            results.sample("copy", f"p{person}", features_of(person, 0))
            results.sample("off", f"p{person}", features_of(person, 2))
    group = frozenset({"p0", "p1"})
    for person in range(4):
        sets = [None, group] if person < 2 else [None]
        results.add("real", "fid", sets, features_of(person, 0))
    for person in range(2):
        results.add("copy", "fid", [None], features_of(person, 0))
    copy = rulers.set_distances(results, "copy", group)
    off = rulers.set_distances(results, "off", group)
    assert copy["fid"]["mean"] < 1e-6 and copy["kid"]["mean"] < 100 < off["kid"]["mean"]
    who = {f"p{person}": f"p{person}" for person in range(4)}
    other = rulers.other_people_kid(results, who)
    real = rulers.set_distances(results, "real", group)
    assert abs(real["kid"]["mean"]) < 100 < other["kid"]["mean"]
    assert real["kid"]["n"] == 120                      # later halves against earlier ones


class Inception(torch.nn.Module):
    def forward(self, x, return_features: bool = False):
        assert x.dtype == torch.uint8 and return_features
        return x.float().mean((2, 3)).repeat(1, 2)


class I3D(torch.nn.Module):
    def forward(self, x, rescale: bool = False, resize: bool = False,
                return_features: bool = False):
        assert rescale and resize and return_features and x.shape[2] == 16
        return x.float().mean((2, 3, 4))


def test_official_scripts_get_what_they_ask_for(tmp_path):
    """Property: FID's network gets every frame, FVD's non-overlapping clips of 16; both take whole
    bytes and scale them themselves."""
    torch.jit.script(Inception()).save(tmp_path / "fid.pt")
    torch.jit.script(I3D()).save(tmp_path / "fvd.pt")
    frames = np.random.default_rng(0).integers(0, 256, (37, 32, 32, 3), np.uint8)
    found = fid.inception_features(tmp_path / "fid.pt")(frames)
    assert np.allclose(found[:, :3], frames.mean((1, 2)), atol=1e-3)
    want = [frames[:16].mean((0, 1, 2)), frames[16:32].mean((0, 1, 2))]
    assert np.allclose(fid.i3d_features(tmp_path / "fvd.pt")(frames), want, atol=1e-3)
    (tmp_path / "no.pt").write_text("no script")
    with pytest.raises(ValueError, match="TorchScript"):
        fid.inception_features(tmp_path / "no.pt")
    with pytest.raises(FileNotFoundError):
        fid.check_file(tmp_path / "missing.pt", "fid")


def test_an_unknown_file_is_named_as_such(tmp_path, capsys):
    """Property: figures of a file that is not the official one must not pass for official: the
    note says so."""
    (tmp_path / "mine.pt").write_bytes(b"x")
    fid.check_file(tmp_path / "mine.pt", "fvd")
    assert "not the known official file" in capsys.readouterr().out


# ---------------------------------------------------------------------- what the eye punishes


@pytest.fixture(scope="module")
def damaged():
    """{name: frames} of a talking portrait: as it is, and with one fault each."""
    frames, *_ = talking.talking()
    return {"good": frames, "blur 1": video.blurred(frames[:8], 1),
            "blur 3": video.blurred(frames[:8], 3), "smear": talking.smear(frames[:8], 3.0),
            "swap": talking.other_person(8)}


def test_sharpness_punishes_blur(damaged):
    """Property: the first thing that a drifting video loses is detail: the more blur, the less
    sharpness; a swap or a smear is for other rulers."""
    sharp = {name: pixels.sharpness(frames[:8], FACE_BOX) for name, frames in damaged.items()}
    assert sharp["blur 3"] < 0.2 * sharp["blur 1"] and sharp["blur 1"] < 0.5 * sharp["good"]
    assert sharp["smear"] > 0.5 * sharp["good"]


def test_identity_punishes_a_swap_a_smear_and_blur(damaged):
    """Property: the identity distance puts talking near the portrait, a slight blur a little away,
    a smeared face half-way, another person far off."""
    embed = identity.sface()
    if embed is None:
        pytest.skip(identity.NOTE)
    image, _ = talking.portrait()

    def distance(frames):
        points, _ = talking.landmarker().points(frames)
        vectors = embed(identity.align(frames, points))
        return float(identity.cosine_distance(vectors, reference).mean())
    points, _ = talking.landmarker().points(image[None])
    reference = embed(identity.align(image[None], points))
    away = {name: distance(frames[:8]) for name, frames in damaged.items()}
    assert away["good"] < 0.15 and away["blur 1"] < 0.15
    assert away["smear"] > 0.25 > away["good"] + 0.1
    assert away["swap"] > 0.5 and away["blur 3"] > away["blur 1"]


def test_perceptual_distance_and_kid_punish_blur_and_smear(damaged):
    """Property: both features of Lite0 order blur by its radius, and see a smeared face that has
    all its detail."""
    network = fid.lite0()
    if network is None:
        pytest.skip(fid.LITE0_NOTE)
    levels, good = fid.lite0_features(network, damaged["good"][:8])
    away, kid = {}, {}
    for name in ("good", "blur 1", "blur 3", "smear"):
        other, features = fid.lite0_features(network, damaged[name][:8])
        away[name] = fid.perceptual(levels, other).mean()
        kid[name] = fid.kernel_distance(good, features)
    assert away["good"] == 0 and away["smear"] > away["blur 1"] > 0.03
    assert away["blur 3"] > 2 * away["blur 1"]
    assert kid["blur 3"] > kid["blur 1"] > max(0, kid["good"]) and kid["smear"] > kid["good"]


def test_lips_punish_frozen_and_late_video():
    """Property: the landmarks' lip gap follows the lips that were made; late and early lips are
    found where they are; a frozen mouth has no correlation and no motion."""
    frames, sound, phones, truth = talking.talking()
    points, _ = talking.landmarker().points(frames)
    gap = landmarks.lip_gap(points).numpy()
    speech = pixels.speech_frames(phones, sound, len(gap))
    good = pixels.lip_row(gap, truth, phones, speech)
    late = pixels.lip_row(np.roll(gap, 1), truth, phones, speech)
    still = pixels.lip_row(np.full_like(gap, gap[0]), truth, phones, speech)
    assert good["lips"] > 0.8 and good["lips"] > max(good["lips_early"], good["lips_late"]) + 0.1
    assert late["lips_late"] > good["lips"] - 0.05 > late["lips"]
    assert still["lips"] == 0 and still["lip_motion"] < 1e-6 < good["lip_motion"]
    assert good["lip_motion_silence"] < 0.3 * good["lip_motion"]


def test_lips_close_at_p_b_m():
    """Property: lips that stay open at an m are found, whatever the correlation is; only the
    middle half of the phone counts."""
    gap = np.full(40, 0.1)
    phones = [(0.4, 0.56, "m"), (1.0, 1.1, "ɑ")]
    speech = np.ones(40, bool)
    opened = pixels.lip_row(gap, None, phones, speech)
    gap[10] = 0.01                                      # 0.42 s: in the phone, before its middle
    early = pixels.lip_row(gap, None, phones, speech)
    gap[12] = 0.01                                      # 0.5 s
    shut = pixels.lip_row(gap, None, phones, speech)
    assert (opened["closed_pbm"], early["closed_pbm"], shut["closed_pbm"]) == (0, 0, 1)
    assert abs(shut["gap_pbm"] - 0.01) < 1e-9
    short = [(0.47, 0.49, "p")]                         # between two frames: the nearest counts
    assert len(pixels.closures(gap, short)) == 1


def test_correlation_over_speech_frames_with_a_lag():
    """Property: a mouth 1 frame late matches at lag 1; a mouth that does not move matches nothing
    and counts as 0, or freezing would not cost anything."""
    true = np.random.default_rng(0).random(60)
    late = np.concatenate([true[:1], true[:-1]])
    speech = np.arange(60) > 5
    at_lag = pixels.correlation(late, true, speech, 1)
    assert at_lag > 0.999 > 0.5 > pixels.correlation(late, true, speech)
    assert pixels.correlation(np.full(60, 0.2), true, speech) == 0
    assert np.isnan(pixels.correlation(true, np.full(60, 0.2), speech))
    assert np.isnan(pixels.correlation(true, true, np.arange(60) < 8))
    gaps = np.where(np.arange(60) % 9 == 0, np.nan, true)               # frames without a face
    assert pixels.correlation(gaps, true, speech) > 0.999


def test_when_somebody_speaks(tmp_path):
    """Property: by the phones where they are known (two kinds of tables), else by loudness."""
    (tmp_path / "clips").mkdir()
    table = "clip\tstart\tend\tphone\na\t0.00\t0.40\tsil\na\t0.40\t0.80\tɑ\n"
    (tmp_path / "phones.tsv").write_text(table, encoding="utf-8")
    sidecar = json.dumps({"phones": [[0, 0.2, "m"], [0.2, 0.4, "sil"]]})
    (tmp_path / "clips" / "b.json").write_text(sidecar, encoding="utf-8")
    a, b, none = (pixels.phones_of(tmp_path / "clips" / f"{n}.mp4") for n in "abc")
    assert pixels.speech_frames(a, np.zeros(0), 20).tolist() == [False] * 10 + [True] * 10
    assert pixels.speech_frames(b, np.zeros(0), 10).tolist() == [True] * 5 + [False] * 5
    assert none is None
    noise = np.random.default_rng(0).standard_normal(20 * HOP)
    sound = np.repeat([0.0, 0.3], 10 * HOP) * noise
    assert pixels.speech_frames(None, sound, 20).tolist() == [False] * 10 + [True] * 10
    assert not pixels.speech_frames(None, np.zeros(0), 20).any()


# ------------------------------------------------------------------------------ head and picture


def test_head_motion_is_measured_in_parts_of_a_pixel():
    """Property: a head moved by a known way is found to have moved by that way; a still one has
    not moved; frames without a face do not count."""
    way = np.array([(0, 0), (0.5, 0), (2, -1), (0, 0), (-1.25, 0.75), (3, 3), (0, -2)])
    image = Image.fromarray(np.pad(talking.portrait()[0], ((8, 8), (8, 8), (0, 0)), "edge"))
    moved = [image.transform((128, 128), Image.Transform.AFFINE, (1, 0, 8 - x, 0, 1, 8 - y),
                             Image.Resampling.BICUBIC) for x, y in way]
    points, _ = talking.landmarker().points(np.stack([np.array(frame) for frame in moved]))
    pose = landmarks.head_pose(points)
    found = pose.position.numpy() - pose.position.numpy()[0]
    assert np.abs(found - way).max() < 0.25
    spread = pixels.head_row(pose, 100)
    assert abs(spread["head_shift"] - np.sqrt(way.var(0).sum())) < 0.1
    still = landmarks.head_pose(points[:1].expand(5, -1, -1))
    assert pixels.head_row(still, 100) == {"head_turn": 0, "head_shift": 0}
    points[2:] = np.nan
    assert pixels.head_row(landmarks.head_pose(points), 100)["head_shift"] < 0.5


def test_the_face_box_is_where_the_face_is():
    """Property: sharpness and colour are taken where the face is, from brow to chin; without a
    face, where data.py puts faces."""
    image, points = talking.portrait()
    x0, y0, x1, y1 = pixels.face_box(points[None], 128)
    eyes = landmarks.eye_centres(points)[:, :2] / 128
    assert x0 < eyes[0, 0] < eyes[1, 0] < x1 and y0 < eyes[:, 1].min() < eyes[:, 1].max() < y1
    assert 0.3 < y1 - y0 < 0.9 and float(points[[13, 14], 1].mean()) / 128 < y1
    moved = np.array(pixels.face_box(points[None] + 12.8, 128))         # a tenth of the side
    assert np.allclose(moved, np.array([x0, y0, x1, y1]) + 0.1, atol=1e-4)
    assert pixels.face_box(np.full((3, 478, 3), np.nan), 128) == FACE_BOX


def test_a_seam_and_a_colour_shift_are_found_where_they_are():
    """Property: a jump into frame 81, the first new one of chunk 1, is a seam; the same jump
    elsewhere is motion. A colour shift is told per channel."""
    rng = np.random.default_rng(3)
    coarse = Image.fromarray(rng.integers(20, 220, (16, 16, 3), np.uint8))
    still = np.int32(coarse.resize((128, 128), Image.Resampling.BICUBIC)).clip(20, 220)
    wobble = 2 * (np.arange(100) % 2)[:, None, None, None]              # two grey levels
    frames = np.uint8(still + wobble)

    def jump(at):
        step = np.where(np.arange(100) >= at, 12, 0)[:, None, None, None]
        return np.clip(frames + step, 0, 255).astype(np.uint8)

    def seam(video, before=None, start=0):
        return pixels.motion_row(video, before, start, chunk=81, overlap=9)["seam"]
    assert seam(jump(81)) > 3 > 1.5 > seam(jump(60))
    later = jump(81)[50:]               # in segments: the frame before belongs to the one before
    assert seam(later, jump(81)[49], 50) > 3
    assert np.isnan(pixels.motion_row(frames, None, 0)["seam"])         # no chunk is known
    reference = pixels.colour(np.uint8(still)[None], FACE_BOX)
    warm = np.clip(frames + [6, 0, 0], 0, 255).astype(np.uint8)
    away = np.abs(pixels.colour(warm, FACE_BOX) - reference).max()
    assert abs(away - 7) < 0.01


# ---------------------------------------------------------------------------------------- curves


@pytest.mark.parametrize("name, record", [
    ("loss.png", {"flow": 1.0, "temporal": None, "face": 0.2, "norm": 3.0, "lr": 1e-4}),
    ("curves.png", {"critic": 1.0, "dmd": 0.5, "regression": 0.1, "lr": 1e-4, "lr_critic": 1e-5})])
def test_curves_are_made_from_whatever_numbers_a_log_has(tmp_path, name, record):
    """Property: a new number in the log is a new curve, without a list of names to keep."""
    lines = [{"step": i, "seconds": 1.0} | record for i in range(40)]
    lines[9]["val"] = {"0.25": 0.5, "0.75": 0.6} if name == "loss.png" else {
        "error": [0.1, 0.2, 0.3], "colour": [1.0, 2.0, 3.0], "seam": 1.1}
    log = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "log.jsonl").write_text(log + "\n", encoding="utf-8")
    curves.main([str(tmp_path)])
    assert (tmp_path / name).stat().st_size > 1000
    records = curves.read_log(tmp_path / "log.jsonl")
    numbers = {key for key, value in record.items() if value is not None}
    drawn = curves.training_curves(records)
    assert {key.split(",")[0] for key in drawn} == numbers
    lines_drawn = [line for plot in curves.validation_curves(records).values() for line in plot]
    assert len(lines_drawn) == (2 if name == "loss.png" else 7)


@pytest.mark.parametrize("text, line", [(None, "no such log"), ("", "is empty"),
                                        ('{"step": 1}\n{"ste', "line 2 is no log record")])
def test_a_bad_log_is_one_line_and_exit_2(tmp_path, capsys, text, line):
    """Property: a missing, empty or damaged log ends in one line, and no picture is written."""
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        curves.main([str(tmp_path)])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and line in error[0]
    assert not list(tmp_path.glob("*.png"))


def test_the_fit_refuses_too_few_clips(tmp_path, capsys):
    """Property: a ridge of a handful of clips would be shipped as noise: one line, nothing
    written."""
    with pytest.raises(SystemExit) as stop:
        fit_ridge.main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and "0 clips to fit" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_licences_stand_beside_shipped_weights():
    """Property: the ridge was fitted on GRID, CC BY 4.0: its authors are named beside it."""
    notice = (ROOT / "weights" / "sync_ridge" / "NOTICE").read_text(encoding="utf-8")
    assert "GRID" in notice and "CC BY 4.0" in notice
