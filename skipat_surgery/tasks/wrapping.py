"""A model without what is put around it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim.swa_utils import AveragedModel

# A user's own model may have an attribute called `module` too.
WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, FullyShardedDataParallel, AveragedModel)


def unwrapped(model: Any) -> Any:
    """A model without what DDP, FSDP, torch.compile, an average or PEFT put around it."""
    while isinstance(model, WRAPPERS) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, WRAPPERS) else model._orig_mod
    return model.get_base_model() if hasattr(model, "get_base_model") else model
