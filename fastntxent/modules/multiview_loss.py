"""NT-Xent of several views as a module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..losses import multiview_nt_xent
from ..losses.false_negatives import Limits
from ..validation import check_parameter
from .base import ModuleOptions, TemperatureLoss, Unpack


class MultiViewNTXentLoss(TemperatureLoss):
    r"""NT-Xent of V views as a module.

    .. math::
        L = \frac{1}{V N (V - 1)} \sum_{i=1}^{V N} \sum_{p \in P(i)} \log(1 + e^{\nu_i - s_{ip}/\tau}), \quad
        \nu_i = \log \sum_{j : n(j) \ne n(i)} e^{s_{ij}/\tau}

    P(i) are the other views of row i's sample n(i). Each ordered pair of views has one term, as in Tian et al.,
    "Contrastive Multiview Coding", 2020, with the negatives of all views. With V = 2 the loss is `nt_xent`.

    The options `margin`, `relative_margin` and `ceiling` leave a negative out only if its similarity exceeds the limit
    by more than rounding. A negative whose similarity is NaN stays in. No gradient flows through the choice of
    negatives. The least similar positive of a row sets the row's limit.

    Call it as `loss(views, ids=None)`; `forward` describes the arguments. `multiview_nt_xent` is the same loss as a
    function.

    Args:
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there. With `learn_temperature`, the value is
            read and initialises the parameter.
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
        reduction: "mean" over the V N rows, "sum", or "none" for one loss per row.
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
        >>> loss = fastntxent.MultiViewNTXentLoss(temperature=1.0)
        >>> loss(torch.eye(4).repeat(3, 1, 1))
        tensor(1.4612)
    """

    _shown = ("label_smoothing", "margin", "relative_margin", "ceiling")

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        label_smoothing: float = 0.0,
        margin: float | None = None,
        relative_margin: float | None = None,
        ceiling: float | None = None,
        **options: Unpack[ModuleOptions],
    ):
        super().__init__(temperature, **options)
        self.label_smoothing = check_parameter("label_smoothing", label_smoothing)
        Limits.checked(margin, relative_margin, ceiling, label_smoothing)
        self.margin, self.relative_margin, self.ceiling = margin, relative_margin, ceiling

    def forward(self, views: Tensor | Sequence[Tensor], ids: Tensor | None = None) -> Tensor:
        """Return the loss of V views.

        Args:
            views: (V, N, D), or a list or tuple of V tensors (N, D), with V >= 2. Row n of each view belongs to sample
                n.
            ids: (N,) integers, the group of each sample. Samples of the same group are not negatives of each other,
                which removes false negatives. An id must mean the same on every rank. None: every other sample is a
                negative.

        Returns:
            A 0-d tensor, or (V N,), view after view, for "none"; float64 for float64 embeddings, else float32.
        """
        return multiview_nt_xent(
            views,
            self.temperature,
            ids=ids,
            label_smoothing=self.label_smoothing,
            margin=self.margin,
            relative_margin=self.relative_margin,
            ceiling=self.ceiling,
            **self._options,
        )
