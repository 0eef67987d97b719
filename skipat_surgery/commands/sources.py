"""The model and the images that a command is given."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Subset

from . import digits, images, loading
from .loading import LoadedModel


def load_model(name: str, accelerator: Accelerator, output: Path) -> LoadedModel:
    """The model to convert; the demonstration's teacher is trained by the main process, and kept for the others.

    Args:
        name: As `loading.load` takes it, or ``digits``.
        accelerator: Of the run.
        output: Where the demonstration's teacher is kept.
    """
    if name != digits.NAME:
        return loading.load(name)
    saved = output / "teacher"
    if accelerator.is_main_process and not saved.exists():
        host = digits.train_teacher()
        host.save(host.model, output / "teacher.unfinished")
        (output / "teacher.unfinished").rename(saved)
    accelerator.wait_for_everyone()
    return loading.load(str(saved))


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
