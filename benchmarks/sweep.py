"""Cost against the number of tokens: the same models at one image size after another.

    python benchmarks/sweep.py --sides 14,28,56

Takes the options of ``recipes/benchmark.py`` too; writes a CSV and a picture beside the table.
"""

from __future__ import annotations

import csv
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from skipat_surgery.analysis.pictures import pyplot
from skipat_surgery.commands.benchmark import Arguments, Benchmark
from skipat_surgery.commands.options import parse
from skipat_surgery.convert.settings import option
from skipat_surgery.core.tables import markdown_table
from skipat_surgery.measure.benchmark import LIMIT, UNTOUCHED, Comparison, Rival, benchmark, label
from skipat_surgery.tower import Tower

SIDES = (14, 20, 28, 40, 56, 80, 112, 128)
TOKENS_A_BATCH = 4096
SHARE_OF_MEMORY = 0.8
CPU = torch.device("cpu")
COLUMNS = ("patches", "tokens", "batch", "model", "ms_per_image", "speed", "captured", "forward_bytes_per_image")


@dataclass(frozen=True)
class Size:
    """One image size of a sweep.

    Args:
        side: Patches a side.
        tokens: Patches in all.
        comparison: What was measured; None where it was left out.
        reason: Why it was left out.
    """

    side: int
    tokens: int
    comparison: Comparison | None
    reason: str | None = None


def sweep(
    build: Callable[[int], nn.Module],
    line_up: Callable[[nn.Module, Tensor], Sequence[Rival]],
    sides: Iterable[int] = SIDES,
    device: torch.device = CPU,
    max_seconds: float = 60.0,
) -> list[Size]:
    """Benchmark a model at one size after another.

    The batch shrinks as the images grow, so that a batch has about `TOKENS_A_BATCH` tokens. What a size would need is
    foretold from the size before it, as if all of it grew with the square of the tokens; where that does not fit in
    memory, the size is left out.

    Args:
        build: A model for images of so many patches a side, on its device and in its dtype.
        line_up: The models to compare, from that one.
        sides: Patches a side.
        device: Where the models run.
        max_seconds: For the rounds of each size; at least five rounds are run.
    """
    found: list[Size] = []
    for side in (bar := tqdm(sorted(sides), desc="Sweep", unit="size")):
        tokens = side * side
        bar.set_postfix_str(f"{side}×{side} patches")
        needed, free = foretold(found, tokens), free_memory(device)
        if needed is not None and needed > SHARE_OF_MEMORY * free:
            found.append(Size(side, tokens, None, f"needs up to {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"))
            continue
        model = build(side)
        tower, parameter = Tower.of(model), next(model.parameters())
        channels, height, width = tower.family.image_size(tower.module)
        images = torch.randn(max(1, TOKENS_A_BATCH // tokens), channels, height, width).to(device, parameter.dtype)
        title = f"{side}×{side} patches"
        comparison = benchmark(line_up(model, images), images, title, max_seconds=max_seconds, training=False)
        found.append(Size(side, tokens, comparison))
    return found


def foretold(sizes: Sequence[Size], tokens: int) -> float | None:
    """The bytes that the next size needs at most; None where nothing was measured yet."""
    measured = [size for size in sizes if size.comparison is not None]
    if not measured:
        return None
    last = measured[-1]
    assert last.comparison is not None
    peak = max(row.forward_bytes or 0 for row in last.comparison.rows) / last.comparison.batch
    return peak * max(1, TOKENS_A_BATCH // tokens) * (tokens / last.tokens) ** 2


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def lines(sizes: Sequence[Size]) -> dict[str, tuple[list[int], list[float]]]:
    """Tokens and milliseconds an image, by model."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for size in sizes:
        if size.comparison is None:
            continue
        for row in size.comparison.rows:
            tokens, times = found.setdefault(label(row), ([], []))
            tokens.append(size.tokens)
            times.append(1e3 * statistics.median(row.seconds) / size.comparison.batch)
    return found


def slope(tokens: Sequence[int], times: Sequence[float]) -> float:
    """The exponent of the cost in the number of tokens, over the larger half of the sizes."""
    half = min(len(tokens) // 2, max(0, len(tokens) - 2))
    logs = [[math.log(value) for value in values[half:]] for values in (tokens, times)]
    return statistics.linear_regression(*logs).slope if len(logs[0]) > 1 else math.nan


def write_csv(sizes: Sequence[Size], path: Path) -> None:
    """Write every row of every size."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for size in sizes:
            if size.comparison is None:
                continue
            batch = size.comparison.batch
            for row in size.comparison.rows:
                captured = size.comparison.captured(row)
                writer.writerow(
                    [
                        f"{size.side}x{size.side}",
                        size.tokens,
                        batch,
                        label(row),
                        1e3 * statistics.median(row.seconds) / batch,
                        size.comparison.speed(row).value,
                        "" if captured is None else captured.value,
                        "" if row.forward_bytes is None else row.forward_bytes // batch,
                    ]
                )


def markdown(sizes: Sequence[Size]) -> str:
    """Speed over the untouched model by size, with the captured share, for a README."""
    first = next(size.comparison for size in sizes if size.comparison is not None)
    names = [label(row) for row in first.rows if label(row) != UNTOUCHED]
    rows = []
    for size in sizes:
        found = size.comparison
        cells = [f"left out: {size.reason}", *[""] * len(names)] if found is None else _cells(found)
        rows.append([f"{size.side}×{size.side}", str(size.tokens), *cells])
    header = ["patches", "tokens", "untouched, ms an image", *names]
    return markdown_table(header, rows, align="lll" + "r" * len(names))


def _cells(comparison: Comparison) -> list[str]:
    cells = []
    for row in comparison.rows:
        captured = comparison.captured(row)
        if label(row) == UNTOUCHED:
            cells.append(f"{1e3 * statistics.median(row.seconds) / comparison.batch:.1f}")
        else:
            share = "" if captured is None else f" ({captured.value:.0%})"
            cells.append(f"{comparison.speed(row).value:.2f}×{share}")
    return cells


def plot(sizes: Sequence[Size], title: str, path: Path) -> None:
    """Draw milliseconds an image against tokens on log axes, with the slope of every line."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for index, (name, (tokens, times)) in enumerate(lines(sizes).items()):
        style = "k--" if name == LIMIT else "o-"
        legend = f"{name} (slope {slope(tokens, times):.2f})"
        axis.plot(
            tokens, times, style, **({} if style == "k--" else {"color": f"C{index}"}), markersize=4, label=legend
        )
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds an image", title=title)
    axis.grid(which="both", alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


@dataclass(frozen=True)
class SweepArguments(Arguments):
    """What to measure, at which sizes."""

    sides: str = option(",".join(map(str, SIDES)), "Patches a side.")


class Sweep(Benchmark):
    """The benchmark at one image size after another."""

    args: SweepArguments

    def run(self) -> None:
        """Cost against tokens: table, CSV and picture."""
        args = self.args
        dtype = args.precisions[0]
        tower = Tower.of(self.model(None, dtype))
        patch = tower.family.image_size(tower.module)[1] // tower.family.grid(tower.module)[0]
        sides = map(int, args.sides.split(","))
        sizes = sweep(
            lambda side: self.model(side * patch, dtype), self.line_up, sides, self.device, max_seconds=args.max_seconds
        )
        title = f"{args.model}, {dtype}, blocks {args.skip} skipped"
        plot(sizes, f"{title}\n{self.where}", self.output / "sweep.png")
        write_csv(sizes, self.output / "sweep.csv")
        self.write([size.comparison for size in sizes if size.comparison], f"{title}\n\n{markdown(sizes)}")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    (args,) = parse((SweepArguments,), sys.argv[1:] if argv is None else argv, "Cost against the number of tokens.")
    Sweep(args).run()


if __name__ == "__main__":
    main()
