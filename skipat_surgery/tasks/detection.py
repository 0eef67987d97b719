"""Detection by queries: a class and a box for each, as YOLOS gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert
from torchvision.utils import draw_bounding_boxes

from .classification import class_divergence
from .colours import class_colours
from .labels import NO_LABEL
from .task import Head, Task

BOX_WEIGHT = 5.0  # of the boxes beside the classes, as in DETR
OVERLAP = 0.5  # IoU from which two boxes are the same
MOST = 1000  # objects of an image that labels may name; crowds have some hundreds


class Detection(Task):
    """Class logits (B, queries, classes + 1), the last for no object, and boxes (B, queries, 4).

    The queries are the model's own, so that each is compared with the teacher's of the same number.
    """

    name, shown = "object detection", "objects"
    sums = ("found", "overlap", "objects")
    by_label, labelled_by = ("label_found", "label_truth"), "objects"

    def read(self, output: Any) -> dict[str, Tensor]:
        """``logits``, and ``boxes`` as (centre x, centre y, width, height) in shares of the image."""
        return {"logits": output.logits, "boxes": output.pred_boxes}

    def distance(self, found: Head, expected: Head, temperature: float = 1.0) -> Tensor:
        """KL divergence of the classes, and the absolute error of the boxes that the teacher takes for objects."""
        classes = class_divergence(found["logits"], expected["logits"], temperature).mean(dim=-1)
        sure = 1 - expected["logits"].softmax(dim=-1)[..., -1]
        error = (found["boxes"] - expected["boxes"]).abs().sum(dim=-1)
        boxes = (sure * error).sum(dim=-1) / sure.sum(dim=-1).clamp(min=torch.finfo(sure.dtype).tiny)
        return classes + BOX_WEIGHT * boxes

    def figures(self, found: Head, expected: Head) -> dict[str, Tensor]:
        """For each image the teacher's objects, those found again, and how much their boxes overlap."""
        kinds, wanted = found["logits"].argmax(dim=-1), expected["logits"].argmax(dim=-1)
        objects = wanted != expected["logits"].shape[-1] - 1
        overlap = _iou(found["boxes"], expected["boxes"]) * objects
        again = objects & (kinds == wanted) & (overlap >= OVERLAP)
        return {
            "found": again.sum(dim=-1).double(),
            "overlap": overlap.double().sum(dim=-1),
            "objects": objects.sum(dim=-1).double(),
        }

    def picture(self, head: Head, teacher: Head, image: Tensor) -> Tensor | None:
        """The image, with the boxes of its objects in the colours of their classes."""
        kinds, objects = _objects(head)
        drawn = (255 * image).round().to(torch.uint8).movedim(-1, 0)
        sides = torch.tensor([image.shape[1], image.shape[0]] * 2)
        boxes = box_convert(head["boxes"][0][objects], "cxcywh", "xyxy").clamp(0, 1) * (sides - 1)
        if len(boxes):
            colours = [tuple(map(int, 255 * colour)) for colour in class_colours(kinds + 1)]
            drawn = draw_bounding_boxes(drawn, boxes, colors=colours, width=max(1, max(image.shape[:2]) // 150))
        return drawn.movedim(0, -1) / 255

    def classes_seen(self, head: Head) -> list[int]:
        """The classes, by how many objects are of each."""
        found, counts = _objects(head)[0].unique(return_counts=True)
        return found[counts.argsort(descending=True)].tolist()

    def colour_of(self, number: int) -> Tensor:
        """As the boxes are drawn, where no class is black."""
        return class_colours(torch.tensor(number + 1))

    def of_sums(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """``detections``, the share of objects found again, and ``box_iou``; neither where the teacher sees none."""
        objects = float(sums["objects"])
        if not objects:
            return {}
        return {"detections": float(sums["found"]) / objects, "box_iou": float(sums["overlap"]) / objects}

    def against_labels(self, head: Head, labels: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Each query's box, score and class (B, queries, 6), and each object's box and class (B, MOST, 5).

        Boxes are (x1, y1, x2, y2) in shares of the image; where there is no further object the class is NO_LABEL. The
        score and the class are those of transformers' ``post_process_object_detection``.
        """
        count = head["logits"].shape[-1] - 1
        truths = [None if each is None else _truth(each, count) for each in labels]
        if len(truths) != len(head["logits"]):
            raise ValueError(f"labels must be of {len(head['logits'])} images, got {len(truths)}")
        nothing = torch.full((MOST, 5), float(NO_LABEL))
        truth = torch.stack([nothing if each is None else each for each in truths]).to(head["logits"])
        scores, kinds = head["logits"].softmax(dim=-1)[..., :-1].max(dim=-1)
        corners = box_convert(head["boxes"], "cxcywh", "xyxy")
        found = torch.cat([corners, scores[..., None], kinds[..., None].to(scores)], dim=-1)
        labelled = torch.tensor([each is not None for each in truths], device=found.device)
        return dict(zip(self.by_label, (found, truth), strict=True)), labelled

    def of_labels(self, columns: Mapping[str, Tensor]) -> dict[str, float]:
        """``label_map``, COCO's mean average precision over IoUs from 0.5 to 0.95, and ``label_map50``, at 0.5.

        By pycocotools; neither where no image has an object.
        """
        found, truth = (columns[name].cpu() for name in self.by_label)
        there = truth[..., 4] != NO_LABEL
        if not bool(there.any()):
            return {}
        try:
            from torchmetrics.detection import MeanAveragePrecision

            metric = MeanAveragePrecision(box_format="xyxy", iou_type="bbox")
        except ImportError as error:
            raise ImportError("mAP needs pycocotools: pip install 'skipat-surgery[detection]'") from error
        for mine, theirs, real in zip(found, truth, there, strict=True):
            given = {"boxes": mine[:, :4], "scores": mine[:, 4], "labels": mine[:, 5].long()}
            metric.update([given], [{"boxes": theirs[real, :4], "labels": theirs[real, 4].long()}])
        measured = metric.compute()
        return {"label_map": float(measured["map"]), "label_map50": float(measured["map_50"])}


def _truth(labels: Mapping[str, Tensor], num_classes: int) -> Tensor:
    """The boxes and classes of one image (MOST, 5).

    Raises:
        ValueError: They are none, too many, or of other classes.
    """
    if not isinstance(labels, Mapping) or not {"class_labels", "boxes"} <= set(labels):
        raise ValueError(f"the labels of an image must be class_labels (n,) and boxes (n, 4), or None, got {labels!r}")
    kinds, boxes = labels["class_labels"], labels["boxes"]
    if boxes.shape != (len(kinds), 4) or len(kinds) > MOST:
        raise ValueError(f"an image must have a box for each class and {MOST} at most, got {tuple(boxes.shape)}")
    if len(kinds) and not 0 <= int(kinds.min()) <= int(kinds.max()) < num_classes:
        raise ValueError(
            f"objects are of classes from {int(kinds.min())} to {int(kinds.max())}, and the model's run from 0 to "
            f"{num_classes - 1}"
        )
    rows = torch.full((MOST, 5), float(NO_LABEL))
    rows[: len(kinds), :4] = box_convert(boxes.float().cpu(), "cxcywh", "xyxy")
    rows[: len(kinds), 4] = kinds.float().cpu()
    return rows


def _objects(head: Head) -> tuple[Tensor, Tensor]:
    """The classes (n,) of the objects of one image, and which queries (queries,) they are of."""
    kinds = head["logits"][0].argmax(dim=-1)
    objects = kinds != head["logits"].shape[-1] - 1
    return kinds[objects], objects


def _iou(found: Tensor, expected: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4), pair by pair."""
    mine, theirs = (box_convert(boxes, "cxcywh", "xyxy") for boxes in (found, expected))
    sides = (torch.minimum(mine, theirs)[..., 2:] - torch.maximum(mine, theirs)[..., :2]).clamp(min=0)
    both = sides.prod(dim=-1)
    either = sum((part[..., 2:] - part[..., :2]).prod(dim=-1) for part in (mine, theirs)) - both
    return both / either.clamp(min=torch.finfo(both.dtype).tiny)
