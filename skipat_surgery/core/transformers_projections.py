"""What the MSAs of transformers compute, read from their modules."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .clusters import Clusters
from .projections import Asking, Projection, Projections
from .ragged import select


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
    query, key, value = _query_key_value(inner)
    return Projections(
        num_heads=num_heads,
        num_key_heads=num_heads,
        num_value_heads=num_heads,
        scale=_first(inner, "scaling", "scale"),
        query=query,
        key=key,
        value=value,
        output=attention.output if inner is not attention else partial(_output, attention),
        dropout=_dropout(inner),
        rotate=None if position_embeddings is None else partial(_rotate, type(attention), *position_embeddings),
        bias=partial(_masked_rows, _causal(inner, hidden_states) if attention_mask is None else attention_mask),
    )


def rotary_projections(attention: Any, hidden_states: Tensor, **kwargs: Any) -> Projections:
    """Of V-JEPA 2's MSA, which rotates by the place of a token itself, time, height and width apart."""
    return replace(transformers_projections(attention, hidden_states), rotate=partial(_rotate_by_place, attention))


def normed_projections(attention: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Projections:
    """Of Sapiens 2's MSA, which norms queries and keys head by head, and whose heads may share keys and values."""
    return replace(
        transformers_projections(attention, hidden_states, *args, **kwargs),
        num_key_heads=attention.num_key_value_heads,
        num_value_heads=attention.num_key_value_heads,
        query=Projection.of(attention.q_proj),
        key=Projection.of(attention.k_proj),
        norm_query=attention.q_norm,
        norm_key=attention.k_norm,
    )


def all_rotary_projections(
    attention: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
) -> Projections:
    """Of MLCD's MSA, which rotates the class token as well."""
    cls, (cos, sin) = type(attention), position_embeddings
    return replace(
        transformers_projections(attention, hidden_states, **kwargs),
        rotate=partial(_rotate_all, cls, cos, sin),
        rotate_special=lambda query: _rotate_all(cls, cos, sin, query, None, query.shape[2]),
    )


def packed_projections(
    attention: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None, **kwargs: Any
) -> Projections:
    """Of an MSA over packed images, and its arguments laid out: an image in each row (B, N, D).

    It may norm queries and keys head by head.
    """
    found = transformers_projections(attention, hidden_states)
    if position_embeddings is not None:
        found = replace(found, rotate=partial(_rotate_each, type(attention), *position_embeddings))
    if hasattr(attention, "qkv") and hasattr(attention, "q_norm"):
        found = replace(found, norm_query=attention.q_norm, norm_key=attention.k_norm)
    return found


def packed_shared_projections(attention: Any, hidden_states: Tensor, **kwargs: Any) -> Projections:
    """`packed_projections` of EXAONE 4.5's MSA, whose heads share keys and values."""
    count, rows = attention.num_key_value_heads, (attention.q_dim, attention.kv_dim, attention.kv_dim)
    query, key, value = Projection.parts(attention.qkv, rows)
    return replace(
        packed_projections(attention, hidden_states, **kwargs),
        num_key_heads=count,
        num_value_heads=count,
        query=query,
        key=key,
        value=value,
    )


def _first(module: Any, *names: str) -> Any:
    """The attribute of whichever name the module has."""
    return next(getattr(module, name) for name in names if hasattr(module, name))


def _query_key_value(attention: Any) -> tuple[Projection, ...]:
    if hasattr(attention, "qkv"):
        return Projection.thirds(attention.qkv)
    names = (("q_proj", "query", "q"), ("k_proj", "key", "k"), ("v_proj", "value", "v"))
    query, key, value = (_first(attention, *each) for each in names)
    norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return *(_normed(linear, norm) for linear, norm in zip((query, key), norms, strict=True)), Projection.of(value)


def _normed(linear: Any, norm: nn.Module | None) -> Projection:
    """A projection, and the norm over all heads at once that may follow it."""
    if norm is None or isinstance(norm, nn.Identity):
        return Projection.of(linear)
    return Projection(lambda x: norm(linear(x)))


def _dropout(attention: Any) -> float:
    names = ("attention_dropout", "dropout_prob", "dropout")
    dropout = next((getattr(attention, name) for name in names if hasattr(attention, name)), 0.0)  # VitDet has none
    return dropout.p if isinstance(dropout, nn.Dropout) else dropout


def _output(attention: Any, context: Tensor, asking: Tensor) -> Tensor:
    out = _first(attention, "o_proj", "out_proj", "proj", "projection", "projection_layer")(context)
    return attention.projection_dropout(out) if hasattr(attention, "projection_dropout") else out


def _rotate(cls: type, cos: Tensor, sin: Tensor, key: Tensor, clusters: Clusters | None) -> Tensor:
    """Rotary keys (B, H, N, d) of the patches or clusters, the last tokens."""
    if clusters is not None:
        cos, sin = (part.index_select(-2, clusters.seeds) for part in (cos, sin))
    patches, module, dtype = sin.shape[-2], sys.modules[cls.__module__], key.dtype
    special, key = key.split((key.shape[-2] - patches, patches), dim=-2)
    if hasattr(module, "apply_rotary_pos_emb_vision"):  # which rotates in float32, whatever the model is in
        key, cos, sin = key.float(), cos.float(), sin.float()
    rotated = key * cos + module.rotate_half(key) * sin
    return torch.cat([special, rotated.to(dtype)], dim=-2)


def _causal(attention: Any, h: Tensor) -> Tensor | None:
    """The causal mask (1, 1, N, N) that fused attention applies, for want of another, where its module says so.

    That of Phi-4 does, though its eager attention is not causal.
    """
    fused = getattr(getattr(attention, "config", None), "_attn_implementation", None) not in ("eager", "flex_attention")
    if not fused or not getattr(attention, "is_causal", False):
        return None
    return torch.ones(1, 1, h.shape[1], h.shape[1], dtype=torch.bool, device=h.device).tril()


def _rotate_by_place(attention: Any, key: Tensor, clusters: Clusters | None) -> Tensor:
    """Keys (B, H, N, d) of all patches, or of clusters, which lie where their seeds are."""
    places = None if clusters is None else clusters.seeds[None]
    return attention.apply_rotary_embeddings(key, attention.get_position_ids(key[:, 0], places))


def _rotate_all(
    cls: type, cos: Tensor, sin: Tensor, x: Tensor, clusters: Clusters | None, first: int | None = None
) -> Tensor:
    """(B, H, N, d) of all tokens, of special tokens and clusters, or of the first tokens."""
    cos, sin = (part[:first] if clusters is None else clusters.take(part, dim=0) for part in (cos, sin))
    x = x.transpose(1, 2)
    rotate = sys.modules[cls.__module__].apply_rotary_pos_emb_vision
    return rotate(x, x, cos.float(), sin.float())[0].transpose(1, 2)


def _rotate_each(cls: type, cos: Tensor, sin: Tensor, key: Tensor, clusters: Clusters | None) -> Tensor:
    """Keys (B, H, N, d) of patches, or of clusters, each at its seed; each image by its own (B, N, d)."""
    if clusters is not None:
        cos, sin = (select(part, clusters.seeds, dim=1) for part in (cos, sin))
    key, module = key.transpose(1, 2), sys.modules[cls.__module__]
    if hasattr(module, "apply_rotary_pos_emb_vision"):
        return module.apply_rotary_pos_emb_vision(key, key, cos, sin)[0].transpose(1, 2)
    return module.apply_rotary_pos_emb(key, key, cos, sin, unsqueeze_dim=2)[0].transpose(1, 2)


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
