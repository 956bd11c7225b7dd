"""Times the backends on a device, so that "auto" can choose by a call's size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..backends import select
from ..losses import nt_xent
from .policy import REPLAYED
from .verdict import memory_ran_out

TIMED_ROWS = (256, 1024, 4096, 16384)
TIMED_FEATURES = (128, 768)
TIMED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TEMPERATURE = 0.1
MOST_DENSE = 2048  # most samples (half the rows) for which the dense reference is timed
FEWEST_TURNS = 3  # fewest repeats of each call
MOST_TURNS, SECONDS_OF_CALL = 12, 0.5  # at each size: the most repeats of a call, and seconds allotted to each call

Times = dict[str, dict[str, dict[str, dict[str, float]]]]  # by dtype, features, rows and backend: milliseconds


def time_backends(
    names: Sequence[str], device: torch.device, begin: Callable[[str, str], None] = lambda *_: None
) -> Times:
    """Return median milliseconds of forward plus backward of the mean loss, over the grid above.

    The backends take turns in one process. A backend has no entry for a size that does not fit in memory, or for a
    dtype that it does not support. The dense loss, "reference", is timed only while its matrix is small. On a GPU each
    backend has a second entry for the same call replayed from a CUDA graph, unless the call cannot be captured.

    Args:
        names: the backends.
        device: the device.
        begin: called with a backend's name and a description of the call, before each call.

    Raises:
        Exception: any error of a kernel, except lack of memory. The last call of `begin` names the backend.
    """
    times: Times = {}
    for dtype in TIMED_DTYPES:
        of_dtype = times.setdefault(str(dtype).removeprefix("torch."), {})
        taking = [name for name in names if _takes(name, device, dtype)]
        for d in TIMED_FEATURES:
            of_features = of_dtype.setdefault(str(d), {})
            for rows in TIMED_ROWS:
                of_features[str(rows)] = _entry(taking, device, dtype, rows // 2, d, begin)
    return times


def _takes(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    try:
        select(name, device.type, dtype)
    except (RuntimeError, TypeError, ValueError):
        return False
    return True


def _entry(
    names: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    n: int,
    d: int,
    begin: Callable[[str, str], None],
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    words = f"timing, {str(dtype).removeprefix('torch.')}, {2 * n} rows of {d} features"
    calls: dict[str, Callable[[], Any]] = {}
    times: dict[str, float] = {}
    with _unless_memory_runs_out():
        views = [torch.randn(n, d, generator=generator).to(device, dtype).requires_grad_() for _ in range(2)]
        for name in names:
            if name == "reference" and n > MOST_DENSE:
                continue
            begin(name, words)
            with _unless_memory_runs_out():
                call = gradient_call(nt_xent_on(name), views)
                call()
                call()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)  # errors surface here, while `begin` has named this backend last
                calls[name] = call
                if (replay := replay_of(call, device)) is not None:
                    calls[name + REPLAYED] = replay
        # Memory may run out here too, because the CUDA graphs of the other calls hold memory that a call needs.
        times = medians_in_turn(
            calls, device, MOST_TURNS, SECONDS_OF_CALL * len(calls),
            begin=lambda name: begin(name.removesuffix(REPLAYED), words),
        )  # fmt: skip
    return times


@contextmanager
def _unless_memory_runs_out() -> Iterator[None]:
    """End the block where memory runs out, without an error."""
    try:
        yield
    except Exception as error:
        if not memory_ran_out(error):
            raise


def nt_xent_on(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the mean NT-Xent loss on a backend, as a function of two views."""
    return lambda z_i, z_j: nt_xent(z_i, z_j, TEMPERATURE, backend=backend)  # type: ignore[arg-type]


def gradient_call(loss: Callable[[Tensor, Tensor], Tensor], views: Sequence[Tensor]) -> Callable[[], Any]:
    """Return forward plus backward of a loss as a function without arguments."""
    return lambda: torch.autograd.grad(loss(*views), views)


def medians_in_turn(
    calls: dict[str, Callable[[], Any]],
    device: torch.device,
    most_turns: int,
    seconds: float,
    begin: Callable[[str], None] = lambda _: None,
) -> dict[str, float]:
    """Return the median milliseconds of each call. The calls take turns for `seconds`: at least FEWEST_TURNS times, and
    at most `most_turns` times. `begin` is called with the name before each call."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for turn in range(most_turns):
        if turn >= FEWEST_TURNS and time.perf_counter() - started > seconds:
            break
        for name, call in calls.items():
            begin(name)
            taken[name].append(milliseconds(call, device))
    return {name: median(values) for name, values in taken.items()}


def replay_of(call: Callable[[], Any], device: torch.device) -> Callable[[], Any] | None:
    """Return a replay of the call from a CUDA graph; None on a CPU, or if the call cannot be captured."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            call()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:  # includes running out of memory
            torch.cuda.synchronize()
            return None
    return graph.replay


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the milliseconds of a call on a device that is idle when the call starts."""
    if device.type == "cpu":
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end)
