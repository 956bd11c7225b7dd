"""NT-Xent as people write it in plain PyTorch, and the two references that losses are checked against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastntxent


def oracle(z_i: Tensor, z_j: Tensor, temperature: float, normalize: bool = True) -> Tensor:
    """Return NT-Xent from our dense reference."""
    return fastntxent.nt_xent(z_i, z_j, temperature, normalize=normalize, backend="reference")


def one_way(z_i: Tensor, z_j: Tensor, temperature: float) -> Tensor:
    """Return InfoNCE of the rows of z_i against all rows of z_j."""
    logits = F.normalize(z_i, dim=1) @ F.normalize(z_j, dim=1).T / temperature
    return (logits.logsumexp(dim=1) - logits.diagonal()).mean()


def dense(z_i: Tensor, z_j: Tensor, temperature: float, normalize: bool = True) -> Tensor:
    """Return NT-Xent in the usual few lines: the whole matrix, its diagonal masked, and cross-entropy."""
    n_samples = z_i.shape[0]
    z = torch.cat((z_i, z_j))
    if normalize:
        z = F.normalize(z, dim=1)
    logits = (z @ z.T) / temperature
    logits = logits.masked_fill(torch.eye(2 * n_samples, dtype=torch.bool, device=z.device), float("-inf"))
    targets = torch.arange(2 * n_samples, device=z.device).roll(n_samples)
    return F.cross_entropy(logits, targets)


def chunked(z_i: Tensor, z_j: Tensor, temperature: float, chunk: int = 512) -> Tensor:
    """Return the dense loss in chunks of rows, recomputed in the backward: plain PyTorch without the whole matrix."""
    z = F.normalize(torch.cat((z_i, z_j)), dim=1)
    rows = torch.arange(len(z), device=z.device)

    def part(z_rows: Tensor, own: Tensor, targets: Tensor) -> Tensor:
        logits = (z_rows / temperature) @ z.T
        logits.scatter_(1, own[:, None], float("-inf"))
        return F.cross_entropy(logits, targets, reduction="sum")

    chunks = zip(z.split(chunk), rows.split(chunk), rows.roll(len(z_i)).split(chunk), strict=True)
    sums = [checkpoint(part, *each, use_reentrant=False, preserve_rng_state=False) for each in chunks]
    return torch.stack(sums).sum() / len(z)


class FlexAttention:
    """NT-Xent from the log-sum-exp of PyTorch's FlexAttention, with the diagonal masked; the positives are computed
    separately."""

    def __init__(self, temperature: float, compiled: bool = True):
        from torch.nn.attention.flex_attention import AuxRequest, flex_attention  # not in every PyTorch

        self.temperature = temperature
        # For type checkers: torch.compile would keep only the first overload of flex_attention.
        attention: Callable[..., Any] = flex_attention
        self.attention = torch.compile(attention, dynamic=False) if compiled else attention
        self.wanted = AuxRequest(lse=True)

    def __call__(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        u_i, u_j = F.normalize(z_i, dim=1), F.normalize(z_j, dim=1)
        u = torch.cat((u_i, u_j)).to(z_i.dtype)[None, None]
        values = u[..., :16]  # narrow, since the attention's output is not used
        options = {"score_mod": _without_self, "scale": 1 / self.temperature, "return_aux": self.wanted}
        _, aux = self.attention(u, u, values, **options)
        return aux.lse.mean() - (u_i * u_j).sum(dim=1).mean() / self.temperature


def _without_self(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return torch.where(row == column, -float("inf"), score)
