"""Reading a model while it runs: Z of chosen blocks, the final tokens, the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .tower import Tower


class Seen(Exception):
    """Ends a forward once everything asked for has been seen."""


@dataclass
class Observation:
    """What one forward showed.

    Args:
        z: Z (B, N, D), or what was kept of it, by block.
        states: The hidden states X (B, N, D) after a block, by block.
        tokens: The tokens (B, N, D) after the last norm.
    """

    z: dict[int, Tensor] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None


def _all_of(z: Tensor) -> Tensor:
    return z


def _store(place: dict[int, Tensor], index: int, keep: Callable[[Tensor], Tensor], value: Tensor) -> None:
    place[index] = keep(value)


@contextmanager
def observe(
    tower: Tower,
    blocks: Iterable[int] = (),
    tokens: bool = False,
    states: Iterable[int] = (),
    keep: Callable[[Tensor], Tensor] = _all_of,
) -> Iterator[Observation]:
    """Watch the forwards made inside the context.

    Args:
        tower: Of the model that runs.
        blocks: The blocks whose Z to keep.
        tokens: Whether to keep the tokens after the last norm, or after the last block where no norm sees them all.
        states: The blocks whose output to keep.
        keep: What to keep of each Z.
    """
    seen = Observation()

    def set_tokens(value: Tensor) -> None:
        seen.tokens = value

    with ExitStack() as hooks:

        def watch(module: nn.Module, put: Callable[[Tensor], object]) -> None:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                put(tower.patches_last(output[0] if isinstance(output, tuple) else output))

            hooks.callback(module.register_forward_hook(hook).remove)

        for index in blocks:
            watch(tower.msa_slot(index), partial(_store, seen.z, index, keep))
        for index in states:
            watch(tower.blocks[index], partial(_store, seen.states, index, _all_of))
        if tokens:
            watch(tower.last_module(), set_tokens)
        yield seen


@contextmanager
def _stopping_after(module: nn.Module) -> Iterator[None]:
    """End a forward made inside the context once this module has run. After every other hook on it."""

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise Seen

    handle = module.register_forward_hook(stop)
    try:
        yield
    except Seen:
        pass
    finally:
        handle.remove()


def z_of(tower: Tower, blocks: Iterable[int], images: Tensor) -> dict[int, Tensor]:
    """Z (B, N, D) of chosen blocks, by block; the tower runs no further than the last of them."""
    blocks = sorted(blocks)
    with observe(tower, blocks) as seen, _stopping_after(tower.msa_slot(blocks[-1])):
        tower.module(images)
    return seen.z


def states_of(tower: Tower, index: int, images: Tensor) -> Tensor:
    """X (B, N, D) after a block, the patches last; the tower runs no further."""
    device = next(tower.module.parameters()).device
    with observe(tower, states=[index]) as seen, _stopping_after(tower.blocks[index]):
        tower.module(images.to(device))
    return seen.states[index]


def pixels_of(batch: Any) -> Tensor:
    """The images (B, C, H, W) of a batch: the batch itself, the first of a pair, or ``pixel_values`` of a mapping.

    Raises:
        TypeError: The batch is none of these.
    """
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    elif isinstance(batch, Mapping):
        batch = batch.get("pixel_values")
    if not isinstance(batch, Tensor):
        raise TypeError(
            "a batch must be images (B, C, H, W), a pair of images and labels, or a mapping with pixel_values, got "
            f"{type(batch).__name__}"
        )
    return batch


def labels_of(batch: Any) -> Tensor | None:
    """The labels (B,) of a batch: the second of a pair, or ``labels`` of a mapping; None where there are none."""
    if isinstance(batch, (tuple, list)):
        return batch[1] if len(batch) > 1 else None
    return batch.get("labels") if isinstance(batch, Mapping) else None


def logits_of(output: Any) -> Tensor | None:
    """The logits (B, classes) in a classifier's output; None where the model is no classifier."""
    if isinstance(output, Tensor):
        return output if output.ndim == 2 else None
    if isinstance(output, tuple) and not hasattr(output, "logits"):  # timm's distilled models, in training
        return torch.stack(output).mean(dim=0)
    return getattr(output, "logits", None)


def num_classes_of(model: Any) -> int | None:
    """The number of classes of a classifier; None for a model without a classifier."""
    if hasattr(model, "config"):
        return model.config.num_labels if "ForImageClassification" in type(model).__name__ else None
    return getattr(model, "num_classes", 0) or None


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Run models in evaluation mode and without gradients, then put their modes back."""
    modes = [{module: module.training for module in model.modules()} for model in models]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for states in modes:
            for module, training in states.items():
                module.training = training


@dataclass(frozen=True)
class Outputs:
    """What the loss compares, in float32.

    Args:
        logits: (B, classes), or None.
        tokens: The tokens after the last norm (B, N, D).
        states: The hidden states (B, N, D) after chosen blocks, by block.
    """

    logits: Tensor | None
    tokens: Tensor
    states: Mapping[int, Tensor] = field(default_factory=dict)


def outputs_of(model: nn.Module, tower: Tower, images: Tensor, states: Iterable[int] = ()) -> Outputs:
    """Run a model, which may be wrapped, and keep what the loss compares.

    Args:
        model: The model to call.
        tower: The tower inside it.
        images: (B, C, H, W).
        states: The blocks whose output to keep.
    """
    with observe(tower, tokens=True, states=states) as seen:
        output = model(images)
    pools = getattr(model, "module", model) is tower.module and getattr(tower.module, "num_classes", None) == 0
    logits = None if pools else logits_of(output)  # timm without a head: (B, D), as logits would be, but no classes
    assert seen.tokens is not None
    between = {index: state.float() for index, state in seen.states.items()}
    return Outputs(None if logits is None else logits.float(), seen.tokens.float(), between)
