"""The strip of a page: both models in the teacher's colours, and images as the models see them."""

from __future__ import annotations

import copy

import numpy as np
import PIL.Image
import pytest
import small_models as make
import torch
from cases import Case, case_named
from figures import picture
from models import cut_of
from torch import nn
from transformers import ViTImageProcessor

from skipat_surgery.analysis.token_colours import TokenColours
from skipat_surgery.commands import loading
from skipat_surgery.commands.loading import LoadedModel
from skipat_surgery.commands.strip import Shown, as_seen, strip
from skipat_surgery.tasks.colours import class_colours
from skipat_surgery.tasks.detection import Detection
from skipat_surgery.tower import Tower


def reference(tokens: np.ndarray, fitted_on: np.ndarray) -> np.ndarray:
    """The colours of tokens (M, D), by the plain singular value decomposition of others (N, D)."""
    mean = fitted_on.mean(axis=0)
    directions = np.linalg.svd(fitted_on - mean, full_matrices=False)[2][:3]
    directions *= np.sign([row[np.abs(row).argmax()] for row in directions])[:, None]
    low, high = np.quantile((fitted_on - mean) @ directions.T, [0.01, 0.99], axis=0)
    return np.clip(((tokens - mean) @ directions.T - low) / (high - low), 0, 1)


def test_colours_are_the_first_principal_components():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 50, 12, generator=generator, dtype=torch.float64) * torch.linspace(3, 1, 12) + 5
    others = torch.randn(2, 7, 12, generator=generator, dtype=torch.float64)
    colours = TokenColours.fit(tokens)
    for each in (tokens, others):
        expected = reference(each.flatten(0, 1).numpy(), tokens.flatten(0, 1).numpy())
        np.testing.assert_allclose(colours(each).flatten(0, 1).numpy(), expected, atol=1e-10)
    same = torch.ones(2, 5, 4)
    assert bool(TokenColours.fit(same)(same).isfinite().all())
    with pytest.raises(ValueError, match="at least 3 entries, got 2"):
        TokenColours.fit(torch.randn(4, 2))


class Items(list):
    """(image, label) pairs in the place of a data set."""


def host_of(case: Case) -> LoadedModel:
    model = case.model().float()
    if case.is_timm:
        return loading.from_timm(model)
    height, width = case.size
    return loading.from_transformers(model, ViTImageProcessor(size={"height": height, "width": width}))


def patches(model: torch.nn.Module, pixels: torch.Tensor, case: Case) -> torch.Tensor:
    """The final patch tokens, by a hook of one's own."""
    kept, tower = [], Tower.of(model)
    handle = tower.last_module().register_forward_hook(
        lambda module, args, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        tower.module(pixels)
    handle.remove()
    return kept[0][:, case.prefix : kept[0].shape[1] - case.suffix].double()


@pytest.mark.parametrize("name", ["ViTForImageClassification", "YolosForObjectDetection", "CLIPModel", "timm vit"])
def test_the_strip_shows_both_models_in_the_teachers_colours(name):
    case = case_named(name)
    host = host_of(case)
    cut = cut_of(copy.deepcopy(host.model))
    items = Items([(picture(side), -1) for side in (32, 40)] + [(None, -1)])
    shown = strip(host, cut, items, 3)
    pixels = torch.cat([host.preprocess([image]) for image, _ in items if image is not None])
    expected, found = (patches(model, pixels, case) for model in (host.model, cut))
    order = [0, 1] if np.array_equal(shown[0].picture, as_seen(host, items[0][0])) else [1, 0]
    assert len(shown) == 2
    for index, image in zip(order, shown, strict=True):
        for tokens, made in ((expected, image.untouched), (found, image.cut)):
            colours = reference(tokens[index].numpy(), expected.flatten(0, 1).numpy())
            colours = (255 * colours).reshape(*case.grid(pixels), 3)
            np.testing.assert_allclose(np.asarray(made.colours, dtype=float), colours, atol=0.6)
        cosine = torch.nn.functional.cosine_similarity(expected[index], found[index], dim=-1).mean()
        assert image.cosine == pytest.approx(float(cosine), abs=1e-5)


def voc(number: int) -> list[int]:
    """The colour of a class, by the lines of VOC's development kit."""
    colour, left = [0, 0, 0], number
    for bit in range(8):
        for channel in range(3):
            colour[channel] |= (left >> channel & 1) << 7 - bit
        left >>= 3
    return colour


def test_colours_of_classes_are_those_of_voc():
    assert [voc(number) for number in (1, 2, 15)] == [[128, 0, 0], [0, 128, 0], [192, 128, 128]]
    found = (255 * class_colours(torch.arange(256))).round().int()
    assert found.tolist() == [voc(number) for number in range(256)]


def shown_of(name: str) -> tuple[LoadedModel, nn.Module, Shown, torch.Tensor]:
    """A host, what was cut of it, what is shown of one image, and its pixels."""
    host = host_of(case_named(name))
    cut = cut_of(copy.deepcopy(host.model))
    (shown,) = strip(host, cut, Items([(picture(32), -1)]), 1)
    return host, cut, shown, host.preprocess([picture(32)])


@torch.no_grad()
def test_class_maps_are_shown_with_a_legend():
    host, cut, shown, pixels = shown_of("BeitForSemanticSegmentation")
    seen = set()
    for model, made in ((host.model, shown.untouched), (cut.float(), shown.cut)):
        classes = model(pixels).logits[0].argmax(dim=0)
        expected = np.array([[voc(number) for number in row] for row in classes.tolist()])
        np.testing.assert_array_equal(np.asarray(made.head), expected)
        seen |= set(classes.flatten().tolist())
    names = host.model.config.id2label
    assert dict(shown.legend) == {names[number]: bytes(voc(number)).hex() for number in seen}


@torch.no_grad()
def test_depth_maps_are_shown_in_the_teachers_range():
    host, cut, shown, pixels = shown_of("DPTForDepthEstimation")
    mine, theirs = (model(pixels).predicted_depth[0].numpy() for model in (cut.float(), host.model))
    grey = (mine - theirs.min()) / (theirs.max() - theirs.min())
    expected = np.repeat(255 * grey.clip(0, 1)[..., None], 3, axis=-1)
    np.testing.assert_allclose(np.asarray(shown.cut.head, dtype=float), expected, atol=0.6)
    assert (np.asarray(shown.untouched.head).min(), np.asarray(shown.untouched.head).max()) == (0, 255)
    assert shown.legend == ()


def test_boxes_are_drawn_over_the_image():
    """Only of what is an object, in the colour of its class, at its place."""
    image = torch.full((40, 60, 3), 0.5)
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.1, 0.1]]])
    head = {"logits": torch.tensor([[[0.0, 9, 0], [0, 0, 9]]]), "boxes": boxes}
    drawn = (255 * Detection().picture(head, head, image)).round().int()
    inside = (drawn == torch.tensor(voc(2))).all(dim=-1).nonzero()
    assert inside.min(dim=0).values.tolist() == pytest.approx([10, 15], abs=1)
    assert inside.max(dim=0).values.tolist() == pytest.approx([30, 45], abs=1)
    assert bool((drawn[:9, :14] == 128).all())
    assert (drawn[20, 30] == 128).all()
    assert Detection().classes_seen(head) == [1]
    nothing = {"logits": torch.tensor([[[0.0, 0, 9]]]), "boxes": boxes[:, :1]}
    torch.testing.assert_close(Detection().picture(nothing, nothing, image), image, atol=1 / 255, rtol=0)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "timm vit"])
def test_an_untouched_model_looks_like_the_teacher(name):
    host = host_of(case_named(name))
    items = Items((picture(side), side % 5) for side in range(30, 40))
    for image in strip(host, copy.deepcopy(host.model), items, 8):
        assert np.array_equal(image.cut.colours, image.untouched.colours)
        assert image.cut.classes == image.untouched.classes
        assert image.cosine == pytest.approx(1, abs=1e-6)
        pixels = host.preprocess(
            [next(each for each, _ in items if np.array_equal(as_seen(host, each), image.picture))]
        )
        with torch.no_grad():
            output = host.model(pixels)
        shares = (output if case_named(name).is_timm else output.logits).softmax(dim=-1)[0]
        first = shares.argsort(descending=True)[:3]
        assert [value for _, value in image.cut.classes] == pytest.approx(shares[first].tolist(), abs=1e-6)
        assert [given for given, _ in image.cut.classes] == [f"class {number}" for number in first.tolist()]


def test_an_image_is_shown_as_the_model_sees_it():
    given = picture(32)
    host = host_of(case_named("ViTForImageClassification"))
    assert np.array_equal(as_seen(host, given), given)
    build = make.timm_model("vit_tiny_patch16_224", pretrained_cfg_overlay={"crop_pct": 1.0, "mean": (0.1, 0.5, 0.7)})
    assert np.array_equal(as_seen(loading.from_timm(build()), given), given)
    grey = LoadedModel(host.model, lambda images: torch.stack([to_tensor(image) for image in images]), "L")
    assert np.array_equal(as_seen(grey, given.convert("L")), given.convert("L"))


def to_tensor(image: PIL.Image.Image) -> torch.Tensor:
    """Greys from 3 down to -1, with padding of zeros on one side."""
    values = 3 - torch.from_numpy(np.array(image, dtype=np.float32)) / 63.75
    return values[None]
