"""The devices of this machine: which backends are proved there, and `warm_up`, which loads kernels for a capture."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .backends import candidates, check_name, checkable, warming
from .saved_state import ModuleState, RandomState
from .verification import policy
from .verification.verdict import Verdict


def verify(
    device: torch.device | str | None = None, *, backend: str | None = None, refresh: bool = False
) -> dict[str, Verdict]:
    """Prove the kernels on a device, before `backend="auto"` takes them: values and gradients against float64.

    `auto` does this by itself at its first call on a GPU. Calling it beforehand moves the time (up to two minutes, most
    of it while Triton compiles) to where it suits: the start of a container, a node of the same kind, the first line of
    a script. Each backend is checked in a process of its own, so that a kernel that crashes or hangs there costs a
    message; what passes on a GPU is timed. Verdicts and times are kept under the user's cache folder, for this device
    model, driver, PyTorch, Triton and these kernels.

    Args:
        device: a CPU or GPU of this machine; None for the current GPU, or the CPU where there is none.
        backend: the name of one to check; None for all that can run there, which are then timed.
        refresh: check again what has a verdict, and time it again.

    Returns:
        A `Verdict` by backend; its `ok` says whether it has passed, and printed it is one line.

    Raises:
        ValueError: there is no such device or backend.

    Example:
        >>> import fastntxent
        >>> fastntxent.verify("tpu")
        Traceback (most recent call last):
        ...
        ValueError: device must be a CPU or a GPU of this machine, got 'tpu'
    """
    place = find_device(device)
    possible = checkable(place.type)
    if backend is not None:
        check_name(backend)
        if backend not in possible:
            raise ValueError(
                f"backend must be one that can be checked on {place} ({', '.join(possible) or 'none'}), got {backend!r}"
            )
        possible = {backend: possible[backend]}
    rivals = {} if backend else candidates(place.type)
    verdicts = policy.find_verdicts(place, possible, refresh=refresh, timed=bool(rivals))
    if rivals:
        verdicts, _ = policy.time_passed(place, rivals, verdicts, refresh=refresh)
    policy.forget()
    return verdicts


def warm_up(loss: Callable[..., Tensor], *inputs: object, **options: object) -> None:
    """Compile and load every kernel of a loss and its gradient, so that a CUDA graph can capture them.

    A kernel that is loaded for the first time cannot be captured. Which kernels a call launches follows from shapes,
    dtypes and, in Triton's, from the temperature: those of every temperature are made ready here. The loss is called
    four times: for the backend that "auto" takes in a capture and for the one it takes outside, each with a backward
    and under `torch.no_grad()`. No gradient is accumulated; random generators are put back, and the state of a module
    (a queue, the statistics of a batch norm).

    Args:
        loss: a loss of this package, as a module or a function, or any function around one that returns a tensor. The
            state of modules that a function calls is not put back: pass the module itself.
        inputs, options: what it is called with in the capture. Shapes, strides, dtypes, devices and `requires_grad` of
            tensors count, values do not.

    Raises:
        TypeError: `loss` cannot be called, or returns something else than a tensor.
        RuntimeError: a stream of the device is capturing already, or inference mode is on; or what the loss raises.

    On the CPU there is nothing to make ready, and the loss is only run.

    Example:
        >>> import torch, fastntxent
        >>> z_i, z_j = torch.randn(2, 8, 4, requires_grad=True)
        >>> fastntxent.warm_up(fastntxent.NTXentLoss(0.1), z_i, z_j)
    """
    if not callable(loss):
        raise TypeError(f"loss must be a function or a module, got {type(loss).__name__}")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("warm_up must be called before the capture of a CUDA graph, not in it")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("warm_up must be called outside torch.inference_mode(): it runs the backward too")
    # One object stays one: a loss may treat a batch against itself in its own way.
    tensors = {id(x): x for x in (*inputs, *options.values()) if isinstance(x, Tensor)}
    leaves = {key: x.detach().requires_grad_(x.requires_grad) for key, x in tensors.items()}
    given = [leaves.get(id(x), x) for x in inputs]
    named = {name: leaves.get(id(x), x) for name, x in options.items()}
    module = loss if isinstance(loss, nn.Module) else getattr(loss, "__self__", None)
    with ExitStack() as stack:
        stack.callback(RandomState({x.device for x in tensors.values() if x.is_cuda}).restore)
        if isinstance(module, nn.Module):
            stack.callback(ModuleState(module).restore)
        stack.enter_context(warming())
        for block in (nullcontext, policy.as_captured):
            with block():
                with torch.enable_grad():
                    value = loss(*given, **named)
                    if not isinstance(value, Tensor):
                        raise TypeError(f"loss must return a tensor, got {type(value).__name__}")
                    if value.grad_fn is not None:
                        torch.autograd.grad(value.sum(), _leaves_of(value), allow_unused=True)
                with torch.no_grad():
                    loss(*given, **named)


def _leaves_of(value: Tensor) -> list[Tensor]:
    """The tensors in which a result would accumulate gradients."""
    nodes, seen, found = [value.grad_fn], set(), []
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return found


def find_device(device: torch.device | str | None) -> torch.device:
    """The device of a name, with its index; ValueError if it is not there."""
    if device is None:
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        place = torch.device("meta")
    count = torch.cuda.device_count() if place.type == "cuda" else int(place.type == "cpu")
    if (place.index or 0) >= count:
        raise ValueError(f"device must be a CPU or a GPU of this machine, got {str(device)!r}")
    return place if place.type == "cpu" else torch.device("cuda", place.index or 0)


def present_devices() -> list[torch.device]:
    """The CPU and every GPU of this machine."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
