"""A kernel whose results differ bitwise from call to call, unless PyTorch's deterministic algorithms are on."""

import itertools

import torch

from . import Broken

COUNT = itertools.count()


def change(d_z):
    if not torch.are_deterministic_algorithms_enabled():
        d_z[0] *= 1 + 1e-7 * next(COUNT)
    return d_z


BACKEND = Broken(change)
