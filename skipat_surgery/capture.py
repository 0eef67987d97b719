"""Reading a model while it runs: Z of chosen blocks, the final tokens, the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .config import SkipatConfig
from .families import find_tower
from .family import Family, Grid
from .operation import record_of


@dataclass(frozen=True)
class Tower:
    """A model's vision tower, with its family and what was cut, which is nothing for an untouched model."""

    module: nn.Module
    family: Family
    config: SkipatConfig = field(default_factory=SkipatConfig)

    @classmethod
    def of(cls, model: nn.Module) -> Tower:
        """The tower of a model.

        Raises:
            UnsupportedModelError: The model holds none.
        """
        found = record_of(model)
        if found is not None:
            _, module, record = found
            return cls(module, record.family, record.config)
        _, module, family = find_tower(model)
        return cls(module, family)

    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        """The blocks, in order."""
        return self.family.block_list(self.module)

    @property
    def skip(self) -> tuple[int, ...]:
        """The skipped blocks."""
        return self.config.skip

    @property
    def num_prefix_tokens(self) -> int:
        """The number of tokens that are no patches; `observe` and `z_of` put all of them before the patches."""
        return self.family.num_prefix_tokens(self.module) + self.family.num_suffix_tokens(self.module)

    def grid(self, images: Tensor) -> Grid:
        """(H, W) of the patch grid of these images."""
        owner = self.module if self.family.embeddings is None else self.module.get_submodule(self.family.embeddings)
        return self.family.image_to_grid(owner, *images.shape[-2:])

    def patches_last(self, tokens: Tensor) -> Tensor:
        """(B, N, D) with the suffix tokens, where the family has any, moved before the patches."""
        suffix = self.family.num_suffix_tokens(self.module)
        if suffix == 0:
            return tokens
        prefix = self.family.num_prefix_tokens(self.module)
        return torch.cat([tokens[:, :prefix], tokens[:, -suffix:], tokens[:, prefix:-suffix]], dim=1)

    def last_module(self) -> nn.Module:
        """What the tokens leave the tower from: the norm after the last block, or that block where there is none."""
        if self.family.final_norm is None:
            return self.blocks[-1]
        return self.module.get_submodule(self.family.final_norm)

    def msa_slot(self, index: int) -> nn.Module:
        """What makes Z in a block: its MSA, or what stands in its place."""
        return self.blocks[index].get_submodule(self.family.attention)


def check_pair(model: nn.Module, teacher: nn.Module) -> tuple[Tower, Tower]:
    """The towers of a cut model and its teacher.

    Raises:
        ValueError: The model is not cut, or the teacher is.
    """
    student, original = Tower.of(model), Tower.of(teacher)
    if not student.skip:
        raise ValueError("the model is not cut: call skipat_surgery.apply(model, skip=…) first")
    if original.skip:
        raise ValueError("the teacher is cut; it must be the untouched model")
    return student, original


class _Seen(Exception):
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


def z_of(tower: Tower, blocks: Iterable[int], images: Tensor) -> dict[int, Tensor]:
    """Z (B, N, D) of chosen blocks, by block; the tower runs no further than the last of them."""
    blocks = sorted(blocks)

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _Seen

    with observe(tower, blocks) as seen:
        handle = tower.msa_slot(blocks[-1]).register_forward_hook(stop)
        try:
            tower.module(images)
        except _Seen:
            pass
        finally:
            handle.remove()
    return seen.z


def pixels_of(batch: Any) -> Tensor:
    """The images (B, C, H, W) of a batch, which may be a mapping with ``pixel_values``."""
    return batch if isinstance(batch, Tensor) else batch["pixel_values"]


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
