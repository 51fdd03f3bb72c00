"""Properties of dit.py: what the flow-matching equations promise; that the network is Wan2.1's."""
import dataclasses

import pytest
import torch
import torch.nn as nn

import dit
from dit import PRESETS, AudioDiT, Block, DiTConfig, sample_student, sample_teacher, student_sigmas

# heads 20 wide: 4 + 3 + 3 rotary pairs, so that a mix-up of the axes shows
SMALL = DiTConfig(dim=80, ffn_dim=96, heads=4, layers=2, channels=2, freq_dim=32,
                  audio_layers=2, audio_dim=6, audio_tokens=5, audio_hidden=16)
F, H, W = 3, 4, 6           # latent frames, latent height and width: 18 tokens


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(cfg=SMALL, seed=0):
    """A network that does something: Wan's leaves the head and all biases at zero."""
    torch.manual_seed(seed)
    model = AudioDiT(cfg).eval()
    for p in model.parameters():
        nn.init.normal_(p, mean=float(p.dim() == 1), std=0.15)
    return model


def inputs(B=2, cfg=SMALL):
    """latents, t, identity, audio"""
    shape = (B, cfg.channels, F, H, W)
    audio = rand(B, 4 * F - 3, cfg.audio_layers, cfg.audio_dim, seed=3)
    return rand(*shape, seed=1), torch.tensor([937.5, 625.0])[:B], rand(*shape, seed=2), audio


# ----------------------------------------------------------------------------------- flow matching


def test_the_velocity_leads_to_both_ends_of_the_line():
    """Property (Eq. 1): from any point of the line, the velocity leads to data and noise."""
    x0, eps = rand(2, 2, F, H, W), rand(2, 2, F, H, W, seed=1)
    sigma = torch.tensor([0.02, 0.9375])                                # one a sample
    x, v = dit.add_noise(x0, eps, sigma), dit.velocity(x0, eps)
    torch.testing.assert_close(x[1], 0.0625 * x0[1] + 0.9375 * eps[1])
    torch.testing.assert_close(dit.x0_from_velocity(x, v, sigma), x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(dit.eps_from_velocity(x, v, sigma), eps, atol=1e-5, rtol=0)
    a, b = dit.add_noise(x0, eps, 0.3), dit.add_noise(x0, eps, 0.4)     # v is the derivative
    torch.testing.assert_close((b - a) / 0.1, v, atol=1e-4, rtol=0)


def test_the_score_is_the_gradient_of_the_log_density():
    """Property (Eq. 12): for one known x0, p(x_sigma) is a Gaussian, and autograd agrees."""
    x0, eps, sigma = rand(1, 2, 1, 2, 2), rand(1, 2, 1, 2, 2, seed=1), 0.7
    x = dit.add_noise(x0, eps, sigma).requires_grad_()
    log_p = -((x - (1 - sigma) * x0) ** 2).sum() / (2 * sigma ** 2)
    slope, = torch.autograd.grad(log_p, x)
    torch.testing.assert_close(dit.score_from_velocity(x.detach(), eps - x0, sigma), slope)


def test_the_student_takes_the_steps_of_the_shifted_grid():
    """Property: shift 5 turns 1000, 750, 500, 250 into 1000, 937.5, 833.33, 625."""
    assert [1000 * s for s in student_sigmas()] == pytest.approx([1000, 937.5, 2500 / 3, 625])
    assert dit.shift_sigma(0.5, 1) == 0.5                               # shift 1 changes nothing


def oracle(x0, seen=None):
    """A perfect network: it has the data, so it has the velocity of every point."""
    def model(x, t, identity, audio):
        if seen is not None:
            seen.append((x.clone(), t))
        return (x - x0) / (t / 1000).view(-1, 1, 1, 1, 1)
    return model


@pytest.mark.parametrize("m", [1, 2])
def test_samplers_recover_the_data_from_a_perfect_velocity(m):
    """Property: straight lines need no small steps; with the true velocity both reach x0."""
    x0, noise = rand(1, 2, F, H, W), rand(1, 2, F, H, W, seed=1)
    kappa, audio = x0[:, :, :m], torch.zeros(1, 9, 2, 6)
    for steps in (1, 4):
        generator = torch.Generator().manual_seed(0)
        sigmas = student_sigmas(steps)
        student = sample_student(oracle(x0), noise, noise, audio, kappa, sigmas, generator)
        teacher = sample_teacher(oracle(x0), noise, noise, audio, kappa, steps=steps, guidance=3.0)
        torch.testing.assert_close(student, x0, atol=2e-6, rtol=0)
        torch.testing.assert_close(teacher, x0, atol=2e-6, rtol=0)


def test_kappa_is_clean_in_every_call_and_in_the_result():
    """Property (section 3.2): the network never sees its own version of the continuity latents."""
    wrong, noise = rand(2, 2, F, H, W), rand(2, 2, F, H, W, seed=2)
    kappa = rand(2, 2, 2, H, W, seed=1)
    seen, states = [], []
    model, given = oracle(wrong, seen), (noise, noise, rand(2, 9, 2, 6), kappa)

    def keep(step, x):
        states.append(x)

    student = sample_student(model, *given, student_sigmas(), torch.Generator(), keep)
    teacher = sample_teacher(model, *given, steps=3, guidance=2.0, callback=keep)
    assert len(seen) == 4 + 2 * 3 and len(states) == 4 + 3
    for x in [x for x, _ in seen] + states + [student, teacher]:
        assert torch.equal(x[:, :, :2], kappa)
    assert [t[0].item() for _, t in seen[:4]] == pytest.approx([1000, 937.5, 2500 / 3, 625])
    assert torch.equal(noise, rand(2, 2, F, H, W, seed=2))  # the caller's noise is left alone


def test_the_student_is_renoised_with_fresh_noise():
    """Property: the same seed gives the same bytes; fresh noise is the generator's alone."""
    model, (_, _, identity, audio) = network(), inputs(1)
    noise, kappa = rand(1, 2, F, H, W), rand(1, 2, 1, H, W, seed=1)

    def run(seed, steps=4):
        generator = torch.Generator().manual_seed(seed)
        sigmas = student_sigmas(steps)
        return sample_student(model, noise, identity, audio, kappa, sigmas, generator)

    first = run(0)
    torch.manual_seed(123)
    assert torch.equal(first, run(0))
    assert (first - run(1)).abs().max() > 0.01
    assert torch.equal(run(0, steps=1), run(1, steps=1))    # one step: nothing to noise again
    seen = []
    model = oracle(torch.zeros_like(noise), seen)           # all data is 0: x is sigma * eps
    run(7)
    eps = torch.stack([(x / (t[0] / 1000))[:, :, 1:] for x, t in seen]).flatten(1)
    assert torch.corrcoef(eps).fill_diagonal_(0).abs().max() < 0.3      # four independent draws


def test_guidance_is_written_in_the_conventional_form():
    """Property: uncond + g (cond - uncond); g = 1 is the conditional network, at one call."""
    model, (noise, _, identity, audio) = network(), inputs(1)
    kappa, calls = noise[:, :, :1], []
    model.register_forward_pre_hook(lambda _, args: calls.append(args[3].abs().sum() == 0))

    def run(guidance, features=audio, steps=2):
        calls.clear()
        return sample_teacher(model, noise, identity, features, kappa, steps, guidance=guidance)

    conditional = run(1)
    assert calls == [False, False]
    uncond = run(1, torch.zeros_like(audio))
    torch.testing.assert_close(run(0), uncond)
    assert calls == [False, True, False, True]
    assert (conditional - uncond).abs().max() > 0.01
    one, none, three = run(1, steps=1), run(0, steps=1), run(3, steps=1)
    torch.testing.assert_close(three, none + 3 * (one - none), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------- the network is Wan's


class FixedTokens(nn.Module):
    """Stands where the audio projection stands and hands out given tokens (B, F, S, D)."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens

    def forward(self, features):
        return self.tokens


def to_diffusers(name):
    """Wan2.1's name of a tensor -> the name it has in diffusers."""
    name = name.replace("norm3", "norm2")                   # used between Wan's norm1 and norm2
    embedder = "condition_embedder.time_"
    for ours, theirs in [("time_embedding.0", embedder + "embedder.linear_1"),
                         ("time_embedding.2", embedder + "embedder.linear_2"),
                         ("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2"),
                         ("time_projection.1", embedder + "proj"),
                         ("head.modulation", "scale_shift_table"),
                         ("head.head", "proj_out"), (".modulation", ".scale_shift_table"),
                         ("self_attn", "attn1"), ("cross_attn", "attn2"),
                         (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."),
                         (".o.", ".to_out.0.")]:
        name = name.replace(ours, theirs)
    return name


def test_forward_equals_an_independent_wan():
    """Property: the same weights in diffusers' Wan transformer give the same velocity.

    Every latent has the same audio tokens, so that attending to its own is attending to a prompt;
    F = 3 tests the rotary positions on every axis."""
    diffusers = pytest.importorskip("diffusers")
    model, (latents, t, identity, audio) = network(), inputs()
    theirs = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=20, in_channels=4,
        out_channels=2, text_dim=16, freq_dim=32, ffn_dim=96, num_layers=2, cross_attn_norm=True,
        eps=1e-6,
        qk_norm="rms_norm_across_heads").eval()
    weights = {to_diffusers(k): v for k, v in model.state_dict().items()
               if not k.startswith("audio_proj.")}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and all("text_embedder" in name for name in missing)
    with torch.no_grad():
        prompt = rand(2, 7, 16, seed=4)
        context = theirs.condition_embedder.text_embedder(prompt)       # (B, S, D)
        model.audio_proj = FixedTokens(context[:, None].expand(-1, F, -1, -1))
        ours = model(latents, t, identity, audio)
        other = theirs(torch.cat([latents, identity], 1), t, prompt).sample
    assert ours.std() > 0.3                                 # the comparison is not of zeros
    torch.testing.assert_close(ours, other, atol=1e-4, rtol=0)


def wan_keys(layers):
    """The keys of an official text-to-video checkpoint, spelled out."""
    def both(*names):
        return [f"{name}.{part}" for name in names for part in ("weight", "bias")]

    keys = both("patch_embedding", "time_embedding.0", "time_embedding.2", "time_projection.1",
                "text_embedding.0", "text_embedding.2", "head.head") + ["head.modulation"]
    attention = both("q", "k", "v", "o") + ["norm_q.weight", "norm_k.weight"]
    block = [f"{kind}.{name}" for kind in ("self_attn", "cross_attn") for name in attention]
    block += both("norm3", "ffn.0", "ffn.2") + ["modulation"]
    return {*keys, *(f"blocks.{i}.{name}" for i in range(layers) for name in block)}


def test_full_size_is_wan_1_3b():
    """Property: 30 blocks of 46,440,704 parameters; the 825 official tensors less the text's 4."""
    with torch.device("meta"):                                          # shapes without memory
        model = AudioDiT(PRESETS["wan-1.3b"])
    assert len(model.blocks) == 30
    assert {sum(p.numel() for p in block.parameters()) for block in model.blocks} == {46_440_704}
    names, official = set(model.state_dict()), wan_keys(30)
    assert len(official) == 825
    text_names = {k for k in official if k.startswith("text_embedding.")}
    assert official - names == text_names
    assert {k.split(".")[0] for k in names - official} == {"audio_proj"}
    wan = sum(p.numel() for k, p in model.named_parameters() if not k.startswith("audio_proj."))
    text = 4096 * 1536 + 1536 + 1536 * 1536 + 1536
    assert wan + text - 1536 * 16 * 4 == 1_418_996_800      # the published model, 2C -> C undone
    assert PRESETS["wan-14b"].layers == 40 and PRESETS["wan-14b"].dim == 40 * 128


def official_checkpoint(cfg, layers):
    """A state dict as Wan publishes it, with random numbers."""
    model, D = network(dataclasses.replace(cfg, layers=layers), seed=5), cfg.dim
    state = {k: v.clone() for k, v in model.state_dict().items()
             if not k.startswith("audio_proj.")}
    state["patch_embedding.weight"] = state["patch_embedding.weight"][:, :cfg.channels].clone()
    state |= {"text_embedding.0.weight": rand(D, 11), "text_embedding.0.bias": rand(D),
              "text_embedding.2.weight": rand(D, D), "text_embedding.2.bias": rand(D)}
    assert set(state) == wan_keys(layers)
    return state


def test_an_official_checkpoint_loads_and_the_identity_starts_without_effect():
    """Property: all that has a home is loaded; the widened half is zero: no effect at first."""
    state, model = official_checkpoint(SMALL, 2), network()
    before = model.audio_proj.norm.weight.clone()
    report = dit.load_wan_checkpoint(model, state)
    own = model.state_dict()
    for name, tensor in state.items():
        if name in own and name != "patch_embedding.weight":
            assert torch.equal(own[name], tensor), name
    assert torch.equal(own["patch_embedding.weight"][:, :2], state["patch_embedding.weight"])
    assert torch.equal(model.audio_proj.norm.weight, before)
    latents, t, identity, audio = inputs()
    with torch.no_grad():
        other = model(latents, t, -3 * identity, audio)
        assert torch.equal(model(latents, t, identity, audio), other)
    loaded, widened, new, unused = report.splitlines()
    assert f"{len(state) - 5}" in loaded and "patch_embedding.weight" in widened
    assert "audio_proj.norm.weight" in new and "blocks" not in new
    assert unused.count("text_embedding") == 4


def test_the_identity_comes_second_in_the_channels():
    """Property: Eq. 4's order is [noisy | identity]: the first C channels are noisy."""
    model, (latents, t, identity, audio) = network(), inputs()
    with torch.no_grad():
        model.patch_embedding.weight[:, :2] = 0
        blind = model(latents, t, identity, audio)
        assert torch.equal(blind, model(-latents, t, identity, audio))
        assert (blind - model(latents, t, -identity, audio)).abs().max() > 0.01


@pytest.mark.parametrize("name", ["blocks.1.ffn.0.weight", "patch_embedding.weight"])
def test_a_wrong_checkpoint_is_named_and_changes_nothing(name):
    """Property: a tensor of the wrong size, or none, is refused by name; nothing is loaded."""
    state, model = official_checkpoint(SMALL, 2), network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wrong = state | {name: rand(3, *state[name].shape[1:])}
    with pytest.raises(ValueError, match=name):
        dit.load_wan_checkpoint(model, wrong)
    with pytest.raises(ValueError, match=f"{name} is missing"):
        dit.load_wan_checkpoint(model, {k: v for k, v in state.items() if k != name})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --------------------------------------------------------------------------- audio, time, training


def test_a_latent_attends_to_its_own_audio_tokens_only():
    """Property: other audio for latent 1 changes the tokens of latent 1 only."""
    torch.manual_seed(0)
    block = Block(SMALL)
    for p in block.self_attn.o.parameters():                # close the other path between latents
        nn.init.zeros_(p)
    x, e, tokens = rand(2, F * 6, 80), rand(2, 6, 80, seed=1), rand(2, F, 5, 80, seed=2)
    changed = tokens.clone()
    changed[:, 1] += rand(2, 5, 80, seed=3)
    rope = dit.rope_table(F, H // 2, W // 2, 20)
    with torch.no_grad():
        moved = block(x, e, rope, changed) - block(x, e, rope, tokens)
    moved = moved.view(2, F, 6, 80).abs().amax((0, 2, 3))
    assert moved[1] > 0.01 and moved[0] == 0 and moved[2] == 0


def test_a_frame_of_audio_reaches_two_latents():
    """Property: frame 5 is in the window of latent 1 (frames -1..6) and of latent 2 (3..10)."""
    model = network()
    audio = inputs()[3]
    changed = audio.clone()
    changed[:, 5] += 1
    with torch.no_grad():
        moved = (model.audio_proj(changed) - model.audio_proj(audio)).abs().amax((0, 2, 3))
    assert moved[0] == 0 and moved[1] > 0 and moved[2] > 0


def test_positions_matter_only_relative_to_each_other():
    """Property: moving both tokens changes no attention score; swapping two axes does."""
    d = 20
    q, k = rand(1, 1, 1, d), rand(1, 1, 1, d, seed=1)
    table = dit.rope_table(4, 3, 3, d).view(4, 3, 3, 1, 1, d // 2)

    def score(a, b):
        return (dit.rotate(q, table[a]) * dit.rotate(k, table[b])).sum().item()

    assert score((0, 0, 0), (1, 2, 1)) == pytest.approx(score((2, 0, 1), (3, 2, 2)), abs=1e-5)
    assert abs(score((0, 0, 0), (1, 2, 1)) - score((0, 0, 0), (1, 1, 2))) > 1e-3


def test_a_window_is_a_small_picture():
    """Property: attention within a window does not depend on where in the picture it lies."""
    q, k = torch.randn(2, 1, 4 * 9, 1, 20)
    whole = dit.rope_table(4, 6, 6, 20).view(4, 6, 6, 1, 10)

    def scores(table):
        return torch.einsum("bnhd,bmhd->bnm", dit.rotate(q, table), dit.rotate(k, table))

    alone = scores(dit.rope_table(4, 3, 3, 20))
    for y, x in ((0, 3), (2, 1)):
        window = whole[:, y:y + 3, x:x + 3].reshape(36, 1, 10)
        assert torch.allclose(scores(window), alone, atol=1e-4)


def test_time_is_never_rounded_to_bfloat16():
    """Property: bfloat16 has no number between 936 and 940, so the time path stays in float32."""
    model = network()
    t = torch.tensor([937.5, 936.0])
    e, e0 = model.embed_time(t)
    with torch.autocast("cpu", torch.bfloat16):
        e_cast, e0_cast = model.embed_time(t)
    assert e_cast.dtype == e0_cast.dtype == torch.float32
    assert torch.equal(e, e_cast) and torch.equal(e0, e0_cast)
    assert (e[0] - e[1]).abs().max() > 0.05
    with pytest.raises(ValueError, match="float32"):
        model.embed_time(t.bfloat16())


def test_cosines_come_before_sines():
    """Property: Wan's time encoding at t = 0 is ones, then zeros."""
    assert dit.sinusoid(torch.zeros(1), 8).tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize("how", ["autocast", "cast_matrices"])
def test_bfloat16_is_close_to_float32(how):
    """Property: both ways into bfloat16 keep the residual stream in float32."""
    model, args = network(), inputs()
    with torch.no_grad():
        exact = model(*args)
        if how == "cast_matrices":
            model.cast_matrices(torch.bfloat16)
            assert model.head.head.weight.dtype == torch.float32
            assert model.time_projection[1].weight.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            kinds = []
            model.blocks[0].register_forward_hook(lambda _, args, out: kinds.append(out.dtype))
            rough = model(*args)
    assert kinds == [torch.float32] and rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.05 * exact.abs().max()


def test_an_untrained_network_predicts_nothing():
    """Property: the head starts at zero, so at first every velocity is 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        assert AudioDiT(SMALL)(*inputs()).abs().max() == 0


def test_checkpointing_trades_time_for_memory_and_nothing_else():
    """Property: recomputing the blocks in the backward pass gives the same gradients."""
    model, args = network(), inputs()
    with torch.inference_mode():
        model(*args)                                        # makes the table of rotary positions
    calls, grads = [], []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(*args).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert len(calls) == 1 + 2                              # the block did run a second time
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)
    assert all(g.abs().max() > 0 for g in grads[0][:-1])


@pytest.mark.parametrize("wrong", ["identity", "audio", "odd"])
def test_shapes_that_do_not_fit_are_refused(wrong):
    """Property: one clear sentence instead of an error from inside PyTorch."""
    latents, t, identity, audio = inputs()
    if wrong == "identity":
        identity = identity[:, :, :1]
    elif wrong == "audio":
        audio = audio[:, :-1]
    else:
        latents, identity = latents[..., :-1], identity[..., :-1]
    with pytest.raises(ValueError, match="must"):
        network()(latents, t, identity, audio)
    with pytest.raises(ValueError, match="heads"):
        AudioDiT(dataclasses.replace(SMALL, heads=3))


