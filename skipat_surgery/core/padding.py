"""Padding: tokens that no token attends to, which must not reach the others by way of Φ either.

A host that lays images of several sizes out on one grid masks the rest of it for its MSA, as Idefics does, and a user
may mask tokens of any. What the mask leaves out counts for nothing in Φ: not in its convolution, where it is like what
lies beyond the edge of the grid, nor in a mean, nor in a cluster. So the tokens of an image come out as they do alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

# A score lowered by this much has no weight in a softmax, in any precision.
NO_WEIGHT = -1000.0


def attended_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Which tokens any token attends to, (B or 1, N), from the arguments of an MSA; None where it is given no mask.

    An image of nothing but padding counts as a whole.
    """
    kept = _of_torch(*args, **kwargs) if _are_torchs(args, kwargs) else _of_host(args, kwargs)
    return None if kept is None else kept | ~kept.any(dim=1, keepdim=True)


def _of_host(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Of an MSA of transformers or timm, whose masks keep where True."""
    mask = kwargs.get("attention_mask", kwargs.get("attn_mask", args[1] if len(args) > 1 else None))
    if isinstance(mask, BlockMask):
        batch, heads, queries, keys = mask.shape
        mask = create_mask(mask.mask_mod, batch, heads, queries, keys, device=str(mask.kv_indices.device))
    if mask is None:
        return None
    mask = mask[:, 0] if mask.ndim == 4 else mask  # padding is the same for every head
    kept = mask > NO_WEIGHT if mask.is_floating_point() else mask.bool()
    if mask.ndim == 3 or "attn_mask" in kwargs:
        kept = kept.any(dim=-2)
    return kept.view(-1, kept.shape[-1])


def _are_torchs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether these are the arguments of torch's own MSA: its input as query, key and value.

    A hook on the module gives it each of them as another tensor.
    """
    first = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[:3]
    return len(first) == 3 and all(isinstance(x, Tensor) and x.shape == first[0].shape for x in first)


def _of_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    **others: Any,
) -> Tensor | None:
    """The same for torch's own MSA, by the arguments of its forward; its masks leave out where True.

    A mask of its scores is (N, N), or (B·heads, N, N).
    """
    kept = None
    if attn_mask is not None:
        kept = _not_left_out(attn_mask).any(dim=-2)
        kept = kept[None] if kept.ndim == 1 else kept.unflatten(0, (query.shape[0], -1))[:, 0]
    if key_padding_mask is not None:
        kept = _not_left_out(key_padding_mask) if kept is None else kept & _not_left_out(key_padding_mask)
    return kept


def _not_left_out(mask: Tensor) -> Tensor:
    return mask > NO_WEIGHT if mask.is_floating_point() else ~mask


def mean_of(x: Tensor, attended: Tensor | None) -> Tensor:
    """The mean (B, 1, D) over tokens (B, n, D), of which only those that are attended to (B, n) count."""
    if attended is None:
        return x.mean(dim=1, keepdim=True)
    counts = attended.sum(dim=1).clamp(min=1)[:, None, None]
    return without_padding(x, attended).sum(dim=1, keepdim=True) / counts.to(x.dtype)


def without_padding(x: Tensor, attended: Tensor | None) -> Tensor:
    """Tokens (B, n, D), with zeros where they are not attended to (B, n)."""
    return x if attended is None else x.masked_fill(~attended[..., None], 0)
