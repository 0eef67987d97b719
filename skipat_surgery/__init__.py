"""Convert pretrained vision transformers to Skip-Attention (SkipAT, arXiv 2301.02240)."""

from .authors import load_authors
from .config import PhiConfig, SkipatConfig
from .families import UnsupportedModelError
from .modeling import register_with_auto_classes
from .phi import Phi
from .report import Report, report
from .solve import SolveResult, solve
from .surgery import apply, restore

__all__ = [
    "Phi",
    "PhiConfig",
    "Report",
    "SkipatConfig",
    "SolveResult",
    "UnsupportedModelError",
    "apply",
    "load_authors",
    "report",
    "restore",
    "solve",
]

register_with_auto_classes()
