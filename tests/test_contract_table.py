"""A slice of the contract is held against the table that the whole of it wrote."""

from pathlib import Path

import contract_table
import pytest
from contract_table import BEGIN, END, POINTS, differences_from


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "supported.md"
    rows = [f"| {family} | " + " | ".join([cell] * len(POINTS)) + " |" for family, cell in (("a", "✓"), ("b", "✓*"))]
    path.write_text("\n".join(["before", BEGIN, "", *rows, END, "after"]))
    return path


@pytest.mark.parametrize(
    ("family", "found", "differs"),
    [
        ("a", {"pass"}, False),
        ("a", {"-"}, False),
        ("a", {"pass", "fail"}, True),
        ("a", {"pass", "stock"}, True),
        ("b", {"pass"}, False),
        ("b", {"stock"}, False),
        ("b", {"stock", "fail"}, True),
        ("c", {"pass"}, True),
    ],
)
def test_what_a_slice_finds_against_the_page(
    page: Path, monkeypatch: pytest.MonkeyPatch, family: str, found: set[str], differs: bool
) -> None:
    monkeypatch.setattr(contract_table, "outcomes", {family: {"graphs": found}})
    lines = differences_from(page)
    assert len(lines) == differs
    assert all(f"of {family}, graphs" in line for line in lines)
