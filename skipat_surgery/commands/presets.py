"""How much to spend on a conversion: three sizes of solving, aligning and distilling.

Sizes are images, not minutes: what a step costs depends on the model and the machine. `teacher_steps` says what they
amount to in training steps of the untouched teacher, which a user has a feeling for.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..measure.counting import count_macs
from ..tower import Tower

# fast and standard see an image about once, so that they need no crops; long sees each of 50,000 a dozen times.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"solve_images": 2048, "max_steps": 110, "warmup_steps": 15, "eval_steps": 110, "checkpoint_steps": 55},
    "standard": {"max_steps": 540, "warmup_steps": 40, "eval_steps": 270, "checkpoint_steps": 180},
    "long": {
        "max_steps": 10000,
        "warmup_steps": 200,
        "min_crop_scale": 0.5,
        "eval_steps": 1000,
        "checkpoint_steps": 500,
    },
}


def teacher_steps(student: nn.Module, teacher: nn.Module, steps: int) -> float:
    """What a distillation costs in training steps of the teacher at the same batch size, by multiplications.

    A training step is a forward and a backward of twice its cost. In a distillation the blocks before the first skipped
    one run forward once, for both models; the rest runs forward in both, and backward in the student.
    """
    first = Tower.of(student).first_changed
    costs = []
    for model in (student, teacher):
        tower = Tower.of(model)
        total, by_block = count_macs(tower.module, tower.family)
        costs.append((total, sum(by_block[:first])))
    (mine, shared), (theirs, _) = costs
    return steps * (mine + (theirs - shared) + 2 * (mine - shared)) / (3 * theirs)
