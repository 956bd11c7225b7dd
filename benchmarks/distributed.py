"""Suite `distributed`: a step of NT-Xent on gloo ranks on this machine, one thread each, and its predicted cost.

The model is in docs/distributed.md. Its rates are measured in the same run. The kernels' rate is measured on one rank
while the other ranks wait. The rate of the link between ranks is measured with an all-gather and with one hop of the
ring; both send blocks as large as in the step. The latency of a collective call is measured with an all-gather of one
number. The ranks share the cores. With more ranks than cores, products take proportionally longer. Without a core left
for gloo, no transfer overlaps with a product.

Two other ways to compute the loss are timed in the same run:

gathered   an all-gather with autograd, then our single-process loss over all rows, on every rank
dense      an all-gather with autograd, then the dense formula of each rank's rows against all rows
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import fastntxent
from fastntxent.distributed import wire
from fastntxent.ops import kernels
from fastntxent.ops.register import call_kernel
from fastntxent.options import Strategy

from .competitors import Loss
from .timing import TEMPERATURE, TOLERANCE, Case, Phases, interleave, quantiles, step

SIZES: tuple[tuple[int, int], ...] = ((128, 128), (512, 128), (512, 512))  # samples per rank, features
STRATEGIES: tuple[Strategy, ...] = ("all_gather", "ring")


def run(arguments: argparse.Namespace) -> tuple[list[dict[str, object]], dict[str, str]]:
    """Return results for every number of ranks. Each number of ranks is measured in new processes."""
    from tests.ranks import on_ranks

    sizes = SIZES
    if arguments.n or arguments.d:
        sizes = tuple((n, d) for n in arguments.n or [512] for d in arguments.d or [128])
    results: list[dict[str, Any]] = []
    for world in arguments.ranks:
        of_ranks = on_ranks(world, measure_rank, sizes, arguments.rounds)
        for found in zip(*of_ranks, strict=True):
            results += compare_with_model(world, found)
            for row in results[-len(STRATEGIES) :]:
                print(
                    f"{world} ranks, N {row['n']}, D {row['d']}, {row['strategy']}: {row['both']['p50']:.3f} ms, "
                    f"{row['model_ms']:.3f} by the model",
                    flush=True,
                )
    return results, {}


def bytes_of_step(world: int, rows: int, d: int, strategy: str) -> int:
    """Return the bytes that a rank sends in a step, by the formula in docs/distributed.md."""
    sent = (world - 1) * (rows * (4 * d + 20) + 72)
    return sent + world // 2 * rows * (4 * d + 8) if strategy == "ring" else sent


def flops_of_step(world: int, rows: int, d: int, strategy: str) -> tuple[int, int]:
    """Return the flops of a rank's products in the forward and in the backward."""
    pairs = rows * world * rows * d
    symmetric = strategy == "ring" or world == 1
    return pairs, 4 * pairs - (rows * rows * d if symmetric else 0)


# --- on every rank ---------------------------------------------------------------------------------------------------


def measure_rank(sizes: list[tuple[int, int]], rounds: int) -> list[dict[str, Any]]:
    """For each size, return the bytes that this rank sent in each collective call of each loss, and this rank's
    times."""
    from tests.ranks import bytes_sent

    # `all_gather` is deprecated, but its replacement does not exist in every version of PyTorch.
    warnings.filterwarnings("ignore", ".*all_gather is deprecated", FutureWarning)
    world, rank = dist.get_world_size(), dist.get_rank()
    measured = []
    for n, d in sizes:
        whole = Case(n * world, d).inputs()
        z_i, z_j = (z.detach()[rank * n : (rank + 1) * n].clone().requires_grad_() for z in whole)
        ways: dict[str, Loss] = {strategy: _over_ranks(strategy) for strategy in STRATEGIES}
        ways |= {"gathered": _gathered, "dense": _dense_of_rank}
        true = _evaluate_whole(*whole, n)
        sent = {}
        for name, loss in ways.items():
            with bytes_sent() as counted:
                gradients = torch.autograd.grad(loss(z_i, z_j), (z_i, z_j))
            sent[name] = counted
            _check_rank(name, torch.cat(gradients), true)
        block = torch.randn(2 * n, d)
        calls = {name: partial(_step_of_ranks, loss, z_i, z_j) for name, loss in ways.items()}
        calls |= {"kernels": partial(_alone, torch.cat(whole).detach()), "link": partial(_link, block)}
        times = interleave(calls, seconds=0, fewest=rounds)
        measured.append({"n": n, "d": d, "sent": sent, "times": times})
    return measured


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _over_ranks(strategy: Strategy) -> Loss:
    group = fastntxent.Sharding(_world(), strategy=strategy)
    return partial(fastntxent.nt_xent, temperature=TEMPERATURE, group=group)


def _gathered(z_i: Tensor, z_j: Tensor) -> Tensor:
    blocks = _all_gather(torch.cat((z_i, z_j)))
    all_i, all_j = (torch.cat(views) for views in zip(*(block.chunk(2) for block in blocks), strict=True))
    return fastntxent.nt_xent(all_i, all_j, TEMPERATURE)


def _dense_of_rank(z_i: Tensor, z_j: Tensor) -> Tensor:
    u = F.normalize(torch.cat((z_i, z_j)), dim=1)
    own = dist.get_rank() * len(u) + torch.arange(len(u))
    logits = u @ torch.cat(_all_gather(u)).T / TEMPERATURE
    return F.cross_entropy(logits.scatter(1, own[:, None], float("-inf")), own.roll(len(z_i)))


def _all_gather(x: Tensor) -> tuple[Tensor, ...]:
    from torch.distributed.nn.functional import all_gather

    return all_gather(x)


def _evaluate_whole(z_i: Tensor, z_j: Tensor, n: int) -> Tensor:
    """Return this rank's rows of the true gradient, in float64.

    A row gets the gradient of the sum of all ranks' losses. That sum is the number of ranks times the loss of the whole
    batch. Rank 0 computes the gradient in one process and broadcasts it.
    """
    gradient = torch.empty(2, *z_i.shape, dtype=torch.float64)
    if dist.get_rank() == 0:
        z = torch.stack((z_i, z_j)).detach().double().requires_grad_()
        (d_z,) = torch.autograd.grad(fastntxent.nt_xent(z[0], z[1], TEMPERATURE), z)
        gradient = d_z * dist.get_world_size()
    dist.broadcast(gradient, 0)
    return gradient[:, dist.get_rank() * n :][:, :n].flatten(0, 1)


def _check_rank(name: str, gradient: Tensor, true: Tensor) -> None:
    error = float((gradient.double() - true).norm() / true.norm())
    if not error < TOLERANCE[torch.float32]:
        raise AssertionError(f"{name} disagrees with one process: gradient error {error:.1e}")


def _step_of_ranks(loss: Loss, z_i: Tensor, z_j: Tensor, turn: int) -> Phases:
    dist.barrier()
    with _watched() as phases:
        return {"both": step(loss, z_i, z_j)["both"], **phases}


def _alone(z: Tensor, turn: int) -> Phases:
    """Return the kernels' forward and backward times for all rows, measured on rank 0 while the other ranks wait."""
    dist.barrier()
    if dist.get_rank():
        return {}
    u, ids = F.normalize(z, dim=1).requires_grad_(), torch.arange(len(z) // 2).repeat(2)
    phases = step(lambda u, _: fastntxent.neg_lse(u, ids, TEMPERATURE).mean(), u, u)
    return {name: phases[name] for name in ("forward", "backward")}


def _link(block: Tensor, turn: int) -> Phases:
    """Return the times of an all-gather of blocks, of one hop of the ring, and of an all-gather of one number."""
    group, phases = _world(), {}
    sizes = [len(block)] * group.size()
    for name, send in {
        "all_gather": lambda: wire.all_gather(group, block, sizes),
        "ring": lambda: list(wire.ring(group, [block], sizes, min(1, group.size() - 1))),
        "number": lambda: wire.gather_numbers(group, block[0, 0]),
    }.items():
        dist.barrier()
        start = time.perf_counter()
        send()
        phases[name] = time.perf_counter() - start
    return phases


@contextlib.contextmanager
def _watched() -> Iterator[Phases]:
    """Measure the seconds that the `with` block spends in the kernels that losses across ranks call, and in waiting for
    other ranks."""
    spent = {"products": 0.0, "waiting": 0.0}
    waiting = wire._waiting

    @contextlib.contextmanager
    def clocked(phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        spent[phase] += time.perf_counter() - start

    @contextlib.contextmanager
    def clocked_waiting(group: Any) -> Iterator[None]:
        with clocked("waiting"), waiting(group):
            yield

    clocked_kernel = clocked("products")(call_kernel)
    with (
        mock.patch.object(kernels, "call_kernel", clocked_kernel),
        mock.patch.object(wire, "_waiting", clocked_waiting),
    ):
        yield spent


# --- results of all ranks --------------------------------------------------------------------------------------------


def compare_with_model(world: int, of_ranks: tuple[dict[str, Any], ...]) -> list[dict[str, Any]]:
    """Return the measured and the modelled figures of both strategies at one size."""
    first = of_ranks[0]
    n, d, rows = first["n"], first["d"], 2 * first["n"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1.0, world / cores)

    def seconds(name: str, phase: str, over: Any = max) -> list[float]:
        """Return one time per round: the slowest rank's, or another reduction across ranks."""
        return [over(each) for each in zip(*(found["times"][name][phase] for found in of_ranks), strict=True)]

    def median(name: str, phase: str, over: Any = max) -> float:
        return statistics.median(seconds(name, phase, over))

    pairs = (world * rows) ** 2 * d
    alone = {phase: statistics.median(times) for phase, times in first["times"]["kernels"].items()}
    rates = {"forward": pairs / alone["forward"], "backward": 3 * pairs / alone["backward"]}
    block = rows * 4 * d
    sent = {"all_gather": (world - 1) * block, "ring": block}
    links = {name: size / median("link", name, statistics.mean) for name, size in sent.items()}
    latency = median("link", "number", statistics.mean)
    results = []
    for strategy in STRATEGIES:
        forward, backward = flops_of_step(world, rows, d, strategy)
        products = share * (forward / rates["forward"] + backward / rates["backward"])
        counted = first["sent"][strategy]
        transfers = len(counted) * latency
        if world > 1:
            transfers += bytes_of_step(world, rows, d, strategy) / links[strategy]
        behind = strategy == "ring" and world < cores
        products_ms, transfers_ms = 1e3 * products, 1e3 * transfers
        ours = median(strategy, "both")
        results.append(
            {
                "ranks": world,
                "cores": cores,
                "n": n,
                "d": d,
                "strategy": strategy,
                "rounds": len(first["times"][strategy]["both"]),
                "calls": len(counted),
                "sent_bytes": sum(counted),
                "formula_bytes": bytes_of_step(world, rows, d, strategy),
                "gflops": {phase: rate / 1e9 for phase, rate in rates.items()},
                "link_gb_per_s": links[strategy] / 1e9 if world > 1 else None,
                "latency_ms": 1e3 * latency,
                "both": quantiles(seconds(strategy, "both")),
                "products_ms": 1e3 * median(strategy, "products", statistics.mean),
                "waiting_ms": 1e3 * median(strategy, "waiting", statistics.mean),
                "model_products_ms": products_ms,
                "model_transfers_ms": transfers_ms,
                "model_ms": max(products_ms, transfers_ms) if behind else products_ms + transfers_ms,
                "over_ours": {name: median(name, "both") / ours for name in ("gathered", "dense")},
            }
        )
    return results
