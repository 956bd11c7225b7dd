"""What multiplies similarities: 1/temperature, and other factors, as floats or as tensors in the accumulation dtype."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from .algebra import accumulation_dtype, in_double
from .ops import may_be_differentiated
from .validation import check_bias, check_range, check_temperature, extremes


def inverse_temperature(temperature: float | Tensor, rows: Tensor, *, per_row: int | None = None) -> float | Tensor:
    """1 / temperature: of a float a float, else a tensor in the accumulation dtype, 0-d, or (per_row,) where one
    temperature per row is taken too."""
    temperature = check_temperature(temperature, rows, per_row=per_row)
    dtype = accumulation_dtype(rows.dtype)
    if not isinstance(temperature, Tensor):
        _check_invertible(temperature, temperature, dtype, torch.finfo(dtype).max)
        return factor(1.0 / temperature, rows)
    # The gradient in tau is that in k times k^2, which leaves the range of float32 long before k does.
    wide = in_double(temperature)
    if limits := extremes(wide):
        differentiable = wide.requires_grad and torch.is_grad_enabled()
        largest = min(torch.finfo(dtype).max, torch.finfo(wide.dtype).max ** (0.5 if differentiable else 1.0))
        _check_invertible(*limits, dtype, largest)
    return factor(wide.reciprocal(), rows)


def _check_invertible(smallest: float, largest: float, dtype: torch.dtype, largest_inverse: float) -> None:
    """1 / temperature is at most so much, and not 0 in the dtype."""
    if smallest < 1 / largest_inverse:
        raise ValueError(f"temperature must be at least {1 / largest_inverse:.4g}, got {smallest}")
    smallest_inverse = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    if largest * smallest_inverse > 1:
        raise ValueError(f"temperature must be at most {1 / smallest_inverse:.4g}, got {largest}")


def logit_scale_factor(logit_scale: float | Tensor, rows: Tensor, name: str = "logit_scale") -> float | Tensor:
    """A logit scale, which is given in place of a temperature, as a factor."""
    scale = factor(check_temperature(logit_scale, rows, name=name), rows)
    dtype = accumulation_dtype(rows.dtype)
    if isinstance(scale, Tensor):
        if isinstance(logit_scale, Tensor) and logit_scale.dtype == dtype:
            return scale  # the very number that was checked
        check_temperature(scale, name=f"{name} in {dtype}")
    elif not 1 / (largest := torch.finfo(dtype).max) <= scale <= largest:
        raise ValueError(f"{name} in {dtype} must be from {1 / largest:.4g} to {largest:.4g}, got {scale}")
    return scale


def bias_of_logits(bias: float | Tensor, rows: Tensor, name: str) -> Tensor:
    """A number that is added to every logit, as a tensor in the accumulation dtype (0-d)."""
    bias = check_bias(name, bias, rows)
    dtype = accumulation_dtype(rows.dtype)
    values: tuple[float, ...] = ()  # that may leave the dtype's range
    if not isinstance(bias, Tensor):
        values = (bias,)
    elif torch.finfo(bias.dtype).max > torch.finfo(dtype).max:
        values = extremes(bias) or ()
    for value in values:
        check_range(name, value, dtype)
    found = factor(bias, rows)
    return found if isinstance(found, Tensor) else scalar_like(found, rows)


def is_per_row(inv_tau: float | Tensor) -> TypeGuard[Tensor]:
    """Whether there is one for each row."""
    return isinstance(inv_tau, Tensor) and inv_tau.ndim > 0


def factor(value: float | Tensor, rows: Tensor) -> float | Tensor:
    """A float that multiplies logits, as it is, or a tensor in the accumulation dtype."""
    if not isinstance(value, Tensor):
        return scalar_like(value, rows) if _changes(value) else value
    if may_be_differentiated(value) or value.ndim > 0:  # its gradient is formed where the rows are
        value = value if value.device == rows.device else value.to(rows.device)
    dtype = accumulation_dtype(rows.dtype)
    return value if value.dtype == dtype else value.to(dtype)  # a `to` that changes nothing takes a microsecond


def _changes(value: float) -> bool:
    """Whether a compiler takes a float for one that changes from call to call. As a float it would be a constant of the
    graph, and a graph be made for each value; as a tensor it is an input."""
    if not torch.compiler.is_compiling():
        return False
    import torch.fx.experimental.symbolic_shapes as shapes  # which costs half a second

    # PyTorch 2.6 cannot tell: there every float becomes a tensor.
    return not (hasattr(shapes, "has_static_value") and shapes.has_static_value(value))


def scalar_like(value: float | Tensor, rows: Tensor) -> Tensor:
    """A Python number, or a size, as a 0-d tensor in the accumulation dtype."""
    dtype = accumulation_dtype(rows.dtype)
    # A compiler turns a factor into an input of the graph, and a constant into a graph for each value. Under
    # torch.jit.trace a size is a tensor, which a constant would lose.
    if isinstance(value, Tensor) or torch.compiler.is_compiling():
        return torch.ones((), dtype=dtype, device="cpu") * value
    return torch.scalar_tensor(value, dtype=dtype, device="cpu")
