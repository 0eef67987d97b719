"""Cut a pretrained vision transformer and distil it against the untouched model.

    accelerate launch recipes/distill.py                    # a demonstration on scikit-learn's digits, 3 minutes
    accelerate launch recipes/distill.py --model ID --dataset ./images --skip 3-8 --output_dir out
    accelerate launch recipes/distill.py recipes/configs/cifar10.yaml --max_steps 200
    accelerate launch recipes/distill.py recipes/configs/cifar10.yaml --resume

The output directory then holds ``best/`` and ``last/`` (standard checkpoints), ``results.json``, ``curve.png``, and
``checkpoints/`` to resume from.
"""

from __future__ import annotations

import copy
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import skipat_surgery

from ..analysis.pictures import pyplot
from ..analysis.planning import block_ranges
from ..convert.evaluation import score
from ..convert.finite import check_weights
from ..convert.optimizers import freeze_untouched
from ..convert.settings import TrainingConfig
from ..convert.solve import check_enough
from ..convert.training import Progress, Training
from ..core.hub import PushError, push
from ..terminal import Terminal
from . import digits, images, loading, results, run_state
from .arguments import Arguments, repository, settings
from .machine import keep_freed_memory, machine, use_all_cores
from .measuring import Measuring, costs_of
from .options import parse, parse_cut
from .output import Output, plain_copy
from .presets import PRESETS, teacher_steps
from .reload import difference_after_reload
from .running import run_command
from .sources import keep_teacher, load_data, load_model, unlabelled

DISTILLED = "distilled"


class Recipe:
    """One run of the recipe: everything is checked in `__init__`, before anything is written."""

    def __init__(self, args: Arguments, config: TrainingConfig) -> None:
        self.args, self.config, self.began = args, config, time.perf_counter()
        self.accelerator = Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=args.report_to or None,
            project_dir=args.output_dir,
        )
        now = settings(args, config, self.accelerator.num_processes)
        self.output = Output(Path(args.output_dir), now, args.resume, self.accelerator)
        self.output.check()
        if args.push_to_hub:
            self.repo = repository(args.hub_model_id or self.output.folder.name)
        pyplot()  # the picture is drawn in the end, and matplotlib is missed now
        use_all_cores(self.accelerator)
        self.cut = parse_cut(args)
        self.host = load_model(args.model, self.accelerator, self.output.folder)
        self.original = self.host.model.to(self.accelerator.device)
        torch.manual_seed(config.seed)  # a fresh Φ is drawn
        self.student = skipat_surgery.apply(
            copy.deepcopy(self.original), replace(self.cut, base_model=self.host.base_model)
        )
        columns = args.train_split, args.eval_split, args.image_column, args.label_column
        self.data = load_data(args.dataset, self.host.num_classes, args.dataset_config, *columns)
        if config.label_weight and not (self.host.num_classes and self.data.label_column):
            raise ValueError("label_weight needs a model with classes and a data set with labels: leave it 0")
        self.teacher = self.original
        if args.teacher:
            other = loading.load(args.teacher)
            if other.num_classes != self.host.num_classes:
                raise ValueError(f"the teacher has {other.num_classes} classes, the model {self.host.num_classes}")
            self.teacher = other.model.to(self.accelerator.device)
        if args.solve_images:
            check_enough(min(args.solve_images, len(self.data.train)), self.student)
        self.prepare_data()
        self.progress = Progress()
        self.console = Terminal(quiet=not self.accelerator.is_main_process)
        self.output.hold()
        self.accelerator.wait_for_everyone()  # nobody writes before everybody has checked

    def prepare_data(self) -> None:
        """Make the training items and the evaluation items, and what measures models on these."""
        data, host, config = self.data, self.host, self.config
        self.collate = images.Collate(host.preprocess, host.image_mode, host.image_size)
        columns = data.image_column, data.label_column, host.image_mode
        augment = images.training_crop(host.image_size, config.min_crop_scale)
        self.train_items = images.ImageItems(data.train, *columns, augment=augment, seed=config.seed)
        self.eval_items = images.ImageItems(data.evaluation, *columns)
        labelled = bool(data.label_column)
        self.measuring = Measuring(host, self.eval_items, self.collate, labelled, self.accelerator, config)

    def run(self) -> None:
        """Cut, solve, distil, measure, save, reload, show."""
        with self.output:
            if self.args.model == digits.NAME and self.accelerator.is_main_process:
                keep_teacher(self.host, self.output.folder)
            self.accelerator.init_trackers(
                "skipat", {**asdict(self.config), "model": self.args.model, "skip": block_ranges(self.cut.skip)}
            )
            self.console.print(skipat_surgery.report(self.student).table())
            freeze_untouched(self.student)
            self.console.print(
                f"Preset {self.args.preset}: {self.config.max_steps} steps of {self.config.batch_size} images, the "
                f"work of {teacher_steps(self.student, self.original, self.config.max_steps):.0f} training steps of "
                "the teacher"
            )
            self.finish(self.distil())
            self.accelerator.end_training()

    def distil(self) -> torch.nn.Module:
        """Start the student and train it, or go on with that; returns the model that comes out."""
        found = run_state.finished(self.output.checkpoints) if self.args.resume else []
        if not found:
            self.start()
        share = self.teacher is self.original
        training = Training(self.student, self.teacher, self.accelerator, self.config, self.progress, share)
        if found:
            self.accelerator.load_state(str(found[-1]))
            self.console.print(f"Resuming from {found[-1]}, step {self.progress.step}")
        elif self.config.max_steps:
            scale = training.choose_rates(training.loader(self.train_items, self.collate))
            self.console.print(f"Rates: {scale:g} times the settings'")
        if self.config.max_steps:
            training.fit(
                training.loader(self.train_items, self.collate),
                measure=lambda step: self.measure(training, step),
                save=lambda step: self.save_state(training, step),
            )
        self.output.begin()
        self.output.save(self.host, training.result, "last")
        return training.result

    def start(self) -> None:
        """Measure the model cut and not trained, then solve and align its Φ, and measure after each."""
        config = self.config
        self.measure_stage("cut")
        if self.args.solve_images:
            chosen = unlabelled(self.host, self.data, self.args.solve_images, config.batch_size, config.seed)
            self.stage("solved", lambda: skipat_surgery.solve(self.student, self.original, chosen))
        if self.args.refit_images:
            chosen = unlabelled(self.host, self.data, self.args.refit_images, config.batch_size, config.seed)
            self.stage("refitted", lambda: skipat_surgery.refit(self.student, self.original, chosen))
        if self.args.align_steps:
            count = self.args.align_steps * config.batch_size
            batches = unlabelled(self.host, self.data, count, config.batch_size, config.seed)
            steps = self.args.align_steps
            self.stage("aligned", lambda: skipat_surgery.align(self.student, self.original, batches, steps=steps))
        start = list(self.progress.rows.values())[-1]
        self.progress.history.append({"step": 0, "seconds": round(self.progress.seconds, 2), **start})

    def stage(self, name: str, work: Callable[[], object]) -> None:
        """Do one stage, add the time it took, and measure what it gave."""
        began = time.perf_counter()
        with self.accelerator.autocast():
            work()
        self.progress.seconds += time.perf_counter() - began
        self.measure_stage(name)

    def measure_stage(self, name: str) -> None:
        """Measure the student after one stage."""
        self.progress.rows[name], sample = self.measuring.on_all(self.student)
        self.keep_best(self.student, name, sample)

    def measure(self, training: Training, step: int) -> None:
        """Measure on the schedule: at the end on all images, and by the sample keep the best model."""
        self.output.begin()
        if step == self.config.max_steps:
            figures, sample = self.measuring.on_all(training.result)
            self.progress.rows[DISTILLED] = figures
        else:
            figures = sample = self.measuring.on_sample(training.result)
        training.record(figures)
        shown = {
            name: round(value, 4) for name, value in figures.items() if name in ("top1", "agreement", "patch_cosine")
        }
        self.console.print(f"step {step}: {shown}")
        self.keep_best(training.result, DISTILLED, sample)

    def keep_best(self, model: torch.nn.Module, stage: str, sample: dict[str, float]) -> None:
        """Save a model where none before was better on the sample."""
        progress = self.progress
        if progress.best and score(sample) < score(progress.best["sample"]):
            return
        progress.best = {"stage": stage, "step": progress.step, "seconds": progress.seconds, "sample": sample}
        self.output.save(self.host, model, "best")

    def save_state(self, training: Training, step: int) -> None:
        """Write what the run can be resumed from."""
        check_weights(training.plain, "lower the learning rates")
        self.output.begin()
        run_state.save(self.accelerator, self.output.checkpoints, step)

    def best_figures(self) -> dict[str, float]:
        """What the best model gives on all images, which is measured where it was not."""
        best = self.progress.best
        if best["step"] in (0, self.config.max_steps):
            return self.progress.rows[best["stage"]]
        self.accelerator.wait_for_everyone()
        model = loading.load(str(self.output.folder / "best")).model.to(self.accelerator.device)
        return self.measuring.on_all(model)[0]

    def finish(self, result: torch.nn.Module) -> None:
        """Reload in a new process, compare speed, and write results, picture and model cards."""
        best = self.best_figures()
        if not self.accelerator.is_main_process:
            return
        model, folder = self.host.as_saved(plain_copy(result)), self.output.folder
        first = range(min(len(self.eval_items), self.config.batch_size))
        batch = self.collate([self.eval_items[index] for index in first])["pixel_values"].to(self.accelerator.device)
        summary = self.summarise(model, batch, best)
        summary["reload_difference"] = difference_after_reload(folder / "last", model, batch)
        run_state.write_json(folder / "results.json", summary)
        results.plot(summary, folder / "curve.png")
        command = shlex.join(["accelerate", "launch", *sys.argv])
        for name in ("best", "last"):
            loading.add_results(folder / name, {**results.of_checkpoint(summary, name), "command": command})
        self.console.print(results.table(summary))
        self.console.print(results.places(summary, folder))
        in_training, in_evaluation = self.progress.corrupt, best["corrupt"]
        if in_training or in_evaluation:
            self.console.print(
                f"Left out as unreadable: {in_evaluation} evaluation images, training images {in_training} times"
            )
        if self.args.push_to_hub:
            self.console.print(f"Pushed to {self.push()}")

    def push(self) -> str:
        """Push ``best/``; returns the address.

        Raises:
            PushError: It failed; with how to push later.
        """
        best = self.output.folder / "best"
        try:
            return push(
                lambda folder: shutil.copytree(best, folder, dirs_exist_ok=True),
                self.repo,
                private=self.args.hub_private_repo,
            )
        except PushError as error:
            later = shlex.join(["hf", "upload", self.repo, str(best)])
            raise PushError(f"the work is done and kept, but {error}. Push it later by: {later}") from error

    def summarise(self, model: torch.nn.Module, batch: torch.Tensor, best: dict[str, float]) -> dict[str, Any]:
        """Everything that was measured, as ``results.json`` holds it."""
        costs = costs_of({"teacher": self.original, "cut": model}, batch, self.accelerator)
        rows = {"teacher": {**results.of_teacher(best), **costs["teacher"]}}
        rows |= {name: {**row, **costs["cut"]} for name, row in self.progress.rows.items()}
        where = {name: self.progress.best[name] for name in ("stage", "step", "seconds")}
        return {
            "model": self.args.model,
            "dataset": self.args.dataset,
            "skip": block_ranges(self.cut.skip),
            "phi": ", ".join(dict.fromkeys(map(str, self.cut.phi.values()))),
            "teacher": self.args.teacher,
            "label_weight": self.config.label_weight,
            "host": "timm" if self.host.processor is None else "transformers",
            "auto_class": "AutoModelForImageClassification" if self.host.num_classes else "AutoModel",
            "machine": machine(self.accelerator.device),
            "processes": self.accelerator.num_processes,
            "precision": self.accelerator.mixed_precision,
            "dtype": str(self.host.dtype).removeprefix("torch."),
            "steps": self.config.max_steps,
            "seconds": self.progress.seconds,
            "wall_seconds": time.perf_counter() - self.began,
            "corrupt_in_training": self.progress.corrupt,
            "rows": rows,
            "best": {**where, "figures": {**best, **costs["cut"]}},
            "history": self.progress.history,
            "arguments": {**asdict(self.args), **asdict(self.config)},
        }


def prepare(argv: list[str]) -> Recipe:
    """The run that a command line asks for, checked."""
    keep_freed_memory()
    return Recipe(*parse((Arguments, TrainingConfig), argv, (__doc__ or "").split("\n")[0], PRESETS))


def main(argv: list[str] | None = None) -> None:
    """Run, or say in one line why not."""
    run_command("distill.py", prepare, argv, resumable=True)


if __name__ == "__main__":
    main()
