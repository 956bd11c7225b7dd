"""Triton kernels: normalisation, log-sum-exp, loss and every gradient on a GPU, on the matrix units.

One source for NVIDIA and AMD. The forward forms half of the similarity matrix, the backward the whole of it once, by
row blocks. With u = 2 M^2 D flops, 2.5u in all; 2u where G goes through panels. Nothing is added atomically, so a
result has the same bits each time; nothing waits for the device. Memory: packed rows, a plane of sums for each thousand
rows, and beyond 256 features (128 of float32, and of any dtype on gfx942) a panel of G of at most 32 MiB (panels.py).

Sigmoid losses, and rows that leave out what is more similar than a limit, have kernels of their own, which form all
similarities in either direction.

Under Triton's interpreter (TRITON_INTERPRET=1 before it is imported) the kernels take tensors in host memory.
"""

import re

import triton

_OLDEST = (3, 3)


def check_version(version: str) -> None:
    """Raise unless this Triton compiles the kernels. 3.2 ends the process over one of them."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or tuple(map(int, found.groups())) < _OLDEST:
        raise RuntimeError(f"Triton {'.'.join(map(str, _OLDEST))} or newer is needed, {version} is installed")


check_version(triton.__version__)
