"""The blocks before the first that the surgery changed are the teacher's own and frozen: run once, for both models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import Images
from ..core.carrying import first_argument
from ..observing import Outputs, outputs_of
from ..tasks.classification import Logits
from ..tasks.task import Task
from ..tasks.wrapping import unwrapped
from ..tower import Tower


def front(tower: Tower) -> list[nn.Module]:
    """The blocks of a cut model before the first that the surgery changed."""
    return list(tower.blocks[: tower.first_changed])


def train_mode(model: nn.Module, tower: Tower, task: Task | None) -> None:
    """Put a cut model into training mode, but for what is to stay as it is in the teacher.

    These are the frozen blocks, and decoders: see `optimizers.freeze_untouched`.
    """
    model.train()
    for block in front(tower):
        block.eval()
    if task is None or isinstance(task, Logits):
        return
    inside = set(tower.module.modules())
    for module in unwrapped(model).modules():
        if module not in inside and not any(part in inside for part in module.modules()):
            module.eval()


@contextmanager
def keep_input(block: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the hidden states (B, N, D) that a block is given while the context lasts."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(first_argument(args, kwargs).detach())

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def started_at(tower: Tower, first: int, x: Tensor) -> Iterator[None]:
    """Let a tower's blocks before `first` do nothing, and give block `first` these hidden states (B, N, D).

    What lies around the blocks runs as ever, so that the host's own loop stays in charge.
    """

    def hook(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if args:
            return (x, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": x}

    handle = tower.blocks[first].register_forward_pre_hook(hook, with_kwargs=True)
    idle = list(tower.blocks[:first])
    for block in idle:
        block.forward = _hand_on_first if tower.family.blocks_return_tuple else _hand_on
    try:
        yield
    finally:
        handle.remove()
        for block in idle:
            del block.forward


def _hand_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _hand_on_first(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return hidden_states, None


def outputs_of_both(
    student: tuple[nn.Module, Tower],
    teacher: tuple[nn.Module, Tower],
    images: Images,
    states: Iterable[int] = (),
    *,
    share: bool,
    task: Task | None = None,
) -> tuple[Outputs, Outputs]:
    """What a cut model and its teacher make of the same images, the teacher without gradients.

    Args:
        student: The cut model, which may be wrapped, and its tower.
        teacher: The model it learns from, and its tower.
        images: (B, C, H, W), or videos (B, T, C, H, W), or patches.
        states: The blocks whose output to keep.
        share: Run the blocks before the first that was changed once, for both: the teacher is the model that was cut,
            and they are frozen.
        task: What both are for; found when left out.
    """
    first = student[1].first_changed
    with keep_input(student[1].blocks[first]) as seen:
        found = outputs_of(*student, images, states, task)
    shared = started_at(teacher[1], first, seen[0]) if share else nullcontext()
    with torch.no_grad(), shared:
        return found, outputs_of(*teacher, images, states, task)
