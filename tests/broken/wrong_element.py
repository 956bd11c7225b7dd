"""A kernel that computes one wrong element in the last row."""

from . import Broken


def change(d_z):
    d_z[-1, -1] += 1e-3 * d_z.abs().max()
    return d_z


BACKEND = Broken(change)
