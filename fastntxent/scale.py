"""Checks and conversions of the numbers that scale or shift logits: 1 / temperature and other factors of similarities,
which are floats or tensors in the accumulation dtype, and the bias, which is always such a tensor."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from .algebra import accumulation_dtype, in_double
from .ops import may_be_differentiated
from .validation import check_bias, check_range, check_temperature, extremes


def inverse_temperature(temperature: float | Tensor, rows: Tensor, *, per_row: int | None = None) -> float | Tensor:
    """Check the temperature and return 1 / temperature: a float for a float, else a 0-d tensor in the accumulation
    dtype. If `per_row` (the number of rows) is given, the temperature may also be a tensor (per_row,), and so is the
    result. Under torch.compile, the result for a float may be a tensor (see `factor`)."""
    temperature = check_temperature(temperature, rows, per_row=per_row)
    dtype = accumulation_dtype(rows.dtype)
    if not isinstance(temperature, Tensor):
        _check_invertible(temperature, temperature, dtype, torch.finfo(dtype).max)
        return factor(1.0 / temperature, rows)
    # The derivative of k = 1 / tau is -k^2, which overflows float32 long before k does. So compute in float64 where the
    # device has it.
    wide = in_double(temperature)
    if limits := extremes(wide):
        differentiable = wide.requires_grad and torch.is_grad_enabled()
        largest = min(torch.finfo(dtype).max, torch.finfo(wide.dtype).max ** (0.5 if differentiable else 1.0))
        _check_invertible(*limits, dtype, largest)
    return factor(wide.reciprocal(), rows)


def _check_invertible(smallest: float, largest: float, dtype: torch.dtype, largest_inverse: float) -> None:
    """Check that 1 / temperature is at most `largest_inverse`, and not 0 in the dtype."""
    if smallest < 1 / largest_inverse:
        raise ValueError(f"temperature must be at least {1 / largest_inverse:.4g}, got {smallest}")
    smallest_inverse = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    if largest * smallest_inverse > 1:
        raise ValueError(f"temperature must be at most {1 / smallest_inverse:.4g}, got {largest}")


def logit_scale_factor(logit_scale: float | Tensor, rows: Tensor, name: str = "logit_scale") -> float | Tensor:
    """Check a logit scale, which takes the place of 1 / temperature, and return it as `factor` returns it."""
    scale = factor(check_temperature(logit_scale, rows, name=name), rows)
    dtype = accumulation_dtype(rows.dtype)
    if isinstance(scale, Tensor):
        if isinstance(logit_scale, Tensor) and logit_scale.dtype == dtype:
            return scale  # exactly the value that was checked
        check_temperature(scale, name=f"{name} in {dtype}")
    elif not 1 / (largest := torch.finfo(dtype).max) <= scale <= largest:
        raise ValueError(f"{name} in {dtype} must be from {1 / largest:.4g} to {largest:.4g}, got {scale}")
    return scale


def bias_of_logits(bias: float | Tensor, rows: Tensor, name: str) -> Tensor:
    """Check the bias, a number that is added to every logit. Return it as a 0-d tensor in the accumulation dtype."""
    bias = check_bias(name, bias, rows)
    dtype = accumulation_dtype(rows.dtype)
    values: tuple[float, ...] = ()  # the values that may be out of the dtype's range
    if not isinstance(bias, Tensor):
        values = (bias,)
    elif torch.finfo(bias.dtype).max > torch.finfo(dtype).max:
        values = extremes(bias) or ()
    for value in values:
        check_range(name, value, dtype)
    found = factor(bias, rows)
    return found if isinstance(found, Tensor) else scalar_like(found, rows)


def is_per_row(inv_tau: float | Tensor) -> TypeGuard[Tensor]:
    """Return whether there is one inverse temperature per row."""
    return isinstance(inv_tau, Tensor) and inv_tau.ndim > 0


def factor(value: float | Tensor, rows: Tensor) -> float | Tensor:
    """Return a number that scales or shifts logits. A float stays a float, unless it changes from call to call under
    torch.compile: then it becomes a tensor. A tensor is converted to the accumulation dtype, and moved to the rows'
    device if it may need a gradient or has one value per row."""
    if not isinstance(value, Tensor):
        return scalar_like(value, rows) if _changes(value) else value
    if may_be_differentiated(value) or value.ndim > 0:  # needs the rows' device
        value = value if value.device == rows.device else value.to(rows.device)
    dtype = accumulation_dtype(rows.dtype)
    return value if value.dtype == dtype else value.to(dtype)  # a no-op `to` costs a microsecond


def _changes(value: float) -> bool:
    """Return whether torch.compile treats a float as a value that changes from call to call.

    As a float, such a value would be a constant of the graph, and each value would need a new graph. As a tensor, it is
    an input of one graph for all values.
    """
    if not torch.compiler.is_compiling():
        return False
    import torch.fx.experimental.symbolic_shapes as shapes  # this import takes half a second

    # PyTorch 2.6 has no such check: there every float becomes a tensor.
    return not (hasattr(shapes, "has_static_value") and shapes.has_static_value(value))


def scalar_like(value: float | Tensor, rows: Tensor) -> Tensor:
    """Return a Python number or a size as a 0-d tensor in host memory, in the accumulation dtype."""
    dtype = accumulation_dtype(rows.dtype)
    # Multiply instead of creating a constant. Under torch.compile the factor of a product is an input of the graph,
    # while a constant needs a new graph for each value. Under torch.jit.trace a size is a tensor, and a constant would
    # freeze its value.
    if isinstance(value, Tensor) or torch.compiler.is_compiling():
        return torch.ones((), dtype=dtype, device="cpu") * value
    return torch.scalar_tensor(value, dtype=dtype, device="cpu")
