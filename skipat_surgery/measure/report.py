"""`report`: what stands where in a cut model, before ⇒ after."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table
from torch import nn

from ..core.config import PhiConfig
from ..core.cutting import Record, records_of
from ..core.family import Grid
from ..core.stages import Stage
from ..core.tokens import by
from ..result import Result
from .before import before
from .counting import count_macs, count_parameters


@dataclass(frozen=True)
class BlockReport:
    """One block. MACs are those of one image or video at the configured size; 1 MAC is 2 FLOPs.

    `source` is the block whose Z enters Φ, and `phi` its shape; both are None for an attended block. `mlp_width` is the
    number of hidden units left to an MLP that `narrow` took some out of.
    """

    index: int
    source: int | None
    phi: PhiConfig | None
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    mlp_width: int | None = None


@dataclass(frozen=True)
class TowerReport:
    """What was done to one vision tower, block by block, and its totals.

    `path` is where the model holds it, and empty where the model is the tower. `global_blocks` are the blocks that
    attend to the whole image, where the others do within windows of it; None where all do. `stages` are its stages,
    where it has more than one; `grid` is that of the first.
    """

    path: str
    family: str
    num_prefix_tokens: int
    grid: Grid
    blocks: tuple[BlockReport, ...]
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    global_blocks: tuple[int, ...] | None = None
    stages: tuple[Stage, ...] = ()

    @property
    def what(self) -> str:
        """What it takes, an image or a video."""
        return "image" if len(self.grid) == 2 else "video"


@dataclass(frozen=True)
class Report(Result):
    """What was done to a model: each vision tower that was cut. `str` gives a table, and a notebook shows it as one."""

    model: str
    towers: tuple[TowerReport, ...]

    @property
    def blocks(self) -> tuple[BlockReport, ...]:
        """The blocks of all towers, in order."""
        return tuple(block for tower in self.towers for block in tower.blocks)

    @property
    def parameters_before(self) -> int:
        """Parameters of all towers before the cut."""
        return sum(tower.parameters_before for tower in self.towers)

    @property
    def parameters_after(self) -> int:
        """Parameters of all towers now."""
        return sum(tower.parameters_after for tower in self.towers)

    @property
    def macs_before(self) -> int:
        """MACs of all towers, for one image each, before the cut."""
        return sum(tower.macs_before for tower in self.towers)

    @property
    def macs_after(self) -> int:
        """MACs of all towers, for one image each, now."""
        return sum(tower.macs_after for tower in self.towers)

    def table(self) -> Table:
        """The report as a rich table."""
        table = Table(title=self.model, title_justify="left", caption_justify="left")
        table.add_column("block", justify="right")
        table.add_column("MSA ⇒ Φ")
        table.add_column("Z from")
        table.add_column("parameters", justify="right")
        table.add_column("MACs", justify="right")
        captions = []
        for tower in self.towers:
            where = f" in {tower.path!r}" if tower.path else ""
            captions.append(
                f"{tower.family}{where}: {tower.num_prefix_tokens} prefix tokens, {by(tower.grid)} patches; MACs for "
                f"one {tower.what}"
            )
            if tower.stages:
                listed = "; ".join(_of_stage(stage, tower.grid) for stage in tower.stages)
                captions.append(f"in stages: {listed}")
            if tower.global_blocks is not None:
                listed = ", ".join(map(str, tower.global_blocks))
                captions.append(f"blocks {listed} attend to the whole {tower.what}, the others within windows of it")
            _add_rows(table, tower)
        table.caption = "\n".join(captions)
        return table


def _of_stage(stage: Stage, patches: Grid) -> str:
    """A stage in a few words."""
    blocks = f"{stage.blocks.start}-{stage.blocks.stop - 1}" if len(stage.blocks) > 1 else f"{stage.blocks.start}"
    return f"blocks {blocks} {by(stage.grid(patches))} patches of width {stage.width}"


def _add_rows(table: Table, tower: TowerReport) -> None:
    """The rows of one tower, block by block, and its totals."""
    skipped = {block.index for block in tower.blocks if block.phi is not None}
    for block in tower.blocks:
        source = f"block {block.source} ({'Φ' if block.source in skipped else 'MSA'})"
        table.add_row(
            str(block.index),
            ("MSA" if block.phi is None else f"MSA ⇒ Φ: {describe(block.phi, len(tower.grid))}")
            + (f"; MLP of {block.mlp_width:,} hidden units" if block.mlp_width else ""),
            "" if block.phi is None else source,
            change(block.parameters_before, block.parameters_after),
            change(block.macs_before, block.macs_after),
            style="bold" if block.phi else None,
        )
    table.add_section()
    table.add_row(
        "all",
        f"{len(skipped)} of {len(tower.blocks)} blocks skipped",
        "",
        change(tower.parameters_before, tower.parameters_after),
        change(tower.macs_before, tower.macs_after),
    )
    table.add_section()


def report(model: nn.Module) -> Report:
    """Say what was done to a cut model, in every tower of it that was cut.

    A skipped block's figures before the cut are those of the last attended block before it that has the same shape; of
    a tower of maps, where blocks are of two kinds, or of one with stages, its own.
    MACs are counted by torch's FLOP counter in one forward on the meta device, which computes nothing.

    Raises:
        ValueError: The model is not cut.

    Examples:
        >>> import timm
        >>> import skipat_surgery
        >>> small = dict(img_size=32, patch_size=8, embed_dim=32, depth=6, num_heads=2, num_classes=4)
        >>> model = skipat_surgery.apply(timm.create_model("vit_tiny_patch16_224", **small), skip=[2, 3])
        >>> print(skipat_surgery.report(model))  # doctest: +ELLIPSIS
        VisionTransformer...2 of 6 blocks skipped...
    """
    found = records_of(model)
    if not found:
        raise ValueError(f"this {type(model).__name__} is not cut: call skipat_surgery.apply(model, skip=…) first")
    return Report(type(model).__name__, tuple(_report_tower(*entry) for entry in found))


def _report_tower(path: str, tower: nn.Module, record: Record) -> TowerReport:
    family, phis = record.family, record.config.phi
    total, macs = count_macs(tower, family)
    sizes = [count_parameters(block) for block in family.block_list(tower)]
    sizes_before, macs_before = _before(tower, record, sizes, macs)
    blocks = []
    for index in range(len(sizes)):
        blocks.append(
            BlockReport(
                index=index,
                source=index - 1 if index in phis else None,
                phi=phis.get(index),
                parameters_before=sizes_before[index],
                parameters_after=sizes[index],
                macs_before=macs_before[index],
                macs_after=macs[index],
                mlp_width=record.config.mlp_widths.get(index),
            )
        )
    parameters, whole = count_parameters(tower), family.global_blocks(tower)
    return TowerReport(
        path=path,
        family=family.name,
        num_prefix_tokens=family.num_prefix_tokens(tower),
        grid=family.grid(tower),
        blocks=tuple(blocks),
        parameters_before=parameters + sum(b.parameters_before - b.parameters_after for b in blocks),
        parameters_after=parameters,
        macs_before=total + sum(b.macs_before - b.macs_after for b in blocks),
        macs_after=total,
        global_blocks=None if whole is None else tuple(whole),
        stages=tuple(family.stage_list(tower)) if family.stages else (),
    )


def _before(tower: nn.Module, record: Record, sizes: list[int], macs: list[int]) -> tuple[list[int], list[int]]:
    """The parameters and MACs of each block before the cut, from what they are now."""
    family = record.family
    if family.maps or family.stages or family.folded or family.pooled or record.full_widths:
        stock = before(tower, record)
        return [count_parameters(block) for block in family.block_list(stock)], count_macs(stock, family)[1]
    like = [_attended_like(index, tower, record) for index in range(len(sizes))]
    return [sizes[index] for index in like], [macs[index] for index in like]


def _attended_like(index: int, tower: nn.Module, record: Record) -> int:
    """The last attended block up to this one whose MSA has the same shape, as far as that is known.

    The MSAs of Sapiens 2 share keys and values in some blocks alone.
    """
    blocks, slot = record.family.block_list(tower), record.family.attention
    attended = [i for i in range(index + 1) if i not in record.config.phi][::-1]
    own = (record.removed or {}).get(index, {}).get(slot) or blocks[index].get_submodule(slot)
    shapes = [parameter.shape for parameter in own.parameters()]
    alike = [i for i in attended if [p.shape for p in blocks[i].get_submodule(slot).parameters()] == shapes]
    return (alike or attended)[0]


def describe(phi: PhiConfig, axes: int = 2) -> str:
    """A Φ over a grid of so many axes, in a few words."""
    eca = ", ECA" if phi.channel_attention else ""
    asking = "clusters" if phi.queries == "clusters" else "patches among clusters"
    clusters = f", MSA of {asking}, one for {by([phi.pool] * axes)} patches" if phi.pool else ""
    reads = ", reads LN(X)" if phi.reads_x else ""
    return f"expansion {phi.expansion:g}, {by(phi.kernel(axes))}{eca}, prefix {phi.prefix}{clusters}{reads}"


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
