"""The batch that losses see when its rows are spread across ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..batch import Batch
from ..scale import is_per_row
from ..sides import CalledTeacher, Guide, Side, Teacher
from . import groups, guided, limited, neg_lse, numbers, positives, soft_targets, softplus, wire
from .shard import Group, Shard, open_shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ShardedBatch(Batch):
    """This rank's rows among the rows of all ranks. The arguments and results of a method are for this rank's rows
    only, unless its docstring says otherwise."""

    def __init__(
        self, rows: Tensor, views: int, reduction: str, normalize: bool, backend: str, shard: Shard, function: str
    ):
        super().__init__(rows, views, reduction, normalize)
        self._backend, self._shard, self._function = backend, shard, function

    @classmethod
    def open(
        cls,
        group: Group,
        function: str,
        rows: Mapping[str, Tensor],
        views: int,
        reduction: str,
        normalize: bool,
        backend: str,
        agreed: Mapping[str, object],
    ) -> ShardedBatch:
        """Return the batch. Unless `Sharding.check` is False, the ranks first compare their calls and exchange their
        numbers of samples."""
        options = {"reduction": reduction, "normalize": normalize, **agreed}
        shard = open_shard(group, function, rows, views, options)
        return cls(next(iter(rows.values())), views, reduction, normalize, backend, shard, function)

    def beside(self, rows: Tensor) -> ShardedBatch:
        return ShardedBatch.open(
            self._shard.sharding, self._function, {"rows": rows}, 1, self.reduction, self.normalize, self._backend, {}
        )

    def in_tiles(self) -> ShardedBatch:
        options = self.views, self.reduction, self.normalize, "blocked"
        return ShardedBatch(self.first, *options, self._shard.in_blocks(), self._function)

    # --- rows and numbers -------------------------------------------------------------------------------------------

    @property
    def group(self) -> ProcessGroup:
        """The process group."""
        return self._shard.group

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return self._shard.rank

    @property
    def sizes(self) -> list[int]:
        """The number of rows on each rank."""
        return self._shard.sizes

    @property
    def n_samples(self) -> int:
        return self._shard.n_samples

    def sample_ids(self) -> Tensor:
        return self._shard.sample_ids(self.first)

    def row_ids(self) -> Tensor:
        return self._shard.row_ids(self.first)

    def _replicated(self, value: float | Tensor) -> float | Tensor:
        return value if not isinstance(value, Tensor) or is_per_row(value) else numbers.replicated(value, self._shard)

    def as_compared(self, u: Tensor) -> Tensor:
        return self._shard.as_sent(u)

    def all_rows(self, u: Tensor) -> Tensor:
        return self._shard.columns(u).whole()

    def gather(self, x: Tensor) -> Tensor:
        return self._shard.gather(x.detach())

    @wire.uncompiled
    def gather_ragged(self, x: Tensor) -> Tensor:
        """Return the entries (n, ...) of all ranks, where each rank may have a different number of them."""
        counts = wire.gather_numbers(self.group, torch.tensor(len(x), device=x.device)).tolist()
        return wire.all_gather(self.group, x, counts)

    # --- log-sum-exps -----------------------------------------------------------------------------------------------

    def _neg_lse(self, u: Tensor, ids: Tensor, inv_tau: float | Tensor) -> Tensor:
        return neg_lse.neg_lse(u, ids, inv_tau, self._shard, self._backend)

    def _neg_lse_to(self, rows: Side, cols: Side, inv_tau: float | Tensor, of_cols: Batch) -> Tensor:
        shards = self._shard, _shard_of(of_cols)
        return neg_lse.cross_neg_lse(rows, cols, inv_tau, *shards, self._backend, both=False)[0]

    def cross_neg_lse(
        self, rows: Side, cols: Side, inv_tau: float | Tensor, *, beside: Batch | None = None
    ) -> tuple[Tensor, Tensor]:
        shards = self._shard, _shard_of(beside or self)
        return neg_lse.cross_neg_lse(rows, cols, inv_tau, *shards, self._backend)

    def _limited_neg_lse(
        self, rows: Side, cols: Side | None, inv_tau: float | Tensor, of_cols: Batch, *, both: bool
    ) -> tuple[Tensor, Tensor]:
        shards = self._shard, _shard_of(of_cols)
        if cols is None:
            return limited.limited_neg_lse(rows, rows, inv_tau, *shards, self._backend), rows.u.new_empty(0)
        nu_rows = limited.limited_neg_lse(rows, cols, inv_tau, *shards, self._backend)
        if not both:
            return nu_rows, cols.u.new_full((len(cols.u),), -torch.inf)
        return nu_rows, limited.limited_neg_lse(cols, rows, inv_tau, *shards, self._backend)

    def neg_lse_to_held(self, rows: Side, cols: Side, inv_tau: float | Tensor, held: Tensor | None = None) -> Tensor:
        if not len(rows.u):
            return rows.u.new_empty(0)
        return ops.held_neg_lse(rows.u, cols.u, rows.ids, cols.ids, held, inv_tau, self._backend)

    def guided_neg_lse(
        self, rows: Side, cols: Side, inv_tau: float | Tensor, guide: Guide, *, beside: Batch | None = None
    ) -> Tensor:
        return guided.guided_neg_lse(rows, cols, inv_tau, guide, self._shard, _shard_of(beside or self))

    # --- positives and groups ---------------------------------------------------------------------------------------

    def all_dots(self, u: Tensor, v: Tensor, *, beside: Batch | None = None) -> Tensor:
        u_ids, v_ids = (x.new_zeros(len(x), dtype=torch.int64) for x in (u, v))
        return groups.group_dots(u, v, u_ids, v_ids, self._shard, _shard_of(beside or self))

    def group_dots(self, u: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        return groups.group_dots(u, v, ids, ids, self._shard, self._shard)

    def positive_dots(self, u: Tensor, ids: Tensor) -> Tensor:
        return groups.positive_dots(u, ids, self._shard)

    def group_counts(self, ids: Tensor) -> Tensor:
        return groups.group_counts(ids, self._shard)

    def positive_lse(self, u: Tensor, ids: Tensor, inv_tau: float | Tensor) -> Tensor:
        return positives.positive_lse(u, ids, inv_tau, self._shard)

    def _positive_lse_to(self, rows: Side, cols: Side, inv_tau: float | Tensor) -> Tensor:
        return positives.positive_lse_to(rows, cols, inv_tau, self._shard)

    def positive_sum(self, u: Tensor, ids: Tensor, inv_tau: float | Tensor, nu: Tensor) -> Tensor:
        return positives.positive_sum(u, ids, inv_tau, nu, self._shard)

    def softplus_sums(
        self, rows: Side, cols: Side | None, inv_tau: float | Tensor, bias: Tensor, *, positives: bool
    ) -> Tensor:
        return softplus.softplus_sums(rows, cols, inv_tau, bias, self._shard, self._backend, positives=positives)

    def called_neg_lse(
        self, similarities: Callable[[Tensor, Tensor], Tensor], inv_tau: float | Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        return soft_targets.called_neg_lse(similarities, inv_tau, self.sample_ids(), dtype, self._shard)

    def soft_dots(self, rows: Side, cols: Side, teacher: Teacher | CalledTeacher) -> tuple[Tensor, Tensor]:
        return soft_targets.soft_dots(rows, cols, teacher, self._shard.in_blocks())

    # --- sums and losses --------------------------------------------------------------------------------------------

    def total(self, x: Tensor) -> Tensor:
        return numbers.all_sum(x.sum(), self._shard)

    def sum_of_ranks(self, x: Tensor) -> Tensor:
        return numbers.sum_of_ranks(x, self._shard)

    def log_sum_exp(self, x: Tensor) -> Tensor:
        return numbers.log_sum_exp(x, self._shard)

    def _mean(self, x: Tensor) -> Tensor:
        return self.total(x) / self._shard.n_rows


def _shard_of(batch: Batch) -> Shard:
    assert isinstance(batch, ShardedBatch)
    return batch._shard
