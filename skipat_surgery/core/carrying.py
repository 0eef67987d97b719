"""The host's own modules, made to carry Z and the patch grid from block to block.

Z and the grid travel as an attribute of the hidden-states tensor. A block's ``__call__`` takes them off the tensor
that it is given and puts them on the one that it returns. Its ``forward``, which may be checkpointed and recomputed,
is pure: Z is a tensor in and a tensor out. Nothing is stored on a module, so threads, recomputation and copies cannot
mix two forwards up.

Inside ``forward`` an attribute leads Z past the host's code as well, which runs unchanged through ``super().forward``:
a `Box` on the block's input takes Z out of the MSA of an attended block, and brings it in where a skipped block had its
MSA.

Each class here is a mixin that `grafting.graft` joins with the host's class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .family import Family, Grid
from .grafting import Grafted
from .phi import Phi

_CARRIED = "_skipat_carried"
_BOX = "_skipat_box"


class Box:
    """Holds Z for one reader: a block's own code during its forward, or without gradients the Φ that uses Z up.

    In a skipped block, whose MSA's slot runs Φ, it holds Φ and the patch grid as well.

    It is emptied by then: autograd saves the tensors that lead it, and with Z inside, Z's own graph would hold Z, a
    circle that Python's garbage collector does not see, and a forward whose output is thrown away would never be freed.
    """

    phi: Phi
    grid: Grid

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


def carry(x: Tensor, grid: Grid, z: Tensor | None = None) -> Tensor:
    """Put the grid, and Z where the next block needs it, on the hidden states."""
    setattr(x, _CARRIED, (grid, z))
    return x


def carried_or_none(x: Tensor) -> tuple[Grid, Tensor | None] | None:
    """The grid and Z that the hidden states carry, or None where they carry nothing."""
    return getattr(x, _CARRIED, None)


def carried(x: Tensor, what: str) -> tuple[Grid, Tensor | None]:
    """The grid and Z that the hidden states carry.

    Raises:
        RuntimeError: They carry nothing: something made a new tensor on the way, or skipped the embeddings.
    """
    state = carried_or_none(x)
    if state is None:
        raise RuntimeError(
            f"{what} was given hidden states that do not carry the patch grid and Z. They must come straight from the "
            "embeddings and blocks of the same model; a hook, a pipeline cut or a reentrant checkpoint around whole "
            "blocks makes a new tensor between them and cannot be used with a cut model (non-reentrant "
            "checkpointing can)."
        )
    return state


def images_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The image batch among the arguments of an embeddings module."""
    images = args[0] if args else kwargs.get("pixel_values")
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


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a norm or an MSA."""
    return args[0] if args else kwargs["hidden_states"]


class GridSource(Grafted):
    """Embeddings: the tokens that they return carry the patch grid of the images that they were given."""

    skipat_family: Family

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        height, width = images_of(args, kwargs).shape[-2:]
        out = super().__call__(*args, **kwargs)  # type: ignore[misc]
        tokens = out if isinstance(out, Tensor) else out[0]
        carry(tokens, self.skipat_family.image_to_grid(self, height, width))
        return out


class Carrier(Grafted):
    """A module between the embeddings and the blocks: hands on what its input carries."""

    def __call__(self, x: Tensor) -> Tensor:
        grid, z = carried(x, type(self).__name__)
        return carry(super().__call__(x), grid, z)  # type: ignore[misc]


class PassingBlock(Grafted):
    """An attended block before a run that does not start there: hands the grid on."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        grid, _ = carried(x, f"a {type(self).__name__} before the skipped blocks")
        return carry(super().__call__(x, *args, **kwargs), grid)  # type: ignore[misc]


class FeedingBlock(Grafted):
    """An attended block whose Z starts a run: Z_l = MSA(LN(X_l))."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        grid, _ = carried(x, f"the {type(self).__name__} before a skipped block")
        x, z = super().__call__(x, *args, **kwargs)  # type: ignore[misc]
        return carry(x, grid, z)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        box = Box()
        x = super().forward(with_box(x, box), *args, **kwargs)  # type: ignore[misc]
        return x, box.empty()


class BoxedNorm(Grafted):
    """The norm before an MSA that is tapped or in part kept: hands the box on."""

    def __call__(self, x: Tensor) -> Tensor:
        out = super().__call__(x)  # type: ignore[misc]
        setattr(out, _BOX, box_of(x))
        return out


class TappedAttention(Grafted):
    """The MSA of a `FeedingBlock`: puts its output, Z, into the box as well."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = super().__call__(*args, **kwargs)  # type: ignore[misc]
        box_of(first_argument(args, kwargs)).z = out[0] if isinstance(out, tuple) else out
        return out


class SkippedBlock(Grafted):
    """A block in whose MSA's slot Φ runs: Z_l = Φ_l(Z_{l-1}).

    `skipat_feeds_next` says whether the next block is skipped too; else Z is let go.
    """

    phi: Phi
    skipat_feeds_next: bool

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
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
        x, z = super().__call__(x, given, grid, *args, **kwargs)  # type: ignore[misc]
        return carry(x, grid, z if self.skipat_feeds_next else None)

    def forward(self, x: Tensor, z: Tensor | Box, grid: Grid, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        box = Box(z.empty() if isinstance(z, Box) else z)
        del z
        box.phi, box.grid = self.phi, grid
        x = super().forward(with_box(x, box), *args, **kwargs)  # type: ignore[misc]
        return x, box.empty()


class SkippedAttention(nn.Module):
    """Stands in the slot of a removed MSA and returns Z as Φ makes it. No parameters."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        h = first_argument(args, kwargs)
        box = box_of(h)
        box.z = box.phi(box.empty(), box.grid, x=h if box.phi.reads_x else None)
        return (box.z, None) if self.returns_tuple else box.z
