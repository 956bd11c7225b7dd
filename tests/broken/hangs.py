"""A kernel that hangs."""

import time

from . import Broken


def change(d_z):
    time.sleep(3600)
    return d_z


BACKEND = Broken(change)
