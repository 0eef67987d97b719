"""Parameters and multiplications of a model."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from ..core.family import Family
from ..tower import Tower


def gflops(model: nn.Module) -> float:
    """GFLOPs of a model's vision tower for one image, by torch's FLOP counter (a multiply-add is two)."""
    tower = Tower.of(model)
    total, _ = count_macs(tower.module, tower.family)
    return 2 * total / 1e9


def count_parameters(module: nn.Module) -> int:
    """The number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(tower: nn.Module, family: Family) -> tuple[int, list[int]]:
    """The MACs of a tower and of each of its blocks, for one image of the configured size."""
    state = {**dict(tower.named_parameters()), **dict(tower.named_buffers())}
    on_meta = {name: tensor.detach().to("meta") for name, tensor in state.items()}
    dtype = next(tower.parameters()).dtype
    image = torch.empty(1, *family.image_size(tower), device="meta", dtype=dtype)
    training = tower.training
    tower.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(tower, on_meta, (image,))
    finally:
        tower.train(training)
    counts = counter.get_flop_counts()
    root = type(tower).__name__
    blocks = range(len(family.block_list(tower)))
    per_block = [sum(counts[f"{root}.{family.blocks}.{i}"].values()) // 2 for i in blocks]
    return counter.get_total_flops() // 2, per_block
