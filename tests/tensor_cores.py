"""How tensor cores add, for Triton's interpreter: NumPy rounds to nearest, tensor cores do not.

A block of products enters the accumulator at once. A product's exponent is the sum of its factors' exponents (its
significand, below 4, is not normalised); a subnormal factor has the exponent of the smallest normal number. All terms,
the accumulator included, are shifted to the largest exponent. Bits below float32's 23 fraction bits and the chip's
extra bits are lost. The sum of what remains is exact, and is truncated to float32: every rounding is toward zero.

Sources: Fasi, Higham, Mikaitis and Pranesh, Numerical behavior of NVIDIA tensor cores (PeerJ Computer Science, 2021);
Ootomo and Yokota (arXiv 2203.03341); Khattak and Mikaitis, Accurate models of NVIDIA tensor cores
(doi 10.1145/3830409), with results of an A100, an H100 and a B200. csrc/cuda/host/tensor_core.h is the same model for
the emulated CUDA device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest


class TensorCore(NamedTuple):
    """Number of half-precision products added at once (half as many for TF32), and the number of extra bits."""

    block: int
    extra_bits: int


# A B200 adds like an H100. No real chip rounds to nearest.
CHIPS = {"nearest": TensorCore(0, 0), "a100": TensorCore(8, 1), "h100": TensorCore(16, 2)}
FAMILIES = {"a100": "sm_80", "h100": "sm_90"}  # the architecture whose tiles are used
LEAST_EXPONENT = {"fp16": -14, "bf16": -126, "tf32": -126}
_NONE = -1000  # the exponent of zero
_LEAST_SHIFT = -133  # the smallest exponent to which a block is shifted

chosen = "h100"  # --tensor-cores

Array = npt.NDArray[Any]


@np.errstate(all="ignore")
def multiply_add(a: Array, b: Array, c: Array, core: TensorCore, kind: str) -> npt.NDArray[np.float32]:
    """Return c + a b for a (M, K), b (K, N) and c (M, N); `kind` must represent a and b exactly."""
    if core.block == 0:
        return a.astype(np.float32) @ b.astype(np.float32) + c.astype(np.float32)
    a, b, c = (x.astype(np.float64) for x in (a, b, c))
    if not all(np.isfinite(x).all() for x in (a, b, c)):
        return (a @ b + c).astype(np.float32)
    of_a, of_b = _exponents(a, LEAST_EXPONENT[kind]), _exponents(b, LEAST_EXPONENT[kind])
    block = core.block // 2 if kind == "tf32" else core.block
    for first in range(0, a.shape[1], block):
        features = range(first, min(first + block, a.shape[1]))
        largest = np.maximum(_exponents(c, -126), _LEAST_SHIFT)
        for k in features:
            np.maximum(largest, np.add.outer(of_a[:, k], of_b[k]), out=largest)
        shift = largest - (23 + core.extra_bits)
        unit, units = np.ldexp(1.0, shift), np.ldexp(1.0, -shift)
        total = np.trunc(c * units)
        for k in features:
            product = np.multiply.outer(a[:, k], b[k])
            product *= units
            total += np.trunc(product, out=product)
        c = np.where(np.isinf(c), c, _cut(total * unit))
    return c.astype(np.float32)


def _exponents(x: Array, least: int) -> Array:
    return np.where(x == 0, np.int32(_NONE), np.maximum(np.frexp(x)[1] - 1, np.int32(least)))


def _cut(x: Array) -> Array:
    """Truncate float64 numbers to float32's precision."""
    exponents = np.frexp(x)[1]
    unit = np.ldexp(1.0, np.maximum(exponents - 24, -149))
    return np.where(exponents > 128, np.copysign(np.inf, x), np.trunc(x / unit) * unit)


def _of_tf32(x: Array) -> Array:
    """Return float32 numbers with only the bits that tensor cores read for TF32."""
    return (np.ascontiguousarray(x).view(np.uint32) & 0xFFFFE000).view(np.float32)


def interpret(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make Triton's interpreter multiply like the named chip."""
    from triton.runtime import interpreter

    from fastntxent.backends.triton import config

    def create_dot(
        self: object, a: Any, b: Any, c: Any, input_precision: object, max_num_imprecise_acc: object
    ) -> object:
        x, y = a.data, b.data
        if x.dtype == np.float16:
            kind = "fp16"
        elif str(input_precision).upper().endswith("IEEE"):
            kind = "bf16"  # widened to float32 by the interpreter
        else:
            kind, x, y = "tf32", _of_tf32(x), _of_tf32(y)
        return interpreter.TensorHandle(multiply_add(x, y, c.data, CHIPS[name], kind), c.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    at_once = CHIPS[name].block or 128  # "nearest" truncates nothing: 128 makes the correction 0
    monkeypatch.setattr(config, "products_at_once", lambda chip: at_once)
