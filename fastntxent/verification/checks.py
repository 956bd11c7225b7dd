"""The checks of a backend on a device: values and gradients against float64, and the same bits in every call.

Small sizes reach every kernel: a backend lists the forms of its kernels, and each form is forced in turn. On a GPU, a
few batches are large enough to fill the device. New memory is filled with NaN, so elements that a kernel leaves
unwritten are found. `error_budget` has the tolerances.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import error_budget
from ..backends.base import Backend
from ..losses import nt_xent
from .problems import (
    Problem,
    cross_problem,
    generator,
    groups_problem,
    limits_problem,
    nt_xent_problem,
    sigmoid_problem,
    sum_problem,
    towers_problem,
    views_of,
    whole_numbers_problem,
)
from .verdict import Status

# With more rows, the true results come from `blocked` in float64, because the dense oracle's matrices would not fit.
_MOST_DENSE_ROWS = 2048

Case = tuple[str, Callable[[], None]]


class FaultError(Exception):
    """A backend gives wrong or irreproducible results."""

    def __init__(self, status: Status, words: str) -> None:
        super().__init__(words)
        self.status = status


def cases(name: str, backend: Backend, device: torch.device) -> Iterator[Case]:
    """Yield every check of a backend on a device: a name, and a function that raises FaultError if the check fails."""
    slow = device.type == "cpu" and "cuda" in backend.device_types  # GPU kernels in an interpreter
    for dtype in backend.dtypes:
        label = str(dtype).removeprefix("torch.")
        for form in backend.forms(device, dtype):
            for call, rows, features in _small_calls(slow, form):
                words = f"{call}: {label}, {2 * rows} rows of {features} features" + (f", {form}" if form else "")
                yield words, functools.partial(_in_form, name, backend, form, call, rows, features, dtype, device)
            if dtype == torch.float32 and device.type == "cuda" and not torch.version.hip:
                for rows, features in ((520, 128), (65, 768)):
                    words = f"nt_xent: {2 * rows} rows of {features} features in TF32" + (f", {form}" if form else "")
                    yield words, functools.partial(_in_tf32, name, backend, form, rows, features, device)
        yield from _special(name, device, dtype, label, slow)
        if device.type != "cpu":
            for call, rows, features in _large_calls(device):
                words = f"{call}: {label}, {2 * rows} rows of {features} features"
                yield words, functools.partial(_in_form, name, backend, "", call, rows, features, dtype, device)
    if device.type == "cuda":
        yield from _on_streams(name, device)


# Calls that are checked in every form of a backend's kernels (in an interpreter, only the first call).
FORM_CALLS: dict[str, Callable[[tuple[Tensor, Tensor]], Problem]] = {
    "nt_xent": lambda views: nt_xent_problem(views, 0.1),
    # Logits beyond the range of exp, and an upstream gradient per row, use separate kernels.
    "nt_xent, temperature 0.005": lambda views: nt_xent_problem(views, 0.005, upstream=_upstream_gradient(views)),
    "two sides": lambda views: cross_problem(views, 0.2),
    "groups": lambda views: groups_problem(views, 0.2),
    "two towers, a sigmoid for each pair": lambda views: sigmoid_problem(views, 0.1, -10.0, two_views=False),
    "two views, a sigmoid for each pair": lambda views: sigmoid_problem(views, 0.2, -3.0, two_views=True),
    "limits": lambda views: limits_problem(views, 0.1),
}


def _small_calls(slow: bool, form: str) -> list[tuple[str, int, int]]:
    """Return (call, N, D) of small batches. N lies at, next to and beyond tile edges; D reaches every part of the
    table of tiles."""
    if slow:
        sizes = [(1, 7), (33, 64)] if form else [(1, 7), (33, 64), (40, 130)]
        return [("nt_xent", *size) for size in sizes]
    features = (64, 128, 130, 768)
    sizes = [(1, 7), (33, 64), (97, 130), (160, 200), (300, 520), (64, 768)]
    if form:
        sizes = [(33, 64), (97, 200), (160, 130), (520, 128), (65, 768)]
    return [
        *(("nt_xent", *size) for size in sizes),
        *(("nt_xent, temperature 0.005", 300 if d == 128 else 97, d) for d in features),
        *((call, 160, d) for call in ("two sides", "groups") for d in (128, 768)),
        *((call, 97, d) for call in FORM_CALLS if call == "limits" or "sigmoid" in call for d in (64, 128, 200, 768)),
    ]


def _large_calls(device: torch.device) -> list[tuple[str, int, int]]:
    """Return (call, N, D) of batches that fill a device. Some kernels split these differently from small batches."""
    # There are more blocks of 32 rows than thread blocks that run at once, so some thread blocks process several tasks
    # (csrc/cuda/plan.h).
    n = 50 * torch.cuda.get_device_properties(device).multi_processor_count + 5
    return [("nt_xent", n, 64), ("nt_xent", n, 200), ("nt_xent", n, 768), ("two sides", 2 * n, 128)]


def _in_form(
    name: str,
    backend: Backend,
    form: str,
    call: str,
    rows: int,
    features: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    problem = FORM_CALLS[call](views_of(rows, features, dtype, device))
    with backend.forced(form):
        check_problem(problem, name)


def _in_tf32(name: str, backend: Backend, form: str, rows: int, features: int, device: torch.device) -> None:
    """Check with PyTorch set to TF32, which then applies to the products of the backend and of the reference."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        _in_form(name, backend, form, "nt_xent", rows, features, torch.float32, device)
    finally:
        torch.set_float32_matmul_precision(before)


def _upstream_gradient(views: Sequence[Tensor]) -> Tensor:
    """Return an upstream gradient with one number per row."""
    rows = sum(len(view) for view in views)
    return torch.randn(rows, generator=generator(7), dtype=torch.float64).to(views[0].device)


def _special(name: str, device: torch.device, dtype: torch.dtype, label: str, slow: bool) -> Iterator[Case]:
    """Yield the checks of options, strides, extreme temperatures and NaN, at small sizes. On a GPU, also yield a batch
    of 8,192 rows with a common direction."""
    n, d = (20, 40) if slow else (40, 72)
    views = views_of(n, d, dtype, device)
    long = tuple(z.mul(1.5) for z in views)
    upstream = _upstream_gradient(views)
    on_device = torch.tensor(0.1, dtype=torch.float64, device=device)
    wide = torch.stack(views, dim=2)  # rows that are not contiguous

    problems = {
        "a weight for each row": nt_xent_problem(views, 0.1, upstream=upstream),
        "rows of any norm": nt_xent_problem(long, 1.0, normalize=False),
        "rows of any norm, a weight for each": nt_xent_problem(long, 1.0, normalize=False, upstream=upstream),
        "temperature 0.005": nt_xent_problem(views, 0.005),
        "temperature on the device": nt_xent_problem(views, on_device),
        "strided rows": nt_xent_problem((wide[..., 0], wide[..., 1]), 0.1),
        "groups, rows without a negative": groups_problem(views, 0.2),
        "two sides": cross_problem(views, 0.2),
        "a weighted sum": sum_problem(views, 0.2),
        "two towers, both directions": towers_problem(views, 0.1, both=True),
        "two towers, a sigmoid for each pair": sigmoid_problem(views, 0.1, -10.0, two_views=False),
        "two views, a sigmoid for each pair": sigmoid_problem(views, 0.2, -3.0, two_views=True),
        "limits": limits_problem(views, 0.1),
        "similarities that are whole numbers": whole_numbers_problem(dtype, device),
    }
    if not slow:
        broad = views_of(n, 300, dtype, device)
        problems["rows of any norm, 300 features"] = nt_xent_problem(broad, 1.0, normalize=False, upstream=upstream)
        problems["two towers, one direction"] = towers_problem(views, 0.1, both=False)
        problems["two towers, temperature 0.005"] = towers_problem(views, 0.005, both=True)
    for words, problem in problems.items():
        yield f"{label}, {words}", functools.partial(check_problem, problem, name)
    ill = views[0].clone()
    ill[1] = torch.nan
    sick = ill, views[1]
    for words, problem in {
        "a row of NaN": nt_xent_problem(sick, 0.1),
        "a row of NaN, a weight for each": nt_xent_problem(sick, 0.1, upstream=upstream),
        "a row of NaN, groups": groups_problem(sick, 0.2),
        "a row of NaN, two sides": cross_problem(sick, 0.2),
        "a row of NaN, a weighted sum": sum_problem(sick, 0.2),
        "a row of NaN, two towers": towers_problem(sick, 0.1, both=True),
        "a row of NaN, a sigmoid for each pair": sigmoid_problem(sick, 0.1, -3.0, two_views=False),
        "a row of NaN, limits": limits_problem(sick, 0.1),
        "a row of NaN, a sigmoid for each pair of two views": sigmoid_problem(sick, 0.1, -3.0, two_views=True),
    }.items():
        yield f"{label}, {words}", functools.partial(_keeps_nan, problem, name)
    if device.type != "cpu":
        many = views_of(4096, 64, dtype, device, common=0.5)
        yield f"{label}, 8,192 rows with a common direction", lambda: check_problem(nt_xent_problem(many, 0.1), name)


def check_problem(problem: Problem, backend: str) -> None:
    """Raise FaultError unless a backend's results are within the error budget and a second call returns the same
    bits."""
    results = _poisoned(problem, backend)
    oracle = "reference" if problem.rows <= _MOST_DENSE_ROWS else "blocked"
    truths, same_precision = problem.run(oracle, True), problem.run(oracle, False)
    for name, value in results.items():
        scale = problem.scales.get(name, 0.0)
        errors, reference = (
            error_budget.errors_of(x, truths[name], scale=scale) for x in (value, same_precision[name])
        )
        gradient = name.startswith(("d_z", "d_u", "d_v"))
        limit = error_budget.allowed(
            reference, problem.dtype, problem.logit_size, output_dtype=value.dtype if gradient else None
        )
        if not errors.within(limit):
            raise FaultError("wrong", f"{name} {_off(value, errors, limit)}")
    # Filling new memory with NaN needs PyTorch's deterministic mode, which can hide bits that change between calls. So
    # bits are compared without this mode.
    once, again = problem.run(backend, False), problem.run(backend, False)
    for name, value in once.items():
        if not torch.equal(_bits(value), _bits(again[name])):
            share = float((_bits(value) != _bits(again[name])).float().mean())
            raise FaultError("not reproducible", f"{100 * share:.2g} % of {name} differs bitwise in the second call")


def _off(value: Tensor, errors: error_budget.Errors, limit: error_budget.Errors) -> str:
    missing = int(value.isnan().sum())
    if missing:
        return f"has {missing} of {value.numel()} elements that are NaN, as in unwritten memory"
    return f"is off by {errors.maximum:.2g} of its largest value; at most {limit.maximum:.2g} is allowed"


def _keeps_nan(problem: Problem, backend: str) -> None:
    """Raise FaultError if a result has a number where the reference has NaN."""
    truths = problem.run("reference", False)
    for name, value in problem.run(backend, False).items():
        given = int((truths[name].isnan() & ~value.isnan()).sum())
        if given:
            raise FaultError("wrong", f"{given} of the {value.numel()} elements of {name} should be NaN and are not")


def _on_streams(name: str, device: torch.device) -> Iterator[Case]:
    """Yield the checks that only a GPU can run: two streams, a captured graph, another current device."""
    views = views_of(160, 128, torch.float32, device)
    problem = nt_xent_problem(views, 0.1)
    yield "200 calls on two streams", lambda: _two_streams(problem, name, device)
    yield "a captured graph", lambda: _graph(views, name, device)
    other = _another(device)
    if other is not None:
        yield "another device current", lambda: _other_device(problem, name, other)


def _another(device: torch.device) -> torch.device | None:
    """Return another GPU that this process can use, or None. A GPU that is full or in exclusive mode cannot be used."""
    for index in range(torch.cuda.device_count()):
        other = torch.device("cuda", index)
        if other != device:
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=other).item()
                return other
    return None


def _two_streams(problem: Problem, name: str, device: torch.device) -> None:
    expected = problem.run(name, False)
    torch.cuda.synchronize(device)
    streams = [torch.cuda.Stream(device), torch.cuda.Stream(device)]
    results = []
    for call in range(200):
        with torch.cuda.stream(streams[call % 2]):
            results.append(problem.run(name, False))
    torch.cuda.synchronize(device)
    for result in results:
        for key, value in result.items():
            if not torch.equal(_bits(value), _bits(expected[key])):
                raise FaultError("not reproducible", f"{key} differs bitwise on one of two streams")


def _graph(views: Sequence[Tensor], name: str, device: torch.device) -> None:
    z_i, z_j = (z.clone().requires_grad_() for z in views)

    def step() -> tuple[Tensor, ...]:
        loss = nt_xent(z_i, z_j, 0.1, backend=name)  # type: ignore[arg-type]
        return loss.detach(), *torch.autograd.grad(loss, (z_i, z_j))

    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            z_i.copy_(views[1])
            z_j.copy_(views[0])
        graph.replay()
        replayed = [x.clone() for x in captured]
        eager = step()
    for key, value, expected in zip(("loss", "d_z_i", "d_z_j"), replayed, eager, strict=True):
        if not torch.equal(_bits(value), _bits(expected)):
            raise FaultError("wrong", f"{key} of a replayed graph differs from the result of the same eager call")


def _other_device(problem: Problem, name: str, other: torch.device) -> None:
    with torch.cuda.device(other):
        check_problem(problem, name)


def _poisoned(problem: Problem, backend: str) -> dict[str, Tensor]:
    """Return the results of a run in which new memory is filled with NaN."""
    with _new_memory_is_nan():
        return problem.run(backend, False)


@contextlib.contextmanager
def _new_memory_is_nan() -> Iterator[None]:
    memory: Any = torch.utils.deterministic
    deterministic, filled = (
        torch.are_deterministic_algorithms_enabled(),
        memory.fill_uninitialized_memory,
    )
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        memory.fill_uninitialized_memory = filled


def _bits(x: Tensor) -> Tensor:
    """Return the bits of the numbers as integers, so that NaN equals itself."""
    kinds: dict[int, Any] = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(kinds[x.element_size()])
