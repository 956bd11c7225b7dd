"""Time of forward, backward and both: competitors interleaved in one run, each checked for equality first."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from . import machine
from .competitors import Loss, competitors, of_backend

TEMPERATURE = 0.1


def inputs(n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two noisy views of random directions."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, d, generator=generator)
    z_i, z_j = (z + torch.randn(2, n, d, generator=generator)).unbind()
    return z_i.clone().requires_grad_(), z_j.clone().requires_grad_()


def check(name: str, loss: Loss, n: int, d: int) -> None:
    """Raise unless value and gradient are the oracle's to 1e-4, on a batch the oracle can hold."""
    z_i, z_j = inputs(min(n, 512), d)
    value, truth = loss(z_i, z_j, TEMPERATURE), of_backend("reference")(z_i, z_j, TEMPERATURE)
    gradient, expected = (torch.autograd.grad(x, z_i)[0] for x in (value, truth))
    error = float((gradient - expected).norm() / expected.norm())
    if abs(float(value.detach()) / float(truth.detach()) - 1) > 1e-5 or not error < 1e-4:
        raise AssertionError(f"{name} disagrees with the oracle: gradient error {error:.1e}")


def step(loss: Loss, z_i: torch.Tensor, z_j: torch.Tensor) -> dict[str, float]:
    """Seconds of one forward and one backward."""
    z_i.grad = z_j.grad = None
    start = time.perf_counter()
    value = loss(z_i, z_j, TEMPERATURE)
    middle = time.perf_counter()
    value.backward()
    end = time.perf_counter()
    return {"forward": middle - start, "backward": end - middle, "both": end - start}


def quantiles(seconds: list[float]) -> dict[str, float]:
    """p20, p50 and p80 in milliseconds."""
    ordered = sorted(1e3 * s for s in seconds)
    last = len(ordered) - 1
    return {"p20": ordered[round(0.2 * last)], "p50": statistics.median(ordered), "p80": ordered[round(0.8 * last)]}


def compare(n: int, d: int, repeats: int) -> dict[str, object]:
    """One size: every competitor and a GEMM, in turn, `repeats` times over."""
    losses = competitors()
    z_i, z_j = inputs(n, d)
    gemm, gemm_flops = machine.gemm_call()
    for name, loss in losses.items():
        check(name, loss, n, d)
        step(loss, z_i, z_j)  # warm: compiles, allocates
    times: dict[str, dict[str, list[float]]] = {name: {} for name in losses}
    gemm_seconds = []
    for _ in range(repeats):
        gemm_seconds.append(_seconds(gemm))
        for name, loss in losses.items():
            for phase, seconds in step(loss, z_i, z_j).items():
                times[name].setdefault(phase, []).append(seconds)
    gemm_rate = gemm_flops / statistics.median(gemm_seconds)
    floor = 2 * (2 * (2 * n) ** 2 * d) / gemm_rate
    rows = {}
    for name, phases in times.items():
        both = statistics.median(phases["both"])
        rows[name] = {
            **{phase: quantiles(seconds) for phase, seconds in phases.items()},
            "times_floor": both / floor,
            "eager_over_this": statistics.median(times["eager"]["both"]) / both,
        }
    return {"n": n, "d": d, "gemm_gflops": gemm_rate / 1e9, "floor_ms": 1e3 * floor, "losses": rows}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
