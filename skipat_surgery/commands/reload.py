"""Does a checkpoint give the same outputs in a new process? ``python -m skipat_surgery.commands.reload DIR FILE``.

FILE holds ``images``, what gives the grid of each where they are patches, and the expected outputs, by number; the
largest difference of each is printed.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..batches import Images, Patches, values_of
from ..observing import image_part
from ..tower import Tower
from . import loading

IMAGES_IN, GRID = "images", "grid."  # names in FILE
IMAGES = 8  # of the batch, so that a large model is compared on a CPU too
# Of the largest value of an output. Both sides run in float32 on a CPU, from the weights as they are stored.
TOLERANCE = 1e-4


def outputs(model: nn.Module, images: Images) -> list[Tensor]:
    """Every floating-point tensor in a model's output, or in its vision tower's where it takes text too."""
    with torch.no_grad():
        found = Tower.of(model).run(images, image_part(model))
    return [tensor.contiguous() for tensor in tensors_in(found)]


def tensors_in(output: Any) -> list[Tensor]:
    """The floating-point tensors in mappings, lists and tuples, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    return [tensor for item in output for tensor in tensors_in(item)] if isinstance(output, (list, tuple)) else []


def difference_after_reload(directory: Path, model: nn.Module, images: Images) -> float:
    """The largest difference between a model's outputs and those of its checkpoint, loaded in a new process.

    Args:
        directory: The checkpoint.
        model: In float32, with the weights that are stored: see `LoadedModel.as_saved`.
        images: (B, C, H, W), of which the first few are compared, or patches.

    Raises:
        ValueError: The checkpoint does not load, or gives other outputs: one is more than `TOLERANCE` of its largest
            value apart.
    """
    file, name = directory / "reload.safetensors", type(model).__name__
    images = (images[:IMAGES] if isinstance(images, Tensor) else images).to("cpu", torch.float32)
    expected = outputs(copy.deepcopy(model).cpu(), images)
    numbered = {str(index): tensor.clone() for index, tensor in enumerate(expected)}
    grids = {} if isinstance(images, Tensor) else {GRID + name: value for name, value in images.others.items()}
    save_file({IMAGES_IN: values_of(images).contiguous(), **grids, **numbered}, file)
    try:
        command = [sys.executable, "-m", "skipat_surgery.commands.reload", str(directory), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        file.unlink()
    if done.returncode != 0:
        raise ValueError(f"{directory} could not be loaded in a new process:\n{done.stderr}")
    differences = [float(word) for word in done.stdout.split()[-len(expected) :]]
    for found, tensor in zip(differences, expected, strict=True):
        largest = float(tensor.abs().max())
        if not found <= TOLERANCE * largest:
            raise ValueError(
                f"{directory} gives other outputs when it is loaded again, {found:.2g} apart where the largest is "
                f"{largest:.2g}: do not use it, and report this with the model's class, {name}"
            )
    return max(differences)


if __name__ == "__main__":
    data = load_file(sys.argv[2])
    grids = {name.removeprefix(GRID): data.pop(name) for name in list(data) if name.startswith(GRID)}
    pixels = data.pop(IMAGES_IN)
    found = outputs(loading.load(sys.argv[1]).model, Patches(pixels, grids) if grids else pixels)
    expected = [data[str(index)] for index in range(len(data))]
    print(*(float((mine - theirs).abs().max()) for mine, theirs in zip(found, expected, strict=True)))
