"""Convert pretrained vision transformers to Skip-Attention (SkipAT, arXiv 2301.02240)."""

from .analysis.cka import Similarity, cka
from .analysis.planning import Plan, plan
from .authors import load_authors
from .convert.align import AlignResult, align
from .convert.distillation import DistillResult, distill
from .convert.evaluation import Evaluator
from .convert.losses import LossWeights, distances, distillation_loss
from .convert.narrow import NarrowResult, narrow
from .convert.optimizers import freeze_untouched, optimizers
from .convert.refit import RefitResult, refit
from .convert.solve import SolveResult, solve
from .core.config import PhiConfig, SkipatConfig
from .core.family import Family
from .core.finding import UnsupportedModelError, register
from .core.modeling import register_with_auto_classes
from .core.phi import Phi
from .core.projections import Projection, Projections
from .measure.report import Report, report
from .observing import outputs_of
from .saving import load, save
from .surgery import apply, forget, restore
from .tower import Tower
from .trainer_card import keep_card

__version__ = "0.1.0"

__all__ = [
    "AlignResult",
    "DistillResult",
    "Evaluator",
    "Family",
    "LossWeights",
    "NarrowResult",
    "Phi",
    "PhiConfig",
    "Plan",
    "Projection",
    "Projections",
    "RefitResult",
    "Report",
    "Similarity",
    "SkipatConfig",
    "SolveResult",
    "Tower",
    "UnsupportedModelError",
    "align",
    "apply",
    "cka",
    "distances",
    "distill",
    "distillation_loss",
    "forget",
    "freeze_untouched",
    "load",
    "load_authors",
    "narrow",
    "optimizers",
    "outputs_of",
    "plan",
    "refit",
    "register",
    "report",
    "restore",
    "save",
    "solve",
]

register_with_auto_classes()
keep_card()
