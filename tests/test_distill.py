"""The pieces of a distillation, by value."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

import skipat_surgery
from skipat_surgery.convert.evaluation import Evaluator
from skipat_surgery.convert.losses import (
    NO_LABEL,
    LossWeights,
    class_ids,
    distances,
    distillation_loss,
    label_loss,
    mixup,
)
from skipat_surgery.convert.optimizers import freeze_untouched, optimizers
from skipat_surgery.convert.settings import TrainingConfig
from skipat_surgery.convert.stream import Stream
from skipat_surgery.observing import Outputs, outputs_of
from skipat_surgery.tasks.classification import Classification
from skipat_surgery.tower import Tower


@pytest.fixture
def outputs():
    torch.manual_seed(0)
    drawn = [(torch.randn(3, 5).double(), torch.randn(3, 7, 4).double()) for _ in range(2)]
    return [Outputs(tokens, {}, {"logits": logits}, Classification()) for logits, tokens in drawn]


def test_terms_equal_their_definitions(outputs):
    student, teacher = outputs
    terms = distances(student, teacher, num_prefix_tokens=1, temperature=2.0)
    p, q = (torch.softmax(o.logits / 2, dim=1) for o in (teacher, student))
    torch.testing.assert_close(terms["kl"], 4 * (p * (p / q).log()).sum(dim=1))
    cls_s, cls_t = student.tokens[:, 0], teacher.tokens[:, 0]
    cosine = (cls_s * cls_t).sum(dim=1) / (cls_s.norm(dim=1) * cls_t.norm(dim=1))
    torch.testing.assert_close(terms["prefix"], 1 - cosine)

    def normal(x):
        return (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    difference = normal(student.tokens[:, 1:]) - normal(teacher.tokens[:, 1:])
    torch.testing.assert_close(terms["patches"], difference.square().mean(dim=(1, 2)))


def test_the_states_between_blocks_are_compared_over_their_variance(outputs):
    student, teacher = (replace(o, states={2: torch.randn(3, 7, 4).double()}) for o in outputs)
    found, expected = student.states[2], teacher.states[2]
    terms = []
    for tokens in (slice(0, 1), slice(1, 7)):
        y = expected[:, tokens]
        variance = ((y - y.reshape(-1, 4).mean(dim=0)) ** 2).mean()
        terms.append(((found[:, tokens] - y) ** 2).mean(dim=(1, 2)) / variance)
    torch.testing.assert_close(distances(student, teacher, 1)["blocks"], (terms[0] + terms[1]) / 2)
    assert "blocks" not in distances(student, outputs[1], 1)


def test_corrupt_images_count_for_nothing(outputs):
    terms = distances(*outputs, num_prefix_tokens=1)
    weights = LossWeights(kl=1.0, prefix=2.0, patches=3.0)
    valid = torch.tensor([True, False, True])
    each = terms["kl"] + 2 * terms["prefix"] + 3 * terms["patches"]
    torch.testing.assert_close(distillation_loss(terms, weights, valid), (each[0] + each[2]) / 2)
    assert distillation_loss(terms, weights, torch.zeros(3, dtype=torch.bool)) == 0


def test_the_label_term_is_the_cross_entropy_and_nothing_without_a_label():
    logits = torch.randn(3, 4).double()
    found = label_loss(logits, torch.tensor([2, NO_LABEL, 0]))
    p = torch.softmax(logits, dim=1)
    torch.testing.assert_close(found, torch.stack([-p[0, 2].log(), torch.zeros(()).double(), -p[2, 0].log()]))


def test_a_teacher_with_other_tokens_is_compared_by_its_classes(outputs):
    student, teacher = outputs
    other = replace(teacher, tokens=torch.randn(3, 9, 6).double())
    assert set(distances(student, other, 1)) == {"kl"}
    with pytest.raises(ValueError, match="neither a head nor the shape of their tokens in common"):
        distances(student, Outputs(other.tokens), 1)


def test_what_still_equals_the_teacher_is_frozen(vit):
    cut = skipat_surgery.apply(copy.deepcopy(vit), [3])
    freeze_untouched(cut)
    trained = {name for name, p in cut.named_parameters() if p.requires_grad}
    frozen = {name for name, p in cut.named_parameters() if not p.requires_grad}
    assert all(
        name.startswith(("vit.embeddings.", "vit.layers.0.", "vit.layers.1.", "vit.layers.2.")) for name in frozen
    )
    assert {"classifier.weight", "vit.layernorm.weight", "vit.layers.3.phi.expand.weight"} <= trained
    cut(torch.randn(2, 3, 32, 32, dtype=torch.float64)).logits.sum().backward()
    assert all(p.grad is not None for name, p in cut.named_parameters() if name in trained)


def test_every_trainable_parameter_has_one_optimiser(vit):
    cut = skipat_surgery.apply(vit, [3])
    freeze_untouched(cut)
    for muon in (0.0, 1e-3):
        chosen = optimizers(cut, muon_learning_rate=muon)
        owned = [id(p) for optimizer in chosen for group in optimizer.param_groups for p in group["params"]]
        assert sorted(owned) == sorted(id(p) for p in cut.parameters() if p.requires_grad)
        assert len(chosen) == (2 if muon else 1)


def test_mixup_is_a_convex_mixture_and_repeatable():
    batch = torch.randn(4, 3, 2, 2)
    first, again = (mixup(batch, 0.8, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, batch)
    torch.testing.assert_close(first.mean(dim=0), batch.mean(dim=0))  # every image is used in the same shares
    assert mixup(batch, 0.0, torch.Generator()) is batch


def test_images_without_a_label_count_for_agreement_and_not_for_top1(vit):
    cut = skipat_surgery.apply(copy.deepcopy(vit), [2, 3])
    pixels, labels = (
        torch.randn(8, 3, 32, 32, dtype=torch.float64),
        torch.tensor([0, NO_LABEL, 1, 2, NO_LABEL, 3, 4, 0]),
    )
    known = labels != NO_LABEL
    evaluate = Evaluator(vit, labelled=True)
    found, only = evaluate(cut, [(pixels, labels)]), evaluate(cut, [(pixels[known], labels[known])])
    assert (found["images"], found["labelled"]) == (8, 6)
    for name in ("top1", "teacher_top1"):
        assert found[name] == only[name]
    without = Evaluator(vit)(cut, [pixels])
    for name in ("agreement", "kl", "patch_cosine"):
        assert found[name] == pytest.approx(without[name])
    as_list = [None if label == NO_LABEL else label for label in labels.tolist()]
    assert evaluate(cut, [(pixels, as_list)]) == found


def test_all_labels_missing_means_no_labels(vit):
    cut = skipat_surgery.apply(copy.deepcopy(vit), [2, 3])
    pixels = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    found = Evaluator(vit, labelled=True)(cut, [(pixels, torch.full((4,), NO_LABEL))])
    assert found == {**Evaluator(vit)(cut, [pixels]), "labelled": 0}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            torch.tensor([1, 2, 4]),
            r"labels run from 1 to 4, and the model's classes from 0 to 3, with -1 where there is no",
        ),
        (torch.tensor([0, -100, 1]), "labels run from -100 to 1"),
        (torch.tensor([0, 1]), r"one integer for each of 3 images, got torch.int64 \(2,\)"),
        (torch.zeros(3), r"one integer for each of 3 images, got torch.float32 \(3,\)"),
        (torch.zeros(3, 4, dtype=torch.long), r"one integer for each of 3 images, got torch.int64 \(3, 4\)"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        class_ids(labels, torch.randn(3, 4))
    with pytest.raises(ValueError, match=message):
        label_loss(torch.randn(3, 4), labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bool], ids=str)
def test_labels_are_integers_of_any_dtype(dtype):
    assert torch.equal(class_ids(torch.tensor([1, 0, 1], dtype=dtype), torch.randn(3, 4)), torch.tensor([1, 0, 1]))


def test_evaluation_equals_plain_counting(vit):
    cut = skipat_surgery.apply(copy.deepcopy(vit), [2, 3])
    pixels, labels = torch.randn(10, 3, 32, 32, dtype=torch.float64), torch.randint(5, (10,))
    valid = torch.tensor([True] * 9 + [False])
    keys = ("pixel_values", "labels", "valid")
    batches = [
        dict(zip(keys, parts, strict=True))
        for parts in zip(*(t.split(4) for t in (pixels, labels, valid)), strict=True)
    ]
    found = Evaluator(vit, labelled=True, gather=lambda row: row)(cut, batches)
    with torch.no_grad():
        mine, theirs = cut(pixels).logits.argmax(dim=1)[:9], vit(pixels).logits.argmax(dim=1)[:9]
    assert (found["images"], found["corrupt"]) == (9, 1)
    assert found["top1"] == pytest.approx((mine == labels[:9]).float().mean().item())
    assert found["teacher_top1"] == pytest.approx((theirs == labels[:9]).float().mean().item())
    assert found["agreement"] == pytest.approx((mine == theirs).float().mean().item())


def test_a_stream_resumed_anywhere_is_the_rest_of_the_stream():
    whole = list(Stream(length=7, total=20, seed=3))
    assert sorted(index for _, index in whole[:7]) == list(range(7))
    assert [index for _, index in whole[:7]] != [index for _, index in whole[7:14]]
    for start in range(21):
        assert list(Stream(length=7, total=20, seed=3, start=start)) == whole[start:]


def test_distill_equals_a_loop_of_its_pieces(vit):
    torch.manual_seed(0)
    batches = list(torch.randn(3, 8, 3, 32, 32, dtype=torch.float64))
    start = skipat_surgery.apply(copy.deepcopy(vit), [2, 3])
    by_hand, weights = copy.deepcopy(start), LossWeights()
    freeze_untouched(by_hand)
    chosen = optimizers(by_hand)
    schedules = [get_cosine_schedule_with_warmup(optimizer, 0, 3) for optimizer in chosen]
    losses = []
    for images in batches:
        mine, theirs = (outputs_of(m, Tower.of(m), images, range(2, 5)) for m in (by_hand, vit))
        terms = distances(mine, replace(theirs, **{name: _detached(value) for name, value in vars(theirs).items()}), 1)
        loss = distillation_loss(terms, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        for optimizer, schedule in zip(chosen, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        losses.append(loss.item())
    result = skipat_surgery.distill(start, vit, batches, steps=3, warmup_steps=0, rate_scale=1.0, progress=False)
    assert result.losses == pytest.approx(losses, rel=1e-6)
    for (name, found), expected in zip(start.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5, msg=name)
    assert all(parameter.requires_grad for parameter in start.parameters())
    assert not start.training


class Clearing(list):
    """Batches between which autocast forgets its casts."""

    def __iter__(self):
        for batch in super().__iter__():
            torch.clear_autocast_cache()
            yield batch


@pytest.mark.parametrize("train", ["distill", "align"])
def test_each_step_inside_autocast_runs_on_the_weights_of_the_one_before(vit, train):
    """Autocast keeps the casts of weights until it ends, which must not outlive the weights."""
    torch.manual_seed(0)
    teacher, images = copy.deepcopy(vit).float(), list(torch.randn(40, 3, 32, 32).split(8))
    options = {"rate_scale": 1.0} if train == "distill" else {"learning_rate": 1e-2}
    found = []
    for batches in (images, Clearing(images)):
        torch.manual_seed(0)
        cut = skipat_surgery.apply(copy.deepcopy(teacher), [2, 3])
        with torch.autocast("cpu", torch.bfloat16):
            getattr(skipat_surgery, train)(cut, teacher, batches, steps=5, progress=False, **options)
        found.append(list(cut.parameters()))
    assert all(torch.equal(mine, expected) for mine, expected in zip(*found, strict=True))


def _detached(value):
    if isinstance(value, dict):
        return {k: v.detach() for k, v in value.items()}
    return value.detach() if isinstance(value, torch.Tensor) else value


def test_distill_learns_from_labels_where_they_are_to_count(vit):
    cut = skipat_surgery.apply(copy.deepcopy(vit), [2, 3])
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    weights = LossWeights(kl=0, prefix=0, patches=0, blocks=0, labels=1.0)
    with pytest.raises(ValueError, match="batches with labels"):
        skipat_surgery.distill(cut, vit, [images], steps=1, weights=weights, progress=False)
    labels = torch.zeros(8, dtype=torch.long)
    losses = skipat_surgery.distill(cut, vit, [(images, labels)], steps=8, weights=weights, progress=False).losses
    assert losses[-1] < losses[0]


def test_distill_stops_at_a_loss_that_is_not_finite(vit):
    cut = skipat_surgery.apply(copy.deepcopy(vit), [2, 3])
    bad = torch.full((2, 3, 32, 32), float("nan"), dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="at step 1"):
        skipat_surgery.distill(cut, vit, [bad], steps=2, progress=False)
    assert all(bool(p.isfinite().all()) for p in cut.parameters())


def test_the_command_and_the_library_weigh_the_terms_alike():
    assert TrainingConfig().loss_weights == LossWeights()
