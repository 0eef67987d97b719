"""The classes of a model and of a data set, brought together by their names."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import timm
import torch
from small_models import hf

from skipat_surgery.commands.classes import check_same_classes, in_order, matched, names_of

PETS = ["cat", "sea lion", "dog"]


def classifier(names: list[str] | None = None, count: int = 3) -> torch.nn.Module:
    named = {"num_labels": count} if names is None else {"num_labels": len(names), "id2label": dict(enumerate(names))}
    return hf("ViTForImageClassification", "ViTConfig", **named)()


def test_the_names_of_a_model():
    assert names_of(classifier(PETS)) == PETS
    assert names_of(classifier()) is None  # LABEL_0, LABEL_1, …
    assert names_of(hf("ViTModel", "ViTConfig")()) is None
    shape = {"img_size": 16, "patch_size": 8, "depth": 1, "num_classes": 3}
    assert names_of(timm.create_model("vit_tiny_patch16_224", **shape)) is None
    named = {"pretrained_cfg_overlay": {"label_names": PETS}}
    assert names_of(timm.create_model("vit_tiny_patch16_224", **shape, **named)) == PETS


@pytest.mark.parametrize(
    ("names", "model", "expected", "how"),
    [
        (PETS, PETS, [0, 1, 2], "the model's, in its order"),
        (["dog", "cat", "sea lion"], PETS, [2, 0, 1], "the model's, in another order, found by their names"),
        (["Cat", "sea_lion", "DOG"], PETS, [0, 1, 2], "the model's, in its order, found by their names"),
        (["Sea-Lion", "cat", "dog"], PETS, [1, 0, 2], "the model's, in another order, found by their names"),
        (["dog"], PETS, [2], "1 of the model's 3, found by their names"),
        (["a", "b", "c"], None, [0, 1, 2], "taken in this order, as the model's have no names"),
        (["0", "1", "2"], PETS, [0, 1, 2], "numbers without names, taken as the model's"),
        (["0", "1", "2"], ["2", "0", "1"], [1, 2, 0], "the model's, in another order, found by their names"),
        (["1", "2", "10"], ["10", "2", "1"], [2, 1, 0], "the model's, in another order, found by their names"),
    ],
)
def test_same_classes_are_matched_by_name(names, model, expected, how):
    assert matched(names, model, 3, "the data set") == (expected, how)


@pytest.mark.parametrize(
    ("names", "model", "words"),
    [
        (["cat", "dog", "bird"], PETS, ["only the data set has bird, only the model sea lion"]),
        (["1", "2", "3"], PETS, ["the data set's are 1, 2, 3, the model's cat, sea lion, dog"]),
        (["a", "b"], None, ["the model has 3 classes and the data set has 2", "the model's have no names"]),
        (["cat", "Cat", "dog"], ["cat", "dog", "fish"], ["only the model fish"]),
        ([f"c{number}" for number in range(15)], PETS, ["c9 and 5 more"]),
    ],
)
def test_other_classes_are_refused_with_both_lists_and_what_to_do(names, model, words):
    with pytest.raises(ValueError, match="--label_column none") as refusal:
        matched(names, model, 3, "the data set")
    for part in words:
        assert part in str(refusal.value)


def test_a_name_that_the_model_has_twice_is_refused():
    with pytest.raises(ValueError, match="so top-1 would mean nothing"):
        matched(["crane", "tench"], ["crane", "crane", "tench"], 3, "the data set")


def test_folders_of_synsets_are_imagenets_classes():
    info = timm.data.ImageNetInfo()
    words = [info.index_to_description(number) for number in range(1000)]
    synsets = info.label_names()
    given = [synsets[207], synsets[3]]
    assert matched(given, words, 1000, "the data set")[0] == [207, 3]
    assert matched(given, None, 1000, "the data set")[0] == [207, 3]
    with pytest.raises(ValueError, match="which are not the same"):
        matched(given, words[::-1], 1000, "the data set")
    with pytest.raises(ValueError, match="which are not the same"):
        matched([*given, "n00000000"], words, 1000, "the data set")


def test_names_are_sorted_as_numbers_where_all_are():
    assert in_order(["10", "1", "2", "2"]) == ["1", "2", "10"]
    assert in_order(["10", "1", "b"]) == ["1", "10", "b"]


def test_a_teacher_with_other_classes_is_refused():
    model = classifier(PETS)
    check_same_classes(model, classifier(PETS))
    check_same_classes(model, classifier())
    with pytest.raises(ValueError, match=re.escape("in another order: 'cat' and 'dog', 'dog' and 'cat'")):
        check_same_classes(classifier(PETS[::-1]), model)
    with pytest.raises(ValueError, match="the teacher has 4 classes, the model 3"):
        check_same_classes(model, classifier(count=4))
    assert names_of(SimpleNamespace(num_classes=0)) is None
