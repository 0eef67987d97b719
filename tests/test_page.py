"""report.html: what stands on it, in which colours, and that it needs nothing else and loses no run."""

from __future__ import annotations

import io
import json
import re
from base64 import b64decode
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from cases import case_named
from figures import picture
from runs import recipe, small_teacher
from transformers import ViTImageProcessor

from skipat_surgery.commands import distill, loading, page
from skipat_surgery.commands.data_uris import of_picture
from skipat_surgery.commands.page import Again, render
from skipat_surgery.commands.page_tables import leaves, stages, text
from skipat_surgery.commands.strip import Impression, Shown
from skipat_surgery.core.config import PhiConfig, SkipatConfig

EVIL = "<script>alert('x')</script>&\"'"
CUT = SkipatConfig({2: PhiConfig(), 3: PhiConfig(pool=3)}, results={"command": "skipat distill --skip 2-3"})


@dataclass
class Read(HTMLParser):
    """A page, read: its texts, and (tag, attributes) of everything on it."""

    page: str
    texts: list[str] = field(default_factory=list)
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.page)

    def handle_data(self, data: str) -> None:
        self.texts += data.split()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def holds(self, words: str) -> bool:
        return " ".join(words.split()) in self.text

    def attributes(self, name: str) -> list[str]:
        return [given[name] or "" for _, given in self.tags if name in given]


def run_of(model: Path, folder: Path, **given) -> Read:
    """A run of the recipe in this process, and the page that it left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "difference_after_reload", lambda *given: 1.25e-7)
        recipe(model, folder, **given).run()
    return Read((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def teacher(once) -> Path:
    return once("small_teacher", small_teacher)


@pytest.fixture(scope="module")
def run(teacher, tmp_path_factory) -> tuple[Path, Read]:
    folder = tmp_path_factory.mktemp("page") / "run"
    return folder, run_of(teacher, folder, log_steps=2)


@pytest.fixture(scope="module")
def results(run) -> dict:
    return json.loads((run[0] / "results.json").read_text())


def test_everything_in_the_results_stands_on_the_page(run, results):
    def figures(value):
        if isinstance(value, dict):
            return [figure for entry in value.values() for figure in figures(entry)]
        if isinstance(value, list):
            return [figure for entry in value for figure in figures(entry)]
        return [f"{value:.6g}" if isinstance(value, float) else "none" if value is None else str(value)]

    found = figures(results)
    assert len(found) > 100
    assert [figure for figure in found if not run[1].holds(figure)] == []
    assert {"torch", "transformers", "timm", "Python"} <= results["versions"].keys()


def test_the_page_is_made_again_as_it_was(run, capsys):
    folder, read = run
    (folder / "report.html").unlink()
    Again([str(folder)]).run()
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert (folder / "report.html").read_text(encoding="utf-8") == read.page


def test_the_page_says_what_was_cut_and_by_which_command(run, results):
    folder, read = run
    assert read.holds("The attention of 2 of 5 blocks, 2–3, was replaced with")
    assert read.holds("clusters ask")
    held = json.loads((folder / "best" / "config.json").read_text())["skipat"]["results"]
    assert read.holds(held["command"])
    assert read.holds(f"{teacher_top1(results)} %")
    pictures = [given for tag, given in read.tags if tag == "img"]
    assert len(pictures) == 3 * 8
    assert all(given["alt"] for given in pictures)
    assert sum(tag == "svg" for tag, _ in read.tags) == 2


def teacher_top1(results: dict) -> str:
    return f"{100 * results['rows']['teacher']['top1']:.2f}"


def analysis(agreement: float | None = 0.98) -> dict:
    """As analyze.py leaves it."""

    def point(*blocks: int) -> dict:
        choice = {"phi": {str(block): {} for block in blocks}, "speedup": 1 + len(blocks) / 10, "divergence": None}
        return {"choice": choice, "divergence": 0.01, "agreement": agreement}

    plan = {"chosen": point(2, 3), "speedup": 1.234, "paper": point(1, 2), "paper_speedup": 1.111, "images": [30, 10]}
    cka = {"msa": [[1.0, 0.25], [0.25, 1.0]], "cls_attention": [[1.0, None], [None, None]], "images": 40}
    return {"plan": {**plan, "frontier": [point(3), point(2, 3)]}, "cka": cka}


@pytest.mark.parametrize("agreement", [0.98, None])
def test_where_blocks_were_chosen_cka_and_the_frontier_stand_there(results, agreement):
    read = Read(render(results, CUT, 5, analysis(agreement)))
    assert sum(tag == "svg" for tag, _ in read.tags) == 5
    for words in ("chosen: 2–3", "the paper's 1–2", "1.23×", "1.11×", "CKA of Z", "CKA of A[CLS]", ".25", "40 images"):
        assert read.holds(words), words
    assert read.holds("agreement, %") == (agreement is not None)
    assert read.holds("chosen: 2–3 1.20× 1.23× 0.0100 98.0" if agreement else "chosen: 2–3 1.20× 1.23× 0.0100 –")
    without = {name: value for name, value in analysis().items() if name != "cka"}
    assert sum(tag == "svg" for tag, _ in Read(render(results, CUT, 5, without)).tags) == 3


def test_the_best_model_is_marked(results):
    best, rows = results["best"], list(results["rows"])
    for stage, step, expected in (("solved", 0, "solved"), ("distilled", results["steps"], "distilled")):
        marked = [
            row.cells[0]
            for row in stages({**results, "best": {**best, "stage": stage, "step": step}})[1]
            if row.is_best
        ]
        assert marked == [expected]
    between = {**best, "stage": "distilled", "step": 3, "figures": {**best["figures"], "top1": 0.123456}}
    header, found = stages({**results, "best": between})
    assert [row.cells[0] for row in found] == [*rows[:-1], "step 3", "distilled"]
    assert [row.is_best for row in found] == [row.cells[0] == "step 3" for row in found]
    assert found[-2].cells[header.index("top-1 %")] == f"{12.3456:.2f}"


def image_shown(name: str) -> Shown:
    impression = Impression(picture(4), ((name, 0.75), ("other", 0.25)))
    return Shown(picture(), name, impression, impression, 0.5)


def test_names_are_shown_as_they_are_and_nothing_of_them_is_run(results):
    evil = {**results, "model": EVIL, "dataset": EVIL, "teacher": EVIL, "machine": EVIL}
    cut = replace(CUT, base_model=EVIL, results={"command": EVIL})
    read = Read(render(evil, cut, 5, analysis(), [image_shown(EVIL)]))
    assert "script" not in {tag for tag, _ in read.tags}
    assert EVIL in read.attributes("title")
    assert f"Evaluation image 1: {EVIL}" in read.attributes("alt")
    assert read.text.count(EVIL) > 6


def test_the_page_needs_nothing_else(run, results):
    for read in (run[1], Read(render(results, CUT, 5, analysis(), [image_shown("a")]))):
        loaded = [*read.attributes("src"), *read.attributes("href"), *read.attributes("xlink:href")]
        assert loaded
        assert all(address.startswith(("data:", "#")) for address in loaded)
        assert all(address.startswith("#") for address in read.page.split("url(")[1:])
        assert "@import" not in read.page
        assert not {"script", "iframe", "object"} & {tag for tag, _ in read.tags}


def test_every_colour_of_the_charts_is_the_pages_own_light_or_dark(results):
    charts = re.findall(r"<svg.*?</svg>", render(results, CUT, 5, analysis()), re.DOTALL)
    assert len(charts) == 5
    for chart in charts:
        assert "var(--accent)" in chart
        assert re.findall(r"#[0-9a-fA-F]{6}\b", chart) == []


def test_the_page_is_small_whatever_the_images(results):
    shown = [replace(image_shown("a"), picture=picture(1024), cut=Impression(picture(37), ()))] * page.IMAGES
    assert len(render(results, CUT, 5, analysis(), shown).encode()) < 2**21


def test_a_large_image_is_a_jpeg_and_a_small_one_exact():
    def read(uri: str) -> PIL.Image.Image:
        return PIL.Image.open(io.BytesIO(b64decode(uri.partition(",")[2])))

    assert np.array_equal(read(of_picture(picture(32))), picture(32))
    assert (read(of_picture(picture(700))).format, read(of_picture(picture(700))).size) == ("JPEG", (320, 320))


def test_a_run_that_is_not_trained_and_has_no_labels(tmp_path):
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 5, "num_heads": 2}
    host = loading.from_timm(timm.create_model("vit_tiny_patch16_224", num_classes=10, **shape))
    host.save(host.model, tmp_path / "timm")
    read = run_of(tmp_path / "timm", tmp_path / "run", max_steps=0, label_column="none")
    stage = json.loads((tmp_path / "run" / "results.json").read_text())["best"]["stage"]
    assert read.holds(f"It was not trained: the model is as it was {stage}.")
    classes = read.attributes("title")
    assert len(classes) == 2 * 3 * page.IMAGES
    assert set(classes) <= {f"class {number}" for number in range(10)}
    assert not read.holds("top-1 accuracy")
    assert "svg" not in {tag for tag, _ in read.tags}


def test_a_model_without_classes_has_a_strip_without_classes(tmp_path):
    model = case_named("Dinov2Model").model().float()
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    read = run_of(tmp_path / "model", tmp_path / "run", max_steps=2, eval_steps=2)
    assert sum(tag == "img" for tag, _ in read.tags) == 3 * 8
    assert "top" not in read.attributes("class")
    assert read.holds("patch cosine")
    assert not read.holds("Distillation loss")  # none was logged in two steps


def test_a_page_that_cannot_be_made_loses_no_run(teacher, tmp_path, monkeypatch, capsys):
    def fail(*given) -> str:
        raise RuntimeError("no ink")

    monkeypatch.setattr(page, "render", fail)
    with pytest.raises(FileNotFoundError):
        run_of(teacher, tmp_path / "run", max_steps=0)
    assert (tmp_path / "run" / "results.json").exists()
    assert "WARNING: there is no report.html: RuntimeError: no ink" in " ".join(capsys.readouterr().out.split())
    assert not list((tmp_path / "run").glob("report.html*"))


def test_recorded_values_are_read_as_they_are():
    nested = {"a": {"b": [1, 2.5], "c": None}, "d": [], "e": True}
    assert [(name, text(value)) for name, value in leaves(nested)] == [
        ("a.b", "1, 2.5"),
        ("a.c", "none"),
        ("d", "none"),
        ("e", "True"),
    ]
