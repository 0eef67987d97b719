"""When a tensor that passes between the parts of a module may be written over, which saves memory."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as every_module


def may_overwrite(module: nn.Module) -> bool:
    """Whether nothing needs or sees what passes between the parts of a module.

    Gradients need it, and a hook on any of its parts, or on all modules, may have kept it. A compiler plans memory by
    itself.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if every_module._global_forward_hooks or every_module._global_forward_pre_hooks:
        return False
    return not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
