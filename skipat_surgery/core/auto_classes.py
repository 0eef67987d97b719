"""Which Auto classes of transformers give a model class, and what a checkpoint's ``auto_map`` says for it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.modeling_auto import MODEL_MAPPING

PREFIX = "Skipat"  # of every class of ours
MODULE = "modeling"  # the file, among those that lie beside a checkpoint, that has them


def auto_class_names(stock: type[PreTrainedModel]) -> list[str]:
    """The Auto classes that give this class for its config, the most specific first; ``AutoModel`` if none does."""
    names = [
        name
        for name, mapping in auto_mappings()
        if stock.__name__ in names_in(mapping._model_mapping.get(_model_type(stock)))
    ]
    return sorted(names, key=lambda name: name == "AutoModel") or ["AutoModel"]


def loader_of(stock: type[PreTrainedModel]) -> str:
    """The name of the class whose ``from_pretrained`` gives back a cut model of this class.

    An Auto class, or the ``Skipat…`` class itself where none gives it from a folder: `auto_map` says which these are.
    """
    names, bare = auto_class_names(stock), names_in(MODEL_MAPPING._model_mapping.get(_model_type(stock)))
    given = names[0] == "AutoBackbone" or (names == ["AutoModel"] and stock.__name__ not in bare)
    return PREFIX + stock.__name__ if given else names[0]


def auto_map(stock: type[PreTrainedModel]) -> dict[str, str]:
    """Where remote code finds what each Auto class asks for: this class, and under ``AutoModel`` its bare model.

    There stand themselves: a class that no Auto class gives, and a Backbone, as ``AutoBackbone`` reads no folder.
    """
    names, bare = auto_class_names(stock), names_in(MODEL_MAPPING._model_mapping.get(_model_type(stock)))
    lone = names == ["AutoModel"] or names[0] == "AutoBackbone" or not bare
    found = dict.fromkeys(names, f"{MODULE}.{PREFIX}{stock.__name__}")
    found["AutoModel"] = f"{MODULE}.{PREFIX}{stock.__name__ if lone else bare[0]}"
    return {"AutoConfig": f"{MODULE}.{PREFIX}{stock.config_class.__name__}", **found}  # type: ignore[union-attr]


def _model_type(stock: type[PreTrainedModel]) -> str:
    return stock.config_class.model_type  # type: ignore[union-attr]


def auto_mappings() -> list[tuple[str, Any]]:
    """Every Auto class of transformers by name, with its mapping from model types to names of classes."""
    classes = [(name, value) for name, value in vars(modeling_auto).items() if isinstance(value, type)]
    found = [(name, cls._model_mapping) for name, cls in classes if issubclass(cls, _BaseAutoModelClass)]
    return [(name, mapping) for name, mapping in found if hasattr(mapping, "_model_mapping")]


def names_in(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The names of classes in an entry of such a mapping, which holds one, several or none."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()
