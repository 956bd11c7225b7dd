"""A kernel that leaves the last row uninitialised."""

import torch

from . import Broken


def change(d_z):
    d_z[-1] = torch.empty_like(d_z[-1])
    return d_z


BACKEND = Broken(change)
