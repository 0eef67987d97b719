"""What models are for: how the outputs of two are compared, and what is measured, one kind of head a file."""

from .classification import Classification, MultiLabel, Regression
from .contrastive import Contrastive, ZeroShot
from .detection import Detection
from .embedding import Embedding
from .finding import task_of
from .maps import Depth, Features
from .restoration import Restoration
from .segmentation import Segmentation
from .task import Task

__all__ = [
    "Classification",
    "Contrastive",
    "Depth",
    "Detection",
    "Embedding",
    "Features",
    "MultiLabel",
    "Regression",
    "Restoration",
    "Segmentation",
    "Task",
    "ZeroShot",
    "task_of",
]
