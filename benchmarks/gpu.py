"""All that is measured of a cut on a GPU, in one call and within a time: speed, memory, training, and quality at speed.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --models timm/test_vit --image_sizes 32 --batch_sizes 2 --minutes 1

Every model at every size and batch: untouched (SDPA), cut and the limit, eager, compiled and with CUDA graphs, beside
the floor that operations and bytes set; then a training step of each; then, where ``../shared`` is at hand, the tables
of ``benchmarks/equal_speed.py``. What the time does not suffice for is left out, and named. Writes one JSON, after
every table, and ``gpu.md``.
"""

from __future__ import annotations

import itertools
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import equal_speed
import torch
from floors import Rates, Work
from subjects import SHARED
from torch import Tensor, nn
from tqdm.auto import tqdm

from skipat_surgery import PhiConfig
from skipat_surgery.commands import loading, run_state
from skipat_surgery.commands.benchmark import DTYPES
from skipat_surgery.commands.machine import machine, quiet_libraries
from skipat_surgery.commands.options import parse, parse_numbers
from skipat_surgery.convert.settings import option
from skipat_surgery.core.tables import markdown_table
from skipat_surgery.measure.benchmark import LIMIT, UNTOUCHED, Comparison, Rival, benchmark
from skipat_surgery.measure.line_up import compiled, line_up
from skipat_surgery.measure.memory import training_step
from skipat_surgery.measure.timing import Estimate, latencies
from skipat_surgery.tower import Tower

PHIS = {"cut": PhiConfig(), "cut of Z": PhiConfig(pool=0, reads_x=False)}
MODELS = ("small", "base", "large")
QUALITY = {
    "cifar10": "cut 3-8, cut 7-11 of Z, merge 2, merge 4",
    "saliency": "cut 5-10, cut 9-10, merge 8, merge 16",
}


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    models: str = option(",".join(f"timm/vit_{size}_patch16_224" for size in MODELS), "Models, with commas.")
    image_sizes: str = option("224,384,512,1024", "Pixels a side.")
    batch_sizes: str = option("1,8,64,256", "Images a batch; what does not fit is left out.")
    dtype: str = option("bf16", "bf16, fp16 or fp32.")
    minutes: float = option(18.0, "The time for all of it.")
    rounds: int = option(30, "How often each model is timed.")
    quality: bool = option(True, "Whether to measure quality at speed, where ../shared is at hand.")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "Where to run.")
    output_dir: str = option("outputs/gpu", "Where everything is written.")


def line_up_of(model: nn.Module) -> list[Rival]:
    """The untouched model, its cuts and their limit; the middle half of the blocks is cut."""
    depth = len(Tower.of(model).blocks)
    return line_up(model, range(depth // 4, 3 * depth // 4), PHIS)


def in_every_mode(eager: list[Rival], device: torch.device) -> list[Rival]:
    """The same, compiled too, and on CUDA as recorded graphs."""
    graphs = compiled(eager, "CUDA graphs", "reduce-overhead") if device.type == "cuda" else []
    return eager + compiled(eager) + graphs


class Gpu:
    """Everything, in the order of what is asked most."""

    def __init__(self, args: Arguments) -> None:
        self.args, self.device, self.dtype = args, torch.device(args.device), DTYPES[args.dtype]
        self.end = time.monotonic() + 60 * args.minutes
        self.output = Path(args.output_dir)
        self.output.mkdir(parents=True, exist_ok=True)
        self.rates = Rates.measured(self.device, self.dtype)
        self.found: dict[str, Any] = {"arguments": asdict(args), "machine": machine(self.device)}
        self.found |= {"rates": asdict(self.rates), "forward": [], "training": [], "left out": []}

    def run(self) -> None:
        """Measure, and write after each table."""
        sizes, batches = (
            parse_numbers(given, int, name)
            for given, name in ((self.args.image_sizes, "image_sizes"), (self.args.batch_sizes, "batch_sizes"))
        )
        combinations = list(itertools.product(self.args.models.split(","), sizes, batches))
        # Those of the smallest size first, so that every model has a row before the time is up.
        combinations.sort(key=lambda found: (found[1], found[2]))
        for model, size, batch in tqdm(combinations, desc="Models", unit="table"):
            with self.unless_left_out(f"{model}, {size} px, batch {batch}") as title:
                self.check_time()
                self.measure(model, size, batch, title)
        if self.args.quality and SHARED.exists():
            self.quality()
        self.write()

    @contextmanager
    def unless_left_out(self, title: str) -> Iterator[str]:
        """Around what may be left out, as the time is up or the memory does not suffice; writes what was found."""
        try:
            yield title
        except (TimeoutError, torch.OutOfMemoryError) as error:
            self.found["left out"].append(f"{title}: {type(error).__name__}, {str(error).splitlines()[0]}")
        self.write()

    def check_time(self) -> None:
        """Raise a TimeoutError once the time is up."""
        if time.monotonic() > self.end:
            raise TimeoutError("the time was up")

    def measure(self, name: str, size: int, batch: int, title: str) -> None:
        """A forward and a training step of one model."""
        torch.manual_seed(0)  # random weights: speed does not depend on them
        model = loading.build(name, size).to(self.device, self.dtype).eval()
        tower, rivals = Tower.of(model), line_up_of(model)
        images = torch.randn(batch, *tower.family.image_size(tower.module)).to(self.device, self.dtype)
        self.forward(rivals, images, title)
        self.training(rivals, images, tower, title)

    def forward(self, eager: list[Rival], images: Tensor, title: str) -> None:
        """Speed, captured share and memory of a forward, and how far it is from its floor."""
        torch.compiler.reset()
        seconds = min(30.0, max(3.0, (self.end - time.monotonic()) / 20))
        rivals = in_every_mode(eager, self.device)
        comparison = benchmark(rivals, images, title, self.args.rounds, seconds, training=False, progress=False)
        floors = {rival.name: Work.of(rival.model, images) for rival in eager if rival.name != LIMIT}
        self.found["forward"].append(
            {
                **comparison.to_dict(),
                "markdown": self.markdown(comparison, floors),
                "work": {key: asdict(work) for key, work in floors.items()},
            }
        )

    def training(self, rivals: list[Rival], images: Tensor, tower: Tower, title: str) -> None:
        """Seconds of a forward and backward."""
        calls = {
            rival.name: partial(training_step, rival.model, images, tower) for rival in rivals if rival.name != LIMIT
        }
        seconds = latencies(calls, self.device, 10, max_seconds=10)
        speed = {key: asdict(Estimate.of_speed(seconds[UNTOUCHED], own)) for key, own in seconds.items()}
        self.found["training"].append({"title": title, "seconds": seconds, "speed": speed})

    def quality(self) -> None:
        """What the real models keep, at which speed."""
        for subject, rows in QUALITY.items():
            options = ["--subject", subject, "--rows", rows, "--device", self.args.device, "--batch_size", "64"]
            folder = self.output / subject
            with self.unless_left_out(f"quality of {subject}"):
                self.check_time()
                equal_speed.main([*options, "--output_dir", str(folder)])

    def markdown(self, comparison: Comparison, floors: dict[str, Work]) -> str:
        """The table of a comparison, and a line on its floors."""
        lines = []
        for name, work in floors.items():
            row = comparison.row(name)
            assert row is not None
            own = Estimate.of(row.seconds).value
            lines.append(
                f"{name}: {own / work.floor(self.rates):.1f} times its floor, "
                f"{own / work.eager_floor(self.rates):.1f} times that of unfused operations"
            )
        return f"{comparison.title}\n\n{comparison.markdown()}\n\n" + "; ".join(lines)

    def write(self) -> None:
        """Write what was found so far."""
        run_state.write_json(self.output / "gpu.json", self.found)
        tables = [table["markdown"] for table in self.found["forward"]]
        rows = [
            [row["title"], *(Estimate(**row["speed"][name]).as_speed() for name in PHIS)]
            for row in self.found["training"]
        ]
        tables.append("A training step\n\n" + markdown_table(["", *PHIS], rows))
        tables += [f"Left out: {line}" for line in self.found["left out"]]
        tables.append(f"`python {shlex.join(sys.argv)}`, {self.found['machine']}, torch {torch.__version__}")
        (self.output / "gpu.md").write_text("\n\n".join(tables) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    (args,) = parse((Arguments,), sys.argv[1:] if argv is None else argv, "All that is measured on a GPU.")
    quiet_libraries()
    Gpu(args).run()


if __name__ == "__main__":
    main()
