"""Properties of official weights: converting them, and that the networks compute what theirs do.

tests/golden_flashhead.json holds numbers that the public sources gave on a CPU in float32, for
weights and inputs made by numbers() and noise() below, whose seeds are the names:
    Soul-AILab/SoulX-FlashHead@12467ce
        WanModelAudioProject, AudioProjModel    forward, windows: one block, narrow
        timestep_transform(shift=5)             timesteps
        audio_analysis.wav2vec2.Wav2Vec2Model   audio: the last 9 of seq_len = 200 frames
        match_and_blend_colors_torch            colours
    madebyollin/taehv@1f14a56
        TAEHV.decode_video(parallel=True)       preview, times 2, minus 1
No published weights are used: what is compared is the computation."""
import importlib
import json
import os
import pickle
import re
import shutil
import weakref
import zlib
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common
import convert_weights
import dit
import infer
import train_teacher
import vae
from audio import AudioEncoder, latent_windows
from dit import DiTConfig

GOLDEN = json.loads((ROOT / "tests" / "golden_flashhead.json").read_text(encoding="utf-8"))
DIT = DiTConfig(dim=48, ffn_dim=64, heads=2, layers=1, channels=4, freq_dim=32, audio_layers=2,
                audio_dim=16, audio_tokens=4, audio_hidden=32)
VAE = vae.VAEConfig(dim=4, z_dim=4, dim_mult=(1, 1, 2, 2), num_res_blocks=1,
                    latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
OFFICIAL = {"dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 1, "in_dim": 8, "out_dim": 4,
            "freq_dim": 32, "eps": 1e-6, "text_dim": 24, "has_image_input": False}
MODEL, AUDIO = "Model_Pro/diffusion_pytorch_model.safetensors", "facebook/wav2vec2-base-960h"
pytestmark = pytest.mark.usefixtures("one_thread")


def noise(name, *shape):
    """Standard normal numbers that depend on the name alone, the same in every numpy."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(random.standard_normal(shape).astype(np.float32))


def numbers(name, shape):
    """A tensor of a network: about unit gain, norms near 1, biases small."""
    x = noise(name, *shape)
    if name.endswith("modulation"):
        return x / shape[-1] ** 0.5
    if len(shape) > 1:
        return x / np.prod(shape[1:]) ** 0.5
    return 0.1 * x + (1.0 if "norm" in name and name.endswith("weight") else 0.0)


def same(got, golden):
    torch.testing.assert_close(got.flatten(), torch.tensor(golden), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory):
    """A small Wav2Vec2's folder, as transformers saves it."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model
    folder = tmp_path_factory.mktemp("w2v")
    model = Wav2Vec2Model(Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2))
    model.load_state_dict({k: numbers(k, v.shape) for k, v in model.state_dict().items()})
    model.save_pretrained(folder)
    return folder


def publish(folder, change=None, config=OFFICIAL):
    """A folder of FlashHead's layout and names, one narrow block; change(tensors) edits them."""
    for part in ("Model_Pro", "VAE_Wan"):
        (folder / part).mkdir(parents=True)
    (folder / "Model_Pro/config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {name: numbers(name, shape) for name, shape in GOLDEN["tensors"].items()}
    if change:
        change(tensors)
    save_file(tensors, folder / MODEL)
    torch.manual_seed(0)
    torch.save(vae.WanVAE(VAE).state_dict(), folder / "VAE_Wan/Wan2.1_VAE.pth")
    return folder


def run(source, out, audio=AUDIO, model="flashhead", dtype="float32"):
    options = convert_weights.Options(model, str(source), out, dtype, str(audio))
    return convert_weights.convert(options, DIT, VAE)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, wav2vec2):
    """-> published folder, converted folder"""
    folder = tmp_path_factory.mktemp("official")
    source = publish(folder / "SRC")
    run(source, folder / "OUT", wav2vec2)
    return source, folder / "OUT"

# ------------------------------------------------------------------------------------- same numbers


@torch.no_grad()
def test_a_forward_equals_flashheads(converted):
    """Property: converted weights give their network's velocity, at each of their timesteps."""
    network, _, trained = infer.load_dit(converted[1] / "student.safetensors",
                                         json.loads((converted[1] / "config.json").read_text()))
    latents, identity = noise("latents", 1, 4, 3, 4, 4), noise("identity", 1, 4, 3, 4, 4)
    audio = noise("audio", 1, 9, 2, 16)
    timesteps = 1000 * torch.tensor(dit.student_sigmas(4, 5.0))
    torch.testing.assert_close(timesteps, torch.tensor(GOLDEN["timesteps"]), atol=1e-3, rtol=0)
    for t, golden in zip(timesteps, GOLDEN["forward"].values(), strict=True):
        same(network(latents, t[None], identity, audio), golden)
    assert trained and np.std(golden) > 0.5                 # the comparison is not of zeros


def test_audio_windows_equal_flashheads():
    """Property: a latent is conditioned on the same frames, in the same order."""
    frames = torch.arange(33).view(1, 33, 1, 1)
    first, rest = latent_windows(frames)
    assert [first.flatten().tolist(), *rest[0].flatten(1).tolist()] == GOLDEN["windows"]


def test_a_window_filled_with_zeros_equals_flashheads_queue(wav2vec2):
    """Property: with a window of 8 s the encoder gets what theirs gets in the first seconds, zeros
    on the left and normalised along. After 8 s a window changes nothing."""
    sound = noise("speech", 33 * 640).numpy() * np.float32(0.1)
    queue, plain = AudioEncoder(wav2vec2, window=8), AudioEncoder(wav2vec2)
    for start, golden in GOLDEN["audio"].items():
        same(queue.features(sound, int(start), 9), golden)
        assert (queue.features(sound, 0, 9) - plain.features(sound, 0, 9)).abs().max() > 0.1
    long = noise("long", 220 * 640)
    assert torch.equal(queue.features(long, 195, 9), plain.features(long, 195, 9))


def test_colours_equal_flashheads():
    """Property: match_colours is their Lab transfer at full strength."""
    video = (noise("video", 1, 3, 2, 6, 6) * 0.4).clamp(-1, 1)
    portrait = (noise("portrait", 1, 3, 6, 6) * 0.3 + 0.2).clamp(-1, 1)
    same(common.match_colours(video, portrait), GOLDEN["colours"])


def test_model_pro_is_wan_1_3b_and_twelve_unused_tensors():
    """Property: full size is theirs to the number: 843 tensors, 1,507,694,912 numbers, of which
    text_embedding and audio_emb are left out."""
    with torch.device("meta"):
        own = dit.AudioDiT(dit.PRESETS["wan-1.3b"]).state_dict()
    unused = [name for name in GOLDEN["tensors"] if name.startswith(convert_weights.UNUSED)]
    assert len(own) + len(unused) == 843 and len(unused) == 12
    text = 4096 * 1536 + 1536 + 1536 * 1536 + 1536
    audio_emb = 2 * 768 + 768 * 768 + 768 + 768 * 1536 + 1536 + 2 * 1536
    assert sum(x.numel() for x in own.values()) + text + audio_emb == 1_507_694_912

# --------------------------------------------------------------------------------------- conversion


def test_converted_weights_talk(converted):
    """Property: the folder says all that inference must know; the video has all its frames.

    (Made at 32 x 32 instead of 512 x 512, by the same loop.)"""
    config = json.loads((converted[1] / "config.json").read_text(encoding="utf-8"))
    said = [config[key] for key in ("size", "frames", "continuity_frames", "audio_window")]
    assert said == [512, 33, 5, 8] and config["student"] == {"steps": 4, "timestep_shift": 5.0}
    models = replace(infer.load(converted[1], device="cpu", dtype="float32"), size=32)
    assert models.audio.window == 8 and models.trained
    image = noise("me", 1, 3, 32, 32).clamp(-1, 1)
    sound = noise("sound", 60 * 640 - 5)
    pieces = list(infer.generate(models, image, sound))
    assert sum(map(len, pieces)) == 60
    assert [len(piece) for piece in pieces] == [1, 16, 16, 12, 15]      # 33 frames, then 27 of 28


def test_matrices_in_bfloat16_make_the_same_network(converted, wav2vec2, tmp_path):
    """Property: --dtype bfloat16 rounds what infer.py rounds anyway, and nothing else."""
    run(converted[0], tmp_path / "half", wav2vec2, dtype="bfloat16")
    config = json.loads((tmp_path / "half/config.json").read_text())
    networks = [infer.load_dit(folder / "student.safetensors", config)[0]
                for folder in (converted[1], tmp_path / "half")]
    full, half = (network.cast_matrices(torch.bfloat16).state_dict() for network in networks)
    assert all(torch.equal(full[name], half[name]) for name in full)
    kept = load_file(tmp_path / "half/student.safetensors")
    assert {name: tensor.dtype for name, tensor in kept.items()} == \
        {name: tensor.dtype for name, tensor in half.items()}
    assert (tmp_path / "half/vae.safetensors").read_bytes() == \
        (converted[1] / "vae.safetensors").read_bytes()             # the encoder needs float32


def test_tensors_pass_one_by_one(converted, tmp_path, monkeypatch):
    """Property: when a tensor is read, no tensor of the network before it is in memory any more."""
    seen, most = [], 0
    check = convert_weights.check_tensor

    def spy(path, name, tensor):
        nonlocal most
        if path.suffix == ".safetensors":
            seen.append(weakref.ref(tensor))
            most = max(most, sum(one() is not None for one in seen))
        return check(path, name, tensor)
    monkeypatch.setattr(convert_weights, "check_tensor", spy)
    run(converted[0], tmp_path / "OUT")
    assert len(seen) > 30 and most <= 2                     # the one before is just being replaced


def test_stage_1_starts_from_converted_weights(converted):
    """Property: --init takes them as our own, and the window travels with what stage 1 makes."""
    model = dit.AudioDiT(DIT)
    train_teacher.load_init(model, converted[1] / "student.safetensors")
    tensors = load_file(converted[1] / "student.safetensors")
    assert all(torch.equal(v, tensors[k]) for k, v in model.state_dict().items())
    _, _, encoder = train_teacher.load_frozen(converted[1], "cpu")
    assert encoder.window == 8


def test_an_audio_encoder_stays_a_name_or_is_copied(converted, wav2vec2, tmp_path):
    """Property: a Hugging Face name is written as it is; a folder of another size is refused."""
    run(converted[0], tmp_path / "OUT")
    assert json.loads((tmp_path / "OUT/config.json").read_text())["audio"] == AUDIO
    assert json.loads((converted[1] / "config.json").read_text())["audio"] == "wav2vec2"
    with pytest.raises(ValueError, match="another encoder"):
        convert_weights.write_audio(wav2vec2, tmp_path, replace(DIT, audio_dim=32))


def test_a_wrong_audio_encoder_is_one_line(wav2vec2, tmp_path):
    """Property: a mistyped folder is not taken for a name; a folder's files are looked into."""
    for name in ("W2V", "./W2V", "/no/W2V", "a/b/W2V", "a/"):
        with pytest.raises(ValueError, match="no folder, and no Hugging Face name"):
            convert_weights.write_audio(name, tmp_path, DIT)
    for file, spoil, message in (
            ("config.json", lambda path: path.write_text("null"), "no JSON object"),
            ("model.safetensors", cut, "cannot be read"),
            ("model.safetensors", lambda path: save_file({"x": torch.ones(1)}, path), "missing")):
        bad = tmp_path / message
        shutil.copytree(wav2vec2, bad)
        spoil(bad / file)
        with pytest.raises(ValueError, match=message):
            convert_weights.write_audio(bad, tmp_path, DIT)


def wan_folder(folder, change=None):
    """Wan2.1's layout: a text-to-video network, C channels in, and the VAE beside it."""
    folder.mkdir()
    keep = ("patch", "text", "time", "blocks", "head")
    tensors = {k: numbers(k, s) for k, s in GOLDEN["tensors"].items() if k.startswith(keep)}
    tensors["patch_embedding.weight"] = tensors["patch_embedding.weight"][:, :4].contiguous()
    if change:
        change(tensors)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    config = OFFICIAL | {"in_dim": 4}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(0)
    torch.save(vae.WanVAE(VAE).state_dict(), folder / "Wan2.1_VAE.pth")
    return folder


def test_wan_makes_a_folder_that_stage_1_starts_from(tmp_path, wav2vec2):
    """Property: `wan` converts the VAE and checks the network, which --init then loads."""
    source = wan_folder(tmp_path / "SRC")
    report = run(source, tmp_path / "OUT", wav2vec2, "wan")
    assert f"--init {source / 'diffusion_pytorch_model.safetensors'}" in report
    config, codec, encoder = train_teacher.load_frozen(tmp_path / "OUT", "cpu")
    assert config["size"] == 512 and codec.config == VAE and encoder.window is None
    train_teacher.load_init(dit.AudioDiT(DIT), source / "diffusion_pytorch_model.safetensors")
    bad = wan_folder(tmp_path / "BAD", lambda x: x["head.head.weight"].fill_(float("nan")))
    with pytest.raises(ValueError, match="head.head.weight"):
        run(bad, tmp_path / "OUT2", wav2vec2, "wan")
    with pytest.raises(ValueError, match="--dtype bfloat16 would change nothing"):
        run(source, tmp_path / "OUT2", wav2vec2, "wan", "bfloat16")

# ---------------------------------------------------------------------------------------- bad input


class Code:
    """A pickle that would run a command when it is loaded."""
    def __reduce__(self):
        return os.system, ("touch code-was-run",)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def lite(folder):
    config = OFFICIAL | {"in_dim": 256, "out_dim": 128}
    (folder / "Model_Pro/config.json").write_text(json.dumps(config), encoding="utf-8")


def big(folder):
    config = OFFICIAL | {"dim": 5120, "num_heads": 40, "num_layers": 40}
    (folder / "Model_Pro/config.json").write_text(json.dumps(config), encoding="utf-8")


def edit(change):
    """change(tensors) on the network's file."""
    def of(folder):
        tensors = load_file(folder / MODEL)
        change(tensors)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / MODEL)
    return of


def swap(tensors):
    name = "blocks.0.ffn.0.weight"
    tensors[name] = tensors[name].T


def edit_vae(folder, change):
    """Change one tensor of the VAE's file."""
    tensors = torch.load(folder / VAE_FILE)
    tensors["conv1.bias"] = change(tensors["conv1.bias"])
    torch.save(tensors, folder / VAE_FILE)


VAE_FILE = "VAE_Wan/Wan2.1_VAE.pth"
WRONG = {
    "pickle": (lambda f: (f / VAE_FILE).write_bytes(pickle.dumps(Code())), "tensors alone"),
    "code": (lambda f: torch.save({"conv1.bias": Code()}, f / VAE_FILE), "tensors alone"),
    "object": (lambda f: torch.save([1, 2], f / VAE_FILE), "tensors alone"),
    "cut vae": (lambda f: cut(f / VAE_FILE), "tensors alone"),
    "other vae": (lambda f: torch.save({"conv1.bias": torch.zeros(8)}, f / VAE_FILE), "missing"),
    "no vae": (lambda f: (f / VAE_FILE).unlink(), "hf download Soul-AILab"),
    "no model": (lambda f: (f / MODEL).unlink(), "hf download Soul-AILab"),
    "cut": (lambda f: cut(f / MODEL), "cannot be read"),
    "pickled model": (lambda f: torch.save({"x": Code()}, f / MODEL), "cannot be read"),
    "nan": (edit(lambda x: x["blocks.0.norm3.bias"][3:4].fill_(float("nan"))), "norm3.bias"),
    "integers": (edit(lambda x: x.update({"head.head.bias": x["head.head.bias"].int()})), "finite"),
    "swapped": (edit(swap), r"ffn.0.weight is \(48, 64\) instead of \(64, 48\)"),
    "lost": (edit(lambda x: x.pop("audio_proj.proj2.bias")), "shared.1.bias is missing"),
    "more": (edit(lambda x: x.update({"blocks.0.k_img.weight": torch.ones(2)})), "k_img"),
    "lite": (lite, "Model_Lite"),
    "14B": (big, "dim 5120 instead of 48"),
    "config": (lambda f: (f / "Model_Pro/config.json").write_text("[1"), "no JSON"),
    "list": (lambda f: (f / "Model_Pro/config.json").write_text("[1]"), "no JSON object"),
    "null": (lambda f: (f / "Model_Pro/config.json").write_text("null"), "no JSON object"),
    "fp8": (edit(lambda x: x.update(
        {"head.head.bias": x["head.head.bias"].to(torch.float8_e4m3fn)})), "bias is not .* finite"),
    "sparse vae": (lambda f: edit_vae(f, lambda x: x.to_sparse()), "conv1.bias .*finite"),
    "meta vae": (lambda f: edit_vae(f, lambda x: x.to("meta")), "conv1.bias .*finite"),
    "twice": (edit(lambda x: x.update(
        {"audio_proj.shared.1.bias": x["audio_proj.proj2.bias"] + 1})), "FlashHead's name and"),
}


@pytest.fixture
def small_sizes(monkeypatch):
    """The program converts the published sizes only; here they are the small ones."""
    monkeypatch.setattr(convert_weights.convert, "__defaults__", (DIT, VAE))


@pytest.mark.parametrize("what", WRONG)
def test_wrong_and_hostile_files_are_one_line(what, tmp_path, monkeypatch, capsys, small_sizes):
    """Property: one line says what is wrong, exit code 2, nothing is left, no code is run."""
    monkeypatch.chdir(tmp_path)
    source = publish(tmp_path / "SRC")
    spoil, message = WRONG[what]
    spoil(source)
    with pytest.raises(SystemExit) as stop:
        convert_weights.main(["flashhead", str(source), "OUT"])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("convert_weights.py: ")
    assert re.search(message, line) and line.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["SRC"]


def test_the_published_size_is_the_only_one(tmp_path, capsys):
    """Property: the program itself refuses any other size than wan-1.3b's."""
    with pytest.raises(SystemExit):
        convert_weights.main(["flashhead", str(publish(tmp_path / "SRC")), str(tmp_path / "OUT")])
    assert "dim 48 instead of 1536" in capsys.readouterr().err


def test_an_existing_folder_and_no_network_are_one_line(converted, tmp_path, capsys, monkeypatch,
                                                        small_sizes):
    """Property: weights are never overwritten, which is said before anything is fetched; a name
    that cannot be fetched is one line."""
    import huggingface_hub

    def no_network(name, **options):
        raise OSError("no route to host\nmore lines")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    for source, out, message in (("somebody/model", converted[1], "exists: choose another"),
                                 ("somebody/model", tmp_path / "o", "no route to host\n")):
        with pytest.raises(SystemExit) as stop:
            convert_weights.main(["flashhead", str(source), str(out)])
        line = capsys.readouterr().err
        assert stop.value.code == 2 and message in line and line.count("\n") == 1


def test_the_program_says_what_to_run_next(converted, tmp_path, capsys, small_sizes):
    """Property: the last lines are the next command, the licences and the folder."""
    convert_weights.main(["flashhead", str(converted[0]), str(tmp_path / "OUT")])
    report = capsys.readouterr().out
    assert f"infer.py --weights {tmp_path / 'OUT'}" in report and "Apache-2.0" in report
    assert "--match-colour --crop none" in report           # as FlashHead itself does by default
    with safe_open(tmp_path / "OUT/student.safetensors", "pt") as file:
        assert file.metadata()["trained"] == "yes"
        assert len(file.keys()) == len(GOLDEN["tensors"]) - 12

# ------------------------------------------------------------------ colours and the preview decoder


def test_matched_frames_have_the_portraits_colours():
    """Property: mean and deviation of every frame are the portrait's; a matched frame stays."""
    portrait = noise("p", 1, 3, 16, 16).mul(0.2)
    video = noise("v", 1, 3, 4, 16, 16).mul(0.1) + torch.linspace(-0.3, 0.3, 4).view(1, 1, 4, 1, 1)
    matched = common.match_colours(video, portrait)
    goal = common.rgb_to_lab(portrait.permute(0, 2, 3, 1) / 2 + 0.5)
    lab = common.rgb_to_lab(matched.permute(0, 2, 3, 4, 1) / 2 + 0.5)
    for statistic in (torch.mean, torch.std):
        torch.testing.assert_close(statistic(lab[0].flatten(1, 2), 1),
                                   statistic(goal.flatten(1, 2), 1).expand(4, 3), atol=0.2, rtol=0)
    torch.testing.assert_close(common.match_colours(matched, portrait), matched, atol=0.01, rtol=0)
    flat = torch.full((1, 3, 1, 16, 16), 0.1)
    assert torch.isfinite(common.match_colours(flat, portrait)).all()


def test_colours_are_matched_before_frames_are_shown_and_encoded(converted, monkeypatch):
    """Property: with match_colour the next kappa encodes matched frames, those that are shown."""
    models = replace(infer.load(converted[1], device="cpu", dtype="float32"), size=32,
                     match_colour=True)
    image = noise("me", 1, 3, 32, 32).mul(0.3)
    tails = []
    monkeypatch.setattr(infer, "continuity_reference", lambda codec, video, n: (
        tails.append(video), codec.encode(video))[1])
    shown = np.concatenate(list(infer.generate(models, image, noise("sound", 40 * 640))))
    assert np.array_equal(shown[28:33], infer.to_uint8(tails[0][0]))
    lab = common.rgb_to_lab(torch.from_numpy(shown).float() / 255)
    goal = common.rgb_to_lab(image.permute(0, 2, 3, 1) / 2 + 0.5)
    assert (lab.mean((1, 2)) - goal.mean((1, 2))).abs().max() < 3


@pytest.fixture(scope="module")
def preview(tmp_path_factory):
    """-> a file of taew2_1's layout, and the decoder made from it"""
    tensors = {k: numbers(k, s) for k, s in GOLDEN["preview"]["tensors"].items()}
    tensors["encoder.0.weight"] = torch.ones(1)             # the published file has an encoder, too
    path = tmp_path_factory.mktemp("preview") / "taew2_1.safetensors"
    save_file(tensors, path)
    with torch.device("meta"):
        wan = vae.WanVAE()
    wan.conv2 = wan.conv2.to_empty(device="cpu")
    return path, vae.load_preview_decoder(path, wan)


def test_the_preview_decoder_equals_taehv(preview):
    """Property: the published file's tensors have a home, and the same latents the same frames."""
    latents = noise("preview", 1, 6, 16, 2, 2).transpose(1, 2)
    video = torch.cat(list(preview[1].decode_stream(latents)), 2)       # (1, 3, 21, 16, 16)
    assert video.shape == (1, 3, 21, 16, 16)
    same(video[0].transpose(0, 1)[:, :, ::8, ::8], GOLDEN["preview"]["video"])


def test_the_preview_decoder_streams(preview, monkeypatch):
    """Property: in pieces it makes the frames of one pass, without those to skip, and never looks
    ahead."""
    latents = noise("preview", 1, 16, 6, 2, 2)
    streamed, skipped = (list(preview[1].decode_stream(latents, skip)) for skip in (0, 9))
    assert [piece.shape[2] for piece in skipped] == [0, 8, 4]
    assert [piece.shape[2] for piece in streamed] == [1, 16, 4]
    monkeypatch.setattr(vae, "pieces", lambda x, size: [x])
    whole, = preview[1].decode_stream(latents)
    torch.testing.assert_close(torch.cat(streamed, 2), whole, atol=1e-5, rtol=0)
    skipped = torch.cat(skipped, 2)
    torch.testing.assert_close(skipped, whole[:, :, 9:], atol=1e-5, rtol=0)
    changed = latents.clone()
    changed[:, :, 3:] = 0
    early, = preview[1].decode_stream(changed)
    torch.testing.assert_close(early[:, :, :9], whole[:, :, :9], atol=1e-6, rtol=0)
    assert (early[:, :, 9:] - whole[:, :, 9:]).abs().max() > 0.1


def test_a_preview_decoder_takes_the_vaes_place(converted):
    """Property: what is shown comes from it, with the same number of frames."""
    models = replace(infer.load(converted[1], device="cpu", dtype="float32"), size=32)
    tiny = vae.PreviewDecoder(z_dim=4, widths=(8, 8, 8, 8)).requires_grad_(False)
    image, sound = noise("me", 1, 3, 32, 32).clamp(-1, 1), noise("sound", 36 * 640)
    plain, fast = (np.concatenate(list(infer.generate(variant, image, sound)))
                   for variant in (models, replace(models, preview=tiny)))
    assert plain.shape == fast.shape == (36, 32, 32, 3) and not np.array_equal(plain, fast)


def test_a_wrong_preview_decoder_is_one_line(preview, tmp_path):
    """Property: another file, pickled code, or other latents than Wan2.1's are refused."""
    wan = vae.WanVAE(replace(VAE, z_dim=16, latents_mean=vae.WAN_MEAN, latents_std=vae.WAN_STD))
    torch.save({"x": Code()}, tmp_path / "code.pth")
    save_file({"decoder.1.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    for path, codec in ((tmp_path / "none.pth", wan), (tmp_path / "code.pth", wan),
                        (tmp_path / "other.safetensors", wan), (preview[0], vae.WanVAE(VAE))):
        with pytest.raises(ValueError, match="preview decoder") as error:
            vae.load_preview_decoder(path, codec)
        assert "\n" not in str(error.value)

# ------------------------------------------------------------------------------------------- memory


def kept_by_autograd(bf16, dim, hidden, tokens):
    """Bytes that autograd keeps inside one block, its weights not counted."""
    block = dit.Block(replace(DIT, dim=dim, ffn_dim=hidden))
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor          # alive: no place is used twice
        return tensor
    x, audio = torch.randn(1, tokens, dim, requires_grad=True), torch.randn(1, 4, 4, dim)
    rope = dit.rope_table(4, 1, tokens // 4, dim // 2)
    with (torch.autocast("cpu", torch.bfloat16, enabled=bf16),
          torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)):
        block(x, torch.randn(1, 6, dim), rope, audio)
    return sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in own)


@pytest.mark.parametrize("bf16", [True, False])
def test_the_memory_plan_counts_what_autograd_keeps(bf16):
    """Property: memory_plan's bytes a token inside a block are those of a real block."""
    a, b = (kept_by_autograd(bf16, 96, 256, tokens) for tokens in (128, 256))
    assert abs((b - a) / 128 / common.kept_in_block(96, 256, bf16) - 1) < 0.01


@pytest.mark.parametrize("stage", ["train_teacher", "distill_student"])
def test_the_memory_plan_of_a_converted_model(stage, capsys):
    """Property: both stages say what one GPU needs for 512 x 512 x 33, without any file: 31 and
    59 GiB. Eight GPUs share weights and optimisers, not the chunk."""
    program = importlib.import_module(stage)

    def plan(gpus):
        program.main(["--preset", "wan-1.3b", "--plan-memory", str(gpus), "512", "33"])
        lines = capsys.readouterr().out.splitlines()
        return {k: float(v.split()[0]) for k, v in (line.split(": ") for line in lines[1:5])}
    one, eight = plan(1), plan(8)
    assert round(one["total"]) == {"train_teacher": 31, "distill_student": 59}[stage]
    assert abs(eight["weights_and_optimizers"] - one["weights_and_optimizers"] / 8) < 0.1
    assert eight["inside_blocks"] == one["inside_blocks"] > 1
    with pytest.raises(SystemExit):
        program.main(["--plan-memory", "1", "512", "32"])
    assert "4 k + 1" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["train_teacher", "distill_student"])
def test_planning_leaves_a_run_alone(stage, tmp_path, capsys):
    """Property: neither a plan nor a command without --data deletes the run that --overwrite
    names."""
    program = importlib.import_module(stage)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"a week's work")
    options = ["--overwrite", "--run-dir", str(tmp_path)]
    program.main([*options, "--plan-memory", "1", "512", "33"])
    assert "total: " in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        program.main(options)
    assert stop.value.code == 2 and "--data is missing" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == b"a week's work"


def test_the_golden_file_is_small():
    """Property: the comparison costs a reader 200 kB at most, and is of the DiT's real config."""
    assert (ROOT / "tests/golden_flashhead.json").stat().st_size < 200_000
    assert asdict(DIT)["eps"] == dit.PRESETS["wan-1.3b"].eps
