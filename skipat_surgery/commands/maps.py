"""Labels that are pictures, a class or a depth for each pixel, read as a model's task takes them; which labels tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..tasks.labels import NO_LABEL
from ..tasks.segmentation import Segmentation
from .classes import names_in_config
from .decoding import numbers_in
from .loading import LoadedModel
from .objects import ObjectLists

IGNORED = 255


@dataclass(frozen=True)
class ClassMaps:
    """Masks: the class of each pixel.

    Args:
        num_classes: The model's.
        ignored: What pixels without a class hold in the file.
        reduced: Whether files count classes from 1 and 0 is none of them, as the ``do_reduce_labels`` of transformers'
            image processors has it.
    """

    num_classes: int
    ignored: int = IGNORED
    reduced: bool = False

    @property
    def how(self) -> str:
        """How they are read, in words."""
        zero = "from 1, 0 being none, as the model's image processor has it" if self.reduced else "from 0"
        return f"a class for each pixel, numbered {zero}; {self.ignored} is ignored"

    def __call__(self, record: Any, image: Any = None) -> Tensor | None:
        """The classes (height, width), NO_LABEL where a pixel has none; None where there is no mask to read."""
        values = numbers_in(record)
        if values is None:
            return None
        values = values.astype(np.int64)
        nothing = (values == self.ignored) | (self.reduced & (values == 0))
        return torch.from_numpy(np.where(nothing, NO_LABEL, values - self.reduced))

    def check(self, mask: Tensor, place: str) -> None:
        """Check that a mask holds the model's classes.

        Raises:
            ValueError: It holds others.
        """
        if int(mask.max()) >= self.num_classes or int(mask.min()) < NO_LABEL:
            raise ValueError(
                f"the masks of {place} hold the class {int(mask.max())}, and the model's run from 0 to "
                f"{self.num_classes - 1}, with {self.ignored} for none: name what is none by --ignore_index, or pass "
                "--label_column none to distil without labels"
            )


@dataclass(frozen=True)
class DepthMaps:
    """Depths: one for each pixel.

    Args:
        scale: What they are divided by.
    """

    scale: float = 1.0

    @property
    def how(self) -> str:
        """How they are read, in words."""
        divided = "" if self.scale == 1 else f", divided by {self.scale:g}"
        return f"a depth for each pixel{divided}; what is not above 0 is ignored"

    def __call__(self, record: Any, image: Any = None) -> Tensor | None:
        """The depths (height, width); None where there is no picture to read."""
        values = numbers_in(record)
        return None if values is None else torch.from_numpy(values.astype(np.float32) / self.scale)

    def check(self, depth: Tensor, place: str) -> None:
        """Check that a picture holds depths.

        Raises:
            ValueError: None is above 0.
        """
        if not bool((depth > 0).any()):
            raise ValueError(f"the depths of {place} hold nothing above 0: pass --label_column none to go without")


Maps = ClassMaps | DepthMaps | ObjectLists


def maps_of(
    host: LoadedModel, ignore_index: int | None = None, depth_scale: float = 1.0, box_format: str = "xywh"
) -> Maps | None:
    """How the labels of a model that gives maps or objects are read; None of any other model.

    Args:
        host: The model.
        ignore_index: What pixels without a class hold; ``semantic_loss_ignore_index`` of the model's configuration, or
            255, when left out.
        depth_scale: What depths are divided by.
        box_format: How boxes are given.
    """
    task: Any = host.task
    if task is not None and task.labelled_by == "objects":
        config: Any = host.model.config
        names = names_in_config(config)
        return ObjectLists(config.num_labels, None if names is None else tuple(names), box_format)
    if task is None or task.labelled_by != "map":
        return None
    if not isinstance(task, Segmentation):
        return DepthMaps(depth_scale)
    config = getattr(host.model, "config", None)
    ignored = getattr(config, "semantic_loss_ignore_index", IGNORED) if ignore_index is None else ignore_index
    reduced = any(getattr(host.processor, name, False) for name in ("do_reduce_labels", "reduce_labels"))
    return ClassMaps(max(getattr(config, "num_labels", 2), 2), ignored, reduced)
