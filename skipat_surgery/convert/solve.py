"""A closed-form start for Φ: ridge regression of the teacher's Z, in seconds and without a gradient.

Where its units stay in GELU's linear range, Φ is an affine map of what it reads. The best one of its rank follows from
the second moments of that and of the teacher's Z. Block by block, in order: each fit reads what the Φ before it really
makes, so that later ones absorb earlier errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..core.padding import mean_of
from ..core.phi import Phi
from ..observing import Seen, evaluating, observe
from ..result import Result, titled_table
from ..tower import Tower, check_pair
from .moments import Moments, Spread, sampled
from .states import State, Walk, walks

# Added to each variance, as a fraction of it.
RIDGE = 1e-3


@dataclass(frozen=True)
class SolveResult(Result):
    """How well each solved Φ meets the teacher's Z: squared error over variance, by block (0 is exact, 1 the mean).

    `prefix` has the blocks that map the Z of prefix tokens: where they attend, there is nothing to fit.
    """

    images: int
    patches: dict[int, float]
    prefix: dict[int, float]

    def table(self) -> Table:
        """The errors, block by block."""
        shown = titled_table(f"Solved on {self.images:,} images: error over variance", "block", "patches", "prefix")
        for block, error in self.patches.items():
            shown.add_row(str(block), f"{error:.4f}", f"{self.prefix[block]:.4f}" if block in self.prefix else "–")
        return shown


def solve(
    model: nn.Module, teacher: nn.Module, batches: Iterable[Any], *, ridge: float = RIDGE, progress: bool = True
) -> SolveResult:
    """Fit every Φ of a cut model to its teacher's Z, in place and in closed form: ridge regression, in order.

    The hidden states of all images are kept, on the CPU beyond `states.ROOM` bytes in a file, and each block of either
    model runs about once.

    Args:
        model: A cut model.
        teacher: The model it was made from, untouched.
        batches: Batches of images (B, C, H, W) or videos (B, T, C, H, W), ``(images, labels)`` pairs, or mappings with
            ``pixel_values``. No labels are needed. They are gone through once.
        ridge: Added to each variance of what Φ reads, as a fraction of it.
        progress: Whether to show a bar.

    Returns:
        The relative error by block.

    Raises:
        ValueError: The model is not cut, the teacher is, or there are too few images or too much alike; with the count
            needed.

    Examples:
        >>> import copy
        >>> import timm
        >>> import torch
        >>> import skipat_surgery
        >>> small = dict(img_size=32, patch_size=8, embed_dim=32, depth=6, num_heads=2, num_classes=4)
        >>> teacher = timm.create_model("vit_tiny_patch16_224", **small).eval()
        >>> student = skipat_surgery.apply(copy.deepcopy(teacher), skip=[2, 3])
        >>> batches = torch.randn(64, 3, 32, 32).split(16)
        >>> result = skipat_surgery.solve(student, teacher, batches, progress=False)
        >>> result.images, sorted(result.patches)
        (64, [2, 3])
    """
    student, original = check_pair(model, teacher)
    patches: dict[int, float] = {}
    prefix: dict[int, float] = {}
    with evaluating(model, teacher):
        mine, theirs = walks(student, original, batches, progress)
        check_enough(mine.images, model)
        blocks = range(mine.index, student.skip[-1] + 1)
        for index in tqdm(blocks, desc="Solving", unit="block", disable=not progress):
            if index in student.skip:
                patches[index], error = solve_block(mine, theirs, ridge)
                prefix |= {} if error is None else {index: error}
            else:
                theirs.move_on()
                mine.move_on()
    return SolveResult(mine.images, patches, prefix)


def phi_of(tower: Tower, index: int) -> Phi:
    """The Φ of a skipped block."""
    return tower.blocks[index].phi  # type: ignore[return-value]


def images_needed(model: nn.Module) -> int:
    """The fewest images that `solve` can work with at a model's configured size: more rows than unknowns in a fit."""
    tower = Tower.of(model)
    return max(_images_needed(tower, index) for index in tower.skip)


def _images_needed(tower: Tower, index: int) -> int:
    """The fewest that the fit of one Φ can work with."""
    phi, width, prefix = phi_of(tower, index), tower.width_of(index), tower.num_special_tokens
    of_prefix = 2 * width // prefix if prefix and not phi.attends else 0
    return max(phi.num_inputs * width // tower.patches_in(index), of_prefix) + 1


def check_enough(images: int, model: nn.Module) -> None:
    """Check that there are images enough to solve a model's Φ.

    Raises:
        ValueError: There are not; with the count needed.
    """
    needed = images_needed(model)
    if images < needed:
        tower = Tower.of(model)
        width = tower.width_of(max(tower.skip, key=lambda index: _images_needed(tower, index)))
        raise ValueError(
            f"{images} images are too few to solve Φ of width {width}: give at least {needed}, better several times "
            "as many"
        )


def solve_block(student: Walk, teacher: Walk, ridge: float = RIDGE) -> tuple[float, float | None]:
    """Fit the Φ of the block that the walks of a cut model and its teacher stand before, and move both past it.

    Returns:
        The errors of the patches, and of the prefix tokens where Φ maps them.
    """
    index, tower = student.index, student.tower
    phi, count = phi_of(tower, index), tower.num_special_in_blocks
    on_patches, on_prefix, spread = Moments(), Moments(), Spread()

    def both() -> Iterator[State]:
        for number in range(len(teacher)):
            with observe(teacher.tower, [index], grid=student.states[number].grid) as seen:
                following = teacher.run(number)
            given, target = phi_arguments(student, number), seen.z[index]
            inputs, base = patch_features(phi, given)
            real = student.states[number].real
            inputs, expected, missing = sampled(number, inputs, target[:, count:], target[:, count:] - base, real=real)
            spread.add(expected)
            on_patches.add(inputs, missing)
            if count and not phi.attends:
                features = prefix_features(tower.patches_last(given["z"]), count, real)
                on_prefix.add(features, target[:, :count].flatten(0, 1))
            yield following

    teacher.move_on(both())
    share = float(on_patches.target.variance / spread.variance)  # what the clusters leave to be mapped
    patches = share * _solve_patches(phi, on_patches, ridge)
    prefix = _solve_prefix(phi, on_prefix, ridge) if on_prefix.target.count else None
    torch.clear_autocast_cache()  # inside autocast, the weights just written would stay hidden behind old casts
    student.move_on()
    return patches, prefix


def phi_arguments(student: Walk, number: int) -> dict[str, Any]:
    """What Φ of the walk's block is given on a batch, by name; the block runs no further."""
    phi, names = phi_of(student.tower, student.index), ("z", "grid")
    given: dict[str, Any] = {}

    def see(module: nn.Module, args: Any, kwargs: Any) -> None:
        given.update(zip(names, args, strict=True), **kwargs)
        raise Seen

    hook = phi.register_forward_pre_hook(see, with_kwargs=True)
    try:
        student.run(number)
    except Seen:
        pass
    finally:
        hook.remove()
    return given


def patch_features(phi: Phi, given: dict[str, Any]) -> tuple[Tensor, Tensor | float]:
    """What Φ maps to the Z of patches, (B, H·W, k·D), and what it adds that to: their clusters' Z, or nothing."""
    clustered = given.get("clustered")
    inputs = phi.patch_inputs(given["grid"], given["z"], given.get("x"), clustered)
    return inputs, 0.0 if clustered is None else clustered.patches()


def prefix_features(z: Tensor, num_prefix_tokens: int, real: Tensor | None = None) -> Tensor:
    """[own Z, mean patch Z] of every prefix token, (B·P, 2D)."""
    prefix, patches = z[:, :num_prefix_tokens], z[:, num_prefix_tokens:]
    mean = mean_of(patches, real).expand_as(prefix)
    return torch.cat([prefix, mean], dim=-1).flatten(0, 1)


def _solve_patches(phi: Phi, moments: Moments, ridge: float) -> float:
    """Write the best affine map of Φ's rank into Φ; returns its error.

    Reduced-rank regression: of the full regression's output, keep the directions with the most variance. Each becomes a
    hidden unit of zero mean and unit scale.
    """
    full = moments.ridge_regression(ridge)
    variances, directions = torch.linalg.eigh(full @ moments.damped(ridge) @ full.T)
    order = variances.argsort(descending=True)[: phi.expand.out_features]
    order = order[variances[order] > 1e-12 * variances.max()]
    scale, basis = variances[order].sqrt(), directions[:, order]
    encode, decode = (basis.T @ full) / scale[:, None], basis * scale
    # decode @ (encode @ inputs + shift) + bias, with shift = -encode @ mean, so that the constant is the target's mean.
    phi.set_patch_map(encode, decode, moments.target.mean, shift=-encode @ moments.mean_x)
    return moments.error(decode @ encode)


def _solve_prefix(phi: Phi, moments: Moments, ridge: float) -> float:
    """Write the best map of [own Z, mean patch Z] into Φ; a Φ that passes prefix tokens through keeps doing so."""
    if phi.mix is None:
        eye = torch.eye(moments.target.mean.shape[0], dtype=moments.x.dtype, device=moments.x.device)
        return moments.error(torch.cat([eye, torch.zeros_like(eye)], dim=1))
    weight = moments.ridge_regression(ridge)
    phi.set_prefix_map(weight, moments.bias(weight))
    return moments.error(weight)
