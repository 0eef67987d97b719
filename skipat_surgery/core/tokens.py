"""Which tokens of an image are patches, and which are special: those before and after the patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Special:
    """Where the tokens that are no patches lie: `prefix` of them before the patches, `suffix` after them."""

    prefix: int
    suffix: int

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """Those entries of a dimension as long as the tokens, the prefix first."""
        first = x.narrow(dim, 0, self.prefix)
        if self.suffix == 0:
            return first
        return torch.cat([first, x.narrow(dim, x.shape[dim] - self.suffix, self.suffix)], dim=dim)


@dataclass(frozen=True)
class Patches:
    """Where the patches lie: after `prefix` tokens and before `suffix`."""

    prefix: int
    suffix: int

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """Those entries of a dimension as long as the tokens."""
        return x.narrow(dim, self.prefix, x.shape[dim] - self.prefix - self.suffix)
