"""Denoising, untouched and cut: PSNR and SSIM on Kodak24 and CBSD68, and time against tokens.

    python benchmarks/denoising.py
    python benchmarks/denoising.py --kind windowed

The denoiser is trained first (`denoiser.py`), then each cut of it is solved and distilled on noisy crops of the same
photos. Everything is kept in --output_dir, and a second call goes on where the first was.
"""

from __future__ import annotations

import copy
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from denoiser import (
    WHOLE,
    Denoiser,
    Shape,
    WindowedDenoiser,
    WindowedShape,
    crops,
    pixels_of,
    trained,
    training_photos,
    with_noise,
)
from safetensors.torch import load_file, save_file
from subjects import SHARED, bf16, dtype_named, rows_of
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchvision.transforms.v2 import functional as TF
from tqdm.auto import tqdm

import skipat_surgery
from skipat_surgery import PhiConfig
from skipat_surgery.analysis.pictures import pyplot
from skipat_surgery.commands import run_state
from skipat_surgery.commands.machine import keep_freed_memory, machine, quiet_libraries
from skipat_surgery.commands.options import parse, parse_skip
from skipat_surgery.convert.settings import option
from skipat_surgery.core.tables import markdown_table
from skipat_surgery.measure.timing import Estimate, latencies
from skipat_surgery.measure.token_merging import merge_tokens
from skipat_surgery.observing import evaluating
from skipat_surgery.tasks import Restoration

UNTOUCHED = "untouched"
SETS = ("Kodak24", "CBSD68")
PHIS = {
    "clusters": PhiConfig(),
    "fewer clusters": PhiConfig(pool=4),
    "no clusters": PhiConfig(pool=0),
    "paper": PhiConfig.paper(),
}
# Of each kind of denoiser, the blocks to cut, the Φ of each row, and the shares of tokens to merge: those that attend
# within windows have no clusters, and their tokens cannot be merged.
KINDS: dict[str, tuple[type, dict[str, str]]] = {
    "plain": (Shape, {"skip": "2-6", "phis": "clusters, fewer clusters, no clusters, paper", "merges": "0.03, 0.06"}),
    "windowed": (WindowedShape, {"skip": "2-5,8-11", "phis": "no clusters, paper", "merges": ""}),
}


@dataclass(frozen=True)
class Arguments:
    """What to measure. What is left empty is that of the kind."""

    kind: Literal["plain", "windowed"] = option("plain", "A plain ViT, or a Swin2SR, which attends within windows.")
    skip: str = option("", "Blocks to cut, of the eight from 0 to 7, or of the twelve of a Swin2SR.")
    phis: str = option("", "The Φ of each row.")
    merges: str = option("", "Token merging, untrained: shares of a photo's tokens that each MSA merges.")
    levels: str = option("15, 25, 50", "σ of the noise, of pixels from 0 to 255.")
    sides: str = option("64, 128, 256", "Sides of the centre crops that PSNR and SSIM are measured on.")
    whole: int = option(6, "How many whole photos of Kodak24 (15,625 tokens) are measured, with σ = 25.")
    photos: int = option(24, "How many photos of each set are measured.")
    solve_crops: int = option(96, "Crops of 128 pixels that a cut is solved on.")
    steps: int = option(200, "Steps that a cut is distilled for, of crops as the denoiser's first ones.")
    timed: str = option("64, 128, 256, 384, 512", "Sides that are timed, one photo at a time.")
    rounds: int = option(7, "How often each is timed.")
    output_dir: str = option("outputs/denoising", "Where everything is written.")


class Merging(nn.Module):
    """A denoiser that merges a share of a photo's tokens after every MSA, however many these are.

    Args:
        denoiser: It stays as it is.
        share: Of the tokens of the photo, each time.
    """

    def __init__(self, denoiser: Denoiser | WindowedDenoiser, share: float) -> None:
        super().__init__()
        self.denoiser, self.share, self.patch = denoiser, share, denoiser.patch
        self.made: dict[tuple[int, torch.dtype], nn.Module] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Photos (B, 3, H, W) to photos without the noise."""
        count = images.shape[-2] * images.shape[-1] // self.patch**2
        key = (count, next(self.denoiser.parameters()).dtype)
        if key not in self.made:
            self.made[key] = merge_tokens(self.denoiser, round(self.share * count))
        return self.made[key](images)


class Denoising:
    """The denoiser, its cuts, and where what was measured of them is written."""

    def __init__(self, args: Arguments, shape: Shape | WindowedShape) -> None:
        self.args, self.output = args, Path(args.output_dir)
        self.output.mkdir(parents=True, exist_ok=True)
        self.file = self.output / "denoising.json"
        self.done: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.phis = {name: PHIS[name] for name in args.phis.split(", ")}
        self.shape, self.teacher = shape, trained(shape, self.output / "denoiser.safetensors")

    def run(self) -> None:
        """Cut, measure, time, draw."""
        models: dict[str, nn.Module] = {UNTOUCHED: self.teacher}
        self.measured(UNTOUCHED, self.teacher)
        for name, phi in tqdm(self.phis.items(), desc="Cuts", unit="cut"):
            models[name] = self.cut(name, phi)
        for share in filter(None, self.args.merges.split(", ")):
            models[f"merge {share}"] = Merging(self.teacher, float(share))
            self.measured(f"merge {share}", models[f"merge {share}"])
        seconds = self.timed(models)
        where = f"`python {shlex.join(sys.argv)}`, {machine(torch.device('cpu'))}, torch {torch.__version__}"
        text = f"{self.quality_table()}\n\n{self.cost_table(seconds)}\n\n{where}\n"
        (self.output / "denoising.md").write_text(text)
        self.plot(seconds)
        print(text)

    def cut(self, name: str, phi: PhiConfig) -> nn.Module:
        """A cut of the denoiser, solved and measured, distilled and measured again."""
        student = copy.deepcopy(self.teacher)
        skipat_surgery.apply(student, parse_skip(self.args.skip), phi, keep_removed=False)
        file = self.output / f"{name.replace(' ', '_')}.safetensors"
        if file.exists():
            student.load_state_dict(load_file(file))
            return student
        draws, photos = torch.Generator().manual_seed(1), training_photos()
        batches = [crops(photos, 128, 8, draws)[1] for _ in range(self.args.solve_crops // 8)]
        with bf16():
            skipat_surgery.solve(student, self.teacher, batches)
            self.measured(f"{name}, solved", student)

            def steps() -> Iterator[Tensor]:
                side, count, _ = self.shape.stages[0]
                for _ in range(self.args.steps + 1):
                    yield crops(photos, side, count, draws)[1]

            skipat_surgery.distill(student, self.teacher, list(steps()), steps=self.args.steps, task=Restoration())
        self.measured(f"{name}, distilled", student)
        save_file(student.state_dict(), file)
        return student

    def measured(self, name: str, model: nn.Module) -> None:
        """PSNR and SSIM of a model, unless they are known."""
        if name in self.done:
            return
        torch.clear_autocast_cache()
        args, found = self.args, {}
        with evaluating(model), torch.no_grad(), bf16():
            for part in SETS:
                photos = photos_of(part, args.photos)
                for level in map(int, args.levels.split(", ")):
                    for side in map(int, args.sides.split(", ")):
                        found[f"{part}, σ {level}, {side} px"] = self.figures(model, photos, level, side)
            if args.whole:
                photos = photos_of(SETS[0], args.whole)
                found[f"{SETS[0]}, σ 25, whole"] = self.figures(model, photos, 25, None)
        torch.clear_autocast_cache()
        self.done[name] = found
        run_state.write_json(self.file, self.done)

    @staticmethod
    def figures(model: nn.Module, photos: list[Tensor], level: float, side: int | None) -> dict[str, float]:
        """Means over the photos, which are padded by reflection to whole patches or cropped at their centre."""
        psnr, ssim = [], []
        for number, photo in enumerate(tqdm(photos, desc=f"σ {level}, {side or 'whole'}", unit="photo", leave=False)):
            clean = (photo if side is None else TF.center_crop(photo, [side])).unsqueeze(0)
            found = restored(model, with_noise(clean, level, seed=number)).clamp(0, 1)
            psnr.append(float(peak_signal_noise_ratio(found, clean, data_range=1.0)))
            similarity = structural_similarity_index_measure(found, clean, data_range=1.0)
            assert isinstance(similarity, Tensor)  # a pair only where the whole map is asked for
            ssim.append(float(similarity))
        return {"psnr": sum(psnr) / len(psnr), "ssim": sum(ssim) / len(ssim)}

    def timed(self, models: dict[str, nn.Module]) -> dict[int, dict[str, list[float]]]:
        """Seconds of each model for one photo of each side, in bf16 where there is one, all models by turns."""
        dtype, seconds = dtype_named(None), {}
        models = {name: copy.deepcopy(model).to(dtype) for name, model in models.items()}
        with evaluating(*models.values()):
            for side in map(int, self.args.timed.split(", ")):
                image = torch.rand(1, 3, side, side, dtype=dtype)
                calls = {name: lambda model=model, image=image: model(image) for name, model in models.items()}
                seconds[side] = latencies(calls, image.device, self.args.rounds, max_seconds=120, progress=True)
        return seconds

    def quality_table(self) -> str:
        """A row for each model, a column for each set, level and side."""
        columns = list(self.done[UNTOUCHED])
        rows = [
            [name, *(f"{found[column]['psnr']:.2f} / {found[column]['ssim']:.3f}" for column in columns)]
            for name, found in self.done.items()
        ]
        return markdown_table(["PSNR in dB / SSIM", *columns], rows)

    def cost_table(self, seconds: dict[int, dict[str, list[float]]]) -> str:
        """A row for each side: how many times as fast as the untouched denoiser each cut is."""
        rows = []
        for side, found in seconds.items():
            others = [name for name in found if name != UNTOUCHED]
            shown = [Estimate.of_speed(found[UNTOUCHED], found[name]).as_speed() for name in others]
            rows.append([str(side), f"{self.tokens(side):,}", *shown])
        return markdown_table(["side", "tokens", *others], rows)

    def tokens(self, side: int) -> int:
        """The number of tokens of a photo."""
        return (side // self.teacher.patch) ** 2

    def plot(self, seconds: dict[int, dict[str, list[float]]]) -> None:
        """Draw time against tokens."""
        plt = pyplot()
        figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
        tokens = list(map(self.tokens, seconds))
        for name in next(iter(seconds.values())):
            middle = [Estimate.of(found[name]).value for found in seconds.values()]
            axis.loglog(tokens, middle, "o-", label=name)
        axis.set(xlabel="tokens", ylabel="seconds a photo")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
        figure.savefig(self.output / "denoising.png", dpi=120)
        plt.close(figure)


def restored(model: nn.Module, noisy: Tensor) -> Tensor:
    """What a denoiser makes of photos (B, 3, H, W) of any size: padded by reflection to whole patches and back."""
    height, width = noisy.shape[-2:]
    pad = (0, -width % WHOLE, 0, -height % WHOLE)
    return model(F.pad(noisy, pad, mode="reflect")).float()[..., :height, :width]


def photos_of(name: str, count: int, folder: Path = SHARED) -> list[Tensor]:
    """The first photos of a set, (3, H, W) each."""
    rows = rows_of(folder / "data" / "denoising" / f"{name}.parquet")
    return pixels_of(rows.select(range(min(count, len(rows))))["image"])


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    (args,) = parse((Arguments,), sys.argv[1:] if argv is None else argv, "Denoising, untouched and cut.")
    quiet_libraries()
    keep_freed_memory()
    shape, defaults = KINDS[args.kind]
    args = replace(args, **{name: getattr(args, name) or default for name, default in defaults.items()})
    Denoising(args, shape()).run()


if __name__ == "__main__":
    main()
