"""Runs a function on several gloo ranks on one machine, each in a separate process."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks import instruction_set
from fastntxent.distributed import wire

# Ranks are forked from a server that has already imported these, since importing PyTorch takes longer than most tests.
# Environment variables that PyTorch reads on import, such as OMP_NUM_THREADS, keep the values from when the server
# started.
_IMPORTED_ONCE = [
    "torch",
    "torch.distributed",
    "torch.testing",
    "pytest",
    "hypothesis",
    "fastntxent",
    "fastntxent.compat",
]
_FORKS = sys.platform == "linux"  # a fork after such imports is fragile on macOS
if _FORKS:
    multiprocessing.get_context("forkserver").set_forkserver_preload(_IMPORTED_ONCE)


def on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call function(*args) on every rank of a new gloo group and return the ranks' results.

    If the function raises or crashes on any rank, RuntimeError is raised here with the traceback or exit code of each
    such rank. The result of a rank that ends by os._exit(0) is None.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, folder, dict(os.environ), instruction_set.held, function, args)
        method = "forkserver" if _FORKS else "spawn"
        context = mp.start_processes(_rank, arguments, nprocs=world, join=False, start_method=method)
        try:
            for process in context.processes:
                process.join()
        finally:
            for process in context.processes:
                process.kill()
        results = []
        for rank, process in enumerate(context.processes):
            path = Path(folder) / f"{rank}.pt"
            if path.exists():
                results.append(torch.load(path, weights_only=False))
            else:
                results.append(_Failure(f"rank {rank}: exit code {process.exitcode}") if process.exitcode else None)
        failures = [result for result in results if isinstance(result, _Failure)]
        if failures:
            raise RuntimeError("\n".join(failures))
        return results


@contextlib.contextmanager
def bytes_sent() -> Iterator[list[int]]:
    """Yield a list of the bytes that this rank sends in each torch.distributed call of fastntxent. Calls that gather
    Python objects are not listed.
    """
    sent: list[int] = []
    gather, exchange, transfer = wire._all_gather, dist.all_to_all_single, dist.batch_isend_irecv

    def counting_gather() -> Callable[..., Any]:
        def call(received: Tensor, own: Tensor, **options: Any) -> Any:
            sent.append(received.nbytes - own.nbytes)  # a rank sends as many bytes as it receives
            return gather()(received, own, **options)

        return call

    def counting_exchange(received: Tensor, own: Tensor, counts_in: list, counts_out: list, group: Any) -> Any:
        sent.append(own.nbytes - counts_out[dist.get_rank(group)] * own.itemsize)
        return exchange(received, own, counts_in, counts_out, group=group)

    def counting_transfer(operations: list[dist.P2POp]) -> Any:
        sent.append(sum(operation.tensor.nbytes for operation in operations if operation.op is dist.isend))
        return transfer(operations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "_all_gather", counting_gather)
        patch.setattr(dist, "all_to_all_single", counting_exchange)
        patch.setattr(dist, "batch_isend_irecv", counting_transfer)
        yield sent


class _Failure(str):
    pass


def _rank(
    rank: int,
    world: int,
    folder: str,
    environment: dict[str, str],
    held: str | None,
    function: Callable[..., Any],
    args: tuple,
) -> None:
    os.environ.clear()
    os.environ.update(environment)  # the fork server has the environment that it was started with
    instruction_set.hold(held)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(minutes=10),
    )
    try:
        result = function(*args)
    except Exception:
        result = _Failure(f"rank {rank}:\n{traceback.format_exc()}")
    torch.save(result, f"{folder}/{rank}.pt")
    if not isinstance(result, _Failure):
        dist.destroy_process_group()
