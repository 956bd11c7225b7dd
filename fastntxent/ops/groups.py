"""Sums and counts of rows by group."""

from __future__ import annotations

import torch
from torch import Tensor


def counts_of_groups(ids: Tensor, wanted: Tensor, in_order: Tensor | None = None) -> Tensor:
    """Return how often each id in `wanted` (M,) occurs in `ids` (K,). in_order: a sorted copy of `ids`."""
    return _found(ids.sort().values if in_order is None else in_order, wanted.contiguous())[1]


def sums_of_groups(u: Tensor, ids: Tensor, wanted: Tensor) -> Tensor:
    """For each id in `wanted` (M,), return the sum (M, D) of the rows of u (K, D) with that id; 0 if there are none."""
    if wanted is ids:
        return sums_and_counts(u, ids)[0]
    ids = ids.contiguous()
    in_order = ids.sort().values
    sums = add_at(torch.zeros_like(u), torch.searchsorted(in_order, ids), u)
    place = torch.searchsorted(in_order, wanted.contiguous()).clamp_max(ids.shape[0] - 1)
    return taken(sums, place).masked_fill((in_order[place] != wanted)[:, None], 0)


def sums_and_counts(u: Tensor, ids: Tensor, in_order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For each row, return the sum (M, D) of its group's rows, and the number (M,) of these rows.

    in_order: a sorted copy of `ids`.

    A group's sum is stored at the position where the group begins in sorted order, so the host need not read the number
    of groups from the device. Sums have a fixed order on every device, in the backward too. To ensure this, the CPU
    uses `index_add`, and an accelerator uses `index_put`, which sorts the indices first.
    """
    ids = ids.contiguous()
    place, counts = _found(ids.sort().values if in_order is None else in_order, ids)
    return taken(add_at(torch.zeros_like(u), place, u), place), counts


def _found(in_order: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each id in `wanted`, its first position among the sorted ids, and how often it occurs there."""
    place = torch.searchsorted(in_order, wanted)
    return place, torch.searchsorted(in_order, wanted, right=True) - place


def taken(rows: Tensor, index: Tensor) -> Tensor:
    """Return rows[index]. The gradient's sums have a fixed order on every device."""
    return rows.index_select(0, index) if rows.device.type == "cpu" else rows[index]


def add_at(into: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Return `into` (M, ...) plus the values (K, ...) at the indices (K,), added in a fixed order on every device."""
    if into.device.type == "cpu":
        return into.index_add(0, index, values)
    return into.index_put((index,), values, accumulate=True)
