"""The two files of `skipat_surgery.save`: what was cut, and the weights; written, found and read."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .core.config import SkipatConfig

CONFIG, WEIGHTS = "skipat.json", "skipat.safetensors"
VERSION = 1


@dataclass(frozen=True)
class CutTower:
    """A tower that was cut.

    Args:
        path: Where it is in the model.
        applied_to: Path of what `apply` was given, which is or holds the tower.
        family: The name of its family.
        skipat: What was cut.
    """

    path: str
    applied_to: str
    family: str
    skipat: SkipatConfig

    def __post_init__(self) -> None:
        if not isinstance(self.family, str) or self.applied_to not in lineage(self.path):
            raise ValueError(f"no tower is {self}")


@dataclass(frozen=True)
class Saved:
    """What ``skipat.json`` holds.

    Args:
        model: Name of the model's class, for messages.
        towers: What was cut; one at least.
        unwritten: The digests of the weights that are not in the other file, by name.
    """

    model: str
    towers: tuple[CutTower, ...]
    unwritten: Mapping[str, str]

    def to_json(self) -> str:
        """Its text, with the version of the format."""
        towers = [{**vars(tower), "skipat": tower.skipat.to_dict()} for tower in self.towers]
        held = {"version": VERSION, "model": self.model, "towers": towers, "unwritten": dict(self.unwritten)}
        return json.dumps(held, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Saved:
        """Read what `to_json` wrote.

        Raises:
            ValueError: It is of a newer version, or nothing that `to_json` writes; KeyError, TypeError alike.
        """
        held = json.loads(text)
        if held["version"] > VERSION:
            raise ValueError(
                f"it is of version {held['version']}, this library reads up to {VERSION}: upgrade skipat-surgery"
            )
        towers = [{**tower, "skipat": SkipatConfig.from_dict(tower["skipat"])} for tower in held["towers"]]
        if not towers:
            raise ValueError("it names no tower")
        return cls(held["model"], tuple(CutTower(**tower) for tower in towers), dict(held["unwritten"]))


def lineage(path: str) -> list[str]:
    """The paths of a submodule and of all that hold it, from the root's, which is empty."""
    return list(dict.fromkeys(["", *accumulate(path.split("."), "{}.{}".format)]))


def write(folder: Path, saved: Saved, weights: dict[str, Tensor]) -> None:
    """Write both files. A folder that holds two such files never holds one of them half written."""
    text = saved.to_json()
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as new:
        # Names that share memory are written once, and the file says which.
        save_torch_state_dict(weights, new, filename_pattern="skipat{suffix}.safetensors", max_shard_size=sys.maxsize)
        Path(new, CONFIG).write_text(text, encoding="utf-8")
        for name in (WEIGHTS, CONFIG):
            os.replace(Path(new, name), folder / name)


def read(folder: Path) -> tuple[Saved, dict[str, Tensor]]:
    """Read both files.

    Raises:
        FileNotFoundError: One is missing.
        ValueError: One is damaged, or of a newer version.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            standard = (folder / "config.json").is_file()
            hint = "a standard checkpoint, it seems: load it with from_pretrained" if standard else "write it by save"
            raise FileNotFoundError(f"{folder} holds no {name}, which skipat_surgery.save writes ({hint})")
    try:
        saved = Saved.from_json((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG} cannot be read: {type(error).__name__}: {error}") from error
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}
            shared = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged: {error}") from error
    return saved, weights | {name: weights[written] for name, written in shared.items() if written in weights}


def locate(directory: str | Path, revision: str | None, token: bool | str | None) -> Path:
    """The folder of this name, or the local copy of the repository of this id.

    Raises:
        FileNotFoundError: There is neither.
    """
    if Path(directory).is_dir():
        return Path(directory)
    options = {"revision": revision, "token": token, "allow_patterns": [CONFIG, WEIGHTS]}
    try:
        return Path(snapshot_download(str(directory), **options))  # type: ignore[arg-type]
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{directory} is no folder, and no repository of the Hub that could be read: {error}"
        ) from error
