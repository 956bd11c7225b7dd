"""Numbers that Python, C++, CUDA and Triton define separately, and that must be equal."""

import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks import binary, model_cuda
from fastntxent import backends, validation
from fastntxent.backends import native, ranges


def read(header: str) -> str:
    """Return a header of csrc without its comments."""
    text = (Path(__file__).parents[1] / "csrc" / header).read_text()
    return re.sub(r"//.*", "", text)


RANGES = read("ranges.h")
INTERFACE = read("cpu/fastntxent.h")


def number(text: str) -> float:
    """Return the value of a C++ literal."""
    return float.fromhex(text) if text.startswith("0x") else float(text.rstrip("f"))


def constant(header: str, name: str) -> float:
    """Return the value of a constant that is defined by a literal."""
    found = re.search(rf"\b{name} = (?:T\()?([^;,)]+)\)?[;,]", header)
    assert found, f"{name} is not in the header"
    return number(found[1])


def by_type(header: str, name: str) -> dict[torch.dtype, float]:
    """Return the values of a constant for float and for double."""
    found = re.search(rf"\b{name} = sizeof\(T\) == 4 \? (\S+) : (\S+);", header)
    assert found, f"{name} is not in the header"
    return {torch.float32: number(found[1]), torch.float64: number(found[2])}


@pytest.mark.parametrize("name", ["DIRECT_LIMIT", "SMALLEST_FACTOR", "LARGEST_WEIGHT"])
def test_ranges_are_the_same_in_every_language(name):
    assert by_type(RANGES, name) == getattr(ranges, name)


def test_ranges_lie_within_their_types():
    for dtype, limit in ranges.DIRECT_LIMIT.items():
        largest = torch.finfo(dtype).max
        assert limit / math.log(largest) == pytest.approx(2 / 3, abs=0.02)
        assert 1 / largest < ranges.SMALLEST_FACTOR[dtype]
        assert 2 * math.log2(ranges.LARGEST_WEIGHT[dtype]) == pytest.approx(math.log2(largest))


def test_weights_fit_float16_in_both_kernels():
    largest = torch.finfo(torch.float16).max
    in_cuda, in_triton = constant(RANGES, "G_SCALE"), ranges.G_SCALE[torch.float16]
    # An element of G is a sum of two terms, each at most G_SCALE, multiplied by the factor of a column. That factor is
    # below 2 in CUDA, and at most 1 in Triton.
    assert 2 * 2 * in_cuda < largest
    assert 2 * in_triton < largest
    assert in_cuda == 2 * in_triton


def test_smallest_unit_scales_to_normal_numbers():
    unit, scale = constant(RANGES, "SMALLEST_UNIT"), constant(RANGES, "G_SCALE")
    assert torch.finfo(torch.float32).tiny < unit / scale
    assert scale / unit < torch.finfo(torch.float32).max


@pytest.mark.skipif(not backends()["triton"].available, reason="needs Triton 3.3 or newer")
def test_triton_has_the_same_numbers():
    from fastntxent.backends.triton import tiles

    assert tiles.DIRECT_LIMIT.value == ranges.DIRECT_LIMIT[torch.float32]
    assert tiles.LOG2_E.value == constant(RANGES, "LOG2_E")
    assert tiles.TINY.value == torch.finfo(torch.float32).tiny


def test_python_and_the_c_interface_have_the_same_codes():
    for name, dtype in {
        "FLOAT16": "float16",
        "BFLOAT16": "bfloat16",
        "FLOAT32": "float32",
        "FLOAT64": "float64",
    }.items():
        found = re.search(rf"FNTX_{name} = (\d)", INTERFACE)
        assert int(found[1]) == native.DTYPES[getattr(torch, dtype)]
    for name in ("FORWARD", "BACKWARD"):
        assert int(re.search(rf"FNTX_{name} = (\d)", INTERFACE)[1]) == getattr(native, name)
    assert "#define FNTX_MOST_ROWS INT32_MAX" in INTERFACE
    assert torch.iinfo(torch.int32).max == validation.MOST_ROWS


def test_model_has_the_constants_of_the_cuda_kernels():
    header = read("cuda/arguments.h")
    for name in ("WARPS", "CHUNK", "GROUP", "MOST_COL_SHARES"):
        assert constant(header, name) == getattr(model_cuda, name)
    row_warps = constant(header, "ROW_WARPS")
    assert "ROWS = 16 * ROW_WARPS" in header
    assert 16 * row_warps == model_cuda.ROWS
    assert "COL_WARPS = WARPS / ROW_WARPS" in header
    assert binary.WARPS / row_warps == model_cuda.COL_WARPS
