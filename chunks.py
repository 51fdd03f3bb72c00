"""Clips -> encoded chunks -> rows of a batch: what both training stages read. Paper sections 3.3 and 3.4 ("Teacher"), Eq. 3 and 24.

The VAE and the audio encoder are frozen, so every chunk is encoded once, into a folder of memory-mapped float16 arrays:
    latents.npy   (K, C, F, h, w)   z = E(V) of the K chunks of a clip
    audio.npy     (K, T, L, A)      their hidden states; the window of each ends with its chunk, as in infer.py
    identity.npy  (R, C, F, h, w)   TRE (Eq. 3) of R reference pictures: the first frames of its first R - 1 chunks, and its last frame
Frames and face masks stay where data.py has put them. A clip shorter than a chunk gives one chunk of its own length, 4k+1 frames.

Shapes: B batch, T pixel frames, F = 1 + (T-1)/4 latent frames, C channels, H W pixels, h w latent grid, L A audio layers and width.
"""
import hashlib
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import Clip
from dit import shift_sigma
from tre import temporal_reference_encoding

# ----------------------------------------------------------------------------------------------------------------- cache


@dataclass(frozen=True)
class Chunk:
    """One training chunk: where its frames and what was encoded lie."""
    clip: Clip
    store: Path                     # folder of latents.npy (K, C, F, h, w), audio.npy (K, T, L, A), identity.npy (R, C, F, h, w), all float16
    row: int                        # which of the K chunks of the clip
    start: int                      # its first frame
    length: int                     # T
    pictures: tuple                 # frame numbers of the R reference pictures; picture j < R - 1 is the first frame of chunk j
    name = property(lambda self: f"{self.clip.name}@{self.start}")

    def array(self, what):
        return np.load(self.store / f"{what}.npy", mmap_mode="r")


def chunk_starts(length, T, step, offsets):
    """First frames of the chunks of a clip: every `step` frames, and the same again from later frames on."""
    starts = [s for o in range(offsets) for s in range(o * step // offsets, length - T + 1, step)]
    return list(dict.fromkeys(starts))


def fingerprint(*models):
    """A hash of networks' weights and latent statistics: encoded with other weights, a chunk is another chunk."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in [*model.state_dict().items(), *model.named_buffers()]:
            digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def pixels(frames):
    """uint8 (T, H, W, 3) -> (1, 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(frames)).permute(3, 0, 1, 2)[None] / 127.5 - 1


@torch.no_grad()
def encode_clip(clip, starts, pictures, T, vae, encoder, device, bf16):
    """-> dict of float16 arrays: what infer.py would compute for these chunks and pictures, rounded."""
    sound = np.array(clip.audio) / np.float32(32768)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
        latents = [vae.encode(pixels(clip.frames[s:s + T]).to(device)) for s in starts]
        identity = [temporal_reference_encoding(vae, pixels(clip.frames[p:p + 1])[:, :, 0].to(device), T) for p in pictures]
    audio = [encoder.features(sound, s, T)[None] for s in starts]               # the window ends with the chunk
    parts = {"latents": latents, "identity": identity, "audio": audio}
    return {name: torch.cat(rows).half().cpu().numpy() for name, rows in parts.items()}


def encode_clips(clips, vae, encoder, cache, cfg, device="cpu", rank=0, world=1):
    """Clips -> list of Chunk; encodes those that the cache folder does not hold yet. Kill it and run it again: it goes on.

    The key is the video file, the weights of both encoders and the grid. Frames and masks stay where data.py has put them."""
    key = [2, fingerprint(vae, encoder.model), cfg.frames, cfg.head, cfg.offsets, cfg.references, cfg.encode_bf16]
    cache.mkdir(parents=True, exist_ok=True)
    chunks, jobs = [], []
    for number, clip in enumerate(clips):
        T = min(cfg.frames, (clip.length - 1) // 4 * 4 + 1)
        if T <= 4 * cfg.head or not len(clip.audio):                            # nothing would be left to predict, or to hear
            continue
        starts = chunk_starts(clip.length, T, cfg.frames - (4 * cfg.head - 3), cfg.offsets)
        pictures = (*starts[:cfg.references], clip.length - 1)
        store = cache / hashlib.sha256(repr([*key, clip.store.name, clip.length]).encode()).hexdigest()[:24]
        chunks += [Chunk(clip, store, row, start, T, pictures) for row, start in enumerate(starts)]
        jobs += [(clip, store, starts, pictures, T)] if number % world == rank and not store.exists() else []
    if not chunks:
        raise ValueError(f"none of {len(clips)} clips has sound and more than {4 * cfg.head} frames")
    for clip, store, starts, pictures, T in tqdm(jobs, "encoding", unit="clip", disable=None if rank == 0 else True):
        arrays = encode_clip(clip, starts, pictures, T, vae, encoder, device, cfg.encode_bf16)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".part-") as part:   # written aside, then renamed
            new = Path(part) / store.name
            new.mkdir()
            for name, array in arrays.items():
                np.save(new / f"{name}.npy", array)
            with suppress(OSError):                                             # another run was quicker: its arrays are the same
                new.rename(store)
    if world > 1:
        dist.barrier()
    return chunks


# ----------------------------------------------------------------------------------------------------------------- batch


class Pools:
    """Chunks by length: a batch has one length. `shares`: how often each folder (a list of chunks) is heard, not how big it is."""

    def __init__(self, folders, shares):
        self.by_length = {}
        for chunks, share in zip(folders, shares, strict=True):
            for chunk in chunks:
                self.by_length.setdefault(chunk.length, []).append((chunk, share / len(chunks)))
        total = np.array([sum(w for _, w in pool) for pool in self.by_length.values()])
        self.lengths, self.chance = list(self.by_length), total / total.sum()
        self.weights = {T: np.array([w for _, w in pool]) / sum(w for _, w in pool) for T, pool in self.by_length.items()}

    def draw(self, cfg, step, row):
        """Row `row` of step `step` -> dict of tensors without a batch axis. A function of (seed, step, row) alone."""
        T = self.lengths[np.random.default_rng((cfg.seed, step)).choice(len(self.lengths), p=self.chance)]
        rng = np.random.default_rng((cfg.seed, step, row))
        chunk = self.by_length[T][rng.choice(len(self.weights[T]), p=self.weights[T])][0]
        return load_row(chunk, cfg, rng, cold=rng.random() < cfg.cold, deaf=rng.random() < cfg.deaf,
                        sigma=shift_sigma(rng.random(), cfg.shift))


def load_row(chunk, cfg, rng, cold, deaf, sigma):
    """-> latents, identity, noise (C, F, h, w); audio (T, L, A); sigma (); predicted (F,), 0 at the continuity latents; mask (F, h, w)."""
    row, pictures = chunk.row, chunk.pictures
    if cold:                                                                    # a chunk whose first frame is a reference picture
        row = picture = row % (len(pictures) - 1)
        chunk = replace(chunk, row=row, start=pictures[row])
    else:                                                                       # a picture outside the chunk, unless there is none
        outside = [j for j, f in enumerate(pictures) if not chunk.start <= f < chunk.start + chunk.length]
        picture = int(rng.choice(outside or len(pictures)))
    latents = torch.from_numpy(chunk.array("latents")[row].astype(np.float32))
    audio = torch.from_numpy(chunk.array("audio")[row].astype(np.float32))
    F, h, w = latents.shape[1:]
    mask = torch.from_numpy(np.array(chunk.clip.mask[chunk.start:chunk.start + chunk.length]))[None].float() / 255
    mask = torch.cat([mask[:, :1].expand(-1, 3, -1, -1), mask], 1)              # latent 0 holds one frame, the others four
    return {"latents": latents, "identity": torch.from_numpy(chunk.array("identity")[picture].astype(np.float32)),
            "audio": audio * 0 if deaf else audio, "sigma": torch.tensor(sigma, dtype=torch.float32),
            "noise": torch.from_numpy(rng.standard_normal(latents.shape, np.float32)),
            "predicted": (torch.arange(F) >= (1 if cold else cfg.head)).float(),
            "mask": torch.nn.functional.adaptive_avg_pool3d(mask, (F, h, w))[0],
            "window": torch.tensor(int(rng.integers(cfg.head, max(cfg.head, F - cfg.window) + 1))), "chunk": chunk}


def collate(rows, device):
    """Rows of one length -> the same names with a batch axis; "chunk" stays a list."""
    return {k: [row[k] for row in rows] if k == "chunk" else torch.stack([row[k] for row in rows]).to(device) for k in rows[0]}
