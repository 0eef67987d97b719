"""Cut a pretrained vision transformer and distil it against the untouched model.

    skipat distill                    # a demonstration on scikit-learn's digits, 3 minutes
    skipat distill --model ID --dataset ./images --skip 3-8 --output_dir out
    accelerate launch recipes/distill.py recipes/configs/cifar10.yaml --resume  # as does -m skipat_surgery distill

The output directory then holds ``best/`` and ``last/`` (standard checkpoints), ``results.json``, ``curve.png``,
``report.html``, and ``checkpoints/`` to resume from.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import skipat_surgery

from ..analysis.pictures import pyplot
from ..analysis.planning import block_ranges
from ..batches import Images
from ..convert.evaluation import score
from ..convert.finite import check_weights
from ..convert.optimizers import freeze_untouched
from ..convert.settings import TrainingConfig
from ..convert.solve import check_enough
from ..convert.stream import Streamed
from ..convert.training import Progress, Training
from ..core.config import SkipatConfig
from ..tasks.finding import give_task
from ..terminal import Terminal
from ..tower import Tower
from . import digits, images, loading, page, results, run_state
from .arguments import Arguments, repository, settings
from .checks import check_whole_copies
from .classes import check_same_classes
from .command_line import as_given
from .machine import keep_freed_memory, machine, slowness, use_all_cores
from .measuring import Measuring, costs_of
from .options import parse, parse_cut
from .output import Output, plain_copy
from .presets import PRESETS, teacher_steps
from .reload import difference_after_reload
from .running import run_command
from .sources import check_tokens, keep_teacher, load_labelled, load_model, unlabelled

DISTILLED, NARROWED = "distilled", "narrowed"
SHOWN = ("top1", "label_miou", "label_map", "depth_abs_rel", "agreement", "patch_cosine")  # of a measurement on the way


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
        check_whole_copies(self.accelerator)
        self.output = Output(Path(args.output_dir), self.settings(), args.resume, self.accelerator)
        self.output.check()
        self.resumed, self.warnings = run_state.newest(self.output.checkpoints) if args.resume else (None, [])
        self.warnings += slowness(self.accelerator.device, self.accelerator.mixed_precision)
        if args.push_to_hub:
            self.repo = repository(args.hub_model_id or self.output.folder.name)
        pyplot()  # the picture is drawn in the end, and matplotlib is missed now
        use_all_cores(self.accelerator)
        self.cut = self.wanted_cut()
        self.host = load_model(args.model, self.accelerator, self.output.folder, args.task, args.texts)
        self.original = self.host.model.to(self.accelerator.device)
        self.student = self.cut_copy(self.output.mlp_widths() if self.resumed else {})
        self.data = load_labelled(self.host, asdict(args) | asdict(config))
        if config.label_weight and not (self.host.num_classes and self.data.train_labels):
            raise ValueError("label_weight needs a model with classes and a data set with labels: leave it 0")
        if config.label_weight and self.data.stream is not None:
            raise ValueError("label_weight reads the labels of all images first, and a stream is not: leave one out")
        self.teacher = self.original
        if args.teacher:
            other = loading.load(args.teacher)
            if args.task is not None:
                give_task(other.model, self.host.task)
            check_same_classes(self.original, other.model)
            check_tokens(self.host, other)
            self.teacher = other.model.to(self.accelerator.device)
        if args.solve_images:
            check_enough(min(args.solve_images, len(self.data.train)), self.student)
        if config.mixup and self.host.takes_any_size:
            raise ValueError("mixup mixes images of one size, and this model takes each at its own: leave it 0")
        self.check_besides()
        self.prepare_data()
        self.progress = Progress()
        self.console = Terminal(quiet=not self.accelerator.is_main_process)
        self.output.hold()
        self.accelerator.wait_for_everyone()  # nobody writes before everybody has checked

    def settings(self) -> dict[str, Any]:
        """What decides the weights that come out."""
        return settings(self.args, self.config, self.accelerator.num_processes)

    def wanted_cut(self) -> SkipatConfig:
        """What to cut, before the model is there."""
        return parse_cut(self.args)

    def cut_copy(self, mlp_widths: Mapping[int, int]) -> torch.nn.Module:
        """The original, cut, with MLPs of these widths."""
        torch.manual_seed(self.config.seed)  # a fresh Φ is drawn
        named = replace(self.cut, base_model=self.host.base_model, mlp_widths=mlp_widths)
        return skipat_surgery.apply(copy.deepcopy(self.original), named)

    def check_besides(self) -> None:
        """What a recipe that is made of this one checks as well."""

    def prepare_data(self) -> None:
        """Make the training items and the evaluation items, and what measures models on these."""
        data, host, config = self.data, self.host, self.config
        self.collate = images.Collate(host.preprocess, host.image_mode, host.image_size)
        whole = not host.takes_any_size
        crop = images.training_crop(host.image_size, config.min_crop_scale) if whole else None
        augment = crop or images.PartOfImage(config.min_crop_scale)
        learned = data.label_column if data.maps is None and data.stream is None else None
        columns = data.image_column, learned, host.image_mode
        items = images.ImageItems(data.train, *columns, augment=augment, seed=config.seed)
        self.train_items = items if data.stream is None else Streamed(data.stream.epoch, items.item)
        columns = data.image_column, data.label_column, host.image_mode
        self.eval_items = images.ImageItems(data.evaluation, *columns, maps=data.maps)
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
            for line in (self.data.summary, self.host.compared_by, *self.warnings):
                self.console.print(line, markup=False, soft_wrap=True)
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
        if self.resumed is None:
            self.start()
        share = self.teacher is self.original
        training = Training(self.student, self.teacher, self.accelerator, self.config, self.progress, share)
        if self.resumed is not None:
            self.accelerator.load_state(str(self.resumed))
            self.console.print(f"Resuming from {self.resumed}, step {self.progress.step}")
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
            if self.args.mlp_keep < 1:
                self.narrow(chosen)
        if self.args.refit_images:
            chosen = unlabelled(self.host, self.data, self.args.refit_images, config.batch_size, config.seed)
            self.stage("refitted", lambda: skipat_surgery.refit(self.student, self.original, chosen))
        if self.args.align_steps:
            steps = self.args.align_steps
            chosen = unlabelled(self.host, self.data, steps * config.batch_size, config.batch_size, config.seed)
            self.stage("aligned", lambda: skipat_surgery.align(self.student, self.original, chosen, steps=steps))
        start = list(self.progress.rows.values())[-1]
        self.progress.history.append({"step": 0, "seconds": round(self.progress.seconds, 2), **start})

    def narrow(self, batches: Iterable[Any]) -> None:
        """Take hidden units out of the MLPs. None of the models before is as fast, so none of them can be the best."""
        self.progress.best = {}
        self.stage(
            NARROWED, lambda: skipat_surgery.narrow(self.student, self.original, batches, keep=self.args.mlp_keep)
        )
        freeze_untouched(self.student)
        self.output.keep_mlp_widths(Tower.of(self.student).config.mlp_widths)

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
        shown = {name: round(value, 4) for name, value in figures.items() if name in SHOWN}
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
        command = as_given("accelerate launch")
        for name in ("best", "last"):
            loading.add_results(folder / name, {**results.of_checkpoint(summary, name), "command": command})
        self.console.print(results.table(summary))
        self.console.print(results.places(summary, folder))
        self.console.print(page.written(folder, self.host, self.eval_items, self.config.seed), soft_wrap=True)
        in_training, in_evaluation = self.progress.corrupt, best["corrupt"]
        if in_training or in_evaluation:
            self.console.print(
                f"Left out as unreadable: {in_evaluation} evaluation images, training images {in_training} times"
            )
        if self.args.push_to_hub:
            self.console.print(f"Pushed to {self.output.push('best', self.repo, self.args.hub_private_repo)}")

    def summarise(self, model: torch.nn.Module, batch: Images, best: dict[str, float]) -> dict[str, Any]:
        """Everything that was measured, as ``results.json`` holds it."""
        models, stages = {"teacher": self.original, "cut": model}, self.progress.rows
        if NARROWED in stages:
            models["with all hidden units"] = self.cut_copy({})
        costs = costs_of(models, batch, self.accelerator)
        before = list(stages)[: list(stages).index(NARROWED)] if NARROWED in stages else []
        rows = {"teacher": {**results.of_teacher(best), **costs["teacher"]}}
        rows |= {
            name: {**row, **costs["with all hidden units" if name in before else "cut"]} for name, row in stages.items()
        }
        where = {name: self.progress.best[name] for name in ("stage", "step", "seconds")}
        return {
            "model": self.args.model,
            "dataset": self.args.dataset,
            "skip": block_ranges(self.cut.skip),
            "phi": ", ".join(dict.fromkeys(map(str, self.cut.phi.values()))),
            "teacher": self.args.teacher,
            "label_weight": self.config.label_weight,
            "host": "timm" if self.host.processor is None else "transformers",
            "auto_class": self.host.loader,
            "machine": machine(self.accelerator.device),
            "processes": self.accelerator.num_processes,
            "precision": self.accelerator.mixed_precision,
            "dtype": str(self.host.dtype).removeprefix("torch."),
            "versions": results.versions(),
            "steps": self.config.max_steps,
            "seconds": self.progress.seconds,
            "wall_seconds": time.perf_counter() - self.began,
            "corrupt_in_training": self.progress.corrupt,
            "rows": rows,
            "best": {**where, "figures": {**best, **costs["cut"]}},
            "history": self.progress.history,
            "arguments": {**asdict(self.args), **asdict(self.config)},
        }


def prepare(argv: list[str], name: str | None = None) -> Recipe:
    """The run that a command line asks for, checked."""
    keep_freed_memory()
    return Recipe(*parse((Arguments, TrainingConfig), argv, __doc__ or "", PRESETS, name))


def main(argv: list[str] | None = None, name: str = "distill.py") -> None:
    """Run, or say in one line why not."""
    run_command(name, partial(prepare, name=name), argv, resumable=True)


if __name__ == "__main__":
    main()
