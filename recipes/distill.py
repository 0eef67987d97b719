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
import json
import os
import platform
import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import torch
import transformers
import yaml
from accelerate import Accelerator
from rich.console import Console
from torch.utils.data import DataLoader, Subset
from transformers import HfArgumentParser

import skipat_surgery
from skipat_surgery import PhiConfig, checkpoints, digits, hosts, images, results
from skipat_surgery.benchmark import gflops, throughput
from skipat_surgery.checkpoints import Progress
from skipat_surgery.distill import Evaluator, freeze_untouched
from skipat_surgery.hosts import Host
from skipat_surgery.hub import push
from skipat_surgery.reload import difference_after_reload
from skipat_surgery.report import count_parameters
from skipat_surgery.solve import check_enough
from skipat_surgery.training import Training, TrainingConfig, option

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
    label_column: str | None = option(None, "Column of labels, for measuring only; 'none' reads none.")
    skip: str = option("3-8", "Blocks to skip, counted from 0, such as 3-8 or 2,4-6.")
    expansion: float = option(PhiConfig.expansion, "Hidden width of Φ, as a multiple of the model's.")
    kernel_size: int = option(PhiConfig.kernel_size, "Side of Φ's depthwise convolution, odd.")
    channel_attention: bool = option(PhiConfig.channel_attention, "Whether Φ has ECA.")
    prefix: str = option(PhiConfig.prefix, "What Φ does with prefix tokens: mix or pass.")
    solve_images: int = option(1536, "Images for the closed-form start of Φ; 0 leaves Φ reusing Z.")
    output_dir: str = option("outputs/digits", "Where everything is written.")
    resume: bool = option(False, "Go on from the newest whole checkpoint in output_dir.")
    mixed_precision: str | None = option(None, "no, bf16 or fp16; accelerate's own setting when left out.")
    report_to: list[str] = field(default_factory=list, metadata={"help": "Trackers: tensorboard, wandb, …"})
    push_to_hub: bool = option(False, "Upload best/ with its model card.")
    hub_model_id: str | None = option(None, "Repository to push to; output_dir's name when left out.")


def parse(argv: list[str]) -> tuple[Arguments, TrainingConfig]:
    """Read the command line, after a YAML file of defaults where the first argument is one."""
    kinds: Any = [Arguments, TrainingConfig]
    parser = HfArgumentParser(kinds, description=__doc__.split("\n")[0])
    if argv and argv[0].endswith((".yaml", ".yml")):
        defaults = yaml.safe_load(Path(argv[0]).read_text()) or {}
        known = {action.dest for action in parser._actions}
        if unknown := sorted(set(defaults) - known):
            raise ValueError(f"{argv[0]} holds unknown arguments {unknown}; see --help")
        parser.set_defaults(**defaults)
        argv = argv[1:]
    return parser.parse_args_into_dataclasses(args=argv)  # type: ignore[return-value]


def parse_skip(text: str) -> list[int]:
    """``"2,4-6"`` as [2, 4, 5, 6].

    Raises:
        ValueError: The text is not of that form.
    """
    blocks: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            blocks += range(int(first), int(last or first) + 1)
    except ValueError:
        raise ValueError(f"--skip must be of the form 3-8 or 2,4-6, got {text!r}") from None
    return blocks


def settings(args: Arguments, config: TrainingConfig, processes: int) -> dict[str, Any]:
    """What decides the weights that come out, and so must stay the same when a run is resumed."""
    others = ("resume", "report_to", "push_to_hub", "hub_model_id", "num_workers", "log_steps")
    given = {**asdict(args), **asdict(config), "processes": processes}
    return {name: value for name, value in given.items() if name not in others}


def check_output(args: Arguments, config: TrainingConfig, processes: int) -> Path:
    """The output directory, which must not hold a run, or the one to resume.

    Raises:
        ValueError: It holds one and this is no resumption, or the run there has other settings.
    """
    output = Path(args.output_dir)
    if not (output / RUN).exists():
        return output
    if not args.resume:
        raise ValueError(f"{output} already holds a run: go on with it by --resume, or choose another --output_dir")
    before, now = json.loads((output / RUN).read_text()), settings(args, config, processes)
    changed = [f"{name} was {before.get(name)!r}, now {now[name]!r}" for name in now if before.get(name) != now[name]]
    if changed:
        raise ValueError(f"{output} cannot be resumed with other settings: {'; '.join(changed)}")
    return output


def load_model(args: Arguments, accelerator: Accelerator, output: Path) -> Host:
    """The model to convert; the demonstration's teacher is trained by the main process, and kept for the others."""
    if args.model != digits.NAME:
        return hosts.load(args.model)
    saved = output / "teacher"
    if accelerator.is_main_process and not saved.exists():
        host = digits.train_teacher()
        host.save(host.model, output / "teacher.unfinished")
        (output / "teacher.unfinished").rename(saved)
    accelerator.wait_for_everyone()
    return hosts.load(str(saved))


def load_data(args: Arguments, num_classes: int | None) -> images.ImageData:
    """The images, with labels that fit the model's classes.

    Raises:
        DataError: The data set cannot be used, or its classes are not the model's.
    """
    source = digits.load_digits() if args.dataset == digits.NAME else args.dataset
    columns = args.train_split, args.eval_split, args.image_column, args.label_column
    data = images.load_image_data(source, args.dataset_config, *columns)
    if num_classes and data.num_classes and data.num_classes != num_classes:
        raise images.DataError(
            f"the model has {num_classes} classes and {args.dataset} has {data.num_classes}, so top-1 would mean "
            "nothing; nothing was done. Pass --label_column none to distil without labels: agreement and KL are then "
            "reported"
        )
    return data


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
        use_all_cores(self.accelerator)
        skip = parse_skip(args.skip)
        self.phi = PhiConfig(args.expansion, args.kernel_size, args.channel_attention, args.prefix)
        self.host = load_model(args, self.accelerator, self.output)
        self.original = self.host.model.to(self.accelerator.device)
        self.student = skipat_surgery.apply(copy.deepcopy(self.original), skip, self.phi)
        self.data = load_data(args, self.host.num_classes)
        self.teacher = self.original
        if args.teacher:
            other = hosts.load(args.teacher)
            if other.num_classes != self.host.num_classes:
                raise ValueError(f"the teacher has {other.num_classes} classes, the model {self.host.num_classes}")
            self.teacher = other.model.to(self.accelerator.device)
        if args.solve_images:
            check_enough(min(args.solve_images, len(self.data.train)), self.student)
        self.prepare_data()
        self.progress = Progress()
        self.evaluate = Evaluator(self.original, bool(self.data.label_column), self.accelerator.gather_for_metrics)
        self.console = Console(quiet=not self.accelerator.is_main_process)
        if args.push_to_hub and self.accelerator.is_main_process:
            self.repo = huggingface_hub.create_repo(args.hub_model_id or self.output.name, exist_ok=True).repo_id
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
            checkpoints.write_json(self.output / RUN, now)
        self.accelerator.init_trackers(
            "skipat", {**asdict(self.config), "model": self.args.model, "skip": self.args.skip}
        )
        self.console.print(skipat_surgery.report(self.student).table())
        freeze_untouched(self.student)
        found = checkpoints.finished(folder) if self.args.resume else []
        if not found:
            self.start()
        training = Training(self.student, self.teacher, self.accelerator, self.config, folder, self.progress)
        if found:
            self.accelerator.load_state(str(found[-1]))
            self.console.print(f"Resuming from {found[-1]}, step {self.progress.step}")
        training.fit(training.loader(self.train_items, self.collate), lambda step: self.measure(training, step))
        self.finish(training)
        self.accelerator.end_training()

    def start(self) -> None:
        """Measure the model cut and not trained, solve Φ in closed form, and measure again."""
        self.progress.rows["cut"] = self.measured(self.student, self.eval_loader)
        if self.args.solve_images:
            plain = images.ImageItems(self.data.train, self.data.image_column, None, self.host.image_mode)
            generator = torch.Generator().manual_seed(self.config.seed)
            chosen = torch.randperm(len(plain), generator=generator)[: self.args.solve_images].tolist()
            loader = DataLoader(
                Subset(plain, chosen), self.config.batch_size, collate_fn=images.ValidOnly(self.collate)
            )
            began = time.perf_counter()
            with self.accelerator.autocast():
                skipat_surgery.solve(self.student, self.original, loader)
            self.progress.seconds += time.perf_counter() - began
            self.progress.rows["solved"] = self.measured(self.student, self.eval_loader)
        start = self.progress.rows.get("solved", self.progress.rows["cut"])
        self.progress.history.append({"step": 0, "seconds": round(self.progress.seconds, 2), **start})

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
            checkpoints.replace_folder(self.output / name, lambda folder: self.host.save(plain_copy(model), folder))

    def finish(self, training: Training) -> None:
        """Reload in a new process, compare speed, and write results, picture and model card."""
        if not self.accelerator.is_main_process:
            return
        model = plain_copy(training.result)
        first = range(min(len(self.eval_items), self.config.batch_size))
        batch = self.collate([self.eval_items[index] for index in first])["pixel_values"].to(self.accelerator.device)
        summary = self.summarise(model, batch)
        summary["reload_difference"] = difference_after_reload(self.output / "last", model, batch)
        checkpoints.write_json(self.output / "results.json", summary)
        results.plot(summary, self.output / "curve.png")
        recorded = {name: value for name, value in summary.items() if name not in ("history", "arguments")}
        recorded["command"] = shlex.join(["accelerate", "launch", *sys.argv])
        for name in ("best", "last"):
            hosts.add_results(self.output / name, recorded)
        self.console.print(results.table(summary))
        self.console.print(
            f"Saved, reloaded in a new process, largest difference in the outputs: {summary['reload_difference']:.2g}\n"
            f"Checkpoint: {self.output / 'last'} (best so far on the way: {self.output / 'best'})\n"
            f"Picture:    {self.output / 'curve.png'}\nFigures:    {self.output / 'results.json'}"
        )
        in_training, in_evaluation = self.progress.corrupt, summary["rows"]["distilled"]["corrupt"]
        if in_training or in_evaluation:
            self.console.print(
                f"Left out as unreadable: {in_evaluation} evaluation images, training images {in_training} times"
            )
        if self.args.push_to_hub:
            url = push(lambda folder: shutil.copytree(self.output / "best", folder, dirs_exist_ok=True), self.repo)
            self.console.print(f"Pushed to {url}")

    def summarise(self, model: torch.nn.Module, batch: torch.Tensor) -> dict[str, Any]:
        """Everything that was measured, as ``results.json`` holds it."""
        speed = throughput({"teacher": self.original, "cut": model}, batch, self.accelerator.autocast)
        distilled = self.progress.rows["distilled"]
        teacher = (
            {"agreement": 1.0, "images": distilled["images"]}
            if "agreement" in distilled
            else {"images": distilled["images"]}
        )
        if "teacher_top1" in distilled:
            teacher["top1"] = distilled["teacher_top1"]
        rows = {"teacher": teacher, **self.progress.rows}
        for name, row in rows.items():
            measured, kind = (self.original, "teacher") if name == "teacher" else (model, "cut")
            row |= {"parameters": count_parameters(measured), "gflops": gflops(measured)}
            row |= {"images_per_second": speed[kind], "speedup": speed[kind] / speed["teacher"]}
        return {
            "model": self.args.model,
            "dataset": self.args.dataset,
            "skip": self.args.skip,
            "phi": str(self.phi),
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


def use_all_cores(accelerator: Accelerator) -> None:
    """Share the CPU cores out among the processes: accelerate's launcher leaves each process a single thread."""
    if accelerator.device.type == "cpu" and torch.get_num_threads() == 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // accelerator.num_processes))


def plain_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy without what accelerate added to ``forward``."""
    copied = copy.deepcopy(model)
    copied.__dict__.pop("forward", None)
    copied.__dict__.pop("_original_forward", None)
    return copied.eval()


def machine(device: torch.device) -> str:
    """What this ran on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} × {platform.processor() or platform.machine()} CPU cores"


def main() -> None:
    """Run, or say in one line why not."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        recipe = Recipe(*parse(sys.argv[1:]))
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"distill.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    recipe.run()


if __name__ == "__main__":
    main()
