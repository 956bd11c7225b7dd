"""A temperature that follows the model."""

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
    r"""MACL: NT-Xent whose temperature grows with the alignment of the batch, and whose easy rows are weighed up.

    .. math::
        L_i = \frac{\ell_i}{1 - e^{-\ell_i}}, \qquad \ell_i = \text{nt\_xent}_i \text{ at } \tau (1 + \alpha (A - A_0)),
        \qquad A = \frac{1}{N} \sum_n s_{n,p(n)}

    Huang et al., "Model-Aware Contrastive Learning: Towards Escaping the Dilemmas", 2023. No gradient goes through A or
    the weight 1 / (1 - exp(-l)). A row's loss tends to 1 as l tends to 0, and is 1 for N = 1. The mean is over the 2N
    rows. For temperatures of your own for each row, give them to `nt_xent`.

    Args:
        temperature: the base temperature.
        alpha: in [0, 1]: how far the temperature follows; 0 keeps it. It never falls below a thousandth of the base,
            where alpha = 1 and views that are opposites would take it to 0.
        a_0: in [0, 1]: the alignment at which it is the base temperature.

    The other arguments, errors, determinism and memory are those of `dcl`.

    Returns:
        A 0-d tensor, or (2N,) for "none", in the order [z_i; z_j]; float64 for float64 embeddings, else float32.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(4)
        >>> fastntxent.macl(z, z, temperature=0.5, alpha=1.0)  # nt_xent at 0.5 * 2, over 1 - 1 / (1 + 6 / e)
        tensor(1.6934)
    """
    alpha = check_parameter("alpha", alpha)
    a_0 = check_parameter("a_0", a_0)
    batch = open_batch(
        group, "macl", {"z_i": z_i, "z_j": z_j}, views=2, reduction=reduction, normalize=normalize, backend=backend,
        temperature=temperature, alpha=alpha, a_0=a_0,
    )  # fmt: skip
    inv_tau = batch.inverse_temperature(temperature)
    # Detached, where torch.jit.trace would leave a block of no_grad out.
    sims = row_dots(batch.unit_rows(z_i.detach()), batch.unit_rows(z_j.detach()))
    stretch = (1 + alpha * (batch.total(sims) / batch.n_samples - a_0)).clamp_min(1e-3)
    stretch = torch.where(stretch.isfinite(), stretch, 1.0)  # embeddings that are not show it in the losses
    nu, pos = batch.nt_xent_rows(z_i, z_j, inv_tau / stretch)
    return batch.reduce(_reweighted(nu, pos))


def _reweighted(nu: Tensor, pos: Tensor) -> Tensor:
    """l / (1 - exp(-l)) of the row losses l, with no gradient through the weight.

    With x = nu - pi, both 1 - exp(-l) and dl/dx are sigmoid(x), so the derivative in x is 1 and the second derivative
    is sigmoid(-x). They are attached to the value as such: for an easy row l and 1 - exp(-l) underflow, and their
    quotient is 1.
    """
    x = nu - pos
    losses = row_losses(nu.detach(), pos.detach())
    values = torch.where(losses < torch.finfo(x.dtype).tiny, 1, losses / -torch.expm1(-losses))
    step = (x - x.detach()).masked_fill(x.isinf(), 0)  # 0, with a gradient of 1
    return values + step + torch.sigmoid(-x.detach()) * step.square() / 2
