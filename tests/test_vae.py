"""Laws of the causal VAE, each with the sentence it teaches."""
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

import train_vae as T
from linear import blocks, principal_components, within
from vae import PRESETS, CausalConv3d, VAEConfig, WanVAE, load_vae

SMALL = VAEConfig(dim=8, z_dim=4, latents_mean=(0.1, -0.2, 0.3, 0.0), latents_std=(1.5, 0.5, 2.0, 1.0))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    vae = WanVAE(SMALL).eval()
    for p in vae.parameters():                          # Wan starts some layers at zero; a law should hold for any weights
        torch.nn.init.normal_(p, std=0.15) if p.dim() > 1 and p.numel() > p.shape[0] else None
    return vae


@pytest.fixture(scope="module")
def clip():
    return torch.rand(1, 3, 37, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def wan_tensors():
    """Every tensor of the official Wan2.1_VAE.pth, from the layer table of the paper's VAE: name -> shape."""
    out = {}

    def conv(name, c_out, c_in, *kernel):
        out[name + ".weight"], out[name + ".bias"] = (c_out, c_in, *kernel), (c_out,)

    def res(name, c_in, c_out):
        out[f"{name}.residual.0.gamma"], out[f"{name}.residual.3.gamma"] = (c_in, 1, 1, 1), (c_out, 1, 1, 1)
        conv(f"{name}.residual.2", c_out, c_in, 3, 3, 3)
        conv(f"{name}.residual.6", c_out, c_out, 3, 3, 3)
        if c_in != c_out:
            conv(f"{name}.shortcut", c_out, c_in, 1, 1, 1)

    conv("encoder.conv1", 96, 3, 3, 3, 3)
    for i, (a, b) in {0: (96, 96), 1: (96, 96), 3: (96, 192), 4: (192, 192), 6: (192, 384), 7: (384, 384), 9: (384, 384), 10: (384, 384)}.items():
        res(f"encoder.downsamples.{i}", a, b)
    for i, c in {2: 96, 5: 192, 8: 384}.items():
        conv(f"encoder.downsamples.{i}.resample.1", c, c, 3, 3)
        if i > 2:
            conv(f"encoder.downsamples.{i}.time_conv", c, c, 3, 1, 1)
    conv("decoder.conv1", 384, 16, 3, 3, 3)
    for i, (a, b) in {**{i: (384, 384) for i in (0, 1, 2, 5, 6)}, 4: (192, 384), **{i: (192, 192) for i in (8, 9, 10)},
                      **{i: (96, 96) for i in (12, 13, 14)}}.items():
        res(f"decoder.upsamples.{i}", a, b)
    for i, c in {3: 384, 7: 384, 11: 192}.items():
        conv(f"decoder.upsamples.{i}.resample.1", c // 2, c, 3, 3)
        if i < 11:
            conv(f"decoder.upsamples.{i}.time_conv", 2 * c, c, 3, 1, 1)
    for side in ("encoder", "decoder"):
        res(f"{side}.middle.0", 384, 384)
        res(f"{side}.middle.2", 384, 384)
        out[f"{side}.middle.1.norm.gamma"] = (384, 1, 1)
        conv(f"{side}.middle.1.to_qkv", 1152, 384, 1, 1)
        conv(f"{side}.middle.1.proj", 384, 384, 1, 1)
    out["encoder.head.0.gamma"], out["decoder.head.0.gamma"] = (384, 1, 1, 1), (96, 1, 1, 1)
    conv("encoder.head.2", 32, 384, 3, 3, 3)
    conv("decoder.head.2", 3, 96, 3, 3, 3)
    conv("conv1", 32, 32, 1, 1, 1)
    conv("conv2", 16, 16, 1, 1, 1)
    return out


def test_official_state_dict_loads_strictly():
    """The network is Wan2.1's, tensor by tensor: 194 of them, 126,892,531 numbers."""
    wanted = wan_tensors()
    with torch.device("meta"):
        vae = WanVAE(PRESETS["wan2.1"])
    assert len(wanted) == 194 and sum(p.numel() for p in vae.parameters()) == 126_892_531
    vae.load_state_dict({k: torch.empty(s, device="meta") for k, s in wanted.items()}, strict=True)


def diffusers_key(k):
    for a, b in (("encoder.conv1", "encoder.conv_in"), ("decoder.conv1", "decoder.conv_in"), (".head.0", ".norm_out"), (".head.2", ".conv_out"),
                 (".middle.0", ".mid_block.resnets.0"), (".middle.1", ".mid_block.attentions.0"), (".middle.2", ".mid_block.resnets.1"),
                 (".residual.0", ".norm1"), (".residual.2", ".conv1"), (".residual.3", ".norm2"), (".residual.6", ".conv2"),
                 (".shortcut", ".conv_shortcut"), ("encoder.downsamples", "encoder.down_blocks")):
        k = k.replace(a, b)
    if k.startswith("decoder.upsamples."):
        n, rest = k.removeprefix("decoder.upsamples.").split(".", 1)
        k = f"decoder.up_blocks.{int(n) // 4}." + (f"resnets.{int(n) % 4}" if int(n) % 4 < 3 else "upsamplers.0") + "." + rest
    return {"conv1": "quant_conv", "conv2": "post_quant_conv"}.get(k.split(".")[0], k.split(".")[0]) + k[len(k.split(".")[0]):]


def test_equals_an_independent_implementation(small, clip):
    """diffusers wrote the same network with a cache of its own: same weights, same latents, same frames."""
    diffusers = pytest.importorskip("diffusers")
    other = diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).eval()
    other.load_state_dict({diffusers_key(k): v for k, v in small.state_dict().items()}, strict=True)
    mean, std = small.stats[0], small.stats[1]
    with torch.no_grad():
        ours, theirs = small.encode(clip), (other.encode(clip).latent_dist.mode() - mean) / std
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(small.decode(ours), other.decode(ours * std + mean).sample, atol=1e-5, rtol=1e-5)


def test_no_frame_of_the_future_is_read(small, clip):
    """The first m latents of a clip are the latents of its first 4m-3 frames: this is why kappa_gt costs nothing."""
    with torch.no_grad():
        whole = small.encode(clip)
        for m in (1, 2, 3):
            torch.testing.assert_close(small.encode(clip[:, :, :4 * m - 3]), whole[:, :, :m], atol=1e-5, rtol=1e-5)
        changed = clip.clone()
        changed[:, :, 9:] = 0
        assert torch.equal(small.encode(changed)[:, :, :3], whole[:, :, :3]) and not torch.equal(small.encode(changed), whole)


def test_streamed_decode_is_one_pass_decode(small, clip):
    """What a layer must remember is two frames of its input; then sixteen frames at a time give the whole clip, exactly."""
    with torch.no_grad():
        z = small.encode(clip)
        pieces = list(small.decode_stream(z))
        once = small.decoder(small.conv2(z * small.stats[1] + small.stats[0])).clamp(-1, 1)
    assert [p.shape[2] for p in pieces] == [1, 16, 16, 4]
    torch.testing.assert_close(torch.cat(pieces, 2), once, atol=1e-5, rtol=1e-5)


def test_encoding_in_groups_is_one_pass_encoding(small):
    """Without gradients encode() takes 16 frames of one clip at a time (on a CPU); with them, all at once. The latents are the same, and so is
    what is decoded from them."""
    video = torch.rand(2, 3, 41, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        grouped = small.encode(video)
        decoded = small.decode(grouped)
    torch.testing.assert_close(grouped, small.encode(video).detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decoded, small.decode(grouped).detach().clamp(-1, 1), atol=1e-5, rtol=1e-5)


def test_causal_convolution_is_conv3d_with_zeros_in_front():
    """The sum of shifted 2D convolutions is the 3D convolution."""
    torch.manual_seed(0)
    layer, x = CausalConv3d(5, 7, 3, padding=1), torch.randn(2, 5, 6, 8, 8)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1, 2, 0))
    torch.testing.assert_close(layer(x), torch.nn.functional.conv3d(padded, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)


def test_frame_counts(small):
    """81 frames are 21 latents; what is not 4k+1 is refused, where Wan would drop the rest in silence."""
    with torch.no_grad():
        assert WanVAE(PRESETS["tiny"]).encode(torch.zeros(1, 3, 81, 16, 16)).shape == (1, 24, 21, 2, 2)
    for shape in ((1, 3, 80, 16, 16), (1, 3, 9, 12, 16), (1, 4, 9, 16, 16)):
        with pytest.raises(ValueError, match="4k\\+1"):
            small.encode(torch.zeros(shape))


def moving_clips(n=4):
    """A bright square that walks over a dark ground: learnable in seconds."""
    clips = []
    for i in range(n):
        frames = np.full((9, 32, 32, 3), 40, np.uint8)
        for t in range(9):
            frames[t, 4 + 2 * i:16 + 2 * i, 2 + t:14 + t] = (220, 120 + 30 * i, 60)
        clips.append(SimpleNamespace(frames=frames, name=f"clip{i}"))
    return clips


COURSE = ((0.5, 1, 32, 4), (1.0, 5, 32, 2))


def test_training_learns_and_a_killed_run_goes_on_bitwise(tmp_path, monkeypatch, capsys):
    """A step depends on its number and the weights only: 8 steps, or 5 and 3 after a resume, give the same bytes."""
    from safetensors.torch import load_file
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(T, "COURSE", COURSE)
    config = replace(PRESETS["tiny"], dim=8, dim_mult=(1, 1, 2, 2))
    cfg = T.TrainConfig(steps=8, warmup=2)
    T.train(cfg, config, [moving_clips()], tmp_path / "a", resume=False)
    first = load_file("runs/vae/checkpoint.safetensors")
    Path("runs/vae/checkpoint.safetensors").unlink()
    real = T.vae_loss

    def killed(*args, calls=[]):                         # noqa: B006 - the list is the counter
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(T, "vae_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        T.train(replace(cfg, minutes=0), config, [moving_clips()], tmp_path / "b", resume=False)
    monkeypatch.setattr(T, "vae_loss", real)
    with pytest.raises(ValueError, match="lips 0.0 -> 0.5"):
        T.train(replace(cfg, lips=0.5), config, [moving_clips()], tmp_path / "b", resume=True)
    with safe_open("runs/vae/checkpoint.safetensors", "pt") as file:
        assert 0 < int(file.metadata()["step"]) < 7
    T.train(cfg, config, [moving_clips()], tmp_path / "b", resume=True)
    second = load_file("runs/vae/checkpoint.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    T.train(replace(cfg, steps=120, warmup=10, lr=3e-3), config, [moving_clips()], tmp_path / "c", resume=False)
    log = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    losses = [float(line.split("loss ")[1].split()[0]) for line in log]
    assert losses[-1] < 0.6 * losses[-3], losses         # 120-step run: steps 0, 50, 100


def test_clips_go_round_and_come_back_to_their_first_input():
    """The pool hands a clip's last output in and its very first input back as the target, until it is old and makes room."""
    rounds, fresh = T.Rounds(size=1, oldest=3, share=0.5), lambda i: torch.full((2, 3, 5, 8, 8), i / 16)
    for i in range(8):
        inputs, targets = rounds.send(fresh(i), None)
        born, age = i - i % 3, i % 3
        assert torch.equal(inputs[:-1], fresh(i)[:-1]) and torch.equal(targets[:-1], fresh(i)[:-1])
        assert torch.equal(targets[-1], fresh(born)[-1]) and torch.equal(inputs[-1], fresh(born)[-1] - age / 16)
        rounds.receive(inputs - 1 / 16)                  # a codec that darkens: each round is one step darker
    inputs, _ = rounds.send(torch.zeros(2, 3, 5, 16, 16), None)
    assert torch.equal(inputs, torch.zeros(2, 3, 5, 16, 16))                # another shape: the pool starts anew


@pytest.fixture
def two_steps(tmp_path, monkeypatch):
    """A folder with the weights of a VAE of 16 channels after two steps; what is trained next starts there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(T, "COURSE", COURSE)
    monkeypatch.setattr(T, "POLISH", COURSE[1:])
    config = replace(SMALL, z_dim=16, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16, dim_mult=(1, 1, 2, 2), num_res_blocks=1)
    T.train(T.TrainConfig(steps=2), config, [moving_clips()], tmp_path / "a", resume=False)
    return tmp_path / "a"


def test_the_decoder_can_be_trained_alone(two_steps, tmp_path):
    """decoder_only leaves every latent as it was, bit for bit: a generator trained on them needs no new training."""
    from safetensors.torch import load_file
    T.train(T.TrainConfig(steps=2, warmup=1, decoder_only=True), None, [moving_clips()], tmp_path / "b", resume=False, init=two_steps)
    a, b = (load_file(tmp_path / x / "vae.safetensors") for x in "ab")
    assert {k for k in a if not torch.equal(a[k], b[k])} >= {"decoder.conv1.weight", "decoder.head.2.weight"}
    assert all(torch.equal(a[k], b[k]) for k in a if k.startswith(("encoder.", "conv1.")))
    assert (tmp_path / "a/config.json").read_bytes() == (tmp_path / "b/config.json").read_bytes()


def test_exported_weights_load_and_normalise(tmp_path, monkeypatch):
    """What train() ships is what load_vae() reads. Its latents have mean 0 and standard deviation 1; those of what moves, which mostly are nothing,
    have it around a mouth."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(T, "COURSE", COURSE)
    config = replace(PRESETS["tiny"], dim=8, dim_mult=(1, 1, 2, 2))
    T.train(T.TrainConfig(steps=2), config, [moving_clips()], tmp_path, resume=False)
    vae = load_vae(tmp_path)
    with torch.no_grad():
        z = torch.cat([vae.encode(T.pixels(c.frames)) for c in moving_clips()])                             # (4, 24, 3, 4, 4)
    y0, y1, x0, x1 = (round(4 * part) for part in T.MOUTH)
    assert z.mean((0, 2, 3, 4)).abs().max() < 0.05 and (z.std((0, 2, 3, 4)) - 1)[:16].abs().max() < 0.05
    assert (z[..., y0:y1, x0:x1].std((0, 2, 3, 4)) - 1)[16:].abs().max() < 0.05 and (z.std((0, 2, 3, 4)) - 1)[16:].abs().max() > 0.1


def test_a_vae_of_sixteen_channels_gets_more(two_steps, tmp_path, monkeypatch):
    """Law: --widen asks the first channels for what they were (nothing to learn at the first step), the new ones for what moves."""
    goals, loss = [], T.vae_loss

    def spy(vae, inputs, video, cfg, generator, linear):
        with torch.no_grad():
            goals.append((vae.posterior(video)[0] - linear(video)).square().mean((0, 2, 3, 4)))             # (24,)
        return loss(vae, inputs, video, cfg, generator, linear)
    monkeypatch.setattr(T, "vae_loss", spy)
    T.train(T.TrainConfig(steps=1, widen=8), None, [moving_clips()], tmp_path / "b", resume=False, init=two_steps)
    assert len(goals) == 1 and goals[0][:16].max() < 1e-3 and goals[0][16:].min() > 0.01                    # autocast rounds
    known = load_vae(tmp_path / "b").config
    assert (known.z_dim, known.moving) == (24, 8)


def test_an_uncertain_motion_is_answered_by_its_mean():
    """Law: of ten clips three move. L1 would have every answer stand still, its median; the squared terms ask for 0.3, its mean."""
    video = torch.zeros(10, 3, 5, 8, 8)
    video[:3, :, 2:] = 1                                                        # these jump at frame 2
    answers, losses = torch.linspace(0, 1, 11), {"flicker": [], "square": []}
    for a in answers:
        out = torch.zeros_like(video)
        out[:, :, 2:] = a
        blind = SimpleNamespace(posterior=lambda x: (torch.zeros(10, 1, 2, 1, 1),) * 2, conv2=lambda z: z, decoder=lambda z, out=out: out)
        parts = T.vae_loss(blind, video, video, T.TrainConfig(), torch.Generator())[1]
        for name, values in losses.items():
            values.append(parts[name])
    assert all(answers[int(torch.stack(values).argmin())].item() == pytest.approx(0.3) for values in losses.values())


def test_what_comes_out_is_asked_to_encode_as_the_clip_it_should_be(small, clip):
    """Law: `cycle` compares the output's latents with those of the video asked for, also when a worn copy went in; no gradient enters that goal."""
    video, first = clip[:, :, :5], small.encoder.conv1.weight
    for inputs in (video, (video + 0.3).clamp(-1, 1)):
        _, parts, out = T.vae_loss(small, inputs, video, T.TrainConfig(), torch.Generator().manual_seed(0))
        with torch.no_grad():
            wanted = small.posterior(video)[0]
        cycle = (small.posterior(out.clamp(-1, 1))[0] - wanted).square().mean()
        assert parts["cycle"].item() == pytest.approx(cycle.item(), rel=1e-4)
        one, two = (torch.autograd.grad(x, first, retain_graph=True)[0] for x in (parts["cycle"], cycle))
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-6 * two.abs().max().item()) and two.abs().max() > 0


def test_crops_around_the_mouth_hold_it():
    """With --lips 1 the place of a face-centred clip's mouth is in every crop; without, in as many as chance has it."""
    frames = np.zeros((9, 128, 128, 3), np.uint8)
    frames[:, 88:94, 61:67] = 255                                               # the middle of MOUTH
    whole = {}
    for lips in (0.0, 1.0):
        crops = T.training_batch([[SimpleNamespace(frames=frames)]], 1, 64, 40, torch.Generator().manual_seed(0), lips)
        whole[lips] = ((crops.amax(1) > crops.amin((1, 2, 3, 4))[:, None, None, None] + 0.5).sum((1, 2, 3)) == 36).float().mean().item()
    assert whole[1.0] == 1 and 0.3 < whole[0.0] < 0.95


def test_principal_components_are_the_best_linear_codec():
    """No linear codec of 16 numbers a block loses less than the discarded components; channels are equally loud; a still clip stays still."""
    videos = [torch.randn(4, 3, 9, 16, 16, generator=torch.Generator().manual_seed(i)).cumsum(4).cumsum(3) / 20 for i in range(4)]
    linear = principal_components(videos, 16)
    z = torch.cat([linear(v).movedim(1, -1).flatten(0, 3) for v in videos])                                 # (n, 16)
    assert z.mean(0).abs().max() < 1e-4 and (z.square().mean(0) - 1).abs().max() < 1e-3
    x = torch.cat([blocks(v).flatten(0, 3) for v in videos])
    x = x - x.mean(0)
    lost = (x - z @ torch.linalg.lstsq(z, x).solution).square().sum(1).mean()
    discarded = torch.linalg.svdvals(x)[16:].square().sum() / len(x)
    assert torch.isclose(lost, discarded, rtol=1e-3)
    still = linear(videos[0][:, :, :1].expand(-1, -1, 9, -1, -1))
    assert torch.allclose(still, still[:, :, :1].expand_as(still), atol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_what_moves_has_channels_of_its_own(trained):
    """Law: of change within four frames that the first channels leave no other 4 numbers hold more; what stands still is nothing there."""
    videos = [torch.randn(4, 3, 9, 16, 16, generator=torch.Generator().manual_seed(i)).cumsum(4).cumsum(3) / 20 for i in range(4)]
    x = torch.cat([blocks(v).flatten(0, 3) for v in videos])
    first = (lambda video: 9 + blocks(video)[..., :768:96].movedim(-1, 1)) if trained else principal_components(videos, 8)
    goal = principal_components(videos, 8, 4, first if trained else None)
    both = torch.cat([goal(v).movedim(1, -1).flatten(0, 3) for v in videos])                                # (n, 8 + 4)
    z, motion = both[:, :8], both[:, 8:]
    assert torch.allclose(z, torch.cat([first(v).movedim(1, -1).flatten(0, 3) for v in videos]), atol=1e-4)
    assert (motion.square().mean(0) - 1).abs().max() < 1e-3                                                 # equally loud
    fit = lambda a, b: b - b.mean(0) - (a - a.mean(0)) @ torch.linalg.lstsq(a - a.mean(0), b - b.mean(0)).solution
    left = within(fit(z, x))
    lost = (left - motion @ torch.linalg.lstsq(motion, left).solution).square().sum(1).mean()
    assert torch.isclose(lost, torch.linalg.svdvals(left)[4:].square().sum() / len(x), rtol=1e-3)
    assert torch.allclose(within(x).unflatten(1, (3, 4, 64)).sum(2), torch.zeros(1), atol=1e-4)
    if not trained:
        still = goal(videos[0][:, :, :1].expand(-1, -1, 9, -1, -1))
        assert still[:, 8:].square().mean() < 0.1 and torch.allclose(still, still[:, :, :1].expand_as(still), atol=1e-5)


def test_a_wider_vae_begins_as_the_old_one(small, clip):
    """Law: the first channels are the old ones, the decoder shows what it did, whatever the new ones are; their posterior is narrow."""
    wide = WanVAE(T.wider(SMALL, 2)).eval()
    T.widen(wide, small)
    with torch.no_grad():
        old, new = small.posterior(clip), wide.posterior(clip)
        assert all(torch.allclose(a, b[:, :4], atol=1e-5) for a, b in zip(old, new))
        assert new[0][:, 4:].std() > 1e-3 and (new[1][:, 4:] == -6).all()
        z = torch.cat([small.encode(clip), torch.randn(1, 2, 10, 4, 4)], 1)
        assert torch.allclose(wide.decode(z), small.decode(small.encode(clip)), atol=1e-5)
    wide.decode(z.requires_grad_()).sum().backward()
    assert wide.decoder.conv1.weight.grad[:, 4:].abs().max() > 0                                            # and it can learn to listen


@pytest.mark.parametrize("options", [["--widen", "8"], ["--init", "x", "--widen", "6"], ["--init", "x", "--widen", "-8"],
                                     ["--init", "x", "--widen", "8", "--decoder-only"], ["--lips", "1.5"], ["--warmup", "0"],
                                     ["--seed", "1", "--decoder-only"]])
def test_options_that_make_no_sense_end_in_a_line(options, capsys):
    """What cannot be meant is told in one line that names the option, before anything is read."""
    with pytest.raises(SystemExit) as stop:
        T.main(["--data", "nowhere", *options])
    assert stop.value.code == 2 and next(o for o in ("--widen", "--lips", "--warmup", "--decoder-only") if o in options) in capsys.readouterr().err
