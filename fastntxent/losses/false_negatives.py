"""False negatives by their similarity: what is too similar to a row leaves its sum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra import accumulation_dtype
from ..validation import check_number, check_parameter

_INF = float("inf")
_MOST = torch.finfo(torch.float32).max  # beyond it there is no limit


class Limits(NamedTuple):
    """How similar a negative may be. A row's own limit follows from the similarity to its positive:

    margin            s_pos - margin
    relative_margin   (1 - relative_margin) s_pos
    ceiling           the same for every row; with a margin, the smaller of the two

    Products of the same rows may round differently, by the shape of the tile they are formed in. So that what is as
    similar as the limit is not taken for more similar, a limit is raised by eps (2 + sqrt(D)) |u_i| |u_pos|; a ceiling
    alone, of rows without one positive, by that of |u_i|^2.
    """

    margin: float | None
    relative_margin: float | None
    ceiling: float | None

    @classmethod
    def checked(
        cls, margin: float | None, relative_margin: float | None, ceiling: float | None, label_smoothing: float = 0.0
    ) -> Limits | None:
        """The limits that a caller asks for; None for none."""
        if margin is None and relative_margin is None and ceiling is None:
            return None
        if margin is not None and relative_margin is not None:
            raise ValueError("margin and relative_margin must not both be given")
        if label_smoothing:
            raise ValueError("label_smoothing takes no margin, relative_margin or ceiling")
        if margin is not None:
            margin = _finite("margin", margin)
        if relative_margin is not None:
            relative_margin = check_parameter("relative_margin", relative_margin)
        return cls(margin, relative_margin, None if ceiling is None else _finite("ceiling", ceiling))

    def by_positive(self, rows: Tensor, normalize: bool) -> tuple[float, float] | None:
        """(a, b) where a row's limit is a s_pos + b, of embeddings like `rows`; None where there is no such pair: the
        limit is the smaller of two, or goes by the rows' lengths."""
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
        """Each row's limit (M,), a constant, from its similarity to its positive (M,) and both rows, (M, D) each.
        With a ceiling alone, similarities may be anything."""
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
    if not -_INF < value < _INF:  # a compiler takes a comparison of a float that changes, and no math.isfinite
        raise ValueError(f"{name} must be finite, got {value}")
    return min(max(value, -_MOST), _MOST)


def _rounding(dtype: torch.dtype, features: int) -> float:
    eps: float = torch.finfo(accumulation_dtype(dtype)).eps
    return eps * (2 + features**0.5)
