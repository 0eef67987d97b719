"""Does a checkpoint give the same outputs in a new process? ``python -m skipat_surgery.commands.reload DIR FILE``.

FILE holds ``images`` and the ``expected`` outputs; the largest difference is printed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..observing import outputs_of
from ..tower import Tower
from . import loading

# Of the largest output. What another device or its kernels round otherwise is below it, and other weights are not.
TOLERANCE = 0.01


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """The logits, or for a model without a classifier the final tokens, in float32."""
    with torch.no_grad():
        seen = outputs_of(model, Tower.of(model), images)
    return seen.tokens if seen.logits is None else seen.logits


def difference_after_reload(directory: Path, model: nn.Module, images: Tensor) -> float:
    """The largest difference between a model's outputs and those of its checkpoint, loaded in a new process.

    Raises:
        ValueError: The checkpoint does not load, or gives other outputs: more than `TOLERANCE` of the largest apart.
    """
    file = directory / "reload.safetensors"
    expected = outputs(model, images).cpu().contiguous()
    save_file({"images": images.cpu().contiguous(), "expected": expected}, file)
    try:
        command = [sys.executable, "-m", "skipat_surgery.commands.reload", str(directory), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        file.unlink()
    if done.returncode != 0:
        raise ValueError(f"{directory} could not be loaded in a new process:\n{done.stderr}")
    difference, largest = float(done.stdout.split()[-1]), float(expected.abs().max())
    if not difference <= TOLERANCE * largest:
        raise ValueError(
            f"{directory} gives other outputs when it is loaded again, {difference:.2g} apart where the largest is "
            f"{largest:.2g}: do not use it, and report this with the model's class, {type(model).__name__}"
        )
    return difference


if __name__ == "__main__":
    data = load_file(sys.argv[2])
    loaded = loading.load(sys.argv[1]).model.to(torch.float32)
    print(float((outputs(loaded, data["images"]) - data["expected"]).abs().max()))
