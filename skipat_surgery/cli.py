"""What the recipes have in common: reading their arguments, finding model and images, naming the machine."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml
from accelerate import Accelerator
from torch.utils.data import DataLoader, Subset
from transformers import HfArgumentParser

from . import digits, hosts, images
from .hosts import Host


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


def load_model(name: str, accelerator: Accelerator, output: Path) -> Host:
    """The model to convert; the demonstration's teacher is trained by the main process, and kept for the others.

    Args:
        name: As `hosts.load` takes it, or ``digits``.
        accelerator: Of the run.
        output: Where the demonstration's teacher is kept.
    """
    if name != digits.NAME:
        return hosts.load(name)
    saved = output / "teacher"
    if accelerator.is_main_process and not saved.exists():
        host = digits.train_teacher()
        host.save(host.model, output / "teacher.unfinished")
        (output / "teacher.unfinished").rename(saved)
    accelerator.wait_for_everyone()
    return hosts.load(str(saved))


def load_data(
    name: str,
    num_classes: int | None,
    config_name: str | None = None,
    train_split: str | None = None,
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> images.ImageData:
    """The images, with labels that fit the model's classes; the arguments are those of `images.load_image_data`.

    Raises:
        DataError: The data set cannot be used, or its classes are not the model's.
    """
    source = digits.load_digits() if name == digits.NAME else name
    data = images.load_image_data(source, config_name, train_split, eval_split, image_column, label_column)
    if num_classes and data.num_classes and data.num_classes != num_classes:
        raise images.DataError(
            f"the model has {num_classes} classes and {name} has {data.num_classes}, so top-1 would mean nothing; "
            "nothing was done. Pass --label_column none to distil without labels: agreement and KL are then reported"
        )
    return data


def unlabelled(host: Host, data: images.ImageData, count: int, batch_size: int, seed: int) -> DataLoader:
    """So many training images, without labels and augmentation, in batches; all of them where there are fewer."""
    items = images.ImageItems(data.train, data.image_column, None, host.image_mode)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))[:count]
    collate = images.ValidOnly(images.Collate(host.preprocess, host.image_mode, host.image_size))
    return DataLoader(Subset(items, order.tolist()), batch_size, collate_fn=collate)


def quiet_libraries() -> None:
    """Leave the terminal to the recipe's own messages and progress bars."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def use_all_cores(accelerator: Accelerator) -> None:
    """Share the CPU cores out among the processes: accelerate's launcher leaves each process a single thread."""
    if accelerator.device.type == "cpu" and torch.get_num_threads() == 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // accelerator.num_processes))


def keep_freed_memory() -> bool:
    """Let glibc keep the memory that this process frees, as PyTorch does on a GPU; False where there is no glibc.

    By default it hands each large tensor back to the kernel, and the next one takes a page fault for every 4 KiB, a
    tenth to a third of a forward on a CPU. How many depends on what was freed in which order, so that timings of one
    run differ by more than what they are to show. As good, from outside: ``MALLOC_TRIM_THRESHOLD_=2147483647
    MALLOC_MMAP_THRESHOLD_=2147483647``, jemalloc or tcmalloc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_threshold, most = -1, -3, 2**31 - 1  # of <malloc.h>
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(option, most) == 1 for option in (trim_threshold, mmap_threshold))


def machine(device: torch.device) -> str:
    """What this ran on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} cores of {_processor()} ({capability})"


def _processor() -> str:
    """The processor's name, which Python itself does not know on Linux."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
