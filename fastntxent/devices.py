"""`verify`, which checks the backends on a device, and `warm_up`, which loads kernels before a capture."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from .backends import candidates, check_name, checkable, warming
from .saved_state import ModuleState, RandomState, module_of
from .trees import map_tensors, named_tensors
from .validation import check_flag
from .verification import policy
from .verification.verdict import Verdict


def verify(
    device: torch.device | str | None = None, *, backend: str | None = None, refresh: bool = False
) -> dict[str, Verdict]:
    """Check the kernels' values and gradients on a device against float64, before backend="auto" uses them.

    "auto" runs this check at its first call on a GPU. The check takes a minute or two, on a GPU most of it in Triton's
    compiler. Call `verify` to run it at a better time: when a container starts, on another node of the same kind, or in
    the first line of a script. Each backend is checked in a process of its own, so a kernel that crashes or hangs there
    costs only a message. A backend that passes on a GPU is also timed. Verdicts and times are stored in the user's
    cache folder. They are valid for this device model, driver, PyTorch, Triton and version of the kernels.

    Args:
        device: A CPU or GPU of this machine. None: the current GPU, or the CPU where there is none.
        backend: The name of a single backend to check, which is then not timed. None: all backends that can run on the
            device, except "reference".
        refresh: Check and time again, even where a verdict is stored.

    Returns:
        A dict that maps the name of each backend to its `Verdict`. A verdict's `ok` says whether the backend passed,
        and the verdict prints as one line.

    Raises:
        TypeError: `refresh` is not a bool.
        ValueError: there is no such device, or no such backend for it.

    Example:
        >>> import fastntxent
        >>> fastntxent.verify("tpu")
        Traceback (most recent call last):
        ...
        ValueError: device must be a CPU or a GPU of this machine, got 'tpu'
    """
    check_flag("refresh", refresh)
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

    A CUDA graph cannot capture the first launch of a kernel, because that launch loads the kernel. Shapes, dtypes and,
    for Triton's kernels, the temperature decide which kernels a call launches; `warm_up` prepares the kernels for every
    temperature. It calls the loss twice with the backend that "auto" takes inside a capture, and twice with the backend
    that "auto" takes outside. In each pair of calls, one includes the backward and one runs under `torch.no_grad()`.
    `warm_up` accumulates no gradient, and restores the random generators and the state of a module, such as a queue or
    the statistics of a batch norm.

    On the CPU there is nothing to prepare, and the loss is only run.

    Args:
        loss: A loss of this package (a module or a function), or a function that calls such a loss and returns a
            tensor. The state of modules that a function calls is not restored: pass the module itself.
        *inputs: Positional arguments of the loss, as in the capture. The shapes, strides, dtypes, devices and
            `requires_grad` of tensors matter; their values do not.
        **options: Keyword arguments of the loss, treated like `inputs`.

    Returns:
        None.

    Raises:
        TypeError: `loss` is not callable, or does not return a tensor.
        RuntimeError: the current CUDA stream is capturing already, or inference mode is on. Errors of the loss pass
            through.

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
    module = module_of(loss)
    bound = (loss.args, loss.keywords) if isinstance(loss, functools.partial) else ((), {})
    # A tensor that is passed twice stays one object, because a loss may treat the comparison of a batch with itself
    # specially.
    tensors = {id(x): x for _, x in named_tensors((inputs, options, *bound), "inputs")}
    leaves = {key: x.detach().requires_grad_(x.requires_grad) for key, x in tensors.items()}
    given, named, *bound = map_tensors(lambda x: leaves[id(x)], (inputs, options, *bound))
    if isinstance(loss, functools.partial):
        loss = functools.partial(loss.func, *bound[0], **bound[1])
    with ExitStack() as stack:
        stack.callback(RandomState({x.device for x in tensors.values() if x.is_cuda}).restore)
        if module is not None:
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
    """Return the leaf tensors that a backward from the result would give gradients to."""
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
    """Return the device as a torch.device, a GPU with its index. None: the current GPU, or the CPU where there is none.
    Raise ValueError if this machine has no such device."""
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
    """Return the CPU and every GPU of this machine."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
