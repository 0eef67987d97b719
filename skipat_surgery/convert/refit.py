"""A closed-form refit after a cut: ridge regression of the teacher's hidden states, without a gradient.

What Φ leaves wrong in the hidden states X, the last linear maps of the blocks can take back in part. Block by block,
from the first skipped one on and on the student's own states, the change ΔW, Δb of W_o in every MSA that was left whole
is fitted to Z_teacher - Z_student, then that of the last map of every MLP to X_teacher - X_student.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..core.folded_windows import JoinedWindows
from ..core.units import Units
from ..core.windows import Windows
from ..observing import evaluating, observe
from ..result import Result, titled_table
from ..tower import check_pair
from .fitted_block import FittedBlock, count_images, shared_parameters
from .last_linear import last_linear
from .states import State, Walk, walks

# Tried one after the other. How far a map may go from its weights depends on how many images there are: what 48 photos
# say of a DINOv2-S is worth a tenth of what its own weights know, on which the error doubles with the smallest.
RIDGES = (1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class RefitResult(Result):
    """How far the hidden states after each block are from the teacher's, on held-out images: error over variance.

    Args:
        images: How many images fitted, and how many measured.
        before: By block, before its refit; the blocks before it have been refitted.
        after: By block. Where it equals `before`, the block gained nothing and keeps its weights.
    """

    images: tuple[int, int]
    before: dict[int, float]
    after: dict[int, float]

    def table(self) -> Table:
        """The errors, block by block."""
        title = f"Refitted on {self.images[0]:,} images: error over variance of X on {self.images[1]:,} others"
        shown = titled_table(title, "block", "before", "after")
        for block, error in self.before.items():
            shown.add_row(str(block), f"{error:.4f}", f"{self.after[block]:.4f}")
        return shown


def refit(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    ridge: float | Sequence[float] = RIDGES,
    prefix_weight: int = 8,
    progress: bool = True,
) -> RefitResult:
    """Refit the last linear map of every MLP, and W_o of every whole MSA, from the first skipped block on, in place.

    The regression is anchored at the pretrained weights: what is penalised is the change, by the ridge with which the
    error on held-out images is least. A map with which it does not fall keeps its weights. Left alone are post-norm
    blocks, whose X does not follow their MLP linearly, maps that are used elsewhere too, and MSAs of which Φ keeps only
    a part.

    The hidden states of all images are kept, on the CPU beyond `states.ROOM` bytes in a file, and each block runs four
    to five times, and once more on the held-out images for each further ridge.

    Args:
        student: A cut model, solved.
        teacher: The model it was made from, untouched.
        batches: Batches of images (B, C, H, W) or videos (B, T, C, H, W), ``(images, labels)`` pairs, or mappings with
            ``pixel_values``; at least two, as one of four is held out. They are gone through once.
        ridge: Added to each variance of a map's inputs, as a fraction of the mean one; of several, each map takes its
            best.
        prefix_weight: How many times a prefix token counts as much as a patch.
        progress: Whether to show a bar.

    Returns:
        The errors by block.

    Raises:
        ValueError: The model is not cut, the teacher is, there are fewer than two batches, or `ridge` is below 0.

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
        >>> result = skipat_surgery.refit(student, teacher, batches, progress=False)
        >>> sorted(result.after)
        [2, 3, 4, 5]
    """
    mine, original = check_pair(student, teacher)
    ridges = [ridge] if isinstance(ridge, (int, float)) else list(ridge)
    if not ridges or min(ridges) < 0:
        raise ValueError(f"ridge must be a number from 0 on, or some, got {ridge!r}")
    before: dict[int, float] = {}
    after: dict[int, float] = {}
    shared = shared_parameters(student)
    with evaluating(student, teacher):
        walk, reference = walks(mine, original, batches, progress)
        images = count_images(walk)
        blocks = range(walk.index, mine.reach)
        for index in tqdm(blocks, desc="Refitting", unit="block", disable=not progress):
            block = _Block(walk, reference, shared, ridges, prefix_weight)
            before[index], after[index] = block.refit()
            walk.move_on()
    return RefitResult(images, before, after)


class _Block(FittedBlock):
    """One block being refitted. The teacher's walk has moved past it, the student's stands before it."""

    def __init__(
        self, student: Walk, teacher: Walk, shared: set[int], ridges: Sequence[float], prefix_weight: float
    ) -> None:
        super().__init__(student, teacher, prefix_weight)
        self.ridges = ridges
        self.z: dict[int, Tensor] = {}
        attention, others = self.parts()
        maps = last_linear(attention, self.run_z), last_linear(others, self.run_x)
        self.attention, self.mlp = (None if found is None or id(found[0].weight) in shared else found for found in maps)
        teacher.move_on(self._teacher_states())

    def _teacher_states(self) -> Iterator[State]:
        for number in range(len(self.teacher)):
            wanted, grid = [self.index] if self.attention else [], self.student.states[number].grid
            with observe(self.teacher.tower, wanted, grid=grid) as seen:
                state = self.teacher.run(number)
            if self.attention and number in self.fitting:
                self.z[number] = seen.z[self.index]
            yield state

    def refit(self) -> tuple[float, float]:
        """Refit what can be, and return the error before and after."""
        first = error = self.error()
        if self.attention:
            windows = self.tower.windows_in(self.index)
            error = self.fit(*self.attention, self.run_z, self.z.__getitem__, error, windows)
        self.z.clear()
        if self.mlp:
            error = self.fit(*self.mlp, self.run_x, self.expected_x, error)
        return first, error

    def fit(
        self,
        linear: nn.Linear,
        scale: Tensor,
        run: Callable[[int], Tensor],
        expected: Callable[[int], Tensor],
        error: float,
        windows: Windows | JoinedWindows | Units | None = None,
    ) -> float:
        """Add the change to a linear map that brings what follows it closest to what is expected.

        Its inputs may lie in windows.

        Returns:
            The error on the held-out images, which is the one given where the map gained nothing and is as it was.
        """
        moments = self.moments(linear, scale, run, expected, windows)
        best = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
        pretrained = best
        for ridge in self.ridges:
            linear.load_state_dict(pretrained)
            change = moments.ridge_regression(ridge, alike=False)
            linear.weight.add_(change)
            if linear.bias is not None:
                linear.bias.add_(moments.bias(change))
            torch.clear_autocast_cache()  # inside autocast, the new weights would stay hidden behind old casts
            found = self.error()
            if found < error:
                error, best = found, {name: tensor.clone() for name, tensor in linear.state_dict().items()}
        linear.load_state_dict(best)
        torch.clear_autocast_cache()
        return error
