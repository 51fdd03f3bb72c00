"""One portrait and one recording in, a talking-head video of any length out. Paper section 3.4, "Inference".

    python infer.py --image me.jpg --audio speech.wav              writes talking.mp4

The chunk loop is all there is:
    z_id  = E(film of the portrait)                                 once                            Eq. 3, tre.py
    kappa = first latent of z_id                                    the cold start
    for each chunk of T frames (81; the small preset: 33):
        z = the student's 4 steps from noise, given audio, z_id, kappa                              dit.py
        frames = D(z); the first n are the last n of the chunk before: drop them, write the others as they come
        kappa = E(last n frames)                                    decoded, then encoded anew      section 3.2, Appendix D
Memory does not grow with the length, but for the recording itself (230 MB an hour). There are always ceil(seconds * 25) frames. Also a library:
    for frames in generate(load("weights/tiny"), image, audio): ...                                 uint8 (T, H, W, 3)
"""
import argparse
import ctypes
import json
import os
import signal
import sys
import time
import warnings
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from audio import AudioEncoder, encoder_of, load_audio
from data import FORMATS, MAX_PIXELS
from dit import AudioDiT, DiTConfig, sample_student, sample_teacher, student_sigmas
from tre import IDENTITY, continuity_reference
from vae import WanVAE, load_vae

FPS, HOP = 25, 640                                                              # frames a second; samples a frame at 16 kHz
CHUNK = 81                                                                      # frames a chunk, 21 latents, unless config.json says otherwise
MADE_BY = "Synthetic video: a machine animated one picture to one recording (AsymTalker, arXiv 2605.02948)."

# ---------------------------------------------------------------------------------------------------------------- models


@dataclass
class Models:
    vae: WanVAE
    dit: AudioDiT
    audio: AudioEncoder
    network: str                                                                # "student" or "teacher"
    size: int                                                                   # pixels along each side of the video
    trained: bool                                                               # False: first weights, the face will not talk yet
    frames: int = CHUNK                                                         # T, frames a chunk: as many as it was trained on
    identity: str = "tre"                                                       # identity reference that it was trained with
    shift: float = 5.0                                                          # of the student's noise levels, as its weights say


def pick(device, dtype):
    """"auto" -> the best there is. bfloat16 only where the processor multiplies in it; the time path and the encoder stay float32."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    elif device != "cpu" and not getattr(torch, device).is_available():
        raise ValueError(f"there is no {device} device here: try --device cpu")
    if dtype == "auto":
        can = getattr(torch.cpu, "get_capabilities", dict)()
        fast = device == "cuda" or device == "cpu" and (can.get("avx512_bf16") or can.get("amx_bf16"))
        dtype = "bfloat16" if fast else "float32"
    return device, getattr(torch, dtype)


def load(weights="weights/tiny", network="student", device="auto", dtype="auto"):
    """A folder of weights (config.json, vae / student / teacher .safetensors, whisper/) -> Models. The process keeps its freed memory from then on.

    FileNotFoundError or ValueError, in one line, if a part is missing or does not fit its config."""
    from safetensors import SafetensorError, safe_open
    folder = Path(weights)
    device, dtype = pick(device, dtype)
    keep_freed_memory()
    for name in ("config.json", "vae.safetensors", f"{network}.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no weights in {folder}: {name} is missing")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        vae = load_vae(folder, device)
        with torch.device("meta"):                                              # no time spent on random weights that are replaced
            dit = AudioDiT(DiTConfig(**config["dit"]))
        with safe_open(folder / f"{network}.safetensors", "pt") as file:
            tensors = {k: file.get_tensor(k).float() for k in file.keys()}
            about = file.metadata() or {}
            trained, identity = about.get("trained") != "no", about.get("identity", "tre")
            shift = float(json.loads(about.get("config", "{}")).get("sample_shift", 5.0))
        dit.load_state_dict(tensors, assign=True)
        if (skip := float(about.get("skip", dit.config.skip))) != dit.config.skip:              # no tensor's shape would tell
            raise ValueError(f"{network}.safetensors was made with skip {skip:g}, config.json says {dit.config.skip:g}")
        heard, size, frames = str(config["audio"]), int(config["size"]), int(config.get("frames", CHUNK))
        if size < 16 or size % 16 or frames % 4 != 1 or frames < 5 or not 1 <= shift < np.inf or vae.config.z_dim != dit.config.channels:
            raise ValueError(f"size {size} (a multiple of 16), frames {frames} (4k + 1), shift {shift} (1 or more) or the number of latent channels")
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the weights in {folder} do not fit together: {type(error).__name__}: {reason}") from None
    audio = encoder_of(folder, heard, device)                                   # its errors name the encoder: no second sentence
    if (audio.layers, audio.dim) != (dit.config.audio_layers, dit.config.audio_dim):
        raise ValueError(f"the weights in {folder} do not fit together: the generator hears {dit.config.audio_layers} x "
                         f"{dit.config.audio_dim} audio features, the audio encoder makes {audio.layers} x {audio.dim}")
    dit = dit.to(device).eval().requires_grad_(False).cast_matrices(dtype)
    vae.decoder.to(dtype)                                                       # a bfloat16 decoder is safe; a bfloat16 *encoder* would
    vae.conv2.to(dtype)                                                         # add its rounding to every chunk's kappa, and drift
    return Models(vae, dit, audio, network, size, trained, frames, identity, shift)


def load_image(path, size):
    """A picture of one of FORMATS (also CMYK, palette, transparent, turned by EXIF) -> float32 (1, 3, size, size) in [-1, 1]: the centre square.

    The small preset knows faces that fill about half the height of the square, eyes a little above the middle.
    FileNotFoundError, or ValueError for what is not a picture, under 16 px or over 100 megapixels."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such picture: {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                                     # Pillow's own warnings on size: we have our limit
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{path} has {image.width} x {image.height} pixels: scale it down first")
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith(("I", "F")):                           # 16 and 32 bits a pixel: Pillow would cut, not scale
                    image = Image.fromarray(np.uint8(255 * to_unit(np.asarray(image, np.float32))))
                if image.mode in ("P", "PA", "LA", "RGBA", "La", "RGBa") or "transparency" in image.info:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                image = image.convert("RGB")
    except Image.DecompressionBombError:
        raise ValueError(f"{path} has far too many pixels: scale it down first") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a picture that can be read: {', '.join(FORMATS)}") from None
    except (OSError, SyntaxError, EOFError, RuntimeError, MemoryError) as error:     # what Pillow's formats raise for damaged files
        raise ValueError(f"{path} cannot be read as a picture: {str(error) or type(error).__name__}") from None
    if min(image.size) < 16:
        raise ValueError(f"{path} is only {image.width} x {image.height} pixels: a face needs more")
    image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)         # centre square, then scale
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_unit(x):
    """Grey values of a deep picture -> [0, 1]: by the 16-bit scale if they use it, else from the darkest to the brightest."""
    low, high = (0, 65535) if x.min() >= 0 and 255 < x.max() <= 65535 else (np.nanmin(x), np.nanmax(x))
    return np.nan_to_num(np.clip((x - low) / max(high - low, 1e-9), 0, 1))


# ------------------------------------------------------------------------------------------------------------------ loop


class Stopwatch(defaultdict):
    """Seconds by stage: `with clock("decode"): ...`"""

    def __init__(self):
        super().__init__(float)

    @contextmanager
    def __call__(self, stage):
        start = self.now()
        yield
        self[stage] += self.now() - start

    @staticmethod
    def now():
        if torch.cuda.is_available():
            torch.cuda.synchronize()                                            # a GPU returns before it has done its work
        return time.perf_counter()


@torch.inference_mode()
def generate(models, image, audio, steps=4, seed=0, continuity_frames=9, handover="reencode", identity="auto", guidance=4.0,
             guidance_focus=16.0, liveliness=1.4, clock=None):
    """The chunk loop. Yields uint8 (T, H, W, 3) pieces, ceil(samples / 640) frames in all.

    image (1, 3, H, W) in [-1, 1]; audio (samples,) float32 at 16 kHz. continuity_frames n = 4k+1 (1, 5, 9, 13) frames, handed over by
    handover "reencode" (the paper's) or "latents" (the last latents as they are: Appendix D's comparison). identity "tre", "etr", or
    "auto", the one that the network was trained with.
    guidance, guidance_focus, liveliness (see dit.guided_velocity) and steps > 4 are the teacher's. Same seed, same frames. ValueError, at the
    first frame, for values outside these."""
    n, m = continuity_frames, 1 + (continuity_frames - 1) // 4                  # kappa holds m latents = n frames
    T, identity = models.frames, models.identity if identity == "auto" else identity
    if n % 4 != 1 or not 1 <= n < T:
        raise ValueError(f"continuity frames must be 1, 5, 9, 13, ... and fewer than the {T} of a chunk, not {n}")
    if handover not in ("reencode", "latents") or identity not in IDENTITY:
        raise ValueError("handover must be reencode or latents, identity auto, tre or etr")
    if steps < 1 or not 0 <= seed < 2**63 or not 0 <= guidance_focus < np.inf or not 0 <= liveliness < np.inf:
        raise ValueError("steps must be at least 1, the seed in [0, 2^63), guidance_focus and liveliness 0 or more")
    clock = Stopwatch() if clock is None else clock                             # (an empty dict is false)
    image = image.to(device := models.vae.stats.device)
    generator = torch.Generator().manual_seed(seed)                             # on the CPU: the same noise on every machine
    total, start = -(-len(audio) // HOP), 0                                     # ceil; first frame of this chunk
    with clock("identity"):
        z_id = IDENTITY[identity](models.vae, image, T)                         # (1, C, F, h, w)
    kappa = z_id[:, :, :1]                                                      # cold start: the portrait itself is frame 0
    while True:
        with clock("audio"):
            heard = models.audio.features(audio, start, T)[None]                # (1, T, L, A); zeros after the end
        noise = torch.randn(z_id.shape, generator=generator).to(device)
        with clock("dit"):
            if models.network == "teacher":
                z = sample_teacher(models.dit, noise, z_id, heard, kappa, steps, guidance=guidance, focus=guidance_focus, liveliness=liveliness)
            else:
                z = sample_student(models.dit, noise, z_id, heard, kappa, student_sigmas(steps, models.shift), generator)
        if not torch.isfinite(z).all():
            raise ValueError("the generator made NaN: broken weights, or a --dtype that is too narrow")
        made, tail = start, None                                                # frames decoded so far; the last n of them
        done = start + n if start else 0                                        # what chunk i-1 has already given
        pieces = models.vae.decode_stream(z)
        while made < min(start + T, total):                                     # past the recording's end nothing is decoded
            with clock("decode"):
                video = next(pieces)                                            # (1, 3, 1 or 16, H, W)
            first, made = made, made + video.shape[2]
            tail = video if tail is None else torch.cat([tail, video], 2)[:, :, -n:]
            if made > done:
                yield to_uint8(video[0, :, max(0, done - first):total - first])
        if made >= total:
            return
        with clock("re-encode"):
            kappa = continuity_reference(models.vae, tail, n) if handover == "reencode" else z[:, :, -m:]
        start += T - n


def to_uint8(video):
    """(3, T, H, W) in [-1, 1] -> uint8 (T, H, W, 3) on the CPU."""
    return ((video + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).cpu().numpy()


# ------------------------------------------------------------------------------------------------------------------ file


class Mp4Writer:
    """H.264 + AAC, written as frames come, with the recording beside them, under a temporary name that close() turns into the real one."""

    def __init__(self, path, size, audio):
        self.path, self.audio, self.frames = Path(path), audio, 0
        self.part = self.path.with_name(f".{self.path.stem}.{os.getpid()}.part.mp4")
        self.container = av.open(str(self.part), "w", options={"movflags": "faststart"})
        self.container.metadata["comment"] = MADE_BY
        self.video = self.container.add_stream("libx264", FPS, options={"crf": "18", "preset": "veryfast"})
        self.video.width = self.video.height = size
        self.video.pix_fmt = "yuv420p"
        self.sound = self.container.add_stream("aac", 16000, layout="mono")
        self.sound.bit_rate = 64000

    def write(self, frames):                                                    # uint8 (T, H, W, 3)
        for frame in frames:
            self.container.mux(self.video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))))
            piece = self.audio[self.frames * HOP:(self.frames + 1) * HOP]       # sound goes along, frame by frame: O(1) memory
            if len(piece):
                block = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece[None], np.float32), "fltp", "mono")
                block.sample_rate, block.pts = 16000, self.frames * HOP
                self.container.mux(self.sound.encode(block))
            self.frames += 1

    def close(self, keep=True):
        """keep=False (an error, or nothing made yet) leaves no file; keep=True leaves a playable one, also after Ctrl-C."""
        try:
            if keep and self.frames:
                self.container.mux(self.video.encode(None))
                self.container.mux(self.sound.encode(None))
            self.container.close()
            if keep and self.frames:
                os.replace(self.part, self.path)
        finally:
            self.part.unlink(missing_ok=True)                                   # gone already if it was renamed


# ------------------------------------------------------------------------------------------------------------------ main


def build_parser():
    p = argparse.ArgumentParser(description="One portrait and one recording in, a talking-head video out (arXiv 2605.02948).",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    needed = {"required": True, "default": argparse.SUPPRESS}                   # its help shall not end in "(default: None)"
    p.add_argument("--image", **needed, help="a portrait, jpg, png, webp, ...: one face, looking into the camera")
    p.add_argument("--audio", **needed, help="a recording, wav, flac, mp3, ogg, m4a, mp4, ...: its length is the video's")
    p.add_argument("--out", default="talking.mp4", help="the video to write (H.264 + AAC)")
    p.add_argument("--weights", default=Path(__file__).parent / "weights" / "tiny", help="folder of weights (config.json and *.safetensors)")
    p.add_argument("--network", choices=["student", "teacher"], default="student", help="which generator of that folder makes the video")
    p.add_argument("--steps", type=int, default=4, help="denoising steps a chunk; the teacher wants 20 to 50")
    p.add_argument("--guidance", type=float, default=4.0, help="audio guidance of the teacher, 1 = none; the student has none")
    p.add_argument("--guidance-focus", type=float, default=16.0, help="how narrowly it guides where the sound is heard: the lips; 0: everywhere")
    p.add_argument("--liveliness", type=float, default=1.4, help="factor on all else that differs from the portrait; with a focus only; 1: none")
    p.add_argument("--seed", type=int, default=0, help="same seed, same video; another seed moves the head differently")
    p.add_argument("--continuity-frames", type=int, default=9, help="frames handed from chunk to chunk: 1, 5, 9 or 13")
    p.add_argument("--handover", choices=["reencode", "latents"], default="reencode", help="hand them over decoded and encoded anew, or as latents")
    p.add_argument("--identity", choices=["auto", *IDENTITY], default="auto", help="identity reference: Eq. 3, or encode-then-repeat, Eq. 29; "
                   "auto: the one that was trained with")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute; auto: a GPU if there is one")
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of generator and decoder; auto: bfloat16 if it is fast")
    p.add_argument("--compile", action="store_true", help="torch.compile the generator: slower start, faster chunks")
    p.add_argument("--bench", action="store_true", help="print frames a second, split by stage, first-frame latency, peak memory")
    return p


def peak_memory():
    try:
        from resource import RUSAGE_SELF, getrusage  # not on Windows
    except ImportError:
        return "unknown"
    unit = 2**20 if sys.platform == "darwin" else 2**10                         # macOS counts bytes, Linux KiB
    return f"{getrusage(RUSAGE_SELF).ru_maxrss / unit:.0f} MiB"


def run(args):
    begin = time.perf_counter()
    out = Path(args.out)
    audio = load_audio(args.audio)
    if not os.access(out.parent, os.W_OK) or out.exists() and not out.is_file():
        raise ValueError(f"cannot write to {out}")
    if out.exists() and any(out.samefile(p) for p in (args.audio, args.image) if Path(p).exists()):
        raise ValueError(f"{out} is one of the inputs: choose another --out")
    models = load(args.weights, args.network, args.device, args.dtype)
    image = load_image(args.image, models.size)
    if not models.trained:
        print(f"note: the {models.network} in {args.weights} is untrained: expect coloured fog, not a face", file=sys.stderr)
    if args.compile:
        models.dit.compile(dynamic=False)
    clock, first, ready = Stopwatch(), None, time.perf_counter()
    pieces = generate(models, image, audio, args.steps, args.seed, args.continuity_frames, args.handover, args.identity,
                      args.guidance, args.guidance_focus, args.liveliness, clock)
    writer, keep = Mp4Writer(out, models.size, audio), False
    try:
        with tqdm(total=-(-len(audio) // HOP), unit="frame", disable=None) as bar:
            for frames in pieces:
                first = first or time.perf_counter()
                with clock("write"):
                    writer.write(frames)
                bar.update(len(frames))
        keep = True
    except KeyboardInterrupt:
        keep = True
        raise
    finally:
        with clock("write"):
            writer.close(keep)
        if keep and writer.frames:
            seconds = time.perf_counter() - ready
            print(f"video: {out}\nframes: {writer.frames}\nseconds: {writer.frames / FPS:.2f}\nframes_per_second: {writer.frames / seconds:.1f}")
    if args.bench:
        for stage, spent in clock.items():
            print(f"{stage}_seconds: {spent:.2f}\n{stage}_share: {spent / seconds:.3f}")
        print(f"load_seconds: {ready - begin:.2f}\nfirst_frame_seconds: {first - ready:.2f}\npeak_memory: {peak_memory()}")


def keep_freed_memory():
    """glibc hands big freed buffers back to the system and gets them again page by page, zeroed: a tenth to a fifth of the decoding time."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        if libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 32 << 20):             # M_MMAP_THRESHOLD; an older glibc takes no more than 32 MiB
            libc.mallopt(-1, 1 << 30)                                           # M_TRIM_THRESHOLD


def main(argv=None):
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)                   # `kill` ends as Ctrl-C does: no hidden part file stays behind
    try:
        run(args)
    except (ValueError, OSError, av.error.FFmpegError) as error:
        print(f"infer.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("infer.py: stopped; if a video was begun, it is kept", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
