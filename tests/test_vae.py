"""Properties of the causal VAE, each with the sentence it teaches."""
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as nnf
from safetensors.torch import save_file

import vae as V
from vae import PRESETS, CausalConv3d, VAEConfig, WanVAE, load_vae

SMALL = VAEConfig(dim=8, z_dim=4, latents_mean=(0.1, -0.2, 0.3, 0.0),
                  latents_std=(1.5, 0.5, 2.0, 1.0))
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def randomise(model, std=0.15):
    """Wan starts some layers at zero; a property should hold for any weights."""
    for p in model.parameters():
        if p.dim() > 1 and p.numel() > p.shape[0]:
            torch.nn.init.normal_(p, std=std)
    return model


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return randomise(WanVAE(SMALL).eval())


@pytest.fixture(scope="module")
def patched():
    """The same with patch = 2: means of 2 x 2 pixels in, a pixel shuffle out."""
    torch.manual_seed(0)
    return randomise(WanVAE(replace(SMALL, patch=2, decoder_widths=(8, 8, 4))).eval(), 0.05)


@pytest.fixture(params=["small", "patched"])
def either(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def clip():
    return torch.rand(1, 3, 37, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1

# ----------------------------------------------------------------------------- the network is Wan's


def wan_tensors():
    """{name: shape} of the official Wan2.1_VAE.pth, from the layer table of the paper's VAE."""
    out = {}

    def conv(name, c_out, c_in, *kernel):
        out[f"{name}.weight"] = (c_out, c_in, *kernel)
        out[f"{name}.bias"] = (c_out,)

    def residual(name, c_in, c_out):
        out[f"{name}.residual.0.gamma"] = (c_in, 1, 1, 1)
        conv(f"{name}.residual.2", c_out, c_in, 3, 3, 3)
        out[f"{name}.residual.3.gamma"] = (c_out, 1, 1, 1)
        conv(f"{name}.residual.6", c_out, c_out, 3, 3, 3)
        if c_in != c_out:
            conv(f"{name}.shortcut", c_out, c_in, 1, 1, 1)

    conv("encoder.conv1", 96, 3, 3, 3, 3)
    for i, c_in, c_out in [(0, 96, 96), (1, 96, 96), (3, 96, 192), (4, 192, 192), (6, 192, 384),
                           (7, 384, 384), (9, 384, 384), (10, 384, 384)]:
        residual(f"encoder.downsamples.{i}", c_in, c_out)
    for i, c in [(2, 96), (5, 192), (8, 384)]:
        conv(f"encoder.downsamples.{i}.resample.1", c, c, 3, 3)
        if i > 2:
            conv(f"encoder.downsamples.{i}.time_conv", c, c, 3, 1, 1)
    conv("decoder.conv1", 384, 16, 3, 3, 3)
    for i, c_in, c_out in [(0, 384, 384), (1, 384, 384), (2, 384, 384), (4, 192, 384),
                           (5, 384, 384), (6, 384, 384), (8, 192, 192), (9, 192, 192),
                           (10, 192, 192), (12, 96, 96), (13, 96, 96), (14, 96, 96)]:
        residual(f"decoder.upsamples.{i}", c_in, c_out)
    for i, c in [(3, 384), (7, 384), (11, 192)]:
        conv(f"decoder.upsamples.{i}.resample.1", c // 2, c, 3, 3)
        if i < 11:
            conv(f"decoder.upsamples.{i}.time_conv", 2 * c, c, 3, 1, 1)
    for side in ("encoder", "decoder"):
        residual(f"{side}.middle.0", 384, 384)
        residual(f"{side}.middle.2", 384, 384)
        out[f"{side}.middle.1.norm.gamma"] = (384, 1, 1)
        conv(f"{side}.middle.1.to_qkv", 1152, 384, 1, 1)
        conv(f"{side}.middle.1.proj", 384, 384, 1, 1)
    out["encoder.head.0.gamma"] = (384, 1, 1, 1)
    out["decoder.head.0.gamma"] = (96, 1, 1, 1)
    conv("encoder.head.2", 32, 384, 3, 3, 3)
    conv("decoder.head.2", 3, 96, 3, 3, 3)
    conv("conv1", 32, 32, 1, 1, 1)
    conv("conv2", 16, 16, 1, 1, 1)
    return out


def test_official_state_dict_loads_strictly():
    """Property: the network is Wan2.1's, tensor by tensor: 194 of them, 126,892,531 numbers."""
    official = wan_tensors()
    with torch.device("meta"):
        vae = WanVAE(PRESETS["wan2.1"])
    assert len(official) == 194
    assert sum(p.numel() for p in vae.parameters()) == 126_892_531
    state = {name: torch.empty(shape, device="meta") for name, shape in official.items()}
    vae.load_state_dict(state, strict=True)


def diffusers_name(name):
    """A parameter's name here -> its name in diffusers' AutoencoderKLWan."""
    for ours, theirs in [
            ("encoder.conv1", "encoder.conv_in"), ("decoder.conv1", "decoder.conv_in"),
            (".head.0", ".norm_out"), (".head.2", ".conv_out"),
            (".middle.0", ".mid_block.resnets.0"), (".middle.1", ".mid_block.attentions.0"),
            (".middle.2", ".mid_block.resnets.1"), (".residual.0", ".norm1"),
            (".residual.2", ".conv1"), (".residual.3", ".norm2"), (".residual.6", ".conv2"),
            (".shortcut", ".conv_shortcut"), ("encoder.downsamples", "encoder.down_blocks")]:
        name = name.replace(ours, theirs)
    if name.startswith("decoder.upsamples."):
        number, rest = name.removeprefix("decoder.upsamples.").split(".", 1)
        block, layer = divmod(int(number), 4)
        layer = f"resnets.{layer}" if layer < 3 else "upsamplers.0"
        name = f"decoder.up_blocks.{block}.{layer}.{rest}"
    first, rest = name.split(".", 1)
    return {"conv1": "quant_conv", "conv2": "post_quant_conv"}.get(first, first) + "." + rest


def test_equals_an_independent_implementation(small, clip):
    """Property: diffusers wrote the same network with a cache of its own: same weights, same
    latents, same frames."""
    diffusers = pytest.importorskip("diffusers")
    other = diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, latents_mean=[0.0] * 4,
                                       latents_std=[1.0] * 4).eval()
    state = {diffusers_name(name): tensor for name, tensor in small.state_dict().items()}
    other.load_state_dict(state, strict=True)
    mean, std = small.stats[0], small.stats[1]
    with torch.no_grad():
        ours = small.encode(clip)
        theirs = (other.encode(clip).latent_dist.mode() - mean) / std
        torch.testing.assert_close(ours, theirs, **CLOSE)
        frames = other.decode(ours * std + mean).sample
        torch.testing.assert_close(small.decode(ours), frames, **CLOSE)

# ---------------------------------------------------------------------------------------- causality


def test_no_frame_of_the_future_is_read(either, clip):
    """Property: the first m latents of a clip are the latents of its first 4m-3 frames. This is why
    kappa_gt costs nothing. The same holds for decoding."""
    with torch.no_grad():
        whole = either.encode(clip)
        decoded = either.decode(whole)
        for m in (1, 2, 3):
            part = either.encode(clip[:, :, :4 * m - 3])
            torch.testing.assert_close(part, whole[:, :, :m], **CLOSE)
            part = either.decode(part)
            torch.testing.assert_close(part, decoded[:, :, :4 * m - 3], **CLOSE)
        changed = clip.clone()
        changed[:, :, 9:] = 0
        changed = either.encode(changed)
    assert torch.equal(changed[:, :, :3], whole[:, :, :3])
    assert not torch.equal(changed, whole)


def test_patch_2_has_the_latents_of_the_means_and_twice_the_pixels(small, patched, clip):
    """Property: with patch = 2 the encoder is Wan's on means of 2 x 2 pixels. So weights trained on
    128 x 128 give 256 x 256 the same latents, and a generator of these latents stays valid."""
    same = WanVAE(replace(SMALL, patch=2, decoder_widths=(8, 8, 4))).eval()
    same.encoder.load_state_dict(small.encoder.state_dict())
    same.conv1.load_state_dict(small.conv1.state_dict())
    means = nnf.interpolate(clip[0].transpose(0, 1), scale_factor=0.5, mode="area")
    with torch.no_grad():
        wanted = small.encode(means.transpose(0, 1)[None])
        torch.testing.assert_close(same.encode(clip), wanted, **CLOSE)
        assert patched.decode(wanted).shape == clip.shape
        assert small.decode(wanted).shape[3:] == (16, 16)


def test_above_a_quarter_of_the_side_no_layer_of_patch_2_mixes_frames(patched):
    """Property: this is why frames that are not shown cost nothing there."""
    for layer in patched.decoder.per_frame.modules():
        assert not isinstance(layer, CausalConv3d) or layer.past == 0
    x = torch.randn(1, 4, 5, 4, 4)
    with torch.no_grad():
        whole = V.run(patched.decoder.per_frame, x, None)
        each = [V.run(patched.decoder.per_frame, frame, None) for frame in x.split(1, 2)]
    torch.testing.assert_close(torch.cat(each, 2), whole, **CLOSE)


@pytest.mark.parametrize("kernel, stride, padding", [
    (3, 1, 1), (1, 1, 0), ((3, 1, 1), 1, (1, 0, 0)), ((3, 1, 1), (2, 1, 1), 0)])
def test_causal_convolution_is_conv3d_with_zeros_in_front(kernel, stride, padding, monkeypatch):
    """Property: a causal convolution is a pad in the past and conv3d. The sum of shifted 2D
    convolutions that CPUs use is the same for every kernel of Wan's, also for a single frame."""
    torch.manual_seed(0)
    layer = CausalConv3d(5, 7, kernel, stride, padding)
    k, s, p = layer.kernel_size, layer.stride, layer.padding
    lengths = (k[0], 5, 7) if k[0] > 1 and not p[0] else (1, 2, 6)
    for T in lengths:
        x = torch.randn(2, 5, T, 8, 8)
        padded = nnf.pad(x, (p[2], p[2], p[1], p[1], k[0] - 1 if p[0] else 0, 0))
        wanted = nnf.conv3d(padded, layer.weight, layer.bias, s)
        for fast in (True, False):
            monkeypatch.setattr(V, "CPU_KERNEL", fast)
            torch.testing.assert_close(layer(x), wanted, **CLOSE)


@pytest.mark.parametrize("fast", [True, False])
def test_a_layer_in_pieces_is_a_layer_in_one_pass(fast, monkeypatch):
    """Property: two frames of its input are all that a convolution must remember, however the clip
    is cut, with the plain convolution as with the CPU's."""
    monkeypatch.setattr(V, "CPU_KERNEL", fast)
    torch.manual_seed(0)
    layer, x = CausalConv3d(5, 7, 3, padding=1), torch.randn(2, 5, 9, 8, 8)
    for sizes in ((1, 8), (1, 1, 1, 6), (4, 5), (2, 1, 3, 3)):
        cache = {}
        pieces = [layer(piece, cache) for piece in x.split(sizes, 2)]
        assert [piece.shape[2] for piece in pieces] == list(sizes)
        torch.testing.assert_close(torch.cat(pieces, 2), layer(x), **CLOSE)
        assert torch.equal(cache[layer], x[:, :, -2:])


def test_the_kernel_for_cpus_changes_no_frame(either, clip, monkeypatch):
    """Property: latents and frames of the whole VAE are the same with pad and conv3d in every
    layer, as a GPU computes them."""
    with torch.no_grad():
        latents = either.encode(clip)
        frames = either.decode(latents)
        monkeypatch.setattr(V, "CPU_KERNEL", False)
        torch.testing.assert_close(either.encode(clip), latents, **CLOSE)
        torch.testing.assert_close(either.decode(latents), frames, **CLOSE)


def test_streamed_decode_is_one_pass_decode(either, clip):
    """Property: what a layer must remember is two frames of its input; then sixteen frames at a
    time give the whole clip, exactly. Frames that are skipped change no other."""
    with torch.no_grad():
        z = either.encode(clip)
        pieces = list(either.decode_stream(z))
        once = either.decoder(either.conv2(z * either.stats[1] + either.stats[0])).clamp(-1, 1)
        rest = list(either.decode_stream(z, skip=9))
    assert [piece.shape[2] for piece in pieces] == [1, 16, 16, 4]
    torch.testing.assert_close(torch.cat(pieces, 2), once, **CLOSE)
    assert [piece.shape[2] for piece in rest] == [0, 8, 16, 4]
    torch.testing.assert_close(torch.cat(rest, 2), once[:, :, 9:], **CLOSE)


def test_encoding_in_groups_is_one_pass_encoding(small):
    """Property: without gradients encode() takes 16 frames of one clip at a time (on a CPU); with
    them, all at once. The latents are the same, and so is what is decoded from them."""
    generator = torch.Generator().manual_seed(2)
    video = torch.rand(2, 3, 41, 16, 16, generator=generator) * 2 - 1
    with torch.no_grad():
        grouped = small.encode(video)
        decoded = small.decode(grouped)
    torch.testing.assert_close(grouped, small.encode(video).detach(), **CLOSE)
    torch.testing.assert_close(decoded, small.decode(grouped).detach().clamp(-1, 1), **CLOSE)

# ------------------------------------------------------------------------------------ shapes, files


def test_frame_counts(small):
    """Property: 81 frames are 21 latents; what is not 4k+1 is refused, where Wan would drop the
    rest in silence."""
    config = VAEConfig(dim=8, z_dim=24, dim_mult=(1, 1, 2, 2), num_res_blocks=1,
                       latents_mean=(0.0,) * 24, latents_std=(1.0,) * 24)
    with torch.no_grad():
        latents = WanVAE(config).encode(torch.zeros(1, 3, 81, 16, 16))
    assert latents.shape == (1, 24, 21, 2, 2)
    for shape in ((1, 3, 80, 16, 16), (1, 3, 9, 12, 16), (1, 4, 9, 16, 16)):
        with pytest.raises(ValueError, match="4k\\+1"):
            small.encode(torch.zeros(shape))


def test_a_folder_without_a_vae_is_refused_in_one_line(small, tmp_path):
    """Property: whatever is wrong with a folder of weights, load_vae names folder and fault."""
    shipped = Path(V.__file__).parent / "weights" / "tiny" / "config.json"
    config = json.loads(shipped.read_text(encoding="utf-8"))
    folder = tmp_path / "weights"
    folder.mkdir()
    one_line = rf"^no usable VAE in {re.escape(str(folder))}: [^\n]+$"
    with pytest.raises(ValueError, match=one_line):
        load_vae(folder)                                            # nothing there
    shutil.copy(shipped, folder)
    save_file(small.state_dict(), folder / "vae.safetensors")
    with pytest.raises(ValueError, match=one_line):
        load_vae(folder)                                            # of other shapes
    for part in ({}, {"vae": 1}, {"vae": config["vae"] | {"colour": 1}},
                 {"vae": config["vae"] | {"z_dim": 5}}):
        (folder / "config.json").write_text(json.dumps(part), encoding="utf-8")
        with pytest.raises(ValueError, match=one_line):
            load_vae(folder)
