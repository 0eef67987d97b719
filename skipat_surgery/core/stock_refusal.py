"""Keeps a stock class from loading a cut checkpoint, as it would put random attention into every skipped block.

transformers itself warns of the other model type and of weights that it did not expect, and goes on. But it refuses a
``fusion_config`` with a fusion that it does not know, before any weight is read, and names it in the error. So a cut
model's configuration asks for one, and its own class alone knows not to look for it.
"""

from __future__ import annotations

from typing import Any

# The error reads "Unknown fusion type: …".
UNKNOWN = (
    "none, as this model is cut by Skip-Attention. Its stock class cannot load it: import a current skipat_surgery and "
    "use an Auto class, as its model card says, or pass that one trust_remote_code=True"
)


def refuse_stock(config: Any) -> None:
    """Have the stock class refuse what is saved with this configuration."""
    config.fusion_config = {**(getattr(config, "fusion_config", None) or {}), UNKNOWN: True}


def allow_stock(config: Any) -> None:
    """Undo `refuse_stock`."""
    config.fusion_config = {name: value for name, value in config.fusion_config.items() if name != UNKNOWN}
    if not config.fusion_config:
        del config.fusion_config


def load_refused(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` that load it all the same: what is given goes before the configuration."""
    return {**kwargs, "fusion_config": kwargs.get("fusion_config") or {}}
