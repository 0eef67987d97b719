"""Reading the arguments of a command."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..analysis.planning import Plan
from ..core.config import PhiConfig, SkipatConfig
from .parser import Parser
from .run_state import read_json

# Four digits at most, as a range of more would only fill the memory before it is refused.
BLOCKS = re.compile(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?")
Number = TypeVar("Number", int, float)


def parse(
    kinds: tuple[Any, ...],
    argv: list[str],
    text: str,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    name: str | None = None,
) -> tuple[Any, ...]:
    """Read a command line into dataclasses.

    Args:
        kinds: The dataclasses.
        argv: The arguments. Where the first is a YAML file, what it holds goes before the others, as if it were given
            on the command line.
        text: For ``--help``: the description, and below a blank line examples.
        presets: What each value of ``--preset`` sets; the file and the command line go before it.
        name: Of the command, for ``--help``; that of the script when left out.

    Raises:
        ValueError: An argument is unknown or has no such value, the file is none, or there is no such preset.
        OSError: There is no such file.
    """
    parser = Parser(kinds, name, text)
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv = [*_arguments_in(Path(argv[0]), parser), *argv[1:]]
    if presets is not None:
        preset = parser.parse_known_args(argv)[0].preset
        if preset not in presets:
            raise ValueError(f"--preset must be one of {sorted(presets)}, got {preset!r}")
        parser.set_defaults(**presets[preset])
    *found, unknown = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"unknown arguments {unknown}; see --help")
    return tuple(found)


def _arguments_in(file: Path, parser: Parser) -> list[str]:
    """What a YAML file holds, as a command line.

    Values stay the text that was written, and mean what they mean on the command line: YAML itself would read ``no`` as
    False, ``6`` as a number and ``1e-3`` as none. What has no value, or null, is left out.
    """
    try:
        held = yaml.load(file.read_bytes(), yaml.BaseLoader) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    if not isinstance(held, dict):
        raise ValueError(f"{file} must hold lines of the form 'argument: value'")
    actions = {action.dest: action for action in parser._actions}
    if unknown := sorted(set(held) - set(actions)):
        raise ValueError(f"{file} holds unknown arguments {unknown}; see --help")
    argv: list[str] = []
    for name, value in held.items():
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(entry, str) for entry in values):
            raise ValueError(f"{file}: {name} must have one value or a list of values, got {value}")
        if values in ([], [""], ["~"], ["null"]):
            continue
        if not actions[name].option_strings:
            argv = [*values, *argv]
        else:
            argv += [f"--{name}", *values] if actions[name].nargs == "+" else [f"--{name}={','.join(values)}"]
    return argv


def parse_phi(args: Any, **given: Any) -> PhiConfig:
    """A Φ whose fields are the arguments of the same names, but for those that are given."""
    names = [field.name for field in fields(PhiConfig) if field.name not in given]
    return PhiConfig(**{name: getattr(args, name) for name in names}, **given)


def parse_cut(args: Any) -> SkipatConfig:
    """What to cut: what ``--plan`` holds, else ``--skip`` with one Φ.

    Raises:
        ValueError: Something of that is out of range, or the file holds no plan.
        OSError: There is no such file.
    """
    if args.plan is None:
        return SkipatConfig.parse(parse_skip(args.skip), parse_phi(args))
    return SkipatConfig.parse(read_plan(Path(args.plan)))


def read_plan(file: Path) -> Plan | SkipatConfig:
    """What ``--plan`` names: a plan, or the blocks and Φ's alone, as they were written before `Plan.save`.

    Raises:
        ValueError: The file holds no plan.
        OSError: There is no such file.
    """
    held = read_json(file)
    try:
        return SkipatConfig.from_dict(held) if "phi" in held else Plan.from_dict(held, str(file))
    except (TypeError, ValueError) as error:
        raise ValueError(f"--plan takes a plan.json of `skipat analyze` or Plan.save: {error}") from error


def parse_skip(text: str) -> list[int]:
    """``"2,4-6"`` as [2, 4, 5, 6].

    Raises:
        ValueError: The text is not of that form.
    """
    blocks: list[int] = []
    for part in text.split(","):
        found = BLOCKS.fullmatch(part)
        if found is None:
            raise ValueError(f"--skip must be of the form 3-8 or 2,4-6, got {text!r}")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise ValueError(f"--skip must name the lower block of a range first, as in {last}-{first}, got {text!r}")
        blocks += range(first, last + 1)
    return blocks


def parse_numbers(text: str, kind: Callable[[str], Number], name: str) -> list[Number]:
    """``"224,384"`` as [224, 384].

    Args:
        text: Numbers above 0, with commas between them.
        kind: int or float.
        name: Of the argument.

    Raises:
        ValueError: The text is not of that form.
    """
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(number > 0 for number in numbers):
        raise ValueError(f"--{name} takes numbers above 0 with commas between them, got {text!r}")
    return numbers
