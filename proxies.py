"""Three small networks that stand in where official weights are missing, trained on our own clips. Their figures are always called `proxy`.

    python evaluate.py train-proxies --data PUPPETS GRID --cache CACHE1 CACHE2          about 10 minutes on one core -> weights/tiny/proxies

sync      a small SyncNet (metrics.py) that sees the lower face: which sound belongs to these lips? The other moments of the same clip are the wrong
          answers, so that neither voice nor face helps. (Chung, Chung and Kang 2019, "Perfect Match".)
identity  64 features of a face: are these two pictures one person? One clip is one person.
face      what a face is doing: gap between the lips (eye distances), lids (0 open, 1 shut), and whether there is a face at all. The labels are
          the puppets' own (NAME.npz "gap", "blink"); real clips have none, and are measured all the same.

What they are good for is measured on the held-out clips and written beside the weights, proxies.json: real against late by 1, 2, 5 frames, another
clip's sound, another person, blur. A figure that cannot tell these apart proves nothing. A proxy trained on the same clips as a generator
knows the same faces and tricks: it finds faults, it does not replace the official networks.
"""
import argparse
import csv
import json
import os
import time
import warnings
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import metrics
from data import FPS, HOP, ClipFolder
from metrics import SMALL, Gaussian, SyncNet, SyncNetConfig, box_of, correlation, face_square, frechet
from puppet import GAP, lip_opening, mouth_curves

CLOSED = 0.03                   # eye distances: lips closer than this are shut

# -------------------------------------------------------------------------------------------------------------- networks


class Eye(nn.Sequential):
    """The small convolutional network of both picture proxies: (N, 3, S, S) in [0, 1] -> (N, 96, S/16, S/16)."""

    def __init__(self):
        block = lambda i, o, s: [nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        super().__init__(*block(3, 16, 2), *block(16, 32, 2), *block(32, 48, 1), *block(48, 64, 2), *block(64, 64, 1), *block(64, 96, 2))


class IdentityNet(nn.Module):
    size = 64

    def __init__(self):
        super().__init__()
        self.eye, self.head = Eye(), nn.Linear(96 * 16, 64)

    def features(self, x):                                                          # (N, 3, 64, 64) -> (N, 192), for Frechet distances:
        y = self.eye(x)                                                             # mean and spread of every channel
        return torch.cat([y.mean((2, 3)), y.std((2, 3))], 1)

    def forward(self, x):                                                           # -> unit vectors (N, 64)
        return F.normalize(self.head(self.eye(x).flatten(1)), dim=1)


class FaceNet(nn.Module):
    size = 96

    def __init__(self):
        super().__init__()
        self.eye, self.head = Eye(), nn.Sequential(nn.Linear(96 * 36, 96), nn.ReLU(), nn.Dropout(0.2), nn.Linear(96, 3))

    def forward(self, x):                                                           # (N, 3, 96, 96) -> (N, 3): gap / GAP, logit of lids, of face
        return self.head(self.eye(x).flatten(1))


CLASSES = {"sync": SyncNet, "identity": IdentityNet, "face": FaceNet}


def load_network(path, device="cpu"):
    """A proxy's .safetensors -> the network. FileNotFoundError, or ValueError if it is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such proxy weights: {path}")
    try:
        with safe_open(path, "pt") as file:
            kind = file.metadata()["proxy"]
            config = json.loads(file.metadata().get("config", "{}"))
            tensors = {k: file.get_tensor(k).float() for k in file.keys()}
        tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        net = SyncNet(SyncNetConfig(**tuples)) if kind == "sync" else CLASSES[kind]()
        net.load_state_dict(tensors)
    except (SafetensorError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no proxy of this program: {' '.join(str(error).split())[:150]}") from None
    return net.eval().requires_grad_(False).to(device)


def load_proxies(folder, device="cpu"):
    """The networks of a folder that are there: {"sync": SyncNet, ...}, {} if none is."""
    return {kind: load_network(Path(folder) / f"{kind}.safetensors", device) for kind in CLASSES if (Path(folder) / f"{kind}.safetensors").is_file()}


def unit(pictures, net):                                                            # uint8 (N, S, S, 3) -> float (N, 3, S, S) in [0, 1]
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).to(next(net.parameters()).device).float() / 255


@torch.no_grad()
def read_faces(net, frames, box):
    """FaceNet on frames uint8 (T, H, W, 3) -> gap (T,) in eye distances, lids (T,) 0 open 1 shut, face (T,) probability of a face."""
    y = torch.cat([net(unit(part, net)) for part in np.array_split(face_square(frames, box, net.size), -(-len(frames) // 64))]).cpu()
    return (y[:, 0] * GAP).clamp(0).numpy(), torch.sigmoid(y[:, 1]).numpy(), torch.sigmoid(y[:, 2]).numpy()


@torch.no_grad()
def read_identity(net, frames, box):
    """IdentityNet on frames -> unit vectors (T, 64), features (T, 192)."""
    parts = [unit(part, net) for part in np.array_split(face_square(frames, box, net.size), -(-len(frames) // 64))]
    return torch.cat([net(x) for x in parts]).cpu().numpy(), torch.cat([net.features(x) for x in parts]).cpu().numpy()


# ------------------------------------------------------------------------------------------------- what is said, and when


@lru_cache(maxsize=8)
def phone_table(path):
    table = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            table.setdefault(row["clip"], []).append((float(row["start"]), float(row["end"]), row["phone"]))
    return table


def phones_of(path):
    """[(start s, end s, IPA)] of a video: NAME.json "phones" beside it, else phones.tsv (clip, start, end, phone) here or one up, else None."""
    try:
        found = json.loads(Path(path).with_suffix(".json").read_text(encoding="utf-8"))["phones"]
        return [(float(s), float(e), str(p)) for s, e, p in found]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    table = next((d / "phones.tsv" for d in (Path(path).parent, Path(path).parent.parent) if (d / "phones.tsv").is_file()), None)
    try:
        return phone_table(table).get(Path(path).stem) if table else None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{table} needs columns clip, start, end, phone: {error!r}") from None


def speech_frames(phones, sound, frames):
    """Which of `frames` frames are spoken: by the phones if they are known, else those louder than a tenth of the loud ones. -> bool (frames,)"""
    t = (np.arange(frames) + 0.5) / FPS
    if phones:
        return np.any([(t >= s) & (t < e) for s, e, p in phones if p != "sil"] or [t < 0], axis=0)
    rms = np.sqrt(np.square(np.resize(np.append(sound, np.zeros(frames * HOP)), (frames, HOP))).mean(1)) if len(sound) else np.zeros(frames)
    return rms > max(0.1 * np.percentile(rms, 95), 1e-4)


@lru_cache(maxsize=4096)
def true_curves(path):
    """What a puppet's sidecar says: {"gap": (N,), "blink": (N,)}, {} where there is none."""
    try:
        with np.load(Path(path).with_suffix(".npz"), allow_pickle=False) as npz:
            return {k: np.float64(npz[k]) for k in ("gap", "blink") if k in npz}
    except (OSError, ValueError, BadZipFile):
        return {}


def mouth_row(gap, truth, phones, speech, start=0):
    """The mouth of frames start, start + 1, ... : gap (T,) seen, truth (T,) or None, phones or None, speech bool (T,). -> figures by name

    Correlations are over speech frames only: silence, when every mouth is shut, inflates them. Closures: the smallest gap within a p, b or m."""
    row = {"mouth_sd": gap[speech].std() if speech.any() else np.nan,
           "mouth_sd_silence": gap[~speech].std() if (~speech).sum() > 4 else np.nan}
    if truth is not None:
        n = min(len(gap), len(truth))
        row |= {key: correlation(gap[:n], truth[:n], speech[:n], lag) for key, lag in (("mouth", 0), ("mouth_early", -1), ("mouth_late", 1))}
    t = (np.arange(len(gap)) + start + 0.5) / FPS
    shut = [gap[np.abs(t - (s + e) / 2) <= max((e - s) / 2, 1 / FPS)] for s, e, p in phones or [] if p in ("p", "b", "m")]
    shut = [x.min() for x in shut if len(x)]
    row |= {"gap_pbm": np.mean(shut), "closed_pbm": np.mean(np.less(shut, CLOSED))} if shut else {}
    return {k: float(v) for k, v in row.items()}


def whole_mouth(rows, gap, lids, truth, sound):
    """Mouth and blinks over the whole video -> its figures; every piece gets its own share into its row."""
    speech = speech_frames(truth["phones"], sound, len(gap))
    for row in rows:
        a, b = round(row["start"] * FPS), round(row["start"] * FPS) + row["frames"]
        row |= mouth_row(gap[a:b], None if truth["gap"] is None else truth["gap"][a:b], truth["phones"], speech[a:b], a)
    blinks = int((np.diff((lids > 0.5).astype(int)) == 1).sum())
    return mouth_row(gap, truth["gap"], truth["phones"], speech) | {"blinks": blinks / (len(gap) / FPS / 60)}


# ----------------------------------------------------------------------------------------------------------------- train


@dataclass(frozen=True)
class ProxyConfig:
    sync_steps: int = 1000          # optimiser steps of the small SyncNet
    identity_steps: int = 400       # ... of the identity network
    face_steps: int = 1200          # ... of the face network
    lr: float = 2e-3                # peak, after a short warm-up; then a cosine to zero
    seed: int = 0


def recolour(rng, pictures, amount=0.3):
    """Another exposure, contrast and white for all pictures alike. uint8 (N, S, S, 3)"""
    gain, lift = 1 + amount * rng.uniform(-1, 1) + 0.3 * amount * rng.uniform(-1, 1, 3), 80 * amount * rng.uniform(-1, 1)
    return np.clip(np.float32(pictures) * gain + lift, 0, 255).astype(np.uint8)


def blurred(pictures, radius):
    """A Gaussian blur of `radius` pixels."""
    return np.stack([np.asarray(Image.fromarray(p).filter(ImageFilter.GaussianBlur(radius))) for p in pictures])


def not_a_face(rng, picture):
    """A picture without a face: a face in pieces, upside down, or coloured fog as an untrained generator makes."""
    kind, S = rng.integers(3), len(picture)
    if kind == 0:
        n = S // 16
        blocks = picture[:16 * n, :16 * n].reshape(n, 16, n, 16, 3).swapaxes(1, 2).reshape(-1, 16, 16, 3)
        return rng.permutation(blocks).reshape(n, n, 16, 16, 3).swapaxes(1, 2).reshape(16 * n, 16 * n, 3)
    if kind == 1:
        return np.rot90(picture, rng.integers(1, 4))
    coarse = rng.integers(0, 256, (int(rng.choice([2, 4, 12, 48])),) * 2 + (3,), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((S, S), Image.Resampling.BILINEAR))


def sync_loss(net, clips, rng, takes=6, moments=10):
    """Six clips, ten windows each: softmax over the distances, every window must find its own sound among those of its clip, and back. All go
    through together: batch norm must see several faces, or it would do at test time what it never did in training."""
    lips, heard = [], []
    for clip in (clips[i] for i in rng.choice(len(clips), takes)):
        at = np.sort(rng.choice(clip.length - 5, moments, replace=False))
        sound = np.array(clip.audio) / np.float32(32768) * 10 ** rng.uniform(-0.5, 0.2)
        pictures = recolour(rng, metrics.mouth_square(clip.frames[at[0]:at[-1] + 5], jittered_box(rng, box_of(clip.path)), net.config.size))
        pictures = pictures[:, :, ::-1] if rng.random() < 0.5 else pictures
        lips.append(metrics.lip_windows(pictures)[at - at[0]]), heard.append(metrics.sound_windows(sound)[at])
    lips, heard = (net.see(torch.cat(lips)), net.hear(torch.cat(heard)))
    distance = torch.cdist(*(x.view(takes, moments, -1) for x in (lips, heard)), compute_mode="donot_use_mm_for_euclid_dist")
    target = torch.arange(moments).expand(takes, -1)
    return (F.cross_entropy(-distance, target) + F.cross_entropy(-distance.mT, target)) / 2


def jittered_box(rng, box):
    h = box[3] - box[1]
    dx, dy, s = rng.uniform(-0.04, 0.04, 3) * h
    return box[0] + dx - s, box[1] + dy - s, box[2] + dx + s, box[3] + dy + s


def identity_loss(net, clips, rng, people=32):
    """Two moments of each of 32 clips, cropped and coloured differently: each must find the other among all (softmax over cosines)."""
    chosen = [clips[i] for i in rng.choice(len(clips), 2 * people, replace=len(clips) < 2 * people)]
    chosen = list({c.identity: c for c in chosen}.values())[:people]                # nobody twice
    views = []
    for _ in range(2):
        pictures = [recolour(rng, face_square(c.frames[int(rng.integers(c.length))][None], box_of(c.path), net.size,
                             rng.uniform(-0.04, 0.04, 2), rng.uniform(0.92, 1.1)), 0.1)[0] for c in chosen]
        views.append(net(unit(np.stack(pictures), net)))
    cosines, target = views[0] @ views[1].T / 0.1, torch.arange(len(chosen))
    return (F.cross_entropy(cosines, target) + F.cross_entropy(cosines.T, target)) / 2


def face_loss(net, clips, rng, faces=48):
    """Gap and lids of frames whose truth is known, blurred and coloured at random; and faces against what is none."""
    pictures, gap, lids = [], [], []
    while len(pictures) < faces:
        clip = clips[int(rng.integers(len(clips)))]
        truth, i = true_curves(clip.path), int(rng.integers(clip.length))
        if rng.random() < 0.5 and truth["blink"].max() > 0.1:      # blinks are rare
            i = int(rng.choice(np.flatnonzero(truth["blink"] > 0.1)))
        p = recolour(rng, face_square(clip.frames[i][None], box_of(clip.path), net.size, rng.uniform(-0.05, 0.05, 2), rng.uniform(0.9, 1.12)))
        p = blurred(p, rng.uniform(0.4, 2))[0] if rng.random() < 0.3 else p[0]
        pictures.append(p[:, ::-1] if rng.random() < 0.5 else p)
        gap.append(truth["gap"][i] / GAP)
        lids.append(truth["blink"][i])
    pictures += [not_a_face(rng, pictures[int(rng.integers(faces))]) for _ in range(faces // 4)]
    y = net(unit(np.stack(pictures), net) + 0.02 * torch.randn(len(pictures), 3, 1, 1))
    t = torch.tensor(np.array([gap, lids]), dtype=torch.float32)
    lips = F.smooth_l1_loss(y[:faces, 0], t[0], beta=0.1)
    eyes = F.binary_cross_entropy_with_logits(y[:faces, 1], t[1])
    return 5 * lips + eyes + F.binary_cross_entropy_with_logits(y[:, 2], (torch.arange(len(y)) < faces).float())


LOSSES = {"sync": sync_loss, "identity": identity_loss, "face": face_loss}


def train_network(kind, clips, cfg, out):
    """One proxy, from nothing, deterministic by the seed -> its network; writes KIND.safetensors into `out`."""
    torch.manual_seed(cfg.seed)
    net = SyncNet(SMALL) if kind == "sync" else CLASSES[kind]()
    steps = getattr(cfg, f"{kind}_steps")
    optimizer = torch.optim.AdamW(net.parameters(), lr=cfg.lr, weight_decay=1e-3)
    rate = lambda s: min(1, (s + 1) / 50) * (0.5 + 0.5 * np.cos(np.pi * s / steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    seen, bar = [], tqdm(range(steps), f"proxy {kind}", unit="step", disable=None)
    for step in bar:
        loss = LOSSES[kind](net, clips, np.random.default_rng([cfg.seed, list(CLASSES).index(kind), step]))
        if not torch.isfinite(loss):
            raise ValueError(f"the loss of the {kind} proxy is {loss.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen.append(loss.item())
        if step % 50 == 49 or step == steps - 1:
            print(f"proxy {kind} step {step + 1:5d}/{steps} | loss {np.mean(seen[-50:]):.4f} | lr {cfg.lr * rate(step):.1e}", flush=True)
    config = asdict(SMALL) if kind == "sync" else {}
    out.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), out / f"{kind}.part", {"proxy": kind, "config": json.dumps(config)})
    os.replace(out / f"{kind}.part", out / f"{kind}.safetensors")
    return net.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------- scale


def auc(good, bad):
    """The chance that a good one scores above a bad one (ties count half): 1 = always apart, 0.5 = blind."""
    a, b = np.asarray(good)[:, None], np.asarray(bad)
    return float(((a > b) + 0.5 * (a == b)).mean())


def sync_scale(net, clips):
    """What the sync proxy says to right and wrong sound: mean of its figures, and how surely `sync_now` tells it from the true one."""
    rows = {}
    for k, clip in enumerate(clips):
        frames, box, sound = np.array(clip.frames[:250]), box_of(clip.path), np.array(clip.audio[:250 * HOP]) / np.float32(32768)
        other = np.resize(np.array(clips[(k + len(clips) // 2) % len(clips)].audio), len(sound)) / np.float32(32768)
        lips, heard = metrics.sync_features(net, frames, sound, box)
        cases = {"real": (lips, heard), "other sound": (lips, metrics.sync_features(net, frames, other, box)[1]),
                 "blurred": (metrics.sync_features(net, blurred(frames, 2), sound, box)[0], heard),
                 "frozen": (lips[:1].expand_as(lips), heard)}
        for late in (1, 2, 5):                                                      # the picture shows frame i - late at frame i
            cases[f"late {late}"] = lips[:-late], heard[late:]
        for name, pair in cases.items():
            rows.setdefault(name, []).append(metrics.sync_scores(*pair, padded=False))
    now = {name: [r["sync_now"] for r in part] for name, part in rows.items()}
    return {name: {k: round(float(np.mean([r[k] for r in part])), 3) for k in part[0]} | {"auc_real_above": round(auc(now["real"], now[name]), 3)}
            for name, part in rows.items()}


def identity_scale(net, clips):
    """Cosines of two moments of one clip, of two people, of a face and its blurred self; the AUC; and Frechet distances of the features."""
    people = list({c.identity: c for c in clips}.values())
    first, last, soft, sums = [], [], [], {k: Gaussian() for k in ("half a", "half b", "blurred")}
    for k, clip in enumerate(people):
        pictures, box = np.array(clip.frames[::8]), box_of(clip.path)
        vectors, features = read_identity(net, pictures, box)
        blur_vectors, blur_features = read_identity(net, blurred(pictures, 1.5), box)
        first.append(vectors[0]), last.append(vectors[-1]), soft.append(blur_vectors[-1])
        sums["half a" if k % 2 else "half b"].add(features)
        if k % 2 == 0:
            sums["blurred"].add(blur_features)                                      # of half b: as many, and never the same people
    cosine = np.array(first) @ np.array(last).T
    same, other = np.diag(cosine), cosine[~np.eye(len(people), dtype=bool)]
    out = {"people": len(people), "same": same.mean(), "other": other.mean() if len(other) else np.nan,
           "blurred": (np.array(first) * soft).sum(1).mean(), "auc_same_above_other": auc(same, other) if len(other) else np.nan}
    if len(people) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                                         # few clips: the number is for scale only
            out |= {"frechet_real_real": frechet(sums["half a"], sums["half b"]), "frechet_blurred": frechet(sums["half a"], sums["blurred"])}
    return {k: round(float(v), 4) for k, v in out.items()}


def face_scale(net, clips):
    """Measured gap and lids against the truth, or, for real clips, against what the phones lead us to expect (0.67 is a landmark tracker's)."""
    rows, lids, faces, chaos = [], [], [], []
    for k, clip in enumerate(clips):
        frames, box, truth, phones = np.array(clip.frames[:250]), box_of(clip.path), true_curves(clip.path), phones_of(clip.path)
        gap, lid, face = read_faces(net, frames, box)
        rule = lip_opening(mouth_curves(phones, len(gap))) if phones else None
        curve, speech = truth.get("gap", rule), speech_frames(phones, np.array(clip.audio) / 32768, len(gap))
        rng = np.random.default_rng(k)
        faces += list(face)
        chaos += list(read_faces(net, np.stack([not_a_face(rng, f) for f in frames[:9]]), box)[2])
        if curve is not None:
            rows.append({"mouth_correlation": correlation(gap, curve[:len(gap)], speech), "late_1": correlation(gap, curve[:len(gap)], speech, -1)})
        if truth:
            rows[-1]["gap_error"] = np.abs(gap - truth["gap"][:len(gap)]).mean()
            lids += [(truth["blink"][:len(gap)], lid)]
    out = {k: np.nanmean([r[k] for r in rows if k in r]) for k in {k for r in rows for k in r}}
    if lids:
        true, seen = (np.concatenate(x) for x in zip(*lids))
        out["lids_correlation"] = np.corrcoef(true, seen)[0, 1]
        out["blinks_true"], out["blinks_seen"] = (int((np.diff((x > 0.5).astype(int)) == 1).sum()) for x in (true, seen))
    out |= {"against": 0 if lids else 1, "faces_seen": np.mean(np.array(faces) > 0.5), "faces_seen_where_none_is": np.mean(np.array(chaos) > 0.5)}
    text = {"against": "the sidecar's gap" if lids else "the rule from phones"}
    return {k: round(float(v), 4) for k, v in sorted(out.items()) if k != "against"} | text


SCALES = {"sync": sync_scale, "identity": identity_scale, "face": face_scale}


# ------------------------------------------------------------------------------------------------------------------ main


def main(argv=None):
    parser = argparse.ArgumentParser(prog="evaluate.py train-proxies", description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="folders of clips; those with puppets' sidecars teach lips and lids")
    parser.add_argument("--cache", nargs="*", help="where the decoded frames are kept, one for every data folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights" / "tiny" / "proxies", help="where the weights go")
    parser.add_argument("--nets", nargs="+", choices=list(CLASSES), default=list(CLASSES), help="which networks to train")
    parser.add_argument("--scale-only", action="store_true", help="train nothing: measure the proxies in --out on the held-out clips")
    parser.add_argument("--clips", type=int, default=40, help="held-out clips of a folder for the scale")
    for field in fields(ProxyConfig):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default, help="see ProxyConfig")
    args = parser.parse_args(argv)
    try:
        if args.cache and len(args.cache) != len(args.data):
            raise ValueError("--cache wants one folder for every folder of --data")
        parts = [[[c for c in ClipFolder(folder, 128, part, args.cache[i] if args.cache else None).clips if c.length >= 20 and len(c.audio)]
                  for i, folder in enumerate(args.data)] for part in ("train", "val")]
        cfg, begin = ProxyConfig(**{f.name: getattr(args, f.name) for f in fields(ProxyConfig)}), time.time()
        train = sum(parts[0], [])
        print(f"{len(train)} clips to train on, {[len(x) for x in parts[1]]} held out | {cfg}", flush=True)
        nets = load_proxies(args.out)
        for kind in [] if args.scale_only else args.nets:
            labelled = [c for c in train if kind != "face" or len(true_curves(c.path)) == 2]
            if len({c.identity for c in labelled}) < 2:
                raise ValueError(f"the {kind} proxy needs clips of two people" + (" with puppets' sidecars (gap, blink)" if kind == "face" else ""))
            nets[kind] = train_network(kind, labelled, cfg, args.out)
        scale = {Path(folder).resolve().name: {kind: SCALES[kind](net, clips[:args.clips]) for kind, net in nets.items()}
                 for folder, clips in zip(args.data, parts[1]) if len(clips) > 1}
    except (ValueError, OSError) as error:
        parser.exit(2, f"evaluate.py train-proxies: {error}\n")
    report = {"config": asdict(cfg), "minutes": round((time.time() - begin) / 60, 1), "threads": torch.get_num_threads(), "scale": scale}
    (args.out / "proxies.part").write_text(json.dumps(report, indent=1), encoding="utf-8")
    os.replace(args.out / "proxies.part", args.out / "proxies.json")
    print(json.dumps(scale, indent=1))
    print(f"proxies: {args.out}\nminutes: {report['minutes']}")


if __name__ == "__main__":
    main()
