"""The parser of all commands: dataclasses as arguments, a group of ``--help`` for each, and errors that are raised."""

from __future__ import annotations

import argparse
from dataclasses import fields
from inspect import get_annotations
from typing import Any, NoReturn, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

POSITIONAL = "positional"  # in the metadata of a field: given without its name


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One spelling of each option, and its default where that says more than that the option is left out."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return str(action.metavar)
        if isinstance(action, argparse._HelpAction):
            return ", ".join(action.option_strings)
        return f"{action.option_strings[0]} {self._format_args(action, _metavar(action))}"

    def _get_help_string(self, action: argparse.Action) -> str:
        default, told = action.default, action.help or ""
        if action.required or default is None or default is False or default in ([], argparse.SUPPRESS):
            return told
        return f"{told} (default: {str(default).lower() if default is True else default})"


def _metavar(action: argparse.Action) -> str:
    """What stands for the value of an option: of `output_dir` DIR."""
    kinds: dict[Any, str] = {int: "N", float: "X", string_to_bool: "true|false"}
    return kinds.get(action.type, "NAME" if action.nargs == "+" else action.dest.rpartition("_")[2].upper())


class Parser(HfArgumentParser):
    """A parser that raises ValueError, where argparse prints sixty lines of usage and exits.

    Args:
        kinds: Dataclasses. Each that has fields, among them and their bases, is a group, titled by its docstring.
        name: Of the command.
        text: Its description, and below a blank line examples.
    """

    def __init__(self, kinds: tuple[Any, ...], name: str | None, text: str) -> None:
        description, _, examples = text.partition("\n\n")
        shown = {"description": description, "epilog": examples.replace("``", ""), "formatter_class": HelpFormatter}
        super().__init__(kinds, prog=name, **shown)
        places = " ".join(action.dest.upper() for action in self._actions if not action.option_strings)
        needed = " ".join(
            f"{a.option_strings[0]} {_metavar(a)}" for a in self._actions if a.required and a.option_strings
        )
        self.usage = " ".join(f"%(prog)s [FILE.yaml] {places} {needed} [--option value …]".split())

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        """Called by `HfArgumentParser`, which would put all fields of a dataclass and its bases into one list."""
        types, groups = get_type_hints(dtype), {}
        for field in fields(dtype):
            owner = next(cls for cls in dtype.__mro__ if field.name in get_annotations(cls))
            if owner not in groups:
                groups[owner] = self.add_argument_group((owner.__doc__ or "").partition(".")[0])
            if POSITIONAL in field.metadata:
                groups[owner].add_argument(field.name, metavar=field.name.upper(), help=field.metadata["help"])
                continue
            field.type = types[field.name]
            self._parse_dataclass_field(groups[owner], field)  # type: ignore[arg-type]
        for action in self._actions:
            if isinstance(action, argparse._StoreFalseAction):  # --no_x beside --x, which takes false
                action.help = argparse.SUPPRESS

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise ValueError(f"{message}; see --help")
