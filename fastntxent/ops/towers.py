"""InfoNCE and CLIP for two towers as operators: the scalar path, and the loss alone."""

from __future__ import annotations

from torch import Tensor

from .register import may_be_differentiated
from .scalar import register_scalar_path


def info_nce_scalar(
    z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool, both: bool, mean: bool, backend: str
) -> Tensor:
    """Return the sum or mean of N losses (InfoNCE): in loss n, the query z_i[n] picks its key z_j[n].

    With `both` (CLIP), return the mean of this loss and the loss in which each key picks its query. Differentiable in
    both sides and inv_tau. Backends can skip the gradient of a side that does not need one.
    """
    needs_i, needs_j = may_be_differentiated(z_i), may_be_differentiated(z_j)
    if needs_i or needs_j or may_be_differentiated(inv_tau):
        return _info_nce_scalar(z_i, z_j, inv_tau, normalize, both, mean, needs_i, needs_j, backend)
    return _info_nce_value(z_i, z_j, inv_tau, normalize, both, mean, backend)


_info_nce_scalar, _info_nce_value = register_scalar_path(
    "info_nce", "bool normalize, bool both, bool mean", with_needs=True
)
