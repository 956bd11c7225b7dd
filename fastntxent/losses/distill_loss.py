"""The loss of a two-tower student whose targets are a teacher's softmaxes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..algebra import accumulation_dtype, in_double, row_dots
from ..batch import Batch
from ..distributed import Group
from ..opening import open_batch
from ..ops import uncompiled
from ..options import BackendName, Reduction
from ..sides import CalledTeacher, Side, Teacher
from ..validation import FLOAT_DTYPES, check_row_each, check_rows, check_same, check_temperature, check_tensor, extremes
from ..watching import watched
from .clip_loss import clip_directions

Similarities: TypeAlias = Callable[[Tensor, Tensor], Tensor]

_LARGEST_SHARED_LOGIT = 256.0  # at this logit, kernels that round differently disagree by 2e-5 in float32


class DistillTerms(NamedTuple):
    """A student's two losses, reduced: CLIP's loss of the pairs, and the cross-entropy with the teacher."""

    contrastive: Tensor
    distilled: Tensor


def distill(
    image_features: Tensor,
    text_features: Tensor,
    teacher_image_features: Tensor | None = None,
    teacher_text_features: Tensor | None = None,
    temperature: float | Tensor | None = None,
    *,
    teacher: Callable[[Tensor, Tensor], Tensor] | None = None,
    teacher_temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    teacher_logit_scale: float | Tensor | None = None,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
) -> Tensor:
    r"""Distillation of two towers: the cross-entropy of a student's softmaxes with a teacher's.

    .. math::
        L = -\frac{1}{2N} \sum_{i=1}^{N} \sum_{j=1}^{N} [ p^T_{ij} \log p^S_{ij} + q^T_{ij} \log q^S_{ij} ], \quad
        p_{ij} = \frac{e^{s_{ij}/\tau}}{\sum_l e^{s_{il}/\tau}}, \quad
        q_{ij} = \frac{e^{s_{ij}/\tau}}{\sum_l e^{s_{lj}/\tau}}

    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, between two towers. p^S and q^S come from the
    student's similarities and temperature, p^T and q^T from the teacher's. The loss is smallest if the student's
    softmaxes equal the teacher's. It is then the mean entropy of the teacher's softmaxes.

    For features that are normalised already, `normalize=False` gives the distillation loss of open_clip's
    `DistillClipLoss`. The loss is differentiable with respect to the student's features and the student's temperature
    or logit scale.

    On the same device with the same number of threads, the same input gives the same bits. Extra memory is O(N (D +
    E)); the reference backend takes O(N^2). The student's log-sum-exps are computed as in `clip`. The teacher's
    log-sum-exps take one pass over its similarities, and the expectation of the student's similarities under the
    teacher takes another.

    A `teacher` is called without gradients and with autocast off, for tiles of at most 512 x 512 (4,096 x 4,096 on an
    accelerator). Each pair is requested twice: once for the teacher's log-sum-exps, and once for the expectation and
    its gradient. With reduction="none" the backward requests each pair a third time. In a group, an index is a position
    among the samples of all ranks, in rank order. In the forward, each rank requests the pairs of its own images with
    all texts twice. In the backward, it requests these pairs once more, and the pairs of all images with its own texts
    once. The reference backend makes two calls, each for all pairs. Under torch.compile a `teacher` causes a graph
    break.

    Args:
        image_features: (N, D) features of the images, float16, bfloat16, float32 or float64. Row n belongs to sample n.
        text_features: (N, D) features of the texts, with the shape, dtype and device of `image_features`. Row n belongs
            to sample n.
        teacher_image_features: (N, E) features of the same images from the teacher, of any floating-point dtype. They
            get no gradient. None where `teacher` is given.
        teacher_text_features: (N, E) features of the same texts from the teacher, like `teacher_image_features`.
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there. None: 0.07, unless `logit_scale` is
            given.
        teacher: A function in place of the teacher's features, for similarities that are not products of features.
            `teacher(rows, cols)` gets the indices of images and of texts, two 1-d int64 tensors on the student's
            device, and returns the (len(rows), len(cols)) similarities of each of these images to each of these texts,
            in any floating-point dtype on that device, before the teacher's temperature is applied. `normalize` does
            not affect the similarities. A similarity of -inf gives a pair the probability 0; the pair's image and text
            must each have another pair above -inf. The function must return the same values at every call.
        teacher_temperature: The teacher's temperature, like `temperature` but without a gradient. None: the student's,
            unless `teacher_logit_scale` is given.
        logit_scale: 1 / tau in place of `temperature`: a positive float or a 0-d floating-point tensor, such as
            `log_scale.exp()` with a learnt parameter `log_scale`.
        teacher_logit_scale: The teacher's logit scale in place of `teacher_temperature`, like `logit_scale` but without
            a gradient.
        reduction: "mean" over the N samples, "sum", or "none" for one loss per sample.
        normalize: True divides each row by max(||z||, 1e-12) like `torch.nn.functional.normalize` (by max(||z||,
            6.1e-5) in float16). False takes the rows as they are, and their products must not overflow. The teacher's
            features are treated in the same way.
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
        TypeError: an argument has the wrong type or dtype, there is no teacher, or `teacher` returns something other
            than a floating-point tensor.
        ValueError: shapes, dtypes or devices do not match, the batch is empty, a number is out of range, or an option
            is unknown, differs between ranks or cannot be combined with another; or a teacher is given in both forms.
        RuntimeError: the backend is not available here (the message says why), a rank of the group does not answer or
            is in a different call, or a second derivative is requested, which only backend="reference" without a group
            supports.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(4)
        >>> fastntxent.distill(z, z, z, z, temperature=1.0)  # the entropy of softmax([1, 0, 0, 0])
        tensor(1.2683)
        >>> fastntxent.distill(z, z, teacher=lambda rows, cols: z[rows] @ z[cols].T, temperature=1.0)  # the same
        tensor(1.2683)
    """
    return distill_terms(
        "distill", image_features, text_features, teacher_image_features, teacher_text_features, temperature,
        teacher=teacher, teacher_temperature=teacher_temperature, logit_scale=logit_scale,
        teacher_logit_scale=teacher_logit_scale, reduction=reduction, normalize=normalize, backend=backend, group=group,
    ).distilled  # fmt: skip


@watched
def distill_terms(
    function: str,
    image_features: Tensor,
    text_features: Tensor,
    teacher_image_features: Tensor | None = None,
    teacher_text_features: Tensor | None = None,
    temperature: float | Tensor | None = None,
    *,
    teacher: Similarities | None = None,
    teacher_temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    teacher_logit_scale: float | Tensor | None = None,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
) -> DistillTerms:
    """Return the losses `clip` and `distill` of the same features. `distill` computes most of `clip` anyway.

    With pi_i the logit of row i's positive, nu_i the log-sum-exp over the other columns and l_ij the logits,

        -sum_j p^T_ij log p^S_ij = softplus(nu_i - pi_i) + sum_{j != i} p^T_ij (pi_i - l_ij)

    The first term is InfoNCE, computed without adding the positive to a sum and then subtracting it. The second is
    linear in the student's similarities.

    function: the name of the public function, for the error message if ranks disagree.
    """
    _check_one_of("temperature", temperature, "logit_scale", logit_scale)
    _check_one_of("teacher_temperature", teacher_temperature, "teacher_logit_scale", teacher_logit_scale)
    features = {"teacher_image_features": teacher_image_features, "teacher_text_features": teacher_text_features}
    _check_one_teacher(teacher, features)
    batch = open_batch(
        group, function, {"image_features": image_features, "text_features": text_features}, reduction=reduction,
        normalize=normalize, backend=backend, temperature=temperature, logit_scale=logit_scale,
        teacher_temperature=teacher_temperature, teacher_logit_scale=teacher_logit_scale,
        teacher="features" if teacher is None else "a function",
    )  # fmt: skip
    for name, value in (("teacher_temperature", teacher_temperature), ("teacher_logit_scale", teacher_logit_scale)):
        if value is not None:
            check_temperature(value, image_features, name=name)
    t_features = (
        [] if teacher is not None else _checked_features(features, image_features, may_be_empty=group is not None)
    )
    k = _scale(batch, temperature, logit_scale)
    if teacher_temperature is None and teacher_logit_scale is None:
        t_k = k.detach() if isinstance(k, Tensor) else k
    else:
        t_k = _scale(batch, teacher_temperature, teacher_logit_scale)
        t_k = t_k.detach() if isinstance(t_k, Tensor) else t_k
    # The features get gradients from two terms, which nearly cancel where the student is close to the teacher. In half
    # precision the rounding of each term would exceed their sum.
    image, text = (x.to(accumulation_dtype(x.dtype)) for x in (image_features, text_features))
    u, v = batch.unit_rows(image), batch.unit_rows(text)
    contrastive = batch.info_nce_at_once(image, text, k, both=True)
    if contrastive is None:
        directions = clip_directions(batch, u, v, k, None, 0.0)
        contrastive = batch.reduce(directions.image_to_text / 2 + directions.text_to_image / 2)
    if teacher is None:
        expected = _expected_loss(batch, u, v, k, *_of_features(batch, t_features, t_k))
    else:
        expected = _expected_loss(batch, u, v, k, *_of_function(batch, teacher, t_k, u.dtype))
    return DistillTerms(contrastive, contrastive + expected)


def _expected_loss(
    batch: Batch, u: Tensor, v: Tensor, k: float | Tensor, teacher: Teacher | CalledTeacher, missed: Tensor
) -> Tensor:
    """Return half the sum over j != i of p^T_ij (pi_i - l_ij), added over both directions and reduced over samples."""
    ids = batch.sample_ids()
    rows, cols = Side(batch.as_compared(u), ids), Side(batch.as_compared(v), ids)
    total = batch.soft_dots_at_once(rows, cols, teacher)
    if total is None:
        of_rows, of_cols = batch.soft_dots(rows, cols, teacher)
        return batch.reduce(k / 2 * (missed * row_dots(u, v) - of_rows - of_cols))
    loss = in_double(missed * row_dots(u, v)).sum() - total
    n = batch.n_samples if batch.reduction == "mean" else 1
    return (k / 2 * loss / n).to(u.dtype)


def _of_features(batch: Batch, features: Sequence[Tensor], t_k: float | Tensor) -> tuple[Teacher, Tensor]:
    """Return the teacher, and for each sample the probability that the teacher's softmaxes give to other samples, added
    over both directions."""
    t_image, t_text = features
    others, ids = batch.beside(t_image), batch.sample_ids()
    a, b = others.unit_rows(t_image), others.unit_rows(t_text)
    pos = t_k * row_dots(a, b)
    a, b = others.as_compared(a), others.as_compared(b)
    if _is_sharp(a, b, t_k, batch.normalize):
        others = others.in_tiles()
    nu_rows, nu_cols = others.cross_neg_lse(Side(a, ids), Side(b, ids), t_k)
    missed = torch.sigmoid(nu_rows - pos) + torch.sigmoid(nu_cols - pos)
    return Teacher(a, b, t_k, torch.logaddexp(nu_rows, pos), torch.logaddexp(nu_cols, pos)), missed


def _is_sharp(a: Tensor, b: Tensor, t_k: float | Tensor, normalize: bool) -> bool:
    """Return whether the host can tell that the teacher's logits are large.

    Two kernels round a logit differently, by about eps |k s| / 2. If one forms the log-sum-exps and another the
    probabilities, the difference becomes a relative error of the probabilities.
    """
    largest = (t_k, t_k) if not isinstance(t_k, Tensor) else extremes(t_k)
    if largest is None:
        return False
    lengths = () if normalize else [extremes(torch.linalg.vector_norm(x, dim=1)) for x in (a, b)]
    return math.prod((largest[1], *(found[1] for found in lengths if found))) > _LARGEST_SHARED_LOGIT


@uncompiled
def _of_function(
    batch: Batch, teacher: Similarities, t_k: float | Tensor, dtype: torch.dtype
) -> tuple[CalledTeacher, Tensor]:
    """Like `_of_features`, for a teacher that is a function."""

    def similarities(rows: Tensor, cols: Tensor) -> Tensor:
        with torch.no_grad():
            found = teacher(rows, cols)
        _check_similarities(found, rows, cols)
        return found.detach().to(dtype)

    nu_rows, nu_cols, pos = batch.called_neg_lse(similarities, t_k, dtype)
    missed = torch.sigmoid(nu_rows - pos) + torch.sigmoid(nu_cols - pos)
    return CalledTeacher(similarities, t_k, torch.logaddexp(nu_rows, pos), torch.logaddexp(nu_cols, pos)), missed


def _check_similarities(found: Tensor, rows: Tensor, cols: Tensor) -> None:
    """Check the similarities that the teacher returned for these images and texts."""
    name = "teacher(rows, cols)"
    check_tensor(name, found)
    if found.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {found.dtype}")
    if found.shape != (len(rows), len(cols)):
        raise ValueError(
            f"{name} must have shape ({len(rows)}, {len(cols)}), the lengths of rows and cols, got {tuple(found.shape)}"
        )
    if found.device != rows.device:
        raise ValueError(f"{name} must be on the device of its arguments ({rows.device}), got {found.device}")


def _check_one_teacher(teacher: object, features: Mapping[str, Any]) -> None:
    given = [name for name, x in features.items() if x is not None]
    if teacher is None:
        if not given:
            raise TypeError(f"either {' and '.join(features)}, or teacher, must be given")
    elif given:
        raise ValueError(f"teacher must not be given with {' and '.join(given)}: it replaces them")
    elif not callable(teacher):
        raise TypeError(f"teacher must be a function of image and text indices, got {type(teacher).__name__}")


def _scale(batch: Batch, temperature: float | Tensor | None, logit_scale: float | Tensor | None) -> float | Tensor:
    if logit_scale is None:
        return batch.inverse_temperature(0.07 if temperature is None else temperature)
    return batch.logit_scale(logit_scale)


def _check_one_of(name: str, value: object, other_name: str, other: object) -> None:
    if value is not None and other is not None:
        raise ValueError(f"{name} and {other_name} must not both be given: one is the inverse of the other")


def _checked_features(features: Mapping[str, Any], student: Tensor, *, may_be_empty: bool) -> list[Tensor]:
    """Return the teacher's features without a gradient, in the accumulation dtype of the student."""
    (a_name, a), (b_name, b) = features.items()
    for name, x in features.items():
        check_rows(name, x, may_be_empty=may_be_empty)
        check_row_each(name, x, "image_features", student)
        check_same("image_features", student, name, x, "device")
    check_same(a_name, a, b_name, b, "shape")
    return [x.detach().to(accumulation_dtype(student.dtype)) for x in (a, b)]
