"""`apply` and `restore`: convert a pretrained model in place, and undo it to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from . import timm_model
from .core import modeling
from .core.config import PhiConfig, SkipatConfig
from .core.cutting import check_skip, cut, record_of, sew
from .core.finding import UnsupportedModelError, find_tower
from .core.grafting import graft, ungraft

Model = TypeVar("Model", bound=nn.Module)


def apply(model: Model, skip: Iterable[int] | Mapping[int, PhiConfig], phi: PhiConfig | None = None) -> Model:
    """Replace the MSA of chosen blocks with Φ, in place (paper §3).

    A skipped block loses its MSA and the norm before it; its Φ takes the MSA output Z of the block before. Nothing is
    changed before everything has been checked.

    Args:
        model: A vision transformer of a supported family, from transformers or timm, or a model that holds one.
        skip: The blocks to skip, counted from 0: any iterable of indices, or a mapping from index to `PhiConfig`.
            Block 0 cannot be skipped. Several runs are fine; each starts from the true Z of the block before it.
        phi: The Φ of every skipped block, where `skip` gives only indices. ``PhiConfig()`` when left out.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: The model is of no supported family, or wrapped, compiled, quantised or adapted.
        ValueError: `skip` is empty, out of range or names block 0, or the model is already cut.
        TypeError: `skip` or `phi` is of the wrong type.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> shape = dict(hidden_size=32, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
        >>> model = ViTForImageClassification(ViTConfig(num_hidden_layers=6, **shape))
        >>> type(skipat_surgery.apply(model, skip=range(2, 5))).__name__
        'SkipatViTForImageClassification'
    """
    config = SkipatConfig.parse(skip, phi)
    check_form(model)
    if record_of(model) is not None:
        raise ValueError(
            f"this {type(model).__name__} is already cut; call skipat_surgery.restore(model) first, then apply again"
        )
    _, tower, family = find_tower(model)
    check_skip(config, len(family.block_list(tower)), type(model).__name__)
    config = replace(config, base_model=config.base_model or base_model_of(model))
    cut(tower, family, config, keep_removed=True)
    for host in (modeling, timm_model):
        if host.can_adopt(model):
            host.adopt(model, config)
    if isinstance(model, PreTrainedModel) and not modeling.is_adopted(model):
        graft(model, modeling.CannotBeSaved)
    return model


def restore(model: Model) -> Model:
    """Undo `apply`, to the bit: the attention that was taken out returns, on the model's present device and dtype.

    Returns:
        The same model.

    Raises:
        ValueError: The model is not cut, or was loaded cut, so that the originals are not there.
    """
    found = record_of(model)
    if found is None:
        raise ValueError(f"this {type(model).__name__} is not cut, so there is nothing to restore")
    _, tower, _ = found
    if isinstance(model, modeling.CannotBeSaved):
        ungraft(model)
    sew(tower)
    for host in (modeling, timm_model):
        if host.is_adopted(model):
            host.release(model)
    return model


def base_model_of(model: nn.Module) -> str | None:
    """The name that a model was loaded by; of a folder, its last part."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if name is None:
        config = getattr(model, "pretrained_cfg", None) or {}
        tag = f".{config['tag']}" if config.get("tag") else ""
        name = config.get("hf_hub_id") or (f"timm/{config['architecture']}{tag}" if "architecture" in config else None)
    return (Path(name).name if Path(name).is_dir() else name) if name else None


def check_form(model: nn.Module) -> None:
    """Check that a model is in its plain form, which is the only one that can be cut.

    Raises:
        UnsupportedModelError: It is wrapped, compiled, quantised or adapted; the message says what to do.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")
    for module in model.modules():
        for cls in type(module).__mro__:
            for mark, (form, remedy) in _FORMS.items():
                if f"{cls.__module__}.{cls.__qualname__}".startswith(mark):
                    raise UnsupportedModelError(f"{type(model).__name__} is {form}; {remedy}")
    _check_present(model)
    parameters = {f"{type(p).__module__}.{type(p).__qualname__}" for p in model.parameters()}
    quantized = sorted(name for name in parameters if name.startswith(("torchao.", "bitsandbytes.")))
    if getattr(model, "is_quantized", False) or quantized:
        raise UnsupportedModelError(f"{type(model).__name__} is quantised; {_CUT_FIRST} quantise")


def _check_present(model: nn.Module) -> None:
    """Check that all of a model is in memory and calls its own code."""
    name = type(model).__name__
    moved = sorted(path or "(root)" for path, module in model.named_modules() if hasattr(module, "_hf_hook"))
    if moved:
        raise UnsupportedModelError(
            f"{name} is dispatched or offloaded by accelerate (hooks on {moved[:3]}); {_CUT_FIRST} dispatch it, or "
            "take the hooks off with accelerate.hooks.remove_hook_from_submodules(model)"
        )
    absent = sorted(path for path, parameter in model.named_parameters() if parameter.is_meta)
    if absent:
        raise UnsupportedModelError(
            f"{len(absent)} parameters of {name} are on the meta device ({absent[0]}, …), so there is nothing to cut; "
            "load the weights first"
        )
    patched = sorted(
        path or "(root)"
        for path, module in model.named_modules()
        if getattr(module.forward, "__func__", None) is not type(module).forward
    )
    if patched:
        raise UnsupportedModelError(
            f"{name} has modules whose forward was replaced from outside ({patched[:3]}), which the cut would not "
            "reach; undo that first"
        )


_CUT_FIRST = "cut the plain model first, then"
_UNWRAP = "cut the plain model inside it (model.module) before wrapping"
_FORMS = {
    "torch.nn.parallel.": ("wrapped for data parallel training", _UNWRAP),
    "torch.distributed.fsdp.": ("wrapped by FSDP", f"{_CUT_FIRST} wrap"),
    "torch.distributed._composable.": ("wrapped by FSDP", f"{_CUT_FIRST} wrap"),
    "torch._dynamo.": ("compiled", f"{_CUT_FIRST} compile (the plain one is model._orig_mod)"),
    "torch.ao.nn.": ("quantised", f"{_CUT_FIRST} quantise"),
    "torchao.": ("quantised", f"{_CUT_FIRST} quantise"),
    "bitsandbytes.": ("quantised", f"{_CUT_FIRST} quantise"),
    "peft.": ("adapted by PEFT", f"{_CUT_FIRST} add adapters (model.unload() takes them off)"),
}
