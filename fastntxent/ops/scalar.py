"""The scalar path of a loss of two views or towers: value and gradient from one kernel call. It has three operators:

{loss}_scalar            (z_i, z_j, inv_tau) -> loss, d_z_i, d_z_j, d_inv_tau, for an upstream gradient of 1
{loss}_scalar_backward   scales these gradients by the actual upstream gradient
{loss}_value             (z_i, z_j, inv_tau) -> loss, when no gradient is needed
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..algebra import accumulation_dtype
from .contract import checked
from .register import register, run_kernel, save_gradients, saved, scaled


def register_scalar_path(
    loss: str, options: str, *, with_needs: bool = False, with_bias: bool = False
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Define the operators of a loss, and return the functions that call its `_scalar` and its `_value`.

    Both functions return only the loss.

    options: the schema of the arguments that the kernels take after the tensors.
    with_needs: `_scalar` also takes needs_i and needs_j, and its kernel returns None for a gradient that is not needed.
    with_bias: after inv_tau, the operators also take a bias, which is added to every logit.
    """
    numbers = ["inv_tau", "bias"] if with_bias else ["inv_tau"]
    taken = 2 + len(numbers)  # the number of tensors before the options
    tensors = ", ".join(f"Tensor {name}" for name in ("z_i", "z_j", *numbers))
    gradients = ", ".join(f"Tensor d_{name}" for name in ("z_i", "z_j", *numbers))
    gradient_types = ", ".join(["Tensor"] * taken)
    needs = ", bool needs_i, bool needs_j" if with_needs else ""
    of_options = (None,) * len(f"{options}{needs}, str backend".split(","))

    def scalar(z_i: Tensor, z_j: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *for_kernel, backend = rest
        value, d_z_i, d_z_j, *d_numbers = run_kernel(backend, f"{loss}_scalar", z_i, z_j, *for_kernel)
        return (
            value,
            _no_gradient(z_i) if d_z_i is None else d_z_i,
            _no_gradient(z_j) if d_z_j is None else d_z_j,
            *d_numbers,
        )

    def scalar_fake(z_i: Tensor, z_j: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        needs_i, needs_j = rest[-3:-1] if with_needs else (True, True)
        dtype = accumulation_dtype(z_i.dtype)
        return (
            z_i.new_empty((), dtype=dtype),
            z_i.new_empty(z_i.shape, dtype=dtype) if needs_i else _no_gradient(z_i),
            z_j.new_empty(z_j.shape, dtype=dtype) if needs_j else _no_gradient(z_j),
            *[z_i.new_empty((), dtype=dtype) for _ in numbers],
        )

    def setup(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        save_gradients(ctx, output[1:], *inputs[:taken])

    def autograd(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if d_loss is None:  # no upstream gradient
            return *[None] * taken, *of_options
        # Use the registered operator only if this backward may be differentiated; otherwise scale the gradients here.
        if torch.is_grad_enabled():
            return *backward(d_loss, *saved(ctx)), *of_options
        needed, kept = ctx.needs_input_grad, ctx.saved_tensors  # activation checkpointing allows only one read
        (d_z_i, d_z_j, *d_numbers), (z_i, z_j) = kept[:taken], kept[taken : taken + 2]
        return (
            scaled(d_loss, d_z_i, z_i) if needed[0] else None,
            scaled(d_loss, d_z_j, z_j) if needed[1] else None,
            *[d_loss * d if need else None for d, need in zip(d_numbers, needed[2:taken], strict=True)],
            *of_options,
        )

    def scale_gradients(*given: Tensor | float) -> tuple[Tensor, ...]:
        d_loss, d_z_i, d_z_j, *rest = checked(f"{loss}_scalar_backward", *given)
        z_i, z_j = rest[len(numbers) : len(numbers) + 2]
        return (
            scaled(d_loss, d_z_i, z_i),
            scaled(d_loss, d_z_j, z_j),
            *[d_loss * d for d in rest[: len(numbers)]],
        )

    def scale_gradients_fake(d_loss: Tensor, d_z_i: Tensor, d_z_j: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        z_i, z_j = rest[len(numbers) : len(numbers) + 2]
        return z_i.new_empty(z_i.shape), z_j.new_empty(z_j.shape), *map(torch.empty_like, rest[: len(numbers)])

    backward = register(
        f"{loss}_scalar_backward(Tensor d_loss, {gradients}, {tensors}) -> ({gradient_types})",
        scale_gradients,
        scale_gradients_fake,
    )

    def value(*given: Any) -> Tensor:
        *for_kernel, backend = given
        found: Tensor = run_kernel(backend, f"{loss}_value", *for_kernel)
        return found

    def refuse(ctx: Any, d_loss: Tensor) -> None:
        raise RuntimeError(f"fastntxent::{loss}_value has no gradient; use fastntxent::{loss}_scalar")

    return (
        register(
            f"{loss}_scalar({tensors}, {options}{needs}, str backend) -> (Tensor, {gradient_types})",
            scalar,
            scalar_fake,
            setup,
            autograd,
            value_alone=True,
        ),
        register(f"{loss}_value({tensors}, {options}, str backend) -> Tensor", value, _value_fake, backward=refuse),
    )


def _no_gradient(z: Tensor) -> Tensor:
    """Return a zero, expanded to the shape of z, in place of a gradient that is not needed."""
    return z.new_zeros((), dtype=accumulation_dtype(z.dtype)).expand(z.shape)


def _value_fake(z_i: Tensor, *_: Any) -> Tensor:
    return z_i.new_empty((), dtype=accumulation_dtype(z_i.dtype))
