"""InfoNCE without the false negatives that a guide's embeddings reveal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..algebra import accumulation_dtype, log_add, row_dots, row_losses, unit_rows
from ..distributed import Group
from ..opening import open_batch
from ..options import MARGIN_STRATEGIES, BackendName, MarginStrategy, Reduction
from ..sides import Guide, Side
from ..validation import (
    check_choice,
    check_features,
    check_flag,
    check_parameter,
    check_row_each,
    check_rows,
    check_same,
)
from ..watching import watched


@watched
def guided_info_nce(
    query: Tensor,
    key: Tensor,
    guide_query: Tensor,
    guide_key: Tensor,
    temperature: float | Tensor = 0.01,
    *,
    margin: float = 0.0,
    margin_strategy: MarginStrategy = "absolute",
    negatives: Tensor | None = None,
    guide_negatives: Tensor | None = None,
    contrast_anchors: bool = True,
    contrast_positives: bool = True,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
) -> Tensor:
    r"""InfoNCE without the negatives that a guide finds closer to the query than the query's own key.

    .. math::
        L_n = \log(1 + e^{\nu_n - s_n/\tau}), \quad
        \nu_n = \log \sum_{j \in C(n),\ g_{nj} \le g_n - m} e^{s_{nj}/\tau}

    s are the similarities of the embeddings and g the cosine similarities of the guide's embeddings; s_n and g_n are
    the similarities of query n to key n. The candidates C(n) are the keys of other samples and the explicit negatives,
    compared with query n. `contrast_anchors` adds the other queries, compared with query n; `contrast_positives` adds
    the other keys, compared with key n.

    Solatorio, "GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning", 2024, with
    the semantics of sentence-transformers' `GISTEmbedLoss`.

    A row is never a negative of itself or of its positive. Ties stay in: a negative is left out only where its
    similarity in the guide exceeds the limit by more than rounding, eps sqrt(E), which is 3e-6 in float32 at E = 768. A
    pair whose similarity or limit is NaN stays in too. The loss of a query without negatives is 0. No gradient flows
    through the choice of negatives.

    On the same device with the same number of threads, the same input gives the same bits. Extra memory is O((N + K) (D
    + E)); the reference backend takes O(N (N + K)). Similarities of the embeddings and of the guide are formed side by
    side, a tile at a time, in plain PyTorch on every device. Comparing queries with keys, queries with queries and keys
    with keys costs u + g flops each in the forward and 3u + g in the backward, with u = 2 N^2 D and g = 2 N^2 E.

    Args:
        query: (N, D) embeddings of the queries, float16, bfloat16, float32 or float64. Row n belongs to sample n.
        key: (N, D) embeddings of the keys, with the shape, dtype and device of `query`. Row n is the positive of row n
            of `query`.
        guide_query: (N, E) embeddings from the guide for the samples of `query`, of any floating-point dtype. They are
            always normalised and get no gradient.
        guide_key: (N, E) embeddings from the guide for the samples of `key`, like `guide_query`.
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there.
        margin: m, a finite float. A negative stays where g_nj <= g_n - m ("absolute"), or where g_nj <= g_n - m
            abs(g_n) ("relative").
        margin_strategy: "absolute" or "relative", the meaning of `margin`.
        negatives: (K, D) explicit negatives of all queries, with the dtype and device of `query`. None: no explicit
            negatives.
        guide_negatives: (K, E) embeddings from the guide for the explicit negatives, like `guide_query`. Required with
            `negatives`, and not allowed without.
        contrast_anchors: Whether the other queries are negatives of a query.
        contrast_positives: Whether the other keys, compared with a query's own key, count as negatives in the loss of
            that query.
        reduction: "mean" over the N queries, "sum", or "none" for one loss per query.
        normalize: True divides each row by max(||z||, 1e-12) like `torch.nn.functional.normalize` (by max(||z||,
            6.1e-5) in float16). False takes the rows as they are, and their products must not overflow.
        backend: "auto", which chooses one for the device, or a name from `backends()`.
        group: The ranks that hold the batch: "world" (the default process group, looked up at each call), a process
            group, a one-dimensional DeviceMesh, or a `Sharding`, which adds options. Each rank passes its own samples,
            any number of them, even none. Negatives come from all ranks. "mean" and "sum" cover the whole batch and are
            equal on every rank. Once DistributedDataParallel has averaged the parameters' gradients, these equal the
            gradients of one process with the whole batch. "none" returns this rank's losses. None: this rank's samples
            are the whole batch. Explicit negatives (K, D) are shared by all ranks too; each rank passes any number of
            them.

    Returns:
        A 0-d tensor, or (N,) for "none"; float64 for float64 embeddings, else float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, dtypes or devices do not match, the batch is empty, a number is out of range, or an option
            is unknown, differs between ranks or cannot be combined with another.
        RuntimeError: the backend is not available here (the message says why), a rank of the group does not answer or
            is in a different call, or a second derivative is requested, which only backend="reference" without a group
            supports.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(3)
        >>> guide = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])  # samples 0 and 2 are alike, a tie
        >>> fastntxent.guided_info_nce(z, z, guide, guide, temperature=1.0, reduction="none")
        tensor([1.1654, 1.1654, 1.1654])
        >>> fastntxent.guided_info_nce(z, z, guide, guide, temperature=1.0, margin=0.5, reduction="none")
        tensor([0.7437, 1.1654, 0.7437])
    """
    check_choice("margin_strategy", margin_strategy, MARGIN_STRATEGIES)
    margin = check_parameter("margin", margin)
    # Check everything before the ranks exchange anything: a rank that raises later would leave the others hanging.
    check_rows("query", query, may_be_empty=group is not None)
    check_rows("key", key, may_be_empty=group is not None)
    check_same("query", query, "key", key, "shape", "dtype", "device")
    if negatives is not None:
        check_rows("negatives", negatives, may_be_empty=group is not None)
        check_same("query", query, "negatives", negatives, "dtype", "device")
        check_features("query", query, "negatives", negatives)
    of_guide: dict[str, tuple[Any, str, Tensor]] = {
        "guide_query": (guide_query, "query", query),
        "guide_key": (guide_key, "key", key),
    }
    if negatives is not None:
        of_guide["guide_negatives"] = guide_negatives, "negatives", negatives
    elif guide_negatives is not None:
        raise ValueError("guide_negatives must be given with negatives, got guide_negatives alone")
    g_query, g_key, *g_negatives = _checked_guide(of_guide, may_be_empty=group is not None)
    check_flag("contrast_anchors", contrast_anchors)
    check_flag("contrast_positives", contrast_positives)
    batch = open_batch(
        group, "guided_info_nce", {"query": query, "key": key}, reduction=reduction, normalize=normalize,
        backend=backend, temperature=temperature, margin=margin, margin_strategy=margin_strategy,
        contrast_anchors=contrast_anchors, contrast_positives=contrast_positives, negatives=negatives is not None,
        guide_features=g_query.shape[1],
    )  # fmt: skip

    inv_tau, samples = batch.inverse_temperature(temperature), batch.sample_ids()
    u, v = batch.unit_rows(query), batch.unit_rows(key)
    limits = _limits(g_query, g_key, margin, margin_strategy)
    cols, guide_cols, ids = [v], [g_key], [samples]
    if contrast_anchors:
        cols, guide_cols, ids = [*cols, u], [*guide_cols, g_query], [*ids, samples]
    if negatives is not None:
        cols, guide_cols = [*cols, batch.unit_rows(negatives)], [*guide_cols, *g_negatives]
        ids.append(samples.new_full((negatives.shape[0],), -1))  # explicit negatives belong to no sample
    if len(cols) == 1:
        nu = batch.guided_neg_lse(Side(u, samples), Side(v, samples), inv_tau, Guide(g_query, g_key, limits))
    else:
        docs = Side(torch.cat(cols), torch.cat(ids))
        guide = Guide(g_query, torch.cat(guide_cols), limits)
        nu = batch.guided_neg_lse(Side(u, samples), docs, inv_tau, guide, beside=batch.beside(docs.u))
    if contrast_positives:
        keys = Side(v, samples)
        nu = log_add(nu, batch.guided_neg_lse(keys, keys, inv_tau, Guide(g_key, g_key, limits)))
    return batch.reduce(row_losses(nu, inv_tau * row_dots(u, v)))


def _limits(g_query: Tensor, g_key: Tensor, margin: float, margin_strategy: str) -> Tensor:
    """Return each query's limit (N,): a negative whose similarity in the guide is above the limit is left out."""
    pos = row_dots(g_query, g_key)
    # A tie must stay a tie in every tile. On a CPU, products of the same rows differed by at most 0.6 times this
    # rounding, for 3 to 4,096 features.
    rounding = torch.finfo(pos.dtype).eps * g_query.shape[1] ** 0.5
    return pos - margin * (pos.abs() if margin_strategy == "relative" else 1) + rounding


def _checked_guide(of_guide: Mapping[str, tuple[Any, str, Tensor]], *, may_be_empty: bool) -> list[Tensor]:
    """Return the guide's unit rows without a gradient, in the accumulation dtype of the embeddings.

    of_guide: maps the name of each guide argument to three things: its rows, and the name and the rows of the argument
    that embeds the same samples.
    """
    first_name, (first, _, query) = next(iter(of_guide.items()))
    unit = []
    for name, (x, rows_name, rows) in of_guide.items():
        check_rows(name, x, may_be_empty=may_be_empty)
        check_row_each(name, x, rows_name, rows)
        check_features(first_name, first, name, x)
        check_same(rows_name, rows, name, x, "device")
        unit.append(unit_rows(x.detach().to(accumulation_dtype(query.dtype))))
    return unit
