"""Speech from a formant synthesiser, with phone times: the recordings in assets/speech.

    python -m synthetic.speech --speech DIR --recordings 40 --seed 1

Writes SPEAKER-NUMBER.flac and .tsv (start s, end s, label), two recordings a speaker; no person's
voice is in them. Harmonics and noise are summed under a spectral envelope whose peaks (formants)
glide from phone to phone, after the classic tables of vowel formants (Peterson and Barney 1952).
Speakers differ in pitch and in the size of the vocal tract.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import tyro

from common import one_line_errors
from data import SAMPLE_RATE
from synthetic.phones import GLIDES

STEP = 0.005                        # s, of the control tracks
STEP_SAMPLES = SAMPLE_RATE // 200   # the same, in samples

# F1-F3: formants in Hz. voice, noise: their amplitudes; the noise has a centre and a width in Hz.
# A stop is silent for the first 60 % of its duration, then bursts.
SOUNDS = {
    #       F1   F2    F3    voice noise centre width seconds
    "sil": (500, 1500, 2500, 0,    0,    1000, 500,  0.25),
    "i":   (280, 2250, 2950, 1,    0,    0,    1,    0.12),
    "ɪ":   (390, 1990, 2550, 1,    0,    0,    1,    0.08),
    "ɛ":   (530, 1840, 2480, 1,    0,    0,    1,    0.1),
    "æ":   (660, 1720, 2410, 1,    0,    0,    1,    0.13),
    "ɑ":   (730, 1090, 2440, 1,    0,    0,    1,    0.13),
    "ɔ":   (570, 840,  2410, 1,    0,    0,    1,    0.13),
    "ʊ":   (440, 1020, 2240, 1,    0,    0,    1,    0.08),
    "u":   (300, 870,  2240, 1,    0,    0,    1,    0.12),
    "ʌ":   (640, 1190, 2390, 1,    0,    0,    1,    0.08),
    "ə":   (500, 1450, 2450, 0.8,  0,    0,    1,    0.06),
    "ɝ":   (480, 1350, 1690, 1,    0,    0,    1,    0.11),
    "eɪ":  (480, 1900, 2550, 1,    0,    0,    1,    0.14),
    "aɪ":  (720, 1250, 2500, 1,    0,    0,    1,    0.16),
    "ɔɪ":  (560, 850,  2400, 1,    0,    0,    1,    0.17),
    "aʊ":  (720, 1250, 2450, 1,    0,    0,    1,    0.16),
    "oʊ":  (500, 950,  2350, 1,    0,    0,    1,    0.14),
    "p":   (350, 850,  2300, 0,    0.25, 900,  700,  0.09),
    "b":   (300, 850,  2300, 0.25, 0.15, 900,  600,  0.08),
    "m":   (270, 950,  2200, 0.45, 0,    0,    1,    0.08),
    "f":   (350, 1100, 2400, 0,    0.16, 5200, 2600, 0.09),
    "v":   (320, 1100, 2400, 0.45, 0.07, 5000, 2600, 0.06),
    "θ":   (350, 1350, 2550, 0,    0.12, 5800, 2600, 0.09),
    "ð":   (320, 1350, 2550, 0.5,  0.05, 5600, 2600, 0.05),
    "t":   (350, 1750, 2650, 0,    0.45, 4300, 1500, 0.08),
    "d":   (300, 1750, 2650, 0.25, 0.25, 4000, 1400, 0.06),
    "n":   (280, 1650, 2600, 0.45, 0,    0,    1,    0.07),
    "s":   (350, 1700, 2600, 0,    0.5,  6200, 1200, 0.1),
    "z":   (320, 1700, 2600, 0.4,  0.28, 6000, 1200, 0.08),
    "l":   (360, 1250, 2700, 0.7,  0,    0,    1,    0.07),
    "ɹ":   (330, 1080, 1500, 0.7,  0,    0,    1,    0.07),
    "ʃ":   (350, 1800, 2500, 0,    0.5,  3300, 900,  0.11),
    "ʒ":   (320, 1800, 2500, 0.4,  0.28, 3200, 900,  0.08),
    "t͡ʃ": (350, 1800, 2600, 0,    0.5,  3500, 1000, 0.11),
    "d͡ʒ": (320, 1800, 2600, 0.3,  0.32, 3400, 1000, 0.09),
    "k":   (350, 2000, 2400, 0,    0.4,  2200, 700,  0.09),
    "ɡ":   (300, 2000, 2400, 0.25, 0.22, 2100, 700,  0.07),
    "ŋ":   (280, 2100, 2500, 0.45, 0,    0,    1,    0.07),
    "h":   (500, 1500, 2500, 0,    0.12, 1600, 1200, 0.06),
    "w":   (290, 640,  2200, 0.7,  0,    0,    1,    0.07),
    "j":   (270, 2150, 3000, 0.7,  0,    0,    1,    0.06),
}
STOPS = {"p", "b", "t", "d", "k", "ɡ", "t͡ʃ", "d͡ʒ"}
WORDS = [word.split() for word in """
    m aɪ | m eɪ b i | b oʊ t | p i p ə l | s t ɑ p | m u v | b ɪ ɡ | p eɪ p ɝ | h ə l oʊ |
    w ɝ l d | f aɪ v | s ɛ v ə n | t u | θ ɹ i | f ɔ ɹ | n aɪ n | ð ə | ð ɪ s | ð æ t |
    w ɪ n d oʊ | h aʊ s | aʊ t | s ʌ n | m u n | l aɪ t | n aɪ t | ʃ i | t͡ʃ ɛ ɹ | d͡ʒ æ m |
    m ɛ ʒ ɝ | v ɔɪ s | b ɔɪ | ɹ ɛ d | ɡ ɹ i n | b l u | j ɛ l oʊ | w aɪ t | b l æ k | k æ t |
    d ɔ ɡ | f ɪ ʃ | b ɝ d | h ɔ ɹ s | ɡ oʊ | k ʌ m | s ɪ ŋ | s ɔ ŋ | t ɔ k | w ɔ k | l ʊ k |
    b ʊ k | f ʊ t | f u d | w ɔ t ɝ | m ɔ ɹ n ɪ ŋ | i v n ɪ ŋ | æ f t ɝ | b ɪ f ɔ ɹ | ə b aʊ t |
    ə p ɑ n | p l i z | θ æ ŋ k | j u | w i | ð eɪ | f ɑ ð ɝ | m ʌ ð ɝ | b ɹ ʌ ð ɝ | z ɪ ɹ oʊ |
    v ɛ ɹ i | æ p ə l | s p u n | t eɪ b ə l | k ʌ p | b æ θ | p ɑ p ə | m ɑ m ə
""".split("|")]


@dataclass
class Config:
    speech: Path                    # folder for the recordings
    recordings: int = 8             # two for each speaker
    seconds: float = 4.2            # length of a recording
    seed: int = 0                   # same seed, same recordings


def random_sentence(rng, seconds):
    """Random words with pauses, at a random pace, about `seconds` long.

    Returns phones [(start s, end s, label)], which follow each other without gaps.
    """
    phones = []
    now = 0.0
    pace = rng.uniform(0.95, 1.25)

    def append(label, length):
        nonlocal now
        end = round(now + length, 2)
        phones.append((round(now, 2), end, label))
        now = end

    append("sil", rng.uniform(0.2, 0.4))
    while now < seconds - 0.8:
        for _ in range(rng.integers(3, 8)):
            for label in WORDS[rng.integers(len(WORDS))]:
                append(label, max(0.04, SOUNDS[label][7] * pace * rng.uniform(0.8, 1.3)))
            if now > seconds - 0.8:
                break
        append("sil", rng.uniform(0.2, 0.5))
    return phones


def smooth(x, n):
    """Moving average over n (odd) steps."""
    return np.convolve(np.pad(x, n // 2, "edge"), np.ones(n) / n, "valid")


def control_tracks(phones, size):
    """What the synthesiser does every 5 ms: (K, 7), the first seven columns of SOUNDS.

    size scales the formants.
    """
    steps = int(np.ceil(phones[-1][1] / STEP))
    times = (np.arange(steps) + 0.5) * STEP
    tracks = np.zeros((steps, 7))
    for start, end, label in phones:
        inside = (times >= start) & (times < end)
        u = (times[inside] - start) / (end - start)         # 0-1 within the phone
        rows = np.tile(np.array(SOUNDS[label][:7], float), (inside.sum(), 1))
        if label in GLIDES:
            target = np.array(SOUNDS[GLIDES[label]][:3])
            rows[:, :3] += np.clip((u[:, None] - 0.35) / 0.5, 0, 1) * (target - rows[:, :3])
        if label in STOPS:
            affricate = label in ("t͡ʃ", "d͡ʒ")
            fall = 1 if affricate else np.exp(-np.maximum(u - 0.6, 0) * 4)
            rows[:, 4] *= (u > 0.6) * fall
        tracks[inside] = rows
    tracks[:, :3] *= size
    for column in range(3):                                 # the tract moves slowly
        tracks[:, column] = smooth(smooth(tracks[:, column], 9), 9)
    tracks[:, 3] = smooth(smooth(tracks[:, 3], 5), 3)       # its excitation quickly
    tracks[:, 4] = smooth(tracks[:, 4], 3)
    return tracks


def resonance(f, formants):
    """Gain of the vocal tract at frequencies f (K, 1), for formants (K, 3), all in Hz. (K, 1)

    A fixed fourth formant lies above.
    """
    gain = np.ones_like(f)
    for i, width in enumerate((80, 110, 170, 250)):
        peak = formants[..., i:i + 1] if i < 3 else np.full_like(f[..., :1], 3600)
        gain = gain * peak ** 2 / np.sqrt((peak ** 2 - f ** 2) ** 2 + (width * f) ** 2)
    return gain


def voiced(rng, tracks, pitch):
    """Harmonics of a gliding pitch (Hz) under the formants. Returns (K * STEP_SAMPLES,)."""
    steps = len(tracks)
    times = np.arange(steps) * STEP
    slow = np.sin(2 * np.pi * times / 1.7 + rng.uniform(0, 6))
    fast = np.sin(2 * np.pi * times / 0.45 + rng.uniform(0, 6))
    melody = 1 + 0.10 * slow + 0.05 * fast
    tremor = np.convolve(rng.standard_normal(steps + 8), np.ones(9) / 3, "valid")
    f0 = pitch * melody * (1 + 0.01 * tremor)               # (K,)
    at = np.arange(steps * STEP_SAMPLES) / STEP_SAMPLES - 0.5

    def to_samples(track):
        return np.interp(at, np.arange(steps), track)

    phase = 2 * np.pi * np.cumsum(to_samples(f0)) / SAMPLE_RATE
    voice = np.zeros(len(at))
    for h in range(1, int(5000 / f0.min()) + 1):
        gain = resonance((h * f0)[:, None], tracks[:, :3])[:, 0]
        amplitude = gain * tracks[:, 3] / h * (h * f0 < 5200)       # the glottis: -6 dB an octave
        voice += to_samples(amplitude) * np.sin(h * phase)
    return voice


def unvoiced(rng, tracks):
    """Noise, shaped in windows of 10 ms. Returns (K * STEP_SAMPLES,)."""
    frame = 2 * STEP_SAMPLES
    frequencies = np.fft.rfftfreq(frame, 1 / SAMPLE_RATE)
    window = np.hanning(frame + 1)[:-1]
    samples = len(tracks) * STEP_SAMPLES
    noise = np.zeros(samples + frame)
    for i, (amplitude, centre, width) in enumerate(tracks[:, 4:]):
        if amplitude > 1e-3:
            band = np.exp(-0.5 * ((frequencies - centre) / width) ** 2)
            piece = np.fft.irfft(np.fft.rfft(rng.standard_normal(frame)) * band, frame)
            start = i * STEP_SAMPLES
            noise[start:start + frame] += amplitude * window * piece
    half = STEP_SAMPLES // 2
    return noise[half:half + samples]


def synthesise(rng, phones, pitch=120.0, size=1.0):
    """Phones [(start s, end s, label)] -> audio (samples,) float32 at 16 kHz, peak 0.3.

    pitch: Hz; size: 1 for a man's vocal tract, 1.15 for a woman's (it scales the formants).
    """
    tracks = control_tracks(phones, size)
    voice = voiced(rng, tracks, pitch)
    audio = 0.35 * voice + unvoiced(rng, tracks)
    return (0.3 * audio / np.abs(audio).max()).astype(np.float32)


def random_voice(rng, woman):
    """-> pitch in Hz and size of the vocal tract: see synthesise."""
    if woman:
        return rng.uniform(170, 230), rng.uniform(1.10, 1.20)
    return rng.uniform(90, 140), rng.uniform(0.95, 1.05)


def write_speech(folder, recordings, seed, seconds):
    """Write SPEAKER-NUMBER.flac and .tsv; women and men take turns."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(recordings):
        speaker = i // 2
        voice_rng = np.random.default_rng([seed, speaker, 1])
        pitch, size = random_voice(voice_rng, woman=speaker % 2)
        rng = np.random.default_rng([seed, i, 2])
        phones = random_sentence(rng, seconds)
        audio = synthesise(rng, phones, pitch, size)
        path = folder / f"synth{seed * 1000 + speaker:04d}-{i % 2}"
        try:
            soundfile.write(f"{path}.flac", audio, SAMPLE_RATE, subtype="PCM_16")
        except soundfile.SoundFileError as error:
            raise OSError(str(error)) from None
        text = "".join(f"{start:.2f}\t{end:.2f}\t{label}\n" for start, end, label in phones)
        Path(f"{path}.tsv").write_text(text, encoding="utf-8")


def main(argv=None):
    cfg = tyro.cli(Config, args=argv, description=__doc__)
    with one_line_errors("synthetic.speech"):
        if cfg.recordings < 1 or cfg.seed < 0 or not 1 <= cfg.seconds <= 3600:
            raise ValueError("need --recordings >= 1, --seed >= 0, --seconds 1-3600")
        write_speech(cfg.speech, cfg.recordings, cfg.seed, cfg.seconds)


if __name__ == "__main__":
    main()
