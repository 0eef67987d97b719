"""`skipat`: the commands by name. The library, which takes seconds to load, is loaded once a command is chosen."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version

COMMANDS = {
    "convert": "plan, cut, solve, distil, measure and save a model, for a budget of speed or of closeness",
    "report": "what can be cut in a model, and where; of a cut model what was cut",
    "analyze": "which blocks to skip: CKA between them, and a plan for a budget",
    "distill": "cut blocks that are named, or a plan's, and distil against the untouched model",
    "discover": "find objects by the last block's attention and keys, beside boxes and masks",
    "benchmark": "measure a cut model beside the untouched one and the limit",
}
HELP = f"""usage: skipat COMMAND ...

Convert pretrained vision transformers to Skip-Attention (SkipAT, arXiv 2301.02240).

commands:
{chr(10).join(f"  {name:10} {line}" for name, line in COMMANDS.items())}

options:
  -h, --help  show this help message and exit
  --version   show the version and exit

`skipat COMMAND --help` tells what a command takes. To begin:

  skipat report google/vit-base-patch16-224
  skipat convert google/vit-base-patch16-224 --images ./images --speedup 1.3 --output_dir out

Several processes: accelerate launch -m skipat_surgery COMMAND ...
"""


def main(argv: list[str] | None = None) -> None:
    """Run the command that is named first, with the arguments that follow.

    Args:
        argv: The arguments; those of the process when left out.

    Raises:
        SystemExit: 2 where there is no such command, else as the command ends.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(HELP, end="")
    elif name == "--version":
        print(f"skipat {version('skipat-surgery')}")
    elif name in COMMANDS:
        import_module(f"skipat_surgery.commands.{name}").main(arguments, name=f"skipat {name}")
    else:
        print(f"skipat: error: there is no {name!r}, only {', '.join(COMMANDS)}; see skipat --help", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
