"""The patch grid in cells of p×p patches: averaged over, and copied back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Cells:
    """The special tokens, and the cells of the patch grid. Where the side does not divide it, the last are smaller.

    Args:
        prefix: Tokens before the patches.
        suffix: Tokens after them.
        grid: (H, W) of the patches.
        side: p, of a cell, in patches.

    Example:
        >>> cells = Cells(prefix=1, suffix=0, grid=(2, 3), side=2)
        >>> cells.of(torch.arange(7.0)[None, :, None]).flatten()
        tensor([0.0000, 3.0000, 4.5000])
    """

    prefix: int
    suffix: int
    grid: tuple[int, int]
    side: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of cells."""
        height, width = self.grid
        return -(-height // self.side), -(-width // self.side)

    def of(self, x: Tensor, dim: int = 1) -> Tensor:
        """The special tokens, the prefix first, and the cells' means, along a dimension as long as the tokens.

        Booleans are true for a cell where they are for all its tokens.
        """
        if x.dtype == torch.bool:
            return self.of(x.float(), dim) == 1
        if (x.ndim, dim) != (3, 1):
            last = x.movedim(dim, -1)
            found = self.of(last.reshape(-1, last.shape[-1], 1))
            return found.reshape(*last.shape[:-1], -1).movedim(-1, dim)
        prefix, patches, suffix = x.split((self.prefix, math.prod(self.grid), self.suffix), dim=1)
        return torch.cat([prefix, suffix, self.means(patches)], dim=1)

    def means(self, patches: Tensor) -> Tensor:
        """(B, H·W, D) to (B, M, D), the mean of each cell."""
        image = patches.unflatten(1, self.grid).permute(0, 3, 1, 2)
        return F.avg_pool2d(image, self.side, ceil_mode=self._uneven).permute(0, 2, 3, 1).flatten(1, 2)

    def spread(self, cells: Tensor) -> Tensor:
        """(B, M, D) to (B, H·W, D): each patch has what its cell has."""
        image = F.interpolate(cells.unflatten(1, self.shape).permute(0, 3, 1, 2), scale_factor=float(self.side))
        if self._uneven:
            image = image[:, :, : self.grid[0], : self.grid[1]]
        return image.permute(0, 2, 3, 1).flatten(1, 2)

    def rotation(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Cosines and sines (…, H·W, d) of a rotary embedding, at the cells' centres.

        A mean of angles' cosines and sines, at unit length, is that of the mean angle where a cell spans less than π.
        """
        pooled = [
            self.means(part.reshape(-1, *part.shape[-2:])).reshape(*part.shape[:-2], -1, part.shape[-1])
            for part in parts
        ]
        length = sum(part.square() for part in pooled).sqrt()  # type: ignore[union-attr]
        return tuple(part / length.clamp(min=1e-6) for part in pooled)

    def log_counts(self, like: Tensor) -> Tensor:
        """(P + S + M,): log of how many tokens each special token (one) and each cell stands for."""
        precision = torch.promote_types(like.dtype, torch.float32)
        ones = torch.ones(1, math.prod(self.grid), 1, dtype=precision, device=like.device)
        image = ones.unflatten(1, self.grid).permute(0, 3, 1, 2)
        padded = F.pad(image, (0, -self.grid[1] % self.side, 0, -self.grid[0] % self.side))
        counts = self.side**2 * F.avg_pool2d(padded, self.side).flatten()
        return F.pad(counts.log(), (self.prefix + self.suffix, 0)).to(like.dtype)

    @property
    def _uneven(self) -> bool:
        return bool(self.grid[0] % self.side or self.grid[1] % self.side)
