"""Which models can be cut, and where: one entry a family.

A *tower* is the module that owns the blocks. An entry names the tower and block classes and the slots that the surgery
touches. Classes are named by their dotted path, so that nothing is imported before a model of that family exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Grid = tuple[int, int]


class UnsupportedModelError(ValueError):
    """The model is of no supported family, or is in a form that cannot be cut."""


@dataclass(frozen=True)
class Family:
    """Where a family keeps what the surgery needs. Paths are relative to the tower, slots to the block.

    Args:
        name: What users call the family.
        tower: Dotted path of the class that owns the blocks.
        block: Dotted path of the class of every block.
        blocks: Path of the sequence of blocks.
        norm: Slot of the norm that feeds the attention; None where the attention reads the block's input itself.
        attention: Slot of the MSA.
        returns_tuple: Whether the MSA returns (Z, weights) rather than Z.
        embeddings: Path of the module whose output enters the blocks and whose first argument is the image batch;
            None where the tower's own ``_pos_embed`` is that place, as in timm.
        final_norm: Path of the norm after the last block.
        width: From the tower, the width D of its tokens.
        num_prefix_tokens: From the tower, the number of tokens before the patches.
        image_to_grid: From the tower's embeddings and (height, width) of the images, the patch grid.
        image_size: From the tower, the configured (channels, height, width).
        carriers: Paths of modules between the embeddings and the first block.
        drop: Further slots of a block that only its MSA uses, set to None where it is skipped.
        refuse: From the tower, a reason not to cut this model, or None.
    """

    name: str
    tower: str
    block: str
    blocks: str
    norm: str | None
    attention: str
    returns_tuple: bool
    embeddings: str | None
    final_norm: str
    width: Callable[[Any], int]
    num_prefix_tokens: Callable[[Any], int]
    image_to_grid: Callable[[Any, int, int], Grid]
    image_size: Callable[[Any], tuple[int, int, int]]
    carriers: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    refuse: Callable[[Any], str | None] = lambda tower: None

    def __reduce__(self) -> tuple[Any, ...]:
        return family_with_tower, (self.tower,)

    def block_list(self, tower: nn.Module) -> nn.ModuleList | nn.Sequential:
        """The blocks, in order."""
        return tower.get_submodule(self.blocks)  # type: ignore[return-value]

    def grid(self, tower: nn.Module) -> Grid:
        """(H, W) of the patch grid at the configured image size."""
        _, height, width = self.image_size(tower)
        return self.image_to_grid(self.grid_owner(tower), height, width)

    def grid_owner(self, tower: nn.Module) -> nn.Module:
        """The module that `image_to_grid` reads: the embeddings, or the tower itself."""
        return tower if self.embeddings is None else tower.get_submodule(self.embeddings)


def pair(value: Any) -> tuple[int, int]:
    """(v, v) of a number, (a, b) of a sequence."""
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _config_image_size(tower: Any) -> tuple[int, int, int]:
    return (tower.config.num_channels, *pair(tower.config.image_size))


def _patch_embeddings_grid(embeddings: Any, height: int, width: int) -> Grid:
    patch_height, patch_width = pair(embeddings.patch_embeddings.patch_size)
    return height // patch_height, width // patch_width


def _shape_v(name: str, module: str, prefix: str, num_prefix_tokens: int) -> Family:
    """transformers' ViT and the models that share its layer, embeddings and loop."""
    path = f"transformers.models.{module}.modeling_{module}.{prefix}"
    return Family(
        name=name,
        tower=f"{path}Model",
        block=f"{path}Layer",
        blocks="layers",
        norm="layernorm_before",
        attention="attention",
        returns_tuple=True,
        embeddings="embeddings",
        final_norm="layernorm",
        width=lambda tower: tower.config.hidden_size,
        num_prefix_tokens=lambda tower: num_prefix_tokens,
        image_to_grid=_patch_embeddings_grid,
        image_size=_config_image_size,
    )


def _timm_grid(tower: Any, height: int, width: int) -> Grid:
    return tuple(tower.patch_embed.dynamic_feat_size((height, width)))


def _timm_image_size(tower: Any) -> tuple[int, int, int]:
    size = tower.patch_embed.img_size or tower.pretrained_cfg["input_size"][1:]
    return (tower.patch_embed.proj.in_channels, *pair(size))


def _timm_refuse(tower: Any) -> str | None:
    if getattr(tower.patch_drop, "prob", 0.0):
        return "its patch dropout removes tokens in training, so there is no grid; create it with patch_drop_rate=0"
    if tower.patch_embed.flatten and not tower.patch_embed.strict_img_size:
        return "it flattens patches of any size, so the grid is lost; create it with dynamic_img_size=True"
    return None


def _timm_vit(name: str, tower: str) -> Family:
    return Family(
        name=name,
        tower=tower,
        block="timm.models.vision_transformer.Block",
        blocks="blocks",
        norm="norm1",
        attention="attn",
        returns_tuple=False,
        embeddings=None,
        final_norm="norm",
        width=lambda tower: tower.embed_dim,
        num_prefix_tokens=lambda tower: tower.num_prefix_tokens,
        image_to_grid=_timm_grid,
        image_size=_timm_image_size,
        carriers=("norm_pre",),
        refuse=_timm_refuse,
    )


FAMILIES: tuple[Family, ...] = (
    _shape_v("ViT, DINO (transformers)", "vit", "ViT", num_prefix_tokens=1),
    _shape_v("DeiT (transformers)", "deit", "DeiT", num_prefix_tokens=2),
    _timm_vit("VisionTransformer (timm)", "timm.models.vision_transformer.VisionTransformer"),
    _timm_vit("VisionTransformerDistilled (timm)", "timm.models.deit.VisionTransformerDistilled"),
)


def family_with_tower(path: str) -> Family:
    """The family whose tower class is at this dotted path."""
    return next(family for family in FAMILIES if family.tower == path)


def dotted(cls: type) -> str:
    """``module.QualifiedName`` of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def is_a(module: nn.Module, path: str) -> bool:
    """Whether the module is of the class at this dotted path, or of a subclass."""
    return any(dotted(cls) == path for cls in type(module).__mro__)


def supported() -> str:
    """The supported families, for error messages."""
    return "; ".join(family.name for family in FAMILIES)


def family_of(module: nn.Module) -> Family | None:
    """The family whose tower this module is, the most specific first; None where it is no tower."""
    for cls in type(module).__mro__:
        for family in FAMILIES:
            if dotted(cls) == family.tower:
                return family
    return None


def find_tower(model: nn.Module) -> tuple[str, nn.Module, Family]:
    """The one tower in a model: (path, tower, family).

    Raises:
        UnsupportedModelError: There is none, there are several, or this one cannot be cut; with the reason.
    """
    towers = [(path, module, family_of(module)) for path, module in model.named_modules()]
    found = [(path, module, family) for path, module, family in towers if family is not None]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds no vision transformer that can be cut. Supported: {supported()}"
        )
    if len(found) > 1:
        listed = ", ".join(f"{path or '(root)'} ({family.name})" for path, _, family in found)
        raise UnsupportedModelError(
            f"{type(model).__name__} holds several vision transformers: {listed}. Pass the one to cut, such as "
            f"model.get_submodule({found[0][0]!r})"
        )
    path, tower, family = found[0]
    check_tower(tower, family)
    return path, tower, family


def check_tower(tower: nn.Module, family: Family) -> None:
    """Check a tower against its entry.

    Raises:
        UnsupportedModelError: A block is of another class, or the family refuses this model.
    """
    for index, block in enumerate(family.block_list(tower)):
        if not is_a(block, family.block):
            raise UnsupportedModelError(
                f"block {index} of {type(tower).__name__} is a {dotted(type(block))}, where {family.name} has "
                f"{family.block}; such blocks cannot be cut. Supported: {supported()}"
            )
    reason = family.refuse(tower)
    if reason is not None:
        raise UnsupportedModelError(f"this {family.name} cannot be cut: {reason}")


def images_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The image batch among the arguments of an embeddings module."""
    images = args[0] if args else kwargs.get("pixel_values")
    if not isinstance(images, Tensor):
        raise TypeError("the embeddings were called without pixel_values, so the patch grid is unknown")
    return images
