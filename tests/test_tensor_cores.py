"""The tensor-core models of Triton's interpreter and of the emulated CUDA device match published results to the bit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests import tensor_cores
from tests.emulated import COMPILER, emulated_kernels
from tests.tensor_cores import CHIPS

ROUNDING = [chip for chip in CHIPS if chip != "nearest"]
Dot = Callable[..., float]


def interpreter(chip: str, a: np.ndarray, b: np.ndarray, c: float, kind: str = "fp16") -> float:
    return tensor_cores.multiply_add(a[None, :], b[:, None], np.full((1, 1), c), CHIPS[chip], kind).item()


def emulator(chip: str, a: np.ndarray, b: np.ndarray, c: float, kind: str = "fp16") -> float:
    rows, cols = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
    sums = np.full((16, 8), c, np.float32)
    rows[3, : len(a)], cols[: len(b), 5] = a, b
    addresses = (x.ctypes.data for x in (rows, cols, sums))
    emulated_kernels().product(kind == "bf16", *CHIPS[chip], *addresses)
    return sums[3, 5].item()


@pytest.fixture(params=[interpreter] if COMPILER is None else [interpreter, emulator])
def dot(request) -> Dot:
    """Return a function that computes c + a b on a chip, for at most 16 features."""
    return request.param


def published() -> list:
    """Return the published results as cases. The emulator skips TF32, because no CUDA kernel multiplies in TF32."""
    cases = []
    for line in (Path(__file__).parent / "tensor_cores.txt").read_text().splitlines():
        if not line.startswith("#"):
            chip, kind, at, *bits = line.split()
            numbers = np.array([int(word, 16) for word in bits], np.uint32).view(np.float32)
            for model in (interpreter,) if kind == "tf32" or COMPILER is None else (interpreter, emulator):
                cases.append(pytest.param(model, chip, kind, numbers, id=f"{model.__name__}-{chip}-{kind}-{at}"))
    return cases


@pytest.mark.parametrize(("model", "chip", "kind", "numbers"), published())
def test_models_match_published_results_to_the_bit(model, chip, kind, numbers):
    (c, result), (a, b) = numbers[:2], np.split(numbers[2:], 2)
    assert model({"A100": "a100"}.get(chip, "h100"), a, b, c, kind) == result


def ones(values: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return two vectors whose elementwise products are these values: the values themselves, and ones."""
    return np.array(values, np.float32), np.ones(len(values), np.float32)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("chip", ROUNDING)
def test_sums_are_truncated_toward_zero_for_either_sign(dot, chip, sign):
    # Between 2^24 and 2^25 float32 holds only even numbers. Rounding to nearest would give 2^24 + 4.
    assert dot(chip, *ones([sign, sign, sign]), sign * 2.0**24) == sign * (2.0**24 + 2)
    assert dot(chip, *ones([-sign, -sign, -sign]), sign * 2.0**24) == sign * (2.0**24 - 3)


def test_a_block_is_added_at_once(dot):
    # The first 8 products sum to 3, the second 8 to 1. Added to 2^24 at once they give 4; added one after the other, 3
    # is truncated to 2, and 1 to 0.
    products = ones([1, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0])
    assert dot("h100", *products, 2.0**24) == 2.0**24 + 4
    assert dot("a100", *products, 2.0**24) == 2.0**24 + 2


def test_bits_below_the_extra_bits_are_lost_term_by_term(dot):
    # When a chip adds to 1, it keeps the bits down to 2^-23 and some extra bits below: one on an A100, two on an H100.
    for smallest, lost_on in ((2.0**-24, ()), (2.0**-25, ("a100",)), (2.0**-26, ("a100", "h100"))):
        for chip in ROUNDING:
            eight = dot(chip, *ones([smallest] * 8), 1.0)
            kept = 8 * smallest if chip not in lost_on else 0.0
            assert eight == 1 + (kept if kept >= 2.0**-23 else 0.0)
    # Subtracting the last extra bit from 1 gives the next smaller float32. Subtracting half of it changes nothing.
    assert dot("a100", *ones([-(2.0**-24)]), 1.0) == 1 - 2.0**-24
    assert dot("a100", *ones([-(2.0**-25)]), 1.0) == 1
    assert dot("h100", *ones([-(2.0**-25)]), 1.0) == 1 - 2.0**-24
    assert dot("h100", *ones([-(2.0**-26)]), 1.0) == 1


@pytest.mark.parametrize("chip", ROUNDING)
def test_products_are_exact_and_not_normalised(dot, chip):
    # The product 1.5 x 1.5 keeps the exponent of the number 1, so its last extra bit is the same as for 1.
    last = 2.0 ** -(23 + CHIPS[chip].extra_bits)
    factor = np.array([1.5], np.float32)
    assert dot(chip, factor, factor, -last) == 2.25 - 2.0**-22
    assert dot(chip, factor, factor, -last / 2) == 2.25
    widest = np.array([1 + 2.0**-10], np.float32)  # the product has 21 bits
    assert dot(chip, widest, widest, 0.0) == (1 + 2.0**-10) ** 2


@pytest.mark.parametrize("chip", ROUNDING)
def test_subnormal_large_and_nonfinite_numbers_are_handled(dot, chip):
    subnormal = np.array([2.0**-24], np.float32)  # the smallest positive float16
    assert dot(chip, subnormal, subnormal, 0.0) == 2.0**-48
    assert dot(chip, *ones([0, 0]), 2.0**-149) == 2.0**-149
    assert dot(chip, *ones([65504] * 16), 0.0) == 16 * 65504
    largest = float(np.finfo(np.float32).max)
    assert dot(chip, *ones([2.0**127]), largest, "bf16") == np.inf
    assert np.isnan(dot(chip, *ones([np.inf, -np.inf]), 0.0))
    assert np.isnan(dot(chip, *ones([1.0]), np.nan))


@pytest.mark.parametrize(("chip", "least"), [("nearest", -1e-6), ("h100", 5e-6), ("a100", 1e-5)])
def test_a_long_sum_drifts_and_many_short_ones_do_not(dot, chip, least):
    a, b = np.random.default_rng(0).uniform(1, 2, (2, 4096)).astype(np.float16).astype(np.float32)
    exact, long, short = float(a.astype(np.float64) @ b), 0.0, np.float32(0)
    for at in range(0, 4096, 64):
        fresh = 0.0
        for first in range(at, at + 64, 16):
            here = a[first : first + 16], b[first : first + 16]
            long, fresh = dot(chip, *here, long), dot(chip, *here, fresh)
        short += np.float32(fresh)
    assert abs(1 - short / exact) < 1e-6
    assert least < 1 - long / exact < (1e-4 if least > 0 else 1e-6)
