"""Recording -> hidden states of a speech encoder at 25 fps -> audio tokens of each latent frame.

Paper sections 3.1 and 3.2, a = MLP(W2V(A)) of Eq. 23. The DiT never gets a waveform. A frozen
encoder W2V turns 16 kHz audio into hidden states, one vector a video frame and layer. Each latent
frame is then conditioned on its own video frames and two more on each side. In this order:
    load_audio          any file -> 16 kHz mono
    AudioEncoder        W2V: at most 8 s of audio -> (frames, layers, dim)
    latent_windows      which video frames belong to which latent
    AudioProjection     MLP: these frames -> S tokens of the latent; trained together with the DiT
The paper's encoder is facebook/wav2vec2-base-960h; the small preset's is in tiny/whisper.py.
Shapes: B batch, T pixel frames, F latent frames, S tokens of a latent, L layers of the encoder,
A width of its hidden states, D width of the DiT. Frame i owns samples [640 i, 640 (i + 1)).
"""
import json
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
import torch.nn as nn
import torch.nn.functional as nnf

from media import FPS, HOP, mono_16k

CONTEXT = 8 * FPS                   # frames the encoder gets at most, the last one included
KINDS = ("wav2vec2", "whisper")     # model types; also the names of their folders in a preset
FILES = ("config.json", "model.safetensors")

# ---------------------------------------------------------------------------------------- recording


def load_audio(path):
    """Any recording -> float32 (samples,) at 16 kHz, mono, in [-1, 1]. Silence is fine.

    Of a video the sound on its pictures' clock: a late start is silence. FileNotFoundError if there
    is no such file; ValueError if it is no audio, empty or has NaN."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        pieces = list(mono_16k(path))
    except (av.FFmpegError, soundfile.LibsndfileError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read {path}: {reason}") from None
    if not any(len(piece) for piece in pieces):
        raise ValueError(f"{path} has no sound")
    return np.concatenate(pieces)

# ------------------------------------------------------------------------------------------ encoder


def normalise(wave):
    """(..., samples) -> zero mean, unit variance, as Wav2Vec2 expects; silence stays zero."""
    wave = wave - wave.mean(-1, keepdim=True)
    return wave * (wave.square().mean(-1, keepdim=True) + 1e-7).rsqrt()


def transformer_states(model, features):
    """Wav2Vec2's transformer: (B, T, conv width) -> the outputs of its L layers, each (B, T, A).

    As transformers' own hidden_states, without the embedding and with the last one normed."""
    encoder, norm_is_last = model.encoder, model.config.do_stable_layer_norm
    hidden, _ = model.feature_projection(features)                  # (B, T, A)
    hidden = hidden + encoder.pos_conv_embed(hidden)
    if not norm_is_last:                                            # base models norm first
        hidden = encoder.layer_norm(hidden)
    hidden = encoder.dropout(hidden)
    states = []
    for layer in encoder.layers:
        hidden = layer(hidden)
        states.append(hidden)
    if norm_is_last:                                                # large models norm last
        states[-1] = encoder.layer_norm(hidden)
    return states


def wav2vec2_states(model, wave):
    """wave (B, 640 T), normalised -> L hidden states, each (B, T, A).

    Resampled to 25 fps before the transformer, as other talking-head models do."""
    features = model.feature_extractor(wave)                        # (B, conv width, ~2T), 50 Hz
    frames = wave.shape[-1] // HOP
    features = nnf.interpolate(features, size=frames, mode="linear", align_corners=True)
    return transformer_states(model, features.transpose(1, 2))


def load_network(folder):
    """Folder of FILES -> (transformers model, its function (model, wave) -> hidden states)."""
    from transformers import Wav2Vec2Model, logging  # here: the import takes seconds
    logging.set_verbosity_error()                                   # else it lists unused tensors
    logging.disable_progress_bar()
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind == "wav2vec2":
        states = wav2vec2_states
        model, info = Wav2Vec2Model.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    elif kind == "whisper":
        from tiny.whisper import load_whisper, whisper_states  # not the paper's
        states = whisper_states
        model, info = load_whisper(folder)
    else:
        raise ValueError(f"it is a {kind}, not a {' or '.join(KINDS)}")
    missing = sorted(set(info["missing_keys"]) - {"masked_spec_embed"})     # pre-training only
    if missing:
        raise ValueError(f"it lacks {len(missing)} tensors of a {kind}, e.g. {missing[0]}")
    return model, states


def check_folder(folder):
    """FileNotFoundError if an encoder's folder, or one of its FILES, is missing."""
    if not folder.exists():
        raise FileNotFoundError(f"no such folder of audio weights: {folder}")
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no audio encoder: {name} is missing")


class AudioEncoder:
    """The frozen encoder W2V: a Wav2Vec2 (or Whisper), from a folder or by its Hugging Face name.

    window: seconds that it always gets, zeros before the recording filling them; None: at most
    8 s. .layers L and .dim A are the sizes of features(). ValueError or FileNotFoundError, in one
    line, if it does not load."""

    def __init__(self, name_or_path, device="cpu", window=None):
        if window is not None and not (isinstance(window, int | float) and 1 <= window <= 60):
            raise ValueError(f"audio_window must be 1 to 60 seconds, not {window}")
        folder = Path(name_or_path)
        is_hub_name = not folder.exists() and not folder.is_absolute() and len(folder.parts) == 2
        if not is_hub_name:
            check_folder(folder)
        try:
            if is_hub_name:     # fails at once without a network; from_pretrained tries for 40 s
                from huggingface_hub import snapshot_download
                folder = Path(snapshot_download(str(name_or_path), allow_patterns=list(FILES)))
            model, self.states = load_network(folder)
        except Exception as error:                                  # hub, json, sizes, damage ...
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            message = f"cannot load an audio encoder from {name_or_path}: {reason}"
            raise ValueError(message) from None
        self.model = model.to(device).eval().requires_grad_(False)  # eval: no dropout, no masking
        self.device = device
        self.window = window
        self.context = CONTEXT if window is None else round(window * FPS)   # frames
        self.layers = model.config.num_hidden_layers
        self.dim = model.config.hidden_size

    def encode(self, wave):
        """wave (B, 640 T), normalised -> hidden states (B, T, L, A)."""
        return torch.stack(self.states(self.model, wave), 2)

    @torch.no_grad()
    def features(self, audio, start, frames):
        """Hidden states of the video frames [start, start + frames): float32 (frames, L, A).

        audio (samples,) at 16 kHz; silence follows its end. Encoded are at most the 8 s up to the
        last of these frames: features of a chunk never depend on the future, and their cost does
        not grow with the recording. With a window they are exactly that long, zeros included."""
        if start < 0 or not 1 <= frames <= self.context:
            raise ValueError(f"features() makes 1 to {self.context} frames from start >= 0: "
                             f"not {frames} from {start}")
        end = start + frames
        begin = end - self.context if self.window else max(0, end - self.context)
        sound = audio[max(0, begin) * HOP:end * HOP]
        sound = torch.as_tensor(sound, dtype=torch.float32, device=self.device)
        before = max(0, -begin) * HOP
        after = (end - begin) * HOP - before - len(sound)
        if self.window:
            wave = normalise(nnf.pad(sound, (before, after)))
        else:
            wave = nnf.pad(normalise(sound), (0, after))
        return self.encode(wave[None])[0, start - begin:]           # (frames, L, A)

    def in_chunks(self, audio, frames, chunk=81):
        """features() of the first `frames` frames, chunk by chunk as infer.py makes them."""
        sizes = [(start, min(chunk, frames - start)) for start in range(0, frames, chunk)]
        return torch.cat([self.features(audio, start, size) for start, size in sizes])


def encoder_path(weights, name):
    """Path of the encoder that a weights folder's config.json calls `name`.

    One of KINDS is a folder beside that file; anything else is a Hugging Face name or a path."""
    return Path(weights) / name if name in KINDS else Path(name)


def load_audio_encoder(weights, name, device="cpu", window=None):
    """The AudioEncoder that a weights folder's config.json calls `name`."""
    return AudioEncoder(encoder_path(weights, name), device, window)

# --------------------------------------------------------------------------------------- projection


def latent_windows(features):
    """Frames that condition each latent: its own and two more on each side, clamped to the chunk.

    features (B, T, L, A), T = 4F - 3 -> first (B, 5, L, A), rest (B, F-1, 8, L, A). Latent 0 is
    frame 0: frames -2..2. Latent f is frames 4f-3..4f: frames 4f-5..4f+2."""
    T = features.shape[1]
    if T % 4 != 1:
        raise ValueError(f"a chunk has 4F - 3 frames, not {T}")
    F = (T + 3) // 4
    first = torch.arange(-2, 3)                                     # (5,)
    rest = 4 * torch.arange(1, F)[:, None] + torch.arange(-5, 3)    # (F-1, 8)
    return features[:, first.clamp(0, T - 1)], features[:, rest.clamp(0, T - 1)]


class AudioProjection(nn.Module):
    """MLP of Eq. 23: features (B, T, L, A) -> audio tokens (B, F, S, D) for cross-attention."""

    def __init__(self, layers, dim, width, tokens=32, hidden=512):
        super().__init__()
        self.tokens, self.width = tokens, width
        self.first = nn.Linear(5 * layers * dim, hidden)            # latent 0 has another window
        self.rest = nn.Linear(8 * layers * dim, hidden)
        self.shared = nn.Sequential(nn.ReLU(), nn.Linear(hidden, hidden),
                                    nn.ReLU(), nn.Linear(hidden, tokens * width))
        self.norm = nn.LayerNorm(width)

    def forward(self, features):
        first, rest = latent_windows(features)
        first = self.first(first.flatten(1))[:, None]               # (B, 1, hidden)
        rest = self.rest(rest.flatten(2))                           # (B, F-1, hidden)
        x = self.shared(torch.cat([first, rest], 1))                # (B, F, S*D)
        return self.norm(x.unflatten(-1, (self.tokens, self.width)))        # (B, F, S, D)
