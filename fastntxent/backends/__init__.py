"""The table of backends: which exist, which load on this machine, and which one serves a call.

A backend's module is imported on first use, so `import fastntxent` costs nothing for unused kernels. If the import
fails, the error is stored, shown by `backends()`, and raised when the backend is requested by name. A backend that was
requested by name never falls back to another one; only "auto" chooses. (One exception: if a backend has no kernels for
similarity limits, calls with limits run on `blocked`.) Only `cpu` is imported together with the package, because its
import registers a fork handler, and its first use may be in a forked child.
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
    auto: str  # whether "auto" may pick it: "yes", "no", or "passed" (only on devices where it passed `verification`)


# The entries are in order of preference. If a device type has an entry marked "passed", "auto" selects the backend that
# is fastest at the call's size, among `blocked` and the backends that have passed verification on that device
# (verification/policy.py). On other device types, it selects the first entry marked "yes" that loads and supports the
# device type and the dtype. "cuda" is for small batches, "triton" for large ones.
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
        verdict: Its verification result on the current GPU, or None if there is no GPU or "auto" needs no result.

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
    except Exception as error:  # any error here is the reason why the backend is not available
        return error
    return backend


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is "auto" or in the table."""
    if not isinstance(name, str) or (name != "auto" and name not in _TABLE):
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, _TABLE))}, got {name!r}")


def _serving(name: str, device_type: str, dtype: torch.dtype) -> Backend | None:
    """Return the backend if it loads and supports this device type and dtype, else None.

    Backends for other device types are not loaded.
    """
    device_types = _TABLE[name].device_types
    if device_types != ANY_DEVICE and device_type not in device_types:
        return None
    backend = _load(name)
    return backend if isinstance(backend, Backend) and dtype in backend.dtypes else None


def select_for(name: str, rows: Tensor, two_views: bool = False) -> Backend:
    """Return the backend for a call on these rows. On a GPU, `verification.policy` chooses for "auto"."""
    device = rows.device
    if name == "auto" and device.type in _CHECKED and rows.ndim == 2:
        possible = candidates(device.type, rows.dtype)
        if possible:  # empty for float64, which no candidate supports
            n, d = rows.shape
            M = 2 * n if two_views else n  # with two views, `rows` is only the first
            chosen = policy.choose_backend(device, candidates(device.type), rows.dtype, M, d)
            name = chosen if chosen in possible else name
    return select(name, device.type, rows.dtype)


@functools.cache
def candidates(device_type: str, dtype: torch.dtype | None = None) -> dict[str, str]:
    """Return the backends (name -> module) that "auto" may select on this device type after they pass verification."""
    found = {
        name: entry for name, entry in _TABLE.items() if entry.auto == "passed" and device_type in entry.device_types
    }
    return {
        name: entry.module
        for name, entry in found.items()
        if isinstance(backend := _load(name), Backend) and (dtype is None or dtype in backend.dtypes)
    }


def checkable(device_type: str) -> dict[str, str]:
    """Return the backends (name -> module) that load here and support this device type, except `reference`."""
    return {
        name: entry.module
        for name, entry in _TABLE.items()
        if name != "reference"
        and isinstance(_load(name), Backend)
        and (device_type in _device_types(name) or _device_types(name) == ANY_DEVICE)
    }


def add(name: str, module: str, device_types: tuple[str, ...]) -> None:
    """Add a backend from outside the package to the table, so that it can be checked. "auto" never selects it."""
    _TABLE.setdefault(name, _Entry(module, device_types, auto="no"))


def select(name: str, device_type: str, dtype: torch.dtype) -> Backend:
    """Return the backend for a name, a device type and a dtype.

    "auto" selects the first suitable backend in the table that needs no verification.
    """
    check_name(name)
    if name == "auto":
        return _first_serving(device_type, dtype)
    backend = _load(name)
    device_types = _device_types(name)
    if device_types != ANY_DEVICE and device_type not in device_types:
        raise ValueError(f"backend {name!r} supports {', '.join(device_types)} tensors, got tensors on {device_type}")
    if isinstance(backend, Exception):
        raise RuntimeError(f"backend {name!r} is not available: {_explain(backend)}") from backend
    if dtype not in backend.dtypes:
        raise TypeError(f"backend {name!r} supports {', '.join(map(str, backend.dtypes))}, got {dtype}")
    return backend


@functools.cache  # in a small batch, the time of the search would be noticeable
def _first_serving(device_type: str, dtype: torch.dtype) -> Backend:
    serving = (_serving(each, device_type, dtype) for each, entry in _TABLE.items() if entry.auto == "yes")
    return next(backend for backend in serving if backend)


@contextlib.contextmanager
def warming() -> Iterator[None]:
    """Return a context in which calls also launch the kernels that other temperatures need."""
    with contextlib.ExitStack() as stack:
        for backend in map(_load, _TABLE):
            if isinstance(backend, Backend):
                stack.enter_context(backend.warming())
        yield


def name_of(backend: Backend) -> str:
    """Return the name of a backend that `select` returned."""
    return next(name for name in _TABLE if _load(name) is backend)


def _device_types(name: str) -> tuple[str, ...]:
    """Return a backend's device types: the backend's own list if it loads and has one, else the table's list."""
    backend = _load(name)
    more = backend.device_types if isinstance(backend, Backend) else ANY_DEVICE
    return _TABLE[name].device_types if more == ANY_DEVICE else more


def backends() -> dict[str, BackendStatus]:
    """Return the status of every backend by name: whether it loads here (and if not, why), and which devices it serves.

    Returns:
        A dict of `BackendStatus(available, device_types, reason, details, verdict)`. `device_types` is `("any",)` for a
        backend that runs wherever PyTorch does, `details` gives the instruction set and the number of threads of "cpu",
        and `verdict` tells whether the GPU kernels have passed `verify` on the current device.

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
    """Return the verification result of a backend on the current GPU.

    Return None if there is no GPU, or if "auto" needs no result for this backend.
    """
    if _TABLE[name].auto != "passed" or not torch.cuda.is_available():
        return None
    try:
        device = torch.device("cuda", torch.cuda.current_device())
        verdict = policy.known_verdicts(device, {name: _TABLE[name].module}).get(name)
    except RuntimeError as error:  # the device does not respond, or this process was forked from one that uses it
        return f"unknown: {_explain(error)}"
    return str(verdict) if verdict else "not checked yet"


def _explain(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


_load("cpu")
