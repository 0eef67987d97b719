"""The host's own modules, made to carry Z and the patch grid from block to block.

Z and the grid travel as an attribute of the hidden-states tensor. A block's ``__call__`` takes them off the tensor
that it is given and puts them on the one that it returns. Its ``forward``, which may be checkpointed and recomputed,
is pure: Z is a tensor in and a tensor out. Nothing is stored on a module, so threads, recomputation and copies cannot
mix two forwards up.

Inside ``forward`` an attribute leads Z past the host's code as well, which runs unchanged through ``super().forward``:
a `Box` on the block's input takes Z out of the MSA of an attended block, and brings it in where a skipped block had its
MSA.

A hook may give a module another tensor than it was called with, or put another in the place of its output, as the
backward hooks of `nn.Module` do. So attributes are read and set in ``__call__``, outside of hooks, and reach a
``forward`` that needs them as an argument.

Each class here is a mixin that `grafting.graft` joins with the host's class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .family import Family, extent
from .fx_tracing import record_call, record_whole
from .grafting import Grafted
from .packed import Packed, laid_out, layout_of, packed_again, plain
from .padding import attended_tokens
from .phi import Phi
from .ragged import Layout

_CARRIED = "_skipat_carried"
_BOX = "_skipat_box"


class Box:
    """Holds Z for one reader: a block's own code during its forward, or without gradients the Φ that uses Z up.

    In a skipped block, whose MSA's slot runs Φ, it holds Φ and the patch grid as well.

    It is emptied by then: autograd saves the tensors that lead it, and with Z inside, Z's own graph would hold Z, a
    circle that Python's garbage collector does not see, and a forward whose output is thrown away would never be freed.
    """

    phi: Phi
    grid: Layout

    def __init__(self, z: Tensor | None = None) -> None:
        self.z = z

    def empty(self) -> Tensor:
        """Take Z out."""
        z, self.z = self.z, None
        assert z is not None
        return z

    def to(self, *args: Any, **kwargs: Any) -> Box:
        """Move Z, as accelerate does with whatever it finds among the inputs of a block on another device."""
        self.z = self.empty().to(*args, **kwargs)
        return self


def carry(x: Tensor, grid: Layout, z: Tensor | None = None) -> Tensor:
    """Put the grid, and Z where the next block needs it, on the hidden states."""
    setattr(x, _CARRIED, (plain(grid), z))
    return x


def carried_or_none(x: Tensor) -> tuple[Layout, Tensor | None] | None:
    """The grid and Z that the hidden states carry, or None where they carry nothing."""
    state = getattr(x, _CARRIED, None)
    return None if state is None else (layout_of(state[0]), state[1])


def carried(x: Tensor, what: str) -> tuple[Layout, Tensor | None]:
    """The grid and Z that the hidden states carry.

    Raises:
        RuntimeError: They carry nothing: something made a new tensor on the way, or skipped the embeddings.
    """
    state = carried_or_none(x)
    if state is None:
        raise RuntimeError(
            f"{what} was given hidden states that do not carry the patch grid and Z. They must come straight from the "
            "embeddings and blocks of the same model; a pipeline cut or a reentrant checkpoint around whole blocks "
            "makes a new tensor between them and cannot be used with a cut model (non-reentrant checkpointing can)."
        )
    return state


def images_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The batch of images or videos among the arguments of an embeddings module."""
    images = args[0] if args else kwargs.get("pixel_values", kwargs.get("pixel_values_videos"))
    if not isinstance(images, Tensor):
        raise TypeError("the embeddings were called without pixel_values, so the patch grid is unknown")
    return images


def with_box(x: Tensor, box: Box) -> Tensor:
    """The same hidden states under a new tensor object, which holds the box; the one given is left alone."""
    x = x.view_as(x)
    setattr(x, _BOX, box)
    return x


def box_of(x: Tensor) -> Box:
    """The box that the input of a norm or an MSA holds."""
    return getattr(x, _BOX)


def boxed_like(x: Tensor, out: Tensor) -> Tensor:
    """A tensor made of hidden states, with the box that they hold."""
    return _handed_on(_BOX, x, out)


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a norm or an MSA."""
    return args[0] if args else kwargs["hidden_states"]


def _embedded(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tokens among the arguments of an encoder."""
    return args[0] if args else kwargs["inputs_embeds"]


def _handed_on(attribute: str, x: Tensor, out: Tensor) -> Tensor:
    """The output of a module with an attribute of its input; in a graph of torch.fx, there is none when it runs."""
    if hasattr(x, attribute):
        setattr(out, attribute, getattr(x, attribute))
    return out


def _beside_z(out: Any, z: Tensor) -> tuple[Any, ...]:
    """(X, Z) of what a host's block returns, X; or (X, Z, others) where that is (X, *others)."""
    return (out[0], z, out[1:]) if isinstance(out, tuple) else (out, z)


def _as_the_host(x: Tensor, others: tuple[Any, ...] | None = None) -> Any:
    """What a host's block returns, from what `_beside_z` took apart."""
    return x if others is None else (x, *others)


class GridSource(Grafted):
    """Embeddings: the tokens that they return carry the patch grid of the images or videos that they were given."""

    skipat_family: Family

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        reason = self.skipat_family.refuse_input(*args, **kwargs)
        if reason is not None:
            raise ValueError(f"this model was cut, and {reason}")
        grid: Layout | None = self.skipat_family.ragged(self, *args, **kwargs)
        if grid is None:
            grid = self.skipat_family.image_to_grid(self, *extent(images_of(args, kwargs).shape[1:]))
        out = super().__call__(*args, **kwargs)  # type: ignore[misc]
        carry(out if isinstance(out, Tensor) else out[0], grid)
        return out


class FirstBlock(Grafted):
    """Block 0 of a tower whose tokens carry nothing on their way to it: sets the grid out, as that has but one."""

    skipat_patches: tuple[Any]  # what knows the grid, in a tuple, as it is no submodule of the block

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        grid = self.skipat_patches[0].grid_size
        return super().__call__(carry(x.view_as(x), grid), *args, **kwargs)  # type: ignore[misc]


@dataclass(frozen=True)
class FixedGrid:
    """Knows a grid that cannot change."""

    grid_size: tuple[int, ...]


class Carrier(Grafted):
    """A module between the embeddings and the blocks: hands on what its input carries."""

    def __call__(self, x: Tensor) -> Tensor:
        return _handed_on(_CARRIED, x, super().__call__(x))  # type: ignore[misc]


class Encoder(Grafted):
    """A module that the tower calls to run its blocks: hands the grid on past its own hooks."""

    def __call__(self, *args: Any, skipat_grid: Layout | None = None, **kwargs: Any) -> Any:
        if skipat_grid is None:
            skipat_grid, _ = carried(_embedded(args, kwargs), type(self).__name__)
        return super().__call__(*args, skipat_grid=skipat_grid, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, skipat_grid: Layout, **kwargs: Any) -> Any:
        carry(_embedded(args, kwargs), skipat_grid)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class PassingBlock(Grafted):
    """An attended block before a run that does not start there: hands the grid on."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        grid, _ = carried(x, f"a {type(self).__name__} before the skipped blocks")
        out = super().__call__(x, *args, **kwargs)  # type: ignore[misc]
        carry(out[0] if isinstance(out, tuple) else out, grid)
        return out


class FeedingBlock(Grafted):
    """An attended block whose Z starts a run: Z_l = MSA(LN(X_l))."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        grid, _ = carried(x, f"the {type(self).__name__} before a skipped block")
        x, z, *others = super().__call__(x, *args, **kwargs)  # type: ignore[misc]
        return _as_the_host(carry(x, grid, z), *others)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        box = Box()
        out = super().forward(with_box(x, box), *args, **kwargs)  # type: ignore[misc]
        return _beside_z(out, box.empty())


class BoxedNorm(Grafted):
    """The norm before an MSA that is tapped or in part kept: hands the box on."""

    def __call__(self, x: Tensor) -> Tensor:
        return _handed_on(_BOX, x, super().__call__(x))  # type: ignore[misc]


class TappedAttention(Grafted):
    """The MSA of a `FeedingBlock`: puts its output, Z, into the box as well."""

    skipat_family: Family

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = super().__call__(*args, **kwargs)  # type: ignore[misc]
        x = first_argument(args, kwargs)
        if hasattr(x, _BOX):  # in a graph of torch.fx, the box was there when it was recorded
            box_of(x).z = out[0] if self.skipat_family.returns_tuple else out
        return out


class SkippedBlock(Grafted):
    """A block in whose MSA's slot Φ runs: Z_l = Φ_l(Z_{l-1}).

    `skipat_feeds_next` says whether the next block is skipped too; else Z is let go.
    """

    phi: Phi
    skipat_feeds_next: bool

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, Proxy):
            # What block before it was recorded whole puts the state on its output by itself.
            state = vars(x).get(_CARRIED)
            return record_whole(self, x if state is None else record_call(carry, x, *state), *args, **kwargs)
        grid, z = carried(x, f"a skipped {type(self).__name__}")
        if z is None:
            raise RuntimeError(
                f"a skipped {type(self).__name__} was given no Z: the block before it was left out, or it was called "
                "twice on the same hidden states without gradients, where the first call uses Z up"
            )
        given: Tensor | Box = z
        if not torch.is_grad_enabled():
            # Only Φ needs this Z. In a box that it empties, Z is gone before the MLP, where memory peaks; and who
            # keeps the hidden states does not keep every Z with them.
            given = Box(z)
            carry(x, grid)
        del z
        x, z, *others = super().__call__(x, given, grid, *args, **kwargs)  # type: ignore[misc]
        return _as_the_host(carry(x, grid, z if self.skipat_feeds_next else None), *others)

    def forward(self, x: Tensor, z: Tensor | Box, grid: Layout, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        box = Box(z.empty() if isinstance(z, Box) else z)
        del z
        box.phi, box.grid = self.phi, grid
        out = super().forward(with_box(x, box), *args, **kwargs)  # type: ignore[misc]
        return _beside_z(out, box.empty())


class RunsPhi:
    """Mixin of what stands in the slot of a skipped block's MSA: its forward gives Z as Φ makes it, for the box too."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        box = box_of(first_argument(args, kwargs))
        out = super().__call__(*args, skipat_box=box, **kwargs)  # type: ignore[misc]
        box.z = out[0] if isinstance(out, tuple) else out
        return out


class SkippedAttention(RunsPhi, nn.Module):
    """Stands in the slot of a removed MSA and returns Z as Φ makes it. No parameters."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, *args: Any, skipat_box: Box, **kwargs: Any) -> Any:
        phi, grid, h = skipat_box.phi, skipat_box.grid, first_argument(args, kwargs)
        z, x = laid_out(grid, skipat_box.empty()), laid_out(grid, h) if phi.reads_x else None
        attended = None if isinstance(grid, Packed) or h.ndim == 4 else attended_tokens(args, kwargs)
        z = packed_again(grid, phi(z, grid, x=x, attended=attended), like=h)
        return (z, None) if self.returns_tuple else z
