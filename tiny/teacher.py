"""Stage 1 with the tricks that made the shipped teacher: this file *is* the difference.

    python -m tiny.teacher --data PUPPETS GRID --weights weights/tiny --init TEACHER

train_teacher.py's loop and loss are used as they are. What is handed to them instead:
    network      TinyDiT, with an EDM skip (tiny/model.py)
    optimiser    Muon for the matrices of the blocks (tiny/muon.py)
    make_batch   rows made by make_row below:
                 region weights         mouths, eyes and faces weigh more in Eq. 2
                 windows                most steps see a quarter of the picture, and four times as
                                        many rows: rotary positions are relative
                 online augmentation    a clip is cropped, mirrored and tinted anew at every draw,
                                        and encoded with two matrices (tiny/linear.py)
                 continuity corruption  kappa as codec round trips would have left it, and noise
    sampling     chunks with blinks are drawn more often

The paper has none of it. tiny/README.md says what each bought, and by which measure.
Shapes: as in train_teacher.py.
"""
import hashlib
import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image

from common import (
    PresetOnly,
    init_distributed,
    one_line_errors,
    parse_args,
    run_folder,
    say,
    select_device,
    shard,
)
from data import (
    Chunk,
    Clip,
    ClipFolder,
    chunk_grid,
    collate,
    encode_audio,
    encode_clips,
    fingerprint,
    save_arrays,
    to_tensor,
)
from dit import DiTConfig
from tiny.linear import LinearEncoder
from tiny.model import TinyDiT
from tiny.muon import Muon
from train_teacher import (
    ChunkSampler,
    Files,
    TeacherConfig,
    check,
    choose_reference,
    draw_pixel_window,
    draw_row,
    export,
    load_frozen,
    load_init,
    train,
)
from tre import temporal_reference_encoding

# ------------------------------------------------------------------------------------------- config

NETWORK = DiTConfig(dim=256, ffn_dim=1024, heads=4, layers=6, channels=24, audio_layers=3,
                    audio_dim=384, audio_tokens=8, audio_hidden=128)
SAMPLING = {"guidance_sharpness": 16.0, "motion_guidance": 1.4}     # of tiny/model.py's guide


@dataclass(frozen=True)
class TinyTeacherConfig(TeacherConfig):
    network: PresetOnly[str] = "tiny"       # NETWORK
    steps: int = 6000                       # optimiser steps
    lr: float = 1e-3                        # of AdamW; Muon's is ten times as high
    warmup: PresetOnly[int] = 20            # steps until the peak learning rate
    decay: PresetOnly[float] = 0.85         # share of the steps in which it falls to 0
    ema: float = 0.98                       # decay of the averaged weights
    timestep_shift: float = 6.0             # of the noise levels
    guidance: PresetOnly[float] = 4.0       # audio guidance in sampling
    sample_steps: PresetOnly[int] = 10      # denoising steps in sampling
    lambda_temp: float = 0.0                # Eq. 16 is left out: it costs more than the network
    lambda_face: float = 0.0                # Eq. 17 is left out; face_loss_weight stands in
    offsets: PresetOnly[int] = 3            # times a clip is cut into chunks
    references: PresetOnly[int] = 4         # chunks whose first frame is a reference picture
    edm_skip: float = 0.15                  # variance of the EDM skip; 0: none
    face_loss_weight: float = 2.0           # extra weight of face latents in Eq. 2
    mouth_loss_weight: float = 15.0         # extra weight of mouth latents
    eye_loss_weight: float = 6.0            # extra weight of eye latents
    eye_motion_weight: float = 6.0          # and of these, times how far they are from their median
    blink_oversampling: float = 2.0         # how often a chunk with a blink is drawn
    codec_roundtrips: int = 6               # of the continuity corruption, 0 to this many; 0: none
    augment: bool = True                    # online augmentation and linear encoding
    window: int = 8                         # latents of a side of a window; 0: whole pictures
    whole_every: int = 2                    # steps from one with whole pictures to the next


PRESETS = {"tiny": TinyTeacherConfig()}

# ------------------------------------------------------------------------------ online augmentation


class AugmentedPictures:
    """Pictures uint8 (N, H, W, ...), all cropped, mirrored and tinted in one random way.

    From repeated clips the network memorises position and lighting. An augmented copy is another
    face, up to a quarter wider or a sixth longer. Slices are made when they are asked for."""

    def __init__(self, pictures, name, seed):
        rng = np.random.default_rng([*name.encode(), seed])         # every clip has its own
        sides = rng.uniform((0.8, 0.85), 1)                         # of the crop: width, height
        place = rng.uniform(0, 1 - sides)
        gamma = rng.uniform(0.7, 1.4) * rng.uniform(0.9, 1.1, 3)    # of red, green, blue
        self.pictures = pictures
        self.mirrored = seed % 2 == 1
        self.size = pictures.shape[2:0:-1]                          # width, height
        self.box = *(place * self.size), *((place + sides) * self.size)
        self.filter, self.table = Image.Resampling.BILINEAR, None   # a mask has no colours
        if pictures.ndim == 4:
            levels = 255 * np.linspace(0, 1, 256) ** gamma[:, None]
            self.filter, self.table = Image.Resampling.LANCZOS, levels.round().ravel().tolist()

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, part):
        return self.cut(part, 0, 0, 1)

    def cut(self, part, top, left, side):
        """The square at (top, left) of pictures[part], in parts of the picture's side."""
        if self.mirrored:
            left = 1 - left - side
        x0, y0, x1, y1 = self.box
        box = (x0 + left * (x1 - x0), y0 + top * (y1 - y0),
               x0 + (left + side) * (x1 - x0), y0 + (top + side) * (y1 - y0))
        size = [round(side * n) for n in self.size]
        return np.stack([self.one(picture, size, box) for picture in self.pictures[part]])

    def one(self, picture, size, box):
        image = Image.fromarray(np.array(picture)).resize(size, self.filter, box)
        if self.table:
            image = image.point(self.table)
        return np.asarray(image)[:, ::-1 if self.mirrored else 1]


@dataclass(frozen=True)
class AugmentedClip(Clip):
    """A Clip whose frames and masks are augmented; the same seed gives the same pictures."""
    seed: int = 1

    def pictures(self, what):
        return AugmentedPictures(super().pictures(what), self.name, self.seed)


@dataclass(frozen=True)
class AugmentedChunk(Chunk):
    """A chunk of which only the audio is cached: its frames are augmented at every draw."""

    def draw(self, rng):
        clip = self.clip
        seed = int(rng.integers(1, 2 ** 31))
        clip = AugmentedClip(clip.name, clip.identity, clip.path, clip.store, clip.length, seed)
        return replace(self, clip=clip)


def augmented_chunks(clips, audio_encoder, cache, cfg):
    """Clips -> list of AugmentedChunk; their audio is encoded now if `cache` does not hold it."""
    key = [5, "audio", fingerprint(audio_encoder.model), cfg.frames, cfg.continuity_frames,
           cfg.offsets, cfg.references]
    chunks = []
    cache.mkdir(parents=True, exist_ok=True)
    for clip in clips:
        of_clip = repr([*key, clip.store.name, clip.length])
        name = hashlib.sha256(of_clip.encode()).hexdigest()[:24]
        found = chunk_grid(clip, cache / name, cfg)
        if found and not (cache / name).exists():
            save_arrays(cache / name, {"audio": encode_audio(found, audio_encoder)})
        chunks += [AugmentedChunk(c.clip, c.store, c.row, c.start, c.length, c.pictures)
                   for c in found]
    return chunks

# ----------------------------------------------------------------------------------- region weights

MOUTH = (0.62, 0.95, 0.25, 0.75)            # of a face: top, bottom, left, right
EYES = (0.2, 0.5, 0.1, 0.9)


def face_region(mask, top, bottom, left, right):
    """Face mask (F, h, w) in 0..1 -> (F, h, w) bool: a part of the face, in shares of its size."""
    def inside(axis, low, high):            # axis: the one that is reduced
        occupied = (mask > 0.5).any(axis)                           # (F, w or h)
        place = torch.arange(mask.shape[3 - axis]) + 0.5
        first = place.where(occupied, torch.inf).amin(1, keepdim=True) - 0.5    # (F, 1)
        last = place.where(occupied, -torch.inf).amax(1, keepdim=True) + 0.5    # no face: inf
        share = (place - first) / (last - first)
        return (share > low) & (share < high)
    return inside(2, top, bottom)[:, :, None] & inside(1, left, right)[:, None, :]


def region_weights(latents, face, mouth, eyes, cfg):
    """Weight of each latent in Eq. 2, (F, h, w); 5 in 100 latents show all that audio decides."""
    moved = (latents - latents.median(1, keepdim=True).values).square().mean(0)     # (F, h, w)
    eye_count = eyes.sum((1, 2), keepdim=True).clamp(min=1)
    eye_motion = (moved * eyes).sum((1, 2), keepdim=True) / eye_count               # (F, 1, 1)
    eye_weight = cfg.eye_loss_weight + cfg.eye_motion_weight * eye_motion
    return 1 + cfg.face_loss_weight * face + cfg.mouth_loss_weight * mouth + eye_weight * eyes


def place_window(mouth, eyes, side, rng):
    """Where a window of side x side latents lies -> (y, x), even, for a token is 2 x 2 latents.

    Half of the windows are centred near the mouth, two fifths near the eyes, the rest anywhere."""
    free = np.array(mouth.shape[1:]) - side
    y, x = rng.integers(free // 2 + 1) * 2
    choice = rng.random()
    region = mouth if choice < 0.5 else eyes
    if choice < 0.9 and region.any():
        middle = region.nonzero()[:, 1:].double().mean(0).numpy() + 0.5
        corner = middle - side / 2 + rng.uniform(-3, 3, 2) * side / 8
        y, x = np.clip(corner / 2, 0, free // 2).round().astype(int) * 2
    return int(y), int(x)

# ---------------------------------------------------------------------------- continuity corruption


@torch.no_grad()
def roundtrip_matrix(vae, chunks, m, device="cpu", linear=None):
    """What one decode and encode does to m latents, as a matrix (C, C): least squares.

    Its power k stands for k round trips, roughly: it explains a fifth of what one changes."""
    def first_latents(chunk):
        if isinstance(chunk, AugmentedChunk):
            return linear.encode(to_tensor(chunk.clip.frames[chunk.start:chunk.start + 4 * m - 3]))
        return torch.from_numpy(np.array(chunk.array("latents")[chunk.row, :, :m])).float()

    before = torch.stack([first_latents(chunk) for chunk in chunks]).to(device)
    after = torch.cat([vae.encode(vae.decode(z[None])) for z in before])
    before, after = (x.transpose(0, 1).flatten(1).cpu().double() for x in (before, after))
    return torch.linalg.lstsq(before.T, after.T).solution.T.float().contiguous()    # (C, C)


def corrupt_kappa(kappa, matrix, roundtrips, noise, cells=4):
    """kappa (C, m, h, w) as after so many codec round trips, with noise, white and in patches.

    It teaches the network to distrust kappa and rely on z_id. `cells` x `cells` coarse patches, a
    quarter of the side each, imitate colours that drift; they are equal for all m latents, or they
    would average out. 0.3 was found by trying; 0.15 is about the error after 15 s."""
    corner = noise[None, :, 0, :cells, :cells]
    patches = nnf.interpolate(corner, size=kappa.shape[2:], mode="bilinear")[0, :, None]
    blurred = torch.einsum("cd,dmhw->cmhw", torch.linalg.matrix_power(matrix, roundtrips), kappa)
    return blurred + roundtrips ** 0.5 * (0.3 * noise + 0.15 * patches)

# ------------------------------------------------------------------------------------------ one row


@dataclass(frozen=True)
class Tricks:
    """What rows are made with, beside the config."""
    grid: int                               # latents of a side of the picture
    linear: LinearEncoder | None = None     # encodes augmented chunks
    roundtrip: torch.Tensor | None = None   # (C, C), see roundtrip_matrix


def make_row(chunk, cfg, rng, is_first, drop_audio, sigma, tricks, side=0):
    """As train_teacher.make_row, with the tricks. side: of a window in latents; 0: all.

    loss_weight is (F, h, w) here."""
    chunk, picture = choose_reference(chunk, is_first, rng)
    augmented = isinstance(chunk, AugmentedChunk)
    if augmented:
        chunk = chunk.draw(rng)
    m = 1 + (cfg.continuity_frames - 1) // 4
    F = (chunk.length + 3) // 4
    part = slice(chunk.start, chunk.start + chunk.length)
    face = latent_mask(chunk.clip.mask[part], F)                    # (F, h, w)
    mouth = face_region(face, *MOUTH)
    eyes = face_region(face, *EYES)
    h, w = face.shape[1:]
    y, x = place_window(mouth, eyes, side, rng) if side else (0, 0)
    side_here = side or h
    window = (slice(y, y + side_here), slice(x, x + side_here))
    face, mouth, eyes = (region[:, *window] for region in (face, mouth, eyes))
    if augmented:
        def cut(frames):
            return to_tensor(chunk.clip.frames.cut(frames, y / h, x / w, side_here / h))
        first = chunk.pictures[picture]
        latents = tricks.linear.encode(cut(part))                   # (C, F, h, w)
        identity = tricks.linear.still(cut(slice(first, first + 1)), F)
    else:
        latents = chunk.tensor("latents", chunk.row)[:, :, *window]
        identity = chunk.tensor("identity", picture)[:, :, *window]
    if cfg.identity == "etr":
        identity = identity[:, :1].expand_as(identity)
    audio = chunk.tensor("audio", chunk.row)                        # (T, L, A)
    given = 1 if is_first else m
    generated = (torch.arange(F) >= given).float()[:, None, None]
    noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
    pixel_window = draw_pixel_window(given, F, cfg.pixel_window, rng)
    kappa = latents[:, :m]
    if cfg.codec_roundtrips and not is_first:                       # a portrait made none
        cells = -(-4 * side // tricks.grid) if side else 4
        roundtrips = int(rng.integers(cfg.codec_roundtrips + 1))
        kappa = corrupt_kappa(kappa, tricks.roundtrip, roundtrips, noise[:, :m], cells)
    return {"latents": latents, "identity": identity, "kappa": kappa,
            "audio": torch.zeros_like(audio) if drop_audio else audio,
            "sigma": torch.tensor(sigma, dtype=torch.float32), "noise": noise,
            "loss_weight": generated * region_weights(latents, face, mouth, eyes, cfg),
            "pixel_window": pixel_window, "chunk": chunk}


def latent_mask(mask, F):
    """uint8 (T, H/4, W/4) -> (F, h, w) in 0..1: latent 0 covers one frame, the others four."""
    mask = torch.from_numpy(np.array(mask))[None].float() / 255     # (1, T, 2h, 2w)
    h, w = (n // 2 for n in mask.shape[2:])
    mask = torch.cat([mask[:, :1].expand(-1, 3, -1, -1), mask], 1)  # (1, 4F, 2h, 2w)
    return nnf.adaptive_avg_pool3d(mask, (F, h, w))[0]


def make_batch(sampler, cfg, step, rows, device, tricks):
    """As train_teacher.make_batch; most steps see windows and have more rows for the same cost."""
    side = 0 if step % cfg.whole_every == 0 else cfg.window
    more = (tricks.grid // side) ** 2 if side else 1
    rows = range(rows.start * more, rows.stop * more)
    make = partial(make_row, tricks=tricks, side=side)
    return collate([draw_row(sampler, cfg, step, row, make) for row in rows], device)


def has_blink(chunk, m):
    """Whether eyes are shut after the chunk's m continuity latents, by "blink" (N,) in NAME.npz."""
    path = chunk.clip.path.with_suffix(".npz")
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as npz:
            blink = npz["blink"]
    except (FileNotFoundError, KeyError):
        return False
    if blink.shape != (chunk.clip.length,):
        raise ValueError(f"{path}: blink {blink.shape}, the clip has {chunk.clip.length} frames")
    return bool((blink[chunk.start + 4 * m - 3:chunk.start + chunk.length] > 0.7).any())


def sampling_weights(folders, shares, cfg):
    """Chunks by folder -> how often each is drawn: each folder its share, blinks more often."""
    m = 1 + (cfg.continuity_frames - 1) // 4
    weights = []
    for chunks, share in zip(folders, shares, strict=True):
        often = np.ones(len(chunks))
        if cfg.blink_oversampling != 1:
            often = np.array([cfg.blink_oversampling if has_blink(c, m) else 1.0 for c in chunks])
        weights += list(share * often / often.sum())
    return weights


def muon(named_parameters, lr, cfg):
    """Muon for the matrices of the blocks; the first and last layer stay with AdamW."""
    return Muon(named_parameters, lr, "blocks.", cfg.betas, cfg.weight_decay)

# --------------------------------------------------------------------------------------------- main


@dataclass(frozen=True)
class TinyFiles(Files):
    data: tuple[Path, ...] = field()        # folders of clips, see data.py
    preset: PresetOnly[str] = "tiny"
    run_dir: Path = Path("runs/tiny-teacher")   # checkpoint, log, samples
    plan_memory: PresetOnly[None] = None    # only for the paper's presets
    shares: tuple[float, ...] = ()          # how often each folder is drawn [equally]


def check_tiny(files, cfg, grid):
    """ValueError, in one line, for tricks that make no sense together."""
    if cfg.window < 0 or cfg.window % 2 or (cfg.window and grid % cfg.window):
        raise ValueError(f"--window {cfg.window} must be even and divide the {grid} latents of a "
                         "picture's side")
    if cfg.window and (cfg.lambda_temp or cfg.lambda_face):
        raise ValueError("Eq. 16 and 17 need whole pictures: --window 0")
    if files.shares and len(files.shares) != len(files.data):
        raise ValueError(f"--shares has {len(files.shares)} values for {len(files.data)} folders")
    if min(cfg.edm_skip, cfg.face_loss_weight, cfg.mouth_loss_weight, cfg.eye_loss_weight,
           cfg.eye_motion_weight, cfg.codec_roundtrips) < 0 or cfg.blink_oversampling < 1:
        raise ValueError("weights, --edm-skip and --codec-roundtrips must be 0 or more, "
                         "--blink-oversampling 1 or more")


def fit_linear_encoder(vae, clips, T, device):
    """LinearEncoder of about 48 clips. ValueError if the VAE's encoder is not nearly linear."""
    some = clips[::-(-len(clips) // 48) or 1]
    videos = (to_tensor(clip.frames[:min(T, (clip.length - 1) // 4 * 4 + 1)]) for clip in some)
    linear = LinearEncoder(vae, videos, device)
    if linear.missing > 0.1:
        raise ValueError(f"--augment: the encoder is not linear enough, {linear.missing:.0%} of "
                         "its latents' variance would be missing")
    return linear


def checkpoint_tensors(tricks):
    """What a resumed run must find as it was."""
    tensors = {} if tricks.roundtrip is None else {"roundtrip": tricks.roundtrip}
    if tricks.linear:
        tensors |= {f"linear.{i}": matrix for i, matrix in enumerate(tricks.linear.matrices)}
    return tensors


def prepare(files, cfg, size, vae, encoder, device, rank, world):
    """Folders of clips -> ChunkSampler, validation chunks, Tricks."""
    cache = files.run_dir.parent / "cache"

    def encode(clips):
        return encode_clips(clips, vae, encoder, temporal_reference_encoding, cache, cfg, device,
                            rank, world)

    clips = [ClipFolder([folder], size, "train").clips for folder in files.data]
    held_out = ClipFolder(files.data, size, "val").clips
    val = encode(held_out[::-(-len(held_out) // cfg.val_chunks)])
    linear = None
    if cfg.augment:
        linear = fit_linear_encoder(vae, sum(clips, []), cfg.frames, device)
        folders = [augmented_chunks(some, encoder, cache, cfg) for some in clips]
    else:
        folders = [encode(some) for some in clips]
    chunks = sum(folders, [])
    roundtrip = None
    if cfg.codec_roundtrips:
        m = 1 + (cfg.continuity_frames - 1) // 4
        some = chunks[::-(-len(chunks) // 8)]
        roundtrip = roundtrip_matrix(vae, some, m, device, linear)
    shares = files.shares or [1.0] * len(folders)
    sampler = ChunkSampler(chunks, sampling_weights(folders, shares, cfg))
    first_chunks = [chunk for chunk in val if chunk.row == 0]
    return sampler, first_chunks, Tricks(size // (8 * vae.config.patch), linear, roundtrip)


def main(argv=None):
    files, cfg = parse_args(__doc__, TinyFiles, PRESETS, argv)
    stopped = "stopped; --resume continues from the last checkpoint"
    with one_line_errors("tiny.teacher", stopped), run_folder(files):
        check(cfg, int(os.environ.get("WORLD_SIZE", 1)))
        device, _ = select_device(files.device)
        rank, world = init_distributed(device)
        config, vae, encoder = load_frozen(files.weights, device)
        size = config["size"]
        check_tiny(files, cfg, size // (8 * vae.config.patch))
        torch.manual_seed(cfg.seed)
        network = replace(NETWORK, channels=vae.config.z_dim, audio_layers=encoder.layers,
                          audio_dim=encoder.dim)
        model = TinyDiT(network, cfg.edm_skip)
        if files.init:
            load_init(model, files.init)
        sampler, val, tricks = prepare(files, cfg, size, vae, encoder, device, rank, world)
        model = shard(model.to(device), device, world)
        state, losses = train(cfg, model, vae, sampler, val, files.run_dir, files.resume, device,
                              rank, world, partial(make_batch, tricks=tricks), muon,
                              checkpoint_tensors(tricks))
        needs = {"edm_skip": cfg.edm_skip, **SAMPLING}
        out = export(files, config, model, state.ema, cfg, tiny=needs)
        loss = np.mean(losses[-50:] or [np.nan])
        say(f"steps: {cfg.steps}\nloss: {loss:.4f}\nweights: {out / 'teacher.safetensors'}")


if __name__ == "__main__":
    main()
