"""Communication between ranks. No other module of the package calls torch.distributed's collectives.

Rows are sent as bytes, so every communication backend supports every dtype. For a sum across ranks, the terms are
gathered and added in rank order, so the sum has the same bits on every rank and in every run.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.register import uncompiled as uncompiled  # collectives cannot be compiled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class NoAnswerError(RuntimeError):
    """A collective failed or timed out, most likely because other ranks did not take part."""


def all_gather(group: ProcessGroup, x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the rows of all ranks in rank order. Rank r holds sizes[r] rows; shorter blocks are sent with padding."""
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
    """Return PyTorch's all-gather. PyTorch 2.13 renamed it and warns about the old name."""
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather_numbers(group: ProcessGroup, x: Tensor) -> Tensor:
    """Return the x of every rank, stacked (ranks, *shape). x is small and has the same shape on every rank."""
    world = dist.get_world_size(group)
    return all_gather(group, x.unsqueeze(0), [1] * world)


def gather_objects(group: ProcessGroup, value: object) -> list[Any]:
    """Return the value of every rank, for error messages. Values are pickled, which is too slow for a training step."""
    values: list[Any] = [None] * dist.get_world_size(group)
    with _waiting(group):
        dist.all_gather_object(values, value, group=group)
    return values


def exchange_numbers(group: ProcessGroup, x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Send each rank the numbers computed here for that rank's rows (M,). Return the numbers that every rank computed
    for this rank's rows (ranks, m)."""
    own = sizes[dist.get_rank(group)]
    received = x.new_empty(len(sizes) * own)
    with _waiting(group):
        dist.all_to_all_single(received, _written(x), [own] * len(sizes), list(sizes), group=group)
    return received.view(len(sizes), own)


def all_reduce(group: ProcessGroup, x: Tensor) -> Tensor:
    """Return the sum across ranks of a tensor that has the same shape on every rank. Each rank adds up one slice and
    gathers the other slices, so at any world size a rank sends at most about twice the tensor's bytes."""
    world = dist.get_world_size(group)
    cuts = [x.numel() * rank // world for rank in range(world + 1)]
    sizes = [stop - start for start, stop in itertools.pairwise(cuts)]
    part = exchange_numbers(group, x.flatten(), sizes).sum(dim=0)
    return all_gather(group, part, sizes).view_as(x)


def ring(group: ProcessGroup, own: Sequence[Tensor], sizes: Sequence[int], hops: int) -> Iterator[tuple[Tensor, ...]]:
    """Iterate over the blocks of ranks: this rank's block, the block of the rank before it, and so on, up to `hops`
    ranks back. If `hops` is the world size minus one, the blocks go all the way around.

    While the caller works on a block, the block is sent to the next rank and the following one is received. So at any
    world size a rank holds two blocks of other ranks at a time.
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
    """Return x as contiguous memory, with PyTorch's lazy negation applied."""
    return x.contiguous().resolve_neg()


def _bytes(x: Tensor) -> Tensor:
    if x.ndim and x.stride(-1) != 1:  # an expanded tensor of one element counts as contiguous despite its stride
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(torch.uint8)


@contextlib.contextmanager
def _waiting(group: ProcessGroup) -> Iterator[None]:
    """Re-raise errors of torch.distributed as NoAnswerError, which names possible causes; the original does not."""
    try:
        yield
    except RuntimeError as error:
        raise NoAnswerError(
            f"rank {dist.get_rank(group)} of {dist.get_world_size(group)} got no answer from the others: a rank has "
            "ended or raised an error, did not call the same losses with this group, or was slower than the group's "
            f"timeout ({error})"
        ) from error
