"""Does a model find objects that nobody told it of? Attention and keys of its last block, beside boxes and masks.

    skipat discover --model out/best --teacher facebook/dinov2-small --dataset VOCdevkit/VOC2012 --split trainval
    skipat discover --model facebook/dinov2-small --dataset coco/annotations/instances_val2017.json --num_images 500

Writes ``discovery.json`` and ``attention.png``, maps side by side, into the output directory. Pictures are resized
whole to the size that the model takes. ``python recipes/discover.py`` does the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import PIL.Image
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..analysis.discovery import LOST_PATCHES, ndimage
from ..analysis.discovery_figures import TRIVIAL, Discovery, Found, figures_of, found_by, trivial
from ..analysis.last_block import check_last_block, read_last_block
from ..analysis.pictures import pyplot
from ..convert.settings import option
from ..terminal import for_wide_tables
from ..tower import Tower
from . import loading, run_state
from .annotations import BOX_FORMATS, Columns, read_annotations
from .arguments import MODEL
from .attention_picture import Example, draw
from .checks import check_at_least, check_writable
from .machine import keep_freed_memory, machine, slowness
from .options import parse, parse_numbers
from .running import run_command
from .whole_images import WholeImages

FIGURES, PICTURE = "discovery.json", "attention.png"
TEACHER, STUDENT = "teacher", "model"


@dataclass(frozen=True, kw_only=True)
class Given:
    """What looks for objects, and where."""

    model: str = field(metadata={"help": f"Cut or not: {MODEL.partition(';')[0]}."})
    dataset: str = field(metadata={"help": "Pictures with VOC's XML, COCO's JSON, or a table with boxes or masks."})
    teacher: str | None = option(None, "The untouched model, to show beside it.")
    output_dir: str = option("outputs/discovery", "Where everything is written.")


@dataclass(frozen=True, kw_only=True)
class Read:
    """How the pictures are read."""

    split: str | None = option(None, "Split of a table, or list in VOC's ImageSets/Main.")
    image_column: str | None = option(None, "Column of images; found when left out.")
    boxes_column: str | None = option(None, "Column of boxes; found when left out.")
    mask_column: str | None = option(None, "Column of masks, a class for each pixel; found when left out.")
    box_format: str = option("xyxy", "Of a column of boxes: xyxy for corners, xywh for a corner and the size.")
    num_images: int | None = option(None, "Only the first so many.")
    image_size: int | None = option(None, "Pixels a side; what the model's preprocessing makes when left out.")
    batch_size: int = option(16, "Images a batch.")


@dataclass(frozen=True, kw_only=True)
class Arguments(Read, Given):
    """How they look."""

    mass: str = option("0.6,0.9", "Shares of the CLS attention whose patches are compared with the masks.")
    lost_patches: int = option(LOST_PATCHES, "Patches that may join LOST's seed; the paper's k.")
    centre_keys: bool = option(False, "Whether LOST and TokenCut see keys without the mean of the image's.")
    shown: int = option(6, "Pictures in attention.png.")
    mixed_precision: str | None = option(None, "no, bf16 or fp16.")

    def __post_init__(self) -> None:
        check_at_least(1, self, "num_images", "image_size", "batch_size", "lost_patches", "shown")
        if self.box_format not in BOX_FORMATS:
            raise ValueError(f"--box_format must be one of {BOX_FORMATS}, got {self.box_format!r}")
        if max(self.masses) >= 1:
            raise ValueError(f"--mass takes shares between 0 and 1, got {self.mass!r}")

    @property
    def masses(self) -> list[float]:
        """The shares of the attention."""
        return parse_numbers(self.mass, float, "mass")


class Looker:
    """A model that looks for objects.

    Raises:
        ValueError: Its last block cannot be read, or it takes no images of the size.
    """

    def __init__(self, name: str, args: Arguments, device: torch.device) -> None:
        host = loading.load(name)
        self.tower, self.args, self.device = Tower.of(host.model), args, device
        check_last_block(self.tower)
        self.images = WholeImages(host, args.image_size)
        self.tower.module.to(device)
        try:
            self.look([PIL.Image.new("RGB", (8, 8))])
        except RuntimeError as error:
            height, width = self.images.size
            raise ValueError(f"{name} takes no images of {height} × {width}; give another --image_size") from error

    def look(self, pictures: Sequence[PIL.Image.Image]) -> list[Found]:
        """What it finds in some pictures."""
        images = self.images([picture.convert(self.images.mode) for picture in pictures])
        block = read_last_block(self.tower, images.to(self.device))
        args = self.args
        return [found_by(block, i, args.masses, args.lost_patches, args.centre_keys) for i in range(len(pictures))]


class Search:
    """One search: what can be checked is checked in `__init__`, and everything is written in the end."""

    def __init__(self, args: Arguments) -> None:
        self.args, self.output, self.console = args, Path(args.output_dir), for_wide_tables()
        check_writable(self.output)
        pyplot()
        ndimage()
        columns = Columns(args.split, args.image_column, args.boxes_column, args.mask_column, args.box_format)
        self.annotated = read_annotations(args.dataset, columns)[: args.num_images]
        self.accelerator = Accelerator(mixed_precision=args.mixed_precision)
        named = {TEACHER: args.teacher, STUDENT: args.model}
        device = self.accelerator.device
        self.lookers = {row: Looker(name, args, device) for row, name in named.items() if name is not None}

    def run(self) -> None:
        """Look, count, draw, write."""
        for line in slowness(self.accelerator.device, self.accelerator.mixed_precision):
            self.console.print(line, soft_wrap=True)
        figures: dict[str, list[dict[str, float]]] = {row: [] for row in (*TRIVIAL, *self.lookers)}
        shown: list[Example] = []
        for example in self.examples():
            boxes = {row: trivial(box, example.truth, self.args.masses) for row, box in TRIVIAL.items()}
            for row, found in {**boxes, **example.found}.items():
                figures[row].append(figures_of(found, example.truth))
            if len(shown) < self.args.shown:
                shown.append(example)
        if not shown:
            raise ValueError(f"not one of {len(self.annotated)} pictures of {self.args.dataset} could be read")
        discovery, missing = Discovery.of(figures), len(self.annotated) - len(figures[STUDENT])
        self.write(discovery, shown, missing)
        self.console.print(discovery.table())
        if missing:
            self.console.print(f"WARNING: {missing} pictures could not be read")
        self.console.print(f"Picture and figures: {self.output}")

    def examples(self) -> Iterator[Example]:
        """Each picture that can be read, with its objects and what the models find."""
        size = self.args.batch_size
        for start in tqdm(range(0, len(self.annotated), size), desc="Discovery", unit="batch"):
            batch = [(each.picture("RGB"), each) for each in self.annotated[start : start + size]]
            read = [(picture, each.truth(picture.size)) for picture, each in batch if picture is not None]
            if not read:
                continue
            with self.accelerator.autocast():
                found = {row: looker.look([picture for picture, _ in read]) for row, looker in self.lookers.items()}
            for index, (picture, truth) in enumerate(read):
                yield Example(picture, truth, {row: each[index] for row, each in found.items()})

    def write(self, discovery: Discovery, shown: Sequence[Example], unreadable: int) -> None:
        """Write the picture and the figures."""
        self.output.mkdir(parents=True, exist_ok=True)
        draw(shown, self.output / PICTURE)
        skip = {row: list(looker.tower.skip) for row, looker in self.lookers.items()}
        about = {"machine": machine(self.accelerator.device), "arguments": asdict(self.args), "skip": skip}
        run_state.write_json(self.output / FIGURES, {**about, "unreadable": unreadable, **discovery.to_dict()})


def prepare(argv: list[str], name: str | None = None) -> Search:
    """The search that a command line asks for, checked."""
    keep_freed_memory()
    return Search(*parse((Arguments,), argv, __doc__ or "", name=name))


def main(argv: list[str] | None = None, name: str = "discover.py") -> None:
    """Look for objects, or say in one line why not."""
    run_command(name, partial(prepare, name=name), argv)


if __name__ == "__main__":
    main()
