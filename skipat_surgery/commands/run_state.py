"""Checkpoints of a running distillation: written whole or not at all, and found again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

PREFIX = "step-"
CHECKSUMS = "checksums.json"
UNFINISHED, REPLACED = ".unfinished", ".replaced"


def save(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Write a checkpoint under a temporary name, then give it its own: one that has its name is whole.

    Only the newest two are kept.

    Raises:
        OSError: It cannot be written.
    """
    final = folder / f"{PREFIX}{step:08d}"
    partial = final.with_name(final.name + UNFINISHED)
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
    except RuntimeError as error:  # torch.save tells so of a full disk
        raise OSError(f"{partial} could not be written: {error}") from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(partial / CHECKSUMS, {str(file.relative_to(partial)): _checksum(file) for file in _files(partial)})
        for file in _files(partial):
            _flush(file)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _flush(folder)
        for old in finished(folder)[:-2]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def replace_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Write a folder under a temporary name, then put it in the place of an older one."""
    partial, older = (final.with_name(final.name + ending) for ending in (UNFINISHED, REPLACED))
    shutil.rmtree(partial, ignore_errors=True)
    write(partial)
    recover_folder(final)
    if final.exists():
        final.rename(older)
    partial.rename(final)
    shutil.rmtree(older, ignore_errors=True)


def recover_folder(final: Path) -> None:
    """Put a folder back that `replace_folder` was stopped before it could replace, and clear what it had replaced."""
    older = final.with_name(final.name + REPLACED)
    if older.exists() and not final.exists():
        older.rename(final)
    shutil.rmtree(older, ignore_errors=True)


def finished(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    names = folder.glob(f"{PREFIX}*")
    return sorted(path for path in names if path.is_dir() and not path.name.endswith(UNFINISHED))


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in a folder that is as it was written, and warnings of newer ones that are not.

    Raises:
        ValueError: There are some, and all are damaged.
    """
    damages: list[str] = []
    for checkpoint in reversed(finished(folder)):
        damage = _damage(checkpoint)
        if damage is None:
            return checkpoint, [f"WARNING: {damage}; an older checkpoint is gone on from" for damage in damages]
        damages.append(f"{checkpoint} is damaged: {damage}")
    if damages:
        raise ValueError(f"{'; '.join(damages)}. Delete {folder.parent}, and begin again")
    return None, []


def _damage(checkpoint: Path) -> str | None:
    """The first file of a checkpoint that is not as it was written, in words."""
    if not (checkpoint / CHECKSUMS).exists():  # of a version that wrote none
        return None
    try:
        expected = read_json(checkpoint / CHECKSUMS)
    except ValueError as error:
        return str(error)
    for name, checksum in expected.items():
        if not (checkpoint / name).is_file():
            return f"it has no {name}"
        if _checksum(checkpoint / name) != checksum:
            return f"{name} is not as it was written"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _checksum(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(2**20):
            found.update(part)
    return found.hexdigest()


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
    """Write JSON whole or not at all.

    Raises:
        ValueError: A number is not finite, which JSON cannot hold.
    """
    text = json.dumps(data, indent=2, allow_nan=False)
    partial = path.with_name(path.name + UNFINISHED)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)
