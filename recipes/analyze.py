"""Which blocks of a model to skip: see ``--help``."""

from skipat_surgery.commands.analyze import main

if __name__ == "__main__":
    main()
