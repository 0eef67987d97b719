"""A new process that loads checkpoints, with the library or without: ``python loading.py FOLDER library|remote``.

Each sub-folder holds a checkpoint and ``expected.pt``: the name of its case, the images and the outputs.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]


def check(folder: Path, how: str) -> None:
    """Load with the Auto class of the checkpoint, compare, save, load again, compare again."""
    import torch
    import transformers
    from cases import case_named

    name, images, expected = torch.load(folder / "expected.pt")
    case = case_named(name)
    config = json.loads((folder / "config.json").read_text())
    given = [key for key, value in config["auto_map"].items() if value.endswith("." + config["architectures"][0])]
    loader: Any = getattr(transformers, given[0] if given[0] != "AutoBackbone" else "AutoModel")
    options: dict[str, Any] = {"trust_remote_code": True}
    if how == "library":
        options = {}
        settings = transformers.AutoConfig.from_pretrained(folder)
        mapped = transformers.AutoModel._model_mapping.get(type(settings), None)
        if loader is transformers.AutoModel and getattr(mapped, "__name__", None) != config["architectures"][0]:
            # No Auto class gives this one for its config, or only AutoBackbone, which reads no folder.
            loader = getattr(importlib.import_module("skipat_surgery.core.modeling"), config["architectures"][0])
    again = folder.parent / f"{folder.name} again"
    for source, target in ((folder, again), (again, None)):
        model = loader.from_pretrained(source, **options)
        assert ("transformers_modules" in type(model).__module__) == (how == "remote")
        with torch.no_grad():
            found = case.tensors(model, images)
        assert len(found) == len(expected)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
        if target is not None:
            model.save_pretrained(target)


def main() -> None:
    root, how = Path(sys.argv[1]), sys.argv[2]
    if how == "library":
        import skipat_surgery  # noqa: F401
    else:
        sys.modules["skipat_surgery"] = None  # type: ignore[assignment]
    results = {}
    for folder in sorted(path.parent for path in root.glob("*/expected.pt")):
        try:
            check(folder, how)
            results[folder.name] = ""
        except Exception:
            results[folder.name] = traceback.format_exc()
    (root / f"{how}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
