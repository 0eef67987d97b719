"""A cut model beside the untouched one and the limit: speed, memory and FLOPs, side by side in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich import box
from rich.table import Table
from torch import Tensor, nn

from ..core.tables import markdown_table
from ..observing import evaluating, image_part
from ..tower import Tower
from .counting import gflops
from .memory import peak_memory, training_step, weight_bytes
from .timing import Estimate, latencies

UNTOUCHED, LIMIT = "untouched", "limit"
HEADER = ("model", "ms", "images/s", "speed", "captured", "GFLOPs", "MB forward", "MB training step")


@dataclass(frozen=True)
class Rival:
    """A model that takes part.

    Args:
        name: What it is called in the table.
        model: The model as it stands, whose FLOPs and memory are counted.
        call: What is timed, such as the model compiled; where left out the model, or its vision tower where it takes
            text too.
        mode: Models are compared with the untouched model and the limit of the same mode, ``"eager"`` or another.
        counts: Whether its FLOPs and weights can be counted.
        trains: Whether a training step can be run.
    """

    name: str
    model: nn.Module
    call: Callable[[Tensor], Any] | None = None
    mode: str = "eager"
    counts: bool = True
    trains: bool = True


@dataclass(frozen=True)
class Row:
    """What was measured of one model.

    Args:
        name: Of the rival.
        mode: Of the rival.
        seconds: Of one batch, round by round; the rounds of all rows belong together.
        gflops: Of one image; None where they cannot be counted.
        forward_bytes: The peak memory of a forward, weights included; None where it was not measured.
        training_bytes: That of a forward and backward, gradients included, optimizer states not.
    """

    name: str
    mode: str
    seconds: tuple[float, ...]
    gflops: float | None = None
    forward_bytes: int | None = None
    training_bytes: int | None = None


@dataclass(frozen=True)
class Comparison:
    """The rows of one run. `str` of its `table` is what people look at."""

    title: str
    batch: int
    rows: tuple[Row, ...]

    def row(self, name: str, mode: str = "eager") -> Row | None:
        """The row of a rival; None where there is none."""
        return next((row for row in self.rows if (row.name, row.mode) == (name, mode)), None)

    def speed(self, row: Row) -> Estimate:
        """How many times as fast as the untouched, eager model a row is, round by round."""
        untouched = self.row(UNTOUCHED)
        assert untouched is not None
        return Estimate.of_speed(untouched.seconds, row.seconds)

    def captured(self, row: Row) -> Estimate | None:
        """The captured share (T_full - T_cut) / (T_full - T_limit) of a row, within its mode.

        None where its mode has no untouched model and limit, or noise drowns what there is to save.
        """
        full, limit = self.row(UNTOUCHED, row.mode), self.row(LIMIT, row.mode)
        if full is None or limit is None:
            return None
        savings = [t - least for t, least in zip(full.seconds, limit.seconds, strict=True)]
        whole = Estimate.of(savings)
        if whole.low <= 0:
            return None
        rounds = zip(full.seconds, row.seconds, strict=True)
        return Estimate.of([(t - cut) / whole.value for t, cut in rounds])

    def drowned(self) -> list[str]:
        """What this run cannot tell, as its spread is larger than the difference."""
        found = []
        for row in self.rows:
            speed = self.speed(row)
            if row.name == UNTOUCHED and row.mode == "eager":
                continue
            if speed.low <= 1 <= speed.high:
                found.append(
                    f"{label(row)}: no difference from the untouched model that the noise does not drown "
                    f"({speed.low:.2f}× to {speed.high:.2f}×)"
                )
            if row.name == LIMIT and self.captured(row) is None:
                found.append(f"{label(row)}: what there is to save drowns in the noise, so no share is given")
        return found

    def cells(self) -> list[tuple[str, ...]]:
        """The rows as text, under `HEADER`."""
        return [self._cells(row) for row in self.rows]

    def _cells(self, row: Row) -> tuple[str, ...]:
        time, speed, captured = Estimate.of(row.seconds), self.speed(row), self.captured(row)
        return (
            label(row),
            f"{1e3 * time.value:.1f} ({1e3 * time.low:.1f}–{1e3 * time.high:.1f})",
            f"{self.batch / time.value:.1f}",
            speed.as_speed(),
            "–"
            if captured is None or row.name == UNTOUCHED
            else f"{captured.value:.0%} ({100 * captured.low:.0f}–{100 * captured.high:.0f})",
            "–" if row.gflops is None else f"{row.gflops:.2f}",
            "–" if row.forward_bytes is None else f"{row.forward_bytes / 1e6:.1f}",
            "–" if row.training_bytes is None else f"{row.training_bytes / 1e6:.1f}",
        )

    def table(self) -> Table:
        """For the terminal."""
        shown = Table(
            title=self.title,
            caption="medians and their 95 % intervals; captured: the share of what the limit saves",
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
        )
        for index, name in enumerate(HEADER):
            shown.add_column(name, justify="right" if index else "left", no_wrap=True)
        for cells in self.cells():
            shown.add_row(*cells)
        return shown

    def markdown(self) -> str:
        """For a README."""
        return markdown_table(HEADER, self.cells())

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file: every sample is kept."""
        rows = []
        for row in self.rows:
            speed, captured = self.speed(row), self.captured(row)
            rows.append({**vars(row), "speed": vars(speed), "captured": captured and vars(captured)})
        return {"title": self.title, "batch": self.batch, "rows": rows, "drowned": self.drowned()}


def benchmark(
    rivals: Sequence[Rival],
    images: Tensor,
    title: str = "",
    rounds: int = 30,
    max_seconds: float | None = None,
    memory: bool = True,
    training: bool = True,
    progress: bool = True,
) -> Comparison:
    """Measure models side by side; `alternatives.line_up` makes the usual ones of a model.

    Args:
        rivals: The models; one of them is called `UNTOUCHED` in mode ``"eager"``.
        images: One batch (B, C, H, W), or of videos (B, T, C, H, W), on the models' device and in their dtype.
        title: Of the table.
        rounds: How often each is timed.
        max_seconds: Fewer rounds, though at least five, where they would take longer.
        memory: Whether to measure the peak memory of a forward.
        training: Whether to measure that of a training step.
        progress: Whether to show a bar.

    Raises:
        ValueError: There is no untouched model to compare with.
    """
    untouched = next((rival for rival in rivals if (rival.name, rival.mode) == (UNTOUCHED, "eager")), None)
    if untouched is None:
        raise ValueError(f"a benchmark needs a rival called {UNTOUCHED!r} in mode 'eager' to compare the others with")
    tower = Tower.of(untouched.model)
    calls = {
        str(index): partial(tower.run, images, image_part(rival.model) if rival.call is None else rival.call)
        for index, rival in enumerate(rivals)
    }
    with evaluating(*(rival.model for rival in rivals)):
        seconds = latencies(calls, images.device, rounds, max_seconds, progress)
        peaks = {index: peak_memory(call, images.device) for index, call in calls.items()} if memory else {}
    return Comparison(
        title,
        len(images),
        tuple(
            Row(
                rival.name,
                rival.mode,
                tuple(seconds[str(index)]),
                gflops(rival.model, images.shape[1:]) if rival.counts else None,
                peaks[str(index)] + weight_bytes(rival.model) if memory and rival.counts else None,
                training_bytes(rival, images, tower) if training else None,
            )
            for index, rival in enumerate(rivals)
        ),
    )


def summary(comparisons: Sequence[Comparison]) -> str:
    """A line for each comparison, in Markdown: speed over the untouched model, the captured share, and memory.

    The memory is the most that a row needs of what the untouched model does, in a forward and in a training step.
    """
    names = [label(row) for row in comparisons[0].rows if label(row) != UNTOUCHED]
    rows = []
    for comparison in comparisons:
        untouched, cells = comparison.row(UNTOUCHED), []
        assert untouched is not None
        for row in comparison.rows:
            if row is untouched:
                continue
            share = comparison.captured(row)
            memory = [
                f"{mine / whole:.2f}"
                for mine, whole in (
                    (row.forward_bytes, untouched.forward_bytes),
                    (row.training_bytes, untouched.training_bytes),
                )
                if mine is not None and whole is not None
            ]
            captured = "" if share is None or row.name == LIMIT else f", **{share.value:.0%}**"
            cells.append(
                f"{comparison.speed(row).value:.2f}×{captured}" + (f", {' / '.join(memory)}" if memory else "")
            )
        rows.append([comparison.title, *cells])
    return markdown_table(["", *names], rows)


def training_bytes(rival: Rival, images: Tensor, tower: Tower) -> int | None:
    """The peak memory of a rival's training step; None where it does not train."""
    if not rival.trains or rival.mode != "eager":
        return None
    part = image_part(rival.model)
    return peak_memory(lambda: training_step(part, images, tower), images.device) + weight_bytes(rival.model)


def label(row: Row) -> str:
    """A row's name, with its mode where that is not eager."""
    return row.name if row.mode == "eager" else f"{row.name}, {row.mode}"
