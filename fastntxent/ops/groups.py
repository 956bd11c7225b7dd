"""Sums and numbers of the rows of a group."""

from __future__ import annotations

import torch
from torch import Tensor


def counts_of_groups(ids: Tensor, of: Tensor, in_order: Tensor | None = None) -> Tensor:
    """How many of `ids` (K,) each of `of` (M,) is equal to. in_order: the ids, sorted."""
    return _found(ids.sort().values if in_order is None else in_order, of.contiguous())[1]


def sums_of_groups(u: Tensor, ids: Tensor, of: Tensor) -> Tensor:
    """For each of `of` (M,) the sum of the rows u (K, D) whose id it is: (M, D), 0 where there is none."""
    if of is ids:
        return sums_and_counts(u, ids)[0]
    ids = ids.contiguous()
    in_order = ids.sort().values
    sums = add_at(torch.zeros_like(u), torch.searchsorted(in_order, ids), u)
    wanted = torch.searchsorted(in_order, of.contiguous()).clamp_max(ids.shape[0] - 1)
    return taken(sums, wanted).masked_fill((in_order[wanted] != of)[:, None], 0)


def sums_and_counts(u: Tensor, ids: Tensor, in_order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Of each row's own group the sum of its rows (M, D), and their number (M,). in_order: the ids, sorted.

    A group's sum lies where the group begins in sorted order, so its place is known without asking the device how many
    groups there are. The sums have a fixed order on every device, in the backward too: `index_add` and its gradient do
    on a CPU, `index_put` and its gradient on an accelerator, which sorts, and neither does on the other's.
    """
    ids = ids.contiguous()
    place, counts = _found(ids.sort().values if in_order is None else in_order, ids)
    return taken(add_at(torch.zeros_like(u), place, u), place), counts


def _found(in_order: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    """Where each of `of` begins among ids in order, and how often it is there."""
    place = torch.searchsorted(in_order, of)
    return place, torch.searchsorted(in_order, of, right=True) - place


def taken(rows: Tensor, index: Tensor) -> Tensor:
    """Return rows[index], whose gradient has a fixed order on every device."""
    return rows.index_select(0, index) if rows.device.type == "cpu" else rows[index]


def add_at(into: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Return `into` (M, ...) with the values (K, ...) added at their places (K,), in a fixed order on every device."""
    if into.device.type == "cpu":
        return into.index_add(0, index, values)
    return into.index_put((index,), values, accumulate=True)
