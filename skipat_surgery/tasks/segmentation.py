"""Semantic segmentation: a class for each pixel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .classification import binary_divergence, class_divergence
from .colours import class_colours
from .labels import NO_LABEL, map_by_map
from .task import Head, Task

AT_ONCE = 16  # classes that are brought to the size of a mask at once, as all of them may not fit the memory


class Segmentation(Task):
    """Logits (B, classes, H, W): KL divergence for each pixel, pixels and regions put in the same class.

    With one class alone, a pixel belongs to it where its logit is above 0. Labels are masks at their own size: the
    logits are brought to that bilinearly, as transformers' ``post_process_semantic_segmentation`` does.
    """

    name, shown = "semantic segmentation", "classes"
    sums = ("intersection", "union")
    by_label, labelled_by = ("label_intersection", "label_union"), "map"

    def read(self, output: Any) -> dict[str, Tensor]:
        """``logits`` (B, classes, H, W)."""
        return {"logits": output.logits}

    def distance(self, found: Head, expected: Head, temperature: float = 1.0) -> Tensor:
        """KL divergence of the class distribution from the teacher's, averaged over the pixels."""
        mine, theirs = found["logits"], expected["logits"]
        if mine.shape[1] == 1:
            return binary_divergence(mine, theirs).mean(dim=(1, 2, 3))
        return class_divergence(mine, theirs, temperature, dim=1).mean(dim=(1, 2))

    def figures(self, found: Head, expected: Head) -> dict[str, Tensor]:
        """``agreement`` of pixels; intersections and unions (B, classes) with the teacher's regions."""
        mine, theirs = classes_of(found["logits"]), classes_of(expected["logits"])
        count = max(found["logits"].shape[1], 2)
        intersection, union = overlaps(mine, theirs, count)
        agreement = (mine == theirs).float().mean(dim=(1, 2))
        return {"agreement": agreement, "intersection": intersection, "union": union}

    def of_sums(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """``miou``: the mean over the classes of intersection over union, of those that either model sees."""
        return {"miou": mean_iou(sums["intersection"], sums["union"])}

    def picture(self, head: Head, teacher: Head, image: Tensor) -> Tensor | None:
        """The class of each pixel, in its colour."""
        return class_colours(classes_of(head["logits"])[0])

    def classes_seen(self, head: Head) -> list[int]:
        """The classes, by how many pixels are of each."""
        found, counts = classes_of(head["logits"]).unique(return_counts=True)
        return found[counts.argsort(descending=True)].tolist()

    def against_labels(self, head: Head, labels: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Intersections and unions (B, classes) with masks of classes, which hold NO_LABEL where a pixel has none."""
        logits = head["logits"]
        count = max(logits.shape[1], 2)

        def measure(given: Tensor, mask: Tensor) -> Tensor | None:
            _check_mask(mask, count)
            found = classes_at(given, (mask.shape[0], mask.shape[1]))
            return torch.cat(overlaps(found[None], mask[None], count, NO_LABEL), dim=1)[0] if _any(mask) else None

        rows, labelled = map_by_map(measure, logits, labels, 2 * count)
        return dict(zip(self.by_label, rows.split(count, dim=1), strict=True)), labelled

    def of_labels(self, columns: Mapping[str, Tensor]) -> dict[str, float]:
        """``label_miou``: the mean over the classes of intersection over union, all images taken together."""
        intersection, union = (columns[name].double().sum(dim=0) for name in self.by_label)
        return {"label_miou": mean_iou(intersection, union)}


def classes_of(logits: Tensor) -> Tensor:
    """The class of each pixel (B, H, W) from logits (B, classes, H, W)."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(dim=1)


def classes_at(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The class of each pixel (height, width) of another size, from the logits (classes, H, W) of one image."""
    if len(logits) == 1:
        return classes_of(_resized(logits[None], size))[0]
    tops = [_resized(part[None], size)[0].max(dim=0) for part in logits.split(AT_ONCE)]
    first = torch.stack([values for values, _ in tops]).argmax(dim=0, keepdim=True)
    return torch.stack([own + AT_ONCE * part for part, (_, own) in enumerate(tops)]).gather(0, first)[0]


def _resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size, mode="bilinear")


def overlaps(found: Tensor, expected: Tensor, num_classes: int, ignored: int | None = None) -> tuple[Tensor, Tensor]:
    """Intersections and unions in pixels, (B, num_classes) each.

    Args:
        found: Classes (B, H, W).
        expected: Classes (B, H, W).
        num_classes: How many there are.
        ignored: Pixels that are expected to be of this class do not count.
    """
    from torchmetrics.functional.classification import multiclass_stat_scores  # which takes two seconds to load

    scores = multiclass_stat_scores(
        found,
        expected,
        num_classes,
        average=None,
        multidim_average="samplewise",
        ignore_index=ignored,
        validate_args=False,
    ).double()
    right, wrong, missed = scores[..., 0], scores[..., 1], scores[..., 3]
    return right, right + wrong + missed


def mean_iou(intersection: Tensor, union: Tensor) -> float:
    """Mean intersection over union of the classes (classes,) that there are."""
    seen = union > 0
    return float((intersection[seen] / union[seen]).mean())


def _any(mask: Tensor) -> bool:
    return bool((mask != NO_LABEL).any())


def _check_mask(mask: Tensor, count: int) -> None:
    wrong = mask[(mask < NO_LABEL) | (mask >= count)]
    if len(wrong):
        raise ValueError(
            f"a mask holds the class {int(wrong[0])}, and the model's classes run from 0 to {count - 1}: pixels "
            f"without a class hold {NO_LABEL} here, and --ignore_index names what they hold in a file"
        )
