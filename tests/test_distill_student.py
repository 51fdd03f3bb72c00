"""Properties of the distillation. Networks are random and small, or one number wide: they hold for
any weights."""
import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import save_file
from test_train_teacher import read_log, run_two_processes
from toys import SMALL, FakeAudioEncoder, make_clip, make_network, make_vae

import distill_student as ds
import infer
from common import learning_rate_factor, write_mp4
from data import chunks_left, encode_clips, to_tensor
from dit import AudioDiT, add_noise, predict, sample_student, student_sigmas
from tre import encode_then_repeat
from tre import temporal_reference_encoding as tre

CFG = ds.StudentConfig(
    steps=7, critic_updates=2, batch=4, micro_batch=4, rollout_chunks=3, lr=1e-3, lr_critic=1e-3,
    warmup=2, decay=0.0, ema=0.9, guidance=3.0, lambda_reg=0.1, continuity_frames=9, frames=33,
    identity="tre", offsets=1, references=2, bf16=False, val_every=99, val_videos=1,
    save_minutes=1e9)
NETWORKS = ("student", "critic", "teacher")


@pytest.fixture(scope="module")
def vae():
    return make_vae()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    lengths = {"long": 90, "other": 81, "two": 57}
    return [make_clip(folder, name, length, i) for i, (name, length) in enumerate(lengths.items())]


@pytest.fixture(scope="module")
def starts(clips, vae, tmp_path_factory):
    """Chunks that a video can begin with: 3, 3 and 2 chunks follow from a clip's first."""
    cache = tmp_path_factory.mktemp("cache")
    chunks = encode_clips(clips, vae, FakeAudioEncoder(), tre, cache, CFG)
    return [c for c in chunks if c.row < len(c.pictures) - 1 and chunks_left(c, CFG) > 1]


def make(seed=0):
    """-> student and critic, teacher: three equal networks, of which the teacher is frozen."""
    networks = {name: make_network(seed) for name in ("student", "critic")}
    return networks, make_network(seed).requires_grad_(False).eval()


def run(folder, vae, starts, resume=False, seed=0, **options):
    cfg = replace(CFG, **options)
    networks, teacher = make(seed)
    buffer = ds.RolloutBuffer(starts, cfg, "cpu")
    return ds.train(cfg, networks, teacher, vae, buffer, starts[-1:], folder, resume)


def exit_at(batch, inputs, predictions, exits, sigmas):
    """What train_step adds to a batch, for chosen exit steps."""
    step = torch.tensor(exits)
    index = torch.arange(len(inputs)), step
    sigma = torch.tensor(sigmas)[step]
    more = {"exit_step": step, "exit_input": inputs[index], "exit_sigma": sigma}
    return batch | more, predictions[index]

# --------------------------------------------------------------------------- in one dimension


class Gaussian(torch.nn.Module):
    """The network that has learned N(mean, std^2) perfectly: v = (x - E[x0 | x]) / sigma."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(mean))
        self.log_std = torch.nn.Parameter(torch.tensor(std).log())

    def forward(self, x, t, identity, audio):
        s, var = (t / 1000)[:, None, None, None, None], self.log_std.exp() ** 2
        gain = (1 - s) * var / ((1 - s) ** 2 * var + s ** 2)
        x0 = self.mean + gain * (x - (1 - s) * self.mean)
        return (x - x0) / s


class Line(torch.nn.Module):
    """A one-step student: noise x -> x0 = a + b x, so it generates N(a, b^2)."""

    def __init__(self, a, b):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(a))
        self.b = torch.nn.Parameter(torch.tensor(b))

    def forward(self, x, t, identity, audio):
        return x - (self.a + self.b * x)


def toy_batch(rows, seed):
    """Sixteen numbers a row and one continuity latent whose value must not matter."""
    g, shape = torch.Generator().manual_seed(seed), (rows, 4, 5, 1, 1)
    noise, zeros = torch.randn(rows, 3, *shape[1:], generator=g), torch.zeros(shape)
    mask = torch.tensor([0.0, 1, 1, 1, 1]).view(1, 1, 5, 1, 1).expand(rows, -1, -1, -1, -1)
    return {"noise": noise, "exit_input": noise[:, 0], "exit_step": torch.zeros(rows).long(),
            "exit_sigma": torch.ones(rows), "latents": zeros, "loss_mask": mask,
            "sigma": 0.02 + 0.96 * torch.rand(rows, 2, generator=g),
            "identity": zeros, "audio": zeros,
            "kappa_teacher": zeros[:, :, :1] + 50, "kappa_student": zeros[:, :, :1] - 50}


def test_a_gaussian_student_becomes_the_teachers_gaussian():
    """Property: trained by two scores alone, a student that generates N(-1, 0.3^2) comes to
    generate the teacher's N(2, 0.8^2), mean *and* width."""
    cfg, teacher = replace(CFG, lambda_reg=0.0, guidance=1.0), Gaussian(2.0, 0.8)
    student, critic = Line(-1.0, 0.3), Gaussian(-1.0, 0.3)
    slow = torch.optim.Adam(student.parameters(), 0.03)
    fast = torch.optim.Adam(critic.parameters(), 0.1)
    for step in range(900):
        batch = toy_batch(64, step)
        if step % 3 == 0:
            slow.zero_grad()
            ds.student_loss(student, critic, teacher, batch, cfg)[0].mean().backward()
            slow.step()
        fast.zero_grad()
        sample = student.a + student.b * batch["exit_input"]
        ds.critic_loss(critic, sample, batch).mean().backward()
        fast.step()
    assert student.a.item() == pytest.approx(2.0, abs=0.1)
    assert abs(student.b.item()) == pytest.approx(0.8, abs=0.1)
    assert critic.mean.item() == pytest.approx(2.0, abs=0.1)        # the critic has followed


@pytest.mark.parametrize("critic_mean, sign", [(2.0, 0), (3.0, 1), (1.0, -1)])
def test_the_gradient_is_the_difference_of_two_scores(critic_mean, sign):
    """Property: no gradient where critic and teacher agree. Where the critic estimates that the
    student generates too much, the gradient is positive: descend."""
    student, cfg = Line(critic_mean, 0.5), replace(CFG, lambda_reg=0.0, guidance=1.0)
    critic, teacher = Gaussian(critic_mean, 0.5), Gaussian(2.0, 0.5)
    loss, parts = ds.student_loss(student, critic, teacher, toy_batch(64, 0), cfg)
    loss.mean().backward()
    assert np.sign(round(student.a.grad.item(), 6)) == sign
    assert (parts["dmd_grad"].mean() > 0.01) == (sign != 0)


def test_equations_12_and_13():
    """Property: w(t) times the difference of scores is the difference of the predictions of x0 over
    the mean correction, each row by itself; continuity latents count neither in the gradient nor
    in the normaliser."""
    g = torch.Generator().manual_seed(0)
    x0, x, v_real, v_fake = torch.randn(4, 3, 4, 5, 2, 2, generator=g)
    sigma, given = torch.tensor([0.1, 0.5, 0.97]), torch.tensor([[1], [3], [3]])
    mask = (torch.arange(5) >= given).float().view(3, 1, 5, 1, 1)
    got = ds.dmd_gradient(x0, x, v_real, v_fake, sigma, mask)
    for i, m in enumerate((1, 3, 3)):
        real, fake = x[i] - sigma[i] * v_real[i], x[i] - sigma[i] * v_fake[i]
        wanted = (fake - real)[:, m:] / (x0[i] - real)[:, m:].abs().mean()
        assert torch.allclose(got[i][:, m:], wanted, atol=1e-4) and not got[i][:, :m].any()
    tensors = x0, x, v_real, v_fake
    junk = [torch.where(mask > 0, y, 1e3 * torch.randn(y.shape, generator=g)) for y in tensors]
    assert torch.allclose(ds.dmd_gradient(*junk, sigma, mask), got, atol=1e-6)
    others = [torch.cat([y[:1], 7 * y[1:]]) for y in tensors]       # other rows do not matter
    assert torch.allclose(ds.dmd_gradient(*others, sigma, mask)[0], got[0], atol=1e-6)


def test_the_surrogate_loss_has_the_gradient_of_equation_13():
    """Property: 0.5 (x0 - sg(x0 - g))^2 has the gradient g / count; its value is 0.5 mean g^2, and
    means nothing."""
    g = torch.Generator().manual_seed(0)
    x0, gradient = torch.randn(2, 2, 3, 5, 2, 2, generator=g)
    mask = torch.tensor([0.0, 1, 1, 1, 1]).view(1, 1, 5, 1, 1)
    x0.requires_grad_()
    ds.dmd_loss(x0, mask * gradient, mask).sum().backward()
    count = mask.expand_as(x0[:1]).sum()
    assert torch.allclose(x0.grad, mask * gradient / count, atol=1e-6)


def test_equation_7():
    """Property: half a square below delta, a straight line above, nothing at the truth, nothing
    from the continuity latents."""
    truth = torch.zeros(1, 1, 3, 1, 1)
    mask = torch.tensor([0.0, 1, 1]).view(1, 1, 3, 1, 1)

    def at(*errors):
        x0 = torch.tensor(errors).view(1, 1, 3, 1, 1)
        return ds.regression_loss(x0, truth, 0.5, mask).item()

    assert at(9.0, 0, 0) == 0
    assert at(9.0, 0.4, 0.4) == pytest.approx(0.08)
    assert at(0.0, 2, -2) == pytest.approx(0.5 * (2 - 0.25))

# ------------------------------------------------------------------------------------ the networks


def test_the_loss_moves_the_student_along_equation_8(starts):
    """Property: d loss / d x0 is (g + lambda_reg clamp(x0 - z, -delta, delta)) / count on generated
    latents, guidance included, and 0 at kappa."""
    cfg = replace(CFG, lambda_reg=0.3, huber_delta=0.7, guidance=2.0)
    networks, teacher = make()
    student, critic = networks["student"], make_network(seed=5)
    batch = ds.RolloutBuffer(starts, CFG, "cpu").batch(range(4), 0)
    sigmas = student_sigmas()
    batch, _ = exit_at(batch, *ds.rollout(student, batch, sigmas), [0, 1, 2, 3], sigmas)
    exit_sigma = batch["exit_sigma"].view(-1, 1, 1, 1, 1)
    with torch.no_grad():
        v = ds.forward(student, batch["exit_input"], batch["exit_sigma"], batch,
                       batch["kappa_student"])
        x0 = batch["exit_input"] - exit_sigma * v
    v.requires_grad_()
    loss, parts = ds.student_loss(lambda *a: v, critic, teacher, batch, cfg)
    loss.sum().backward()
    with torch.no_grad():                                           # once more, written out
        sigma, mask = batch["sigma"][:, 0], batch["loss_mask"]
        s = sigma.view(-1, 1, 1, 1, 1)
        x = (1 - s) * x0 + s * batch["noise"][:, -2]
        m = batch["kappa_student"].shape[2]
        x_head = torch.cat([batch["kappa_student"], x[:, :, m:]], 2)
        fake = critic(torch.where(mask > 0, x, x_head), 1000 * sigma, batch["identity"],
                      batch["audio"])
        x_head = torch.cat([batch["kappa_teacher"], x[:, :, m:]], 2)
        x_teacher = torch.where(mask > 0, x, x_head)
        cond, uncond = (teacher(x_teacher, 1000 * sigma, batch["identity"], audio)
                        for audio in (batch["audio"], 0 * batch["audio"]))
        g = ds.dmd_gradient(x0, x, 2 * cond - uncond, fake, sigma, mask)
        count = mask.expand_as(x0).sum((1, 2, 3, 4)).view(-1, 1, 1, 1, 1)
        pull = 0.3 * mask * (x0 - batch["latents"]).clamp(-0.7, 0.7)
    got = v.grad / -exit_sigma
    assert torch.allclose(got, (g + pull) / count, rtol=1e-3, atol=1e-6)
    assert parts["regression"].shape == (4,)


def test_gradients_reach_the_student_only(starts, vae):
    """Property: a student step leaves teacher, critic, both continuity references and earlier
    chunks without gradient; a critic step leaves the student. The student is called once with
    gradient, for one of its steps; the others are input."""
    networks, teacher = make()
    student, critic = networks.values()
    buffer = ds.RolloutBuffer(starts, CFG, "cpu")
    teacher.requires_grad_(True)                                    # so that a gradient could
    buffer.kappa_gen.normal_().requires_grad_(True)                 # from earlier chunks
    buffer.cursor[:, 1] = torch.tensor([0, 1, 1, 0])
    with_gradient = []
    student.register_forward_pre_hook(
        lambda _, x: with_gradient.append(1) if torch.is_grad_enabled() else None)
    batch = buffer.batch(range(4), 0)
    assert not any(batch[f"kappa_{who}"].requires_grad for who in ("teacher", "student"))
    inputs, predictions = ds.rollout(student, batch, student_sigmas())
    assert not inputs.requires_grad and not predictions.requires_grad and not with_gradient
    batch, sample = exit_at(batch, inputs, predictions, [0, 1, 2, 3], student_sigmas())
    ds.student_loss(student, critic, teacher, batch, CFG)[0].mean().backward()

    def untouched(net):
        return all(p.grad is None for p in net.parameters())

    assert untouched(teacher) and untouched(critic) and not untouched(student)
    assert len(with_gradient) == 1
    student.zero_grad()
    sample.requires_grad_()
    ds.critic_loss(critic, sample, batch).mean().backward()
    assert untouched(teacher) and untouched(student) and not untouched(critic)
    assert sample.grad is None
    assert not ds.next_kappa_gen(vae, sample, 9).requires_grad


def test_autocast_does_not_lose_the_gradient(starts, vae, tmp_path, monkeypatch):
    """Property: weights cast while the roll-out runs without gradient are cast anew for the step
    that has one, else most of them would never learn."""
    monkeypatch.setattr(ds, "bf16_autocast",
                        lambda device, wanted: torch.autocast("cpu", torch.bfloat16))
    state, _ = run(tmp_path, vae, starts, steps=1, critic_updates=1, bf16=True)
    for name, p in state.networks["student"].named_parameters():
        if "blocks" in name and p.ndim == 2:
            assert p.grad.abs().sum() > 0


def test_the_rollout_is_inferences(starts):
    """Property: a roll-out is what infer.py generates: the same steps, the same clean continuity
    latents, fresh noise in between."""
    networks, _ = make()
    model, sigmas = networks["student"], student_sigmas(4)
    buffer = ds.RolloutBuffer(starts, CFG, "cpu")
    buffer.kappa_gen.normal_()
    buffer.cursor[:, 1] = 1
    batch = buffer.batch(range(2), 3)
    inputs, predictions = ds.rollout(model, batch, sigmas)
    for i in range(2):
        class Replay:                                               # hands out the batch's noise
            device, noise = torch.device("cpu"), iter(batch["noise"][i, 1:])
        row = {k: v[i:i + 1] for k, v in batch.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn", lambda *a, generator, **k: next(generator.noise)[None])
            z = sample_student(model, row["noise"][:, 0], row["identity"], row["audio"],
                               row["kappa_student"], sigmas, Replay())
        assert torch.allclose(predictions[i:i + 1, -1], z, atol=1e-5)
    with torch.no_grad():                                           # an input can be used again
        x = torch.cat([batch["kappa_student"], inputs[:, 2, :, 3:]], 2)
        v = predict(model, x, sigmas[2], batch["identity"], batch["audio"])
        x0 = inputs[:, 2] - sigmas[2] * v
    assert torch.allclose(x0[:, :, 3:], predictions[:, 2, :, 3:], atol=1e-5)


def test_the_student_never_sees_the_truth(starts):
    """Property: kappa_gen and the roll-out do not depend on ground-truth latents: there are none
    in use. (tiny/student.py's teacher forcing breaks this, on purpose.)"""
    networks, _ = make()
    buffer = ds.RolloutBuffer(starts, CFG, "cpu")
    buffer.cursor[:, 1] = 1
    batch = buffer.batch(range(2), 3)
    other = batch | {"latents": batch["latents"] + 1, "kappa_teacher": batch["kappa_teacher"] + 1}
    one, two = (ds.rollout(networks["student"], b, student_sigmas())[1] for b in (batch, other))
    assert torch.equal(one, two)


def test_kappa_gen_is_what_inference_hands_over(vae, clips):
    """Property: kappa_gen of the next chunk is what infer.py gives to its network, bit for bit: the
    whole roll-out is decoded, its last n frames are encoded again."""
    seen = []

    class Recorder(torch.nn.Module):                                # velocity 0: output = input
        def forward(self, x, t, identity, audio):
            seen.append(x)
            return torch.zeros_like(x)

    image = to_tensor(clips[0].frames[:1])[:, :, 0]
    models = infer.Models(
        vae=vae, dit=Recorder(), audio=FakeAudioEncoder(), network="student", size=32, trained=True,
        frames=33, identity="tre", continuity_frames=9, steps=1, timestep_shift=5.0, guidance=1.0)
    list(infer.generate(models, image, np.zeros(153 * 640, np.float32)))
    assert torch.equal(ds.next_kappa_gen(vae, seen[0], 9), seen[1][:, :, :3])
    both = ds.next_kappa_gen(vae, torch.cat([seen[1], seen[0]]), 9) # each video by itself
    assert torch.equal(both[1:], seen[1][:, :, :3])
    assert torch.equal(both[:1], ds.next_kappa_gen(vae, seen[1], 9))


TABLE_4 = [("gt", "gt"), ("gen", "gen"), ("gt", "gen")]


@pytest.mark.parametrize("teacher_sees, student_sees", TABLE_4)
def test_the_three_rows_of_table_4(starts, vae, tmp_path, teacher_sees, student_sees):
    """Property: two words decide which continuity reference each network sees; critic and student
    always see the same. By default the teacher sees kappa_gt, the others kappa_gen: AKD."""
    default = ds.StudentConfig()
    assert (default.teacher_continuity, default.student_continuity) == ("gt", "gen")
    cfg = replace(CFG, teacher_continuity=teacher_sees, student_continuity=student_sees)
    networks, teacher = make()
    buffer = ds.RolloutBuffer(starts, cfg, "cpu")
    heads = {name: [] for name in NETWORKS}
    for name, net in zip(NETWORKS, (*networks.values(), teacher)):
        net.register_forward_pre_hook(
            lambda _, x, name=name: heads[name].append(x[0][:, :, :3].clone()))
    buffer.kappa_gen.normal_()
    buffer.cursor[:] = torch.tensor([0, 1, 3])
    batch = buffer.batch(range(4), 0)
    kappa = {"gt": batch["latents"][:, :, :3], "gen": buffer.kappa_gen.clone()}
    turn = next(step for step in range(9) if ds.is_student_step(step, cfg))
    state = ds.TrainState(networks, {"student": 1e-3, "critic": 1e-3}, "student", cfg)
    no_autocast = torch.autocast("cpu", torch.bfloat16, enabled=False)
    ds.train_step(state, teacher, vae, buffer, cfg, turn, no_autocast, tmp_path, 0, ds.rollout, {})
    assert {name: len(x) for name, x in heads.items()} == {"student": 5, "critic": 2, "teacher": 2}
    for name, wanted in zip(NETWORKS, (student_sees, student_sees, teacher_sees)):
        assert all(torch.equal(x, kappa[wanted]) for x in heads[name])
    moved = not torch.equal(buffer.kappa_gen, kappa["gen"])
    assert moved == (student_sees == "gen")                         # no frames that nobody sees

# ----------------------------------------------------------------------------- the roll-out buffer


def test_videos_continue_and_start_again(starts, vae):
    """Property: a video starts with its portrait, every step generates its next chunk after its own
    kappa_gen, and after K chunks, or where the clip ends, another one starts. Batches hold chunks
    of every age, and the student is trained on every row at every age."""
    cfg = replace(CFG, critic_updates=3)                            # the worst case: equal to K
    starts = [start for start in starts if chunks_left(start, CFG) == 3]
    buffer, met, truths = ds.RolloutBuffer(starts, cfg, "cpu"), set(), {}
    long = ds.RolloutBuffer(starts, replace(cfg, rollout_chunks=9), "cpu")
    assert long.cursor[:, 2].max() <= 3                             # no longer than its clip
    assert len(set(buffer.cursor[:, 2].tolist())) > 1               # rows differ from the start
    for step in range(60):
        before, batch = buffer.cursor.clone(), buffer.batch(range(4), step)
        if ds.is_student_step(step, cfg):
            met |= {(row, int(before[row, 1])) for row in range(4)}
        for row, (start, age, length) in enumerate(before.tolist()):
            chunk, given = starts[start], 1 if age == 0 else 3
            begin = chunk.start + 24 * age                          # 33 - 9 frames on
            if (start, age) not in truths:
                with torch.no_grad():
                    frames = to_tensor(chunk.clip.frames[begin:begin + 33])
                    truths[start, age] = vae.encode(frames)[0].half().float()
            truth = truths[start, age]
            assert torch.equal(batch["latents"][row], truth)
            assert age < length <= min(3, chunks_left(chunk, CFG))
            assert batch["audio"][row, -1, 1, 2] == begin + 33      # the audio of that chunk
            mask = [0.0] * given + [1.0] * (9 - given)
            assert batch["loss_mask"][row].flatten().tolist() == mask
            kappa = truth[:, :1] if age == 0 else buffer.kappa_gen[row]
            assert torch.equal(batch["kappa_student"][row, :, :given], kappa[:, :given])
            assert torch.equal(batch["kappa_teacher"][row], truth[:, :3])
        buffer.advance([(range(4), torch.full_like(buffer.kappa_gen, step))], step)
        assert torch.equal(buffer.kappa_gen, torch.full_like(buffer.kappa_gen, step))
    assert met == {(row, age) for row in range(4) for age in range(3)}


def test_one_student_update_in_every_block():
    """Property: with critic_updates 5, one step of every five trains the student."""
    cfg = replace(CFG, critic_updates=5)
    turns = [ds.is_student_step(step, cfg) for step in range(500)]
    assert [sum(turns[i:i + 5]) for i in range(0, 500, 5)] == [1] * 100


def test_validation_follows_the_longest_videos(starts):
    """Property: videos too short for K chunks are left out of validation, unless none is longer."""
    def lengths(cfg):
        return [chunks_left(start, cfg) for start in ds.longest(starts, cfg)]

    left = [chunks_left(start, CFG) for start in starts]
    assert set(left) == {2, 3}
    assert lengths(CFG) == lengths(replace(CFG, rollout_chunks=9)) == [3] * left.count(3)
    assert ds.longest(starts, replace(CFG, rollout_chunks=2)) == starts


def test_draws_depend_on_seed_step_and_row_alone(starts):
    """Property: noise, noise levels and exit steps are functions of (seed, step, row); exits are
    uniform, sigmas stay in [0.02, 0.98]."""
    buffer = ds.RolloutBuffer(starts, CFG, "cpu")
    whole, part = buffer.batch(range(4), 7), buffer.batch([2], 7)
    assert all(torch.equal(whole[k][2], part[k][0]) for k in whole)
    drawn = [ds.draw_noise(CFG, step, 0, (1, 1, 1, 1), "cpu") for step in range(800)]
    counts = np.bincount([int(d["exit_step"]) for d in drawn], minlength=4)
    sigma = torch.stack([d["sigma"] for d in drawn])
    assert len(counts) == 4 and counts.min() > 150
    assert 0.02 <= sigma.min() and sigma.max() <= 0.98 and 0.75 < sigma.median() < 0.9
    assert abs(torch.stack([d["noise"] for d in drawn]).mean()) < 0.1
    assert drawn[0]["noise"].shape == (6, 1, 1, 1, 1)


def test_the_learning_rates_rise_and_fall(vae, starts, tmp_path):
    """Property: up over the warm-up, level, down to zero over the last share of the steps, or not
    at all; the log has what was used."""
    level = replace(CFG, steps=10, warmup=4)
    falls = replace(CFG, steps=10, warmup=2, decay=0.5)
    factors = [learning_rate_factor(k, level) for k in range(10)]
    assert factors == [0.25, 0.5, 0.75, *[1] * 7]
    factors = [learning_rate_factor(k, falls) for k in range(11)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0])
    run(tmp_path, vae, starts, steps=2, lr=0.1, lr_critic=0.2)
    rates = [(r["lr"], r["lr_critic"]) for r in read_log(tmp_path)[:2]]
    assert rates == [(0.05, 0.1), (0.1, 0.2)]


def test_identity_reference_of_table_3(starts, vae):
    """Property: a teacher of encode-then-repeat (Eq. 29) gives its student the same reference."""
    buffer = ds.RolloutBuffer(starts, replace(CFG, identity="etr"), "cpu")
    chunk, got = starts[int(buffer.cursor[0, 0])], buffer.batch([0], 0)["identity"]
    image = to_tensor(chunk.clip.frames[chunk.start:chunk.start + 1])[:, :, 0]
    with torch.no_grad():
        wanted = encode_then_repeat(vae, image, 33)
    assert torch.equal(got, wanted.half().float())

# --------------------------------------------------------------------------------------------- loop


def test_accumulated_gradients_are_those_of_the_whole_batch(vae, starts, tmp_path):
    """Property: two calls of two rows are one call of four; validation leaves no trace."""
    a, la = run(tmp_path / "a", vae, starts, steps=3)
    b, lb = run(tmp_path / "b", vae, starts, steps=3, val_every=1, micro_batch=2)
    assert np.allclose(la, lb, atol=1e-5)
    assert torch.equal(a.tensors["buffer.cursor"], b.tensors["buffer.cursor"])
    assert all(torch.allclose(a.tensors[k], b.tensors[k], atol=1e-4) for k in a.tensors)
    logs = [read_log(tmp_path / x) for x in "ab"]
    for name in ("norm_student", "norm_critic", "dmd_grad", "regression", "reg_grad"):
        one, two = ([record[name] for record in log if name in record] for log in logs)
        assert one and one == pytest.approx(two, rel=1e-3)
    val = logs[1][0]["val"]
    assert len(val["error"]) == len(val["colour"]) == 2 and val["seam"] > 0


def test_a_killed_run_continues_bit_for_bit(vae, starts, tmp_path, monkeypatch):
    """Property: killed at any step and resumed, a run has the losses, weights, averages, optimisers
    and *videos in progress* of one that was left alone."""
    whole, losses = run(tmp_path / "a", vae, starts)
    train_step, save = ds.train_step, ds.save_checkpoint

    def killed(state, teacher, vae, buffer, cfg, step, *rest):
        if step == 5:
            raise KeyboardInterrupt
        return train_step(state, teacher, vae, buffer, cfg, step, *rest)

    def save_until_3(path, tensors, step, cfg, **more):
        if step <= 3:
            save(path, tensors, step, cfg, **more)

    monkeypatch.setattr(ds, "train_step", killed)
    monkeypatch.setattr(ds, "save_checkpoint", save_until_3)
    with pytest.raises(KeyboardInterrupt):                          # saved before step 3
        run(tmp_path / "b", vae, starts, save_minutes=0.0)
    monkeypatch.setattr(ds, "train_step", train_step)
    monkeypatch.setattr(ds, "save_checkpoint", save)
    resumed, rest = run(tmp_path / "b", vae, starts, resume=True)
    assert len(rest) == 4 and rest == losses[3:]
    assert all(torch.equal(whole.tensors[k], resumed.tensors[k]) for k in whole.tensors)
    steps = [record["step"] for record in read_log(tmp_path / "b")]
    assert steps == list(range(8))                                  # none twice
    with pytest.raises(ValueError, match="lambda_reg 0.1 -> 0.5"):
        run(tmp_path / "b", vae, starts, resume=True, lambda_reg=0.5)
    with pytest.raises(ValueError, match=r"data \w+ -> \w+"):
        run(tmp_path / "b", vae, starts[:2], resume=True)


def test_nan_stops_the_run_and_names_the_clips(vae, starts, tmp_path, monkeypatch):
    """Property: a row that is not a number stops the run before weights and videos are touched; the
    last checkpoint is whole, the clips are named."""
    batch = ds.RolloutBuffer.batch

    def poisoned(self, rows, step):
        bad = {"audio": torch.full((4, 33, 2, 3), float("nan"))}
        return batch(self, rows, step) | (bad if (self.cfg.seed, step) == (0, 3) else {})

    monkeypatch.setattr(ds.RolloutBuffer, "batch", poisoned)
    networks, teacher = make()
    cfg = replace(CFG, save_minutes=0.0)
    buffer = ds.RolloutBuffer(starts, cfg, "cpu")
    with pytest.raises(FloatingPointError, match="in the clips (long|other|two), "):
        ds.train(cfg, networks, teacher, vae, buffer, starts[:2], tmp_path)
    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as file:
        assert file.metadata()["step"] == "3"
        assert torch.equal(file.get_tensor("buffer.kappa_gen"), buffer.kappa_gen)
        for name, p in networks["student"].named_parameters():
            assert torch.equal(file.get_tensor(f"student.{name}"), p) and p.isfinite().all()

# ------------------------------------------------------------------------------------------ program


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vae):
    """A folder of clips and one of weights, as a user has them; the teacher is random."""
    top = tmp_path_factory.mktemp("user")
    for where in ("clips", "weights"):
        (top / where).mkdir()
    for seed in range(2):
        clip = make_clip(top / "made", str(seed), 57, seed)
        write_mp4(top / "clips" / f"{seed}.mp4", np.array(clip.frames), np.array(clip.audio))
    torch.manual_seed(0)
    size = replace(SMALL, audio_layers=3, audio_dim=384)
    teacher = AudioDiT(size)
    torch.nn.init.normal_(teacher.head.head.weight, std=0.02)
    save_file(teacher.state_dict(), top / "weights" / "teacher.safetensors")
    save_file(vae.state_dict(), top / "weights" / "vae.safetensors")
    config = {"size": 32, "frames": 33, "continuity_frames": 9, "identity": "tre",
              "audio": str(ROOT / "weights" / "tiny" / "whisper"), "vae": asdict(vae.config),
              "dit": asdict(size), "teacher": {"steps": 4, "timestep_shift": 5.0, "guidance": 2.0}}
    (top / "weights" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return top


def options(folder, *more, run="run"):
    return ["--data", str(folder / "clips"), "--weights", str(folder / "weights"),
            "--run-dir", str(folder / run), "--preset", "debug", "--device", "cpu", *more]


def test_debug_preset_overfits_one_video(folder, capsys):
    """Property: debug's run comes closer to its one video, chunk by chunk, and what it exports runs
    in infer.py, with the steps it was trained for; the teacher is not touched."""
    before = (folder / "weights" / "teacher.safetensors").read_bytes()
    # this teacher has learned nothing: rely on Eq. 7
    ds.main(options(folder, "--lambda-reg", "10", "--lr", "1e-3", "--timestep-shift", "2"))
    assert "student_updates: " in capsys.readouterr().out
    log = read_log(folder / "run")
    first, last = (np.array(log[i]["val"]["error"]) for i in (0, -1))
    assert (last < 0.9 * first).all(), (first, last)
    assert (folder / "run" / "samples.png").exists()
    weights = folder / "run" / "weights"
    assert (weights / "teacher.safetensors").read_bytes() == before
    with safe_open(weights / "student.safetensors", "pt") as file:
        assert file.get_tensor("head.head.weight").dtype == torch.float16
        assert json.loads(file.metadata()["config"])["teacher_continuity"] == "gt"
    models = infer.load(weights, "student", "cpu", "float32")
    assert models.trained and models.identity == "tre"
    seen = []
    models.dit.register_forward_pre_hook(lambda module, given: seen.append(given[1].item()))
    next(infer.generate(models, torch.zeros(1, 3, 32, 32), np.zeros(33 * 640, np.float32)))
    assert seen == pytest.approx([1000, 6000 / 7, 2000 / 3, 400])


def test_no_steps_is_the_teacher(folder):
    """Property: the baseline without AKD is the teacher's own weights, validated in the student's
    steps."""
    ds.main(options(folder, "--steps", "0", run="none"))
    one = safe_open(folder / "none" / "weights" / "student.safetensors", "pt")
    two = safe_open(folder / "weights" / "teacher.safetensors", "pt")
    with one, two:
        assert all(torch.equal(one.get_tensor(k), two.get_tensor(k).half()) for k in two.keys())
    log = read_log(folder / "none")
    assert len(log) == 1 and "error" in log[0]["val"]


def test_guidance_comes_from_the_teachers_weights(folder):
    """Property: there is one set of guidance defaults, kept with the weights; a flag overrides it.
    What the teacher was trained with cannot be overridden: another n is refused."""
    models = infer.load(folder / "weights", "teacher", "cpu", "float32")
    nano = ds.with_teachers_values(ds.StudentConfig(), models)
    assert (nano.guidance, nano.frames, nano.continuity_frames) == (2.0, 33, 9)
    assert nano.identity == "tre"
    assert ds.with_teachers_values(ds.StudentConfig(guidance=5.0), models).guidance == 5.0
    with pytest.raises(ValueError, match="--continuity-frames 5, but .* trained with 9"):
        ds.with_teachers_values(ds.StudentConfig(continuity_frames=5), models)


def test_bad_input_is_one_line(folder, capsys):
    """Property: what a user can get wrong ends in exit code 2 and one line, Table 4's missing row
    with its reason among them."""
    long = shutil.copytree(folder / "weights", folder / "long")     # chunks longer than the clips
    config = json.loads((long / "config.json").read_text(encoding="utf-8"))
    (long / "config.json").write_text(json.dumps(config | {"frames": 81}), encoding="utf-8")
    for bad, word in ((["--data", str(folder / "nowhere")], "nowhere"),
                      (["--micro-batch", "3"], "micro-batch"),
                      (["--weights", str(folder)], "config.json"),
                      (["--continuity-frames", "5"], "trained with 9"),
                      (["--weights", str(long)], "long enough"),
                      (["--teacher-continuity", "gen", "--student-continuity", "gt"], "Table 4"),
                      (["--timestep-shift", "0"], "shifts"), (["--huber-delta", "0"], "over 0"),
                      (["--lambda-reg", "-1"], "or more")):
        with pytest.raises(SystemExit) as stop:
            ds.main(options(folder, *bad, run="bad"))
        text = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and text[-1].startswith("distill_student.py: ")
        assert word in text[-1], (bad, text[-1])


def test_two_processes_have_the_losses_of_one(folder):
    """Property: FSDP changes where the numbers lie, not what they are; the checkpoint, videos in
    progress included, is the one-process checkpoint."""
    more = ["--steps", "4", "--no-bf16", "--batch", "4", "--micro-batch", "1",
            "--critic-updates", "2", "--guidance", "3"]
    ds.main(options(folder, *more, run="run1"))
    run_two_processes("distill_student.py", options(folder, *more, run="run2"))
    names = ("critic", "dmd_grad", "regression", "norm_student", "norm_critic")
    numbers = [[v for record in read_log(folder / f"run{world}") for k, v in record.items()
                if k in names] for world in (1, 2)]
    assert len(numbers[0]) == 4 * 2 + 2 * 3
    assert np.allclose(*numbers, rtol=1e-4, atol=1e-4)
    one, two = (safe_open(folder / f"run{n}" / "checkpoint.safetensors", "pt") for n in (1, 2))
    with one, two:
        assert set(one.keys()) == set(two.keys())
        for k in one.keys():
            if k.startswith(("ema.", "buffer.")):
                assert torch.allclose(one.get_tensor(k), two.get_tensor(k), atol=1e-4)


def test_noise_levels_of_a_shifted_step_list():
    """Property: `--timestep-shift 2` denoises at 1, 0.86, 0.67, 0.4, and Eq. 1 noises to them."""
    sigmas = student_sigmas(4, 2.0)
    assert sigmas == pytest.approx([1, 6 / 7, 2 / 3, 0.4])
    x0, eps = torch.zeros(1), torch.ones(1)
    assert [add_noise(x0, eps, sigma).item() for sigma in sigmas] == pytest.approx(sigmas)
