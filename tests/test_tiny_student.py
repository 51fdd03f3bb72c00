"""Properties of tiny/student.py: its tricks, and that they made the shipped student."""
from dataclasses import replace

import pytest
import torch
from test_distill_student import CFG as PLAIN
from test_distill_student import clips, exit_at, make, starts, vae  # noqa: F401, fixtures
from toys import make_network

import distill_student as ds
from dit import add_noise, student_sigmas
from tiny import student as tiny

CFG = tiny.TinyStudentConfig(
    steps=4, critic_updates=2, batch=4, micro_batch=4, rollout_chunks=3, lr=1e-3, lr_critic=1e-3,
    warmup=2, decay=0.0, ema=0.9, continuity_frames=9, frames=33, identity="tre", offsets=1,
    references=2, bf16=False, val_every=99, save_minutes=1e9, val_videos=1)


def test_the_training_step_of_the_shipped_student(starts, vae, tmp_path):  # noqa: F811
    """Property: the steps that made the shipped student are these steps: the critic's losses are
    those of the code that trained it, before it was moved to this room."""
    networks = {name: make_network(edm_skip=0.15) for name in ("student", "critic")}
    teacher = make_network(edm_skip=0.15).requires_grad_(False).eval()
    buffer = ds.RolloutBuffer(starts, CFG, "cpu")
    _, losses = ds.train(CFG, networks, teacher, vae, buffer, starts[-1:], tmp_path,
                         **tiny.train_arguments(CFG))
    assert losses == pytest.approx([0.489568, 0.405184, 0.531238, 0.830402], rel=1e-4)


def test_teacher_forcing_gives_the_noised_truth_to_the_next_steps(starts):  # noqa: F811
    """Property: the J steps after the first start from the ground truth with noise, no later one;
    with J = 0 it is the paper's roll-out."""
    networks, _ = make()
    student, sigmas = networks["student"], student_sigmas(4)
    buffer = ds.RolloutBuffer(starts, PLAIN, "cpu")
    buffer.cursor[:2, 1] = torch.tensor([0, 1])
    batch = buffer.batch(range(2), 3)
    forced, free = (tiny.rollout_with_teacher_forcing(student, batch, sigmas, steps)
                    for steps in (2, 0))
    for step, sigma in enumerate(sigmas):
        truth = add_noise(batch["latents"], batch["noise"][:, step], sigma)
        assert torch.equal(forced[0][:, step], truth) == (step in (0, 1, 2))
        assert torch.equal(free[0][:, step], truth) == (step == 0)
    papers = ds.rollout(student, batch, sigmas)
    assert all(torch.equal(a, b) for a, b in zip(free, papers))


def test_only_training_uses_teacher_forcing(starts, vae, tmp_path, monkeypatch):  # noqa: F811
    """Property: validation videos are generated as in use."""
    calls, rollout = [], tiny.rollout_with_teacher_forcing
    monkeypatch.setattr(tiny, "rollout_with_teacher_forcing",
                        lambda *a, **k: calls.append(k["steps"]) or rollout(*a, **k))
    networks, teacher = make()
    cfg = replace(CFG, steps=1, rollout_chunks=2)
    buffer = ds.RolloutBuffer(starts, cfg, "cpu")
    ds.train(cfg, networks, teacher, vae, buffer, starts[-1:], tmp_path,
             **tiny.train_arguments(cfg))
    assert calls == [2]                                     # one step, and two validations without


def test_the_regression_loss_begins_at_a_step(starts):  # noqa: F811
    """Property: rows that exit earlier have no Eq. 7, and the log counts what acts."""
    networks, teacher = make()
    student, critic = networks.values()
    batch = ds.RolloutBuffer(starts, PLAIN, "cpu").batch(range(4), 0)
    sigmas = student_sigmas()
    batch, _ = exit_at(batch, *ds.rollout(student, batch, sigmas), [0, 1, 2, 3], sigmas)
    late = {"reg_weight": tiny.train_arguments(replace(CFG, anchor_from_step=2))["reg_weight"]}
    always, late = (ds.student_loss(student, critic, teacher, batch, PLAIN, **more)[1]
                    for more in ({}, late))
    for name in ("regression", "reg_grad"):
        assert always[name].all()
        assert not late[name][:2].any() and late[name][2:].all()


def test_masked_guidance_reaches_the_gradient(starts):  # noqa: F811
    """Property: the guide of tiny/model.py, and no other, makes the real score."""
    networks, teacher = make()
    student, critic = networks["student"], make_network(seed=5)
    batch = ds.RolloutBuffer(starts, PLAIN, "cpu").batch(range(4), 0)
    sigmas = student_sigmas()
    batch, _ = exit_at(batch, *ds.rollout(student, batch, sigmas), [0, 1, 2, 3], sigmas)
    calls = []

    def guide(v_cond, v_uncond, guidance, **context):
        calls.append((guidance, set(context)))
        return v_cond

    masked = {"guide": tiny.train_arguments(CFG)["guide"]}
    grads = [ds.student_loss(student, critic, teacher, batch, PLAIN, **more)[1]["dmd_grad"]
             for more in ({}, masked, {"guide": guide})]
    assert calls == [(3.0, {"x", "sigma", "identity", "loss_mask"})]
    assert not torch.allclose(grads[0], grads[1]) and not torch.allclose(grads[0], grads[2])


def test_options_that_make_no_sense_are_refused():
    """Property: one clear line for teacher forcing that leaves no step of its own, and for motion
    guidance without effect."""
    for steps, forcing in ((4, 3), (2, 1), (1, 1)):
        with pytest.raises(ValueError, match=f"--teacher-forcing {forcing}"):
            tiny.check_tiny(replace(CFG, teacher_forcing=forcing, denoising_steps=steps))
    for changes in ({"guidance_sharpness": -1.0}, {"motion_guidance": float("nan")},
                    {"guidance": 1.0}, {"guidance_sharpness": 0.0}):
        with pytest.raises(ValueError, match="guidance"):
            tiny.check_tiny(replace(CFG, **changes))
    tiny.check_tiny(CFG)
