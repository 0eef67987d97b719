"""The cases of `faults.py`: what is given to the recipe in the place of good input, and how it must end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from kills import prepare as good_input
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import SHAPE

Options = dict[str, Any]
SHORT = {"max_steps": 3, "eval_steps": 3, "checkpoint_steps": 1, "warmup_steps": 0, "rate_scale": 1}
SIDE = 32


@dataclass(frozen=True)
class Case:
    """Something that users give.

    Args:
        given: In words.
        expected: ``works``, ``stopped`` or ``refused``.
        prepare: Makes it in a folder, and returns the options that differ from good ones.
        shows: What the line that stands in the table holds; the last line where this is left out.
    """

    given: str
    expected: str
    prepare: Callable[[Path, Options], Options]
    shows: str | None = None


def prepare(folder: Path) -> Options:
    """Good input: a small model, a folder of pictures, and options."""
    words = good_input(folder)
    options: Options = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    return {**options, **SHORT}


def option(**given: Any) -> Callable[[Path, Options], Options]:
    return lambda place, options: given


def yaml_file(text: str) -> Callable[[Path, Options], Options]:
    def write(place: Path, options: Options) -> Options:
        (place / "plan.json").write_text(text)
        return {"plan": place / "plan.json"}

    return write


OPTIONS = [
    Case("an option that there is not", "refused", option(skips="3")),
    Case("`--skip 3-`", "refused", option(skip="3-")),
    Case("`--skip 4-2`", "refused", option(skip="4-2")),
    Case("`--skip 0-2`", "refused", option(skip="0-2")),
    Case("`--skip 5-9` of a model of 6 blocks", "refused", option(skip="5-9")),
    Case("`--preset quick`", "refused", option(preset="quick")),
    Case("`--mixed_precision fp8`", "refused", option(mixed_precision="fp8")),
    Case("`--learning_rate nan`", "refused", option(learning_rate="nan")),
    Case("`--kernel_size 4`", "refused", option(kernel_size=4)),
    Case("`--max_steps -1`", "refused", option(max_steps=-1)),
    Case("`--solve_images 3`", "refused", option(solve_images=3)),
    Case("`--report_to` a tracker that nobody knows", "refused", option(report_to="paper")),
    Case("`--push_to_hub` without a login", "refused", option(push_to_hub=True)),
    Case("`--plan` a file that holds no plan", "refused", yaml_file('{"a": 1}')),
    Case("`--plan` a file that is no JSON", "refused", yaml_file("{")),
    Case("`--output_dir` below a file", "refused", lambda place, options: {"output_dir": _file(place / "a") / "run"}),
]


def _file(path: Path) -> Path:
    path.write_text("")
    return path


def changed_model(change: Callable[[Path], None]) -> Callable[[Path, Options], Options]:
    def copy(place: Path, options: Options) -> Options:
        shutil.copytree(options["model"], place / "model")
        change(place / "model")
        return {"model": place / "model"}

    return copy


def _half(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[: (model / name).stat().st_size // 2])  # type: ignore[func-returns-value]


def _without(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def _first_bit(name: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        data = bytearray((model / name).read_bytes())
        data[0] ^= 0x40
        (model / name).write_bytes(data)

    return change


def _weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        file = model / "model.safetensors"
        save_file({name: change(weight) for name, weight in load_file(file).items()}, file, {"format": "pt"})

    return write


def _setting(name: str, value: Any) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, name: value}))

    return write


def other_model(model: str, config: str, processor: bool = True, **settings: Any) -> Callable[[Path, Options], Options]:
    def build(place: Path, options: Options) -> Options:
        torch.manual_seed(0)
        built = getattr(transformers, model)(getattr(transformers, config)(**settings))
        built.save_pretrained(place / "model")
        if processor:
            transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(place / "model")
        return {"model": place / "model"}

    return build


def _in_half(model: Path) -> None:
    _weights(lambda weight: weight.half())(model)
    _setting("dtype", "float16")(model)


BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30}
MODELS = [
    Case("a name that is no model", "refused", option(model="/nowhere/at/all")),
    *(
        Case(f"a checkpoint whose {file} is {what}", "refused", changed_model(change(file)))
        for file in ("config.json", "model.safetensors", "preprocessor_config.json")
        for what, change in (("cut off", _half), ("missing", _without))
    ),
    Case(
        "a checkpoint whose config.json begins with another letter", "refused", changed_model(_first_bit("config.json"))
    ),
    Case(
        "a checkpoint whose model.safetensors begins with another byte",
        "refused",
        changed_model(_first_bit("model.safetensors")),
    ),
    Case("weights that are NaN", "refused", changed_model(_weights(lambda weight: torch.full_like(weight, torch.nan)))),
    Case("a checkpoint of other shapes than its config.json", "refused", changed_model(_setting("hidden_size", 64))),
    Case("a checkpoint in fp16 (trained in fp32, saved in fp16)", "works", changed_model(_in_half), "Best:"),
    Case("a text model", "refused", other_model("BertForSequenceClassification", "BertConfig", **BERT)),
    Case(
        "a model that drops patches (ViTMAE)", "refused", other_model("ViTMAEForPreTraining", "ViTMAEConfig", **SHAPE)
    ),
    Case(
        "a model of 4 channels",
        "refused",
        other_model("ViTForImageClassification", "ViTConfig", **SHAPE, num_channels=4, num_labels=3),
    ),
    Case(
        "a model with one output (regression)",
        "works",
        other_model("ViTForImageClassification", "ViTConfig", **SHAPE, num_labels=1),
        "measured by",
    ),
    Case(
        "a detector (YOLOS)",
        "works",
        other_model(
            "YolosForObjectDetection", "YolosConfig", **{**SHAPE, "image_size": [SIDE, SIDE]}, num_detection_tokens=3
        ),
        "measured by",
    ),
]


def pictures(folder: Path, *paths: str, count: int = 8) -> Path:
    """Some pictures in each of these folders."""
    draw = np.random.default_rng(0)
    for path in paths:
        for index in range(count):
            (folder / path).mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / path / f"{index}.png")
    return folder


def folder_of(*paths: str, count: int = 24) -> Callable[[Path, Options], Options]:
    return lambda place, options: {"dataset": pictures(place / "data", *paths, count=count)}


def changed_data(change: Callable[[Path], None]) -> Callable[[Path, Options], Options]:
    def copy(place: Path, options: Options) -> Options:
        shutil.copytree(options["dataset"], place / "data")
        change(place / "data")
        return {"dataset": place / "data"}

    return copy


def table_of(**columns: Any) -> Callable[[Path, Options], Options]:
    """A parquet file with a column of pictures and others."""

    def write(place: Path, options: Options) -> Options:
        files = [str(path) for path in sorted(Path(options["dataset"]).rglob("*.png"))][:72]
        rows = {name: [value(index) for index in range(len(files))] for name, value in columns.items()}
        data = datasets.Dataset.from_dict({"image": files, **rows})
        (place / "data").mkdir()
        data.cast_column("image", datasets.Image()).to_parquet(str(place / "data" / "train.parquet"))
        return {"dataset": place / "data"}

    return write


def _spoil(share: int) -> Callable[[Path], None]:
    def spoil(data: Path) -> None:
        for file in sorted(data.rglob("*.png"))[::share]:
            file.write_bytes(b"not a picture")

    return spoil


DATA = [
    Case("a folder that is not there", "refused", option(dataset="/nowhere/at/all")),
    Case("an empty folder", "refused", lambda place, options: {"dataset": _empty(place / "data")}),
    Case("one picture", "refused", folder_of("a", count=1)),
    Case("classes that are not the model's", "refused", folder_of("a", "b", "z")),
    Case("the model's classes in another order", "works", table_of(label=lambda index: "cab"[index % 3]), "order"),
    Case("labels outside the model's classes", "refused", table_of(label=lambda index: index % 5)),
    Case("labels −1 and none at all", "works", table_of(label=lambda index: (None, -1, 0)[index % 3]), "train:"),
    Case("labels that are fractions", "refused", table_of(label=lambda index: index / 2)),
    Case("a column of labels that is not there", "refused", option(label_column="kind")),
    Case("a split that is not there", "refused", option(train_split="rest")),
    Case("splits and other folders side by side", "refused", folder_of("train/a", "test/a", "more/a")),
    Case("pictures at different depths", "works", folder_of("a", "b/c"), "WARNING"),
    Case(
        "files that are no pictures among them",
        "works",
        changed_data(lambda data: _file(data / "train" / "notes.txt") and None),
        "WARNING",
    ),  # type: ignore[func-returns-value]
    Case("every second picture damaged", "works", changed_data(_spoil(2)), "unreadable"),
    Case("all pictures damaged", "stopped", changed_data(_spoil(1))),
]


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def saved_as(suffix: str, convert: Callable[[Image.Image], Image.Image]) -> Callable[[Path, Options], Options]:
    def change(data: Path) -> None:
        for file in data.rglob("*.png"):
            image = convert(Image.open(file))
            file.unlink()
            image.save(file.with_suffix(suffix))

    return changed_data(change)


def _sixteen_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(257 * np.asarray(image.convert("L")).astype(np.uint16))


PICTURES = [
    Case("16 bits a channel", "works", saved_as(".png", _sixteen_bits), "Best:"),
    Case("32-bit floats", "works", saved_as(".tiff", lambda image: image.convert("F")), "Best:"),
    Case("CIELAB", "works", saved_as(".tiff", lambda image: Image.merge("LAB", image.split())), "Best:"),
    Case("CMYK", "works", saved_as(".jpg", lambda image: image.convert("CMYK")), "Best:"),
    Case(
        "palettes with transparency", "works", saved_as(".png", lambda image: image.convert("RGBA").quantize()), "Best:"
    ),
    Case("pictures of one pixel", "works", saved_as(".png", lambda image: image.resize((1, 1))), "Best:"),
]
