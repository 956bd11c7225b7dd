"""Times of forward, backward and both: the losses are interleaved in one run, and each is checked for correctness
first."""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor

from . import machine
from .competitors import COMPETITORS, OURS, Loss

if TYPE_CHECKING:
    from typing_extensions import NotRequired

TEMPERATURE = 0.1
FEWEST, MOST = 5, 200  # rounds per comparison
BATCHES = 3  # used in turn
LARGEST_CHECKED = 4096  # samples: the reference is dense, in float64
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative error of the gradient; for the value, a tenth

Phases = dict[str, float]  # seconds by name
Quantiles = dict[str, float]  # milliseconds by name
Key = TypeVar("Key", bound=Hashable)


class Case(NamedTuple):
    """The size, device and dtype of a batch."""

    n: int
    d: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def inputs(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return two noisy views of random directions."""
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(self.n, self.d, generator=generator)
        views = (z + torch.randn(2, self.n, self.d, generator=generator)).to(self.device, self.dtype)
        z_i, z_j = (view.clone().requires_grad_() for view in views)
        return z_i, z_j


class LossRow(TypedDict):
    """The figures of one loss in a comparison."""

    forward: Quantiles
    backward: Quantiles
    both: Quantiles
    times_floor: float
    over_ours: float | None
    gradient_error: float
    note: str
    extra_bytes: NotRequired[int]  # suite gpu


class Comparison(TypedDict):
    """All losses at one size."""

    n: int
    d: int
    dtype: str
    temperature: float
    rounds: int
    gemm_gflops: float
    floor_ms: float
    ours: str | None
    losses: dict[str, LossRow]
    threads: NotRequired[dict[str, dict]]  # suite cpu, from `compare_threads`
    device: NotRequired[str]  # suite gpu
    model: NotRequired[dict[str, float]]  # suite gpu: milliseconds


def _evaluate(loss: Loss, z_i: Tensor, z_j: Tensor) -> tuple[float, Tensor]:
    value = loss(z_i, z_j)
    return float(value.detach()), torch.cat(torch.autograd.grad(value, (z_i, z_j))).double()


@functools.lru_cache(maxsize=2)
def _evaluate_truth(truth: Callable[..., Tensor], case: Case) -> tuple[float, Tensor]:
    z_i, z_j = (z.detach().double().requires_grad_() for z in case.inputs())
    return _evaluate(partial(truth, temperature=TEMPERATURE), z_i, z_j)


def check(name: str, loss: Loss, case: Case) -> float:
    """Return the relative error of the gradient against the float64 reference. Raise if this error or the value's error
    is too large."""
    case = case._replace(n=min(case.n, LARGEST_CHECKED))
    value, gradient = _evaluate(loss, *case.inputs())
    true_value, true_gradient = _evaluate_truth(COMPETITORS[name].truth, case)
    error = float((gradient - true_gradient).norm() / true_gradient.norm())
    tolerance = TOLERANCE[case.dtype]
    if not (error < tolerance and abs(value / true_value - 1) < tolerance / 10):
        raise AssertionError(
            f"{name} disagrees with the oracle: the loss is {value}, expected {true_value}; the relative error of the "
            f"gradient is {error:.1e}"
        )
    return error


def step(loss: Loss, z_i: Tensor, z_j: Tensor) -> Phases:
    """Return the seconds of one forward and one backward."""
    z_i.grad = z_j.grad = None
    clock = machine.CLOCKS[z_i.device.type]
    start = clock.mark()
    value = loss(z_i, z_j)
    middle = clock.mark()
    value.backward()
    end = clock.mark()
    return {
        "forward": clock.seconds(start, middle),
        "backward": clock.seconds(middle, end),
        "both": clock.seconds(start, end),
    }


def interleave(
    calls: Mapping[Key, Callable[[int], Phases]], seconds: float, fewest: int = FEWEST
) -> dict[Key, dict[str, list[float]]]:
    """Make every call once untimed, and then once per round, in a random order. Rounds end when the time is spent or
    after MOST rounds, but not before `fewest`. Return name -> phase -> the seconds of each round."""
    for call in calls.values():
        call(0)  # compiles, allocates, starts threads
    times: dict[Key, dict[str, list[float]]] = {name: {} for name in calls}
    start, rounds = time.perf_counter(), 0
    while rounds < fewest or (rounds < MOST and time.perf_counter() - start < seconds):
        for name in random.Random(rounds).sample(list(calls), len(calls)):
            for phase, duration in calls[name](rounds).items():
                times[name].setdefault(phase, []).append(duration)
        rounds += 1
    return times


def quantiles(seconds: list[float]) -> Quantiles:
    """Return p20, p50 and p80 in milliseconds."""
    ordered = sorted(1e3 * s for s in seconds)
    last = len(ordered) - 1
    return {"p20": ordered[round(0.2 * last)], "p50": statistics.median(ordered), "p80": ordered[round(0.8 * last)]}


def compare(losses: dict[str, Loss], case: Case, seconds: float) -> Comparison:
    """Return the comparison of all losses and a GEMM at one size."""
    errors = {name: check(name, loss, case) for name, loss in losses.items()}
    batches = [case.inputs(seed) for seed in range(BATCHES)]
    gemm, flops = machine.gemm_call(case.device, case.dtype)
    calls = {name: lambda turn, loss=loss: step(loss, *batches[turn % BATCHES]) for name, loss in losses.items()}
    times = interleave({"gemm": lambda turn: {"both": gemm()}, **calls}, seconds)
    products = times.pop("gemm")["both"]
    rate = flops / statistics.median(products)
    floor = machine.floor(case.n, case.d, rate)
    medians = {name: statistics.median(phases["both"]) for name, phases in times.items()}
    ours = next((name for name in OURS if name in losses), None)
    rows: dict[str, LossRow] = {
        name: {
            "forward": quantiles(phases["forward"]),
            "backward": quantiles(phases["backward"]),
            "both": quantiles(phases["both"]),
            "times_floor": medians[name] / floor,
            "over_ours": medians[name] / medians[ours] if ours else None,
            "gradient_error": errors[name],
            "note": COMPETITORS[name].note,
        }
        for name, phases in times.items()
    }
    return {
        "n": case.n,
        "d": case.d,
        "dtype": str(case.dtype).removeprefix("torch."),
        "temperature": TEMPERATURE,
        "rounds": len(products),
        "gemm_gflops": rate / 1e9,
        "floor_ms": 1e3 * floor,
        "ours": ours,
        "losses": rows,
    }


def lines(result: Comparison) -> list[str]:
    """Return the results of one comparison as lines of text."""
    size = f"N {result['n']}, D {result['d']}, {result['dtype']}"
    return [
        f"{size}, {name}: forward {row['forward']['p50']:.3f} ms, backward {row['backward']['p50']:.3f} ms, "
        f"both {row['both']['p50']:.3f} ({row['both']['p20']:.3f} - {row['both']['p80']:.3f}), "
        f"{row['times_floor']:.2f} x floor"
        for name, row in result["losses"].items()
    ]


def compare_threads(
    loss: Loss, counts: list[int], case: Case, seconds: float, gemm: Callable[[], float]
) -> dict[str, dict]:
    """Time one loss and a GEMM at several numbers of threads in turn. `gemm` runs the GEMM and returns its seconds.

    Return milliseconds, and speed-ups relative to the first number of threads.
    """
    batches = [case.inputs(seed) for seed in range(BATCHES)]

    def timed(count: int, turn: int) -> Phases:
        torch.set_num_threads(count)
        step(loss, *batches[turn % BATCHES]), gemm()  # the first call starts the threads of a new team
        return {"both": step(loss, *batches[turn % BATCHES])["both"], "gemm": gemm()}

    before = torch.get_num_threads()
    try:
        times = interleave({str(count): partial(timed, count) for count in counts}, seconds)
    finally:
        torch.set_num_threads(before)
    first = {phase: statistics.median(durations) for phase, durations in times[str(counts[0])].items()}
    return {
        count: {
            **{phase: quantiles(durations) for phase, durations in phases.items()},
            "speed_up": first["both"] / statistics.median(phases["both"]),
            "gemm_speed_up": first["gemm"] / statistics.median(phases["gemm"]),
        }
        for count, phases in times.items()
    }
