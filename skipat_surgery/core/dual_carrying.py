"""What the blocks of DaViTs need on top of `carrying`: each attends within windows of its map, and then over channels.

The second is no MSA over tokens, and stays. Z is what the first gives, on the map, so that it fits the first of the
next block, past the second of its own. Their forward adds convolutions of the map on the way to the MSA, which nothing
leads a Z past. So a block that hands its Z on and one that is skipped have a forward of their own, of the same steps,
which calls what is in the first part, and not that part as a whole.

Source: transformers, ``Florence2VisionSpatialBlock.forward``, and timm, ``davit.SpatialBlock.forward``, whose code this
is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .carrying import box_of, boxed_like
from .family import pair
from .grafting import Grafted
from .map_carrying import FirstChannelsFirstBlock
from .stages import Stages
from .windows import Windows


class DualBlock(Grafted):
    """A block: X + Z and X + MLP(LN(X)), each after a convolution, and then the part that attends over channels."""

    def forward(self, x: Tensor) -> Tensor:
        spatial, over_channels = _parts(self)
        grid = (x.shape[2], x.shape[3])
        tokens = _convolved(spatial, 1, x).flatten(2).transpose(1, 2)
        z = self.attend(spatial, boxed_like(x, spatial.norm1(tokens)), grid)
        tokens = tokens + spatial.drop_path1(z)
        tokens = _convolved(spatial, 2, tokens.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        mlp = spatial.ffn if _is_florence(spatial) else spatial.mlp
        tokens = tokens + spatial.drop_path2(mlp(spatial.norm2(tokens)))
        return over_channels(tokens.transpose(1, 2).unflatten(2, grid))

    def attend(self, spatial: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Z (B, H·W, D) of what the MSA reads, (B, H·W, D)."""
        raise NotImplementedError


class TappedDualBlock(DualBlock):
    """An attended block of which Z goes into the box."""

    def attend(self, spatial: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """By the MSA, in windows."""
        box, x = box_of(x), x.unflatten(1, grid)
        if _is_florence(spatial):  # whose MSA lays them out itself
            z = box.z = spatial.window_attn(x)
            return z
        windows = dual_windows(self)
        z = box.z = windows.tokens(spatial.attn(windows.partition(x).flatten(1, 2)), grid)
        return z


class SkippedDualBlock(DualBlock):
    """A skipped block: what stands in the slot of its MSA is given all tokens."""

    def attend(self, spatial: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """By Φ."""
        return (spatial.window_attn if _is_florence(spatial) else spatial.attn)(x)


def dual_stages(path: str, part: str, between: Callable[..., Tensor], merges: str | None = None) -> Stages:
    """The stages of such blocks, the MSA of which is in a part; the rest as `Stages` has it."""
    return Stages(
        path=path,
        takes_z=f"{part}.drop_path1",
        first=FirstChannelsFirstBlock,
        attended=TappedDualBlock,
        skipped=SkippedDualBlock,
        windows=lambda tower, block: dual_windows(block),
        between=between,
        merges=merges,
    )


def dual_windows(block: Any) -> Windows:
    """The windows of an attended block."""
    spatial, _ = _parts(block)
    return Windows(pair(spatial.window_attn.window_size if _is_florence(spatial) else spatial.window_size))


def _parts(block: Any) -> tuple[Any, Any]:
    """What attends within windows, and what attends over channels."""
    spatial, over_channels, *_ = block.children()  # and Φ
    return spatial, over_channels


def _is_florence(spatial: Any) -> bool:
    """Whether a part is of transformers' Florence-2, which has other names than timm's DaViT."""
    return hasattr(spatial, "window_attn")


def _convolved(spatial: Any, number: int, x: Tensor) -> Tensor:
    """A map (B, D, H, W), and its convolution added."""
    if _is_florence(spatial):
        return spatial.get_submodule(f"conv{number}")(x) + x
    return spatial.get_submodule(f"cpe{number}")(x)
