"""The loss of a student of two towers whose targets are a teacher's softmaxes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra import accumulation_dtype, in_double, row_dots
from ..batch import Batch
from ..distributed import Group
from ..opening import open_batch
from ..options import BackendName, Reduction
from ..sides import Side, Teacher
from ..validation import check_rows, check_same, check_temperature
from ..watching import watched
from .clip_loss import clip_directions


class DistillTerms(NamedTuple):
    """A student's two losses, reduced: CLIP's, of the pairs, and the cross-entropy with its teacher."""

    contrastive: Tensor
    distilled: Tensor


def distill(
    image_features: Tensor,
    text_features: Tensor,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    temperature: float | Tensor | None = None,
    *,
    teacher_temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    teacher_logit_scale: float | Tensor | None = None,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
) -> Tensor:
    r"""Distillation of two towers: cross-entropies of a student's softmaxes with a teacher's, in both directions.

    .. math::
        L = -\frac{1}{2N} \sum_{i=1}^{N} \sum_{j=1}^{N} \big[
            p^T_{ij} \log p^S_{ij} + q^T_{ij} \log q^S_{ij} \big], \qquad
        p_{ij} = \frac{e^{s_{ij}/\tau}}{\sum_l e^{s_{il}/\tau}}, \quad
        q_{ij} = \frac{e^{s_{ij}/\tau}}{\sum_l e^{s_{lj}/\tau}}

    with the student's similarities and temperature in p^S and q^S, the teacher's in p^T and q^T; open_clip's
    `DistillClipLoss` of features that are normalised already is this with `normalize=False`. It is least, and then the
    teacher's entropy, where the student's softmaxes are the teacher's.

    Args:
        image_features, text_features: (N, D), the student's; row n of both belongs together.
        teacher_image_features, teacher_text_features: (N, E), the teacher's of the same samples, of any floating dtype.
            No gradient goes through them.
        temperature: as in `nt_xent`; 0.07 where neither it nor a logit_scale is given.
        teacher_temperature: the teacher's, through which no gradient goes; the student's where neither it nor a
            teacher_logit_scale is given.
        logit_scale, teacher_logit_scale: 1 / temperature, in its place: a positive float or a 0-d tensor.
        reduction: "mean" (1/N over the samples of half the sum of both directions), "sum", or "none".
        normalize, backend, group: as in `nt_xent`; `normalize` is for the teacher's rows too.

    Returns:
        A 0-d tensor, or (N,) for "none": half of what row n of the images and row n of the texts add. float64 for
        float64 features, else float32. Differentiable in the student's features, temperature or scale.

    Raises:
        TypeError, ValueError, RuntimeError: as `nt_xent`.

    Deterministic, O(N (D + E)) memory. The student's log-sum-exps are CLIP's, in one pass with their gradient; the
    teacher's take one pass of its similarities, and what it expects of the student's another.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(4)
        >>> fastntxent.distill(z, z, z, z, temperature=1.0)  # the entropy of softmax([1, 0, 0, 0])
        tensor(1.2683)
    """
    return distill_terms(
        "distill", image_features, text_features, teacher_image_features, teacher_text_features, temperature,
        teacher_temperature=teacher_temperature, logit_scale=logit_scale, teacher_logit_scale=teacher_logit_scale,
        reduction=reduction, normalize=normalize, backend=backend, group=group,
    ).distilled  # fmt: skip


@watched
def distill_terms(
    function: str,
    image_features: Tensor,
    text_features: Tensor,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    temperature: float | Tensor | None = None,
    *,
    teacher_temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    teacher_logit_scale: float | Tensor | None = None,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
) -> DistillTerms:
    """`distill` and the `clip` of the same features, which has most of it in it. function: what was called, for errors
    over ranks.

    With pi_i the logit of row i's positive, nu_i its log-sum-exp over the others and l_ij its logits,

        -sum_j p^T_ij log p^S_ij = softplus(nu_i - pi_i) + sum_{j != i} p^T_ij (pi_i - l_ij)

    The first is InfoNCE, so that nothing is subtracted that was added before, and the second is linear in the student's
    similarities.
    """
    _check_one_of("temperature", temperature, "logit_scale", logit_scale)
    _check_one_of("teacher_temperature", teacher_temperature, "teacher_logit_scale", teacher_logit_scale)
    batch = open_batch(
        group, function, {"image_features": image_features, "text_features": text_features}, reduction=reduction,
        normalize=normalize, backend=backend, temperature=temperature, logit_scale=logit_scale,
        teacher_temperature=teacher_temperature, teacher_logit_scale=teacher_logit_scale,
    )  # fmt: skip
    of_teacher = {"teacher_image_features": teacher_image_features, "teacher_text_features": teacher_text_features}
    for name, value in (("teacher_temperature", teacher_temperature), ("teacher_logit_scale", teacher_logit_scale)):
        if value is not None:
            check_temperature(value, image_features, name=name)
    t_image, t_text = _checked_teacher(of_teacher, image_features, may_be_empty=group is not None)
    k = _scale(batch, temperature, logit_scale)
    if teacher_temperature is None and teacher_logit_scale is None:
        t_k = k.detach() if isinstance(k, Tensor) else k
    else:
        t_k = _scale(batch, teacher_temperature, teacher_logit_scale)
        t_k = t_k.detach() if isinstance(t_k, Tensor) else t_k
    # Two terms give a gradient to the features, which near the teacher cancel: in half precision what is left would be
    # smaller than the rounding of either.
    image, text = (x.to(accumulation_dtype(x.dtype)) for x in (image_features, text_features))
    u, v = batch.unit_rows(image), batch.unit_rows(text)
    contrastive = batch.info_nce_at_once(image, text, k, both=True)
    if contrastive is None:
        directions = clip_directions(batch, u, v, k, None, 0.0)
        losses = directions.image_to_text / 2 + directions.text_to_image / 2
        if reduction == "none":
            return DistillTerms(losses, losses + _expected_loss(batch, u, v, k, t_image, t_text, t_k))
        contrastive = batch.reduce(losses)
    return DistillTerms(contrastive, contrastive + _expected_loss(batch, u, v, k, t_image, t_text, t_k))


def _expected_loss(
    batch: Batch, u: Tensor, v: Tensor, k: float | Tensor, t_image: Tensor, t_text: Tensor, t_k: float | Tensor
) -> Tensor:
    """Half of sum_{j != i} p^T_ij (pi_i - l_ij), and of the same over the columns' rows, of each sample, reduced."""
    ids = batch.sample_ids()
    rows, cols = Side(batch.as_compared(u), ids), Side(batch.as_compared(v), ids)
    teacher, missed = _teacher(batch, t_image, t_text, t_k)
    total = batch.soft_dots_at_once(rows, cols, teacher)
    if total is None:
        of_rows, of_cols = batch.soft_dots(rows, cols, teacher)
        return batch.reduce(k / 2 * (missed * row_dots(u, v) - of_rows - of_cols))
    loss = in_double(missed * row_dots(u, v)).sum() - total
    n = batch.n_samples if batch.reduction == "mean" else 1
    return (k / 2 * loss / n).to(u.dtype)


def _teacher(batch: Batch, t_image: Tensor, t_text: Tensor, t_k: float | Tensor) -> tuple[Teacher, Tensor]:
    """The teacher, and of each sample what its softmaxes give to other samples, in both directions."""
    others, ids = batch.beside(t_image), batch.sample_ids()
    a, b = others.unit_rows(t_image), others.unit_rows(t_text)
    pos = t_k * row_dots(a, b)
    a, b = others.as_compared(a), others.as_compared(b)
    nu_rows, nu_cols = others.cross_neg_lse(Side(a, ids), Side(b, ids), t_k)
    missed = torch.sigmoid(nu_rows - pos) + torch.sigmoid(nu_cols - pos)
    return Teacher(a, b, t_k, torch.logaddexp(nu_rows, pos), torch.logaddexp(nu_cols, pos)), missed


def _scale(batch: Batch, temperature: float | Tensor | None, logit_scale: float | Tensor | None) -> float | Tensor:
    if logit_scale is None:
        return batch.inverse_temperature(0.07 if temperature is None else temperature)
    return batch.logit_scale(logit_scale)


def _check_one_of(name: str, value: object, other_name: str, other: object) -> None:
    if value is not None and other is not None:
        raise ValueError(f"{name} and {other_name} must not both be given: one is the inverse of the other")


def _checked_teacher(features: dict[str, Tensor], student: Tensor, *, may_be_empty: bool) -> list[Tensor]:
    """The teacher's features without a gradient, in the dtype in which the student's are compared."""
    (a_name, a), (b_name, b) = features.items()
    for name, x in features.items():
        check_rows(name, x, may_be_empty=may_be_empty)
        if x.shape[0] != student.shape[0]:
            raise ValueError(
                f"{name} must have {student.shape[0]} rows, one for each of image_features, got {x.shape[0]}"
            )
        check_same("image_features", student, name, x, "device")
    check_same(a_name, a, b_name, b, "shape")
    return [x.detach().to(accumulation_dtype(student.dtype)) for x in (a, b)]
