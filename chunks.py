"""Clips -> encoded chunks -> rows of a batch: what both training stages read. Paper sections 3.3 and 3.4, Eq. 3, 24 and 29.

The VAE and the audio encoder are frozen, so every chunk is encoded once, into a folder of memory-mapped float16 arrays:
    latents.npy   (K, C, F, h, w)   z = E(V) of the K chunks of a clip; neither this nor identity.npy if the clip is "fresh", see LinearCodec
    audio.npy     (K, T, L, A)      their hidden states; the window of each ends with its chunk, as in infer.py
    identity.npy  (R, C, F, h, w)   TRE (Eq. 3) of R reference pictures: the first frames of its first R - 1 chunks, and its last frame
Frames and face masks stay where data.py has put them. A clip shorter than a chunk gives one chunk of its own length, 4k+1 frames.
Neighbours share n frames. The VAE is causal, so kappa_gt, the encoding of those n by themselves, is the chunk's own first m latents.
Stage 1 draws single chunks (Pools), stage 2 follows films in the making from chunk to chunk (Streams).

Shapes: B batch, T pixel frames, F = 1 + (T-1)/4 latent frames, C channels, H W pixels, h w latent grid, L A audio layers and width.
"""
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from tqdm import tqdm

from data import Clip, keep_arrays
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
    fresh: bool = False             # only its sound is stored: it is encoded at every draw, by LinearCodec
    name = property(lambda self: f"{self.clip.name}{'*' * (self.clip.copy > 0)}@{self.start}")

    def array(self, what):
        return np.load(self.store / f"{what}.npy", mmap_mode="r")

    def blinks(self, m):
        """Whether eyes are shut in a frame after its m continuity latents, as "blink" (N,) in the clip's NAME.npz says; False if it says nothing."""
        try:
            with open(path := self.clip.path.with_suffix(".npz"), "rb") as file, np.load(file, allow_pickle=False) as npz:
                blink = npz["blink"]
        except (FileNotFoundError, KeyError):
            return False
        if blink.shape != (self.clip.length,):
            raise ValueError(f"{path}: blink {blink.shape}, the clip has {self.clip.length} frames")
        return bool((blink[self.start + 4 * m - 3:self.start + self.length] > 0.7).any())


def chunk_starts(length, T, step, offsets):
    """First frames of the chunks of a clip: every `step` frames, and the same again from later frames on."""
    starts = [s for o in range(offsets) for s in range(o * step // offsets, length - T + 1, step)]
    return list(dict.fromkeys(starts))


def fingerprint(*models):
    """A hash of networks' weights: encoded with other weights, a chunk is another chunk."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in model.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def digest(folders, shares):
    """A hash of what a run learns from: the encoded chunks and how often each folder is drawn. Kept in the checkpoint, for --resume."""
    names = [[f"{chunk.store.name}@{chunk.row}" for chunk in chunks] for chunks in folders]
    return hashlib.sha256(repr([names, list(shares)]).encode()).hexdigest()[:16]


def pixels(frames):
    """uint8 (T, H, W, 3) -> (1, 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(frames)).permute(3, 0, 1, 2)[None] / 127.5 - 1


def one_per_folder(args, *names, folders="data"):
    """ValueError if an option of these names is given and has not a value for each folder of --data, or of another option."""
    count = len(getattr(args, folders))
    for name in names:
        if (values := getattr(args, name)) and len(values) != count:
            raise ValueError(f"--{name} has {len(values)} values for the {count} folders of --{folders}")


def names_of(folders):
    """What figures of folders are kept by: their names. ValueError if two have the same."""
    names = [Path(folder).resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"figures are kept by the folders' names, and two are the same: {' '.join(names)}")
    return names


@torch.no_grad()
def encode_clip(clip, starts, pictures, T, vae, encoder, device, bf16, fresh=False):
    """-> dict of float16 arrays: what infer.py would compute for these chunks and pictures, rounded. fresh: the sound only."""
    sound = np.array(clip.audio) / np.float32(32768)
    parts = {"audio": [encoder.features(sound, s, T)[None] for s in starts]}    # the window ends with the chunk
    if not fresh:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            parts["latents"] = [vae.encode(pixels(clip.frames[s:s + T]).to(device)) for s in starts]
            parts["identity"] = [temporal_reference_encoding(vae, pixels(clip.frames[p:p + 1])[:, :, 0].to(device), T) for p in pictures]
    return {name: torch.cat(rows).half().cpu().numpy() for name, rows in parts.items()}


def encode_clips(clips, vae, encoder, cache, cfg, device="cpu", rank=0, world=1, fresh=False):
    """Clips -> list of Chunk; encodes those that the cache folder does not hold yet. Kill it and run it again: it goes on.

    The key is the video file, the weights of the encoders that are used and the grid. Frames and masks stay where data.py has put them."""
    codec = [] if fresh else [fingerprint(vae.encoder, vae.conv1), vae.config.latents_mean, vae.config.latents_std]     # sound knows none
    key = [4, *codec, fingerprint(encoder.model), cfg.frames, cfg.head, cfg.offsets, cfg.references, cfg.encode_bf16]
    cache.mkdir(parents=True, exist_ok=True)
    chunks, jobs = [], []
    for number, clip in enumerate(clips):
        T = min(cfg.frames, (clip.length - 1) // 4 * 4 + 1)
        if T <= 4 * cfg.head or not len(clip.audio):                            # nothing would be left to predict, or to hear
            continue
        starts = chunk_starts(clip.length, T, cfg.frames - (4 * cfg.head - 3), cfg.offsets)
        pictures = (*starts[:cfg.references], clip.length - 1)
        store = cache / hashlib.sha256(repr([*key, clip.store.name, clip.length, *["sound"] * bool(fresh)]).encode()).hexdigest()[:24]
        chunks += [Chunk(clip, store, row, start, T, pictures, fresh) for row, start in enumerate(starts)]
        jobs += [(clip, store, starts, pictures, T)] if number % world == rank and not store.exists() else []
    if not chunks:
        raise ValueError(f"none of {len(clips)} clips has sound and more than {4 * cfg.head} frames")
    for clip, store, starts, pictures, T in tqdm(jobs, "encoding", unit="clip", disable=None if rank == 0 else True):
        keep_arrays(store, encode_clip(clip, starts, pictures, T, vae, encoder, device, cfg.encode_bf16, fresh))
    if world > 1:
        dist.barrier()
    return chunks


@torch.no_grad()
def wear_of(vae, chunks, m, device="cpu", codec=None):
    """What one round of decoding and encoding does to m latents, as a matrix (C, C): least squares over the first latents of some chunks.

    Of the shipped VAE's the singular values are 1 to 0.8: channels that hold fine detail go first. Its power k stands for k rounds, roughly: of
    what one changes it explains a fifth, the rest is not linear (LOG.md)."""
    def latents_of(chunk):
        if chunk.fresh:
            return codec.encode(pixels(chunk.clip.frames[chunk.start:chunk.start + 4 * m - 3]))
        return torch.from_numpy(np.array(chunk.array("latents")[chunk.row, :, :m])).float()
    before = torch.stack([latents_of(chunk) for chunk in chunks]).to(device)    # (n, C, m, h, w)
    after = torch.cat([vae.encode(vae.decode(z[None])) for z in before])
    before, after = (x.transpose(0, 1).flatten(1).cpu().double() for x in (before, after))         # (C, N)
    return torch.linalg.lstsq(before.T, after.T).solution.T.float().contiguous()


def worn(kappa, wear, rounds, noise, cells=4):
    """kappa (C, m, h, w) as if it had been handed over `rounds` times, (C, m, h, w): less detail, and noise, white and in cells x cells blotches,
    a quarter of the picture's side each, as colours run. No codec makes this noise: it teaches to distrust kappa and look in z_id. 0.3 was
    found by trying; 0.15 is about the error of 4 x 4 means after 15 s (LOG.md)."""
    corner = noise[None, :, 0, :cells, :cells]                                  # of the head's noise, which nothing else needs; one for all m, or
    blotches = nnf.interpolate(corner, size=kappa.shape[2:], mode="bilinear")[0, :, None]       # they would average out; (C, 1, h, w)
    less = torch.einsum("cd,dmhw->cmhw", torch.linalg.matrix_power(wear, rounds), kappa)
    return less + rounds ** 0.5 * (0.3 * noise + 0.15 * blotches)


# ----------------------------------------------------------------------------------------------------------------- batch


class Pools:
    """Chunks by length: a batch has one length. `shares`: how often each folder (a list of chunks) is drawn, whatever its size; `often`, Chunk ->
    float > 0: how often one is drawn beside others of its folder.

    wear: what kappa loses in a round of the codec, see wear_of; needed if cfg.worn > 0, and then part of the checkpoint. codec: LinearCodec, if a
    chunk is fresh, and then part of it as well."""

    def __init__(self, folders, shares, wear=None, codec=None, often=lambda chunk: 1.0):
        self.by_length, self.data, self.wear, self.codec = {}, digest(folders, shares), wear, codec
        self.size = sum(folders, [])[0].clip.mask.shape[1] // 2                 # latents of a side; a mask is (N, H/4, W/4)
        for chunks, share in zip(folders, shares, strict=True):
            times = np.array([often(chunk) for chunk in chunks])
            for chunk, chance in zip(chunks, share * times / times.sum(), strict=True):
                self.by_length.setdefault(chunk.length, []).append((chunk, chance))
        total = np.array([sum(w for _, w in pool) for pool in self.by_length.values()])
        self.lengths, self.chance = list(self.by_length), total / total.sum()
        self.weights = {T: np.array([w for _, w in pool]) / sum(w for _, w in pool) for T, pool in self.by_length.items()}

    def draw(self, cfg, step, row, side=0):
        """Row `row` of step `step` -> dict of tensors without a batch axis. side: load_row's. A function of (seed, step, row), wear, codec."""
        T = self.lengths[np.random.default_rng((cfg.seed, step)).choice(len(self.lengths), p=self.chance)]
        rng = np.random.default_rng((cfg.seed, step, row))
        chunk = self.by_length[T][rng.choice(len(self.weights[T]), p=self.weights[T])][0]
        cold, deaf = rng.random() < cfg.cold, rng.random() < cfg.deaf
        item = load_row(chunk, cfg, rng, cold, deaf, shift_sigma(rng.random(), cfg.shift), self.codec, side)
        if cfg.worn and not cold:                                               # a portrait has no round behind it; the head's noise is free
            cells = -(-4 * side // self.size) if side else 4                    # as large in a window as in the whole picture
            item["kappa"] = worn(item["kappa"], self.wear, int(rng.integers(cfg.worn + 1)), item["noise"][:, :cfg.head], cells)
        return item


def identity_of(identity, cfg):
    """z_id (C, F, h, w) as Eq. 3 has it, or as Eq. 29 does: z_etr repeats E(I), which is z_id's first latent."""
    return identity[:, :1].expand_as(identity) if cfg.identity == "etr" else identity


def part_of(mask, top, bottom, left, right):
    """Face mask (F, h, w) in 0..1 -> (F, h, w) bool: the part of a face that lies between these shares of its height and width."""
    def inside(axis, low, high):                                                # axis: the one that is looked along
        there, place = (mask > 0.5).any(axis), torch.arange(mask.shape[3 - axis]) + 0.5
        first = place.where(there, torch.inf).amin(1, keepdim=True) - 0.5       # (F, 1); no face: inf, and nothing is inside
        last = place.where(there, -torch.inf).amax(1, keepdim=True) + 0.5
        share = (place - first) / (last - first)                                # (F, h or w)
        return (share > low) & (share < high)
    return inside(2, top, bottom)[:, :, None] & inside(1, left, right)[:, None, :]


MOUTH, EYES = (0.62, 0.95, 0.25, 0.75), (0.2, 0.5, 0.1, 0.9)                    # of a face: top, bottom, left, right


def place_window(mouth, eyes, side, rng):
    """Where a window of side x side latents lies -> (y, x), even, as a token has 2 x 2. Half of them go for the middle of the mouth (F, h, w), two
    of five for that of the eyes, the rest anywhere."""
    free = np.array(mouth.shape[1:]) - side
    y, x = rng.integers(free // 2 + 1) * 2
    luck = rng.random()
    part = mouth if luck < 0.5 else eyes
    if luck < 0.9 and part.any():
        middle = part.nonzero()[:, 1:].double().mean(0).numpy() + 0.5
        y, x = np.clip((middle - side / 2 + rng.uniform(-3, 3, 2) * side / 8) / 2, 0, free // 2).round().astype(int) * 2
    return int(y), int(x)


def load_row(chunk, cfg, rng, cold, deaf, sigma, codec=None, side=0):
    """Eq. 24, encoded -> latents, identity, noise (C, F, h, w); kappa (C, m, h, w); audio (T, L, A); sigma (); predicted (F,), 0 at the head;
    weight (F, h, w) in Eq. 2.

    cold: begins as a video does, of kappa only the first latent counts, the portrait's. deaf: without sound, the unconditional case of
    audio guidance. codec: encodes what is fresh, cut out anew (data.Copy). side: a window of so many latents, 0: the whole picture.
    Rotary positions are relative, so the network takes a window for a small picture, and learns the same from it."""
    row, pictures, T = chunk.row, chunk.pictures, chunk.length
    if cold:                                                                    # a chunk whose first frame is a reference picture
        row = picture = row % (len(pictures) - 1)
        chunk = replace(chunk, row=row, start=pictures[row])
    else:                                                                       # a picture outside the chunk, unless there is none
        outside = [j for j, f in enumerate(pictures) if not chunk.start <= f < chunk.start + chunk.length]
        picture = int(rng.choice(outside or len(pictures)))
    if chunk.fresh:
        chunk = replace(chunk, clip=replace(chunk.clip, copy=int(rng.integers(1, 2 ** 31))))
    F, part = (T + 3) // 4, slice(chunk.start, chunk.start + T)
    mask = torch.from_numpy(np.array(chunk.clip.mask[part]))[None].float() / 255
    h, w = (n // 2 for n in mask.shape[2:])
    mask = nnf.adaptive_avg_pool3d(torch.cat([mask[:, :1].expand(-1, 3, -1, -1), mask], 1), (F, h, w))[0]     # latent 0 holds one frame, others four
    mouth, eyes = part_of(mask, *MOUTH), part_of(mask, *EYES)
    (y, x), side = (place_window(mouth, eyes, side, rng), side) if side else ((0, 0), h)
    window = (slice(y, y + side), slice(x, x + side))
    mask, mouth, eyes = (seen[:, *window] for seen in (mask, mouth, eyes))
    if chunk.fresh:
        cut = lambda part: pixels(chunk.clip.frames.cut(part, y / h, x / w, side / h))
        latents, identity = codec.encode(cut(part)), codec.still(cut(slice(pictures[picture], pictures[picture] + 1)), F)
    else:
        latents, identity = (torch.from_numpy(chunk.array(what)[at].astype(np.float32))[:, :, *window]
                             for what, at in (("latents", row), ("identity", picture)))
    audio = torch.from_numpy(chunk.array("audio")[row].astype(np.float32))
    moved = (latents - latents.median(1, keepdim=True).values).square().mean(0)                       # (F, h, w)
    moved = (moved * eyes).sum((1, 2), keepdim=True) / eyes.sum((1, 2), keepdim=True).clamp(min=1)    # (F, 1, 1), of eyes seen
    weight = 1 + cfg.focus * mask + cfg.lips * mouth + (cfg.eyes + cfg.lids * moved) * eyes
    return {"latents": latents, "identity": identity_of(identity, cfg), "kappa": latents[:, :cfg.head],
            "audio": audio * 0 if deaf else audio, "sigma": torch.tensor(sigma, dtype=torch.float32),
            "noise": torch.from_numpy(rng.standard_normal(latents.shape, np.float32)),
            "predicted": (torch.arange(F) >= (1 if cold else cfg.head)).float(), "weight": weight,
            "window": torch.tensor(int(rng.integers(cfg.head, max(cfg.head, F - cfg.window) + 1))), "chunk": chunk}


def collate(rows, device):
    """Rows of one length -> the same names with a batch axis; "chunk" stays a list."""
    return {k: [row[k] for row in rows] if k == "chunk" else torch.stack([row[k] for row in rows]).to(device) for k in rows[0]}


def shorten(batch, F):
    """The first F latents of every row of a batch, or the batch as it is if F is 0. VAE and TRE are causal: that *is* a shorter chunk.

    A network call on 9 latents instead of 21 costs a quarter: attention grows with the square."""
    F = min(F, batch["latents"].shape[2]) or batch["latents"].shape[2]
    video = {k: batch[k][:, :, :F] for k in ("latents", "identity", "noise")}   # (B, C, F, h, w)
    return batch | video | {"audio": batch["audio"][:, :4 * F - 3], "predicted": batch["predicted"][:, :F], "weight": batch["weight"][:, :F]}


# ----------------------------------------------------------------------------------------------------------------- films


def chunks_left(chunk, cfg):
    """How many chunks of its clip, this one included, follow one another from here; each shares n frames with the one before."""
    return 1 + (chunk.clip.length - chunk.length - chunk.start) // (cfg.frames - 4 * cfg.head + 3)


def load_chunk(start, age, cfg):
    """Chunk `age` of the film that begins with `start` -> latents, identity (C, F, h, w), audio (T, L, A), predicted (1, F, 1, 1), cold (1, 1, 1, 1).

    The portrait is the film's first frame, that is reference picture number `start.row`; consecutive chunks lie in consecutive rows."""
    latents, audio, identity = (torch.from_numpy(np.array(start.array(what)[start.row + later]))
                                for what, later in (("latents", age), ("audio", age), ("identity", 0)))
    predicted = torch.arange(latents.shape[1]) >= (cfg.head if age else 1)
    return {"latents": latents, "identity": identity_of(identity, cfg), "audio": audio,
            "predicted": predicted.view(1, -1, 1, 1), "cold": torch.full((1, 1, 1, 1), age == 0)}


def draw(cfg, step, row, shape, device):
    """Row `row` of step `step` -> noise (S + 2, C, F, h, w): for the student's S steps, Eq. 11 and Eq. 14; sigma (2,) of those two, by Self-Forcing
    in [0.02, 0.98]; exit () in 0..S-1. Shape (C, F, h, w). A function of (seed, step, row) alone."""
    seed = np.random.SeedSequence((cfg.seed, step, row)).generate_state(1, np.uint64)[0]
    generator = torch.Generator(device).manual_seed(int(seed >> np.uint64(1)))
    noise = torch.randn(cfg.denoise + 2, *shape, generator=generator, device=device)
    u = torch.rand(3, generator=generator, device=device)
    return {"noise": noise, "sigma": shift_sigma(u[1:], cfg.shift).clamp(0.02, 0.98), "exit": (u[0] * cfg.denoise).long()}


class Streams:
    """The films in the making, one for each row of a batch: where each stands in which clip, and the kappa its student made.

    folders: lists of chunks that films can start with; shares: how often each folder is drawn. Both tensors, `place` and `kappa`, are part of the
    checkpoint. The rows of process `rank` of `world` are in `calls`, cfg.micro a call; `place` is the same on all, kappa each keeps for its own."""

    def __init__(self, folders, shares, cfg, device, rank=0, world=1):
        self.starts = [chunk for chunks in folders for chunk in chunks]
        if not self.starts:
            raise ValueError(f"no clip is long enough: a film needs two chunks, {2 * cfg.frames - 4 * cfg.head + 3} frames, and sound")
        weights = np.concatenate([np.full(len(chunks), share / max(1, len(chunks))) for chunks, share in zip(folders, shares, strict=True)])
        self.cfg, self.device, self.weights, self.data = cfg, device, weights / weights.sum(), digest(folders, shares)
        self.calls = [range(row, row + cfg.micro) for row in range(rank * cfg.micro, cfg.batch, cfg.micro * world)]
        C, _, h, w = self.starts[0].array("latents").shape[1:]
        self.place = torch.zeros(cfg.batch, 3, dtype=torch.long)                # which start, chunks made, chunks to be made
        self.kappa = torch.zeros(cfg.batch, C, cfg.head, h, w, device=device)
        for row in range(cfg.batch):
            self.restart(row, 0)
            self.place[row, 2] = 1 + row % self.place[row, 2]                   # not all in step: a batch has chunks of every age

    def restart(self, row, step):
        rng = np.random.default_rng((self.cfg.seed, step, row))
        start = int(rng.choice(len(self.starts), p=self.weights))
        self.place[row] = torch.tensor([start, 0, min(self.cfg.rollout, chunks_left(self.starts[start], self.cfg))])

    @torch.no_grad()
    def batch(self, rows, step):
        """-> the tensors of load_chunk and draw with a batch axis, on the device; "teacher", "student": what each sees at the head, rest unused."""
        places = [self.place[row].tolist() for row in rows]
        loaded = [load_chunk(self.starts[start], age, self.cfg) for start, age, _ in places]
        batch = {k: torch.stack([chunk[k] for chunk in loaded]).to(self.device).float() for k in loaded[0]}
        drawn = [draw(self.cfg, step, row, batch["latents"].shape[1:], self.device) for row in rows]
        batch |= {k: torch.stack([one[k] for one in drawn]) for k in drawn[0]}
        sees = {"gt": batch["latents"], "gen": torch.zeros_like(batch["latents"])}         # kappa_gt, kappa_gen: section 3.4, Table 4
        m = self.cfg.head                                                       # cold start: the portrait itself, one latent
        sees["gen"][:, :, :m] = torch.where(batch["cold"] > 0, batch["identity"][:, :, :m], self.kappa[list(rows)])
        return batch | {"teacher": sees[self.cfg.teacher_sees], "student": sees[self.cfg.student_sees]}

    def advance(self, kappas, step):
        """After a step: every row goes on to its next chunk, with the kappa made for it, or starts again."""
        for rows, kappa in kappas:
            self.kappa[list(rows)] = kappa
        self.place[:, 1] += 1
        for row in torch.where(self.place[:, 1] == self.place[:, 2])[0].tolist():
            self.restart(row, step + 1)

    def share(self):
        """Every process gets the kappas of all rows."""
        if dist.is_initialized():
            others = torch.ones(len(self.kappa), dtype=torch.bool)
            others[[row for rows in self.calls for row in rows]] = False
            self.kappa[others.to(self.kappa.device)] = 0
            dist.all_reduce(self.kappa)
