"""`save` and `load`: a cut model of any class, as two files for a model that the user builds."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import timm_model
from .core import modeling
from .core.cutting import records_of
from .core.finding import UnsupportedModelError, check_tower, families_of
from .core.hub import PUSH_OPTIONS, push
from .saved_files import CONFIG, WEIGHTS, CutTower, Saved, lineage, locate, read, write
from .surgery import apply, check_form, forget, restore

Model = TypeVar("Model", bound=nn.Module)
State = dict[str, Tensor]

OPTIONS = tuple(name for name in PUSH_OPTIONS if name != "tags")  # which are of a model card; there is none here


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    base: nn.Module | None = None,
    push_to_hub: str | None = None,
    **push_options: Any,
) -> None:
    """Save a cut model of any class, such as one of your own that holds a tower.

    ``skipat.json`` says what was cut, ``skipat.safetensors`` holds the weights, in their dtype. What `apply` took out
    is not written. All other weights are, unless `base` is given.

    Args:
        model: Cut.
        directory: Made where it does not exist; an earlier save in it is replaced.
        base: The untouched model, such as the teacher. Weights that are its own to the bit are then not written, and
            `load` takes only a model that has them.
        push_to_hub: ``name`` or ``owner/name``, a repository of the Hub to push both files to.
        push_options: Of `skipat_surgery.core.hub.push`, such as ``private=True``.

    Raises:
        ValueError: The model is not cut, or `base` is.
        UnsupportedModelError: The model is wrapped, compiled, quantised or adapted.
        PushError: The push did not end; both files are written all the same.

    Examples:
        >>> import copy, skipat_surgery, torch
        >>> from transformers import ViTConfig, ViTModel
        >>> shape = dict(hidden_size=32, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
        >>> teacher = torch.nn.ModuleDict({"tower": ViTModel(ViTConfig(**shape)), "head": torch.nn.Linear(32, 1)})
        >>> student = skipat_surgery.apply(copy.deepcopy(teacher), skip=range(3, 9))
        >>> skipat_surgery.save(student, "student", base=teacher)
        >>> loaded = skipat_surgery.load("student", teacher)
    """
    unknown = sorted(push_options.keys() - set(OPTIONS))
    if unknown or (push_options and push_to_hub is None):
        raise TypeError(
            f"got {unknown or sorted(push_options)}; with push_to_hub='owner/name' the options of the push are "
            f"{OPTIONS}, and without it there are none"
        )
    _check_savable(model)
    if base is not None and records_of(base):
        raise ValueError("base is cut; it must be the untouched model")
    state = _state(model)
    unwritten = {} if base is None else _equal(state, _state(base))
    saved = Saved(type(model).__name__, tuple(_towers(model)), unwritten)
    write(Path(directory), saved, {name: weight for name, weight in state.items() if name not in unwritten})
    if push_to_hub is not None:
        files = [Path(directory, name) for name in (CONFIG, WEIGHTS)]
        push(lambda folder: [shutil.copy(file, folder) for file in files], push_to_hub, **push_options)


def load(directory: str | Path, model: Model, *, revision: str | None = None, token: bool | str | None = None) -> Model:
    """Cut a model, in place, as a saved one was, and give it that one's weights: it then equals it to the bit.

    A load that is refused leaves the model as it was, to the bit. What is taken out is not kept for `restore`.

    Args:
        directory: What `save` wrote to, or the id of a repository of the Hub.
        model: Untouched, built as the saved one was and in its dtype. Its weights are those of the `base` that `save`
            was given; without one they may be any.
        revision: Branch, tag or commit of a repository of the Hub.
        token: Of the Hub; the stored one when left out.

    Returns:
        The same model, on its device and in its mode.

    Raises:
        FileNotFoundError: `directory` is neither, or a file is missing in it.
        ValueError: A file is damaged or of a newer version; the model is already cut, or is not as the saved one was:
            the tower, its family, the names, shapes and dtypes of the weights, or those that were not written.
        UnsupportedModelError: The model is wrapped, compiled, quantised or adapted.
    """
    saved, weights = read(locate(directory, revision, token))
    check_form(model)
    if records_of(model):
        raise ValueError(f"this {type(model).__name__} is already cut; pass an untouched one, built as the saved was")
    for tower in saved.towers:
        _check_tower(model, tower, saved.model)
    untouched = _state(model)
    _check_base(untouched, saved.unwritten)
    try:
        # Only the cut model tells which weights it needs. Where the saved ones do not fit, the cut is undone.
        for tower in saved.towers:
            within = tower.path.removeprefix(tower.applied_to).lstrip(".")
            config = replace(tower.skipat, tower=within or None)
            apply(model.get_submodule(tower.applied_to), config)
        _check_weights(_state(model), weights, untouched, saved.unwritten)
    except Exception:
        if records_of(model):
            restore(model)
        raise
    _fill(model, weights, untouched)
    return forget(model)


def _check_savable(model: nn.Module) -> None:
    try:
        check_form(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"save takes the plain model: {error}") from error
    if not records_of(model):
        raise ValueError(f"this {type(model).__name__} is not cut, so there is nothing to save here")


def _state(model: nn.Module) -> State:
    """The state of a model by name, without what is no tensor, as the state of some quantised layers is not."""
    state = model.state_dict()
    strange = sorted(name for name, value in state.items() if not isinstance(value, Tensor))
    if strange:
        raise ValueError(f"the state of {type(model).__name__} holds what is no tensor: {_some(strange)}")
    return state


def _digest(weight: Tensor) -> str:
    """Of the values, shape and dtype of a weight."""
    data = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)} ".encode() + data.tobytes()).hexdigest()


def _equal(state: State, base: State) -> dict[str, str]:
    """The digests of the weights that are the base's own to the bit, by name."""
    found = {name: _digest(weight) for name, weight in state.items() if name in base}
    return {name: digest for name, digest in found.items() if digest == _digest(base[name])}


def _towers(model: nn.Module) -> Iterable[CutTower]:
    for path, _, record in records_of(model):
        holders = {holder: model.get_submodule(holder) for holder in lineage(path)}
        # `apply` was given what took on a class that saves itself, else perhaps the largest part with no other tower.
        adopted = [at for at, module in holders.items() if modeling.is_adopted(module) or timm_model.is_adopted(module)]
        alone = [at for at, module in holders.items() if sum(bool(families_of(m)) for m in module.modules()) == 1]
        yield CutTower(path, [*adopted, *alone, path][0], record.family.name, record.config)


def _check_tower(model: nn.Module, tower: CutTower, saved_class: str) -> None:
    """Check that a model has this tower.

    Raises:
        ValueError: There is none at its path, or it is of another family.
    """
    module = dict(model.named_modules()).get(tower.path)
    family = check_tower(module).name if module is not None and families_of(module) else None
    if family != tower.family:
        raise ValueError(
            f"the saved {saved_class} has a tower of the family {tower.family} at {tower.path or '(root)'}, where this "
            f"{type(model).__name__} has {f'one of {family}' if family else 'none'}; pass a model that is built alike"
        )


def _check_base(untouched: State, unwritten: Mapping[str, str]) -> None:
    """Check that a model has the weights that were not written.

    Raises:
        ValueError: Some are missing, or others.
    """
    others = [name for name, digest in unwritten.items() if name not in untouched or _digest(untouched[name]) != digest]
    if others:
        raise ValueError(
            f"the model was saved without the weights of its base, and here some are others, or of another dtype: "
            f"{_some(others)}. Load the base's weights first, or save the cut model anew without base"
        )


def _check_weights(state: State, weights: State, untouched: State, unwritten: Mapping[str, str]) -> None:
    """Check the weights that were saved against the state of the model, which is cut by now.

    Raises:
        ValueError: Some are missing, left over, or of another shape or dtype.
    """
    both = state.keys() & weights.keys()
    shapes = {name: (tuple(weights[name].shape), tuple(state[name].shape)) for name in both}
    dtypes = {name: (weights[name].dtype, state[name].dtype) for name in both & untouched.keys()}
    wrong = {
        "missing": _some(state.keys() - weights.keys() - unwritten.keys()),
        "left over": _some((weights.keys() | unwritten.keys()) - state.keys()),
        "of another shape (saved, here)": _some(f"{n} {pair}" for n, pair in shapes.items() if pair[0] != pair[1]),
        "of another dtype (saved, here)": _some(f"{n} {pair}" for n, pair in dtypes.items() if pair[0] != pair[1]),
    }
    if any(wrong.values()):
        found = "; ".join(f"{what}: {names}" for what, names in wrong.items() if names)
        raise ValueError(f"the saved weights do not fit. {found}. Pass a model that is built alike, in the same dtype")


def _fill(model: nn.Module, weights: State, untouched: State) -> None:
    """Load the saved weights, all of which fit. Those of Φ have the dtype that they were trained in."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in untouched:
                parameter.data = parameter.data.to(weights[name].dtype)
    state = model.state_dict()
    state.update(weights)
    model.load_state_dict(state)


def _some(names: Iterable[str]) -> str:
    """The first of these names, and how many there are; empty where there are none."""
    found = sorted(names)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
