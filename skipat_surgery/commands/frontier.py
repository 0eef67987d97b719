"""What a model keeps at which speed, cut and made faster in other ways: a table, a picture and a sentence."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator

from ..analysis.frontier import frontier
from ..analysis.pictures import pyplot
from ..analysis.planning import OFFERS, check_plannable, plan
from ..analysis.scoring import check_offers, num_fitting
from ..terminal import for_wide_tables
from . import run_state
from .checks import check_writable
from .command_line import as_given
from .machine import machine
from .sources import load_data, load_model, unlabelled

BATCH_SIZE = 32


class FrontierBenchmark:
    """One frontier: what can be checked is checked in `__init__`, and everything is written in the end.

    Args:
        model: As the commands take it.
        dataset: Of images; no label is read.
        num_images: Three quarters solve, one quarter is measured on.
        batch_size: Images a batch, of timing too; 32 when left out.
        rounds: How often each model is timed.
        output_dir: Where everything is written.
    """

    def __init__(
        self, model: str, dataset: str, num_images: int, batch_size: int | None, rounds: int, output_dir: str
    ) -> None:
        self.output, self.rounds, size = Path(output_dir), rounds, batch_size or BATCH_SIZE
        check_writable(self.output)
        pyplot()
        self.accelerator = Accelerator()
        host = load_model(model, self.accelerator, self.output)
        data = load_data(dataset, None, label_column="none")
        check_plannable(host.model, 1)
        check_offers(host.model, OFFERS, num_fitting(min(num_images, len(data.train)), size))
        self.loader = list(unlabelled(host, data, num_images, size, seed=0))
        self.model = host.model.to(self.accelerator.device)
        self.console = for_wide_tables()

    def run(self) -> None:
        """Plan, measure, draw, write."""
        torch.manual_seed(0)
        with self.accelerator.autocast():
            planned = plan(self.model, self.loader, n_skip=1)  # its frontier is the same whatever is asked for
            found = frontier(self.model, self.loader, planned, rounds=self.rounds)
        self.output.mkdir(parents=True, exist_ok=True)
        found.plot(self.output / "frontier.png")
        where = f"`{as_given('python')}`, {machine(self.accelerator.device)}, torch {torch.__version__}"
        run_state.write_json(self.output / "frontier.json", {"machine": where, "frontier": found.to_dict()})
        left_out = [f"Left out, {line}" for line in found.left_out]
        text = "\n\n".join([found.verdict(), found.markdown(), *left_out, where])
        (self.output / "frontier.md").write_text(f"{text}\n", encoding="utf-8")
        self.console.print(found.table())
        for line in left_out:
            self.console.print(line, markup=False, soft_wrap=True)
        self.console.print(f"Written to {self.output}")
