"""`python -m headoff`."""

import sys

from headoff.cli import main

if __name__ == "__main__":
    sys.exit(main())
