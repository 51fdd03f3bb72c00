"""Makes a talking-head video of any length from one photo and one recording. Section 3.4.

    python infer.py --image me.jpg --audio speech.wav               writes talking.mp4
    python infer.py --image photos --audio a.wav b.wav --out DIR    each with each: DIR/me-a.mp4 ...

The chunk loop is the whole method:

    z_id  = E(the portrait, T times)                                once: Eq. 3, tre.py
    kappa = the first latent of z_id                                of the first chunk
    for each chunk of T frames (81; the small preset: 33):
        z = the student's 4 steps from noise, given audio, z_id and kappa           dit.py
        frames = D(z)       the first n are the last n of the chunk before: skip them
        kappa = E(the last n frames)                                section 3.2, Appendix D

The video has ceil(seconds * 25) frames. Memory does not grow with its length, except for the
recording itself (230 MB an hour). It is also a library:

    for frames in generate(load("weights/tiny"), image, audio):     # uint8 (T', H, W, 3)

audio may also be an iterator of blocks, as a microphone makes them. A chunk cannot start before its
sound is there: T / 25 s for the first chunk, then (T - n) / 25 s (the small preset: 1.3 and 1 s).
"""
import json
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from safetensors import safe_open
from tqdm import tqdm

import common
from audio import AudioEncoder, load_audio, load_audio_encoder
from data import FPS, HOP, to_uint8
from dit import (
    AudioDiT,
    DiTConfig,
    classifier_free_guidance,
    sample_student,
    sample_teacher,
    student_sigmas,
)
from media import read_picture
from tre import IDENTITY, continuity_reference
from vae import PreviewDecoder, WanVAE, load_preview_decoder, load_vae

# ------------------------------------------------------------------------------------------- models


@dataclass
class Models:
    """All that generate() needs. dataclasses.replace(models, steps=8) makes a variant."""
    vae: WanVAE
    dit: AudioDiT
    audio: AudioEncoder
    network: str                        # "student" or "teacher"
    size: int                           # pixels along each side of the video
    trained: bool                       # False: initial weights, the video will be noise
    frames: int                         # T, frames of a chunk
    identity: str                       # identity reference, "tre" (Eq. 3) or "etr" (Eq. 29)
    continuity_frames: int              # n = 4k + 1, frames that two chunks share
    steps: int                          # denoising steps of a chunk
    timestep_shift: float               # 1: even noise levels, more: denser near noise
    guidance: float = 1.0               # the teacher's audio guidance, 1 = none
    guide: Callable = classifier_free_guidance                      # the teacher's guidance rule
    match_colour: bool = False          # every frame gets the portrait's colour statistics
    preview: PreviewDecoder | None = None                           # decodes instead of the VAE


def load(weights="weights/tiny", network="student", device="auto", dtype="auto"):
    """A folder (config.json, vae / student / teacher .safetensors, audio encoder) -> Models.

    The process keeps its freed memory from then on. FileNotFoundError or ValueError, in one line,
    if a part is missing or the parts do not fit together."""
    folder = Path(weights)
    device, dtype = common.select_device(device, dtype)
    common.keep_freed_memory()
    with weights_errors(folder, "config.json", "vae.safetensors", f"{network}.safetensors"):
        config, settings = read_config(folder, network)
        audio_name = str(config["audio"])
        vae = load_vae(folder, device)
        dit, guide, trained = load_dit(folder / f"{network}.safetensors", config)
    audio = load_audio_encoder(folder, audio_name, device, config.get("audio_window"))
    made = vae.config.z_dim, audio.layers, audio.dim
    read = dit.config.channels, dit.config.audio_layers, dit.config.audio_dim
    if made != read:
        raise ValueError(f"the weights in {folder} do not fit together: the {network} reads {read} "
                         f"latent channels, audio layers and numbers in a layer, not {made}")
    dit = dit.eval().requires_grad_(False).cast_matrices(dtype).to(device)
    vae.decoder.to(dtype)               # the encoder stays float32: its rounding would enter
    vae.conv2.to(dtype)                 # every kappa, and the video would drift
    return Models(vae, dit, audio, network, trained=trained, guide=guide, **settings)


@contextmanager
def weights_errors(folder, *names):
    """Files of these names must be there, and whatever a damaged one raises becomes ValueError."""
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no weights in {folder}: {name} is missing")
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} has no {error}") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the weights in {folder} do not fit together: {reason}") from None


def read_config(folder, network):
    """-> config.json, the numbers in Models. KeyError: one is missing, ValueError: it is bad."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = {key: config[key] for key in ("size", "frames", "continuity_frames", "identity")}
    settings |= {key: config[network][key] for key in ("steps", "timestep_shift")}
    if network == "teacher":
        settings["guidance"] = config["teacher"]["guidance"]
    size, T, n = settings["size"], settings["frames"], settings["continuity_frames"]
    side = 16 * config.get("vae", {}).get("patch", 1)              # pixels of a token
    rules = {f"size must be a multiple of {side}": size >= side and size % side == 0,
             "frames must be 4k + 1, 5 or more": T >= 5 and T % 4 == 1,
             "continuity_frames must be 4k + 1, fewer than frames": 1 <= n < T and n % 4 == 1,
             "identity must be tre or etr": settings["identity"] in IDENTITY,
             "steps must be 1 or more": settings["steps"] >= 1,
             "timestep_shift must be 1 or more": 1 <= settings["timestep_shift"] < float("inf")}
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise ValueError(f"config.json: {', '.join(broken)}")
    return config, settings


def load_dit(path, config):
    """NETWORK.safetensors -> (network, float32 on the CPU; its guidance rule; is it trained).

    A block "tiny" in config.json is what the shipped weights need and the paper has not."""
    size = DiTConfig(**config["dit"])
    tiny = config.get("tiny")
    with torch.device("meta"):          # no time for random weights that are replaced at once
        if tiny:
            from tiny.model import TinyDiT, make_guide
            dit = TinyDiT(size, tiny["edm_skip"])
            guide = make_guide(tiny["guidance_sharpness"], tiny["motion_guidance"])
        else:
            dit, guide = AudioDiT(size), classifier_free_guidance
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}
        trained = (file.metadata() or {}).get("trained") != "no"
    dit.load_state_dict(tensors, assign=True)
    return dit, guide, trained

# --------------------------------------------------------------------------------------------- loop


@torch.inference_mode()
def generate(models, image, audio, seed=0, steps=None, guidance=None, continuity_mode="reencode",
             clock=None):
    """The chunk loop. Yields uint8 (T', H, W, 3) pieces, ceil(samples / 640) frames in all.

    image (1, 3, H, W) in [-1, 1]; audio (samples,) float32 at 16 kHz, or an iterator of its blocks:
    same frames, each chunk as soon as its sound is there. steps, guidance: None is what the weights
    say; the student takes no guidance. continuity_mode "reencode" is the paper's,
    "latents" takes the last latents as they are, Appendix D's comparison. clock: a Stopwatch.
    Same seed, same frames. ValueError, at the first frame, for values outside these."""
    # PLUMBING: options, and the stages, each timed by the clock
    check_options(models, seed, steps, guidance, continuity_mode)
    steps = models.steps if steps is None else steps
    guidance = models.guidance if guidance is None else guidance
    generator = torch.Generator().manual_seed(seed)                 # CPU: same noise everywhere
    image = image.to(models.vae.stats.device)
    clock = common.Stopwatch() if clock is None else clock          # (an empty one is false)
    encode_identity = clock("identity")(IDENTITY[models.identity])
    encode_audio = clock("audio")(models.audio.features)
    denoise = clock("dit")(sample)
    reencode = clock("re-encode")(continuity_reference)

    # PAPER section 3.4
    T, n = models.frames, models.continuity_frames
    m = 1 + (n - 1) // 4                                            # latents of n frames
    blocks = iter([audio] if hasattr(audio, "shape") else audio)
    audio = np.zeros(0, np.float32)                                 # what of it is there
    shown = 0                                                       # frames yielded so far
    tail = image[:, :, None][:, :, :0]                              # (1, 3, <= n, H, W), newest
    z_id = encode_identity(models.vae, image, T)                    # (1, C, F, h, w), Eq. 3
    kappa = z_id[:, :, :1]                                          # frame 0 is the portrait
    for start in count(0, T - n):                                   # first frame of the chunk
        audio = listen(audio, blocks, (start + T) * HOP)
        total = -(-len(audio) // HOP)                               # frames of the video: ceil
        if shown == total:
            return                                                  # that was the last chunk
        features = encode_audio(audio, start, T)[None]              # (1, T, L, A), 0 after the end
        noise = torch.randn(z_id.shape, generator=generator).to(image.device)
        z = denoise(models, noise, z_id, features, kappa, steps, guidance, generator)
        skip = min(n, T - n) if start else 0    # shown before, and not needed for kappa
        end = start + skip                                          # of what is decoded
        decoder = models.preview or models.vae
        for video in decode(decoder, z, skip, min(T, total - start), clock):
            if models.match_colour:                                 # before it is shown or encoded
                video = common.match_colours(video, image)
            new = video[0, :, max(0, shown - end):total - end]      # without those shown before
            end += video.shape[2]
            shown += new.shape[1]
            tail = torch.cat([tail, video], 2)[:, :, -n:]
            if new.shape[1]:
                yield to_uint8(new)
        if continuity_mode == "reencode":
            kappa = reencode(models.vae, tail, n)                   # (1, C, m, h, w), section 3.2
        else:
            kappa = z[:, :, -m:]                                    # Appendix D's comparison


def listen(audio, blocks, samples):
    """Append blocks to audio (samples',) until there are enough, or the recording is over."""
    parts = [audio] if len(audio) else []
    have = len(audio)
    while have < samples and (block := next(blocks, None)) is not None:
        parts.append(np.asarray(block, np.float32))
        have += len(block)
    if not parts:
        return audio
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def check_options(models, seed, steps, guidance, continuity_mode):
    """ValueError for options of generate() that it cannot follow."""
    if guidance is not None and models.network == "student":
        raise ValueError("the student takes no --guidance: it has learned the teacher's")
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be 1 or more, not {steps}")
    if not 0 <= seed < 2**63 or continuity_mode not in ("reencode", "latents"):
        raise ValueError("the seed must be in [0, 2^63), continuity_mode reencode or latents")


def sample(models, noise, z_id, features, kappa, steps, guidance, generator):
    """noise (1, C, F, h, w) -> clean latents of a chunk, by the sampler of the network."""
    shift = models.timestep_shift
    if models.network == "teacher":
        z = sample_teacher(models.dit, noise, z_id, features, kappa, steps, shift, guidance,
                           models.guide)
    else:
        sigmas = student_sigmas(steps, shift)
        z = sample_student(models.dit, noise, z_id, features, kappa, sigmas, generator)
    if not torch.isfinite(z).all():
        raise ValueError("the network made NaN: broken weights, or too narrow numbers (--dtype)")
    return z


def decode(vae, z, skip, frames, clock):
    """Frames `skip` to `frames` of D(z), in pieces (1, 3, T', H, W): none past the recording."""
    pieces = vae.decode_stream(z, skip)
    made = skip
    while made < frames:
        with clock("decode"):
            video = next(pieces)
        made += video.shape[2]
        if video.shape[2]:                                          # not all of it was skipped
            yield video

# --------------------------------------------------------------------------------------------- main

FromWeights = tyro.conf.arg(metavar="NUMBER", help_behavior_hint="(default: as in the weights)")
FromVAE = tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: the VAE's own decoder)")
Largest = tyro.conf.arg(metavar="NUMBER", help_behavior_hint="(default: 1, the largest)")
Unmade = tyro.conf.arg(metavar="FILE.webp", help_behavior_hint="(default: not made)")


@dataclass(frozen=True)
class Options:
    image: Path                         # photo of a face (jpg, png, webp ...), or a folder of them
    audio: tuple[Path, ...]             # recordings (wav, mp3, m4a, mp4 ...) or folders of them
    out: Path = Path("talking.mp4")     # .mp4 .mov .mkv .webm or (silent) .gif; of several: folder
    preview: Annotated[Path | None, Unmade] = None      # an animated picture of the first 4 s
    crop: Literal["face", "none"] = "face"      # none: the centre square as it is; for drawn faces
    face: Annotated[int | None, Largest] = None         # which face of several, by size
    weights: Path = Path(__file__).parent / "weights/tiny"          # folder with config.json
    network: Literal["student", "teacher"] = "student"              # which one makes the video
    steps: Annotated[int | None, FromWeights] = None                # denoising steps of a chunk
    guidance: Annotated[float | None, FromWeights] = None           # audio guidance, teacher only
    continuity_mode: Literal["reencode", "latents"] = "reencode"    # kappa: the paper's or App. D's
    match_colour: bool = False          # give each frame the portrait's colour statistics
    preview_decoder: Annotated[Path | None, FromVAE] = None         # file taew2_1: fast, softer
    seed: int = 0                       # same seed, same video
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"          # auto: a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"          # of network and decoder
    compile: bool = False               # torch.compile the network: slow start, faster chunks
    bench: bool = False                 # print seconds by stage, first-frame latency, peak memory


def load_portrait(path, picture, size, crop="face", face=None):
    """Pillow image -> float32 (1, 3, size, size) in [-1, 1]: its face, framed as in training.

    Prints what was done, and warnings on stderr. ValueError if there is no (such) face."""
    if crop == "face":
        from measure.framing import frame_face
        picture, note, warnings = frame_face(path, picture, size, face)
        common.say(f"face: {note}")
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
    return common.centre_square(picture, size)


def prepare(options):
    """Flags -> models. Notes on stderr; ValueError for options that do not fit them."""
    models = load(options.weights, options.network, options.device, options.dtype)
    check_options(models, options.seed, options.steps, options.guidance, options.continuity_mode)
    models.match_colour = options.match_colour
    if options.preview_decoder:
        models.preview = load_preview_decoder(options.preview_decoder, models.vae)
    if not models.trained:
        print(f"note: this {models.network} is untrained: the video is noise", file=sys.stderr)
    if models.network == "student" and options.steps not in (None, models.steps):
        print(f"note: this student was distilled for {models.steps} steps", file=sys.stderr)
    if options.compile:
        models.dit.compile(dynamic=False)
    return models


def make_video(options, models, image, audio, sound, out):
    """One video with this sound (see VideoWriter), and its figures on stdout."""
    began = time.perf_counter()
    clock = common.Stopwatch()
    pieces = generate(models, image, audio, options.seed, options.steps, options.guidance,
                      options.continuity_mode, clock)
    bar = tqdm(total=-(-len(audio) // HOP), unit="frame", disable=None)
    with bar, common.VideoWriter(out, models.size, sound) as writer:
        for frames in pieces:
            if not writer.frames:
                first = time.perf_counter() - began
            with clock("write"):
                writer.write(frames)
            bar.update(len(frames))
    seconds = time.perf_counter() - began
    common.say(f"video: {out}\nframes: {writer.frames}\nseconds: {writer.frames / FPS:.2f}\n"
               f"frames_per_second: {writer.frames / seconds:.1f}")
    if options.preview:
        common.write_preview(options.preview, out)
    if options.bench:
        for stage, spent in clock.items():
            common.say(f"{stage}_seconds: {spent:.2f}\n{stage}_share: {spent / seconds:.3f}")
        common.say(f"first_frame_seconds: {first:.2f}\npeak_memory: {common.peak_memory()}")


def run(options):
    """Each photo and each recording is read once; bad ones before the weights are loaded."""
    began = time.perf_counter()
    videos = common.list_videos(options)
    with weights_errors(options.weights, "config.json"):
        size = read_config(options.weights, options.network)[1]["size"]
    skipped, portraits, models = common.Skipped(common.is_batch(options)), {}, None
    for photo in next(iter(videos.values())):
        with skipped:
            picture = read_picture(photo)
            portraits[photo] = load_portrait(photo, picture, size, options.crop, options.face)
    for recording, outs in videos.items():
        audio = None
        with skipped:
            audio = load_audio(recording)
        if audio is None or not portraits:
            continue
        if models is None:
            models = prepare(options)
            if common.is_batch(options):
                options.out.mkdir(exist_ok=True)
            if options.bench:
                common.say(f"load_seconds: {time.perf_counter() - began:.2f}")
        for photo, image in portraits.items():
            with skipped:
                make_video(options, models, image, audio, recording, outs[photo])
    if skipped.count:
        raise ValueError(f"{skipped.count} skipped, see above")


def main(argv=None):
    options = tyro.cli(Options, args=argv, prog="infer.py", description=__doc__,
                       config=(tyro.conf.FlagCreatePairsOff,))
    with common.one_line_errors("infer.py", "stopped; if a video was begun, it is kept"):
        run(options)


if __name__ == "__main__":
    main()
