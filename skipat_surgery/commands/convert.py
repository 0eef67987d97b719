"""Convert a pretrained vision transformer for a budget: plan, cut, solve, distil, measure and save in one go.

    skipat convert MODEL --images ./images --speedup 1.3 --output_dir out
    skipat convert MODEL --images ./images --n_skip 4 --output_dir out --preset standard --push_to_hub
    skipat convert MODEL --images ./images --plan out/plan.json --output_dir again
    accelerate launch -m skipat_surgery convert MODEL --images ./images --speedup 1.3 --output_dir out

The output directory then holds what `skipat analyze` and `skipat distill` write. With --resume a run that was broken
off goes on where it was, and does not plan again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from ..analysis.cka import SMALLEST_BATCH
from ..analysis.planning import Plan, check_budget, check_plannable
from ..analysis.scoring import check_offers, num_fitting
from ..convert.settings import TrainingConfig, option
from ..core.config import SkipatConfig
from . import run_state
from .analyze import PLAN, analysed, shortfall, write
from .arguments import DATASET, MODEL, TASK, Arguments, Budget, Columns, Learning, Run
from .checks import check_at_least
from .distill import Recipe
from .machine import keep_freed_memory, machine
from .options import parse, read_plan
from .output import RUN
from .parser import POSITIONAL
from .presets import PRESETS
from .running import run_command
from .sources import unlabelled


@dataclass(frozen=True, kw_only=True)
class Given:
    """What to convert, on which images, into what."""

    model: str = field(metadata={"help": MODEL, POSITIONAL: True})
    images: str = field(metadata={"help": DATASET})
    output_dir: str = field(metadata={"help": "Where everything is written."})
    task: str | None = option(None, TASK)


@dataclass(frozen=True, kw_only=True)
class Request(Run, Learning, Columns, Budget, Given):
    """What was planned before, in the place of a budget."""

    plan: str | None = option(None, "plan.json of an earlier run, of `skipat analyze` or of Plan.save.")

    def __post_init__(self) -> None:
        if self.plan is None:
            check_budget(self.speedup, self.n_skip, self.max_kl)
        elif (self.speedup, self.n_skip, self.max_kl) != (None, None, None):
            raise ValueError("--plan is in the place of a budget: leave speedup, n_skip and max_kl out, or --plan")
        check_at_least(SMALLEST_BATCH if self.cka else 1, self, "num_images")
        check_at_least(1, self, "max_run")

    @property
    def arguments(self) -> Arguments:
        """The distillation of what is planned."""
        same = {f.name for f in fields(Arguments)} & {f.name for f in fields(self)}
        given = {name: getattr(self, name) for name in same - {"plan"}}
        return Arguments(dataset=self.images, plan=self.plan or str(Path(self.output_dir) / PLAN), **given)


class Conversion(Recipe):
    """A distillation whose cut is planned, where no plan is given or was left by the run that is resumed.

    All checks are those of the distillation, on a cut of one block, and those of the plan.
    """

    def __init__(self, request: Request, config: TrainingConfig) -> None:
        self.request, self.kept = request, Path(request.output_dir) / PLAN
        super().__init__(request.arguments, config)

    def settings(self) -> dict[str, Any]:
        """What decides the weights that come out."""
        return super().settings() | {f.name: getattr(self.request, f.name) for f in fields(Budget)}

    def wanted_cut(self) -> SkipatConfig:
        """The plan of the run that is resumed, or the one that is given; else a block, for the checks."""
        resumed = self.args.resume and (self.kept.parent / RUN).exists() and self.kept.exists()
        given = None if self.request.plan is None else Path(self.request.plan)
        self.planned = self.kept if resumed else given
        if self.planned is None:
            return SkipatConfig.parse([1], self.request.phis[0])
        return SkipatConfig.parse(read_plan(self.planned))

    @property
    def batch_size(self) -> int:
        """Images a batch while it is planned; CKA takes no fewer."""
        return max(self.config.batch_size, SMALLEST_BATCH)

    def check_besides(self) -> None:
        """Check what the plan needs."""
        if self.planned is not None:
            return
        check_plannable(self.original, self.request.n_skip)
        phis, available = self.request.phis, len(self.data.train)
        check_offers(self.original, phis, num_fitting(min(self.request.num_images, available), self.batch_size))
        if self.args.solve_images:
            check_offers(self.original, phis, min(self.args.solve_images, available))

    def run(self) -> None:
        """Plan, and distil what was planned. A run that can be resumed is there once its plan is."""
        with self.output:
            if self.planned is None:
                self.plan()
            elif self.accelerator.is_main_process and self.planned.resolve() != self.kept.resolve():
                self.keep(read_plan(self.planned))
            self.output.begin()
            super().run()

    def plan(self) -> None:
        """Plan, and cut what was chosen.

        Every process plans, as none could wait so long for another, and takes what the main one found.
        """
        request, seed = self.request, self.config.seed
        self.console.print(f"Planning on {min(request.num_images, len(self.data.train)):,} images")
        images = unlabelled(self.host, self.data, request.num_images, self.batch_size, seed)
        with self.accelerator.autocast():
            found = analysed(self.original, images, request, seed)
        plan, similarity = broadcast_object_list([*found])
        if self.accelerator.is_main_process:
            asked = {"machine": machine(self.accelerator.device), "arguments": asdict(request)}
            write(self.output.folder, plan, similarity, asked)
        self.console.print(plan.table())
        if warning := shortfall(plan, request):
            self.console.print(warning, soft_wrap=True)
        self.cut = SkipatConfig.parse(plan)
        self.student = self.cut_copy({})

    def keep(self, plan: Plan | SkipatConfig) -> None:
        """Have a plan that was given in the output directory."""
        if isinstance(plan, Plan):
            write(self.output.folder, plan, None, {"arguments": asdict(self.request)})
        else:
            run_state.write_json(self.kept, plan.to_dict())

    def summarise(self, *given: Any) -> dict[str, Any]:
        """Everything that was measured, with what was asked for."""
        summary = super().summarise(*given)
        return {**summary, "arguments": summary["arguments"] | asdict(self.request)}


def prepare(argv: list[str], name: str | None = None) -> Conversion:
    """The conversion that a command line asks for, checked."""
    keep_freed_memory()
    return Conversion(*parse((Request, TrainingConfig), argv, __doc__ or "", PRESETS, name))


def main(argv: list[str] | None = None, name: str = "convert.py") -> None:
    """Run, or say in one line why not."""
    run_command(name, partial(prepare, name=name), argv, resumable=True)


if __name__ == "__main__":
    main()
