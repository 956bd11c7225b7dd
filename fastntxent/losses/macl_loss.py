"""MACL: a temperature that follows the alignment of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..algebra import row_dots, row_losses
from ..distributed import Group
from ..opening import open_batch
from ..options import BackendName, Reduction
from ..validation import check_parameter
from ..watching import watched


@watched
def macl(
    z_i: Tensor,
    z_j: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    alpha: float = 0.5,
    a_0: float = 0.0,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
) -> Tensor:
    r"""MACL: NT-Xent with a temperature that grows with the batch's alignment, and with easy rows weighted up.

    .. math::
        L_i = \frac{\ell_i}{1 - e^{-\ell_i}}, \quad
        \ell_i = \text{nt\_xent}_i \text{ at temperature } \tau (1 + \alpha (A - A_0)), \quad
        A = \frac{1}{N} \sum_n s_{n,p(n)}

    Huang et al., "Model-Aware Contrastive Learning: Towards Escaping the Dilemmas", 2023. The rows are [z_i; z_j], and
    p(n) is the other view of sample n. No gradient flows through A or the weight 1 / (1 - exp(-l)). A row's loss tends
    to 1 as l tends to 0, and is 1 for N = 1.

    To pass one temperature per row, use `nt_xent`.

    On the same device with the same number of threads, the same input gives the same bits. Extra memory is O(N D);
    the reference backend takes O(N^2).

    Args:
        z_i: (N, D) embeddings of the first view, float16, bfloat16, float32 or float64, with any strides. Row n belongs
            to sample n.
        z_j: (N, D) embeddings of the second view, with the shape, dtype and device of `z_i`. Row n belongs to sample n.
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there. This is the base temperature.
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

    Returns:
        A 0-d tensor, or (2N,) in the order [z_i; z_j] for "none"; float64 for float64 embeddings, else float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, dtypes or devices do not match, the batch is empty, a number is out of range, or an option
            is unknown, differs between ranks or cannot be combined with another.
        RuntimeError: the backend is not available here (the message says why), a rank of the group does not answer or
            is in a different call, or a second derivative is requested, which only backend="reference" without a group
            supports.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(4)
        >>> fastntxent.macl(z, z, temperature=0.5, alpha=1.0)  # nt_xent at 0.5 * 2, divided by 1 - 1 / (1 + 6 / e)
        tensor(1.6934)
    """
    alpha = check_parameter("alpha", alpha)
    a_0 = check_parameter("a_0", a_0)
    batch = open_batch(
        group, "macl", {"z_i": z_i, "z_j": z_j}, views=2, reduction=reduction, normalize=normalize, backend=backend,
        temperature=temperature, alpha=alpha, a_0=a_0,
    )  # fmt: skip
    inv_tau = batch.inverse_temperature(temperature)
    # Detached, because torch.jit.trace would ignore a no_grad block.
    sims = row_dots(batch.unit_rows(z_i.detach()), batch.unit_rows(z_j.detach()))
    stretch = (1 + alpha * (batch.total(sims) / batch.n_samples - a_0)).clamp_min(1e-3)
    stretch = torch.where(stretch.isfinite(), stretch, 1.0)  # non-finite embeddings make the losses non-finite anyway
    nu, pos = batch.nt_xent_rows(z_i, z_j, inv_tau / stretch)
    return batch.reduce(_reweighted(nu, pos))


def _reweighted(nu: Tensor, pos: Tensor) -> Tensor:
    """Return l / (1 - exp(-l)) for the row losses l, without a gradient through the weight.

    With x = nu - pi, both 1 - exp(-l) and dl/dx are sigmoid(x). So the result has the derivative 1 with respect to x,
    and the second derivative sigmoid(-x). Both derivatives are attached to the value explicitly, because for an easy
    row both l and 1 - exp(-l) underflow, although their quotient is 1.
    """
    x = nu - pos
    losses = row_losses(nu.detach(), pos.detach())
    values = torch.where(losses < torch.finfo(x.dtype).tiny, 1, losses / -torch.expm1(-losses))
    step = (x - x.detach()).masked_fill(x.isinf(), 0)  # 0, with a gradient of 1
    return values + step + torch.sigmoid(-x.detach()) * step.square() / 2
