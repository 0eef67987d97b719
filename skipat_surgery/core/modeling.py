"""Cut models as standard Hugging Face classes, so that a checkpoint is saved and loaded like any other.

For each stock class ``X`` there is a ``SkipatX`` with the model type ``skipat_x``, made when it is first asked for:
``modeling.SkipatViTForImageClassification``. Only the outermost class is ours. The classes nested in it stay stock,
so that transformers' own conversions of parameter names still apply to them.
"""

from __future__ import annotations

import copy
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING,
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)
from transformers.utils import logging
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .auto_classes import PREFIX, auto_class_names, auto_map, auto_mappings, loader_of, names_in
from .card import model_card, write_card
from .checking import check_cut
from .config import SkipatConfig
from .cutting import Record, apply_to_tower, records_of, with_widths
from .finding import FAMILIES, find_tower
from .grafting import Grafted, cached
from .hub import PUSH_OPTIONS, push
from .stock_refusal import allow_stock, load_refused, refuse_stock
from .transformers_nesting import NESTING

logger = logging.get_logger(__name__)


REGISTERED: set[type] = set()  # the config classes that the Auto classes know


class SkipatPreTrainedConfig:
    """Mixin of the ``Skipat…Config`` classes. `skipat` holds what `SkipatConfig.to_dict` wrote."""

    stock_class: type[PreTrainedConfig]
    skipat: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # An Auto class asks for a model by its config, so that none is looked up before there is one. To import the
        # models of every kind with this library would take seconds. The copy beside a checkpoint registers nothing.
        if cls in REGISTERED:
            register_models(cls.stock_class)
        return super().__new__(cls)


class SkipatPreTrainedModel:
    """Mixin of the ``Skipat…`` model classes: the stock model, cut as its config says."""

    stock_class: type[PreTrainedModel]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        skipat = SkipatConfig.from_dict(getattr(config, "skipat", None) or {})
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        config.auto_map = auto_map(self.stock_class)
        refuse_stock(config)
        for part in skipat.towers:
            _, tower, family = find_tower(self, part.tower)  # type: ignore[arg-type]
            check_cut(tower, family, part, type(self).__name__)
            apply_to_tower(tower, family, part, keep_removed=False, model=self)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load as transformers does, but strictly where the surgery is concerned.

        Every Φ must be there, and nothing of what the surgery took out. The one exception is the checkpoint of an
        uncut model: it holds no Φ at all, so each Φ starts fresh, which is said in a warning.

        Raises:
            ValueError: The checkpoint does not hold the blocks that `config.skipat` describes.
        """
        load, ignore = super().from_pretrained, kwargs.pop("ignore_mismatched_sizes", False)  # type: ignore[misc]
        # transformers' own error for a misshapen tensor names it only in a report on the side.
        model, info = load(*args, output_loading_info=True, ignore_mismatched_sizes=True, **load_refused(kwargs))
        if info["mismatched_keys"] and not ignore:
            raise ValueError(
                f"this checkpoint does not fit {cls.__name__}: (tensor, its shape here, the shape wanted) is "
                f"{sorted(info['mismatched_keys'])}; pass ignore_mismatched_sizes=True for a new head"
            )
        check_loaded(model, info)
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as transformers does, with a model card where there is none.

        With `push_to_hub` the folder is then pushed, our card with it, to ``repo_id`` or a repository of its name.
        """
        tell_config(self)  # a tower of it may have been narrowed alone
        named = {name: kwargs.pop(name) for name in ("repo_id", *PUSH_OPTIONS) if name in kwargs}
        token = {"token": named["token"]} if "token" in named else {}
        save = super().save_pretrained  # type: ignore[misc]
        save(save_directory, is_main_process=is_main_process, state_dict=state_dict, **token, **kwargs)
        if not is_main_process:
            return
        write_card(save_directory, self.card())
        if push_to_hub:
            repo_id = named.pop("repo_id", Path(save_directory).name)
            push(lambda folder: shutil.copytree(save_directory, folder, dirs_exist_ok=True), repo_id, **named)

    def card(self) -> str:
        """The model card: what was cut, how it was distilled, how it is loaded."""
        skipat = self.config.skipat  # type: ignore[attr-defined]
        return model_card(skipat, "transformers", load_with=loader_of(self.stock_class))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Push the checkpoint, its code and its model card to the Hub: see `skipat_surgery.core.hub.push`."""
        return push(self.save_pretrained, repo_id, **kwargs)


class CannotBeSaved(Grafted):
    """Mixin of a cut model that `can_adopt` refuses, as one of the user's own: it could not be loaded cut."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            f"{type(self).__name__} is not a class that transformers builds from its config alone, so its checkpoint "
            "would be loaded without the surgery. Use skipat_surgery.save(model, directory), and to load it "
            "skipat_surgery.load(directory, model) with a model that is built as this one was"
        )

    push_to_hub = save_pretrained


def check_loaded(model: Any, info: dict[str, Any]) -> None:
    """Check what transformers found missing or left over against the surgery; start each Φ of an uncut checkpoint.

    Raises:
        ValueError: The checkpoint and `config.skipat` contradict each other.
    """
    cut = records_of(model)
    blocks = _names_in(cut, skipped=False)
    wrong = {
        what: sorted(str(key) for key in info.get(what) or () if blocks.search(str(key)))
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if not any(wrong.values()):
        return
    phis = {name for name, _ in model.named_parameters() if re.search(r"\.\d+\.phi\.", name)}
    skipped = _names_in(cut, skipped=True)
    uncut = set(wrong["missing_keys"]) == phis and not wrong["mismatched_keys"]
    if not uncut or any(not skipped.search(key) or ".phi." in key for key in wrong["unexpected_keys"]):
        found = {what: keys for what, keys in wrong.items() if keys}
        raise ValueError(
            f"this checkpoint does not hold the blocks that the config.skipat of {type(model).__name__} describes: "
            f"{found}"
        )
    for _, tower, record in cut:
        for index in record.config.skip:
            record.family.block_list(tower)[index].phi.reset_parameters()  # type: ignore[operator, union-attr]
    logger.warning(
        "%s was loaded from the checkpoint of an uncut model: the Φ of blocks %s are fresh. Solve or distil them "
        "before use.",
        type(model).__name__,
        [index for _, _, record in cut for index in record.config.skip],
    )


def _names_in(cut: list[tuple[str, Any, Record]], skipped: bool) -> re.Pattern[str]:
    """What the names of weights in blocks of cut towers look like, or in their skipped ones; of one, in any holder."""
    places = []
    for path, tower, record in cut:
        place = "" if len(cut) == 1 else re.escape(f"{path}.")
        for index, block in enumerate(record.family.block_paths(tower)):
            owner, _, name = block.rpartition(".")
            if not skipped or index in record.config.skip:
                places.append(rf"{place}{re.escape(owner)}\.{name if skipped else '[0-9]+'}\.")
    return re.compile(rf"(^|\.)({'|'.join(dict.fromkeys(places))})")


@cached
def skipat_config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The ``Skipat…Config`` of a stock config class."""
    model_type = f"skipat_{stock.model_type}"
    names = {
        "__module__": __name__,
        "model_type": model_type,
        "stock_class": stock,
        "_auto_class": "AutoConfig",  # has transformers copy this file beside the checkpoint
    }
    _share_conversion(stock.model_type, model_type)
    return type(PREFIX + stock.__name__, (SkipatPreTrainedConfig, stock), names)


@cached
def skipat_model_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The ``Skipat…`` class of a stock model class."""
    name = PREFIX + stock.__name__
    names = {
        "__module__": __name__,
        "config_class": skipat_config_class(stock.config_class),  # type: ignore[arg-type]
        "stock_class": stock,
        "_auto_class": auto_class_names(stock)[0],
    }
    _share_conversion(stock.__name__, name)
    return type(name, (SkipatPreTrainedModel, stock), names)


def _share_conversion(stock: str, ours: str) -> None:
    """transformers converts the names in a checkpoint by class or by model type: have ours converted alike."""
    conversion = get_checkpoint_conversion_mapping(stock)
    if conversion is not None:
        register_checkpoint_conversion_mapping(ours, conversion, overwrite=True)


def can_adopt(model: object) -> bool:
    """Whether ``Skipat…`` can be made of a model's class by name, as transformers defines it and can build it so.

    It cannot where an Auto class gives another model type's class for the config: ShieldGemma 2 builds its inside by
    such an Auto class, which knows no ``Skipat…Config``.
    """
    if not isinstance(model, PreTrainedModel) or getattr(transformers, type(model).__name__, None) is not type(model):
        return False
    # AutoBackbone gives a part of some models, such as TIPSv2, for the config of the whole.
    entries = [found for name, found in auto_entries(type(model.config)) if name != "AutoBackbone"]
    return all(entry.config_class is type(model.config) for found in entries for entry in found)


def is_adopted(model: object) -> bool:
    """Whether a model is of a ``Skipat…`` class."""
    return isinstance(model, SkipatPreTrainedModel)


def adopt(model: Any, skipat: SkipatConfig) -> None:
    """Give a model that was cut in place its ``Skipat…`` class, and its config what was done.

    Of one that has them, as another of its towers was cut before, the config is told of this one too.
    """
    if is_adopted(model):
        before = SkipatConfig.from_dict(model.config.skipat)
        model.config.skipat = replace(before, others=(*before.others, skipat)).to_dict()
        return
    stock = type(model)
    # What can fail comes before the first change.
    config_class, model_class = skipat_config_class(type(model.config)), skipat_model_class(stock)
    places = auto_map(stock)
    register_config(type(model.config))
    register_models(type(model.config))
    config = _own_config(model)
    config.__class__ = config_class  # keep the object: every attention module holds it
    config.skipat, config.auto_map = skipat.to_dict(), places
    refuse_stock(config)
    model.__class__ = model_class
    # transformers looks up by class what a model can record, and fills this in __init__
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(model.__class__), model._can_record_outputs)


def tell_config(model: Any) -> None:
    """Have the config of a cut model say how wide its MLPs are by now."""
    model.config.skipat = with_widths(SkipatConfig.from_dict(model.config.skipat), model).to_dict()


def _own_config(model: Any) -> Any:
    """The configuration of a model, made its own: others may have been built from the same object."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                setattr(module, name, copies[id(value)])
    return model.config


def release(model: Any) -> None:
    """Undo `adopt`."""
    config = model.config
    config.__class__ = config.stock_class
    del config.skipat
    del config.auto_map
    allow_stock(config)
    model.__class__ = model.stock_class


def __getattr__(name: str) -> type:
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(stock, type) and issubclass(stock, PreTrainedModel):
        return skipat_model_class(stock)
    if isinstance(stock, type) and issubclass(stock, PreTrainedConfig):
        return skipat_config_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register_with_auto_classes() -> None:
    """Let ``AutoConfig`` find the cut form of each model type that may hold a tower; its models follow a config."""
    packages = {
        tower.split(".")[2] for family in FAMILIES for tower in family.towers if tower.startswith("transformers")
    }
    wanted = {*NESTING, *(f"{package}_vision_model" for package in packages)}
    for model_type in CONFIG_MAPPING_NAMES:
        if model_type_to_module_name(model_type) in packages or model_type in wanted:
            register_config(CONFIG_MAPPING[model_type])


def register_config(stock: type[PreTrainedConfig]) -> None:
    """Let ``AutoConfig`` find the cut form of one stock config class."""
    config_class = skipat_config_class(stock)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    REGISTERED.add(config_class)


@cached
def register_models(stock: type[PreTrainedConfig]) -> None:
    """Let every ``AutoModel…`` find the cut form of the models of one stock config class."""
    for name, found in auto_entries(stock):
        classes = tuple(skipat_model_class(entry) for entry in found if entry.config_class is stock)
        if classes:
            auto_class = getattr(modeling_auto, name)
            auto_class.register(skipat_config_class(stock), classes if len(classes) > 1 else classes[0], exist_ok=True)


def auto_entries(stock: type[PreTrainedConfig]) -> list[tuple[str, list[Any]]]:
    """What each Auto class gives for a stock config class, by the Auto class's name."""
    entries = [(name, names_in(mapping._model_mapping.get(stock.model_type))) for name, mapping in auto_mappings()]
    return [(name, [getattr(transformers, entry) for entry in found]) for name, found in entries]
