"""Robust InfoNCE as a module."""

from __future__ import annotations

from torch import Tensor

from ..losses import rince
from ..validation import check_parameter
from .base import ModuleOptions, TemperatureLoss, Unpack


class RINCELoss(TemperatureLoss):
    r"""RINCE, robust InfoNCE, as a module.

    .. math::
        L_i = -\frac{e^{q s_{i,p(i)}/\tau}}{q} + \frac{1}{q} ( \lambda \sum_{j \ne i} e^{s_{ij}/\tau} )^{q}

    Chuang et al., "Robust Contrastive Learning against Noisy Views", 2022. The rows are [z_i; z_j], and p(i) is the
    other view of row i's sample. q = 1 is fully robust and symmetric; as q tends to 0 the loss tends to InfoNCE plus
    log(lam), in which one positive can contribute without bound. The first power can reach exp(q / tau), which fits
    into float32 for q / tau < 88; the second can be (lam (2N - 1))^q times as large.

    Call it as `loss(z_i, z_j)`; `forward` describes the arguments. `rince` is the same loss as a function.

    Args:
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there. With `learn_temperature`, the value is
            read and initialises the parameter.
        q: The robustness, in (0, 1]. 1 is fully robust.
        lam: The weight of the denominator, in (0, 1).
        reduction: "mean" over the 2N rows, "sum", or "none" for one loss per row.
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
        ValueError: a number is out of range, or an option is unknown.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.RINCELoss(temperature=1.0, q=1.0, lam=0.5)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(1.6409)
    """

    _shown = ("q", "lam")

    def __init__(
        self, temperature: float | Tensor = 0.5, *, q: float = 0.5, lam: float = 0.01, **options: Unpack[ModuleOptions]
    ):
        super().__init__(temperature, **options)
        self.q = check_parameter("q", q)
        self.lam = check_parameter("lam", lam)

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        """Return the loss of two views.

        Args:
            z_i: (N, D) embeddings of the first view, float16, bfloat16, float32 or float64, with any strides. Row n
                belongs to sample n.
            z_j: (N, D) embeddings of the second view, with the shape, dtype and device of `z_i`. Row n belongs to
                sample n.

        Returns:
            A 0-d tensor, or (2N,) in the order [z_i; z_j] for "none"; float64 for float64 embeddings, else float32.
        """
        return rince(z_i, z_j, self.temperature, q=self.q, lam=self.lam, **self._options)
