"""What meets the `None` of a skipped block among the attention maps, and the ways round it that the guide shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from cases import case_named
from models import cut_of


@pytest.fixture
def model():
    cut = cut_of(case_named("ViTForImageClassification").model()).float()
    cut.set_attn_implementation("eager")
    return cut


@torch.no_grad()
def test_trainer_predicts_without_the_maps(model, tmp_path):
    model.config.output_attentions = True
    images = case_named("ViTForImageClassification").images(batch=6).float()
    arguments = transformers.TrainingArguments(tmp_path, per_device_eval_batch_size=4, report_to=[], use_cpu=True)
    data = [{"pixel_values": image, "labels": 0} for image in images]
    found = transformers.Trainer(model, arguments).predict(data, ignore_keys=["attentions"]).predictions
    np.testing.assert_allclose(found, model(images).logits, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_the_maps_that_are_there_are_gathered(model):
    attentions = model(case_named("ViTForImageClassification").images().float(), output_attentions=True).attentions
    maps = {block: map_ for block, map_ in enumerate(attentions) if map_ is not None}
    gathered = Accelerator(cpu=True).gather_for_metrics(maps)
    assert list(gathered) == [0, 1, 4]
    assert all(torch.equal(gathered[block], attentions[block]) for block in maps)


@torch.no_grad()
def test_none_is_never_taken_for_a_map(model):
    """As a map with no rows would be, whose mean is NaN."""
    attentions = model(case_named("ViTForImageClassification").images().float(), output_attentions=True).attentions
    with pytest.raises(TypeError, match="NoneType"):
        torch.stack(attentions)
