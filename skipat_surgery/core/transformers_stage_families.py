"""The families of transformers whose blocks lie in stages, and attend within windows, or units."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from .dual_carrying import dual_stages
from .family import Family, Grid, pair
from .stages import Stage, Stages
from .tokens import by
from .transformers_shapes import SHAPE_V, transformers_family
from .transformers_stages import FirstLayer, SkippedLayer, TappedLayer, windows_of
from .units import Units


def _grid(tower: Any, height: int, width: int) -> Grid:
    """Images are filled up to whole patches."""
    patch_height, patch_width = pair(tower.config.patch_size)
    return -(-height // patch_height), -(-width // patch_width)


def _merged(tower: Any, stage: int, x: Tensor, args: tuple[Any, ...]) -> Tensor:
    """Patches are merged at the end of a stage, and the grid is the first of what its blocks are given beside X."""
    return tower.encoder.layers[stage].downsample(x, args[0])


def _whole_windows(tower: Any, height: int, width: int) -> Grid:
    """Images are filled up to whole windows, whose side is meant in pixels there."""
    side = tower.config.window_size
    return _grid(tower, height + -height % side, width + -width % side)


def _convolved(tower: Any, stage: int, x: Tensor, args: tuple[Any, ...]) -> Tensor:
    """A stage ends in a convolution of its map."""
    last = tower.encoder.stages[stage]
    return last.patch_embed(last.conv(last.patch_unembed(x, args[0])))[0]


def _strided(tower: Any, height: int, width: int) -> Grid:
    """Patches overlap, and are filled up at the edges of an image."""
    stride = tower.config.patch_stride[0]
    return -(-height // stride), -(-width // stride)


def _florence_size(tower: Any) -> tuple[int, int, int]:
    """That of its processor's images, where the config does not tell, as it need not."""
    return (tower.config.in_channels, *pair(getattr(tower.config, "image_size", None) or 768))


def _refuse_other_strides(tower: Any) -> str | None:
    config, stages = tower.config, range(len(tower.config.depths))
    whole = all(config.patch_size[n] == 2 * config.patch_padding[n] + 1 for n in stages)
    halved = all(config.patch_stride[n] == 2 and config.embed_dim[n] == 2 * config.embed_dim[n - 1] for n in stages[1:])
    if whole and halved:
        return None
    return (
        "Φ is made for maps that are half as high and wide, rounded up, and twice as wide in D from stage to stage, as "
        "in all Florence-2 that were published; give it odd patch_size with patch_padding of half of it, rounded down, "
        "patch_stride 2 from the second stage on, and an embed_dim that doubles"
    )


def _swin(name: str, module: str, prefix: str, *, post_norm: bool = False, **differs: Any) -> Family:
    stages = Stages(
        path="encoder.layers",
        takes_z="layernorm_before" if post_norm else "drop_path",
        first=FirstLayer,
        attended=TappedLayer,
        skipped=SkippedLayer,
        windows=lambda tower, block: windows_of(block),
        between=_merged,
    )
    shape: dict[str, Any] = {
        **SHAPE_V,
        "blocks": "blocks",
        "norm": None if post_norm else "layernorm_before",
        "embeddings": None,
        "image_to_grid": _grid,
        "width": lambda tower: tower.config.embed_dim,
        "blocks_return_tuple": True,
        "stages": replace(stages, **differs.pop("stages", {})),
    }
    towers = differs.pop("towers", (f"{prefix}Model",))
    return transformers_family(name, module, towers, f"{prefix}Layer", 0, **{**shape, **differs})


def _one_size(embeddings: Any, height: int, width: int) -> Grid:
    """Of Hiera, which does not tell its blocks how large an image is."""
    patches = embeddings.patch_embeddings
    if (height, width) != tuple(patches.image_size):
        wanted = by(patches.image_size)
        raise ValueError(
            f"where Hiera is cut, it takes images of the size that it is configured for, {wanted}, got "
            f"{height}×{width}: resize them, or cut a model whose config.image_size is theirs"
        )
    return tuple(patches.tokens_spatial_shape)


def _pooled(tower: Any) -> list[Stage]:
    """Hiera's stages: the first blocks of some of them make the map smaller."""
    config, found, start = tower.config, [], 0
    side, parted = config.query_stride[0], len(config.depths) - 1
    for number, depth in enumerate(config.depths):
        pooled = min(number, config.num_query_pool)
        width = int(config.embed_dim * config.embed_dim_multiplier**number)
        blocks = range(start, start + depth)
        found.append(Stage(blocks, width, side**pooled, fills=False, units=Units(side, parted - pooled)))
        start += depth
    return found


def _refuse_masks(tower: Any) -> str | None:
    if tower.embeddings.is_mae:
        return "it takes units of patches out at random, so Φ has no grid; build it with is_mae=False"
    return None


STAGE_FAMILIES: tuple[Family, ...] = (
    _swin("Swin", "swin", "Swin"),
    _swin("Swin v2", "swinv2", "Swinv2", post_norm=True),
    # It holds the blocks itself, and norms nothing after them.
    _swin("Swin v2 backbone", "swinv2", "Swinv2", post_norm=True, towers=("Swinv2Backbone",), final_norm=None),
    _swin(
        "Swin2SR",
        "swin2sr",
        "Swin2SR",
        post_norm=True,
        blocks="layers",
        image_to_grid=_whole_windows,
        stages={"path": "encoder.stages", "between": _convolved, "residual": True},
    ),
    _swin("Donut's Swin", "donut", "DonutSwin", file="modeling_donut_swin", final_norm=None),
    _swin("MaskFormer's Swin", "maskformer", "MaskFormerSwin", file="modeling_maskformer_swin"),
    transformers_family(
        "Florence-2 vision",
        "florence2",
        ("Florence2VisionBackbone",),
        "Florence2VisionBlock",
        0,
        blocks="",
        norm="spatial_block.norm1",
        attention="spatial_block.window_attn",
        returns_tuple=False,
        embeddings=None,
        final_norm=None,
        width=lambda tower: tower.config.embed_dim[0],
        image_to_grid=_strided,
        image_size=_florence_size,
        maps=True,
        channels_first=True,
        refuse=_refuse_other_strides,
        stages=dual_stages(
            "blocks", "spatial_block", lambda tower, stage, x, args: tower.convs[stage + 1](x), merges="convs"
        ),
    ),
    transformers_family(
        "Hiera",
        "hiera",
        ("HieraModel",),
        "HieraLayer",
        0,
        **{**SHAPE_V, "blocks": "encoder.stages.*.layers", "attention": "attn", "final_norm": None},
        image_to_grid=_one_size,
        width=lambda tower: tower.config.embed_dim,
        blocks_return_tuple=True,
        refuse=_refuse_masks,
        pooled=_pooled,
    ),
)
