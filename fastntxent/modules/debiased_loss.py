"""The debiased loss, and its variant HCL, which gives hard negatives more weight, as modules."""

from __future__ import annotations

from torch import Tensor

from ..losses import debiased, hard_negative
from ..validation import check_parameter
from .base import ModuleOptions, TemperatureLoss, Unpack


class DebiasedLoss(TemperatureLoss):
    r"""The debiased contrastive loss as a module.

    .. math::
        L_i = \log(1 + G_i e^{-s_{i,p(i)}/\tau}), \quad
        G_i = \max( \frac{e^{\nu_i} - \tau^+ n\, e^{s_{i,p(i)}/\tau}}{1 - \tau^+}, n\, e^{-1/\tau} )

    Chuang et al., "Debiased Contrastive Learning", 2020. The rows are [z_i; z_j], p(i) is the other view of row i's
    sample, and nu_i is the log-sum-exp over the n = 2N - 2 negatives. For cosine similarities, tau_plus = 0 gives
    `nt_xent`, because exp(nu_i) never falls below the lower bound n exp(-1/tau). The bound assumes cosine similarities,
    even with normalize=False. With N = 1 there are no negatives and the loss is 0.

    Call it as `loss(z_i, z_j)`; `forward` describes the arguments. `debiased` is the same loss as a function.

    Args:
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there. With `learn_temperature`, the value is
            read and initialises the parameter.
        tau_plus: The prior probability, in [0, 1), that a negative belongs to the row's own class.
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
        >>> loss = fastntxent.DebiasedLoss(temperature=1.0, tau_plus=0.1)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(1.0246)
    """

    _shown = ("tau_plus",)

    def __init__(self, temperature: float | Tensor = 0.5, *, tau_plus: float = 0.1, **options: Unpack[ModuleOptions]):
        super().__init__(temperature, **options)
        self.tau_plus = check_parameter("tau_plus", tau_plus)

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
        return debiased(z_i, z_j, self.temperature, tau_plus=self.tau_plus, **self._options)


class HardNegativeLoss(TemperatureLoss):
    r"""HCL, the debiased loss with hard negatives weighted up, as a module.

    .. math::
        L_i = \log(1 + G_i e^{-s_{i,p(i)}/\tau}), \quad
        G_i = \max( \frac{E_i - \tau^+ n\, e^{s_{i,p(i)}/\tau}}{1 - \tau^+}, n\, e^{-1/\tau} ), \quad
        E_i = \frac{\sum_j e^{(1 + \beta) s_{ij}/\tau}}{\frac{1}{n} \sum_j e^{\beta s_{ij}/\tau}}

    Robinson et al., "Contrastive Learning with Hard Negative Samples", 2021. The rows are [z_i; z_j], p(i) is the other
    view of row i's sample, and the sums run over the n = 2N - 2 negatives. Gradients flow through the weights too.
    With beta = 0 the loss is `debiased`. The lower bound n exp(-1/tau) assumes cosine similarities, even with
    normalize=False. With N = 1 there are no negatives and the loss is 0.

    Call it as `loss(z_i, z_j)`; `forward` describes the arguments. `hard_negative` is the same loss as a function.

    Args:
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there. With `learn_temperature`, the value is
            read and initialises the parameter.
        tau_plus: The prior probability, in [0, 1), that a negative belongs to the row's own class.
        beta: The concentration on hard negatives, 0 or more.
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
        >>> loss = fastntxent.HardNegativeLoss(temperature=1.0, tau_plus=0.1, beta=1.0)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(1.0246)
    """

    _shown = ("tau_plus", "beta")

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        tau_plus: float = 0.1,
        beta: float = 1.0,
        **options: Unpack[ModuleOptions],
    ):
        super().__init__(temperature, **options)
        self.tau_plus = check_parameter("tau_plus", tau_plus)
        self.beta = check_parameter("beta", beta)

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
        return hard_negative(z_i, z_j, self.temperature, tau_plus=self.tau_plus, beta=self.beta, **self._options)
