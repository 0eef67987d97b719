"""What the README, the pages of docs/ and the docstrings show, runs as they show it."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from pages import PAGES, ROOT, blocks, commands, make_world, name_of, run, snippets
from transformers import HfArgumentParser

import skipat_surgery

DOCUMENTED = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "skipat_surgery").rglob("*.py"))
    if ">>> " in path.read_text()
]
NEEDS = {"quantisation.md": "torchao"}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_process: None) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    return make_world(tmp_path)


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=name_of)
def test_the_snippets_of_a_page_run(page: Path, world: dict[str, Any]) -> None:
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    run(snippets(page), name_of(page), world)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_examples_of_a_module_run(name: str, world: dict[str, Any]) -> None:
    module = importlib.import_module(name)
    source = Path(module.__file__ or "").read_text()
    assert "+SKIP" not in source
    assert not re.search(r"^ +Example:$", source, re.MULTILINE), "the reference shows a section called Examples"
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


@pytest.mark.parametrize("name", skipat_surgery.__all__)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    assert f"::: skipat_surgery.{name}\n" in (ROOT / "docs/api.md").read_text()


class Parsed(BaseException):
    """A command line was read to its end, which is where the test of it ends."""


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_the_command_lines_of_a_page_are_read(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = HfArgumentParser.parse_args_into_dataclasses

    def read_and_stop(*args: Any, **kwargs: Any) -> Any:
        *found, unknown = read(*args, **kwargs)
        if unknown:
            return *found, unknown
        raise Parsed

    monkeypatch.setattr(HfArgumentParser, "parse_args_into_dataclasses", read_and_stop)
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        check_command(words, monkeypatch)


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a command line with the parser that it meets when it is run."""
    program, *arguments = words
    if program == "skipat":
        import skipat_command

        assert arguments[0] in ("--help", *skipat_command.COMMANDS), words
        if len(arguments) > 1:  # else a mention
            with pytest.raises(Parsed):
                skipat_command.main(arguments)
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif program == "pip":
        check_extras(arguments[-1])
    elif "torchrun" in words:
        assert words[-1] == "loop.py"  # run below
    elif words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])
        if launched.module:
            check_main(launched.training_script, launched.training_script_args, monkeypatch)
        elif "/" in launched.training_script:
            check_main(module_of(launched.training_script), launched.training_script_args, monkeypatch)
    elif program == "python" and arguments[0].startswith(("recipes/", "benchmarks/")):
        check_main(module_of(arguments[0]), arguments[1:], monkeypatch)
    elif program == "python" and arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]), words
    elif program == "python":
        assert arguments[0] == "-c" or (ROOT / arguments[0]).exists(), words
    else:
        pytest.fail(f"nothing here reads {words}")


def module_of(script: str) -> str:
    """The module of a script's path; a recipe launches the command of its name."""
    folder, name = Path(script).parts
    assert (ROOT / script).exists(), script
    return f"skipat_surgery.commands.{Path(name).stem}" if folder == "recipes" else Path(name).stem


def check_main(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    with pytest.raises(Parsed):
        importlib.import_module(module).main()


def check_extras(requirement: str) -> None:
    """Check that what pip is asked for besides the package is there to ask for."""
    found = re.search(r"\[(.*)\]", requirement)
    for extra in found[1].split(",") if found else []:
        assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), requirement


def test_the_loop_of_the_guide_runs_on_two_processes(tmp_path: Path) -> None:
    (loop,) = [
        block for block in blocks(ROOT / "docs/guides/several-gpus.md", "python") if block.startswith("# loop.py")
    ]
    (tmp_path / "loop.py").write_text(f"{loop}\nprint(accelerator.num_processes, 'processes')")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    command = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc_per_node", "2", "loop.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes") == 2, done.stdout
    assert (tmp_path / "vit-cut" / "model.safetensors").exists()


def test_gradient_checkpointing_under_the_trainer_changes_nothing(world: dict[str, Any]) -> None:
    """The guide's student, trained with and without: the same weights."""
    first = blocks(ROOT / "docs/guides/trainer.md", "python")[0]
    trained = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        given = run([first], "trainer.md", {})
        arguments = given["transformers"].TrainingArguments(
            "out", gradient_checkpointing=checkpointing, max_steps=3, report_to=[], save_strategy="no", seed=1
        )
        given["transformers"].Trainer(given["student"], arguments, train_dataset=given["data"]).train()
        trained.append({name: weight.detach() for name, weight in given["student"].named_parameters()})
    start = dict(run([first], "trainer.md", {})["student"].named_parameters())
    assert any(not torch.equal(trained[0][name], start[name]) for name in start)
    torch.testing.assert_close(trained[1], trained[0], atol=1e-6, rtol=1e-5)
