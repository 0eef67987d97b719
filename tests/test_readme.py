"""The ways to load a model that the README shows, each run in a new process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import case_named
from models import cut_of

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README.split("## Save and load")[1].split("\n## ")[0], flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=["with the library", "without", "timm"])
def test_a_way_to_load(block, tmp_path):
    is_timm = "timm.create_model" in block
    case = case_named("timm vit" if is_timm else "ViTForImageClassification")
    cut, images = cut_of(case.model()).float(), case.images().float()
    cut.save_pretrained(tmp_path / "cut")
    with torch.no_grad():
        torch.save((images, case.tensors(cut, images)[0]), tmp_path / "expected.pt")
    code = block.replace("hf-hub:you/timm-vit-cut", f"local-dir:{tmp_path}/cut").replace(
        "you/vit-cut", f"{tmp_path}/cut"
    )
    assert code != block
    if "import skipat_surgery" not in block:
        code = f"import sys\nsys.modules['skipat_surgery'] = None\n{code}"
    code += f"""
import torch
images, expected = torch.load("{tmp_path}/expected.pt")
with torch.no_grad():
    found = model.eval()(images)
assert torch.equal(getattr(found, "logits", found), expected)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, stdin=subprocess.DEVNULL)


def test_all_three_ways_are_there():
    assert len(BLOCKS) == 3
