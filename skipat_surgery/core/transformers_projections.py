"""What the MSAs of transformers compute, read from their modules."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .clusters import Clusters
from .projections import Asking, Projection, Projections


def transformers_projections(
    attention: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Projections:
    """Of an MSA and the arguments of its forward."""
    inner = getattr(attention, "attention", attention)  # YOLOS and DPT nest it
    num_heads = _first(inner, "num_attention_heads", "num_heads")
    return Projections(
        num_heads=num_heads,
        num_key_heads=num_heads,
        num_value_heads=num_heads,
        scale=_first(inner, "scaling", "scale"),
        query=Projection.of(_first(inner, "q_proj", "query")),
        key=Projection.of(_first(inner, "k_proj", "key")),
        value=Projection.of(_first(inner, "v_proj", "value")),
        output=attention.output if inner is not attention else partial(_output, attention),
        dropout=_first(inner, "attention_dropout", "dropout_prob", "dropout"),
        rotate=None if position_embeddings is None else partial(_rotate, type(attention), *position_embeddings),
        bias=partial(_masked_rows, attention_mask),
    )


def _first(module: Any, *names: str) -> Any:
    """The attribute of whichever name the module has."""
    return next(getattr(module, name) for name in names if hasattr(module, name))


def _output(attention: Any, context: Tensor, asking: Tensor) -> Tensor:
    return _first(attention, "o_proj", "out_proj")(context)


def _rotate(cls: type, cos: Tensor, sin: Tensor, key: Tensor, clusters: Clusters | None) -> Tensor:
    """Rotary keys (B, H, N, d) of the patches or clusters, the last tokens."""
    if clusters is not None:
        cos, sin = (part.index_select(-2, clusters.seeds) for part in (cos, sin))
    patches = sin.shape[-2]
    special, key = key.split((key.shape[-2] - patches, patches), dim=-2)
    rotate_half = sys.modules[cls.__module__].rotate_half
    return torch.cat([special, key * cos + rotate_half(key) * sin], dim=-2)


def _masked_rows(mask: Any, asking: Asking) -> list[Tensor]:
    """The rows of a mask or of a relative position bias (B or 1, H or 1, N, N) that belong to the tokens that ask."""
    if mask is None:
        return []
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise TypeError(
            "prefix tokens and clusters that attend honour a mask (B, 1, N, N) or none; this attention implementation "
            "makes another kind: use attn_implementation='sdpa' or 'eager', or PhiConfig(prefix='mix', pool=0)"
        )
    return [mask if mask.shape[2] == 1 else asking.take(mask, dim=2)]
