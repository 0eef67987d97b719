"""Alike patches, taken together: each joins the seed that it is most alike, of which every p×p patches have one.

On the grid of a video, (T, H, W), seeds lie p apart along every axis: p×p×p patches have one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .padding import without_padding
from .ragged import Layout, Ragged, places_in, select
from .tokens import Patches, Special


@dataclass(frozen=True)
class Clusters:
    """The special tokens, each by itself, and the clusters of an image's patches.

    Nothing but the members depends on the image: there are as many clusters as seeds, and no sorting is needed.

    Args:
        prefix: Tokens before the patches.
        suffix: Tokens after them.
        seeds: (M,), which patches the seeds are: the first of every p along each axis of the grid; (B, M) where grids
            differ by image.
        places: (B, N), the place of each token among the special tokens, the prefix first, and the M clusters.
        attended: (B, N), which tokens are no padding, and so count in their cluster; None where all do.

    Examples:
        >>> h = torch.tensor([[[9.0, 9], [1, 0], [0, 1], [0.1, 3], [3, 0.1]]])  # CLS, and a row of four patches
        >>> Clusters.of(h, prefix=1, suffix=0, grid=(2, 2), side=2).places
        tensor([[0, 1, 1, 1, 1]])
        >>> Clusters.of(h, prefix=1, suffix=0, grid=(1, 4), side=2).places
        tensor([[0, 1, 2, 2, 1]])
    """

    prefix: int
    suffix: int
    seeds: Tensor
    places: Tensor
    attended: Tensor | None = None

    @classmethod
    def of(
        cls,
        h: Tensor,
        prefix: int,
        suffix: int,
        grid: Layout,
        side: int,
        attended: Tensor | None = None,
    ) -> Clusters:
        """The clusters of tokens (B, N, D) by the cosine of their values, with seeds `side` apart along each axis.

        No token joins a seed that is padding, which is not `attended` (B or 1, N).
        """
        count = places_in(grid)
        with torch.no_grad():
            seeds, there, own = _seeds(grid, side, h.device)
            alike = h @ F.normalize(select(h, prefix + seeds, 1), dim=-1).transpose(-2, -1)
            if attended is not None:
                attended = attended.expand(h.shape[0], -1)
                there = select(attended, prefix + seeds, 1) & there
                alike = alike.masked_fill(~there[:, None], -torch.inf)
            # A seed stays its own even where another is its like, so that no cluster is empty.
            found = alike[:, prefix : prefix + count].argmax(dim=-1)
            places = prefix + suffix + torch.where(own < 0, found, own)
            special = torch.arange(prefix + suffix, device=h.device).expand(h.shape[0], -1)
            places = torch.cat([special[:, :prefix], places, special[:, prefix:]], dim=1)
        return cls(prefix, suffix, seeds, places, attended)

    @property
    def special(self) -> int:
        """How many special tokens there are."""
        return self.prefix + self.suffix

    @property
    def patches(self) -> Patches:
        """Where the patches lie."""
        return Patches(self.prefix, self.suffix)

    def counts(self) -> Tensor:
        """(B, P + S + M), how many tokens each special token (one) and each cluster holds; padding is none."""
        return self._sums(torch.ones_like(self.places)[..., None])[..., 0]

    def means(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, P + S + M, D): the special tokens, and the mean of each cluster."""
        counts = self.counts() if self.attended is None else self.counts().clamp(min=1)
        return self._sums(x) / counts[..., None].to(x.dtype)

    def spread(self, values: Tensor) -> Tensor:
        """(B, M, D) to (B, H·W, D): each patch has what its cluster has."""
        places = self.patches.take(self.places) - self.special
        index = _flat(places, values.shape[1])
        return values.flatten(0, 1).index_select(0, index).unflatten(0, places.shape)

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """The special tokens and the seeds, (P + S + M) of a dimension that is as long as the tokens."""
        seeds = select(x, self.prefix + self.seeds, dim)
        return torch.cat([Special(self.prefix, self.suffix).take(x, dim), seeds], dim=dim)

    def _sums(self, x: Tensor) -> Tensor:
        size = self.special + self.seeds.shape[-1]
        x = without_padding(x, self.attended)
        if torch.compiler.is_exporting():  # OpenVINO converts no index_add that an exported program holds
            index = self.places[..., None].expand_as(x)
            return x.new_zeros(x.shape[0], size, x.shape[-1]).scatter_add(1, index, x)
        sums = x.new_zeros(x.shape[0] * size, x.shape[-1])
        return sums.index_add(0, _flat(self.places, size), x.flatten(0, 1)).unflatten(0, (x.shape[0], size))


@dataclass(frozen=True)
class Clustered:
    """What is known of clusters.

    Args:
        clusters: The clusters.
        x: (B, M, D), the means of LN(X).
        z: (B, M, D), what the MSA makes of them; (B, H·W, D) where every patch asks for itself.
        by_image: Of clusters of the patches of windows, what lays their patches out image by image.
    """

    clusters: Clusters
    x: Tensor
    z: Tensor
    by_image: Callable[[Tensor], Tensor] | None = None

    def patches(self) -> Tensor:
        """Z of each patch, (B, H·W, D)."""
        if self.z.shape[1] <= self.x.shape[1]:
            return self.spread(self.z)
        return self.z if self.by_image is None else self.by_image(self.z)

    def spread(self, values: Tensor) -> Tensor:
        """(B, M, D) to (B, H·W, D): each patch has what its cluster has."""
        patches = self.clusters.spread(values)
        return patches if self.by_image is None else self.by_image(patches)


def _flat(places: Tensor, size: int) -> Tensor:
    """Places (B, n) of each of B images, as places in all of them, one after the other."""
    first = size * torch.arange(places.shape[0], device=places.device)
    return (places + first[:, None]).flatten()


def _seeds(grid: Layout, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The patches that are seeds, whether an image has them, and which seed each patch is, or -1."""
    if isinstance(grid, Ragged):
        return grid.seeds(side)
    places = torch.arange(math.prod(grid), device=device)
    seeds = places.view(grid)[(slice(None, None, side),) * len(grid)].flatten()
    numbers = torch.arange(seeds.shape[0], device=device)
    return seeds, torch.ones_like(seeds, dtype=torch.bool), torch.full_like(places, -1).index_copy(0, seeds, numbers)
