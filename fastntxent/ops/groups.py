"""Sums and numbers of the rows of a group."""

from __future__ import annotations

import torch
from torch import Tensor


def group_sums(u: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """For every row the sum of all rows of its group (M, D) and their number (M,); the row itself is one of them."""
    return sums_of_groups(u, ids, ids), counts_of_groups(ids, ids)


def counts_of_groups(ids: Tensor, of: Tensor) -> Tensor:
    """How many of `ids` (K,) each of `of` (M,) is equal to."""
    in_order = ids.sort().values
    of = of.contiguous()
    return torch.searchsorted(in_order, of, right=True) - torch.searchsorted(in_order, of)


def sums_of_groups(u: Tensor, ids: Tensor, of: Tensor) -> Tensor:
    """For each of `of` (M,) the sum of the rows u (K, D) whose id it is: (M, D), 0 where there is none.

    A group's sum lies where the group begins in sorted order, so its place is known without asking the device how many
    groups there are. The sums have a fixed order on every device, in the backward too: `index_add` and its gradient do
    on a CPU, `index_put` and its gradient on an accelerator, which sorts, and neither does on the other's.
    """
    ids = ids.contiguous()
    in_order = ids.sort().values
    place = torch.searchsorted(in_order, ids)
    wanted = place if of is ids else torch.searchsorted(in_order, of.contiguous()).clamp_max(ids.shape[0] - 1)
    sums = add_at(torch.zeros_like(u), place, u)
    sums = sums.index_select(0, wanted) if u.device.type == "cpu" else sums[wanted]
    return sums if of is ids else sums.masked_fill((in_order[wanted] != of)[:, None], 0)


def add_at(into: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Return `into` (M, ...) with the values (K, ...) added at their places (K,), in a fixed order on every device."""
    if into.device.type == "cpu":
        return into.index_add(0, index, values)
    return into.index_put((index,), values, accumulate=True)
