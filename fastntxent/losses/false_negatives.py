"""False negatives by similarity: a negative that is too similar to a row is left out of the row's sum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra import accumulation_dtype
from ..validation import check_number, check_parameter

_INF = float("inf")
_MOST = torch.finfo(torch.float32).max  # a larger limit has no effect


class Limits(NamedTuple):
    """How similar a negative may be to a row. With s_pos the row's similarity to its positive, the row's limit is

        margin            s_pos - margin
        relative_margin   (1 - relative_margin) s_pos
        ceiling           the same for every row; with a margin, the smaller of the two

    Products of the same rows may round differently in tiles of different shapes. To keep a negative whose similarity
    equals the limit, the limit is raised by eps (2 + sqrt(D)) |u_i| |u_pos|. For `sup_con`, where a row may have any
    number of positives, the ceiling is raised by eps (2 + sqrt(D)) |u_i|^2.
    """

    margin: float | None
    relative_margin: float | None
    ceiling: float | None

    @classmethod
    def checked(
        cls, margin: float | None, relative_margin: float | None, ceiling: float | None, label_smoothing: float = 0.0
    ) -> Limits | None:
        """Check the arguments and return the limits, or None if the arguments set no limit."""
        if margin is None and relative_margin is None and ceiling is None:
            return None
        if margin is not None and relative_margin is not None:
            raise ValueError("margin and relative_margin must not both be given")
        if label_smoothing:
            raise ValueError("label_smoothing cannot be combined with margin, relative_margin or ceiling")
        if margin is not None:
            margin = _finite("margin", margin)
        if relative_margin is not None:
            relative_margin = check_parameter("relative_margin", relative_margin)
        return cls(margin, relative_margin, None if ceiling is None else _finite("ceiling", ceiling))

    def by_positive(self, rows: Tensor, normalize: bool) -> tuple[float, float] | None:
        """Return (a, b) such that a row's limit is a s_pos + b. `rows` gives the number of features and the dtype.

        Return None where no such pair exists: the limit is the smaller of two, or depends on the norms of the rows.
        """
        of_margin = self.margin is not None or self.relative_margin is not None
        if not normalize or (of_margin and self.ceiling is not None):
            return None
        rounding = _rounding(rows.dtype, rows.shape[-1])
        if self.ceiling is not None:
            return 0.0, self.ceiling + rounding
        if self.margin is not None:
            return 1.0, rounding - self.margin
        return 1.0 - (self.relative_margin or 0.0), rounding

    def of(self, similarities: Tensor, u: Tensor, positives: Tensor) -> Tensor:
        """Return each row's limit (M,), a constant.

        similarities: each row's similarity to its positive (M,), ignored if the ceiling is the only limit. u,
        positives: the rows and their positives, (M, D) each.
        """
        with torch.no_grad():
            lengths = torch.linalg.vector_norm(u, dim=-1) * torch.linalg.vector_norm(positives, dim=-1)
            limits = torch.full_like(similarities, torch.inf)
            if self.margin is not None:
                limits = similarities - self.margin
            if self.relative_margin is not None:
                limits = similarities * (1 - self.relative_margin)
            if self.ceiling is not None:
                limits = limits.clamp_max(self.ceiling)
            return limits + _rounding(u.dtype, u.shape[-1]) * lengths


def _finite(name: str, value: float) -> float:
    value = check_number(name, value)
    if not -_INF < value < _INF:  # torch.compile traces comparisons of a changing float, but not math.isfinite
        raise ValueError(f"{name} must be finite, got {value}")
    return min(max(value, -_MOST), _MOST)


def _rounding(dtype: torch.dtype, features: int) -> float:
    eps: float = torch.finfo(accumulation_dtype(dtype)).eps
    return eps * (2 + features**0.5)
