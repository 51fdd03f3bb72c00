"""Phones -> mouth parameters: the mouth of every synthetic clip, and the reference for its speech.

A phone file (NAME.tsv beside a recording) has one row a phone: start s, end s, IPA label.
mouth_curves() turns such rows into six numbers a video frame, lip_opening() those into one.
Nothing here is learnt, and only numpy is needed: measure/ and tiny/ use this file, too.
"""
import numpy as np

GAP = 0.27              # inner-lip gap at opening 1, in eye distances (real open vowels: 0.05-0.25)
HALF_FRAME = 0.02       # s, at 25 fps
CLOSURE_FADE = 0.06     # s, until the closure of a p, b or m is gone
KEYS = ("jaw_open", "lip_width", "lip_round", "lip_close", "teeth", "tongue")

# Textbook phonetics. jaw_open and weight were then moved halfway to what fits GRID speaker 1.
# weight: how strongly a phone pulls its neighbours.
PHONES = {
    #       jaw   width round close teeth tongue weight
    "sil": (0,    0,    0,    0.6,  0,    0,    0.45),
    "i":   (0.35, 1,    0,    0,    0,    0.3,  0.65),
    "ɪ":   (0.42, 0.65, 0,    0,    0,    0.2,  0.51),
    "ɛ":   (0.65, 0.55, 0,    0,    0,    0.15, 0.67),
    "æ":   (0.67, 0.6,  0,    0,    0,    0.15, 0.69),
    "ɑ":   (0.9,  0.2,  0,    0,    0,    0.05, 0.96),
    "ɔ":   (0.63, 0,    0.55, 0,    0,    0,    0.83),
    "ʊ":   (0.32, 0,    0.65, 0,    0,    0,    0.6),
    "u":   (0.25, 0,    1,    0,    0,    0,    0.91),
    "ʌ":   (0.5,  0.25, 0,    0,    0,    0.1,  0.46),
    "ə":   (0.4,  0.25, 0,    0,    0,    0.1,  0.3),
    "ɝ":   (0.3,  0.1,  0.5,  0,    0,    0.25, 0.6),
    "eɪ":  (0.68, 0.75, 0,    0,    0,    0.2,  0.79),
    "aɪ":  (0.81, 0.45, 0,    0,    0,    0.15, 0.91),
    "ɔɪ":  (0.6,  0.2,  0.5,  0,    0,    0.1,  0.9),
    "aʊ":  (0.61, 0.15, 0.35, 0,    0,    0.05, 0.69),
    "oʊ":  (0.45, 0,    0.8,  0,    0,    0,    0.91),
    "p":   (0.05, 0.3,  0,    1,    0,    0,    1.3),
    "b":   (0.05, 0.3,  0,    1,    0,    0,    1.3),
    "m":   (0.05, 0.3,  0,    1,    0,    0,    1.3),
    "f":   (0.12, 0.3,  0,    0,    1,    0,    1.06),
    "v":   (0.14, 0.3,  0,    0,    1,    0,    1.01),
    "θ":   (0.11, 0.35, 0,    0,    0,    1,    0.89),
    "ð":   (0.14, 0.35, 0,    0,    0,    1,    0.73),
    "t":   (0.26, 0.45, 0,    0,    0,    0.6,  0.33),
    "d":   (0.24, 0.4,  0,    0,    0,    0.6,  0.35),
    "n":   (0.25, 0.4,  0,    0,    0,    0.6,  0.29),
    "s":   (0.2,  0.6,  0,    0,    0,    0.3,  0.64),
    "z":   (0.15, 0.55, 0,    0,    0,    0.3,  0.62),
    "l":   (0.37, 0.4,  0,    0,    0,    0.8,  0.46),
    "ɹ":   (0.14, 0.05, 0.6,  0,    0,    0.3,  0.66),
    "ʃ":   (0.2,  0.05, 0.65, 0,    0,    0.2,  0.8),
    "ʒ":   (0.2,  0.05, 0.6,  0,    0,    0.2,  0.7),
    "t͡ʃ": (0.26, 0.1,  0.6,  0,    0,    0.4,  0.76),
    "d͡ʒ": (0.27, 0.1,  0.55, 0,    0,    0.4,  0.68),
    "k":   (0.39, 0.35, 0,    0,    0,    0.1,  0.32),
    "ɡ":   (0.29, 0.35, 0,    0,    0,    0.1,  0.34),
    "ŋ":   (0.35, 0.35, 0,    0,    0,    0.1,  0.3),
    "h":   (0.43, 0.3,  0,    0,    0,    0,    0.15),
    "w":   (0.14, 0,    1,    0,    0,    0,    0.86),
    "j":   (0.27, 0.8,  0,    0,    0,    0.3,  0.51),
}
GLIDES = {"eɪ": "ɪ", "aɪ": "ɪ", "ɔɪ": "ɪ", "aʊ": "ʊ", "oʊ": "ʊ"}     # second half of a diphthong
CLOSURES = ("p", "b", "m")


def read_phones(path):
    """Read a phone file (tab-separated, no header; columns after the third are ignored).

    Returns [(start s, end s, label)]. Raises ValueError for a row of another form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [line.split("\t") for line in lines if line.strip()]
        return [(float(row[0]), float(row[1]), row[2]) for row in rows]
    except (ValueError, IndexError):
        message = f"{path}: a row is start s, end s, label, with tabs between"
        raise ValueError(message) from None


def split_glide(start, end, label):
    """One phone -> the sounds that the mouth makes: two for a diphthong longer than 60 ms."""
    if label not in GLIDES or end - start <= 0.06:
        return [(start, end, label)]
    cut = start + 0.62 * (end - start)
    return [(start, cut, label), (cut, end, GLIDES[label])]


def mouth_curves(phones, frames, blur=0.03, fps=25):
    """Coarticulation: every phone pulls the mouth with its weight and Gaussian tails of `blur` s.

    phones: [(start s, end s, label)]. Returns (frames, 6) float32 in [0, 1], columns KEYS, at the
    times (i + 0.5) / fps. p, b and m also close the lips for certain: lip_close is 1 within the
    sound and at the frame nearest its middle, and falls to 0 in 60 ms.
    Raises ValueError for a label that is not in PHONES.
    """
    times = (np.arange(frames) + 0.5) / fps

    def seconds_outside(start, end, reach):
        """How far each frame lies outside of the middle of a sound +- reach."""
        return np.maximum(np.abs(times - (start + end) / 2) - reach, 0)

    pull = np.zeros((frames, len(KEYS)))
    total = np.full((frames, 1), 1e-6)
    closed = np.zeros(frames)
    for start, end, label in phones:
        if label not in PHONES:
            raise ValueError(f"unknown phone {label!r}; known: {' '.join(PHONES)}")
        for a, b, sound in split_glide(start, end, label):
            *target, weight = PHONES[sound]
            outside = seconds_outside(a, b, max((b - a) / 2 - 0.01, 0))
            k = weight * np.exp(-0.5 * (outside / blur) ** 2) + 1e-9      # (frames,)
            pull += k[:, None] * target
            total += k[:, None]
        if label in CLOSURES:
            outside = seconds_outside(start, end, max((end - start) / 2, HALF_FRAME))
            closed = np.maximum(closed, 1 - outside / CLOSURE_FADE)
    mouth = pull / total                                                  # (frames, 6)
    close = KEYS.index("lip_close")
    mouth[:, close] = np.maximum(mouth[:, close], closed)
    return mouth.astype(np.float32)


def lip_opening(mouth):
    """Mouth parameters (..., 6) -> how far the lips part (...), 0-1; 1 is a gap of GAP.

    The jaw opens the lips; rounding, closure and f/v take some of it back.
    """
    jaw, _, rounding, close, teeth, _ = np.moveaxis(mouth, -1, 0)
    parted = jaw * (1 - 0.35 * rounding) * (1 - np.clip(1.1 * close, 0, 1)) * (1 - 0.7 * teeth)
    return np.clip(parted, 0, 1)
