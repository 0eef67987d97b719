"""A host's MSA taken apart: its projections, and what it does between them. One description for all hosts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .clusters import Clusters
from .tokens import Patches, Special


@dataclass(frozen=True)
class Projection:
    """One projection of an MSA.

    Args:
        apply: (B, N, D) to (B, N, H·d).
        weight: (H·d, D), where `apply` is no more than this weight and bias, so that it can be absorbed; else None, as
            for a LoRA or quantised layer.
        bias: (H·d,), or None.
    """

    apply: Callable[[Tensor], Tensor]
    weight: Tensor | None = None
    bias: Tensor | None = None

    @classmethod
    def of(cls, linear: Any) -> Projection:
        """Of a module of its own."""
        return cls.affine(linear.weight, linear.bias) if is_plain(linear) else cls(linear)

    @classmethod
    def affine(cls, weight: Tensor, bias: Tensor | None) -> Projection:
        """Of a weight and a bias."""
        return cls(lambda x: F.linear(x, weight, bias), weight, bias)

    @classmethod
    def thirds(cls, linear: Any, bias: Tensor | None = None) -> tuple[Projection, ...]:
        """Of a module that makes queries, keys and values at once, with a bias of its own or the one given."""
        if is_plain(linear):
            bias = linear.bias if bias is None else bias
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            return tuple(map(cls.affine, linear.weight.chunk(3), biases))

        def third(part: int) -> Callable[[Tensor], Tensor]:
            shift = 0.0 if bias is None else bias.chunk(3)[part]
            return lambda x: linear(x).chunk(3, dim=-1)[part] + shift

        return tuple(cls(third(part)) for part in range(3))

    @classmethod
    def parts(cls, linear: Any, sizes: Sequence[int]) -> tuple[Projection, ...]:
        """Of a module that makes queries, keys and values at once, of so many rows."""
        if is_plain(linear):
            biases = (None,) * len(sizes) if linear.bias is None else linear.bias.split(sizes)
            return tuple(map(cls.affine, linear.weight.split(sizes), biases))

        def part(number: int) -> Callable[[Tensor], Tensor]:
            return lambda x: linear(x).split(sizes, dim=-1)[number]

        return tuple(cls(part(number)) for number in range(len(sizes)))


def is_plain(linear: nn.Module) -> bool:
    """Whether a module is a Linear and nothing else: no adapter, no quantised or offloaded weight, no hook."""
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    hooked = any(hooks) or hasattr(linear, "_hf_hook")
    return type(linear) is nn.Linear and type(linear.weight) in (Tensor, nn.Parameter) and not hooked


# The tokens that ask, of whose rows of the scores something is wanted.
Asking: TypeAlias = Special | Patches | Clusters


def _no_bias(asking: Asking) -> list[Tensor]:
    return []


@dataclass(frozen=True)
class Projections:
    """What a host's MSA computes, in one forward.

    Args:
        num_heads: H.
        num_key_heads: G, each of which serves H/G heads of queries.
        num_value_heads: G as well, but where `combine` leaves fewer heads than there are queries.
        scale: Of the scores.
        query: Queries of tokens.
        key: Keys.
        value: Values.
        output: From what the heads read, (B, n, H·d), and the n tokens that asked (B, n, D), Z (B, n, D).
        dropout: Of the attention weights, in training.
        norm_query: Norm of the queries (B, H, n, d), or None.
        norm_key: Norm of the keys (B, G, N, d), or None.
        mix: From the scores (B, H, n, N), those that the softmax takes, where heads are mixed; None where they are the
            same.
        rotate: Rotary embedding of the keys (B, G, N, d) of all tokens, or None.
        rotate_special: Of the queries (B, H, n, d) of the special tokens, or None where it leaves them alone.
        combine: From the attention weights (B, H, n, N), those that values are read with: mixed, or fewer where
            maps are subtracted; None where they are the same.
        bias: From the tokens that ask, what is added to the rows of their scores, each broadcast to (B, H, n, N).
            Booleans keep where True.
        distances: From queries (B, H, n, d) of the clusters, or of all patches, and the M clusters as keys, what their
            distances add to the scores, (B, H, n, M), where that depends on the query; None where it does not.
    """

    num_heads: int
    num_key_heads: int
    num_value_heads: int
    scale: float
    query: Projection
    key: Projection
    value: Projection
    output: Callable[[Tensor, Tensor], Tensor]
    dropout: float
    norm_query: Callable[[Tensor], Tensor] | None = None
    norm_key: Callable[[Tensor], Tensor] | None = None
    mix: Callable[[Tensor], Tensor] | None = None
    rotate: Callable[[Tensor, Clusters | None], Tensor] | None = None
    rotate_special: Callable[[Tensor], Tensor] | None = None
    combine: Callable[[Tensor], Tensor] | None = None
    bias: Callable[[Asking], list[Tensor]] = _no_bias
    distances: Callable[[Tensor, Clusters], Tensor] | None = None


def heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, n, H·d) to (B, H, n, d)."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def shared(x: Tensor, groups: int, num_heads: int, dim: int) -> Tensor:
    """A dimension of G·d as one of H, each of G groups standing for the H/G heads that share it, and one of d."""
    return repeated(x.unflatten(dim, (groups, -1)), num_heads // groups, dim)


def repeated(x: Tensor, times: int, dim: int) -> Tensor:
    """Each part along a dimension so many times, one after the other; once, it is the very tensor, and no copy."""
    return x if times == 1 else x.repeat_interleave(times, dim=dim)


def attention_weights(scores: Tensor, biases: list[Tensor], dropout: float) -> Tensor:
    """The softmax of scores (B, H, n, N), made in float32 at least, as hosts do."""
    for bias in biases:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    return F.dropout(weights, dropout) if dropout else weights
