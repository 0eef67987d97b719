"""The models of transformers that look close enough to be tried and cannot be cut, each with the reason."""

from __future__ import annotations

_PLAIN = "use a plain ViT, such as DINOv2 or DINOv3"
# Packages whose models look close enough to be tried, each with the reason and what to use instead.
REFUSED: dict[str, str] = {
    "transformers.models.vit_mae.": "it shuffles and drops patches, so Φ has no grid; load its encoder as a ViTModel",
    "transformers.models.kosmos2_5.": "what reads its vision tower also reads the padding behind the patches of each "
    f"image, for which Φ makes no Z; {_PLAIN}",
    "transformers.models.videomae.modeling_videomae.VideoMAEForPreTraining": "it drops the patches that are masked, so "
    "Φ has no grid; load its encoder as a VideoMAEModel, or as a VideoMAEForVideoClassification",
    "transformers.models.timesformer.": "its blocks attend twice, over the frames of a patch and over the patches of a "
    "frame, so that no one MSA gives Z; use a model that attends to all patches at once: VideoMAE, ViViT or V-JEPA 2",
    "transformers.models.hiera.modeling_hiera.HieraBackbone": "it does not lay its tokens out in the units in which "
    "its blocks attend and pool, so that what they take for neighbours are none on any grid; use a HieraModel, whose "
    "reshaped_hidden_states are the maps of its stages",
    "transformers.models.hiera.modeling_hiera.HieraForPreTraining": "it takes units of patches out at random, so Φ has "
    "no grid; load its encoder as a HieraModel, or as a HieraForImageClassification",
}
