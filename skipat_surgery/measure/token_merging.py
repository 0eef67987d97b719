"""Token merging (ToMe: Bolya et al., ICLR 2023, arXiv 2210.09461), written from the paper, and composed with a cut.

Between the MSA and the MLP of a block the r most alike pairs of tokens are merged. The tokens are dealt in turn into
two sets; each token of the first is matched with the one of the second whose key, averaged over the heads, is most
alike by cosine; the r best matches become one token each, the mean weighted by how many tokens either stands for
(§3, "Bipartite Soft Matching"). A token that stands for s tokens counts s times as a key ("Proportional Attention").
Special tokens are never merged. With rotary embeddings a merged token lies where the one of the second set lies, and
keys are compared before they are turned. After the last block every patch gets the value of the token that it went
into.

In a cut model only attended blocks merge, as skipped ones have no keys, and Z is merged with its token. Skipped blocks
work on the tokens that are left, which lie on no grid any more: clusters have a seed every p tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.cluster_attention import attend_clusters
from ..core.clusters import Clustered, Clusters
from ..core.finding import find_tower
from ..core.phi import Phi
from ..core.prefix_attention import attend
from ..core.projections import Projections, Special, heads, shared
from ..tower import Tower

SCALES = (("ls1", "layer_scale1"), ("ls2", "layer_scale2"))
NORMS = ("norm2", "layernorm_after")
ROUNDING = 1e-4  # of the norm of all tokens: what a forward in float32 may differ by


@dataclass
class Tokens:
    """What is known of the tokens of one forward beside their values.

    Args:
        sizes: (B, M), how many tokens each stands for; None before the first merge.
        places: (B, N), the token that each of the first block's went into.
        positions: (B, M), which of the first block's tokens each lies at: the one that others went into.
        z: (B, M, D), Z of the block before, in a run of skipped blocks.
    """

    sizes: Tensor | None
    places: Tensor
    positions: Tensor
    z: Tensor | None = None


class Shared:
    """What all blocks of a model know. No list: an export makes copies of those, a block each."""

    tokens: Tokens


@dataclass(frozen=True)
class Matching:
    """Which of the tokens at even places go into which of those at odd places.

    Args:
        kept: (B, A - r) of the even ones, in their order.
        merged: (B, r) of the even ones.
        into: (B, r) of the odd ones.
        special: How many tokens come first, before and after.
    """

    kept: Tensor
    merged: Tensor
    into: Tensor
    special: int = 0

    @classmethod
    def of(cls, keys: Tensor, r: int, special: int) -> Matching:
        """The r best matches of keys (B, M, d), whose first `special` tokens are left alone."""
        keys = F.normalize(keys, dim=-1)
        scores = keys[:, ::2] @ keys[:, 1::2].transpose(-2, -1)
        scores[:, : (special + 1) // 2] = -torch.inf
        scores[:, :, : special // 2] = -torch.inf
        best, to = scores.max(dim=-1)
        order = best.argsort(dim=-1, descending=True)
        merged = order[:, :r]
        return cls(order[:, r:].sort(dim=-1).values, merged, to.gather(1, merged), special)

    def order(self, odd: int) -> list[int]:
        """What is left, of the kept even tokens and then the odd ones, with the special tokens before all others."""
        kept = self.kept.shape[1]
        first = dict.fromkeys(number // 2 + (number % 2) * kept for number in range(self.special))
        return [*first, *(number for number in range(kept + odd) if number not in first)]

    def joined(self, even: Tensor, odd: Tensor) -> Tensor:
        """The kept even tokens and the odd ones, in their order; up to one special token comes first as it is."""
        left = torch.cat([even, odd], dim=1)
        return left if self.special < 2 else left[:, self.order(odd.shape[1])]

    def positions(self, positions: Tensor) -> Tensor:
        """(B, M - r), the places (B, M) of the tokens that others go into, and of those that are left alone."""
        even, odd = positions[:, ::2], positions[:, 1::2]
        return self.joined(even.gather(1, self.kept), odd)

    def sum(self, x: Tensor) -> Tensor:
        """Tokens (B, M, D) to (B, M - r, D): a merged one is added to the one that it goes into."""
        even, odd = x[:, ::2], x[:, 1::2]
        into = odd.scatter_add(1, _wide(self.into, x), even.gather(1, _wide(self.merged, x)))
        return self.joined(even.gather(1, _wide(self.kept, x)), into)

    def places(self, count: int) -> Tensor:
        """(B, M), where each of M tokens went."""
        kept, batch = self.kept.shape[1], len(self.kept)
        places = torch.empty(batch, count, dtype=torch.long, device=self.kept.device)
        even, odd = places[:, ::2], places[:, 1::2]
        even.scatter_(1, self.kept, torch.arange(kept, device=places.device).expand(batch, -1))
        even.scatter_(1, self.merged, kept + self.into)
        odd.copy_(kept + torch.arange(odd.shape[1], device=places.device).expand(batch, -1))
        if self.special < 2:
            return places
        return torch.tensor(self.order(odd.shape[1]), device=places.device).argsort()[places]


class MergingBlock(nn.Module):
    """A block, X + MSA(LN(X)), merge, X + MLP(LN(X)); a skipped one has Φ for its MSA and does not merge."""

    def __init__(self, tower: Tower, index: int, r: int) -> None:
        super().__init__()
        block: Any = tower.blocks[index]
        family = tower.family
        assert family.norm is not None
        self.r, self.first, self.last = r, index == 0, index == len(tower.blocks) - 1
        self.special, self.projections = Special(family.num_prefix_tokens(tower.module), 0), family.projections
        self.norm, self.msa = block.get_submodule(family.norm), block.get_submodule(family.attention)
        self.mlp_norm = next(getattr(block, name) for name in NORMS if hasattr(block, name))
        self.mlp = block.mlp
        self.scales = nn.ModuleList(
            next((getattr(block, name) for name in names if hasattr(block, name)), nn.Identity()) for names in SCALES
        )
        self.phi: Phi | None = getattr(block, "phi", None)
        self.feeds = index + 1 in tower.skip
        self.shared = Shared()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, M, D) to (B, M - r, D), or after the last block to (B, N, D) again."""
        if self.first:
            batch, count = x.shape[:2]
            places = torch.arange(count, device=x.device).expand(batch, -1)
            self.shared.tokens = Tokens(None, places, places)
        tokens = self.shared.tokens
        h = self.norm.forward(x)  # in a cut model, a call wants what the host's own block brings
        msa = _weighted(self.projections(self.msa, h, **self._rotary(kwargs.get("rope"), tokens)), tokens.sizes)
        if self.phi is not None:
            z, keys = self._phi(msa, h, tokens), None
        else:
            z, keys = _attention(msa, h)
        x = x + self.scales[0](z)
        tokens.z = z if self.feeds else None
        if keys is not None and self.r:
            x = self._merge(x, keys, tokens)
        x = x + self.scales[1](self.mlp(self.mlp_norm(x)))
        if self.last:
            del self.shared.tokens
            return x.gather(1, _wide(tokens.places, x))
        return x

    def _rotary(self, rope: Tensor | None, tokens: Tokens) -> dict[str, Tensor]:
        """timm's angles (N, 2d) of the patches that are left, (B, 1, M, 2d)."""
        if rope is None or rope.ndim != 2:
            return {}
        return {"rope": rope[tokens.positions[:, self.special.prefix :] - self.special.prefix].unsqueeze(1)}

    def _phi(self, msa: Projections, h: Tensor, tokens: Tokens) -> Tensor:
        assert self.phi is not None
        assert tokens.z is not None
        given: dict[str, Any] = {"x": h} if self.phi.reads_x else {}
        grid = (1, h.shape[1] - self.special.prefix)
        if self.phi.attends:
            given["rows"] = attend(msa, h, self.special, training=False)
        if self.phi.pool:
            given["clustered"] = _clustered(msa, h, self.phi.clusters(h, grid), tokens.sizes)
        return self.phi(tokens.z, grid, **given)

    def _merge(self, x: Tensor, keys: Tensor, tokens: Tokens) -> Tensor:
        room = (x.shape[1] - self.special.prefix) // 2
        matching = Matching.of(keys, min(self.r, room), self.special.prefix)
        sizes = x.new_ones(*x.shape[:2], 1) if tokens.sizes is None else tokens.sizes[..., None]
        merged = matching.sum(sizes)
        tokens.places = matching.places(x.shape[1]).gather(1, tokens.places)
        tokens.positions = matching.positions(tokens.positions)
        tokens.sizes = merged[..., 0]
        if tokens.z is not None:
            tokens.z = matching.sum(tokens.z * sizes) / merged
        return matching.sum(x * sizes) / merged


def merge_tokens(model: nn.Module, r: int | Sequence[int]) -> nn.Module:
    """A copy of a model that merges tokens.

    Args:
        model: Untouched or cut; it stays as it is.
        r: How many tokens each attended block merges, or a number a block. Never more than half of the patches.

    Raises:
        ValueError: The model's Φ needs the patch grid, which merged tokens have left; or it merges patches itself.
    """
    model = copy.deepcopy(model)
    tower = Tower.of(model)
    if len(tower.stages) > 1:
        raise ValueError(f"{type(model).__name__} merges patches itself, from stage to stage, and needs their grid")
    counts = [r] * len(tower.blocks) if isinstance(r, int) else list(r)
    for index in tower.skip:
        phi = tower.config.phi[index]
        if phi.kernel_size != 1:
            raise ValueError(
                f"merged tokens lie on no grid, which the convolution of Φ of block {index} needs (kernel_size="
                f"{phi.kernel_size}); cut with PhiConfig(kernel_size=1) to merge tokens as well"
            )
    blocks = [MergingBlock(tower, index, count) for index, count in enumerate(counts)]
    for index, block in enumerate(blocks):
        block.shared = blocks[0].shared
        tower.blocks[index] = block
    return model


@torch.no_grad()
def check_merging(model: nn.Module, images: Tensor) -> None:
    """Check that a model merges as it is written here, with plain pre-norm blocks: merging nothing changes nothing.

    Args:
        model: Untouched; it stays as it is.
        images: (B, C, H, W).

    Raises:
        ValueError: It has blocks of another kind, or computes more in them.
    """
    plain = copy.deepcopy(model).float().eval()
    path, tower, family = find_tower(plain)
    try:
        merging = merge_tokens(plain, 0)
        blocks = (family.block_list(own)[-1] for own in (tower, merging.get_submodule(path)))
        expected, found = (_given_by(block, own, images) for block, own in zip(blocks, (plain, merging), strict=True))
        same = bool((found - expected).norm() <= ROUNDING * expected.norm())
    except (AssertionError, AttributeError, RuntimeError, StopIteration, TypeError, ValueError):
        same = False
    if not same:
        raise ValueError(
            f"token merging is written for plain pre-norm blocks, and those of {type(model).__name__} compute more"
        )


def _given_by(block: nn.Module, model: nn.Module, images: Tensor) -> Tensor:
    """The tokens that a block gives as its model runs in float32."""
    seen: list[Any] = []
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.autocast(images.device.type, enabled=False):
        model(images.float())
    handle.remove()
    (output,) = seen
    return output[0] if isinstance(output, tuple) else output


def _attention(msa: Projections, h: Tensor) -> tuple[Tensor, Tensor]:
    """Z (B, M, D), and the keys averaged over the heads (B, M, d)."""
    query = heads(msa.query.apply(h), msa.num_heads)
    key = heads(msa.key.apply(h), msa.num_key_heads)
    value = shared(msa.value.apply(h), msa.num_value_heads, msa.num_heads, 2).transpose(1, 2)
    (bias,) = msa.bias(Special(0, 0)) or (None,)
    alike = key.mean(dim=1)  # by what a token holds, wherever it lies
    if msa.rotate is not None:
        query, key = msa.rotate(query, None), msa.rotate(key, None)
    read = F.scaled_dot_product_attention(query, key, value, bias, scale=msa.scale)
    return msa.output(read.transpose(1, 2).flatten(2), h), alike


def _clustered(msa: Projections, h: Tensor, clusters: Clusters, sizes: Tensor | None) -> Clustered:
    """Clusters of tokens that stand for several: their means, and their weight as keys, count them so."""
    sizes = h.new_ones(h.shape[:2]) if sizes is None else sizes
    mean_size = clusters.means(sizes[..., None])
    tokens = clusters.means(h * sizes[..., None]) / mean_size
    own = mean_size[..., 0].gather(1, clusters.places)
    msa = replace(msa, bias=lambda asking: [own.log()[:, None, None]])
    return Clustered(clusters, tokens[:, clusters.special :], attend_clusters(msa, tokens, clusters, training=False))


def _weighted(msa: Projections, sizes: Tensor | None) -> Projections:
    """An MSA whose keys count as often as they stand for tokens."""
    biases = [] if sizes is None else [sizes.log()[:, None, None]]
    return replace(msa, bias=lambda asking: biases)


def _wide(index: Tensor, x: Tensor) -> Tensor:
    """An index (B, n) for whole tokens of x."""
    return index[..., None].expand(-1, -1, x.shape[2])
