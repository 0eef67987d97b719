"""What a distillation trains, and with which optimizer."""

from __future__ import annotations

import torch
from torch import nn

from ..tasks.classification import Logits
from ..tasks.finding import task_of
from ..tasks.task import Task
from ..tower import Tower
from .muon import Muon

LEARNING_RATE = 1e-3
MUON_LEARNING_RATE = 7e-4
WEIGHT_DECAY = 0.01


def freeze_untouched(model: nn.Module, task: Task | None = None) -> int:
    """Freeze what the cut did not change: the embeddings and the blocks before the first skipped or narrower one.

    They give exactly what the teacher's give. Beyond the tower, a linear head of logits is trained with it; a decoder
    stays the teacher's, and what it makes of the tokens trains these.

    Args:
        model: A cut model.
        task: What it is for; found when left out.

    Returns:
        The number of parameters that remain trainable.
    """
    tower, task = Tower.of(model), task_of(model) if task is None else task
    blocks, first = tower.family.block_list(tower.module), tower.first_changed
    later = [
        tower.module.get_submodule(path)  # whole, with what merges patches
        for number, stage in enumerate(tower.stages)
        if stage.blocks.start > first
        for path in tower.family.stage_parts(tower.module, number)
    ]
    trained: list[nn.Module] = [*blocks[first:], *later, tower.last_module()]
    keep = {id(parameter) for module in trained for parameter in module.parameters()}
    if isinstance(task, Logits):
        inside = {id(parameter) for parameter in tower.module.parameters()}
        head = {
            id(p) for name, p in model.named_parameters() if id(p) not in inside or name.startswith(("head", "fc_norm"))
        }
        keep |= head
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in keep)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def optimizers(
    model: nn.Module,
    *,
    learning_rate: float = LEARNING_RATE,
    muon_learning_rate: float = MUON_LEARNING_RATE,
    weight_decay: float = WEIGHT_DECAY,
) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices inside the blocks, AdamW for all the rest.

    A converted model starts close to its teacher and has few steps to spend; Muon's orthogonal updates spend them
    better. With a Muon rate of 0, AdamW trains everything. Only what requires a gradient is trained: see
    `freeze_untouched`.

    Args:
        model: A vision transformer of a supported family, cut or not.
        learning_rate: Of AdamW.
        muon_learning_rate: Of Muon.
        weight_decay: Decoupled, of all matrices.
    """
    tower = Tower.of(model)
    inside = {id(p) for p in tower.family.block_list(tower.module).parameters() if p.ndim == 2}
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if id(p) in inside and muon_learning_rate > 0]
    chosen = {id(p) for p in matrices}
    rest = [p for p in trainable if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=(0.9, 0.98))
    if not matrices:
        return [adamw]
    return [adamw, Muon(matrices, lr=muon_learning_rate, weight_decay=weight_decay)]
