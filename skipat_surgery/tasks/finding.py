"""The task of a model, found from its class and its configuration."""

from __future__ import annotations

from typing import Any

from torch import nn

from .classification import Classification, MultiLabel, Regression
from .contrastive import Contrastive
from .detection import Detection
from .embedding import Embedding
from .maps import Depth, Features
from .restoration import Restoration
from .segmentation import Segmentation
from .task import Task
from .wrapping import unwrapped

# transformers' classes by what their names end with.
ENDINGS: dict[str, type[Task]] = {
    "ForSemanticSegmentation": Segmentation,
    "ForObjectDetection": Detection,
    "ForImageSuperResolution": Restoration,
    "WithProjection": Embedding,
    "Backbone": Features,
}
PIXELS = ("pixel_values", "pixel_values_videos")  # what transformers calls images, and videos
NAMED: dict[str, type[Task] | None] = {
    "classification": Classification,
    "multi-label": MultiLabel,
    "regression": Regression,
    "segmentation": Segmentation,
    "depth": Depth,
    "detection": Detection,
    "embedding": Embedding,
    "features": Features,
    "restoration": Restoration,
    "none": None,
}
GIVEN = "skipat_task"  # the attribute of a model whose task was named


def task_named(name: str) -> Task | None:
    """The task of a name; None of ``"none"``, where tokens alone are compared.

    Raises:
        ValueError: There is no such task.
    """
    if name not in NAMED:
        raise ValueError(f"the task must be one of {', '.join(NAMED)}, got {name!r}")
    kind = NAMED[name]
    return None if kind is None else kind()


def give_task(model: nn.Module, task: Task | None) -> None:
    """Have `task_of` a model, and of its copies, be this, whatever its class says; a checkpoint does not keep it."""
    setattr(unwrapped(model), GIVEN, task)


def task_of(model: Any) -> Task | None:
    """The task of a model of transformers or timm; None where its tokens alone are compared.

    A single-label classifier is one whose every image has one class: only there is the softmax of the logits what the
    model says. A regression and a multi-label classifier have logits of the same shape. What `give_task` gave goes
    before what is found.
    """
    model = unwrapped(model)
    if GIVEN in vars(model):
        return vars(model)[GIVEN]
    if not hasattr(model, "config"):
        return _of_timm(model)
    name = type(model).__name__
    if all(hasattr(model, f"get_{part}_features") for part in ("image", "text")):
        return Contrastive()
    if not takes_images_alone(model):
        return None
    if "ForImageClassification" in name or "ForVideoClassification" in name:
        return _of_logits(model.config)
    if name.endswith("ForDepthEstimation"):
        return Depth(relative=getattr(model.config, "depth_estimation_type", "relative") == "relative")
    if name.endswith("Backbone") and not hasattr(model, "out_features"):  # SLANeXt's, which gives its tokens alone
        return None
    return next((task() for ending, task in ENDINGS.items() if name.endswith(ending)), None)


def _of_logits(config: Any) -> Task:
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification":
        return MultiLabel()
    return Regression() if problem == "regression" or config.num_labels == 1 else Classification()


def _of_timm(model: Any) -> Task | None:
    """timm says what its models are for by the number of classes; without pooling, a head sees every token.

    A module of one's own that has a number of classes is taken as timm's are.
    """
    count = getattr(model, "num_classes", None)
    if count is None:
        return Features() if hasattr(model, "feature_info") else None
    if getattr(model, "global_pool", None) == "":
        return None
    if count:
        return Classification() if count > 1 else Regression()
    return Embedding() if hasattr(model, "forward_head") else None


def num_classes_of(model: Any) -> int | None:
    """The number of classes of a single-label classifier, of which each image has one; None for any other model."""
    if not isinstance(task_of(model), Classification):
        return None
    model = unwrapped(model)
    return model.config.num_labels if hasattr(model, "config") else model.num_classes


def takes_images_alone(model: nn.Module) -> bool:
    """Whether a model runs on images or videos and nothing else; one that joins them with text does not."""
    return getattr(model, "main_input_name", PIXELS[0]) in PIXELS
