"""Every example runs, and says what it should."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SAYS = {
    "cut_hf.py": ["6 of 12 blocks skipped", "reloaded, equal: True", "restored, equal: True"],
    "cut_timm.py": ["3 of 12 blocks skipped", "reloaded, equal: True", "restored, equal: True"],
    "distil_plain.py": ["agreement with the teacher on 450 test images"],
    "pretrain.py": ["untouched: loss", "cut: loss", "the cut one"],
    "backbone_features.py": ["block 2: (2, 192, 14, 20)", "block 11: (2, 192, 14, 20)"],
}


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_example(name):
    options = {"pretrain.py": ["--steps", "24", "--depth", "6", "--skip", "2-3"]}.get(name, [])
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *options], capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr
    for line in SAYS[name]:
        assert line in done.stdout
    agreement = re.search(r"test images: ([\d.]+)%", done.stdout)
    assert agreement is None or float(agreement[1]) >= 95


def test_the_docs_show_them_as_they_are():
    guides = "".join(page.read_text() for page in (EXAMPLES.parent / "docs" / "guides").glob("*.md"))
    for name in SAYS:
        assert f"examples/{name}" in guides
    for name in ("distil_plain.py", "backbone_features.py"):
        assert (EXAMPLES / name).read_text() in guides
