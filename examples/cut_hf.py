"""Cut a transformers model, read the report, save it, load it, and undo the cut."""

import tempfile

import torch
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

import skipat_surgery

# With a network: AutoModelForImageClassification.from_pretrained("google/vit-base-patch16-224")
model = ViTForImageClassification(ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768)).eval()
images = torch.randn(2, 3, 224, 224)
before = model(images).logits

skipat_surgery.apply(model, skip=range(3, 9))
print(skipat_surgery.report(model))

with tempfile.TemporaryDirectory() as directory:
    model.save_pretrained(directory)
    loaded = AutoModelForImageClassification.from_pretrained(directory).eval()
    print("reloaded, equal:", torch.equal(loaded(images).logits, model(images).logits))

skipat_surgery.restore(model)
print("restored, equal:", torch.equal(model(images).logits, before))
