"""A module that ends its process when it is imported, before the first check."""

import os

os._exit(3)
