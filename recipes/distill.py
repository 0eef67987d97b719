"""Cut a pretrained vision transformer and distil it against the untouched model: see ``--help``."""

from skipat_surgery.commands.distill import main

if __name__ == "__main__":
    main()
