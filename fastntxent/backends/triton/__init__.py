"""Triton kernels: normalisation, log-sum-exp, loss and every gradient on a GPU's matrix units.

One source serves NVIDIA and AMD. The forward computes half of the similarity matrix, and the backward computes all of
it once, by row blocks. With u = 2 M^2 D flops that is 2.5u in all. Beyond 256 features (128 for float32, and for any
dtype on gfx942) it is 2u: the weights G of the gradient (backward.py) then go through memory in panels, for which half
of the similarities are enough (panels.py). Up to about a thousand rows, and where exp would leave its range, the
forward computes the whole matrix, which adds u/2.

There are no atomic additions, so results are bitwise reproducible. The host never waits for the device. Memory is the
packed rows, the sums of the gradient, at most 129 planes of sums (forward.py) with one float32 per row, and a panel of
at most 32 MiB where G goes through memory.

Sigmoid losses have separate kernels, and calls with similarity limits use variants of the kernels above. Except in
panels, all of these compute the whole similarity matrix instead of half of it.

Under Triton's interpreter (set TRITON_INTERPRET=1 before importing Triton) the kernels take tensors in host memory.
"""

import re

import triton

_OLDEST = (3, 3)


def check_version(version: str) -> None:
    """Raise RuntimeError if this Triton is too old to compile the kernels. Triton 3.2 crashes on one of them."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or tuple(map(int, found.groups())) < _OLDEST:
        raise RuntimeError(f"Triton {'.'.join(map(str, _OLDEST))} or newer is needed, but {version} is installed")


check_version(triton.__version__)
