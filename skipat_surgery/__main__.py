"""``python -m skipat_surgery``, the same as ``skipat``."""

from skipat_command import main

if __name__ == "__main__":
    main()
