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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from accelerate import Accelerator
from huggingface_hub.utils import validate_repo_id
from torch.utils.data import DataLoader, Subset

import skipat_surgery
from skipat_surgery import PhiConfig

from ..analysis.pictures import pyplot
from ..analysis.planning import block_ranges
from ..convert.evaluation import Evaluator
from ..convert.optimizers import freeze_untouched
from ..convert.settings import TrainingConfig, option
from ..convert.solve import check_enough
from ..convert.training import Progress, Training
from ..core.hub import PushError, push
from ..measure.counting import count_parameters, gflops
from ..measure.timing import throughput
from ..terminal import Terminal
from . import digits, images, loading, results, run_state
from .checks import check_at_least, check_trackers, check_writable
from .machine import keep_freed_memory, machine, use_all_cores
from .options import parse, parse_cut
from .presets import PRESETS, teacher_steps
from .reload import difference_after_reload
from .running import run_command
from .sources import keep_teacher, load_data, load_model, unlabelled

RUN = "run.json"


@dataclass(frozen=True)
class Arguments:
    """What to convert, on which images, into what."""

    model: str = option(digits.NAME, "HF id, directory, or timm/NAME; 'digits' trains the demonstration's teacher.")
    teacher: str | None = option(
        None, "Another model to learn from, with the same preprocessing; the untouched model when left out."
    )
    dataset: str = option(digits.NAME, "HF id, a folder of images or of parquet files, or 'digits'.")
    dataset_config: str | None = option(None, "Configuration of a data set that has several.")
    train_split: str | None = option(None, "Split to distil on; found when left out.")
    eval_split: str | None = option(None, "Split to measure on; found when left out.")
    image_column: str | None = option(None, "Column of images; found when left out.")
    label_column: str | None = option(None, "Column of labels: to measure by, to learn from by label_weight; or none.")
    preset: str = option("fast", "How much to spend: fast, standard or long. What is given besides goes before it.")
    skip: str = option("3-8", "Blocks to skip, counted from 0, such as 3-8 or 2,4-6.")
    plan: str | None = option(
        None, "plan.json of recipes/analyze.py: blocks and Φ, in the place of --skip and all Φ's."
    )
    expansion: float = option(PhiConfig.expansion, "Hidden width of Φ, as a multiple of the model's.")
    kernel_size: int = option(PhiConfig.kernel_size, "Side of Φ's depthwise convolution, odd.")
    channel_attention: bool = option(PhiConfig.channel_attention, "Whether Φ has ECA.")
    prefix: str = option(PhiConfig.prefix, "What becomes of prefix tokens: attend, mix or pass.")
    pool: int = option(
        PhiConfig.pool, "The block's own MSA still runs, over one cluster for pool × pool patches; 0 for none."
    )
    queries: str = option(PhiConfig.queries, "Who asks where there are clusters: clusters or patches.")
    reads_x: bool = option(PhiConfig.reads_x, "Whether Φ reads LN(X) beside the Z of the block before.")
    solve_images: int = option(4096, "Images for the closed-form start of Φ; 0 leaves Φ reusing Z.")
    refit_images: int = option(0, "Images for the closed-form refit of the blocks' last maps; 0 leaves it out.")
    align_steps: int = option(
        0, "Batches for the layerwise training of Φ, between solving and distilling; 0 leaves it out."
    )
    output_dir: str = option("outputs/digits", "Where everything is written.")
    resume: bool = option(False, "Go on from the newest whole checkpoint in output_dir.")
    mixed_precision: str | None = option(None, "no, bf16 or fp16; accelerate's own setting when left out.")
    report_to: list[str] = field(default_factory=list, metadata={"help": "Trackers: tensorboard, wandb, …"})
    push_to_hub: bool = option(False, "Upload best/ with its model card.")
    hub_model_id: str | None = option(None, "Repository to push to; output_dir's name when left out.")
    hub_private_repo: bool | None = option(None, "Whether to make that repository private, when it is made.")

    def __post_init__(self) -> None:
        check_at_least(0, self, "solve_images", "refit_images", "align_steps")
        check_trackers(self.report_to)


def settings(args: Arguments, config: TrainingConfig, processes: int) -> dict[str, Any]:
    """What decides the weights that come out, and so must stay the same when a run is resumed."""
    others = ("resume", "report_to", "push_to_hub", "hub_model_id", "hub_private_repo", "num_workers", "log_steps")
    given = {**asdict(args), **asdict(config), "processes": processes}
    return {name: value for name, value in given.items() if name not in others}


def check_output(args: Arguments, config: TrainingConfig, processes: int) -> Path:
    """The output directory, which must not hold a run, or the one to resume.

    Raises:
        ValueError: It cannot be written, it holds one and this is no resumption, or the run there has other settings.
    """
    output = Path(args.output_dir)
    check_writable(output)
    if not (output / RUN).exists():
        return output
    if not args.resume:
        raise ValueError(f"{output} already holds a run: go on with it by --resume, or choose another --output_dir")
    before, now = run_state.read_json(output / RUN), settings(args, config, processes)
    changed = [f"{name} was {before.get(name)!r}, now {now[name]!r}" for name in now if before.get(name) != now[name]]
    if changed:
        raise ValueError(f"{output} cannot be resumed with other settings: {'; '.join(changed)}")
    return output


def repository(name: str) -> str:
    """The name of a repository that can be pushed to, by its form and by there being a login; nothing is created.

    Raises:
        ValueError: It is no name of a repository, nobody is logged in, or the Hub's client is set to work offline.
    """
    validate_repo_id(name)
    if huggingface_hub.get_token() is None:
        raise ValueError("push_to_hub needs a login: run `hf auth login`, or set HF_TOKEN")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ValueError("push_to_hub needs the network, and HF_HUB_OFFLINE is set: unset it, or push later")
    return name


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
        self.output = check_output(args, config, self.accelerator.num_processes)
        if args.push_to_hub:
            self.repo = repository(args.hub_model_id or self.output.name)
        pyplot()  # the picture is drawn in the end, and matplotlib is missed now
        use_all_cores(self.accelerator)
        self.cut = parse_cut(args)
        self.host = load_model(args.model, self.accelerator, self.output)
        self.original = self.host.model.to(self.accelerator.device)
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
        self.evaluate = Evaluator(
            self.original,
            labelled=bool(self.data.label_column),
            gather=self.accelerator.gather_for_metrics,
        )
        self.console = Terminal(quiet=not self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()  # nobody writes before everybody has checked

    def prepare_data(self) -> None:
        """Make the training items, and the evaluation batches: all of them, and a sample for the way."""
        data, host, config = self.data, self.host, self.config
        self.collate = images.Collate(host.preprocess, host.image_mode, host.image_size)
        columns = data.image_column, data.label_column, host.image_mode
        augment = images.training_crop(host.image_size, config.min_crop_scale)
        self.train_items = images.ImageItems(data.train, *columns, augment=augment, seed=config.seed)
        self.eval_items = images.ImageItems(data.evaluation, *columns)
        order = torch.randperm(len(self.eval_items), generator=torch.Generator().manual_seed(config.seed))
        sample = Subset(self.eval_items, order[: config.eval_images].tolist())
        self.eval_loader, self.sample_loader = (
            self.accelerator.prepare(
                DataLoader(items, config.batch_size, collate_fn=self.collate, num_workers=config.num_workers)
            )
            for items in (self.eval_items, sample)
        )

    def run(self) -> None:
        """Cut, solve, distil, measure, save, reload, show."""
        folder = self.output / "checkpoints"
        if self.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            now = settings(self.args, self.config, self.accelerator.num_processes)
            run_state.write_json(self.output / RUN, now)
            if self.args.model == digits.NAME:
                keep_teacher(self.host, self.output)
        self.accelerator.init_trackers(
            "skipat", {**asdict(self.config), "model": self.args.model, "skip": block_ranges(self.cut.skip)}
        )
        self.console.print(skipat_surgery.report(self.student).table())
        freeze_untouched(self.student)
        self.console.print(
            f"Preset {self.args.preset}: {self.config.max_steps} steps of {self.config.batch_size} images, the work of "
            f"{teacher_steps(self.student, self.original, self.config.max_steps):.0f} training steps of the teacher"
        )
        found = run_state.finished(folder) if self.args.resume else []
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
                save=lambda step: run_state.save(self.accelerator, folder, step),
            )
        else:
            self.write(self.student, "best")
            self.write(self.student, "last")
        self.finish(training)
        self.accelerator.end_training()

    def start(self) -> None:
        """Measure the model cut and not trained, then solve and align its Φ, and measure after each."""
        config = self.config
        self.progress.rows["cut"] = self.measured(self.student, self.eval_loader)
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
        self.progress.rows[name] = self.measured(self.student, self.eval_loader)

    def measured(self, model: torch.nn.Module, loader: DataLoader) -> dict[str, float]:
        """A model's figures on evaluation images."""
        with self.accelerator.autocast():
            return self.evaluate(model, loader)

    def measure(self, training: Training, step: int) -> None:
        """Measure on the schedule, and keep the best model so far."""
        last = step == self.config.max_steps
        figures = self.measured(training.result, self.eval_loader if last else self.sample_loader)
        training.record(figures)
        shown = {
            name: round(value, 4) for name, value in figures.items() if name in ("top1", "agreement", "patch_cosine")
        }
        self.console.print(f"step {step}: {shown}")
        score = figures.get("agreement", figures.get("prefix_cosine", figures["patch_cosine"]))
        if score > self.progress.best:
            self.progress.best = score
            self.write(training.result, "best")
        if last:
            self.progress.rows["distilled"] = figures
            self.write(training.result, "last")

    def write(self, model: torch.nn.Module, name: str) -> None:
        """Save a standard checkpoint, whole or not at all."""
        if self.accelerator.is_main_process:
            run_state.replace_folder(self.output / name, lambda folder: self.host.save(plain_copy(model), folder))

    def finish(self, training: Training) -> None:
        """Reload in a new process, compare speed, and write results, picture and model card."""
        if not self.accelerator.is_main_process:
            return
        model = plain_copy(training.result)
        first = range(min(len(self.eval_items), self.config.batch_size))
        batch = self.collate([self.eval_items[index] for index in first])["pixel_values"].to(self.accelerator.device)
        summary = self.summarise(model, batch)
        summary["reload_difference"] = difference_after_reload(self.output / "last", model, batch)
        run_state.write_json(self.output / "results.json", summary)
        results.plot(summary, self.output / "curve.png")
        recorded = {name: value for name, value in summary.items() if name not in ("history", "arguments")}
        recorded["command"] = shlex.join(["accelerate", "launch", *sys.argv])
        for name in ("best", "last"):
            loading.add_results(self.output / name, recorded)
        self.console.print(results.table(summary))
        self.console.print(
            f"Saved, reloaded in a new process, largest difference in the outputs: {summary['reload_difference']:.2g}\n"
            f"Checkpoint: {self.output / 'last'} (best so far on the way: {self.output / 'best'})\n"
            f"Picture:    {self.output / 'curve.png'}\nFigures:    {self.output / 'results.json'}"
        )
        in_training, in_evaluation = self.progress.corrupt, self.final()["corrupt"]
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
        best = self.output / "best"
        try:
            return push(
                lambda folder: shutil.copytree(best, folder, dirs_exist_ok=True),
                self.repo,
                private=self.args.hub_private_repo,
            )
        except PushError as error:
            later = shlex.join(["hf", "upload", self.repo, str(best)])
            raise PushError(f"the work is done and kept, but {error}. Push it later by: {later}") from error

    def final(self) -> dict[str, float]:
        """The figures of the last stage."""
        return list(self.progress.rows.values())[-1]

    def summarise(self, model: torch.nn.Module, batch: torch.Tensor) -> dict[str, Any]:
        """Everything that was measured, as ``results.json`` holds it."""
        speed = throughput({"teacher": self.original, "cut": model}, batch, self.accelerator.autocast)
        final = self.final()
        teacher = {"agreement": 1.0, "images": final["images"]} if "agreement" in final else {"images": final["images"]}
        if "teacher_top1" in final:
            teacher["top1"] = final["teacher_top1"]
        rows = {"teacher": teacher, **self.progress.rows}
        for name, row in rows.items():
            measured, kind = (self.original, "teacher") if name == "teacher" else (model, "cut")
            row |= {"parameters": count_parameters(measured), "gflops": gflops(measured)}
            row |= {"images_per_second": speed[kind], "speedup": speed[kind] / speed["teacher"]}
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
            "steps": self.config.max_steps,
            "seconds": self.progress.seconds,
            "wall_seconds": time.perf_counter() - self.began,
            "corrupt_in_training": self.progress.corrupt,
            "rows": rows,
            "history": self.progress.history,
            "arguments": {**asdict(self.args), **asdict(self.config)},
        }


def plain_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy without what accelerate added to ``forward``."""
    copied = copy.deepcopy(model)
    copied.__dict__.pop("forward", None)
    copied.__dict__.pop("_original_forward", None)
    return copied.eval()


def prepare(argv: list[str]) -> Recipe:
    """The run that a command line asks for, checked."""
    keep_freed_memory()
    return Recipe(*parse((Arguments, TrainingConfig), argv, (__doc__ or "").split("\n")[0], PRESETS))


def main(argv: list[str] | None = None) -> None:
    """Run, or say in one line why not."""
    run_command("distill.py", prepare, argv, resumable=True)


if __name__ == "__main__":
    main()
