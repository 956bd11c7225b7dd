"""How a batch is spread across ranks: the user's options, and the number of rows on each rank in one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeAlias, Union

import torch
import torch.distributed as dist
from torch import Tensor

from ..algebra import accumulation_dtype
from ..options import STRATEGIES, Strategy
from ..validation import FLOAT_DTYPES, check_choice, check_flag
from . import wire
from .agreement import Turn, agree
from .columns import Columns, Partition
from .wire import uncompiled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

WORLD: Literal["world"] = "world"  # the default process group; the name can be used before the group exists

# With "auto", rows go around the ring if the unit rows of all ranks exceed this many bytes. The ring sends more bytes
# (for NT-Xent, about one and a half times as many), overlapped with the products, but no rank needs to hold all rows.
# Below this size memory matters little, and one collective is faster than many messages.
RING_BYTES = 2**29


@dataclass(frozen=True)
class Sharding:
    """The ranks over which a batch is spread, and how rows are sent between them. Pass it as a loss's `group=`.

    Args:
        group: A process group, a one-dimensional DeviceMesh, or "world" for the default process group, which is looked
            up at each call. A loss also takes any of these directly, with the default options.
        strategy: "all_gather" holds the unit rows of all ranks, O(M D) memory for M rows in total. "ring" holds the
            rows of two other ranks at a time and sends more bytes (for NT-Xent, about one and a half times as many),
            overlapped with the products. "auto" uses the ring above 512 MiB of rows.
        wire_dtype: Dtype to which rows are rounded before they are compared, or None. torch.bfloat16 halves the bytes.
            Values and gradients are then exact for the rounded rows, which are the same on every rank. Positives of two
            views are not rounded.
        check: Compare the arguments of all ranks at each call, and raise the same error on every rank if they differ.
            False saves exchanges of 32 bytes (one in the forward, one for each term in the backward) and the time spent
            waiting for them, but then every rank must have the same number of rows.

    Raises:
        TypeError: group, wire_dtype or check has the wrong type.
        ValueError: the mesh has several dimensions, this rank is not in the group, or the strategy or the name of the
            group is unknown.
        RuntimeError: torch.distributed is not available.

    Example:
        >>> import fastntxent
        >>> fastntxent.Sharding("everybody")
        Traceback (most recent call last):
            ...
        ValueError: group must be 'world' if it is a string, got 'everybody'
    """

    group: ProcessGroup | DeviceMesh | Literal["world"]
    strategy: Strategy = "auto"
    wire_dtype: torch.dtype | None = None
    check: bool = True

    def __post_init__(self) -> None:
        if self.group != WORLD:  # the default group may not exist yet
            process_group(self.group)
        check_choice("strategy", self.strategy, STRATEGIES)
        if self.wire_dtype is not None and self.wire_dtype not in FLOAT_DTYPES:
            raise TypeError(f"wire_dtype must be None or a floating-point dtype, got {self.wire_dtype}")
        check_flag("check", self.check)

    def __deepcopy__(self, memo: dict[int, object]) -> Sharding:
        """Return self: a process group cannot be copied, and a copied module keeps its ranks."""
        return self


Group: TypeAlias = Union["ProcessGroup", "DeviceMesh", Sharding, Literal["world"]]


def process_group(group: object) -> ProcessGroup:
    """Return the process group that a `group=` argument stands for. For a `Sharding`, pass its `group`."""
    if not dist.is_available():
        raise RuntimeError("group needs torch.distributed, which this PyTorch was built without")
    if group == WORLD:
        if not dist.is_initialized():
            raise RuntimeError("group 'world' needs torch.distributed.init_process_group to be called before the loss")
        group = dist.group.WORLD
    if isinstance(group, str):
        raise ValueError(f"group must be 'world' if it is a string, got {group!r}")
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group must be a one-dimensional DeviceMesh, got {group.ndim}-d: pass mesh['name']")
        group = group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must be a process group that this rank belongs to")
    if not isinstance(group, dist.ProcessGroup):
        hint = ": dist.group.WORLD is None before init_process_group; pass 'world' instead" if group is None else ""
        raise TypeError(f"group must be a ProcessGroup, a DeviceMesh or 'world', got {type(group).__name__}{hint}")
    return group


@dataclass(eq=False)
class Shard:
    """One call's view of the ranks. `samples` and `sizes` are the numbers of samples and rows on each rank."""

    group: ProcessGroup
    sharding: Sharding
    rank: int
    samples: list[int]
    views: int
    ring: bool
    wire_dtype: torch.dtype | None
    turn: Turn
    by_rank: bool = False
    _columns: list[tuple[Tensor, Columns]] = field(default_factory=list)

    @property
    def sizes(self) -> list[int]:
        return [self.views * n for n in self.samples]

    @property
    def n_samples(self) -> int:
        return sum(self.samples)

    @property
    def n_rows(self) -> int:
        return sum(self.sizes)

    def sample_ids(self, like: Tensor) -> Tensor:
        """Return the indices of this rank's samples among the samples of all ranks."""
        first = sum(self.samples[: self.rank])
        return torch.arange(first, first + self.samples[self.rank], device=like.device)

    def row_ids(self, like: Tensor) -> Tensor:
        """Return the indices of this rank's rows, view after view, among the rows of all ranks."""
        first = sum(self.sizes[: self.rank])
        return torch.arange(first, first + self.sizes[self.rank], device=like.device)

    def in_blocks(self) -> Shard:
        """Return a copy whose columns come in one block per rank. Each similarity is then computed by matrix products
        of the same shape in forward and backward, for its row and for its column, so it has the same bits each time."""
        return replace(self, by_rank=True, _columns=[])

    def columns(self, u: Tensor) -> Columns:
        """Return the columns of all ranks for this rank's rows u. Terms of a loss that pass the same u share the
        columns."""
        for known, columns in self._columns:
            if known is u:
                return columns
        dtype = accumulation_dtype(u.dtype)
        partition = Partition(self.group, self.rank, self.sizes, self.ring, dtype, self.turn, self.by_rank)
        # If u already has this dtype, the result shares u's memory, so a change of u in place is detected.
        columns = Columns(partition, u.detach().resolve_neg().to(self.wire_dtype or dtype))
        self._columns.append((u, columns))
        return columns

    def as_sent(self, u: Tensor) -> Tensor:
        """Return this rank's rows as the other ranks see them, with a straight-through gradient to u."""
        if self.wire_dtype is None:
            return u
        # The sum equals the rounded value exactly: u and its rounded value are close, so their difference is exact.
        return u + (u.to(self.wire_dtype).to(u.dtype) - u).detach()

    @uncompiled
    def gather(self, x: Tensor) -> Tensor:
        """Return the entries of all ranks, given one entry per sample of this rank (N, ...)."""
        return wire.all_gather(self.group, x, self.samples)


@uncompiled
def open_shard(
    group: Group, function: str, rows: Mapping[str, Tensor], views: int, agreed: Mapping[str, object]
) -> Shard:
    """Return the shard. Unless `Sharding.check` is False, the ranks first compare their calls and exchange their
    numbers of samples.

    Each tensor of `rows`, (n, D), has one row for each sample of this rank. The loss compares `views` rows for each
    sample. `agreed` is everything else that must be the same on every rank.
    """
    sharding = group if isinstance(group, Sharding) else Sharding(group)
    of = process_group(sharding.group)
    first = next(iter(rows.values()))
    facts = {
        "features": first.shape[-1],
        "dtype": first.dtype,
        **{f"{name}.requires_grad": x.requires_grad and torch.is_grad_enabled() for name, x in rows.items()},
        "strategy": sharding.strategy,
        "wire_dtype": sharding.wire_dtype,
        "views": views,
        "function": function,
        **agreed,
    }
    turn, samples = agree(of, function, len(first), facts if sharding.check else None, first.device)
    if sum(samples) == 0:
        raise ValueError(f"{function} must have at least one row on the {of.size()} ranks together, got none")
    dtype = sharding.wire_dtype or accumulation_dtype(first.dtype)
    size = sum(samples) * views * first.shape[-1] * dtype.itemsize
    ring = sharding.strategy == "ring" or (sharding.strategy == "auto" and size > RING_BYTES)
    return Shard(of, sharding, of.rank(), samples, views, ring, sharding.wire_dtype, turn)
