"""A pytest plugin: marks each contract test with its point, and makes the table of families × contract out of a run.

``pytest --contract-table docs/supported.md`` writes the table between the markers of that file. ``--leads`` runs the
contract on one model of each family. ``--slice now`` runs it on a model of each layout and on one in twelve of the
others, other ones every hour; the point graphs, which takes as long as all others together, beside the layouts on one
in twelve of the other families' first models. It fails where what it finds is not what the table says: of the newest
hosts, that is, not with ``--leads``.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
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
SLICES = 12
# These are in every slice: prefix, suffix, rotary positions, position biases, padding, grouped keys, a grid of three
# axes, late blocks, grids that differ by image, padded and packed, windows of such, of maps and folded, stages of four
# kinds, tokens in units, and every host.
LAYOUTS = (
    "ViTModel",
    "YolosModel",
    "DINOv3ViTModel",
    "BeitModel",
    "Idefics2Model",
    "Sapiens2Model",
    "VideoMAEModel",
    "EomtForUniversalSegmentation",
    "Siglip2VisionModel",
    "Qwen3VLVisionModel",
    "Qwen2_5_VisionTransformerPretrainedModel",
    "SamVisionModel",
    "timm vit",
    "timm eva02",
    "timm relpos",
    "timm swin",
    "timm nest",
    "RfDetrDinov2Backbone",
    "Sam2HieraDetModel",
    "Florence2VisionBackbone",
    "timm hiera",
    "torchvision vit",
)
PAGE = Path(__file__).parents[1] / "docs" / "supported.md"
outcomes: dict[str, dict[str, set[str]]] = {}
differences: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--contract-table", default=None, help="Markdown file whose table to rewrite from this run.")
    parser.addoption("--leads", action="store_true", help="Run the contract on one model of each family only.")
    parser.addoption(
        "--slice",
        type=lambda given: int(time.time() // 3600 if given == "now" else given) % SLICES,
        help=f"Run one of the {SLICES} parts of the contract: that of this number, or 'now', that of this hour.",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "contract(point): the point of the contract that a test belongs to")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        mark, case = item.get_closest_marker("contract"), case_of(item)
        if mark is not None and case is not None:
            item.user_properties.append(("contract", (case.family, mark.args[0])))
        if case is not None and case.is_too_new:
            item.add_marker(pytest.mark.skip(f"this model is there since {case.since}"))
    number, leads = config.getoption("--slice"), config.getoption("--leads")
    if leads or number is not None:
        chosen, drawn = _chosen(LEADS if leads else CASES, number), _chosen(LEADS, number)
        items[:] = [item for item in items if _name(item) is None or _name(item) in (drawn if _draws(item) else chosen)]


def _chosen(cases: Sequence[Case], number: int | None) -> set[str]:
    """The names of those of some cases that a slice runs: the layouts, and a part of the others."""
    if number is None:
        return {case.name for case in cases}
    others = [case.name for case in cases if case.name not in LAYOUTS]
    return {*LAYOUTS, *others[number::SLICES]}


def _name(item: pytest.Item) -> str | None:
    case = case_of(item)
    return None if case is None else case.name


def _draws(item: pytest.Item) -> bool:
    """Whether a test is of the point graphs."""
    mark = item.get_closest_marker("contract")
    return mark is not None and mark.args[0] == "graphs"


def case_of(item: pytest.Item) -> Case | None:
    """The case that a test runs on."""
    case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
    return case if isinstance(case, Case) else None


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
    if hasattr(session.config, "workerinput"):
        return
    if session.config.getoption("--slice") is not None and not session.config.getoption("--leads"):
        differences.extend(differences_from(PAGE))
        if differences and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    path = session.config.getoption("--contract-table")
    if path is None:
        return
    text = Path(path).read_text()
    before, rest = text.split(BEGIN)
    Path(path).write_text(f"{before}{BEGIN}\n\n{table()}\n{END}{rest.split(END)[1]}")


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None]:
    # After everything else, as a CI's log is read from its end.
    yield
    number = terminalreporter.config.getoption("--slice")
    if number is not None:
        terminalreporter.write_line(f"of the contract, slice {number} of {SLICES}: --slice {number} repeats it")
    for difference in differences:
        terminalreporter.write_line(difference, red=True)


def differences_from(page: Path) -> list[str]:
    """What the page's table says of a family and this run did not find, a line each.

    Of ✓* a slice may find less: what passes, or what the stock model fails, may be in another.
    """
    lines = page.read_text().split(BEGIN)[1].split(END)[0].splitlines()
    says = {row[0]: row[1:] for row in ([part.strip() for part in line.split("|")[1:-1]] for line in lines) if row}
    different = []
    for family, found in outcomes.items():
        for point, symbols in found.items():
            here, said = cell(symbols), says[family][POINTS.index(point)] if family in says else "nothing"
            if here not in (said, "–") and (said != "✓*" or here == "✗"):
                different.append(f"{page.name} says {said} of {family}, {point}; here: {here}. Write it: make contract")
    return different


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
