"""Whisper's encoder in place of the paper's Wav2Vec2: the small preset's audio encoder.

audio.AudioEncoder imports this file if the model_type in an encoder's config.json is "whisper".
The shipped one is openai/whisper-tiny.en, cut to three layers and fine-tuned by
tiny/train_audio.py; it has a fifteenth of wav2vec2-base-960h's parameters.
Shapes: B batch, T video frames, M mel bands, A width of a hidden state; frames of 640 samples.
"""
from functools import lru_cache

import torch
import torch.nn.functional as nnf
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from data import SAMPLE_RATE

MIN_POSITIONS = 400                 # 50 a second: the 8 s that AudioEncoder.features() encodes
SPEECH_LEVEL = 0.1                  # root mean square of ordinary recordings

feature_extractor = lru_cache(WhisperFeatureExtractor)


def load_whisper(folder):
    """Folder of a Whisper, or of its encoder alone -> (WhisperEncoder, transformers' loading info).

    ValueError if it takes less than 8 s of audio at once."""
    config = WhisperConfig.from_pretrained(folder)
    if config.max_source_positions < MIN_POSITIONS:
        seconds = config.max_source_positions / 50
        raise ValueError(f"it takes {seconds} s of audio at once, 8 are needed")
    of_whole_model = {r"^(model\.)?encoder\.": ""}                  # names of tensors -> ours
    return WhisperEncoder.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
        key_mapping=of_whole_model)


def log_mel(wave, bands):
    """wave (B, 640 T), normalised -> Whisper's own log-mel features (B, M, 4T), 100 a second."""
    sounds = list((SPEECH_LEVEL * wave).cpu().numpy())
    with torch.autocast("cpu", enabled=False):                      # bfloat16 is too coarse for dB
        features = feature_extractor(feature_size=bands)(
            sounds, sampling_rate=SAMPLE_RATE, return_tensors="pt",
            padding="do_not_pad", truncation=False)                 # instead of 30 s, always
    return features["input_features"].to(wave.device)


def states_at_50_hz(model, wave):
    """wave (B, 640 T), normalised -> outputs of all layers, each (B, 2T, A), the last one normed.

    As WhisperEncoder.forward, which refuses anything but its full length."""
    mel = log_mel(wave, model.config.num_mel_bins)                  # (B, M, 4T)
    hidden = nnf.gelu(model.conv1(mel))                             # (B, A, 4T)
    hidden = nnf.gelu(model.conv2(hidden)).transpose(1, 2)          # (B, 2T, A)
    hidden = hidden + model.embed_positions.weight[:hidden.shape[1]]
    hidden = nnf.dropout(hidden, model.dropout, model.training)
    states = []
    for layer in model.layers:
        hidden = layer(hidden, None)
        states.append(hidden)
    states[-1] = model.layer_norm(hidden)
    return states


def whisper_states(model, wave):
    """wave (B, 640 T), normalised -> L hidden states, each (B, T, A): means of two at 50 Hz.

    Wav2Vec2 is resampled before the transformer; Whisper's positions are trained 20 ms apart."""
    return [states.unflatten(1, (-1, 2)).mean(2) for states in states_at_50_hz(model, wave)]
