"""``python -m voxfuse`` is the command ``voxfuse``."""

import sys

from voxfuse.cli import main

if __name__ == "__main__":
    sys.exit(main())
