"""A pytest plugin: marks each contract test with its point, and makes the table of families × contract out of a run.

``pytest --contract-table README.md`` writes the table between the markers of that file. ``--leads`` runs the contract
on one model of each family.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import CASES, LEADS, Case

from skipat_surgery.core.tables import markdown_table

POINTS = (
    "equations",
    "gradients",
    "graphs",
    "copies, threads",
    "intermediates",
    "distributed",
    "precision, modes",
    "restore",
    "save, load",
)
BEGIN, END = "<!-- contract table, written by `make contract` -->", "<!-- end of contract table -->"
outcomes: dict[str, dict[str, set[str]]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--contract-table", default=None, help="Markdown file whose table to rewrite from this run.")
    parser.addoption("--leads", action="store_true", help="Run the contract on one model of each family only.")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "contract(point): the point of the contract that a test belongs to")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        mark, case = item.get_closest_marker("contract"), case_of(item)
        if mark is not None and case is not None:
            item.user_properties.append(("contract", (case.family, mark.args[0])))
    if config.getoption("--leads"):
        items[:] = [item for item in items if case_of(item) is None or case_of(item) in LEADS]


def case_of(item: pytest.Item) -> Case | None:
    """The case that a test runs on."""
    return item.callspec.params.get("case") if hasattr(item, "callspec") else None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name, value in report.user_properties:
        if name == "contract" and (report.when == "call" or not report.passed):
            family, point = value
            outcomes.setdefault(family, {}).setdefault(point, set()).add(_symbol(report))


def _symbol(report: pytest.TestReport) -> str:
    if report.skipped:
        return "stock" if "stock" in str(report.longrepr) else "-"
    return "pass" if report.passed else "fail"


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--contract-table")
    if path is None or hasattr(session.config, "workerinput"):
        return
    text = Path(path).read_text()
    before, rest = text.split(BEGIN)
    Path(path).write_text(f"{before}{BEGIN}\n\n{table()}\n{END}{rest.split(END)[1]}")


def table() -> str:
    """The table, a row for each family of the suite."""
    rows = []
    for family in dict.fromkeys(case.family for case in CASES):
        cells = [cell(outcomes.get(family, {}).get(point, set())) for point in POINTS]
        rows.append([family, *cells])
    return markdown_table(["family", *POINTS], rows, align="l" + "c" * len(POINTS)) + "\n"


def cell(found: set[str]) -> str:
    """✓ where everything passed, ✓* where a part was skipped as the stock model fails too."""
    if "fail" in found:
        return "✗"
    if "pass" not in found:
        return "–" if not found - {"-"} else "stock fails"
    return "✓*" if "stock" in found else "✓"
