"""What the global MSAs of SAM-like towers compute, read from their modules: relative positions, decomposed by axis.

A score is given q·R_h[y - y'] + q·R_w[x - x'] for the places of the query and the key (MViTv2, arXiv 2112.01526,
"Decomposed Relative Position Embedding"). It depends on the query, so that it is no fixed bias of places.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .clusters import Clusters
from .projections import Projections
from .timm_projections import timm_projections
from .transformers_projections import transformers_projections


def sam_projections(attention: Any, hidden_states: Tensor, **kwargs: Any) -> Projections:
    """Of an MSA of transformers' SAM and the towers like it, and the map (B, H, W, D) that it is given."""
    table = attention.get_rel_pos if getattr(attention, "use_rel_pos", False) else None  # SAM 2 has none
    return _with_distances(transformers_projections(attention, hidden_states), attention, hidden_states, table)


def vitdet_projections(attention: Any, hidden_state: Tensor, **kwargs: Any) -> Projections:
    """Of an MSA of VitDet, and the map (B, H, W, D) that it is given."""
    module = sys.modules[type(attention).__module__]
    table = module.get_rel_pos if attention.use_relative_position_embeddings else None
    return _with_distances(transformers_projections(attention, hidden_state), attention, hidden_state, table)


def sam3_projections(
    attention: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
) -> Projections:
    """Of an MSA of SAM 3, which rotates neighbouring channels, by cosines and sines (1, H·W, d)."""
    found = transformers_projections(attention, hidden_states)
    return replace(found, rotate=partial(_rotate_pairs, type(attention), *position_embeddings))


def timm_sam_projections(attention: Any, x: Tensor) -> Projections:
    """Of an MSA of timm's SAM, and the map (B, H, W, D) that it is given."""
    table = sys.modules[type(attention).__module__].get_rel_pos if attention.use_rel_pos else None
    found = _with_distances(timm_projections(attention, x), attention, x, table)
    return found if attention.rope is None else replace(found, rotate=partial(_rotate, attention))


def _with_distances(
    found: Projections, attention: Any, x: Tensor, table: Callable[[int, int, Tensor], Tensor] | None
) -> Projections:
    """With what distances add to the scores, where the MSA has it: `table` gives R, (side, side, d), of an axis."""
    if table is None:
        return found
    height, width = x.shape[1:3]
    rows, columns = table(height, height, attention.rel_pos_h), table(width, width, attention.rel_pos_w)
    return replace(found, distances=partial(_distances, rows, columns))


def _distances(rows: Tensor, columns: Tensor, query: Tensor, clusters: Clusters) -> Tensor:
    """What distances add to the scores (B, heads, n, M) of queries (B, heads, n, d) and clusters as keys.

    The queries are those of the clusters, or of all patches. A cluster lies where its seed does.

    Args:
        rows: (H, H, d), R_h of the row of a query and that of a key.
        columns: (W, W, d), R_w.
        query: Of n tokens.
        clusters: The M clusters.
    """
    width, seeds = columns.shape[0], clusters.seeds
    of_clusters = query.shape[2] == seeds.shape[0]
    places = seeds if of_clusters else torch.arange(query.shape[2], device=query.device)
    down = torch.einsum("bhnd,nkd->bhnk", query, rows[places // width])
    across = torch.einsum("bhnd,nkd->bhnk", query, columns[places % width])
    return down.index_select(3, seeds // width) + across.index_select(3, seeds % width)


def _rotate_pairs(cls: type, cos: Tensor, sin: Tensor, key: Tensor, clusters: Clusters | None) -> Tensor:
    """Rotary keys (B, heads, N, d) of the patches or clusters of SAM 3."""
    if clusters is not None:
        cos, sin = (part.index_select(-2, clusters.seeds) for part in (cos, sin))
    return sys.modules[cls.__module__].apply_rotary_pos_emb_2d(key, key, cos, sin)[0]


def _rotate(attention: Any, key: Tensor, clusters: Clusters | None) -> Tensor:
    """Rotary keys (B, heads, N, d) of the patches or clusters of timm's SAM."""
    rope = attention.rope.get_embed()
    rope = rope if clusters is None else rope.index_select(0, clusters.seeds)
    return sys.modules[type(attention).__module__].apply_rot_embed_cat(key, rope).type_as(key)
