"""`python -m fastntxent`: what is installed, what this machine's devices support, and how fast it is."""

import sys

from .commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
