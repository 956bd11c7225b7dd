"""How a batch is spread over ranks: what a person chooses, and what the ranks settle before a loss."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, Union

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.base import accumulation_dtype
from ..options import STRATEGIES, Strategy
from ..validation import FLOAT_DTYPES, check_choice
from . import schedule, wire
from .wire import eager

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

# "auto": unit rows of all ranks beyond so many bytes go round the ring. They are sent one and a half times then, behind
# the products, and are never held; below it the memory is small change, and one collective is quicker than many
# messages.
RING_BYTES = 2**29


@dataclass(frozen=True)
class Sharding:
    """The ranks over which a batch is spread, and how rows travel between them; what `group=` of a loss takes.

    Args:
        group: a process group, or a DeviceMesh of one dimension. A loss takes either itself, too, for the defaults.
        strategy: "all_gather" holds the unit rows of all ranks, O(M D) memory for M rows in all; "ring" holds two other
            ranks' at a time, and sends them one and a half times, behind the products; "auto" is the ring from 512 MiB
            of rows.
        wire_dtype: None, or the dtype that rows are rounded to before they are compared: torch.bfloat16 halves the
            bytes. Values and gradients are then those of the rounded rows, the same on every rank; positives of two
            views are not rounded.
        check: at each call the ranks compare what they were given, and raise one error on all of them if it differs.
            False saves an exchange of 16 bytes, and the wait for it; every rank must then have the same number of rows.

    Raises:
        TypeError: group or wire_dtype is something else.
        ValueError: the mesh has several dimensions, this rank is not in the group, or the strategy is unknown.
        RuntimeError: torch.distributed is not available.

    Example:
        >>> import fastntxent
        >>> fastntxent.Sharding("everybody")
        Traceback (most recent call last):
            ...
        TypeError: group must be a ProcessGroup or a DeviceMesh, got str
    """

    group: ProcessGroup | DeviceMesh
    strategy: Strategy = "auto"
    wire_dtype: torch.dtype | None = None
    check: bool = True

    def __post_init__(self) -> None:
        process_group(self.group)
        check_choice("strategy", self.strategy, STRATEGIES)
        if self.wire_dtype is not None and self.wire_dtype not in FLOAT_DTYPES:
            raise TypeError(f"wire_dtype must be None or a floating-point dtype, got {self.wire_dtype}")

    def __deepcopy__(self, memo: dict[int, object]) -> Sharding:
        """A copy of a module has the same ranks: a process group cannot be copied."""
        return self


Group: TypeAlias = Union["ProcessGroup", "DeviceMesh", Sharding]


def process_group(group: object) -> ProcessGroup:
    """The process group that a person means."""
    if not dist.is_available():
        raise RuntimeError("group needs torch.distributed, which this PyTorch was built without")
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group must be a DeviceMesh of 1 dimension, got {group.ndim}: take one, mesh['name']")
        group = group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must be a process group that this rank belongs to")
    if not isinstance(group, dist.ProcessGroup):
        hint = ": dist.group.WORLD is None until init_process_group was called" if group is None else ""
        raise TypeError(f"group must be a ProcessGroup or a DeviceMesh, got {type(group).__name__}{hint}")
    return group


@dataclass(eq=False)
class Shard:
    """One call's view of the ranks. `samples` and `rows` have a number for each of them."""

    group: ProcessGroup
    rank: int
    samples: list[int]
    views: int
    ring: bool
    wire_dtype: torch.dtype | None
    _columns: list[tuple[Tensor, Columns]] = field(default_factory=list)

    @property
    def rows(self) -> list[int]:
        return [self.views * n for n in self.samples]

    @property
    def n_samples(self) -> int:
        return sum(self.samples)

    @property
    def n_rows(self) -> int:
        return sum(self.rows)

    def sample_ids(self, like: Tensor) -> Tensor:
        """The samples of this rank, counted over all ranks."""
        first = sum(self.samples[: self.rank])
        return torch.arange(first, first + self.samples[self.rank], device=like.device)

    def row_ids(self, like: Tensor) -> Tensor:
        """This rank's rows, view after view, counted over all ranks."""
        first = sum(self.rows[: self.rank])
        return torch.arange(first, first + self.rows[self.rank], device=like.device)

    def columns(self, u: Tensor) -> Columns:
        """This rank's rows as columns of all ranks. Two terms of a loss that ask for the same rows share them."""
        for known, columns in self._columns:
            if known is u:
                return columns
        columns = Columns(self, u)
        self._columns.append((u, columns))
        return columns

    def as_sent(self, u: Tensor) -> Tensor:
        """This rank's rows as the other ranks see them, with the gradient of the rows as they are."""
        if self.wire_dtype is None:
            return u
        return u + (u.to(self.wire_dtype).to(u.dtype) - u).detach()  # exact: a rounding is small beside its number

    @eager
    def gather(self, x: Tensor) -> Tensor:
        """One entry a row of this rank (M, ...) to those of all ranks."""
        return wire.all_gather(self.group, x, self.rows)


class Block(NamedTuple):
    """Rows (n, D) of one rank or of all, with what belongs to each."""

    span: slice  # where they are among the rows of all ranks
    rows: Tensor
    ids: Tensor
    numbers: tuple[Tensor, ...] = ()

    def part(self, span: slice) -> Block:
        """Those of a span of it."""
        here = slice(span.start - self.span.start, span.stop - self.span.start)
        return Block(span, self.rows[here], self.ids[here])


class Columns:
    """The rows of all ranks, block by block, with what else each block brings.

    It knows of the ranks, and not of the shard: that one holds the rows it was asked for, with their graph.
    """

    def __init__(self, shard: Shard, u: Tensor):
        self.group, self.rank, self.sizes, self.ring = shard.group, shard.rank, shard.rows, shard.ring
        self.spans = schedule.spans(self.sizes)
        self.dtype = accumulation_dtype(u.dtype)
        self._sent = u.detach().to(shard.wire_dtype or self.dtype)
        self._gathered: list[tuple[Tensor, Tensor]] = []

    @property
    def own(self) -> Tensor:
        """This rank's rows as the other ranks see them."""
        return self._sent.to(self.dtype)

    @property
    def span(self) -> slice:
        return self.spans[self.rank]

    @property
    def n_rows(self) -> int:
        return sum(self.sizes)

    def blocks(self, ids: Tensor, *numbers: Tensor) -> Iterator[Block]:
        """The rows of all ranks in one block, or of one rank after another, which are left out if they have none."""
        blocks = self._round(len(self.sizes) - 1, ids, *numbers) if self.ring else [self._all(ids, *numbers)]
        return (block for block in blocks if len(block.rows))

    def pairs(self, ids: Tensor) -> Iterator[tuple[Block, Block]]:
        """This rank's share of the pairs of rows, each of which is on one rank: all pairs between two blocks, or those
        within one that comes twice."""
        if self.ring:
            pairs = schedule.half_ring(self.rank, self.sizes)
            here, met = Block(self.span, self.own, ids), self._round(len(pairs) - 1, ids)
        else:
            pairs = schedule.triangle(self.rank, len(self.sizes), self.n_rows)
            here = self._all(ids)
            met = itertools.repeat(here, len(pairs))
        for block, (rows, cols) in zip(met, pairs, strict=True):
            if rows.start < rows.stop and cols.start < cols.stop:
                yield here.part(rows), block.part(cols)

    def exchange(self, numbers: Tensor) -> Tensor:
        """From a number of this rank for each row of all (M,) to those of all ranks for its own rows (ranks, m)."""
        return wire.exchange_numbers(self.group, numbers, self.sizes)

    def _all(self, ids: Tensor, *numbers: Tensor) -> Block:
        gathered = tuple(wire.all_gather(self.group, x, self.sizes) for x in numbers)
        return Block(slice(0, self.n_rows), self.whole(), self._once(ids), gathered)

    def _round(self, hops: int, ids: Tensor, *numbers: Tensor) -> Iterator[Block]:
        blocks = wire.ring(self.group, (self._sent, ids, *numbers), self.sizes, hops)
        for step, (rows, block_ids, *rest) in enumerate(blocks):
            yield Block(self.spans[self.rank - step], rows.to(self.dtype), block_ids, tuple(rest))

    @eager
    def whole(self) -> Tensor:
        """The rows of all ranks in one."""
        if self.ring:
            return wire.all_gather(self.group, self._sent, self.sizes).to(self.dtype)
        return self._once(self._sent).to(self.dtype)

    def _once(self, x: Tensor) -> Tensor:
        """Gathered, and kept for whoever asks again: another term of the loss, or the backward."""
        for known, gathered in self._gathered:
            if known is x:
                return gathered
        self._gathered.append((x, wire.all_gather(self.group, x, self.sizes)))
        return self._gathered[-1][1]


def open_shard(
    group: Group | None, function: str, rows: Tensor, backend: str, *, views: int = 1, **agreed: object
) -> Shard | None:
    """Settle with the other ranks what each holds: None without a group.

    `rows` (n, D) has one row for each of this rank's samples, of which a loss has `views`. `agreed` is everything else
    that must be the same on every rank.
    """
    if group is None:
        return None
    if backend == "reference":
        raise ValueError("backend 'reference' takes no group: it is the dense loss of one process")
    return _open(group, function, rows, views, agreed)


@eager
def _open(group: Group, function: str, rows: Tensor, views: int, agreed: dict[str, object]) -> Shard:
    sharding = group if isinstance(group, Sharding) else Sharding(group)
    of = process_group(sharding.group)
    samples = [len(rows)] * of.size()
    if sharding.check:
        facts = {
            "function": function,
            "features": rows.shape[-1],
            "dtype": rows.dtype,
            "requires_grad": rows.requires_grad and torch.is_grad_enabled(),
            "strategy": sharding.strategy,
            "wire_dtype": sharding.wire_dtype,
            "views": views,
            **agreed,
        }
        described = {name: _describe(fact) for name, fact in facts.items()}
        digest = hashlib.sha256(repr(sorted(described.items())).encode()).digest()[:8]
        header = torch.tensor([len(rows), int.from_bytes(digest, "big", signed=True)], device=rows.device)
        headers = wire.gather_numbers(of, header).tolist()
        if len({digest for _, digest in headers}) > 1:
            raise ValueError(_disagreement(wire.gather_objects(of, described)))
        samples = [n for n, _ in headers]
    if sum(samples) == 0:
        raise ValueError(f"{function} must have a row on one of the {of.size()} ranks at least, got none")
    dtype = sharding.wire_dtype or accumulation_dtype(rows.dtype)
    size = sum(samples) * views * rows.shape[-1] * dtype.itemsize
    ring = sharding.strategy == "ring" or (sharding.strategy == "auto" and size > RING_BYTES)
    return Shard(of, of.rank(), samples, views, ring, sharding.wire_dtype)


def _describe(fact: object) -> str:
    """A value as it is shown and compared. A tensor on an accelerator is not read."""
    if not isinstance(fact, Tensor):
        return repr(fact)
    number = repr(fact.item()) if fact.ndim == 0 and fact.device.type == "cpu" else f"a tensor ({fact.ndim}-d)"
    return number + (", requires_grad" if fact.requires_grad and torch.is_grad_enabled() else "")


def _disagreement(described: Sequence[dict[str, str]]) -> str:
    if len({of_rank["function"] for of_rank in described}) > 1:  # whose other facts are no others' either
        described = [{"function": of_rank["function"]} for of_rank in described]
    parts = []
    for name in sorted({name for of_rank in described for name in of_rank}):
        ranks: dict[str, list[str]] = {}
        for rank, of_rank in enumerate(described):
            ranks.setdefault(of_rank.get(name, "not given"), []).append(str(rank))
        if len(ranks) > 1:
            values = "; ".join(f"{value} on rank {', '.join(which)}" for value, which in ranks.items())
            parts.append(f"{name} is {values}")
    return "the ranks must be given the same: " + ". ".join(parts)
