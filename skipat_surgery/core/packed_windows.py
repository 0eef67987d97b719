"""Images packed window by window, as in Qwen2.5-VL, most of whose blocks attend within windows of an image.

All blocks see the patches in one order: an image's windows follow one another, and the patches of a window lie there as
those of an image do elsewhere. So Z_l, the output of the MSA of block l whatever its windows, is laid out image by
image for Φ, and in a block that attends within windows what is kept of its MSA runs on these side by side.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from .packed import Packed


def in_windows(sizes: Tensor, merge: int, side: int) -> Packed:
    """The layout of images whose patches lie window by window, in each window `merge`×`merge` patches together.

    Args:
        sizes: (B, 2), rows and columns of each image.
        merge: Side of what is merged later.
        side: Of a window, in patches; those at the lower and right edges may be smaller.
    """
    images, corners, shapes = [], [], []
    for number, (height, width) in enumerate(sizes.tolist()):
        for top, left in product(range(0, height, side), range(0, width, side)):
            images.append(number)
            corners.append((top, left))
            shapes.append((min(side, height - top), min(side, width - left)))
    image, corner = (torch.tensor(found, device=sizes.device) for found in (images, corners))
    windows = Packed.of(torch.tensor(shapes, device=sizes.device), merge)
    (row, column), length = windows.at(), int(sizes.prod(dim=1).max())
    place = image[:, None] * length + (corner[:, :1] + row) * sizes[image, 1:] + corner[:, 1:] + column
    back = place.flatten()[windows.back]
    every = torch.arange(len(back), device=sizes.device)
    places = every.new_zeros(len(sizes) * length).scatter(0, back, every).view(-1, length)
    return Packed(sizes, length, places, back, windows)
