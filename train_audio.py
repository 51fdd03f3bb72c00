"""Trains the ears of weights/tiny: a speech encoder that comes trained learns on, for lips. The paper's (facebook/wav2vec2-base-960h) stays as it is.

    python train_audio.py --speech DIR --phones DIR [--clips FOLDER ...]    -> runs/ears, for swap_ears.py (--resume after a kill)
    python train_audio.py --speech DIR --phones DIR --evaluate              -> figures of --out on speakers it never heard, metrics.json

The start, --init, is openai/whisper-tiny.en, of which the encoder's first layers are kept: 680,000 hours have taught it what no hour of ours can.
It learns two things of every video frame: which phone is spoken, and how far the lips of a puppet are open that says so (puppet.py). Neither is the
aim: hidden states that know both know the mouth. Phones alone leave open *when* lips part and shut, within 40 ms, and which confusions matter.
Held out are the speakers that puppet.py holds out, so that neither this training nor the face model ever heard them.
"""
import argparse
import copy
import hashlib
import json
import os
import time
import timeit
from collections import namedtuple
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from audio import CONTEXT, HOP, RATE, AudioEncoder, encode, load_audio, normalise
from checkpoint import write_json, write_safetensors
from chunks import fingerprint, one_per_folder
from data import ClipFolder
from infer import pick
from metrics import correlation
from proxies import phones_of
from puppet import divide, lip_opening, mouth_curves, read_phones

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

# int16 at 16 kHz; every 10 ms: index into PHONES, opening of the lips (0..1), how sure (0..1)
Recording = namedtuple("Recording", "speaker audio phone opening weight")


@dataclass(frozen=True)
class AudioConfig:
    layers: Annotated[int, "of the encoder's layers are kept, the first ones; 0: all"] = 3
    steps: Annotated[int, "optimiser steps"] = 1000
    every: Annotated[int, "steps from log line to log line and checkpoint to checkpoint"] = 100
    frames: Annotated[int, "video frames of a batch, cut into windows of 2, 4 or 8 s"] = 800
    lr: Annotated[float, "peak of AdamW's learning rate, after at most 100 steps of warm-up; ten times that for what is new"] = 2e-4
    dropout: Annotated[float, "share of the transformer's activations that a step drops"] = 0.0
    ema: Annotated[float, "decay of the averaged weights, which are the ones shipped"] = 0.99
    lips: Annotated[float, "weight of the opening's squared error, in units of its variance, beside the phones' cross entropy"] = 1.0
    share: Annotated[float, "share of the windows that come from --clips"] = 0.25
    bf16: Annotated[int, "1: bfloat16 autocast; 0: plain float32"] = 1
    seed: Annotated[int, "seed of everything random: same seed, same weights"] = 0


def start_from(encoder, cfg):
    """AudioEncoder -> its network, to be trained, cut to cfg.layers layers and, a Whisper, to the 8 s that are ever heard at once."""
    model = encoder.model.requires_grad_(True)
    layers = (model if model.config.model_type == "whisper" else model.encoder).layers
    if not 0 <= cfg.layers <= len(layers):
        raise ValueError(f"--layers {cfg.layers}, but there are {len(layers)}")
    del layers[cfg.layers or len(layers):]
    model.config.num_hidden_layers = len(layers)
    if model.config.model_type == "whisper":
        model.config.max_source_positions = 2 * CONTEXT
        model.embed_positions = nn.Embedding.from_pretrained(model.embed_positions.weight[:2 * CONTEXT].detach().clone())      # sines, never trained
    for module in model.modules():                                          # some keep a module for it, some a rate
        if isinstance(module, nn.Dropout):
            module.p = cfg.dropout
        elif isinstance(getattr(module, "dropout", None), (int, float)):
            module.dropout = cfg.dropout
    return model


def recording(speaker, audio, said):
    """audio float32 (samples,); said [(start s, end s, IPA, how sure 0..1)] -> Recording. What is not said is silence of weight 0."""
    size = len(audio) // 160
    opening = lip_opening(mouth_curves([row[:3] for row in said], size, fps=100)).astype(np.float32)           # raises for an unknown phone
    phone, weight = np.zeros(size, np.int64), np.zeros(size, np.float32)
    for start, end, label, sure in said:
        span = slice(round(100 * start), round(100 * end))
        phone[span], weight[span] = PHONES.index(label), sure
    return Recording(speaker, (audio * 32767).astype(np.int16), phone, opening, weight)


def load_speech(speech, phones):
    """Folder of SPEAKER-NAME.flac (or wav ...), folder of SPEAKER-NAME.tsv with lines of start s, end s, IPA phone and, if known, confidence -> list
    of Recording."""
    pairs = [(p, t) for t in sorted(Path(phones).glob("*.tsv")) for p in Path(speech).glob(f"{t.stem}.[!t]*")]
    if not pairs:
        raise ValueError(f"no recording NAME.flac in {speech} has its NAME.tsv in {phones}")
    takes = []
    for path, table in pairs:
        columns = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
        try:
            sure = [float(row[3]) if len(row) > 3 else 1.0 for row in columns]
            takes.append(recording(path.stem.split("-")[0], load_audio(path), [(*row, c) for row, c in zip(read_phones(table), sure, strict=True)]))
        except ValueError as error:
            raise ValueError(f"{table}: {error}") from None
    return takes


def load_clips(folders, caches, part):
    """The sound of video clips with phones (phones_of in proxies.py), those that teach or those that are held out -> list of Recording."""
    takes = []
    for folder, cache in zip(folders, caches or [None] * len(folders), strict=True):
        clips = [(clip, phones_of(clip.path)) for clip in ClipFolder(folder, 128, part, cache).clips]
        takes += [recording(str(folder), np.array(clip.audio) / np.float32(32768), [(*row, 1.0) for row in said]) for clip, said in clips if said]
    if folders and not takes:
        raise ValueError(f"no {part} clip in {', '.join(map(str, folders))} says its phones")
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


def training_batch(takes, clips, cfg, rng):
    """Random windows -> wave (B, 640 T), normalised; target (B, T, phones), shares of it; opening, weight (B, T)."""
    T, rows = int(rng.choice([50, 100, 200])), []
    for _ in range(max(1, cfg.frames // T)):
        pool = clips if clips and rng.random() < cfg.share else takes
        chances = np.array([len(take.audio) for take in pool], float)
        take = pool[rng.choice(len(pool), p=chances / chances.sum())]
        m = round(T * np.exp(rng.uniform(-0.18, 0.18))) * HOP               # samples squeezed into T frames
        start = int(rng.integers(0, max(0, len(take.audio) - m + T * HOP // 8) + 1))
        sound = torch.from_numpy(take.audio[start:start + m] / np.float32(32768))
        sound = augment(F.pad(sound, (0, m - len(sound))), T * HOP, rng)
        tick = (start / 160 + (np.arange(4 * T) + 0.5) * m / (640 * T)).astype(int)     # four looks a frame
        inside, tick = tick < len(take.phone), tick.clip(max=len(take.phone) - 1)
        phone, opening, weight = (torch.from_numpy(np.where(inside, known[tick], outside)).view(T, 4)
                                  for known, outside in ((take.phone, 0), (take.opening, 0), (take.weight, 0.3)))
        rows.append((sound, F.one_hot(phone, len(PHONES)).float().mean(1), opening.float().mean(1), weight.float().mean(1)))
    wave, *rest = (torch.stack(column) for column in zip(*rows))
    return normalise(wave), *rest


def digest(takes, clips):
    """A hash of what a run hears, kept in the checkpoint for --resume."""
    return hashlib.sha256(repr([[(take.speaker, len(take.audio)) for take in some] for some in (takes, clips)]).encode()).hexdigest()[:16]


def save_checkpoint(path, nets, optimizer, step, cfg, data):
    """Tensors in one .safetensors with step, config and data in its header; written aside, then renamed."""
    tensors = nets.state_dict()
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{k}": v for k, v in state.items()}
    write_safetensors(path, tensors, {"step": str(step), "config": json.dumps(asdict(cfg)), "data": data})


def load_checkpoint(path, nets, optimizer, cfg, data):
    """Returns the steps already done. No random state is stored: every step draws from a seed of its own."""
    meta = safe_open(path, "pt").metadata()
    if json.loads(meta["config"]) != asdict(cfg):
        raise ValueError(f"{path} was made with other options: {meta['config']}")
    if meta["data"] != data:
        raise ValueError(f"{path} was made with other recordings or clips, or from another --init")
    tensors, state = load_file(path), {}
    for name in [name for name in tensors if name.startswith("adam.")]:
        state.setdefault(int(name.split(".")[1]), {})[name.split(".")[2]] = tensors.pop(name)
    nets.load_state_dict(tensors)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(meta["step"])


def loss_of(guess, target, opening, weight, lips):
    """guess (B, T, phones + 1): logits and opening; -> cross entropy of the phones + lips x squared error of the opening, over its variance."""
    known = weight.sum().clamp(min=1e-6)                                    # 0: nothing is known of these sounds, and nothing is to be learnt
    entropy = -(target * guess[..., :-1].float().log_softmax(-1) * weight[..., None]).sum() / known
    error = ((guess[..., -1].float() - opening).square() * weight).sum() / (opening.var() + 1e-3) / known
    return entropy + lips * error, error


def train(cfg, encoder, takes, clips, out, run, resume=False, device="cpu"):
    """encoder: of start_from. Checkpoints go to `run`, averaged weights (half precision, Hugging Face format) to `out`; beside them
    the head, a linear map from all hidden states of a frame to phones and opening. Returns the losses."""
    torch.manual_seed(cfg.seed)
    head = nn.Linear(encoder.config.num_hidden_layers * encoder.config.hidden_size, len(PHONES) + 1)
    nn.init.zeros_(head.weight)                                             # a guess of 0 is better than a guess of anything
    live = nn.ModuleList([encoder, head]).to(device).train()
    mean = copy.deepcopy(live)
    nets = nn.ModuleDict({"live": live, "mean": mean})
    groups = [{"params": [*live[0].parameters()], "times": 1}, {"params": [*live[1].parameters()], "times": 10}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.02)
    run.mkdir(parents=True, exist_ok=True)
    checkpoint = run / "checkpoint.safetensors"
    data = digest(takes, clips) + fingerprint(encoder)                      # before a step is made: of --init
    done = load_checkpoint(checkpoint, nets, optimizer, cfg, data) if resume else 0
    losses, errors, began = [], [], time.time()
    for step in tqdm(range(done, cfg.steps), initial=done, total=cfg.steps, unit="step", disable=None):
        torch.manual_seed(cfg.seed * 1_000_003 + step)                      # so that --resume drops out the same
        batch = training_batch(takes, clips, cfg, np.random.default_rng((cfg.seed, step)))
        wave, *labels = (x.to(device) for x in batch)
        rate = float(cfg.lr * min(1, (step + 1) / min(100, cfg.steps / 10)) * (1 + np.cos(np.pi * step / cfg.steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["times"]
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bool(cfg.bf16)):
            guess = head(torch.cat(encode(encoder, wave), -1))
        loss, error = loss_of(guess, *labels, cfg.lips)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(live.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise ValueError(f"loss {loss.item()}, gradient {norm.item()} at step {step}; the last good checkpoint is {checkpoint}")
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():                                               # a short memory while all is new
            for old, new in zip(mean.parameters(), live.parameters()):
                old.lerp_(new, 1 - min(cfg.ema, (step + 1) / (step + 10)))
        losses.append(loss.item())
        errors.append(error.item())
        if (step + 1) % cfg.every == 0 or step + 1 == cfg.steps:
            loss, error, speed = *(np.mean(x[-cfg.every:]) for x in (losses, errors)), cfg.frames * cfg.every / (time.time() - began)
            tqdm.write(f"step {step + 1:5d}/{cfg.steps} | loss {loss:.4f} | opening {error:.4f} | norm {norm:.2f} | lr {rate:.1e}"
                       f" | {speed:.0f} frames/s")
            save_checkpoint(checkpoint, nets, optimizer, step + 1, cfg, data)
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
    """Figures on `takes`, heard in chunks of 81 frames (the small preset's have 33), each from its own window. opening_correlation: of what is
    heard of the lips' opening, of one frame's states by a linear map, with what a puppet shows; over speech frames, mean over the takes."""
    encoder = AudioEncoder(out, device)
    head = nn.Linear(encoder.layers * encoder.dim, len(PHONES) + 1).to(device)
    head.load_state_dict(load_file(out / "head.safetensors"))
    said, heard, lips = [], [], []
    for take in takes:
        said.append(torch.from_numpy(take.phone[2::4]))                     # the phone in a frame's middle
        guess = head(encoder.in_chunks(take.audio / np.float32(32768), len(said[-1])).flatten(1)).cpu()        # (frames, phones + 1)
        heard.append(guess[:, :-1].argmax(-1))
        lips.append(correlation(guess[:, -1].numpy(), take.opening[2::4], said[-1].numpy() > 0))
    said, heard = torch.cat(said), torch.cat(heard)
    talk, phone, viseme = said != 0, said == heard, VISEME_OF[said] == VISEME_OF[heard]
    table = F.one_hot(VISEME_OF[said], len(VISEMES)).T @ F.one_hot(VISEME_OF[heard], len(VISEMES))
    wave = torch.randn(1, CONTEXT * HOP, device=device)
    seconds = timeit.repeat(lambda: encode(encoder.model, wave)[-1].sum().item(), number=1, repeat=9)
    shares = {"phone_accuracy": phone, "phone_accuracy_without_silence": phone[talk], "silent_share": ~talk,
              "viseme_accuracy": viseme, "viseme_accuracy_without_silence": viseme[talk]}
    return {**{name: round(hits.float().mean().item(), 4) for name, hits in shares.items()},
            "opening_correlation": round(float(np.mean([c for c in lips if c == c] or [0.0])), 4),
            "frames": len(said), "speakers": len({take.speaker for take in takes}),
            "parameters": sum(p.numel() for p in encoder.model.parameters()),
            "seconds_for_8_s": round(min(seconds), 4), "threads": torch.get_num_threads(),
            "viseme_percent": (100 * table / table.sum(1, keepdim=True).clamp_min(1)).round().int().tolist()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--speech", required=True, default=argparse.SUPPRESS, help="folder of recordings SPEAKER-ANYTHING.flac")
    parser.add_argument("--phones", required=True, default=argparse.SUPPRESS, help="folder of tables, *.tsv: start s, end s, phone, confidence")
    parser.add_argument("--clips", nargs="+", default=[], help="folders of video clips with phones (GRID's phones.tsv), to hear as well")
    parser.add_argument("--cache", nargs="+", default=[], help="where data.py's decoded frames lie, one a folder of --clips; else FOLDER/.cache-128")
    parser.add_argument("--init", default="openai/whisper-tiny.en", help="where to start: hub name or folder of a Whisper or Wav2Vec2")
    parser.add_argument("--out", type=Path, default="runs/ears", help="folder for the weights and their figures")
    parser.add_argument("--run-dir", dest="run", type=Path, default="runs/audio", help="folder for the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--evaluate", action="store_true", help="do not train, measure --out on held-out speakers and clips")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute; auto: a GPU if there is one")
    for entry in fields(AudioConfig):
        parser.add_argument(f"--{entry.name}", type=entry.type.__origin__, default=entry.default, help=entry.type.__metadata__[0])
    args = parser.parse_args(argv)
    cfg = AudioConfig(**{entry.name: getattr(args, entry.name) for entry in fields(AudioConfig)})
    try:
        device = pick(args.device, "auto")[0]
        one_per_folder(args, "cache", folders="clips")
        if min(cfg.steps, cfg.every) < 1:
            raise ValueError("--steps and --every must be at least 1")
        takes = load_speech(args.speech, args.phones)
        new = set(divide(sorted({take.speaker for take in takes}), str, np.random.default_rng(0))[0])
        heard, unheard = ([take for take in takes if (take.speaker in new) == held_out] for held_out in (False, True))
        if not (heard and unheard):
            raise ValueError(f"{args.speech}: one speaker is no speaker to hold out")
        held_out = load_clips(args.clips, args.cache, "val")
        if not args.evaluate:
            clips = load_clips(args.clips, args.cache, "train")
            sizes = f"train: {len(heard)} recordings, {len(clips)} clips | held out: {len(unheard)}, {len(held_out)}"
            print(f"{json.dumps(asdict(cfg))}\n{sizes}", flush=True)
            train(cfg, start_from(AudioEncoder(args.init), cfg), heard, clips, args.out, args.run, args.resume, device)
        figures = {**evaluate(args.out, unheard, device), "viseme_classes": list(VISEMES)}
        if held_out:
            figures |= {f"clips_{name}": value for name, value in evaluate(args.out, held_out, device).items()
                        if name in ("phone_accuracy", "viseme_accuracy", "opening_correlation", "frames")}
        figures["command"] = "python train_audio.py --speech DIR --phones DIR" + " --clips DIR" * bool(held_out) + " --evaluate --out DIR"
        write_json(args.out / "metrics.json", figures)
    except (ValueError, OSError, RuntimeError, LookupError, TypeError, SafetensorError, KeyboardInterrupt) as error:
        parser.exit(130 if isinstance(error, KeyboardInterrupt) else 2, f"train_audio.py: {' '.join(str(error).split())[:300] or 'stopped'}\n")
    print("\n".join(f"{name}: {value}" for name, value in figures.items() if "viseme_p" not in name))
    print("spoken " + "".join(f"{name:>6}" for name in VISEMES) + "   <- heard, % of the row")
    for name, row in zip(VISEMES, figures["viseme_percent"]):
        print(f"{name:<7}" + "".join(f"{percent or '.':>6}" for percent in row))


if __name__ == "__main__":
    main()
