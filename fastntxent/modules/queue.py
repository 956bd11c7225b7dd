"""A queue of embeddings of past batches, and a loss that takes negatives from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import accumulation_dtype, log_add, row_dots, row_losses, unit_rows
from ..batch import Batch
from ..opening import open_batch
from ..ops import copy_now, tracing
from ..options import BackendName
from ..sides import Side
from ..validation import ID_DTYPES, check_features, check_flag, check_ids, check_integer, check_rows
from ..watching import watch
from .base import ModuleOptions, TemperatureLoss, Unpack

_NO_ID = torch.iinfo(torch.int64).min  # the id of a row pushed without one: matches no query
_NO_GROUP = _NO_ID + 1  # the id of queries without ids: matches no stored row


class NegativeQueue(nn.Module):
    """A queue of the last `size` rows that were pushed, first in, first out.

    Its `state_dict` holds the rows, their ids, the pointer (the index at which the next row is written) and the fill
    (the number of rows held). A restored queue continues as the saved one would have. A restore loads the whole state
    or nothing. If a key is missing, or the state does not fit the queue or contradicts itself, the queue stays as it
    was, and `load_state_dict` reports why.

    The buffers follow `.to(device)` and `.half()`. The pointer and the fill stay in host memory, so nothing waits for
    the device. Moving the queue to the meta device empties it, and so does `to_empty()` from there.

    No gradient reaches the queue. `QueueInfoNCELoss` is a loss that uses a queue.

    Args:
        size: The number of rows that the queue holds, at least 1.
        dim: The number of features of a row, at least 1.
        dtype: The floating-point dtype of the rows held. Rows are normalised in float32 (float64 rows in float64)
            before they are rounded to this dtype, and are compared in the dtype in which the loss computes.
        normalize: Whether rows are scaled to unit length when they are pushed.

    Raises:
        TypeError: `size` or `dim` is not an int, `dtype` is not a floating-point dtype, or `normalize` is not a bool.
        ValueError: `size` or `dim` is below 1.

    Example:
        >>> import torch, fastntxent
        >>> queue = fastntxent.NegativeQueue(3, 2)
        >>> queue.push(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> len(queue), queue.rows
        (2, tensor([[1., 0.],
                [0., 1.]]))
    """

    @torch.inference_mode(False)  # buffers made in inference mode could not be written to outside it
    def __init__(self, size: int, dim: int, *, dtype: torch.dtype = torch.float32, normalize: bool = True):
        super().__init__()
        size, dim = check_integer("size", size, 1), check_integer("dim", dim, 1)
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
        self.size = size
        self.normalize = check_flag("normalize", normalize)
        self._rows: Tensor
        self._ids: Tensor
        self.register_buffer("_rows", torch.zeros(size, dim, dtype=dtype))
        self.register_buffer("_ids", torch.full((size,), _NO_ID))
        # The index of the next row, and the number of rows held. This is a tensor, because torch.compile recompiles for
        # each value of a Python number. It is not a buffer, because it stays in host memory.
        self._cursor = torch.zeros(2, dtype=torch.int64, device="cpu")

    def __len__(self) -> int:
        return self.filled

    @property
    def pointer(self) -> int:
        """The index at which the next row is written."""
        return int(self._cursor[0])

    @property
    def filled(self) -> int:
        """The number of rows held."""
        return int(self._cursor[1])

    @property
    def rows(self) -> Tensor:
        """The rows held, (filled, D), in no particular order: a view of the buffer."""
        return self._rows[: self.filled]

    @property
    def ids(self) -> Tensor:
        """The ids of the rows held, (filled,) int64; the smallest int64 for a row pushed without an id."""
        return self._ids[: self.filled]

    @torch.no_grad()
    def push(self, z: Tensor, ids: Tensor | None = None) -> None:
        """Push rows into the queue. If there are more than `size` rows, only the last `size` of them are stored.

        The values are not checked: a row with a NaN makes losses NaN for as long as it is in the queue.

        Args:
            z: (N, D) rows, float16, bfloat16, float32 or float64.
            ids: (N,) integers, the group of each row. None: the rows are negatives of every query.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: a shape does not fit, `ids` is not on the device of `z`, or `z` is on the meta device and the
                queue is not.
            RuntimeError: torch.jit.trace is tracing. A trace would replay the first push.
        """
        if tracing():
            raise RuntimeError(
                "NegativeQueue.push must not be called under torch.jit.trace, which would replay the first push"
            )
        check_rows("z", z)
        check_features("z", z, "the queue's rows", self._rows)
        if z.is_meta and not self._rows.is_meta:
            raise ValueError(f"z must hold values for a queue on {self._rows.device}, got a tensor on the meta device")
        if ids is not None:
            check_ids("ids", ids, "z", z)
        pointer, filled = self._cursor.unbind()
        # Everything that can fail comes before the first change.
        rows = unit_rows(z[-self.size :], self.normalize).to(self._rows)
        N = rows.shape[0]
        new_ids = self._ids.new_full((N,), _NO_ID) if ids is None else ids[-self.size :].to(self._ids)
        places = (pointer + torch.arange(N, device=rows.device)) % self.size
        cursor = torch.stack(((pointer + N) % self.size, (filled + N).clamp(max=self.size)))
        self._rows[places] = rows
        self._ids[places] = new_ids
        self._cursor.copy_(cursor)

    def neg_lse(self, u: Tensor, ids: Tensor | None, inv_tau: float | Tensor, backend: BackendName) -> Tensor:
        """Return nu of unit rows against the rows held: the log-sum-exp of their logits.

        Args:
            u: (N, D) unit rows.
            ids: (N,) integers, the group of each row. Rows of the same group in the queue do not count. None: every row
                held counts.
            inv_tau: 1 / temperature, a float or a 0-d tensor.
            backend: "auto", which chooses one for the device, or a name from `backends()`.

        Returns:
            A tensor (N,), float64 for float64 rows, else float32; -inf where no row held counts, as in an empty queue.
            No gradient reaches the queue.
        """
        batch = open_batch(None, "NegativeQueue.neg_lse", {"u": u}, ids=ids, normalize=False, backend=backend)
        return self.neg_lse_of(batch, u, ids, inv_tau)

    def neg_lse_of(self, batch: Batch, u: Tensor, ids: Tensor | None, inv_tau: float | Tensor) -> Tensor:
        """Like `neg_lse`, for rows of a batch that is already open."""
        sides = self.sides_of(u, ids)
        if sides is None or not len(u):
            return u.new_full((u.shape[0],), -torch.inf, dtype=accumulation_dtype(u.dtype))
        rows, cols, held = sides
        return batch.neg_lse_to_held(rows, cols, inv_tau, held)

    def sides_of(self, u: Tensor, ids: Tensor | None) -> tuple[Side, Side, Tensor] | None:
        """Return the rows, a snapshot of the queue and how many of its rows count. Return None if the queue is empty,
        except under torch.compile."""
        # Compiled code uses the whole buffer, whose shape never changes.
        first = self.size if torch.compiler.is_compiling() else self.filled
        if not first:
            return None
        if ids is None:
            ids = torch.full((u.shape[0],), _NO_GROUP, device=u.device)
        # Copies, because the backward needs them after the queue has changed.
        rows, row_ids, held = map(copy_now, (self._rows[:first], self._ids[:first], self._cursor[1]))
        queue = Side(rows.to(u), row_ids.to(u.device))
        return Side(u, ids.to(torch.int64)), queue, held

    def get_extra_state(self) -> Tensor:
        """Return the pointer and the fill for `state_dict`. Like the buffers in a `state_dict`, they are not copied and
        change with the queue."""
        return self._cursor

    def set_extra_state(self, state: Tensor) -> None:
        """Set the pointer and the fill from `load_state_dict`."""
        self._cursor.copy_(self._checked_cursor("state", state))

    def _checked_cursor(self, name: str, saved: object) -> Tensor:
        """Return a saved pointer and fill, checked against this queue's size."""
        if not isinstance(saved, Tensor) or saved.dtype not in ID_DTYPES or saved.shape != (2,) or saved.is_meta:
            raise TypeError(f"{name} must be a tensor of two integers, a queue's pointer and fill, got {saved!r}")
        pointer, filled = saved.tolist()
        follows = pointer == filled if filled < self.size else pointer < self.size
        if pointer < 0 or filled > self.size or not follows:
            raise ValueError(f"{name}: a queue of {self.size} rows cannot hold {filled} with its pointer at {pointer}")
        return saved

    def _checked_state(self, saved: dict[str, Any], assign: bool) -> dict[str, Tensor]:
        """Return a saved queue's rows, ids and cursor by their keys. Raise unless they fit this queue and each
        other."""
        (rows_key, rows), (ids_key, ids), (cursor_key, cursor) = saved.items()
        for key, value, own in ((rows_key, rows, self._rows), (ids_key, ids, self._ids)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{key} must be a torch.Tensor, got {type(value).__name__}")
            if value.shape != own.shape:
                raise ValueError(f"{key} must have shape {tuple(own.shape)}, got {tuple(value.shape)}")
            if value.is_floating_point() != own.is_floating_point() or value.dtype == torch.bool:
                raise TypeError(f"{key} must have a dtype like {own.dtype}, got {value.dtype}")
            if value.is_meta or (own.is_meta and not assign):
                raise ValueError(f"{key} must not be on the meta device, nor must the queue unless assign=True")
        filled = int(self._checked_cursor(cursor_key, cursor)[1])
        held = rows[:filled] if assign else rows[:filled].to(self._rows.dtype)
        if not held.to(accumulation_dtype(held.dtype)).isfinite().all():
            raise ValueError(f"{rows_key} must be finite in {held.dtype}")
        # Clone tensors that are assigned: they become the queue's buffers, which pushes change in place.
        return {key: value.detach().clone() if assign else value for key, value in saved.items()}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load a whole queue. If the saved one does not fit, keep this queue's state and report why."""
        own = {prefix + "_rows": self._rows, prefix + "_ids": self._ids, prefix + "_extra_state": self._cursor}
        missing = [key for key in own if key not in state_dict]
        missing_keys.extend(missing)
        if not missing:
            try:
                own = self._checked_state(
                    {key: state_dict[key] for key in own}, local_metadata.get("assign_to_params_buffers", False)
                )
            except (TypeError, ValueError) as error:
                error_msgs.append(str(error))
        super()._load_from_state_dict(
            {**state_dict, **own}, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NegativeQueue:
        without_data = self._rows.is_meta
        super()._apply(fn, recurse)
        if without_data or self._rows.is_meta:
            self._cursor.zero_()
        return self

    def extra_repr(self) -> str:
        size, dim = self._rows.shape
        return f"{size}, {dim}, dtype={self._rows.dtype}, normalize={self.normalize}, filled={self.filled}"


class QueueInfoNCELoss(TemperatureLoss):
    r"""InfoNCE against a queue of past keys, as in MoCo, and against the batch's own keys.

    .. math::
        L_n = \log(1 + e^{\nu_n - s_n/\tau}), \quad
        e^{\nu_n} = \sum_{\text{queue}} e^{q_n \cdot k_j/\tau} + \sum_{m \ne n} e^{q_n \cdot k_m/\tau}

    He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", 2020, where the negatives come from
    the queue alone (`in_batch_negatives=False`). s_n is the similarity of query n to its own key.

    In training mode each call computes the loss and then pushes its keys; in evaluation mode the queue does not change.

    On the same device with the same number of threads, the same input gives the same bits. Extra memory is O((N + size)
    D); the reference backend takes O(N (N + size)).

    Call it as `loss(query, key, ids=None)`; `forward` describes the arguments.

    Args:
        size: The number of rows that the queue holds, at least 1.
        dim: The number of features of a row, at least 1.
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there. With `learn_temperature`, the value is
            read and initialises the parameter.
        in_batch_negatives: Whether the keys of other samples in the batch are negatives too.
        queue_dtype: The floating-point dtype of the rows in the queue.
        reduction: "mean" over the N queries, "sum", or "none" for one loss per query.
        normalize: True divides each row by max(||z||, 1e-12) like `torch.nn.functional.normalize` (by max(||z||,
            6.1e-5) in float16). False takes the rows as they are, and their products must not overflow.
        backend: "auto", which chooses one for the device, or a name from `backends()`.
        group: The ranks that hold the batch: "world" (the default process group, looked up at each call), a process
            group, a one-dimensional DeviceMesh, or a `Sharding`, which adds options. Each rank passes its own samples,
            any number of them, even none. Negatives come from all ranks. "mean" and "sum" cover the whole batch and are
            equal on every rank. Once DistributedDataParallel has averaged the parameters' gradients, these equal the
            gradients of one process with the whole batch. "none" returns this rank's losses. None: this rank's samples
            are the whole batch. Every rank's queue stores the keys of all ranks, so all queues stay equal.
        learn_temperature: Make the temperature a parameter. It is stored as its logarithm, `log_temperature`, so no
            optimiser step can make it negative. Exclude it from weight decay.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a number is out of range, or an option is unknown.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.QueueInfoNCELoss(8, 4, temperature=1.0)
        >>> loss(torch.eye(4), torch.eye(4))  # the queue is empty: log(e + 3) - 1
        tensor(0.7437)
        >>> loss(torch.eye(4), torch.eye(4))  # now the queue holds the keys too: log(2 e + 6) - 1
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
        **options: Unpack[ModuleOptions],
    ):
        super().__init__(temperature, **options)
        self.in_batch_negatives = check_flag("in_batch_negatives", in_batch_negatives)
        self.queue = NegativeQueue(size, dim, dtype=queue_dtype, normalize=self.normalize)

    def forward(self, query: Tensor, key: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return the loss, and in training mode push the keys into the queue.

        Args:
            query: (N, D) embeddings of the queries, float16, bfloat16, float32 or float64. Row n belongs to sample n.
            key: (N, D) embeddings of the keys, with the shape, dtype and device of `query`. Row n is the positive of
                row n of `query`.
            ids: (N,) integers, the group of each sample. Keys of a query's group, in the queue and in the batch, are
                not negatives of the query. None: every other key is a negative.

        Returns:
            A 0-d tensor, or (N,) for "none"; float64 for float64 embeddings, else float32.
        """
        given_ids = ids
        pointer, filled = self.queue._cursor.unbind()
        batch = open_batch(
            self.group, "QueueInfoNCELoss", {"query": query, "key": key}, ids=ids, temperature=self.temperature,
            reduction=self.reduction, normalize=self.normalize, backend=self.backend,
            in_batch_negatives=self.in_batch_negatives, queue_pointer=pointer, queue_filled=filled,
        )  # fmt: skip
        check_features("query", query, "the queue's rows", self.queue._rows)
        inv_tau = batch.inverse_temperature(self.temperature)
        u, v = batch.unit_rows(query), batch.unit_rows(key)
        pos, of_queue = inv_tau * row_dots(u, v), self.queue.sides_of(u, ids)
        parts = []
        if self.in_batch_negatives:
            groups = batch.sample_ids() if ids is None else ids
            nu = batch.neg_lse_to(Side(u, groups), Side(v, groups), inv_tau)
            # log(1 + e^(nu - pos) + e^(queue - pos)) is this term plus log(1 + e^(queue - pos')), where pos' = log(e^nu
            # + e^pos) includes the batch's negatives.
            parts.append(batch.reduce(row_losses(nu, pos)))
            pos = log_add(nu, pos)
        if of_queue is not None:
            rows, cols, held = of_queue
            parts.append(batch.held_loss(rows, cols, inv_tau, pos, held))
        loss = sum(parts[1:], parts[0]) if parts else batch.reduce(row_losses(torch.full_like(pos, -torch.inf), pos))
        if self.training:  # with the rows of all ranks, so the queues of all ranks stay equal
            self.queue.push(batch.all_rows(v), None if ids is None else batch.gather(ids))
        return watch(loss, self.temperature, given_ids)
