"""Pictures as a model takes them, but whole: boxes and masks belong to all of a picture, and a crop would cut them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import PIL.Image
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from ..batches import values_of
from .loading import LoadedModel


class WholeImages:
    """Resizes pictures to one size, whatever their shape, with the channels' scale of a model's own preprocessing.

    That scale is found from what the preprocessing makes of a black and of a white picture.

    Args:
        host: The model.
        side: Pixels a side; what its preprocessing makes when left out.
        resample: Pillow's filter.

    Raises:
        ValueError: The model takes each image at its own size.
    """

    def __init__(
        self, host: LoadedModel, side: int | None = None, resample: int = PIL.Image.Resampling.BICUBIC
    ) -> None:
        self.mode, self.resample = host.image_mode, PIL.Image.Resampling(resample)
        if host.takes_any_size:
            raise ValueError(
                f"{type(host.model).__name__} takes each image at its own size, as patches, so that pictures cannot be "
                "resized to one size for it here: use a model that takes images of one size, such as SigLIP or DINOv2"
            )
        blank = [PIL.Image.new(self.mode, host.image_size[::-1], colour) for colour in ("black", "white")]
        made = values_of(host.preprocess(blank))
        self.size = tuple(made.shape[-2:]) if side is None else (side, side)
        self.black, self.white = made[:, :, :1, :1]

    def __call__(self, pictures: Sequence[PIL.Image.Image]) -> Tensor:
        """(B, C, H, W) of pictures in the mode of the model."""
        height, width = self.size
        resized = [picture.resize((width, height), self.resample) for picture in pictures]
        shares = torch.stack([TF.pil_to_tensor(picture) for picture in resized]) / 255
        return self.black + (self.white - self.black) * shares


def seen_whole(host: LoadedModel) -> LoadedModel:
    """A model that gives maps or objects, with pictures resized to the model's own size, and nothing cropped."""
    if host.task is None or host.task.labelled_by not in ("map", "objects"):
        return host
    resample = getattr(host.processor, "resample", None)
    return replace(
        host, preprocess=WholeImages(host, resample=PIL.Image.Resampling.BICUBIC if resample is None else resample)
    )
