"""Measure a cut model beside the untouched one (SDPA) and the limit: see ``--help``."""

from skipat_surgery.commands.benchmark import main

if __name__ == "__main__":
    main()
