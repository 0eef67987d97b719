"""A closed-form start for Φ: ridge regression of the teacher's Z, in seconds and without a gradient.

Where its units stay in GELU's linear range, Φ is an affine map of Z. So is a chain of them, and the second moments of
the Z that starts a run, with the teacher's Z of each block, hold all that the fits of the whole run need: one pass over
the images, whatever their number. Each fit reads the Z that the Φ before it really makes, so that later ones absorb
earlier errors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..core.phi import Phi
from ..observing import evaluating, pixels_of, z_of
from ..result import Result, titled_table
from ..tower import Tower, check_pair

# Added to the diagonal of a covariance, as a fraction of its mean.
RIDGE = 1e-3
# A pivot this far below the largest is rounding.
SINGULAR = 1e-7


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


class Moments:
    """First and second moments, in float64, of inputs x (n, D) and of one target y (n, D) a block."""

    def __init__(self) -> None:
        self.count = 0
        self.x: Tensor | Any = 0.0
        self.xx: Tensor | Any = 0.0
        self.y: dict[int, Tensor | Any] = {}
        self.xy: dict[int, Tensor | Any] = {}
        self.yy: dict[int, Tensor | Any] = {}

    def add(self, x: Tensor, targets: dict[int, Tensor]) -> None:
        """Add the rows of one batch."""
        x = x.double()
        self.count += x.shape[0]
        self.x += x.sum(dim=0)
        self.xx += x.T @ x
        for block, y in targets.items():
            y = y.double()
            self.y[block] = self.y.get(block, 0.0) + y.sum(dim=0)
            self.xy[block] = self.xy.get(block, 0.0) + x.T @ y
            self.yy[block] = self.yy.get(block, 0.0) + y.square().sum(dim=0)

    def through(self, weight: Tensor, bias: Tensor, block: int) -> Fit:
        """The regression of a block's target on ``weight @ x + bias``."""
        mean_x, mean_y = self.x / self.count, self.y[block] / self.count
        cov_x = self.xx / self.count - torch.outer(mean_x, mean_x)
        cov_xy = self.xy[block] / self.count - torch.outer(mean_x, mean_y)
        var_y = (self.yy[block] / self.count - mean_y.square()).sum()
        return Fit(weight @ mean_x + bias, mean_y, weight @ cov_x @ weight.T, weight @ cov_xy, var_y)


@dataclass(frozen=True)
class Fit:
    """What a regression of y on x needs: means, covariances, and the total variance of y."""

    mean_x: Tensor
    mean_y: Tensor
    cov_x: Tensor
    cov_xy: Tensor
    var_y: Tensor

    def damped(self, ridge: float) -> Tensor:
        """The covariance of x with `ridge` times its mean variance on the diagonal."""
        size = self.cov_x.shape[0]
        eye = torch.eye(size, dtype=self.cov_x.dtype, device=self.cov_x.device)
        return self.cov_x + ridge * self.cov_x.trace() / size * eye

    def ridge_regression(self, ridge: float) -> Tensor:
        """The weight (D_y, D_x) of the ridge regression.

        Raises:
            ValueError: The inputs do not span their space, so that many weights fit equally well.
        """
        factor, info = torch.linalg.cholesky_ex(self.damped(ridge))
        pivots = factor.diagonal()
        if int(info) or not bool(pivots.min() > SINGULAR * pivots.max()):
            size = self.cov_x.shape[0]
            raise ValueError(
                f"the images leave the fit of {size} unknowns singular (Z alike, constant or not finite): give at "
                f"least {size + 1} that differ, or a larger ridge than {ridge:g}"
            )
        return torch.cholesky_solve(self.cov_xy, factor).T

    def bias(self, weight: Tensor) -> Tensor:
        """The bias (D_y,) that goes with a weight."""
        return self.mean_y - weight @ self.mean_x

    def error(self, weight: Tensor) -> float:
        """The squared error of a weight, with its best bias, over the variance of y."""
        residual = self.var_y - 2 * (weight * self.cov_xy.T).sum() + ((weight @ self.cov_x) * weight).sum()
        return float(residual / self.var_y)


def solve(
    model: nn.Module, teacher: nn.Module, batches: Iterable[Any], *, ridge: float = RIDGE, progress: bool = True
) -> SolveResult:
    """Fit every Φ of a cut model to its teacher's Z, in place and in closed form (SCIENCE: ridge regression, in order).

    Args:
        model: A cut model.
        teacher: The model it was made from, untouched.
        batches: Image batches (B, C, H, W), ``(images, labels)`` pairs, or mappings with ``pixel_values``. No labels
            are needed. With several runs of skipped blocks they are gone through once a run, so they must allow that: a
            list or a DataLoader.
        ridge: Added to each covariance's diagonal, as a fraction of its mean.
        progress: Whether to show a bar.

    Returns:
        The relative error by block.

    Raises:
        ValueError: The model is not cut, the teacher is, or there are too few images or too much alike; with the count
            needed.

    Example:
        >>> skipat_surgery.solve(student, teacher, [images])  # doctest: +SKIP
        SolveResult(images=512, patches={3: 0.41, …}, prefix={3: 0.12, …})
    """
    student, original = check_pair(model, teacher)
    images, patches, prefix = 0, {}, {}
    with evaluating(model, teacher):
        for run in _chains(student):
            images, moments = collect(student, original, run, batches, progress)
            if images == 0:
                raise ValueError(
                    "batches gave no images; with several runs of skipped blocks they are gone through once a run, so "
                    "pass a list or a DataLoader, not a generator"
                )
            check_enough(images, model)
            errors = solve_run(student, run, *moments, ridge)
            torch.clear_autocast_cache()  # inside autocast, the weights just written would stay hidden behind old casts
            patches.update(errors[0])
            prefix.update(errors[1])
    return SolveResult(images, patches, prefix)


def _chains(tower: Tower) -> list[tuple[int, ...]]:
    """The runs of skipped blocks, parted where a Φ reads the Z of prefix tokens that attended: no map gives that."""
    chains: list[list[int]] = []
    for run in tower.config.runs:
        for index in run:
            if index == run[0] or (phi_of(tower, index - 1).attends and not phi_of(tower, index).attends):
                chains.append([])
            chains[-1].append(index)
    return [tuple(chain) for chain in chains]


def phi_of(tower: Tower, index: int) -> Phi:
    """The Φ of a skipped block."""
    return tower.blocks[index].phi  # type: ignore[return-value]


def collect(
    student: Tower, original: Tower, run: tuple[int, ...], batches: Iterable[Any], progress: bool = False
) -> tuple[int, tuple[Moments, Moments]]:
    """What the fits of a run need, in one pass over the images.

    Args:
        student: Gives the Z before the run. It may be the original, where nothing before the run was cut.
        original: Gives the Z of each block of the run.
        run: Consecutive blocks.
        batches: As `solve` takes them.
        progress: Whether to show a bar.

    Returns:
        The number of images, and the moments of patches and of prefix tokens.
    """
    images, patch_moments, prefix_moments = 0, Moments(), Moments()
    count = student.num_special_tokens
    source = run[0] - 1
    device = next(student.module.parameters()).device
    what = f"Solving blocks {run[0]} to {run[-1]}"
    for batch in tqdm(batches, desc=what, unit="batch", disable=not progress):
        pixels = pixels_of(batch).to(device)
        targets = z_of(original, [source, *run], pixels)
        z = targets.pop(source)
        if student is not original:
            z = z_of(student, [source], pixels)[source]
        images += z.shape[0]
        patch_moments.add(
            z[:, count:].flatten(0, 1), {block: y[:, count:].flatten(0, 1) for block, y in targets.items()}
        )
        if count:
            prefix_moments.add(
                prefix_features(z, count), {block: y[:, :count].flatten(0, 1) for block, y in targets.items()}
            )
    return images, (patch_moments, prefix_moments)


def prefix_features(z: Tensor, num_prefix_tokens: int) -> Tensor:
    """[own Z, mean patch Z] of every prefix token, (B·P, 2D)."""
    prefix, patches = z[:, :num_prefix_tokens], z[:, num_prefix_tokens:]
    mean = patches.mean(dim=1, keepdim=True).expand_as(prefix)
    return torch.cat([prefix, mean], dim=-1).flatten(0, 1)


def images_needed(model: nn.Module) -> int:
    """The fewest images that `solve` can work with at a model's configured size: more rows than unknowns in a fit."""
    tower = Tower.of(model)
    width, prefix = tower.family.width(tower.module), tower.num_special_tokens
    height, columns = tower.family.grid(tower.module)
    prefix = 0 if all(phi_of(tower, index).attends for index in tower.skip) else prefix
    return max(width // (height * columns), 2 * width // prefix if prefix else 0) + 1


def check_enough(images: int, model: nn.Module) -> None:
    """Check that there are images enough to solve a model's Φ.

    Raises:
        ValueError: There are not; with the count needed.
    """
    needed = images_needed(model)
    if images < needed:
        width = Tower.of(model).family.width(Tower.of(model).module)
        raise ValueError(
            f"{images} images are too few to solve Φ of width {width}: give at least {needed}, better several times "
            "as many"
        )


def solve_run(
    tower: Tower, run: tuple[int, ...], patch_moments: Moments, prefix_moments: Moments, ridge: float = RIDGE
) -> tuple[dict[int, float], dict[int, float]]:
    """Solve the Φs of one run in order, from what `collect` gave, and return the errors of patches and prefix tokens.

    The chain so far is kept as an affine map from the run's source: (P, p) for patches, and (G, g) for a prefix token
    and the patch mean together.
    """
    patch_errors: dict[int, float] = {}
    prefix_errors: dict[int, float] = {}
    width = patch_moments.xx.shape[0]
    eye = torch.eye(width, dtype=torch.float64, device=patch_moments.xx.device)
    chain = (eye, eye.new_zeros(width))
    joint = (torch.block_diag(eye, eye), eye.new_zeros(2 * width))
    for index in run:
        phi = phi_of(tower, index)
        weight, bias, patch_errors[index] = _solve_patches(phi, patch_moments.through(*chain, index), ridge)
        chain = (weight @ chain[0], weight @ chain[1] + bias)
        if tower.num_special_tokens and not phi.attends:
            fit = prefix_moments.through(*joint, index)
            own, own_bias, prefix_errors[index] = _solve_prefix(phi, fit, ridge)
            mean = torch.cat([torch.zeros_like(weight), weight], dim=1)
            step, step_bias = torch.cat([own, mean]), torch.cat([own_bias, bias])
            joint = (step @ joint[0], step @ joint[1] + step_bias)
    return patch_errors, prefix_errors


def _solve_patches(phi: Phi, fit: Fit, ridge: float) -> tuple[Tensor, Tensor, float]:
    """Write the best affine map of Φ's rank into Φ; returns its weight, bias and error.

    Reduced-rank regression: of the full regression's output, keep the directions with the most variance. Each becomes a
    hidden unit of zero mean and unit scale.
    """
    full = fit.ridge_regression(ridge)
    variances, directions = torch.linalg.eigh(full @ fit.damped(ridge) @ full.T)
    order = variances.argsort(descending=True)[: phi.expand.out_features]
    order = order[variances[order] > 1e-12 * variances.max()]
    scale, basis = variances[order].sqrt(), directions[:, order]
    encode, decode = (basis.T @ full) / scale[:, None], basis * scale
    weight = decode @ encode
    # decode @ (encode @ z + shift) + bias, with shift = -encode @ mean, so that the constant is the target's mean.
    phi.set_patch_map(encode, decode, fit.mean_y, shift=-encode @ fit.mean_x)
    return weight, fit.bias(weight), fit.error(weight)


def _solve_prefix(phi: Phi, fit: Fit, ridge: float) -> tuple[Tensor, Tensor, float]:
    """Write the best map of [own Z, mean patch Z] into Φ; a Φ that passes prefix tokens through keeps doing so."""
    if phi.mix is None:
        width = fit.mean_y.shape[0]
        eye = torch.eye(width, dtype=fit.cov_x.dtype, device=fit.cov_x.device)
        weight, bias = torch.cat([eye, torch.zeros_like(eye)], dim=1), torch.zeros_like(fit.mean_y)
    else:
        weight = fit.ridge_regression(ridge)
        bias = fit.bias(weight)
        phi.set_prefix_map(weight, bias)
    return weight, bias, fit.error(weight)
