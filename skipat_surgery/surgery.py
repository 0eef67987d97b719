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
from .core.attention_maps import unfill_attentions
from .core.checking import check_cut
from .core.config import PhiConfig, SkipatConfig
from .core.cutting import (
    Record,
    apply_to_tower,
    check_restorable,
    forget_removed,
    reached,
    records_of,
    restore_tower,
)
from .core.family import Family
from .core.finding import UnsupportedModelError, find_tower, towers_in
from .core.grafting import graft, ungraft
from .core.windowed_phis import suited

Model = TypeVar("Model", bound=nn.Module)


def apply(
    model: Model,
    skip: Iterable[int] | Mapping[int, PhiConfig] | SkipatConfig,
    phi: PhiConfig | None = None,
    *,
    tower: str | None = None,
    keep_removed: bool = True,
) -> Model:
    """Replace the MSA of chosen blocks with Φ, in place (paper §3).

    A skipped block loses its MSA and the norm before it; its Φ takes the MSA output Z of the block before. Nothing is
    changed before everything has been checked. Make optimizers after it: one that was made before holds the weights
    that are taken out, and not those of Φ.

    Args:
        model: A vision transformer of a supported family, from transformers or timm, or a model that holds one.
        skip: The blocks to skip, counted from 0: any iterable of indices, a mapping from index to `PhiConfig`, or a
            `SkipatConfig`, which names the base model too.
            Block 0 cannot be skipped. Several runs are fine; each starts from the true Z of the block before it.
        phi: The Φ of every skipped block, where `skip` gives only indices. ``PhiConfig()`` when left out, without
            clusters where a block attends within windows.
        tower: Path of the vision transformer to cut, where the model holds several. Call `apply` once for each; to
            solve or distil one, pass it alone: ``model.get_submodule(tower)``, and the teacher's.
        keep_removed: Keep what is taken out in memory, for `restore`. Without it the model needs no more memory than
            one loaded from a checkpoint; `forget` lets go of it later.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: The model is of no supported family, or wrapped, compiled, quantised or adapted, or
            holds several towers and `tower` names none.
        ValueError: `skip` is empty, out of range or names block 0, or the model is already cut.
        TypeError: `skip` or `phi` is of the wrong type.

    Examples:
        >>> import skipat_surgery
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> shape = dict(hidden_size=32, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
        >>> model = ViTForImageClassification(ViTConfig(num_hidden_layers=6, **shape))
        >>> type(skipat_surgery.apply(model, skip=range(2, 5))).__name__
        'SkipatViTForImageClassification'
    """
    config = SkipatConfig.parse(skip, phi)
    check_form(model)
    if config.others:
        raise ValueError("skip tells of several towers: call apply once for each of skip.towers, with tower=its tower")
    path, found, family = find_tower(model, config.tower if tower is None else tower)
    if any(module is found for _, module, _ in records_of(model)):
        raise ValueError(
            f"this {type(model).__name__} is already cut; call skipat_surgery.restore(model) first, then apply again"
        )
    if phi is None and not isinstance(skip, (Mapping, SkipatConfig)):
        config = suited(found, family, config)  # the default
    check_cut(found, family, config, type(model).__name__)
    _check_forwards(path, found, family, reached(family.stage_list(found), config))
    config = replace(
        config,
        base_model=config.base_model or base_model_of(model),
        tower=path if len(towers_in(model)) > 1 else None,
    )
    apply_to_tower(found, family, config, keep_removed=True, model=model)
    try:
        _adopt(model, config)
    except Exception:
        _undo(model, found)  # a failed `apply` changes nothing
        raise
    if not keep_removed:
        forget_removed(found)
    return model


def _undo(model: nn.Module, tower: nn.Module) -> None:
    """Restore a tower; where no other of the model was cut, the model too."""
    if len(records_of(model)) == 1:
        restore(model)
    else:
        restore_tower(tower)


def _adopt(model: nn.Module, config: SkipatConfig) -> None:
    """Let a model that was just cut save itself as a standard checkpoint, where its class allows it."""
    for host in (modeling, timm_model):
        if host.can_adopt(model) or host.is_adopted(model):
            host.adopt(model, config)
    refused = isinstance(model, PreTrainedModel) and not modeling.is_adopted(model)
    if refused and not isinstance(model, modeling.CannotBeSaved):  # it is where another of its towers was cut before
        graft(model, modeling.CannotBeSaved)


def tell_config(model: nn.Module) -> None:
    """Have the configuration of a cut model, as it is saved, say how wide its MLPs are by now."""
    for module in model.modules():
        for host in (modeling, timm_model):
            if host.is_adopted(module):
                host.tell_config(module)


def restore(model: Model) -> Model:
    """Undo `apply`, to the bit: the attention that was taken out returns, on the model's present device and dtype.

    Where a model holds several towers that were cut, all of them are restored.

    Returns:
        The same model.

    Raises:
        ValueError: The model is not cut, or the originals are not there: it was loaded cut, or they were forgotten.
    """
    found = _cut_towers(model, "restore")
    for _, tower, _ in found:
        check_restorable(tower)
    for _, tower, _ in found:
        restore_tower(tower)
    unfill_attentions(model)
    for module in model.modules():
        if isinstance(module, modeling.CannotBeSaved):
            ungraft(module)
        for host in (modeling, timm_model):
            if host.is_adopted(module):
                host.release(module)
    return model


def forget(model: Model) -> Model:
    """Let go of the attention that `apply` took out and keeps in memory for `restore`.

    Returns:
        The same model, which can no longer be restored.

    Raises:
        ValueError: The model is not cut.
    """
    for _, tower, _ in _cut_towers(model, "forget"):
        forget_removed(tower)
    return model


def _cut_towers(model: nn.Module, what: str) -> list[tuple[str, nn.Module, Record]]:
    found = records_of(model)
    if not found:
        raise ValueError(f"this {type(model).__name__} is not cut, so there is nothing to {what}")
    return found


def base_model_of(model: nn.Module) -> str | None:
    """The name that a transformers model was loaded by, of a folder its last part; of timm the architecture alone.

    timm does not record whether a model's weights are the pretrained ones or random.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if name is None:
        name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
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
    """Check that all of a model is in memory."""
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


def _check_forwards(root: str, tower: nn.Module, family: Family, indices: Iterable[int]) -> None:
    """Check that the blocks that the cut reaches, and what it grafts around them, call their own code.

    Raises:
        UnsupportedModelError: One has a forward that was put on it from outside.
    """
    alone = [path for path in ("", family.embeddings, *family.carriers) if path is not None]
    paths = family.block_paths(tower)
    blocks = {paths[index]: tower.get_submodule(paths[index]) for index in indices}
    inside = [f"{path}.{part}".strip(".") for path, block in blocks.items() for part, _ in block.named_modules()]
    found = {path: tower.get_submodule(path) for path in (*alone, *inside)}
    patched = sorted(
        ".".join(filter(None, (root, path))) or "(root)"
        for path, module in found.items()
        if getattr(module.forward, "__func__", None) is not type(module).forward
    )
    if patched:
        raise UnsupportedModelError(
            f"{type(tower).__name__} has modules whose forward was replaced from outside ({patched[:3]}), which the "
            "cut would not reach; undo that first"
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
