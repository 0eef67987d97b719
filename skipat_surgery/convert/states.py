"""Hidden states kept between the blocks, so that a pass over the blocks runs each of them once, and alone.

Fitting block after block would else take a forward of the whole model for each. What lies around the blocks is read off
one forward: the further arguments of each block, and what a host adds between two of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..batches import Images
from ..core.carrying import Box, carried_or_none, carry, first_argument
from ..core.ragged import Layout, Ragged
from ..core.stages import merged
from ..observing import Seen, pixels_of
from ..tower import Tower

# States beyond this many bytes lie in a file that is mapped into memory.
ROOM = 4 * 2**30


@dataclass
class State:
    """What a block is given: X (B, N, D) and, in a cut model, the Z before it and the patch grid.

    Args:
        x: X.
        z: Z of the block before.
        grid: Of the patches that the block gives: its MSA may make the map smaller.
        start: The X that its stage began with, where that is added in the end.
    """

    x: Tensor
    z: Tensor | None = None
    grid: Layout | None = None
    start: Tensor | None = None

    @property
    def images(self) -> int:
        """The number of images; of packed videos, of frames; where windows are folded into the batch, of those."""
        return self.grid.sizes.shape[0] if isinstance(self.grid, Ragged) else self.x.shape[0]

    @property
    def real(self) -> Tensor | None:
        """Which patches (B, N) are no padding; None where none is."""
        return self.grid.real if isinstance(self.grid, Ragged) else None


@dataclass
class _Call:
    """How the host calls a block: all arguments but X, Z and the grid, and what it adds to X before, (1, N, D)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    added: Tensor | None


@dataclass
class _Host:
    """The calls of all blocks, for images of one size."""

    batch_size: int
    calls: dict[int, _Call] = field(default_factory=dict)


class Walk:
    """A model's hidden states before one block, batch by batch, moved on block by block.

    Args:
        tower: Of the model.
        first: The block to start before.
    """

    def __init__(self, tower: Tower, first: int) -> None:
        self.tower, self.index = tower, first
        self.hosts: dict[Any, _Host] = {}
        self.states: list[State] = []
        self.sizes: list[Any] = []  # of each batch, or its number where its images have a grid each
        self._store = _Store()

    def start(self, pixels: Images) -> None:
        """Add a batch of images (B, C, H, W), videos (B, T, C, H, W) or patches."""
        pixels = pixels.to(next(self.tower.module.parameters()).device)
        alike = isinstance(pixels, Tensor) and not self.tower.family.packs
        self.sizes.append(pixels.shape[1:] if alike else len(self.states))  # type: ignore[union-attr]
        self.states.append(self._store.keep(self._run_to_the_first_block(pixels)))

    def __len__(self) -> int:
        return len(self.states)

    @property
    def images(self) -> int:
        """The number of images."""
        return self.count(self.states)

    def count(self, states: Iterable[State]) -> int:
        """The number of images of some batches."""
        return sum(state.images for state in states) // self.tower.windows_of_an_image

    def run(self, number: int) -> State:
        """Run the block on one batch; what the next one is given."""
        state, host = self.states[number], self.hosts[self.sizes[number]]
        call = host.calls[self.index]
        x = state.x.view_as(state.x)
        if state.grid is not None:
            carry(x, state.grid, state.z)
        args, kwargs = _fitted((call.args, call.kwargs), host.batch_size, x.shape[0])
        out = self.tower.blocks[self.index](x, *args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        grid, z = carried_or_none(out) or (state.grid, None)  # the last blocks carry nothing
        following = host.calls.get(self.index + 1)
        if self._begins_a_stage(self.index + 1):
            return self._in_the_next_stage(out, state.start, grid, args)
        out = out if following is None or following.added is None else out + following.added
        side = self.tower.pooling(self.index + 1)
        grid = tuple(length // side for length in grid) if isinstance(grid, tuple) else grid
        return State(out, z, grid, state.start)

    def _begins_a_stage(self, index: int) -> bool:
        """Whether a block is the first of a stage, but for the first one, and the host does something before it."""
        starts = (stage.blocks.start for stage in self.tower.stages[1:])
        return self.tower.family.stages is not None and index in starts

    def _in_the_next_stage(self, x: Tensor, start: Tensor | None, grid: Layout | None, args: tuple[Any, ...]) -> State:
        """What the block after this one, which was called so, is given, in the next stage."""
        family, tower = self.tower.family, self.tower.module
        assert family.stages is not None
        number = self.tower.stages.index(self.tower.stage_of(self.index))
        x = family.stages.between(tower, number, x, args)
        if start is None:
            return State(x, None, merged(grid) if isinstance(grid, tuple) else None)
        x = x + start
        return State(x, None, grid, x)

    def move_on(self, states: Iterable[State] | None = None) -> None:
        """Go on to the next block, with what `run` gave for every batch; where that is left out, it is run."""
        for number, state in enumerate(map(self.run, range(len(self))) if states is None else states):
            self.states[number] = self._store.keep(state, self.states[number])
        self.index += 1

    def _run_to_the_first_block(self, pixels: Images) -> State:
        """Run the model to the block; for the first images of a size to its end, to see all calls."""
        size = self.sizes[-1]
        known = size in self.hosts
        found: list[State] = []
        outputs: dict[int, Tensor] = {}
        starts: list[Tensor] = []
        host = self.hosts.setdefault(size, _Host(len(pixels)))

        def begin(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            starts.append(_parted(args, kwargs)[0].x)

        def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state, call = _parted(args, kwargs)
            if index == self.index:
                found.append(replace(state, start=starts[-1] if starts else None))
                if known:
                    raise Seen
            last = outputs.pop(index - 1, None)
            stays = last is None or last is state.x or self._begins_a_stage(index)
            if last is not None and not stays and not torch.equal(last, state.x):
                call.added = (state.x - last)[:1]
            host.calls[index] = call

        def after(index: int, output: Any) -> None:
            outputs[index] = output[0] if isinstance(output, tuple) else output

        with ExitStack() as hooks:
            if self.tower.family.stages and self.tower.family.stages.residual:
                first = self.tower.blocks[self.tower.stage_of(self.index).blocks.start]
                hooks.callback(first.register_forward_pre_hook(begin, with_kwargs=True).remove)
            for index, block in list(enumerate(self.tower.blocks))[self.index : self.tower.reach]:
                hooks.callback(_before(block, before, index).remove)
                if not known:
                    hooks.callback(_after(block, after, index).remove)
            try:
                self.tower.run(pixels)
            except Seen:
                pass
        return found[0]


def walks(
    student: Tower, original: Tower, batches: Iterable[Any], progress: bool, first: int | None = None
) -> tuple[Walk, Walk]:
    """The states of a student and its teacher before a block: the first skipped one where none is named."""
    first = student.skip[0] if first is None else first
    mine, theirs = (Walk(tower, first) for tower in (student, original))
    for batch in tqdm(batches, desc=f"Running to block {first}", unit="batch", disable=not progress):
        pixels = pixels_of(batch)
        for walk in (mine, theirs) if len(pixels) else ():  # none is left of a batch whose images are all corrupt
            walk.start(pixels)
    return mine, theirs


def _before(block: nn.Module, see: Any, index: int) -> Any:
    return block.register_forward_pre_hook(lambda module, args, kwargs: see(index, args, kwargs), with_kwargs=True)


def _after(block: nn.Module, see: Any, index: int) -> Any:
    return block.register_forward_hook(lambda module, args, output: see(index, output))


def _parted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[State, _Call]:
    """The state among what a block's forward is given, and the rest."""
    x = first_argument(args, kwargs)
    rest = args[1:]
    kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    grid, z = carried_or_none(x) or (None, None)
    if z is not None or (rest and isinstance(rest[0], Box)):  # a skipped block, whose forward is given Z and the grid
        z = rest[0].z if isinstance(rest[0], Box) else z
        rest = rest[2:]
    return State(x, z, grid), _Call(rest, kwargs, None)


def _fitted(value: Any, given: int, size: int) -> Any:
    """The arguments of a batch of `given` images for one of `size`: masks (B, H, N, N) may be one for each image."""
    if isinstance(value, Tensor):
        return value[:size] if value.ndim == 4 and value.shape[0] == given > 1 else value
    if isinstance(value, tuple):
        return tuple(_fitted(part, given, size) for part in value)
    if isinstance(value, dict):
        return {name: _fitted(part, given, size) for name, part in value.items()}
    return value


class _Store:
    """Keeps states in memory while there is room, then in a file."""

    def __init__(self) -> None:
        self.used = 0
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def keep(self, state: State, instead_of: State | None = None) -> State:
        """The state, in the place of an older one where there is one."""
        old = instead_of or State(torch.empty(0))
        z, start = (
            None if tensor is None else self._keep(tensor, before)
            for tensor, before in ((state.z, old.z), (state.start, old.start))
        )
        return State(self._keep(state.x, old.x), z, state.grid, start)

    def _keep(self, tensor: Tensor, old: Tensor | None) -> Tensor:
        if old is not None and old.shape == tensor.shape:
            return old.copy_(tensor)
        self.used += tensor.nbytes
        if tensor.device.type != "cpu" or self.used <= ROOM:
            return tensor.clone()
        if self.folder is None:
            self.folder = tempfile.TemporaryDirectory(prefix="skipat_surgery_")
        path = Path(self.folder.name) / f"{self.used}.bin"
        size = tensor.numel()
        return torch.from_file(str(path), shared=True, size=size, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)
