"""What goes between ranks: the only place that calls torch.distributed's collectives.

Rows travel as bytes, so that every backend takes every dtype. Sums over ranks are gathered and added in the order of
the ranks: the same bits on every rank, and on every run.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.register import uncompiled as uncompiled  # nothing here can be compiled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class NoAnswerError(RuntimeError):
    """A rank waited for the others in vain."""


def all_gather(group: ProcessGroup, x: Tensor, sizes: Sequence[int]) -> Tensor:
    """The rows of all ranks in their order, sum(sizes) of them; rank r holds sizes[r]. Shorter ones travel padded."""
    largest = max(sizes)
    if largest == 0:
        return x
    sent = _written(x)
    if len(x) < largest:
        sent = torch.cat((sent, sent.new_zeros(largest - len(x), *x.shape[1:])))
    received = x.new_empty(len(sizes) * largest, *x.shape[1:])
    with _waiting(group):
        _all_gather()(_bytes(received), _bytes(sent), group=group)
    if min(sizes) == largest:
        return received
    return torch.cat([block[:size] for block, size in zip(received.split(largest), sizes, strict=True)])


def _all_gather() -> Callable[..., Any]:
    """PyTorch 2.13 renamed it, and warns of the old name."""
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather_numbers(group: ProcessGroup, x: Tensor) -> Tensor:
    """A tensor of the same small shape from every rank: (ranks, *shape)."""
    world = dist.get_world_size(group)
    return all_gather(group, x.unsqueeze(0), [1] * world)


def gather_objects(group: ProcessGroup, value: object) -> list[Any]:
    """Something of each rank that can be pickled: for errors, not for a step."""
    values: list[Any] = [None] * dist.get_world_size(group)
    with _waiting(group):
        dist.all_gather_object(values, value, group=group)
    return values


def exchange_numbers(group: ProcessGroup, x: Tensor, sizes: Sequence[int]) -> Tensor:
    """From one number for each row of all ranks (M,) to what every rank has for this one's rows (ranks, m)."""
    own = sizes[dist.get_rank(group)]
    received = x.new_empty(len(sizes) * own)
    with _waiting(group):
        dist.all_to_all_single(received, _written(x), [own] * len(sizes), list(sizes), group=group)
    return received.view(len(sizes), own)


def all_reduce(group: ProcessGroup, x: Tensor) -> Tensor:
    """The sum over the ranks of a tensor of the same shape on each. A rank adds a part of it and gathers the others':
    less than twice the tensor is sent, however many ranks there are."""
    world = dist.get_world_size(group)
    cuts = [x.numel() * rank // world for rank in range(world + 1)]
    sizes = [stop - start for start, stop in itertools.pairwise(cuts)]
    part = exchange_numbers(group, x.flatten(), sizes).sum(dim=0)
    return all_gather(group, part, sizes).view_as(x)


def ring(group: ProcessGroup, own: Sequence[Tensor], sizes: Sequence[int], hops: int) -> Iterator[tuple[Tensor, ...]]:
    """The blocks of ranks, one after another: this rank's, then that of the rank before it, and so on, after so many
    hops. Ranks minus one are all the way round.

    While one block is worked on, it goes to the next rank and the one after it comes in: two blocks of other ranks are
    held at a time, however many ranks there are.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    after, before = (dist.get_global_rank(group, (rank + step) % world) for step in (1, -1))
    block = tuple(map(_written, own))
    for step in range(hops + 1):
        work: list[dist.Work] = []
        if step < hops:
            size = sizes[(rank - step - 1) % world]
            coming = tuple(x.new_empty(size, *x.shape[1:]) for x in own)
            transfers = []
            for tag, (x, y) in enumerate(zip(block, coming, strict=True)):
                if x.numel():
                    transfers.append(dist.P2POp(dist.isend, _bytes(x), after, group, tag))
                if y.numel():
                    transfers.append(dist.P2POp(dist.irecv, _bytes(y), before, group, tag))
            if transfers:
                with _waiting(group):
                    work = dist.batch_isend_irecv(transfers)
        yield block
        with _waiting(group):
            for transfer in work:
                transfer.wait()
        if step < hops:
            block = coming


def _written(x: Tensor) -> Tensor:
    """Contiguous, and negated where PyTorch has only noted that it should be."""
    return x.contiguous().resolve_neg()


def _bytes(x: Tensor) -> Tensor:
    if x.ndim and x.stride(-1) != 1:  # of one element, as an expanded gradient is, that counts as contiguous
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(torch.uint8)


@contextlib.contextmanager
def _waiting(group: ProcessGroup) -> Iterator[None]:
    """What torch.distributed raises when a rank does not answer says little of why it should have."""
    try:
        yield
    except RuntimeError as error:
        raise NoAnswerError(
            f"rank {dist.get_rank(group)} of {dist.get_world_size(group)} got no answer from the others: a rank has "
            "ended or raised an error of its own, did not call the same losses with this group, or was later than the "
            f"group's timeout ({error})"
        ) from error
