"""Registration of operators: schema, fake kernel, autograd, `torch.func`, and a fast path for eager code.

Autocast: operators run with autocast off and take embeddings in the dtype they arrive in. Under autocast, PyTorch
rounds the output of a half-precision product to half precision *after* its sum, and no later float32 sum can undo that:
at a temperature of 0.1 the gradient's error grows from 1e-7 to 3e-3. Here, sums and exponentials are computed in
float32, or in float64 for float64 embeddings.

Second derivatives: the kernels have none. Every `_backward` operator has a backward that raises, so that asking for a
second derivative is an error rather than a silent zero.

Temperature: an operator that takes a temperature has two overloads with the same implementation. `Tensor inv_tau` may
require a gradient or be on an accelerator. `float inv_tau` (the overload "float") needs no tensor, and is a constant in
compiled graphs.

Fast path: the dispatch of an operator registered from Python takes longer than the loss of a small batch itself (70 of
110 microseconds at N = 16, several times that with cold caches). If no compiler, mode or transform is active and all
tensors are plain, a call skips the dispatcher: a plain autograd.Function calls the same forward and backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ..algebra import autocast_off
from ..backends import select_for
from ..backends.base import KernelBackend
from .contract import check_kinds, checked, rows_of, taken_by

_LIBRARY = torch.library.Library("fastntxent", "DEF")
_PLAIN = (Tensor, torch.nn.Parameter)
_INV_TAU = "Tensor inv_tau"
_Function = TypeVar("_Function", bound=Callable[..., Any])

_USE_REFERENCE = (
    "pass backend='reference', which is plain PyTorch and can be differentiated in any way (its memory grows with the "
    "square of the number of rows)"
)


def run_kernel(backend: str, method: str, *arguments: Any) -> Any:
    """Check the tensors of a call, which come first among the arguments. Call the kernel and return its results."""
    tensors = checked(method, *taken_by(method, arguments))
    return call_kernel(backend, method, rows_of(method, tensors), *tensors, *arguments[len(tensors) :])


def call_kernel(backend: str, method: str, rows: Tensor, *arguments: Any) -> Any:
    """Call a method of the backend that serves these rows, with autocast off. The arguments are already checked."""
    two_views = _holds_two_views(method, arguments)
    kernel = getattr(kernels_for(backend, rows, two_views), method, None)
    if kernel is None:  # not every backend has kernels for limits; `blocked`, in plain PyTorch, runs on every device
        kernel = getattr(kernels_for("blocked", rows), method)
    with autocast_off(rows):
        return kernel(*arguments)


def _holds_two_views(method: str, arguments: tuple[Any, ...]) -> bool:
    """Return whether a call's rows are only the first of two views, so that the call has twice as many rows."""
    if method in ("sigmoid_scalar", "sigmoid_value"):
        *_, two_views = arguments[:6]  # after both matrices, inv_tau, bias and normalize
        return bool(two_views)
    return "nt_xent" in method


def kernels_for(backend: str, rows: Tensor, two_views: bool = False) -> KernelBackend:
    """Return the named backend for these rows, or the one that "auto" selects."""
    kernels = select_for(backend, rows, two_views)
    if not isinstance(kernels, KernelBackend):
        raise RuntimeError(f"backend {backend!r} has no kernels: call fastntxent's public functions instead")
    return kernels


def _refuse_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(f"fastntxent's kernels have no second derivative; {_USE_REFERENCE}")


def _refuse_forward_mode(ctx: Any, *_: Any) -> None:
    raise RuntimeError(f"fastntxent's kernels have no forward-mode derivative; {_USE_REFERENCE}")


def _save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def save(ctx: Any, *values: Any) -> None:
    """Save values for the backward: tensors through autograd, everything else (such as a float inv_tau) on ctx."""
    ctx.no_tensors = [None if isinstance(x, Tensor) else x for x in values]
    ctx.save_for_backward(*[x if isinstance(x, Tensor) else None for x in values])


def save_gradients(ctx: Any, gradients: Sequence[Tensor], *inputs: Tensor | float) -> None:
    """Save gradients that were computed with the value.

    The inputs are saved so that an in-place change is detected, and so that a second derivative reaches the function
    that refuses it.
    """
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)  # do not allocate zeros for outputs without an upstream gradient
    save(ctx, *gradients, *inputs)
    if not _may_be_hooked():
        ctx.watched = [id(x) for x in inputs]


def watched_by_autograd(result: Tensor, x: Tensor) -> bool:
    """Return whether autograd itself is known to detect an in-place change of x before the backward of `result`.

    Autograd detects the change if x itself was saved for that backward. It does not if a saved-tensor hook replaced x,
    as activation checkpointing does.
    """
    return id(x) in getattr(result.grad_fn, "watched", ())


def _may_be_hooked() -> bool:
    """Return whether saved-tensor hooks may be active."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # some versions of PyTorch lack it
    return top is None or top(False) is not None


def scaled(d_value: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
    """Return the saved gradient times the upstream gradient, in the dtype of x."""
    product = d_value * gradient
    return product if product.dtype == x.dtype else product.to(x.dtype)  # a no-op `to` costs as much as the product


def saved(ctx: Any) -> list[Any]:
    """Return the values that `save` saved."""
    return [x if other is None else other for x, other in zip(ctx.saved_tensors, ctx.no_tensors, strict=True)]


def register(
    schema: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] = _save_nothing,
    backward: Callable[..., Any] = _refuse_second_derivative,
    *,
    value_alone: bool = False,
) -> Callable[..., Any]:
    """Define an operator, and return the function that calls it.

    value_alone: return only the first output to the caller; the others are for the backward.
    """
    name, _, arguments = schema.partition("(")
    parameters = arguments.partition(")")[0].split(", ")
    place = parameters.index(_INV_TAU) if _INV_TAU in parameters else None
    if place is not None:
        backward = _without_gradient_of_a_float(backward, place)
    checking_fake = _checking_kinds(name, fake)

    def define(schema: str) -> Any:
        overload = schema.partition("(")[0]
        _LIBRARY.define(schema)
        _LIBRARY.impl(overload, forward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastntxent::{overload}", checking_fake, lib=_LIBRARY)
        torch.library.register_autograd(f"fastntxent::{overload}", backward, setup_context=setup_context, lib=_LIBRARY)
        return getattr(getattr(torch.ops.fastntxent, name), overload.partition(".")[2] or "default")

    of_tensors = define(schema)
    of_float: Any = None if place is None else define(f"{name}.float({arguments}".replace(_INV_TAU, "float inv_tau"))

    def operator(*args: Any) -> Any:
        return of_tensors(*args) if place is None or isinstance(args[place], Tensor) else of_float(*args)

    # register_autograd does not support torch.func's transforms; an autograd.Function with the same forward and
    # backward does.
    transformed = function_of(name, operator, setup_context, backward, again=lambda *args: observed(*args))

    # One function for forward and setup_context: if they are separate, PyTorch inspects the signature at every call.
    def eager(ctx: Any, *args: Any) -> Any:
        output = forward(*args)
        setup_context(ctx, args, output)
        return output[0] if value_alone else output

    # The class name is what the autograd graph and the profiler show.
    halves = {
        "forward": staticmethod(eager),
        "backward": staticmethod(backward),
        "jvp": staticmethod(_refuse_forward_mode),
    }
    Eager: Any = type(name, (torch.autograd.Function,), halves)
    # Skip Function.apply's handling of torch.func transforms: `unobserved` has ruled them out.
    apply = super(torch.autograd.Function, Eager).apply

    def observed(*args: Any) -> Any:
        return transformed(*args) if _transforming() else operator(*args)

    def call(*args: Any) -> Any:
        if unobserved(args):
            return apply(*args)
        output = observed(*args)
        return output[0] if value_alone else output

    return call


def function_of(
    name: str,
    forward: Callable[..., Any],
    setup_context: Callable[..., None] = _save_nothing,
    backward: Callable[..., Any] = _refuse_second_derivative,
    *,
    again: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Return a function with this forward and backward, which supports torch.func's transforms except forward mode.

    again: the function that vmap calls for each slice; by default the returned function itself.
    """

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return _loop(again or call, info.batch_size, in_dims, args)

    halves = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "jvp": staticmethod(_refuse_forward_mode),
        "vmap": staticmethod(vmap),
    }
    made: Any = type(name, (torch.autograd.Function,), halves)

    def call(*args: Any) -> Any:
        return made.apply(*args)

    return call


def uncompiled(function: _Function) -> _Function:
    """Return the function in a form that torch.compile runs eagerly, including all that it calls (a graph break)."""
    left_out = _disable_dynamo(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # `left_out` is called only while compiling, because it imports torch._dynamo, which takes seconds.
        return (left_out if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return cast(_Function, call)


def _without_gradient_of_a_float(backward: Callable[..., Any], place: int) -> Callable[..., Any]:
    """Return a backward that returns None for inv_tau's gradient unless that gradient is needed."""

    def call(ctx: Any, *gradients: Any) -> Any:
        found = backward(ctx, *gradients)
        if found[place] is None or ctx.needs_input_grad[place]:
            return found
        return (*found[:place], None, *found[place + 1 :])

    return call


def _checking_kinds(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Return a fake kernel that also checks layouts, dtypes, numbers of dimensions and devices, like the real one."""

    def call(*args: Any) -> Any:
        check_kinds(name, taken_by(name, args))
        return fake(*args)

    return call


def may_be_differentiated(*values: Tensor | float) -> bool:
    """Return whether a gradient may be needed.

    `requires_grad` is not conclusive inside a torch.func transform, where a tensor does not show that an outer level
    differentiates it. Under torch.jit.trace neither `requires_grad` nor the grad mode says which gradients later calls
    need.
    """
    if torch.is_grad_enabled():
        for x in values:
            if isinstance(x, Tensor) and x.requires_grad:
                return True
        return _transforming() or tracing()
    return tracing()


def _transforming() -> bool:
    """Return whether a torch.func transform is active and no compiler is."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def tracing() -> bool:
    """Return whether torch.jit.trace is recording this call."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def unobserved(args: Sequence[Any]) -> bool:
    """Return whether the fast path is safe: plain tensors with data, and no active compiler, mode or transform.

    A mode may be a tracer, a fake tensor mode or a recorder.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    for arg in args:
        # The gradients of is_grads_batched=True look plain but have no storage; only the dispatcher can unpack them.
        if isinstance(arg, Tensor) and (type(arg) not in _PLAIN or arg.is_meta or not torch._C._has_storage(arg)):
            return False
    return True


def _loop(call: Callable[..., Any], size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> Any:
    """Call once per slice, for torch.func.vmap. Return the stacked results and their batch dimensions."""
    slices = [
        call(*(arg if dim is None else arg.select(dim, index) for arg, dim in zip(args, in_dims, strict=True)))
        for index in range(size)
    ]
    if isinstance(slices[0], Tensor):
        return torch.stack(slices), 0
    stacked = tuple(map(torch.stack, zip(*slices, strict=True)))
    return stacked, (0,) * len(stacked)
