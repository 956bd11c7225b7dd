"""DCL and DCLW, the decoupled losses, as modules."""

from __future__ import annotations

from torch import Tensor

from ..losses import dcl, dclw
from ..validation import check_positive_number
from .base import ModuleOptions, TemperatureLoss, Unpack


class DCLLoss(TemperatureLoss):
    r"""DCL as a module: NT-Xent with the positive left out of the denominator.

    .. math:: L_i = -s_{i,p(i)}/\tau + \log \sum_{j \ne i, p(i)} e^{s_{ij}/\tau}

    Yeh et al., "Decoupled Contrastive Learning", 2022. The rows are [z_i; z_j], and p(i) is the other view of row i's
    sample. A loss may be negative. With N = 1 there are no negatives and the loss is 0.

    Call it as `loss(z_i, z_j)`; `forward` describes the arguments. `dcl` is the same loss as a function.

    Args:
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there. With `learn_temperature`, the value is
            read and initialises the parameter.
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
        >>> loss = fastntxent.DCLLoss(temperature=1.0)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(0.7918)
    """

    def __init__(self, temperature: float | Tensor = 0.1, **options: Unpack[ModuleOptions]):
        super().__init__(temperature, **options)

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
        return dcl(z_i, z_j, self.temperature, **self._options)


class DCLWLoss(TemperatureLoss):
    r"""DCLW, DCL with a von Mises-Fisher weight, as a module.

    .. math::
        L_i = -w_i s_{i,p(i)}/\tau + \log \sum_{j \ne i, p(i)} e^{s_{ij}/\tau}, \quad
        w_i = 2 - \frac{e^{s_{i,p(i)}/\sigma}}{\frac{1}{N} \sum_n e^{s_{n,p(n)}/\sigma}}

    Yeh et al., "Decoupled Contrastive Learning", 2022. The rows are [z_i; z_j], and p(i) is the other view of row i's
    sample. No gradient flows through the weights. A loss may be negative. With N = 1 there are no negatives and the
    loss is 0.

    Call it as `loss(z_i, z_j)`; `forward` describes the arguments. `dclw` is the same loss as a function.

    Args:
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there. With `learn_temperature`, the value is
            read and initialises the parameter.
        sigma: The bandwidth of the weights, a positive float. The larger it is, the closer the weights are to 1.
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
        >>> loss = fastntxent.DCLWLoss(temperature=1.0)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(0.7918)
    """

    _shown = ("sigma",)

    def __init__(self, temperature: float | Tensor = 0.1, *, sigma: float = 0.5, **options: Unpack[ModuleOptions]):
        super().__init__(temperature, **options)
        self.sigma = check_positive_number("sigma", sigma)

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
        return dclw(z_i, z_j, self.temperature, sigma=self.sigma, **self._options)
