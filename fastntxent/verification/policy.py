"""Chooses the backend that "auto" takes on an accelerator: the fastest of `blocked` and the backends that have passed.

At the first call on a device, verdicts are read from the store, or found by a child process. Checking and timing take
up to two minutes and are announced on stderr. After that, each choice takes two dict lookups.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from . import process
from .process import VERIFY
from .store import Store, model_of
from .verdict import Verdict

FALLBACK = "blocked"
# Without times, batches of up to this many rows go to the first backend that passed, and larger ones to the last.
SMALL_BATCH = 8192
REPLAYED = " replayed"  # suffix of a backend's name, for times of a replayed CUDA graph, without host overhead
# Backends that "auto" may take on a device type once they have passed, with their modules.
Candidates = Mapping[str, str]
# Number of child processes that share a backend's checks, for a backend whose kernels are compiled at the first call.
PARTS = {"triton": min(4, os.cpu_count() or 1)}

_decided: dict[torch.device, Decision] = {}
_lock = threading.Lock()
_said: set[str] = set()


class Decision:
    """Verdicts and times on a device, and the choice of a backend from them.

    Attributes:
        verdicts: the verdict of each backend, by name.
        times: the result of `timing.time_backends`; None if there is none.
        reason: the reason why no backend was checked; empty if any was.
    """

    def __init__(self, verdicts: dict[str, Verdict], times: dict[str, Any] | None, reason: str = "") -> None:
        self.verdicts = verdicts
        self.times = times
        self.reason = reason
        self.passed = [name for name, verdict in verdicts.items() if verdict.ok]
        self._taken: dict[tuple[torch.dtype, int, int, bool], str] = {}

    def take(self, dtype: torch.dtype, rows: int, features: int, captured: bool = False) -> str:
        """Return the backend for a call of this size. `captured`: whether the call is captured in a CUDA graph."""
        size = (dtype, rows, features, captured)
        taken = self._taken.get(size)
        if taken is None:
            if len(self._taken) > 10_000:  # sizes that keep changing
                self._taken.clear()
            taken = self._taken[size] = self.explain(dtype, rows, features, captured)[0]
        return taken

    def explain(self, dtype: torch.dtype, rows: int, features: int, captured: bool = False) -> tuple[str, str]:
        """Return the backend for a call of this size, and the reason."""
        if not self.passed:
            return FALLBACK, self.reason or "no kernels have passed here"
        times = self._nearest(dtype, rows, features, captured)
        if not times:
            return self.passed[0 if rows <= SMALL_BATCH else -1], "it has passed, but nothing was timed at this size"
        quickest = min(times, key=lambda name: times[name])
        said = ", ".join(f"{name} {value:.3g} ms" for name, value in sorted(times.items(), key=lambda item: item[1]))
        return quickest, f"the fastest at the nearest timed size: {said}"

    def _nearest(self, dtype: torch.dtype, rows: int, features: int, captured: bool) -> dict[str, float]:
        """Return the times of `blocked` and of the backends that have passed, at the nearest timed size.

        The nearest size has the nearest number of features, then the nearest number of rows, on a logarithmic scale.
        For a call captured in a CUDA graph, return the times of replays, if there are any.
        """
        table = (self.times or {}).get(str(dtype).removeprefix("torch."), {})
        for wanted in (features, rows):
            if not table:
                return {}
            table = table[min(table, key=lambda size: abs(math.log2(max(wanted, 1) / int(size))))]
        allowed = (*self.passed, FALLBACK)
        replayed = {name: table[name + REPLAYED] for name in allowed if name + REPLAYED in table}
        return replayed if captured and replayed else {name: table[name] for name in allowed if name in table}


def choose_backend(device: torch.device, candidates: Candidates, dtype: torch.dtype, rows: int, features: int) -> str:
    """Return the backend for a call on an accelerator.

    Args:
        device: the device, with its index.
        candidates: the backends that load here, in order of preference, each with its module.
        dtype, rows, features: dtype and size of the call.
    """
    decision = _decided.get(device)
    if decision is None:
        decision = decide(device, candidates)
    return decision.take(dtype, rows, features, _as_captured > 0 or _capturing(device))


_as_captured = 0  # number of open `as_captured` blocks


@contextlib.contextmanager
def as_captured() -> Iterator[None]:
    """In this block, "auto" chooses in every thread as if a CUDA graph were being captured."""
    global _as_captured
    _as_captured += 1
    try:
        yield
    finally:
        _as_captured -= 1


def decide(device: torch.device, candidates: Candidates) -> Decision:
    """Return the decision for a device, from the store or by checking it now."""
    if not candidates:
        return _settle(device, Decision({}, None, "no kernels load here"))
    if never():
        return _settle(device, Decision({}, None, f"{VERIFY}=never: no kernels are checked or used"))
    if _capturing(device):
        _say_once(
            f"fastntxent: a CUDA graph is being captured, so the kernels cannot be checked on {device} now; this graph "
            f"uses backend {FALLBACK!r}. Call fastntxent.verify() before the capture."
        )
        return Decision({}, None, "a CUDA graph was being captured")
    with _lock:
        decision = _decided.get(device)
        if decision is not None:
            return decision
        decision = _settle(device, _find_out(device, candidates))
    _complain(device, decision)
    return decision


def never() -> bool:
    """Return whether $FASTNTXENT_VERIFY forbids checks. Raise ValueError if its value is unknown."""
    value = os.environ.get(VERIFY) or "auto"
    if value not in ("auto", "never"):
        raise ValueError(f"{VERIFY} must be 'auto' or 'never', got {value!r}")
    return value == "never"


def _settle(device: torch.device, decision: Decision) -> Decision:
    _decided[device] = decision
    return decision


def forget() -> None:
    """Forget all decisions, so that the next call reads the store again."""
    _decided.clear()


def _find_out(device: torch.device, candidates: Candidates) -> Decision:
    verdicts, times = time_passed(device, candidates, find_verdicts(device, candidates, timed=True))
    return Decision(verdicts, times)


def _complain(device: torch.device, decision: Decision) -> None:
    """Report each backend that did not pass or could not be checked, once per process."""
    for name, verdict in decision.verdicts.items():
        where = model_of(device).name
        if verdict.status == "not available":
            _say_once(
                f"fastntxent: backend {name!r} could not be checked on {where} and is not used in this process: "
                f"{verdict.detail}. `python -m fastntxent verify` checks it in advance."
            )
        elif not verdict.ok:
            _warn_once(
                f"backend {name!r} did not pass on {where} and will not be used: {verdict}. Please report this with "
                "the output of `python -m fastntxent info --json`."
            )


def find_verdicts(
    device: torch.device, candidates: Candidates, *, refresh: bool = False, timed: bool = False
) -> dict[str, Verdict]:
    """Return the verdict of each backend on a device, from the store or by checks in a child process.

    Args:
        device: the device.
        candidates: the backends and their modules.
        refresh: ignore stored verdicts.
        timed: whether the caller times backends that pass; if so, the announcement says so.
    """
    store = Store(model_of(device))
    found = {} if refresh else _known(store, candidates)
    if len(found) == len(candidates):
        return {name: found[name] for name in candidates}
    with store.checking():
        if not refresh:
            found = _known(store, candidates)  # another process may have checked meanwhile
        missing = [name for name in candidates if name not in found]
        if missing:
            _say(
                f"fastntxent: checking {', '.join(missing)} on {store.model.name}, once for this device, driver and "
                f"PyTorch{', and timing what passes: up to two minutes' if timed else ': a minute or two'}"
            )
        for name in missing:
            request = {**_request(device), "backend": name, "module": candidates[name], "parts": _parts(name, device)}
            found[name] = process.check_in_child(request)
            store.keep(name, candidates[name], found[name])
    return {name: found[name] for name in candidates}


def time_passed(
    device: torch.device, candidates: Candidates, verdicts: dict[str, Verdict], *, refresh: bool = False
) -> tuple[dict[str, Verdict], dict[str, Any] | None]:
    """Return the verdicts, and the times of the backends that have passed, stored or measured in a child process.

    Some timed batches are larger than every checked one. A backend that fails while it is timed counts as not passed.

    Returns:
        The updated verdicts, and the times or None.
    """
    store, verdicts = Store(model_of(device)), dict(verdicts)

    def passed() -> dict[str, str]:
        return {name: module for name, module in candidates.items() if name in verdicts and verdicts[name].ok}

    times = None if refresh else store.times(passed())
    if times is None and passed():
        with store.checking():
            times = None if refresh else store.times(passed())
            while times is None and passed():
                names = [*passed(), FALLBACK, "reference"]
                times, running, verdict = process.time_in_child({**_request(device), "time": names})
                if times is not None:
                    store.keep_times(passed(), times)
                elif running in passed() and verdict and verdict.status != "not available":
                    verdicts[running] = verdict
                    store.keep(running, candidates[running], verdict)
                else:
                    break
    return verdicts, times


def _request(device: torch.device) -> dict[str, Any]:
    return {"device": str(device), "model": model_of(device)._asdict()}


def _parts(name: str, device: torch.device) -> int:
    return PARTS.get(name, 1) if device.type != "cpu" else 1


def _known(store: Store, candidates: Candidates) -> dict[str, Verdict]:
    known = {name: store.verdict(name, module) for name, module in candidates.items()}
    return {name: verdict for name, verdict in known.items() if verdict}


def known_decision(device: torch.device, candidates: Candidates) -> Decision:
    """Return the decision for a device from what is already known, without checking anything."""
    if never():
        return Decision({}, None, f"{VERIFY}=never: no kernels are checked or used")
    if not candidates:
        return Decision({}, None, "no kernels load here")
    verdicts = known_verdicts(device, candidates)
    passed = {name: module for name, module in candidates.items() if name in verdicts and verdicts[name].ok}
    times = Store(model_of(device)).times(passed) if passed else None
    return Decision(verdicts, times, "" if verdicts else "until the first call on this device has checked the kernels")


def known_verdicts(device: torch.device, candidates: Candidates) -> dict[str, Verdict]:
    """Return the verdicts that are stored or that this process has found, without checking anything."""
    decision = _decided.get(device)
    found = {} if decision is None else {name: v for name, v in decision.verdicts.items() if name in candidates}
    return {**found, **_known(Store(model_of(device)), candidates)}


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return False
    if torch.cuda.current_device() == device.index:  # the usual case, and a microsecond faster
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _warn_once(words: str) -> None:
    if words not in _said:
        _said.add(words)
        warnings.warn(words, RuntimeWarning, stacklevel=2)


def _say_once(words: str) -> None:
    if words not in _said:
        _said.add(words)
        _say(words)


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
