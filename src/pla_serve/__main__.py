"""``python -m pla_serve``, the same as ``pla-serve``."""

import sys

from pla_serve.cli import main

if __name__ == "__main__":
    sys.exit(main())
