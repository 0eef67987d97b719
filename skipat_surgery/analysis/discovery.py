"""Unsupervised object discovery: how well the last block finds objects that nobody told it of.

- The paper's measure (§4.2): the patches that hold most of A^[CLS], head by head, beside the masks of the objects.
- LOST (Siméoni et al. 2021, arXiv 2109.14279) and TokenCut (Wang et al. 2022, arXiv 2202.11539): one box an image from
  the keys of the last block, beside the boxes of the objects.

Boxes are (x1, y1, x2, y2) as fractions of the image, from its upper left corner, so that an image may be resized to any
shape: that changes no IoU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou

BACKGROUND, VOID = 0, -1  # in a mask; void pixels count for nothing
WHOLE_IMAGE = torch.tensor([0.0, 0.0, 1.0, 1.0])
CENTRED_BOX = torch.tensor([0.15, 0.15, 0.85, 0.85])  # 70 % of each side
FOUND_FROM = 0.5  # the IoU that CorLoc asks for
LOST_PATCHES = 100
TOKENCUT_THRESHOLD, TOKENCUT_EPSILON = 0.2, 1e-5


@dataclass(frozen=True)
class Truth:
    """The objects in an image.

    Args:
        boxes: (n, 4).
        mask: (height, width), the class of each pixel, `BACKGROUND` or `VOID`; None where it is not known.
    """

    boxes: Tensor
    mask: Tensor | None = None


def ndimage() -> Any:
    """scipy's ndimage.

    Raises:
        ImportError: scipy is not installed; with what to install.
    """
    try:
        from scipy import ndimage
    except ImportError as error:
        raise ImportError("object discovery needs scipy: pip install scipy") from error
    return ndimage


def most_of(attention: Tensor, mass: float) -> Tensor:
    """The fewest patches that hold this share of the attention.

    Args:
        attention: (..., H, W), not negative.
        mass: From 0 to 1.

    Returns:
        (..., H, W) of booleans.

    Examples:
        >>> most_of(torch.tensor([[0.5, 0.3], [0.15, 0.05]]), 0.6).int()
        tensor([[1, 1],
                [0, 0]], dtype=torch.int32)
    """
    flat = attention.flatten(-2).double()
    ascending, order = (flat / flat.sum(dim=-1, keepdim=True)).sort(dim=-1)
    kept = ascending.cumsum(dim=-1) > 1 - mass
    return torch.zeros_like(kept).scatter(-1, order, kept).view_as(attention)


def jaccard(regions: Tensor, mask: Tensor) -> Tensor:
    """IoU of each region with the pixels of each class in an image.

    Args:
        regions: (heads, H, W) of booleans, on any grid.
        mask: (height, width), as `Truth` holds it.

    Returns:
        (classes, heads), of the classes that the image shows.
    """
    size = (int(mask.shape[0]), int(mask.shape[1]))
    regions = F.interpolate(regions[None].float(), size=size, mode="nearest-exact")[0].bool() & (mask != VOID)
    classes = mask.unique()
    inside = mask == classes[(classes != BACKGROUND) & (classes != VOID)][:, None, None]
    both, either = (op(inside[:, None], regions).sum(dim=(2, 3)) for op in (torch.logical_and, torch.logical_or))
    return both / either


def lost(keys: Tensor, patches: int = LOST_PATCHES) -> Tensor:
    """The box that LOST finds.

    Two patches are alike where the product of their keys is not negative. An object is thought to be small, so its seed
    is the patch that is like the fewest others. Of the `patches` patches that are like the fewest, those that are like
    the seed join it, and a patch is of the object where its products with these add up to no less than 0. The box is
    around those that hang together with the seed.

    Args:
        keys: (H, W, D).
        patches: How many patches may join the seed; the paper's k.

    Returns:
        (4,).
    """
    flat = keys.flatten(0, 1)
    products = flat @ flat.T
    alike = products >= 0
    degree = alike.sum(dim=1)
    seed = int(degree.argmin())
    few = degree.argsort(stable=True)[:patches]
    joined = few[alike[seed, few]]
    found = products[:, joined].sum(dim=1) >= 0
    return box_around(found.view(keys.shape[:2]), seed)


def tokencut(keys: Tensor) -> Tensor:
    """The box that TokenCut finds: a normalised cut of the graph of patches.

    Two patches whose keys have a cosine of at least 0.2 are tied by 1, others by next to nothing. The second smallest
    solution of (D − E) y = λ D y, split at its mean, is the cut. Its entry of the largest magnitude is of the object,
    and the box is around the patches of that side that hang together with it.

    Args:
        keys: (H, W, D).

    Returns:
        (4,). Where all patches are tied to all, any cut is as good as any other, and this is the whole image.
    """
    flat = F.normalize(keys.flatten(0, 1).double(), dim=1)
    tied = flat @ flat.T >= TOKENCUT_THRESHOLD
    if tied.all():
        return WHOLE_IMAGE
    ties = torch.where(tied, 1.0, TOKENCUT_EPSILON).double()
    root = ties.sum(dim=1).rsqrt()
    # With y = D^-½ u the problem is an ordinary one: (I − D^-½ E D^-½) u = λ u.
    _, vectors = torch.linalg.eigh(torch.eye(len(flat)).to(ties) - root[:, None] * ties * root)
    y = root * vectors[:, 1]
    seed = int(y.abs().argmax())
    side = y > y.mean()
    return box_around((side == side[seed]).view(keys.shape[:2]), seed)


def centred(keys: Tensor) -> Tensor:
    """Keys (H, W, D) without their mean.

    What all keys share adds the same to every score of a row, and the softmax drops it: a model may have any such
    share, and nothing trains it away. LOST and TokenCut compare keys with each other, and see it.
    """
    return keys - keys.mean(dim=(0, 1))


def box_around(found: Tensor, seed: int) -> Tensor:
    """The box (4,) around the part of a region (H, W) that hangs together, side by side, with a patch in it."""
    parts, _ = ndimage().label(found.cpu().numpy())
    own = parts.flat[seed]
    assert own, f"patch {seed} is not in its own region"
    rows, columns = ndimage().find_objects(parts)[own - 1]
    height, width = found.shape
    return torch.tensor([columns.start / width, rows.start / height, columns.stop / width, rows.stop / height])


def localised(box: Tensor, truth: Truth) -> bool:
    """Whether a box (4,) is right as CorLoc counts it: of an IoU of at least 0.5 with any object's."""
    return bool((box_iou(box[None].double(), truth.boxes.double()) >= FOUND_FROM).any())
