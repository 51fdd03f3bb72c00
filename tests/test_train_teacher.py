"""Properties of the teacher's training. Networks are random and small: any weights would do."""
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from toys import FakeAudioEncoder, make_clip, make_network, make_vae

import dit
import infer
import train_teacher as tt
from common import TrainState, log, save_image, swap_ema, write_mp4
from data import collate, encode_clips, to_tensor
from tre import temporal_reference_encoding as tre

CFG = tt.TeacherConfig(
    steps=6, batch=4, micro_batch=4, lr=1e-3, warmup=2, ema=0.9, timestep_shift=8.0, bf16=False,
    offsets=2, references=2, pixel_every=1, pixel_rows=4, sample_steps=2, val_every=3, val_chunks=1,
    save_minutes=1e9)


@pytest.fixture(scope="module")
def vae():
    return make_vae()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    lengths = {"long": 70, "other": 70, "short": 31}
    pairs = enumerate(lengths.items())
    return [make_clip(folder, name, length, i) for i, (name, length) in pairs]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def chunks(clips, vae, cache):
    return encode_clips(clips, vae, FakeAudioEncoder(), tre, cache, CFG)


@pytest.fixture
def sampler(chunks):
    return tt.ChunkSampler(chunks)


def run(folder, vae, sampler, chunks, resume=False, model=None, **options):
    extra = options.pop("extra", None)
    cfg = replace(CFG, **options)
    return tt.train(cfg, model or make_network(), vae, sampler, chunks[:1], folder, resume,
                    extra=extra)


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]

# ------------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize("T, reference", [(81, "tre"), (33, "tre"), (33, "etr")])
def test_training_sees_what_inference_gives_the_network(vae, tmp_path, T, reference):
    """Property: latents, identity reference, kappa and audio of a training row are infer.py's own,
    rounded to half precision, at any chunk length and with either identity reference."""
    seen = []

    class Recorder(torch.nn.Module):
        def forward(self, x, t, identity, audio):
            seen.append((x, identity, audio))
            return torch.zeros_like(x)

    clip = make_clip(tmp_path, "whole", 2 * T - 2, 5)
    cfg = replace(CFG, frames=T, offsets=1, identity=reference)
    chunks = encode_clips([clip], vae, FakeAudioEncoder(), tre, tmp_path / "cache", cfg)
    assert [c.start for c in chunks] == [0, T - 9]                  # as in infer.py
    image = torch.from_numpy(np.array(clip.frames[0])).permute(2, 0, 1)[None] / 127.5 - 1
    sound = np.array(clip.audio[:(2 * T - 9) * 640]) / np.float32(32768)
    models = infer.Models(
        vae=vae, dit=Recorder(), audio=FakeAudioEncoder(), network="teacher", size=32, trained=True,
        frames=T, identity=reference, continuity_frames=9, steps=1, timestep_shift=5.0,
        guidance=1.0)
    list(infer.generate(models, image, sound))
    for chunk, (x, identity, audio) in zip(chunks, seen, strict=True):
        rng = np.random.default_rng(0)
        row = tt.make_row(chunk, cfg, rng, is_first=chunk.row == 0, drop_audio=False, sigma=0.5)
        assert torch.equal(row["audio"], audio[0].half().float())
        with torch.no_grad():
            truth = vae.encode(to_tensor(clip.frames[chunk.start:chunk.start + T]))[0]
        assert torch.equal(row["latents"], truth.half().float())
        if chunk.row == 0:                                          # the portrait is frame 0 ...
            assert torch.equal(row["identity"], identity[0].half().float())
            assert torch.equal(row["latents"][:, :1], x[0, :, :1].half().float())   # ... and kappa

# --------------------------------------------------------------------------------------------- rows


def test_rates_lengths_and_weights(chunks):
    """Property: one row in ten is a first chunk, one in ten has no audio, a batch has one length,
    and a chunk is drawn as often as its weight says."""
    weights = [1.0 if chunk.length == 33 else 5.0 for chunk in chunks]
    sampler = tt.ChunkSampler(chunks, weights)
    lengths, first, silent = [], 0, 0
    for step in range(200):
        rows = [tt.draw_row(sampler, CFG, step, row) for row in range(4)]
        assert len({row["chunk"].length for row in rows}) == 1
        lengths.append(rows[0]["chunk"].length)
        for row in rows:
            mask = row["loss_weight"].flatten()
            first += int(mask.sum() == len(mask) - 1)
            silent += int(not row["audio"].any())
            if mask[1]:                                             # a first chunk
                assert torch.equal(row["identity"][:, 0], row["latents"][:, 0])
                assert row["chunk"].start == row["chunk"].pictures[row["chunk"].row]
    assert 0.06 < first / 800 < 0.14 and 0.06 < silent / 800 < 0.14
    count = [sum(w for c, w in zip(chunks, weights) if c.length == T) for T in (33, 29)]
    assert np.mean(np.array(lengths) == 33) == pytest.approx(count[0] / sum(count), abs=0.1)


def test_the_reference_picture_is_not_in_the_chunk(chunks):
    """Property: the picture comes from elsewhere in the clip (Eq. 24), else the network could copy
    its mouth."""
    for chunk in [c for c in chunks if c.clip.name == "long"]:
        inside = range(chunk.start, chunk.start + 33)
        outside = [j for j, frame in enumerate(chunk.pictures) if frame not in inside]
        allowed = [chunk.tensor("identity", j) for j in outside]
        for seed in range(8):
            row = tt.make_row(chunk, CFG, np.random.default_rng(seed), False, False, 0.5)
            assert outside and any(torch.equal(row["identity"], z) for z in allowed)

# ------------------------------------------------------------------------------------------- losses


def test_continuity_latents_are_clean_and_have_no_loss(sampler, vae):
    """Property: the network sees kappa_gt without noise, and its prediction there has no gradient,
    with the pixel losses too."""
    cfg = replace(CFG, first_chunk_prob=0.5)
    batch = tt.make_batch(sampler, cfg, 1, range(4), "cpu")
    v = torch.zeros_like(batch["latents"], requires_grad=True)
    inputs = []
    loss, parts = tt.teacher_loss(lambda x, *rest: inputs.append((x, *rest)) or v, vae, batch, cfg,
                                  with_pixels=True)
    loss.sum().backward()
    given = batch["loss_weight"][:, :, 0, 0] == 0                   # (B, F)
    assert set(given.sum(1).tolist()) == {1, 3}                     # first chunks and others
    x, t = inputs[0][:2]
    for i in range(4):
        rest, sigma = ~given[i], batch["sigma"][i]
        assert torch.equal(x[i][:, given[i]], batch["latents"][i][:, given[i]])
        assert not v.grad[i][:, given[i]].any()
        assert (v.grad[i][:, rest] != 0).float().mean() > 0.99
        noisy = (1 - sigma) * batch["latents"][i] + sigma * batch["noise"][i]
        assert torch.allclose(x[i][:, rest], noisy[:, rest], atol=1e-6)
    assert torch.equal(t, 1000 * batch["sigma"])
    assert (parts["face"] > 0).all() and (parts["temporal"] > 0).all()


def test_equation_2():
    """Property: the target is eps - x0; the loss is a weighted mean of squares."""
    x0, eps, v = (torch.full((1, 2, 3, 1, 1), value) for value in (1.0, 4.0, 3.0))
    weight = torch.tensor([0.0, 1.0, 3.0]).view(1, 1, 3, 1, 1)
    assert tt.flow_matching_loss(v, x0, eps, weight).item() == 0
    v[:, :, 0], v[:, :, 1], v[:, :, 2] = 99, 5, 4                   # errors: not counted, 2, 1
    loss = tt.flow_matching_loss(v, x0, eps, weight).item()
    assert loss == pytest.approx((1 * 4 + 3 * 1) / 4)


def test_equation_16_sees_changes_only():
    """Property: a constant colour offset costs nothing; a jump of one frame costs twice."""
    truth = torch.rand(1, 3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    offset = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1, 1)
    assert tt.temporal_gradient_loss(truth + offset, truth).item() < 1e-6
    jump = truth.clone()
    jump[:, :, 2] += 0.3
    loss = tt.temporal_gradient_loss(jump, truth).item()
    assert loss == pytest.approx(2 * 0.3 / 4, abs=1e-6)


def test_equation_17_sees_the_face_only():
    """Property: errors outside the mask cost nothing; inside, the mean over the face, however small
    it is."""
    truth, mask = torch.zeros(1, 3, 2, 4, 4), torch.zeros(1, 1, 2, 4, 4)
    mask[..., 1, 1] = 1
    assert tt.face_loss(truth + (1 - mask), truth, mask).item() == 0
    assert tt.face_loss(truth + 0.5 * mask, truth, mask).item() == pytest.approx(0.5, abs=1e-5)
    assert tt.face_loss(truth + 1, truth, mask * 0).item() == 0     # no face: zero, not NaN


def test_equation_5_holds_on_average(sampler, vae, chunks):
    """Property: decoding one row of four, every second step, leaves the weight of Eq. 16 and 17 as
    it is: the mean over all choices of the row is that of decoding all rows, lambda and all."""
    all_rows = replace(CFG, pixel_rows=4, pixel_every=1, lambda_temp=0.3, lambda_face=0.7)
    one_row = replace(all_rows, pixel_rows=1, pixel_every=2)
    batch = tt.make_batch(sampler, CFG, 0, range(4), "cpu")
    zero = torch.zeros_like(batch["latents"])

    def pixel_part(cfg, order):
        mixed = {k: [v[i] for i in order] if k == "chunk" else v[order] for k, v in batch.items()}
        loss, parts = tt.teacher_loss(lambda *a: zero, vae, mixed, cfg, with_pixels=True)
        return (loss - parts["flow"]).mean().item()

    orders = [[0, 1, 2, 3], [1, 0, 2, 3], [2, 0, 1, 3], [3, 0, 1, 2]]
    rare = np.mean([pixel_part(one_row, order) for order in orders]) / one_row.pixel_every
    assert rare == pytest.approx(pixel_part(all_rows, orders[0]), rel=1e-4)


@pytest.mark.parametrize("given", [1, 3])
def test_every_generated_latent_is_equally_likely_in_a_window(given):
    """Property: the windows of Eq. 16 and 17 cover all generated latents alike, the ones beside
    kappa and the last ones, which become the next kappa, too."""
    rng = np.random.default_rng(0)
    counts = np.zeros(9)
    for _ in range(3000):
        first, count = tt.draw_pixel_window(given, 9, 3, rng).tolist()
        assert first >= given and count >= 1 and first + count <= 9
        counts[first:first + count] += 1
    assert not counts[:given].any()
    assert counts[given:].min() > 0.85 * counts[given:].max()


def test_a_decoded_window_is_a_piece_of_the_whole(vae, chunks):
    """Property: with enough context to its left, a window decodes to the frames of the chunk."""
    z = torch.from_numpy(chunks[0].array("latents")[:1].astype(np.float32))
    whole = vae.decode(z.clone().requires_grad_()).detach()
    window = tt.decode_window(vae, z.requires_grad_(), first=4, count=3, context=99)
    assert window.shape[2] == 13                                    # and the frame before
    assert torch.allclose(window, whole[:, :, 4 * 4 - 4:4 * 7 - 3], atol=1e-5)


def test_pixel_losses_compare_with_the_right_frames(chunks, clips):
    """Property: with a perfect decoder the pixel losses of the true latents are zero, whatever
    chunk and window; rows that are not decoded count as zero."""
    class Perfect:
        def decode(self, z):                                        # z carries frame numbers
            start, frames = int(z[0, 0, 0, 0, 0]), clips[0].frames
            video = to_tensor(frames[start:start + 4 * z.shape[2] - 3])
            return video + 0.2 * z[0, 1, 0, 0, 0]

    cfg = replace(CFG, pixel_rows=1)
    for chunk in [c for c in chunks if c.clip.name == "long"]:
        for seed in range(4):
            row = tt.make_row(chunk, cfg, np.random.default_rng(seed), False, False, 0.5)
            batch, x0 = collate([row, row], "cpu"), torch.zeros(2, 2, 9, 4, 4)
            # a window that begins at latent b decodes as a clip of its own: one frame, then fours
            x0[:, 0] = (chunk.start + 4 * torch.arange(9))[:, None, None]
            temporal, face = tt.pixel_losses(Perfect(), x0, batch, cfg)
            assert temporal.tolist() == [0, 0] and face.tolist() == [0, 0]
            x0[:, 1] = 1
            temporal, face = tt.pixel_losses(Perfect(), x0, batch, cfg)
            assert temporal[0] < 1e-6 and face[1] == 0
            count = batch["pixel_window"][0, 1].item()
            weight = 2 * count / 3 * (6 + 2) / 6                    # 2 rows, 6 latents, 8 windows
            assert face[0] == pytest.approx(weight * 0.2, abs=1e-5)

# --------------------------------------------------------------------------------------------- loop


def test_accumulated_gradients_are_those_of_the_whole_batch(sampler, vae, chunks, tmp_path):
    """Property: two calls of two rows are one call of four (Adam would hide a wrong scale, the norm
    does not); validation changes nothing."""
    options = {"steps": 2, "lambda_temp": 0.0, "lambda_face": 0.0}
    a, la = run(tmp_path / "a", vae, sampler, chunks, val_every=9, **options)
    b, lb = run(tmp_path / "b", vae, sampler, chunks, val_every=1, micro_batch=2, **options)
    assert np.allclose(la, lb, atol=1e-5)
    assert all(torch.allclose(a.tensors[k], b.tensors[k], atol=1e-5) for k in a.tensors)
    norms = [[record["norm"] for record in read_log(tmp_path / x)[:2]] for x in "ab"]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_a_killed_run_continues_bit_for_bit(sampler, vae, chunks, tmp_path, monkeypatch):
    """Property: killed at any step and resumed, a run has the losses, weights, averages, optimiser
    and extra tensors of one that was left alone."""
    whole, losses = run(tmp_path / "a", vae, sampler, chunks, extra={"some": torch.ones(3)})
    train_step, save = tt.train_step, tt.save_checkpoint

    def killed(state, vae, sampler, cfg, step, *rest):
        if step == 4:
            raise KeyboardInterrupt
        return train_step(state, vae, sampler, cfg, step, *rest)

    def save_until_3(path, tensors, step, cfg, **more):
        if step <= 3:
            save(path, tensors, step, cfg, **more)

    monkeypatch.setattr(tt, "train_step", killed)
    monkeypatch.setattr(tt, "sample_grid", lambda *a: None)
    monkeypatch.setattr(tt, "save_checkpoint", save_until_3)
    with pytest.raises(KeyboardInterrupt):                          # saved before step 3
        run(tmp_path / "b", vae, sampler, chunks, save_minutes=0.0, extra={"some": torch.ones(3)})
    monkeypatch.setattr(tt, "train_step", train_step)
    monkeypatch.setattr(tt, "save_checkpoint", save)
    resumed, rest = run(tmp_path / "b", vae, sampler, chunks, resume=True,
                        model=make_network(seed=9), extra={"some": torch.zeros(3)})
    assert len(rest) == 3 and rest == losses[3:]
    assert all(torch.equal(whole.tensors[k], resumed.tensors[k]) for k in whole.tensors)
    steps = [record["step"] for record in read_log(tmp_path / "b")]
    assert steps == list(range(7))                                  # none twice
    with pytest.raises(ValueError, match="lambda_face 0.1 -> 0.2"):
        run(tmp_path / "b", vae, sampler, chunks, resume=True, lambda_face=0.2)
    with pytest.raises(ValueError, match="made with other options: data "):
        run(tmp_path / "b", vae, tt.ChunkSampler(chunks[1:]), chunks, resume=True)


def test_nan_stops_the_run_and_names_the_clips(sampler, vae, chunks, tmp_path, monkeypatch):
    """Property: a row that is not a number stops the run before the weights are touched; the last
    checkpoint is whole, the clip is named."""
    draw_row, model = tt.draw_row, make_network()

    def poisoned(sampler, cfg, step, row):
        got = draw_row(sampler, cfg, step, row)
        factor = float("nan") if (step, row) == (3, 2) else 1
        return got | {"latents": got["latents"] * factor}

    name = draw_row(sampler, CFG, 3, 2)["chunk"].name
    monkeypatch.setattr(tt, "draw_row", poisoned)
    monkeypatch.setattr(tt, "sample_grid", lambda *a: None)
    with pytest.raises(FloatingPointError, match=name):
        run(tmp_path, vae, sampler, chunks, save_minutes=0.0, model=model)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as file:
        assert file.metadata()["step"] == "3"
        assert torch.equal(file.get_tensor("model.head.head.weight"), model.head.head.weight)


def test_a_full_disk_costs_a_checkpoint_not_the_run(sampler, vae, chunks, tmp_path, monkeypatch,
                                                    capsys):
    """Property: when the new checkpoint cannot be written the old one stays, the half-written one
    goes, and training goes on."""
    run(tmp_path, vae, sampler, chunks, steps=1)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("common.save_file", full)
    _, losses = run(tmp_path, vae, sampler, chunks, steps=2)
    assert len(losses) == 2 and "No space left" in capsys.readouterr().err
    log(tmp_path, {"step": 0})                                      # nor does a line of the log ...
    save_image(tmp_path / "log.jsonl" / "grid.png", Image.new("RGB", (2, 2)))   # ... or a picture
    assert capsys.readouterr().err.count("warning: ") == 2
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


def test_validation_is_fixed_and_leaves_no_trace(chunks):
    """Property: the validation loss has fixed noise, so it moves with the weights only; a look at
    the EMA does not change them."""
    model = make_network()
    state = TrainState({"model": model}, {"model": 1e-3}, "model", CFG)
    before = {k: v.clone() for k, v in state.tensors.items()}
    for v in state.ema.values():
        v.add_(0.01)
    own = tt.validate(model, chunks[:2], CFG, "cpu")
    assert own == tt.validate(model, chunks[:2], CFG, "cpu")
    assert list(own) == [str(sigma) for sigma in tt.VAL_SIGMAS]
    with state.ema_weights():
        assert tt.validate(model, chunks[:2], CFG, "cpu") != own
    assert all(torch.equal(v, before[k]) for k, v in state.tensors.items() if "model." in k)
    swap_ema(model, state.ema)
    swap_ema(model, state.ema)
    assert tt.validate(model, chunks[:2], CFG, "cpu") == own

# ------------------------------------------------------------------------------------------ program


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clips, vae):
    """A folder of clips and one of weights, as a user has them, with the shipped audio encoder."""
    top = tmp_path_factory.mktemp("user")
    for where in ("clips", "weights"):
        (top / where).mkdir()
    for clip in clips[:2]:
        path = top / "clips" / f"{clip.name}.mp4"
        write_mp4(path, np.array(clip.frames[:33]), np.array(clip.audio[:33 * 640]))
    save_file(vae.state_dict(), top / "weights" / "vae.safetensors")
    encoder = str(ROOT / "weights" / "tiny" / "whisper")
    config = {"vae": asdict(vae.config), "audio": encoder, "size": 32}
    (top / "weights" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return top


def options(folder, *more, run="run"):
    return ["--data", str(folder / "clips"), "--weights", str(folder / "weights"),
            "--run-dir", str(folder / run), "--preset", "debug", "--device", "cpu", *more]


def test_debug_preset_overfits_one_chunk(folder, capsys):
    """Property: `--preset debug` learns one chunk, and what it exports runs in infer.py. The best
    answer without having learned it costs about 1."""
    tt.main(options(folder, "--steps", "120"))
    assert float(capsys.readouterr().out.split("\nloss: ")[1].split()[0]) < 0.35
    weights = folder / "run" / "weights"
    with safe_open(weights / "teacher.safetensors", "pt") as file:
        assert file.metadata()["trained"] == "yes"
        assert file.get_tensor("head.head.weight").dtype == torch.float16
    models = infer.load(weights, "teacher", "cpu", "float32")
    assert models.trained and models.dit.config.dim == dit.PRESETS["debug"].dim
    settings = models.frames, models.continuity_frames, models.identity, models.steps
    cfg = tt.PRESETS["debug"]
    assert settings == (33, 9, "tre", cfg.sample_steps)
    assert (models.guidance, models.timestep_shift) == (cfg.guidance, cfg.timestep_shift)
    assert (folder / "run" / "samples.png").exists()
    assert not (folder / "weights" / "teacher.safetensors").exists()    # the source is not touched
    log = (folder / "run" / "log.jsonl").read_bytes()
    with pytest.raises(SystemExit) as stop:                 # --resume was forgotten
        tt.main(options(folder))
    assert stop.value.code == 2 and "holds a run" in capsys.readouterr().err
    assert (folder / "run" / "log.jsonl").read_bytes() == log


def test_bad_input_is_one_line(folder, capsys):
    """Property: what a user can get wrong ends in exit code 2 and one line."""
    other = folder / "other.safetensors"
    save_file({"audio_proj.norm.weight": torch.zeros(3)}, other)
    half = folder / "half"
    half.mkdir()
    (half / "config.json").write_text('{"size": 32, "vae": {}}', encoding="utf-8")
    for bad, word in ((["--data", str(folder / "nowhere")], "nowhere"),
                      (["--micro-batch", "3"], "multiple"), (["--steps", "0"], "1 or more"),
                      (["--steps", "-5"], "1 or more"), (["--resume", "--overwrite"], "not both"),
                      (["--frames", "32"], "4k + 1"),
                      (["--continuity-frames", "33"], "leave"),
                      (["--lambda-temp", "-1"], "or more"), (["--lambda-face", "nan"], "or more"),
                      (["--audio-drop-prob", "2"], "between"),
                      (["--init", str(other)], "another network"),
                      (["--weights", str(half)], "config.json lacks audio")):
        with pytest.raises(SystemExit) as stop:
            tt.main(options(folder, *bad, run="bad"))
        text = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and text[-1].startswith("train_teacher.py: ")
        assert word in text[-1], bad
    assert not (folder / "bad").exists()


def test_two_processes_have_the_losses_of_one(folder):
    """Property: FSDP changes where the numbers lie, not what they are; and its checkpoint is the
    one-process checkpoint."""
    more = ["--steps", "2", "--first-chunk-prob", "0.3", "--no-bf16", "--batch", "4",
            "--micro-batch", "2"]
    tt.main(options(folder, *more, run="run1"))
    run_two_processes("train_teacher.py", options(folder, *more, run="run2"))
    losses = [[r["loss"] for r in read_log(folder / f"run{world}")[:2]] for world in (1, 2)]
    assert np.allclose(*losses, atol=1e-4)
    one, two = (safe_open(folder / f"run{n}" / "checkpoint.safetensors", "pt") for n in (1, 2))
    with one, two:
        assert set(one.keys()) == set(two.keys())
        for k in one.keys():
            if k.startswith("ema."):
                assert torch.allclose(one.get_tensor(k), two.get_tensor(k), atol=1e-4)


def run_two_processes(program, arguments, timeout=300):
    """What torchrun would start, on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                                "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    command = [sys.executable, str(ROOT / program), *arguments]
    jobs = [subprocess.Popen(command, env=environment | {"RANK": rank, "LOCAL_RANK": rank},
                             stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) for rank in "01"]
    errors = [job.communicate(timeout=timeout)[1].decode() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], errors[0][-2000:]


@pytest.mark.parametrize("script", [tt, "distill_student"])
def test_torchrun_passes_every_flag_on(script):
    """Property: torchrun takes a flag that begins like one of its own for itself. None of ours does
    (`--run` was one)."""
    import importlib

    from torch.distributed.run import parse_args
    module = importlib.import_module(script) if isinstance(script, str) else script
    config = next(iter(module.PRESETS.values()))
    names = [*asdict(config), *module.Files.__dataclass_fields__]
    for flag in [f"--{name.replace('_', '-')}" for name in names]:
        given = parse_args(["--nproc_per_node=2", "script.py", flag])
        assert given.training_script_args == [flag]


def test_a_copied_folder_is_complete(folder):
    """Property: the exported folder runs alone: it holds the VAE and all that config.json names."""
    weights = folder / "run" / "weights"
    if not weights.exists():
        tt.main(options(folder, "--steps", "1"))
    alone = shutil.copytree(weights, folder / "alone")
    assert {p.name for p in alone.iterdir()} >= {"config.json", "vae.safetensors",
                                                 "teacher.safetensors"}
