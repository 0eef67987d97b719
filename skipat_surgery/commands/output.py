"""The output directory of a run: who may write into it, and what is written there, whole or not at all."""

from __future__ import annotations

import copy
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from filelock import FileLock, Timeout
from torch import nn

from ..core.hub import PushError, push
from ..tower import Tower
from . import run_state
from .checks import check_writable
from .loading import LoadedModel

RUN, LOCK, WIDTHS = "run.json", "run.lock", "mlp_widths.json"


class Output:
    """The directory that one run holds, from `hold` to the end of the context or of the process.

    It holds a run from its first step on: one that ended before has nothing to resume, and does not block it.

    Args:
        folder: The directory.
        settings: What decides the weights that come out.
        resume: Whether the run there is to go on.
        accelerator: Of the run; only its main process writes.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool, accelerator: Accelerator) -> None:
        self.folder, self.settings, self.resume, self.accelerator = folder, settings, resume, accelerator
        self.lock = FileLock(folder / LOCK, blocking=False)
        self.checkpoints = folder / "checkpoints"

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *error: object) -> None:
        self.lock.release()

    def check(self) -> None:
        """Check that the directory holds no run, or the one to resume, and that no other run is writing there.

        Raises:
            ValueError: It cannot be written, it holds one and this is no resumption, the run there has other settings,
                or it still lives.
        """
        check_writable(self.folder)
        if self.accelerator.is_main_process and not self.lock.is_locked and Path(self.lock.lock_file).exists():
            with self._acquire():
                pass
        if not (self.folder / RUN).exists():
            return
        if not self.resume:
            raise ValueError(
                f"{self.folder} already holds a run: go on with it by --resume, or choose another --output_dir"
            )
        before = run_state.read_json(self.folder / RUN)
        changed = [
            f"{name} was {before.get(name)!r}, now {now!r}"
            for name, now in self.settings.items()
            if before.get(name) != now
        ]
        if changed:
            raise ValueError(f"{self.folder} cannot be resumed with other settings: {'; '.join(changed)}")

    def hold(self) -> None:
        """Make the directory and keep all other runs out of it. The system lets go of it with the process.

        Raises:
            ValueError: Another run is there, or ended there since `check`.
        """
        if self.accelerator.is_main_process:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._acquire()
            self.check()
            for name in ("best", "last"):
                run_state.recover_folder(self.folder / name)

    def _acquire(self) -> Any:
        try:
            return self.lock.acquire()
        except Timeout:
            raise ValueError(
                f"another run is writing into {self.folder}: wait for its end, or choose another --output_dir"
            ) from None

    def begin(self) -> None:
        """Record, before the first thing of a running distillation is written, that a run is here."""
        if self.accelerator.is_main_process and not (self.folder / RUN).exists():
            run_state.write_json(self.folder / RUN, self.settings)

    def keep_mlp_widths(self, widths: Mapping[int, int]) -> None:
        """Keep how wide the MLPs are, for a resumption, which builds the model before it loads the weights."""
        self.begin()
        if self.accelerator.is_main_process:
            run_state.write_json(self.folder / WIDTHS, {str(index): width for index, width in widths.items()})

    def mlp_widths(self) -> dict[int, int]:
        """What `keep_mlp_widths` kept; empty where there is nothing."""
        file = self.folder / WIDTHS
        return {int(index): width for index, width in run_state.read_json(file).items()} if file.exists() else {}

    def save(self, host: LoadedModel, model: nn.Module, name: str) -> None:
        """Save a standard checkpoint of a model of the host's kind."""
        if self.accelerator.is_main_process:
            run_state.replace_folder(self.folder / name, lambda folder: host.save(plain_copy(model), folder))

    def push(self, name: str, repo: str, private: bool | None) -> str:
        """Push a checkpoint that `save` wrote; returns the address.

        Raises:
            PushError: It failed; with how to push later.
        """
        saved = self.folder / name
        try:
            return push(lambda folder: shutil.copytree(saved, folder, dirs_exist_ok=True), repo, private=private)
        except PushError as error:
            later = shlex.join(["hf", "upload", repo, str(saved)])
            raise PushError(f"the work is done and kept, but {error}. Push it later by: {later}") from error


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy without what accelerate added to ``forward``."""
    copied = copy.deepcopy(model)
    for module in (copied, Tower.of(copied).module):
        module.__dict__.pop("forward", None)
        module.__dict__.pop("_original_forward", None)
    return copied.eval()
