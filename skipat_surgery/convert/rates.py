"""How fast a model can be trained without losing the start that the closed form gave it: seen in a few steps.

The rates that suit a small classifier throw a large model far from a good start, and most of a short schedule is then
spent on coming back. So the first steps are tried, at full rates and at ever smaller ones, until they lower the loss
on images that they were not taken on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

# Tried in order. At the last it is taken as it is.
SCALES = (1.0, 0.3, 0.1, 0.03)
STEPS = 8


def probe(
    student: nn.Module,
    loss_of: Callable[[Any], Tensor],
    make: Callable[[float], list[torch.optim.Optimizer]],
    batches: Sequence[Any],
    max_grad_norm: float,
) -> float:
    """The largest of `SCALES` at which the first steps lower the loss; the model is left as it was.

    Args:
        student: The model to train.
        loss_of: From a batch, the loss, with a gradient.
        make: From a scale of the rates, the optimizers.
        batches: One to measure on, then `STEPS` to take a step on, at rates that rise to the full ones; further ones
            are not used, and fewer are gone through again.
        max_grad_norm: Gradients are clipped to this norm.
    """
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    buffers = [buffer.clone() for buffer in student.buffers()]
    held_out, *given = batches if len(batches) > 1 else [*batches, *batches]

    def put_back() -> None:
        with torch.no_grad():
            for tensor, value in zip([*trained, *student.buffers()], [*before, *buffers], strict=True):
                tensor.copy_(value)
        torch.clear_autocast_cache()

    def measured() -> float:
        with torch.no_grad():
            return float(loss_of(held_out))

    start = measured()
    for scale in SCALES:
        _warm_up(trained, loss_of, make(scale), given, max_grad_norm)
        gained = measured() < start
        put_back()
        if gained:
            return scale
    return SCALES[-1]


def _warm_up(
    trained: list[nn.Parameter],
    loss_of: Callable[[Any], Tensor],
    optimizers: list[torch.optim.Optimizer],
    batches: Sequence[Any],
    max_grad_norm: float,
) -> None:
    """Take `STEPS` steps, at rates that rise to the optimizers' own."""
    warm_ups = [LinearLR(optimizer, 1 / STEPS, total_iters=STEPS - 1) for optimizer in optimizers]
    for step in range(STEPS):
        loss_of(batches[step % len(batches)]).backward()
        nn.utils.clip_grad_norm_(trained, max_grad_norm)
        for optimizer, warm_up in zip(optimizers, warm_ups, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            warm_up.step()
        torch.clear_autocast_cache()
