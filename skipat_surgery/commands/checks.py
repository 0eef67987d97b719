"""What a command needs of the machine, checked before its work begins."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, LoggerType

# The packages whose names are not those of the trackers.
TRACKER_PACKAGES = {"tensorboard": "'skipat-surgery[trackers]'", "comet_ml": "comet-ml"}


# Ways to share one model out among processes: accelerate's others each keep a whole copy.
PARTS = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def check_whole_copies(accelerator: Accelerator) -> None:
    """Check that each process keeps a whole model, which is what a distillation solves, measures and saves.

    Raises:
        ValueError: It was launched so that each keeps a part.
    """
    if accelerator.distributed_type in PARTS:
        raise ValueError(
            f"the recipe keeps a whole student and teacher on each process, and was launched with "
            f"{accelerator.distributed_type.value}, which shares a model out: launch it with DDP, such as accelerate "
            "launch --config_file recipes/configs/ddp.yaml; where a model fits no GPU, see docs/guides/several-gpus.md"
        )


def check_writable(directory: Path) -> None:
    """Check that a directory is there, or can be made, and that files can be written into it. Nothing is left there.

    Raises:
        ValueError: It cannot.
    """
    nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"--output_dir {directory} cannot be made: {nearest} is a file; choose another")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"--output_dir {directory} cannot be written: {error.strerror}; choose another") from error


def check_trackers(names: Iterable[str]) -> None:
    """Check that accelerate knows the trackers of ``--report_to`` and that their packages are here.

    Raises:
        ValueError: There is no such tracker.
        ImportError: Its package is not installed; with what to install.
    """
    known, here = LoggerType.list(), {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in known:
            raise ValueError(f"--report_to takes {sorted(known)}, got {name!r}")
        if name != "all" and name not in here:
            package = TRACKER_PACKAGES.get(name, name)
            raise ImportError(f"--report_to {name} needs a package that is not installed: pip install {package}")


def check_at_least(least: int, args: Any, *names: str) -> None:
    """Check numbers of an object with arguments; None is left alone.

    Raises:
        ValueError: One is below `least`.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
