"""Laws of the distillation. The networks here are random and small, or one number wide: a law holds for any weights."""
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import save_file
from test_train_teacher import SMALL, Ear, make_clip, network

import distill_student as ds
import infer
from chunks import Streams, chunks_left, draw, encode_clips, pixels
from data import write_mp4
from dit import add_noise, guided_velocity, predict, sample_student, student_sigmas
from tre import encode_then_repeat
from vae import PRESETS as VAE
from vae import WanVAE

CFG = ds.StudentConfig(steps=7, batch=4, micro=4, rollout=3, ratio=2, lr=1e-3, lr_critic=1e-3, warmup=2, ema=0.9, tail=0, frames=33, offsets=1,
                       decay=0.0, optimizer="adamw", guidance=3.0, lambda_reg=0.1, anchor_from=0, encode_bf16=False,
                       references=2, bf16=False, every=99, minutes=1e9, val=1)
NETS = ("student", "critic", "teacher")


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return WanVAE(replace(VAE["tiny"], dim=8, dim_mult=(1, 1, 2, 2))).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [make_clip(folder, "long", 90, 0), make_clip(folder, "other", 81, 1), make_clip(folder, "two", 57, 2)]


@pytest.fixture(scope="module")
def starts(clips, vae, tmp_path_factory):
    """Chunks that films can begin with: 3, 3 and 2 chunks are left from the first, one less from the second."""
    chunks = encode_clips(clips, vae, Ear(), tmp_path_factory.mktemp("cache"), CFG)
    return [c for c in chunks if c.row < len(c.pictures) - 1 and chunks_left(c, CFG) > 1]


def make(starts, cfg=CFG, seed=0):
    """-> State and teacher, as prepare() makes them: three equal networks, of which the teacher is frozen."""
    nets = [network(seed) for _ in NETS]
    return ds.State(*nets[:2], Streams([starts], [1.0], cfg, "cpu"), cfg), nets[2].requires_grad_(False).eval()


def run(folder, vae, starts, resume=False, seed=0, **options):
    cfg = replace(CFG, **options)
    state, teacher = make(starts, cfg, seed)
    return state, ds.train(cfg, state, teacher, vae, starts[-1:], folder, resume)


def exit_at(batch, given, answers, exits, sigmas):
    """What train_step adds to a batch, for chosen exit steps."""
    pick = torch.arange(len(given)), torch.tensor(exits)
    return batch | {"exit": pick[1], "given": given[pick], "exit_sigma": torch.tensor(sigmas)[pick[1]]}, answers[pick]


# ------------------------------------------------------------------------------------------- the machinery in one dimension


class Gaussian(torch.nn.Module):
    """The network that has learnt N(mean, std^2) perfectly: v = (x - E[x0 | x]) / sigma, number by number."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.log_std = torch.nn.Parameter(torch.tensor(mean)), torch.nn.Parameter(torch.tensor(std).log())

    def forward(self, x, t, identity, audio):
        s, var = (t / 1000)[:, None, None, None, None], self.log_std.exp() ** 2
        x0 = self.mean + (1 - s) * var / ((1 - s) ** 2 * var + s ** 2) * (x - (1 - s) * self.mean)
        return (x - x0) / s


class Line(torch.nn.Module):
    """A one-step student: noise x -> x0 = a + b x, so it makes N(a, b^2)."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.tensor(a)), torch.nn.Parameter(torch.tensor(b))

    def forward(self, x, t, identity, audio):
        return x - (self.a + self.b * x)


def toy_batch(rows, seed):
    """Sixteen numbers a row and one continuity latent, which holds rubbish: it must not matter."""
    g, shape = torch.Generator().manual_seed(seed), (rows, 4, 5, 1, 1)
    noise, zeros = torch.randn(rows, 3, *shape[1:], generator=g), torch.zeros(shape)
    predicted = torch.tensor([0.0, 1, 1, 1, 1]).view(1, 1, 5, 1, 1).expand(rows, -1, -1, -1, -1)
    return {"noise": noise, "given": noise[:, 0], "exit": torch.zeros(rows).long(), "exit_sigma": torch.ones(rows), "latents": zeros,
            "sigma": 0.02 + 0.96 * torch.rand(rows, 2, generator=g), "predicted": predicted, "identity": zeros, "audio": zeros,
            "teacher": zeros + 50, "student": zeros - 50}


def test_a_gaussian_student_becomes_the_teachers_gaussian():
    """Law: taught by nothing but two scores, a student that makes N(-1, 0.3^2) comes to make the teacher's N(2, 0.8^2), mean *and* width."""
    cfg, teacher = replace(CFG, lambda_reg=0.0, guidance=1.0), Gaussian(2.0, 0.8)
    student, critic = Line(-1.0, 0.3), Gaussian(-1.0, 0.3)
    slow, fast = torch.optim.Adam(student.parameters(), 0.03), torch.optim.Adam(critic.parameters(), 0.1)
    for step in range(900):
        batch = toy_batch(64, step)
        if step % 3 == 0:
            slow.zero_grad()
            ds.student_loss(student, critic, teacher, batch, cfg)[0].mean().backward()
            slow.step()
        fast.zero_grad()
        ds.critic_loss(critic, student.a + student.b * batch["given"], batch).mean().backward()
        fast.step()
    assert student.a.item() == pytest.approx(2.0, abs=0.1) and abs(student.b.item()) == pytest.approx(0.8, abs=0.1)
    assert critic.mean.item() == pytest.approx(2.0, abs=0.1)                    # the critic has followed


@pytest.mark.parametrize("critic_mean, sign", [(2.0, 0), (3.0, 1), (1.0, -1)])
def test_the_gradient_is_the_difference_of_two_scores(critic_mean, sign):
    """Law: no gradient where critic and teacher agree. Where the critic says the student makes too much, the gradient is positive: descend."""
    student, cfg = Line(critic_mean, 0.5), replace(CFG, lambda_reg=0.0, guidance=1.0)
    loss, parts = ds.student_loss(student, Gaussian(critic_mean, 0.5), Gaussian(2.0, 0.5), toy_batch(64, 0), cfg)
    loss.mean().backward()
    assert np.sign(student.a.grad.item()) == sign and (parts["dmd"].mean() > 0.01) == (sign != 0)


def test_equations_12_and_13():
    """Law: w(t) times the difference of scores is the difference of the guesses of x0 over the mean correction, each row by itself, and is what
    autograd gets; nothing at the continuity latents counts, not in the gradient and not in the normaliser."""
    g = torch.Generator().manual_seed(0)
    x0, x, v_real, v_fake = torch.randn(4, 3, 4, 5, 2, 2, generator=g)
    sigma, predicted = torch.tensor([0.1, 0.5, 0.97]), (torch.arange(5) >= torch.tensor([[1], [3], [3]])).float().view(3, 1, 5, 1, 1)
    got = ds.dmd_gradient(x0, x, v_real, v_fake, sigma, predicted)
    for i, m in enumerate((1, 3, 3)):
        real, fake = x[i] - sigma[i] * v_real[i], x[i] - sigma[i] * v_fake[i]
        wanted = (fake - real)[:, m:] / (x0[i] - real)[:, m:].abs().mean()
        assert torch.allclose(got[i][:, m:], wanted, atol=1e-4) and not got[i][:, :m].any()
    rubbish = [torch.where(predicted > 0, y, 1e3 * torch.randn(y.shape, generator=g)) for y in (x0, x, v_real, v_fake)]
    assert torch.allclose(ds.dmd_gradient(*rubbish, sigma, predicted), got, atol=1e-6)
    others = [torch.cat([y[:1], 7 * y[1:]]) for y in (x0, x, v_real, v_fake)]   # the other rows do not matter
    assert torch.allclose(ds.dmd_gradient(*others, sigma, predicted)[0], got[0], atol=1e-6)


def test_equation_7():
    """Law: half a square below delta, a straight line above, nothing at the truth, nothing from the continuity latents."""
    truth, predicted = torch.zeros(1, 1, 3, 1, 1), torch.tensor([0.0, 1, 1]).view(1, 1, 3, 1, 1)
    at = lambda *e: ds.anchor_loss(torch.tensor(e).view(1, 1, 3, 1, 1), truth, 0.5, predicted).item()
    assert at(9.0, 0, 0) == 0 and at(9.0, 0.4, 0.4) == pytest.approx(0.08) and at(0.0, 2, -2) == pytest.approx(0.5 * (2 - 0.25))


# ------------------------------------------------------------------------------------------------------------- the networks


def test_the_loss_moves_the_student_along_equation_8(starts):
    """Law: d loss / d x0 is (g + lambda_reg clamp(x0 - z, -delta, delta)) / count on the predicted latents, guidance included, and 0 at kappa."""
    cfg, (state, teacher) = replace(CFG, lambda_reg=0.3, delta=0.7, guidance=2.0), make(starts)
    critic = network(seed=5)
    batch = state.streams.batch(range(4), 0)
    batch, _ = exit_at(batch, *ds.rollout(state.nets["student"], batch, student_sigmas()), [0, 1, 2, 3], student_sigmas())
    with torch.no_grad():
        v = ds.ask(state.nets["student"], batch["given"], batch["exit_sigma"], batch, "student")
        x0 = batch["given"] - batch["exit_sigma"].view(-1, 1, 1, 1, 1) * v
    v.requires_grad_()
    loss, parts = ds.student_loss(lambda *a: v, critic, teacher, batch, cfg)
    loss.sum().backward()
    with torch.no_grad():
        sigma, eps, p = batch["sigma"][:, 0], batch["noise"][:, -2], batch["predicted"]
        x = torch.where(p > 0, (1 - sigma.view(-1, 1, 1, 1, 1)) * x0 + sigma.view(-1, 1, 1, 1, 1) * eps, batch["student"])
        fake, cond = (m(x, 1000 * sigma, batch["identity"], batch["audio"]) for m in (critic, teacher))
        deaf = teacher(x, 1000 * sigma, batch["identity"], 0 * batch["audio"])
        g = ds.dmd_gradient(x0, x, 2 * cond - deaf, fake, sigma, p)
        count = p.expand_as(x0).sum((1, 2, 3, 4)).view(-1, 1, 1, 1, 1)
        wanted = (g + 0.3 * p * (x0 - batch["latents"]).clamp(-0.7, 0.7)) / count
    got = v.grad / -batch["exit_sigma"].view(-1, 1, 1, 1, 1)
    assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-6) and parts["anchor"].shape == (4,)
    with torch.no_grad():                                                       # narrowly guided, and livelier
        real = guided_velocity(cond, deaf, x, sigma, batch["identity"], p, 2.0, 4.0, 1.5)
        g = ds.dmd_gradient(x0, x, real, fake, sigma, p)
    v.grad, narrow = None, replace(cfg, lambda_reg=0.0, guidance_focus=4.0, liveliness=1.5)
    ds.student_loss(lambda *a: v, critic, teacher, batch, narrow)[0].sum().backward()
    assert torch.allclose(v.grad / -batch["exit_sigma"].view(-1, 1, 1, 1, 1), p * g / count, rtol=1e-3, atol=1e-6)
    assert (p * (real - (2 * cond - deaf))).abs().max() > 0.1                   # another gradient than that of before
    late = ds.student_loss(state.nets["student"], critic, teacher, batch, replace(cfg, anchor_from=2))[1]
    assert not late["anchor"][:2].any() and late["anchor"][2:].all()
    assert not late["pull"][:2].any() and late["pull"][2:].all() and parts["pull"].all()            # the log counts what acts


def test_who_is_taught_by_what(starts, vae):
    """Law: a student step leaves teacher, critic, both continuity references and earlier chunks without gradient; a critic step leaves the student.
    The student is asked once with gradient, for one of its steps; the others are input."""
    (state, teacher), asked = make(starts), []
    student, critic = state.nets.values()
    teacher.requires_grad_(True)                                                # so that a gradient could reach it
    state.streams.kappa.normal_().requires_grad_(True)                          # what earlier chunks have left behind: must come in cut off
    state.streams.place[:, 1] = torch.tensor([0, 1, 1, 0])
    student.register_forward_pre_hook(lambda _, x: asked.append(x[0].requires_grad) if torch.is_grad_enabled() else None)
    batch = state.streams.batch(range(4), 0)
    assert not any(batch[who].requires_grad for who in ("teacher", "student"))
    given, answers = ds.rollout(student, batch, student_sigmas())
    assert not given.requires_grad and not answers.requires_grad and not asked
    batch, made = exit_at(batch, given, answers, [0, 1, 2, 3], student_sigmas())
    ds.student_loss(student, critic, teacher, batch, CFG)[0].mean().backward()
    none = lambda net: all(p.grad is None for p in net.parameters())
    assert none(teacher) and none(critic) and not none(student) and len(asked) == 1
    student.zero_grad()
    made.requires_grad_()
    ds.critic_loss(critic, made, batch).mean().backward()
    assert none(teacher) and none(student) and not none(critic) and made.grad is None
    assert not ds.self_generated(vae, made, CFG).requires_grad


def test_bfloat16_does_not_lose_the_gradient(starts, vae, tmp_path):
    """Law: weights cast while the roll-out runs without gradient are cast anew for the step that has one, else most of them would never learn."""
    state, _ = run(tmp_path, vae, starts, steps=2, ratio=1, bf16=True)
    assert all(p.grad.abs().sum() > 0 for k, p in state.nets["student"].named_parameters() if "blocks" in k and p.ndim == 2)


def test_the_rollout_is_inferences(starts):
    """Law: a roll-out is what infer.py makes (without --follow): the same steps, the same clean head, fresh noise in between."""
    (state, _), sigmas = make(starts), student_sigmas(4)
    state.streams.kappa.normal_()
    state.streams.place[:, 1] = 1
    batch, model = state.streams.batch(range(2), 3), state.nets["student"]
    given, answers = ds.rollout(model, batch, sigmas)
    for i in range(2):
        class Replay:                                                           # hands out the noise of the batch, one after the other
            device, noise = torch.device("cpu"), iter(batch["noise"][i, 1:])
        row = {k: v[i:i + 1] for k, v in batch.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn", lambda *a, generator, **k: next(generator.noise)[None])
            z = sample_student(model, row["noise"][:, 0], row["identity"], row["audio"], row["student"][:, :, :3], sigmas, Replay())
        assert torch.allclose(answers[i:i + 1, -1], z, atol=1e-5)
    with torch.no_grad():                                                       # and a given step can be asked again
        x = torch.where(batch["predicted"] > 0, given[:, 2], batch["student"])
        x0 = given[:, 2] - sigmas[2] * predict(model, x, sigmas[2], batch["identity"], batch["audio"])
    assert torch.allclose(x0[:, :, 3:], answers[:, 2, :, 3:], atol=1e-5)


def test_a_film_can_follow_the_truth(starts):
    """Law: --follow J hands the truth with noise to the J steps after the first, and to no later one: they are told where the head is."""
    (state, _), sigmas = make(starts), student_sigmas(4)
    state.streams.place[:2, 1] = torch.tensor([0, 1])                           # a first chunk, of which one latent is given, and a later one
    batch = state.streams.batch(range(2), 3)
    free, kept = (ds.rollout(state.nets["student"], batch, sigmas, follow) for follow in (0, 2))
    for step, sigma in enumerate(sigmas):
        told = add_noise(batch["latents"], batch["noise"][:, step], sigma)
        assert torch.equal(kept[0][:, step], told) == (step in (0, 1, 2)) and torch.equal(free[0][:, step], told) == (step == 0)
    other = ds.rollout(state.nets["student"], batch | {"latents": batch["latents"] + 1}, sigmas)
    assert torch.equal(free[1], other[1])                                       # in use there is no truth, and without the option none is read
    ds.check(replace(CFG, follow=2), 1)
    for steps, follow in ((4, 3), (2, 1), (1, 1)):
        with pytest.raises(ValueError, match=f"follow {follow} must be under denoise - 1, {steps - 1}"):
            ds.check(replace(CFG, follow=follow, denoise=steps), 1)


def test_only_training_follows(starts, vae, tmp_path, monkeypatch):
    """Law: the truth is whispered while films are made to learn from; what is validated is made as in use. Both at --sample-shift's noise levels."""
    asked, rollout = [], ds.rollout
    monkeypatch.setattr(ds, "rollout", lambda student, batch, sigmas, follow=0: (asked.append((follow, sigmas)),
                                                                                 rollout(student, batch, sigmas, follow))[1])
    run(tmp_path, vae, starts, steps=1, follow=2, rollout=2, sample_shift=2.0)
    assert [follow for follow, _ in asked] == [0, 0, 2, 0, 0]                   # a film of two chunks before and after the one step
    assert all(sigmas == pytest.approx([1, 6 / 7, 2 / 3, 0.4]) for _, sigmas in asked)


def test_the_continuity_reference_is_inferences(vae, clips):
    """Law: kappa_gen of the next chunk is what infer.py would hand to its network, bit for bit."""
    seen = []

    class Recorder(torch.nn.Module):                                            # velocity 0: with one step, the chunk is what it was given
        def forward(self, x, t, identity, audio):
            seen.append(x)
            return torch.zeros_like(x)

    image = pixels(clips[0].frames[:1])[:, :, 0]
    list(infer.generate(infer.Models(vae, Recorder(), Ear(), "student", 32, True), image, np.zeros(153 * 640, np.float32), steps=1))
    assert torch.equal(ds.self_generated(vae, seen[0], CFG), seen[1][:, :, :3])
    assert torch.equal(ds.self_generated(vae, seen[0], replace(CFG, tail=21)), seen[1][:, :, :3])   # 21 latents are all there are
    assert ds.self_generated(vae, seen[0], replace(CFG, tail=4)).shape == (1, 24, 3, 4, 4)
    both = ds.self_generated(vae, torch.cat([seen[1], seen[0]]), CFG)                               # every film by itself, in order
    assert torch.equal(both[1:], seen[1][:, :, :3]) and torch.equal(both[:1], ds.self_generated(vae, seen[1], CFG))


# -------------------------------------------------------------------------------------------------------------- the streams


def test_films_go_on_where_they_are_and_start_again(starts, vae):
    """Law: a film starts cold with its portrait, every step makes its next chunk after its own kappa, and after K chunks, or where the clip ends,
    another one starts. Batches hold chunks of every age, and the student meets every row at every age."""
    cfg, starts = replace(CFG, ratio=3), [start for start in starts if chunks_left(start, CFG) == 3]           # the worst case: ratio = K
    streams, met, truths = Streams([starts], [1.0], cfg, "cpu"), set(), {}
    assert Streams([starts], [1.0], replace(cfg, rollout=9), "cpu").place[:, 2].max() <= 3         # no film is longer than its clip
    assert len({int(life) for life in streams.place[:, 2]}) > 1                 # not all in step from the beginning
    for step in range(60):
        before, batch = streams.place.clone(), streams.batch(range(4), step)
        met |= {(row, int(before[row, 1])) for row in range(4) if ds.students_turn(step, cfg)}
        for row, (start, age, life) in enumerate(before.tolist()):
            chunk, first = starts[start], 1 if age == 0 else 3
            begin = chunk.start + 24 * age                                      # 33 - 9 frames on
            if (start, age) not in truths:
                with torch.no_grad():
                    truths[start, age] = vae.encode(pixels(chunk.clip.frames[begin:begin + 33]))[0]
            truth = truths[start, age]
            assert torch.equal(batch["latents"][row], truth.half().float()) and age < life <= min(3, chunks_left(chunk, CFG))
            assert batch["audio"][row, -1, 1, 2] == begin + 33                  # the sound of that chunk
            assert batch["predicted"][row].flatten().tolist() == [0.0] * first + [1.0] * (9 - first)
            kappa = truth[:, :1].half().float() if age == 0 else streams.kappa[row]
            assert torch.equal(batch["student"][row, :, :first], kappa[:, :first]) and torch.equal(batch["teacher"][row], batch["latents"][row])
        streams.advance([(range(4), torch.full_like(streams.kappa, step))], step)
        assert torch.equal(streams.kappa, torch.full_like(streams.kappa, step))
    assert met == {(row, age) for row in range(4) for age in range(3)}
    turns = [ds.students_turn(step, replace(CFG, ratio=5)) for step in range(500)]
    assert [sum(turns[i:i + 5]) for i in range(0, 500, 5)] == [1] * 100         # 5 : 1, block by block


def test_validation_follows_the_longest_films(starts):
    """Law: films too short for K chunks are left out of validation, unless none is longer; a film longer than K is no better than one of K."""
    left = [chunks_left(film, CFG) for film in starts]
    assert set(left) == {2, 3}
    assert [chunks_left(film, CFG) for film in ds.longest(starts, CFG)] == [3] * left.count(3)
    assert ds.longest(starts, replace(CFG, rollout=2)) == starts
    assert [chunks_left(film, CFG) for film in ds.longest(starts, replace(CFG, rollout=9))] == [3] * left.count(3)


def test_draws_depend_on_seed_step_and_row_alone(starts):
    """Law: noise, noise levels and exit steps are functions of (seed, step, row); exits are even, sigmas stay in [0.02, 0.98]."""
    streams = Streams([starts], [1.0], CFG, "cpu")
    whole, part = streams.batch(range(4), 7), streams.batch([2], 7)
    assert all(torch.equal(whole[k][2], part[k][0]) for k in whole)
    drawn = [draw(CFG, step, 0, (1, 1, 1, 1), "cpu") for step in range(800)]
    counts = np.bincount([int(d["exit"]) for d in drawn], minlength=4)
    sigma = torch.stack([d["sigma"] for d in drawn])
    assert len(counts) == 4 and counts.min() > 150 and 0.02 <= sigma.min() and sigma.max() <= 0.98 and 0.75 < sigma.median() < 0.9
    assert abs(torch.stack([d["noise"] for d in drawn]).mean()) < 0.1 and drawn[0]["noise"].shape == (6, 1, 1, 1, 1)


def test_the_learning_rates_rise_and_fall(vae, starts, tmp_path):
    """Law: up over the warm-up, level, down to zero over the last share of the steps, or not at all; the log has what was used."""
    level, falls = replace(CFG, steps=10, warmup=4), replace(CFG, steps=10, warmup=2, decay=0.5)
    assert [ds.rise_and_fall(k, level) for k in range(10)] == [0.25, 0.5, 0.75, *[1] * 7]
    assert [ds.rise_and_fall(k, falls) for k in range(11)] == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0])
    run(tmp_path, vae, starts, steps=2, lr=0.1, lr_critic=0.2)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(r["lr"], r["lr_critic"]) for r in log[:2]] == [(0.05, 0.1), (0.1, 0.2)]


def test_identity_reference_of_table_3(starts, vae):
    """Law: --identity etr gives encode-then-repeat (Eq. 29) of the film's first frame, from the same cache."""
    batch = Streams([starts], [1.0], replace(CFG, identity="etr"), "cpu")
    chunk, got = starts[int(batch.place[0, 0])], batch.batch([0], 0)["identity"]
    with torch.no_grad():
        wanted = encode_then_repeat(vae, pixels(chunk.clip.frames[chunk.start:chunk.start + 1])[:, :, 0], 33)
    assert torch.equal(got, wanted.half().float())


@pytest.mark.parametrize("teacher_sees, student_sees", [("gt", "gt"), ("gen", "gen"), ("gt", "gen")])
def test_the_three_rows_of_table_4(starts, vae, tmp_path, teacher_sees, student_sees):
    """Law: two words decide what lies at the head of each network's input; critic and student always see the same."""
    cfg = replace(CFG, teacher_sees=teacher_sees, student_sees=student_sees)
    (state, teacher), heads = make(starts, cfg), {}
    for name, net in zip(NETS, (*state.nets.values(), teacher)):
        net.register_forward_pre_hook(lambda _, x, name=name: heads.setdefault(name, []).append(x[0][:, :, :3].clone()))
    state.streams.kappa.normal_()
    state.streams.place[:] = torch.tensor([0, 1, 3])
    batch, turn = state.streams.batch(range(4), 0), next(s for s in range(9) if ds.students_turn(s, cfg))
    sees = {"gt": batch["latents"][:, :, :3], "gen": state.streams.kappa.clone()}
    ds.train_step(state, teacher, vae, cfg, turn, torch.autocast("cpu", torch.bfloat16, enabled=False), tmp_path, 0)
    assert {name: len(x) for name, x in heads.items()} == {"student": 5, "critic": 2, "teacher": 2}
    for name, wanted in zip(NETS, (student_sees, student_sees, teacher_sees)):
        assert all(torch.equal(x, sees[wanted]) for x in heads[name])
    moved = not torch.equal(state.streams.kappa, sees["gen"])
    assert moved == (student_sees == "gen")                                     # no frames are made that nobody will see


# --------------------------------------------------------------------------------------------------------------------- loop


def test_accumulated_gradients_are_those_of_the_whole_batch(vae, starts, tmp_path):
    """Law: two calls of two rows are one call of four; validation and its films leave no trace in the run."""
    (a, la), (b, lb) = (run(tmp_path / name, vae, starts, steps=3, **options)
                        for name, options in (("a", {"every": 99}), ("b", {"every": 1, "micro": 2})))
    assert np.allclose(la, lb, atol=1e-5) and torch.equal(a.streams.place, b.streams.place)
    assert all(torch.allclose(a.tensors[k], b.tensors[k], atol=1e-4) for k in a.tensors)
    logs = [[json.loads(line) for line in (tmp_path / x / "log.jsonl").read_text(encoding="utf-8").splitlines()] for x in "ab"]
    for name in ("norm_student", "norm_critic", "dmd", "anchor", "pull"):
        assert [r[name] for r in logs[0] if name in r] == pytest.approx([r[name] for r in logs[1] if name in r], rel=1e-3)
    assert len(logs[1][0]["val"]["error"]) == len(logs[1][0]["val"]["colour"]) == 2 and logs[1][0]["val"]["seam"] > 0


def test_a_killed_run_goes_on_bit_for_bit(vae, starts, tmp_path, monkeypatch):
    """Law: killed at any step and resumed, a run has the same losses, weights, averages, optimisers and *films* as one that was left alone."""
    whole, losses = run(tmp_path / "a", vae, starts)
    step_of, save = ds.train_step, ds.save_checkpoint

    def killed(state, teacher, vae, cfg, step, *rest):
        if step == 5:
            raise KeyboardInterrupt
        return step_of(state, teacher, vae, cfg, step, *rest)

    monkeypatch.setattr(ds, "train_step", killed)
    monkeypatch.setattr(ds, "save_checkpoint", lambda path, tensors, step, cfg, **more: step <= 3 and save(path, tensors, step, cfg, **more))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", vae, starts, minutes=0.0)                           # last saved before step 3, killed in step 5
    monkeypatch.setattr(ds, "train_step", step_of)
    monkeypatch.setattr(ds, "save_checkpoint", save)
    resumed, rest = run(tmp_path / "b", vae, starts, resume=True)
    assert len(rest) == 4 and rest == losses[3:]
    assert all(torch.equal(whole.tensors[k], resumed.tensors[k]) for k in whole.tensors)
    steps = [json.loads(line)["step"] for line in (tmp_path / "b/log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert steps == list(range(8))                                              # no step is logged twice
    for options, reason in (({"lambda_reg": 0.5}, "lambda_reg 0.1 -> 0.5"), ({}, r"data \w+ -> \w+")):
        with pytest.raises(ValueError, match=reason):
            run(tmp_path / "b", vae, starts if options else starts[:2], resume=True, **options)


def test_nan_stops_the_run_and_names_the_clips(vae, starts, tmp_path, monkeypatch):
    """Law: a row that is not a number stops the run before weights and films are touched; the last checkpoint is whole, the clips are named."""
    batch = Streams.batch
    monkeypatch.setattr(Streams, "batch", lambda self, rows, step: batch(self, rows, step) | (
        {"audio": torch.full((4, 33, 2, 3), float("nan"))} if (self.cfg.seed, step) == (0, 3) else {}))
    state, teacher = make(starts)
    with pytest.raises(FloatingPointError, match="in the clips (long|other|two), "):
        ds.train(replace(CFG, minutes=0.0), state, teacher, vae, starts[:2], tmp_path)
    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as file:
        assert file.metadata()["step"] == "3"
        assert all(torch.equal(file.get_tensor(k), v) and v.isfinite().all() for k, v in state.tensors.items())


# ------------------------------------------------------------------------------------------------------------------ program


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vae):
    """A folder of clips and one of weights, as a user has them; the teacher is random, the ears are the shipped ones."""
    top = tmp_path_factory.mktemp("user")
    for where in ("clips", "weights"):
        (top / where).mkdir()
    for seed in range(2):
        clip = make_clip(top / "made", str(seed), 57, seed)
        write_mp4(top / "clips" / f"{seed}.mp4", np.array(clip.frames), np.array(clip.audio))
    torch.manual_seed(0)
    size = replace(SMALL, audio_layers=3, audio_dim=384)
    teacher = ds.infer.AudioDiT(size)
    torch.nn.init.normal_(teacher.head.head.weight, std=0.02)
    save_file(teacher.state_dict(), top / "weights" / "teacher.safetensors")
    save_file(vae.state_dict(), top / "weights" / "vae.safetensors")
    config = {"vae": asdict(vae.config), "dit": asdict(size), "audio": str(ROOT / "weights" / "tiny" / "whisper"), "size": 32, "frames": 33}
    (top / "weights" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return top


def options(folder, *more, run="run"):
    return ["--data", str(folder / "clips"), "--weights", str(folder / "weights"), "--encoded", str(folder / "cache"), "--run-dir", str(folder / run),
            "--preset", "debug", "--device", "cpu", *more]


def test_debug_preset_learns_a_film_by_heart(folder, capsys):
    """Law: debug's run comes closer to the one film it knows, chunk by chunk, and what it exports runs in infer.py, the teacher untouched."""
    before = (folder / "weights" / "teacher.safetensors").read_bytes()
    ds.main(options(folder, "--out", str(folder / "out"), "--lambda-reg", "10", "--lr", "1e-3"))       # this teacher knows nothing: lean on the truth
    assert "student_updates: " in capsys.readouterr().out
    log = [json.loads(line) for line in (folder / "run/log.jsonl").read_text(encoding="utf-8").splitlines()]
    first, last = (np.array(log[i]["val"]["error"]) for i in (0, -1))
    assert (last < 0.9 * first).all(), (first, last)
    models = infer.load(folder / "out", "student", "cpu", "float32")
    assert models.trained and models.identity == "tre" and (folder / "weights" / "teacher.safetensors").read_bytes() == before
    with safe_open(folder / "out/student.safetensors", "pt") as file:
        about = file.metadata()
        assert file.get_tensor("head.head.weight").dtype == torch.float16 and json.loads(about["config"])["teacher_sees"] == "gt"
        assert float(about["skip"]) == models.dit.config.skip
    assert (folder / "run/strip.png").exists()
    ds.main(["--plot", "--run-dir", str(folder / "run")])
    assert (folder / "run/curves.png").exists()


def test_no_distill_is_the_teacher(folder):
    """Law: the baseline without AKD is the teacher's own weights, measured in the student's steps; and infer.py takes those very steps."""
    ds.main(options(folder, "--no-distill", "--sample-shift", "2", "--out", str(folder / "none"), run="none_run"))
    with safe_open(folder / "none/student.safetensors", "pt") as one, safe_open(folder / "weights/teacher.safetensors", "pt") as two:
        assert all(torch.equal(one.get_tensor(k), two.get_tensor(k).half()) for k in two.keys())
    log = (folder / "none_run/log.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(log) == 1 and "error" in json.loads(log[0])["val"]
    models, seen = infer.load(folder / "none", "student", "cpu", "float32"), []
    models.dit.register_forward_pre_hook(lambda module, given: seen.append(given[1].item()))
    next(infer.generate(models, torch.zeros(1, 3, 32, 32), np.zeros(33 * 640, np.float32)))
    assert seen == pytest.approx([1000, 6000 / 7, 2000 / 3, 400])


def test_bad_input_is_one_line(folder, capsys):
    """Law: what a user can get wrong ends in exit code 2 and one line, Table 4's missing row with its reason among them."""
    shutil.copytree(folder / "weights", folder / "long")                         # a teacher of longer chunks than the clips have
    config = json.loads((folder / "long" / "config.json").read_text(encoding="utf-8"))
    (folder / "long" / "config.json").write_text(json.dumps(config | {"frames": 81}), encoding="utf-8")
    for bad, word in ((["--data", str(folder / "nowhere")], "nowhere"), (["--micro", "3"], "micro"), (["--weights", str(folder)], "config.json"),
                      (["--frames", "81"], "trained with 33"),
                      (["--weights", str(folder / "long"), "--frames", "81"], "long enough"),
                      (["--teacher-sees", "gen", "--student-sees", "gt"], "Table 4"),
                      (["--identity", "etr"], "trained with tre"),                # a student cannot learn from scores of another reference
                      (["--tail", "3"], "tail"), (["--sample-shift", "0"], "sample_shift"),
                      (["--guidance-focus", "-1"], "0 or more"), (["--liveliness", "nan"], "0 or more"),
                      (["--guidance", "2", "--liveliness", "2"], "over 0"), (["--delta", "0"], "over 0"),
                      (["--share", "1", "1"], "folders of --data"), (["--cache", "a", "b"], "folders of --data")):
        with pytest.raises(SystemExit) as stop:
            ds.main(options(folder, *bad, run="bad"))
        text = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and text[-1].startswith("distill_student.py: ") and word in text[-1]
    with pytest.raises(SystemExit) as stop:
        ds.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"--{name.replace('_', '-')}" in text for name in asdict(CFG))


def test_two_processes_have_the_losses_of_one(folder):
    """Law: FSDP changes where the numbers lie, not what they are; the checkpoint, films included, is the one-process checkpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = ["--out", str(folder / "out2"), "--steps", "4", "--films", "0", "--no-bf16", "--batch", "4", "--micro", "1", "--ratio", "2",
            "--guidance", "3", "--follow", "2"]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    command = [sys.executable, str(ROOT / "distill_student.py")]
    jobs = [subprocess.Popen([*command, *options(folder, *more, run="run2")], env=environment | {"RANK": rank, "LOCAL_RANK": rank},
                             stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) for rank in "01"]
    ds.main(options(folder, *more, run="run1"))
    errors = [job.communicate(timeout=300)[1].decode() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], errors[0][-2000:]
    numbers = []
    for world in (1, 2):
        lines = [json.loads(line) for line in (folder / f"run{world}/log.jsonl").read_text(encoding="utf-8").splitlines()]
        numbers.append([v for r in lines for k, v in r.items() if k in ("critic", "dmd", "anchor", "norm_student", "norm_critic")])
    assert len(numbers[0]) == 4 * 2 + 2 * 3 and np.allclose(*numbers, rtol=1e-4, atol=1e-4)
    with safe_open(folder / "run1/checkpoint.safetensors", "pt") as one, safe_open(folder / "run2/checkpoint.safetensors", "pt") as two:
        assert set(one.keys()) == set(two.keys())
        assert all(torch.allclose(one.get_tensor(k), two.get_tensor(k), atol=1e-4) for k in one.keys() if k.startswith(("ema.", "streams.")))
