"""The symmetric loss between two towers, and between all pairs of several."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra import row_dots, row_losses
from ..batch import Batch
from ..distributed import Group
from ..opening import agree_on, open_batch
from ..options import BackendName, Positives, Reduction, SeveralForm
from ..scale import bias_of_logits
from ..sides import Side
from ..validation import check_parameter, check_rows, check_same, check_tensor, check_weights
from ..watching import watched
from .false_negatives import Limits
from .info_nce_loss import check_ids_given, check_positives, several_positives


class CLIPDirections(NamedTuple):
    """The losses of both directions, (N,) each."""

    image_to_text: Tensor
    text_to_image: Tensor


@watched
def clip(
    image_features: Tensor,
    text_features: Tensor,
    temperature: float | Tensor | None = None,
    *,
    logit_scale: float | Tensor | None = None,
    logit_bias: float | Tensor | None = None,
    ids: Tensor | None = None,
    positives: Positives = "pair",
    form: SeveralForm = "out",
    label_smoothing: float = 0.0,
    margin: float | None = None,
    relative_margin: float | None = None,
    ceiling: float | None = None,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
) -> Tensor:
    r"""CLIP's loss: each image picks its text, and each text its image.

    .. math::
        L = \frac{1}{2N} \sum_{n=1}^{N} [ \log(1 + e^{\nu^{img}_n - \pi_n}) + \log(1 + e^{\nu^{txt}_n - \pi_n}) ], \quad
        \pi_n = s_{nn}/\tau

    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021. nu^img_n is the
    log-sum-exp of image n's logits with the other texts, and nu^txt_n the log-sum-exp of text n's logits with the other
    images. Both directions come from one pass over the similarities, or from one pass each with positives="same_id".
    For features that are normalised already, `normalize=False` gives open_clip's `ClipLoss`.

    With positives="same_id" and form "out", the positives are part of the denominator. Near convergence the gradient
    then has an absolute error of about eps / tau, the rounding error of a logit (eps is the machine epsilon). The
    gradient of form "in" keeps its relative accuracy. If every row has one positive, both forms give the same loss.

    The options `margin`, `relative_margin` and `ceiling` leave a negative out only if its similarity exceeds the limit
    by more than rounding. A negative whose similarity is NaN stays in. No gradient flows through the choice of
    negatives. Limits and smoothing apply in both directions.

    On the same device with the same number of threads, the same input gives the same bits. Extra memory is O(N D);
    the reference backend takes O(N^2).

    Args:
        image_features: (N, D) features of the images, float16, bfloat16, float32 or float64. Row n belongs to sample n.
        text_features: (N, D) features of the texts, with the shape, dtype and device of `image_features`. Row n belongs
            to sample n.
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there. None: 0.07, unless `logit_scale` is
            given.
        logit_scale: 1 / tau in place of `temperature`: a positive float or a 0-d floating-point tensor, such as
            `log_scale.exp()` with a learnt parameter `log_scale`.
        logit_bias: A finite float or a tensor of one element that is added to every logit. The softmax cancels it, so
            the loss does not change and the bias gets a gradient of exactly 0. Only the losses with sigmoids, such as
            `siglip`, depend on a bias.
        ids: (N,) integers, the group of each sample. Samples of the same group are not negatives of each other, which
            removes false negatives. An id must mean the same on every rank. None: every other sample is a negative.
            Required for positives="same_id".
        positives: "pair": row n of the other side is the only positive of row n. "same_id": all rows of the other side
            with the id of row n are its positives; this needs `ids` and cannot be combined with label smoothing,
            margins or a ceiling.
        form: With positives="same_id", how the positives are combined. "out" averages their negative log-probabilities,
            which gives nu' - mean_p s_np / tau, with nu' the log-sum-exp over all columns. "in" takes the negative
            logarithm of their mean probability.
        label_smoothing: The share of the target, in [0, 1), that is spread evenly over the positive and the negatives,
            as in `torch.nn.functional.cross_entropy`.
        margin: Leave a negative out of row i's sum where its similarity to row i is above s_pos - margin, with s_pos
            the similarity of row i to its positive. A finite float; None sets no limit. Cannot be combined with
            `relative_margin` or `label_smoothing`.
        relative_margin: Leave a negative out of row i's sum where its similarity to row i is above (1 -
            relative_margin) s_pos. A float in [0, 1]; None sets no limit. Cannot be combined with `margin` or
            `label_smoothing`.
        ceiling: Leave a negative out of row i's sum where its similarity to row i is above this finite float. If there
            is also a margin, the smaller limit applies. None sets no limit. Cannot be combined with `label_smoothing`.
        reduction: "mean" over the N samples, "sum", or "none" for one loss per sample.
        normalize: True divides each row by max(||z||, 1e-12) like `torch.nn.functional.normalize` (by max(||z||,
            6.1e-5) in float16). False takes the rows as they are, and their products must not overflow.
        backend: "auto", which chooses one for the device, or a name from `backends()`.
        group: The ranks that hold the batch: "world" (the default process group, looked up at each call), a process
            group, a one-dimensional DeviceMesh, or a `Sharding`, which adds options. Each rank passes its own samples,
            any number of them, even none. Negatives come from all ranks. "mean" and "sum" cover the whole batch and are
            equal on every rank. Once DistributedDataParallel has averaged the parameters' gradients, these equal the
            gradients of one process with the whole batch. "none" returns this rank's losses. None: this rank's samples
            are the whole batch.

    Returns:
        A 0-d tensor, or (N,) for "none"; float64 for float64 features, else float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, dtypes or devices do not match, the batch is empty, a number is out of range, or an option
            is unknown, differs between ranks or cannot be combined with another.
        RuntimeError: the backend is not available here (the message says why), a rank of the group does not answer or
            is in a different call, or a second derivative is requested, which only backend="reference" without a group
            supports.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(4)
        >>> fastntxent.clip(z, z, temperature=1.0)  # log(e + 3) - 1, in both directions
        tensor(0.7437)
    """
    label_smoothing = check_parameter("label_smoothing", label_smoothing)
    if logit_scale is not None and temperature is not None:
        raise ValueError("temperature and logit_scale must not both be given: one is the inverse of the other")
    limits = Limits.checked(margin, relative_margin, ceiling, label_smoothing)
    check_positives(positives, form, limits, label_smoothing=label_smoothing)
    if positives == "same_id":
        check_ids_given(ids)
    batch = open_batch(
        group, "clip", {"image_features": image_features, "text_features": text_features}, ids=ids,
        reduction=reduction, normalize=normalize, backend=backend, temperature=temperature, logit_scale=logit_scale,
        logit_bias=logit_bias, label_smoothing=label_smoothing, positives=positives, form=form, limits=limits,
    )  # fmt: skip
    bias = None if logit_bias is None else _checked_bias(logit_bias, image_features)
    if logit_scale is None:
        scale = batch.inverse_temperature(0.07 if temperature is None else temperature)
    else:
        scale = batch.logit_scale(logit_scale)
    loss = None
    if ids is None and not label_smoothing and limits is None:
        loss = batch.info_nce_at_once(image_features, text_features, scale, both=True)
    if loss is None:
        u, v = batch.unit_rows(image_features), batch.unit_rows(text_features)
        if positives == "same_id":
            assert ids is not None
            images, texts = Side(u, ids), Side(v, ids)
            directions = CLIPDirections(
                several_positives(batch, images, texts, scale, form),
                several_positives(batch, texts, images, scale, form),
            )
        else:
            directions = clip_directions(batch, u, v, scale, ids, label_smoothing, limits)
        loss = batch.reduce(directions.image_to_text / 2 + directions.text_to_image / 2)
    return loss if bias is None else loss + 0 * bias


def clip_directions(
    batch: Batch,
    u: Tensor,
    v: Tensor,
    scale: float | Tensor,
    ids: Tensor | None,
    label_smoothing: float,
    limits: Limits | None = None,
) -> CLIPDirections:
    """Return the losses of both directions for rows that come from `unit_rows`."""
    groups = batch.sample_ids() if ids is None else ids
    # The products are formed first, so that their backward runs last, after the kernel's backward has freed its
    # workspace.
    sims = row_dots(u, v)
    pos = scale * sims
    if limits is None:
        nu_rows, nu_cols = batch.cross_neg_lse(Side(u, groups), Side(v, groups), scale)
    else:
        of_pair = limits.of(sims, u, v)
        nu_rows, nu_cols = batch.limited_cross_neg_lse(Side(u, groups, of_pair), Side(v, groups, of_pair), scale)
    rows, cols = row_losses(nu_rows, pos), row_losses(nu_cols, pos)
    if label_smoothing:
        candidates = batch.n_samples - batch.group_counts(groups) + 1
        rows_mean = (pos + scale * (batch.all_dots(u, v) - batch.group_dots(u, v, groups))) / candidates
        cols_mean = (pos + scale * (batch.all_dots(v, u) - batch.group_dots(v, u, groups))) / candidates
        rows = rows + label_smoothing * (pos - rows_mean)
        cols = cols + label_smoothing * (pos - cols_mean)
    return CLIPDirections(rows, cols)


def _checked_bias(logit_bias: float | Tensor, rows: Tensor) -> Tensor:
    """Check a bias, which is a number or a tensor of one element, and return it as a 0-d tensor."""
    if isinstance(logit_bias, Tensor):
        check_tensor("logit_bias", logit_bias)
        if logit_bias.numel() != 1:
            raise ValueError(f"logit_bias must be a float or have one element, got shape {tuple(logit_bias.shape)}")
        logit_bias = logit_bias.reshape(())
    return bias_of_logits(logit_bias, rows, "logit_bias")


def multi_clip(
    features: Sequence[Tensor],
    temperature: float | Tensor | None = None,
    *,
    logit_scale: float | Tensor | None = None,
    weights: Sequence[float] | None = None,
    ids: Tensor | None = None,
    positives: Positives = "pair",
    form: SeveralForm = "out",
    label_smoothing: float = 0.0,
    margin: float | None = None,
    relative_margin: float | None = None,
    ceiling: float | None = None,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
) -> Tensor:
    r"""CLIP's loss of every pair among several towers, such as images, texts and sounds.

    .. math:: L = \sum_{a < b} w_{ab} L^{\text{clip}}(x_a, x_b)

    Each pair of towers takes one pass over its similarities, or two with positives="same_id". With the default weights
    the loss is the mean over the pairs. `clip` is the loss of Radford et al., "Learning Transferable Visual Models From
    Natural Language Supervision", 2021.

    With positives="same_id" and form "out", the positives are part of the denominator. Near convergence the gradient
    then has an absolute error of about eps / tau, the rounding error of a logit (eps is the machine epsilon). The
    gradient of form "in" keeps its relative accuracy. If every row has one positive, both forms give the same loss.

    The options `margin`, `relative_margin` and `ceiling` leave a negative out only if its similarity exceeds the limit
    by more than rounding. A negative whose similarity is NaN stays in. No gradient flows through the choice of
    negatives.

    On the same device with the same number of threads, the same input gives the same bits. Extra memory is O(T^2 N D),
    for two gradients of each pair of towers; the reference backend takes O(T^2 N^2).

    Args:
        features: T >= 2 tensors (N, D) of the same shape, dtype and device, one per tower. Row n of each belongs to
            sample n.
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there. None: 0.07, unless `logit_scale` is
            given.
        logit_scale: 1 / tau in place of `temperature`: a positive float or a 0-d floating-point tensor, such as
            `log_scale.exp()` with a learnt parameter `log_scale`.
        weights: One finite number, at least 0, for each pair of towers, in the order (0, 1), (0, 2), ..., (1, 2), ...;
            at least one is above 0. A pair of weight 0 costs nothing. None: each pair has the weight 1 / (number of
            pairs).
        ids: (N,) integers, the group of each sample. Samples of the same group are not negatives of each other, which
            removes false negatives. An id must mean the same on every rank. None: every other sample is a negative.
            Required for positives="same_id".
        positives: "pair": row n of the other side is the only positive of row n. "same_id": all rows of the other side
            with the id of row n are its positives; this needs `ids` and cannot be combined with label smoothing,
            margins or a ceiling.
        form: With positives="same_id", how the positives are combined. "out" averages their negative log-probabilities,
            which gives nu' - mean_p s_np / tau, with nu' the log-sum-exp over all columns. "in" takes the negative
            logarithm of their mean probability.
        label_smoothing: The share of the target, in [0, 1), that is spread evenly over the positive and the negatives,
            as in `torch.nn.functional.cross_entropy`.
        margin: Leave a negative out of row i's sum where its similarity to row i is above s_pos - margin, with s_pos
            the similarity of row i to its positive. A finite float; None sets no limit. Cannot be combined with
            `relative_margin` or `label_smoothing`.
        relative_margin: Leave a negative out of row i's sum where its similarity to row i is above (1 -
            relative_margin) s_pos. A float in [0, 1]; None sets no limit. Cannot be combined with `margin` or
            `label_smoothing`.
        ceiling: Leave a negative out of row i's sum where its similarity to row i is above this finite float. If there
            is also a margin, the smaller limit applies. None sets no limit. Cannot be combined with `label_smoothing`.
        reduction: "mean" over the N samples, "sum", or "none" for one loss per sample.
        normalize: True divides each row by max(||z||, 1e-12) like `torch.nn.functional.normalize` (by max(||z||,
            6.1e-5) in float16). False takes the rows as they are, and their products must not overflow.
        backend: "auto", which chooses one for the device, or a name from `backends()`.
        group: The ranks that hold the batch: "world" (the default process group, looked up at each call), a process
            group, a one-dimensional DeviceMesh, or a `Sharding`, which adds options. Each rank passes its own samples,
            any number of them, even none. Negatives come from all ranks. "mean" and "sum" cover the whole batch and are
            equal on every rank. Once DistributedDataParallel has averaged the parameters' gradients, these equal the
            gradients of one process with the whole batch. "none" returns this rank's losses. None: this rank's samples
            are the whole batch.

    Returns:
        A 0-d tensor, or (N,) for "none"; float64 for float64 features, else float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, dtypes or devices do not match, the batch is empty, a number is out of range, or an option
            is unknown, differs between ranks or cannot be combined with another.
        RuntimeError: the backend is not available here (the message says why), a rank of the group does not answer or
            is in a different call, or a second derivative is requested, which only backend="reference" without a group
            supports.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(4)
        >>> fastntxent.multi_clip([z, z, z], temperature=1.0)  # log(e + 3) - 1 for each pair
        tensor(0.7437)
    """
    pairs, weights = _pairs_of_towers(features, weights, may_be_empty=group is not None)
    agree_on(group, "multi_clip", features[0], {"towers": len(features), "weights": weights})
    of_pair = functools.partial(
        clip, temperature=temperature, logit_scale=logit_scale, ids=ids, positives=positives, form=form,
        label_smoothing=label_smoothing, margin=margin, relative_margin=relative_margin, ceiling=ceiling,
        reduction=reduction, normalize=normalize, backend=backend, group=group,
    )  # fmt: skip
    losses = [weight * of_pair(a, b) for (a, b), weight in zip(pairs, weights, strict=True) if weight]
    return torch.stack(losses).sum(dim=0)


def _pairs_of_towers(
    features: Sequence[Tensor] | Tensor, weights: Sequence[float] | None, *, may_be_empty: bool
) -> tuple[list[tuple[Tensor, Tensor]], list[float]]:
    if isinstance(features, Tensor):
        raise TypeError("features must be a sequence of tensors, one per tower, got one tensor; pass features.unbind()")
    if not isinstance(features, Sequence):
        raise TypeError(f"features must be a sequence of tensors, one per tower, got {type(features).__name__}")
    pairs = list(itertools.combinations(features, 2))
    if not pairs:
        raise ValueError(f"features must hold at least two towers, got {len(features)}")
    for index, x in enumerate(features):
        check_rows(f"features[{index}]", x, may_be_empty=may_be_empty)
        check_same("features[0]", features[0], f"features[{index}]", x, "shape", "dtype", "device")
    if weights is None:
        return pairs, [1 / len(pairs)] * len(pairs)
    checked = check_weights("weights", weights, "a number for each pair")
    if len(checked) != len(pairs):
        raise ValueError(f"weights must have one number for each of the {len(pairs)} pairs, got {len(checked)}")
    return pairs, checked
