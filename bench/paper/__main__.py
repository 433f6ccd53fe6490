"""``python -m bench.paper NAME``, or ``all``."""

import sys

from bench.paper.cli import main

if __name__ == "__main__":
    sys.exit(main())
