"""What the results of the library have in common: a table to read, and plain data to keep."""

from __future__ import annotations

import io
import math
import sys
from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from .terminal import Terminal, spell_out

WIDTH = 130


def titled_table(title: str, *columns: str) -> Table:
    """An empty table, wide enough for its title."""
    return Table(*columns, title=title, title_justify="left", min_width=len(title))


class Page(io.StringIO):
    """Text that is to be printed: with the encoding of stdout."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Where stdout is closed, UTF-8."""
        return getattr(sys.stdout, "encoding", None) or "utf-8"


class Result(ABC):
    """Base of the frozen dataclasses that hold results: `str` gives the table, and a notebook shows it as one."""

    @abstractmethod
    def table(self) -> Table:
        """The result as a rich table."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {name: _plain(value) for name, value in asdict(self).items()}  # type: ignore[call-overload]

    def __str__(self) -> str:
        page = Page()
        Terminal(file=page, width=WIDTH).print(self.table())
        return spell_out(page.getvalue().rstrip(), page.encoding)

    def _repr_html_(self) -> str:
        console = Console(file=io.StringIO(), record=True, width=WIDTH)
        console.print(self.table())
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def _plain(value: Any) -> Any:
    """A value as JSON holds it; what is not finite is null."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
