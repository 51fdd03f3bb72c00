"""Speech from a formant synthesiser, with phone times: the recordings in assets/speech. Nobody is heard.

    python assets/synth_speech.py --speech DIR --recordings 40 --seed 1      writes SPEAKER-NUMBER.flac and .tsv (start, end, label)

say() sums harmonics and noise under a spectral envelope whose peaks (formants) glide from phone to phone, after the classic tables of
vowel formants (Peterson and Barney 1952). Two recordings for each speaker; speakers differ in pitch and size of the vocal tract.
"""
import argparse
from pathlib import Path

import numpy as np
import soundfile

RATE = 16000
# phone: (F1, F2, F3 in Hz, voice, noise, noise centre in Hz, its width, seconds); a stop is silent for its first 60 %, then bursts.
SOUNDS = {
    "sil": (500, 1500, 2500, 0, 0, 1000, 500, .25), "i": (280, 2250, 2950, 1, 0, 0, 1, .12), "ɪ": (390, 1990, 2550, 1, 0, 0, 1, .08),
    "ɛ": (530, 1840, 2480, 1, 0, 0, 1, .10), "æ": (660, 1720, 2410, 1, 0, 0, 1, .13), "ɑ": (730, 1090, 2440, 1, 0, 0, 1, .13),
    "ɔ": (570, 840, 2410, 1, 0, 0, 1, .13), "ʊ": (440, 1020, 2240, 1, 0, 0, 1, .08), "u": (300, 870, 2240, 1, 0, 0, 1, .12),
    "ʌ": (640, 1190, 2390, 1, 0, 0, 1, .08), "ə": (500, 1450, 2450, .8, 0, 0, 1, .06), "ɝ": (480, 1350, 1690, 1, 0, 0, 1, .11),
    "eɪ": (480, 1900, 2550, 1, 0, 0, 1, .14), "aɪ": (720, 1250, 2500, 1, 0, 0, 1, .16), "ɔɪ": (560, 850, 2400, 1, 0, 0, 1, .17),
    "aʊ": (720, 1250, 2450, 1, 0, 0, 1, .16), "oʊ": (500, 950, 2350, 1, 0, 0, 1, .14),
    "p": (350, 850, 2300, 0, .25, 900, 700, .09), "b": (300, 850, 2300, .25, .15, 900, 600, .08), "m": (270, 950, 2200, .45, 0, 0, 1, .08),
    "f": (350, 1100, 2400, 0, .16, 5200, 2600, .09), "v": (320, 1100, 2400, .45, .07, 5000, 2600, .06),
    "θ": (350, 1350, 2550, 0, .12, 5800, 2600, .09), "ð": (320, 1350, 2550, .5, .05, 5600, 2600, .05),
    "t": (350, 1750, 2650, 0, .45, 4300, 1500, .08), "d": (300, 1750, 2650, .25, .25, 4000, 1400, .06), "n": (280, 1650, 2600, .45, 0, 0, 1, .07),
    "s": (350, 1700, 2600, 0, .50, 6200, 1200, .10), "z": (320, 1700, 2600, .40, .28, 6000, 1200, .08), "l": (360, 1250, 2700, .7, 0, 0, 1, .07),
    "ɹ": (330, 1080, 1500, .7, 0, 0, 1, .07), "ʃ": (350, 1800, 2500, 0, .50, 3300, 900, .11), "ʒ": (320, 1800, 2500, .4, .28, 3200, 900, .08),
    "t͡ʃ": (350, 1800, 2600, 0, .50, 3500, 1000, .11), "d͡ʒ": (320, 1800, 2600, .3, .32, 3400, 1000, .09),
    "k": (350, 2000, 2400, 0, .40, 2200, 700, .09), "ɡ": (300, 2000, 2400, .25, .22, 2100, 700, .07), "ŋ": (280, 2100, 2500, .45, 0, 0, 1, .07),
    "h": (500, 1500, 2500, 0, .12, 1600, 1200, .06), "w": (290, 640, 2200, .7, 0, 0, 1, .07), "j": (270, 2150, 3000, .7, 0, 0, 1, .06)}
GLIDES = {"eɪ": "ɪ", "aɪ": "ɪ", "ɔɪ": "ɪ", "aʊ": "ʊ", "oʊ": "ʊ"}
STOPS = {"p", "b", "t", "d", "k", "ɡ", "t͡ʃ", "d͡ʒ"}
WORDS = [w.split() for w in """
    m aɪ|m eɪ b i|b oʊ t|p i p ə l|s t ɑ p|m u v|b ɪ ɡ|p eɪ p ɝ|h ə l oʊ|w ɝ l d|f aɪ v|s ɛ v ə n|t u|θ ɹ i|f ɔ ɹ|n aɪ n|ð ə|ð ɪ s|ð æ t|
    w ɪ n d oʊ|h aʊ s|aʊ t|s ʌ n|m u n|l aɪ t|n aɪ t|ʃ i|t͡ʃ ɛ ɹ|d͡ʒ æ m|m ɛ ʒ ɝ|v ɔɪ s|b ɔɪ|ɹ ɛ d|ɡ ɹ i n|b l u|j ɛ l oʊ|w aɪ t|b l æ k|k æ t|d ɔ ɡ|
    f ɪ ʃ|b ɝ d|h ɔ ɹ s|ɡ oʊ|k ʌ m|s ɪ ŋ|s ɔ ŋ|t ɔ k|w ɔ k|l ʊ k|b ʊ k|f ʊ t|f u d|w ɔ t ɝ|m ɔ ɹ n ɪ ŋ|i v n ɪ ŋ|æ f t ɝ|b ɪ f ɔ ɹ|
    ə b aʊ t|ə p ɑ n|p l i z|θ æ ŋ k|j u|w i|ð eɪ|f ɑ ð ɝ|m ʌ ð ɝ|b ɹ ʌ ð ɝ|
    z ɪ ɹ oʊ|v ɛ ɹ i|æ p ə l|s p u n|t eɪ b ə l|k ʌ p|b æ θ|p ɑ p ə|m ɑ m ə""".split("|")]


def sentence(rng, seconds):
    """Random words with pauses, at a random pace. Returns phones [(start s, end s, label)] that fill about `seconds`."""
    phones, t, pace = [], 0.0, rng.uniform(.95, 1.25)

    def put(label, long):
        nonlocal t
        end = round(t + long, 2)
        phones.append((round(t, 2), end, label))
        t = end
    put("sil", rng.uniform(.2, .4))
    while t < seconds - .8:
        for _ in range(rng.integers(3, 8)):
            for label in WORDS[rng.integers(len(WORDS))]:
                put(label, max(.04, SOUNDS[label][7] * pace * rng.uniform(.8, 1.3)))
            if t > seconds - .8:
                break
        put("sil", rng.uniform(.2, .5))
    return phones


def tracks(phones, size):
    """Control tracks every 5 ms: (K, 7) formants 1-3, voice, noise, its centre and width; `size` scales the formants."""
    k = int(np.ceil(phones[-1][1] / .005))
    t, out = (np.arange(k) + .5) * .005, np.zeros((k, 7))
    for start, end, label in phones:
        i = (t >= start) & (t < end)
        u = (t[i] - start) / (end - start)
        row = np.tile(np.array(SOUNDS[label][:7], float), (i.sum(), 1))
        if label in GLIDES:
            row[:, :3] += np.clip((u[:, None] - .35) / .5, 0, 1) * (np.array(SOUNDS[GLIDES[label]][:3]) - row[:, :3])
        if label in STOPS:
            row[:, 4] *= (u > .6) * (1 if label in ("t͡ʃ", "d͡ʒ") else np.exp(-np.maximum(u - .6, 0) * 4))
        out[i] = row
    out[:, :3] *= size
    smooth = lambda x, n: np.convolve(np.pad(x, n // 2, "edge"), np.ones(n) / n, "valid")
    for c in range(3):                                                    # the tract moves slowly, its excitation quickly
        out[:, c] = smooth(smooth(out[:, c], 9), 9)
    out[:, 3], out[:, 4] = smooth(smooth(out[:, 3], 5), 3), smooth(out[:, 4], 3)
    return out


def resonance(f, formants):
    """Gain of the vocal tract at frequencies f (..., h) for formants (..., 3) in Hz; a fixed fourth one above."""
    gain = np.ones_like(f)
    for c, width in ((0, 80), (1, 110), (2, 170), (3, 250)):
        top = formants[..., c:c + 1] if c < 3 else np.full_like(f[..., :1], 3600)
        gain = gain * top ** 2 / np.sqrt((top ** 2 - f ** 2) ** 2 + (width * f) ** 2)
    return gain


def say(rng, phones, pitch=120.0, size=1.0):
    """Speak phones [(start s, end s, label)]: audio (samples,) float32 at 16 kHz, peak 0.3. pitch in Hz; size 1 = a man's tract, 1.15 a woman's."""
    x = tracks(phones, size)
    k, hop = len(x), RATE // 200
    t = np.arange(k) * .005
    melody = 1 + .10 * np.sin(2 * np.pi * t / 1.7 + rng.uniform(0, 6)) + .05 * np.sin(2 * np.pi * t / .45 + rng.uniform(0, 6))
    f0 = pitch * melody * (1 + .01 * np.convolve(rng.standard_normal(k + 8), np.ones(9) / 3, "valid"))
    n = k * hop
    at = np.arange(n) / hop - .5
    up = lambda v: np.interp(at, np.arange(k), v)
    phase = 2 * np.pi * np.cumsum(up(f0)) / RATE
    voice = np.zeros(n)
    for h in range(1, int(5000 / f0.min()) + 1):                          # harmonics under the formants; -6 dB an octave from the glottis
        a = resonance((h * f0)[:, None], x[:, :3])[:, 0] * x[:, 3] / h * (h * f0 < 5200)
        voice += up(a) * np.sin(h * phase)
    frame, spectrum = 2 * hop, np.fft.rfftfreq(2 * hop, 1 / RATE)
    window = np.hanning(frame + 1)[:-1]
    noise = np.zeros(n + frame)
    for i in range(k):                                                    # noise, shaped in windows of 10 ms
        if x[i, 4] > 1e-3:
            band = np.exp(-.5 * ((spectrum - x[i, 5]) / x[i, 6]) ** 2)
            piece = np.fft.irfft(np.fft.rfft(rng.standard_normal(frame)) * band, frame)
            noise[i * hop:i * hop + frame] += x[i, 4] * window * piece
    audio = .35 * voice + noise[hop // 2:hop // 2 + n]
    return (.3 * audio / np.abs(audio).max()).astype(np.float32)


def write_speech(folder, recordings, seed, seconds):
    """Write SPEAKER-NUMBER.flac and .tsv (start, end, label); two recordings for each speaker, who differ in pitch and tract."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(recordings):
        who = np.random.default_rng([seed, i // 2, 1])
        woman = (i // 2) % 2
        pitch, size = who.uniform(170, 230) if woman else who.uniform(90, 140), who.uniform(1.10, 1.20) if woman else who.uniform(.95, 1.05)
        rng = np.random.default_rng([seed, i, 2])
        phones = sentence(rng, seconds)
        name = f"synth{seed * 1000 + i // 2:04d}-{i % 2}"
        soundfile.write(folder / f"{name}.flac", say(rng, phones, pitch, size), RATE, subtype="PCM_16")
        text = "".join(f"{s:.2f}\t{e:.2f}\t{p}\n" for s, e, p in phones)
        (folder / f"{name}.tsv").write_text(text, encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--speech", type=Path, required=True, help="folder to write the recordings to")
    parser.add_argument("--recordings", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4.2, help="length of a recording")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.recordings < 1 or args.seed < 0 or not 1 <= args.seconds <= 3600:
        parser.error("need --recordings >= 1, --seed >= 0, --seconds 1-3600")
    try:
        write_speech(args.speech, args.recordings, args.seed, args.seconds)
    except (OSError, soundfile.SoundFileError) as e:
        parser.error(str(e))


if __name__ == "__main__":
    main()
