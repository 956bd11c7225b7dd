"""A queue of embeddings of past batches, and the loss that takes negatives from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..backends.base import row_dots, row_losses
from ..common import inverse_temperature, log_add, neg_lse_of_columns, reduce, sample_ids, unit_rows
from ..distributed import Group, open_shard
from ..options import BackendName, Reduction
from ..validation import check_features, check_ids, check_rows, check_same
from .base import TemperatureLoss

_NO_ID = torch.iinfo(torch.int64).min  # of an entry without an id: no query has it
_NO_GROUP = _NO_ID + 1  # of a query without one: no entry has it


class NegativeQueue(nn.Module):
    """The last `size` rows that were given to it, first in, first out.

    Rows, ids, the pointer and how far it is filled are in its `state_dict`; a restored queue goes on as the saved one
    would have. Its buffers follow `.to(device)` and `.half()`; the pointer stays in host memory, so nothing waits for
    the device.

    Args:
        size: rows held.
        dim: features of a row.
        dtype: of the rows held. They are normalised in float32 before they are rounded to it, and compared in the dtype
            that the loss computes in.
        normalize: whether rows are scaled to unit length as they come in.

    Example:
        >>> import torch, fastntxent
        >>> queue = fastntxent.NegativeQueue(3, 2)
        >>> queue.push(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> len(queue), queue.rows
        (2, tensor([[1., 0.],
                [0., 1.]]))
    """

    def __init__(self, size: int, dim: int, *, dtype: torch.dtype = torch.float32, normalize: bool = True):
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
        self.size = size
        self.normalize = normalize
        self.pointer = 0  # where the next row goes
        self.filled = 0  # rows held
        self._rows: Tensor
        self._ids: Tensor
        self.register_buffer("_rows", torch.zeros(size, dim, dtype=dtype))
        self.register_buffer("_ids", torch.full((size,), _NO_ID))

    def __len__(self) -> int:
        return self.filled

    @property
    def rows(self) -> Tensor:
        """(len, D), a view of what is held, in no particular order."""
        return self._rows[: self.filled]

    @property
    def ids(self) -> Tensor:
        """(len,) int64: the ids that the rows came with; the smallest int64 for none."""
        return self._ids[: self.filled]

    @torch.no_grad()
    def push(self, z: Tensor, ids: Tensor | None = None) -> None:
        """Take rows (N, D) in, with ids (N,) if they have any. Of more rows than fit, the last stay."""
        check_rows("z", z)
        check_features("z", z, "the queue's rows", self._rows)
        if ids is not None:
            check_ids("ids", ids, "z", z)
        rows = unit_rows(z, self.normalize)[-self.size :]
        N = rows.shape[0]
        new_ids = torch.full((N,), _NO_ID) if ids is None else ids[-self.size :]
        first = min(N, self.size - self.pointer)  # the rest goes to the beginning
        for held, new in ((self._rows, rows), (self._ids, new_ids)):
            held[self.pointer : self.pointer + first] = new[:first].to(held)
            held[: N - first] = new[first:].to(held)
        self.pointer = (self.pointer + N) % self.size
        self.filled = min(self.filled + N, self.size)

    def neg_lse(self, u: Tensor, ids: Tensor | None, inv_tau: Tensor, backend: str) -> Tensor:
        """nu of unit rows u (N, D) against the rows held; -inf while there are none. No gradient reaches the queue.

        Without ids, or against a row that came without one, every row held is a negative.
        """
        if not self.filled or not len(u):
            return u.new_full((u.shape[0],), -torch.inf)
        if ids is None:
            ids = torch.full((u.shape[0],), _NO_GROUP, device=u.device)
        # A copy: the backward needs these rows, and the queue moves on before it.
        held = self.rows.to(u, copy=True)
        return neg_lse_of_columns(u, held, ids.to(torch.int64), self.ids.clone(), inv_tau, backend)

    def get_extra_state(self) -> Tensor:
        """Pointer and fill, for `state_dict`."""
        return torch.tensor([self.pointer, self.filled])

    def set_extra_state(self, state: Tensor) -> None:
        """Pointer and fill, from `load_state_dict`."""
        pointer, filled = state.tolist()
        if not (0 <= pointer < self.size and 0 <= filled <= self.size):
            raise ValueError(f"a queue of {self.size} rows cannot hold {filled} with its pointer at {pointer}")
        self.pointer, self.filled = pointer, filled

    def extra_repr(self) -> str:
        size, dim = self._rows.shape
        return f"{size}, {dim}, dtype={self._rows.dtype}, normalize={self.normalize}, filled={self.filled}"


class QueueInfoNCELoss(TemperatureLoss):
    r"""InfoNCE against a queue of past keys, as MoCo does, and against the batch's own keys.

    .. math:: L_n = \log\big(1 + e^{\nu_n - s_n/\tau}\big), \qquad
        e^{\nu_n} = \sum_{\text{queue}} e^{q_n \cdot k_j/\tau} + \sum_{m \ne n} e^{q_n \cdot k_m/\tau}

    He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", 2020, where negatives are the
    queue's alone (`in_batch_negatives=False`). The mean is 1/N, from queries to keys.

    In training mode each call's keys go into the queue after the loss is formed; in evaluation mode it stays as it is.

    Args:
        size, dim: of the queue, rows and features; see `NegativeQueue`.
        in_batch_negatives: whether the other samples' keys of the batch are negatives too.
        queue_dtype: of the rows held.
        group: as in `nt_xent`; every rank's queue takes the keys of all ranks, so that all hold the same.
        temperature and the others: as of `NTXentLoss`.

    Its call takes query and key, (N, D), and `ids` (N,): keys with a query's id, in the queue and in the batch, are no
    negatives of it. Deterministic; memory O((N + size) D).

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.QueueInfoNCELoss(8, 4, temperature=1.0)
        >>> loss(torch.eye(4), torch.eye(4))  # an empty queue: log(e + 3) - 1
        tensor(0.7437)
        >>> loss(torch.eye(4), torch.eye(4))  # now each key twice, once as a negative: log(2 e + 6) - 1
        tensor(1.4368)
    """

    _shown = ("in_batch_negatives",)

    def __init__(
        self,
        size: int,
        dim: int,
        temperature: float | Tensor = 0.1,
        *,
        in_batch_negatives: bool = True,
        queue_dtype: torch.dtype = torch.float32,
        reduction: Reduction = "mean",
        normalize: bool = True,
        backend: BackendName = "auto",
        group: Group | None = None,
        learn_temperature: bool = False,
    ):
        super().__init__(
            temperature,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            group=group,
            learn_temperature=learn_temperature,
        )
        self.in_batch_negatives = in_batch_negatives
        self.queue = NegativeQueue(size, dim, dtype=queue_dtype, normalize=normalize)

    def forward(self, query: Tensor, key: Tensor, ids: Tensor | None = None) -> Tensor:
        check_rows("query", query, may_be_empty=self.group is not None)
        check_rows("key", key, may_be_empty=self.group is not None)
        check_same("query", query, "key", key, "shape", "dtype", "device")
        check_features("query", query, "the queue's rows", self.queue._rows)
        if ids is not None:
            check_ids("ids", ids, "query", query)
        shard = open_shard(
            self.group, "QueueInfoNCELoss", query, self.backend, temperature=self.temperature,
            reduction=self.reduction, normalize=self.normalize, in_batch_negatives=self.in_batch_negatives,
            ids_given=ids is not None, key_requires_grad=key.requires_grad, queue_filled=len(self.queue),
        )  # fmt: skip
        inv_tau = inverse_temperature(self.temperature, query, shard=shard)
        u, v = unit_rows(query, self.normalize), unit_rows(key, self.normalize)
        nu = self.queue.neg_lse(u, ids, inv_tau, self.backend)
        if self.in_batch_negatives:
            groups = sample_ids(u, shard) if ids is None else ids
            nu = log_add(nu, neg_lse_of_columns(u, v, groups, groups, inv_tau, self.backend, shard, shard))
        losses = row_losses(nu, inv_tau * row_dots(u, v))
        if self.training:
            if shard:  # the keys of all ranks, in their order: every rank holds the same queue
                key, ids = shard.columns(v).whole(), None if ids is None else shard.gather(ids)
            self.queue.push(key, ids)
        return reduce(losses, self.reduction, shard=shard)
