"""One block's MSA and the Φ in its place, operation by operation.

    python benchmarks/profiles.py --image_sizes 224

Takes the options of ``recipes/benchmark.py``.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from skipat_surgery.commands.benchmark import Arguments, Benchmark
from skipat_surgery.commands.options import parse
from skipat_surgery.core.config import PhiConfig
from skipat_surgery.core.tables import markdown_table
from skipat_surgery.observing import evaluating
from skipat_surgery.surgery import apply
from skipat_surgery.tower import Tower

REPEATS = 20
SHOWN = 10


def of_a_block(model: nn.Module, skip: Iterable[int], phis: Mapping[str, PhiConfig], images: Tensor) -> str:
    """Markdown tables of where the time goes in the first skipped block, with its norm and MSA, and with each Φ.

    Args:
        model: Untouched; it stays so.
        skip: The blocks to skip.
        phis: The Φ, by name.
        images: One batch (B, C, H, W).
    """
    skip = sorted(skip)
    tower = Tower.of(model)
    block = tower.blocks[skip[0]]
    slots = filter(None, (tower.family.norm, tower.family.attention))
    tables = {"norm and MSA": _calls(model, [block.get_submodule(slot) for slot in slots], images)}
    for name, phi in phis.items():
        cut = apply(copy.deepcopy(model), skip, phi)
        found: Any = Tower.of(cut).blocks[skip[0]].phi
        tables[name] = _calls(cut, [found], images)
    return "\n\n".join(_table(name, calls, images) for name, calls in tables.items())


def _calls(model: nn.Module, modules: list[nn.Module], images: Tensor) -> list[Callable[[], object]]:
    """Calls of modules with the arguments that they are given in a forward of their model."""
    found: list[Callable[[], object]] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(lambda: module.forward(*args, **kwargs))

    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    with evaluating(model):
        model(images)
    for hook in hooks:
        hook.remove()
    return found


def _table(name: str, calls: list[Callable[[], object]], images: Tensor) -> str:
    device = images.device.type
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with evaluating():
        for _ in range(3):
            for call in calls:
                call()
        with profile(activities=activities) as profiler:
            for _ in range(REPEATS):
                for call in calls:
                    call()
    attribute = f"self_{'device' if device == 'cuda' else 'cpu'}_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, attribute))
    whole = sum(getattr(event, attribute) for event in events)
    rows = []
    for event in events[:SHOWN]:
        spent = getattr(event, attribute)
        rows.append([event.key, f"{event.count / REPEATS:g}", f"{spent / REPEATS:.0f}", f"{spent / whole:.0%}"])
    return f"{name}: {whole / REPEATS:.0f} µs\n\n" + markdown_table(["operation", "calls", "µs", "%"], rows)


class Profiles(Benchmark):
    """One attended and one skipped block, operation by operation."""

    def run(self) -> None:
        """A table for every size and dtype."""
        args, texts = self.args, []
        for size in map(int, args.image_sizes.split(",")):
            for dtype in args.precisions:
                model = self.model(size, dtype)
                table = of_a_block(model, self.skip, args.phis, self.images(model, size, dtype))
                texts.append(f"{args.model}, {size} px, {dtype}\n\n{table}")
        self.write([], "\n\n".join(texts))


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    (args,) = parse((Arguments,), sys.argv[1:] if argv is None else argv, "One MSA and one Φ, operation by operation.")
    Profiles(args).run()


if __name__ == "__main__":
    main()
