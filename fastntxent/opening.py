"""Opening a batch: check the rows, let the ranks agree, and decide where the rows are."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .backends import check_name as check_backend
from .batch import Batch, DenseBatch, LocalBatch
from .distributed import Group, ShardedBatch
from .validation import check_flag, check_ids, check_reduction, check_row_count, check_rows, check_same


def agree_on(group: Group | None, function: str, rows: Tensor, agreed: Mapping[str, object]) -> None:
    """Let the ranks compare the options that decide which losses they call, before they call any of them.

    rows: one of the tensors (..., D) that the losses will get. The ranks compare its number of features, its dtype, and
    whether it requires a gradient.
    """
    if group is not None:
        ShardedBatch.open(group, function, {"rows": rows.flatten(0, -2)}, 1, "mean", True, "auto", agreed)


def open_batch(
    group: Group | None,
    function: str,
    rows: Mapping[str, Tensor],
    *,
    ids: Tensor | None = None,
    views: int = 1,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str = "auto",
    **agreed: object,
) -> Batch:
    """Check the arguments that every loss takes, let the ranks compare them, and return the batch.

    Args:
        group: The ranks, or None for this process alone.
        function: The name of the public function, for the error message if ranks disagree.
        rows: The embeddings (N, D) by argument name, all of the same shape, dtype and device.
        ids: (N,) integers, the group of each sample, if the caller gave any.
        views: The number of rows per sample in the loss.
        reduction: The reduction of the losses: "mean", "sum" or "none".
        normalize: Whether rows are scaled to unit length.
        backend: "auto" or the name of a backend.
        **agreed: Other values that must be equal on every rank. A tensor of one number is compared by value on a CPU
            and not read on an accelerator; an `Alike` is compared by all its values on any device.

    Returns:
        The batch that matches `group` and `backend`.
    """
    names = list(rows)
    for name, x in rows.items():
        check_rows(name, x, may_be_empty=group is not None)
    first = rows[names[0]]
    for name in names[1:]:
        check_same(names[0], first, name, rows[name], "shape", "dtype", "device")
    check_row_count(views * first.shape[0], *names)
    if ids is not None:
        check_ids("ids", ids, names[0], first)
    check_reduction(reduction)
    check_flag("normalize", normalize)
    check_backend(backend)
    if backend == "reference":
        if group is not None:
            raise ValueError("backend 'reference' takes no group: it is the dense loss of one process")
        return DenseBatch(first, views, reduction, normalize)
    if group is None:
        return LocalBatch(first, views, reduction, normalize, backend)
    agreed = {"ids_given": ids is not None, **agreed}
    return ShardedBatch.open(group, function, rows, views, reduction, normalize, backend, agreed)
