"""The limit: what a model would take if the MSA of chosen blocks cost nothing at all."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checking import check_skip
from ..core.config import PhiConfig, SkipatConfig
from ..core.cutting import lay_out_no_windows, take_out
from ..core.in_place import save_memory
from ..tower import Tower

ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
# What hosts do to Z before they add it: scale it, normalise it, drop some of it.
ABSORBED = {"mul", "mul_", "__mul__", "__rmul__", "layer_norm", "rms_norm", "dropout"}


class Nothing(Tensor):
    """What a deleted MSA returns: added to hidden states it leaves them as they are, without reading them."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ADDITIONS:
            return args[1] if isinstance(args[0], Nothing) else args[0]
        if name in ABSORBED:
            return args[0] if isinstance(args[0], Nothing) else args[1]
        return super().__torch_function__(func, types, args, kwargs or {})

    def __deepcopy__(self, memo: Any) -> Nothing:
        return self


class DeletedAttention(nn.Module):
    """Stands in the slot of an MSA and costs nothing, and neither does the residual addition after it."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        self.nothing = torch.empty(0).as_subclass(Nothing)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.nothing, None) if self.returns_tuple else self.nothing


def limit(model: nn.Module, skip: Iterable[int]) -> nn.Module:
    """A copy of a model that computes X + MLP(LN(X)) in chosen blocks: no Φ can make a model faster than this.

    The norm before the MSA and the residual addition after it go with the MSA; all else is as in a cut model. The
    output is good for timing only.

    Args:
        model: Untouched; it stays so.
        skip: The blocks, counted from 0.

    Raises:
        UnsupportedModelError: The model cannot be cut.
        ValueError: The model is cut, or a block is out of range.

    Examples:
        >>> import timm
        >>> import torch
        >>> from skipat_surgery.measure.limit import limit
        >>> small = dict(img_size=32, patch_size=8, embed_dim=32, depth=6, num_heads=2, num_classes=4)
        >>> model = timm.create_model("vit_tiny_patch16_224", **small).eval()
        >>> limit(model, skip=[2, 3])(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 4])
    """
    model = copy.deepcopy(model)
    tower = Tower.of(model)
    if tower.skip:
        raise ValueError("the limit is made from the untouched model, and this one is cut")
    config = SkipatConfig(dict.fromkeys(skip, PhiConfig()))
    check_skip(tower.module, tower.family, config, type(model).__name__)
    family = tower.family
    for index in {*config.skip, *(index - 1 for index in config.skip)}:
        save_memory(tower.blocks[index], family.attention)  # as in a cut model
    for index in config.skip:
        lay_out_no_windows(tower.blocks[index], family)
        take_out(tower.blocks[index], family, DeletedAttention(family.returns_tuple))
    return model
