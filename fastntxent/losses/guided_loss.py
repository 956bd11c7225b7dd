"""InfoNCE whose false negatives are left out, as a guide's embeddings find them."""

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
from ..validation import check_choice, check_features, check_parameter, check_row_each, check_rows, check_same
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
    r"""InfoNCE without the negatives that a guide takes for positives: those nearer to the query than its own key is.

    .. math:: L_n = \log\big(1 + e^{\nu_n - s_n/\tau}\big), \qquad
        \nu_n = \log \sum_{j \in C(n),\ g_{nj} \le g_n - m} e^{s_{nj}/\tau}

    with s the similarities of the embeddings, g the cosine similarities of the guide's, g_n that of query n and key n.
    The candidates C(n) are the other samples' keys and the negatives, compared with query n; with `contrast_anchors`
    the other queries, compared with query n; and with `contrast_positives` the other keys, compared with key n.

    Solatorio, "GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning", 2024, as
    sentence-transformers' `GISTEmbedLoss` has it.

    Args:
        query, key: (N, D) embeddings; row n of key is the positive of row n of query.
        guide_query, guide_key: (N, E), the guide's of the same samples, of any floating dtype, which are normalised. No
            gradient goes through them, nor through the choice of negatives.
        temperature: as in `nt_xent`.
        margin: m. A negative stays where g_nj <= g_n - m ("absolute"), or g_nj <= g_n - m |g_n| ("relative").
        margin_strategy: "absolute" or "relative".
        negatives: (K, D), explicit negatives of all queries.
        guide_negatives: (K, E), the guide's of the same rows; given with negatives, and only then.
        contrast_anchors: whether other queries are negatives of a query.
        contrast_positives: whether other keys are negatives of a key, in the loss of its query.
        reduction: "mean" (1/N), "sum" or "none".
        normalize, backend: as in `nt_xent`.
        group: as in `nt_xent`; explicit negatives are those of all ranks, of any number on each.

    A row is never a negative of itself or of its positive. A tie stays: a negative is left out where its similarity is
    above the limit by more than rounding, eps sqrt(E), which is 3e-6 in float32 at E = 768. A pair whose similarity
    or limit is NaN stays too. The loss of a query without any negative left is 0.

    Returns:
        A 0-d tensor, or (N,) for "none"; float64 for float64 embeddings, else float32. Differentiable in the embeddings
        and the temperature.

    Raises:
        TypeError, ValueError, RuntimeError: as `nt_xent`.

    Deterministic, O((N + K) (D + E)) memory. Similarities and the guide's are formed side by side, a tile at a time,
    in plain PyTorch on every device: with u = 2 N^2 D and g = 2 N^2 E flops, each of the three products among N samples
    costs u + g forward and 3u + g backward.

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
    # All of it is checked before the ranks meet, so that a rank that raises leaves none in the middle of the loss.
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
        raise ValueError("guide_negatives must be given with negatives, got them alone")
    g_query, g_key, *g_negatives = _checked_guide(of_guide, may_be_empty=group is not None)
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
        ids.append(samples.new_full((negatives.shape[0],), -1))  # of no sample
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
    """The largest similarity to a query, for the guide, that is still a negative's (N,)."""
    pos = row_dots(g_query, g_key)
    # A tie stays one in whichever tile its product is formed: on a CPU, products of the same rows differed by at most
    # 0.6 of this, at 3 to 4,096 features.
    rounding = torch.finfo(pos.dtype).eps * g_query.shape[1] ** 0.5
    return pos - margin * (pos.abs() if margin_strategy == "relative" else 1) + rounding


def _checked_guide(of_guide: Mapping[str, tuple[Any, str, Tensor]], *, may_be_empty: bool) -> list[Tensor]:
    """The guide's unit rows without a gradient, in the dtype that embeddings are compared in. of_guide: by name, its
    rows, the name of the embeddings of the same samples, and those."""
    first_name, (first, _, query) = next(iter(of_guide.items()))
    unit = []
    for name, (x, rows_name, rows) in of_guide.items():
        check_rows(name, x, may_be_empty=may_be_empty)
        check_row_each(name, x, rows_name, rows)
        check_features(first_name, first, name, x)
        check_same(rows_name, rows, name, x, "device")
        unit.append(unit_rows(x.detach().to(accumulation_dtype(query.dtype))))
    return unit
