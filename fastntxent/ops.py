"""The registered operators `torch.ops.fastntxent.*`: schemas, fake kernels, autograd, autocast.

    neg_lse        (u, ids, inv_tau)             -> nu                               any ids, any weights
    nt_xent_rows   (z_i, z_j, inv_tau)           -> nu, pi                           the weighted path
    nt_xent_sum    (z_i, z_j, inv_tau)           -> loss, d_z_i, d_z_j, d_inv_tau    the scalar path

Each has its `_backward`, an operator too. The scalar path forms the gradient together with the loss, once, for an
upstream gradient of 1; its backward only scales. The public layer takes it where a gradient is wanted and one
number is asked for.

Autocast: the operators run with autocast off, on embeddings in the dtype they come in. A half-precision product
out of PyTorch is rounded to half precision *after* its sum, which no later float32 sum repairs (at a temperature
of 0.1 the gradient's error grows from 1e-7 to 3e-3); sums, exponentials and gradients stay float32.

Second derivatives: the kernels have none. Every `_backward` operator is differentiable in name only, so that asking
raises an error in place of a silent zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .backends import select
from .backends.base import KernelBackend, accumulation_dtype, row_losses
from .backends.reference import BACKEND as _REFERENCE
from .validation import check_positive

_LIBRARY = torch.library.Library("fastntxent", "DEF")


def neg_lse(u: Tensor, ids: Tensor, inv_tau: Tensor, backend: str) -> Tensor:
    """nu of the rows (M,), differentiable in u and inv_tau."""
    if backend == "reference":
        with autocast_off(u):
            return _REFERENCE.neg_lse(u, ids, inv_tau)
    return _neg_lse(u, ids, inv_tau, backend)


def nt_xent_rows(z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool, backend: str) -> tuple[Tensor, Tensor]:
    """nu and pi of every row, (2N,) each, differentiable in both views and inv_tau."""
    if backend == "reference":
        with autocast_off(z_i):
            return _REFERENCE.nt_xent_rows(z_i, z_j, inv_tau, normalize)
    return _nt_xent_rows(z_i, z_j, inv_tau, normalize, backend)


def nt_xent_sum(z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool, backend: str) -> Tensor:
    """The sum of the 2N losses, differentiable in both views and inv_tau."""
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (z_i, z_j, inv_tau))
    if backend == "reference" or not wants_gradient:
        neg_lse, pos = nt_xent_rows(z_i, z_j, inv_tau, normalize, backend)
        return row_losses(neg_lse, pos).sum()
    return _nt_xent_sum(z_i, z_j, inv_tau, normalize, backend)[0]


def autocast_off(rows: Tensor) -> contextlib.AbstractContextManager[None]:
    """A block in which autocast leaves operations on the rows' device alone."""
    device_type = rows.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _kernels(name: str, rows: Tensor, inv_tau: Tensor) -> Iterator[KernelBackend]:
    """The backend of that name for these rows, to be used inside the block."""
    if inv_tau.device.type == "cpu":  # a compiled caller's checks saw no value; here there is one
        check_positive("1 / temperature", inv_tau.item())
    backend = select(name, rows.device.type)
    if not isinstance(backend, KernelBackend):
        raise RuntimeError(f"backend {name!r} has no kernels: call it through fastntxent's functions")
    with autocast_off(rows):
        yield backend


_USE_REFERENCE = (
    "pass backend='reference', which is plain PyTorch and can be differentiated in any way (its memory grows with M^2)"
)


def _refuse_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(f"fastntxent's kernels have no second derivative; {_USE_REFERENCE}")


def _save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _register(
    schema: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] = _save_nothing,
    backward: Callable[..., Any] = _refuse_second_derivative,
) -> Callable[..., Any]:
    """Define an operator, and return the function that calls it."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastntxent::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"fastntxent::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    operator = getattr(torch.ops.fastntxent, name).default

    # register_autograd does not reach torch.func's transforms; an autograd.Function of the same two halves does.
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return operator(*args)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
            return _loop(call, info.batch_size, in_dims, args)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise RuntimeError(f"fastntxent's kernels have no forward-mode derivative; {_USE_REFERENCE}")

    Function.setup_context = staticmethod(setup_context)  # type: ignore[method-assign]
    Function.backward = staticmethod(backward)  # type: ignore[method-assign]

    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return Function.apply(*args)
        return operator(*args)

    return call


def _loop(call: Callable[..., Any], size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> Any:
    """torch.func.vmap of a call: one call per slice, the results stacked."""
    slices = [
        call(*(arg if dim is None else arg.select(dim, index) for arg, dim in zip(args, in_dims, strict=True)))
        for index in range(size)
    ]
    if isinstance(slices[0], Tensor):
        return torch.stack(slices), 0
    stacked = tuple(map(torch.stack, zip(*slices, strict=True)))
    return stacked, (0,) * len(stacked)


# --- neg_lse ---------------------------------------------------------------------------------------------------------


def _neg_lse_forward(u: Tensor, ids: Tensor, inv_tau: Tensor, backend: str) -> Tensor:
    with _kernels(backend, u, inv_tau) as kernels:
        return kernels.neg_lse(u, ids, inv_tau)


def _neg_lse_fake(u: Tensor, ids: Tensor, inv_tau: Tensor, backend: str) -> Tensor:
    return u.new_empty(u.shape[0], dtype=accumulation_dtype(u.dtype))


def _neg_lse_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output)


def _neg_lse_autograd(ctx: Any, d_neg_lse: Tensor) -> tuple[Tensor | None, ...]:
    d_u, d_inv_tau = _neg_lse_backward(d_neg_lse, *ctx.saved_tensors, ctx.backend)
    return d_u, None, d_inv_tau, None


def _neg_lse_backward_forward(
    d_neg_lse: Tensor, u: Tensor, ids: Tensor, inv_tau: Tensor, neg_lse: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    with _kernels(backend, u, inv_tau) as kernels:
        d_u, d_inv_tau = kernels.neg_lse_backward(d_neg_lse, u, ids, inv_tau, neg_lse)
    return d_u.to(u.dtype), d_inv_tau


def _neg_lse_backward_fake(
    d_neg_lse: Tensor, u: Tensor, ids: Tensor, inv_tau: Tensor, neg_lse: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), d_neg_lse.new_empty(())


_neg_lse_backward = _register(
    "neg_lse_backward(Tensor d_neg_lse, Tensor u, Tensor ids, Tensor inv_tau, Tensor neg_lse, str backend)"
    " -> (Tensor, Tensor)",
    _neg_lse_backward_forward,
    _neg_lse_backward_fake,
)
_neg_lse = _register(
    "neg_lse(Tensor u, Tensor ids, Tensor inv_tau, str backend) -> Tensor",
    _neg_lse_forward,
    _neg_lse_fake,
    _neg_lse_setup,
    _neg_lse_autograd,
)

# --- nt_xent_rows ----------------------------------------------------------------------------------------------------


def _rows_forward(z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool, backend: str) -> tuple[Tensor, Tensor]:
    with _kernels(backend, z_i, inv_tau) as kernels:
        return kernels.nt_xent_rows(z_i, z_j, inv_tau, normalize)


def _rows_fake(z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool, backend: str) -> tuple[Tensor, Tensor]:
    neg_lse = z_i.new_empty(2 * z_i.shape[0], dtype=accumulation_dtype(z_i.dtype))
    return neg_lse, torch.empty_like(neg_lse)


def _rows_setup(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.normalize, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[0])


def _rows_autograd(ctx: Any, d_neg_lse: Tensor, d_pos: Tensor) -> tuple[Tensor | None, ...]:
    return *_rows_backward(d_neg_lse, d_pos, *ctx.saved_tensors, ctx.normalize, ctx.backend), None, None


def _rows_backward_forward(
    d_neg_lse: Tensor,
    d_pos: Tensor,
    z_i: Tensor,
    z_j: Tensor,
    inv_tau: Tensor,
    neg_lse: Tensor,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with _kernels(backend, z_i, inv_tau) as kernels:
        d_z_i, d_z_j, d_inv_tau = kernels.nt_xent_rows_backward(d_neg_lse, d_pos, z_i, z_j, inv_tau, neg_lse, normalize)
    return d_z_i.to(z_i.dtype), d_z_j.to(z_j.dtype), d_inv_tau


def _rows_backward_fake(
    d_neg_lse: Tensor, d_pos: Tensor, z_i: Tensor, z_j: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return z_i.new_empty(z_i.shape), z_j.new_empty(z_j.shape), d_neg_lse.new_empty(())


_rows_backward = _register(
    "nt_xent_rows_backward(Tensor d_neg_lse, Tensor d_pos, Tensor z_i, Tensor z_j, Tensor inv_tau, Tensor neg_lse,"
    " bool normalize, str backend) -> (Tensor, Tensor, Tensor)",
    _rows_backward_forward,
    _rows_backward_fake,
)
_nt_xent_rows = _register(
    "nt_xent_rows(Tensor z_i, Tensor z_j, Tensor inv_tau, bool normalize, str backend) -> (Tensor, Tensor)",
    _rows_forward,
    _rows_fake,
    _rows_setup,
    _rows_autograd,
)

# --- nt_xent_sum -----------------------------------------------------------------------------------------------------


def _sum_forward(
    z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with _kernels(backend, z_i, inv_tau) as kernels:
        return kernels.nt_xent_sum(z_i, z_j, inv_tau, normalize)


def _sum_fake(
    z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(z_i.dtype)
    return tuple(z_i.new_empty(shape, dtype=dtype) for shape in ((), z_i.shape, z_j.shape, ()))  # type: ignore


def _sum_setup(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    z_i, z_j, inv_tau, _, _ = inputs
    gradients = output[1:]
    ctx.mark_non_differentiable(*gradients)
    # The backward needs no z; it takes them so that a second derivative finds its way to the refusal.
    ctx.save_for_backward(*gradients, z_i, z_j, inv_tau)


def _sum_autograd(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *_sum_backward(d_loss, *ctx.saved_tensors), None, None


def _sum_backward_forward(
    d_loss: Tensor, d_z_i: Tensor, d_z_j: Tensor, d_inv_tau: Tensor, z_i: Tensor, z_j: Tensor, inv_tau: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (d_loss * d_z_i).to(z_i.dtype), (d_loss * d_z_j).to(z_j.dtype), d_loss * d_inv_tau


def _sum_backward_fake(
    d_loss: Tensor, d_z_i: Tensor, d_z_j: Tensor, d_inv_tau: Tensor, z_i: Tensor, z_j: Tensor, inv_tau: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return z_i.new_empty(z_i.shape), z_j.new_empty(z_j.shape), torch.empty_like(d_inv_tau)


_sum_backward = _register(
    "nt_xent_sum_backward(Tensor d_loss, Tensor d_z_i, Tensor d_z_j, Tensor d_inv_tau, Tensor z_i, Tensor z_j,"
    " Tensor inv_tau) -> (Tensor, Tensor, Tensor)",
    _sum_backward_forward,
    _sum_backward_fake,
)
_nt_xent_sum = _register(
    "nt_xent_sum(Tensor z_i, Tensor z_j, Tensor inv_tau, bool normalize, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _sum_forward,
    _sum_fake,
    _sum_setup,
    _sum_autograd,
)
