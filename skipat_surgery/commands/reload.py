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


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """The logits, or for a model without a classifier the final tokens, in float32."""
    with torch.no_grad():
        seen = outputs_of(model, Tower.of(model), images)
    return seen.tokens if seen.logits is None else seen.logits


def difference_after_reload(directory: Path, model: nn.Module, images: Tensor) -> float:
    """The largest difference between a model's outputs and those of its checkpoint, loaded in a new process."""
    file = directory / "reload.safetensors"
    save_file({"images": images.cpu().contiguous(), "expected": outputs(model, images).cpu().contiguous()}, file)
    try:
        command = [sys.executable, "-m", "skipat_surgery.commands.reload", str(directory), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        file.unlink()
    if done.returncode != 0:
        raise RuntimeError(f"{directory} could not be loaded in a new process:\n{done.stderr}")
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    data = load_file(sys.argv[2])
    loaded = loading.load(sys.argv[1]).model.to(torch.float32)
    print(float((outputs(loaded, data["images"]) - data["expected"]).abs().max()))
