"""Recording -> Wav2Vec2 hidden states at 25 fps -> the audio tokens of every latent frame. Paper sections 3.1 and 3.2, Eq. 23.

The DiT never hears a waveform. A frozen Wav2Vec2 turns 16 kHz sound into hidden states, one vector per video frame and layer; a latent is told
about its own frames and two more on each side. In the order of this file:
    load_audio          any file -> 16 kHz mono
    AudioEncoder        8 s of sound -> (frames, layers, dim); stretched to 25 fps *before* the transformer
    AudioProjection     5 or 8 neighbouring frames -> S tokens per latent; trained together with the DiT
The full-size preset uses facebook/wav2vec2-base-960h, the tiny one a small network of the same class. The rest of the file trains that one to
name the phone in every frame, and measures it on speakers it never heard:
    python audio.py --speech DIR --phones DIR               -> weights/tiny/wav2vec2 (--resume after a kill)
    python audio.py --speech DIR --phones DIR --evaluate    -> figures, metrics.json
Shapes: B batch, T pixel frames, F latent frames, S tokens per latent, L layers, A width of a hidden state.
"""
import argparse
import copy
import json
import os
import time
import timeit
import zlib
from collections import namedtuple
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

import av
import numpy as np
import soundfile
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

RATE = 16000                # samples a second, what every Wav2Vec2 expects
FPS = 25                    # video frames a second
HOP = RATE // FPS           # samples of one video frame: frame i owns samples [640 i, 640 (i+1))
CONTEXT = 8 * FPS           # frames the encoder hears at most, back from the end of the frames asked for

# -------------------------------------------------------------------------------------------------- recording

def _blocks(path):
    """Yields (rate, float32 (n, channels)), by libsndfile (wav flac mp3 ogg) or by FFmpeg (m4a mp4 mov)."""
    try:
        file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError:
        file = None
    while file and len(block := file.read((1 << 18) // file.channels, dtype="float32", always_2d=True)):
        yield file.samplerate, block
    if file:
        return file.close()
    with av.open(str(path)) as container:
        if not container.streams.audio:
            raise ValueError(f"{path} has no sound track")
        to_float = av.AudioResampler(format="flt")                          # changes the sample format only
        for i, frame in enumerate(container.decode(audio=0)):
            late = (frame.time or 0) - (max(0, container.start_time or 0) / av.time_base if container.streams.video else 0)
            if i == 0 and 0 < late < 300:                                   # than the picture, s; more is a broken clock
                yield frame.sample_rate, np.zeros((round(late * frame.sample_rate), 1), np.float32)
            for part in to_float.resample(frame):
                yield part.sample_rate, part.to_ndarray().reshape(-1, part.layout.nb_channels)


def _to_16k(blocks, path):
    """Blocks of any rate -> 16 kHz mono pieces. swresample's windowed sinc drops what 16 kHz cannot hold."""
    resampler, pieces, rate = av.AudioResampler(format="flt", layout="mono", rate=RATE), [], None
    for rate, block in blocks:
        if rate < 4000:
            raise ValueError(f"{path} has {rate} samples a second: damaged, or too few for speech")
        if not np.isfinite(block).all():
            raise ValueError(f"{path} contains NaN or infinite samples")
        frame = av.AudioFrame.from_ndarray(block.mean(1, dtype=np.float32)[None], format="flt", layout="mono")
        frame.sample_rate = rate
        pieces += resampler.resample(frame)
    pieces += resampler.resample(None) if rate else []                      # what is still inside the filter
    return [piece.to_ndarray()[0] for piece in pieces]


def load_audio(path):
    """Any recording -> float32 (samples,) at 16 kHz, mono, in [-1, 1]. Silence is fine.

    Raises FileNotFoundError if there is no such file, ValueError if it is not audio, empty, or holds NaN."""
    if not (path := Path(path)).exists():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        pieces = _to_16k(_blocks(path), path)
    except (av.FFmpegError, soundfile.LibsndfileError, OSError) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not sum(map(len, pieces)):
        raise ValueError(f"{path} has no samples")
    return np.concatenate(pieces).clip(-1, 1)

# ---------------------------------------------------------------------------------------------------- encoder

def normalise(wave):
    """(..., samples) -> zero mean, unit variance, as Wav2Vec2's own feature extractor; silence stays zero."""
    wave = wave - wave.mean(-1, keepdim=True)
    return wave * (wave.square().mean(-1, keepdim=True) + 1e-7).rsqrt()


def transformer_states(model, features):
    """(B, T, conv width) -> L tensors (B, T, A): all hidden states but the embedding, the last one normed."""
    hidden, _ = model.feature_projection(features)
    encoder, norm_last, states = model.encoder, model.config.do_stable_layer_norm, []
    hidden = hidden + encoder.pos_conv_embed(hidden)
    hidden = encoder.dropout(hidden if norm_last else encoder.layer_norm(hidden))   # base models norm first,
    for layer in encoder.layers:
        hidden = layer(hidden)
        states.append(hidden)
    return states[:-1] + [encoder.layer_norm(hidden)] if norm_last else states      # large ones last


def encode(model, wave):
    """wave (B, 640 T), normalised -> L tensors (B, T, A), an entry per video frame."""
    features = model.feature_extractor(wave)                                # (B, conv width, ~2T) at 50 Hz
    features = F.interpolate(features, size=wave.shape[-1] // HOP, mode="linear", align_corners=True)
    return transformer_states(model, features.transpose(1, 2))


class AudioEncoder:
    """A frozen Wav2Vec2Model from a local folder (config.json, model.safetensors) or by its hub name.

    .layers L and .dim A are the sizes of features(). ValueError / FileNotFoundError if it does not load."""

    def __init__(self, name_or_path, device="cpu"):
        from huggingface_hub import constants, get_session  # here: the imports take seconds
        from transformers import Wav2Vec2Model, logging
        folder = Path(name_or_path)
        if not folder.exists() and (folder.is_absolute() or len(folder.parts) != 2):
            raise FileNotFoundError(f"no such folder of audio weights: {folder}")
        for name in ("config.json", "model.safetensors"):
            if folder.exists() and not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no Wav2Vec2: {name} is missing")
        logging.set_verbosity_error()                       # else it lists what is left over (base-960h has a
        logging.disable_progress_bar()                      # head for letters), and draws bars
        try:
            if not (here := folder.exists()):               # a hub name: one question, for without a network
                get_session().head(constants.ENDPOINT, timeout=3)               # from_pretrained asks for 40 s
        except Exception:                                   # whatever httpx calls it: only a name fetched before
            here = True                                     # can be loaded now
        try:
            model, found = Wav2Vec2Model.from_pretrained(
                str(name_or_path), dtype=torch.float32, use_safetensors=True, output_loading_info=True, local_files_only=here)
        except Exception as error:                          # hub, json, wrong sizes, broken files ...
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"cannot load a Wav2Vec2 from {name_or_path}: {reason}") from None
        if missing := sorted(set(found["missing_keys"]) - {"masked_spec_embed"}):       # pre-training only
            raise ValueError(f"{name_or_path} lacks {len(missing)} tensors of a Wav2Vec2, e.g. {missing[0]}")
        self.model = model.to(device).eval().requires_grad_(False)          # eval: no dropout, no SpecAugment
        self.device, self.layers, self.dim = device, model.config.num_hidden_layers, model.config.hidden_size

    @torch.no_grad()
    def features(self, audio, start, frames):
        """Hidden states of the video frames [start, start + frames) of a recording, `audio` (samples,) at 16 kHz: float32 (frames, L, A).

        Read are at most 8 s that end with the last frame asked for: a chunk hears no future, and the cost does not grow. After the end: silence."""
        if start < 0 or not 1 <= frames <= CONTEXT:
            raise ValueError(f"features() makes 1 to {CONTEXT} frames, start >= 0: not {frames} from {start}")
        begin, end = max(0, start + frames - CONTEXT), start + frames
        sound = torch.as_tensor(audio[begin * HOP:end * HOP], dtype=torch.float32, device=self.device)
        wave = F.pad(normalise(sound), (0, (end - begin) * HOP - len(sound)))
        return torch.stack(encode(self.model, wave[None]), 2)[0, start - begin:]        # (frames, L, A)

# ------------------------------------------------------------------------------------------------- projection

def latent_windows(features):
    """features (B, T, L, A), T = 4F - 3 -> what a latent hears: first (B, 5, L, A), rest (B, F-1, 8, L, A).

    Latent 0 is frame 0: frames -2..2. Latent f is 4f-3..4f: frames 4f-5..4f+2. Clamped to the chunk."""
    T = features.shape[1]
    if T % 4 != 1:
        raise ValueError(f"a chunk has 4F - 3 frames, not {T}")
    first = torch.arange(-2, 3).clamp(0, T - 1)                                         # (5,)
    rest = 4 * torch.arange(1, (T + 3) // 4)[:, None] + torch.arange(-5, 3)             # (F-1, 8)
    return features[:, first], features[:, rest.clamp(0, T - 1)]


class AudioProjection(nn.Module):
    """a = MLP(W2V(A)) of Eq. 23: features (B, T, L, A) -> audio tokens (B, F, S, D) for the cross-attention of each latent frame."""

    def __init__(self, layers, dim, width, tokens=32, hidden=512):
        super().__init__()
        self.tokens, self.width = tokens, width
        self.first = nn.Linear(5 * layers * dim, hidden)                    # latent 0 has a window of its own
        self.rest = nn.Linear(8 * layers * dim, hidden)
        self.shared = nn.Sequential(nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, tokens * width))
        self.norm = nn.LayerNorm(width)

    def forward(self, features):
        first, rest = latent_windows(features)
        x = torch.cat([self.first(first.flatten(1))[:, None], self.rest(rest.flatten(2))], 1)  # (B,F,hidden)
        return self.norm(self.shared(x).unflatten(-1, (self.tokens, self.width)))              # (B, F, S, D)

# --------------------------------------------------------------------------------------------------- training
# The small encoder learns which phone is spoken in every video frame. The phone is not the aim: hidden states that know it know the mouth.
# Phones whose mouths look alike form a viseme class; lips need that accuracy.

VISEMES = {"sil": ("sil",),
           "pbm": ("p", "b", "m"),                          # lips shut
           "fv": ("f", "v"),                                # lower lip to the upper teeth
           "th": ("θ", "ð"),                                # tongue between the teeth
           "tdnl": ("t", "d", "n", "l"),                    # tongue tip behind the teeth, lips neutral
           "sz": ("s", "z"),                                # teeth nearly closed, lips spread
           "kgh": ("k", "ɡ", "ŋ", "h"),                     # made far back: the lips follow their neighbours
           "sh": ("ʃ", "ʒ", "t͡ʃ", "d͡ʒ"),                    # teeth nearly closed, lips pushed out
           "wru": ("w", "ɹ", "ɝ", "u", "ʊ"),                # small round opening
           "oh": ("oʊ", "ɔ", "ɔɪ"),                         # larger round opening
           "ee": ("i", "ɪ", "eɪ", "j"),                     # spread lips, jaw nearly closed
           "ah": ("ə", "ʌ", "ɛ", "æ", "ɑ", "aɪ", "aʊ")}     # open jaw
PHONES = [phone for group in VISEMES.values() for phone in group]
VISEME_OF = torch.tensor([i for i, group in enumerate(VISEMES.values()) for _ in group])    # phone -> class

Recording = namedtuple("Recording", "speaker audio phone weight")           # int16 at 16 kHz; every 10 ms: index into PHONES, how sure (0..1)


@dataclass(frozen=True)
class AudioConfig:
    steps: Annotated[int, "optimiser steps"] = 5200
    every: Annotated[int, "steps from log line to log line and checkpoint to checkpoint"] = 100
    frames: Annotated[int, "video frames of a batch, cut into windows of 2, 4 or 8 s"] = 800
    lr: Annotated[float, "peak of AdamW's learning rate, after at most 200 steps of warm-up"] = 1e-3
    dropout: Annotated[float, "share of the transformer's activations that a step drops"] = 0.15
    ema: Annotated[float, "decay of the averaged weights, which are the ones shipped"] = 0.998
    fold: Annotated[int, "speakers with crc32(name) modulo 10 = FOLD are held out"] = 0
    bf16: Annotated[int, "1: bfloat16 autocast; 0: plain float32"] = 1
    seed: Annotated[int, "seed of everything random: same seed, same weights"] = 0


def new_model(dropout=0.0):
    """An untrained Wav2Vec2Model: a stock one, with three wide convolutions in place of seven narrow ones.

    Together they are 640 samples long, 320 apart: T frames make 2T - 1 outputs, so the stretching to 25 fps takes every second one, which heard
    exactly its own frame. The first filters are windowed waves on a mel scale, four phases each (rectified by the GELU they add up to the band's
    loudness), and stay so: a random start has to find the like first. Their learnt bias is what the layer norm compares weak sound with."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model
    model = Wav2Vec2Model(Wav2Vec2Config(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024, num_conv_pos_embeddings=15,
        num_conv_pos_embedding_groups=8, conv_dim=(192, 192, 256), conv_kernel=(200, 4, 3), conv_stride=(40, 4, 2), conv_bias=True,
        num_feat_extract_layers=3, feat_extract_norm="layer", hidden_dropout=dropout, attention_dropout=dropout, feat_proj_dropout=dropout,
        activation_dropout=0.0, layerdrop=0.0, mask_time_prob=0.0, vocab_size=len(PHONES)))
    conv = model.feature_extractor.conv_layers[0].conv
    hertz = 700 * torch.expm1(torch.linspace(np.log1p(80 / 700), np.log1p(7600 / 700), 48))[:, None]   # mel
    t = torch.arange(200) - 99.5
    width = (RATE / (0.15 * hertz + 80)).clamp(max=200) / 4                 # shorter where bands are wider
    angle = 2 * torch.pi * hertz * t / RATE + torch.arange(4)[:, None, None] * torch.pi / 2
    waves = (torch.exp(-0.5 * (t / width) ** 2) * torch.sin(angle)).flatten(0, 1)              # (4 * 48, 200)
    emphasis = 1 + hertz.repeat(4, 1) / 500                                 # speech is weak at high pitch
    conv.weight.requires_grad_(False).copy_((waves / waves.norm(dim=1, keepdim=True) * emphasis)[:, None])
    nn.init.normal_(conv.bias, std=0.1)
    return model


def load_speech(speech, phones):
    """Folder of SPEAKER-NAME.flac (or wav ...), folder of SPEAKER-NAME.tsv with lines of start s, end s, IPA phone, confidence -> list of
    Recording. What no line covers is silence of weight 0."""
    pairs = [(p, t) for t in sorted(Path(phones).glob("*.tsv")) for p in Path(speech).glob(f"{t.stem}.[!t]*")]
    takes = []
    for path, table in pairs:
        audio = load_audio(path)
        phone, weight = np.zeros(len(audio) // 160, np.int64), np.zeros(len(audio) // 160, np.float32)
        for line in table.read_text(encoding="utf-8").splitlines():
            start, end, label, confidence = line.split("\t")
            span = slice(round(100 * float(start)), round(100 * float(end)))
            phone[span], weight[span] = PHONES.index(label), float(confidence)
        takes.append(Recording(path.name.split("-")[0], (audio * 32767).astype(np.int16), phone, weight))
    if not pairs:
        raise ValueError(f"no recording NAME.flac in {speech} has its NAME.tsv in {phones}")
    return takes


def augment(wave, size, rng):
    """wave (m,) -> (size,): speed and pitch by the ratio m / size, then a microphone, a room and noise."""
    bins = size // 2 + 1
    spectrum = torch.fft.rfft(wave)[:bins]
    spectrum = F.pad(spectrum, (0, bins - len(spectrum)))
    hertz = np.linspace(0, RATE / 2, bins)
    curve = np.interp(np.log2(hertz + 60), np.linspace(5.9, 13, 9), rng.normal(0, 5, 9))    # equaliser, dB
    if rng.random() < 0.3:                                                  # a telephone, a cheap microphone
        curve -= 60 * np.clip((hertz - rng.uniform(3000, 7500)) / 400, 0, 1)
    if rng.random() < 0.3:                                                  # no bass
        curve -= 30 * np.clip(1 - hertz / rng.uniform(80, 300), 0, 1)
    if rng.random() < 0.3:                                                  # a band that is missing
        curve -= 40 * (np.abs(np.log2(hertz + 200) - rng.uniform(8, 13)) < rng.uniform(0, 0.25))
    spectrum = spectrum * torch.from_numpy(10 ** (curve / 20)).float()
    if rng.random() < 0.3:                                                  # a room: a tail that fades away
        tail = rng.standard_normal(8000) * np.exp(-6.9 / RATE * np.arange(8000) / rng.uniform(0.1, 0.6))
        tail *= 10 ** (-rng.uniform(3, 20) / 20) / np.linalg.norm(tail)
        spectrum = spectrum * (1 + torch.fft.rfft(torch.from_numpy(tail).float(), size))
    wave = torch.fft.irfft(spectrum, size)
    wave = wave / (wave.std() + 1e-5)
    if rng.random() < 0.8:                                                  # white to red, 5 to 45 dB weaker
        colour = torch.from_numpy((hertz + 50) ** -rng.uniform(0, 1)).float()
        noise = torch.fft.rfft(torch.from_numpy(rng.standard_normal(size, np.float32)))
        noise = torch.fft.irfft(noise * colour, size)
        wave = wave + noise / noise.std() * 10 ** (-rng.uniform(5, 45) / 20)
    return wave


def training_batch(takes, cfg, rng):
    """Random windows -> wave (B, 640 T), normalised; target (B, T, phones), shares of it; weight (B, T)."""
    T, rows = int(rng.choice([50, 100, 200])), []
    chances = np.array([len(take.audio) for take in takes], float)
    for _ in range(max(1, cfg.frames // T)):
        take = takes[rng.choice(len(takes), p=chances / chances.sum())]
        m = round(T * np.exp(rng.uniform(-0.18, 0.18))) * HOP               # samples squeezed into T frames
        start = int(rng.integers(0, max(0, len(take.audio) - m + T * HOP // 8) + 1))
        sound = torch.from_numpy(take.audio[start:start + m] / np.float32(32768))
        sound = augment(F.pad(sound, (0, m - len(sound))), T * HOP, rng)
        tick = (start / 160 + (np.arange(4 * T) + 0.5) * m / (640 * T)).astype(int)     # four looks a frame
        inside, tick = tick < len(take.phone), tick.clip(max=len(take.phone) - 1)
        phone = torch.from_numpy(np.where(inside, take.phone[tick], 0)).view(T, 4)
        weight = torch.from_numpy(np.where(inside, take.weight[tick], 0.3)).float().view(T, 4)
        rows.append((sound, F.one_hot(phone, len(PHONES)).float().mean(1), weight.mean(1)))
    wave, target, weight = (torch.stack(column) for column in zip(*rows))
    return normalise(wave), target, weight


def save_checkpoint(path, nets, optimizer, step, cfg):
    """Tensors in one .safetensors with step and config in its header; written aside, then renamed."""
    tensors = nets.state_dict()
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{k}": v for k, v in state.items()}
    save_file(tensors, f"{path}.part", {"step": str(step), "config": json.dumps(asdict(cfg))})
    os.replace(f"{path}.part", path)


def load_checkpoint(path, nets, optimizer, cfg):
    """Returns the steps already done. No random state is stored: every step draws from a seed of its own."""
    meta = safe_open(path, "pt").metadata()
    if json.loads(meta["config"]) != asdict(cfg):
        raise ValueError(f"{path} was made with other options: {meta['config']}")
    tensors, state = load_file(path), {}
    for name in [name for name in tensors if name.startswith("adam.")]:
        state.setdefault(int(name.split(".")[1]), {})[name.split(".")[2]] = tensors.pop(name)
    nets.load_state_dict(tensors)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(meta["step"])


def train(cfg, takes, out, run, resume=False, device="cpu"):
    """Checkpoints go to `run`, averaged weights (half precision, Hugging Face format) to `out`; beside them
    the phone head, a linear classifier of all hidden states of a frame. Returns the cross entropies."""
    torch.manual_seed(cfg.seed)
    encoder = new_model(cfg.dropout)
    head = nn.Linear(encoder.config.num_hidden_layers * encoder.config.hidden_size, len(PHONES))
    live = nn.ModuleList([encoder, head]).to(device).train()
    mean = copy.deepcopy(live)
    nets = nn.ModuleDict({"live": live, "mean": mean})
    optimizer = torch.optim.AdamW(live.parameters(), lr=cfg.lr, betas=(0.9, 0.98), weight_decay=0.05)
    run.mkdir(parents=True, exist_ok=True)
    checkpoint = run / "checkpoint.safetensors"
    done = load_checkpoint(checkpoint, nets, optimizer, cfg) if resume else 0
    losses, began = [], time.time()
    for step in tqdm(range(done, cfg.steps), initial=done, total=cfg.steps, unit="step", disable=None):
        torch.manual_seed(cfg.seed * 1_000_003 + step)                      # so that --resume drops out the same
        batch = training_batch(takes, cfg, np.random.default_rng((cfg.seed, step)))
        wave, target, weight = (x.to(device) for x in batch)
        rate = cfg.lr * min(1, (step + 1) / min(200, cfg.steps / 10))
        optimizer.param_groups[0]["lr"] = rate = float(rate * (1 + np.cos(np.pi * step / cfg.steps)) / 2)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bool(cfg.bf16)):
            logits = head(torch.cat(encode(encoder, wave), -1))
        loss = -(target * logits.float().log_softmax(-1) * weight[..., None]).sum() / weight.sum()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(live.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():                                               # a short memory while all is new
            for old, new in zip(mean.parameters(), live.parameters()):
                old.lerp_(new, 1 - min(cfg.ema, (step + 1) / (step + 10)))
        losses.append(loss.item())
        if (step + 1) % cfg.every == 0 or step + 1 == cfg.steps:
            loss, speed = np.mean(losses[-cfg.every:]), cfg.frames * cfg.every / (time.time() - began)
            tqdm.write(f"step {step + 1:5d}/{cfg.steps} | loss {loss:.4f} | norm {norm:.2f} | lr {rate:.1e} | {speed:.0f} frames/s")
            save_checkpoint(checkpoint, nets, optimizer, step + 1, cfg)
            began = time.time()
    aside = out / ".part"
    aside.mkdir(parents=True, exist_ok=True)
    mean[0].half().save_pretrained(aside)
    save_file(mean[1].half().state_dict(), aside / "head.safetensors")
    for path in aside.iterdir():
        os.replace(path, out / path.name)
    aside.rmdir()
    return losses

# ------------------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def evaluate(out, takes, device="cpu"):
    """Figures on `takes`, heard as the video model hears them: chunk by chunk, each from its own window."""
    encoder = AudioEncoder(out, device)
    head = nn.Linear(encoder.layers * encoder.dim, len(PHONES)).to(device)
    head.load_state_dict(load_file(out / "head.safetensors"))
    said, heard = [], []
    for take in takes:
        said.append(torch.from_numpy(take.phone[2::4]))                     # the phone in a frame's middle
        for start in range(0, len(said[-1]), 81):
            states = encoder.features(take.audio / np.float32(32768), start, min(81, len(said[-1]) - start))
            heard.append(head(states.flatten(1)).argmax(-1).cpu())
    said, heard = torch.cat(said), torch.cat(heard)
    talk, phone, viseme = said != 0, said == heard, VISEME_OF[said] == VISEME_OF[heard]
    table = F.one_hot(VISEME_OF[said], len(VISEMES)).T @ F.one_hot(VISEME_OF[heard], len(VISEMES))
    wave = torch.randn(1, 10 * RATE, device=device)
    seconds = timeit.repeat(lambda: encode(encoder.model, wave)[-1].sum().item(), number=1, repeat=9)
    shares = {"phone_accuracy": phone, "phone_accuracy_without_silence": phone[talk], "silent_share": ~talk,
              "viseme_accuracy": viseme, "viseme_accuracy_without_silence": viseme[talk]}
    return {**{name: round(hits.float().mean().item(), 4) for name, hits in shares.items()},
            "frames": len(said), "speakers": len({take.speaker for take in takes}),
            "parameters": sum(p.numel() for p in encoder.model.parameters()),
            "seconds_for_10_s": round(min(seconds), 4), "threads": torch.get_num_threads(),
            "viseme_percent": (100 * table / table.sum(1, keepdim=True).clamp_min(1)).round().int().tolist()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--speech", required=True, default=argparse.SUPPRESS, help="folder of recordings SPEAKER-ANYTHING.flac")
    parser.add_argument("--phones", required=True, default=argparse.SUPPRESS, help="folder of tables, *.tsv: start s, end s, phone, confidence")
    parser.add_argument("--out", type=Path, default="weights/tiny/wav2vec2", help="folder for the weights and their figures")
    parser.add_argument("--run-dir", dest="run", type=Path, default="runs/audio", help="folder for the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--evaluate", action="store_true", help="do not train, measure --out on held-out speakers")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute; auto: a GPU if there is one")
    for entry in fields(AudioConfig):
        parser.add_argument(f"--{entry.name}", type=entry.type.__origin__, default=entry.default, help=entry.type.__metadata__[0])
    args = parser.parse_args(argv)
    cfg = AudioConfig(**{entry.name: getattr(args, entry.name) for entry in fields(AudioConfig)})
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        heard, unheard = [], []
        for take in load_speech(args.speech, args.phones):
            (unheard if zlib.crc32(take.speaker.encode()) % 10 == cfg.fold else heard).append(take)
        if not (heard and unheard):
            raise ValueError(f"{len(heard)} recordings to hear, {len(unheard)} held out: try another --fold")
        if not args.evaluate:
            print(f"{json.dumps(asdict(cfg))}\ntrain: {len(heard)} | held out: {len(unheard)}", flush=True)
            train(cfg, heard, args.out, args.run, args.resume, device)
        command = f"python audio.py --speech DIR --phones DIR --evaluate --fold {cfg.fold}"
        figures = {**evaluate(args.out, unheard, device), "viseme_classes": list(VISEMES), "command": command}
    except (ValueError, OSError, RuntimeError, SafetensorError, KeyboardInterrupt) as error:
        parser.exit(130 if isinstance(error, KeyboardInterrupt) else 2, f"audio.py: {str(error) or 'stopped'}\n")
    print("\n".join(f"{name}: {value}" for name, value in figures.items() if "viseme_p" not in name))
    print("spoken " + "".join(f"{name:>6}" for name in VISEMES) + "   <- heard, % of the row")
    for name, row in zip(VISEMES, figures["viseme_percent"]):
        print(f"{name:<7}" + "".join(f"{percent or '.':>6}" for percent in row))
    (args.out / "metrics.json.part").write_text(json.dumps(figures) + "\n", encoding="utf-8")
    os.replace(args.out / "metrics.json.part", args.out / "metrics.json")


if __name__ == "__main__":
    main()
