"""Checks of what a person passes in: each raises an error that names the argument, what was expected and what came.

Everything here looks at shapes, dtypes and devices, which the host knows. The one look at a value is the
temperature's, and only where it lies in host memory: a temperature on an accelerator is never read.
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
MOST_ROWS = 2**31 - 1  # of a loss, in all of its views: what the kernels count in 32 bits

# The interval of each number that a loss takes, as it is written: a square bracket includes that end.
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
    """A tensor with an address for every element: not sparse, nested, quantised or in a layout of MKL-DNN."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested or value.is_quantized:
        layout = "a nested tensor" if value.is_nested else value.dtype if value.is_quantized else value.layout
        raise TypeError(f"{name} must be a dense (strided) tensor, got {layout}")


def check_rows(name: str, rows: Tensor, *, may_be_empty: bool = False) -> None:
    """A floating-point matrix with at least one column, and one row unless it may be without."""
    check_tensor(name, rows)
    if rows.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {rows.dtype}")
    if rows.ndim != 2:
        raise ValueError(f"{name} must have 2 dimensions (rows, features), got shape {tuple(rows.shape)}")
    if (rows.shape[0] == 0 and not may_be_empty) or rows.shape[1] == 0:
        raise ValueError(f"{name} must have at least one row and one feature, got shape {tuple(rows.shape)}")
    check_row_count(rows.shape[0], name)


def check_row_count(n_rows: int, *names: str) -> None:
    """No more than MOST_ROWS, of these arguments together."""
    # A compiled graph is to serve every number of rows, which a bound here would end: the kernels check it again.
    if not torch.compiler.is_compiling() and n_rows > MOST_ROWS:
        name = " and ".join(names) + (" together" if len(names) > 1 else "")
        raise ValueError(f"{name} must have at most {MOST_ROWS} rows, got {n_rows}")


def check_views(z_i: Tensor, z_j: Tensor, *, may_be_empty: bool = False) -> None:
    """Two views of one batch: matrices of the same shape, dtype and device."""
    check_rows("z_i", z_i, may_be_empty=may_be_empty)
    check_rows("z_j", z_j, may_be_empty=may_be_empty)
    check_same("z_i", z_i, "z_j", z_j, "shape", "dtype", "device")
    check_row_count(2 * z_i.shape[0], "z_i", "z_j")


def check_same(a_name: str, a: Tensor, b_name: str, b: Tensor, *attributes: str) -> None:
    """Two tensors that agree in these attributes."""
    for attribute in attributes:
        of_a, of_b = getattr(a, attribute), getattr(b, attribute)
        if of_a != of_b:
            of_a, of_b = (tuple(of_a), tuple(of_b)) if attribute == "shape" else (of_a, of_b)
            raise ValueError(f"{a_name} and {b_name} must have the same {attribute}, got {of_a} and {of_b}")


def check_features(a_name: str, a: Tensor, b_name: str, b: Tensor) -> None:
    """Two sets of rows of the same length."""
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"{a_name} and {b_name} must have the same number of features, got {a.shape[-1]} and {b.shape[-1]}"
        )


def check_row_each(name: str, x: Tensor, rows_name: str, rows: Tensor) -> None:
    """As many rows as there are."""
    if x.shape[0] != rows.shape[0]:
        raise ValueError(f"{name} must have {rows.shape[0]} rows, one for each of {rows_name}, got {x.shape[0]}")


def check_ids(name: str, ids: Tensor, rows_name: str, rows: Tensor) -> None:
    """One integer group per row, on the rows' device."""
    check_tensor(name, ids)
    if ids.dtype not in ID_DTYPES:
        raise TypeError(f"{name} must have an integer dtype, got {ids.dtype}")
    if ids.shape != rows.shape[:1]:
        raise ValueError(
            f"{name} must have shape ({rows.shape[0]},), one per row of {rows_name}, got {tuple(ids.shape)}"
        )
    if ids.device != rows.device:
        raise ValueError(f"{name} must be on the device of {rows_name}, {rows.device}, got {ids.device}")


def check_temperature(
    temperature: float | Tensor,
    rows: Tensor | None = None,
    *,
    per_row: int | None = None,
    name: str = "temperature",
) -> float | Tensor:
    """A positive, finite number, or a 0-d floating tensor in host memory or on the rows' device; or, with `per_row`,
    a tensor of so many. Return it, as a Python number where it is one."""
    if isinstance(temperature, Tensor):
        check_factor(name, temperature, rows)
        if temperature.ndim != 0 and (per_row is None or temperature.shape != (per_row,)):
            either = "" if per_row is None else f"have shape ({per_row},), one per row, or "
            raise ValueError(f"{name} must {either}be a 0-d tensor, got shape {tuple(temperature.shape)}")
        for extreme in extremes(temperature) or ():  # NaN if there is one
            check_positive(name, extreme)
        return temperature
    tensors = "a 0-d tensor" if per_row is None else "a tensor, 0-d or with one temperature per row"
    return check_positive_number(name, temperature, f"a float or {tensors}")


def extremes(x: Tensor) -> tuple[float, float] | None:
    """The smallest and the largest entry, or None where the host cannot see them: on an accelerator, or traced."""
    if not x.is_cpu or not x.numel() or _traced():
        return None
    x = _unwrapped(x)
    if x.ndim == 0:
        return (value := x.item()), value
    low, high = x.detach().aminmax()
    return low.item(), high.item()


def _traced() -> bool:
    """Whether tensors may have no values yet: in a compiler, or in a dispatch mode (a tracer, fake tensors)."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _unwrapped(x: Tensor) -> Tensor:
    """The tensor inside torch.func's transforms: all values of a vmap at once."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def check_factor(name: str, value: Tensor, rows: Tensor | None) -> None:
    """A floating tensor that may multiply what comes of the rows: in host memory, or on their device."""
    check_tensor(name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if rows is None and value.is_meta:
        raise ValueError(f"{name} must have a value, got a tensor on the meta device")
    if rows is not None and value.device.type != "cpu" and value.device != rows.device:
        raise ValueError(f"{name} must be on the CPU or on the embeddings' device {rows.device}, got {value.device}")


def check_number(name: str, value: object, expected: str = "a number") -> float:
    """A real number in the range of a float, and not True or False. Return it as a Python number: NumPy's have
    arithmetic of their own."""
    if type(value) is float:
        return value
    integer = value if type(value) is int else None
    if integer is not None and torch.compiler.is_compiling():  # it may be symbolic, and then has 64 bits
        return integer
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # of an int or a Fraction; Python may refuse to print one so long
        largest = sys.float_info.max
        raise ValueError(
            f"{name} must be from {-largest:.2g} to {largest:.2g}, got {type(value).__name__} beyond"
        ) from None
    return number if integer is None else integer


def check_numbers(name: str, values: Any, expected: str) -> list[float]:
    """A sequence of real numbers. Return them as `check_number` does.

    expected: what the sequence has, as "a number for each pair".
    """
    try:
        entries = list(values)
    except TypeError:
        raise TypeError(f"{name} must be a sequence, {expected}, got {type(values).__name__}") from None
    return [check_number(name, entry, expected) for entry in entries]


def check_weights(name: str, values: Any, expected: str) -> list[float]:
    """A sequence of numbers that are finite and not negative, one of them not 0. Return them as `check_number` does."""
    weights = check_numbers(name, values, expected)
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(f"{name} must be finite, at least 0, and one of them above, got {weights}")
    return weights


def check_bias(name: str, bias: float | Tensor, rows: Tensor | None = None) -> float | Tensor:
    """A finite number, or a 0-d floating tensor in host memory or on the rows' device. Return it, as a Python number
    where it is one."""
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
    """A number that does not overflow the dtype."""
    largest = torch.finfo(dtype).max
    if not -largest <= value <= largest:
        raise ValueError(f"{name} in {dtype} must be from {-largest:.2g} to {largest:.2g}, got {value}")


def check_integer(name: str, value: object, least: int) -> int:
    """An integer of at least so much, and not True or False. Return it as a Python int."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return operator.index(value)


def check_parameter(name: str, value: float) -> float:
    """Check a loss's parameter against its interval, and return it as `check_number` does."""
    left, low, high, right = _INTERVALS[name]
    value = check_number(name, value)
    above = low <= value if left == "[" else low < value
    below = value <= high if right == "]" else value < high
    if not (above and below):
        raise ValueError(f"{name} must be in {left}{low:g}, {high:g}{right}, got {value}")
    return value


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """One of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_positive(name: str, value: float) -> None:
    """A number above zero, neither infinite nor NaN."""
    if not 0 < value < math.inf:  # comparisons alone: torch.compile traces them with a symbolic value
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_positive_number(name: str, value: object, expected: str = "a number") -> float:
    """A number above zero, neither infinite nor NaN. Return it as `check_number` does."""
    number = check_number(name, value, expected)
    check_positive(name, number)
    return number


def check_reduction(reduction: str) -> None:
    """One of REDUCTIONS."""
    check_choice("reduction", reduction, REDUCTIONS)
