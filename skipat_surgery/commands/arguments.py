"""What the commands are asked for, in parts that several of them take."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import huggingface_hub
from huggingface_hub.utils import validate_repo_id

from skipat_surgery import PhiConfig

from ..analysis.planning import OFFERS
from ..convert.settings import TrainingConfig, option
from ..tasks.finding import NAMED, task_named
from . import digits
from .checks import check_at_least, check_trackers
from .options import parse_numbers
from .texts import parse_texts

MODEL = "HF id, directory, or timm/NAME; 'digits' trains the demonstration's teacher."
TASK = f"What the model is for, where its class does not say: {', '.join(NAMED)}."
DATASET = "HF id, a folder of images or of parquet files, or 'digits'."


@dataclass(frozen=True)
class Source:
    """What to convert, on which images, into what."""

    model: str = option(digits.NAME, MODEL)
    dataset: str = option(digits.NAME, DATASET)
    task: str | None = option(None, TASK)
    output_dir: str = option("outputs/digits", "Where everything is written.")

    def __post_init__(self) -> None:
        if self.task is not None:
            task_named(self.task)


@dataclass(frozen=True)
class Columns:
    """How the data set is read."""

    dataset_config: str | None = option(None, "Configuration of a data set that has several.")
    streaming: bool = option(
        False,
        "Read the images to train on as they come, as of shards on the Hub or in WebDataset's format, without a copy "
        "here; what is measured on is then the first eval_images.",
    )
    train_split: str | None = option(None, "Split to distil on; found when left out.")
    eval_split: str | None = option(None, "Split to measure on; found when left out.")
    image_column: str | None = option(None, "Column of images; found when left out.")
    label_column: str | None = option(
        None, "Column of labels: to measure by, to learn from by label_weight; or none. Found when left out."
    )
    ignore_index: int | None = option(
        None, "What pixels without a class hold in masks; what the model's configuration says, or 255, when left out."
    )
    texts: str | None = option(
        None, "A text for each class, such as 'a photo of a cat, a photo of a dog': the classes of a contrastive model."
    )
    depth_scale: float = option(1.0, "What depths are divided by, such as 1000 of millimetres.")
    box_format: str = option(
        "xywh", "How boxes are given: xywh, a corner and the size as in COCO, or xyxy, two corners."
    )


@dataclass(frozen=True)
class Cut:
    """What is cut."""

    skip: str = option("3-8", "Blocks to skip, counted from 0, such as 3-8 or 2,4-6.")
    plan: str | None = option(None, "plan.json of `skipat analyze`: blocks and Φ, in the place of --skip and all Φ's.")
    expansion: float = option(PhiConfig.expansion, "Hidden width of Φ, as a multiple of the model's.")
    kernel_size: int = option(PhiConfig.kernel_size, "Side of Φ's depthwise convolution, odd.")
    channel_attention: bool = option(PhiConfig.channel_attention, "Whether Φ has ECA.")
    prefix: str = option(PhiConfig.prefix, "What becomes of prefix tokens: attend, mix or pass.")
    pool: int = option(
        PhiConfig.pool, "The block's own MSA still runs, over one cluster for pool × pool patches; 0 for none."
    )
    queries: str = option(PhiConfig.queries, "Who asks where there are clusters: clusters or patches.")
    reads_x: bool = option(PhiConfig.reads_x, "Whether Φ reads LN(X) beside the Z of the block before.")


@dataclass(frozen=True)
class Budget:
    """The budget to plan for: one of the first three."""

    speedup: float | None = option(None, "Plan for this speed-up over the untouched model.")
    n_skip: int | None = option(None, "Plan for this number of blocks.")
    max_kl: float | None = option(None, "Plan for the fastest set whose KL to the untouched model stays below.")
    expansions: str | None = option(
        None, "Widths of the default Φ to choose from, such as 0.25,0.5; when left out, Φ's from near to cheap."
    )
    max_run: int | None = option(None, "The longest run of a Φ without clusters; half the blocks when left out.")
    num_images: int = option(2048, "Images to plan on; three quarters fit, one quarter scores.")
    cka: bool = option(True, "Whether to compute CKA.")

    @property
    def phis(self) -> list[PhiConfig]:
        """The Φ to choose from."""
        if self.expansions is None:
            return list(OFFERS)
        return [PhiConfig(expansion=width) for width in parse_numbers(self.expansions, float, "expansions")]


@dataclass(frozen=True)
class Learning:
    """How it learns, and how much is spent on it."""

    teacher: str | None = option(
        None, "Another model to learn from, with the same preprocessing; the untouched model when left out."
    )
    preset: str = option("fast", "How much to spend: fast, standard or long. What is given besides goes before it.")
    solve_images: int = option(4096, "Images for the closed-form start of Φ; 0 leaves Φ reusing Z.")
    mlp_keep: float = option(
        1.0, "Share of the work of the MLPs that is kept: below 1, the hidden units that cost least are taken out."
    )
    refit_images: int = option(0, "Images for the closed-form refit of the blocks' last maps; 0 leaves it out.")
    align_steps: int = option(
        0, "Batches for the layerwise training of Φ, between solving and distilling; 0 leaves it out."
    )


@dataclass(frozen=True)
class Run:
    """The run, and where it goes."""

    resume: bool = option(False, "Go on from the newest whole checkpoint in output_dir.")
    mixed_precision: str | None = option(None, "no, bf16 or fp16; accelerate's own setting when left out.")
    report_to: list[str] = field(default_factory=list, metadata={"help": "Trackers: tensorboard, wandb, …"})
    push_to_hub: bool = option(False, "Upload best/ with its model card.")
    hub_model_id: str | None = option(None, "Repository to push to; output_dir's name when left out.")
    hub_private_repo: bool | None = option(None, "Whether to make that repository private, when it is made.")


@dataclass(frozen=True)
class Arguments(Run, Learning, Cut, Columns, Source):
    """What a distillation is asked for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.texts is not None:
            parse_texts(self.texts)
        check_at_least(0, self, "solve_images", "refit_images", "align_steps")
        if not 0 < self.mlp_keep <= 1:
            raise ValueError(f"--mlp_keep must be above 0 and at most 1, got {self.mlp_keep}")
        if self.mlp_keep < 1 and not self.solve_images:
            raise ValueError("--mlp_keep needs --solve_images: the same images tell which hidden units cost least")
        check_trackers(self.report_to)


def settings(args: Arguments, config: TrainingConfig, processes: int) -> dict[str, Any]:
    """What decides the weights that come out, and so must stay the same when a run is resumed."""
    hub = ("push_to_hub", "hub_model_id", "hub_private_repo")
    others = ("output_dir", "resume", "report_to", "num_workers", "log_steps", *hub)
    given = {**asdict(args), **asdict(config), "processes": processes}
    return {name: value for name, value in given.items() if name not in others}


def repository(name: str) -> str:
    """The name of a repository that can be pushed to, by its form and by there being a login; nothing is created.

    Raises:
        ValueError: It is no name of a repository, nobody is logged in, or the Hub's client is set to work offline.
    """
    validate_repo_id(name)
    if huggingface_hub.get_token() is None:
        raise ValueError("push_to_hub needs a login: run `hf auth login`, or set HF_TOKEN")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ValueError("push_to_hub needs the network, and HF_HUB_OFFLINE is set: unset it, or push later")
    return name
