"""Faults survived: bad input given to the real recipe, case by case, and what it says, as a table for the docs.

    python tests/faults.py --output docs/faults.md

Every case runs in a process forked from this one. *Refused* ends with exit status 2, one line, and nothing written;
*stopped* with 1 and one line that says how to go on; *works* with 0. A case that ends otherwise is shown and is an
error. Full and read-only disks are mounted, which needs root: without it these cases are said to be left out.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fault_cases import DATA, MODELS, OPTIONS, PICTURES, Case, Options, prepare
from kills import start, weights
from tqdm import tqdm

STATUS = {"works": 0, "stopped": 1, "refused": 2}
COMMAND = "distill.py: "
BEGIN, END = "<!-- written by tests/faults.py -->", "<!-- end -->"
Row = tuple[str, str, str]


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status, and all that it printed."""

    status: int
    printed: str

    @property
    def last(self) -> str:
        """The line that says why it ended, or the last one."""
        lines = [line.strip() for line in self.printed.splitlines() if line.strip()]
        return next((line for line in reversed(lines) if line.startswith(COMMAND)), lines[-1])


def run(options: Options, log: Path) -> Ended:
    """The recipe with these options, to its end."""
    given = [str(part) for name, value in options.items() if value is not None for part in (f"--{name}", value)]
    _, status = os.waitpid(start(given, log), 0)
    return Ended(os.waitstatus_to_exitcode(status), log.read_text())


def check(case: str, ended: Ended, expected: str) -> None:
    """Check that a command ended as it should.

    Raises:
        AssertionError: It did not.
    """
    says_why = expected == "works" or ended.last.startswith(COMMAND)
    if ended.status != STATUS[expected] or not says_why or "Traceback" in ended.printed:
        raise AssertionError(f"{case}: expected to be {expected}, ended with {ended.status}:\n{ended.printed[-3000:]}")


def said(text: str, folder: Path) -> str:
    """A line for the table, without what differs from machine to machine."""
    text = re.sub(rf"{re.escape(str(folder))}/?\S*?([^/\s]*)(?=[\s:;,.']|$)", r"…/\1", text)
    text = text.removeprefix(COMMAND).removeprefix("error: ").replace("|", "\\|")
    return text if len(text) < 260 else text[:258] + " …"


def try_case(case: Case, folder: Path, options: Options) -> Row:
    """One case, prepared in a folder of its own."""
    place = folder / re.sub(r"\W+", "-", case.given)
    place.mkdir()
    options = {**options, "output_dir": place / "run"}
    options.update(case.prepare(place, dict(options)))
    ended = run(options, folder / f"{place.name}.log")
    check(case.given, ended, case.expected)
    if case.expected == "refused" and (place / "run").exists():
        raise AssertionError(f"{case.given}: refused, and yet {place / 'run'} was written")
    line = ended.last
    if case.shows is not None:
        lines = [line.strip() for line in ended.printed.splitlines() if re.search(case.shows, line)]
        if not lines:
            raise AssertionError(f"{case.given}: nothing like {case.shows!r} was said:\n{ended.printed[-3000:]}")
        line = lines[0]
    shutil.rmtree(place)
    return case.given, case.expected, said(line, folder)


def checkpoints(folder: Path, options: Options, whole: Path) -> list[Row]:
    """Each file of the newest checkpoint cut off, changed, and missing: the older one is gone on from."""
    expected = weights(whole)
    rows = []
    newest = sorted((whole / "checkpoints").glob("step-????????"))[-1]
    files = sorted(path.relative_to(whole) for path in newest.rglob("*") if path.is_file())
    for file in tqdm([file for file in files if file.name != "checksums.json"], desc="Checkpoint", unit="file"):
        for name, damage in DAMAGES.items():
            output = folder / "damaged"
            shutil.copytree(whole, output)
            damage(output / file)
            given = f"{file.name} of the newest checkpoint {name}"
            ended = run({**options, "output_dir": output, "resume": True}, folder / "damaged.log")
            check(given, ended, "works")
            (line,) = [
                line for line in ended.printed.splitlines() if line.startswith("WARNING: ") and "damaged" in line
            ]
            assert weights(output) == expected, f"{given}: other weights came out"
            rows.append((given, "works, equal to the bit", said(line, output)))
            shutil.rmtree(output)
            (folder / "damaged.log").unlink()
    output = folder / "damaged"
    shutil.copytree(whole, output)
    for checkpoint in (output / "checkpoints").glob("step-*"):
        DAMAGES["cut off"](checkpoint / "model.safetensors")
    ended = run({**options, "output_dir": output, "resume": True}, folder / "damaged.log")
    check("both damaged", ended, "refused")
    rows.append(("both checkpoints damaged", "refused", said(ended.last, output)))
    shutil.rmtree(output)
    return rows


def _cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _changed(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[2 * len(data) // 3] ^= 0x40
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut off": _cut_off,
    "with one bit changed": _changed,
    "missing": Path.unlink,
}


def mount(place: Path, *settings: str) -> bool:
    """Mount a file system in memory; whether that is allowed here."""
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(settings), "tmpfs", str(place)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def disks(folder: Path, options: Options, whole: Path) -> list[Row]:
    """A disk that is read-only, and disks that are full at several moments, made larger, and gone on with."""
    place = folder / "disk"
    if not mount(place, "ro"):
        print("Disks: left out, as nothing can be mounted here")
        return []
    output, expected, rows = place / "run", weights(whole), []
    try:
        ended = run({**options, "output_dir": output}, folder / "ro.log")
        check("a read-only disk", ended, "refused")
        rows.append(("a read-only disk", "refused", said(ended.last, folder)))
    finally:
        subprocess.run(["umount", place], check=True)
    for kilobytes in (100, 400, 700, 1000, 1400):
        mount(place, f"size={kilobytes}k")
        try:
            log = folder / f"{kilobytes}.log"
            ended = run({**options, "output_dir": output}, log)
            given = f"a disk with {kilobytes} kB left, later made larger"
            check(given, ended, "stopped" if kilobytes > 100 or ended.status == 1 else "refused")
            line = ended.last
            subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
            again = run({**options, "output_dir": output, "resume": True}, log)
            check(given, again, "works")
            assert weights(output) == expected, f"{given}: other weights came out"
            rows.append((given, "stopped; resumed, equal to the bit", said(line, folder)))
        finally:
            subprocess.run(["umount", place], check=True)
    return rows


def starters(folder: Path, options: Options, whole: Path) -> list[Row]:
    """Two runs started in one directory: the second is refused, and the first goes on as if it were alone."""
    output, log = folder / "twice", folder / "first.log"
    given = [str(part) for name, value in {**options, "output_dir": output}.items() for part in (f"--{name}", value)]
    first = start(given, log)
    while not (output / "run.lock").exists():
        if os.waitpid(first, os.WNOHANG)[0]:
            raise AssertionError(f"the first of two runs ended before it began:\n{log.read_text()}")
    second = run({**options, "output_dir": output}, folder / "second.log")
    check("two starters", second, "refused")
    _, status = os.waitpid(first, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert weights(output) == weights(whole)
    return [("a second run in one output directory", "refused; the first equal to the bit", said(second.last, folder))]


def table(rows: Sequence[Row]) -> str:
    lines = ["| given | what becomes of it | what is said |", "|--|--|--|"]
    return "\n".join([*lines, *(f"| {given} | {became} | {line} |" for given, became, line in rows)])


def main() -> None:
    """Try all cases, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="Markdown file whose tables to rewrite")
    parser.add_argument("--only", default="", help="only the cases whose text holds this")
    args = parser.parse_args()
    sections: dict[str, list[Row]] = {}
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = prepare(folder)
        for title, cases in {"Options": OPTIONS, "Models": MODELS, "Data": DATA, "Pictures": PICTURES}.items():
            chosen = [case for case in cases if args.only in case.given]
            sections[title] = []
            for case in tqdm(chosen, desc=title, unit="case"):
                try:
                    sections[title].append(try_case(case, folder, options))
                except AssertionError as fault:
                    faults.append(str(fault))
        if not args.only:
            whole = folder / "whole"
            check("a run left alone", run({**options, "output_dir": whole}, folder / "whole.log"), "works")
            title = "Output directories and disks"
            sections[title] = []
            for trial in (starters, disks, checkpoints):
                try:
                    sections[title] += trial(folder, options, whole)
                except AssertionError as fault:
                    faults.append(str(fault))
    written = "\n\n".join(f"### {title}\n\n{table(rows)}" for title, rows in sections.items())
    if args.output is None:
        print(written)
    else:
        before, rest = args.output.read_text().split(BEGIN)
        args.output.write_text(f"{before}{BEGIN}\n\n{written}\n\n{END}{rest.split(END)[1]}")
    if faults:
        raise SystemExit("\n\n".join(faults))


if __name__ == "__main__":
    main()
