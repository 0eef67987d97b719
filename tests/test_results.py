"""Every result of the library reads as a table and turns into plain data."""

from __future__ import annotations

import json

import pytest
import torch
from cases import case_named

import skipat_surgery


@pytest.fixture(scope="module")
def results():
    torch.manual_seed(0)
    model = case_named("ViTForImageClassification").model()
    labelled = [(images, torch.zeros(20)) for images in torch.randn(160, 3, 32, 32, dtype=torch.float64).split(20)]
    found = [skipat_surgery.cka(model, labelled, progress=False)]
    found.append(skipat_surgery.plan(model, labelled, n_skip=1, max_run=1, progress=False))
    teacher = case_named("ViTForImageClassification").model()
    skipat_surgery.apply(model, [2, 3])
    found.append(skipat_surgery.report(model))
    found.append(skipat_surgery.solve(model, teacher, labelled, progress=False))
    found.append(skipat_surgery.align(model, teacher, labelled, steps=2, progress=False))
    found.append(skipat_surgery.distill(model, teacher, labelled, steps=2, progress=False))
    return {type(result).__name__: result for result in found}


SAYS = {
    "Similarity": "160 images",
    "Plan": "chosen",
    "Report": "2 of 6 blocks skipped",
    "SolveResult": "Solved on 160 images",
    "AlignResult": "last",
    "DistillResult": "Distilled for 2 steps",
}


@pytest.mark.parametrize("name", SAYS)
def test_a_result(results, name):
    result = results[name]
    assert SAYS[name] in str(result)
    assert "<pre>" in result._repr_html_()
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == result.to_dict()


def test_what_a_batch_may_be():
    from skipat_surgery.observing import labels_of, pixels_of

    images, labels = torch.randn(2, 3, 4, 4), torch.tensor([0, 1])
    batches = [images, (images, labels), [images, labels], {"pixel_values": images, "labels": labels}]
    assert all(pixels_of(batch) is images for batch in batches)
    assert [labels_of(batch) is labels for batch in batches] == [False, True, True, True]
    with pytest.raises(TypeError, match="a batch must be images"):
        pixels_of("images")
