"""Checks of arguments. Each check raises an error that names the argument, the expectation and the actual value.

The checks look at shapes, dtypes and devices, which the host knows. Values of a tensor are read only in host memory: a
temperature on an accelerator is never read.
"""

from __future__ import annotations

import math
import operator
import sys
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .options import REDUCTIONS

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ID_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MOST_ROWS = 2**31 - 1  # over all views of a loss: the kernels count rows in 32 bits

# The intervals that `check_parameter` checks; a square bracket includes the end.
_INTERVALS = {
    "A_0": ("[", 0, 1, "]"),
    "a_0": ("[", 0, 1, "]"),
    "alpha": ("[", 0, 1, "]"),
    "beta": ("[", 0, math.inf, ")"),
    "hardness_strength": ("[", 0, math.inf, ")"),
    "label_smoothing": ("[", 0, 1, ")"),
    "lam": ("(", 0, 1, ")"),
    "margin": ("(", -math.inf, math.inf, ")"),
    "max_logit_scale": ("(", 0, math.inf, ")"),
    "q": ("(", 0, 1, "]"),
    "relative_margin": ("[", 0, 1, "]"),
    "tau_plus": ("[", 0, 1, ")"),
}


def check_tensor(name: str, value: object) -> None:
    """Check that the value is a dense tensor: not sparse, nested, quantised or in MKL-DNN's layout."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested or value.is_quantized:
        layout = "a nested tensor" if value.is_nested else value.dtype if value.is_quantized else value.layout
        raise TypeError(f"{name} must be a dense (strided) tensor, got {layout}")


def check_rows(name: str, rows: Tensor, *, may_be_empty: bool = False) -> None:
    """Check that the rows are a floating-point matrix with at least one column, and at least one row unless
    `may_be_empty`."""
    check_tensor(name, rows)
    if rows.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {rows.dtype}")
    if rows.ndim != 2:
        raise ValueError(f"{name} must have 2 dimensions (rows, features), got shape {tuple(rows.shape)}")
    if (rows.shape[0] == 0 and not may_be_empty) or rows.shape[1] == 0:
        raise ValueError(f"{name} must have at least one row and one feature, got shape {tuple(rows.shape)}")
    check_row_count(rows.shape[0], name)


def check_row_count(n_rows: int, *names: str) -> None:
    """Check that these arguments together have at most MOST_ROWS rows."""
    # Skipped under torch.compile, where a bound would specialise the graph on the number of rows. The kernels check it
    # again.
    if not torch.compiler.is_compiling() and n_rows > MOST_ROWS:
        name = " and ".join(names) + (" together" if len(names) > 1 else "")
        raise ValueError(f"{name} must have at most {MOST_ROWS} rows, got {n_rows}")


def check_views(z_i: Tensor, z_j: Tensor, *, may_be_empty: bool = False) -> None:
    """Check that two views are matrices of the same shape, dtype and device."""
    check_rows("z_i", z_i, may_be_empty=may_be_empty)
    check_rows("z_j", z_j, may_be_empty=may_be_empty)
    check_same("z_i", z_i, "z_j", z_j, "shape", "dtype", "device")
    check_row_count(2 * z_i.shape[0], "z_i", "z_j")


def check_same(a_name: str, a: Tensor, b_name: str, b: Tensor, *attributes: str) -> None:
    """Check that two tensors agree in these attributes."""
    for attribute in attributes:
        of_a, of_b = getattr(a, attribute), getattr(b, attribute)
        if of_a != of_b:
            of_a, of_b = (tuple(of_a), tuple(of_b)) if attribute == "shape" else (of_a, of_b)
            raise ValueError(f"{a_name} and {b_name} must have the same {attribute}, got {of_a} and {of_b}")


def check_features(a_name: str, a: Tensor, b_name: str, b: Tensor) -> None:
    """Check that two sets of rows have the same number of features."""
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"{a_name} and {b_name} must have the same number of features, got {a.shape[-1]} and {b.shape[-1]}"
        )


def check_row_each(name: str, x: Tensor, rows_name: str, rows: Tensor) -> None:
    """Check that `x` has as many rows as `rows`."""
    if x.shape[0] != rows.shape[0]:
        raise ValueError(f"{name} must have {rows.shape[0]} rows, one for each row of {rows_name}, got {x.shape[0]}")


def check_ids(name: str, ids: Tensor, rows_name: str, rows: Tensor) -> None:
    """Check that ids hold one integer per row, on the device of the rows."""
    check_tensor(name, ids)
    if ids.dtype not in ID_DTYPES:
        raise TypeError(f"{name} must have an integer dtype, got {ids.dtype}")
    if ids.shape != rows.shape[:1]:
        raise ValueError(
            f"{name} must have shape ({rows.shape[0]},), one per row of {rows_name}, got {tuple(ids.shape)}"
        )
    if ids.device != rows.device:
        raise ValueError(f"{name} must be on the device of {rows_name} ({rows.device}), got {ids.device}")


def check_temperature(
    temperature: float | Tensor,
    rows: Tensor | None = None,
    *,
    per_row: int | None = None,
    name: str = "temperature",
) -> float | Tensor:
    """Check a temperature and return it, converted to a Python number unless it is a tensor.

    It must be positive and finite: a number, or a 0-d floating-point tensor in host memory or on the device of the
    rows. With `per_row`, a tensor (per_row,) is accepted too.
    """
    if isinstance(temperature, Tensor):
        check_factor(name, temperature, rows)
        if temperature.ndim != 0 and (per_row is None or temperature.shape != (per_row,)):
            either = "" if per_row is None else f"have shape ({per_row},), one per row, or "
            raise ValueError(f"{name} must {either}be a 0-d tensor, got shape {tuple(temperature.shape)}")
        for extreme in extremes(temperature) or ():  # NaN if an entry is NaN
            check_positive(name, extreme)
        return temperature
    tensors = "a 0-d tensor" if per_row is None else "a tensor, 0-d or with one temperature per row"
    return check_positive_number(name, temperature, f"a float or {tensors}")


def extremes(x: Tensor) -> tuple[float, float] | None:
    """Return the smallest and the largest entry, or None if there are no entries or the host cannot see them: on an
    accelerator, or while tracing."""
    if not x.is_cpu or not x.numel() or _traced():
        return None
    x = _unwrapped(x)
    if x.ndim == 0:
        return (value := x.item()), value
    low, high = x.detach().aminmax()
    return low.item(), high.item()


def _traced() -> bool:
    """Return whether tensors may lack values: under torch.compile, or in a dispatch mode (a tracer, fake tensors)."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _unwrapped(x: Tensor) -> Tensor:
    """Return the tensor inside torch.func's transforms, with all values of a vmap at once."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def check_factor(name: str, value: Tensor, rows: Tensor | None) -> None:
    """Check a floating-point tensor that multiplies or shifts logits: it must be in host memory or on the device of the
    rows."""
    check_tensor(name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if rows is None and value.is_meta:
        raise ValueError(f"{name} must have a value, got a tensor on the meta device")
    if rows is not None and value.device.type != "cpu" and value.device != rows.device:
        raise ValueError(f"{name} must be on the CPU or on the embeddings' device {rows.device}, got {value.device}")


def check_number(name: str, value: object, expected: str = "a number") -> float:
    """Check that the value is a real number in the range of a float, and return it as a Python number.

    True and False are rejected. NumPy's numbers are converted, because their arithmetic differs.
    """
    if type(value) is float:
        return value
    integer = value if type(value) is int else None
    if integer is not None and torch.compiler.is_compiling():  # may be symbolic, and then fits 64 bits
        return integer
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an int or a Fraction, which Python may refuse to print if it is too long
        largest = sys.float_info.max
        raise ValueError(
            f"{name} must be in the range of a float, up to {largest:.2g}, got {type(value).__name__} out of range"
        ) from None
    return number if integer is None else integer


def check_numbers(name: str, values: Any, expected: str) -> list[float]:
    """Check a sequence of real numbers, and return a list with each number converted as in `check_number`.

    expected: the content of the sequence for the error message, such as "a number for each pair".
    """
    try:
        entries = list(values)
    except TypeError:
        raise TypeError(f"{name} must be a sequence, {expected}, got {type(values).__name__}") from None
    return [check_number(name, entry, expected) for entry in entries]


def check_weights(name: str, values: Any, expected: str) -> list[float]:
    """Check that a sequence has finite numbers, that none is negative, and that not all are 0. Return a list with each
    number converted as in `check_number`."""
    weights = check_numbers(name, values, expected)
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(f"{name} must be finite and at least 0, and not all 0, got {weights}")
    return weights


def check_bias(name: str, bias: float | Tensor, rows: Tensor | None = None) -> float | Tensor:
    """Check a bias and return it, converted to a Python number unless it is a tensor.

    It must be finite: a number, or a 0-d floating-point tensor in host memory or on the device of the rows.
    """
    if not isinstance(bias, Tensor):
        bias = check_number(name, bias, "a float or a 0-d tensor")
        values: tuple[float, ...] = (bias,)
    else:
        check_factor(name, bias, rows)
        if bias.ndim != 0:
            raise ValueError(f"{name} must be a 0-d tensor, got shape {tuple(bias.shape)}")
        values = extremes(bias) or ()
    for value in values:
        if not -math.inf < value < math.inf:
            raise ValueError(f"{name} must be finite, got {value}")
    return bias


def check_range(name: str, value: float, dtype: torch.dtype) -> None:
    """Check that a number does not overflow the dtype."""
    largest = torch.finfo(dtype).max
    if not -largest <= value <= largest:
        raise ValueError(f"{name} in {dtype} must be from {-largest:.2g} to {largest:.2g}, got {value}")


def check_integer(name: str, value: object, least: int) -> int:
    """Check that the value is an integer, at least `least`, and return it as a Python int. True and False are
    rejected."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return operator.index(value)


def check_parameter(name: str, value: float) -> float:
    """Check a loss's parameter against its interval, and return it, converted as in `check_number`."""
    left, low, high, right = _INTERVALS[name]
    value = check_number(name, value)
    above = low <= value if left == "[" else low < value
    below = value <= high if right == "]" else value < high
    if not (above and below):
        raise ValueError(f"{name} must be in {left}{low:g}, {high:g}{right}, got {value}")
    return value


def check_flag(name: str, value: object) -> bool:
    """Check that an option is True or False, and return it. Without the check, a string such as "no" would count as
    True."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return value


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Check that the value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_positive(name: str, value: float) -> None:
    """Check that a number is positive and finite."""
    if not 0 < value < math.inf:  # only comparisons, which torch.compile traces for symbolic values
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_positive_number(name: str, value: object, expected: str = "a number") -> float:
    """Check that the value is a positive and finite number, and return it, converted as in `check_number`."""
    number = check_number(name, value, expected)
    check_positive(name, number)
    return number


def check_reduction(reduction: str) -> None:
    """Check that the reduction is one of REDUCTIONS."""
    check_choice("reduction", reduction, REDUCTIONS)
