"""The shared front: the teacher, started where the student was cut, gives what it gives on its own."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import case_named

import skipat_surgery
from skipat_surgery.convert.sharing import front, keep_input, started_at
from skipat_surgery.observing import outputs_of
from skipat_surgery.tower import Tower

FAMILIES = ["ViTForImageClassification", "CLIPVisionModel", "DINOv3ViTModel", "YolosModel", "timm vit", "timm eva02"]


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_the_teacher_gives_the_same_from_the_students_front(name):
    case = case_named(name)
    teacher, images = case.model(), case.images()
    student = skipat_surgery.apply(copy.deepcopy(teacher), [2, 3])
    mine, theirs = Tower.of(student), Tower.of(teacher)
    whole = outputs_of(teacher, theirs, images, states=[2, 4])
    ran = []
    handle = theirs.blocks[1].get_submodule(theirs.family.attention).register_forward_hook(lambda *_: ran.append(1))
    with keep_input(mine.blocks[2]) as seen:
        outputs_of(student, mine, images)
    with started_at(theirs, 2, seen[0]):
        shared = outputs_of(teacher, theirs, images, states=[2, 4])
    assert not ran  # the front was not computed again
    torch.testing.assert_close(shared.tokens, whole.tokens, rtol=0, atol=0)
    for index in (2, 4):
        torch.testing.assert_close(shared.states[index], whole.states[index], rtol=0, atol=0)
    again = outputs_of(teacher, theirs, images)
    assert ran
    handle.remove()
    torch.testing.assert_close(again.tokens, whole.tokens, rtol=0, atol=0)
    assert all("forward" not in vars(block) for block in theirs.blocks)
    assert len(front(mine)) == 2
