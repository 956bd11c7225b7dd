"""Helpers of the drop-ins: the default process group, labels as ids, one-element tensors, and logits on demand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..algebra import product
from ..validation import ID_DTYPES, check_tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_TILE = 2**20  # logits that Logits.argmax forms at a time


def default_group() -> ProcessGroup | None:
    """Return the default process group, in which the replaced libraries gather rows, or None for a single process."""
    return dist.group.WORLD if world_size() > 1 else None


def default_group_of(name: str, size: int, rank: int | None = None) -> ProcessGroup | None:
    """Like `default_group`, after checking the number of processes and the rank that the caller passed.

    Args:
        name: The argument that holds the number of processes, for errors.
        size: The number of processes; for 1 the result is None.
        rank: This process's rank, or None to leave it unchecked.
    """
    if size == 1:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(f"{name} of {size} needs torch.distributed.init_process_group to be called before the loss")
    if size != world_size():
        raise ValueError(f"{name} must be 1 or the size of the default process group, {world_size()}, got {size}")
    if rank is not None and rank != dist.get_rank():
        raise ValueError(f"rank must be this process's rank in the default group, {dist.get_rank()}, got {rank}")
    return default_group()


def world_size() -> int:
    """Return the size of the default process group, or 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check_dense(name: str, value: object) -> None:
    """Raise unless `value` is a dense tensor that is not complex."""
    check_tensor(name, value)
    if isinstance(value, Tensor) and value.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {value.dtype}")


def as_ids(name: str, labels: Tensor, rows: Tensor) -> Tensor:
    """Return labels of any real dtype as integer ids on the rows' device. Equal labels get equal ids. NaN does not
    equal itself, so a NaN label is an error if the host can read it."""
    check_dense(name, labels)
    if labels.shape != rows.shape[:1]:
        raise ValueError(f"{name} must have shape ({rows.shape[0]},), one per row, got {tuple(labels.shape)}")
    seen = labels.is_floating_point() and labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if seen and labels.isnan().any():
        raise ValueError(f"{name} must not be NaN: give each unlabelled row a unique label")
    if labels.is_meta and not rows.is_meta:
        raise TypeError(f"{name} must hold numbers, got {labels.dtype} on {labels.device}")
    labels = labels.to(rows.device)
    if labels.is_floating_point():  # the bits are the same on every rank; ids numbered by first appearance would not be
        return (labels.double() + 0.0).view(torch.int64)  # adding 0.0 turns -0.0 into 0.0
    return labels if labels.dtype in ID_DTYPES else labels.to(torch.int64)


def as_columns(name: str, columns: Any) -> list[Any]:
    """Return the columns of a data set (anchors, positives and so on) as a list."""
    if isinstance(columns, (str, Mapping)) or not isinstance(columns, Iterable):
        raise TypeError(f"{name} must be a sequence, one element per column, got {type(columns).__name__}")
    return list(columns)


def as_scalar(value: float | Tensor) -> float | Tensor:
    """Return a one-element tensor of any shape as a 0-d tensor; return anything else unchanged."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
    return value.reshape(()) if isinstance(value, Tensor) and dense and value.ndim and value.numel() == 1 else value


class Logits:
    """The logits of rows against columns, which are formed only on demand: no loss here stores them.

    In a process group the columns come from all ranks, in rank order, and no gradient reaches them.

    Args:
        rows: (M, D), the rows on this rank.
        cols: (K, D), the columns on all ranks.
        scale: Factor of the similarities, a float or a 0-d tensor.

    Example:
        >>> import torch
        >>> logits = Logits(torch.eye(3), torch.eye(3).roll(1, 0), 2.0)
        >>> logits.shape, logits.argmax()
        (torch.Size([3, 3]), tensor([1, 2, 0]))
    """

    def __init__(self, rows: Tensor, cols: Tensor, scale: float | Tensor):
        self._rows = rows
        self._cols = cols
        self._scale = scale

    @property
    def shape(self) -> torch.Size:
        """(M, K)."""
        return torch.Size((self._rows.shape[0], self._cols.shape[0]))

    def dense(self) -> Tensor:
        """Return the whole matrix (M, K), differentiable. Takes O(M K) memory."""
        return product(self._rows, self._cols.T) * self._scale

    @torch.no_grad()
    def argmax(self) -> Tensor:
        """Return the column of each row's largest logit (M,). Logits are formed in blocks of rows that take about 8 MiB
        in float32."""
        height = max(1, _TILE // self._cols.shape[0])
        blocks = self._rows.split(height)
        return torch.cat([Logits(rows, self._cols, self._scale).dense().argmax(dim=1) for rows in blocks])

    def __repr__(self) -> str:
        return f"Logits(shape={tuple(self.shape)}, not formed: call dense() to form them)"
