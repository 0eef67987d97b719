"""Which blocks of a model to skip: how alike they are (CKA), and a plan from solved Φ and measured latency.

    python recipes/analyze.py --n_skip 4                     # a demonstration on scikit-learn's digits
    python recipes/analyze.py --model ID --dataset ./images --speedup 1.1 --output_dir out
    python recipes/analyze.py recipes/configs/analyze.yaml

Writes ``cka.png``, ``frontier.png``, ``analysis.json``, and the ``plan.json`` that ``recipes/distill.py --plan`` takes,
into the output directory. No label is read.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from torch.utils.data import DataLoader

import skipat_surgery
from skipat_surgery import PhiConfig

from ..convert.settings import option
from ..core.config import SkipatConfig
from . import digits, run_state
from .machine import keep_freed_memory, machine, quiet_libraries
from .options import parse
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


def load(args: Arguments, accelerator: Accelerator, output: Path) -> tuple[torch.nn.Module, DataLoader]:
    """The model and the images, in batches."""
    host = load_model(args.model, accelerator, output)
    data = load_data(args.dataset, None, args.dataset_config, args.train_split, None, args.image_column, "none")
    loader = unlabelled(host, data, args.num_images, args.batch_size, args.seed)
    return host.model.to(accelerator.device), loader


def run(args: Arguments) -> None:
    """Analyse, draw, write."""
    output, console = Path(args.output_dir), Console()
    output.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    model, loader = load(args, accelerator, output)
    torch.manual_seed(args.seed)  # a fresh Φ is drawn
    widths = args.expansions.split(",") if args.expansions else ()
    phis = [PhiConfig(expansion=float(width)) for width in widths] or None
    with accelerator.autocast():
        plan = skipat_surgery.plan(
            model, loader, speedup=args.speedup, n_skip=args.n_skip, max_kl=args.max_kl, phi=phis, max_run=args.max_run
        )
        similarity = skipat_surgery.cka(model, loader) if args.cka else None
    found = {"machine": machine(accelerator.device), "arguments": asdict(args), "plan": plan.to_dict()}
    plan.plot(output / "frontier.png")
    if similarity is not None:
        similarity.plot(output / "cka.png", skip=plan)
        found["cka"] = similarity.to_dict()
    run_state.write_json(output / "analysis.json", found)
    console.print(plan.table())
    run_state.write_json(output / "plan.json", SkipatConfig.parse(plan).to_dict())
    given = f"--model {args.model} --dataset {args.dataset} --plan {output / 'plan.json'}"
    console.print(f"Next: accelerate launch recipes/distill.py {given}")
    console.print(f"Pictures and figures: {output}")


def main() -> None:
    """Run, or say in one line why not."""
    quiet_libraries()
    keep_freed_memory()
    try:
        (args,) = parse((Arguments,), sys.argv[1:], (__doc__ or "").split("\n")[0])
        run(args)
    except (ValueError, TypeError, OSError) as error:
        print(f"analyze.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
