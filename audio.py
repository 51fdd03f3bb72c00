"""Recording -> hidden states of a speech encoder at 25 fps -> the audio tokens of every latent frame. Paper sections 3.1 and 3.2, Eq. 23.

The DiT never hears a waveform. A frozen encoder turns 16 kHz sound into hidden states, one vector per video frame and layer; a latent is told
about its own frames and two more on each side. In the order of this file:
    load_audio          any file -> 16 kHz mono
    AudioEncoder        8 s of sound -> (frames, layers, dim)
    AudioProjection     5 or 8 neighbouring frames -> S tokens per latent; trained together with the DiT
The full-size preset hears with facebook/wav2vec2-base-960h, as the paper does; the tiny one with the smaller encoder of openai/whisper-tiny.en, cut
to three layers and trained on by train_audio.py. Nothing runs here.
Shapes: B batch, T pixel frames, F latent frames, S tokens per latent, L layers, A width of a hidden state.
"""
from functools import lru_cache, partial
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
import torch.nn as nn
import torch.nn.functional as F

RATE = 16000                # samples a second, what every Wav2Vec2 and Whisper expects
FPS = 25                    # video frames a second
HOP = RATE // FPS           # samples of one video frame: frame i owns samples [640 i, 640 (i+1))
CONTEXT = 8 * FPS           # frames the encoder hears at most, back from the end of the frames asked for
KINDS = "wav2vec2", "whisper"               # encoders that can be heard with; also the names of their folders among a preset's weights

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


@lru_cache(maxsize=1)
def log_mel(bands):
    """Whisper's own front: sound -> mel bands, 100 looks a second; log10 of the power, no more than 8 decades under the loudest, then (x + 4) / 4."""
    from transformers import WhisperFeatureExtractor  # here: the import takes seconds

    return partial(WhisperFeatureExtractor(feature_size=bands), sampling_rate=RATE, padding="do_not_pad", truncation=False, return_tensors="pt")


def whisper_states(model, wave):
    """wave (B, samples), normalised -> L tensors (B, samples / 320, A): as the encoder's forward(), but that wants its full 30 s and no less."""
    with torch.autocast("cpu", enabled=False):                              # where it is computed; bfloat16 is too coarse for decibels
        mel = log_mel(model.config.num_mel_bins)(list((0.1 * wave).cpu().numpy()))["input_features"]         # 0.1: as loud as recordings are
    hidden = F.gelu(model.conv2(F.gelu(model.conv1(mel.to(wave.device))))).transpose(1, 2)  # (B, samples / 320, A), 50 a second
    hidden, states = F.dropout(hidden + model.embed_positions.weight[:hidden.shape[1]], model.dropout, model.training), []
    for layer in model.layers:
        hidden = layer(hidden, None)
        states.append(hidden)
    return states[:-1] + [model.layer_norm(hidden)]


def encode(model, wave):
    """wave (B, 640 T), normalised -> L tensors (B, T, A), an entry per video frame.

    Wav2Vec2 is stretched to 25 fps before the transformer, as other talking heads do it. Whisper has learnt places 20 ms apart, so it hears at 50 a
    second, and two of its states make a frame."""
    if model.config.model_type == "whisper":
        return [states.unflatten(1, (-1, 2)).mean(2) for states in whisper_states(model, wave)]
    features = model.feature_extractor(wave)                                # (B, conv width, ~2T) at 50 Hz
    features = F.interpolate(features, size=wave.shape[-1] // HOP, mode="linear", align_corners=True)
    return transformer_states(model, features.transpose(1, 2))


class AudioEncoder:
    """A frozen Wav2Vec2 or the encoder of a Whisper, from a local folder (config.json, model.safetensors) or by its hub name.

    .layers L and .dim A are the sizes of features(). ValueError / FileNotFoundError if it does not load."""

    def __init__(self, name_or_path, device="cpu"):
        from huggingface_hub import constants, get_session  # here: the imports take seconds
        from transformers import AutoConfig, Wav2Vec2Model, logging
        from transformers.models.whisper.modeling_whisper import WhisperEncoder
        folder = Path(name_or_path)
        if not folder.exists() and (folder.is_absolute() or len(folder.parts) != 2):
            raise FileNotFoundError(f"no such folder of audio weights: {folder}")
        for name in ("config.json", "model.safetensors"):
            if folder.exists() and not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no audio encoder: {name} is missing")
        logging.set_verbosity_error()                       # else it lists what is left over (base-960h has a
        logging.disable_progress_bar()                      # head for letters), and draws bars
        try:
            if not (here := folder.exists()):               # a hub name: one question, for without a network
                get_session().head(constants.ENDPOINT, timeout=3)               # from_pretrained asks for 40 s
        except Exception:                                   # whatever httpx calls it: only a name fetched before
            here = True                                     # can be loaded now
        try:
            config = AutoConfig.from_pretrained(str(name_or_path), local_files_only=here, trust_remote_code=False)
            kind = config.model_type
            if kind not in KINDS:
                raise ValueError(f"it is a {kind}, not a {' or '.join(KINDS)}")
            if kind == "whisper" and config.max_source_positions < 2 * CONTEXT:
                raise ValueError(f"it hears {config.max_source_positions / 50} s at once, 8 are needed")
            of_it = {"key_mapping": {r"^(model\.)?encoder\.": ""}} if kind == "whisper" else {}       # a whole Whisper's encoder, or one by itself
            model, found = (WhisperEncoder if kind == "whisper" else Wav2Vec2Model).from_pretrained(
                str(name_or_path), dtype=torch.float32, use_safetensors=True, output_loading_info=True, local_files_only=here, **of_it)
        except Exception as error:                          # hub, json, wrong sizes, broken files ...
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"cannot load an audio encoder from {name_or_path}: {reason}") from None
        if missing := sorted(set(found["missing_keys"]) - {"masked_spec_embed"}):       # pre-training only
            raise ValueError(f"{name_or_path} lacks {len(missing)} tensors of a {kind}, e.g. {missing[0]}")
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

    def in_chunks(self, audio, frames, chunk=81):
        """features() of the first `frames` frames, heard as the video model hears them: chunk by chunk, nothing after a chunk. -> (frames, L, A)"""
        return torch.cat([self.features(audio, start, min(chunk, frames - start)) for start in range(0, frames, chunk)])


def encoder_path(weights, name):
    """Where what config.json of a folder of weights calls "audio" lies: one of KINDS in that folder, all else is a hub name or a path."""
    return Path(weights) / name if name in KINDS else Path(name)


def encoder_of(weights, name, device="cpu"):
    """The AudioEncoder that config.json of a folder of weights names."""
    return AudioEncoder(encoder_path(weights, name), device)

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
