"""What a user would take instead of the cut, alone and together with it: unfused attention, int8, pruning.

    python benchmarks/alternatives.py --compile true

Takes the options of ``recipes/benchmark.py``.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from skipat_surgery.commands.benchmark import Arguments, Benchmark
from skipat_surgery.commands.options import parse
from skipat_surgery.core.config import PhiConfig
from skipat_surgery.measure.alternatives import int8, prune
from skipat_surgery.measure.benchmark import Rival
from skipat_surgery.measure.counting import gflops
from skipat_surgery.surgery import apply


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
        *(_int8(rival) for rival in (untouched, cut)),
        Rival(untouched.name, pruned, mode="MLPs pruned"),
        Rival(cut.name, cut_too, mode="MLPs pruned"),
    ]


def _int8(rival: Rival) -> Rival:
    model = int8(rival.model)
    return Rival(rival.name, model, torch.compile(model, dynamic=False), "int8, compiled", counts=False, trains=False)


def unfuse(model: nn.Module) -> nn.Module:
    """A copy with the attention that SDPA replaced, which is what the paper compares with."""
    model = copy.deepcopy(model)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")  # type: ignore[operator]
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    return model


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
