"""The rows and the columns of a call, and the regime in which kernels exponentiate the logits.

In the direct regime kernels compute exp(k s) itself. In the shifted regime exp(k s) might leave float32's range, so
kernels first subtract a maximum (forward) or nu (backward). Every kernel that has two regimes calls `in_direct_range`
to find out which one applies. If the host knows the regime, it launches the kernel of this regime. If only the device
knows (rows that are not normalised, or a temperature on the device), the host launches the kernels of both regimes, and
one of them returns at once.
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
    """Return whether exp of every logit stays in range. Unit rows have |s| <= 1; with BOUNDED, a bound is loaded."""
    bound = tl.load(bounds_ptr) if BOUNDED else 1.0
    return k * bound + log_terms < DIRECT_LIMIT


@triton.jit
def largest_scale(bounds_ptr, BOUNDED: tl.constexpr):
    """Return an upper bound of the columns' r. It is 1 for normalised rows, whose largest x is at least 1."""
    return tl.load(bounds_ptr + 1) if BOUNDED else 1.0


@triton.jit
def load_inverse_temperature(inv_tau, ON_DEVICE: tl.constexpr):
    """Return k, loaded from device memory if ON_DEVICE, else as passed."""
    return tl.load(inv_tau) if ON_DEVICE else inv_tau


@triton.jit(do_not_specialize=SIZES)
def _bounds_kernel(rows_peaks_ptr, cols_peaks_ptr, bounds_ptr, n_rows_peaks, n_cols_peaks):
    """Write, once for each side, max|u_i| max|v_j| and the largest r of the other side."""
    longest = max_of_parts(rows_peaks_ptr, n_rows_peaks) * max_of_parts(cols_peaks_ptr, n_cols_peaks)
    tl.store(bounds_ptr, longest)
    tl.store(bounds_ptr + 1, max_of_parts(cols_peaks_ptr + n_cols_peaks, n_cols_peaks))
    tl.store(bounds_ptr + 4, longest)
    tl.store(bounds_ptr + 5, max_of_parts(rows_peaks_ptr + n_rows_peaks, n_rows_peaks))


class Limits(NamedTuple):
    """The largest similarity that counts in the sum of each row and of each column.

    The limit is `scale` times the given number plus `shift`.
    """

    of_rows: Tensor
    of_cols: Tensor
    scale: float = 1.0
    shift: float = 0.0

    def swapped(self) -> Limits:
        """Return the limits with rows and columns exchanged."""
        return self._replace(of_rows=self.of_cols, of_cols=self.of_rows)


@dataclass(frozen=True, eq=False)
class Sides:
    """Packed rows against packed columns, or one side against itself, with the quantities that decide the regime.

    `bounds` holds an upper bound of |s| and the largest r of the columns. `swapped_bounds` holds the same with rows and
    columns exchanged.
    """

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
        """Return the same call with rows and columns exchanged."""
        limits = self.limits and self.limits.swapped()
        return Sides(self.work, self.cols, self.rows, self.inv_tau, self.swapped_bounds, self.bounds, limits)

    def each(self) -> list[Sides]:
        """Return one `Sides` for each side of the call, with that side as the rows."""
        return [self] if self.one_side else [self, self.swapped()]

    @property
    def longer(self) -> int:
        """The number of rows of the longer side."""
        return max(self.rows.n, self.cols.n)

    @property
    def log_terms(self) -> float:
        """The logarithm of the number of terms in the longest sum.

        With limits the result is infinite. This selects the shifted regime, because kernels with limits have no direct
        regime.
        """
        return math.log(self.longer) if self.limits is None else math.inf

    @property
    def bounded(self) -> bool:
        """Whether only the device knows the bound of |s|."""
        return not self.rows.normalize

    @property
    def on_device(self) -> bool:
        """Whether only the device knows the temperature."""
        return isinstance(self.inv_tau, Tensor)

    def may_be(self, *, direct: bool) -> bool:
        """Return whether the kernels of this regime must be launched.

        If only the device knows the regime, the kernels of both regimes must be launched.
        """
        if self.limits is not None:
            return not direct
        if self.bounded or self.on_device:
            return True
        if self.work.direct is not None:
            return self.work.direct == direct
        # If the margin is near 0, it may have the other sign on the device because of rounding, so the kernels of both
        # regimes are launched.
        margin = DIRECT_LIMIT.value - (self.inv_tau + self.log_terms)
        return (margin > 0) == direct or abs(margin) < 1e-3

    def shifts(self) -> list[bool]:
        """Return the values of SHIFTED for which a kernel must be launched."""
        return [shifted for shifted in (False, True) if self.may_be(direct=not shifted)]

    def temperature_and_bounds(self) -> dict[str, Any]:
        """Return a kernel's arguments for k and the largest r of the columns."""
        return {
            "inv_tau": self.inv_tau,
            "bounds_ptr": self.bounds,
            "BOUNDED": self.bounded,
            "ON_DEVICE": self.on_device,
        }

    def regime(self) -> dict[str, Any]:
        """Return a kernel's arguments for choosing the regime, including the arguments of `temperature_and_bounds`."""
        return {**self.temperature_and_bounds(), "log_terms": self.log_terms}

    def tiles_as(self, kernel: str) -> str:
        """Return the kernel name to look up in the table: with limits the kernel's variant, else `kernel` itself."""
        return kernel if self.limits is None else config.VARIANTS[kernel]

    def limits_of(self, *names: str) -> dict[str, Any]:
        """Return a kernel's arguments for the limits of the named sides, "rows" or "cols"."""
        limits = self.limits or Limits(self.rows.unread, self.cols.unread)
        given = {"rows": limits.of_rows, "cols": limits.of_cols}
        numbers = {"limit_scale": limits.scale, "limit_shift": limits.shift, "LIMITED": self.limits is not None}
        return {**{f"{name}_limits_ptr": given[name] for name in names}, **numbers}

    def modes(self) -> dict[str, Any]:
        """Return a kernel's constants for the way operands are multiplied."""
        return {"SPLIT": config.split(self.rows), "TF32": self.rows.tf32, "UPCAST": INTERPRETED}


def make_sides(work: Work, rows: Packed, cols: Packed, inv_tau: float | Tensor, limits: Limits | None = None) -> Sides:
    """Return the rows and columns of a call, which are the same object if there is one side.

    If the rows are not normalised, this launches a kernel that finds the bounds.
    """
    if rows.normalize:
        return Sides(work, rows, cols, inv_tau, rows.unread, cols.unread, limits)
    both = work.empty(2, 4)  # each row has 16 bytes, so both are aligned and use the same compiled kernel
    work.launch(
        _bounds_kernel, (1,), rows_peaks_ptr=rows.peaks, cols_peaks_ptr=cols.peaks, bounds_ptr=both,
        n_rows_peaks=rows.peaks.shape[1], n_cols_peaks=cols.peaks.shape[1], num_warps=4,
    )  # fmt: skip
    bounds, swapped_bounds = both.unbind()
    return Sides(work, rows, cols, inv_tau, bounds, swapped_bounds, limits)


def unbounded_sides(work: Work, rows: Packed, cols: Packed, inv_tau: float | Tensor) -> Sides:
    """Return the rows and columns of a call for kernels that have only one regime and need no bounds."""
    return Sides(work, rows, cols, inv_tau, bounds=rows.unread, swapped_bounds=cols.unread)
