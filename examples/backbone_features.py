"""Use a cut backbone for dense features, at an image size and shape of one's own."""

from typing import Any

import timm
import torch

import skipat_surgery

# With a network: timm.create_model("vit_small_patch16_dinov3.lvd1689m", pretrained=True) and its like
backbone: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
skipat_surgery.apply(backbone, skip=range(3, 9))

images = torch.randn(2, 3, 224, 320)
with torch.no_grad():
    maps = backbone.forward_intermediates(images, indices=[2, 5, 8, 11], intermediates_only=True)
for index, features in zip([2, 5, 8, 11], maps, strict=True):
    print(f"block {index}: {tuple(features.shape)}")
