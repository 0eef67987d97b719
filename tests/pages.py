"""The pages that users read, the snippets in them, and the world that these take as given."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import timm
import torch
from test_authors import random_weights
from transformers import ViTConfig, ViTForImageClassification

import skipat_surgery

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = {path.name: path.read_text() for path in (ROOT / "examples").glob("*.py")}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`((?:skipat|accelerate launch|python) [^`]+)`")
# What is put in the place of a page's own words: a name that only the Hub knows, and work that takes minutes.
INSTEAD = {"hf-hub:you/": "local-dir:you/", "steps=540": "steps=2"}
MODEL, CUT, TIMM_CUT = "google/vit-base-patch16-224", "you/vit-cut", "you/timm-vit-cut"
SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32, "patch_size": 8}


def name_of(page: Path) -> str:
    """The path of a page inside the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language, in order."""
    return [text for found, text in FENCE.findall(page.read_text()) if found == language]


def snippets(page: Path) -> list[str]:
    """The Python of a page that runs nowhere else: examples that it shows run as such."""
    return [block for block in blocks(page, "python") if block not in EXAMPLES.values()]


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page, in blocks and in the text, as lists of words without comments."""
    text = FENCE.sub("", page.read_text())
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [found.replace("\n", " ") for found in INLINE.findall(text)]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def make_world(folder: Path) -> dict[str, Any]:
    """The models that the pages name, under these names in a folder, and the variables that they take as given."""
    torch.manual_seed(0)
    teacher = ViTForImageClassification(ViTConfig(**SMALL, num_labels=5)).eval()
    teacher.save_pretrained(folder / MODEL)
    skipat_surgery.apply(copy.deepcopy(teacher), skip=range(3, 9)).save_pretrained(folder / CUT)
    host = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, num_heads=2)
    skipat_surgery.apply(host, skip=range(3, 9)).save_pretrained(folder / TIMM_CUT)
    torch.save({"model": random_weights()}, folder / "skipat_tiny_patch16_224.t7")
    return {"model": copy.deepcopy(teacher), "batches": torch.randn(64, 3, 32, 32).split(16)}


def run(code: list[str], name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Run blocks in order, in one namespace, with `INSTEAD` put in; returns the namespace."""
    namespace = {"__name__": "page", **given}
    for block in code:
        for words, others in INSTEAD.items():
            block = block.replace(words, others)
        exec(compile(block, name, "exec"), namespace)
    return namespace
