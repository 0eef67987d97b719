"""What the blocks of transformers' Swins need on top of `carrying`: Z lies on the map, whatever the windows' shift.

Their forward lays out the tokens in windows, calls the MSA and takes both back in one piece, in which nothing leads a Z
out or in. So a block that hands its Z on and one that is skipped have a forward of their own, of the same steps.

Source: transformers, ``SwinLayer.forward``, ``DonutSwinLayer.forward`` and ``Swinv2Layer.forward``, whose code this is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .carrying import box_of, carry
from .grafting import Grafted
from .windows import Windows


class FirstLayer(Grafted):
    """The first block of a stage: the grid is among its arguments."""

    def __call__(self, x: Tensor, input_dimensions: tuple[int, int], *args: Any, **kwargs: Any) -> Any:
        x = carry(x.view_as(x), tuple(input_dimensions))
        return super().__call__(x, input_dimensions, *args, **kwargs)  # type: ignore[misc]


class Layer(Grafted):
    """A block: X + Z, then X + MLP(LN(X)). Swin v2 norms what is added."""

    def forward(
        self,
        x: Tensor,
        input_dimensions: tuple[int, int],
        output_attentions: bool | None = None,
        always_partition: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        block: Any = self
        if hasattr(block, "set_shift_and_window_size") and not always_partition:
            block.set_shift_and_window_size(input_dimensions)
        if output_attentions is not None:
            kwargs["output_attentions"] = output_attentions
        norms_after = _norms_after(block)
        z, maps = self.attend(x if norms_after else block.layernorm_before(x), input_dimensions, **kwargs)
        if norms_after:
            x = x + block.drop_path(block.layernorm_before(z))
            return x + block.drop_path(block.layernorm_after(block.output(block.intermediate(x)))), maps
        if not hasattr(block, "mlp"):
            x = x + block.drop_path(z)
            return x + block.output(block.intermediate(block.layernorm_after(x))), maps
        x = x + block.drop_path(block.dropout(z))
        return x + block.dropout(block.mlp(block.layernorm_after(x))), maps

    def attend(self, x: Tensor, grid: tuple[int, int], **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Z (B, H·W, D) of what the MSA reads, (B, H·W, D), and its attention maps where they are wanted."""
        raise NotImplementedError


class TappedLayer(Layer):
    """An attended block of which Z goes into the box, once it lies on the map again."""

    def attend(self, x: Tensor, grid: tuple[int, int], **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """By the MSA, in windows."""
        block: Any = self
        windows = windows_of(block)
        laid_out = windows.partition(x.unflatten(1, tuple(grid)))
        z, *maps = block.attention(laid_out.flatten(1, 2), _mask(block, grid, x), **kwargs)
        z = box_of(x).z = windows.tokens(z, grid)
        return z, maps[0] if maps else None


class SkippedLayer(Layer):
    """A skipped block: what stands in the slot of its MSA is given all tokens."""

    def attend(self, x: Tensor, grid: tuple[int, int], **kwargs: Any) -> tuple[Tensor, None]:
        """By Φ."""
        z, _ = self.attention(x)  # type: ignore[attr-defined]
        return z, None


def _norms_after(block: Any) -> bool:
    """Whether a block is of Swin v2, which norms Z and what its MLP gives."""
    return hasattr(block, "_compute_window_shift")


def _mask(block: Any, grid: tuple[int, int], like: Tensor) -> Tensor | None:
    """What keeps apart what the shift of a filled-up grid brought together, (n, side², side²)."""
    sides = [length + -length % block.window_size for length in grid]
    one_by_one = _norms_after(block) or hasattr(block, "set_shift_and_window_size")  # and in MaskFormer together
    return block.get_attn_mask(*(sides if one_by_one else (sides,)), dtype=like.dtype, device=like.device)


def windows_of(block: Any) -> Windows:
    """The windows of a block."""
    side, shift = int(block.window_size), int(block.shift_size)
    return Windows((side, side), (shift, shift), fills_first=True)
