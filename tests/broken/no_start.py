"""A process that exits before the first check."""

import os

os._exit(3)
