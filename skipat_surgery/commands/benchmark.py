"""Measure a cut model beside the untouched one (SDPA) and the limit, the MSA deleted at no cost.

    skipat benchmark --model timm/vit_base_patch16_224 --image_sizes 224,384 --dtypes fp32,bf16
    skipat benchmark --compile true
    skipat benchmark --frontier true --model google/vit-base-patch16-224 --dataset ./images

Only the configuration of a model is read: weights are random, as speed does not depend on them. With --frontier they
are the model's own: how much is kept at which speed, of cuts and of what a user would take instead. Writes a JSON with
every sample and a markdown table into the output directory. ``python recipes/benchmark.py`` does the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from skipat_surgery import PhiConfig

from ..convert.settings import option
from ..core.tokens import by
from ..measure.benchmark import Comparison, Rival, benchmark, summary
from ..measure.line_up import compiled, line_up
from ..surgery import apply
from ..terminal import for_wide_tables
from ..tower import Tower
from . import loading, run_state
from .checks import check_at_least, check_writable
from .command_line import as_given
from .frontier import FrontierBenchmark
from .machine import keep_freed_memory, machine, usual_dtype
from .options import parse, parse_numbers, parse_phi, parse_skip
from .running import run_command

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    model: str = option("timm/vit_small_patch16_224", "timm/NAME, HF id or directory; only its configuration is read.")
    skip: str = option("3-8", "Blocks to skip, such as 3-8 or 2,4-6.")
    image_sizes: str = option("224", "Pixels a side, such as 224,384,512,1024.")
    dtypes: str | None = option(
        None, "fp32, bf16 or fp16, several with commas; bf16 when left out, or fp32 where the device has no bf16."
    )
    batch_size: int | None = option(None, "Images a batch; about 2,048 tokens in all when left out.")
    expansions: str = option("0.25,0.5", "Widths of Φ; 'paper' is the paper's Φ.")
    kernel_size: int = option(PhiConfig.kernel_size, "Kernel of Φ's depthwise convolution.")
    channel_attention: bool = option(PhiConfig.channel_attention, "Whether Φ has ECA.")
    prefix: str = option(PhiConfig.prefix, "What becomes of prefix tokens: attend, mix or pass; several with commas.")
    pool: int = option(
        PhiConfig.pool, "The block's own MSA still runs, over one cluster for pool × pool patches; 0 for none."
    )
    queries: str = option(PhiConfig.queries, "Who asks where there are clusters: clusters or patches.")
    reads_x: bool = option(PhiConfig.reads_x, "Whether Φ reads LN(X) beside the Z of the block before.")
    compile: bool = option(False, "Measure the compiled models as well.")
    memory: bool = option(True, "Measure peak memory.")
    keep_freed_memory: bool = option(
        True, "Let the process keep the memory it frees, as with jemalloc; glibc does not."
    )
    frontier: bool = option(False, "Measure quality against speed instead, beside token merging and others.")
    dataset: str | None = option(None, "Of --frontier: HF id, a folder of images or of parquet files, or 'digits'.")
    num_images: int = option(512, "Of --frontier: images; three quarters solve, one quarter is measured on.")
    rounds: int = option(40, "How often each model is timed.")
    max_seconds: float = option(60.0, "Fewer rounds where those of one table would take longer.")
    threads: int | None = option(None, "CPU threads; all cores when left out.")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "Where to run.")
    output_dir: str = option("outputs/benchmark", "Where everything is written.")

    def __post_init__(self) -> None:
        check_at_least(1, self, "batch_size", "rounds", "threads", "num_images")
        if self.frontier != (self.dataset is not None):
            raise ValueError("--frontier true and --dataset belong together: quality is measured on images")

    @property
    def precisions(self) -> list[str]:
        """The dtypes, by name."""
        if self.dtypes is not None:
            return self.dtypes.split(",")
        return [usual_dtype(torch.device(self.device))]

    @property
    def sizes(self) -> list[int]:
        """The image sizes."""
        return parse_numbers(self.image_sizes, int, "image_sizes")

    @property
    def phis(self) -> dict[str, PhiConfig]:
        """The Φ to cut with, by the name of their row."""
        found, prefixes = {}, self.prefix.split(",")
        for width in self.expansions.split(","):
            if width == "paper":
                found["cut, the paper's Φ"] = PhiConfig.paper()
                continue
            (expansion,) = parse_numbers(width, float, "expansions")
            for prefix in prefixes:
                phi = parse_phi(self, expansion=expansion, prefix=prefix)
                which = f", prefix {prefix}" if len(prefixes) > 1 else ""
                found[f"cut, expansion {phi.expansion:g}{which}"] = phi
        return found


class Benchmark:
    """The models to compare, and where what was measured is written: all is checked before the directory is made."""

    def __init__(self, args: Arguments) -> None:
        self.args, self.skip, self.device = args, parse_skip(args.skip), torch.device(args.device)
        unknown = sorted(set(args.precisions) - set(DTYPES))
        if unknown:
            raise ValueError(f"--dtypes takes {sorted(DTYPES)}, got {unknown}")
        self.output = Path(args.output_dir)
        check_writable(self.output)
        self.check_device()
        for size in args.sizes:
            model = self.model(size, args.precisions[0])
            self.shape(model, size)
            apply(model, self.skip, next(iter(args.phis.values())))
        torch.set_num_threads(args.threads or torch.get_num_threads())
        kept = "kept" if args.keep_freed_memory and keep_freed_memory() else "left to the allocator"
        threads = f"{torch.get_num_threads()} threads, freed memory {kept}"
        self.where = f"{machine(self.device)}, {threads}, torch {torch.__version__}"
        self.console = for_wide_tables()
        self.output.mkdir(parents=True, exist_ok=True)

    def check_device(self) -> None:
        """Check that there is such a device; torch's own errors are of many kinds."""
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(f"--device {self.args.device} cannot be used here: {error}") from error

    def model(self, image_size: int | None, dtype: str) -> nn.Module:
        """The untouched model."""
        torch.manual_seed(0)
        return loading.build(self.args.model, image_size).to(self.device, DTYPES[dtype])

    def line_up(self, model: nn.Module, images: torch.Tensor) -> list[Rival]:
        """Everything that is compared with it."""
        found = line_up(model, self.skip, self.args.phis)
        if self.args.compile:
            found += compiled(found)
        return found

    def compare(self) -> list[Comparison]:
        """A table for every size and dtype."""
        found = []
        for size in self.args.sizes:
            for dtype in self.args.precisions:
                torch.compiler.reset()
                model = self.model(size, dtype)
                images = self.images(model, size, dtype)
                title = f"{self.args.model}, blocks {self.args.skip}, {size} px, {dtype}, batch {len(images)}"
                args, rivals = self.args, self.line_up(model, images)
                comparison = benchmark(
                    rivals, images, title, args.rounds, args.max_seconds, memory=args.memory, training=args.memory
                )
                self.console.print(comparison.table())
                for line in comparison.drowned():
                    self.console.print(f"[yellow]{line}[/]")
                found.append(comparison)
        return found

    def images(self, model: nn.Module, size: int, dtype: str) -> torch.Tensor:
        """A batch of noise: images, or videos, of so many pixels a side."""
        tower, shape = Tower.of(model), self.shape(model, size)
        batch = self.args.batch_size or max(1, 2048 // math.prod(tower.family.grid_of(tower.module, shape)))
        return torch.randn(batch, *shape).to(self.device, DTYPES[dtype])

    def shape(self, model: nn.Module, size: int) -> tuple[int, ...]:
        """The shape of an image, or a video, of so many pixels a side.

        Raises:
            ValueError: The model takes none of that size.
        """
        tower = Tower.of(model)
        shape = tower.family.image_size(tower.module)
        if tower.family.takes_ragged:  # no size is configured, and any will do
            shape = (*shape[:-2], size, size)
        if shape[-2:] != (size, size) or 0 in tower.family.grid_of(tower.module, shape):
            height, width = shape[-2:]
            raise ValueError(
                f"--image_sizes names {size}, but {type(model).__name__} then takes images of {height} × {width}, "
                f"{by(tower.family.grid_of(tower.module, shape))} patches: name a size that it can be configured for"
            )
        return shape

    def write(self, comparisons: Sequence[Comparison], text: str) -> None:
        """Write what was found, and say where."""
        found = {"machine": self.where, "arguments": asdict(self.args), "tables": [c.to_dict() for c in comparisons]}
        run_state.write_json(self.output / "benchmark.json", found)
        text = f"{text}\n\n`{as_given('python')}`, {self.where}\n"
        (self.output / "benchmark.md").write_text(text, encoding="utf-8")
        self.console.print(text, markup=False)
        self.console.print(f"Written to {self.output}")

    def run(self) -> None:
        """Compare, and write the tables."""
        comparisons = self.compare()
        tables = [f"{comparison.title}\n\n{comparison.markdown()}" for comparison in comparisons]
        self.write(comparisons, "\n\n".join([*tables, summary(comparisons)]))


def prepare(argv: list[str], name: str | None = None) -> Benchmark | FrontierBenchmark:
    """The benchmark that a command line asks for, checked."""
    (args,) = parse((Arguments,), argv, __doc__ or "", name=name)
    if args.frontier:
        keep_freed_memory()
        return FrontierBenchmark(
            args.model, args.dataset, args.num_images, args.batch_size, args.rounds, args.output_dir
        )
    return Benchmark(args)


def main(argv: list[str] | None = None, name: str = "benchmark.py") -> None:
    """Run, or say in one line why not."""
    run_command(name, partial(prepare, name=name), argv)


if __name__ == "__main__":
    main()
