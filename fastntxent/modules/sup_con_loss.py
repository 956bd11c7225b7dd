"""The supervised contrastive loss as a module."""

from __future__ import annotations

from torch import Tensor

from ..losses import sup_con
from ..losses.false_negatives import Limits
from ..options import FORMS, SupConForm
from ..validation import check_choice
from .base import ModuleOptions, TemperatureLoss, Unpack


class SupConLoss(TemperatureLoss):
    r"""SupCon, the supervised contrastive loss, as a module.

    .. math::
        L^{out}_i = \log \sum_{all} e^{s_{ij}/\tau} - \frac{1}{|P(i)|} \sum_{p \in P(i)} s_{ip}/\tau

        L^{in}_i = \log \sum_{all} e^{s_{ij}/\tau} - \log \frac{1}{|P(i)|} \sum_{p \in P(i)} e^{s_{ip}/\tau}

        L^{pairs}_i = \frac{1}{|P(i)|} \sum_{p \in P(i)} \log(1 + \sum_{neg} e^{(s_{ij} - s_{ip})/\tau})

    P(i) are the positives of row i. The sums over "all" leave out row i itself; the sums over "neg" leave out the whole
    class of row i. "out" and "in" are equations 2 and 3 of Khosla et al., "Supervised Contrastive Learning", 2020.
    "pairs" has one NT-Xent term for each positive, without the other positives in its denominator, as in
    pytorch-metric-learning's `NTXentLoss`.

    With `pair_weights` W, every other row j is a positive of row i, with the weight W[y_i, y_j]; y are the labels:

    .. math::
        L^{W}_i = \log \sum_{all} e^{s_{ij}/\tau}
            - \frac{\sum_{j \ne i} W_{y_i y_j} s_{ij}/\tau}{\sum_{j \ne i} W_{y_i y_j}}

    A row without a positive has loss 0 in "none" and "sum", and "mean" leaves it out. If no row has a positive, "mean"
    is 0. A row without a positive is still a negative of the other rows. With `pair_weights`, a row has no positive if
    all other rows have weight 0 for it. The identity matrix as W gives the same loss as no weights. A ceiling removes
    negatives only.

    The module holds `pair_weights` as a buffer.

    Call it as `loss(z, labels)`; `forward` describes the arguments. `sup_con` is the same loss as a function.

    Args:
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there. With `learn_temperature`, the value is
            read and initialises the parameter.
        form: "out", "in" or "pairs", the formulas above.
        ceiling: Leave a negative out of row i's sum where its similarity to row i is above this finite float. None sets
            no limit. Cannot be combined with `pair_weights` or several labels per row.
        pair_weights: (C, C) finite floats, at least 0: W[a, b] is the weight of a row of class b as a positive of a row
            of class a. Only the proportions within a row of W count. Needs one label per row, in [0, C), and the form
            "out". No gradient flows through the weights. Every rank must pass the same tensor.
        reduction: "mean" over the rows with a positive, "sum", or "none" for one loss per row.
        normalize: True divides each row by max(||z||, 1e-12) like `torch.nn.functional.normalize` (by max(||z||,
            6.1e-5) in float16). False takes the rows as they are, and their products must not overflow.
        backend: "auto", which chooses one for the device, or a name from `backends()`.
        group: The ranks that hold the batch: "world" (the default process group, looked up at each call), a process
            group, a one-dimensional DeviceMesh, or a `Sharding`, which adds options. Each rank passes its own samples,
            any number of them, even none. Negatives come from all ranks. "mean" and "sum" cover the whole batch and are
            equal on every rank. Once DistributedDataParallel has averaged the parameters' gradients, these equal the
            gradients of one process with the whole batch. "none" returns this rank's losses. None: this rank's samples
            are the whole batch. Positives come from all ranks too.
        learn_temperature: Make the temperature a parameter. It is stored as its logarithm, `log_temperature`, so no
            optimiser step can make it negative. Exclude it from weight decay.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a number is out of range, or an option is unknown.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.SupConLoss(temperature=1.0)
        >>> loss(torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2))
        tensor(1.1654)
    """

    _shown = ("form", "ceiling")

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        form: SupConForm = "out",
        ceiling: float | None = None,
        pair_weights: Tensor | None = None,
        **options: Unpack[ModuleOptions],
    ):
        super().__init__(temperature, **options)
        check_choice("form", form, FORMS)
        Limits.checked(None, None, ceiling)
        self.form, self.ceiling = form, ceiling
        self.pair_weights: Tensor | None
        self.register_buffer("pair_weights", pair_weights)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of labelled rows.

        Args:
            z: (M, D) embeddings of all views of all samples, in any order, float16, bfloat16, float32 or float64.
            labels: (M,) integers, the class of each row; or (M, C), bool or integer, nonzero where row i has label c.
                With several labels per row, a pair of rows counts once for each label that both rows have, and the form
                must be "out".

        Returns:
            A 0-d tensor, or (M,) for "none"; float64 for float64 embeddings, else float32.
        """
        return sup_con(
            z,
            labels,
            self.temperature,
            form=self.form,
            ceiling=self.ceiling,
            pair_weights=self.pair_weights,
            **self._options,
        )
