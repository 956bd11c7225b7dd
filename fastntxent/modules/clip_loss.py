"""CLIP's loss for two or more towers as a module that holds its own logit scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..algebra import in_double
from ..losses import clip, multi_clip
from ..losses.false_negatives import Limits
from ..losses.info_nce_loss import check_positives
from ..options import Positives, SeveralForm
from ..validation import check_parameter, check_weights
from .base import LossOptions, TemperatureLoss, Unpack


class _AtMost(torch.autograd.Function):
    """min(x, bound). Above the bound, a gradient that would raise x is dropped, and one that lowers it passes."""

    @staticmethod
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.clamp_max(bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0] > inputs[1])

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, None]:
        (beyond,) = ctx.saved_tensors
        return torch.where(beyond & (d_x < 0), 0, d_x), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, bound: float) -> tuple[Tensor, int | None]:
        return _AtMost.apply(x, bound), in_dims[0]  # it works entry by entry


class CLIPLoss(TemperatureLoss):
    r"""CLIP's loss as a module that holds its own logit scale.

    .. math::
        L = \frac{1}{2N} \sum_{n=1}^{N} [ \log(1 + e^{\nu^{img}_n - \pi_n}) + \log(1 + e^{\nu^{txt}_n - \pi_n}) ], \quad
        \pi_n = s_{nn}/\tau

    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021. nu^img_n is the
    log-sum-exp of image n's logits with the other texts, and nu^txt_n the log-sum-exp of text n's logits with the other
    images.

    With positives="same_id" and form "out", the positives are part of the denominator. Near convergence the gradient
    then has an absolute error of about eps / tau, the rounding error of a logit (eps is the machine epsilon). The
    gradient of form "in" keeps its relative accuracy. If every row has one positive, both forms give the same loss.

    The options `margin`, `relative_margin` and `ceiling` leave a negative out only if its similarity exceeds the limit
    by more than rounding. A negative whose similarity is NaN stays in. No gradient flows through the choice of
    negatives.

    The module holds the temperature (the inverse of the logit scale) and learns it by default, as CLIP does.
    `logit_scale` is the scale that the loss uses, at most `max_logit_scale`.

    Call it as `loss(image_features, text_features, ids=None)`; `forward` describes the arguments. `clip` is the same
    loss as a function.

    Args:
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there. With `learn_temperature`, the value is
            read and initialises the parameter.
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
        max_logit_scale: An upper bound of the logit scale, a positive float; CLIP was trained with 100. Above it, a
            gradient that would raise the scale is dropped, and one that lowers it passes. None: no bound.
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
        learn_temperature: Make the temperature a parameter. It is stored as its logarithm, `log_temperature`, so no
            optimiser step can make it negative. Exclude it from weight decay.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a number is out of range, or an option is unknown or cannot be combined with another.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.CLIPLoss(temperature=1.0)
        >>> loss(torch.eye(4), torch.eye(4)).detach()  # log(e + 3) - 1
        tensor(0.7437)
    """

    _shown: tuple[str, ...] = (
        "positives",
        "form",
        "label_smoothing",
        "margin",
        "relative_margin",
        "ceiling",
        "max_logit_scale",
    )

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        positives: Positives = "pair",
        form: SeveralForm = "out",
        label_smoothing: float = 0.0,
        margin: float | None = None,
        relative_margin: float | None = None,
        ceiling: float | None = None,
        max_logit_scale: float | None = 100.0,
        learn_temperature: bool = True,
        **options: Unpack[LossOptions],
    ):
        super().__init__(temperature, learn_temperature=learn_temperature, **options)
        self.label_smoothing = check_parameter("label_smoothing", label_smoothing)
        limits = Limits.checked(margin, relative_margin, ceiling, label_smoothing)
        check_positives(positives, form, limits, label_smoothing=label_smoothing)
        self.positives, self.form = positives, form
        self.margin, self.relative_margin, self.ceiling = margin, relative_margin, ceiling
        if max_logit_scale is not None:
            max_logit_scale = check_parameter("max_logit_scale", max_logit_scale)
        self.max_logit_scale = max_logit_scale

    @property
    def logit_scale(self) -> float | Tensor:
        """1 / temperature, clamped to `max_logit_scale`: a float, or a 0-d tensor in float64 where the device supports
        it."""
        bound = self.max_logit_scale
        if self.learn_temperature:
            log_temperature = in_double(self.log_temperature)
        elif isinstance(self._temperature, Tensor):
            log_temperature = in_double(self._temperature).log()
        else:
            return min(1 / self._temperature, math.inf if bound is None else bound)
        if bound is None:
            return torch.exp(-log_temperature)
        # Bound the logarithm, since the scale and its gradient may overflow.
        return bound * torch.exp(_AtMost.apply(-log_temperature - math.log(bound), 0.0))

    @property
    def _of_clip(self) -> dict[str, Any]:
        return {
            "logit_scale": self.logit_scale,
            "positives": self.positives,
            "form": self.form,
            "label_smoothing": self.label_smoothing,
            "margin": self.margin,
            "relative_margin": self.relative_margin,
            "ceiling": self.ceiling,
            **self._options,
        }

    def forward(self, image_features: Tensor, text_features: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return the loss of two towers.

        Args:
            image_features: (N, D) features of the images, float16, bfloat16, float32 or float64. Row n belongs to
                sample n.
            text_features: (N, D) features of the texts, with the shape, dtype and device of `image_features`. Row n
                belongs to sample n.
            ids: (N,) integers, the group of each sample. Samples of the same group are not negatives of each other,
                which removes false negatives. An id must mean the same on every rank. None: every other sample is a
                negative. Required for positives="same_id".

        Returns:
            A 0-d tensor, or (N,) for "none"; float64 for float64 features, else float32.
        """
        return clip(image_features, text_features, ids=ids, **self._of_clip)


class MultiCLIPLoss(CLIPLoss):
    r"""CLIP's loss of every pair among several towers, as a module that holds its own logit scale.

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

    The module holds the temperature (the inverse of the logit scale) and learns it by default, as CLIP does.
    `logit_scale` is the scale that the loss uses, at most `max_logit_scale`.

    Call it as `loss(features, ids=None)`; `forward` describes the arguments. `multi_clip` is the same loss as a
    function.

    Args:
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there. With `learn_temperature`, the value is
            read and initialises the parameter.
        weights: One finite number, at least 0, for each pair of towers, in the order (0, 1), (0, 2), ..., (1, 2), ...;
            at least one is above 0. A pair of weight 0 costs nothing. None: each pair has the weight 1 / (number of
            pairs).
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
        max_logit_scale: An upper bound of the logit scale, a positive float; CLIP was trained with 100. Above it, a
            gradient that would raise the scale is dropped, and one that lowers it passes. None: no bound.
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
        learn_temperature: Make the temperature a parameter. It is stored as its logarithm, `log_temperature`, so no
            optimiser step can make it negative. Exclude it from weight decay.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a number is out of range, or an option is unknown or cannot be combined with another.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.MultiCLIPLoss(temperature=1.0)
        >>> loss([torch.eye(4)] * 3).detach()  # log(e + 3) - 1 for each pair
        tensor(0.7437)
    """

    _shown = (*CLIPLoss._shown, "weights")

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        weights: Sequence[float] | None = None,
        positives: Positives = "pair",
        form: SeveralForm = "out",
        label_smoothing: float = 0.0,
        margin: float | None = None,
        relative_margin: float | None = None,
        ceiling: float | None = None,
        max_logit_scale: float | None = 100.0,
        learn_temperature: bool = True,
        **options: Unpack[LossOptions],
    ):
        super().__init__(
            temperature,
            positives=positives,
            form=form,
            label_smoothing=label_smoothing,
            margin=margin,
            relative_margin=relative_margin,
            ceiling=ceiling,
            max_logit_scale=max_logit_scale,
            learn_temperature=learn_temperature,
            **options,
        )
        self.weights = None if weights is None else check_weights("weights", weights, "a number for each pair")

    def forward(self, features: Sequence[Tensor], ids: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Return the loss of all pairs of towers.

        Args:
            features: T >= 2 tensors (N, D) of the same shape, dtype and device, one per tower. Row n of each belongs to
                sample n.
            ids: (N,) integers, the group of each sample. Samples of the same group are not negatives of each other,
                which removes false negatives. An id must mean the same on every rank. None: every other sample is a
                negative. Required for positives="same_id".

        Returns:
            A 0-d tensor, or (N,) for "none"; float64 for float64 features, else float32.
        """
        return multi_clip(features, weights=self.weights, ids=ids, **self._of_clip)
