"""Reading a model while it runs: Z of chosen blocks, the final tokens, the logits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .config import SkipatConfig
from .families import find_tower
from .family import Family
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
    def skip(self) -> tuple[int, ...]:
        """The skipped blocks."""
        return self.config.skip

    @property
    def num_prefix_tokens(self) -> int:
        """The number of tokens that are no patches; `observe` and `z_of` put all of them before the patches."""
        return self.family.num_prefix_tokens(self.module) + self.family.num_suffix_tokens(self.module)

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
            return self.family.block_list(self.module)[-1]
        return self.module.get_submodule(self.family.final_norm)

    def msa_slot(self, index: int) -> nn.Module:
        """What makes Z in a block: its MSA, or what stands in its place."""
        return self.family.block_list(self.module)[index].get_submodule(self.family.attention)


class _Seen(Exception):
    """Ends a forward once everything asked for has been seen."""


@dataclass
class Observation:
    """What one forward showed: Z by block (B, N, D), and the tokens after the last norm (B, N, D)."""

    z: dict[int, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None


@contextmanager
def observe(tower: Tower, blocks: Iterable[int] = (), tokens: bool = False) -> Iterator[Observation]:
    """Watch the forwards made inside the context.

    Args:
        tower: Of the model that runs.
        blocks: The blocks whose Z to keep.
        tokens: Whether to keep the tokens after the last norm, or after the last block where no norm sees them all.
    """
    seen = Observation()

    def keep_z(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen.z[index] = tower.patches_last(output[0] if isinstance(output, tuple) else output)

        return hook

    def keep_tokens(module: nn.Module, args: Any, output: Any) -> None:
        seen.tokens = tower.patches_last(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        for index in blocks:
            handle = tower.msa_slot(index).register_forward_hook(keep_z(index))
            hooks.callback(handle.remove)
        if tokens:
            hooks.callback(tower.last_module().register_forward_hook(keep_tokens).remove)
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
