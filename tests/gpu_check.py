"""Full size on one GPU: does it fit, is bfloat16 right, how fast is it? Random weights, 8 minutes.

    python tests/gpu_check.py                   on an 80 GB card
    python tests/gpu_check.py --toy             the same steps on a CPU, in seconds: a rehearsal

Prints `name: value` lines as they are known; a step that runs out of memory or fails is a line,
too. Then each goal is a line, met or missed. The exit code is 1 if a step failed or, without --toy,
a goal was missed. --out FILE keeps it all as JSON. What it measures, for wan-1.3b and Wan2.1's VAE
at 512 x 512:
    parity          a forward in bfloat16 against float32
    chunk_33, _81   frames a second and seconds by stage, end to end, and the share of the card's
                    own bfloat16 rate; with and without torch.compile
    diffusers       a chunk's networks in diffusers' classes, in the same run
    stage_1, _2     one training step with recomputed blocks, without Eq. 16 and 17's decode
"""
import argparse
import gc
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # a script has no conftest.py
import common
import distill_student
import dit
import infer
import train_teacher
from dit import AudioDiT, DiTConfig, student_sigmas
from tre import continuity_reference
from vae import PRESETS, VAEConfig, WanVAE


@dataclass(frozen=True)
class Sizes:
    """What is checked: the real thing, or a toy."""
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    network: DiTConfig = dit.PRESETS["wan-1.3b"]
    vae: VAEConfig = PRESETS["wan2.1"]
    size: int = 512
    chunks: tuple = ((33, 5), (81, 9))              # T and n
    product: int = 8192                             # side of the matrices that measure the card
    compile: bool = True


TOY = Sizes(
    device="cpu", dtype=torch.float32, size=32, chunks=((9, 5), (13, 5)), product=256,
    compile=False,
    network=replace(dit.PRESETS["debug"], layers=1, dim=48, ffn_dim=64, channels=4),
    vae=VAEConfig(dim=4, z_dim=4, dim_mult=(1, 1, 2, 2), num_res_blocks=1,
                  latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4))


class RandomAudio:
    """Features of the right shape: the audio encoder is a thousandth of the work."""
    def __init__(self, sizes):
        self.sizes, self.window = sizes, None

    def features(self, audio, start, frames):
        network = self.sizes.network
        generator = torch.Generator().manual_seed(start)
        shape = frames, network.audio_layers, network.audio_dim
        return torch.randn(shape, generator=generator).to(self.sizes.device)


def make_dit(sizes):
    """A random network that does something: Wan's head starts at zero."""
    torch.manual_seed(0)
    with torch.device(sizes.device):
        network = AudioDiT(sizes.network)
    torch.nn.init.normal_(network.head.head.weight, std=0.02)
    return network


def make_vae(sizes, dtype):
    torch.manual_seed(0)
    with torch.device(sizes.device):
        vae = WanVAE(sizes.vae).eval().requires_grad_(False)
    vae.decoder.to(dtype)
    vae.conv2.to(dtype)
    return vae


def make_inputs(sizes, T, rows=1):
    """-> latents (B, C, F, h, w), identity, audio (B, T, L, A)"""
    torch.manual_seed(1)
    network, side = sizes.network, sizes.size // 8
    shape = rows, network.channels, 1 + (T - 1) // 4, side, side
    audio = torch.randn(rows, T, network.audio_layers, network.audio_dim, device=sizes.device)
    return *(torch.randn(shape, device=sizes.device) for _ in range(2)), audio


def seconds_of(call, repeats=3):
    """Seconds of one call, the best of `repeats` after one that is thrown away."""
    call()
    best = float("inf")
    for _ in range(repeats):
        begin = common.Stopwatch.now()
        call()
        best = min(best, common.Stopwatch.now() - begin)
    return best


def peak_gib():
    """Peak of the card's memory since the last step, GiB; the process's on a CPU, in words."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return common.peak_memory()

# ----------------------------------------------------------------------------------------- steps


def card(sizes):
    """The card's name and its measured rate of bfloat16 products."""
    n = sizes.product
    a, b = (torch.randn(n, n, device=sizes.device, dtype=sizes.dtype) for _ in range(2))
    rate = 2 * n**3 / seconds_of(lambda: a @ b, 10)
    name = torch.cuda.get_device_name() if sizes.device == "cuda" else "CPU"
    return {"name": name, "tflops": round(rate / 1e12, 3)}


@torch.inference_mode()
def parity(sizes):
    """One forward in bfloat16 and in float32: mean difference over mean size of the velocity."""
    network = make_dit(sizes)
    latents, identity, audio = make_inputs(sizes, sizes.chunks[0][0])
    full, half = [], []
    for sigma in student_sigmas():
        full.append(dit.predict(network, latents, sigma, identity, audio))
    network.cast_matrices(torch.bfloat16)
    for sigma in student_sigmas():
        half.append(dit.predict(network, latents, sigma, identity, audio))
    errors = [((a - b).abs().mean() / a.abs().mean()).item() for a, b in zip(full, half)]
    return {"relative_error": [round(error, 5) for error in errors], "peak": peak_gib()}


def make_models(sizes, T, n, compiled):
    network = make_dit(sizes).eval().requires_grad_(False).cast_matrices(sizes.dtype)
    if compiled:
        network.compile(dynamic=False)
    return infer.Models(
        make_vae(sizes, sizes.dtype), network, RandomAudio(sizes), "student", sizes.size, False,
        frames=T, identity="tre", continuity_frames=n, steps=4, timestep_shift=5.0)


def flop_of(call):
    """FLOP of the products, convolutions and attention of call(); a product and its sum are two."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@torch.inference_mode()
def work_of_a_chunk(models, sizes):
    """FLOP of one later chunk: the network's steps, the decoder, the encoder of the next kappa."""
    latents, identity, audio = make_inputs(sizes, models.frames)
    n = models.continuity_frames
    tail = torch.zeros(1, 3, n, sizes.size, sizes.size, device=sizes.device)
    forward = flop_of(lambda: dit.predict(models.dit, latents, 1.0, identity, audio))
    decode = flop_of(lambda: models.vae.decode(latents))
    return models.steps * forward + decode + flop_of(
        lambda: continuity_reference(models.vae, tail, n))


def chunk(sizes, T, n, compiled, tflops, count=4):
    """`count` chunks by infer.generate, after one video that warms up."""
    models = make_models(sizes, T, n, compiled)
    work = None if compiled else work_of_a_chunk(models, sizes)     # the counter sees eager code
    image = torch.zeros(1, 3, sizes.size, sizes.size)
    frames = T + (count - 1) * (T - n)
    sound = torch.zeros(frames * 640)
    for _ in infer.generate(models, image, sound[:(2 * T - n) * 640]):
        pass
    clock = common.Stopwatch()
    begin = clock.now()
    made = sum(len(piece) for piece in infer.generate(models, image, sound, clock=clock))
    seconds = clock.now() - begin
    assert made == frames
    found = {"frames_per_second": round(made / seconds, 2), "peak": peak_gib(),
             "seconds": {stage: round(spent, 3) for stage, spent in clock.items()}}
    if work:
        share = count * work / seconds / (tflops * 1e12)
        found |= {"tflop_a_chunk": round(work / 1e12, 3), "share_of_rate": round(share, 3)}
    return found


def diffusers_twins(sizes):
    """The same two networks in diffusers' classes, random, in the same dtype."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    net, codec = sizes.network, sizes.vae
    with torch.device(sizes.device):
        transformer = WanTransformer3DModel(
            num_attention_heads=net.heads, attention_head_dim=net.dim // net.heads,
            in_channels=2 * net.channels, out_channels=net.channels, ffn_dim=net.ffn_dim,
            num_layers=net.layers, freq_dim=net.freq_dim)
        vae = AutoencoderKLWan(
            base_dim=codec.dim, z_dim=codec.z_dim, dim_mult=list(codec.dim_mult),
            num_res_blocks=codec.num_res_blocks,
            temperal_downsample=list(codec.temporal_downsample),
            latents_mean=list(codec.latents_mean), latents_std=list(codec.latents_std))
    return transformer.to(sizes.dtype).eval(), vae.to(sizes.dtype).eval()


@torch.inference_mode()
def against_diffusers(sizes):
    """Seconds of a chunk's 4 forwards and its decode, ours and in diffusers' classes."""
    T, n = sizes.chunks[0]
    latents, identity, audio = make_inputs(sizes, T)
    network = make_dit(sizes).eval().cast_matrices(sizes.dtype)
    codec = make_vae(sizes, sizes.dtype)
    ours = {"dit": seconds_of(lambda: dit.predict(network, latents, 1.0, identity, audio)),
            "decode": seconds_of(lambda: codec.decode(latents))}
    transformer, vae = diffusers_twins(sizes)
    x = torch.cat([latents, identity], 1).to(sizes.dtype)
    t = torch.tensor([1000], device=x.device)
    prompt = torch.randn(1, sizes.network.audio_tokens, 4096, device=x.device, dtype=x.dtype)
    z = latents.to(sizes.dtype)
    theirs = {"dit": seconds_of(lambda: transformer(x, t, prompt)),
              "decode": seconds_of(lambda: vae.decode(z))}
    sums = [4 * part["dit"] + part["decode"] for part in (ours, theirs)]
    ours, theirs = ({k: round(v, 4) for k, v in part.items()} for part in (ours, theirs))
    return {"ours": ours, "theirs": theirs, "times_as_fast": round(sums[1] / sums[0], 2)}


def stage_1(sizes, cfg=train_teacher.PRESETS["wan-1.3b"]):
    """One step of train_teacher.train_step on a random row -> loss, peak, seconds."""
    T, n = sizes.chunks[0]
    cfg = replace(cfg, batch=1, micro_batch=1, frames=T, continuity_frames=n, lambda_temp=0.0,
                  lambda_face=0.0, checkpointing=True)
    latents, identity, audio = make_inputs(sizes, T)
    m = 1 + (n - 1) // 4
    weight = (torch.arange(latents.shape[2], device=sizes.device) >= m).float()
    batch = {"latents": latents, "identity": identity, "kappa": latents[:, :, :m], "audio": audio,
             "sigma": torch.full((1,), 0.7, device=sizes.device), "noise": identity.flip(-1),
             "loss_weight": weight.view(1, -1, 1, 1), "chunk": [SimpleNamespace(name="random")]}
    model = make_dit(sizes)
    model.gradient_checkpointing = True
    state = common.TrainState({"model": model}, {"model": cfg.lr}, "model", cfg)
    autocast = common.bf16_autocast(sizes.device)
    begin = common.Stopwatch.now()
    numbers = train_teacher.train_step(state, None, None, cfg, 0, autocast, Path("."),
                                       sizes.device, 0, 1, lambda *_: batch)
    return {"loss": round(numbers["loss"], 4), "peak": peak_gib(),
            "seconds": round(common.Stopwatch.now() - begin, 2)}


class OneChunk:
    """A RolloutBuffer of one random chunk."""
    calls = [range(1)]

    def __init__(self, sizes, cfg):
        T, n = sizes.chunks[0]
        m = 1 + (n - 1) // 4
        latents, identity, audio = make_inputs(sizes, T)
        mask = (torch.arange(latents.shape[2], device=sizes.device) >= m).float()
        drawn = distill_student.draw_noise(cfg, 0, 0, latents.shape[1:], sizes.device)
        self.whole = {k: v[None] for k, v in drawn.items()}
        self.whole |= {"latents": latents, "identity": identity, "audio": audio,
                       "loss_mask": mask.view(1, 1, -1, 1, 1),
                       "kappa_teacher": latents[:, :, :m], "kappa_student": identity[:, :, :m]}

    def batch(self, rows, step):
        return dict(self.whole)

    def advance(self, kappas, step):
        assert len(kappas) == 1


def stage_2(sizes, cfg=distill_student.PRESETS["wan-1.3b"]):
    """One step of distill_student.train_step, student and critic -> losses, peak, seconds."""
    T, n = sizes.chunks[0]
    cfg = replace(cfg, batch=1, micro_batch=1, critic_updates=1, frames=T, continuity_frames=n,
                  identity="tre", checkpointing=True)
    networks = {name: make_dit(sizes) for name in ("student", "critic")}
    teacher = make_dit(sizes).requires_grad_(False)
    for network in (*networks.values(), teacher):
        network.gradient_checkpointing = True
    peaks = {"student": cfg.lr, "critic": cfg.lr_critic}
    state = common.TrainState(networks, peaks, "student", cfg)
    vae, buffer = make_vae(sizes, sizes.dtype), OneChunk(sizes, cfg)
    autocast = common.bf16_autocast(sizes.device)
    begin = common.Stopwatch.now()
    numbers = distill_student.train_step(state, teacher, vae, buffer, cfg, 0, autocast, Path("."),
                                         0, distill_student.rollout, {})
    return {"critic": numbers["critic"], "regression": numbers["regression"], "peak": peak_gib(),
            "seconds": round(common.Stopwatch.now() - begin, 2)}

# ------------------------------------------------------------------------------------------ main


def empty():
    """Give back what the step before held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def steps_of(sizes, tflops):
    """{name: function without arguments}, the most wanted first."""
    steps = {"parity": lambda: parity(sizes)}
    for T, n in sizes.chunks:
        steps[f"chunk_{T}"] = lambda T=T, n=n: chunk(sizes, T, n, False, tflops)
    steps |= {"stage_1": lambda: stage_1(sizes), "stage_2": lambda: stage_2(sizes),
              "diffusers": lambda: against_diffusers(sizes)}
    if sizes.compile:
        T, n = sizes.chunks[0]
        steps[f"chunk_{T}_compiled"] = lambda: chunk(sizes, T, n, True, tflops)
    return steps


GOALS = {                               # goal: (step that measures it, is it reached?)
    "parity": ("parity", lambda found: max(found["relative_error"]) < 0.02),
    "half of the card's rate, 33 frames": ("chunk_33", lambda found: found["share_of_rate"] >= 0.5),
    "half of the card's rate, 81 frames": ("chunk_81", lambda found: found["share_of_rate"] >= 0.5),
    "1.5 x diffusers": ("diffusers", lambda found: found["times_as_fast"] >= 1.5),
}


def judge(results):
    """{step: what was found} -> {goal: "met" or "missed"}. What was not measured is missed."""
    return {goal: "met" if isinstance(results.get(step), dict) and reached(results[step])
            else "missed" for goal, (step, reached) in GOALS.items()}


def check(sizes, minutes=8.0):
    """Run every step that still fits into the minutes -> {name: what was found}."""
    began = time.time()
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    results = {"card": card(sizes), "torch": torch.__version__, "commit": commit,
               "network": asdict(sizes.network)}
    for name, result in results.items():
        print(f"{name}: {result}", flush=True)
    for name, step in steps_of(sizes, results["card"]["tflops"]).items():
        empty()
        if time.time() - began > 60 * minutes:
            results[name] = "left out: no time"
        else:
            try:
                results[name] = step()
            except Exception as error:              # the other steps are still worth having
                results[name] = f"failed: {' '.join(str(error).split())[:300]}"
        print(f"{name}: {results[name]}", flush=True)
    results["goals"] = judge(results)
    results["minutes"] = round((time.time() - began) / 60, 2)
    return results


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="no step begins after so many")
    parser.add_argument("--out", type=Path, help="keep what was found as JSON")
    options = parser.parse_args(argv)
    if not options.toy and not torch.cuda.is_available():
        print("gpu_check.py: there is no GPU here; --toy rehearses on the CPU", file=sys.stderr)
        sys.exit(2)
    results = check(TOY if options.toy else Sizes(), options.minutes)
    if options.out:
        common.write_json(options.out, results)
    for goal, outcome in results["goals"].items():
        print(f"goal: {goal}: {outcome}")
    print(f"minutes: {results['minutes']}")
    failed = any(str(result).startswith("failed: ") for result in results.values())
    if failed or (not options.toy and "missed" in results["goals"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
