"""What each choice is worth: the controls, and a base changed one thing at a time, all against one teacher.

    python benchmarks/ablation.py benchmarks/ablation.yaml
    python benchmarks/ablation.py --model ID --dataset ./images --skip 3-8 --rows 'base,kernel 3' --seeds 3

Writes ``ablation.md`` and ``ablation.json`` into the output directory; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

import skipat_surgery
from skipat_surgery import PhiConfig
from skipat_surgery.commands import digits, images, run_state
from skipat_surgery.commands.classes import names_of
from skipat_surgery.commands.machine import keep_freed_memory, machine, quiet_libraries
from skipat_surgery.commands.options import parse, parse_skip
from skipat_surgery.commands.presets import PRESETS
from skipat_surgery.commands.sources import load_data, load_model, unlabelled
from skipat_surgery.convert.evaluation import Evaluator
from skipat_surgery.convert.optimizers import freeze_untouched
from skipat_surgery.convert.settings import TrainingConfig, option
from skipat_surgery.convert.training import Progress, Training
from skipat_surgery.core.tables import markdown_table
from skipat_surgery.tower import Tower


@dataclass(frozen=True)
class Arguments:
    """What to compare, on which model and images."""

    model: str = option(digits.NAME, "HF id, directory, or timm/NAME.")
    dataset: str = option(digits.NAME, "HF id, a folder of images or of parquet files, or 'digits'.")
    skip: str = option("3-8", "Blocks to skip, counted from 0.")
    preset: str = option("fast", "How long each row trains.")
    rows: str = option("all", "Names of rows, separated by commas.")
    seeds: int = option(1, "Seeds of each row.")
    solve_images: int = option(4096, "Images for the closed-form start of Φ.")
    align_steps: int = option(60, "Batches of the layerwise training, in the rows that have it.")
    test_images: int = option(5000, "Images to measure on.")
    mixed_precision: str | None = option(None, "no, bf16 or fp16.")
    output_dir: str = option("outputs/ablation", "Where everything is written.")


@dataclass(frozen=True)
class Row:
    """One row of the table: the base, but for what it names.

    Args:
        phi: The Φ of every skipped block.
        solve: Whether Φ starts from the closed form.
        align: Whether it is aligned then.
        training: What is changed in the training; None does not train at all.
        zero: Whether Z = 0 takes the place of Φ.
    """

    phi: PhiConfig = field(default_factory=PhiConfig)
    solve: bool = True
    align: bool = False
    training: dict[str, Any] | None = field(default_factory=dict)
    zero: bool = False


# Spelt out, so that the table does not move with the defaults that it decides.
PHI = PhiConfig(expansion=0.5, kernel_size=5, channel_attention=True, prefix="mix", pool=0, reads_x=False)
BASE = Row(PHI)
ROWS = {
    "Z = 0": replace(BASE, solve=False, zero=True, training=None),
    "Z reused": replace(BASE, phi=replace(PHI, expansion=1.0), solve=False, training=None),
    "solved only": replace(BASE, training=None),
    "solved and aligned only": replace(BASE, align=True, training=None),
    "the paper's Φ solved only": replace(BASE, phi=PhiConfig.paper(), training=None),
    "base": BASE,
    "the paper's Φ": replace(BASE, phi=PhiConfig.paper()),
    "prefix pass": replace(BASE, phi=replace(PHI, prefix="pass")),
    "expansion 2": replace(BASE, phi=replace(PHI, expansion=2.0)),
    "expansion 1": replace(BASE, phi=replace(PHI, expansion=1.0)),
    "expansion 0.25": replace(BASE, phi=replace(PHI, expansion=0.25)),
    "expansion 0.125": replace(BASE, phi=replace(PHI, expansion=0.125)),
    "expansion 0.25 and kernel 3": replace(BASE, phi=replace(PHI, expansion=0.25, kernel_size=3)),
    "expansion 0.25 and kernel 3 without ECA": replace(
        BASE, phi=replace(PHI, expansion=0.25, kernel_size=3, channel_attention=False)
    ),
    "reads LN(X)": replace(BASE, phi=replace(PHI, reads_x=True)),
    "prefix attend": replace(BASE, phi=replace(PHI, prefix="attend")),
    "prefix attend with MSA of clusters and LN(X)": replace(
        BASE, phi=replace(PHI, prefix="attend", pool=2, reads_x=True)
    ),
    "kernel 3": replace(BASE, phi=replace(PHI, kernel_size=3)),
    "kernel 7": replace(BASE, phi=replace(PHI, kernel_size=7)),
    "without ECA": replace(BASE, phi=replace(PHI, channel_attention=False)),
    "not solved": replace(BASE, solve=False),
    "aligned": replace(BASE, align=True),
    "no loss between blocks": replace(BASE, training={"block_weight": 0.0}),
    "AdamW only": replace(BASE, training={"muon_learning_rate": 0.0}),
}


class Ablation:
    """The teacher, the images, and the table so far."""

    def __init__(self, args: Arguments, config: TrainingConfig) -> None:
        self.args, self.config = args, config
        self.output = Path(args.output_dir)
        self.output.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(mixed_precision=args.mixed_precision)
        self.host = load_model(args.model, self.accelerator, self.output)
        self.teacher = self.host.model.to(self.accelerator.device)
        self.data = load_data(args.dataset, self.host.num_classes, class_names=names_of(self.host.model))
        self.collate = images.Collate(self.host.preprocess, self.host.image_mode, self.host.image_size)
        columns = self.data.image_column, self.data.label_column, self.host.image_mode
        crop = images.training_crop(self.host.image_size, config.min_crop_scale)
        self.augmented = images.ImageItems(self.data.train, *columns, augment=crop, seed=config.seed)
        test = images.ImageItems(self.data.evaluation, *columns)
        some = Subset(test, range(min(args.test_images, len(test))))
        self.test = self.accelerator.prepare(DataLoader(some, 250, collate_fn=self.collate))
        labelled = bool(self.data.label_column)
        self.evaluate = Evaluator(self.teacher, labelled=labelled, gather=self.accelerator.gather_for_metrics)
        self.file = self.output / "ablation.json"
        self.done: dict[str, list[dict[str, float]]] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def run(self) -> None:
        """Fill the table, row by row and seed by seed."""
        names = list(ROWS) if self.args.rows == "all" else self.args.rows.split(",")
        if unknown := sorted(set(names) - set(ROWS)):
            raise ValueError(f"--rows names {unknown}; the rows are {list(ROWS)}")
        for seed in range(self.args.seeds):
            for name in tqdm(names, desc=f"Rows, seed {seed}", unit="row"):
                if len(self.done.get(name, [])) <= seed:
                    self.done.setdefault(name, []).append(self.measure(ROWS[name], seed))
                    run_state.write_json(self.file, self.done)
                    (self.output / "ablation.md").write_text(self.table())
        print(self.table())

    def measure(self, row: Row, seed: int) -> dict[str, float]:
        """The figures of one row with one seed."""
        torch.manual_seed(seed)
        student = skipat_surgery.apply(copy.deepcopy(self.teacher), parse_skip(self.args.skip), row.phi)
        began = time.perf_counter()
        with self.accelerator.autocast():
            self.start(row, student, seed)
        if row.training is not None:
            self.train(student, replace(self.config, seed=seed, **row.training))
        seconds = time.perf_counter() - began
        with self.accelerator.autocast():
            return {**self.evaluate(student, self.test), "seconds": seconds}

    def start(self, row: Row, student: nn.Module, seed: int) -> None:
        """Put Φ where the row lets it start from."""
        tower = Tower.of(student)
        for index in tower.skip:
            block: Any = tower.blocks[index]
            if row.zero:
                block.phi.register_forward_hook(lambda module, args, z: torch.zeros_like(z))
        if row.solve:
            skipat_surgery.solve(student, self.teacher, self.batches(seed, self.args.solve_images))
        if row.align:
            count = self.args.align_steps * self.config.batch_size
            skipat_surgery.align(student, self.teacher, self.batches(seed, count), steps=self.args.align_steps)

    def batches(self, seed: int, count: int) -> DataLoader:
        """So many training images in batches, without augmentation."""
        return unlabelled(self.host, self.data, count, self.config.batch_size, seed)

    def train(self, student: nn.Module, config: TrainingConfig) -> None:
        """Distil for as long as the preset says."""
        freeze_untouched(student)
        accelerator = Accelerator(mixed_precision=self.args.mixed_precision)
        config = replace(config, checkpoint_steps=config.max_steps, eval_steps=config.max_steps)
        training = Training(student, self.teacher, accelerator, config, Progress(), share=True)
        training.fit(training.loader(self.augmented, self.collate), measure=lambda step: None)

    def table(self) -> str:
        """The table, in Markdown: means over the seeds, with the standard deviation where there are several."""
        columns = {"top1": 100, "agreement": 100, "kl": 1, "prefix_cosine": 1, "patch_cosine": 1}
        lines = []
        for name, rows in self.done.items():
            shown = []
            for column, scale in columns.items():
                values = [scale * row[column] for row in rows if column in row]
                digits_shown = 2 if scale == 100 else 4
                text = f"{mean(values):.{digits_shown}f}" if values else "–"
                shown.append(text + (f" ± {pstdev(values):.{digits_shown}f}" if len(values) > 1 else ""))
            seconds = f"{mean(row['seconds'] for row in rows):.0f}"
            lines.append([name, str(len(rows)), *shown, seconds])
        where = f"{machine(self.accelerator.device)}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        header = ["", "seeds", "top-1 %", "agree %", "KL", "CLS cosine", "patch cosine", "s"]
        return markdown_table(header, lines) + f"\n\n{where}; {asdict(self.args)}\n"


def main() -> None:
    """Run, or say in one line why not."""
    quiet_libraries()
    keep_freed_memory()
    try:
        args, config = parse((Arguments, TrainingConfig), sys.argv[1:], (__doc__ or "").split("\n")[0], PRESETS)
        Ablation(args, config).run()
    except (ValueError, TypeError, OSError) as error:
        print(f"ablation.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
