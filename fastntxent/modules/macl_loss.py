"""MACL, whose temperature adapts to the batch, as a module."""

from __future__ import annotations

from torch import Tensor

from ..losses import macl
from ..validation import check_parameter
from .base import ModuleOptions, TemperatureLoss, Unpack


class MACLLoss(TemperatureLoss):
    r"""MACL, NT-Xent with a temperature that adapts to the batch, as a module.

    .. math::
        L_i = \frac{\ell_i}{1 - e^{-\ell_i}}, \quad
        \ell_i = \text{nt\_xent}_i \text{ at temperature } \tau (1 + \alpha (A - A_0)), \quad
        A = \frac{1}{N} \sum_n s_{n,p(n)}

    Huang et al., "Model-Aware Contrastive Learning: Towards Escaping the Dilemmas", 2023. The rows are [z_i; z_j], and
    p(n) is the other view of sample n. No gradient flows through A or the weight 1 / (1 - exp(-l)). A row's loss tends
    to 1 as l tends to 0, and is 1 for N = 1.

    Call it as `loss(z_i, z_j)`; `forward` describes the arguments. `macl` is the same loss as a function.

    Args:
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there. With `learn_temperature`, the value is
            read and initialises the parameter. This is the base temperature.
        alpha: How far the temperature follows the alignment A, in [0, 1]. 0 keeps the temperature fixed. The
            temperature never falls below a thousandth of the base, which matters where alpha (A - A_0) is close to -1
            or below.
        a_0: The alignment at which the temperature equals the base, in [0, 1].
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
        >>> loss = fastntxent.MACLLoss(temperature=0.5, alpha=1.0)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(1.6934)
    """

    _shown = ("alpha", "a_0")

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        alpha: float = 0.5,
        a_0: float = 0.0,
        **options: Unpack[ModuleOptions],
    ):
        super().__init__(temperature, **options)
        self.alpha = check_parameter("alpha", alpha)
        self.a_0 = check_parameter("a_0", a_0)

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
        return macl(z_i, z_j, self.temperature, alpha=self.alpha, a_0=self.a_0, **self._options)
