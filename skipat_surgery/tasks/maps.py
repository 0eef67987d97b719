"""Maps of numbers: depth, and the feature maps of backbones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .colours import greys
from .labels import map_by_map
from .task import Head, Task

WITHIN = 1.25  # the factor that δ1 allows


class Depth(Task):
    """``predicted_depth`` (B, H, W), in whatever unit and up to whatever scale the model gives it.

    The teacher's map is what the cut model is to give, so that its own unit, scale and shift are the right ones. Labels
    are depths, at their own size, to which the map is brought bilinearly. A relative model gives inverse depth up to
    scale and shift (MiDaS, DPT, Depth Anything): these are fitted image by image, by least squares, to the inverse of
    the labels, and no pixel is taken to be farther than the farthest label.

    Args:
        relative: Whether it is, or else gives depth itself in the unit of the labels.
    """

    name, shown = "depth estimation", "map"
    by_label, labelled_by = ("depth_mae", "depth_abs_rel", "depth_delta1"), "map"

    def __init__(self, relative: bool = True) -> None:
        self.relative = relative

    def read(self, output: Any) -> dict[str, Tensor]:
        """``depth`` (B, H, W)."""
        return {"depth": output.predicted_depth}

    def distance(self, found: Head, expected: Head, temperature: float = 1.0) -> Tensor:
        """Squared error over the variance of the teacher's map."""
        return relative_error(found["depth"], expected["depth"])

    def figures(self, found: Head, expected: Head) -> dict[str, Tensor]:
        """``map_correlation``, and ``relative_error``: the mean absolute error over the teacher's mean depth."""
        mine, theirs = found["depth"].flatten(1), expected["depth"].flatten(1)
        error = (mine - theirs).abs().mean(dim=1) / theirs.abs().mean(dim=1).clamp(min=_tiny(theirs))
        return {"map_correlation": _correlation(mine, theirs), "relative_error": error}

    def picture(self, head: Head, teacher: Head, image: Tensor) -> Tensor | None:
        """The map in greys, from the least to the greatest value of the teacher's."""
        return greys(head["depth"][0], float(teacher["depth"].min()), float(teacher["depth"].max()))

    def against_labels(self, head: Head, labels: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Mean absolute error, absolute relative error and δ1, (B,) each; what is not above 0 is no label."""
        rows, labelled = map_by_map(self._errors, head["depth"], labels, len(self.by_label))
        return dict(zip(self.by_label, rows.unbind(dim=1), strict=True)), labelled

    def _errors(self, given: Tensor, labels: Tensor) -> Tensor | None:
        from torchmetrics.functional.regression import mean_absolute_error, mean_absolute_percentage_error

        known = labels.isfinite() & (labels > 0)
        if not bool(known.any()):
            return None
        size = labels.shape[0], labels.shape[1]
        found = F.interpolate(given[None, None], size, mode="bilinear")[0, 0][known].double()
        truth = labels[known].double()
        if self.relative:
            found = 1 / fitted(found, 1 / truth).clamp(min=1 / float(truth.max()))
        within = torch.maximum(found / truth, truth / found.clamp(min=_tiny(found))) < WITHIN
        error, relative = (of(found, truth) for of in (mean_absolute_error, mean_absolute_percentage_error))
        return torch.stack([error, relative, within.double().mean()])


class Features(Task):
    """The feature maps of a backbone, (B, C, H, W) each, or (B, H, W, C) as timm gives some."""

    name = "features"

    def read(self, output: Any) -> dict[str, Tensor]:
        """The maps by their number."""
        maps = output.feature_maps if hasattr(output, "feature_maps") else output
        return {str(number): part for number, part in enumerate(maps)}

    def distance(self, found: Head, expected: Head, temperature: float = 1.0) -> Tensor:
        """Squared error over the variance of the teacher's map, averaged over the maps."""
        return torch.stack([relative_error(found[name], expected[name]) for name in expected]).mean(dim=0)

    def figures(self, found: Head, expected: Head) -> dict[str, Tensor]:
        """``map_correlation``, over all values of a map, averaged over the maps."""
        found_again = [_correlation(found[name].flatten(1), expected[name].flatten(1)) for name in expected]
        return {"map_correlation": torch.stack(found_again).mean(dim=0)}


def fitted(found: Tensor, expected: Tensor) -> Tensor:
    """Values (n,) with the scale and the shift that bring them nearest to others (n,), by least squares."""
    mine, theirs = found - found.mean(), expected - expected.mean()
    scale = (mine * theirs).mean() / mine.square().mean().clamp(min=_tiny(mine))
    return scale * mine + expected.mean()


def relative_error(found: Tensor, expected: Tensor) -> Tensor:
    """Squared error over variance for each image (B,)."""
    mine, theirs = found.flatten(1), expected.flatten(1)
    return (mine - theirs).square().mean(dim=1) / theirs.var(dim=1, correction=0).clamp(min=_tiny(theirs))


def _correlation(found: Tensor, expected: Tensor) -> Tensor:
    """Pearson's correlation (B,) of values (B, n)."""
    mine, theirs = (values - values.mean(dim=1, keepdim=True) for values in (found, expected))
    return F.cosine_similarity(mine, theirs, dim=1)


def _tiny(values: Tensor) -> float:
    return torch.finfo(values.dtype).tiny
