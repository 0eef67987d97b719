"""What the MSAs of timm compute, read from their modules."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .clusters import Clusters
from .projections import Asking, Projection, Projections
from .ragged import select

READ = ("Attention", "AttentionRope", "DiffAttention", "EvaAttention", "RelPosAttention", "TalkingHeadAttn")


def timm_attends(attention: nn.Module) -> bool:
    """Whether `timm_projections` can read this MSA."""
    return type(attention).__qualname__ in READ


def timm_projections(
    attention: Any,
    x: Tensor,
    shared: Tensor | None = None,
    *,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    shared_rel_pos: Tensor | None = None,
    shared_rel_pos_bias: Tensor | None = None,
) -> Projections:
    """Of an MSA and the arguments of its forward."""
    differs = hasattr(attention, "sub_norm")  # differential attention: two maps a head, one subtracted from the other
    talks = hasattr(attention, "proj_w")  # talking heads: mixed before the softmax and after it
    heads = attention.num_heads * (2 if differs else 1)
    query, key, value = _query_key_value(attention)
    shared = next((bias for bias in (shared, shared_rel_pos, shared_rel_pos_bias) if bias is not None), None)
    return Projections(
        num_heads=heads,
        num_key_heads=getattr(attention, "num_kv_heads", heads),
        num_value_heads=getattr(attention, "num_kv_heads", attention.num_heads),
        scale=attention.scale,
        query=query,
        key=key,
        value=value,
        output=partial(_output, attention),
        dropout=0.0 if talks else attention.attn_drop.p,
        norm_query=_unless_identity(attention, "q_norm"),
        norm_key=_unless_identity(attention, "k_norm"),
        rotate=None if rope is None else partial(_rotate, attention, rope),
        mix=partial(_mixed, attention.proj_l) if talks else None,
        combine=partial(_difference, attention) if differs else partial(_talked, attention) if talks else None,
        bias=partial(_bias, attention, shared, None if is_causal else attn_mask, is_causal, x.shape[1]),
    )


def _query_key_value(attention: Any) -> tuple[Projection, ...]:
    if attention.qkv is None:
        return tuple(map(Projection.of, (attention.q_proj, attention.k_proj, attention.v_proj)))
    bias = None
    if getattr(attention, "q_bias", None) is not None:
        bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    return Projection.thirds(attention.qkv, bias)


def _unless_identity(attention: Any, name: str) -> nn.Module | None:
    norm = getattr(attention, name, None)
    return None if isinstance(norm, nn.Identity) else norm


def _difference(attention: Any, weights: Tensor) -> Tensor:
    """(B, 2H, P, N) to (B, H, P, N)."""
    first, second = weights.unflatten(1, (-1, 2)).unbind(2)
    return first - attention._compute_lambda().type_as(weights) * second


def _mixed(linear: nn.Module, maps: Tensor) -> Tensor:
    """(B, H, P, N) through a Linear over heads."""
    return linear(maps.movedim(1, -1)).movedim(-1, 1)


def _talked(attention: Any, weights: Tensor) -> Tensor:
    return attention.attn_drop(_mixed(attention.proj_w, weights))


def _output(attention: Any, context: Tensor, asking: Tensor) -> Tensor:
    if hasattr(attention, "sub_norm"):
        heads = context.unflatten(2, (attention.num_heads, -1))
        context = attention.sub_norm(heads).flatten(2) * (1 - attention.lambda_init)
    if getattr(attention, "norm", None) is not None:
        context = attention.norm(context)
    if getattr(attention, "gate", None) is not None:
        context = context * attention.gate(asking).sigmoid()
    return attention.proj_drop(attention.proj(context))


def _rotate(attention: Any, rope: Tensor, key: Tensor, clusters: Clusters | None) -> Tensor:
    """Rotary keys (B, G, N, d) of all but the first tokens, patches or clusters."""
    if clusters is not None:
        rope = select(rope, clusters.seeds, dim=-2)
    first = attention.num_prefix_tokens
    apply = sys.modules[type(attention).__module__].apply_rot_embed_cat
    half = getattr(attention, "rotate_half", False)
    return torch.cat([key[:, :, :first], apply(key[:, :, first:], rope, half=half)], dim=2).type_as(key)


def _bias(
    attention: Any, shared: Tensor | None, mask: Tensor | None, is_causal: bool, count: int, asking: Asking
) -> list[Tensor]:
    """The rows of masks and relative position biases that belong to the tokens that ask."""
    biases = [asking.take(mask, dim=-2)] if mask is not None else []
    if is_causal:
        biases.append(asking.take(torch.ones(count, count, dtype=torch.bool, device=_device(attention)).tril(), dim=-2))
    own = _relative_position_bias(attention, count)
    # BEiT adds what its blocks share to its own; the other kind has one or the other.
    if shared is not None and (own is None or hasattr(attention, "relative_position_bias_table")):
        biases.append(asking.take(shared, dim=-2))
    return biases if own is None else [*biases, asking.take(own, dim=-2)]


def _device(attention: nn.Module) -> torch.device:
    return next(attention.parameters()).device


def _relative_position_bias(attention: Any, count: int) -> Tensor | None:
    """An MSA's own relative position bias (H, N, N)."""
    owner = attention if hasattr(attention, "relative_position_bias_table") else getattr(attention, "rel_pos", None)
    if owner is None:
        return None
    table = getattr(owner, "relative_position_bias_table", None)
    if table is not None:
        return table[owner.relative_position_index.view(count, count)].permute(2, 0, 1)
    return None if owner is attention else owner.get_bias()


def gemma4_attends(attention: nn.Module) -> bool:
    """Whether `gemma4_projections` can read this MSA."""
    return type(attention).__qualname__ == "Gemma4Attention"


def gemma4_projections(
    attention: Any, x: Tensor, cos: Tensor, sin: Tensor, attn_mask: Tensor | None = None
) -> Projections:
    """Of Gemma 4's MSA, which norms values as well, and the arguments of its forward; for images it has no mask."""
    groups = attention.num_kv_heads

    def values(h: Tensor) -> Tensor:
        return attention.v_norm(attention.v_proj(h).unflatten(2, (groups, -1))).flatten(2)

    def rotate(key: Tensor, clusters: Clusters | None) -> Tensor:
        turn = (cos, sin) if clusters is None else (cos[:, clusters.seeds], sin[:, clusters.seeds])
        apply = sys.modules[type(attention).__module__].apply_multidimensional_rope
        return apply(key, *turn, ndim=2, unsqueeze_dim=1)

    return Projections(
        num_heads=attention.num_heads,
        num_key_heads=groups,
        num_value_heads=groups,
        scale=1.0,
        query=Projection(attention.q_proj),
        key=Projection(attention.k_proj),
        value=Projection(values),
        output=lambda context, asking: attention.proj_drop(attention.o_proj(context)),
        dropout=attention.attn_drop.p,
        norm_query=attention.q_norm,
        norm_key=attention.k_norm,
        rotate=rotate,
    )
