"""Images packed into one sequence, as in Qwen's towers: laid out for Φ with a row of places for each, packed again.

Φ and what is kept of the MSA run on the images side by side, padded to the largest of them, so that one mechanism
serves padded and packed hosts. All else of a block stays packed: only Φ works on padding, where sizes differ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .ragged import Layout, Ragged

BOUNDS = "cu_seqlens"  # where what sees itself begins in the sequence, which every block of these towers is given
Given = TypeVar("Given", bound=tuple[Any, ...])


@dataclass(frozen=True)
class Packed(Ragged):
    """The grids of B images whose T patches follow one another in one sequence. A frame of a video is an image.

    Args:
        places: (B, N), where in the sequence each patch is, row by row; 0 for padding.
        back: (T,), where among the B·N places each patch of the sequence is.
        windows: Where each image lies window by window, the layout of the windows as if each was an image.
    """

    places: Tensor
    back: Tensor
    windows: Packed | None = None

    @classmethod
    def of(cls, sizes: Tensor, merge: int = 1) -> Packed:
        """Of images whose patches lie row by row, or of each `merge`×`merge` patches together."""
        counts = sizes.prod(dim=1)
        grids = Ragged(sizes, int(counts.max()))
        (row, column), real = grids.at(), grids.real
        first = (counts.cumsum(0) - counts)[:, None]
        block = row // merge * (sizes[:, 1:] // merge) + column // merge
        places = first + block * merge**2 + row % merge * merge + column % merge
        total = int(counts.sum())
        every = torch.arange(places.numel(), device=sizes.device)
        # Padding is written behind the sequence, and cut off.
        back = every.new_zeros(total + 1).scatter(0, torch.where(real, places, total).flatten(), every)[:total]
        return cls(sizes, grids.length, torch.where(real, places, 0), back)

    def to(self, *args: Any, **kwargs: Any) -> Packed:
        """On another device."""
        parts = {name: getattr(self, name).to(*args, **kwargs) for name in ("sizes", "places", "back")}
        windows = None if self.windows is None else self.windows.to(*args, **kwargs)
        return replace(self, **parts, windows=windows)

    @property
    def bounds(self) -> Tensor:
        """(B + 1,), where each image begins in the sequence, and where the last one ends."""
        return F.pad(self.sizes.prod(dim=1).cumsum(0, dtype=torch.int32), (1, 0))

    def lay_out(self, x: Tensor) -> Tensor:
        """(T, D) or (1, T, D) to (B, N, D)."""
        return x.reshape(-1, x.shape[-1])[self.places]

    def pack(self, x: Tensor, like: Tensor) -> Tensor:
        """(B, N, D) to a sequence (T, D) or (1, T, D), as another is."""
        return x.flatten(0, 1).index_select(0, self.back).view(*like.shape[:-1], x.shape[-1])

    def attended_in(self, kwargs: dict[str, Any]) -> Packed:
        """The layout of what sees itself in the MSA whose arguments these are: the images, or their windows."""
        within, bounds = self.windows, kwargs.get(BOUNDS)
        return self if within is None or bounds is None or len(bounds) == len(self.sizes) + 1 else within

    def arguments(self, args: Given, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Those of an MSA's forward, laid out: the hidden states and what rotates them. No image sees another, so that
        what keeps them apart in the sequence is left out."""
        x = args[0] if args else kwargs["hidden_states"]
        rotation = kwargs.get("position_embeddings")
        laid = None if rotation is None else tuple(map(self.lay_out, rotation))
        return (self.lay_out(x),), {"position_embeddings": laid}


def plain(grid: Layout) -> tuple[Any, ...]:
    """A layout as numbers and tensors alone: what hidden states carry is saved with them, and loaded without us."""
    if not isinstance(grid, Ragged):
        return grid
    if not isinstance(grid, Packed):
        return grid.sizes, grid.length
    windows = () if grid.windows is None else plain(grid.windows)
    return (grid.sizes, grid.length, grid.places, grid.back, *windows)


def layout_of(parts: tuple[Any, ...]) -> Layout:
    """Undo `plain`."""
    if not (isinstance(parts[0], Tensor) and parts[0].ndim == 2):  # traced, the sides of a grid are tensors too
        return parts
    if len(parts) == 2:
        return Ragged(*parts)
    sizes, length, places, back, *windows = parts
    return Packed(sizes, length, places, back, Packed(*windows) if windows else None)


def laid_out(grid: Layout | None, x: Tensor) -> Tensor:
    """Tokens (B, N, D): of packed images laid out, of a map (B, H, W, D) row by row."""
    if isinstance(grid, Packed):
        return grid.lay_out(x)
    return x.flatten(1, 2) if x.ndim == 4 else x


def packed_again(grid: Layout, x: Tensor, like: Tensor) -> Tensor:
    """Undo `laid_out`."""
    if isinstance(grid, Packed):
        return grid.pack(x, like)
    return x.unflatten(1, like.shape[1:3]) if like.ndim == 4 else x
