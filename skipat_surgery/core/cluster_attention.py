"""The MSA of a block at a lower resolution: over its special tokens and clusters of alike patches.

With C the mean over clusters, Z_clusters = MSA(C LN(X)), where the key of a cluster counts as often as it has patches:
the logarithm of their number is added to the scores (ToMe, arXiv 2210.09461, "Proportional Attention"). That is what
the MSA gives where all patches of a cluster are alike. A cluster lies, and is masked, where its seed is. With a seed
for every 2×2 patches it takes a quarter of the projections and a sixteenth of the attention.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .clusters import Clusters
from .projections import Projections, attention_weights, heads, shared


def attend_clusters(msa: Projections, tokens: Tensor, clusters: Clusters, training: bool) -> Tensor:
    """Z (B, M, D) of the M clusters.

    Args:
        msa: What the host's MSA computes.
        tokens: (B, P + S + M, D), the means of LN(X).
        clusters: The clusters.
        training: Whether attention weights are dropped out.
    """
    asking = tokens[:, clusters.special :]
    query = heads(msa.query.apply(asking), msa.num_heads)
    key = heads(msa.key.apply(tokens), msa.num_key_heads)
    value = shared(msa.value.apply(tokens), msa.num_value_heads, msa.num_value_heads, 2).transpose(1, 2)
    query = query if msa.norm_query is None else msa.norm_query(query)
    key = key if msa.norm_key is None else msa.norm_key(key)
    if msa.rotate is not None:
        query = msa.rotate(F.pad(query, (0, 0, clusters.special, 0)), clusters)[:, :, clusters.special :]
        key = msa.rotate(key, clusters)
    key = key.repeat_interleave(msa.num_heads // msa.num_key_heads, dim=1)
    bias = _bias(msa, clusters, query)
    dropout = msa.dropout if training else 0.0
    if msa.combine is None:
        value = value.repeat_interleave(msa.num_heads // msa.num_value_heads, dim=1)
        read = F.scaled_dot_product_attention(query, key, value, bias, dropout, scale=msa.scale)
    else:
        read = msa.combine(attention_weights(query * msa.scale @ key.mT, [bias], dropout)) @ value
    return msa.output(read.transpose(1, 2).flatten(2), asking)


def _bias(msa: Projections, clusters: Clusters, query: Tensor) -> Tensor:
    """What is added to the scores, (B, H or 1, M, P + S + M)."""
    precision = torch.promote_types(query.dtype, torch.float32)
    bias = clusters.counts()[:, None, None].to(precision).log()
    for own in msa.bias(clusters):
        rows = clusters.take(own, dim=-1)
        rows = rows if rows.shape[-2] == 1 else rows[..., clusters.special :, :]
        if rows.dtype == torch.bool:
            rows = torch.zeros_like(rows, dtype=precision).masked_fill(~rows, -torch.inf)
        bias = bias + rows
    return bias.expand(-1, -1, query.shape[2], -1).to(query.dtype)
