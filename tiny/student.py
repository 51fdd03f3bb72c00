"""Stage 2 with the tricks that made the shipped student: this file *is* the difference.

    python -m tiny.student --data PUPPETS GRID --weights weights/tiny

distill_student.py's loop and losses are used as they are. What is handed to them instead:
    optimiser   Muon for the matrices of the blocks (tiny/muon.py)
    rollout     teacher forcing: steps 2 and 3 start from the noised ground truth
    guide       masked audio guidance and motion guidance of the real score (tiny/model.py)
    reg_weight  Eq. 7 only from a later step on; the earlier ones can predict a blur only

The paper has none of it. With teacher forcing the student is trained on inputs that inference does
not give it, so this is not the paper's AKD. tiny/README.md says what each bought, as measured.
Shapes: as in distill_student.py.
"""
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common import PresetOnly, one_line_errors, parse_args, run_folder
from distill_student import Files, StudentConfig, check, forward, run
from dit import add_noise, x0_from_velocity
from tiny.model import make_guide
from tiny.teacher import muon
from tre import overwrite_continuity

# ------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class TinyStudentConfig(StudentConfig):
    steps: int = 140                        # critic updates
    rollout_chunks: int = 28                # K, chunks of a video
    timestep_shift: float = 2.0             # of the student's steps: 1, 0.86, 0.67, 0.4
    lr: float = 1e-4                        # of AdamW; Muon's is ten times as high
    lr_critic: float = 3e-4                 # of the critic's
    guidance: float | None = 3.0            # of the real score
    lambda_reg: float = 4.0                 # weight of Eq. 7 in Eq. 8
    offsets: PresetOnly[int] = 1            # times a clip is cut into chunks
    references: PresetOnly[int] = 1         # chunks of a clip with which a video can begin
    teacher_forcing: int = 2                # steps after the first that start from the noised truth
    anchor_from_step: int = 1               # first of the student's steps with Eq. 7
    guidance_sharpness: float = 16.0        # of the guidance mask; 0: guidance everywhere
    motion_guidance: float = 1.5            # away from the still portrait; 1: none


PRESETS = {"tiny": TinyStudentConfig()}

# ------------------------------------------------------------------------------------------- tricks


@torch.no_grad()
def rollout_with_teacher_forcing(student, batch, sigmas, steps):
    """As distill_student.rollout, but the inputs of `steps` steps after the first are the noised
    ground truth instead of the last prediction.

    The head stays where the ground-truth video has it, so that the regression loss and the teacher
    ask for a face at its place."""
    kappa = batch["kappa_student"]
    x = batch["noise"][:, 0]
    inputs, predictions = [], []
    for step, sigma in enumerate(sigmas):
        v = forward(student, x, torch.full((len(x),), sigma, device=x.device), batch, kappa)
        x0 = x0_from_velocity(x, v, sigma)
        x0 = torch.where(batch["loss_mask"] > 0, x0, overwrite_continuity(x0, kappa))
        inputs.append(x)
        predictions.append(x0)
        if step + 1 < len(sigmas):
            basis = batch["latents"] if step < steps else x0
            x = add_noise(basis, batch["noise"][:, step + 1], sigmas[step + 1])
    return torch.stack(inputs, 1), torch.stack(predictions, 1)


def late_regression(exit_step, first):
    """1 for rows that exit at step `first` or later, else 0."""
    return (exit_step >= first).float()


def train_arguments(cfg):
    """What distill_student.train is given beside the paper's."""
    return {"rollout": partial(rollout_with_teacher_forcing, steps=cfg.teacher_forcing),
            "make_optimizer": muon,
            "guide": make_guide(cfg.guidance_sharpness, cfg.motion_guidance),
            "reg_weight": partial(late_regression, first=cfg.anchor_from_step)}

# --------------------------------------------------------------------------------------------- main


@dataclass(frozen=True)
class TinyFiles(Files):
    data: tuple[Path, ...] = field()        # folders of clips, see data.py
    preset: PresetOnly[str] = "tiny"
    run_dir: Path = Path("runs/tiny-student")   # checkpoint, log, samples
    plan_memory: PresetOnly[None] = None    # only for the paper's presets


def check_tiny(cfg):
    """ValueError, in one line, for tricks that make no sense together."""
    if not 0 <= cfg.teacher_forcing < max(1, cfg.denoising_steps - 1):
        raise ValueError(f"--teacher-forcing {cfg.teacher_forcing} must leave the last step the "
                         "student's own prediction")
    if not all(0 <= x < np.inf for x in (cfg.guidance_sharpness, cfg.motion_guidance)):
        raise ValueError("--guidance-sharpness and --motion-guidance must be 0 or more")
    if cfg.motion_guidance != 1 and (cfg.guidance == 1 or cfg.guidance_sharpness == 0):
        raise ValueError(f"--motion-guidance {cfg.motion_guidance} needs --guidance other than 1 "
                         "and --guidance-sharpness over 0")


def main(argv=None):
    files, cfg = parse_args(__doc__, TinyFiles, PRESETS, argv)
    stopped = "stopped; --resume continues from the last checkpoint"
    with one_line_errors("tiny.student", stopped), run_folder(files):
        check(cfg, int(os.environ.get("WORLD_SIZE", 1)))
        check_tiny(cfg)
        run(files, cfg, **train_arguments(cfg))


if __name__ == "__main__":
    main()
