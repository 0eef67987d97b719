"""How every command runs: everything is checked before the work, and what goes wrong is said in one line."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from datasets.exceptions import DatasetsError
from safetensors import SafetensorError

from ..core.hub import PushError
from ..terminal import SPELLED_OUT
from .machine import quiet_libraries

REFUSED, FAILED, INTERRUPTED = 2, 1, 130  # exit codes
# What user input raises while it is checked. What else is raised is a fault of ours, and keeps its traceback.
REFUSALS = (ValueError, TypeError, OSError, RuntimeError, ImportError, DatasetsError, SafetensorError)
# What may still happen to work that began well: a full disk, unreadable images, a loss that diverges.
FAILURES = (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError, DatasetsError, SafetensorError, PushError)


class Command(Protocol):
    """A command whose arguments were checked."""

    def run(self) -> None:
        """Do the work, and write what came of it."""


def run_command(
    name: str, prepare: Callable[[list[str]], Command], argv: list[str] | None = None, resumable: bool = False
) -> None:
    """Run a command, or say in one line on stderr why not and exit.

    Args:
        name: Of the command.
        prepare: Makes it from its arguments, and checks everything that can be checked before the work; it writes
            nothing where it refuses.
        argv: The arguments; those of the process when left out.
        resumable: Whether a run that was broken off goes on by ``--resume``.

    Raises:
        SystemExit: 2 where the command was refused, 1 where the work failed, 130 where it was interrupted.
    """
    quiet_libraries()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=SPELLED_OUT)
    stopped = _stopped(prepare, sys.argv[1:] if argv is None else argv, resumable)
    if stopped is not None:  # and nothing of the work is left, so that its progress bars are closed above the line
        print(" ".join(f"{name}: {stopped.reason}".split()), file=sys.stderr)
        sys.exit(stopped.code)


@dataclass(frozen=True)
class Stopped:
    """Why a command did not come to its end, and its exit code."""

    code: int
    reason: str


def _stopped(prepare: Callable[[list[str]], Command], argv: list[str], resumable: bool) -> Stopped | None:
    """Run a command; None where it came to its end."""
    resume = "; the same command with --resume goes on with it" if resumable else ""
    try:
        command = prepare(argv)
    except KeyboardInterrupt:
        return Stopped(INTERRUPTED, "interrupted before the work began, nothing was written")
    except REFUSALS as error:
        return Stopped(REFUSED, f"error: {_said(error)}")
    try:
        command.run()
    except KeyboardInterrupt:
        return Stopped(INTERRUPTED, f"interrupted{resume}")
    except FAILURES as error:
        later = resume if isinstance(error, (OSError, SafetensorError)) else ""
        return Stopped(FAILED, f"error: {_said(error)}{later}")
    return None


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__
