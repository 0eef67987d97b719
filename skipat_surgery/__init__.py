"""Convert pretrained vision transformers to Skip-Attention (SkipAT, arXiv 2301.02240)."""

from .align import AlignResult, align
from .authors import load_authors
from .config import PhiConfig, SkipatConfig
from .families import UnsupportedModelError
from .modeling import register_with_auto_classes
from .phi import Phi
from .plan import Plan, plan
from .report import Report, report
from .similarity import Similarity, cka
from .solve import SolveResult, solve
from .surgery import apply, restore

__all__ = [
    "AlignResult",
    "Phi",
    "PhiConfig",
    "Plan",
    "Report",
    "Similarity",
    "SkipatConfig",
    "SolveResult",
    "UnsupportedModelError",
    "align",
    "apply",
    "cka",
    "load_authors",
    "plan",
    "report",
    "restore",
    "solve",
]

register_with_auto_classes()
