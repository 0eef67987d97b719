"""What torch's own `nn.MultiheadAttention` computes, read from the module."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .projections import Asking, Projection, Projections


def torch_attends(attention: nn.Module) -> bool:
    """Whether `torch_projections` can read this MSA: torch's own, batch first, keys and values like its queries."""
    return (
        isinstance(attention, nn.MultiheadAttention)
        and attention.batch_first
        and attention._qkv_same_embed_dim
        and attention.bias_k is None
        and not attention.add_zero_attn
    )


def torch_projections(
    attention: Any,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Projections:
    """Of an MSA and the arguments of its forward, where it attends to its own input."""
    heads = attention.num_heads
    biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
    of_queries, of_keys, of_values = map(Projection.affine, attention.in_proj_weight.chunk(3), biases)
    return Projections(
        num_heads=heads,
        num_key_heads=heads,
        num_value_heads=heads,
        scale=attention.head_dim**-0.5,
        query=of_queries,
        key=of_keys,
        value=of_values,
        output=lambda context, asking: attention.out_proj(context),
        dropout=attention.dropout,
        bias=partial(_bias, heads, attn_mask, key_padding_mask),
    )


def _bias(num_heads: int, mask: Tensor | None, padding: Tensor | None, asking: Asking) -> list[Tensor]:
    """The rows of masks that belong to the tokens that ask. torch's own leave out where True."""
    biases = []
    if mask is not None:
        rows = asking.take(mask, dim=-2)
        biases.append(_kept(rows.unflatten(0, (-1, num_heads)) if rows.ndim == 3 else rows))
    if padding is not None:
        biases.append(_kept(padding[:, None, None]))
    return biases


def _kept(mask: Tensor) -> Tensor:
    return ~mask if mask.dtype == torch.bool else mask
