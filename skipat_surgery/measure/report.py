"""`report`: what stands where in a cut model, before ⇒ after."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from torch import nn

from ..core.config import PhiConfig
from ..core.cutting import record_of
from ..core.family import Grid
from .counting import count_macs, count_parameters


@dataclass(frozen=True)
class BlockReport:
    """One block. MACs are those of one image at the configured size; 1 MAC is 2 FLOPs.

    `source` is the block whose Z enters Φ, and `phi` its shape; both are None for an attended block.
    """

    index: int
    source: int | None
    phi: PhiConfig | None
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int


@dataclass(frozen=True)
class Report:
    """What was done to a model, block by block, and the totals of its vision tower.

    `str` gives a table, and a notebook shows it as one.
    """

    model: str
    family: str
    tower: str
    num_prefix_tokens: int
    grid: Grid
    blocks: tuple[BlockReport, ...]
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int

    def table(self) -> Table:
        """The report as a rich table."""
        height, width = self.grid
        where = f" in {self.tower!r}" if self.tower else ""
        table = Table(
            title=f"{self.model}: {self.family}{where}",
            caption=f"{self.num_prefix_tokens} prefix tokens, {height}×{width} patches; MACs for one image",
            title_justify="left",
            caption_justify="left",
        )
        table.add_column("block", justify="right")
        table.add_column("MSA ⇒ Φ")
        table.add_column("Z from")
        table.add_column("parameters", justify="right")
        table.add_column("MACs", justify="right")
        skipped = {block.index for block in self.blocks if block.phi is not None}
        for block in self.blocks:
            source = f"block {block.source} ({'Φ' if block.source in skipped else 'MSA'})"
            table.add_row(
                str(block.index),
                "MSA" if block.phi is None else f"MSA ⇒ Φ: {describe(block.phi)}",
                "" if block.phi is None else source,
                change(block.parameters_before, block.parameters_after),
                change(block.macs_before, block.macs_after),
                style="bold" if block.phi else None,
            )
        table.add_section()
        table.add_row(
            "all",
            f"{len(skipped)} of {len(self.blocks)} blocks skipped",
            "",
            change(self.parameters_before, self.parameters_after),
            change(self.macs_before, self.macs_after),
        )
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=130)
        console.print(self.table())
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def _repr_html_(self) -> str:
        console = Console(file=io.StringIO(), record=True, width=130)
        console.print(self.table())
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def report(model: nn.Module) -> Report:
    """Say what was done to a cut model.

    A skipped block's figures before the cut are those of the attended block that its run starts from, which has the
    same shape. MACs are counted by torch's FLOP counter in one forward on the meta device, which computes nothing.

    Raises:
        ValueError: The model is not cut.

    Example:
        >>> print(skipat_surgery.report(model))  # doctest: +SKIP
    """
    found = record_of(model)
    if found is None:
        raise ValueError(f"this {type(model).__name__} is not cut: call skipat_surgery.apply(model, skip=…) first")
    path, tower, record = found
    family, skip = record.family, set(record.config.skip)
    block_list = family.block_list(tower)
    total, macs = count_macs(tower, family)
    sizes = [count_parameters(block) for block in block_list]
    blocks = []
    for index in range(len(block_list)):
        like = index
        while like in skip:
            like -= 1
        blocks.append(
            BlockReport(
                index=index,
                source=index - 1 if index in skip else None,
                phi=record.config.phi.get(index),
                parameters_before=sizes[like],
                parameters_after=sizes[index],
                macs_before=macs[like],
                macs_after=macs[index],
            )
        )
    parameters = count_parameters(tower)
    return Report(
        model=type(model).__name__,
        family=family.name,
        tower=path,
        num_prefix_tokens=family.num_prefix_tokens(tower),
        grid=family.grid(tower),
        blocks=tuple(blocks),
        parameters_before=parameters + sum(b.parameters_before - b.parameters_after for b in blocks),
        parameters_after=parameters,
        macs_before=total + sum(b.macs_before - b.macs_after for b in blocks),
        macs_after=total,
    )


def describe(phi: PhiConfig) -> str:
    """A Φ in a few words."""
    eca = ", ECA" if phi.channel_attention else ""
    return f"expansion {phi.expansion:g}, {phi.kernel_size}×{phi.kernel_size}{eca}, prefix {phi.prefix}"


def change(before: int, after: int) -> str:
    """A figure before ⇒ after, as people write it."""
    if before == after:
        return human(before)
    return f"{human(before)} ⇒ {human(after)} ({after / before - 1:+.0%})"


def human(value: float) -> str:
    """12 345 678 as 12.35 M."""
    for unit in ("", " k", " M", " G"):
        if value < 1000:
            return f"{value:.4g}{unit}"
        value /= 1000
    return f"{value:.4g} T"
