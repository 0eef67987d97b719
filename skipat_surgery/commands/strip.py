"""What an untouched model and a cut one make of a few images: patch tokens as colours, top classes, heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from ..analysis.token_colours import TokenColours
from ..batches import Images, values_of
from ..convert.losses import image_means
from ..core.ragged import Ragged
from ..observing import Outputs, evaluating, outputs_of
from ..tasks.labels import NO_LABEL
from ..tasks.task import Task
from ..tower import Tower
from .classes import names_of
from .images import ImageItems
from .loading import LoadedModel

TOP = 3
LEGEND = 12  # classes, to name


@dataclass(frozen=True)
class Impression:
    """What a model makes of an image.

    Args:
        colours: Its final patch tokens, a pixel each.
        classes: (name, probability) of the first classes; empty for a model without classes.
        head: What its head gives, where that can be seen: class maps, depth, boxes.
    """

    colours: PIL.Image.Image
    classes: tuple[tuple[str, float], ...]
    head: PIL.Image.Image | None = None


@dataclass(frozen=True)
class Shown:
    """One image of the strip.

    Args:
        picture: The image as the models see it, cropped and resized.
        label: The name of its class, where it has one.
        untouched: What the untouched model makes of it.
        cut: What the cut model makes of it, in the same colours.
        cosine: Between the patch tokens of the two, their mean.
        legend: (name, colour) of the classes that the head of one of them shows, those of the untouched one first.
    """

    picture: PIL.Image.Image
    label: str | None
    untouched: Impression
    cut: Impression
    cosine: float
    legend: tuple[tuple[str, str], ...] = ()


def strip(host: LoadedModel, cut: nn.Module, items: ImageItems, count: int, seed: int = 0) -> list[Shown]:
    """Run both models on images drawn at random.

    Args:
        host: The untouched model.
        cut: The same, cut.
        items: The images, of which those that cannot be read are passed over.
        count: How many to show.
        seed: Which images are drawn.
    """
    chosen = _readable(items, count, seed)
    if not chosen:
        return []
    images = [image for image, _ in chosen]
    pixels = host.preprocess(images) if host.takes_any_size else _side_by_side(host, images)
    tower, names = Tower.of(host.model), _class_names(host)
    untouched, made = (_outputs(model, pixels, host.task) for model in (host.model, cut))
    expected, found = (outputs.tokens[:, tower.num_special_tokens :] for outputs in (untouched, made))
    real, grids = untouched.real, _grids(tower, pixels)
    project = TokenColours.fit(expected if real is None else expected[real.cpu()])
    pictures = [as_seen(host, image) for image in images]

    def impressions(outputs: Outputs, patches: Tensor) -> list[Impression]:
        colours_of = zip(project(patches), grids, strict=True)
        maps = [colours[: math.prod(grid)].unflatten(0, grid) for colours, grid in colours_of]
        classes = _top_classes(outputs.logits, names, len(patches))
        heads = _head_pictures(outputs, untouched, pictures)
        each = zip(maps, classes, heads, strict=True)
        return [Impression(_picture(colours), top, head) for colours, top, head in each]

    cosines = image_means(F.cosine_similarity(expected, found, dim=-1), real).tolist()
    both = zip(impressions(untouched, expected), impressions(made, found), strict=True)
    legends = _legends(host.model, untouched, made, len(chosen))
    every = zip(chosen, pictures, both, cosines, legends, strict=True)
    return [
        Shown(picture, names[label] if names and label != NO_LABEL else None, mine, theirs, cosine, legend)
        for (_, label), picture, (mine, theirs), cosine, legend in every
    ]


def _side_by_side(host: LoadedModel, images: Sequence[PIL.Image.Image]) -> Tensor:
    """Images (B, C, H, W) as the model wants them, each on its own."""
    return torch.cat([values_of(host.preprocess([image])) for image in images])


def _grids(tower: Tower, pixels: Images) -> list[tuple[int, ...]]:
    """The patch grid of each image, as the last stage has it."""
    layout = tower.layout(pixels)
    if isinstance(layout, Ragged):
        return [tuple(sides) for sides in layout.sizes.tolist()]
    return [tower.stages[-1].grid(layout)] * len(pixels)


def _head_pictures(
    outputs: Outputs, untouched: Outputs, pictures: Sequence[PIL.Image.Image]
) -> list[PIL.Image.Image | None]:
    """What the head of a model gives for each image, as its task shows it."""
    if outputs.task is None:
        return [None] * len(pictures)
    found = []
    for index, picture in enumerate(pictures):
        image = TF.pil_to_tensor(picture.convert("RGB")).movedim(0, -1) / 255
        colours = outputs.task.picture(_of_one(outputs, index), _of_one(untouched, index), image)
        found.append(None if colours is None else _picture(colours))
    return found


def _legends(model: Any, untouched: Outputs, made: Outputs, images: int) -> list[tuple[tuple[str, str], ...]]:
    """(name, colour) of the classes that the heads show, image by image."""
    task, found = untouched.task, []
    if task is None:
        return [()] * images
    names = getattr(getattr(model, "config", None), "id2label", {})
    for index in range(images):
        heads = [_of_one(outputs, index) for outputs in (untouched, made)]
        seen = dict.fromkeys(kind for head in heads for kind in task.classes_seen(head))
        shades = {kind: (255 * task.colour_of(kind)).round().int().tolist() for kind in list(seen)[:LEGEND]}
        found.append(tuple((names.get(kind, f"class {kind}"), bytes(shade).hex()) for kind, shade in shades.items()))
    return found


def _of_one(outputs: Outputs, index: int) -> dict[str, Tensor]:
    return {name: part[index : index + 1] for name, part in outputs.head.items()}


def as_seen(host: LoadedModel, image: PIL.Image.Image) -> PIL.Image.Image:
    """An image as it enters the model, cropped and resized; one that is taken at its own size as it is.

    What the model's preprocessing makes of black and of white is measured, as each library normalises in its own way.
    """
    if host.takes_any_size:
        return image
    black, white = (PIL.Image.new(host.image_mode, image.size, colour) for colour in ("black", "white"))
    found, least, most = (values_of(host.preprocess([each]))[0] for each in (image, black, white))
    span = most - least
    there = span != 0  # where there is padding, there is no image
    return _picture(torch.where(there, (found - least) / torch.where(there, span, 1), 0).movedim(0, -1))


def _readable(items: ImageItems, count: int, seed: int) -> list[tuple[PIL.Image.Image, Any]]:
    """The first images of a random order that can be read, with their labels."""
    found: list[tuple[PIL.Image.Image, Any]] = []
    for index in torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(found) == count:
            break
        image, label = items[index]
        found += [] if image is None else [(image, label)]
    return found


def _outputs(model: nn.Module, pixels: Images, task: Task | None) -> Outputs:
    """What a model makes of images, on the CPU."""
    with evaluating(model):
        found = outputs_of(model, Tower.of(model), pixels.to(next(model.parameters()).device), task=task)
    return replace(found, tokens=found.tokens.cpu(), head={name: part.cpu() for name, part in found.head.items()})


def _class_names(host: LoadedModel) -> list[str]:
    """The names of the classes, or their numbers; empty for a model without classes."""
    return names_of(host.model) or [f"class {number}" for number in range(host.num_classes or 0)]


def _top_classes(logits: Tensor | None, names: list[str], images: int) -> list[tuple[tuple[str, float], ...]]:
    """(name, probability) of the first classes, image by image."""
    if logits is None:
        return [()] * images
    top = logits.softmax(dim=-1).topk(min(TOP, logits.shape[-1]))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [tuple((names[n], value) for n, value in zip(*pair, strict=True)) for pair in pairs]


def _picture(values: Tensor) -> PIL.Image.Image:
    """A picture of values (H, W, channels) from 0 to 1."""
    rounded = (255 * values.clamp(0, 1)).round().to(torch.uint8).cpu().numpy()
    return PIL.Image.fromarray(rounded.squeeze(-1) if rounded.shape[-1] == 1 else rounded)
