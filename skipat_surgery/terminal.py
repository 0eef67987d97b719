"""Tables on every terminal: characters that its encoding lacks are spelled out."""

from __future__ import annotations

import codecs
from typing import Any

from rich.console import Console
from rich.text import Text

SPELLED_OUT = "skipat_surgery.spelled_out"  # an error handler, as `str.encode` and streams take it
SPELLINGS = {"Φ": "Phi", "⇒": "=>", "×": "x", "–": "-", "·": "*", "≥": ">=", "…": "~"}


def spell_out(text: str, encoding: str) -> str:
    """A text in the characters of an encoding.

    Examples:
        >>> spell_out("MSA ⇒ Φ, 4×4", "ascii")
        'MSA => Phi, 4x4'
    """
    return text.encode(encoding, SPELLED_OUT).decode(encoding)


class Terminal(Console):
    """rich's console, which would stop at a character that its file cannot encode.

    Strings are spelled out before they are laid out, so that columns stay in line.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """As in rich."""
        return super().render_str(spell_out(text, self.encoding), **options)


def for_wide_tables() -> Terminal:
    """The terminal as wide as it is; a file or a pipe, which is not, gets room for the widest table."""
    terminal = Terminal()
    return terminal if terminal.is_terminal else Terminal(width=160)


def _spelling(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(SPELLINGS.get(character, "?") for character in error.object[error.start : error.end]), error.end


codecs.register_error(SPELLED_OUT, _spelling)
