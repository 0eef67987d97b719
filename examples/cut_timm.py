"""Cut a timm model with a Φ of its own for each block, save it, load it, and undo the cut."""

import tempfile

import timm
import torch

import skipat_surgery
from skipat_surgery import PhiConfig

# With a network: timm.create_model("vit_small_patch16_224.augreg_in1k", pretrained=True)
model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
images = torch.randn(2, 3, 224, 224)
before = model(images)

skipat_surgery.apply(model, skip={3: PhiConfig(), 4: PhiConfig(expansion=0.25), 7: PhiConfig.paper()})
print(skipat_surgery.report(model))

with tempfile.TemporaryDirectory() as directory:
    timm.models.save_for_hf(model, directory, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
    print("reloaded, equal:", torch.equal(loaded(images), model(images)))

skipat_surgery.restore(model)
print("restored, equal:", torch.equal(model(images), before))
