"""The model of the CUDA kernel: how a call is split into tasks, and how long each phase takes."""

import math
from collections import Counter

import pytest

from benchmarks import limits, model_cuda, sass
from benchmarks.chips import CHIPS
from tests.emulated import COMPILER, H100, emulated_kernels

CHIP = CHIPS["sm_90"]


def carved(cut, n, parts):
    """Return the bytes of workspace that csrc/cuda/plan.h allocates."""
    padded = math.ceil(n / 128) * 128
    floats = [padded] * 5 + [cut.col_shares * padded] * 2 + [cut.grid] * 2 + [2 * padded] + [1] + [n] * 2 + [cut.grid]
    pieces = [2 * padded * cut.chunks * model_cuda.CHUNK] * parts + [4 * count for count in floats]
    return sum(math.ceil(piece / 256) * 256 for piece in pieces)


@pytest.mark.skipif(COMPILER is None, reason="needs Linux and a C++ compiler")
@pytest.mark.parametrize("n", [40, 512, 2048, 5000, 16384])
@pytest.mark.parametrize("d", [64, 128, 200, 768])
@pytest.mark.parametrize(("parts", "dtype"), [(1, 1), (2, 2)])
def test_the_model_plans_as_large_a_workspace_as_the_kernel(n, d, parts, dtype):
    kernels = emulated_kernels()
    kernels.emulate(CHIP.multiprocessors, H100, 0, 16, 2)
    cut = model_cuda.plan(CHIP, 255, n, d, parts)
    assert kernels.workspace(0, dtype, n, 0, d, 0) == carved(cut, n, parts)


def region(counts, flops=0.0, inner=(), ways=None):
    counts = Counter(counts)
    return sass.Region(counts, 0, flops, inner, 0, ways or {counts["tensor"]: counts.total()})


STEP = region({"tensor": 16, "alu": 84}, flops=16 * 4096)
TILE = region({"tensor": 48, "fma": 252}, 48 * 4096, (STEP,), {0: 200, 16: 220, 32: 260, 48: 300})
TASK = region({"alu": 100}, inner=(TILE,))
CUT = model_cuda.Plan(grid=132, held=1, col_shares=4, group=1, chunks=2, cols=128, row_blocks=33, tiles=8)


def cycles(task, phase, cut=CUT, parts=1):
    found = model_cuda.time_of_phase(task, phase, cut, CHIP, parts)
    return found.seconds * CHIP.rates.cycles / CHIP.multiprocessors, found.limit


def test_time_of_a_phase_adds_its_steps_tiles_and_tasks():
    # The cycles that one multiprocessor takes for the bytes of a step, at its share of the cache's rate.
    per_step = 128 * 64 * 2 / (CHIP.rates.cache / CHIP.rates.cycles)
    sums, limit = cycles(TASK, model_cuda.Phase(132, 2, 0))
    assert limit == "cache"
    assert sums == pytest.approx(2 * (2 * per_step + 2 * 200) + 2 * 100 + 2 * limits.LOAD)
    gradient, _ = cycles(TASK, model_cuda.Phase(132, 2, 1))
    second = 2 * model_cuda.PRODUCT
    assert gradient == pytest.approx(2 * (2 * per_step + 2 * 220 + second) + 2 * 100 + 2 * limits.LOAD)
    assert cycles(TASK, model_cuda.Phase(133, 2, 0))[0] == pytest.approx(2 * sums)


@pytest.mark.parametrize(
    ("counts", "flops", "cols", "limit"),
    [
        ({"tensor": 1, "alu": 1000}, 1.0, 128, "slots"),
        ({"tensor": 1}, 1e7, 128, "products"),
        ({"tensor": 1}, 1.0, 128, "cache"),
        ({"tensor": 1}, 1.0, 32, "latency"),
    ],
)
def test_a_step_on_few_multiprocessors_takes_the_longest_of_its_limits(counts, flops, cols, limit):
    task = region({"alu": 1}, inner=(region({"alu": 1}, inner=(region(counts, flops),)),))
    assert cycles(task, model_cuda.Phase(4, 1, 0), CUT._replace(cols=cols))[1] == limit
