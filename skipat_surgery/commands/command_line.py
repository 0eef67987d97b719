"""The command line of this process, for cards and tables: what gives the same again."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

PROGRAM = "skipat"


def as_given(launcher: str) -> str:
    """The command line of this process, as it can be given again.

    Args:
        launcher: What runs a script, such as ``accelerate launch``; `skipat` needs none.
    """
    spec = sys.modules["__main__"].__spec__
    if spec is not None and spec.name.partition(".")[0] == "skipat_surgery":  # by -m, where argv[0] is only a file
        program = [*launcher.split(), "-m", spec.name.removesuffix(".__main__")]
    elif Path(sys.argv[0]).stem == PROGRAM:
        program = [PROGRAM]
    else:
        program = [*launcher.split(), sys.argv[0]]
    return shlex.join([*program, *sys.argv[1:]])
