"""Reading a model while it runs: Z of chosen blocks, the final tokens, the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Images, patches_in
from .core.ragged import Layout
from .tasks.classification import Classification
from .tasks.finding import PIXELS, takes_images_alone, task_of
from .tasks.task import Task, same_shapes
from .tasks.wrapping import unwrapped
from .tower import Tower


class Seen(Exception):
    """Ends a forward once everything asked for has been seen."""


@dataclass
class Observation:
    """What one forward showed.

    Args:
        z: Z (B, N, D), or what was kept of it, by block.
        states: The hidden states X (B, N, D) after a block, by block.
        tokens: The tokens (B, N, D) after the last norm.
    """

    z: dict[int, Any] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None


def _all_of(z: Tensor) -> Tensor:
    return z


def _store(place: dict[int, Any], index: int, keep: Callable[[Tensor], Any], value: Tensor) -> None:
    place[index] = keep(value)


@contextmanager
def observe(
    tower: Tower,
    blocks: Iterable[int] = (),
    tokens: bool = False,
    states: Iterable[int] = (),
    keep: Callable[[Tensor], Any] = _all_of,
    grid: Layout | Callable[[int], Layout] | None = None,
) -> Iterator[Observation]:
    """Watch the forwards made inside the context.

    Args:
        tower: Of the model that runs.
        blocks: The blocks whose Z to keep.
        tokens: Whether to keep the tokens after the last norm, or after the last block where no norm sees them all.
        states: The blocks whose output to keep.
        keep: What to keep of each Z.
        grid: Of the images, where they may be packed, or lie in windows of a map: what is seen of them is laid out.
            From a block, where it is not the same for all.
    """
    seen = Observation()

    def set_tokens(value: Tensor) -> None:
        if value.ndim > 2:  # Janus sends its pooled token (B, D) through the same norm afterwards
            seen.tokens = value

    with ExitStack() as hooks:

        def watch(module: nn.Module, put: Callable[[Tensor], object], block: int | None = None) -> None:
            takes = block is not None and tower.family.stages is not None  # Z, where others give it

            def hook(module: nn.Module, args: Any, output: Any) -> None:
                value = args[0] if takes else output[0] if isinstance(output, tuple) else output
                own = grid(block) if callable(grid) and block is not None else grid
                assert own is None or not callable(own)
                put(tower.state_tokens(value, own) if block is None else tower.z_tokens(block, value, own))

            hooks.callback(module.register_forward_hook(hook).remove)

        for index in blocks:
            watch(tower.z_slot(index), partial(_store, seen.z, index, keep), index)
        for index in states:
            watch(tower.blocks[index], partial(_store, seen.states, index, _all_of))
        if tokens:  # a backbone may be set to leave its last norm out
            for module in dict.fromkeys((tower.blocks[-1], tower.last_module())):
                watch(module, set_tokens)
        yield seen


@contextmanager
def _stopping_after(module: nn.Module) -> Iterator[None]:
    """End a forward made inside the context once this module has run. After every other hook on it."""

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise Seen

    handle = module.register_forward_hook(stop)
    try:
        yield
    except Seen:
        pass
    finally:
        handle.remove()


def z_of(tower: Tower, blocks: Iterable[int], images: Images) -> dict[int, Tensor]:
    """Z (B, N, D) of chosen blocks, by block; the tower runs no further than the last of them."""
    blocks = sorted(blocks)
    grid = partial(tower.layout_in, layout=tower.layout(images))
    with observe(tower, blocks, grid=grid) as seen, _stopping_after(tower.z_slot(blocks[-1])):
        tower.run(images)
    return seen.z


def states_of(tower: Tower, index: int, images: Images) -> Tensor:
    """X (B, N, D) after a block, the patches last; the tower runs no further."""
    device = next(tower.module.parameters()).device
    images = images.to(device)
    stopping = _stopping_after(tower.blocks[index])
    with observe(tower, states=[index], grid=tower.ragged(images)) as seen, stopping:
        tower.run(images)
    return seen.states[index]


def pixels_of(batch: Any) -> Images:
    """The images (B, C, H, W) or videos (B, T, C, H, W) of a batch, or its patches.

    They are the batch itself, the first of a pair, or ``pixel_values`` or ``pixel_values_videos`` of a mapping.

    Patches have the grid of each image beside them: ``spatial_shapes`` of SigLIP 2's processor, ``patch_coord`` of
    timm's collator. Spectrograms (B, T, F) are told by their name, ``input_values`` of a mapping.

    Raises:
        TypeError: The batch is none of these.
    """
    patches = patches_in(batch)
    if patches is not None:
        return patches
    axes = 3 if isinstance(batch, Mapping) and "input_values" in batch else 4
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    elif isinstance(batch, Mapping):
        names = ("input_values",) if axes == 3 else PIXELS
        batch = next((batch[name] for name in names if name in batch), None)
    if not isinstance(batch, Tensor) or batch.ndim < axes:
        got = f"images {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
        raise TypeError(
            "a batch must be images (B, C, H, W) or videos (B, T, C, H, W), a pair of them and labels, or a mapping "
            f"with pixel_values, got {got}; what goes through them is a list of batches, or a DataLoader"
        )
    return batch


def labels_of(batch: Any) -> Tensor | None:
    """The labels (B,) of a batch: the second of a pair, or ``labels`` of a mapping; None where there are none."""
    if isinstance(batch, (tuple, list)):
        return batch[1] if len(batch) > 1 else None
    return batch.get("labels") if isinstance(batch, Mapping) else None


def image_part(model: nn.Module) -> nn.Module:
    """What of a model runs on images alone: the model, or its vision tower where it takes text too."""
    return model if takes_images_alone(model) else Tower.of(model).module


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Run models in evaluation mode and without gradients, then put their modes back."""
    modes = [{module: module.training for module in model.modules()} for model in models]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for states in modes:
            for module, training in states.items():
                module.training = training


@dataclass(frozen=True)
class Outputs:
    """What the loss compares, in float32.

    Args:
        tokens: The tokens after the last norm (B, N, D).
        states: The hidden states (B, N, D) after chosen blocks, by block.
        head: What the task reads of the model's output, (B, …) by name.
        real: Which patches (B, N) are no padding; None where none is.
        task: The model's; None where its tokens alone are compared.
    """

    tokens: Tensor
    states: Mapping[int, Tensor] = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)
    task: Task | None = None
    real: Tensor | None = None

    @property
    def logits(self) -> Tensor | None:
        """The logits (B, classes) of a single-label classifier; None for any other model."""
        return self.head["logits"] if isinstance(self.task, Classification) else None

    def shares_head(self, other: Outputs) -> bool:
        """Whether both are of one task, and can be compared by it."""
        return self.task is not None and self.task == other.task and same_shapes(self.head, other.head)


def outputs_of(
    model: nn.Module, tower: Tower, images: Images, states: Iterable[int] = (), task: Task | None = None
) -> Outputs:
    """Run a model, which may be wrapped, and keep what the loss compares.

    Without a task its tower alone is run: no term reads what comes after it, and it takes images alone.

    Args:
        model: The model to call.
        tower: The tower inside it.
        images: (B, C, H, W), or videos (B, T, C, H, W), or patches.
        states: The blocks whose output to keep.
        task: The model's; found when left out.
    """
    task = task_of(model) if task is None else task
    grid = tower.ragged(images)
    with observe(tower, tokens=True, states=states, grid=grid) as seen:
        whole = task is not None or unwrapped(model) is tower.module
        called = tower.module if not whole else model if task is None else task.called(model)
        output = tower.run(images, called)
    assert seen.tokens is not None
    tokens = tower.of_images(seen.tokens, images).float()
    between = {index: tower.of_images(state, images, index).float() for index, state in seen.states.items()}
    head = {} if task is None else {name: part.float() for name, part in task.read(output).items()}
    return Outputs(tokens, between, head, task, None if grid is None else grid.real)
