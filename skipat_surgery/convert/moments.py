"""Second moments of inputs and targets, and the ridge regression that they hold all of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# The patches of an image that enter a fit, drawn anew for each batch. Neighbours are alike: more would cost time only.
SAMPLED = 64
# A variance this far below the mean one is rounding.
CONSTANT = 1e-12


class Spread:
    """First and second moments of each channel of tokens (n, D), added up in float64."""

    def __init__(self) -> None:
        self.count = 0.0
        self.total: Tensor | Any = 0.0
        self.squares: Tensor | Any = 0.0

    def add(self, tokens: Tensor, weight: float = 1.0) -> None:
        """Add the rows of one batch, each as if it were there `weight` times."""
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        self.count += weight * tokens.shape[0]
        self.total += weight * tokens.sum(dim=0).double()
        self.squares += weight * tokens.square().sum(dim=0).double()

    @property
    def mean(self) -> Tensor:
        """(D,)."""
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        """Of all channels together."""
        return (self.squares / self.count - self.mean.square()).sum()


class Moments:
    """First and second moments of inputs x (n, D_x) and targets y (n, D_y).

    The products of a batch are made in its own precision, float32 at least, and added up in float64.
    """

    def __init__(self) -> None:
        self.target = Spread()
        self.x: Tensor | Any = 0.0
        self.xx: Tensor | Any = 0.0
        self.xy: Tensor | Any = 0.0

    def add(self, x: Tensor, y: Tensor, weight: float = 1.0) -> None:
        """Add the rows of one batch, each as if it were there `weight` times."""
        precision = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        x, y = x.to(precision), y.to(precision)
        self.target.add(y, weight)
        self.x += weight * x.sum(dim=0).double()
        with torch.autocast(x.device.type, enabled=False):
            self.xx += weight * (x.T @ x).double()
            self.xy += weight * (x.T @ y).double()

    @property
    def mean_x(self) -> Tensor:
        """(D_x,)."""
        return self.x / self.target.count

    @property
    def cov_x(self) -> Tensor:
        """(D_x, D_x)."""
        return self.xx / self.target.count - torch.outer(self.mean_x, self.mean_x)

    @property
    def cov_xy(self) -> Tensor:
        """(D_x, D_y)."""
        return self.xy / self.target.count - torch.outer(self.mean_x, self.target.mean)

    def damped(self, ridge: float, alike: bool = True) -> Tensor:
        """The covariance of x with something added to each variance.

        Args:
            ridge: As a fraction.
            alike: Of each variance itself, so that inputs of any scale count alike; else of the mean one, so that what
                hardly varies is hardly fitted.

        Raises:
            ValueError: The inputs do not vary, or are not finite.
        """
        cov = self.cov_x
        variances = cov.diagonal()
        if not bool(variances.mean() > CONSTANT * (self.xx.diagonal() / self.target.count).mean()):
            raise ValueError(
                f"the images leave a fit of {len(variances)} unknowns singular (Z alike, constant or not finite): give "
                f"more that differ, at least {len(variances) + 1} tokens"
            )
        mean = float(variances.mean())
        return cov + ridge * torch.diag(variances.clamp(min=1e-6 * mean) if alike else torch.full_like(variances, mean))

    def ridge_regression(self, ridge: float, alike: bool = True) -> Tensor:
        """The weight (D_y, D_x) of the ridge regression.

        Raises:
            ValueError: The inputs do not span their space, so that many weights fit equally well.
        """
        factor, info = torch.linalg.cholesky_ex(self.damped(ridge, alike))
        if int(info):
            raise ValueError(
                f"the images leave the fit of {factor.shape[0]} unknowns singular: give more that differ, or a larger "
                f"ridge than {ridge:g}"
            )
        return torch.cholesky_solve(self.cov_xy, factor).T

    def bias(self, weight: Tensor) -> Tensor:
        """The bias (D_y,) that goes with a weight."""
        return self.target.mean - weight @ self.mean_x

    def error(self, weight: Tensor) -> float:
        """The squared error of a weight, with its best bias, over the variance of y."""
        variance = self.target.variance
        residual = variance - 2 * (weight * self.cov_xy.T).sum() + ((weight @ self.cov_x) * weight).sum()
        return float(residual / variance)


def sampled(number: int, *tokens: Tensor, real: Tensor | None = None) -> list[Tensor]:
    """The same patches of each (B, N, D), as rows (B·n, D): all of them, or a sample that the batch's number draws.

    Those that are no padding, where `real` (B, N) tells: then of all images together.
    """
    if real is not None:
        kept = _drawn(number, int(real.sum()), len(real) * SAMPLED).to(real.device)
        return [each[real][kept] for each in tokens]
    count = tokens[0].shape[1]
    if count > SAMPLED:
        kept = _drawn(number, count, SAMPLED).to(tokens[0].device)
        return [each[:, kept].flatten(0, 1) for each in tokens]
    return [each.flatten(0, 1) for each in tokens]


def _drawn(number: int, count: int, most: int) -> Tensor:
    """So many of `count` at most, in the order that a number draws."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(number))[:most]
