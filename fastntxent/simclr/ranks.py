"""The ranks of a run: the processes that torchrun started, each with a part of every batch; or one, with all of it."""

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

# Errors that a user's mistake raises; the command prints them as one line.
MISTAKES = (ValueError, OSError, ImportError)


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run.

    Attributes:
        group: all of them; None for one process.
        rank: its number among them; the first, 0, does the writing and the talking.
        world: how many they are.
        local: its number among those of its machine.
    """

    group: dist.ProcessGroup | None = None
    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and talks."""
        return self.rank == 0

    def part(self, x: Tensor) -> Tensor:
        """This rank's rows of x, consecutive ones: the parts differ by one row at most, and may be empty."""
        return x[len(x) * self.rank // self.world : len(x) * (self.rank + 1) // self.world]

    def gather(self, x: Tensor) -> Tensor:
        """The rows of all ranks, in the order of the ranks."""
        if self.group is None:
            return x
        sizes = wire.gather_numbers(self.group, torch.tensor(len(x), device=x.device))
        return wire.all_gather(self.group, x, sizes.tolist())

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.group is None:
            return number
        return int(wire.gather_numbers(self.group, torch.tensor(number)).max())

    def tell(self, words: str) -> str:
        """Return the messages of all ranks, joined; every rank gets the same text."""
        if self.group is None:
            return words
        told = wire.gather_objects(self.group, words)
        return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(told) if text)

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        """If any rank raises in this block, every rank raises at its end, so that none of them hangs.

        Raises:
            The rank's own exception; on a rank without one, a ValueError (for one of MISTAKES) or a RuntimeError
            with the number and the words of one where something was.
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
        """Raise ValueError on every rank if a fact differs between ranks, naming it and its values."""
        if self.group is None:
            return
        of_ranks = wire.gather_objects(self.group, facts)
        differing = [name for name in facts if any(of_rank[name] != of_ranks[0][name] for of_rank in of_ranks)]
        if differing:
            values = (f"{name} is {', '.join(str(of_rank[name]) for of_rank in of_ranks)}" for name in differing)
            raise ValueError(
                f"the ranks must be given the same, but on ranks 0 to {self.world - 1} {'; '.join(values)}"
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
        """End the run for a reason that every rank has found; returns the exit status."""
        if self.first:
            print(words, file=sys.stderr, flush=True)
        if self.group:
            wire.gather_objects(self.group, None)  # when a rank ends, torchrun ends the others: not before it is said
        self.leave()
        return status

    def leave(self) -> None:
        """End the process group, on all ranks at once.

        A rank that ends by itself, by an error of its own, leaves that to the end of its process: NCCL would wait here
        for what the others do not send.
        """
        if self.group:
            dist.destroy_process_group()

    def end(self, status: int) -> int:
        """The exit status of a process that is done; one of several ranks ends here, without Python's finalisation.

        A thread of gloo lets go of the last tensors after they have arrived, and needs Python for it. DDP keeps these
        threads alive beyond the group. Python before 3.14 ends a thread that asks for it while it is finalised, in
        the midst of a destructor: the process aborts, and torchrun ends the first rank before it has judged.
        """
        if self.group:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status


ALONE = Ranks()


def launched() -> bool:
    """Whether torchrun has started this process and others."""
    return dist.is_available() and dist.is_torchelastic_launched() and os.environ["WORLD_SIZE"] != "1"


def join() -> Ranks:
    """Meet the other processes that torchrun has started; alone without torchrun, or if it started one."""
    if not launched():
        return ALONE
    # A tensor travels by the library of its device: options and errors by gloo, before there is a device.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return Ranks(dist.group.WORLD, dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))
