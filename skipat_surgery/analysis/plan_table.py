"""A plan as a table of eighty columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from string import ascii_lowercase

from rich import box
from rich.table import Table

from ..core.config import PhiConfig, SkipatConfig
from ..core.tokens import by
from .scoring import Point

BLOCKS_WIDTH = 21  # what eighty columns leave for the blocks


def frontier_table(rows: Sequence[tuple[str, Point, float | None]], title: str) -> Table:
    """A row for each (name, point, measured speed-up). Each Φ is a letter, which the lines below say.

    Args:
        rows: The points.
        title: Of the table.
    """
    offers = list(dict.fromkeys(phi for _, point, _ in rows for phi in point.choice.phi.values()))
    letters = {phi: _letter(index) for index, phi in enumerate(offers)}
    key = [f"{letter}: {words_of(phi)}" for phi, letter in letters.items()]
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, min_width=max(map(len, [title, *key])))
    shown.caption, shown.caption_justify = "\n".join(key), "left"
    shown.add_column("", no_wrap=True)
    shown.add_column("blocks by Φ", overflow="fold", max_width=BLOCKS_WIDTH)
    for name in ("divergence", "agree %", "predicted", "measured"):
        shown.add_column(name, justify="right", no_wrap=True)
    for name, point, measured in rows:
        shown.add_row(
            name,
            blocks_by_phi(point.choice.phi, letters),
            f"{point.divergence:.4f}",
            "–" if point.agreement is None else f"{100 * point.agreement:.1f}",
            f"{point.choice.speedup:.2f}×",
            "" if measured is None else f"{measured:.2f}×",
        )
    return shown


def blocks_by_phi(phi: Mapping[int, PhiConfig], letters: Mapping[PhiConfig, str]) -> str:
    """``"a:3-5,8 b:10"``: which blocks have which Φ."""
    blocks = _blocks_of(phi)
    return " ".join(f"{letter}:{block_ranges(blocks[offer])}" for offer, letter in letters.items() if offer in blocks)


def spelt_out(phi: Mapping[int, PhiConfig]) -> str:
    """``"3-5,8: clusters of side 2, expansion 0.25; 10: Z alone, expansion 0.25"``: which blocks have which Φ."""
    return "; ".join(f"{block_ranges(blocks)}: {words_of(offer)}" for offer, blocks in _blocks_of(phi).items())


def _blocks_of(phi: Mapping[int, PhiConfig]) -> dict[PhiConfig, list[int]]:
    """The blocks that have each Φ."""
    return {offer: [block for block in phi if phi[block] == offer] for offer in phi.values()}


def words_of(phi: PhiConfig) -> str:
    """What a Φ works on, in a line: its width, and besides what is not the default."""
    default = PhiConfig()
    words = [f"clusters of side {phi.pool}" if phi.pool else "Z and LN(X)" if phi.reads_x else "Z alone"]
    words += ["patches ask"] if phi.queries == "patches" else []
    words += ["without LN(X)"] if phi.pool and not phi.reads_x else []
    words += [f"expansion {phi.expansion:g}"]
    words += (
        [f"kernel {phi.kernel_size if isinstance(phi.kernel_size, int) else by(phi.kernel_size)}"]
        if phi.kernel_size != default.kernel_size
        else []
    )
    words += ["ECA"] if phi.channel_attention else []
    words += [f"prefix {phi.prefix}"] if phi.prefix != default.prefix else []
    return ", ".join(words)


def block_ranges(blocks: Iterable[int]) -> str:
    """``"3-5,8"`` of 3, 4, 5, 8, as ``--skip`` takes it."""
    runs = SkipatConfig.parse(blocks).runs
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _letter(index: int) -> str:
    """a to z, then a1, b1, …"""
    turn, place = divmod(index, len(ascii_lowercase))
    return ascii_lowercase[place] + (str(turn) if turn else "")
