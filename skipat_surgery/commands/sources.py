"""The model and the images that a command is given."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader

from ..observing import evaluating, outputs_of
from ..tasks.finding import NAMED, give_task, task_named
from ..tower import Tower
from . import digits, images, loading, streaming
from .classes import count_of, names_of
from .data import ImageData, chosen_splits, load_image_data
from .loading import LoadedModel
from .maps import Maps, maps_of
from .texts import parse_texts, zero_shot
from .whole_images import seen_whole

TEACHER = "teacher"


def load_model(
    name: str, accelerator: Accelerator, output: Path, task: str | None = None, texts: str | None = None
) -> LoadedModel:
    """The model to convert, with the task that it is given.

    Args:
        name: As `loading.load` takes it, or ``digits``.
        accelerator: Of the run.
        output: Where `keep_teacher` may have kept the demonstration's teacher.
        task: The name of its task; found from its class when left out.
        texts: A text for each class, of a contrastive model.

    Raises:
        ValueError: The model does not give what the task compares, or takes no texts.
    """
    host = _load(name, accelerator, output)
    if task is not None:
        give_task(host.model, task_named(task))
    if texts is not None:
        give_task(host.model, zero_shot(host, name, parse_texts(texts)))
    host = seen_whole(host)
    if task is not None:
        check_task(host, task)
    return host


def check_task(host: LoadedModel, name: str) -> None:
    """Check that a model gives what its task compares, on a black picture.

    Raises:
        ValueError: It does not.
    """
    if host.task is None:
        return
    black = host.preprocess([PIL.Image.new(host.image_mode, host.image_size[::-1])])
    device = next(host.model.parameters()).device
    try:
        with evaluating(host.model):
            head = outputs_of(host.model, Tower.of(host.model), black.to(device)).head
        fits = host.task.distance(head, head).shape == (1,) and bool(host.task.figures(head, head))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            f"--task {name}: {type(host.model).__name__} does not give what is compared for {host.task.name}: leave it "
            f"out, or name another of {', '.join(NAMED)}"
        )


def _load(name: str, accelerator: Accelerator, output: Path) -> LoadedModel:
    """The model. The demonstration's teacher is trained by the main process, and nothing is written.

    Args:
        name: As `loading.load` takes it, or ``digits``.
        accelerator: Of the run.
        output: Where `keep_teacher` may have kept the demonstration's teacher.

    Raises:
        ValueError: It takes videos.
    """
    if name != digits.NAME:
        loaded = loading.load(name)
        _ = loaded.image_size  # which a model of videos does not have: an error
        return loaded
    saved = output / TEACHER
    if saved.exists():
        return loading.load(str(saved))
    with tempfile.TemporaryDirectory() as folder:
        shared = broadcast_object_list([folder])[0]  # the main process's own
        if accelerator.is_main_process:
            host = digits.train_teacher()
            host.save(host.model, shared)
        accelerator.wait_for_everyone()
        loaded = loading.load(shared)
        accelerator.wait_for_everyone()
    return loaded


def keep_teacher(host: LoadedModel, output: Path) -> None:
    """Keep the demonstration's teacher in the output directory, for a run that is resumed."""
    if not (output / TEACHER).exists():
        host.save(host.model, output / f"{TEACHER}.unfinished")
        (output / f"{TEACHER}.unfinished").rename(output / TEACHER)


def check_tokens(host: LoadedModel, teacher: LoadedModel) -> None:
    """Check that a model without classes can learn from a teacher, token by token.

    Raises:
        ValueError: The tokens of the two are not of one shape.
    """
    if host.num_classes is not None:
        return
    towers = [Tower.of(loaded.model) for loaded in (host, teacher)]
    mine, theirs = (
        f"{tower.family.grid(tower.module)} patches and {tower.num_special_tokens} other tokens of width "
        f"{tower.family.width(tower.module)}"
        for tower in towers
    )
    if mine != theirs:
        raise ValueError(
            f"a model without classes learns from tokens like its own: it has {mine}, the teacher {theirs}"
        )


def load_data(
    name: str,
    num_classes: int | None,
    config_name: str | None = None,
    train_split: str | None = None,
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | None = None,
    maps: Maps | None = None,
) -> ImageData:
    """The images that a command names; the arguments are those of `data.load_image_data`."""
    source = digits.load_digits() if name == digits.NAME else name
    columns = train_split, eval_split, image_column, label_column
    return load_image_data(source, config_name, *columns, num_classes, class_names, maps)


def load_labelled(host: LoadedModel, given: Mapping[str, Any]) -> ImageData:
    """The images that a command names, with the labels that tell of its model, where any do.

    Args:
        host: The model.
        given: The arguments of the command: the data set and how it is read.
    """
    maps = maps_of(host, given.get("ignore_index"), given.get("depth_scale", 1.0), given.get("box_format", "xywh"))
    labels = given["label_column"] if host.task is not None and host.task.labelled_by else "none"
    if given.get("streaming"):
        return load_stream(host, given, maps, labels)
    return load_data(
        given["dataset"],
        count_of(host.model),
        config_name=given["dataset_config"],
        train_split=given["train_split"],
        eval_split=given["eval_split"],
        image_column=given["image_column"],
        label_column=labels,
        class_names=names_of(host.model),
        maps=maps,
    )


def load_stream(host: LoadedModel, given: Mapping[str, Any], maps: Maps | None, labels: str | None) -> ImageData:
    """The images that a command names, of which those to train on are read as they come.

    Args:
        host: The model.
        given: The arguments of the command, and the settings of the training.
        maps: How the labels are read, where they are maps.
        labels: The column of labels.
    """
    name = given["dataset"]
    splits = streaming.open_stream(name, given["dataset_config"])
    chosen = chosen_splits(given["train_split"], given["eval_split"], splits, name)
    kept = max(given["solve_images"], given["refit_images"], given["align_steps"] * given["batch_size"], 1)
    counts = kept, given["eval_images"]
    found, stream = streaming.read_stream(name, splits, chosen, given["image_column"], counts, given["seed"])
    classes = count_of(host.model), names_of(host.model)
    data = load_image_data(found, None, "train", "test", given["image_column"], labels, *classes, maps)
    return replace(data, stream=stream)


def unlabelled(host: LoadedModel, data: ImageData, count: int, batch_size: int, seed: int) -> DataLoader:
    """So many training images, without labels and augmentation, in batches; all of them where there are fewer."""
    items = images.ImageItems(data.train, data.image_column, None, host.image_mode)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))[:count]
    return DataLoader(images.ReadableBatches(items, order.tolist(), batch_size, host.preprocess), batch_size=None)
