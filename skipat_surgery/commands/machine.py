"""What a command does to the process it runs in, and the name of the machine."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import datasets
import torch
import transformers
from accelerate import Accelerator

from ..precision import multiplies_bf16


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


def usual_dtype(device: torch.device) -> str:
    """The dtype in which a device is fast: bf16, or fp32 where it has none."""
    return "bf16" if multiplies_bf16(device) else "fp32"


def slowness(device: torch.device, mixed_precision: str | None) -> list[str]:
    """What to say where a precision makes all slower instead of faster."""
    if mixed_precision != "bf16" or multiplies_bf16(device):
        return []
    return ["WARNING: this CPU has no bfloat16 (AVX512), in which it is a hundred times slower: --mixed_precision no"]


def machine(device: torch.device) -> str:
    """What this ran on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} cores of {_processor()} ({capability})"


def _processor() -> str:
    """The processor's name, which Python itself does not know on Linux."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
