"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> str:
    """A table in Markdown.

    Args:
        header: The titles of the columns.
        rows: The cells, as many in each row.
        align: ``l``, ``r`` or ``c`` for each column; the first to the left and the others to the right when left out.

    Examples:
        >>> print(markdown_table(["", "top-1"], [["teacher", "82.0"]]))
        |  | top-1 |
        |--|--:|
        | teacher | 82.0 |
    """
    marks = {"l": "--", "r": "--:", "c": ":-:"}
    rule = "|".join(marks[side] for side in align or "l" + "r" * (len(header) - 1))
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])
