"""Checks of what a person passes in: each raises an error that names the argument, what was expected and what came.

Everything here looks at shapes, dtypes and devices, which the host knows. The one look at a value is the
temperature's, and only where it lies in host memory: a temperature on an accelerator is never read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ID_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_rows(name: str, rows: Tensor, *, may_be_empty: bool = False) -> None:
    """A floating-point matrix with at least one column, and one row unless it may be without."""
    _require_tensor(name, rows)
    if rows.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {rows.dtype}")
    if rows.layout != torch.strided or rows.is_nested:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {rows.layout}, nested: {rows.is_nested}")
    if rows.ndim != 2:
        raise ValueError(f"{name} must have 2 dimensions (rows, features), got shape {tuple(rows.shape)}")
    if (rows.shape[0] == 0 and not may_be_empty) or rows.shape[1] == 0:
        raise ValueError(f"{name} must have at least one row and one feature, got shape {tuple(rows.shape)}")


def check_views(z_i: Tensor, z_j: Tensor, *, may_be_empty: bool = False) -> None:
    """Two views of one batch: matrices of the same shape, dtype and device."""
    check_rows("z_i", z_i, may_be_empty=may_be_empty)
    check_rows("z_j", z_j, may_be_empty=may_be_empty)
    check_same("z_i", z_i, "z_j", z_j, "shape", "dtype", "device")


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


def check_ids(name: str, ids: Tensor, rows_name: str, rows: Tensor) -> None:
    """One integer group per row, on the rows' device."""
    _require_tensor(name, ids)
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
) -> None:
    """A positive, finite number, or a 0-d floating tensor in host memory or on the rows' device; or, with `per_row`,
    a tensor of so many."""
    if isinstance(temperature, Tensor):
        if temperature.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} must be a floating-point tensor, got {temperature.dtype}")
        if temperature.ndim != 0 and (per_row is None or temperature.shape != (per_row,)):
            either = "" if per_row is None else f"have shape ({per_row},), one per row, or "
            raise ValueError(f"{name} must {either}be a 0-d tensor, got shape {tuple(temperature.shape)}")
        if rows is not None and temperature.device.type != "cpu" and temperature.device != rows.device:
            raise ValueError(
                f"{name} must be on the CPU or on the embeddings' device {rows.device}, got {temperature.device}"
            )
        for extreme in extremes(temperature) or ():  # NaN if there is one
            check_positive(name, extreme)
    else:
        check_number(name, temperature, "a float or a 0-d tensor")
        check_positive(name, temperature)


def extremes(x: Tensor) -> tuple[float, float] | None:
    """The smallest and the largest entry, or None where the host cannot see them: on an accelerator, or compiling."""
    if x.device.type != "cpu" or not x.numel() or torch.compiler.is_compiling():
        return None
    low, high = x.detach().aminmax()
    return low.item(), high.item()


def check_number(name: str, value: object, expected: str = "a number") -> None:
    """A Python number, and not True or False."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")


def check_in_range(name: str, value: float, low: float, high: float, *, with_low: bool, with_high: bool) -> None:
    """A number of an interval, its ends included or not."""
    check_number(name, value)
    above = low <= value if with_low else low < value
    below = value <= high if with_high else value < high
    if not (above and below):
        interval = f"{'[' if with_low else '('}{low:g}, {high:g}{']' if with_high else ')'}"
        raise ValueError(f"{name} must be in {interval}, got {value}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """One of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_positive(name: str, value: float) -> None:
    """A number above zero, neither infinite nor NaN."""
    if not 0 < value < math.inf:  # comparisons alone: torch.compile traces them with a symbolic value
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_reduction(reduction: str) -> None:
    """One of REDUCTIONS."""
    check_choice("reduction", reduction, REDUCTIONS)
