"""The place of each row's positive, a block of rows at a time; an operator, so that a graph is the same for any number
of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.base import swap_views
from .contract import checked
from .register import autocast_off, register

_TILE = 2**22  # similarities held at once


def _forward(u: Tensor) -> Tensor:
    (u,) = checked("positive_ranks", u)
    M = u.shape[0]
    every = torch.arange(M, device=u.device)
    partner = swap_views(every)
    ranks = torch.empty_like(partner)
    with autocast_off(u):
        for rows in every.split(max(1, _TILE // max(1, M))):
            sims = u[rows] @ u.T
            pos = sims.gather(1, partner[rows, None])
            sims.scatter_(1, rows[:, None], -torch.inf)  # itself is worse than any
            worse = (sims < pos).sum(dim=1)  # not so of a NaN
            ranks[rows] = (M - worse).clamp_max(M - 1)
    return ranks


def _fake(u: Tensor) -> Tensor:
    return u.new_empty(u.shape[0], dtype=torch.int64)


positive_ranks = register("positive_ranks(Tensor u) -> Tensor", _forward, _fake)
