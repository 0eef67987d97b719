"""What a real model keeps at which speed: cut, its tokens merged (ToMe), and both.

    python benchmarks/equal_speed.py --subject saliency --image_size 224
    python benchmarks/equal_speed.py --subject cifar10 --rows "merge 4, cut 3-8, cut 3-8 of Z"
    python benchmarks/equal_speed.py --subject camvid --test_images 101 --solve_images 120 --batch_size 2

A row is ``merge R`` (R tokens merged after every MSA), ``cut BLOCKS`` with the default Φ, ``cut BLOCKS asking`` with
one where the patches ask, ``cut BLOCKS of Z`` with one that reads nothing but Z, ``cut BLOCKS off the grid`` with one
that needs no grid, two such cuts joined by ``and``, or a cut and ``merge R``. Cuts are solved, not trained; those
that say ``refitted`` last are refitted on the same images. ``narrow K`` leaves K percent of the MLPs, by `narrow`, to
what stands before it, which may be nothing. All rows are timed in one interleaved run. Writes a table, a
picture and a JSON, and goes on where it was.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from street_scenes import StreetScenes
from subjects import Classifier, Saliency, Subject, bf16, dtype_named, speeds_of
from torch import Tensor, nn
from tqdm.auto import tqdm

import skipat_surgery
from skipat_surgery import PhiConfig
from skipat_surgery.analysis.pictures import pyplot
from skipat_surgery.commands import run_state
from skipat_surgery.commands.machine import keep_freed_memory, machine, quiet_libraries
from skipat_surgery.commands.options import parse, parse_skip
from skipat_surgery.convert.narrow import narrow_tower
from skipat_surgery.convert.settings import option
from skipat_surgery.core.tables import markdown_table
from skipat_surgery.measure.timing import Estimate
from skipat_surgery.measure.token_merging import merge_tokens
from skipat_surgery.tower import Tower

UNTOUCHED = "untouched"
PHIS = {
    "": PhiConfig(),
    "asking": PhiConfig(expansion=0.125, queries="patches"),
    "of Z": PhiConfig(pool=0, reads_x=False),
    "off the grid": PhiConfig(pool=4, kernel_size=1),
}
ROW = re.compile(
    r"(?:cut (?P<cuts>.+?)(?P<refitted> refitted)?)?(?:(?:^| )narrow (?P<keep>\d+))?(?:(?:^| )merge (?P<r>\d+))?"
)
CUT = re.compile(rf"(?P<skip>[\d+-]+)(?: (?P<phi>{'|'.join(filter(None, PHIS))}))?")


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    subject: str = option("saliency", "saliency, cifar10 or camvid.")
    rows: str = option("merge 4, merge 8, merge 16, cut 3-8, cut 3-8 of Z", "The rows; blocks such as 3-8 or 1+3-4.")
    image_size: int = option(224, "Pixels a side, of saliency.")
    solve_images: int = option(512, "How many images cuts are solved on.")
    test_images: int = option(544, "How many images are measured on.")
    batch_size: int = option(8, "Images a batch, of timing.")
    dtype: str | None = option(None, "bf16 or fp32, of timing; bf16 when left out, or fp32 where there is no bf16.")
    rounds: int = option(25, "How often each model is timed.")
    max_seconds: float = option(240.0, "Fewer rounds where they would take longer.")
    device: str = option("cpu", "cpu or cuda; street scenes on a CPU alone.")
    output_dir: str = option("outputs/equal_speed", "Where everything is written.")


@dataclass(frozen=True)
class Row:
    """A model to compare.

    Args:
        phi: The Φ of each block that is cut; none where only tokens are merged.
        r: How many tokens are merged after every MSA.
        refitted: Whether the last maps of the blocks are refitted after the solve.
        keep: The share of the MLPs that is left, where some is taken out.
    """

    phi: Mapping[int, PhiConfig]
    r: int
    refitted: bool = False
    keep: float | None = None

    @classmethod
    def of(cls, name: str) -> Row:
        """From its name.

        Raises:
            ValueError: There is no such row.
        """
        found = ROW.fullmatch(name)
        cuts = found["cuts"].split(" and ") if found is not None and found["cuts"] else []
        parts = [CUT.fullmatch(cut) for cut in cuts]
        if found is None or not name or None in parts:
            raise ValueError(
                "--rows takes rows such as 'merge 8', 'cut 3-8 of Z', 'cut 1-2 off the grid merge 4', "
                f"'cut 1-4 asking and 5-10 refitted', got {name!r}"
            )
        phi = {
            block: PHIS[part["phi"] or ""]
            for part in filter(None, parts)
            for block in parse_skip(part["skip"].replace("+", ","))
        }
        keep = int(found["keep"]) / 100 if found["keep"] else None
        return cls(phi, int(found["r"] or 0), found["refitted"] is not None, keep)

    @property
    def kind(self) -> str:
        """What is done to the model, in a few words."""
        done = {"cut": bool(self.phi), "narrow": self.keep is not None, "merge": bool(self.r)}
        return " and ".join(what for what, whether in done.items() if whether)

    def make(self, teacher: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
        """The model, cut, solved, refitted and narrowed on batches of images, and its tokens merged.

        Without batches a cut stays as it starts.
        """
        model = copy.deepcopy(teacher)
        if self.phi:
            skipat_surgery.apply(model, self.phi, keep_removed=False)
            if batches:
                with bf16(next(teacher.parameters()).device.type):
                    skipat_surgery.solve(model, teacher, batches)
                    if self.refitted:
                        skipat_surgery.refit(model, teacher, batches)
        if self.keep is not None:
            with bf16(next(teacher.parameters()).device.type):
                narrow_tower(model, Tower.of(model), Tower.of(teacher), batches, self.keep)
        return merge_tokens(model, self.r) if self.r else model


def subject_of(args: Any) -> Subject:
    """The subject that a command is asked for.

    Raises:
        ValueError: There is no such subject.
    """
    device = getattr(args, "device", "cpu")
    kinds: dict[str, Callable[[], Subject]] = {
        "saliency": lambda: Saliency(args.test_images, args.image_size, device=device),
        "cifar10": lambda: Classifier(args.test_images, device=device),
        "camvid": lambda: StreetScenes(args.test_images),
    }
    if args.subject not in kinds:
        raise ValueError(f"--subject must be one of {sorted(kinds)}, got {args.subject!r}")
    return kinds[args.subject]()


class EqualSpeed:
    """The rows, and where what was measured of them is written."""

    def __init__(self, args: Arguments) -> None:
        self.dtype = dtype_named(args.dtype, args.device)
        self.args, self.rows = args, {name: Row.of(name) for name in args.rows.split(", ")}
        self.output = Path(args.output_dir)
        self.output.mkdir(parents=True, exist_ok=True)
        self.file = self.output / "equal_speed.json"
        of = {name: getattr(args, name) for name in ("subject", "image_size", "solve_images", "test_images")}
        stored = json.loads(self.file.read_text()) if self.file.exists() else {"of": of, "rows": {}}
        if stored["of"] != of:
            raise ValueError(f"--output_dir holds rows of {stored['of']}, not of {of}; choose another")
        self.stored, self.done = stored, stored["rows"]
        self.subject = subject_of(args)

    def run(self) -> None:
        """Measure every row, then time them."""
        teacher = self.subject.teacher
        models = {UNTOUCHED: teacher}
        fitted = {name for name, row in self.rows.items() if row.keep or (row.phi and name not in self.done)}
        batches = self.subject.fitting(self.args.solve_images) if fitted else []
        for name, row in tqdm(self.rows.items(), desc="Rows", unit="row"):
            # What was measured before is only timed, and takes as long unsolved; widths follow from the images.
            models[name] = row.make(teacher, batches if name in fitted else [])
            if name not in self.done:
                self.done[name] = self.subject.measure(models[name])
                run_state.write_json(self.file, self.stored)
        speeds = self.speeds(models)
        where = f"`python {shlex.join(sys.argv)}`, {machine(torch.device(self.args.device))}, torch {torch.__version__}"
        text = f"{self.table(speeds)}\n\n{where}\n"
        (self.output / "equal_speed.md").write_text(text)
        self.plot(speeds)
        print(text)

    def speeds(self, models: dict[str, nn.Module]) -> dict[str, Estimate]:
        """How many times as fast as the untouched model each row is."""
        args = self.args
        images = self.subject.images(args.batch_size).to(self.dtype)
        found = speeds_of(models, images, args.rounds, args.max_seconds, UNTOUCHED)
        return {name: found[name] for name in self.rows}

    def table(self, speeds: dict[str, Estimate]) -> str:
        """Speed and quality of every row."""
        columns = list(next(iter(self.done.values())))
        rows = []
        for name, speed in speeds.items():
            shown = speed.as_speed()
            rows.append([name, shown, *(f"{self.done[name][column]:.4f}" for column in columns)])
        return markdown_table(["", "speed", *columns], rows)

    def plot(self, speeds: dict[str, Estimate]) -> None:
        """Draw quality against speed, a line for merging alone, one for cuts, one for both."""
        plt = pyplot()
        figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
        for kind in dict.fromkeys(row.kind for row in self.rows.values()):
            names = [name for name, row in self.rows.items() if row.kind == kind]
            points = sorted((speeds[name].value, self.done[name][self.subject.quality], name) for name in names)
            if points:
                axis.plot(
                    [x for x, _, _ in points], [y for _, y, _ in points], "o-" if kind == "merge" else "s", label=kind
                )
            for x, y, name in points:
                axis.annotate(name, (x, y), fontsize=7, xytext=(4, 4), textcoords="offset points")
        axis.set(xlabel="speed over the untouched model", ylabel=self.subject.quality.replace("_", " "))
        axis.grid(alpha=0.3)
        axis.legend()
        figure.savefig(self.output / "equal_speed.png", dpi=120)
        plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    (args,) = parse((Arguments,), sys.argv[1:] if argv is None else argv, "Quality at equal speed.")
    quiet_libraries()
    keep_freed_memory()
    EqualSpeed(args).run()


if __name__ == "__main__":
    main()
