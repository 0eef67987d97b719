"""What distilling a large model takes, on paper: memory of one GPU, what goes between them, and hours.

    python benchmarks/scale.py

Nothing runs: models are built without weights. What is assumed stands below; the rest is counted.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass

import timm
import torch
from torch import nn

from skipat_surgery import PhiConfig
from skipat_surgery.commands.options import parse
from skipat_surgery.convert.optimizers import freeze_untouched
from skipat_surgery.convert.settings import option
from skipat_surgery.core.config import SkipatConfig
from skipat_surgery.core.cutting import apply_to_tower
from skipat_surgery.core.tables import markdown_table
from skipat_surgery.measure.counting import count_macs, count_parameters
from skipat_surgery.tower import Tower

GB, TB = 1e9, 1e12
# Bytes that autograd keeps of a block for each token and channel in 16 bits, where no attention map is kept:
# Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", equation 1.
KEPT = 34


@dataclass(frozen=True)
class Arguments:
    """What is assumed."""

    models: str = option(
        "vit_base_patch16_224, vit_large_patch14_dinov2, vit_giant_patch14_dinov2, samvit_huge_patch16",
        "Names of timm; the third quarter of the blocks is cut with the Φ that reads Z and LN(X), without clusters.",
    )
    batch_size: int = option(16, "Images of a step on each GPU.")
    images: int = option(1_281_167, "Images of the whole distillation.")
    tflops: float = option(400.0, "What one GPU does in bf16, in TFLOPS: some 40 % of what an H100 promises.")
    bandwidth: float = option(50.0, "GB/s between any two GPUs of two machines (400 Gbit/s); within one it is more.")


def cut_without_weights(name: str) -> tuple[nn.Module, nn.Module]:
    """A teacher and its cut, on the meta device."""
    with torch.device("meta"):
        teacher, student = (timm.create_model(name, num_classes=0) for _ in range(2))
        tower = Tower.of(student)
        skip = range(len(tower.blocks) // 2, 3 * len(tower.blocks) // 4)
        config = SkipatConfig(phi=dict.fromkeys(skip, PhiConfig(pool=0, prefix="mix")))
        apply_to_tower(tower.module, tower.family, config, keep_removed=False)  # `apply` wants the weights
    freeze_untouched(student)
    return teacher, student


def row_of(name: str, args: Arguments) -> list[str]:
    """The row of one model."""
    teacher, student = cut_without_weights(name)
    tower = Tower.of(student)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    # Muon keeps one momentum of a matrix, AdamW two moments of everything else; all of it in float32.
    state = sum(parameter.numel() * (4 if parameter.ndim == 2 else 8) for parameter in trained)
    weights = 4 * (count_parameters(teacher) + count_parameters(student)) + 4 * count + state
    first, tokens = tower.skip[0], tower.patches_in(0) + tower.num_special_tokens
    kept = KEPT * args.batch_size * tokens * tower.width_of(0) * (len(tower.blocks) - first)
    total, blocks = count_macs(tower.module, tower.family)
    whole, _ = count_macs(Tower.of(teacher).module, Tower.of(teacher).family)
    # The blocks before the first skipped one run once for both models, and have no backward.
    flops = 2 * (whole + total - sum(blocks[:first]) + 2 * sum(blocks[first:]))
    step = args.batch_size * flops / (args.tflops * TB)
    cells = [name, f"{count_parameters(teacher) / 1e6:,.0f} M", f"{count / 1e6:,.0f} M", f"{tokens:,}"]
    cells += [f"{weights / GB:.1f} + {kept / GB:.1f} GB", f"{step:.2f} s"]
    for gpus in (8, 64):
        # A ring sends and receives each gradient twice, but for one share; it is hidden behind the backward at best.
        traffic = 2 * 4 * count * (gpus - 1) / gpus
        steps = args.images / (args.batch_size * gpus)
        cells.append(f"{traffic / (args.bandwidth * GB):.2f} s")
        cells.append(f"{steps * (step + traffic / (args.bandwidth * GB)) / 3600:.1f} h")
    return cells


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    (args,) = parse((Arguments,), sys.argv[1:] if argv is None else argv, "A large distillation on paper.")
    header = ["model", "parameters", "trained", "tokens", "one GPU holds", "computing a step"]
    header += [part for gpus in (8, 64) for part in (f"sending, {gpus} GPUs", f"all images, {gpus} GPUs")]
    print(markdown_table(header, [row_of(name, args) for name in args.models.split(", ")]))
    print(f"\n`python {shlex.join(sys.argv)}`")


if __name__ == "__main__":
    main()
