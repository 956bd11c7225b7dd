"""No memory left on the device."""

from . import Broken


def change(d_z):
    raise RuntimeError("CUDA error: out of memory")
    return d_z


BACKEND = Broken(change)
