"""The comparison of a checkpoint, loaded in a new process, with the model that was saved."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import skipat_surgery
from skipat_surgery.commands.reload import difference_after_reload


def test_a_checkpoint_that_gives_other_outputs_is_refused(vit, tmp_path):
    cut = skipat_surgery.apply(copy.deepcopy(vit), [2, 3]).float()
    cut.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert difference_after_reload(tmp_path, cut, images) < 1e-5
    with torch.no_grad():
        cut.classifier.weight.mul_(1.5)
    with pytest.raises(ValueError, match=r"gives other outputs when it is loaded again, .* do not use it"):
        difference_after_reload(tmp_path, cut, images)
