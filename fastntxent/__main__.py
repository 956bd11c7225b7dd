"""`python -m fastntxent`: what is installed, what this machine's devices can do with it, and how fast."""

import sys

from .commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
