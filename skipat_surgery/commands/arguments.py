"""What a distillation is asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import huggingface_hub
from huggingface_hub.utils import validate_repo_id

from skipat_surgery import PhiConfig

from ..convert.settings import TrainingConfig, option
from . import digits
from .checks import check_at_least, check_trackers


@dataclass(frozen=True)
class Arguments:
    """What to convert, on which images, into what."""

    model: str = option(digits.NAME, "HF id, directory, or timm/NAME; 'digits' trains the demonstration's teacher.")
    teacher: str | None = option(
        None, "Another model to learn from, with the same preprocessing; the untouched model when left out."
    )
    dataset: str = option(digits.NAME, "HF id, a folder of images or of parquet files, or 'digits'.")
    dataset_config: str | None = option(None, "Configuration of a data set that has several.")
    train_split: str | None = option(None, "Split to distil on; found when left out.")
    eval_split: str | None = option(None, "Split to measure on; found when left out.")
    image_column: str | None = option(None, "Column of images; found when left out.")
    label_column: str | None = option(None, "Column of labels: to measure by, to learn from by label_weight; or none.")
    preset: str = option("fast", "How much to spend: fast, standard or long. What is given besides goes before it.")
    skip: str = option("3-8", "Blocks to skip, counted from 0, such as 3-8 or 2,4-6.")
    plan: str | None = option(
        None, "plan.json of recipes/analyze.py: blocks and Φ, in the place of --skip and all Φ's."
    )
    expansion: float = option(PhiConfig.expansion, "Hidden width of Φ, as a multiple of the model's.")
    kernel_size: int = option(PhiConfig.kernel_size, "Side of Φ's depthwise convolution, odd.")
    channel_attention: bool = option(PhiConfig.channel_attention, "Whether Φ has ECA.")
    prefix: str = option(PhiConfig.prefix, "What becomes of prefix tokens: attend, mix or pass.")
    pool: int = option(
        PhiConfig.pool, "The block's own MSA still runs, over one cluster for pool × pool patches; 0 for none."
    )
    queries: str = option(PhiConfig.queries, "Who asks where there are clusters: clusters or patches.")
    reads_x: bool = option(PhiConfig.reads_x, "Whether Φ reads LN(X) beside the Z of the block before.")
    solve_images: int = option(4096, "Images for the closed-form start of Φ; 0 leaves Φ reusing Z.")
    refit_images: int = option(0, "Images for the closed-form refit of the blocks' last maps; 0 leaves it out.")
    align_steps: int = option(
        0, "Batches for the layerwise training of Φ, between solving and distilling; 0 leaves it out."
    )
    output_dir: str = option("outputs/digits", "Where everything is written.")
    resume: bool = option(False, "Go on from the newest whole checkpoint in output_dir.")
    mixed_precision: str | None = option(None, "no, bf16 or fp16; accelerate's own setting when left out.")
    report_to: list[str] = field(default_factory=list, metadata={"help": "Trackers: tensorboard, wandb, …"})
    push_to_hub: bool = option(False, "Upload best/ with its model card.")
    hub_model_id: str | None = option(None, "Repository to push to; output_dir's name when left out.")
    hub_private_repo: bool | None = option(None, "Whether to make that repository private, when it is made.")

    def __post_init__(self) -> None:
        check_at_least(0, self, "solve_images", "refit_images", "align_steps")
        check_trackers(self.report_to)


def settings(args: Arguments, config: TrainingConfig, processes: int) -> dict[str, Any]:
    """What decides the weights that come out, and so must stay the same when a run is resumed."""
    others = ("resume", "report_to", "push_to_hub", "hub_model_id", "hub_private_repo", "num_workers", "log_steps")
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
