"""The symmetric loss of two towers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..backends import check_name as check_backend
from ..backends.base import row_dots, row_losses
from ..common import (
    cross_neg_lse,
    factor,
    group_counts,
    group_dots,
    inverse_temperature,
    n_samples,
    reduce,
    sample_ids,
    unit_rows,
    watched,
)
from ..distributed import Group, Shard, open_shard
from ..options import BackendName, Reduction
from ..validation import (
    check_factor,
    check_ids,
    check_in_range,
    check_number,
    check_reduction,
    check_rows,
    check_same,
    check_temperature,
)


class CLIPDirections(NamedTuple):
    """The two halves of the loss: (N,) each."""

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
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
) -> Tensor:
    r"""CLIP's loss: each image picks its text and each text its image, both from one pass over the similarities.

    .. math::
        L = \frac{1}{2N} \sum_{n=1}^{N} \Big[ \log\big(1 + e^{\nu^{img}_n - \pi_n}\big)
            + \log\big(1 + e^{\nu^{txt}_n - \pi_n}\big) \Big], \qquad \pi_n = s_{nn}/\tau

    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021; open_clip's
    `ClipLoss` of features that are normalised already is this with `normalize=False`.

    Args:
        image_features, text_features: (N, D); row n of both belongs together.
        temperature: as in `nt_xent`; 0.07 where neither it nor a logit_scale is given.
        logit_scale: 1 / temperature, in its place: a positive float or a 0-d tensor, as `log_scale.exp()` of a learnt
            parameter.
        logit_bias: added to every logit, where the softmax cancels it: the loss does not change, and the bias gets a
            gradient of exactly zero. (SigLIP's sigmoid loss is the one that has use for it.)
        ids: (N,) integers: samples of the same id are no negatives of each other.
        label_smoothing: as in `nt_xent`, in both directions.
        reduction: "mean" (1/N over the samples of half the sum of both directions), "sum", or "none".
        normalize, backend, group: as in `nt_xent`.

    Returns:
        A 0-d tensor, or (N,) for "none"; float64 for float64 features, else float32. Differentiable in the features,
        the temperature or the scale.

    Raises:
        TypeError, ValueError, RuntimeError: as `nt_xent`.

    Deterministic, O(N D) memory.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(4)
        >>> fastntxent.clip(z, z, temperature=1.0)  # log(e + 3) - 1, in both directions
        tensor(0.7437)
    """
    check_rows("image_features", image_features, may_be_empty=group is not None)
    check_rows("text_features", text_features, may_be_empty=group is not None)
    check_same("image_features", image_features, "text_features", text_features, "shape", "dtype", "device")
    check_reduction(reduction)
    check_backend(backend)
    label_smoothing = check_in_range("label_smoothing", label_smoothing, 0, 1, with_low=True, with_high=False)
    if ids is not None:
        check_ids("ids", ids, "image_features", image_features)
    if logit_scale is None:
        temperature = 0.07 if temperature is None else temperature
    elif temperature is not None:
        raise ValueError("temperature and logit_scale must not both be given: one is the inverse of the other")
    shard = open_shard(
        group, "clip", image_features, backend, temperature=temperature, logit_scale=logit_scale,
        ids_given=ids is not None, label_smoothing=label_smoothing, reduction=reduction,
        normalize=normalize, text_requires_grad=text_features.requires_grad,
    )  # fmt: skip
    if temperature is not None:
        scale = inverse_temperature(temperature, image_features, shard=shard)
    else:
        assert logit_scale is not None
        logit_scale = check_temperature(logit_scale, image_features, name="logit_scale")
        scale = factor(logit_scale, image_features, shard)
        check_temperature(scale, name=f"logit_scale in {scale.dtype}")
    u, v = unit_rows(image_features, normalize), unit_rows(text_features, normalize)
    directions = clip_directions(u, v, scale, ids, label_smoothing, backend, shard)
    losses = directions.image_to_text / 2 + directions.text_to_image / 2
    if logit_bias is not None:
        if not isinstance(logit_bias, Tensor):
            logit_bias = check_number("logit_bias", logit_bias, "a float or a tensor of one element")
        else:
            check_factor("logit_bias", logit_bias, losses)
        if isinstance(logit_bias, Tensor) and logit_bias.numel() != 1:
            raise ValueError(f"logit_bias must be a float or have one element, got shape {tuple(logit_bias.shape)}")
        losses = losses + 0 * factor(logit_bias, losses)
    return reduce(losses, reduction, shard=shard)


def clip_directions(
    u: Tensor,
    v: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    label_smoothing: float,
    backend: str,
    shard: Shard | None = None,
) -> CLIPDirections:
    """Both directions' losses of rows that are taken as they are."""
    groups = sample_ids(u, shard) if ids is None else ids
    # First, so that its backward comes last, when the kernel's has given its memory back.
    pos = scale * row_dots(u, v)
    nu_rows, nu_cols = cross_neg_lse(u, v, groups, groups, scale, backend, shard)
    rows, cols = row_losses(nu_rows, pos), row_losses(nu_cols, pos)
    if label_smoothing:
        candidates = n_samples(u, shard) - group_counts(groups, shard) + 1
        rows_sims = group_dots(u, v, None, shard) - group_dots(u, v, groups, shard)
        cols_sims = group_dots(v, u, None, shard) - group_dots(v, u, groups, shard)
        rows_mean = (pos + scale * rows_sims) / candidates
        cols_mean = (pos + scale * cols_sims) / candidates
        rows = rows + label_smoothing * (pos - rows_mean)
        cols = cols + label_smoothing * (pos - cols_mean)
    return CLIPDirections(rows, cols)
