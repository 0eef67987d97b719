"""Narrower MLPs in closed form: the hidden units that cost least are taken out, and the others take their work over.

A cut saves attention. Where images are small most of the time goes into the MLPs, so that a cut model may save there
too. What the units that stay can do for those that go follows from their second moments: see `removal`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..core.cutting import narrow_block
from ..core.mlp import Mlp
from ..observing import evaluating
from ..result import Result, titled_table
from ..surgery import tell_config
from ..tower import Tower, check_pair
from .fitted_block import FittedBlock, count_images, shared_parameters
from .last_linear import last_linear
from .moments import Spread, sampled
from .removal import Removal, Weighed, widths_within
from .states import walks


@dataclass(frozen=True)
class NarrowResult(Result):
    """What was taken out of each MLP, and how far the hidden states after it are from the teacher's.

    Args:
        images: How many images fitted, and how many measured.
        widths: By block, the hidden units before and after.
        errors: By block, the error of X after it over its variance, on the held-out images; the blocks before it are
            narrower already.
    """

    images: tuple[int, int]
    widths: dict[int, tuple[int, int]]
    errors: dict[int, float]

    def table(self) -> Table:
        """Widths and errors, block by block."""
        title = f"Narrowed on {self.images[0]:,} images: error over variance of X on {self.images[1]:,} others"
        shown = titled_table(title, "block", "hidden units", "left", "error")
        for block, (before, after) in self.widths.items():
            shown.add_row(str(block), f"{before:,}", f"{after:,}", f"{self.errors[block]:.4f}")
        return shown


def narrow(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    keep: float = 0.75,
    *,
    blocks: Iterable[int] | None = None,
    prefix_weight: int = 8,
    progress: bool = True,
) -> NarrowResult:
    """Take hidden units out of the MLPs of a cut model, in place, and fit what is left to the teacher.

    A first pass over the blocks finds what each unit costs: the error that its removal adds to X, over the variance of
    X. The units that cost least for the MACs that they take go, whichever block they are in, in groups of 8. A second
    pass takes them out, block by block on the student's own states, so that each MLP makes up for its own loss and for
    what those before it lost.

    The images are kept, and hidden states as `refit` keeps them. `restore` gives the MLPs back. The checkpoint says how
    many units each has, and loads as any other.

    Args:
        student: A cut model, solved.
        teacher: The model it was made from, untouched.
        batches: Batches of images (B, C, H, W) or videos (B, T, C, H, W), ``(images, labels)`` pairs, or mappings with
            ``pixel_values``; at least two, as one of four is held out.
        keep: The share of the MACs of these MLPs that stays, between 0 and 1.
        blocks: The blocks whose MLPs are to be narrower. All whose can be when left out; the others stay as they are.
        prefix_weight: How many times a prefix token counts as much as a patch.
        progress: Whether to show a bar.

    Returns:
        Widths and errors by block.

    Raises:
        ValueError: The model is not cut, the teacher is, `keep` is no such share, a block is none, or the MLP of one
            that is named cannot be narrower: it is none of plain Linears, a norm sees all its units, it is used
            elsewhere too, or X does not follow it linearly, as in post-norm blocks.

    Examples:
        >>> import copy
        >>> import timm
        >>> import torch
        >>> import skipat_surgery
        >>> small = dict(img_size=32, patch_size=8, embed_dim=32, depth=6, num_heads=2, num_classes=4)
        >>> teacher = timm.create_model("vit_tiny_patch16_224", **small).eval()
        >>> student = skipat_surgery.apply(copy.deepcopy(teacher), skip=[2, 3])
        >>> batches = torch.randn(64, 3, 32, 32).split(16)
        >>> solved = skipat_surgery.solve(student, teacher, batches, progress=False)
        >>> result = skipat_surgery.narrow(student, teacher, batches, keep=0.5, progress=False)
        >>> sum(after for _, after in result.widths.values())
        384
    """
    mine, original = check_pair(student, teacher)
    result = narrow_tower(student, mine, original, list(batches), keep, blocks, prefix_weight, progress)
    tell_config(student)
    return result


def narrow_tower(
    student: nn.Module,
    mine: Tower,
    original: Tower,
    batches: Sequence[Any],
    keep: float,
    blocks: Iterable[int] | None = None,
    prefix_weight: int = 8,
    progress: bool = True,
) -> NarrowResult:
    """What `narrow` does, to a model that may be uncut: its checkpoint then says nothing of it."""
    wanted = _checked(mine, keep, blocks)
    with evaluating(student, original.module):
        passes, shared = _Passes(mine, original, batches, prefix_weight, progress), shared_parameters(student)
        weighed: dict[int, Weighed] = {}
        reasons = []
        for block in passes.over_blocks("Weighing", wanted):
            reason = block.reason_against(shared)
            if reason is None:
                weighed[block.index] = block.weighed()
            else:
                reasons.append(f"block {block.index} cannot be narrower: {reason}")
        if reasons and (blocks is not None or not weighed):
            raise ValueError(f"{reasons[0]}; leave it out of blocks")
        widths = widths_within(weighed, keep)
        errors = {block.index: block.narrow(widths[block.index]) for block in passes.over_blocks("Narrowing", weighed)}
    return NarrowResult(passes.images, {index: (one.width, widths[index]) for index, one in weighed.items()}, errors)


def _checked(tower: Tower, keep: float, blocks: Iterable[int] | None) -> list[int]:
    """The blocks that may be narrower.

    Raises:
        ValueError: There are none such, or `keep` is no share.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep < 1:
        raise ValueError(f"keep must be a share of the MLPs' MACs, between 0 and 1, got {keep!r}")
    wanted = sorted(set(range(tower.reach) if blocks is None else blocks))
    if not wanted or not 0 <= wanted[0] <= wanted[-1] < tower.reach:
        raise ValueError(f"blocks must name some of 0 to {tower.reach - 1}, got {wanted}")
    return wanted


class _Passes:
    """Passes over the blocks, each from the first of them on."""

    def __init__(
        self,
        mine: Tower,
        original: Tower,
        batches: Sequence[Any],
        prefix_weight: float,
        progress: bool,
    ) -> None:
        self.towers, self.batches = (mine, original), batches
        self.prefix_weight, self.progress = prefix_weight, progress
        self.images = (0, 0)

    def over_blocks(self, what: str, wanted: Iterable[int]) -> Iterator[_Block]:
        """Some blocks, in order, each with the student's walk before it and the teacher's past it."""
        indices = sorted(wanted)
        walk, reference = walks(*self.towers, self.batches, self.progress, first=indices[0])
        self.images = count_images(walk)
        whole = range(indices[0], indices[-1] + 1)
        for index in tqdm(whole, desc=what, unit="block", disable=not self.progress):
            reference.move_on()
            if index in indices:
                yield _Block(walk, reference, self.prefix_weight)
            walk.move_on()


class _Block(FittedBlock):
    """One block whose MLP becomes narrower."""

    def removal(self) -> Removal:
        """What was measured of its hidden units on the images that fit."""
        found = self._reader()
        assert found is not None
        return Removal(self.moments(*found, self.run_x, self.expected_x, None), *found)

    def _reader(self) -> tuple[nn.Linear, Tensor] | None:
        """The Linear that reads the hidden units, and by how much its channels count; None where X is not linear in
        it."""
        found = last_linear(self.parts()[1], self.run_x)
        reader = self.tower.blocks[self.index].get_submodule(self.mlp.reader)
        return None if found is None or found[0] is not reader else found

    @property
    def mlp(self) -> Mlp:
        """Where its hidden units are."""
        return Mlp.of(self.tower.module, self.tower.family, self.index)

    def reason_against(self, shared: set[int]) -> str | None:
        """Why no unit can be taken out, where none can."""
        try:
            mlp = self.mlp
        except ValueError as error:
            return str(error)
        linears = [self.tower.blocks[self.index].get_submodule(path) for path in (*mlp.makers, mlp.reader)]
        if any(id(parameter) in shared for linear in linears for parameter in linear.parameters()):
            return "its MLP is used elsewhere too"
        if not self._units_are_apart():
            return "its MLP mixes hidden units"
        return "its X does not follow its MLP linearly" if self._reader() is None else None

    def weighed(self) -> Weighed:
        """What units cost, before any goes."""
        removal, x, variance = self.removal(), self.run_x(), self.variance()
        steps = [(left, cost / variance) for left, cost in removal.steps()]
        return Weighed(removal.width, x.shape[1] * x.shape[2], steps)

    def narrow(self, width: int) -> float:
        """Leave so many units; the error of X on the held-out images."""
        removal = self.removal()
        removal.down_to(width)
        block, mlp = self.tower.blocks[self.index], self.mlp
        if self.tower.skip:
            narrow_block(self.tower.module, self.index, removal.kept)
        else:
            mlp.keep(block, removal.kept)
        removal.write(block.get_submodule(mlp.reader))  # type: ignore[arg-type]
        torch.clear_autocast_cache()  # inside autocast, the new weights would stay hidden behind old casts
        return self.error()

    def variance(self) -> float:
        """Of the teacher's X after the block."""
        count, spread = self.tower.num_special_in_blocks, Spread()
        for number in self.fitting:
            x, real = self.expected_x(number), self.student.states[number].real
            spread.add(sampled(number, x[:, count:], real=real)[0])
        return float(spread.variance)

    def _units_are_apart(self) -> bool:
        """Whether each hidden unit is made by its own row of the Linears before: what is done to some, others miss."""
        block, mlp = self.tower.blocks[self.index], self.mlp
        width, seen = mlp.width(block), []

        def shift(linear: Any, args: Any, output: Tensor) -> Tensor:
            shifts = torch.zeros(output.shape[-1], device=output.device, dtype=output.dtype)
            shifts.view(-1, width)[:, ::2] = 1
            return output + shifts

        with ExitStack() as hooks:
            reader = block.get_submodule(mlp.reader)
            hooks.callback(reader.register_forward_pre_hook(lambda m, args: seen.append(args[0])).remove)
            self.run_x()
            for path in mlp.makers:
                hooks.callback(block.get_submodule(path).register_forward_hook(shift).remove)
            self.run_x()
        if len(seen) != 2:
            return False  # it is called more than once
        before, after = seen
        return torch.equal(before[..., 1::2], after[..., 1::2]) and not torch.equal(before, after)
