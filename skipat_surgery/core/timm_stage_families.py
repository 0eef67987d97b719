"""The families of timm whose blocks lie in stages, and attend within windows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from .dual_carrying import dual_stages
from .family import Family, Grid, pair
from .map_carrying import FirstMapBlock
from .nest_carrying import FirstNestLayer, SkippedNestLayer, TappedNestLayer, pooled
from .stage_carrying import NoWindows, TappedWindows, windows_of
from .stages import Stages
from .timm_shapes import timm_family
from .windows import Windows


def _swin_grid(tower: Any, height: int, width: int) -> Grid:
    patch_height, patch_width = pair(tower.patch_embed.patch_size)
    return height // patch_height, width // patch_width


def _swin(name: str, module: str, prefix: str, path: str, takes_z: str, **differs: Any) -> Family:
    """A family of maps (B, H, W, D) whose stages merge patches before their blocks."""

    def merged(tower: Any, stage: int, x: Tensor, args: Any) -> Tensor:
        return tower.get_submodule(path)[stage + 1].downsample(x)

    return timm_family(
        name,
        module,
        prefix,
        f"{prefix}Block",
        post_norm=takes_z == "norm1",
        width=lambda tower: tower.feature_info[0]["num_chs"],
        num_prefix_tokens=lambda tower: 0,
        image_to_grid=_swin_grid,
        refuse=lambda tower: None,
        maps=True,
        stages=Stages(
            path=path,
            takes_z=takes_z,
            first=FirstMapBlock,
            attended=TappedWindows,
            skipped=NoWindows,
            windows=lambda tower, block: windows_of(block),
            between=merged,
        ),
        **differs,
    )


def _doubles(widths: Sequence[int]) -> bool:
    """Whether each stage is twice as wide as the one before it."""
    return all(wider == 2 * width for width, wider in pairwise(widths))


def _davit_size(tower: Any) -> tuple[int, int, int]:
    return (tower.stem.in_chs, *tower.pretrained_cfg["input_size"][1:])


def _davit_grid(tower: Any, height: int, width: int) -> Grid:
    """Images are filled up to whole patches."""
    down, across = tower.stem.stride
    return -(-height // down), -(-width // across)


def _refuse_davit(tower: Any) -> str | None:
    blocks = [[type(part).__name__ for part in block] for stage in tower.stages for block in stage.blocks]
    if any([name for name in names if name != "Phi"] != ["SpatialBlock", "ChannelBlock"] for names in blocks):
        return "its blocks do not attend within windows first, and then over channels; leave attn_types as it is"
    widths = [info["num_chs"] for info in tower.feature_info]
    sides = [stage.downsample.conv.kernel_size[0] for stage in tower.stages[1:]]
    if all(side == 2 or side % 2 for side in sides) and _doubles(widths):
        return None
    return (
        "Φ is made for maps that are half as high and wide, rounded up, and twice as wide in D from stage to stage, as "
        "in all DaViTs of timm; give it embed_dims that double, and a down_kernel_size of 2 or odd"
    )


def _davit(name: str, part: str) -> Family:
    """A family of maps (B, D, H, W), in whose blocks an attention over channels follows the MSA, which is in a part."""
    return timm_family(
        name,
        "davit",
        "DaVit",
        "torch.nn.modules.container.Sequential",
        norm=f"{part}.norm1",
        attention=f"{part}.attn",
        final_norm="norm_pre",
        width=lambda tower: tower.feature_info[0]["num_chs"],
        num_prefix_tokens=lambda tower: 0,
        image_to_grid=_davit_grid,
        image_size=_davit_size,
        refuse=_refuse_davit,
        maps=True,
        channels_first=True,
        stages=dual_stages("stages", part, lambda tower, stage, x, args: tower.stages[stage + 1].downsample(x)),
    )


def _refuse_nest(tower: Any) -> str | None:
    widths = [info["num_chs"] for info in tower.feature_info]
    if _doubles(widths):
        return None
    return (
        "Φ is made for levels of which each is twice as wide as the one before it, as in all NesTs of timm; give it "
        "embed_dims that double"
    )


STAGE_FAMILIES: tuple[Family, ...] = (
    _swin("Swin", "swin_transformer", "SwinTransformer", "layers", "drop_path1"),
    _swin("Swin v2", "swin_transformer_v2", "SwinTransformerV2", "layers", "norm1"),
    # Its last block norms X itself.
    _swin("Swin v2 CR", "swin_transformer_v2_cr", "SwinTransformerV2Cr", "stages", "norm1", final_norm=None),
    _davit("DaViT", "0"),
    _davit("DaViT with named blocks", "spatial_block"),
    timm_family(
        "NesT",
        "nest",
        "Nest",
        "TransformerLayer",
        blocks="transformer_encoder",
        width=lambda tower: tower.feature_info[0]["num_chs"],
        num_prefix_tokens=lambda tower: 0,
        refuse=_refuse_nest,
        stages=Stages(
            path="levels",
            takes_z="drop_path1",
            first=FirstNestLayer,
            attended=TappedNestLayer,
            skipped=SkippedNestLayer,
            windows=lambda tower, block: Windows.square(tower.block_size),
            between=lambda tower, stage, x, args: pooled(tower.levels[stage + 1], x),
            in_windows=True,
        ),
    ),
)
