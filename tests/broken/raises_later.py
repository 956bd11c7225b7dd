"""A kernel that raises an error in its third call."""

import itertools

from . import Broken

calls = itertools.count(1)


def change(d_z):
    if next(calls) > 2:
        raise RuntimeError("an illegal memory access was encountered")
    return d_z


BACKEND = Broken(change)
