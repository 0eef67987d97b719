"""Which blocks of a model to skip: how alike they are (CKA), and a plan from solved Φ and measured latency.

    python recipes/analyze.py --n_skip 4                     # a demonstration on scikit-learn's digits
    python recipes/analyze.py --model ID --dataset ./images --speedup 1.1 --output_dir out
    python recipes/analyze.py recipes/configs/analyze.yaml

Writes ``cka.png``, ``frontier.png``, ``analysis.json``, and the ``plan.json`` that ``recipes/distill.py --plan`` takes,
into the output directory. No label is read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

import skipat_surgery
from skipat_surgery import PhiConfig

from ..analysis.cka import SMALLEST_BATCH, Similarity
from ..analysis.pictures import pyplot
from ..analysis.planning import Plan, check_budget, check_plannable
from ..convert.settings import option
from ..core.config import SkipatConfig
from ..terminal import for_wide_tables
from . import digits, run_state
from .checks import check_at_least, check_writable
from .machine import keep_freed_memory, machine
from .options import parse, parse_numbers
from .running import run_command
from .sources import load_data, load_model, unlabelled


@dataclass(frozen=True)
class Arguments:
    """What to analyse, on which images, for which budget."""

    model: str = option(digits.NAME, "HF id, directory, or timm/NAME; 'digits' trains the demonstration's teacher.")
    dataset: str = option(digits.NAME, "HF id, a folder of images or of parquet files, or 'digits'.")
    dataset_config: str | None = option(None, "Configuration of a data set that has several.")
    train_split: str | None = option(None, "Split to draw images from; found when left out.")
    image_column: str | None = option(None, "Column of images; found when left out.")
    speedup: float | None = option(None, "Plan for this speed-up over the untouched model.")
    n_skip: int | None = option(None, "Plan for this number of blocks.")
    max_kl: float | None = option(None, "Plan for the fastest set whose KL to the untouched model stays below.")
    expansions: str | None = option(
        None, "Widths of the default Φ to choose from, such as 0.25,0.5; when left out, Φ's from near to cheap."
    )
    max_run: int | None = option(None, "The longest run of a Φ without clusters; half the blocks when left out.")
    num_images: int = option(2048, "Images; three quarters fit, one quarter scores.")
    batch_size: int = option(128, "Images a batch.")
    cka: bool = option(True, "Whether to compute CKA.")
    mixed_precision: str | None = option(None, "no, bf16 or fp16.")
    seed: int = option(0, "Seed of the images that are drawn, and of a fresh Φ.")
    output_dir: str = option("outputs/analysis", "Where everything is written.")

    def __post_init__(self) -> None:
        check_budget(self.speedup, self.n_skip, self.max_kl)
        check_at_least(1, self, "num_images", "batch_size", "max_run")
        if self.cka:
            check_at_least(SMALLEST_BATCH, self, "num_images", "batch_size")

    @property
    def phis(self) -> list[PhiConfig] | None:
        """The Φ to choose from; None for those on offer."""
        if self.expansions is None:
            return None
        return [PhiConfig(expansion=width) for width in parse_numbers(self.expansions, float, "expansions")]


class Analysis:
    """One analysis: what can be checked is checked in `__init__`, and everything is written in the end."""

    def __init__(self, args: Arguments) -> None:
        self.args, self.phis, self.output = args, args.phis, Path(args.output_dir)
        self.console = for_wide_tables()
        check_writable(self.output)
        pyplot()
        self.accelerator = Accelerator(mixed_precision=args.mixed_precision)
        host = load_model(args.model, self.accelerator, self.output)
        check_plannable(host.model, args.n_skip)
        data = load_data(args.dataset, None, args.dataset_config, args.train_split, None, args.image_column, "none")
        self.loader = unlabelled(host, data, args.num_images, args.batch_size, args.seed)
        self.model = host.model.to(self.accelerator.device)

    def run(self) -> None:
        """Analyse, draw, write."""
        args = self.args
        torch.manual_seed(args.seed)  # a fresh Φ is drawn
        with self.accelerator.autocast():
            similarity = skipat_surgery.cka(self.model, self.loader) if args.cka else None
            plan = skipat_surgery.plan(
                self.model,
                self.loader,
                speedup=args.speedup,
                n_skip=args.n_skip,
                max_kl=args.max_kl,
                phi=self.phis,
                max_run=args.max_run,
            )
        self.write(plan, similarity)

    def write(self, plan: Plan, similarity: Similarity | None) -> None:
        """Write pictures, figures and the plan, and say where."""
        args, output = self.args, self.output
        output.mkdir(parents=True, exist_ok=True)
        found = {"machine": machine(self.accelerator.device), "arguments": asdict(args), "plan": plan.to_dict()}
        plan.plot(output / "frontier.png")
        if similarity is not None:
            similarity.plot(output / "cka.png", skip=plan)
            found["cka"] = similarity.to_dict()
        run_state.write_json(output / "analysis.json", found)
        self.console.print(plan.table())
        run_state.write_json(output / "plan.json", SkipatConfig.parse(plan).to_dict())
        given = f"--model {args.model} --dataset {args.dataset} --plan {output / 'plan.json'}"
        self.console.print(f"Next: accelerate launch recipes/distill.py {given}", soft_wrap=True)
        self.console.print(f"Pictures and figures: {output}")


def prepare(argv: list[str]) -> Analysis:
    """The analysis that a command line asks for, checked."""
    keep_freed_memory()
    return Analysis(*parse((Arguments,), argv, (__doc__ or "").split("\n")[0]))


def main(argv: list[str] | None = None) -> None:
    """Run, or say in one line why not."""
    run_command("analyze.py", prepare, argv)


if __name__ == "__main__":
    main()
