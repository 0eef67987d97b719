"""What a real model keeps on its way through a distillation, tenth by tenth, beside the start that the solve gave it.

    python benchmarks/course.py --subject saliency --row "cut 5-10" --steps 120
    python benchmarks/course.py --subject cifar10 --row "cut 3-8" --steps 540 --batch_size 64

The rates are found by the library's own probe. Writes a table, a picture and a JSON.
"""

from __future__ import annotations

import copy
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from equal_speed import Row, subject_of
from subjects import bf16
from torch import Tensor, nn

import skipat_surgery
from skipat_surgery.analysis.pictures import pyplot
from skipat_surgery.commands import run_state
from skipat_surgery.commands.machine import keep_freed_memory, machine, quiet_libraries
from skipat_surgery.commands.options import parse
from skipat_surgery.convert.rates import STEPS
from skipat_surgery.convert.settings import option
from skipat_surgery.core.tables import markdown_table
from skipat_surgery.observing import evaluating

TENTHS = 10


@dataclass(frozen=True)
class Arguments:
    """What to distil."""

    subject: str = option("saliency", "saliency, cifar10 or camvid.")
    row: str = option("cut 5-10", "What is cut, as benchmarks/equal_speed.py names it.")
    image_size: int = option(224, "Pixels a side, of saliency.")
    solve_images: int = option(512, "How many images the cut is solved on.")
    images: int = option(2048, "How many images it is distilled on.")
    test_images: int = option(192, "How many images are measured on.")
    steps: int = option(120, "Optimizer steps.")
    batch_size: int = option(32, "Images a step.")
    seed: int = option(0, "Order of the images.")
    output_dir: str = option("outputs/course", "Where everything is written.")


class Course:
    """A student on its way."""

    def __init__(self, args: Arguments) -> None:
        self.args = args
        self.subject = subject_of(args)
        self.student = Row.of(args.row).make(self.subject.teacher, self.subject.fitting(args.solve_images))
        self.images = torch.cat(self.subject.fitting(args.images))
        self.points: list[dict[str, float]] = []
        self.began, self.scale = 0.0, 0.0

    def run(self) -> None:
        """Distil, and show what was kept on the way."""
        args, output = self.args, Path(self.args.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        self.measure(0, self.student)
        draws = torch.Generator().manual_seed(args.seed)
        probed = [self.draw(draws) for _ in range(STEPS + 1)]
        with bf16():
            # Rates are probed on batches given at once; those of the run measure the student as they are drawn.
            self.scale = scale = self.probed(probed)
            self.began = time.perf_counter()
            skipat_surgery.distill(
                self.student, self.subject.teacher, self.measured(draws), steps=args.steps, rate_scale=scale
            )
        self.measure(args.steps, self.student)
        where = f"`python {shlex.join(sys.argv)}`, rates times {scale:g}, {machine(torch.device('cpu'))}"
        (output / "course.md").write_text(f"{self.table()}\n\n{where}\n")
        self.plot(output / "course.png")
        print(f"{self.table()}\n\n{where}")

    def probed(self, batches: list[Tensor]) -> float:
        """The scale of the rates that the probe finds; the student that it tries them on is thrown away."""
        trial = copy.deepcopy(self.student)
        found = skipat_surgery.distill(trial, self.subject.teacher, batches, steps=1, progress=False)
        return found.rate_scale

    def draw(self, draws: torch.Generator) -> Tensor:
        """A batch of images, each flipped half of the time."""
        chosen = self.images[torch.randint(len(self.images), (self.args.batch_size,), generator=draws)]
        flipped = torch.rand(len(chosen), 1, 1, 1, generator=draws) < 0.5
        return torch.where(flipped, chosen.flip(-1), chosen)

    def measured(self, draws: torch.Generator) -> Iterator[Tensor]:
        """The batches of the run; each tenth of it, the student is measured."""
        for step in range(self.args.steps):
            if step and step % max(1, self.args.steps // TENTHS) == 0:
                self.measure(step, self.student)
            yield self.draw(draws)

    def measure(self, step: int, model: nn.Module) -> None:
        """What the student keeps after so many steps."""
        seconds = time.perf_counter() - self.began if self.began else 0.0
        torch.clear_autocast_cache()
        with evaluating(model), torch.autocast("cpu", enabled=False):
            self.points.append({"step": step, "seconds": round(seconds), **self.subject.measure(model)})
        found = {"arguments": asdict(self.args), "rate_scale": self.scale, "points": self.points}
        run_state.write_json(Path(self.args.output_dir) / "course.json", found)  # what a run that is ended leaves
        torch.clear_autocast_cache()  # casts that were made without a gradient must not serve a step

    def table(self) -> str:
        """Every point."""
        columns = list(self.points[0])
        rows = [
            [f"{point[name]:.4f}" if isinstance(point[name], float) else str(point[name]) for name in columns]
            for point in self.points
        ]
        return markdown_table(columns, rows)

    def plot(self, path: Path) -> None:
        """Draw the quality by step, and the start as a line."""
        plt, quality = pyplot(), self.subject.quality
        figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
        axis.plot([p["step"] for p in self.points], [p[quality] for p in self.points], "o-")
        axis.axhline(self.points[0][quality], linestyle=":", color="C1", label="solved, the start")
        axis.axvspan(0, self.args.steps / TENTHS, alpha=0.1, label="the first tenth")
        axis.set(xlabel="step", ylabel=quality.replace("_", " "), title=self.args.row)
        axis.legend()
        figure.savefig(path, dpi=120)
        plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    (args,) = parse((Arguments,), sys.argv[1:] if argv is None else argv, "A distillation, tenth by tenth.")
    quiet_libraries()
    keep_freed_memory()
    Course(args).run()


if __name__ == "__main__":
    main()
