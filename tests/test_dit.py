"""The laws of dit.py: what the flow-matching equations promise, and that the network is Wan2.1's own."""
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
    """A network that does something: Wan's initialisation leaves the head and all biases at zero."""
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


# ---------------------------------------------------------------------------------------------- flow matching


def test_the_velocity_leads_to_both_ends_of_the_line():
    """Eq. 1: from any point of the line, the velocity tells the data and the noise exactly."""
    x0, eps = rand(2, 2, F, H, W), rand(2, 2, F, H, W, seed=1)
    sigma = torch.tensor([0.02, 0.9375])                                # one a sample
    x, v = dit.add_noise(x0, eps, sigma), dit.velocity(x0, eps)
    torch.testing.assert_close(x[1], 0.0625 * x0[1] + 0.9375 * eps[1])
    torch.testing.assert_close(dit.x0_from_velocity(x, v, sigma), x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(dit.eps_from_velocity(x, v, sigma), eps, atol=1e-5, rtol=0)
    a, b = dit.add_noise(x0, eps, 0.3), dit.add_noise(x0, eps, 0.4)     # v is the derivative along the line
    torch.testing.assert_close((b - a) / 0.1, v, atol=1e-4, rtol=0)


def test_the_score_is_the_gradient_of_the_log_density():
    """Eq. 12 against calculus: for one known x0, p(x_sigma) is a Gaussian and autograd knows its slope."""
    x0, eps, sigma = rand(1, 2, 1, 2, 2), rand(1, 2, 1, 2, 2, seed=1), 0.7
    x = dit.add_noise(x0, eps, sigma).requires_grad_()
    log_p = -((x - (1 - sigma) * x0) ** 2).sum() / (2 * sigma ** 2)
    slope, = torch.autograd.grad(log_p, x)
    torch.testing.assert_close(dit.score_from_velocity(x.detach(), eps - x0, sigma), slope)


def test_what_the_linear_guess_leaves_of_the_velocity_is_for_the_references_to_tell():
    """Law of least squares: data = what is known + what is open. Of the latter x has nothing more to say, once the guess is taken off."""
    known, opened, eps = (rand(2, 1, 1, 100, 100, seed=seed) for seed in range(3))
    sigma = torch.tensor([0.3, 0.9])
    x0 = known + 0.5 * opened                                           # variance 0.25
    x, v = dit.add_noise(x0, eps, sigma), dit.velocity(x0, eps)
    seen = x - dit.add_noise(known, 0 * eps, sigma)                     # what x shows of it, and noise
    rest = v - dit.linear_velocity(x, sigma, 0.25)
    assert (rest * seen).mean((1, 2, 3, 4)).abs().max() < 0.03 < 0.1 < (v * seen).mean((1, 2, 3, 4)).abs().min()
    assert torch.equal(dit.linear_velocity(x, 1.0, 0.25), x) and torch.equal(dit.linear_velocity(x, 0.0, 0.25), -x)


def test_with_a_skip_the_network_says_what_the_linear_guess_leaves():
    """The guess is added to what the same weights would say without; Wan's sizes have none."""
    latents, t, identity, audio = inputs()
    with torch.no_grad():
        plain, with_skip = (network(dataclasses.replace(SMALL, skip=skip))(latents, t, identity, audio) for skip in (0.0, 0.15))
    torch.testing.assert_close(with_skip - plain, dit.linear_velocity(latents, t / 1000, 0.15), atol=1e-5, rtol=1e-4)
    assert not any(cfg.skip for name, cfg in PRESETS.items() if name.startswith("wan"))


def test_the_small_preset_is_one():
    """What is small agrees about the latents and the skip, in the VAE, the network, its training and in what is shipped."""
    import json
    from pathlib import Path

    import train_teacher
    import vae
    shipped = json.loads((Path(dit.__file__).parent / "weights/tiny/config.json").read_text(encoding="utf-8"))
    tiny = PRESETS["tiny"]
    assert dataclasses.asdict(tiny) == shipped["dit"] and tiny.skip == train_teacher.PRESETS["tiny"].skip
    assert tiny.channels == vae.PRESETS["tiny"].z_dim == shipped["vae"]["z_dim"] and vae.PRESETS["tiny"].moving == shipped["vae"]["moving"]


def test_the_student_takes_the_steps_of_the_shifted_grid():
    """Shift 5 turns 1000, 750, 500, 250 into 1000, 937.5, 833.33, 625. Forgetting it is common."""
    assert [1000 * s for s in student_sigmas()] == pytest.approx([1000, 937.5, 2500 / 3, 625])
    assert dit.shift_sigma(0.5, 1) == 0.5                               # shift 1 changes nothing


def oracle(x0, seen=None):
    """A perfect network: it knows the data, so it knows the velocity of every point."""
    def model(x, t, identity, audio):
        if seen is not None:
            seen.append((x.clone(), t))
        return (x - x0) / (t / 1000).view(-1, 1, 1, 1, 1)
    return model


@pytest.mark.parametrize("m", [1, 2])
def test_samplers_recover_the_data_from_a_perfect_velocity(m):
    """Straight lines need no small steps: with the true velocity both samplers reach x0, in 4 steps or 1."""
    x0, noise = rand(1, 2, F, H, W), rand(1, 2, F, H, W, seed=1)
    kappa, audio = x0[:, :, :m], torch.zeros(1, 9, 2, 6)
    for steps in (1, 4):
        generator = torch.Generator().manual_seed(0)
        student = sample_student(oracle(x0), noise, noise, audio, kappa, student_sigmas(steps), generator)
        teacher = sample_teacher(oracle(x0), noise, noise, audio, kappa, steps=steps, guidance=3.0)
        torch.testing.assert_close(student, x0, atol=2e-6, rtol=0)
        torch.testing.assert_close(teacher, x0, atol=2e-6, rtol=0)


def test_the_head_is_clean_in_every_call_and_in_the_result():
    """Section 3.2: the network never sees its own idea of the continuity latents; nor does anyone else."""
    wrong, kappa, noise = rand(2, 2, F, H, W), rand(2, 2, 2, H, W, seed=1), rand(2, 2, F, H, W, seed=2)
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
    assert torch.equal(noise, rand(2, 2, F, H, W, seed=2))              # and the caller's noise is left alone


def test_the_student_is_renoised_with_fresh_noise():
    """Same seed, same bytes; another seed, another video. The fresh noise is the given generator's alone."""
    model, (_, _, identity, audio) = network(), inputs(1)
    noise, kappa = rand(1, 2, F, H, W), rand(1, 2, 1, H, W, seed=1)

    def run(seed, steps=4):
        generator = torch.Generator().manual_seed(seed)
        return sample_student(model, noise, identity, audio, kappa, student_sigmas(steps), generator)

    first = run(0)
    torch.manual_seed(123)
    assert torch.equal(first, run(0))
    assert (first - run(1)).abs().max() > 0.01
    assert torch.equal(run(0, steps=1), run(1, steps=1))                # one step: nothing to re-noise
    seen = []
    model = oracle(torch.zeros_like(noise), seen)                       # all data is 0: x is sigma * eps
    run(7)
    eps = torch.stack([(x / (t[0] / 1000))[:, :, 1:] for x, t in seen]).flatten(1)
    assert torch.corrcoef(eps).fill_diagonal_(0).abs().max() < 0.3      # four draws, unrelated to each other


def test_guidance_is_written_in_the_conventional_form():
    """uncond + g (cond - uncond): g = 1 is the conditional network, at one call; g = 0 is the deaf one."""
    model, (noise, _, identity, audio) = network(), inputs(1)
    kappa, calls = noise[:, :, :1], []
    model.register_forward_pre_hook(lambda module, args: calls.append(args[3].abs().sum().item() == 0))

    def run(guidance, heard=audio, steps=2):
        calls.clear()
        return sample_teacher(model, noise, identity, heard, kappa, steps, guidance=guidance)

    conditional = run(1)
    assert calls == [False, False]
    deaf = run(1, torch.zeros_like(audio))
    torch.testing.assert_close(run(0), deaf)
    assert calls == [False, True, False, True]
    assert (conditional - deaf).abs().max() > 0.01
    one, none, three = run(1, steps=1), run(0, steps=1), run(3, steps=1)
    torch.testing.assert_close(three, none + 3 * (one - none), atol=1e-4, rtol=1e-4)


def test_guidance_can_be_kept_to_where_the_sound_is_heard():
    """Where the sound changes a token much, it is guided; where it changes it by chance, hardly; where kappa is, not at all. focus 0: everywhere."""
    v, x, z = (rand(1, 2, 4, 16, 16, seed=seed) for seed in range(3))
    sound = 0.3 * torch.ones_like(v)
    sound[..., 6:8, 4:6] = 3.0                                          # one token of 64: the lips
    predicted = torch.tensor([0.0, 1, 1, 1]).view(1, 1, 4, 1, 1)
    added = dit.guided_velocity(v, v - sound, x, 0.7, z, predicted, guidance=3, focus=16) - v
    assert not added[:, :, 0].any()
    torch.testing.assert_close(added[:, :, 1:, 6:8, 4:6], torch.full((1, 2, 3, 2, 2), 6.0), atol=0.1, rtol=0)
    added[..., 6:8, 4:6] = 0
    assert 0 < added.abs().max() < 0.01                                 # 0.6 by guidance everywhere
    everywhere = dit.guided_velocity(v, v - sound, x, 0.7, z, predicted, guidance=3, focus=0)
    torch.testing.assert_close(everywhere - v, 2 * predicted * sound)


def test_a_row_is_guided_by_its_own_sound_and_noise_level():
    """Rows of a batch, some with a long kappa, some with a short one, are what each is alone; the sampler's step is that of guided_velocity."""
    v, deaf, x, z = (rand(3, 2, 4, 16, 16, seed=seed) * (1 + 3 * torch.arange(3).view(3, 1, 1, 1, 1)) for seed in range(4))
    sigma, predicted = torch.tensor([1.0, 0.85, 0.4]), torch.ones(3, 1, 4, 1, 1)
    predicted[0, :, :1], predicted[1:, :, :3] = 0, 0
    together = dit.guided_velocity(v, deaf, x, sigma, z, predicted, 3.0, 4.0, 2.0)
    for i in range(3):
        row = slice(i, i + 1)
        alone = dit.guided_velocity(v[row], deaf[row], x[row], sigma[i].item(), z[row], predicted[row], 3.0, 4.0, 2.0)
        torch.testing.assert_close(together[row], alone)
    model, (noise, _, identity, audio) = network(), inputs(1)
    kappa = identity[:, :, :1]
    x, free = dit.replace_head(noise, kappa), torch.tensor([0.0, 1, 1]).view(1, 1, 3, 1, 1)
    with torch.no_grad():
        v, deaf = (dit.predict(model, x, 1.0, identity, sound) for sound in (audio, 0 * audio))
    guided = dit.guided_velocity(v, deaf, x, 1.0, identity, free, 3.0, 4.0, 2.0)
    sampled = sample_teacher(model, noise, identity, audio, kappa, 1, guidance=3.0, focus=4.0, liveliness=2.0)
    torch.testing.assert_close(sampled, dit.replace_head(x - guided, kappa))


def test_liveliness_makes_larger_what_differs_from_the_still_portrait():
    """A network that says half of a motion, and twice of that: the motion itself. Only in noise, not at kappa, not where the sound is heard."""
    z, motion, eps = (rand(1, 2, 4, 16, 16, seed=seed) for seed in range(3))
    sound, predicted = torch.zeros_like(z), torch.tensor([0.0, 1, 1, 1]).view(1, 1, 4, 1, 1)
    sound[..., 6:8, 4:6] = 1.0
    for sigma, share in ((1.0, 1.0), (0.8, 1.0), (0.79, 0.5)):           # of the motion that is said
        x = dit.add_noise(z, eps, sigma)
        v = (x - (z + motion / 2)) / sigma
        x0 = dit.x0_from_velocity(x, dit.guided_velocity(v, v - sound, x, sigma, z, predicted, 1.0, 1e-6, liveliness=2.0), sigma)
        said = (x0 - z) / motion
        assert torch.allclose(said[:, :, 0], torch.tensor(0.5), atol=1e-2) and torch.allclose(said[..., 6:8, 4:6], torch.tensor(0.5), atol=1e-2)
        assert torch.allclose(said[:, :, 1:, :6], torch.tensor(share), atol=1e-2)
    usual = dit.guided_velocity(v, v - sound, x, 1.0, z, predicted, 2.0, 0.0, liveliness=2.0)
    torch.testing.assert_close(usual, v + predicted * sound)            # guided everywhere: nothing is left to be livelier



# --------------------------------------------------------------------------------------- the network is Wan's


class FixedTokens(nn.Module):
    """Stands where the audio projection stands and hands out given tokens (B, F, S, D)."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens

    def forward(self, features):
        return self.tokens


def to_diffusers(name):
    """Wan2.1's name of a tensor -> the name it has in diffusers."""
    name = name.replace("norm3", "norm2")                               # used between Wan's norm1 and norm2
    embedder = "condition_embedder.time_"
    for ours, theirs in [("time_embedding.0", embedder + "embedder.linear_1"), ("ffn.0", "ffn.net.0.proj"),
                         ("time_embedding.2", embedder + "embedder.linear_2"), ("ffn.2", "ffn.net.2"),
                         ("time_projection.1", embedder + "proj"), ("head.modulation", "scale_shift_table"),
                         ("head.head", "proj_out"), (".modulation", ".scale_shift_table"),
                         ("self_attn", "attn1"), ("cross_attn", "attn2"),
                         (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."), (".o.", ".to_out.0.")]:
        name = name.replace(ours, theirs)
    return name


def test_forward_equals_an_independent_wan():
    """Same weights into diffusers' Wan transformer: same velocity. Every latent is given the same tokens, so
    attending to one's own is attending to the prompt; F = 3 tests the rotary positions on every axis."""
    diffusers = pytest.importorskip("diffusers")
    model, (latents, t, identity, audio) = network(), inputs()
    theirs = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=20, in_channels=4, out_channels=2,
        text_dim=16, freq_dim=32, ffn_dim=96, num_layers=2, cross_attn_norm=True, eps=1e-6,
        qk_norm="rms_norm_across_heads").eval()
    weights = {to_diffusers(k): v for k, v in model.state_dict().items() if not k.startswith("audio_proj.")}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and all("text_embedder" in name for name in missing)
    with torch.no_grad():
        prompt = rand(2, 7, 16, seed=4)
        context = theirs.condition_embedder.text_embedder(prompt)       # (B, S, D)
        model.audio_proj = FixedTokens(context[:, None].expand(-1, F, -1, -1))
        ours = model(latents, t, identity, audio)
        other = theirs(torch.cat([latents, identity], 1), t, prompt).sample
    assert ours.std() > 0.3                                             # the comparison is not of zeros
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
    """30 blocks of 46,440,704 parameters; the 825 official tensors less the text's 4; audio_proj is new."""
    with torch.device("meta"):                                          # shapes without memory
        model = AudioDiT(PRESETS["wan-1.3b"])
    assert len(model.blocks) == 30
    assert {sum(p.numel() for p in block.parameters()) for block in model.blocks} == {46_440_704}
    names, official = set(model.state_dict()), wan_keys(30)
    assert len(official) == 825
    assert {k for k in official if k not in names} == {k for k in official if k.startswith("text_embedding.")}
    assert {k.split(".")[0] for k in names - official} == {"audio_proj"}
    wan = sum(p.numel() for k, p in model.named_parameters() if not k.startswith("audio_proj."))
    text = 4096 * 1536 + 1536 + 1536 * 1536 + 1536
    assert wan + text - 1536 * 16 * 4 == 1_418_996_800                  # the published model, 2C -> C undone
    assert PRESETS["wan-14b"].layers == 40 and PRESETS["wan-14b"].dim == 40 * 128


def official_checkpoint(cfg, layers):
    """A state dict as Wan publishes it, with random numbers."""
    model, D = network(dataclasses.replace(cfg, layers=layers), seed=5), cfg.dim
    state = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("audio_proj.")}
    state["patch_embedding.weight"] = state["patch_embedding.weight"][:, :cfg.channels].clone()
    state |= {"text_embedding.0.weight": rand(D, 11), "text_embedding.0.bias": rand(D),
              "text_embedding.2.weight": rand(D, D), "text_embedding.2.bias": rand(D)}
    assert set(state) == wan_keys(layers)
    return state


def test_an_official_checkpoint_loads_and_the_identity_starts_silent():
    """Everything with a home is loaded; the widened half is zero, so at first the identity is mute."""
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
        assert torch.equal(model(latents, t, identity, audio), model(latents, t, -3 * identity, audio))
    loaded, widened, new, unused = report.splitlines()
    assert f"{len(state) - 5}" in loaded and "patch_embedding.weight" in widened
    assert "audio_proj.norm.weight" in new and "blocks" not in new
    assert unused.count("text_embedding") == 4


def test_the_identity_comes_second_in_the_channels():
    """Eq. 4's order is [noisy | identity]: the first C input channels read the noisy latents."""
    model, (latents, t, identity, audio) = network(), inputs()
    with torch.no_grad():
        model.patch_embedding.weight[:, :2] = 0
        blind = model(latents, t, identity, audio)
        assert torch.equal(blind, model(-latents, t, identity, audio))
        assert (blind - model(latents, t, -identity, audio)).abs().max() > 0.01


@pytest.mark.parametrize("name", ["blocks.1.ffn.0.weight", "patch_embedding.weight"])
def test_a_wrong_checkpoint_is_named_and_changes_nothing(name):
    """A tensor of the wrong size, or none, is refused by its name, before anything is loaded."""
    state, model = official_checkpoint(SMALL, 2), network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wrong = state | {name: rand(3, *state[name].shape[1:])}
    with pytest.raises(ValueError, match=name):
        dit.load_wan_checkpoint(model, wrong)
    with pytest.raises(ValueError, match=f"{name} is missing"):
        dit.load_wan_checkpoint(model, {k: v for k, v in state.items() if k != name})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# -------------------------------------------------------------------------------------- audio, time, training


def test_a_latent_hears_only_its_own_tokens():
    """Cross-attention is per latent frame: new audio for latent 1 changes the tokens of latent 1 only."""
    torch.manual_seed(0)
    block = Block(SMALL)
    for p in block.self_attn.o.parameters():                    # silence the other path between latents
        nn.init.zeros_(p)
    x, e, tokens = rand(2, F * 6, 80), rand(2, 6, 80, seed=1), rand(2, F, 5, 80, seed=2)
    changed = tokens.clone()
    changed[:, 1] += rand(2, 5, 80, seed=3)
    rope = dit.rope_table(F, H // 2, W // 2, 20)
    with torch.no_grad():
        moved = block(x, e, rope, changed) - block(x, e, rope, tokens)
    moved = moved.view(2, F, 6, 80).abs().amax((0, 2, 3))
    assert moved[1] > 0.01 and moved[0] == 0 and moved[2] == 0


def test_a_frame_of_sound_reaches_two_latents():
    """Through the whole projection: frame 5 is heard by latent 1 (frames -1..6) and 2 (3..10)."""
    model = network()
    audio = inputs()[3]
    changed = audio.clone()
    changed[:, 5] += 1
    with torch.no_grad():
        moved = (model.audio_proj(changed) - model.audio_proj(audio)).abs().amax((0, 2, 3))
    assert moved[0] == 0 and moved[1] > 0 and moved[2] > 0


def test_positions_matter_only_relative_to_each_other():
    """Rotary positions: moving both tokens changes no attention score; swapping two axes does."""
    d = 20
    q, k = rand(1, 1, 1, d), rand(1, 1, 1, d, seed=1)
    table = dit.rope_table(4, 3, 3, d).view(4, 3, 3, 1, 1, d // 2)

    def score(a, b):
        return (dit.rotate(q, table[a]) * dit.rotate(k, table[b])).sum().item()

    assert score((0, 0, 0), (1, 2, 1)) == pytest.approx(score((2, 0, 1), (3, 2, 2)), abs=1e-5)
    assert abs(score((0, 0, 0), (1, 2, 1)) - score((0, 0, 0), (1, 1, 2))) > 1e-3


def test_a_window_is_a_small_picture():
    """Rotary positions are relative: what tokens of a window say to each other does not depend on where in the picture it lies."""
    q, k = torch.randn(2, 1, 4 * 9, 1, 20)
    whole = dit.rope_table(4, 6, 6, 20).view(4, 6, 6, 1, 10)
    scores = [torch.einsum("bnhd,bmhd->bnm", dit.rotate(q, t), dit.rotate(k, t)) for t in
              (dit.rope_table(4, 3, 3, 20), *(whole[:, y:y + 3, x:x + 3].reshape(36, 1, 10) for y, x in ((0, 3), (2, 1))))]
    assert torch.allclose(scores[0], scores[1], atol=1e-4) and torch.allclose(scores[0], scores[2], atol=1e-4)


def test_time_is_never_rounded_to_bfloat16():
    """bfloat16 has no number between 936 and 940: even under autocast the time path must stay float32."""
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
    """Wan's time encoding at t = 0 is ones, then zeros; the other order is another network."""
    assert dit.sinusoid(torch.zeros(1), 8).tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize("how", ["autocast", "cast_matrices"])
def test_bfloat16_is_close_to_float32(how):
    """Both ways into bfloat16 keep the sum of all blocks in float32, so only single products lose digits."""
    model, args = network(), inputs()
    with torch.no_grad():
        exact = model(*args)
        if how == "cast_matrices":
            model.cast_matrices(torch.bfloat16)
            assert model.head.head.weight.dtype == model.time_projection[1].weight.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            kinds = []
            model.blocks[0].register_forward_hook(lambda module, args, out: kinds.append(out.dtype))
            rough = model(*args)
    assert kinds == [torch.float32] and rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.05 * exact.abs().max()


def test_an_untrained_network_predicts_nothing():
    """The head starts at zero: at first every velocity is 0, and no sample is pushed anywhere."""
    torch.manual_seed(0)
    with torch.no_grad():
        assert AudioDiT(SMALL)(*inputs()).abs().max() == 0


def test_checkpointing_trades_time_for_memory_and_nothing_else():
    """Recomputing the blocks in the backward pass gives the same gradients, also after inference."""
    model, args = network(), inputs()
    with torch.inference_mode():
        model(*args)                                                    # makes the table of rotary positions
    calls, grads = [], []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(*args).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert len(calls) == 1 + 2                                          # the block did run a second time
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)
    assert all(g.abs().max() > 0 for g in grads[0][:-1])


@pytest.mark.parametrize("wrong", ["identity", "audio", "odd"])
def test_shapes_that_do_not_fit_are_refused(wrong):
    """One clear sentence instead of an error from the depths."""
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


def test_a_network_for_more_channels_begins_as_the_old_one():
    """Law: widened, it says of the old channels what it said, of the new ones 0; it can see them, and has a gradient to learn with."""
    model, wide = network(), AudioDiT(dataclasses.replace(SMALL, channels=5)).eval()
    wide.load_state_dict(dit.widen(model.state_dict(), wide.state_dict()))
    z, identity = rand(2, 5, F, H, W), rand(2, 5, F, H, W, seed=1)
    t, audio = torch.tensor([100.0, 900.0]), rand(2, 4 * F - 3, 2, 6, seed=2)
    with torch.no_grad():
        old, new = model(z[:, :2], t, identity[:, :2], audio), wide(z.where(torch.arange(5).view(5, 1, 1, 1) < 2, 0),
                                                                    t, identity.where(torch.arange(5).view(5, 1, 1, 1) < 2, 0), audio)
    assert torch.allclose(new[:, :2], old, atol=1e-5) and old.abs().max() > 0.1 and not new[:, 2:].any()
    (wide(z, t, identity, audio)[:, 2:] - z[:, 2:]).square().sum().backward()
    gain = wide.head.head.weight.grad.view(4, 5, -1)[:, 2:] @ wide.patch_embedding.weight.detach().flatten(1)  # what its new rows begin to read
    assert gain.unflatten(-1, (2, 5, 4))[..., 0, 2:, :].abs().mean() > 0.01 * gain.abs().mean()
    same = dit.widen(model.state_dict(), network(seed=1).state_dict())
    assert all(torch.equal(tensor, same[name]) for name, tensor in model.state_dict().items())
