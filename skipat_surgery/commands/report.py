"""What can be cut in a model, and where; of a cut model what was cut.

    skipat report google/vit-base-patch16-224
    skipat report timm/vit_small_patch14_dinov2
    skipat report out/best

Only the configuration of a model is read, and no weights. A model that cannot be cut is refused with the reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

from rich.table import Table
from torch import nn

from ..analysis.plan_table import block_ranges
from ..core.cutting import records_of
from ..core.family import Family, Grid
from ..core.finding import UnsupportedModelError, find_tower, towers_in
from ..core.folded_carrying import attends_globally
from ..core.tokens import by
from ..core.windowed_phis import is_windowed
from ..measure.report import report
from ..result import Result, titled_table
from ..surgery import check_form
from ..terminal import for_wide_tables
from . import loading
from .arguments import MODEL
from .options import parse
from .parser import POSITIONAL
from .running import run_command

WITHOUT_MSA = "a Φ that keeps no part of the MSA, such as PhiConfig(prefix='mix', pool=0)"
WITHOUT_CLUSTERS = "a Φ without clusters, such as PhiConfig(pool=0)"


@dataclass(frozen=True)
class Arguments:
    """What to report on."""

    model: str = field(metadata={"help": MODEL.partition(";")[0] + ".", POSITIONAL: True})


@dataclass(frozen=True)
class Blocks:
    """Blocks of which the same is true.

    Args:
        blocks: Their indices.
        takes: What can stand in the place of their MSA; empty where nothing can.
        reason: Why not more.
    """

    blocks: tuple[int, ...]
    takes: str
    reason: str = ""


@dataclass(frozen=True)
class Anatomy(Result):
    """What can be cut in an untouched model.

    Args:
        model: Its class.
        path: Where it holds the vision tower; empty where it is that itself.
        family: Of the tower.
        width: Of its tokens.
        image_size: The configured (channels, height, width), or (frames, channels, height, width).
        grid: Patches at that size.
        special_tokens: Tokens before the patches, and after them.
        blocks: All blocks, by what can be done with them.
    """

    model: str
    path: str
    family: str
    width: int
    image_size: tuple[int, ...]
    grid: Grid
    special_tokens: tuple[int, int]
    blocks: tuple[Blocks, ...]

    def table(self) -> Table:
        """The anatomy as a rich table."""
        prefix, suffix = self.special_tokens
        depth = sum(len(part.blocks) for part in self.blocks)
        after = f", {suffix} suffix tokens" if suffix else ""
        shown = titled_table(f"{self.model}: what can be cut", "", "")
        shown.show_header = False
        shown.add_row("family", self.family)
        shown.add_row("vision tower", self.path or "the model itself")
        shown.add_row("images" if len(self.grid) == 2 else "videos", by(self.image_size))
        tokens = prefix + math.prod(self.grid) + suffix
        shown.add_row("tokens", f"{tokens}: {prefix} prefix tokens, {by(self.grid)} patches{after}")
        shown.add_row("width", str(self.width))
        shown.add_row("blocks", f"{depth}, counted from 0", end_section=True)
        for part in self.blocks:
            shown.add_row(
                f"{'block' if len(part.blocks) == 1 else 'blocks'} {block_ranges(part.blocks)}",
                "; ".join(filter(None, (f"can be skipped, with {part.takes}" if part.takes else "stays", part.reason))),
            )
        return shown


def anatomy(model: nn.Module, within: str | None = None) -> Anatomy:
    """What can be cut in an untouched model; no weights are looked at.

    Args:
        model: Untouched.
        within: Path of the vision transformer, where the model holds several.

    Raises:
        UnsupportedModelError: Nothing can, with the reason.
    """
    check_form(model)
    path, tower, family = find_tower(model, within)
    return Anatomy(
        model=type(model).__name__,
        path=path,
        family=family.name,
        width=family.width(tower),
        image_size=family.image_size(tower),
        grid=family.grid(tower),
        special_tokens=(family.num_prefix_tokens(tower), family.num_suffix_tokens(tower)),
        blocks=tuple(_blocks(tower, family)),
    )


def _blocks(tower: nn.Module, family: Family) -> list[Blocks]:
    """The blocks, those of which the same is true together."""
    same: dict[tuple[str, str], list[int]] = {}
    starts = tuple(stage.blocks.start for stage in family.stage_list(tower))
    for index in range(len(family.block_list(tower))):
        if index not in starts:
            same.setdefault(_taken(tower, family, index), []).append(index)
    why = "no block before it gives a Z to start from" if starts == (0,) else "in each begins a stage, and no Z fits it"
    return [Blocks(starts, "", why), *(Blocks(tuple(indices), *key) for key, indices in same.items())]


def _taken(tower: nn.Module, family: Family, index: int) -> tuple[str, str]:
    """The most that a block can be given, and why not more."""
    block = family.block_list(tower)[index]
    attention = block.get_submodule(family.attention)
    if is_windowed(family, block):
        return WITHOUT_CLUSTERS, "within windows attention costs little"
    if family.folded and attends_globally(block, family):
        return WITHOUT_MSA, "its MSA attends over all windows, and a Φ sees them one by one"
    if family.attends(attention):
        return "any Φ", ""
    return WITHOUT_MSA, f"no part of its {type(attention).__name__} can be kept, which is of no kind that is known"


class Reporting:
    """The report on a model, which is built without its weights."""

    def __init__(self, args: Arguments) -> None:
        self.args, model = args, loading.build(args.model)
        if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
            raise UnsupportedModelError(f"{args.model} is quantised; cut the plain model first, then quantise")
        self.cut = bool(records_of(model))
        # Where there is none, the error says why.
        paths: list[str | None] = [path for path, _ in towers_in(model)] or [None]
        self.found: list[Result] = [report(model)] if self.cut else [anatomy(model, path) for path in paths]

    def run(self) -> None:
        """Show it, and how to go on."""
        console = for_wide_tables()
        for found in self.found:
            console.print(found.table())
        first = self.found[0]
        if len(self.found) > 1:
            given = ", ".join(f"tower={found.path!r}" for found in self.found if isinstance(found, Anatomy))
            console.print(
                f"Next: skipat_surgery.apply(model, skip, …) with one of {given}", soft_wrap=True, markup=False
            )
        elif isinstance(first, Anatomy) and len(first.grid) == 2:  # `skipat convert` reads images
            given = f"{self.args.model} --images FOLDER --speedup 1.3 --output_dir OUT"
            console.print(f"Next: skipat convert {given}", soft_wrap=True, markup=False)


def prepare(argv: list[str], name: str | None = None) -> Reporting:
    """The report that a command line asks for, made."""
    return Reporting(*parse((Arguments,), argv, __doc__ or "", name=name))


def main(argv: list[str] | None = None, name: str = "report.py") -> None:
    """Run, or say in one line why not."""
    run_command(name, partial(prepare, name=name), argv)


if __name__ == "__main__":
    main()
