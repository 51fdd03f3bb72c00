"""Trains the proxies (proxies.py) on clips and measures, on clips that were held out, what they are good for -> weights/tiny/proxies.

    python evaluate.py train-proxies --data PUPPETS GRID --cache CACHE1 CACHE2          an hour or so of one core, half of it for --coded
    python evaluate.py train-proxies --data PUPPETS GRID --nets face                    one of them anew
    python evaluate.py train-proxies --data PUPPETS GRID --scale-only                   the measurement alone

What a proxy measures has mostly been through the VAE's decoder, so half of what it is trained on has, too (--coded).
"""
import argparse
import hashlib
import inspect
import json
import re
import time
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors import safe_open
from tqdm import tqdm

import metrics
from checkpoint import write_json, write_safetensors
from chunks import fingerprint, names_of, one_per_folder
from data import HOP, ClipFolder, keep_arrays, sidecar_text
from infer import CHUNK
from metrics import SMALL, Gaussian, SyncNet, box_of, correlation, face_square, frechet
from muon import Muon
from proxies import (
    CLASSES,
    around,
    blinks,
    load_network,
    load_proxies,
    phones_of,
    read_faces,
    read_identity,
    speech_frames,
    true_curves,
    unit,
    vae_frames,
)
from puppet import GAP, lip_opening, mouth_curves
from vae import load_vae

# ----------------------------------------------------------------------------------------------------------------- train


@dataclass(frozen=True)
class ProxyConfig:
    sync_steps: int = 1000          # optimiser steps of the small SyncNet
    identity_steps: int = 400       # optimiser steps of the identity network
    face_steps: int = 2000          # optimiser steps of the face network
    coded: int = 400                # clips of each folder that are also seen through the VAE, together as often as all are seen as they are; 0: none
    lr: float = 2e-3                # peak, after a short warm-up; then a cosine to zero
    seed: int = 0                   # of everything random


def coded_copies(clips, count, vae, length):
    """`count` of the clips, evenly spread, or all if there are fewer, once more as the VAE shows them: Clips whose frames lie beside theirs,
    made once; path and truth stay. What is measured has mostly been through a decoder, and lips never seen soft are read worse there."""
    weights, copies = fingerprint(vae), []
    chosen = np.linspace(0, len(clips) - 1, min(count, len(clips))).astype(int)
    for clip in tqdm([clips[i] for i in chosen], "coding", unit="clip", disable=None):
        cache = clip.store.parent / "coded"
        cache.mkdir(exist_ok=True)
        store = cache / hashlib.sha256(repr([weights, length, clip.store.name]).encode()).hexdigest()[:24]
        if not store.exists():
            frames = np.stack(list(vae_frames(vae, np.array(clip.frames), length)))
            keep_arrays(store, {"frames": frames, "audio": clip.audio, "mask": clip.mask})
        copies.append(replace(clip, store=store))
    return copies


def lessons(parts, count, vae, length):
    """Clips of all folders (a list each) to draw from: every folder as often as another, in it what the VAE leaves as often as what there was."""
    whole = []
    for part in parts:
        copies = coded_copies(part, count, vae, length) if count else []
        also = copies * round(len(part) / max(1, len(copies)))
        whole += (part + also) * round(max(map(len, parts)) / max(1, len(part)))
    return whole


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
        mixed = lambda: np.argsort(rng.random(8)[np.arange(S) * 8 // S], kind="stable")     # eight bands in another order
        return picture[mixed()][:, mixed()]
    if kind == 1:
        return np.rot90(picture, rng.integers(1, 4))
    coarse = rng.integers(0, 256, (int(rng.choice([2, 4, 12, 48])),) * 2 + (3,), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((S, S), Image.Resampling.BILINEAR))


def sync_loss(net, clips, rng, takes=6, moments=10):
    """Six clips, ten windows each: softmax over the distances, every window must find its own sound among those of its clip, and back. All go
    through together: batch norm must see several faces, or it would do at test time what it never did in training."""
    lips, heard = [], []
    for clip in (clips[i] for i in rng.choice(len(clips), takes)):
        n = min(clip.length - 5, 75)                                               # within 3 s
        at = rng.integers(clip.length - 4 - n) + np.sort(rng.choice(n, moments, replace=False))
        sound, (x0, y0, x1, y1) = np.array(clip.audio) / np.float32(32768) * 10 ** rng.uniform(-0.5, 0.2), box_of(clip.path)
        dx, dy, more = rng.uniform(-0.04, 0.04, 3) * (y1 - y0)
        box = x0 + dx - more, y0 + dy - more, x1 + dx + more, y1 + dy + more
        pictures = recolour(rng, metrics.mouth_square(clip.frames[at[0]:at[-1] + 5], box, net.config.size))
        pictures = blurred(pictures, rng.uniform(0.5, 3)) if rng.random() < 0.3 else pictures      # sharpness is not sync
        pictures = pictures[:, :, ::-1] if rng.random() < 0.5 else pictures
        lips.append(metrics.lip_windows(pictures)[at - at[0]]), heard.append(metrics.sound_windows(sound)[at])
    lips, heard = (net.see(torch.cat(lips)), net.hear(torch.cat(heard)))
    distance = torch.cdist(*(x.view(takes, moments, -1) for x in (lips, heard)), compute_mode="donot_use_mm_for_euclid_dist")
    target = torch.arange(moments).expand(takes, -1)
    return (F.cross_entropy(-distance, target) + F.cross_entropy(-distance.mT, target)) / 2


def identity_loss(net, clips, rng, people=32):
    """Two moments of 32 people, of two clips if there are, cropped, mirrored and coloured: each must find the other (softmax over cosines)."""
    clips_of = {}
    for clip in clips:
        clips_of.setdefault(clip.identity, []).append(clip)
    chosen = [clips_of[k] for k in rng.permutation(sorted(clips_of))[:people]]
    views = []
    for _ in range(2):
        taken = [mine[rng.integers(len(mine))] for mine in chosen]
        pictures = [recolour(rng, face_square(c.frames[int(rng.integers(c.length))][None], box_of(c.path), net.size,
                             rng.uniform(-0.04, 0.04, 2), rng.uniform(0.92, 1.1)), 0.25)[0] for c in taken]
        views.append(net(unit(np.stack([p[:, ::-1] if rng.random() < 0.5 else p for p in pictures]), net)))
    cosines, target = views[0] @ views[1].T / 0.1, torch.arange(len(chosen))
    return (F.cross_entropy(cosines, target) + F.cross_entropy(cosines.T, target)) / 2


def face_loss(net, clips, rng, faces=48):
    """Gap and lids of frames whose truth is known, blurred and coloured at random; and faces against what is none."""
    pictures, gap, lids = [], [], []
    while len(pictures) < faces:
        clip = clips[int(rng.integers(len(clips)))]
        truth = true_curves(clip.path)
        i = int(rng.integers(n := min(clip.length, len(truth["gap"]))))                 # a sidecar may be a frame short
        if rng.random() < 0.6 and truth["blink"].max() > 0.1:      # blinks are rare; near ones teach when they begin and end
            i = int(np.clip(rng.choice(np.flatnonzero(truth["blink"] > 0.1)) + rng.integers(-5, 6) * rng.integers(2), 0, n - 1))
        p = face_square(clip.frames[around(i, clip.length)], box_of(clip.path), net.size, rng.uniform(-0.06, 0.06, 2), rng.uniform(0.9, 1.15))
        p = recolour(rng, blurred(p, rng.uniform(0.4, 2)) if rng.random() < 0.3 else p)
        pictures.append(np.concatenate(list(p[:, :, ::-1] if rng.random() < 0.5 else p), -1))       # (96, 96, 9)
        gap.append(truth["gap"][i] / GAP), lids.append(truth["blink"][i])
    pictures += [np.tile(not_a_face(rng, pictures[int(rng.integers(faces))][..., 3:6]), 3) for _ in range(faces // 4)]
    y = net((x := unit(np.stack(pictures), net)) + 0.02 * torch.randn_like(x))
    t = torch.tensor(np.array([gap, lids]), dtype=torch.float32)
    lips = F.smooth_l1_loss(y[:faces, 0], t[0], beta=0.1)
    shut = F.binary_cross_entropy_with_logits(y[:faces, 2], t[1])
    return 5 * lips + shut + F.binary_cross_entropy_with_logits(y[:, 1], (torch.arange(len(y)) < faces).float())


def train_network(kind, clips, cfg, out):
    """One proxy, from nothing, deterministic by the seed -> its network; writes KIND.safetensors into `out`."""
    torch.manual_seed(cfg.seed)
    net = SyncNet(SMALL) if kind == "sync" else CLASSES[kind]()
    steps, loss_of = getattr(cfg, f"{kind}_steps"), {"sync": sync_loss, "identity": identity_loss, "face": face_loss}[kind]
    optimizer = Muon(dict(net.named_parameters()), cfg.lr, weight_decay=1e-3)
    seen = []
    for step in tqdm(range(steps), f"proxy {kind}", unit="step", disable=None):
        rate = optimizer.param_groups[0]["lr"] = cfg.lr * min(1, (step + 1) / 50) * (0.5 + 0.5 * np.cos(np.pi * step / steps))
        loss = loss_of(net, clips, np.random.default_rng([cfg.seed, list(CLASSES).index(kind), step]))
        if not torch.isfinite(loss):
            raise ValueError(f"the loss of the {kind} proxy is {loss.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        seen.append(loss.item())
        if step % 50 == 49 or step == steps - 1:
            print(f"proxy {kind} step {step + 1:5d}/{steps} | loss {np.mean(seen[-50:]):.4f} | lr {rate:.1e}", flush=True)
    state = {k: v.half() if v.ndim > 1 else v for k, v in net.state_dict().items()}         # batch norm's variances would not fit into 16 bits
    how = {"steps": steps, "coded": cfg.coded, "lr": cfg.lr, "seed": cfg.seed, "clips": len({c.path for c in clips})}
    write_safetensors(out / f"{kind}.safetensors", state, {"proxy": kind, "config": json.dumps(asdict(SMALL) if kind == "sync" else {}),
                                                           "training": json.dumps(how)})
    return load_network(out / f"{kind}.safetensors")                                        # rounded: what is measured is what is shipped


def training_of(path):
    """What train_network wrote beside the weights of a proxy: its steps and settings."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata().get("training", "{}"))


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
                 "shuffled": (lips, heard[torch.from_numpy(np.random.default_rng(k).permutation(len(heard)))]),
                 "frozen": (lips[:1].expand_as(lips), heard)}
        for late in (1, 2, 5):                                                      # the picture shows frame i - late at frame i
            cases[f"late {late}"] = lips[:-late], heard[late:]
        for name, pair in cases.items():
            rows.setdefault(name, []).append(metrics.sync_scores(*pair, padded=False))
    now = {name: [r["sync_now"] for r in part] for name, part in rows.items()}
    return {name: {k: round(float(np.mean([r[k] for r in part])), 3) for k in part[0]} | {"auc_real_above": round(auc(now["real"], now[name]), 3)}
            for name, part in rows.items()}


def identity_scale(net, clips, strangers):
    """Cosines of two moments of one person, of two people, of a face and its blurred self; the AUC; Frechet distances of the features. `strangers`,
    clips of other folders, are people too: without them, a folder of one person could say nothing (and one person's moments are of two clips)."""
    first, last, soft, sums = [], [], [], {k: Gaussian() for k in ("half a", "half b", "blurred")}
    for k, clip in enumerate(clips):
        pictures, box = np.array(clip.frames[::8]), box_of(clip.path)
        vectors, features = read_identity(net, pictures, box)
        blur_vectors, blur_features = read_identity(net, blurred(pictures, 1.5), box)
        first.append(vectors[0]), last.append(vectors[-1]), soft.append(blur_vectors[-1])
        sums["half a" if k % 2 else "half b"].add(features)
        if k % 2 == 0:
            sums["blurred"].add(blur_features)                                      # of half b: as many, and never the same clips
    others = [read_identity(net, np.array(c.frames[-1:]), box_of(c.path))[0][0] for c in strangers]
    who, whom = (np.array([c.identity for c in part]) for part in (clips, [*clips, *strangers]))
    cosine, one = np.array(first) @ np.array(last + others).T, who[:, None] == whom
    apart = np.add.outer(range(len(clips)), -np.arange(len(whom))) != 0             # two clips, not two moments of one
    same, other = cosine[one & apart if len(set(who)) == 1 else one], cosine[~one]
    out = {"people": len(set(whom)), "same": same.mean(), "blurred": (np.array(first) * soft).sum(1).mean()}
    out |= {"other": other.mean(), "auc_same_above_other": auc(same, other)} if len(other) else {}
    with warnings.catch_warnings(action="ignore"):                                  # few clips: the number is for scale only
        out |= {"frechet_real_real": frechet(sums["half a"], sums["half b"]), "frechet_blurred": frechet(sums["half a"], sums["blurred"])}
    return {k: round(float(v), 4) for k, v in out.items()}


def face_scale(net, clips, coded=()):
    """Measured gap and lids against the truth, or, for real clips, against what the phones lead us to expect (0.67 is a landmark tracker's).
    coded: the same clips as the VAE shows them, whose gap is measured as well."""
    rows, lids, faces, chaos = [], [], [], []
    for k, clip in enumerate(clips):
        frames, box, truth, phones = np.array(clip.frames[:250]), box_of(clip.path), true_curves(clip.path), phones_of(clip.path)
        gap, lid, face = read_faces(net, frames, box)
        rule = lip_opening(mouth_curves(phones, len(gap))) if phones else None
        curve, speech = truth.get("gap", rule), speech_frames(phones, np.array(clip.audio) / 32768, len(gap))
        faces += list(face)
        chaos += list(read_faces(net, np.stack([not_a_face(np.random.default_rng([k, i]), f) for i, f in enumerate(frames[:9])]), box)[2])
        if curve is not None:
            rows.append({"mouth_correlation": correlation(gap, curve[:len(gap)], speech), "late_1": correlation(gap, curve[:len(gap)], speech, -1)})
        if len(truth) == 2:
            rows[-1]["gap_error"] = np.abs(gap - truth["gap"][:len(gap)]).mean()
            lids += [(truth["blink"][:len(gap)], lid, blinks(truth["blink"][:len(gap)]), blinks(lid))]
    out = {k: np.nanmean([r[k] for r in rows if k in r]) for k in {k for r in rows for k in r}}
    if coded and rows:
        out["mouth_correlation_vae"] = face_scale(net, coded)["mouth_correlation"]
    if lids:
        true, seen, shut, found = (np.concatenate(x) for x in zip(*lids))
        near = [np.abs(np.subtract.outer(a, b)) <= 3 for _, _, a, b in lids]         # a blink seen within 3 frames of a true one is right
        out |= {"lids_correlation": np.corrcoef(true, seen)[0, 1]} if true.std() * seen.std() > 0 else {}       # nobody blinks: nothing to say
        out |= {"blinks_true": len(shut), "blinks_seen": len(found),
                "blinks_recall": sum(x.any(1).sum() for x in near) / max(1, len(shut)),
                "blinks_precision": sum(x.any(0).sum() for x in near) / max(1, len(found))}
    out |= {"faces_seen": np.mean(np.array(faces) > 0.5), "faces_seen_where_none_is": np.mean(np.array(chaos) > 0.5)}
    out = {k: round(float(v), 4) for k, v in sorted(out.items()) if np.isfinite(v)}     # nan: nothing to say
    return out | {"against": "the sidecar's gap" if lids else "the rule from phones"}


# ------------------------------------------------------------------------------------------------------------------ main


def main(argv=None):
    parser = argparse.ArgumentParser(prog="evaluate.py train-proxies", description=__doc__.split("\n")[0])
    parser.add_argument("--data", nargs="+", required=True, help="folders of clips; those with puppets' sidecars teach lips and lids")
    parser.add_argument("--cache", nargs="*", help="where the decoded frames are kept, one for every data folder (FOLDER/.cache-128)")
    parser.add_argument("--weights", type=Path, default=Path(__file__).parent / "weights" / "tiny", help="where the VAE lies (%(default)s)")
    parser.add_argument("--out", type=Path, help="their folder (WEIGHTS/proxies)")
    parser.add_argument("--nets", nargs="+", choices=list(CLASSES), default=list(CLASSES), help="which networks to train (all)")
    parser.add_argument("--scale-only", action="store_true", help="train nothing: measure the proxies in --out on the held-out clips")
    parser.add_argument("--clips", type=int, default=40, help="held-out clips of a folder for the scale (%(default)s)")
    meaning = dict(re.findall(r"    (\w+): .*?# (.*)", inspect.getsource(ProxyConfig)))
    for field in fields(ProxyConfig):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default,
                            help=f"{meaning[field.name]} [{field.default}]")
    args = parser.parse_args(argv)
    try:
        one_per_folder(args, "cache")
        names = names_of(args.data)
        parts = [[[replace(c, identity=sidecar_text(c.path, "identity", str(c.path.parent)))
                   for c in ClipFolder(folder, 128, part, args.cache[i] if args.cache else None).clips if c.length >= 20 and len(c.audio)]
                  for i, folder in enumerate(args.data)] for part in ("train", "val")]
        cfg, begin = ProxyConfig(**{f.name: getattr(args, f.name) for f in fields(ProxyConfig)}), time.time()
        out, kinds = args.out or args.weights / "proxies", [] if args.scale_only else args.nets
        held, nets = [part[:args.clips] for part in parts[1]], load_proxies(out)
        if cfg.coded < 0 or max(map(len, held)) < 2 or not kinds and not nets:
            raise ValueError(f"--coded {cfg.coded} must be 0 or more, a folder must hold out two clips ({[len(x) for x in held]}), "
                             f"and --scale-only needs proxies in {out}")
        vae, about = load_vae(args.weights) if cfg.coded else None, args.weights / "config.json"
        length = int(json.loads(about.read_text(encoding="utf-8")).get("frames", CHUNK)) if cfg.coded else CHUNK
        useful = {kind: [[c for c in part if kind != "face" or len(true_curves(c.path)) == 2] for part in parts[0]] for kind in kinds}
        for kind, some in useful.items():                                           # all looked at before the first hour is spent
            if len({c.identity for part in some for c in part}) < 2:
                raise ValueError(f"the {kind} proxy needs clips of two people" + (" with puppets' sidecars (gap, blink)" if kind == "face" else ""))
        print(f"{[len(x) for x in parts[0]]} clips to train on, {[len(x) for x in parts[1]]} held out | {cfg}", flush=True)
        for kind, some in useful.items():
            nets[kind] = train_network(kind, lessons(some, cfg.coded, vae, length), cfg, out)
        strangers = lambda clips: [c for part in held if part is not clips for c in part]
        through = lambda clips: coded_copies(clips, len(clips), vae, length) if cfg.coded else []
        scales = {"sync": sync_scale, "identity": lambda net, clips: identity_scale(net, clips, strangers(clips)),
                  "face": lambda net, clips: face_scale(net, clips, through(clips))}
        scale = {name: {kind: scales[kind](net, clips) for kind, net in nets.items()}
                 for name, clips in zip(names, held) if len(clips) > 1}
        report = {"training": {kind: training_of(out / f"{kind}.safetensors") for kind in nets}, "minutes": round((time.time() - begin) / 60, 1),
                  "threads": torch.get_num_threads(), "scale": scale}
        write_json(out / "proxies.json", report)
    except (ValueError, OSError, KeyboardInterrupt) as error:
        parser.exit(2 if str(error) else 130, f"evaluate.py train-proxies: {str(error) or 'stopped; finished networks are kept'}\n")
    print(f"{json.dumps(scale, indent=1)}\nproxies: {out}\nminutes: {report['minutes']}")


if __name__ == "__main__":
    main()
