"""Records that losses, operators and backends pass as one argument: a side of a log-sum-exp, a teacher, and a guide."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Side(NamedTuple):
    """One side of a log-sum-exp: rows u (M, D), their groups ids (M,), and optionally limits (M,), the largest
    similarity that each row's sum includes.

    A call with one side compares its rows with each other. A call with two sides compares rows with columns.
    """

    u: Tensor
    ids: Tensor
    limits: Tensor | None = None


class Teacher(NamedTuple):
    """A teacher's rows (M, E) and columns (K, E), one per row and column of the student, and terms of its softmaxes.

    The terms are the inverse temperature, and the log-sum-exp of all logits of each row and each column.
    """

    rows: Tensor
    cols: Tensor
    inv_tau: float | Tensor
    rows_lse: Tensor
    cols_lse: Tensor


class CalledTeacher(NamedTuple):
    """A teacher that is a function of the ids of rows and columns, and the terms of its softmaxes as in `Teacher`."""

    similarities: Callable[[Tensor, Tensor], Tensor]
    inv_tau: float | Tensor
    rows_lse: Tensor
    cols_lse: Tensor


class Guide(NamedTuple):
    """A guide's rows (M, E) and columns (K, E), one for each row and column of the loss, and each row's limit (M,).

    A column whose similarity to the row, according to the guide, is above the limit does not count.
    """

    rows: Tensor
    cols: Tensor
    limits: Tensor
