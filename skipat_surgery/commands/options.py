"""Reading the arguments of a command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from ..core.config import PhiConfig, SkipatConfig


def parse(
    kinds: tuple[Any, ...], argv: list[str], description: str, presets: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[Any, ...]:
    """Read a command line into dataclasses.

    Args:
        kinds: The dataclasses.
        argv: The arguments. Where the first is a YAML file, it holds defaults for the others.
        description: For ``--help``.
        presets: What each value of ``--preset`` sets; the file and the command line go before it.

    Raises:
        ValueError: The file names an unknown argument, or there is no such preset.
    """
    parser = HfArgumentParser(kinds, description=description)
    known = {action.dest for action in parser._actions}
    defaults: dict[str, Any] = {}
    if argv and argv[0].endswith((".yaml", ".yml")):
        defaults = yaml.safe_load(Path(argv[0]).read_text()) or {}
        if unknown := sorted(set(defaults) - known):
            raise ValueError(f"{argv[0]} holds unknown arguments {unknown}; see --help")
        argv = argv[1:]
    parser.set_defaults(**defaults)
    if presets is not None:
        preset = parser.parse_known_args(argv)[0].preset
        if preset not in presets:
            raise ValueError(f"--preset must be one of {sorted(presets)}, got {preset!r}")
        parser.set_defaults(**{**presets[preset], **defaults})
    return parser.parse_args_into_dataclasses(args=argv)


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
    try:
        return SkipatConfig.from_dict(json.loads(Path(args.plan).read_text()))
    except (KeyError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"--plan takes the plan.json that recipes/analyze.py writes, {args.plan} is none") from error


def parse_skip(text: str) -> list[int]:
    """``"2,4-6"`` as [2, 4, 5, 6].

    Raises:
        ValueError: The text is not of that form.
    """
    blocks: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            blocks += range(int(first), int(last or first) + 1)
    except ValueError:
        raise ValueError(f"--skip must be of the form 3-8 or 2,4-6, got {text!r}") from None
    return blocks
