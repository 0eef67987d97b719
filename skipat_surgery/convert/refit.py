"""A closed-form refit of the MLPs after a cut: ridge regression of the teacher's hidden states, without a gradient.

What Φ leaves wrong in the hidden states X, the last linear map of each MLP can take back in part. Block by block, from
the first skipped one on and on the student's own states, its change ΔW, Δb is fitted to X_teacher - X_student.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..observing import evaluating, pixels_of, states_of
from ..result import Result, titled_table
from ..tower import Tower, check_pair
from .losses import relative_error
from .solve import Moments

RIDGE = 1e-2
HELD_OUT = 4  # one batch of four measures, the second, the others fit
# A channel that its LayerScale all but closes cannot be fitted through it.
CLOSED = 1e-6


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
    ridge: float = RIDGE,
    prefix_weight: int = 8,
    progress: bool = True,
) -> RefitResult:
    """Refit the last linear map of every MLP from the first skipped block on, in place and in closed form.

    The regression is anchored at the pretrained weights: what is penalised is the change. A block whose error on
    held-out images does not fall keeps its weights. Post-norm blocks, whose MLP does not add to X linearly, are left
    alone, and so are blocks whose last linear map is used elsewhere too.

    Each block takes a pass over the images to fit and two over the held-out ones, with products in float64: minutes on
    a CPU for a few thousand images.

    Args:
        student: A cut model, solved.
        teacher: The model it was made from, untouched.
        batches: Image batches (B, C, H, W), ``(images, labels)`` pairs, or mappings with ``pixel_values``; at least
            two, as one of four is held out. They are gone through once a block: a list or a DataLoader.
        ridge: Added to the covariance's diagonal, as a fraction of its mean.
        prefix_weight: How many times a prefix token counts as much as a patch.
        progress: Whether to show a bar.

    Returns:
        The errors by block.

    Raises:
        ValueError: The model is not cut, the teacher is, or there are fewer than two batches.

    Example:
        >>> skipat_surgery.solve(student, teacher, loader)  # doctest: +SKIP
        >>> print(skipat_surgery.refit(student, teacher, loader))  # doctest: +SKIP
    """
    mine, original = check_pair(student, teacher)
    before: dict[int, float] = {}
    after: dict[int, float] = {}
    images = _count(batches)
    shared = _shared_parameters(student)
    device = next(student.parameters()).device
    with evaluating(student, teacher), torch.autocast(device.type, enabled=False):
        blocks = range(mine.skip[0], len(mine.blocks))
        for index in tqdm(blocks, desc="Refitting", unit="block", disable=not progress):
            linear = last_linear(mine, index, next(_held_out(batches)))
            if linear is None or id(linear[0].weight) in shared:
                continue
            before[index] = _error(mine, original, index, batches)
            kept = {name: tensor.clone() for name, tensor in linear[0].state_dict().items()}
            _fit(mine, original, index, *linear, batches, ridge, prefix_weight)
            after[index] = _error(mine, original, index, batches)
            if not after[index] < before[index]:
                linear[0].load_state_dict(kept)
                after[index] = before[index]
    torch.clear_autocast_cache()  # inside autocast, the new weights would stay hidden behind old casts
    return RefitResult(images, before, after)


def last_linear(tower: Tower, index: int, images: Tensor) -> tuple[nn.Linear, Tensor] | None:
    """The last linear map of a block's MLP, and by how much each channel of its output counts in X (D,): LayerScale.

    None where X does not follow its output linearly, as in post-norm blocks. Found by running the block, with the
    output of the map shifted.
    """
    block = tower.blocks[index]
    attention = set(tower.msa_slot(index).modules())
    phi = set(block.phi.modules()) if index in tower.skip else set()  # type: ignore[union-attr]
    called: list[nn.Linear] = []
    candidates = [m for m in block.modules() if type(m) is nn.Linear and m not in attention and m not in phi]
    hooks = [m.register_forward_hook(lambda m, args, out: called.append(m)) for m in candidates]
    try:
        x = states_of(tower, index, images)
    finally:
        for hook in hooks:
            hook.remove()
    if not called or called.count(called[-1]) > 1 or called[-1].out_features != x.shape[-1]:
        return None
    linear = called[-1]
    unit = float(x.std())
    with _shifted(linear, unit):
        scale = (states_of(tower, index, images) - x).double().mean(dim=(0, 1)) / unit
    draw = torch.Generator().manual_seed(0)
    shift = unit * torch.randn(x.shape[-1], generator=draw).to(x.device, x.dtype)
    with _shifted(linear, shift):
        moved = (states_of(tower, index, images) - x).double()
    linearly = torch.allclose(moved, (scale * shift).expand_as(moved), rtol=0, atol=1e-2 * float(moved.std()) + 1e-12)
    return (linear, scale) if linearly else None


@contextmanager
def _shifted(linear: nn.Linear, shift: Tensor | float) -> Iterator[None]:
    hook = linear.register_forward_hook(lambda module, args, output: output + shift)
    try:
        yield
    finally:
        hook.remove()


def _shared_parameters(model: nn.Module) -> set[int]:
    """The parameters that have more than one name."""
    names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {key for key, count in names.items() if count > 1}


def _held_out(batches: Iterable[Any]) -> Iterator[Tensor]:
    """The images that measure."""
    return (pixels_of(batch) for index, batch in enumerate(batches) if index % HELD_OUT == 1)


def _fitting(batches: Iterable[Any]) -> Iterator[Tensor]:
    """The images that fit."""
    return (pixels_of(batch) for index, batch in enumerate(batches) if index % HELD_OUT != 1)


def _count(batches: Iterable[Any]) -> tuple[int, int]:
    """How many images fit, and how many measure.

    Raises:
        ValueError: There are none to measure on, or they cannot be gone through again.
    """
    counts = [sum(map(len, part(batches))) for part in (_fitting, _held_out)]
    if not all(counts):
        raise ValueError(
            f"refit needs images to fit and, one batch of {HELD_OUT}, images to measure on; it was given {counts}. They"
            " are gone through more than once: pass at least two batches in a list or a DataLoader, not a generator"
        )
    return counts[0], counts[1]


def _error(student: Tower, teacher: Tower, index: int, batches: Iterable[Any]) -> float:
    """The error of X after a block, over its variance, on the held-out images."""
    count, errors = student.num_special_tokens, []
    for images in _held_out(batches):
        found, expected = (states_of(tower, index, images).double() for tower in (student, teacher))
        errors.append(relative_error(found, expected, count))
    return float(torch.cat(errors).mean())


def _fit(
    student: Tower,
    teacher: Tower,
    index: int,
    linear: nn.Linear,
    scale: Tensor,
    batches: Iterable[Any],
    ridge: float,
    prefix_weight: int,
) -> None:
    """Add the change to a linear map that brings X after its block closest to the teacher's."""
    count, moments, inputs = student.num_special_tokens, Moments(), []
    open_ = scale.abs() > CLOSED * scale.abs().max()
    divisor = torch.where(open_, scale, torch.inf)
    hook = linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        for images in _fitting(batches):
            missing = states_of(teacher, index, images).double() - states_of(student, index, images).double()
            h, target = student.patches_last(inputs.pop()).double(), missing / divisor
            moments.add(h[:, count:].flatten(0, 1), {index: target[:, count:].flatten(0, 1)})
            for _ in range(prefix_weight if count else 0):
                moments.add(h[:, :count].flatten(0, 1), {index: target[:, :count].flatten(0, 1)})
    finally:
        hook.remove()
    eye = torch.eye(linear.in_features, dtype=torch.float64, device=scale.device)
    fit = moments.through(eye, eye.new_zeros(linear.in_features), index)
    change = fit.ridge_regression(ridge)
    linear.weight.add_(change)
    if linear.bias is not None:
        linear.bias.add_(fit.bias(change))
