"""Prefix tokens that attend: the rows of an MSA that belong to them, exactly, without the rest of it.

Z of a few tokens takes neither keys nor values of all tokens. With the host's projections absorbed into the queries,
per head h and query q,

    u_h = W_k,hᵀ q_h    a_h = softmax(u_h · LN(x_n) · scale)    Z = W_o [W_v,h Σ_n a_h,n LN(x_n) + b_v,h]_h + b_o

which is a hundredth of the MSA for a class token. The bias of the keys adds the same to every score of a row, and the
softmax drops it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .carrying import box_of, first_argument
from .family import Family
from .grafting import Grafted
from .projections import Projections, Special


class PrefixAttention(Grafted):
    """The MSA of a skipped block whose prefix tokens attend: their rows are its own, all others are Φ's."""

    skipat_family: Family

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        h = first_argument(args, kwargs)
        box, family = box_of(h), self.skipat_family
        projections = family.projections(self, *args, **kwargs)
        phi = box.phi
        special = Special(phi.num_prefix_tokens, phi.num_suffix_tokens)
        rows = attend(projections, h, special, self.training)  # type: ignore[attr-defined]
        box.z = phi(box.empty(), box.grid, rows)
        return (box.z, None) if family.returns_tuple else box.z


def attend(msa: Projections, h: Tensor, special: Special, training: bool) -> Tensor:
    """Z (B, P, D) of the P special tokens, as the MSA makes it from all tokens h = LN(X), (B, N, D).

    Keys and values are absorbed where that takes fewer multiplications than making them, which it does while P·H < D.
    Keys that are normed, rotated or made by more than a Linear are made.
    """
    own = special.of(h)
    absorbs = own.shape[1] * msa.num_heads < h.shape[2]
    query = _heads(msa.query.apply(own), msa.num_heads)
    query = query if msa.norm_query is None else msa.norm_query(query)
    linear = msa.norm_key is None and msa.rotate is None
    score = _absorbed_scores if absorbs and linear and msa.key.weight is not None else _scores
    weights = _softmax(score(msa, query * msa.scale, h), msa.bias(special))
    if training and msa.dropout:
        weights = F.dropout(weights, msa.dropout)
    weights = weights if msa.combine is None else msa.combine(weights)
    read = _absorbed_read if absorbs and msa.value.weight is not None else _read
    return msa.output(read(msa, weights, h).transpose(1, 2).flatten(2), own)


def _softmax(scores: Tensor, biases: list[Tensor]) -> Tensor:
    """Attention weights (B, H, P, N), made in float32 at least, as hosts do."""
    for bias in biases:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, n, H·d) to (B, H, n, d)."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def _shared(x: Tensor, groups: int, heads: int, dim: int) -> Tensor:
    """A dimension of G·d as one of H, each of G groups standing for the H/G heads that share it, and one of d."""
    return x.unflatten(dim, (groups, -1)).repeat_interleave(heads // groups, dim=dim)


def _by_head(x: Tensor, weight: Tensor) -> Tensor:
    """(B, H, P, d) through the matrix (H, d, e) of each head: (B, H, P, e). One bmm, half the time of an einsum."""
    return (x.transpose(0, 1).flatten(1, 2) @ weight).unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)


def _scores(msa: Projections, query: Tensor, h: Tensor) -> Tensor:
    """(B, H, P, N) of queries (B, H, P, d), with keys that are made."""
    key = _heads(msa.key.apply(h), msa.num_key_heads)
    key = key if msa.norm_key is None else msa.norm_key(key)
    key = key if msa.rotate is None else msa.rotate(key)
    return query @ key.repeat_interleave(msa.num_heads // msa.num_key_heads, dim=1).mT


def _absorbed_scores(msa: Projections, query: Tensor, h: Tensor) -> Tensor:
    """(B, H, P, N) of queries (B, H, P, d), without keys."""
    assert msa.key.weight is not None
    absorbed = _by_head(query, _shared(msa.key.weight, msa.num_key_heads, msa.num_heads, 0))
    scores = (absorbed.flatten(1, 2) @ h.mT).unflatten(1, query.shape[1:3])
    if msa.key.bias is None or not torch.is_grad_enabled():
        return scores
    # The softmax drops it, but a parameter without a gradient, rather than with a zero one, stops DDP.
    bias = _shared(msa.key.bias, msa.num_key_heads, msa.num_heads, 0)
    return scores + _by_head(query, bias[..., None])


def _read(msa: Projections, weights: Tensor, h: Tensor) -> Tensor:
    """What each head reads, (B, H, P, d), with values that are made."""
    return weights @ _shared(msa.value.apply(h), msa.num_value_heads, weights.shape[1], 2).transpose(1, 2)


def _absorbed_read(msa: Projections, weights: Tensor, h: Tensor) -> Tensor:
    """What each head reads, (B, H, P, d), without values."""
    assert msa.value.weight is not None
    mean = (weights.flatten(1, 2) @ h).unflatten(1, weights.shape[1:3])
    heads = weights.shape[1]
    read = _by_head(mean, _shared(msa.value.weight, msa.num_value_heads, heads, 0).mT)
    if msa.value.bias is None:
        return read
    # The weights of a row add up to one, but for dropout.
    bias = _shared(msa.value.bias, msa.num_value_heads, heads, 0)
    return read + weights.sum(dim=-1, keepdim=True) * bias[:, None]
