"""Checkpoints of a running distillation: written whole or not at all, and found again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

PREFIX = "step-"
UNFINISHED = ".unfinished"


def save(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Write a checkpoint under a temporary name, then give it its own: one that has its name is whole.

    Only the newest two are kept.
    """
    final = folder / f"{PREFIX}{step:08d}"
    partial = final.with_name(final.name + UNFINISHED)
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for file in partial.rglob("*"):
            if file.is_file():
                _flush(file)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _flush(folder)
        for old in finished(folder)[:-2]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def replace_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Write a folder under a temporary name, then put it in the place of an older one."""
    partial = final.with_name(final.name + UNFINISHED)
    shutil.rmtree(partial, ignore_errors=True)
    write(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)


def finished(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    names = folder.glob(f"{PREFIX}*")
    return sorted(path for path in names if path.is_dir() and not path.name.endswith(UNFINISHED))


def _flush(path: Path) -> None:
    """Have the disk hold a file or folder before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ValueError: It is no JSON, or holds something else.
        OSError: It cannot be read.
    """
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, and holds {type(found).__name__}")
    return found


def write_json(path: Path, data: Any) -> None:
    """Write JSON whole or not at all."""
    partial = path.with_name(path.name + UNFINISHED)
    partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
