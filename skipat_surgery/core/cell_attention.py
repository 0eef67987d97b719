"""The MSA of a block at a lower resolution: over its special tokens and the cells of the patch grid.

With P the mean over cells of p×p patches, Z_cells = MSA(P LN(X)), where the key of a cell counts as often as it has
patches: its logarithm is added to the scores. That is what the MSA gives where all patches of a cell are alike. For
p = 2 it takes a quarter of the projections and a sixteenth of the attention.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .cells import Cells
from .projections import Projections, attention_weights, heads, shared


def attend_cells(msa: Projections, tokens: Tensor, cells: Cells, training: bool) -> Tensor:
    """Z (B, M, D) of the M cells.

    Args:
        msa: What the host's MSA computes.
        tokens: (B, P + S + M, D), LN(X) as `Cells.of` gives it.
        cells: The cells.
        training: Whether attention weights are dropped out.
    """
    asking = tokens[:, cells.prefix + cells.suffix :]
    query = heads(msa.query.apply(asking), msa.num_heads)
    key = heads(msa.key.apply(tokens), msa.num_key_heads)
    value = shared(msa.value.apply(tokens), msa.num_value_heads, msa.num_value_heads, 2).transpose(1, 2)
    query = query if msa.norm_query is None else msa.norm_query(query)
    key = key if msa.norm_key is None else msa.norm_key(key)
    if msa.rotate is not None:
        count = tokens.shape[1] - asking.shape[1]
        query = msa.rotate(F.pad(query, (0, 0, count, 0)), cells)[:, :, count:]
        key = msa.rotate(key, cells)
    key = key.repeat_interleave(msa.num_heads // msa.num_key_heads, dim=1)
    bias = _bias(msa, cells, query)
    dropout = msa.dropout if training else 0.0
    if msa.combine is None:
        value = value.repeat_interleave(msa.num_heads // msa.num_value_heads, dim=1)
        read = F.scaled_dot_product_attention(query, key, value, bias, dropout, scale=msa.scale)
    else:
        read = msa.combine(attention_weights(query * msa.scale @ key.mT, [bias], dropout)) @ value
    return msa.output(read.transpose(1, 2).flatten(2), asking)


def _bias(msa: Projections, cells: Cells, query: Tensor) -> Tensor:
    """What is added to the scores, (B or 1, H or 1, M or 1, P + S + M)."""
    special, bias = cells.prefix + cells.suffix, cells.log_counts(query)
    for own in msa.bias(cells):
        rows = cells.of(own, dim=-1)
        rows = rows if rows.shape[-2] == 1 else rows[..., special:, :]
        if rows.dtype == torch.bool:
            rows = torch.zeros_like(rows, dtype=query.dtype).masked_fill(~rows, -torch.inf)
        bias = bias + rows
    return bias.expand(*(1,) * (4 - bias.ndim), *bias.shape).expand(-1, -1, query.shape[2], -1).to(query.dtype)
