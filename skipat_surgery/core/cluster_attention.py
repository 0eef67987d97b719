"""The MSA of a block over clusters of alike patches: coarser keys and values, and where wanted coarser queries.

With C the mean over clusters, Z_clusters = MSA(C LN(X)), where the key of a cluster counts as often as it has patches:
the logarithm of their number is added to the scores (ToMe, arXiv 2210.09461, "Proportional Attention"). That is what
the MSA gives where all patches of a cluster are alike. A cluster lies, and is masked, where its seed is. With a seed
for every 2×2 patches it takes a quarter of the projections and a sixteenth of the attention. Where the patches
themselves ask, queries and output are those of the MSA, and a quarter of the attention is left.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .clusters import Clusters
from .projections import Projections, attention_weights, heads, repeated, shared
from .tokens import Patches


def attend_clusters(
    msa: Projections, tokens: Tensor, clusters: Clusters, training: bool, h: Tensor | None = None
) -> Tensor:
    """Z of the M clusters, (B, M, D), or of the patches where they ask, (B, H·W, D).

    Args:
        msa: What the host's MSA computes.
        tokens: (B, P + S + M, D), the means of LN(X).
        clusters: The clusters.
        training: Whether attention weights are dropped out.
        h: LN(X), (B, N, D), where the patches ask.
    """
    asking = tokens[:, clusters.special :] if h is None else clusters.patches.take(h)
    key = heads(msa.key.apply(tokens), msa.num_key_heads)
    value = shared(msa.value.apply(tokens), msa.num_value_heads, msa.num_value_heads, 2).transpose(1, 2)
    key = key if msa.norm_key is None else msa.norm_key(key)
    key = key if msa.rotate is None else msa.rotate(key, clusters)
    query = _queries(msa, asking, clusters, None if h is not None else clusters)
    key = repeated(key, msa.num_heads // msa.num_key_heads, 1)
    bias = _bias(msa, clusters, query, clusters if h is None else clusters.patches)
    dropout = msa.dropout if training else 0.0
    if msa.combine is None:
        value = repeated(value, msa.num_heads // msa.num_value_heads, 1)
        read = F.scaled_dot_product_attention(query, key, value, bias, dropout, scale=msa.scale)
    else:
        scores = query * msa.scale @ key.transpose(-2, -1)
        scores = scores if msa.mix is None else msa.mix(scores)
        # Heads are mixed patch by patch, each with its share of what its cluster is given.
        count = clusters.counts()[:, None, None].to(scores.dtype)
        read = msa.combine(attention_weights(scores, [bias], dropout) / count) * count @ value
    return msa.output(read.transpose(1, 2).flatten(2), asking)


def _queries(msa: Projections, asking: Tensor, clusters: Clusters, places: Clusters | None) -> Tensor:
    """The queries (B, H, n, d) of patches, or of clusters, which lie at their places."""
    query = heads(msa.query.apply(asking), msa.num_heads)
    query = query if msa.norm_query is None else msa.norm_query(query)
    if msa.rotate is None:
        return query
    # Rotary embeddings are made for all tokens.
    before, after = (clusters.special, 0) if places is not None else (clusters.prefix, clusters.suffix)
    query = msa.rotate(F.pad(query, (0, 0, before, after)), places)
    return query[:, :, before : query.shape[2] - after]


def _bias(msa: Projections, clusters: Clusters, query: Tensor, asking: Clusters | Patches) -> Tensor:
    """What is added to the scores, (B, H or 1, n, P + S + M)."""
    precision = torch.promote_types(query.dtype, torch.float32)
    bias = clusters.counts()[:, None, None].to(precision).log()
    for own in msa.bias(asking):
        rows = clusters.take(own, dim=-1)
        if asking is clusters and rows.shape[-2] > 1:
            rows = rows[..., clusters.special :, :]
        if rows.dtype == torch.bool:
            rows = torch.zeros_like(rows, dtype=precision).masked_fill(~rows, -torch.inf)
        bias = bias + rows
    if msa.distances is not None:
        bias = bias + msa.distances(query, clusters)
    return bias.expand(-1, -1, query.shape[2], -1).to(query.dtype)
