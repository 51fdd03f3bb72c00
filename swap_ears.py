"""Other ears for a trained face: audio_proj learns to say with a new audio encoder what it said with the old one. Ours, not the paper's.

    python swap_ears.py --data CLIPS [CLIPS ...] --ears runs/ears --out weights/other     weights/tiny with other ears, in minutes: only sound is used

Hidden states of another encoder mean nothing to a trained DiT. All of them pass through audio_proj (Eq. 23), and what it makes of them, the audio
tokens, has to stay what the blocks know. So the old ears' tokens are the labels for the new ears' audio_proj: plain regression.
Where clips say how far the lips are open (puppets do), the labels are put right first: tokens are read for the opening by a linear map, and moved
along the line on which they change with it until they tell the true one. New ears that hear lips better then say so. Train the teacher on, after it.

Shapes: N chunks of T frames, F = 1 + (T-1)/4 latents, L A layers and width of hidden states, S D tokens of a latent; P = S * D.
"""
import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tqdm import tqdm

from audio import KINDS, AudioEncoder, AudioProjection, encoder_of
from checkpoint import write_json, write_safetensors
from chunks import one_per_folder
from data import ClipFolder
from infer import CHUNK, pick
from proxies import true_curves

# ----------------------------------------------------------------------------------------------------------------- sound


def hear(encoder, clips, T):
    """-> hidden states of the first and the last chunk of every clip, float16 (N, T, L, A)."""
    states = []
    for clip in tqdm(clips, "hearing", unit="clip", disable=None):
        sound = np.array(clip.audio) / np.float32(32768)
        states += [encoder.features(sound, start, T).half().cpu() for start in (0, clip.length - T)]
    return torch.stack(states)


def openings(clips, T):
    """-> gap between the lips in the same chunks, eye distances (N, F - 1, 4): four frames of each latent but the first; NaN where no one says."""
    rows = []
    for clip in clips:
        gap = np.full(clip.length, np.nan)
        said = true_curves(clip.path).get("gap", gap)[:clip.length]
        gap[:len(said)] = said                                                  # a sidecar may be a frame shorter than the video
        rows += [torch.from_numpy(gap[start + 1:start + T]).float().view(-1, 4) for start in (0, clip.length - T)]
    return torch.stack(rows)

# ---------------------------------------------------------------------------------------------------------------- labels


class Reading:
    """Tokens of a latent (..., P) <-> gaps of its four frames (..., 4): read by ridge regression; and how tokens move with what they tell."""

    def __init__(self, tokens, gaps):
        x, y = tokens.flatten(0, -2).double(), gaps.flatten(0, -2).double()    # (n, P), (n, 4)
        self.mean, self.gap = x.mean(0), y.mean(0)
        x, y = x - self.mean, y - self.gap
        self.map = torch.linalg.solve(x.T @ x + 1e-3 * x.square().sum(0).mean() * torch.eye(x.shape[1]), x.T @ y)      # (P, 4)
        told = x @ self.map
        self.along = torch.linalg.lstsq(told, x).solution                       # (4, P); along @ map = 1: what is written is what is read

    def read(self, tokens):
        return (tokens.double() - self.mean) @ self.map + self.gap

    def put_right(self, tokens, gaps):
        """-> tokens that read as `gaps`; where those are NaN, the tokens as they are."""
        wrong = (gaps - self.read(tokens)).nan_to_num(0.0)
        return (tokens.double() + wrong @ self.along).float()


def read_of(reading, tokens, gaps):
    """Mean over chunks of the correlation of what tokens tell with the true gaps; NaN if no chunk has any."""
    moving = [(told, gap) for told, gap in zip(reading.read(tokens), gaps) if gap.isfinite().all() and gap.std() > 1e-3]
    return float(np.mean([np.corrcoef(told.flatten(), gap.flatten())[0, 1] for told, gap in moving])) if moving else float("nan")

# ------------------------------------------------------------------------------------------------------------------- fit


def project(projection, states):
    """(N, T, L, A) -> (N, F, P), without gradient."""
    with torch.no_grad():
        return torch.cat([projection(part.float()).flatten(2) for part in states.split(64)])


def fit(projection, states, labels, steps, reading=None, gaps=None, seed=0):
    """The loop. projection AudioProjection, states (N, T, L, A), labels (N, F, P); AdamW, the rate falling to zero.

    reading, gaps (N, F - 1, 4): what is read of the lips shall be right as well: it is little of all that tokens hold."""
    optimizer, size = torch.optim.AdamW(projection.parameters(), 1e-3, weight_decay=0.01), labels.var()
    spread = gaps[gaps.isfinite()].var() if reading else 1.0
    for step in tqdm(range(steps), "fitting", unit="step", disable=None):
        rows = torch.from_numpy(np.random.default_rng((seed, step)).integers(0, len(states), 32))
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 50, 1.5 * (1 - step / steps))
        tokens = projection(states[rows].float()).flatten(2)                    # (32, F, P)
        loss = (tokens - labels[rows]).square().mean() / size
        if reading:
            loss = loss + 0.2 * (reading.read(tokens[:, 1:]) - gaps[rows]).nan_to_num(0.0).square().mean().float() / spread
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def swap(weights, config, ears, clips, held_out, steps, device="cpu"):
    """weights: folder of the face, config: its config.json; ears: AudioEncoder; clips, held_out: lists of Clip. -> tensors of the teacher, "dit" of
    config.json, figures"""
    if "dit" not in config:
        raise ValueError(f"{weights / 'config.json'} knows no \"dit\": there is no trained face here")
    old_ears, tensors = encoder_of(weights, config["audio"], device), load_file(weights / "teacher.safetensors")
    T, sizes = config.get("frames", CHUNK), (config["dit"]["dim"], config["dit"]["audio_tokens"], config["dit"]["audio_hidden"])
    torch.manual_seed(0)                                                        # where the sizes differ, the new one begins at random
    old, new = (AudioProjection(e.layers, e.dim, *sizes) for e in (old_ears, ears))
    mine = {name[11:]: tensor.float() for name, tensor in tensors.items() if name.startswith("audio_proj.")}
    old.load_state_dict(mine)
    same = {name: tensor for name, tensor in mine.items() if tensor.shape == new.state_dict()[name].shape}
    new.load_state_dict(same, strict=False)                                     # a start; all of it, if the sizes are the same
    clips, held_out = ([clip for clip in some if clip.length >= T and len(clip.audio)] for some in (clips, held_out))
    if not clips or not held_out:
        raise ValueError(f"{len(clips)} clips to learn from, {len(held_out)} held out, of {T} frames or more, with sound: one of each is needed")
    labels, gaps = project(old, hear(old_ears, clips, T)), openings(clips, T)
    known, test_labels, test_gaps = gaps.isfinite().flatten(1).all(1), project(old, hear(old_ears, held_out, T)), openings(held_out, T)
    figures, reading = {"clips": len(clips), "held_out": len(held_out)}, None
    if known.any():
        reading = Reading(labels[known, 1:], gaps[known])
        labels[:, 1:] = reading.put_right(labels[:, 1:], gaps)
    fit(new, states := hear(ears, clips, T), labels, steps, reading, gaps)
    tokens = project(new, hear(ears, held_out, T))
    figures["tokens_changed"] = ((tokens - test_labels).square().mean() / test_labels.var()).item()       # of the variance
    if reading:
        figures |= {f"lips_read_{when}": read_of(reading, told[:, 1:], test_gaps) for when, told in (("before", test_labels), ("after", tokens))}
    tensors |= {f"audio_proj.{name}": tensor.half() for name, tensor in new.state_dict().items()}
    return tensors, config["dit"] | {"audio_layers": states.shape[2], "audio_dim": states.shape[3]}, figures

# ------------------------------------------------------------------------------------------------------------------ main


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", nargs="+", required=True, help="folders of clips (see data.py): their sound, and what puppets say of their lips")
    p.add_argument("--cache", nargs="+", help="where data.py's decoded frames lie, one per folder (default: FOLDER/.cache-SIZE)")
    p.add_argument("--weights", type=Path, default=Path("weights/tiny"), help="folder of config.json, teacher.safetensors and the rest (%(default)s)")
    p.add_argument("--ears", required=True, help="the new ears: a folder of train_audio.py's, or a hub name")
    p.add_argument("--out", type=Path, required=True, help="new folder for the face with these ears; it has no student")
    p.add_argument("--steps", type=int, default=1500, help="of the fit, 32 chunks each (%(default)s)")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where the ears hear; auto: a GPU if there is one")
    args = p.parse_args(argv)
    try:
        one_per_folder(args, "cache")
        if args.out.exists() or args.steps < 1:
            raise ValueError(f"--out {args.out} must be a new folder, --steps 1 or more")
        config, device = json.loads((args.weights / "config.json").read_text(encoding="utf-8")), pick(args.device, "auto")[0]
        ears = AudioEncoder(args.ears, device)
        parts = [[clip for folder, cache in zip(args.data, args.cache or [None] * len(args.data), strict=True)
                  for clip in ClipFolder(folder, config["size"], part, cache).clips] for part in ("train", "val")]
        tensors, dit, figures = swap(args.weights, config, ears, *parts, args.steps, device)
        with safe_open(args.weights / "teacher.safetensors", "pt") as file:
            about = file.metadata() or {}
        old = [path.name for path in args.weights.glob("*.json")]               # figures of the other ears; not proxies/proxies.json
        other = shutil.ignore_patterns("student*", "teacher*", *KINDS, "*.part", *old)
        aside = args.out.with_name(args.out.name + ".part")
        shutil.rmtree(aside, ignore_errors=True)                                # of a run that was killed
        shutil.copytree(args.weights, aside, ignore=other)
        name = args.ears
        if Path(args.ears).is_dir():
            shutil.copytree(args.ears, aside / (name := ears.model.config.model_type))
        write_json(aside / "config.json", config | {"audio": name, "dit": dit})
        write_safetensors(aside / "teacher.safetensors", tensors, about)
        os.replace(aside, args.out)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        sys.exit(print(f"swap_ears.py: {' '.join(str(error).split())[:300]}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("swap_ears.py: stopped, nothing was written", file=sys.stderr) or 130)
    print("\n".join(f"{name}: {round(value, 4)}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
