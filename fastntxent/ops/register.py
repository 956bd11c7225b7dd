"""How an operator is made: schema, fake kernel, autograd, `torch.func`, and the short way from eager code.

Autocast: the operators run with autocast off, on embeddings in the dtype they come in. A half-precision product
out of PyTorch is rounded to half precision *after* its sum, which no later float32 sum repairs (at a temperature
of 0.1 the gradient's error grows from 1e-7 to 3e-3); sums, exponentials and gradients stay float32.

Second derivatives: the kernels have none. Every `_backward` operator is differentiable in name only, so that asking
raises an error in place of a silent zero.

Temperature: an operator that takes one has two overloads over the same functions. `Tensor inv_tau` may be learnt, or
lie on an accelerator; `float inv_tau` (the overload "float") makes no tensor, and is a constant of a compiled graph.

The short way: what the dispatcher does for an operator registered from Python takes longer than the loss of a small
batch (70 of 110 microseconds at N = 16, several times that with cold caches). With no compiler, mode or transform
active, plain tensors go to the same function through a plain autograd.Function.
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
    "pass backend='reference', which is plain PyTorch and can be differentiated in any way (its memory grows with M^2)"
)


def run_kernel(backend: str, method: str, *arguments: Any) -> Any:
    """Check the tensors of a kernel, which come first among its arguments, and call it."""
    tensors = checked(method, *taken_by(method, arguments))
    return call_kernel(backend, method, rows_of(method, tensors), *tensors, *arguments[len(tensors) :])


def call_kernel(backend: str, method: str, rows: Tensor, *arguments: Any) -> Any:
    """Call a method of the backend that serves these rows, with arguments that were checked, and autocast off."""
    kernel = getattr(kernels_for(backend, rows, method), method, None)
    if kernel is None:  # not every backend has kernels for limits: plain PyTorch runs everywhere
        kernel = getattr(kernels_for("blocked", rows, method), method)
    with autocast_off(rows):
        return kernel(*arguments)


def kernels_for(backend: str, rows: Tensor, method: str) -> KernelBackend:
    """The kernels of that backend for such rows."""
    kernels = select_for(backend, rows, method)
    if not isinstance(kernels, KernelBackend):
        raise RuntimeError(f"backend {backend!r} has no kernels: call it through fastntxent's functions")
    return kernels


def _refuse_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(f"fastntxent's kernels have no second derivative; {_USE_REFERENCE}")


def _refuse_forward_mode(ctx: Any, *_: Any) -> None:
    raise RuntimeError(f"fastntxent's kernels have no forward-mode derivative; {_USE_REFERENCE}")


def _save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def save(ctx: Any, *values: Any) -> None:
    """Keep tensors, and what may be none, as a temperature that is a float, for the backward."""
    ctx.no_tensors = [None if isinstance(x, Tensor) else x for x in values]
    ctx.save_for_backward(*[x if isinstance(x, Tensor) else None for x in values])


def save_gradients(ctx: Any, gradients: Sequence[Tensor], *inputs: Tensor | float) -> None:
    """Keep gradients that came with a value. The backward needs no inputs; it takes them so that a second derivative
    finds its way to the refusal."""
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)  # no zeros for gradients that nobody asks for
    save(ctx, *gradients, *inputs)
    if not _may_be_hooked():
        ctx.watched = [id(x) for x in inputs]


def watched_by_autograd(result: Tensor, x: Tensor) -> bool:
    """Whether a result that has just been made has saved this very tensor: its backward raises if x has changed.
    Where hooks take saved tensors, as under activation checkpointing, autograd does not look."""
    return id(x) in getattr(result.grad_fn, "watched", ())


def _may_be_hooked() -> bool:
    """Whether hooks may take the tensors that are saved now."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # not in every PyTorch
    return top is None or top(False) is not None


def scaled(d_value: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
    """A gradient that was kept, times what came back, in the dtype of what it belongs to."""
    product = d_value * gradient
    return product if product.dtype == x.dtype else product.to(x.dtype)  # such a `to` takes as long as the product


def saved(ctx: Any) -> list[Any]:
    """Return what `save` kept."""
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

    value_alone: the first output is all that a caller gets, the others are for the backward.
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

    # register_autograd does not reach torch.func's transforms; an autograd.Function of the same two halves does.
    transformed = function_of(name, operator, setup_context, backward, again=lambda *args: observed(*args))

    def eager(ctx: Any, *args: Any) -> Any:  # one with a setup_context has its signature inspected at every call
        output = forward(*args)
        setup_context(ctx, args, output)
        return output[0] if value_alone else output

    # By this name autograd's graph and the profiler show it.
    halves = {
        "forward": staticmethod(eager),
        "backward": staticmethod(backward),
        "jvp": staticmethod(_refuse_forward_mode),
    }
    Eager: Any = type(name, (torch.autograd.Function,), halves)
    # Function.apply does more, for transforms of torch.func. `unobserved` has found none.
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
    """Return a differentiable function of these halves, which takes torch.func's transforms too.

    again: what a vmap calls for each slice; None: the function itself.
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
    """Run a function eagerly under torch.compile (a graph break), and all that it calls."""
    left_out = _disable_dynamo(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Only where there is a compiler: what leaves code out of it takes seconds to import.
        return (left_out if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return cast(_Function, call)


def _without_gradient_of_a_float(backward: Callable[..., Any], place: int) -> Callable[..., Any]:
    """Return None for inv_tau's gradient unless it is needed."""

    def call(ctx: Any, *gradients: Any) -> Any:
        found = backward(ctx, *gradients)
        if found[place] is None or ctx.needs_input_grad[place]:
            return found
        return (*found[:place], None, *found[place + 1 :])

    return call


def _checking_kinds(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """A fake kernel that refuses what the kernel would, as far as tensors without data can tell."""

    def call(*args: Any) -> Any:
        check_kinds(name, taken_by(name, args))
        return fake(*args)

    return call


def may_be_differentiated(*values: Tensor | float) -> bool:
    """Whether a gradient may be asked for. Inside a vmap a tensor does not say that one is wanted around it; under
    torch.jit.trace neither the example nor the grad mode says it of later calls."""
    if torch.is_grad_enabled():
        for x in values:
            if isinstance(x, Tensor) and x.requires_grad:
                return True
        return _transforming() or tracing()
    return tracing()


def _transforming() -> bool:
    """Whether a transform of torch.func is around this call, outside a compiler."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def tracing() -> bool:
    """Whether torch.jit.trace records this call."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def unobserved(args: Sequence[Any]) -> bool:
    """Plain tensors that hold data, with no compiler, mode (a tracer, a fake tensor mode, a recorder) or transform
    around."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    for arg in args:
        # The gradients of is_grads_batched=True look plain, but have no storage: the dispatcher takes them apart.
        if isinstance(arg, Tensor) and (type(arg) not in _PLAIN or arg.is_meta or not torch._C._has_storage(arg)):
            return False
    return True


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
