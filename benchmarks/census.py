"""Which models of transformers and timm can be cut: each is built on the meta device, without weights, and asked.

    python benchmarks/census.py           # asks them all and writes docs/supported.md, in minutes
    python benchmarks/census.py --check   # asks the kinds that the page lists, and fails where fewer are taken now

Of transformers, every class that takes images, in its default configuration; of timm, every name of `list_models`.
Where two blocks do, there are two: all are of one class. A model is taken where its last block can be cut.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import inspect
import os
import re
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import astuple, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network

import timm
import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

from skipat_surgery.commands.options import parse
from skipat_surgery.core.checking import check_phis
from skipat_surgery.core.config import SkipatConfig
from skipat_surgery.core.cutting import apply_to_tower
from skipat_surgery.core.finding import UnsupportedModelError, find_tower, towers_in
from skipat_surgery.core.tables import markdown_table
from skipat_surgery.core.windowed_phis import suited

PAGE = Path(__file__).parents[1] / "docs" / "supported.md"
BEGIN, END = "<!-- census, written by benchmarks/census.py -->", "<!-- end of census -->"
HOSTS, OUTCOMES = ("transformers", "timm"), ("taken", "refused", "not built")
DEPTHS = {"num_hidden_layers", "num_layers", "depth", "encoder_layers", "decoder_layers", "n_layer", "n_layers"}
SECONDS = 20  # for one model


@dataclass(frozen=True)
class Settings:
    """Census"""

    check: bool = field(
        default=False,
        metadata={"help": "ask only the kinds that the page lists as taken, and fail where fewer are taken now"},
    )
    answers: str | None = field(
        default=None,
        metadata={"help": "a CSV file for every answer, with its reason; what is in it is not asked again"},
    )


@dataclass(frozen=True)
class Model:
    """One that may be cut.

    Args:
        host: Its library.
        kind: Its model type, or for timm the file that it is defined in.
        name: Its class, or for timm its name.
    """

    host: str
    kind: str
    name: str

    def build(self) -> nn.Module:
        """Without weights, and where that works with two blocks."""
        builders: tuple[Callable[[], nn.Module], ...]
        if self.host == "timm":
            builders = (lambda: timm.create_model(self.name, depth=2), lambda: timm.create_model(self.name))
        else:
            cls = getattr(transformers, self.name)
            builders = (lambda: cls(_shallow(cls.config_class())), lambda: cls(cls.config_class()))
        with torch.device("meta"):
            try:
                return builders[0]()
            except TimeoutError:
                raise
            except Exception:
                return builders[1]()


@dataclass(frozen=True)
class Answer:
    """Whether a model is taken: ``taken``, ``refused`` or ``not built``, and why not."""

    host: str
    kind: str
    name: str
    outcome: str
    reason: str = ""


def transformers_models(kinds: Container[str] | None = None) -> Iterator[Model]:
    """Every class of transformers that is given images, or those of these model types."""
    wanted = {model_type_to_module_name(kind) for kind in CONFIG_MAPPING_NAMES if kinds is None or kind in kinds}
    for file in sorted(Path(transformers.models.__path__[0]).glob("*/modeling_*.py")):
        if file.parent.name not in wanted:
            continue
        try:
            module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        except ImportError:  # it needs a package that is not here, such as torchaudio
            continue
        for name in getattr(module, "__all__", ()):
            config = _config_of_images(getattr(module, name))
            if config is not None and (kinds is None or config.model_type in kinds):
                yield Model("transformers", config.model_type, name)


def _config_of_images(cls: Any) -> Any:
    """The configuration's class of a model's class that is given images; None for any other."""
    if not (inspect.isclass(cls) and issubclass(cls, PreTrainedModel)) or cls.__name__.endswith("PreTrainedModel"):
        return None
    given = {str(cls.main_input_name), *inspect.signature(cls.forward).parameters}
    takes_images = any("pixel" in name or name in ("images", "flattened_patches") for name in given)
    return cls.config_class if takes_images else None


def timm_models(kinds: Container[str] | None = None) -> Iterator[Model]:
    """Every name of timm, or those of these files."""
    for module in timm.list_modules():
        for name in timm.list_models(module=module) if kinds is None or module in kinds else ():
            if timm.models.model_entrypoint(name).__module__.startswith("timm."):  # ours is registered there too
                yield Model("timm", module, name)


def _shallow(config: Any) -> Any:
    """A configuration with all depths in it, at any level, cut down to two."""
    for key, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _shallow(value)
        elif key in DEPTHS and isinstance(value, int):
            setattr(config, key, min(value, 2))
    return config


MODELS = {"transformers": transformers_models, "timm": timm_models}


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise `TimeoutError` after so many seconds."""

    def stop(*args: Any) -> None:
        raise TimeoutError(f"took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ask(model: Model) -> Answer:
    """Build a model and cut its last block."""
    place = (model.host, model.kind, model.name)
    try:
        with limited(SECONDS):
            built = model.build()
    except Exception as error:
        return Answer(*place, "not built", f"{type(error).__name__}: {error}".splitlines()[0])
    first = next((path for path, _ in towers_in(built)), None)  # of several, one is enough
    try:
        _, tower, family = find_tower(built, first)
        last = max(family.skippable(tower), default=len(family.block_list(tower)) - 1)
        config = suited(tower, family, SkipatConfig.parse([last], None))
        check_phis(tower, family, config)
    except UnsupportedModelError as error:
        return Answer(*place, "refused", reason_of(str(error), type(built).__name__))
    apply_to_tower(tower, family, config, keep_removed=False)  # an entry that names a slot wrongly fails here
    return Answer(*place, "taken")


def reason_of(message: str, name: str) -> str:
    """What an error says of all models of a kind: without names, and without what to do."""
    message = message.split(". Supported: ")[0].removeprefix(f"{name} ").removeprefix("cannot be cut: ")
    message = re.sub(r"^this \w+ cannot be cut: ", "", message)
    message = re.sub(r"^the blocks of this \w+ are (\[[^]]*\]).*", r"its blocks are \1", message)
    return re.split(r"[;:] ", message)[0]


def ask_all(models: Iterable[Model], file: Path | None = None) -> list[Answer]:
    """The answers of models, in order; those that stand in a file already are taken from it, and others added."""
    known: dict[tuple[str, str], Answer] = {}
    if file is not None and file.exists():
        with file.open(newline="") as rows:
            known = {(row[0], row[2]): Answer(*row) for row in csv.reader(rows)}
    found = []
    with open(os.devnull if file is None else file, "a", newline="") as rows:
        writer = csv.writer(rows)
        for model in tqdm(list(models), desc="census", unit="model", disable=None):
            answer = known.get((model.host, model.name))
            if answer is None:
                answer = ask(model)
                writer.writerow(astuple(answer))
                rows.flush()
            found.append(answer)
    return found


def taken_by_kind(answers: Iterable[Answer]) -> dict[str, Counter[str]]:
    """How many of each kind are taken, by host."""
    found: dict[str, Counter[str]] = {host: Counter() for host in HOSTS}
    for answer in answers:
        found[answer.host][answer.kind] += answer.outcome == "taken"
    return found


def tables(answers: list[Answer]) -> str:
    """What the page shows."""
    counts = [[f"{host} {metadata.version(host)}", *_counts(answers, host)] for host in HOSTS]
    kinds = taken_by_kind(answers)
    lists = [[host, " · ".join(f"{kind} {n}" for kind, n in sorted(kinds[host].items()) if n)] for host in HOSTS]
    return "\n\n".join(
        [
            markdown_table(["", "types or files", "asked", *OUTCOMES], counts),
            markdown_table(["", "taken, by model type or file"], lists, align="ll"),
            markdown_table(["refused, as", "transformers", "timm", "such as"], _reasons(answers), align="lrrl"),
        ]
    )


def _counts(answers: list[Answer], host: str) -> list[str]:
    """How many kinds and models of a host were asked, and how many had each outcome."""
    kinds = {answer.kind for answer in answers if answer.host == host}
    outcomes = Counter(answer.outcome for answer in answers if answer.host == host)
    return [f"{count:,}" for count in (len(kinds), outcomes.total(), *(outcomes[outcome] for outcome in OUTCOMES))]


def _reasons(answers: list[Answer]) -> list[list[str]]:
    """A row for each reason of a refusal, the most frequent first."""
    refused = [answer for answer in answers if answer.outcome == "refused"]
    rows = []
    for reason, _ in Counter(answer.reason for answer in refused).most_common():
        same = [answer for answer in refused if answer.reason == reason]
        hosts = Counter(answer.host for answer in same)
        kinds = list(dict.fromkeys(answer.kind for answer in same))
        rows.append([reason, *(str(hosts[host]) for host in HOSTS), ", ".join(kinds[:4]) + ", …" * (len(kinds) > 4)])
    return rows


def listed(page: str) -> tuple[dict[str, str], dict[str, Counter[str]]]:
    """From a page, the versions of the hosts and how many of each kind were taken."""
    text = page.split(BEGIN)[1].split(END)[0]
    versions = dict(re.findall(rf"^\| ({'|'.join(HOSTS)}) ([0-9][^ ]*) \|", text, re.MULTILINE))
    rows = dict(re.findall(rf"^\| ({'|'.join(HOSTS)}) \| (.*) \|$", text, re.MULTILINE))
    kinds = {host: Counter({kind: int(n) for kind, n in re.findall(r"(\S+) (\d+)", row)}) for host, row in rows.items()}
    return versions, kinds


def check(page: str, enough: int | None = None) -> list[str]:
    """What is taken less often than a page says. A host of another version than the page's is left out.

    Args:
        page: Its text.
        enough: Ask no more of a kind when so many are taken.
    """
    versions, expected = listed(page)
    fewer = []
    for host, kinds in expected.items():
        if versions[host] != metadata.version(host):
            continue
        taken: Counter[str] = Counter()
        for model in tqdm(list(MODELS[host](kinds)), desc=host, unit="model", disable=None):
            if enough is None or taken[model.kind] < enough:
                taken[model.kind] += ask(model).outcome == "taken"
        wanted = {kind: count if enough is None else min(count, enough) for kind, count in kinds.items()}
        fewer += [
            f"{host}'s {kind}: {taken[kind]} taken, where the page says {kinds[kind]}"
            for kind, count in wanted.items()
            if taken[kind] < count
        ]
    return fewer


def main() -> None:
    (settings,) = parse((Settings,), sys.argv[1:], __doc__ or "")
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    text = PAGE.read_text()
    if settings.check:
        fewer = check(text)
        sys.exit("\n".join(fewer) or 0)
    answers = ask_all([*transformers_models(), *timm_models()], settings.answers and Path(settings.answers))
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables(answers)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
