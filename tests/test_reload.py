"""The comparison of a checkpoint, loaded in a new process, with the model that was saved."""

from __future__ import annotations

import pytest
import torch
from cases import case_named
from models import cut_of
from transformers import ViTImageProcessor

from skipat_surgery.commands.reload import difference_after_reload


def test_a_checkpoint_that_gives_other_outputs_is_refused(tmp_path):
    case = case_named("YolosForObjectDetection")
    cut, images = cut_of(case.model()).float(), case.images().float()
    cut.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert difference_after_reload(tmp_path, cut, images) < 1e-5
    with torch.no_grad():
        cut.bbox_predictor.layers[-1].bias.add_(0.01)  # neither the tokens nor the logits show it
    with pytest.raises(ValueError, match=r"gives other outputs when it is loaded again, .* do not use it"):
        difference_after_reload(tmp_path, cut, images)
