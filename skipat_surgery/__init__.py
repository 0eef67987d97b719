"""Convert pretrained vision transformers to Skip-Attention (SkipAT, arXiv 2301.02240)."""

from .analysis.cka import Similarity, cka
from .analysis.planning import Plan, plan
from .authors import load_authors
from .convert.align import AlignResult, align
from .convert.solve import SolveResult, solve
from .core.config import PhiConfig, SkipatConfig
from .core.finding import UnsupportedModelError
from .core.modeling import register_with_auto_classes
from .core.phi import Phi
from .measure.report import Report, report
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
