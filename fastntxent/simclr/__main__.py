"""`python -m fastntxent.simclr`; see `command`."""

import sys

try:
    from .command import main
except ImportError as error:  # a package of the extra "simclr", such as NumPy, which PyTorch does not require
    print(
        f"error: the trainer needs more packages than the loss: pip install fastntxent[simclr] ({error})",
        file=sys.stderr,
    )
    sys.exit(2)
except KeyboardInterrupt:
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
