"""A cut on the engines that people deploy with: speed, quality, and what the graph is made of.

    python benchmarks/engines.py --subject saliency --rows "cut 5-10, merge 12"
    python benchmarks/engines.py --subject cifar10 --batch_sizes 1,32 --engines "eager, onnxruntime fp32"

Rows are those of ``benchmarks/equal_speed.py``, beside the limit of the first cut. Each is exported at a fixed batch
and compared with its own eager outputs; what is quantised after training is calibrated on the photos that it was
solved on. Every engine times all rows by turns, against the untouched model on the same engine. Needs
``pip install 'skipat-surgery[benchmark]'``.
"""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from equal_speed import UNTOUCHED, Row, subject_of
from exported import ENGINES, Exported, Run, run_module
from torch import Tensor
from tqdm.auto import tqdm

from skipat_surgery.commands import run_state
from skipat_surgery.commands.machine import keep_freed_memory, machine, quiet_libraries
from skipat_surgery.commands.options import parse, parse_numbers
from skipat_surgery.convert.settings import option
from skipat_surgery.core.tables import markdown_table
from skipat_surgery.measure.benchmark import LIMIT
from skipat_surgery.measure.limit import limit
from skipat_surgery.measure.timing import Estimate, latencies
from skipat_surgery.observing import evaluating

# Operations whose time depends on what they read, and which engines do not fuse.
IRREGULAR = ("Sort", "TopK", "Scatter", "ScatterElements", "ScatterND", "GatherElements", "GatherND")


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    subject: str = option("saliency", "saliency, cifar10 or camvid.")
    rows: str = option("cut 5-10, cut 3-8 of Z, merge 8, merge 12", "The rows, as of benchmarks/equal_speed.py.")
    engines: str = option(", ".join(ENGINES), "The engines.")
    batch_sizes: str = option("1,8", "Images a batch.")
    image_size: int = option(224, "Pixels a side, of saliency.")
    solve_images: int = option(256, "How many images cuts are solved, and int8 is calibrated, on.")
    test_images: int = option(64, "How many images are measured on.")
    rounds: int = option(25, "How often each model is timed.")
    max_seconds: float = option(40.0, "Fewer rounds where those of one engine would take longer.")
    output_dir: str = option("outputs/engines", "Where everything is written.")

    def __post_init__(self) -> None:
        unknown = sorted(set(self.engines.split(", ")) - set(ENGINES))
        if unknown:
            raise ValueError(f"--engines takes {', '.join(ENGINES)}; got {', '.join(unknown)}")


class Engines:
    """The rows on every engine, and where what was measured is written."""

    def __init__(self, args: Arguments) -> None:
        self.args, self.batches = args, parse_numbers(args.batch_sizes, int, "batch_sizes")
        rows = {name: Row.of(name) for name in args.rows.split(", ")}
        self.subject, self.output = subject_of(args), Path(args.output_dir)
        self.output.mkdir(parents=True, exist_ok=True)
        self.file = self.output / "engines.json"
        self.calibration = self.subject.fitting(args.solve_images)
        teacher = self.subject.teacher
        self.models = {UNTOUCHED: teacher, **{name: row.make(teacher, self.calibration) for name, row in rows.items()}}
        skip = next((sorted(row.phi) for row in rows.values() if row.phi), None)
        if skip is not None:
            self.models[LIMIT] = limit(teacher, skip)
        self.found: list[dict[str, Any]] = []
        self.refused: dict[tuple[str, int, str], str] = {}  # by engine, batch and row, in the engine's words

    def run(self) -> None:
        """Measure each engine at each batch, and write after each."""
        with evaluating(*self.models.values()):
            for batch in self.batches:
                exported = {
                    name: Exported(model, self.subject.images(batch), self.output / f"{name}, {batch}.onnx")
                    for name, model in tqdm(self.models.items(), desc=f"Exporting at batch {batch}", unit="model")
                }
                self.found += [self.graph(name, batch, model) for name, model in exported.items()]
                for engine in self.args.engines.split(", "):
                    self.found += self.measured(engine, batch, exported)
                    run_state.write_json(self.file, {"arguments": asdict(self.args), "rows": self.found})
        refused = "".join(f"- {', '.join(map(str, key))}: {reason}\n" for key, reason in self.refused.items())
        where = f"`python {shlex.join(sys.argv)}`, {machine(torch.device('cpu'))}"
        text = f"{self.table()}\n\n{refused}\n{self.graphs()}\n\n{where}\n"
        (self.output / "engines.md").write_text(text)
        print(text)

    def measured(self, engine: str, batch: int, exported: dict[str, Exported]) -> list[dict[str, Any]]:
        """Speed, quality, and the largest difference from the eager outputs, of every row."""
        images, runs = self.subject.images(batch), {}
        for name, model in tqdm(exported.items(), desc=f"Loading into {engine}", unit="model", leave=False):
            try:
                runs[name] = ENGINES[engine](model, self.calibration)
            except RuntimeError as error:
                self.refused[engine, batch, name] = str(error).strip().splitlines()[-1]
        calls: dict[str, Callable[[], Tensor]] = {name: (lambda run=run: run(images)) for name, run in runs.items()}  # type: ignore[misc]
        seconds = latencies(calls, images.device, self.args.rounds, self.args.max_seconds, progress=True)
        rows = []
        for name, run in runs.items():
            speed = Estimate.of_speed(seconds[UNTOUCHED], seconds[name])
            row = {"engine": engine, "batch": batch, "name": name, "speed": asdict(speed), "seconds": seconds[name]}
            if name != LIMIT:
                row |= self.quality(run, exported[name], images)
            rows.append(row)
        return rows

    def quality(self, run: Run, model: Exported, images: Tensor) -> dict[str, Any]:
        """What the subject measures of an engine's outputs, and how far they are from the eager ones."""
        with torch.no_grad():
            expected = model.tokens(images)
        difference = ((run(images) - expected).norm() / expected.norm()).item()
        return {"difference": difference, "quality": self.subject.measure(run_module(run, len(images), model.name))}

    def graph(self, name: str, batch: int, model: Exported) -> dict[str, Any]:
        """How large an export is, and of what nodes."""
        return {"name": name, "batch": batch, "nodes": dict(model.nodes), "bytes": model.bytes}

    def table(self) -> str:
        """A row a model, engine and batch."""
        rows = []
        for row in self.found:
            if "engine" in row:
                quality = row.get("quality", {}).get(self.subject.quality)
                rows.append(
                    [
                        f"{row['engine']}, batch {row['batch']}",
                        row["name"],
                        Estimate(**row["speed"]).as_speed(),
                        "–" if quality is None else f"{quality:.4f}",
                        f"{row['difference']:.1e}" if "difference" in row else "–",
                    ]
                )
        rows += [[f"{engine}, batch {batch}", name, "does not run", "–", "–"] for engine, batch, name in self.refused]
        return markdown_table(["engine", "", "speed", self.subject.quality, "from eager fp32"], rows)

    def graphs(self) -> str:
        """A row a model: nodes, irregular ones, size of the file."""
        rows = []
        for row in self.found:
            if "nodes" in row and row["batch"] == self.batches[0]:
                nodes = Counter(row["nodes"])
                irregular = ", ".join(f"{nodes[kind]} {kind}" for kind in IRREGULAR if nodes[kind]) or "none"
                rows.append([row["name"], str(nodes.total()), irregular, f"{row['bytes'] / 1e6:.1f}"])
        return markdown_table(["", "nodes", "sorts, scatters, gathers by value", "MB"], rows)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    (args,) = parse((Arguments,), sys.argv[1:] if argv is None else argv, "A cut on the engines of deployment.")
    quiet_libraries()
    keep_freed_memory()
    Engines(args).run()


if __name__ == "__main__":
    main()
