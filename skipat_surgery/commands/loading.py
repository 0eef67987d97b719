"""Loading a model with its own preprocessing, and saving it again, alike for transformers and timm."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
import transformers
from PIL.Image import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from .. import timm_model
from ..batches import Patches, patches_in
from ..convert.finite import check_weights, not_finite
from ..core import modeling
from ..core.auto_classes import PREFIX, loader_of
from ..core.card import model_card, write_card
from ..core.finding import families_of, towers_in
from ..tasks.finding import num_classes_of, task_of
from ..tasks.task import Task
from ..tower import Tower
from .run_state import read_json, write_json

TIMM_PREFIX = "timm/"
Made = TypeVar("Made")


@dataclass(frozen=True)
class LoadedModel:
    """A model and what belongs to it.

    Args:
        model: The model.
        preprocess: Images as the model wants them: a list of PIL images to (B, C, H, W), or to patches where it takes
            each at its own size.
        image_mode: The PIL mode that `preprocess` takes, ``"RGB"`` or ``"L"``.
        processor: transformers' image processor; None for timm, whose configuration the model itself holds.
        base_model: The name that its weights were loaded by, where it is one of the Hub; None where it is not known.
        dtype: What its checkpoint's weights are stored in, and what `save` stores them in.
    """

    model: nn.Module
    preprocess: Callable[[list[Image]], Any]
    image_mode: str
    processor: Any = None
    base_model: str | None = None
    dtype: torch.dtype = torch.float32

    @property
    def num_classes(self) -> int | None:
        """The number of classes of a single-label classifier; None for any other model."""
        return num_classes_of(self.model)

    @property
    def task(self) -> Task | None:
        """What it is for; None where its tokens alone are compared."""
        return task_of(self.model)

    @property
    def loader(self) -> str:
        """The name of the class of transformers that loads a cut model of its kind; empty for timm."""
        return "" if self.processor is None else loader_of(type(self.model))  # type: ignore[arg-type]

    @property
    def compared_by(self) -> str:
        """What a distillation compares of it, and measures."""
        name, task = type(self.model).__name__, self.task
        if task is None:
            return f"{name} has no head that is known: distilled and measured by its tokens"
        return f"{name} is for {task.name}: distilled and measured by that and its tokens"

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images that the model is configured for.

        Raises:
            ValueError: It takes videos, and the commands read images.
        """
        tower = Tower.of(self.model)
        *frames, _, height, width = tower.family.image_size(tower.module)
        if frames:
            raise ValueError(
                f"{type(self.model).__name__} takes videos, and the commands read images: cut it with "
                "skipat_surgery.apply, and pass batches of videos to skipat_surgery.solve and distill"
            )
        return height, width

    @property
    def takes_any_size(self) -> bool:
        """Whether each image has a grid of its own, so that `preprocess` gives patches."""
        return isinstance(self.preprocess, Patched)

    def save(self, model: nn.Module, directory: str | Path) -> None:
        """Write a model of this kind as a standard checkpoint in its dtype, with its preprocessing beside it.

        Raises:
            FloatingPointError: A weight is not finite, or would not be in that dtype; nothing is then written.
        """
        check_weights(model, "lower the learning rates")
        if self.dtype != torch.float32:
            model = copy.deepcopy(model).to(self.dtype)
            check_weights(model, f"{self.dtype} cannot hold them; store the model in float32 and begin with that")
        if self.processor is None:
            timm_model.save(model, directory)
        else:
            model.save_pretrained(directory)  # type: ignore[operator]
            self.processor.save_pretrained(directory)

    def as_saved(self, model: nn.Module) -> nn.Module:
        """A model as its checkpoint gives it back: its weights rounded to the dtype they are stored in, in float32."""
        return model if self.dtype == torch.float32 else copy.deepcopy(model).to(self.dtype).float()


# Classes and no local functions, as these are pickled for the workers of a data loader.
@dataclass(frozen=True)
class Processed:
    """Images as transformers' image processor makes them."""

    processor: Any

    def __call__(self, images: list[Image]) -> Tensor:
        return self.processor(images=images, return_tensors="pt")["pixel_values"]


@dataclass(frozen=True)
class Patched:
    """Images as patches, with the grid of each, as transformers' image processor makes them."""

    processor: Any

    def __call__(self, images: list[Image]) -> Patches:
        patches = patches_in(self.processor(images=images, return_tensors="pt"))
        if patches is None:
            raise ValueError(f"the model takes patches, and {type(self.processor).__name__} gives the grid of no image")
        return patches


@dataclass(frozen=True)
class Transformed:
    """Images as timm's transform makes them."""

    transform: Callable[[Image], Tensor]

    def __call__(self, images: list[Image]) -> Tensor:
        return torch.stack([self.transform(image) for image in images])


def naming_the_model(make: Callable[..., Made]) -> Callable[..., Made]:
    """Have what goes wrong in reading a checkpoint say which it is; what the libraries raise seldom does."""

    @functools.wraps(make)
    def made(name: str, *args: Any, **kwargs: Any) -> Made:
        try:
            return make(name, *args, **kwargs)
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError) as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}, "
            raise ValueError(f"{name} cannot be loaded: {kind}{error}") from error

    return made


@naming_the_model
def load(name: str) -> LoadedModel:
    """Load a model, cut or not, in evaluation mode and in float32, whatever its checkpoint is stored in.

    Args:
        name: A Hugging Face id, a directory that transformers or timm wrote, or ``timm/NAME`` with any name that
            ``timm.create_model`` takes.

    Raises:
        OSError: There is no such model, or no image processor beside it.
        ValueError: A file of it is broken, or holds weights that are not finite.
    """
    loaded = _load_as_stored(name)
    if wrong := not_finite(loaded.model):
        raise ValueError(f"{len(wrong)} of its tensors hold NaN or infinity, the first of them {wrong[0]}")
    return replace(loaded, model=loaded.model.float())


def _load_as_stored(name: str) -> LoadedModel:
    directory = Path(name)
    if name.startswith(TIMM_PREFIX) and not directory.is_dir():
        loaded = from_timm(timm.create_model(name.removeprefix(TIMM_PREFIX), pretrained=True))
        return replace(loaded, base_model=timm_name(loaded.model))
    if timm_wrote(directory):
        loaded = from_timm(timm.create_model(f"local-dir:{directory}", pretrained=True))
        return replace(loaded, dtype=stored_dtype(directory))
    config = AutoConfig.from_pretrained(name)
    model = class_of(config).from_pretrained(name, dtype="auto")
    return replace(from_transformers(model, AutoImageProcessor.from_pretrained(name)), dtype=model.dtype)


def timm_wrote(directory: Path) -> bool:
    """Whether a name is a directory with a checkpoint of timm's; transformers' wrapper of timm writes a model type."""
    file = directory / "config.json"
    return file.is_file() and is_timms(read_json(file))


def is_timms(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is timm's."""
    return "architecture" in config and "model_type" not in config


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype of the weights in a directory that timm wrote; timm itself loads them as float32."""
    file = next(path for pattern in ("*.safetensors", "*.bin") for path in directory.glob(pattern))
    return next(
        weight.dtype for weight in timm.models.load_state_dict(str(file)).values() if weight.is_floating_point()
    )


def timm_name(model: Any) -> str:
    """The id on the Hub of the weights that a timm model was created with."""
    config = model.pretrained_cfg
    tag = f".{config['tag']}" if config.get("tag") else ""
    return config.get("hf_hub_id") or f"{TIMM_PREFIX}{config['architecture']}{tag}"


def class_of(config: Any) -> Any:
    """The class that loads a transformers checkpoint: of a cut model its own, as the stock one would leave it uncut."""
    architecture = (config.architectures or [""])[0]
    if architecture.startswith(PREFIX):
        return getattr(modeling, architecture)
    if "ForImageClassification" in architecture:
        return transformers.AutoModelForImageClassification
    return getattr(transformers, architecture, AutoModel)


@naming_the_model
def build(name: str, image_size: int | None = None) -> nn.Module:
    """Build a model with random weights, in evaluation mode: good for its speed, without its weights at hand.

    Args:
        name: As `load` takes it. Of a Hugging Face id or directory only the configuration is read.
        image_size: Pixels a side; the configured size when left out.
    """
    timms = timm_wrote(Path(name))
    if timms or name.startswith(TIMM_PREFIX):
        size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
        made = f"local-dir:{name}" if timms else name.removeprefix(TIMM_PREFIX)
        return timm.create_model(made, pretrained=False, **size).eval()
    config = AutoConfig.from_pretrained(name)
    if image_size is not None:
        set_image_size(config, image_size)
    builder = class_of(config)
    return (builder.from_config(config) if hasattr(builder, "from_config") else builder(config)).eval()


def set_image_size(config: Any, image_size: int) -> None:
    """Configure a transformers model for images of so many pixels a side."""
    if hasattr(config, "model_args"):  # transformers' wrapper of timm
        config.model_args = {**(config.model_args or {}), "img_size": image_size}
        return
    for inside in ("vision_config", "backbone_config", "sam_config"):  # the last of DeepSeek-OCR 2
        config = getattr(config, inside, None) or config
    for name in ("image_size", "crop_size"):  # V-JEPA 2 has the one, Phi-4 both
        if hasattr(config, name):
            square = isinstance(getattr(config, name), int)
            setattr(config, name, image_size if square else [image_size, image_size])


def from_transformers(model: Any, processor: Any) -> LoadedModel:
    """A transformers model with its image processor."""
    channels = getattr(getattr(model.config, "vision_config", model.config), "num_channels", 3)
    families = [family for _, tower in towers_in(model) for family in families_of(tower)]
    kind = Patched if any(family.takes_ragged for family in families) else Processed
    return LoadedModel(model.eval(), kind(processor), mode_of(channels), processor)


def from_timm(model: nn.Module) -> LoadedModel:
    """A timm model, with the preprocessing of its data configuration."""
    data_config = timm.data.resolve_model_data_config(model)
    tower = Tower.of(model)  # timm goes by the pretrained size, whatever size the model was built for
    data_config["input_size"] = tower.family.image_size(tower.module)
    transform: Any = timm.data.create_transform(**data_config, is_training=False)
    return LoadedModel(model.eval(), Transformed(transform), mode_of(data_config["input_size"][0]))


def mode_of(channels: int) -> str:
    """The PIL mode of pictures with so many channels.

    Raises:
        ValueError: Pictures have no such number.
    """
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise ValueError(f"the model takes images of {channels} channels, and pictures give 1 or 3")
    return modes[channels]


def add_results(directory: str | Path, results: dict[str, Any]) -> None:
    """Record in a saved checkpoint how it was distilled, and write its model card anew.

    Args:
        directory: Where `LoadedModel.save` wrote a cut model.
        results: What the recipe measured, without the course of it.
    """
    config_file = Path(directory) / "config.json"
    config = read_json(config_file)
    skipat = config["model_args"]["skipat"] if is_timms(config) else config["skipat"]
    skipat["results"] = results
    write_json(config_file, config)
    card = Path(directory) / "README.md"
    card.unlink(missing_ok=True)
    write_card(directory, model_card(skipat, results["host"], results["auto_class"]))
