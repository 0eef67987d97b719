"""The model and the images that a command is given."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader, Subset

from . import digits, images, loading
from .loading import LoadedModel

TEACHER = "teacher"


def load_model(name: str, accelerator: Accelerator, output: Path) -> LoadedModel:
    """The model to convert. The demonstration's teacher is trained by the main process, and nothing is written.

    Args:
        name: As `loading.load` takes it, or ``digits``.
        accelerator: Of the run.
        output: Where `keep_teacher` may have kept the demonstration's teacher.
    """
    if name != digits.NAME:
        return loading.load(name)
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


def load_data(
    name: str,
    num_classes: int | None,
    config_name: str | None = None,
    train_split: str | None = None,
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> images.ImageData:
    """The images, with labels that fit the model's classes; the arguments are those of `images.load_image_data`.

    Raises:
        DataError: The data set cannot be used, or its classes are not the model's.
    """
    source = digits.load_digits() if name == digits.NAME else name
    data = images.load_image_data(source, config_name, train_split, eval_split, image_column, label_column)
    if num_classes and data.num_classes and data.num_classes != num_classes:
        raise images.DataError(
            f"the model has {num_classes} classes and {name} has {data.num_classes}, so top-1 would mean nothing; "
            "nothing was done. Pass --label_column none to distil without labels: agreement and KL are then reported"
        )
    return data


def unlabelled(host: LoadedModel, data: images.ImageData, count: int, batch_size: int, seed: int) -> DataLoader:
    """So many training images, without labels and augmentation, in batches; all of them where there are fewer."""
    items = images.ImageItems(data.train, data.image_column, None, host.image_mode)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))[:count]
    collate = images.ValidOnly(images.Collate(host.preprocess, host.image_mode, host.image_size))
    return DataLoader(Subset(items, order.tolist()), batch_size, collate_fn=collate)
