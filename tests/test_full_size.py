"""Properties at full size, without weights: the real shapes fit together and run.

The slow tests take random weights of wan-1.3b's and Wan2.1's shapes through the converter, infer.py
and one step of each stage, on pictures of 64 x 64 and 32 x 32, for a CPU's sake. They are left out
by default; the memory is computed for 30 blocks, with fewer blocks it is less:

    python -m pytest -m slow tests/test_full_size.py                        8, 32 and 62 GB
    FULL_SIZE_LAYERS=2 python -m pytest -m slow tests/test_full_size.py     3, 5 and 9 GB
"""
import json
import os
from dataclasses import replace

import av
import gpu_check
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry

import convert_weights
import dit
import infer
import vae

LAYERS = int(os.environ.get("FULL_SIZE_LAYERS", 30))
NETWORK = replace(dit.PRESETS["wan-1.3b"], layers=LAYERS)
SIZES = replace(gpu_check.TOY, network=NETWORK, vae=vae.PRESETS["wan2.1"], size=32)
THEIRS = {ours: theirs for theirs, ours in convert_weights.RENAMED.items()}


def their_name(name):
    """audio_proj.shared.1.weight -> audio_proj.proj2.weight"""
    if not name.startswith("audio_proj."):
        return name
    part, last = name.removeprefix("audio_proj.").rsplit(".", 1)
    return f"audio_proj.{THEIRS[part]}.{last}"


def publish(folder):
    """A folder of FlashHead's layout with random tensors of the published shapes, one by one."""
    for part in ("Model_Pro", "VAE_Wan"):
        (folder / part).mkdir(parents=True)
    config = {"dim": NETWORK.dim, "ffn_dim": NETWORK.ffn_dim, "num_heads": NETWORK.heads,
              "num_layers": LAYERS, "in_dim": 32, "out_dim": 16, "freq_dim": 256, "eps": 1e-6}
    (folder / "Model_Pro/config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.device("meta"):
        own = dit.AudioDiT(NETWORK).state_dict()
    shapes = {their_name(name): tensor.shape for name, tensor in own.items()}
    tensors = ((name, torch.randn(shape) * 0.02) for name, shape in shapes.items())
    convert_weights.write_one_by_one(
        folder / "Model_Pro/diffusion_pytorch_model.safetensors", tensors,
        dict.fromkeys(shapes, torch.float32), shapes, {})
    torch.save(vae.WanVAE().state_dict(), folder / "VAE_Wan/Wan2.1_VAE.pth")
    return folder


@pytest.mark.slow
def test_full_size_weights_are_converted_and_talk(tmp_path):
    """Property: files of the published shapes become a folder that infer.py runs."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model
    Wav2Vec2Model(Wav2Vec2Config()).save_pretrained(tmp_path / "w2v")       # base: 12 x 768
    source, out = publish(tmp_path / "SRC"), tmp_path / "OUT"
    options = convert_weights.Options("flashhead", str(source), out, "bfloat16",
                                      str(tmp_path / "w2v"))
    convert_weights.convert(options, NETWORK)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps(config | {"size": 64}), encoding="utf-8")
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "me.png")
    soundfile.write(tmp_path / "a.wav", np.zeros(40 * 640, np.float32), 16000)
    infer.main(["--weights", str(out), "--image", str(tmp_path / "me.png"), "--dtype", "float32",
                "--audio", str(tmp_path / "a.wav"), "--out", str(tmp_path / "o.mp4"), "--bench"])
    with av.open(str(tmp_path / "o.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 40          # 33 and 7 of a second chunk


@pytest.mark.slow
@pytest.mark.parametrize("stage", [gpu_check.stage_1, gpu_check.stage_2])
def test_full_size_stages_make_a_step(stage):
    """Property: one step of a stage runs at full width, with finite losses."""
    found = stage(SIZES)
    print(found)
    losses = [found[name] for name in ("loss", "critic", "regression") if name in found]
    assert len(losses) == (1 if stage is gpu_check.stage_1 else 2) and np.isfinite(losses).all()


def test_the_gpu_check_is_rehearsed(one_thread):
    """Property: each step of tests/gpu_check.py runs, on a CPU at toy size (diffusers': below).

    So that the minutes of a borrowed GPU are not spent on a typing error."""
    steps = gpu_check.steps_of(gpu_check.TOY, 1.0)
    assert set(steps) == {"parity", "chunk_9", "chunk_13", "stage_1", "stage_2", "diffusers"}
    assert max(steps["parity"]()["relative_error"]) < 0.02
    assert steps["stage_1"]()["loss"] > 0 and steps["stage_2"]()["critic"] > 0
    found = gpu_check.chunk(gpu_check.TOY, 9, 5, False, tflops=0.01, count=2)
    assert found["share_of_rate"] > 0 and set(found["seconds"]) >= {"dit", "decode", "re-encode"}


def test_the_gpu_check_compares_with_diffusers(one_thread, monkeypatch):
    """Property: the step that runs diffusers' classes works, each network once."""
    pytest.importorskip("diffusers")
    monkeypatch.setattr(gpu_check, "seconds_of", lambda call: (call(), 1.0)[1])
    assert gpu_check.against_diffusers(gpu_check.TOY)["times_as_fast"] == 1


def test_the_gpu_check_counts_all_work():
    """Property: FLOP are 2 x products, of matrices, convolutions and attention alike: what
    share_of_rate divides by the card's rate. Attention's kernels on a GPU are known, too; those on
    a CPU are not (the plain one is taken here), so a toy's share is without attention."""
    q = torch.ones(1, 2, 6, 8)                                      # (rows, heads, tokens, width)
    linear, conv = torch.nn.Linear(8, 16), torch.nn.Conv3d(3, 5, (3, 1, 1))
    with torch.inference_mode():
        assert gpu_check.flop_of(lambda: linear(torch.ones(4, 8))) == 2 * 4 * 8 * 16
        assert gpu_check.flop_of(lambda: conv(torch.ones(1, 3, 6, 2, 2))) == 2 * 16 * 5 * 3 * 3
        attention = torch.nn.functional.scaled_dot_product_attention
        with sdpa_kernel(SDPBackend.MATH):
            assert gpu_check.flop_of(lambda: attention(q, q, q)) == 2 * 2 * 2 * 6 * 6 * 8
    for kernel in ("flash", "efficient", "cudnn"):
        name = f"_scaled_dot_product_{kernel}_attention"
        assert getattr(torch.ops.aten, name) in flop_registry


@pytest.mark.parametrize("share, parity, code", [(0.6, 0.001, 0), (0.4, 0.001, 1), (0.6, "", 1)])
def test_the_gpu_check_fails_when_a_goal_is_missed(share, parity, code, monkeypatch, capsys):
    """Property: a missed goal and a failed step are lines, and the exit code is 1."""
    steps = {"parity": lambda: {"relative_error": [0.001 + parity]},
             "chunk_33": lambda: {"share_of_rate": share}, "chunk_81": lambda: {"share_of_rate": 1},
             "diffusers": lambda: {"times_as_fast": 1.5}}
    monkeypatch.setattr(gpu_check, "Sizes", lambda: gpu_check.TOY)
    monkeypatch.setattr(gpu_check, "steps_of", lambda sizes, tflops: steps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_check, "empty", lambda: None)
    try:
        gpu_check.main([])
        assert code == 0
    except SystemExit as stop:
        assert stop.code == code
    lines = capsys.readouterr().out
    assert f"33 frames: {'met' if share >= 0.5 else 'missed'}" in lines
    assert f"goal: parity: {'met' if parity else 'missed'}" in lines
