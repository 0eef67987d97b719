"""Which room imports from which, what a checkpoint carries, and what the public names are."""

from __future__ import annotations

import ast
import graphlib
import importlib
import pkgutil
from collections import Counter
from pathlib import Path

import pytest
from cases import case_named
from models import cut_of

import skipat_surgery

PACKAGE = Path(skipat_surgery.__file__).parent
ROOMS = {"core": 0, "tasks": 0, "": 1, "convert": 2, "measure": 2, "analysis": 3, "commands": 4}
NAMES = [info.name for info in pkgutil.walk_packages([str(PACKAGE)], "skipat_surgery.") if not info.ispkg]


def imported(name: str) -> set[str]:
    """The modules of the package that a module imports, wherever in it."""
    spec = importlib.util.find_spec(name)
    found = set()
    for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), spec.parent)
            found |= {base} if base in NAMES else {f"{base}.{alias.name}" for alias in node.names}
    return found & set(NAMES)


def room(name: str) -> str:
    return name.split(".")[1] if name.count(".") > 1 else ""


@pytest.mark.parametrize("name", NAMES)
def test_arrows_point_one_way(name):
    for other in imported(name):
        assert room(other) == room(name) or ROOMS[room(other)] < ROOMS[room(name)], f"{name} imports {other}"


def test_nothing_imports_in_a_circle():
    order = graphlib.TopologicalSorter({name: imported(name) for name in NAMES}).static_order()
    assert len(list(order)) == len(NAMES)


def test_no_module_that_tests_import_hides_another():
    root = PACKAGE.parent
    names = Counter(
        path.stem
        for room in ("tests", "tests/contract", "benchmarks", "examples")
        for path in (root / room).glob("*.py")
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_a_checkpoint_carries_core_and_nothing_else(tmp_path):
    cut_of(case_named("ViTForImageClassification").model()).save_pretrained(tmp_path)
    shipped = {path.name for path in tmp_path.glob("*.py")}
    assert shipped == {path.name for path in (PACKAGE / "core").glob("*.py")} - {"__init__.py"}


@pytest.mark.parametrize("name", skipat_surgery.__all__)
def test_no_module_is_hidden_by_a_public_name(name):
    assert f"skipat_surgery.{name}" not in NAMES


def test_public_names_are_there_and_documented():
    for name in skipat_surgery.__all__:
        assert getattr(skipat_surgery, name).__doc__, name
