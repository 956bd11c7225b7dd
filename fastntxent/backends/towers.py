"""InfoNCE and CLIP as O(N D) tensor code around cross_neg_lse, for backends that have no kernels for these losses.

loss_n = log(1 + exp(nu_n - pi_n)),  pi_n = k u_n . v_n      for query n, and for key n in the other direction
w_n    = sigmoid(nu_n - pi_n)                                d loss_n / d nu_n = - d loss_n / d pi_n
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra import direction_weight, row_dots, row_losses
from ..sides import Side
from .base import Upstream
from .rows import UnitRows
from .softplus import TiledSoftplus


class _Directions(NamedTuple):
    """Quantities that the value and the gradient share.

    `nu` is (1, N) or (2, N), with one row per direction in use; `sims` are u_n . v_n.
    """

    ids: Tensor
    nu_i: Tensor
    nu_j: Tensor
    nu: Tensor
    sims: Tensor
    pos: Tensor


class ComposedTowers(TiledSoftplus):
    """A backend whose InfoNCE and CLIP are O(N D) tensor code around cross_neg_lse."""

    def info_nce_value(
        self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool, both: bool, mean: bool
    ) -> Tensor:
        u, v = UnitRows(z_i, normalize).u, UnitRows(z_j, normalize).u
        found = self._directions(u, v, inv_tau, both)
        return (row_losses(found.nu, found.pos) * direction_weight(z_i, both, mean)).sum()

    def info_nce_scalar(
        self,
        z_i: Tensor,
        z_j: Tensor,
        inv_tau: float | Tensor,
        normalize: bool,
        both: bool,
        mean: bool,
        needs_i: bool,
        needs_j: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        queries, keys = UnitRows(z_i, normalize), UnitRows(z_j, normalize)
        u, v = queries.u, keys.u
        ids, nu_i, nu_j, nu, sims, pos = self._directions(u, v, inv_tau, both)
        weight = direction_weight(z_i, both, mean)
        w = torch.sigmoid(nu - pos) * weight
        w_j = w[1] if both else torch.zeros_like(nu_j)
        of_queries, of_keys = Upstream(w[0], nu_i, needs_i), Upstream(w_j, nu_j, needs_j)
        d_u, d_v, d_inv_tau = self.cross_neg_lse_backward(Side(u, ids), Side(v, ids), inv_tau, of_queries, of_keys)
        d_pos = -w.sum(dim=0)
        d_sims = (inv_tau * d_pos).unsqueeze(1)
        return (
            (row_losses(nu, pos) * weight).sum(),
            None if d_u is None else queries.backward(d_u.addcmul_(v, d_sims)),
            None if d_v is None else keys.backward(d_v.addcmul_(u, d_sims)),
            d_inv_tau + torch.dot(d_pos, sims),
        )

    def _directions(self, u: Tensor, v: Tensor, inv_tau: float | Tensor, both: bool) -> _Directions:
        ids = torch.arange(u.shape[0], device=u.device)
        nu_i, nu_j = self.cross_neg_lse(Side(u, ids), Side(v, ids), inv_tau)
        sims = row_dots(u, v)
        nu = torch.stack((nu_i, nu_j)) if both else nu_i.unsqueeze(0)
        return _Directions(ids, nu_i, nu_j, nu, sims, inv_tau * sims)
