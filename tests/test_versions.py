"""Checkpoints that were written once must load, with the same outputs, for ever after.

``python tests/test_versions.py`` writes those of the present version anew; commit them when the version changes, and
keep the old ones.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import transformers

import skipat_surgery
from skipat_surgery import PhiConfig, SkipatConfig
from skipat_surgery.core.config import FORMAT_VERSION

DATA = Path(__file__).parent / "data"
STORED = sorted(path.relative_to(DATA).as_posix() for path in DATA.glob("v*/*") if path.is_dir())
PHIS = {1: PhiConfig(), 2: PhiConfig.paper(), 3: PhiConfig(expansion=0.25, kernel_size=3, channel_attention=False)}
WIDTHS = {0: 16, 3: 8}


@torch.no_grad()
@pytest.mark.parametrize("stored", STORED)
def test_a_stored_checkpoint_gives_the_outputs_that_it_gave(stored):
    folder = DATA / stored
    images, expected = torch.load(folder / "expected.pt")
    if folder.name == "timm":
        found = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)
    else:
        found = transformers.AutoModelForImageClassification.from_pretrained(folder)(images).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_present_version_is_stored():
    assert {f"v{FORMAT_VERSION}/timm", f"v{FORMAT_VERSION}/transformers"} <= set(STORED)


def write(folder: Path) -> None:
    """Small models with random weights, and what they give."""
    torch.manual_seed(0)
    images = torch.rand(2, 3, 16, 24)
    shape = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.ViTConfig(**shape, image_size=(16, 24), patch_size=8, num_labels=3)
    vit = transformers.ViTForImageClassification(config)
    size = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 16, "depth": 5, "num_heads": 2, "mlp_ratio": 1.5}
    for name, model in (
        ("transformers", vit),
        ("timm", timm.create_model("vit_tiny_patch16_224", num_classes=3, **size)),
    ):
        skipat_surgery.apply(model, SkipatConfig(PHIS, mlp_widths=WIDTHS)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            output = model(images)
        model.save_pretrained(folder / name)
        for code in (folder / name).glob("*.py"):  # the library is at hand here
            code.unlink()
        torch.save((images, getattr(output, "logits", output)), folder / name / "expected.pt")


if __name__ == "__main__":
    write(DATA / f"v{FORMAT_VERSION}")
