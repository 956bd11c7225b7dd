"""The dense oracle: the M x M logits, held whole, in plain differentiable PyTorch.

It is the only truth of the project, and is itself held against an independent NumPy loop. Autograd goes through it
rather than through a hand-written backward, so its gradients are no relatives of the kernels', and it may be
differentiated any number of times. Float64 in gives float64 throughout; narrower input is computed in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Backend, accumulation_dtype, norm_eps


class ReferenceBackend(Backend):
    def neg_lse(self, u: Tensor, ids: Tensor, inv_tau: Tensor) -> Tensor:
        u = u.to(accumulation_dtype(u.dtype))
        return _masked_logsumexp(inv_tau * (u @ u.T), ids[:, None] != ids)

    def cross_neg_lse(
        self, u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: Tensor
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(u.dtype)
        logits, mask = inv_tau * (u.to(dtype) @ v.to(dtype).T), u_ids[:, None] != v_ids
        return _masked_logsumexp(logits, mask), _masked_logsumexp(logits.T, mask.T)

    def nt_xent_rows(self, z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
        n_samples = z_i.shape[0]
        u = torch.cat((z_i, z_j)).to(accumulation_dtype(z_i.dtype))
        if normalize:
            u = F.normalize(u, dim=1, eps=norm_eps(z_i.dtype))
        row = torch.arange(2 * n_samples, device=u.device)
        sample, partner = row % n_samples, (row + n_samples) % (2 * n_samples)
        logits = inv_tau * (u @ u.T)
        pos = logits.gather(1, partner[:, None]).squeeze(1)
        return _masked_logsumexp(logits, sample[:, None] != sample), pos


def _masked_logsumexp(logits: Tensor, mask: Tensor) -> Tensor:
    """log of the sum of exp(logits) over each row where mask is True; -inf, with no gradient, where it never is."""
    some = mask.any(dim=1)
    # A row without a term keeps its logits and gets its -inf afterwards: logsumexp's gradient at -inf is NaN.
    logits = torch.where(mask | ~some[:, None], logits, -torch.inf)
    return torch.where(some, torch.logsumexp(logits, dim=1), -torch.inf)


BACKEND = ReferenceBackend()
