"""Training from scratch: the pieces of examples/pretrain.py that its own run does not show."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import pretrain


@pytest.fixture
def dino():
    pytest.importorskip("lightly")
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0}
    return pretrain.Dino(timm.create_model("vit_tiny_patch16_224", **shape), dim=32, steps=4, prototypes=16)


def test_dino_follows_the_student_and_trains_it_alone(dino):
    arm = pretrain.Arm(dino, lambda model, views, _: model.loss(views), pretrain.Arguments(steps=4))
    follower = dino.followed[0]
    for mine, theirs in zip(dino.student.parameters(), follower.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    before = [p.clone() for p in dino.student.parameters()]
    views = [torch.randn(4, 3, 16, 16) for _ in range(2)]
    for _ in range(2):
        arm.step(views, torch.zeros(4))
    assert any(not torch.equal(a, b) for a, b in zip(before, dino.student.parameters(), strict=True))
    assert all(p.grad is None for p in follower.parameters())
    # After the first update, which finds both the same, the second moves by a part of the way.
    for start, mine, theirs in zip(before, dino.student.parameters(), follower.parameters(), strict=True):
        assert not torch.equal(theirs, mine) or torch.equal(start, mine)


def test_what_is_said_of_two_arms(dino, capsys):
    def arm(losses, seconds):
        found = pretrain.Arm(torch.nn.Linear(1, 1), lambda *_: None, pretrain.Arguments(steps=4))
        found.losses, found.seconds = losses, [seconds] * len(losses)
        return found

    pretrain.say({"untouched": arm([4.0, 3.0, 2.0, 1.0], 2.0), "cut": arm([4.0, 2.0, 1.0, 0.5], 1.5)}, window=2)
    said = capsys.readouterr().out
    assert "untouched: loss 1.5000 after 4 steps, 2000 ms a step" in said
    assert "the cut one had 1.5000 after 3 steps, in 56% of the untouched one's time" in said
    pretrain.say({"untouched": arm([2.0, 1.0], 1.0), "cut": arm([2.0, 2.0], 1.0)}, window=2)
    assert "the cut one did not come to 1.5000" in capsys.readouterr().out
