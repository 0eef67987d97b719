"""Which tokens of an image are patches, and which are special: those before and after the patches."""

from __future__ import annotations

from collections.abc import Iterable
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
        first = _part(x, dim, slice(self.prefix))
        return torch.cat([first, _part(x, dim, slice(-self.suffix, None))], dim=dim) if self.suffix else first


@dataclass(frozen=True)
class Patches:
    """Where the patches lie: after `prefix` tokens and before `suffix`."""

    prefix: int
    suffix: int

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """Those entries of a dimension as long as the tokens."""
        return _part(x, dim, slice(self.prefix, -self.suffix if self.suffix else None))


def _part(x: Tensor, dim: int, which: slice) -> Tensor:
    # A length that is computed from a shape, as `narrow` takes it, is a tensor in a trace: OpenVINO converts none.
    return x[(slice(None),) * (dim % x.ndim) + (which,)]


def by(sides: Iterable[int]) -> str:
    """4×5 of the sides of a grid or a kernel."""
    return "×".join(map(str, sides))
