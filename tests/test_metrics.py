"""Laws of the measures: the official ones are rebuilt to the letter, the others do what their names say."""
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

import metrics as M
import proxies as P
import train_proxies as T
from data import HOP, RATE

# ------------------------------------------------------------------------------------------------------------- SyncNet


def test_syncnet_is_the_official_one_by_name_and_size():
    """Official weights load only into a network with exactly their names and shapes: 24 layers with weights, 13,631,616 parameters."""
    shapes = {name: tuple(p.shape) for name, p in M.SyncNet().named_parameters()}
    three = (256, 256, 1, 3, 3)
    lips = {0: (96, 3, 5, 7, 7), 4: (256, 96, 1, 5, 5), 8: three, 11: three, 14: three, 18: (512, 256, 1, 6, 6)}
    sound = {0: (64, 1, 3, 3), 4: (192, 64, 3, 3), 8: (384, 192, 3, 3), 11: (256, 384, 3, 3), 14: (256, 256, 3, 3), 18: (512, 256, 5, 4)}
    want = {}
    for part, layers in (("netcnnlip", lips), ("netcnnaud", sound)):
        for i, shape in layers.items():                                         # a convolution, then its batch norm
            want |= {f"{part}.{i}.weight": shape} | {f"{part}.{j}.{k}": shape[:1] for j, k in ((i, "bias"), (i + 1, "weight"), (i + 1, "bias"))}
    for part in ("netfclip", "netfcaud"):
        want |= {f"{part}.0.weight": (512, 512), f"{part}.3.weight": (1024, 512), f"{part}.3.bias": (1024,)}
        want |= {f"{part}.{k}": (512,) for k in ("0.bias", "1.weight", "1.bias")}
    assert shapes == want
    count = lambda *parts: sum(p.numel() for n, p in M.SyncNet().named_parameters() if n.startswith(parts))
    assert (count("netcnnaud"), count("netcnnlip"), count("netfclip")) == (4_875_712, 7_177_920, 788_992) and count("net") == 13_631_616


def test_syncnet_sees_and_hears_in_the_published_sizes():
    """Every layer's output has the size of the published table: a wrong padding would still run, and give other numbers."""
    net, seen = M.SyncNet().eval(), {}
    for part in ("netcnnlip", "netcnnaud"):
        for i, layer in enumerate(getattr(net, part)):
            layer.register_forward_hook(lambda m, x, y, key=(part, i): seen.__setitem__(key, tuple(y.shape[1:])))
    with torch.no_grad():
        assert net.see(torch.zeros(1, 3, 5, 224, 224)).shape == net.hear(torch.zeros(1, 1, 13, 20)).shape == (1, 1024)
    lips = {0: (96, 1, 109, 109), 3: (96, 1, 54, 54), 4: (256, 1, 26, 26), 7: (256, 1, 13, 13), 17: (256, 1, 6, 6), 18: (512, 1, 1, 1)}
    sound = {0: (64, 13, 20), 3: (64, 13, 20), 4: (192, 13, 20), 7: (192, 11, 9), 11: (256, 11, 9), 17: (256, 5, 4), 18: (512, 1, 1)}
    assert all(seen["netcnnlip", i] == s for i, s in lips.items()) and all(seen["netcnnaud", i] == s for i, s in sound.items())


def test_a_weights_file_cannot_run_code(tmp_path):
    """syncnet_v2.model is a pickle, and a pickle can hold a program: read as tensors only, it loads, and a poisoned one is refused."""
    net = M.SyncNet()
    torch.save(net.state_dict(), tmp_path / "good.model")
    again = M.load_syncnet(tmp_path / "good.model")
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))

    class Poison:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()
    (tmp_path / "bad.model").write_bytes(pickle.dumps(Poison()))
    torch.save({"netcnnaud.0.weight": Poison()}, tmp_path / "worse.model")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.model")
    for name in ("bad", "worse", "other"):
        with pytest.raises(ValueError, match="no SyncNet"):
            M.load_syncnet(tmp_path / f"{name}.model")
    assert not (tmp_path / "ran").exists()


def test_mfcc_is_that_of_python_speech_features():
    """SyncNet was trained on one library's cepstra; an almost equal recipe (another window, another lifter) is another ear."""
    reference = pytest.importorskip("python_speech_features")
    rng = np.random.default_rng(0)
    sound = (3000 * rng.standard_normal(RATE * 2) * np.linspace(0, 1, RATE * 2)).astype(np.int16)
    for samples in (sound, sound[:RATE], sound[:300], np.zeros(4000, np.int16)):
        want = reference.mfcc(samples, RATE)
        assert M.mfcc(samples).shape == want.shape and np.abs(M.mfcc(samples) - want).max() < 1e-4


def test_a_frame_owns_four_columns_of_the_sound():
    """Picture and sound stay together because 640 samples are a frame and four steps of 10 ms: window i begins with frame i."""
    sound = np.zeros(50 * HOP, np.float32)
    sound[20 * HOP + 260:20 * HOP + 290] = 0.5                                  # heard in columns 80 and 81 only
    windows = M.sound_windows(sound)
    loud = windows[:, 0, 0].amax(1) > windows[:, 0, 0].amin() + 5               # c0 is the log energy
    assert windows.shape[1:] == (1, 13, 20) and loud.nonzero().flatten().tolist() == [16, 17, 18, 19, 20]


# -------------------------------------------------------------------------------------------------------------- offset


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("late", range(-10, 11))
def test_the_offset_found_is_the_offset_made(late, padded):
    """Late pictures have a positive offset, and the search is right to the frame."""
    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    lips, sound = x[20 - late:80 - late], x[20:80] + 0.3
    assert M.sync_scores(lips, sound, padded=padded)["sync_offset"] == late


def test_sync_c_forgives_a_delay_and_sync_now_does_not():
    """Sync-C and Sync-D take the best offset: a video 5 frames late scores as well as a good one. Read the offset, or sync_now, beside them."""
    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    good, late = (M.sync_scores(lips, x[20:80], padded=False) for lips in (x[20:80], x[15:75]))
    assert late["sync_c"] > 0.95 * good["sync_c"] and late["sync_now"] < 0.1 * good["sync_now"]


def talker(seed, frames=75, side=64):
    """A clip whose dark mouth opens as its sound gets louder: all that lip sync is, without a face."""
    rng = np.random.default_rng(seed)
    opening = np.convolve(rng.random(frames + 4), np.ones(3) / 3, "valid")[:frames]
    opening = np.clip((opening - opening.min()) / np.ptp(opening), 0, 1)
    pictures, skin = [], tuple(int(v) for v in rng.integers(120, 220, 3))
    for h in opening:
        image = Image.new("RGB", (side, side), skin)
        x, y, r = 0.5 * side, 0.71 * side, 0.1 * side * h
        ImageDraw.Draw(image).ellipse((x - 0.12 * side, y - r, x + 0.12 * side, y + r), fill=(40, 10, 10))
        pictures.append(np.asarray(image))
    sound = rng.standard_normal(frames * HOP) * np.repeat(opening, HOP) * 0.2
    audio = (np.clip(sound, -1, 1) * 32767).astype(np.int16)
    return SimpleNamespace(frames=np.stack(pictures), audio=audio, length=frames, path=f"/no/talker_{seed}.mp4", opening=opening, identity=str(seed))


class ByHand(torch.nn.Module):
    """A SyncNet nobody trained: it sees how much of the picture is dark and hears how loud it is, in each of its five frames."""
    config = M.SyncNetConfig(size=48, crop="mouth")

    def __init__(self):
        super().__init__()
        self.here = torch.nn.Parameter(torch.zeros(1))

    def see(self, lips):                                                        # (N, 3, 5, S, S) -> (N, 5), the opening
        return (lips.mean(1) < 80).float().mean((2, 3)) / 0.3

    def hear(self, cepstra):                                                    # (N, 1, 13, 20) -> (N, 5), the loudness
        return (cepstra[:, 0, 0] / 2).exp().unflatten(1, (5, 4)).mean(2) / (0.2 * 32767 * 20)


@pytest.mark.parametrize("late", range(-10, 11))
def test_lips_and_sound_keep_their_time_on_the_way_to_the_offset(late):
    """From pixels and samples: pictures moved by -10 to 10 frames are found to be moved by that. One column or frame lost on the way shifts all."""
    clip = talker(100, 100)
    pair = M.sync_features(ByHand(), clip.frames[10 - late:90 - late], clip.audio[10 * HOP:90 * HOP] / np.float32(32768), M.FACE_BOX)
    assert M.sync_scores(*pair, padded=False)["sync_offset"] == M.sync_scores(*pair)["sync_offset"] == late


def test_sync_ranks_real_above_late_above_another_sound():
    """A sync measure is worth its name if it orders: in time, 2 frames late, 5 frames late or another sound; a frozen picture has none."""
    now, net = {}, ByHand()
    for seed in range(200, 206):
        clip, other = talker(seed), talker(seed + 50)
        lips, heard = M.sync_features(net, clip.frames, clip.audio / np.float32(32768), M.FACE_BOX)
        wrong = M.sync_features(net, clip.frames, other.audio / np.float32(32768), M.FACE_BOX)[1]
        pairs = {"real": (lips, heard), "late 2": (lips[:-2], heard[2:]), "late 5": (lips[:-5], heard[5:]), "other": (lips, wrong),
                 "frozen": (lips[:1].expand_as(lips), heard)}
        for name, pair in pairs.items():
            now.setdefault(name, []).append(M.sync_scores(*pair, padded=False)["sync_now"])
    mean = {k: np.mean(v) for k, v in now.items()}
    assert mean["real"] > 2 * max(v for k, v in mean.items() if k != "real") and abs(mean["frozen"]) < 0.1 * mean["real"]
    assert T.auc(now["real"], now["late 2"]) == 1


def test_training_brings_matching_lips_and_sound_together():
    """A step of the sync proxy's loss has a gradient for both halves, and on one batch seen again and again the loss falls."""
    torch.manual_seed(0)
    net, clips = M.SyncNet(M.SyncNetConfig(80, (8,) * 6, (8,) * 6, 8, "mouth")), [talker(i, 30) for i in range(2)]
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=1e-2), []
    for _ in range(8):
        losses.append(T.sync_loss(net, clips, np.random.default_rng(0), takes=2, moments=6))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0] and all(p.grad.abs().sum() > 0 for p in (net.netcnnlip[0].weight, net.netcnnaud[0].weight))


def test_the_shipped_proxies_rank():
    """What proxies.json says of the weights beside it, on clips they never saw: the later the sound the lower `sync_now`, at 5 frames chance;
    `sync_c` forgives a delay, so it is what tells a late sound from a shuffled one. One person is more alike than two; blinks are seen."""
    path = P.Path(P.__file__).parent / "weights" / "tiny" / "proxies" / "proxies.json"
    if not path.is_file():
        pytest.skip("no proxies are shipped yet")
    scales = json.loads(path.read_text(encoding="utf-8"))["scale"]
    for name, scale in scales.items():
        now, best = ({k: v[figure] for k, v in scale["sync"].items()} for figure in ("sync_now", "sync_c"))
        assert now["real"] > now["late 1"] > now["late 2"] > now["late 5"] and now["late 2"] > now["shuffled"], name
        assert min(best["real"], best["late 2"], best["late 5"]) > best["other sound"] > best["shuffled"] > best["frozen"], name
        assert abs(scale["sync"]["late 5"]["sync_offset"] - 5) < 0.5 and scale["identity"]["auc_same_above_other"] > 0.9, name
        assert scale["face"].get("blinks_recall", 1) > 0.8, name


def test_too_short_for_syncnet():
    """Six frames hold one window: nothing to search in, said in one line."""
    with pytest.raises(ValueError, match="7 frames"):
        M.sync_features(M.SyncNet(M.SMALL), np.zeros((6, 64, 64, 3), np.uint8), np.zeros(6 * HOP, np.float32), M.FACE_BOX)


# ------------------------------------------------------------------------------------------------------------- Frechet


def gaussian(x):
    g = M.Gaussian()
    for part in np.array_split(x, 3):                                           # a few at a time is as good as all at once
        g.add(part)
    return g


def reference(a, b):
    """The same distance without a matrix root: tr (S1 S2)^(1/2) is the nuclear norm of the product of the centred samples."""
    x, y = (v - v.mean(0) for v in (a, b))
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum() / np.sqrt((len(x) - 1) * (len(y) - 1))
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + (x ** 2).sum() / (len(x) - 1) + (y ** 2).sum() / (len(y) - 1) - 2 * cross


@pytest.mark.parametrize("n,D", [(400, 12), (50, 50), (20, 64)])
def test_frechet_equals_a_reference_in_float64(n, D):
    """Also with fewer samples than features, where a matrix square root fails or returns complex numbers; then it warns."""
    rng = np.random.default_rng(D)
    a, b = rng.standard_normal((n, D)), rng.standard_normal((n + 7, D)) @ rng.standard_normal((D, D)) / 4 + 0.5
    if n <= D:
        with pytest.warns(UserWarning, match="singular"):
            found = M.frechet(gaussian(a), gaussian(b))
    else:
        found = M.frechet(gaussian(a), gaussian(b))
    assert abs(found - reference(a, b)) < 1e-6 * max(1, found)


def test_frechet_in_one_dimension_is_textbook():
    """(m1 - m2)^2 + (s1 - s2)^2; nothing against itself."""
    a, b = np.random.default_rng(0).standard_normal((2, 500, 1)) * [[[1.0]], [[3.0]]] + [[[0.0]], [[2.0]]]
    want = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert abs(M.frechet(gaussian(a), gaussian(b)) - want) < 1e-9 and M.frechet(gaussian(a), gaussian(a)) < 1e-9


# ------------------------------------------------------------------------------------------------------ official files


class Inception(torch.nn.Module):
    def forward(self, x, return_features: bool = False):
        assert x.dtype == torch.uint8 and return_features
        return x.float().mean((2, 3)).repeat(1, 2)


class I3D(torch.nn.Module):
    def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
        assert rescale and resize and return_features and x.shape[2] == 16
        return x.float().mean((2, 3, 4))


def test_official_scripts_get_what_they_ask_for(tmp_path):
    """FID's network sees every frame, FVD's non-overlapping clips of 16; both take whole bytes and scale them themselves."""
    torch.jit.script(Inception()).save(tmp_path / "fid.pt")
    torch.jit.script(I3D()).save(tmp_path / "fvd.pt")
    frames = np.random.default_rng(0).integers(0, 256, (37, 32, 32, 3), np.uint8)
    assert np.allclose(M.inception_features(tmp_path / "fid.pt")(frames)[:, :3], frames.mean((1, 2)), atol=1e-3)
    assert np.allclose(M.i3d_features(tmp_path / "fvd.pt")(frames), [frames[:16].mean((0, 1, 2)), frames[16:32].mean((0, 1, 2))], atol=1e-3)
    (tmp_path / "no.pt").write_text("no script")
    with pytest.raises(ValueError, match="TorchScript"):
        M.inception_features(tmp_path / "no.pt")
    with pytest.raises(FileNotFoundError):
        M.check_file(tmp_path / "missing.pt", "fid")


def test_an_unknown_file_is_named_as_such(tmp_path, capsys):
    """Figures of a file that is not the official one must not pass for official: the note says so."""
    (tmp_path / "mine.pt").write_bytes(b"x")
    M.check_file(tmp_path / "mine.pt", "fvd")
    assert "not the known official file" in capsys.readouterr().out


def test_alignment_brings_the_eyes_to_the_template():
    """ArcFace knows faces in one place only: five points of a turned, scaled face land on its template."""
    turn = 0.8 * np.exp(0.3j)
    z = M.TEMPLATE[:, 0] + 1j * M.TEMPLATE[:, 1]
    src = np.stack([(turn * z + 9 - 4j).real, (turn * z + 9 - 4j).imag], 1)
    T = M.similarity(src, M.TEMPLATE)
    assert np.abs(src @ T[:, :2].T + T[:, 2] - M.TEMPLATE).max() < 1e-9
    frame = np.zeros((1, 128, 128, 3), np.uint8)
    points = (M.TEMPLATE * 0.8 + [20, 10]) / 128
    x, y = np.round(points[0] * 128).astype(int)
    frame[0, y - 2:y + 3, x - 2:x + 3] = 255                                    # a bright left eye
    yy, xx = np.nonzero(M.aligned(frame, M.FACE_BOX, points)[0, :, :, 0] > 128)
    assert np.hypot(xx.mean() - M.TEMPLATE[0, 0], yy.mean() - M.TEMPLATE[0, 1]) < 2


# ---------------------------------------------------------------------------------------------------------- the pixels


@pytest.fixture(scope="module")
def face():
    """A smooth random picture: something to move about."""
    coarse = np.random.default_rng(3).integers(0, 256, (20, 20, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((160, 160), Image.Resampling.BICUBIC))


def test_head_motion_is_measured_in_parts_of_a_pixel(face):
    """A head moved by a known way is found to have moved by that way, in parts of the face's height, against the middle frame."""
    way = np.array([(0, 0), (0.5, 0), (2, -1), (0, 0), (-1.25, 0.75), (3, 3), (0, -2)])
    frames = np.stack([np.asarray(Image.fromarray(face).transform((128, 128), Image.Transform.AFFINE, (1, 0, 16 - x, 0, 1, 16 - y),
                                                                  Image.Resampling.BICUBIC)) for x, y in way])
    found = M.head_shift(frames, M.FACE_BOX) * 0.7 * 128
    assert np.abs(found - way).max() < 0.25
    assert np.abs(M.head_shift(frames[:1].repeat(5, 0), M.FACE_BOX)).max() < 1e-6


def test_a_seam_and_a_tint_are_seen_where_they_are(face):
    """A jump into frame 81, the first new one of chunk 1, is a seam; the same jump elsewhere is motion. A tint is told per channel."""
    still = np.clip(face[16:144, 16:144], 20, 220)
    frames = np.uint8(still + 2 * (np.arange(100) % 2)[:, None, None, None])       # trembles by two grey levels
    jump = lambda at: np.clip(np.int32(frames) + np.where(np.arange(100) >= at, 12, 0)[:, None, None, None], 0, 255).astype(np.uint8)
    row = lambda x: M.picture_row(x, None, 0, M.FACE_BOX, M.colour(still[None], M.FACE_BOX))
    assert row(jump(81))["seam"] > 3 > 1.5 > row(jump(60))["seam"]
    part = jump(81)[50:]                                                        # in pieces: the frame before belongs to the piece before
    assert M.picture_row(part, jump(81)[49], 50, M.FACE_BOX, M.colour(still[None], M.FACE_BOX))["seam"] > 3
    warm = np.clip(np.int32(frames) + [6, 0, 0], 0, 255).astype(np.uint8)
    assert abs(row(warm)["colour"] - 7) < 0.01 and abs(row(frames)["colour"] - 1) < 0.01


def test_blur_lowers_sharpness(face):
    """The first thing that goes in a drifting video is detail."""
    assert M.sharpness(T.blurred(face[None], 2), M.FACE_BOX) < 0.8 * M.sharpness(face[None], M.FACE_BOX)


def test_correlation_over_speech_frames_with_a_lag():
    """A mouth 1 frame late matches at lag 1; a mouth that does not move matches nothing and counts as 0, or freezing would not cost anything."""
    true = np.random.default_rng(0).random(60)
    late, speech = np.concatenate([true[:1], true[:-1]]), np.arange(60) > 5
    assert M.correlation(late, true, speech, 1) > 0.999 > 0.5 > M.correlation(late, true, speech)
    assert M.correlation(np.full(60, 0.2), true, speech) == 0 and np.isnan(M.correlation(true, np.full(60, 0.2), speech))
    assert np.isnan(M.correlation(true, true, np.arange(60) < 8))


# -------------------------------------------------------------------------------------------------------------- proxies


def test_when_somebody_speaks(tmp_path):
    """By the phones where they are known (two kinds of tables), else by loudness."""
    (tmp_path / "clips").mkdir()
    (tmp_path / "phones.tsv").write_text("clip\tstart\tend\tphone\na\t0.00\t0.40\tsil\na\t0.40\t0.80\tɑ\n", encoding="utf-8")
    (tmp_path / "clips" / "b.json").write_text(json.dumps({"phones": [[0, 0.2, "m"], [0.2, 0.4, "sil"]]}), encoding="utf-8")
    a, b, none = (P.phones_of(tmp_path / "clips" / f"{n}.mp4") for n in "abc")
    assert P.speech_frames(a, np.zeros(0), 20).tolist() == [False] * 10 + [True] * 10
    assert P.speech_frames(b, np.zeros(0), 10).tolist() == [True] * 5 + [False] * 5 and none is None
    sound = np.repeat([0.0, 0.3], 10 * HOP) * np.random.default_rng(0).standard_normal(20 * HOP)
    assert P.speech_frames(None, sound, 20).tolist() == [False] * 10 + [True] * 10


def test_closures_are_looked_for_where_p_b_m_are_said():
    """Lips that stay open at an m are seen, whatever the correlation says."""
    gap, said = np.full(40, 0.1), [(0.4, 0.5, "m"), (1.0, 1.1, "ɑ")]
    opened = P.mouth_row(gap, None, said, np.ones(40, bool))
    gap[11] = 0.01
    shut = P.mouth_row(gap, None, said, np.ones(40, bool))
    assert (opened["closed_pbm"], shut["closed_pbm"]) == (0, 1) and abs(shut["gap_pbm"] - 0.01) < 1e-9


def test_proxies_are_only_what_they_say(tmp_path):
    """A proxy comes back as it was saved; a file of another kind is refused in one line."""
    torch.manual_seed(0)
    net = P.FaceNet().eval()
    save_file(net.state_dict(), tmp_path / "face.safetensors", {"proxy": "face", "config": "{}"})
    again, frames = P.load_proxies(tmp_path)["face"], np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    assert all(np.array_equal(a, b) for a, b in zip(P.read_faces(net, frames, M.FACE_BOX), P.read_faces(again, frames, M.FACE_BOX)))
    save_file({"a": torch.zeros(1)}, tmp_path / "sync.safetensors", {"proxy": "sync", "config": "{}"})
    (tmp_path / "identity.safetensors").write_text("no tensors")
    for name in ("sync", "identity"):
        with pytest.raises(ValueError, match="no proxy"):
            P.load_network(tmp_path / f"{name}.safetensors")


def test_auc_is_the_chance_to_be_right():
    """1 when good and bad never meet, 0.5 when they are the same."""
    assert T.auc([2, 3], [0, 1]) == 1 and T.auc([1, 1], [1, 1]) == 0.5 and T.auc([0, 2], [1]) == 0.5
