"""A process that ends before the first check."""

import os

os._exit(3)
