"""The recipe on 1, 2 and 4 processes, with the same images in each step: the same model, and what each process holds.

    python benchmarks/several_processes.py

On CPUs, by torchrun. With one seed and the joint batch alike, the distilled weights may differ by rounding alone.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file
from subjects import SHARED, rows_of
from torch import Tensor

from skipat_surgery.commands.machine import machine
from skipat_surgery.commands.options import parse
from skipat_surgery.convert.settings import option
from skipat_surgery.core.tables import markdown_table

ROOT = Path(__file__).parents[1]
TEACHER = SHARED / "models" / "cifar10-vit-tiny"


@dataclass(frozen=True)
class Arguments:
    """What to run."""

    images: int = option(1024, "Images of CIFAR-10 to distil on; a quarter as many are measured on.")
    processes: str = option("1, 2, 4", "Numbers of processes.")
    batch_size: int = option(32, "Images a step, of all processes together.")
    steps: int = option(10, "Steps to distil.")
    skip: str = option("3-8", "Blocks to skip.")
    output_dir: str = option("outputs/processes", "Where everything is written; what is there is deleted.")


def run(args: Arguments, count: int) -> tuple[dict[str, Tensor], float]:
    """The distilled weights, and the most memory in MiB that one of the processes held."""
    folder = Path(args.output_dir) / str(count)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command += [str(ROOT / "recipes/distill.py"), "--model", str(TEACHER), "--dataset", str(images_in(args))]
    command += ["--solve_images", "512", "--refit_images", "0", "--align_steps", "0", "--eval_steps", str(args.steps)]
    command += ["--skip", args.skip, "--max_steps", str(args.steps), "--warmup_steps", "2", "--rate_scale", "0.3"]
    command += ["--batch_size", str(args.batch_size // count), "--output_dir", str(folder)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment) as process:
        watch = Watch(process.pid)
        if process.wait():
            raise SystemExit(f"{shlex.join(command)} failed")
        watch.stop()
    return load_file(folder / "last" / "model.safetensors"), watch.peak / 2**20


def images_in(args: Arguments) -> Path:
    """A folder with the first images of CIFAR-10."""
    folder = Path(args.output_dir) / "images"
    if not folder.exists():
        folder.mkdir(parents=True)
        for split, count in (("train", args.images), ("test", args.images // 4)):
            rows_of(SHARED / "data" / "cifar10" / f"{split}.parquet").select(range(count)).to_parquet(
                folder / f"{split}.parquet"
            )
    return folder


class Watch:
    """The most memory that any process below one holds, in bytes (resident), seen ten times a second."""

    def __init__(self, pid: int) -> None:
        self.parent, self.peak, self.ended = psutil.Process(pid), 0, False
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Look no more."""
        self.ended = True
        self.thread.join()

    def _look(self) -> None:
        while not self.ended:
            try:
                held = [child.memory_info().rss for child in self.parent.children(recursive=True)]
            except psutil.Error:
                held = []
            self.peak = max(self.peak, *held, 0)
            time.sleep(0.1)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    (args,) = parse((Arguments,), sys.argv[1:] if argv is None else argv, "The recipe on several processes.")
    shutil.rmtree(args.output_dir, ignore_errors=True)
    counts = [int(count) for count in args.processes.split(", ")]
    found = {count: run(args, count) for count in counts}
    first = found[counts[0]][0]
    rows = []
    for count, (weights, held) in found.items():
        apart = max(float((weights[name] - first[name]).abs().max()) for name in first)
        figures = json.loads((Path(args.output_dir) / str(count) / "results.json").read_text())["rows"]["distilled"]
        shown = [f"{figures[name]:.4f}" for name in ("agreement", "patch_cosine") if name in figures]
        rows.append([str(count), f"{apart:.1e}", *shown, f"{held:,.0f} MiB"])
    header = [
        "processes",
        f"weights apart from those of {counts[0]}",
        "agreement",
        "patch cosine",
        "held by one, at most",
    ]
    print(markdown_table(header, rows))
    where = f"`python {shlex.join(sys.argv)}`, {machine(torch.device('cpu'))}, torch {torch.__version__}"
    print(f"\n{where}")


if __name__ == "__main__":
    main()
