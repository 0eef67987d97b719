"""Pushing to a Hub over HTTP, and loading from it by id in new processes with an empty cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub

HERE = Path(__file__).parent

PUSH = """
import sys, torch
from cases import case_named
from models import cut_of
folder = sys.argv[1]
for name, repo in [("ViTForImageClassification", "founder/hf-cut"), ("timm vit", "founder/timm-cut")]:
    case = case_named(name)
    cut, images = cut_of(case.model()).float(), case.images().float()
    with torch.no_grad():
        torch.save((images, case.tensors(cut, images)), f"{folder}/{repo.split('/')[1]}.pt")
    print(cut.push_to_hub(repo, commit_message="Cut", tags=["tiny"]))
"""

SAVE_AND_PUSH = """
import sys
from cases import case_named
from models import cut_of
cut = cut_of(case_named("ViTForImageClassification").model()).float()
cut.save_pretrained(f"{sys.argv[1]}/saved", push_to_hub=True, repo_id="founder/saved", commit_message="Saved")
"""

LOAD = """
import sys, torch
folder, how = sys.argv[1:]
if how == "library":
    import skipat_surgery, timm
else:
    sys.modules["skipat_surgery"] = None
from transformers import AutoModelForImageClassification
options = {"trust_remote_code": True} if how == "remote" else {}
images, (expected,) = torch.load(f"{folder}/hf-cut.pt")
with torch.no_grad():
    model = AutoModelForImageClassification.from_pretrained("founder/hf-cut", **options)
    assert torch.equal(model(images).logits, expected)
    if how == "library":
        images, (expected,) = torch.load(f"{folder}/timm-cut.pt")
        assert torch.equal(timm.create_model("hf-hub:founder/timm-cut", pretrained=True).eval()(images), expected)
        wrapper = AutoModelForImageClassification.from_pretrained("founder/timm-cut")
        assert type(wrapper).__name__ == "TimmWrapperForImageClassification"
        assert torch.equal(wrapper.eval()(images).logits, expected)
print("equal")
"""

PUSH_TWICE = """
from cases import case_named
from models import cut_of
cut = cut_of(case_named("ViTForImageClassification").model()).float()
for step in ("create", "lfs", "commit"):
    try:
        cut.push_to_hub(f"founder/at-{step}")
    except RuntimeError as error:
        print(f"{step}: {error}".replace(chr(10), " "))
    cut.push_to_hub(f"founder/at-{step}")
"""


def run(hub: Hub, code: str, home: Path, *args: str) -> str:
    """Run code in a new process whose Hub is this one, with a cache of its own."""
    folders = [str(HERE), str(HERE / "contract"), str(HERE.parent)]
    environment = {**hub.environment(home), "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run(
        [sys.executable, "-c", code, *args], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    with Hub() as hub:
        folder = tmp_path_factory.mktemp("hub")
        run(hub, PUSH, folder / "pusher", str(folder))
        yield hub, folder


def test_a_push_is_one_commit_with_weights_code_and_card(pushed):
    hub, _ = pushed
    assert hub.commits["founder/hf-cut"] == ["initial commit", "Cut"]
    files = hub.repos["founder/hf-cut"]
    assert {"config.json", "model.safetensors", "modeling.py", "phi.py", "README.md"} <= files.keys()
    assert {"config.json", "model.safetensors", "README.md"} <= hub.repos["founder/timm-cut"].keys()
    for repo in hub.repos.values():
        card = repo["README.md"].decode()
        assert "arxiv.org/abs/2301.02240" in card
        assert "blocks 2, 3, 5" in card
        assert "- tiny" in card
        assert "## Load it" in card


@pytest.mark.parametrize("how", ["library", "remote"])
def test_loading_by_id_from_an_empty_cache(pushed, how):
    hub, folder = pushed
    assert "equal" in run(hub, LOAD, folder / f"home-{how}", str(folder), how)


def test_a_push_that_fails_halfway_says_so_and_can_be_repeated(tmp_path):
    steps = ("create", "lfs", "commit")
    with Hub() as hub:
        hub.fail_at = {f"founder/at-{step}": step for step in steps}
        said = dict(line.split(": ", 1) for line in run(hub, PUSH_TWICE, tmp_path).splitlines())
        for step in steps:
            expected = "nothing was created" if step == "create" else "exists, but nothing was committed to it"
            assert f"{expected}. Push again to repeat it" in said[step]
            assert hub.commits[f"founder/at-{step}"] == ["initial commit", "Upload a model with Skip-Attention"]
            assert "model.safetensors" in hub.repos[f"founder/at-{step}"]


def test_saving_with_a_push_pushes_our_card_and_code(tmp_path):
    with Hub() as hub:
        run(hub, SAVE_AND_PUSH, tmp_path / "home", str(tmp_path))
        assert hub.commits["founder/saved"] == ["initial commit", "Saved"]
        files = hub.repos["founder/saved"]
    assert {"config.json", "model.safetensors", "modeling.py", "README.md"} <= files.keys()
    assert files["README.md"].decode() == (tmp_path / "saved" / "README.md").read_text()
    assert "arxiv.org/abs/2301.02240" in files["README.md"].decode()
