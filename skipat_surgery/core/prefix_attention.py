"""Prefix tokens that attend: the rows of an MSA that belong to them, exactly, without the rest of it.

Z of a few tokens takes neither keys nor values of all tokens. With the host's projections absorbed into the queries,
per head h and query q,

    u_h = W_k,hᵀ q_h    a_h = softmax(u_h · LN(x_n) · scale)    Z = W_o [W_v,h Σ_n a_h,n LN(x_n) + b_v,h]_h + b_o

which is a hundredth of the MSA for a class token. The bias of the keys adds the same to every score of a row, and the
softmax drops it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .projections import Projections, attention_weights, heads, repeated, shared
from .tokens import Special


def attend(msa: Projections, h: Tensor, special: Special, training: bool) -> Tensor:
    """Z (B, P, D) of the P special tokens, as the MSA makes it from all tokens h = LN(X), (B, N, D).

    Keys and values are absorbed where that takes fewer multiplications than making them, which it does while P·H < D.
    Keys that are normed, rotated or made by more than a Linear are made.
    """
    own = special.take(h)
    absorbs = own.shape[1] * msa.num_heads < h.shape[2]
    query = heads(msa.query.apply(own), msa.num_heads)
    query = query if msa.norm_query is None else msa.norm_query(query)
    query = query if msa.rotate_special is None else msa.rotate_special(query)
    linear = msa.norm_key is None and msa.rotate is None
    score = _absorbed_scores if absorbs and linear and msa.key.weight is not None else scores_of
    scores = score(msa, query * msa.scale, h)
    scores = scores if msa.mix is None else msa.mix(scores)
    weights = attention_weights(scores, msa.bias(special), msa.dropout if training else 0.0)
    weights = weights if msa.combine is None else msa.combine(weights)
    read = _absorbed_read if absorbs and msa.value.weight is not None else _read
    return msa.output(read(msa, weights, h).transpose(1, 2).flatten(2), own)


def _by_head(x: Tensor, weight: Tensor) -> Tensor:
    """(B, H, P, d) through the matrix (H, d, e) of each head: (B, H, P, e). One bmm, half the time of an einsum."""
    return (x.transpose(0, 1).flatten(1, 2) @ weight).unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)


def scores_of(msa: Projections, query: Tensor, h: Tensor) -> Tensor:
    """(B, H, P, N) of queries (B, H, P, d), with keys that are made."""
    key = heads(msa.key.apply(h), msa.num_key_heads)
    key = key if msa.norm_key is None else msa.norm_key(key)
    key = key if msa.rotate is None else msa.rotate(key, None)
    return query @ repeated(key, msa.num_heads // msa.num_key_heads, 1).transpose(-2, -1)


def _absorbed_scores(msa: Projections, query: Tensor, h: Tensor) -> Tensor:
    """(B, H, P, N) of queries (B, H, P, d), without keys."""
    assert msa.key.weight is not None
    absorbed = _by_head(query, shared(msa.key.weight, msa.num_key_heads, msa.num_heads, 0))
    scores = (absorbed.flatten(1, 2) @ h.transpose(-2, -1)).unflatten(1, query.shape[1:3])
    if msa.key.bias is None or not torch.is_grad_enabled() or torch.jit.is_tracing():
        return scores
    # The softmax drops it, but a parameter without a gradient, rather than with a zero one, stops DDP.
    bias = shared(msa.key.bias, msa.num_key_heads, msa.num_heads, 0)
    return scores + _by_head(query, bias[..., None])


def _read(msa: Projections, weights: Tensor, h: Tensor) -> Tensor:
    """What each head reads, (B, H, P, d), with values that are made."""
    return weights @ shared(msa.value.apply(h), msa.num_value_heads, weights.shape[1], 2).transpose(1, 2)


def _absorbed_read(msa: Projections, weights: Tensor, h: Tensor) -> Tensor:
    """What each head reads, (B, H, P, d), without values."""
    assert msa.value.weight is not None
    mean = (weights.flatten(1, 2) @ h).unflatten(1, weights.shape[1:3])
    count = weights.shape[1]
    read = _by_head(mean, shared(msa.value.weight, msa.num_value_heads, count, 0).transpose(-2, -1))
    if msa.value.bias is None:
        return read
    # The weights of a row add up to one, but for dropout.
    bias = shared(msa.value.bias, msa.num_value_heads, count, 0)
    return read + weights.sum(dim=-1, keepdim=True) * bias[:, None]
