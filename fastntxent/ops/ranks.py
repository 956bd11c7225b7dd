"""The rank of each row's positive, computed in blocks of rows.

This is an operator so that a compiled graph does not depend on the number of blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..algebra import autocast_off, swap_views
from .contract import checked
from .register import register

_TILE = 2**22  # similarities in a block
_EXACT = 2**24  # a sum of this many ones is exact in float32


def _forward(u: Tensor) -> Tensor:
    (u,) = checked("positive_ranks", u)
    with autocast_off(u):
        M = u.shape[0]
        own = torch.arange(M, device=u.device)
        partner, ranks = swap_views(own), torch.empty_like(own)
        height = max(1, _TILE // M)
        buffer = u.new_empty(min(height, M), M)
        for rows, me, other, rank in zip(*(x.split(height) for x in (u, own, partner, ranks)), strict=True):
            sims = torch.mm(rows, u.T, out=buffer[: len(rows)])
            pos = sims.gather(1, other[:, None])
            sims.scatter_(1, me[:, None], -torch.inf)  # rank the row itself last
            # Compare in place, which gives 1.0 or 0.0: on a CPU the sum of a bool tensor would first copy it to int64.
            # A NaN does not count as worse.
            worse = sum(part.sum(dim=1).long() for part in sims.lt_(pos).split(_EXACT, dim=1))
            rank.copy_((M - worse).clamp_max(M - 1))
    return ranks


def _fake(u: Tensor) -> Tensor:
    return u.new_empty(u.shape[0], dtype=torch.int64)


positive_ranks = register("positive_ranks(Tensor u) -> Tensor", _forward, _fake)
