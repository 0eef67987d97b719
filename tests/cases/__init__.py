"""Small models of every supported family, built from configs with random weights: what the contract runs on.

A new family is one `Case` here, next to its entry in `skipat_surgery/core/*_families.py`. The first case of a family is
its lead: it stands for the family in the slow parts of the contract.
"""

from . import (
    dual,
    folded,
    maps,
    packed,
    ragged,
    stages,
    timm_towers,
    torchvision_towers,
    transformers_towers,
    units,
    vision_language,
)
from .case import Case, InStages, output_tensors

CASES: list[Case] = [
    *transformers_towers.CASES,
    *vision_language.CASES,
    *timm_towers.CASES,
    *torchvision_towers.CASES,
    *ragged.CASES,
    *packed.CASES,
    *maps.CASES,
    *stages.CASES,
    *dual.CASES,
    *folded.CASES,
    *units.CASES,
]
LEADS: list[Case] = list({case.family: case for case in reversed(CASES)}.values())[::-1]


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


__all__ = ["CASES", "LEADS", "Case", "InStages", "case_named", "output_tensors"]
