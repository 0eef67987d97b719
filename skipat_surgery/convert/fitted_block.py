"""A block of a student that is fitted to the teacher's states, on images of which some are held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..core.folded_windows import JoinedWindows
from ..core.units import Units
from ..core.windows import Windows
from ..observing import observe
from .losses import relative_error
from .moments import Moments, sampled
from .states import Walk

HELD_OUT = 4  # one batch of four measures, the second, the others fit
# A channel that its LayerScale all but closes cannot be fitted through it.
CLOSED = 1e-6


class FittedBlock:
    """One block: the student's walk stands before it, the teacher's has moved past it where X is compared.

    Args:
        student: Of a cut model.
        teacher: Of the untouched one.
        prefix_weight: How many times a prefix token counts as much as a patch.
    """

    def __init__(self, student: Walk, teacher: Walk, prefix_weight: float) -> None:
        self.student, self.teacher, self.index = student, teacher, student.index
        self.tower, self.prefix_weight = student.tower, prefix_weight
        self.held_out = [number for number in range(len(student)) if number % HELD_OUT == 1]
        self.fitting = [number for number in range(len(student)) if number % HELD_OUT != 1]

    def parts(self) -> tuple[set[nn.Module], set[nn.Module]]:
        """The modules of the MSA, none where the block is skipped, and the others but for Φ's."""
        attention = set(self.tower.msa_slot(self.index).modules())
        others = set(self.tower.blocks[self.index].modules()) - attention
        if self.index in self.tower.skip:
            others -= set(self.tower.blocks[self.index].phi.modules())  # type: ignore[union-attr]
            attention = set()
        return attention, others

    def run_x(self, number: int = 0) -> Tensor:
        """X after the block."""
        return self.tower.state_tokens(self.student.run(number).x, self.student.states[number].grid)

    def run_z(self, number: int = 0) -> Tensor:
        """Z of the block."""
        with observe(self.tower, [self.index], grid=self.student.states[number].grid) as seen:
            self.student.run(number)
        return seen.z[self.index]

    def expected_x(self, number: int) -> Tensor:
        """The teacher's X after the block."""
        return self.tower.state_tokens(self.teacher.states[number].x, self.student.states[number].grid)

    def error(self) -> float:
        """The error of X after the block, over its variance, on the held-out images."""
        count = self.tower.num_special_in_blocks
        errors = [
            relative_error(self.run_x(n).double(), self.expected_x(n).double(), count, self.student.states[n].real)
            for n in self.held_out
        ]
        return float(torch.cat(errors).mean())

    def moments(
        self,
        linear: nn.Linear,
        scale: Tensor,
        run: Callable[[int], Tensor],
        expected: Callable[[int], Tensor],
        windows: Windows | JoinedWindows | Units | None,
    ) -> Moments:
        """Of the inputs of a linear map, and of what its output lacks, on the images that fit."""
        count, moments, inputs = self.tower.num_special_in_blocks, Moments(), []
        divisor = torch.where(scale.abs() > CLOSED * scale.abs().max(), scale, torch.inf)
        hook = linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        try:
            for number in self.fitting:
                target = (expected(number) - run(number)) / divisor
                h = self.tower.inner_tokens(inputs.pop(), self.student.states[number].grid, windows)
                rows, missing = sampled(number, h[:, count:], target[:, count:], real=self.student.states[number].real)
                moments.add(rows, missing)
                if count:
                    moments.add(h[:, :count].flatten(0, 1), target[:, :count].flatten(0, 1), self.prefix_weight)
        finally:
            hook.remove()
        return moments


def shared_parameters(model: nn.Module) -> set[int]:
    """The parameters that have more than one name."""
    names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {key for key, count in names.items() if count > 1}


def count_images(walk: Walk) -> tuple[int, int]:
    """How many images fit, and how many measure.

    Raises:
        ValueError: There are none to measure on.
    """
    held_out = walk.count(walk.states[1::HELD_OUT])
    counts = walk.images - held_out, held_out
    if not all(counts):
        raise ValueError(
            f"fitting needs images to fit and, one batch of {HELD_OUT}, images to measure on; it was given {counts}: "
            "pass at least two batches"
        )
    return counts
