"""Parameters and multiplications of a model."""

from __future__ import annotations

from collections.abc import Container, Sequence
from contextlib import suppress
from unittest import mock

import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..core.family import Family
from ..tower import Tower


def gflops(model: nn.Module, shape: Sequence[int] | None = None) -> float:
    """GFLOPs of a model's vision tower for one image or video, by torch's FLOP counter (a multiply-add is two).

    Args:
        model: The model.
        shape: Of the input, without the batch; that of the configured size when left out.
    """
    tower = Tower.of(model)
    total, _ = count_macs(tower.module, tower.family, shape)
    return 2 * total / 1e9


def count_parameters(module: nn.Module) -> int:
    """The number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(tower: nn.Module, family: Family, shape: Sequence[int] | None = None) -> tuple[int, list[int]]:
    """The MACs of a tower and of each of its blocks, for one input of this shape, or of the configured size."""
    training = tower.training
    tower.eval()
    try:
        counter = _counted(tower, family, family.shape_of_input(tower) if shape is None else shape)
    finally:
        tower.train(training)
    counts = counter.get_flop_counts()
    root = type(tower).__name__
    per_block = [sum(counts[f"{root}.{path}"].values()) // 2 for path in family.block_paths(tower)]
    return counter.get_total_flops() // 2, per_block


def _counted(tower: nn.Module, family: Family, shape: Sequence[int]) -> FlopCounterMode:
    """The counter after a forward that computes nothing."""
    with suppress(RuntimeError):
        return _forward(tower, family, shape, "meta")
    with suppress(RuntimeError):  # EoMT looks at the values of a buffer of its own
        return _forward(tower, family, shape, "meta", but=dict(tower.named_buffers(recurse=False)))
    # The host reads sizes or a mask out of tensors, and those on meta hold no values. Fake tensors keep those of the
    # few that are made of numbers.
    known = mock.patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", 64)
    fake = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    with sdpa_kernel(SDPBackend.MATH):  # the counter does not know the others of a CPU
        with suppress(fake_tensor.DynamicOutputShapeException), known, fake:
            return _forward(tower, family, shape, "cpu")
        # The Idefics of transformers 5.18 pick the patches of each image out, as many as there are.
        return _forward(tower, family, shape, "cpu", but=dict(tower.named_buffers()))


def _forward(
    tower: nn.Module, family: Family, shape: Sequence[int], device: str, but: Container[str] = ()
) -> FlopCounterMode:
    """Run one input, with all parameters and buffers empty but those of these names."""
    # One name for each: of a module that blocks share, torch would put back what it was given, not what was there.
    state = {
        f"{path}.{name}".removeprefix("."): tensor
        for path, module in tower.named_modules()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }
    empty = {name: torch.empty_like(tensor, device=device) for name, tensor in state.items() if name not in but}
    image = torch.empty(1, *shape, device=device, dtype=next(tower.parameters()).dtype)
    first, others = family.arguments(tower, image)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(tower, empty, (first,), others, tie_weights=False)
    return counter
