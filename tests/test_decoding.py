"""Pictures of every mode and range, by value."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest

from skipat_surgery.commands.decoding import converted, decode

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX", "RGBa", "La"]
MODES += ["I;16", "I;16L", "I;16B", "I;16N"]


def read(image: PIL.Image.Image, mode: str = "L", kind: str = "png", **options: object) -> np.ndarray:
    """The picture, written to a file and decoded."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return np.asarray(decode({"bytes": file.getvalue(), "path": None}, mode))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_honoured(orientation):
    """A red corner that must come out at the top left, from wherever the camera's orientation puts it."""
    upright = np.zeros((40, 80), dtype=np.uint8)
    upright[:16, :16] = 255
    turns = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud}
    turns |= {5: np.transpose, 6: np.rot90, 7: lambda x: np.rot90(x, 2).T, 8: lambda x: np.rot90(x, 3)}
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    stored = PIL.Image.fromarray(np.ascontiguousarray(turns[orientation](upright)))
    np.testing.assert_array_equal(read(stored, exif=exif), upright)


def test_a_damaged_orientation_leaves_a_sound_picture():
    file = io.BytesIO()
    PIL.Image.fromarray(RAMP).save(file, "png", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    np.testing.assert_array_equal(np.asarray(decode({"bytes": file.getvalue(), "path": None}, "L")), RAMP)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bits_are_divided_by_256(kind):
    values = 256 * RAMP.astype(np.uint16) + 7
    np.testing.assert_array_equal(read(PIL.Image.fromarray(values), kind=kind), RAMP)
    dark = PIL.Image.fromarray(np.minimum(values, 200))  # whatever its maximum is
    assert read(dark, kind=kind).max() == 0


@pytest.mark.parametrize("scale", [1, 2**8, 2**23])
def test_32_bits_have_the_range_of_their_maximum(scale):
    values = RAMP.astype(np.int32) * scale
    values[0, 0] = -5
    np.testing.assert_array_equal(read(PIL.Image.fromarray(values), kind="tiff"), RAMP)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (RAMP / 255, RAMP),
        (RAMP.astype(float), RAMP),
        (RAMP * 2.0 - 100, np.clip(RAMP * 2.0 - 100, 0, 255)),
        (np.where(RAMP == 3, np.nan, RAMP / 255), np.where(RAMP == 3, 0, RAMP)),
    ],
    ids=["from 0 to 1", "8 bits", "beyond 8 bits", "NaN"],
)
def test_floats_keep_their_range(values, expected):
    found = read(PIL.Image.fromarray(values.astype(np.float32)), kind="tiff")
    np.testing.assert_array_equal(found, expected.astype(np.uint8))


def srgb(lightness: float, a: float, b: float) -> np.ndarray:
    """CIELAB under D50 in sRGB, by the definitions of both."""
    middle = (lightness + 16) / 116
    f = np.array([middle + a / 500, middle, middle - b / 200])
    xyz = np.array([0.9642, 1, 0.8249]) * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    bradford = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    linear = (np.array(bradford) @ xyz).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("colour", [(50, 0, 0), (54, 40, -20), (80, -30, 50), (20, 10, 10)])
def test_lab_becomes_srgb(colour):
    lightness = round(colour[0] * 255 / 100)
    stored = PIL.Image.new("LAB", (2, 2), (lightness, colour[1] + 128, colour[2] + 128))
    expected = srgb(100 * lightness / 255, *colour[1:])
    found = read(stored, "RGB", "tiff")
    np.testing.assert_allclose(found, np.broadcast_to(expected, (2, 2, 3)), atol=1)  # 8 bits, rounded twice
    np.testing.assert_array_equal(read(stored, "L", "tiff"), np.asarray(PIL.Image.fromarray(found).convert("L")))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wanted", ["RGB", "L"])
def test_every_mode_of_pillow_is_converted(mode, wanted):
    found = converted(PIL.Image.new(mode, (4, 3)), wanted)
    assert (found.mode, found.size) == (wanted, (4, 3))


@pytest.mark.parametrize(
    "record",
    [
        None,
        {"bytes": None, "path": None},
        {"bytes": b"", "path": None},
        {"bytes": b"no picture", "path": None},
        {"bytes": None, "path": "/nowhere/at/all.png"},
    ],
)
def test_what_is_no_picture_is_none(record):
    assert decode(record, "RGB") is None


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "gif", "bmp", "webp"])
def test_damaged_pictures_are_none_or_what_can_be_read(kind):
    """Cut short and with bits flipped, at many places: nothing is raised."""
    file = io.BytesIO()
    PIL.Image.fromarray(RAMP).convert("RGB").save(file, kind)
    whole, draw = file.getvalue(), np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole[: draw.integers(1, len(whole) + 1)])
        for place in draw.integers(0, len(damaged), draw.integers(0, 4)):
            damaged[place] ^= 1 << draw.integers(8)
        found = decode({"bytes": bytes(damaged), "path": None}, "RGB")
        assert found is None or found.mode == "RGB"
