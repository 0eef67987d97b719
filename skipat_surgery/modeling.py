"""Cut models as standard Hugging Face classes, so that a checkpoint is saved and loaded like any other.

For each stock class ``X`` there is a ``SkipatX`` with the model type ``skipat_x``, made when it is first asked for:
``skipat_surgery.modeling.SkipatViTForImageClassification``. Only the outermost class is ours. The classes nested in it
stay stock, so that transformers' own conversions of parameter names still apply to them.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING,
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .config import SkipatConfig
from .families import FAMILIES, find_tower
from .layers import cached
from .operation import check_skip, cut

PREFIX = "Skipat"


class SkipatPreTrainedConfig:
    """Mixin of the ``Skipat…Config`` classes. `skipat` holds what `SkipatConfig.to_dict` wrote."""

    stock_class: type[PreTrainedConfig]
    skipat: dict[str, Any]


class SkipatPreTrainedModel:
    """Mixin of the ``Skipat…`` model classes: the stock model, cut as its config says."""

    stock_class: type[PreTrainedModel]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        skipat = SkipatConfig.from_dict(getattr(config, "skipat", None) or {})
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        _, tower, family = find_tower(self)  # type: ignore[arg-type]
        check_skip(skipat, len(family.block_list(tower)), type(self).__name__)
        cut(tower, family, skipat, keep_removed=False)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load as transformers does, but strictly: no weight may be missing, left over or misshapen.

        Raises:
            ValueError: The checkpoint does not hold exactly the weights of the cut model.
        """
        load = super().from_pretrained  # type: ignore[misc]
        model, info = load(*args, output_loading_info=True, **kwargs)
        wrong = {what: sorted(map(str, info[what])) for what in ("missing_keys", "unexpected_keys") if info[what]}
        if info.get("mismatched_keys"):
            wrong["mismatched_keys"] = sorted(map(str, info["mismatched_keys"]))
        if wrong:
            raise ValueError(f"this checkpoint does not fit {cls.__name__} as its config.skipat describes it: {wrong}")
        return (model, info) if output_loading_info else model


@cached
def skipat_config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The ``Skipat…Config`` of a stock config class."""
    names = {"__module__": __name__, "model_type": f"skipat_{stock.model_type}", "stock_class": stock}
    return type(PREFIX + stock.__name__, (SkipatPreTrainedConfig, stock), names)


@cached
def skipat_model_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The ``Skipat…`` class of a stock model class."""
    config_class = skipat_config_class(stock.config_class)  # type: ignore[arg-type]
    names = {"__module__": __name__, "config_class": config_class, "stock_class": stock}
    name = PREFIX + stock.__name__
    cls = type(name, (SkipatPreTrainedModel, stock), names)
    conversion = get_checkpoint_conversion_mapping(stock.__name__)  # transformers looks it up by class name
    if conversion is not None:
        register_checkpoint_conversion_mapping(name, conversion, overwrite=True)
    return cls


def can_adopt(model: object) -> bool:
    """Whether a model's class is one that transformers defines, so that ``Skipat…`` can be made of it by name."""
    return isinstance(model, PreTrainedModel) and getattr(transformers, type(model).__name__, None) is type(model)


def is_adopted(model: object) -> bool:
    """Whether a model is of a ``Skipat…`` class."""
    return isinstance(model, SkipatPreTrainedModel)


def adopt(model: Any, skipat: SkipatConfig) -> None:
    """Give a model that was cut in place its ``Skipat…`` class, and its config what was done."""
    config = model.config  # keep the object: every attention module holds it
    config.__class__ = skipat_config_class(type(config))
    config.skipat = skipat.to_dict()
    model.__class__ = skipat_model_class(type(model))
    # transformers looks up by class what a model can record, and fills this in __init__
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(model.__class__), model._can_record_outputs)


def release(model: Any) -> None:
    """Undo `adopt`."""
    config = model.config
    config.__class__ = config.stock_class
    del config.skipat
    model.__class__ = model.stock_class


def __getattr__(name: str) -> type:
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(stock, type) and issubclass(stock, PreTrainedModel):
        return skipat_model_class(stock)
    if isinstance(stock, type) and issubclass(stock, PreTrainedConfig):
        return skipat_config_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register_with_auto_classes() -> None:
    """Let ``AutoConfig`` and every ``AutoModel…`` find the cut form of each supported model type."""
    packages = {
        tower.split(".")[2] for family in FAMILIES for tower in family.towers if tower.startswith("transformers")
    }
    for model_type in CONFIG_MAPPING_NAMES:
        if model_type_to_module_name(model_type) not in packages:
            continue
        config_class = skipat_config_class(CONFIG_MAPPING[model_type])
        AutoConfig.register(config_class.model_type, config_class)
        for auto_class in vars(modeling_auto).values():
            if not (isinstance(auto_class, type) and issubclass(auto_class, _BaseAutoModelClass)):
                continue
            name = getattr(auto_class._model_mapping, "_model_mapping", {}).get(model_type)
            if isinstance(name, str):
                auto_class.register(config_class, skipat_model_class(getattr(transformers, name)))
