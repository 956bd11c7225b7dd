"""The rows and the columns of a call, and the regime in which kernels form their logits.

Direct, kernels form exp(k s) itself. Shifted, they subtract a maximum (forward) or nu (backward) first, because
exp(k s) would leave float32's range. Every kernel asks `in_direct_range` which of the two it is. Where the host knows
the answer it launches one kernel; where only the device knows (rows of any length, or a temperature on the device), it
launches both, and one of them returns at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import config
from .launch import Work
from .pack import Packed
from .tiles import DIRECT_LIMIT, INTERPRETED, SIZES, max_of_parts


@triton.jit
def in_direct_range(bounds_ptr, k, log_terms, BOUNDED: tl.constexpr):
    """Whether no logit leaves the range of exp. Unit rows have |s| <= 1; otherwise (BOUNDED) bounds has max|s|."""
    bound = tl.load(bounds_ptr) if BOUNDED else 1.0
    return k * bound + log_terms < DIRECT_LIMIT


@triton.jit
def largest_scale(bounds_ptr, BOUNDED: tl.constexpr):
    """An upper bound of the columns' r: 1 for normalised rows, whose largest x is 1 or more."""
    return tl.load(bounds_ptr + 1) if BOUNDED else 1.0


@triton.jit
def load_inverse_temperature(inv_tau, ON_DEVICE: tl.constexpr):
    """k, from device memory or as it was passed."""
    return tl.load(inv_tau) if ON_DEVICE else inv_tau


@triton.jit(do_not_specialize=SIZES)
def _bounds_kernel(rows_peaks_ptr, cols_peaks_ptr, bounds_ptr, n_rows_peaks, n_cols_peaks):
    """For either side: max|u_i| max|v_j|, and the largest r of the other side."""
    longest = max_of_parts(rows_peaks_ptr, n_rows_peaks) * max_of_parts(cols_peaks_ptr, n_cols_peaks)
    tl.store(bounds_ptr, longest)
    tl.store(bounds_ptr + 1, max_of_parts(cols_peaks_ptr + n_cols_peaks, n_cols_peaks))
    tl.store(bounds_ptr + 4, longest)
    tl.store(bounds_ptr + 5, max_of_parts(rows_peaks_ptr + n_rows_peaks, n_rows_peaks))


class Limits(NamedTuple):
    """Of each row and of each column the largest similarity that its sum takes: `scale` times these numbers, and
    `shift`."""

    of_rows: Tensor
    of_cols: Tensor
    scale: float = 1.0
    shift: float = 0.0

    def swapped(self) -> Limits:
        """The same for rows and columns exchanged."""
        return self._replace(of_rows=self.of_cols, of_cols=self.of_rows)


@dataclass(frozen=True, eq=False)
class Sides:
    """Packed rows against packed columns, or one side against itself; and what decides the regime. `bounds` holds
    max|s| and the largest r of the columns, `swapped_bounds` the same with rows and columns exchanged."""

    work: Work
    rows: Packed
    cols: Packed
    inv_tau: float | Tensor
    bounds: Tensor
    swapped_bounds: Tensor
    limits: Limits | None = None

    @property
    def one_side(self) -> bool:
        return self.cols is self.rows

    def swapped(self) -> Sides:
        """The columns as rows, and the rows as columns."""
        limits = self.limits and self.limits.swapped()
        return Sides(self.work, self.cols, self.rows, self.inv_tau, self.swapped_bounds, self.bounds, limits)

    def each(self) -> list[Sides]:
        """The call as each of its sides sees it, that side being the rows."""
        return [self] if self.one_side else [self, self.swapped()]

    @property
    def longer(self) -> int:
        """The number of rows of the longer side."""
        return max(self.rows.n, self.cols.n)

    @property
    def log_terms(self) -> float:
        """The logarithm of the number of terms in the longest sum. Where there are limits it is not within any range:
        their kernels have one regime, shifted."""
        return math.log(self.longer) if self.limits is None else math.inf

    @property
    def bounded(self) -> bool:
        """Whether only the device knows max|s|."""
        return not self.rows.normalize

    @property
    def on_device(self) -> bool:
        """Whether only the device knows the temperature."""
        return isinstance(self.inv_tau, Tensor)

    def may_be(self, *, direct: bool) -> bool:
        """Whether this regime's kernels have to be launched: both, where only the device knows."""
        if self.limits is not None:
            return not direct
        if self.bounded or self.on_device:
            return True
        if self.work.direct is not None:
            return self.work.direct == direct
        margin = DIRECT_LIMIT.value - (self.inv_tau + self.log_terms)  # which the device may round to the other side
        return (margin > 0) == direct or abs(margin) < 1e-3

    def shifts(self) -> list[bool]:
        """The SHIFTED of kernels that have to be launched."""
        return [shifted for shifted in (False, True) if self.may_be(direct=not shifted)]

    def temperature_and_bounds(self) -> dict[str, Any]:
        """A kernel's arguments for k and the largest r of the columns."""
        return {
            "inv_tau": self.inv_tau,
            "bounds_ptr": self.bounds,
            "BOUNDED": self.bounded,
            "ON_DEVICE": self.on_device,
        }

    def regime(self) -> dict[str, Any]:
        """A kernel's arguments for the choice of the regime, those of `temperature_and_bounds` among them."""
        return {**self.temperature_and_bounds(), "log_terms": self.log_terms}

    def tiles_as(self, kernel: str) -> str:
        """Whose tiles a kernel takes: where there are limits, those of its variant."""
        return kernel if self.limits is None else config.VARIANTS[kernel]

    def limits_of(self, *names: str) -> dict[str, Any]:
        """A kernel's arguments for the limits of its "rows" and of its "cols"."""
        limits = self.limits or Limits(self.rows.unread, self.cols.unread)
        given = {"rows": limits.of_rows, "cols": limits.of_cols}
        numbers = {"limit_scale": limits.scale, "limit_shift": limits.shift, "LIMITED": self.limits is not None}
        return {**{f"{name}_limits_ptr": given[name] for name in names}, **numbers}

    def modes(self) -> dict[str, Any]:
        """A kernel's constants for how operands are multiplied."""
        return {"SPLIT": config.split(self.rows), "TF32": self.rows.tf32, "UPCAST": INTERPRETED}


def make_sides(work: Work, rows: Packed, cols: Packed, inv_tau: float | Tensor, limits: Limits | None = None) -> Sides:
    """Rows and columns of a call, which are one object where there is one side. Launches a kernel where only the device
    knows how long the rows are."""
    if rows.normalize:
        return Sides(work, rows, cols, inv_tau, rows.unread, cols.unread, limits)
    both = work.empty(2, 4)  # rows of 16 bytes: aligned, for one compiled kernel
    work.launch(
        _bounds_kernel, (1,), rows_peaks_ptr=rows.peaks, cols_peaks_ptr=cols.peaks, bounds_ptr=both,
        n_rows_peaks=rows.peaks.shape[1], n_cols_peaks=cols.peaks.shape[1], num_warps=4,
    )  # fmt: skip
    bounds, swapped_bounds = both.unbind()
    return Sides(work, rows, cols, inv_tau, bounds, swapped_bounds, limits)


def unbounded_sides(work: Work, rows: Packed, cols: Packed, inv_tau: float | Tensor) -> Sides:
    """The same for kernels that have one regime alone."""
    return Sides(work, rows, cols, inv_tau, bounds=rows.unread, swapped_bounds=cols.unread)
