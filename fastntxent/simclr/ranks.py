"""The ranks of a run: the processes that torchrun started, each with a part of every batch, or a single process."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import wire

# Errors that a user's mistake can raise. The command prints such an error on one line.
MISTAKES = (ValueError, OSError, ImportError)


@dataclass(frozen=True)
class Ranks:
    """This process's place among the processes of the run.

    Attributes:
        group: the process group; None for a single process.
        rank: rank of this process. Rank 0 writes files and prints messages.
        world: world size.
        local: rank of this process on its machine.
    """

    group: dist.ProcessGroup | None = None
    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def part(self, x: Tensor) -> Tensor:
        """Return this rank's consecutive rows of x. Parts differ in size by at most one row, and may be empty."""
        return x[len(x) * self.rank // self.world : len(x) * (self.rank + 1) // self.world]

    def gather(self, x: Tensor) -> Tensor:
        """Return the rows of all ranks, in rank order."""
        if self.group is None:
            return x
        sizes = wire.gather_numbers(self.group, torch.tensor(len(x), device=x.device))
        return wire.all_gather(self.group, x, sizes.tolist())

    def largest(self, number: int) -> int:
        """Return the maximum of a number across all ranks."""
        if self.group is None:
            return number
        return int(wire.gather_numbers(self.group, torch.tensor(number)).max())

    def tell(self, words: str) -> str:
        """Return the messages of all ranks in one string, without empty messages. Every rank gets the same string."""
        if self.group is None:
            return words
        told = wire.gather_objects(self.group, words)
        return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(told) if text)

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        """If any rank raises in this block, every rank raises at the end of the block, so none of them hangs.

        Raises:
            The exception of this rank, if this rank failed. A rank that did not fail raises an error with the number
            and the message of the first rank that failed: a ValueError for one of MISTAKES, otherwise a RuntimeError.
        """
        if self.group is None:
            yield
            return
        failure: Exception | SystemExit | None = None
        try:
            yield
        except (Exception, SystemExit) as error:
            failure = error
        of_ranks = wire.gather_objects(self.group, failure and (isinstance(failure, MISTAKES), str(failure)))
        if failure:
            raise failure
        for rank, told in enumerate(of_ranks):
            if told:
                is_mistake, words = told
                raise (ValueError if is_mistake else RuntimeError)(f"rank {rank}: {words}")

    def require_same(self, facts: dict[str, Any]) -> None:
        """Raise ValueError on every rank if a fact differs between ranks. The error names the fact and its values."""
        if self.group is None:
            return
        of_ranks = wire.gather_objects(self.group, facts)
        differing = [name for name in facts if any(of_rank[name] != of_ranks[0][name] for of_rank in of_ranks)]
        if differing:
            values = (f"{name} is {', '.join(str(of_rank[name]) for of_rank in of_ranks)}" for name in differing)
            raise ValueError(
                f"these values must be the same on all ranks, but on ranks 0 to {self.world - 1} {'; '.join(values)}"
            )

    @contextlib.contextmanager
    def one_voice(self) -> Iterator[None]:
        """Silence stdout and stderr in this block on every rank but the first."""
        with contextlib.ExitStack() as stack:
            if not self.first:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield

    def stop(self, words: str, status: int) -> int:
        """Print `words` on the first rank, destroy the process group, and return `status`.

        All ranks must call this.
        """
        if self.first:
            print(words, file=sys.stderr, flush=True)
        if self.group:
            wire.gather_objects(self.group, None)  # wait for the print: torchrun kills all ranks when one ends
        self.leave()
        return status

    def leave(self) -> None:
        """Destroy the process group. All ranks must call this.

        A rank that fails alone must not call it: NCCL would wait here for messages that the other ranks never send.
        """
        if self.group:
            dist.destroy_process_group()

    def end(self, status: int) -> int:
        """Return the exit status of a finished process. On several ranks, exit here, without Python's finalisation.

        A gloo thread releases the last tensors after they have arrived, and takes the GIL to do so. DDP keeps gloo's
        threads alive after the group is destroyed. Before 3.14, Python kills a thread that takes the GIL during
        finalisation. The gloo thread would be killed inside a destructor, which aborts the process. Then torchrun would
        kill the first rank during its evaluation.
        """
        if self.group:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status


ALONE = Ranks()


def launched() -> bool:
    """Whether torchrun has started several processes, including this one."""
    return dist.is_available() and dist.is_torchelastic_launched() and os.environ["WORLD_SIZE"] != "1"


def join() -> Ranks:
    """Return the ranks of this run after joining the processes that torchrun started; ALONE for a single process."""
    if not launched():
        return ALONE
    # A tensor's device decides which backend sends it. Ranks exchange options and errors through gloo, because that
    # happens before a device is chosen.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return Ranks(dist.group.WORLD, dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))
