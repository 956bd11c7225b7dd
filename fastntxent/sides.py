"""What losses, operators and backends hand down as one argument: a side of a log-sum-exp, and a teacher or a guide of
two sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Side(NamedTuple):
    """Rows u (M, D), the group of each, ids (M,), and where there are limits the largest similarity that each row's sum
    takes (M,). One side is its own columns; two are rows and columns."""

    u: Tensor
    ids: Tensor
    limits: Tensor | None = None


class Teacher(NamedTuple):
    """A teacher's rows (M, E) and columns (K, E), one for each of the student's, with what its softmaxes need: the
    inverse temperature, and of each row and each column the log-sum-exp of all its logits."""

    rows: Tensor
    cols: Tensor
    inv_tau: float | Tensor
    rows_lse: Tensor
    cols_lse: Tensor


class CalledTeacher(NamedTuple):
    """A teacher that is called for its similarities, by the ids of rows and columns, with what its softmaxes need, as
    `Teacher` has it."""

    similarities: Callable[[Tensor, Tensor], Tensor]
    inv_tau: float | Tensor
    rows_lse: Tensor
    cols_lse: Tensor


class Guide(NamedTuple):
    """A guide's rows (M, E) and columns (K, E), one for each of the student's, and each row's limit (M,): a column does
    not count whose similarity to the row is, for the guide, above it."""

    rows: Tensor
    cols: Tensor
    limits: Tensor
