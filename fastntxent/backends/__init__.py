"""The table of backends: which exist, which load here, and which one serves a call.

A backend's module is imported when it is first asked for, so that `import fastntxent` costs nothing for kernels
that are not used, and a backend that fails to import keeps its error for `backends()` and for whoever asks for it
by name. There is no silent fallback from a name: only "auto" chooses. `cpu` alone is loaded at once: it has to know
of a fork, and the first to ask for it may be the child.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..verification import policy
from .base import Backend

ANY_DEVICE = ("any",)


class _Entry(NamedTuple):
    module: str
    device_types: tuple[str, ...]
    auto: str  # may "auto" pick it: "yes", "no", or "passed", on devices on which it has passed `verification`


# In order of preference: "auto" takes the first that may be picked, serves the device and loads; on an accelerator,
# of those that have passed there, the one that is quickest for the call's size. "cuda" is for small batches, "triton",
# after it, for large ones.
_TABLE: dict[str, _Entry] = {
    "cpu": _Entry("fastntxent.backends.cpu", ("cpu",), auto="yes"),
    "cuda": _Entry("fastntxent.backends.cuda.backend", ("cuda",), auto="passed"),
    "triton": _Entry("fastntxent.backends.triton.backend", ("cuda",), auto="passed"),
    "blocked": _Entry("fastntxent.backends.blocked", ANY_DEVICE, auto="yes"),
    "reference": _Entry("fastntxent.backends.reference", ANY_DEVICE, auto="no"),
}


_CHECKED = {kind for entry in _TABLE.values() if entry.auto == "passed" for kind in entry.device_types}


class BackendStatus(NamedTuple):
    """The status of one backend, as `backends()` reports it.

    Attributes:
        available: Whether the backend loads on this machine.
        device_types: The device types that it serves, such as ("cpu",); ("any",) if it runs wherever PyTorch does.
        reason: Why it is not available, else None.
        details: The hardware that it uses, such as "avx2, 2 threads", or None.
        verdict: Its verification result on the current device, or None if "auto" does not depend on one.

    Example:
        >>> import fastntxent
        >>> fastntxent.backends()["blocked"].device_types
        ('any',)
    """

    available: bool
    device_types: tuple[str, ...]
    reason: str | None
    details: str | None = None
    verdict: str | None = None


@functools.cache
def _load(name: str) -> Backend | Exception:
    try:
        backend: Backend = importlib.import_module(_TABLE[name].module).BACKEND
    except Exception as error:  # whatever stops an import is the answer to "why not?"
        return error
    return backend


def check_name(name: str) -> None:
    """Raise unless `name` is "auto" or stands in the table."""
    if name != "auto" and name not in _TABLE:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, _TABLE))}, got {name!r}")


def _serving(name: str, device_type: str, dtype: torch.dtype) -> Backend | None:
    """The backend, if it loads and takes such tensors. One that is for other devices is not loaded to find out."""
    device_types = _TABLE[name].device_types
    if device_types != ANY_DEVICE and device_type not in device_types:
        return None
    backend = _load(name)
    return backend if isinstance(backend, Backend) and dtype in backend.dtypes else None


def select_for(name: str, rows: Tensor, method: str) -> Backend:
    """The backend for a call of a method on these rows; for "auto" on an accelerator the quickest that has passed."""
    device = rows.device
    if name == "auto" and device.type in _CHECKED and rows.ndim == 2:
        possible = candidates(device.type, rows.dtype)
        if possible:  # float64 is for none of them
            n, d = rows.shape
            M = 2 * n if method.startswith("nt_xent") else n  # the first of two views, or all rows
            chosen = policy.choose_backend(device, candidates(device.type), rows.dtype, M, d)
            name = chosen if chosen in possible else name
    return select(name, device.type, rows.dtype)


@functools.cache
def candidates(device_type: str, dtype: torch.dtype | None = None) -> dict[str, str]:
    """The backends that "auto" may take on devices of this type once they have passed, each with its module."""
    found = {
        name: entry for name, entry in _TABLE.items() if entry.auto == "passed" and device_type in entry.device_types
    }
    return {
        name: entry.module
        for name, entry in found.items()
        if isinstance(backend := _load(name), Backend) and (dtype is None or dtype in backend.dtypes)
    }


def checkable(device_type: str) -> dict[str, str]:
    """The backends that load here and serve devices of this type, each with its module; not the oracle itself."""
    return {
        name: entry.module
        for name, entry in _TABLE.items()
        if name != "reference"
        and isinstance(_load(name), Backend)
        and (device_type in _device_types(name) or _device_types(name) == ANY_DEVICE)
    }


def add(name: str, module: str, device_types: tuple[str, ...]) -> None:
    """Put a backend into the table, to be called by name: where it is to be checked, and is not this package's."""
    _TABLE.setdefault(name, _Entry(module, device_types, auto="no"))


def select(name: str, device_type: str, dtype: torch.dtype) -> Backend:
    """The backend for `name` on tensors like these; for "auto" the first of the table that serves unchecked."""
    check_name(name)
    if name == "auto":
        return _first_serving(device_type, dtype)
    backend = _load(name)
    device_types = _device_types(name)
    if device_types != ANY_DEVICE and device_type not in device_types:
        raise ValueError(f"backend {name!r} serves {', '.join(device_types)} tensors, got tensors on {device_type}")
    if isinstance(backend, Exception):
        raise RuntimeError(f"backend {name!r} is not available: {_explain(backend)}") from backend
    if dtype not in backend.dtypes:
        raise TypeError(f"backend {name!r} takes {', '.join(map(str, backend.dtypes))}, got {dtype}")
    return backend


@functools.cache  # small batches would notice the search
def _first_serving(device_type: str, dtype: torch.dtype) -> Backend:
    serving = (_serving(each, device_type, dtype) for each, entry in _TABLE.items() if entry.auto == "yes")
    return next(backend for backend in serving if backend)


@contextlib.contextmanager
def warming() -> Iterator[None]:
    """A block in which calls also launch what they would at any other temperature."""
    with contextlib.ExitStack() as stack:
        for backend in map(_load, _TABLE):
            if isinstance(backend, Backend):
                stack.enter_context(backend.warming())
        yield


def name_of(backend: Backend) -> str:
    """The name of a backend that `select` gave."""
    return next(name for name in _TABLE if _load(name) is backend)


def _device_types(name: str) -> tuple[str, ...]:
    """As the table has it; a backend that has loaded may know of more."""
    backend = _load(name)
    more = backend.device_types if isinstance(backend, Backend) else ANY_DEVICE
    return _TABLE[name].device_types if more == ANY_DEVICE else more


def backends() -> dict[str, BackendStatus]:
    """Every backend by name: whether it loads here, which device types it serves, and if not, why not.

    Returns:
        A dict of `BackendStatus(available, device_types, reason, details, verdict)`; `device_types` is `("any",)` for
        a backend that runs wherever PyTorch does, `details` names the instruction set and the threads of "cpu", and
        `verdict` says whether the kernels for a GPU have passed `verify` on the current one.

    Example:
        >>> import fastntxent
        >>> fastntxent.backends()["blocked"]
        BackendStatus(available=True, device_types=('any',), reason=None, details=None, verdict=None)
    """
    return {name: _status(name) for name in _TABLE}


def _status(name: str) -> BackendStatus:
    loaded = _load(name)
    if isinstance(loaded, Exception):
        return BackendStatus(False, _device_types(name), _explain(loaded))
    return BackendStatus(True, _device_types(name), None, loaded.details(), _verdict(name))


def _verdict(name: str) -> str | None:
    """What is known of a backend on the current GPU, if "auto" would have to know."""
    if _TABLE[name].auto != "passed" or not torch.cuda.is_available():
        return None
    try:
        device = torch.device("cuda", torch.cuda.current_device())
        verdict = policy.known_verdicts(device, {name: _TABLE[name].module}).get(name)
    except RuntimeError as error:  # the device does not answer, or this is a fork of a process that uses it
        return f"unknown: {_explain(error)}"
    return str(verdict) if verdict else "not checked yet"


def _explain(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


_load("cpu")
