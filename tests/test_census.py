"""Every kind of model that docs/supported.md lists as taken is taken still."""

from __future__ import annotations

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks import census
from skipat_surgery.core import finding

PAGE = census.PAGE.read_text()


def test_of_every_kind_that_the_page_lists_some_are_taken() -> None:
    """`benchmarks/census.py --check` asks all of them, in a minute or two."""
    assert census.check(PAGE, enough=1) == []


def test_the_page_lists_both_hosts() -> None:
    versions, kinds = census.listed(PAGE)
    assert versions.keys() == kinds.keys() == set(census.HOSTS)
    assert kinds["transformers"]["vit"]
    assert kinds["timm"]["vision_transformer"]


def test_the_auto_classes_find_the_cut_form_of_every_kind() -> None:
    _, kinds = census.listed(PAGE)
    unknown = {kind for kind in kinds["transformers"] if f"skipat_{kind}" not in CONFIG_MAPPING}
    assert unknown == {"shieldgemma2"}  # whose cut form cannot be built from a config


def test_a_family_that_is_gone_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "FAMILIES", tuple(f for f in finding.FAMILIES if f.name != "BEiT (timm)"))
    answers = [census.Answer("timm", "beit", "beit_base_patch16_224", "taken")]
    page = f"{census.BEGIN}\n{census.tables(answers)}\n{census.END}"
    assert census.check(page) == ["timm's beit: 0 taken, where the page says 1"]


def test_an_answer_is_not_asked_for_twice(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [census.Model("timm", "beit", "beit_base_patch16_224"), census.Model("timm", "resnet", "resnet10t")]
    file = tmp_path / "answers.csv"
    first = census.ask_all(models, file)
    assert [(answer.outcome, answer.reason) for answer in first] == [
        ("taken", ""),
        ("refused", "holds no vision transformer that can be cut"),
    ]
    monkeypatch.setattr(census, "ask", None)
    assert census.ask_all(models, file) == first
