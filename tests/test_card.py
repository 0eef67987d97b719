"""What the model card says, and that nobody else's takes its place."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

import skipat_surgery
from skipat_surgery.core.card import model_card

SKIPAT = {"version": 1, "phi": {"3": {"expansion": 0.25}}, "base_model": "founder/vit"}
RESULTS = {
    "dataset": "images",
    "rows": {"teacher": {"images": 10, "top1": 0.9}, "cut": {"top1": 0.5}, "distilled": {"top1": 0.8}},
    "steps": 5,
    "seconds": 60.0,
    "machine": "a machine",
    "precision": "no",
}


def card(**facts) -> str:
    return model_card({**SKIPAT, "results": {**RESULTS, **facts}}, "transformers", "AutoModel")


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"teacher": None, "label_weight": 0.0}, "Against the untouched model on `images`"),
        ({"teacher": "founder/large", "label_weight": 0.0}, "Against `founder/large` on `images`"),
        ({"teacher": None, "label_weight": 0.0}, "labels were used for measuring only"),
        ({"teacher": None, "label_weight": 0.5}, "labels were learned from too, with weight 0.5"),
        ({"teacher": None}, "| teacher | 90.00 |"),
        ({"teacher": "founder/large"}, "| untouched | 90.00 |"),
        ({"teacher": None, "label_weight": 0.5, "steps": 0}, "labels were used for measuring only"),
        ({}, "whether it learned from labels is not recorded"),
    ],
)
def test_it_says_what_happened(facts, says):
    assert says in card(**facts)


def test_it_says_which_mlps_are_narrower():
    assert "narrower" not in model_card(SKIPAT, "transformers", "AutoModel")
    narrow = model_card({**SKIPAT, "mlp_widths": {"0": 1160, "3": 64}}, "transformers", "AutoModel")
    assert "left to MLPs that are narrower than in the base model: 1,160 (block 0), 64 (block 3)" in narrow


def test_without_labels_none_was_read():
    rows = {"teacher": {"images": 10}, "cut": {"patch_cosine": 0.5}}
    assert "no label was read" in card(rows=rows, teacher=None, label_weight=0.0)


def test_a_model_that_was_only_cut_says_so():
    rows = {"teacher": {"images": 10}, "cut": {"patch_cosine": 0.5}}
    assert "on `images`: cut, not trained; " in card(rows=rows, teacher=None, label_weight=0.0, steps=0)


def test_the_trainer_keeps_it(vit, tmp_path):
    """`Trainer.create_model_card` writes over README.md; ours stays, with the Trainer's facts at its end."""
    cut = skipat_surgery.apply(vit.float(), [2, 3])
    items = [{"pixel_values": torch.randn(3, 32, 32), "labels": 0} for _ in range(4)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(cut, arguments, train_dataset=items)
    trainer.train()
    trainer.save_model()
    ours = (tmp_path / "README.md").read_text()
    trainer.create_model_card(model_name="mine")
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(ours.rstrip())
    assert "train_batch_size: 2" in text


def test_a_stock_models_card_is_left_to_transformers(vit, tmp_path):
    items = [{"pixel_values": torch.randn(3, 32, 32), "labels": 0}]
    trainer = Trainer(vit.float(), TrainingArguments(str(tmp_path), report_to=[], use_cpu=True), train_dataset=items)
    trainer.create_model_card(model_name="mine")
    assert "2301.02240" not in (tmp_path / "README.md").read_text()
