"""The table of backends: which exist, which load here, and which one serves a call.

A backend's module is imported when it is first asked for, so that `import fastntxent` costs nothing for kernels
that are not used, and a backend that fails to import keeps its error for `backends()` and for whoever asks for it
by name. There is no silent fallback from a name: only "auto" chooses. `cpu` alone is loaded at once: it has to know
of a fork, and the first to ask for it may be the child.
"""

from __future__ import annotations

import functools
import importlib
from typing import NamedTuple

import torch

from .base import Backend

ANY_DEVICE = ("any",)


class _Entry(NamedTuple):
    module: str
    device_types: tuple[str, ...]
    auto: bool  # may "auto" pick it: only what passed the whole suite on real hardware of that kind


# In order of preference: "auto" takes the first that may be picked, serves the device and loads.
_TABLE: dict[str, _Entry] = {
    "cpu": _Entry("fastntxent.backends.cpu", ("cpu",), auto=True),
    "cuda": _Entry("fastntxent.backends.cuda.backend", ("cuda",), auto=False),
    "triton": _Entry("fastntxent.backends.triton.backend", ("cuda",), auto=False),
    "blocked": _Entry("fastntxent.backends.blocked", ANY_DEVICE, auto=True),
    "reference": _Entry("fastntxent.backends.reference", ANY_DEVICE, auto=False),
}


class BackendStatus(NamedTuple):
    """What `backends()` says of one backend."""

    available: bool
    device_types: tuple[str, ...]
    reason: str | None  # why it is not available, else None
    details: str | None = None  # what of this machine it uses: "avx2, 2 threads"


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


def select(name: str, device_type: str, dtype: torch.dtype) -> Backend:
    """The backend for `name` on tensors like these; for "auto" the first of the table that may serve."""
    check_name(name)
    if name == "auto":
        candidates = (_serving(candidate, device_type, dtype) for candidate, entry in _TABLE.items() if entry.auto)
        return next(backend for backend in candidates if backend)
    backend = _load(name)
    device_types = _device_types(name)
    if device_types != ANY_DEVICE and device_type not in device_types:
        raise ValueError(f"backend {name!r} serves {', '.join(device_types)} tensors, got tensors on {device_type}")
    if isinstance(backend, Exception):
        raise RuntimeError(f"backend {name!r} is not available: {_explain(backend)}") from backend
    if dtype not in backend.dtypes:
        raise TypeError(f"backend {name!r} takes {', '.join(map(str, backend.dtypes))}, got {dtype}")
    return backend


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
        A dict of `BackendStatus(available, device_types, reason, details)`; `device_types` is `("any",)` for a backend
        that runs wherever PyTorch does, and `details` names the instruction set and the threads of "cpu".

    Example:
        >>> import fastntxent
        >>> fastntxent.backends()["blocked"]
        BackendStatus(available=True, device_types=('any',), reason=None, details=None)
    """
    return {name: _status(name) for name in _TABLE}


def _status(name: str) -> BackendStatus:
    loaded = _load(name)
    if isinstance(loaded, Exception):
        return BackendStatus(False, _device_types(name), _explain(loaded))
    return BackendStatus(True, _device_types(name), None, loaded.details())


def _explain(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


_load("cpu")
