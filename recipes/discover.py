"""Whether a model finds objects that nobody told it of: see ``--help``."""

from skipat_surgery.commands.discover import main

if __name__ == "__main__":
    main()
