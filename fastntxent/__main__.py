"""`python -m fastntxent`: show what is installed, verify it on this machine's devices, and time it."""

import sys

from .commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
