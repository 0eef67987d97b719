"""Layerwise training of Φ against the teacher's Z: what the closed form of `solve` cannot express.

Only Φ is trained, and neither model runs further than the last skipped block. A fresh Φ is best given the teacher's own
Z first, so that all learn at once from a true input; a solved one what the Φ before it really makes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm.auto import tqdm

from ..batches import Images
from ..core.ragged import Layout
from ..observing import evaluating, pixels_of, z_of
from ..result import Result, titled_table
from ..tower import Tower, check_pair
from .finite import check_loss, check_precision, in_float16
from .losses import relative_error
from .solve import phi_of

# On a plateau the learning rate falls by this factor; at this share of its start the training stops.
FACTOR, LOWEST = 0.3, 0.05
# A solved Φ lies in a narrow valley, and the first steps of AdamW are of full size whatever the gradient.
WARMUP = 15


@dataclass(frozen=True)
class AlignResult(Result):
    """What the alignment did.

    Args:
        steps: The batches that were used.
        errors: Of each step, the squared error over the variance of the teacher's Z, in the mean over the blocks and
            over patches and prefix tokens.
    """

    steps: int
    errors: tuple[float, ...]

    def table(self) -> Table:
        """The error at the start and at the end."""
        shown = titled_table("Aligned", "", "step", "error over variance")
        for name, step in (("first", 0), ("last", len(self.errors) - 1)) if self.errors else ():
            shown.add_row(name, str(step + 1), f"{self.errors[step]:.4f}")
        return shown


def align(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int = 60,
    forced: float = 0.0,
    learning_rate: float = 1e-4,
    patience: int = 20,
    progress: bool = True,
) -> AlignResult:
    """Train every Φ of a cut model against its teacher's Z, in place, and nothing else.

    The loss is the squared error over the variance of the teacher's Z in the batch, of each block, patches and prefix
    tokens apart, so that blocks of any scale count alike. It stops early once the loss no longer falls.

    Args:
        model: A cut model.
        teacher: The model it was made from, untouched.
        batches: Batches of images (B, C, H, W) or videos (B, T, C, H, W), ``(images, labels)`` pairs, or mappings with
            ``pixel_values``; no labels are needed. They are gone through again where they are fewer than `steps`.
        steps: The most batches to use.
        forced: The share of the steps in which each Φ is given the teacher's Z, not that of the Φ before it. None by
            default: `solve` has fitted each Φ to what the one before it really makes, and the teacher's Z leads it
            away from there. Where a Φ reads more than Z, the cut model runs as it is in all steps.
        learning_rate: Of AdamW, after a warm-up of 15 batches; a plateau lowers it.
        patience: Batches without a better loss that make a plateau. After three of them the teacher's Z gives way to
            the chain, and the chain ends the training.
        progress: Whether to show a bar.

    Raises:
        ValueError: The model is not cut, the teacher is, either is in half precision, or there are no images.
        FloatingPointError: The loss is not finite; the model is then as the step before left it.

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
        >>> result = skipat_surgery.align(student, teacher, batches, steps=4, progress=False)
        >>> result.steps
        4
    """
    student, original = check_pair(model, teacher)
    check_precision(model, teacher)
    phis = nn.ModuleList(student.blocks[index].phi for index in student.skip)  # type: ignore[misc]
    wanted = [parameter.requires_grad for parameter in phis.parameters()]
    phis.requires_grad_(True)
    try:
        with evaluating(model, teacher):
            errors = _train(
                student, original, phis, repeated(batches, steps), steps, forced, learning_rate, patience, progress
            )
    finally:
        for parameter, trained in zip(phis.parameters(), wanted, strict=True):
            parameter.grad = None
            parameter.requires_grad_(trained)
        torch.clear_autocast_cache()
    return AlignResult(len(errors), tuple(errors))


def plateau(optimizer: torch.optim.Optimizer, learning_rate: float, patience: int) -> ReduceLROnPlateau:
    """A schedule that begins at this rate."""
    set_rate(optimizer, learning_rate)
    return ReduceLROnPlateau(optimizer, factor=FACTOR, patience=patience, threshold=0.01)


def _train(
    student: Tower,
    original: Tower,
    phis: nn.ModuleList,
    batches: Iterator[Any],
    steps: int,
    forced: float,
    learning_rate: float,
    patience: int,
    progress: bool,
) -> list[float]:
    """Train until the batches end or the chain's loss stops falling; the arguments are those of `align`."""
    optimizer = torch.optim.AdamW(phis.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    errors: list[float] = []
    chained, schedule = False, plateau(optimizer, learning_rate, patience)
    bar = tqdm(batches, total=steps, desc="Aligning", unit="step", disable=not progress)
    for step, batch in enumerate(bar):
        if not chained and (step >= round(forced * steps) or over(schedule, learning_rate)):
            chained, schedule = True, plateau(optimizer, learning_rate, patience)
        if step < WARMUP:
            set_rate(optimizer, learning_rate * (step + 1) / WARMUP)
        pixels = pixels_of(batch).to(next(phis.parameters()).device)
        loss = _loss(student, original, pixels, chained)
        float16 = in_float16(pixels.device)
        check_loss(float(loss.detach()), step + 1, student.module, original.module, pixels, float16=float16)
        _update(loss, optimizer)
        errors.append(float(loss.detach()))
        if step >= WARMUP:
            schedule.step(errors[-1])
        bar.set_postfix(error=f"{errors[-1]:.4f}")
        if chained and over(schedule, learning_rate):
            break
    return errors


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give all parameters this rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def over(schedule: ReduceLROnPlateau, learning_rate: float) -> bool:
    """Whether the loss has stopped falling, even at the lowest rate."""
    return float(schedule.get_last_lr()[0]) < LOWEST * learning_rate


def repeated(batches: Iterable[Any], count: int) -> Iterator[Any]:
    """So many batches, from the start again where they end.

    Raises:
        ValueError: There are none, or they cannot be gone through again.
    """
    given = 0
    while given < count:
        before = given
        for batch in batches:
            yield batch
            given += 1
            if given == count:
                return
        if given == before:
            raise ValueError(
                f"batches ended after {given}, and could not be gone through again: pass a list or a DataLoader"
            )


def _loss(student: Tower, original: Tower, pixels: Images, chained: bool) -> Tensor:
    """The loss of one batch, with a gradient."""
    alone = not any(phi.reads_x or phi.pool for phi in map(partial(phi_of, student), student.skip))
    sources = [run[0] - 1 for run in student.config.runs] if alone else []
    targets = z_of(original, {*sources, *student.skip}, pixels)
    # The first run starts from blocks that are the teacher's own; a later one from what the student has become.
    later = z_of(student, sources[1:], pixels) if chained and len(sources) > 1 else {}
    with torch.enable_grad():
        # A Φ that reads more than Z takes the blocks between as well.
        found = (
            _chain(student, targets | later, targets, pixels, chained) if alone else z_of(student, student.skip, pixels)
        )
        real = student.real(pixels)
        losses = [
            relative_error(found[index].float(), targets[index].float(), student.num_special_in_blocks, real).mean()
            for index in student.skip
        ]
        return torch.stack(losses).mean()


def _update(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One step of the optimizer on the parameters it has."""
    loss.backward(inputs=[p for group in optimizer.param_groups for p in group["params"]])
    optimizer.step()
    optimizer.zero_grad()
    torch.clear_autocast_cache()  # the casts of the weights as they were


def _chain(
    student: Tower, sources: dict[int, Tensor], targets: dict[int, Tensor], pixels: Images, chained: bool
) -> dict[int, Tensor]:
    """What every Φ makes, by block: of what the Φ before it made, from the run's source on, or of the teacher's Z."""
    found: dict[int, Tensor] = {}
    layout = student.layout(pixels)
    for run in student.config.runs:
        z = sources[run[0] - 1]
        for index in run:
            given = z if chained else targets[index - 1]
            z = found[index] = phi_output(student, index, given, student.layout_in(index, layout), targets[index])
    return found


def phi_output(tower: Tower, index: int, z: Tensor, grid: Layout, expected: Tensor) -> Tensor:
    """What a block's Φ makes of Z (B, N, D), both with the patches last as `z_of` gives them.

    Prefix tokens that attend have the Z that is expected of them: Φ has no part in it.
    """
    phi: Any = tower.blocks[index].phi
    count = tower.num_special_in_blocks
    return phi.map_tokens(z, grid, count, expected[:, :count] if phi.attends else None)
