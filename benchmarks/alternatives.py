"""What a user would take instead of the cut, alone and together with it: unfused attention, int8, pruning.

    python benchmarks/alternatives.py --compile true

Takes the options of ``recipes/benchmark.py``.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from skipat_surgery.commands.benchmark import Arguments, Benchmark
from skipat_surgery.commands.options import parse
from skipat_surgery.core.config import PhiConfig
from skipat_surgery.measure.benchmark import Rival
from skipat_surgery.measure.counting import gflops
from skipat_surgery.surgery import apply
from skipat_surgery.tower import Tower


def alternatives(untouched: Rival, cut: Rival, skip: Iterable[int], phi: PhiConfig, images: Tensor) -> list[Rival]:
    """What a user would take instead, alone and together with the cut: unfused attention, int8, pruning.

    Args:
        untouched: The untouched model.
        cut: The same, cut.
        skip: The blocks that are skipped.
        phi: The Φ that is in them.
        images: A batch (B, C, H, W).

    Raises:
        ImportError: torchao or torch-pruning is not installed; with what to install.
    """
    pruned = prune(untouched.model, images[:1], gflops(untouched.model) - gflops(cut.model))
    cut_too = apply(copy.deepcopy(pruned), skip, phi)
    return [
        *(Rival(rival.name, unfuse(rival.model), mode="unfused") for rival in (untouched, cut)),
        *(int8(rival) for rival in (untouched, cut)),
        Rival(untouched.name, pruned, mode="MLPs pruned"),
        Rival(cut.name, cut_too, mode="MLPs pruned"),
    ]


def unfuse(model: nn.Module) -> nn.Module:
    """A copy with the attention that SDPA replaced, which is what the paper compares with."""
    model = copy.deepcopy(model)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")  # type: ignore[operator]
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    return model


def int8(rival: Rival) -> Rival:
    """A copy with every Linear in dynamic int8 by torchao, compiled, as torchao asks for.

    Raises:
        ImportError: torchao is not installed.
    """
    torchao = _need("torchao.quantization", "torchao")
    model = copy.deepcopy(rival.model).eval()
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    call = torch.compile(model, dynamic=False)
    return Rival(rival.name, model, call, "int8, compiled", counts=False, trains=False)


def prune(model: nn.Module, images: Tensor, saved_gflops: float) -> nn.Module:
    """A copy whose MLPs torch-pruning has narrowed, by magnitude, until it saves so many GFLOPs an image.

    Raises:
        ImportError: torch-pruning is not installed.
    """
    torch_pruning = _need("torch_pruning", "torch-pruning")
    model = copy.deepcopy(model)
    tower = Tower.of(model)
    width = tower.family.width(tower.module)
    inside = {m for block in tower.blocks for m in block.get_submodule(tower.family.attention).modules()}
    widening = [
        module
        for block in tower.blocks
        for module in block.modules()
        if isinstance(module, nn.Linear) and module not in inside and module.in_features == width
    ]
    height, columns = tower.grid(images)
    tokens = height * columns + tower.num_special_tokens
    whole = sum(2 * 2 * layer.weight.numel() * tokens for layer in widening) / 1e9  # 2 Linears, 2 FLOPs a multiply-add
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
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this comparison needs {package}: pip install 'skipat-surgery[benchmark]'") from error


class Alternatives(Benchmark):
    """The benchmark with what else a user could take."""

    def line_up(self, model: nn.Module, images: Tensor) -> list[Rival]:
        """The usual models, and the alternatives to the first Φ."""
        found = super().line_up(model, images)
        phi = next(iter(self.args.phis.values()))
        return found + alternatives(found[0], found[1], self.skip, phi, images)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    (args,) = parse((Arguments,), sys.argv[1:] if argv is None else argv, "Measure a cut model beside alternatives.")
    Alternatives(args).run()


if __name__ == "__main__":
    main()
