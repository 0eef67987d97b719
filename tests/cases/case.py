"""Small models of every supported family, built from configs with random weights: what the contract runs on.

A new family is one `Case` here, next to its entry in `skipat_surgery/core/*_families.py`. The first case of a family is
its lead: it stands for the family in the slow parts of the contract.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import small_models as make
import torch
from packaging.version import Version
from reference_stages import grids_of
from torch import Tensor, nn
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class InStages:
    """The path of something in a block that is counted over all stages, as a `str` gives that of others.

    Args:
        path: With ``{}`` for the stage, and for the block in it.
        depths: The number of blocks of each stage.
        halves: Whether the grid is halved from stage to stage.
        flat: Whether the blocks of all stages lie in one list.
        units: Where tokens lie in units, how often the map of each stage is parted.
    """

    path: str
    depths: tuple[int, ...]
    halves: bool = True
    flat: bool = False
    units: tuple[int, ...] = ()

    def format(self, index: int) -> str:
        """Of block `index`."""
        if self.flat:
            return self.path.format(index)
        stage = next(n for n in range(len(self.depths)) if index < sum(self.depths[: n + 1]))
        return self.path.format(stage, index - sum(self.depths[:stage]))


@dataclass(frozen=True)
class Case:
    """A model to test on: how to build it, how to call it, and where its MSA and its patches are.

    Args:
        name: For the test ids.
        family: The family it belongs to, by name.
        build: Makes the model.
        msa: Path of the MSA of block i, with ``{}`` for i; in stages, with the number of blocks of each.
        prefix: Number of tokens before the patches.
        suffix: Number of tokens after them.
        size: Of the images, (height, width), or of the videos, (frames, height, width).
        patch: Side of a patch in pixels, or of a tubelet its frames, height and width.
        strides: From a patch to the next along each axis; its side where left out.
        others: Further sizes that the host takes as it was built.
        flags: Keyword arguments that a forward at those sizes needs.
        inputs: Further inputs, from the batch size.
        given: From the images, the inputs that hold them.
        sizes: From the images, the grid (B, 2) of each of them, where they differ.
        merge: Where the patches of all images are packed, the side of the blocks in which they are.
        window: Where they lie window by window, the side of a window in patches.
        folded: Where each window of an image is an image of its own, the number of them along a side.
        seed: Of the weights.
        since: The first version of a host that has this model, such as "timm 1.0.30"; it is skipped on older ones.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    msa: str | InStages
    prefix: int
    suffix: int = 0
    size: tuple[int, ...] = (32, 32)
    patch: int | tuple[int, ...] = 8
    strides: tuple[int, ...] | None = None
    others: tuple[tuple[int, ...], ...] = ()
    flags: dict[str, bool] = field(default_factory=dict)
    inputs: Callable[[int], dict[str, Tensor]] = lambda batch: {}
    given: Callable[[Tensor], dict[str, Tensor]] = make.pixels
    sizes: Callable[[Tensor], Tensor] | None = None
    merge: int = 0
    window: int = 0
    folded: int = 0
    seed: int = 0
    since: str = ""

    @property
    def depths(self) -> tuple[int, ...]:
        """The number of blocks of each stage; empty where there is no more than one."""
        return self.msa.depths if isinstance(self.msa, InStages) else ()

    def grids(self, images: Tensor) -> list[tuple[int, ...]]:
        """The grid of each block; none where there are no stages."""
        return grids_of(self.depths, self.grid(images), self.msa.halves) if isinstance(self.msa, InStages) else []

    @property
    def units(self) -> list[int]:
        """How often the map of each block is parted; none where tokens lie row by row."""
        times = self.msa.units if isinstance(self.msa, InStages) else ()
        return [times[stage] for stage in range(len(times)) for _ in range(self.depths[stage])]

    def skippable(self, blocks: Iterable[int]) -> list[int]:
        """Those of some blocks with which no stage begins."""
        starts = {sum(self.depths[:stage]) for stage in range(len(self.depths))}
        return [index for index in blocks if index not in starts]

    def block(self, index: int) -> str:
        """The path of a block."""
        path = self.msa if isinstance(self.msa, str) else self.msa.path
        return self.msa.format(index).removesuffix(path.rpartition("{}")[2])

    @property
    def host(self) -> str:
        """The library whose model it is: transformers, timm or torchvision."""
        return "transformers" if "TimmWrapper" in self.name else self.family.rpartition("(")[2].removesuffix(")")

    @property
    def is_timm(self) -> bool:
        return self.host == "timm"

    @property
    def is_too_new(self) -> bool:
        """Whether the host that is installed is older than the model."""
        host, _, version = self.since.partition(" ")
        return bool(host) and Version(metadata.version(host)) < Version(version)

    def model(self) -> nn.Module:
        """In float64, with every weight random: many start at zero, which would hide a missing path."""
        torch.manual_seed(self.seed)
        model = self.build().double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def images(self, size: tuple[int, ...] | None = None, batch: int = 2, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        *frames, height, width = size or self.size
        shape = (batch, *frames, 3, height, width)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    @property
    def sides(self) -> tuple[int, ...]:
        """Of a patch, along each axis of the grid."""
        return self.patch if isinstance(self.patch, tuple) else (self.patch,) * len(self.size)

    def grid(self, images: Tensor) -> tuple[int, ...]:
        extent = images.shape[1:-3] + images.shape[-2:]
        strides = self.strides or self.sides
        return tuple(
            (pixels - side) // stride + 1 for pixels, side, stride in zip(extent, self.sides, strides, strict=True)
        )

    def layout(self, images: Tensor) -> tuple[int, ...] | list[tuple[int, ...]]:
        """The grid of all images, or of each one."""
        return self.grid(images) if self.sizes is None else list(map(tuple, self.sizes(images).tolist()))

    def size_of(self, *grid: int) -> tuple[int, ...]:
        """The size of images of so many patches along each axis, or of videos."""
        strides = self.strides or self.sides
        return tuple(
            side + (length - 1) * stride for length, side, stride in zip(grid, self.sides, strides, strict=True)
        )

    def call(self, model: Any, images: Tensor, **kwargs: Any) -> Any:
        if self.host != "transformers":
            return self.without_padding(model(self.argument(images), **kwargs), images)
        output = model(**self.given(images), **self.inputs(images.shape[0]), **kwargs)
        return self.without_padding(output, images)

    def argument(self, images: Tensor) -> Any:
        """What a model of timm or torchvision is called with: images, or patches."""
        return images if self.sizes is None else self.given(images)

    def without_padding(self, output: Any, images: Tensor) -> Any:
        """An output with zeros where there is no patch, whatever the model gives there."""
        if self.sizes is None:
            return output
        patches = torch.arange(math.prod(self.grid(images))) < self.sizes(images).prod(dim=1, keepdim=True)
        tokens = nn.functional.pad(patches, (self.prefix, self.suffix), value=True)

        def cleared(value: Any) -> Any:
            for real in (patches, tokens) if isinstance(value, Tensor) else ():
                if value.ndim == 3 and value.shape[:2] == real.shape:
                    return torch.where(real[..., None], value, 0)
                if value.ndim == 4 and value.shape[2:] == real.shape[1:] * 2:
                    return torch.where(real[:, None, None] & real[:, None, :, None], value, 0)
            return value

        return tree_map(cleared, output)

    def tensors(self, model: Any, images: Tensor, **kwargs: Any) -> list[Tensor]:
        """Every floating-point tensor of the output, in order."""
        return output_tensors(self.call(model, images, **kwargs))


def output_tensors(output: Any) -> list[Tensor]:
    """Every floating-point tensor in a model's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = tuple(output.values())
    if not isinstance(output, (tuple, list)):
        return []
    return [tensor for item in output for tensor in output_tensors(_of_all_images(item))]


def _of_all_images(output: Any) -> Any:
    """One tensor of what a model of images and text gives as one (N, D) for each image; else what was given."""
    if isinstance(output, (tuple, list)) and all(isinstance(item, Tensor) and item.ndim == 2 for item in output):
        if len({item.shape for item in output}) == 1:
            return torch.stack(list(output))
        if len({item.shape[1] for item in output}) == 1:  # images of different sizes
            return torch.cat(list(output))
    return output
