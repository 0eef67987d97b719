"""Pictures as models were trained to see them: upright, with 8 bits a channel, in the mode that is asked for.

- They are turned as their EXIF orientation says.
- Unsigned integers of 16 bits (Pillow's modes ``I;16``) are divided by 256.
- Integers of 32 bits (``I``) have the range that the picture's own maximum shows: 8 bits up to 255, 16 bits up to
  65,535, 31 bits above that. What is negative is black.
- Floats (``F``) are multiplied by 255 where all lie in [0, 1]; else they are taken as 8 bits and clipped. NaN is black.
- CIELAB becomes sRGB by way of ImageCms. Everything else is converted as Pillow does it, by way of RGB where Pillow has
  no direct way; of several frames the first is taken, and transparency is dropped.
"""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
import PIL.Image
from PIL import ImageCms, ImageOps


def decode(record: dict[str, Any] | None, mode: str) -> PIL.Image.Image | None:
    """A picture from its encoded ``bytes``, or from its ``path`` where these are None.

    Args:
        record: As ``datasets.Image(decode=False)`` gives it.
        mode: Pillow's mode to convert to, ``"RGB"`` or ``"L"``.

    Returns:
        The picture; None where it is missing or corrupt.
    """
    try:
        assert record is not None
        source = io.BytesIO(record["bytes"]) if record["bytes"] is not None else record["path"]
        with PIL.Image.open(source) as image:
            image.load()
            return converted(_upright(image), mode)
    except Exception:  # Pillow's readers raise all there is on damaged files, and one picture is not the end of a run
        return None


def numbers_in(record: dict[str, Any] | None) -> np.ndarray | None:
    """The numbers (height, width) of a picture that holds one for each pixel, such as a mask, as they are stored.

    Args:
        record: As ``datasets.Image(decode=False)`` gives it.

    Returns:
        The numbers; None where the picture is missing or corrupt.

    Raises:
        ValueError: It holds several for each pixel.
    """
    if record is None:
        return None
    try:
        with PIL.Image.open(record["path"] if record["bytes"] is None else io.BytesIO(record["bytes"])) as image:
            values, mode = np.array(image), image.mode
    except (OSError, SyntaxError):  # as Pillow's reader of PNG calls a broken chunk
        return None
    if values.ndim != 2:
        raise ValueError(f"labels of pixels must be pictures of one number for each, got one of mode {mode}")
    return values


def converted(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    """A picture of any of Pillow's modes in another, by the rules above.

    Examples:
        >>> converted(PIL.Image.new("I;16", (1, 1), 40_000), "L").getpixel((0, 0))
        156
    """
    if image.mode == "F" or image.mode.startswith("I"):
        image = PIL.Image.fromarray(_eight_bits(np.asarray(image)))
    elif image.mode == "LAB":
        image = ImageCms.applyTransform(image, _lab_to_srgb())  # type: ignore[assignment]
    try:
        return image.convert(mode)
    except ValueError:  # premultiplied alpha goes by way of its plain mode alone
        return image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, "RGB")).convert(mode)


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF beside a sound picture
        return image


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """The values (H, W) of a picture as bytes."""
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, nan=0.0, posinf=255.0, neginf=0.0)
        scale = 255.0 if values.min() >= 0 and values.max() <= 1 else 1.0
        return (scale * values).clip(0, 255).round().astype(np.uint8)
    if values.dtype.itemsize == 2:
        return (values >> 8).astype(np.uint8)
    largest = values.max()
    shift = 0 if largest < 2**8 else 8 if largest < 2**16 else 23
    return (values.clip(min=0) >> shift).astype(np.uint8)


@functools.cache
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(*profiles, inMode="LAB", outMode="RGB")
