"""A module that does not load."""

raise RuntimeError("no such device here")
