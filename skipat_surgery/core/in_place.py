"""The activations in the MLPs of cut blocks, and Φ's own, made to write over their input.

Z must live while the MLP runs, and that is where the memory of a forward peaks: the hidden units, in most models four
times as wide as Z, are there before and after the activation. Once is enough where no gradient needs them, and leaves
more room than Z takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from .grafting import Grafted, graft, ungraft
from .recording import is_recorded


def may_overwrite(module: nn.Module) -> bool:
    """Whether nothing needs or sees what passes between the parts of a module.

    Gradients need it, and a hook on any of its parts, or on all modules, may have kept it. A compiler plans memory by
    itself.
    """
    if torch.is_grad_enabled() or is_recorded():
        return False
    if every_module._global_forward_hooks or every_module._global_forward_pre_hooks:
        return False
    return not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def may_write(module: nn.Module) -> bool:
    """Whether a module may write into what its parts give it.

    With gradients it may not: what a quantised layer, or one with a backward hook, returns is a view that autograd
    does not let anyone write into. A compiler makes a write into whatever is best.
    """
    return torch.compiler.is_compiling() or may_overwrite(module)


def _gelu(activation: Any, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_(x, approximate=activation.approximate)


def _exact_gelu(activation: Any, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_(x)


def _tanh_gelu(activation: Any, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_(x, approximate="tanh")


def _quick_gelu(activation: Any, x: Tensor) -> Tensor:
    return x.mul_((1.702 * x).sigmoid_())


def _silu(activation: Any, x: Tensor) -> Tensor:
    return torch.ops.aten.silu_(x)


# By dotted path, so that nothing is imported. Others are left as they are.
IN_PLACE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "torch.nn.modules.activation.GELU": _gelu,
    "torch.nn.modules.activation.SiLU": _silu,
    "timm.layers.activations.GELU": _exact_gelu,
    "timm.layers.activations.GELUTanh": _tanh_gelu,
    "timm.layers.activations.QuickGELU": _quick_gelu,
    "transformers.activations.GELUActivation": _exact_gelu,
    "transformers.activations.GELUTanh": _tanh_gelu,
    "transformers.activations.QuickGELUActivation": _quick_gelu,
    "transformers.activations.SiLUActivation": _silu,
}


class InPlaceActivation(Grafted):
    """Writes over its input where `may_overwrite` says so of its MLP."""

    skipat_in_place: Callable[[Any, Tensor], Tensor]
    skipat_mlp: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if may_overwrite(self.skipat_mlp):
            return self.skipat_in_place(self, x)
        return super().forward(x)  # type: ignore[misc]


def in_place(activation: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    """The function that does in place what an activation does; None where there is none."""
    if "python" in getattr(getattr(activation, "act", None), "__name__", ""):
        return None  # transformers' gelu_python, which rounds otherwise
    return IN_PLACE.get(f"{type(activation).__module__}.{type(activation).__qualname__}")


def save_memory(block: nn.Module, attention: str) -> None:
    """Let the activations of a block, but for any in the slot of its MSA, write over their input."""
    parts = [part for slot, part in block.named_children() if slot != attention]
    for mlp in [module for part in parts for module in part.modules()]:
        for activation in mlp.children():
            function = in_place(activation)
            if function is not None:
                graft(activation, InPlaceActivation)
                # Past nn.Module's own: the MLP must not become a submodule of its activation.
                vars(activation).update(skipat_in_place=function, skipat_mlp=mlp)


def undo_save_memory(block: nn.Module) -> None:
    """Undo `save_memory`."""
    for module in block.modules():
        if isinstance(module, InPlaceActivation):
            ungraft(module)
            del module.__dict__["skipat_in_place"], module.__dict__["skipat_mlp"]
