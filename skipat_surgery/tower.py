"""A model's vision tower: its blocks, its tokens, and what was cut."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .core.config import SkipatConfig
from .core.cutting import records_of
from .core.family import Family, Grid
from .core.finding import UnsupportedModelError, find_tower


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
            UnsupportedModelError: The model holds none, or several.
        """
        found = records_of(model)
        if len(found) > 1:
            raise UnsupportedModelError(
                f"{type(model).__name__} holds several cut vision transformers: {[path for path, _, _ in found]}. Pass "
                f"one of them, such as model.get_submodule({found[0][0]!r})"
            )
        if found:
            _, module, record = found[0]
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
    def num_special_tokens(self) -> int:
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
