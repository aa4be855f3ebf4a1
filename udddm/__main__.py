"""`python -m udddm` runs the command `udddm`."""

import sys

from udddm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
