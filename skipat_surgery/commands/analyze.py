"""Which blocks of a model to skip: how alike they are (CKA), and a plan from solved Φ and measured latency.

    skipat analyze --n_skip 4                     # a demonstration on scikit-learn's digits
    skipat analyze --model ID --dataset ./images --speedup 1.1 --output_dir out
    skipat analyze recipes/configs/analyze.yaml

Writes ``cka.png``, ``frontier.png``, ``analysis.json``, and the ``plan.json`` that `--plan` of `skipat convert` and
`skipat distill` takes, into the output directory. No label is read. ``python recipes/analyze.py`` does the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

import skipat_surgery

from ..analysis.cka import SMALLEST_BATCH, Similarity
from ..analysis.pictures import pyplot
from ..analysis.planning import Plan, check_budget, check_plannable
from ..analysis.scoring import check_offers, num_fitting
from ..convert.settings import option
from ..terminal import for_wide_tables
from . import run_state
from .arguments import Budget, Source
from .checks import check_at_least, check_writable
from .machine import keep_freed_memory, machine, slowness
from .options import parse
from .running import run_command
from .sources import load_data, load_model, unlabelled

ANALYSIS, PLAN = "analysis.json", "plan.json"


@dataclass(frozen=True)
class Arguments(Budget, Source):
    """How it is analysed."""

    dataset_config: str | None = option(None, "Configuration of a data set that has several.")
    train_split: str | None = option(None, "Split to draw images from; found when left out.")
    image_column: str | None = option(None, "Column of images; found when left out.")
    batch_size: int = option(128, "Images a batch.")
    mixed_precision: str | None = option(None, "no, bf16 or fp16.")
    seed: int = option(0, "Seed of the images that are drawn, and of a fresh Φ.")
    output_dir: str = option("outputs/analysis", "Where everything is written.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.speedup, self.n_skip, self.max_kl)
        check_at_least(1, self, "num_images", "batch_size", "max_run")
        if self.cka:
            check_at_least(SMALLEST_BATCH, self, "num_images", "batch_size")


class Analysis:
    """One analysis: what can be checked is checked in `__init__`, and everything is written in the end."""

    def __init__(self, args: Arguments) -> None:
        self.args, self.output = args, Path(args.output_dir)
        self.console = for_wide_tables()
        check_writable(self.output)
        pyplot()
        phis = args.phis
        self.accelerator = Accelerator(mixed_precision=args.mixed_precision)
        host = load_model(args.model, self.accelerator, self.output, args.task)
        data = load_data(args.dataset, None, args.dataset_config, args.train_split, None, args.image_column, "none")
        check_plannable(host.model, args.n_skip)
        check_offers(host.model, phis, num_fitting(min(args.num_images, len(data.train)), args.batch_size))
        self.said = [data.summary, *slowness(self.accelerator.device, self.accelerator.mixed_precision)]
        self.loader = unlabelled(host, data, args.num_images, args.batch_size, args.seed)
        self.model = host.model.to(self.accelerator.device)

    def run(self) -> None:
        """Analyse, draw, write."""
        args, output = self.args, self.output
        for line in self.said:
            self.console.print(line, markup=False, soft_wrap=True)
        with self.accelerator.autocast():
            plan, similarity = analysed(self.model, self.loader, args, args.seed)
        output.mkdir(parents=True, exist_ok=True)
        write(output, plan, similarity, {"machine": machine(self.accelerator.device), "arguments": asdict(args)})
        self.console.print(plan.table())
        if warning := shortfall(plan, args):
            self.console.print(warning, soft_wrap=True)
        given = f"--model {args.model} --dataset {args.dataset} --plan {output / PLAN}"
        self.console.print(f"Next: skipat distill {given}", soft_wrap=True)
        self.console.print(f"Pictures and figures: {output}")


def analysed(model: nn.Module, batches: Iterable[Any], budget: Budget, seed: int) -> tuple[Plan, Similarity | None]:
    """The plan for a budget, and CKA where that is asked for."""
    torch.manual_seed(seed)  # a fresh Φ is drawn
    similarity = skipat_surgery.cka(model, batches) if budget.cka else None
    plan = skipat_surgery.plan(
        model,
        batches,
        speedup=budget.speedup,
        n_skip=budget.n_skip,
        max_kl=budget.max_kl,
        phi=budget.phis,
        max_run=budget.max_run,
    )
    return plan, similarity


def shortfall(plan: Plan, budget: Budget) -> str:
    """What to know where a plan was measured slower than it was to be; empty where it was not."""
    if budget.speedup is None or plan.speedup >= budget.speedup:
        return ""
    return (
        f"WARNING: {plan.speedup:.2f}× was measured, and {budget.speedup:g}× asked for: what the blocks save "
        "alone does not add up here, as where a model is small or the machine busy"
    )


def write(folder: Path, plan: Plan, similarity: Similarity | None, found: dict[str, Any]) -> None:
    """Write pictures, figures, and last the plan.

    Args:
        folder: Where to.
        plan: The plan.
        similarity: CKA, where it was computed.
        found: What ``analysis.json`` is to hold besides.
    """
    plan.plot(folder / "frontier.png")
    found = {**found, "plan": plan.to_dict()}
    if similarity is not None:
        similarity.plot(folder / "cka.png", skip=plan)
        found["cka"] = similarity.to_dict()
    run_state.write_json(folder / ANALYSIS, found)
    plan.save(folder / PLAN)


def prepare(argv: list[str], name: str | None = None) -> Analysis:
    """The analysis that a command line asks for, checked."""
    keep_freed_memory()
    return Analysis(*parse((Arguments,), argv, __doc__ or "", name=name))


def main(argv: list[str] | None = None, name: str = "analyze.py") -> None:
    """Run, or say in one line why not."""
    run_command(name, partial(prepare, name=name), argv)


if __name__ == "__main__":
    main()
