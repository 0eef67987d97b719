"""Alike patches, taken together: each joins the seed that it is most alike, of which every p×p patches have one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .tokens import Patches, Special


@dataclass(frozen=True)
class Clusters:
    """The special tokens, each by itself, and the clusters of an image's patches.

    Nothing but the members depends on the image: there are as many clusters as seeds, and no sorting is needed.

    Args:
        prefix: Tokens before the patches.
        suffix: Tokens after them.
        seeds: (M,), which patches the seeds are: the first of every p×p ones.
        places: (B, N), the place of each token among the special tokens, the prefix first, and the M clusters.

    Example:
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

    @classmethod
    def of(cls, h: Tensor, prefix: int, suffix: int, grid: tuple[int, int], side: int) -> Clusters:
        """The clusters of tokens (B, N, D) by the cosine of their values, with a seed for every side×side patches."""
        count = math.prod(grid)
        seeds = torch.arange(count, device=h.device).view(grid)[::side, ::side].flatten()
        with torch.no_grad():
            alike = h @ F.normalize(h[:, prefix + seeds], dim=-1).mT
            places = prefix + suffix + alike[:, prefix : prefix + count].argmax(dim=-1)
            # A seed stays its own even where another is its like, so that no cluster is empty.
            places[:, seeds] = prefix + suffix + torch.arange(seeds.shape[0], device=h.device)
            special = torch.arange(prefix + suffix, device=h.device).expand(h.shape[0], -1)
            places = torch.cat([special[:, :prefix], places, special[:, prefix:]], dim=1)
        return cls(prefix, suffix, seeds, places)

    @property
    def special(self) -> int:
        """How many special tokens there are."""
        return self.prefix + self.suffix

    @property
    def patches(self) -> Patches:
        """Where the patches lie."""
        return Patches(self.prefix, self.suffix)

    def counts(self) -> Tensor:
        """(B, P + S + M), how many tokens each special token (one) and each cluster holds."""
        return self._sums(torch.ones_like(self.places)[..., None])[..., 0]

    def means(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, P + S + M, D): the special tokens, and the mean of each cluster."""
        return self._sums(x) / self.counts()[..., None].to(x.dtype)

    def spread(self, values: Tensor) -> Tensor:
        """(B, M, D) to (B, H·W, D): each patch has what its cluster has."""
        places = self.patches.take(self.places) - self.special
        index = _flat(places, values.shape[1])
        return values.flatten(0, 1).index_select(0, index).unflatten(0, places.shape)

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """The special tokens and the seeds, (P + S + M) of a dimension that is as long as the tokens."""
        seeds = x.index_select(dim, self.prefix + self.seeds)
        return torch.cat([Special(self.prefix, self.suffix).take(x, dim), seeds], dim=dim)

    def _sums(self, x: Tensor) -> Tensor:
        size = self.special + self.seeds.shape[0]
        sums = x.new_zeros(x.shape[0] * size, x.shape[-1])
        return sums.index_add(0, _flat(self.places, size), x.flatten(0, 1)).unflatten(0, (x.shape[0], size))


@dataclass(frozen=True)
class Clustered:
    """What is known of clusters.

    Args:
        clusters: The clusters.
        x: (B, M, D), the means of LN(X).
        z: (B, M, D), what the MSA makes of them; (B, H·W, D) where every patch asks for itself.
    """

    clusters: Clusters
    x: Tensor
    z: Tensor

    def patches(self) -> Tensor:
        """Z of each patch, (B, H·W, D)."""
        return self.z if self.z.shape[1] > self.x.shape[1] else self.clusters.spread(self.z)


def _flat(places: Tensor, size: int) -> Tensor:
    """Places (B, n) of each of B images, as places in all of them, one after the other."""
    first = size * torch.arange(places.shape[0], device=places.device)
    return (places + first[:, None]).flatten()
