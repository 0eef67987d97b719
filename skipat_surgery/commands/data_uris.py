"""Pictures as data URIs, to stand in a page themselves."""

from __future__ import annotations

import base64
import io

import PIL.Image

LARGEST = 320  # pixels a side: two for each that a page has room for


def of_picture(picture: PIL.Image.Image) -> str:
    """A photograph, shrunk where it is large: as JPEG, but as PNG where it has so few pixels that each is seen."""
    if max(picture.size) <= 64:
        return _encoded(picture, "PNG")
    shown = picture.copy()
    shown.thumbnail((LARGEST, LARGEST), PIL.Image.Resampling.LANCZOS)
    return _encoded(shown, "JPEG", quality=82)


def of_colours(picture: PIL.Image.Image) -> str:
    """A map with a pixel for each token, as it is."""
    return _encoded(picture, "PNG", optimize=True)


def _encoded(picture: PIL.Image.Image, kind: str, **options: object) -> str:
    held = io.BytesIO()
    picture.save(held, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(held.getvalue()).decode()}"
