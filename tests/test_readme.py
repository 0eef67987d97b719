"""The page people see first: its length, its links, its figures, and the ways to load a model that it shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from cases import case_named
from models import cut_of
from pages import README, ROOT, blocks

TEXT = README.read_text()
WAYS = [block for block in blocks(README, "python") if "skipat_surgery.apply" not in block]


def test_it_can_be_read_in_one_go():
    assert len(TEXT.splitlines()) <= 200


def test_it_needs_nothing_that_a_clone_lacks():
    assert "../" not in TEXT


def test_its_links_lead_somewhere():
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert links
    for link in filter(None, links):
        assert (ROOT / link).exists(), link


def test_every_row_of_its_table_is_in_the_results():
    rows = TEXT.split("## What a cut keeps")[1].split("\n## ")[0].replace("**", "")
    measured = [
        [cell.strip() for cell in row.split("|")[2:-1]] for row in re.findall(r"^\|.*×.*\|$", rows, re.MULTILINE)
    ]
    assert 0 < len(measured) <= 8
    results = (ROOT / "docs/results.md").read_text().splitlines()
    for name, speed, kept in measured:
        assert any(line.startswith(f"| {name} | {speed} |") and f"| {kept} |" in line for line in results), name


def test_the_ways_to_load_are_those_of_the_docs():
    assert len(WAYS) == 3
    assert WAYS == blocks(ROOT / "docs/checkpoints.md", "python")[:3]


@pytest.mark.parametrize("block", WAYS, ids=["with the library", "without", "timm"])
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
