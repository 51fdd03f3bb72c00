"""Trains the small preset's audio encoder: a pretrained Whisper, fine-tuned on mouth shapes.

    python -m tiny.train_audio --speech DIR --phones DIR [--clips DIR [DIR]] --out DIR
    python -m tiny.train_audio --speech DIR --phones DIR --out DIR --evaluate

Nothing here is in the paper, whose wav2vec2-base-960h stays as it comes. --init is by default
openai/whisper-tiny.en, of which the first three layers are kept: 6 M parameters instead of 94 M.
A linear head predicts two labels of every video frame from all hidden states: which phone is
spoken, and how far the lips of a synthetic face open that speaks it (synthetic/phones.py). Phones
alone leave open *when* the lips part, within 40 ms, and which confusions matter for the mouth.
Held out are the speakers that synthetic/puppet.py holds out, so that neither the audio encoder nor
the video model is trained on them. The second command measures only, into OUT/metrics.json.
Shapes: B batch, T video frames, L layers, A width of a hidden state, P = 41 phones.
"""
import copy
import csv
import hashlib
import json
import os
import time
import timeit
from collections import namedtuple
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as nnf
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from audio import CONTEXT, HOP, AudioEncoder, load_audio, normalise
from common import (
    TrainState,
    clip_gradients,
    load_checkpoint,
    one_line_errors,
    parse_args,
    run_folder,
    save_checkpoint,
    select_device,
    write_json,
)
from data import SAMPLE_RATE, ClipFolder, fingerprint, one_per_folder
from synthetic.phones import lip_opening, mouth_curves, read_phones
from synthetic.puppet import divide

# ------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class Files:
    speech: Path                            # folder of recordings, SPEAKER-NAME.flac (or wav ...)
    phones: Path                            # of SPEAKER-NAME.tsv: start s, end s, phone, confidence
    clips: tuple[Path, ...] = ()            # folders of video clips with phones, used as well
    cache: tuple[Path, ...] = ()            # where data.py keeps frames, one for each of --clips
    init: str = "openai/whisper-tiny.en"    # Whisper or Wav2Vec2: a folder or a Hugging Face name
    out: Path = Path("runs/audio/whisper")  # folder of the weights and their metrics.json
    run_dir: Path = Path("runs/audio")      # folder of the checkpoint
    resume: bool = False                    # go on from the checkpoint
    overwrite: bool = False                 # replace the run that --run-dir holds
    evaluate: bool = False                  # no training: measure --out on held-out speakers
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"      # auto: a GPU if there is one


@dataclass(frozen=True)
class AudioConfig:
    layers: int = 3                         # layers of the encoder to keep, from the first; 0: all
    steps: int = 1000                       # optimiser steps
    log_every: int = 100                    # steps between log lines, and between checkpoints
    batch_frames: int = 800                 # video frames of a batch, in windows of 2, 4 or 8 s
    clip_share: float = 0.25                # share of the windows that come from --clips
    opening_loss_weight: float = 1.0        # of the lip opening, beside the phones' 1
    lr: float = 2e-4                        # peak learning rate of the encoder; head: 10 times
    betas: tuple[float, float] = (0.9, 0.98)    # of AdamW's moments
    weight_decay: float = 0.02              # of AdamW, per unit of the learning rate
    clip_norm: float = 1.0                  # largest norm of the gradient
    dropout: float = 0.0                    # dropped share of the transformer's activations
    ema: float = 0.99                       # decay of the averaged weights, which are the result
    bf16: bool = True                       # bfloat16 autocast
    seed: int = 0                           # same seed, same weights

# ------------------------------------------------------------------------------------------- labels

VISEMES = {                             # phones whose mouths look alike
    "sil": ("sil",),
    "pbm": ("p", "b", "m"),                         # lips shut
    "fv": ("f", "v"),                               # lower lip to the upper teeth
    "th": ("θ", "ð"),                               # tongue between the teeth
    "tdnl": ("t", "d", "n", "l"),                   # tongue tip behind the teeth, lips neutral
    "sz": ("s", "z"),                               # teeth nearly closed, lips spread
    "kgh": ("k", "ɡ", "ŋ", "h"),                    # far back; the lips follow the neighbours
    "sh": ("ʃ", "ʒ", "t͡ʃ", "d͡ʒ"),                   # teeth nearly closed, lips pushed out
    "wru": ("w", "ɹ", "ɝ", "u", "ʊ"),               # small round opening
    "oh": ("oʊ", "ɔ", "ɔɪ"),                        # larger round opening
    "ee": ("i", "ɪ", "eɪ", "j"),                    # spread lips, jaw nearly closed
    "ah": ("ə", "ʌ", "ɛ", "æ", "ɑ", "aɪ", "aʊ"),    # open jaw
}
PHONES = [phone for phones in VISEMES.values() for phone in phones]
VISEME_OF = torch.tensor([i for i, phones in enumerate(VISEMES.values()) for _ in phones])  # (P,)

# audio: int16 (samples,). At 100 Hz: phone, an index into PHONES; opening of the lips and weight
# (confidence in both), each 0 to 1.
Recording = namedtuple("Recording", "speaker audio phone opening weight")


def make_recording(speaker, audio, alignment):
    """audio float32 (samples,), alignment [(start s, end s, phone, confidence)] -> Recording.

    Where the alignment is empty: silence of weight 0. ValueError for an unknown phone."""
    size = len(audio) // 160
    mouth = mouth_curves([row[:3] for row in alignment], size, fps=100)
    phone = np.zeros(size, np.int64)
    weight = np.zeros(size, np.float32)
    for start, end, label, confidence in alignment:
        span = slice(round(100 * start), round(100 * end))
        phone[span] = PHONES.index(label)
        weight[span] = confidence
    opening = lip_opening(mouth).astype(np.float32)
    return Recording(speaker, (audio * 32767).astype(np.int16), phone, opening, weight)


def read_alignment(table):
    """A *.tsv of start s, end s, phone and perhaps confidence -> rows of make_recording()."""
    lines = table.read_text(encoding="utf-8").splitlines()
    columns = [line.split("\t") for line in lines if line.strip()]
    confidence = [float(row[3]) if len(row) > 3 else 1.0 for row in columns]
    return [(*row, c) for row, c in zip(read_phones(table), confidence, strict=True)]


def load_speech(speech, phones):
    """Folders of SPEAKER-NAME.flac and of SPEAKER-NAME.tsv -> list of Recording."""
    recordings = []
    for table in sorted(Path(phones).glob("*.tsv")):
        for path in Path(speech).glob(f"{table.stem}.[!t]*"):
            try:
                speaker = path.stem.split("-")[0]
                recording = make_recording(speaker, load_audio(path), read_alignment(table))
            except ValueError as error:
                raise ValueError(f"{table}: {error}") from None
            recordings.append(recording)
    if not recordings:
        raise ValueError(f"no recording NAME.flac in {speech} has its NAME.tsv in {phones}")
    return recordings


@lru_cache
def read_phone_table(path):
    """phones.tsv with columns clip, start, end, phone -> {clip: [(start s, end s, phone)]}"""
    table = {}
    with open(path, encoding="utf-8", newline="") as file:
        try:
            for row in csv.DictReader(file, delimiter="\t"):
                phone = float(row["start"]), float(row["end"]), row["phone"]
                table.setdefault(row["clip"], []).append(phone)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} needs columns clip, start, end, phone: {error!r}") from None
    return table


def clip_phones(path):
    """[(start s, end s, phone)] of a video; nothing if they are unknown.

    From "phones" in NAME.json beside it, else from a phones.tsv there or in the folder above."""
    with suppress(OSError, ValueError, KeyError, TypeError):        # no sidecar, or without phones
        rows = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["phones"]
        return [(float(start), float(end), str(phone)) for start, end, phone in rows]
    for table in (path.parent / "phones.tsv", path.parent.parent / "phones.tsv"):
        if table.is_file():
            return read_phone_table(table).get(path.stem)
    return None


def load_clips(folders, caches, split):
    """The sound of the "train" or "val" clips whose phones are known -> list of Recording."""
    recordings = []
    for folder, cache in zip(folders, caches or [None] * len(folders), strict=True):
        for clip in ClipFolder(folder, 128, split, cache).clips:
            phones = clip_phones(clip.path)
            if phones:
                audio = np.array(clip.audio) / np.float32(32768)
                alignment = [(*row, 1.0) for row in phones]
                recordings.append(make_recording(str(folder), audio, alignment))
    if folders and not recordings:
        raise ValueError(f"no {split} clip in {', '.join(map(str, folders))} has phones")
    return recordings

# -------------------------------------------------------------------------------------------- batch


def microphone(hertz, rng):
    """Frequency response (bins,) in dB: an equaliser, at times without treble, bass or a band."""
    centres = np.linspace(5.9, 13, 9)                               # log2 of Hz
    curve = np.interp(np.log2(hertz + 60), centres, rng.normal(0, 5, 9))
    if rng.random() < 0.3:                                          # a telephone
        curve -= 60 * np.clip((hertz - rng.uniform(3000, 7500)) / 400, 0, 1)
    if rng.random() < 0.3:
        curve -= 30 * np.clip(1 - hertz / rng.uniform(80, 300), 0, 1)
    if rng.random() < 0.3:
        distance = np.abs(np.log2(hertz + 200) - rng.uniform(8, 13))
        curve -= 40 * (distance < rng.uniform(0, 0.25))
    return curve


def augment(wave, size, rng):
    """wave (n,) -> (size,): other speed and pitch (n / size), a microphone, a room, noise."""
    bins = size // 2 + 1
    hertz = np.linspace(0, SAMPLE_RATE / 2, bins)
    spectrum = torch.fft.rfft(wave)[:bins]
    spectrum = nnf.pad(spectrum, (0, bins - len(spectrum)))
    spectrum = spectrum * torch.from_numpy(10 ** (microphone(hertz, rng) / 20)).float()
    if rng.random() < 0.3:                                          # a room: 0.1 to 0.6 s of echo
        echo = rng.standard_normal(8000)
        echo *= np.exp(-6.9 / SAMPLE_RATE * np.arange(8000) / rng.uniform(0.1, 0.6))
        echo *= 10 ** (-rng.uniform(3, 20) / 20) / np.linalg.norm(echo)
        spectrum = spectrum * (1 + torch.fft.rfft(torch.from_numpy(echo).float(), size))
    wave = torch.fft.irfft(spectrum, size)
    wave = wave / (wave.std() + 1e-5)
    if rng.random() < 0.8:                                          # white to red, 5 to 45 dB below
        colour = torch.from_numpy((hertz + 50) ** -rng.uniform(0, 1)).float()
        noise = torch.from_numpy(rng.standard_normal(size, np.float32))
        noise = torch.fft.irfft(torch.fft.rfft(noise) * colour, size)
        wave = wave + noise / noise.std() * 10 ** (-rng.uniform(5, 45) / 20)
    return wave


def frame_labels(recording, start, size, T):
    """Labels of T frames that are made of the `size` samples from `start` on.

    -> phones (T, P), shares of the frame; opening (T,); weight (T,). Means of four a frame."""
    middles = (np.arange(4 * T) + 0.5) * size / (640 * T)           # in ticks of 10 ms
    tick = (start / 160 + middles).astype(int)
    inside = tick < len(recording.phone)
    tick = tick.clip(max=len(recording.phone) - 1)

    def four_a_frame(labels, after_the_end):
        return torch.from_numpy(np.where(inside, labels[tick], after_the_end)).view(T, 4)

    phones = nnf.one_hot(four_a_frame(recording.phone, 0), len(PHONES))     # (T, 4, P)
    opening = four_a_frame(recording.opening, 0)
    weight = four_a_frame(recording.weight, 0.3)                    # the padding is silence
    return [labels.float().mean(1) for labels in (phones, opening, weight)]


def draw_window(recordings, T, rng):
    """A random place of the recordings, as T frames -> wave (640 T,) and its frame_labels()."""
    lengths = np.array([len(recording.audio) for recording in recordings], float)
    recording = recordings[rng.choice(len(recordings), p=lengths / lengths.sum())]
    size = round(T * np.exp(rng.uniform(-0.18, 0.18))) * HOP        # samples squeezed into T frames
    last_start = max(0, len(recording.audio) - size + T * HOP // 8)
    start = int(rng.integers(0, last_start + 1))
    wave = torch.from_numpy(recording.audio[start:start + size] / np.float32(32768))
    wave = augment(nnf.pad(wave, (0, size - len(wave))), T * HOP, rng)
    return wave, *frame_labels(recording, start, size, T)


def training_batch(recordings, clips, cfg, rng):
    """Random windows of equal length.

    -> wave (B, 640 T), normalised; phones (B, T, P); opening (B, T); weight (B, T)"""
    T = int(rng.choice([50, 100, 200]))
    rows = []
    for _ in range(max(1, cfg.batch_frames // T)):
        from_clips = clips and rng.random() < cfg.clip_share
        rows.append(draw_window(clips if from_clips else recordings, T, rng))
    wave, phones, opening, weight = (torch.stack(column) for column in zip(*rows))
    return normalise(wave), phones, opening, weight

# ------------------------------------------------------------------------------------------ network


def prepare_encoder(encoder, cfg):
    """AudioEncoder -> the same, trainable and cut: to cfg.layers layers, a Whisper also to 8 s."""
    model = encoder.model.requires_grad_(True)
    is_whisper = model.config.model_type == "whisper"
    layers = model.layers if is_whisper else model.encoder.layers
    if not 0 <= cfg.layers <= len(layers):
        raise ValueError(f"--layers {cfg.layers}, but there are {len(layers)}")
    del layers[cfg.layers or len(layers):]
    model.config.num_hidden_layers = encoder.layers = len(layers)
    if is_whisper:
        positions = 2 * CONTEXT                                     # 50 a second
        model.config.max_source_positions = positions
        sines = model.embed_positions.weight[:positions].detach().clone()
        model.embed_positions = nn.Embedding.from_pretrained(sines)     # frozen, as in Whisper
    for module in model.modules():                                  # some have a module for it,
        if isinstance(module, nn.Dropout):                          # some a number
            module.p = cfg.dropout
        elif isinstance(getattr(module, "dropout", None), (int, float)):
            module.dropout = cfg.dropout
    return encoder


def make_head(encoder):
    """Linear map: hidden states of a frame (..., L A) -> phone logits and opening (..., P + 1)."""
    return nn.Linear(encoder.layers * encoder.dim, len(PHONES) + 1)


def load_head(folder, encoder):
    """The head beside an encoder's weights. ValueError if it belongs to another encoder."""
    path = folder / "head.safetensors"
    head = make_head(encoder)
    try:
        head.load_state_dict(load_file(path))
    except RuntimeError:
        raise ValueError(f"{path} is not a head of the audio encoder beside it") from None
    return head

# --------------------------------------------------------------------------------------------- loss


def probe_loss(predicted, phones, opening, weight, opening_loss_weight):
    """predicted (B, T, P + 1), labels of training_batch() -> loss, its opening part; scalars.

    Cross entropy of the phones + opening_loss_weight x squared error of the opening / variance.
    Frames of weight 0 have no labels; a batch of them has loss 0."""
    known = weight.sum().clamp(min=1e-6)
    log_p = predicted[..., :-1].float().log_softmax(-1)             # (B, T, P)
    cross_entropy = -(phones * log_p * weight[..., None]).sum() / known
    squared = (predicted[..., -1].float() - opening).square()       # (B, T)
    opening_loss = (squared * weight).sum() / (opening.var() + 1e-3) / known
    return cross_entropy + opening_loss_weight * opening_loss, opening_loss

# --------------------------------------------------------------------------------------------- loop


def learning_rate(step, cfg):
    """Linear warm-up of at most 100 steps, times a cosine to zero."""
    warmup = min(1, (step + 1) / min(100, cfg.steps / 10))
    return float(cfg.lr * warmup * (1 + np.cos(np.pi * step / cfg.steps)) / 2)


def training_data_hash(recordings, clips, model):
    """A hash of data and first weights, kept in the checkpoint for --resume."""
    names = [[(recording.speaker, len(recording.audio)) for recording in some]
             for some in (recordings, clips)]
    return hashlib.sha256(repr(names).encode()).hexdigest()[:16] + fingerprint(model)


def export(out, model, head):
    """OUT gets the encoder in Hugging Face format and head.safetensors, float16, written aside."""
    part = out / ".part"
    part.mkdir(parents=True, exist_ok=True)
    # False: with the encoder's own names, also if it came as a part of a whole Whisper
    model.half().save_pretrained(part, save_original_format=False)
    save_file(head.half().state_dict(), part / "head.safetensors")
    for path in part.iterdir():
        os.replace(path, out / path.name)
    part.rmdir()


def train(cfg, encoder, recordings, clips, out, run_dir, resume=False):
    """Train an encoder of prepare_encoder() and a new head; export() their EMA -> losses."""
    # PLUMBING
    torch.manual_seed(cfg.seed)
    device, model = encoder.device, encoder.model
    head = make_head(encoder).to(device)
    nn.init.zeros_(head.weight)                                     # first predictions: about 0
    both = nn.ModuleList([model, head]).train()
    networks = {"encoder": model, "head": head, "both": both}
    times_lr = {"encoder": 1, "head": 10}                           # the head is new
    peaks = {name: times * cfg.lr for name, times in times_lr.items()}
    state = TrainState(networks, peaks, "both", cfg)
    run_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = run_dir / "checkpoint.safetensors"
    data = training_data_hash(recordings, clips, model)
    start = load_checkpoint(checkpoint, state.tensors, cfg, (), data=data) if resume else 0
    losses, opening_losses, began = [], [], time.time()

    for step in tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, disable=None):
        # a seed of its own for each step, so that a resumed run draws the same
        torch.manual_seed(cfg.seed * 1_000_003 + step)
        rng = np.random.default_rng((cfg.seed, step))
        batch = training_batch(recordings, clips, cfg, rng)
        wave, *labels = (tensor.to(device) for tensor in batch)

        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=cfg.bf16):
            predicted = head(encoder.encode(wave).flatten(2))       # (B, T, P + 1)
        loss, opening_loss = probe_loss(predicted, *labels, cfg.opening_loss_weight)
        loss.backward()

        norm = clip_gradients(both, cfg.clip_norm)
        if not np.isfinite(norm):
            raise ValueError(f"loss {loss.item()}, gradient {norm} at step {step}; "
                             f"the last good checkpoint is {checkpoint}")
        rate = learning_rate(step, cfg)
        for name, optimizer in state.optimizers.items():
            optimizer.param_groups[0]["lr"] = times_lr[name] * rate
            optimizer.step()
            optimizer.zero_grad()
        state.update_ema(cfg.ema, step)

        # PLUMBING
        losses.append(loss.item())
        opening_losses.append(opening_loss.item())
        if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.steps:
            speed = cfg.batch_frames * cfg.log_every / (time.time() - began)
            tqdm.write(f"step {step + 1:5d}/{cfg.steps} "
                       f"| loss {np.mean(losses[-cfg.log_every:]):.4f} "
                       f"| opening {np.mean(opening_losses[-cfg.log_every:]):.4f} "
                       f"| norm {norm:.2f} | lr {rate:.1e} | {speed:.0f} frames/s")
            save_checkpoint(checkpoint, state.tensors, step + 1, cfg, data=data)
            began = time.time()
    with state.ema_weights():
        export(out, *copy.deepcopy(both))
    return losses

# --------------------------------------------------------------------------------------- evaluation


def correlation(predicted, true, use):
    """Pearson correlation of curves (T,) where `use`; nan if too short or if `true` is constant."""
    if use.sum() < 12 or true[use].std() < 1e-6:
        return float("nan")
    x, y = predicted[use].astype(float), true[use].astype(float)
    return float(((x - x.mean()) * (y - y.mean())).mean() / max(x.std() * y.std(), 1e-12))


@torch.no_grad()
def evaluate(out, recordings, device="cpu"):
    """The encoder and head of OUT on recordings, encoded in chunks of 81 frames -> figures.

    opening_correlation: of the predicted lip opening with a synthetic face's, over speech frames,
    mean over recordings. The confusion table is in percent of a row, rows are the true visemes."""
    encoder = AudioEncoder(out, device)
    head = load_head(out, encoder).to(device)
    spoken, predicted, correlations = [], [], []
    for recording in recordings:
        phone = torch.from_numpy(recording.phone[2::4])             # (T,), in a frame's middle
        features = encoder.in_chunks(recording.audio / np.float32(32768), len(phone))
        output = head(features.flatten(1)).cpu()                    # (T, P + 1)
        opening = output[:, -1].numpy()
        speech = phone.numpy() > 0
        correlations.append(correlation(opening, recording.opening[2::4], speech))
        spoken.append(phone)
        predicted.append(output[:, :-1].argmax(-1))
    spoken, predicted = torch.cat(spoken), torch.cat(predicted)
    correlations = [c for c in correlations if not np.isnan(c)] or [0.0]

    visemes, predicted_visemes = VISEME_OF[spoken], VISEME_OF[predicted]
    right_phone = (spoken == predicted).float()
    right_viseme = (visemes == predicted_visemes).float()
    speech = spoken != 0
    count = len(VISEMES)
    table = nnf.one_hot(visemes, count).T @ nnf.one_hot(predicted_visemes, count)
    percent = (100 * table / table.sum(1, keepdim=True).clamp_min(1)).round().int()
    wave = torch.randn(1, CONTEXT * HOP, device=device)
    seconds = timeit.repeat(lambda: encoder.encode(wave).sum().item(), number=1, repeat=9)
    shares = {
        "phone_accuracy": right_phone.mean(),
        "phone_accuracy_without_silence": right_phone[speech].mean(),
        "silent_share": (~speech).float().mean(),
        "viseme_accuracy": right_viseme.mean(),
        "viseme_accuracy_without_silence": right_viseme[speech].mean(),
    }
    return {
        **{name: round(share.item(), 4) for name, share in shares.items()},
        "opening_correlation": round(float(np.mean(correlations)), 4),
        "frames": len(spoken),
        "speakers": len({recording.speaker for recording in recordings}),
        "parameters": sum(p.numel() for p in encoder.model.parameters()),
        "seconds_for_8_s": round(min(seconds), 4),
        "threads": torch.get_num_threads(),
        "viseme_percent": percent.tolist(),
    }


def print_figures(figures):
    for name, value in figures.items():
        if name != "viseme_percent":
            print(f"{name}: {value}")
    names = "".join(f"{name:>6}" for name in VISEMES)
    print(f"spoken {names}   <- predicted, % of the row")
    for name, row in zip(VISEMES, figures["viseme_percent"]):
        print(f"{name:<7}" + "".join(f"{percent or '.':>6}" for percent in row))

# --------------------------------------------------------------------------------------------- main


def run(files, cfg):
    """Train unless --evaluate, then measure on held-out speakers and clips -> figures."""
    one_per_folder(files, "cache", folders="clips")
    if min(cfg.steps, cfg.log_every) < 1:
        raise ValueError("--steps and --log-every must be at least 1")
    device, _ = select_device(files.device)
    recordings = load_speech(files.speech, files.phones)
    speakers = sorted({recording.speaker for recording in recordings})
    held_out_speakers, _ = divide(speakers, str, np.random.default_rng(0))
    train_set = [r for r in recordings if r.speaker not in held_out_speakers]
    held_out = [r for r in recordings if r.speaker in held_out_speakers]
    if not (train_set and held_out):
        raise ValueError(f"{files.speech}: one speaker is no speaker to hold out")
    held_out_clips = load_clips(files.clips, files.cache, "val")
    if not files.evaluate:
        clips = load_clips(files.clips, files.cache, "train")
        print(f"{json.dumps(asdict(cfg))}\n"
              f"train: {len(train_set)} recordings, {len(clips)} clips "
              f"| held out: {len(held_out)}, {len(held_out_clips)}", flush=True)
        encoder = prepare_encoder(AudioEncoder(files.init, device), cfg)
        train(cfg, encoder, train_set, clips, files.out, files.run_dir, files.resume)
    figures = {**evaluate(files.out, held_out, device), "viseme_classes": list(VISEMES)}
    command = "python -m tiny.train_audio --speech DIR --phones DIR"
    if held_out_clips:
        command += " --clips DIR"
        of_clips = evaluate(files.out, held_out_clips, device)
        for name in ("phone_accuracy", "viseme_accuracy", "opening_correlation", "frames"):
            if name in of_clips:
                figures[f"clips_{name}"] = of_clips[name]
    figures["command"] = f"{command} --out DIR --evaluate"
    write_json(files.out / "metrics.json", figures)
    return figures


def main(argv=None):
    files, cfg = parse_args(__doc__, Files, {"tiny": AudioConfig()}, argv)
    stopped = "stopped; --resume goes on from the checkpoint"
    ours = nullcontext() if files.evaluate else run_folder(files)
    with one_line_errors("tiny.train_audio", stopped), ours:
        print_figures(run(files, cfg))


if __name__ == "__main__":
    main()
