"""A few calls of one backend, for a profiler: python -m benchmarks.one_call BACKEND"""

from __future__ import annotations

import argparse

import torch

from fastntxent import nt_xent

from .timing import TEMPERATURE, Case, step


def main() -> None:
    """Run forward and backward of the mean loss four times."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.one_call", description=__doc__)
    parser.add_argument("backend")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--d", type=int, default=128)
    given = parser.parse_args()
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    z_i, z_j = Case(given.n, given.d, given.device, dtype).inputs()
    for _ in range(4):
        step(lambda a, b: nt_xent(a, b, TEMPERATURE, backend=given.backend), z_i, z_j)
    if given.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
