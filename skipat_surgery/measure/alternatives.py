"""What a user would take instead of a cut: weights in int8 (torchao), MLPs narrowed (torch-pruning).

Neither library comes with this one: ``pip install 'skipat-surgery[benchmark]'``.
"""

from __future__ import annotations

import copy
import importlib
import math
from typing import Any

from torch import Tensor, nn

from ..tower import Tower


def int8(model: nn.Module) -> nn.Module:
    """A copy with every Linear in dynamic int8 by torchao, which asks for it to be compiled.

    Raises:
        ImportError: torchao is not installed.
    """
    torchao = _need("torchao.quantization", "torchao")
    model = copy.deepcopy(model).eval()
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    return model


def prune(model: nn.Module, images: Tensor, saved_gflops: float) -> nn.Module:
    """A copy whose MLPs torch-pruning has narrowed, by magnitude, until it saves so many GFLOPs an image.

    Raises:
        ImportError: torch-pruning is not installed.
    """
    torch_pruning = _need("torch_pruning", "torch-pruning")
    model = copy.deepcopy(model)
    tower = Tower.of(model)
    inside = {m for block in tower.blocks for m in block.get_submodule(tower.family.attention).modules()}
    widening: dict[nn.Linear, int] = {}  # with how many tokens go through it
    for stage in tower.stages:
        tokens = math.prod(stage.grid(tower.grid(images))) + tower.num_special_tokens
        for module in (module for index in stage.blocks for module in tower.blocks[index].modules()):
            if isinstance(module, nn.Linear) and module not in inside and module.in_features == stage.width:
                widening[module] = tokens
    # 2 Linears, 2 FLOPs a multiply-add
    whole = sum(2 * 2 * layer.weight.numel() * tokens for layer, tokens in widening.items()) / 1e9
    torch_pruning.pruner.BasePruner(
        model,
        images,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.0,
        pruning_ratio_dict=dict.fromkeys(widening, saved_gflops / whole),
        ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear) and m not in widening],
        round_to=8,
    ).step()
    return model


def _need(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this comparison needs {package}: pip install 'skipat-surgery[benchmark]'") from error
