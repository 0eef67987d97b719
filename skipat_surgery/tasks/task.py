"""The one interface of all tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .colours import class_colours

Head = Mapping[str, Tensor]


class Task(ABC):
    """What a model's head gives, how two heads' outputs are compared, and which figures tell how alike they are.

    `read` takes a model's output apart; all other methods are given what two models gave for the same images, the cut
    one's and the untouched one's, in float32, with the images first: (B, …).
    """

    name: ClassVar[str]
    term: ClassVar[str] = "head"  # of the loss, whose weight it is given
    sums: ClassVar[tuple[str, ...]] = ()  # of the figures, those that are added up over the images for `of_sums`
    by_label: ClassVar[tuple[str, ...]] = ()  # what `against_labels` measures; nothing where no label tells
    shown: ClassVar[str] = ""  # what `picture` is of
    labelled_by: ClassVar[str | None] = None  # "class" for one number an image, "map" for one a pixel, "objects"

    def called(self, model: nn.Module) -> nn.Module:
        """What of a model, which may be wrapped, is called with images (B, C, H, W), and gives what `read` takes."""
        return model

    @abstractmethod
    def read(self, output: Any) -> dict[str, Tensor]:
        """The tensors of a model's output that are compared, (B, …) by name."""

    @abstractmethod
    def distance(self, found: Head, expected: Head, temperature: float = 1.0) -> Tensor:
        """How far apart two outputs are, for each image (B,): a term of the loss, 0 where they are the same."""

    @abstractmethod
    def figures(self, found: Head, expected: Head) -> dict[str, Tensor]:
        """What is measured, for each image: (B,), or (B, …) for a name in `sums`."""

    def of_sums(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The figures that come of sums over all images, by name; none where there is nothing to divide by."""
        return {}

    def against_labels(self, head: Head, labels: Any) -> tuple[dict[str, Tensor], Tensor]:
        """What is measured of one model against labels, by the names in `by_label`, (B, …), and who has one (B,).

        Args:
            head: What the model gave.
            labels: Those of the batch: of each image a class, or a map, or its objects, or that there is none.

        Raises:
            ValueError: The labels are not of that kind.
        """
        raise NotImplementedError(f"{self.name} is not measured by labels")

    def of_labels(self, columns: Mapping[str, Tensor]) -> dict[str, float]:
        """The figures from what `against_labels` measured of all images that have a label: the means, by name."""
        return {name: float(values.double().mean()) for name, values in columns.items()}

    def picture(self, head: Head, teacher: Head, image: Tensor) -> Tensor | None:
        """What a model gives for one image, to be seen: colours (H, W, 3) from 0 to 1; None where it is no picture.

        Args:
            head: What the model gave, (1, …) by name.
            teacher: What the untouched model gave for the same image.
            image: The image itself (H, W, 3), from 0 to 1.
        """
        return None

    def classes_seen(self, head: Head) -> list[int]:
        """The classes in that picture, those that are seen most first."""
        return []

    def colour_of(self, number: int) -> Tensor:
        """The colour (3,) of a class in that picture, from 0 to 1."""
        return class_colours(torch.tensor(number))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))


def same_shapes(found: Head, expected: Head) -> bool:
    """Whether two outputs hold the same tensors, by name and shape."""
    return {name: part.shape for name, part in found.items()} == {name: part.shape for name, part in expected.items()}
