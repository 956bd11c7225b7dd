"""Ways to compute NT-Xent, each as its users would write it: name -> loss(z_i, z_j, temperature)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastntxent

Loss = Callable[[Tensor, Tensor, float], Tensor]


def dense(z_i: Tensor, z_j: Tensor, temperature: float) -> Tensor:
    """The usual few lines: the whole matrix, its diagonal masked, cross-entropy."""
    n_samples = z_i.shape[0]
    z = F.normalize(torch.cat((z_i, z_j)), dim=1)
    logits = (z @ z.T) / temperature
    logits = logits.masked_fill(torch.eye(2 * n_samples, dtype=torch.bool, device=z.device), float("-inf"))
    targets = torch.arange(2 * n_samples, device=z.device).roll(n_samples)
    return F.cross_entropy(logits, targets)


def of_backend(name: str) -> Loss:
    """One of our backends."""
    return lambda z_i, z_j, temperature: fastntxent.nt_xent(z_i, z_j, temperature, backend=name)


def competitors() -> dict[str, Loss]:
    """All that run here; ours first."""
    ours = [name for name, status in fastntxent.backends().items() if status.available and name != "reference"]
    return {**{name: of_backend(name) for name in ours}, "eager": dense, "compiled": torch.compile(dense)}
