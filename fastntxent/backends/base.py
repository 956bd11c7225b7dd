"""What a backend is: the primitive `neg_lse` with its gradient, and NT-Xent built on it.

neg_lse and its gradient are the only O(M^2 D) work there is. A backend that has no more than those takes the rest from
`composed.py`, in O(M D) tensor code around them; one whose kernels fuse all of it is a `KernelBackend`.

Symbols (M = 2N rows, k = 1/tau, [z_i; z_j] stacked; p(i) is the other view of row i's sample):

    u_i   = z_i / max(|z_i|, eps)                                    unit rows
    nu_i  = log sum over {j : id_j != id_i} of exp(k u_i . u_j)      neg_lse, -inf where the sum is empty
    pi_i  = k u_i . u_p(i)                                           pos
    loss_i = log(1 + exp(nu_i - pi_i))                               NT-Xent, the positive in the denominator
    q_i   = sigmoid(nu_i - pi_i) = d loss_i / d nu_i = - d loss_i / d pi_i

The positive is never inside the masked sum, so nothing is subtracted that was added before: the gradient keeps its
relative accuracy however small the loss becomes.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..sides import Side
from ..validation import FLOAT_DTYPES


class Upstream(NamedTuple):
    """What a backward is given of a side: the gradient of its nu (M,), its nu (M,), and whether d/du is wanted."""

    d_neg_lse: Tensor
    neg_lse: Tensor
    wanted: bool = True


class SumWeights(NamedTuple):
    """Weights of the sums of softplus: of the rows' (M,), of the columns' (K,) where there are two sides, and which
    sides' gradients are wanted."""

    of_rows: Tensor
    of_cols: Tensor
    wants_rows: bool = True
    wants_cols: bool = True


class PairSums(NamedTuple):
    """Sums of softplus of the rows (M,); where weights were given, the gradients of the weighted sum of the rows' and
    the columns' sums, None where not wanted."""

    rows: Tensor
    d_rows: Tensor | None = None
    d_cols: Tensor | None = None
    d_inv_tau: Tensor | None = None
    d_bias: Tensor | None = None


class Backend(ABC):
    """One implementation of the losses' core. Methods allocate what they return, and neither change nor alias their
    arguments. `inv_tau` is a Python number, or a 0-d tensor on an accelerator, where the host cannot read it."""

    device_types: tuple[str, ...] = ("any",)
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES

    def details(self) -> str | None:
        """What of this machine it uses, in words; None where there is nothing to say."""
        return None

    def forms(self, device: torch.device, dtype: torch.dtype) -> Sequence[str]:
        """The forms that the kernels take by a call's size, as names for `forced`; "" leaves it to the size."""
        return ("",)

    def forced(self, form: str) -> contextlib.AbstractContextManager[None]:
        """A block in which every call takes that form, whatever its size: to check all of them on small ones."""
        assert not form
        return contextlib.nullcontext()

    def warming(self) -> contextlib.AbstractContextManager[None]:
        """A block in which every call also launches the kernels that it would at any other temperature. Results are
        those of any call."""
        return contextlib.nullcontext()

    @abstractmethod
    def neg_lse(self, rows: Side, inv_tau: float | Tensor) -> Tensor:
        """nu of the rows (M,) in the accumulation dtype."""

    @abstractmethod
    def cross_neg_lse(self, rows: Side, cols: Side, inv_tau: float | Tensor) -> tuple[Tensor, Tensor]:
        """nu of the M rows against the K columns, and of the columns against the rows: (M,) and (K,)."""

    @abstractmethod
    def nt_xent_rows(self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
        """nu and pi of every row, (M,) each, order [z_i; z_j]."""


class KernelBackend(Backend):
    """A backend with gradients of its own: the registered ops call it, on detached tensors. All its results are in
    the accumulation dtype."""

    @abstractmethod
    def neg_lse_backward(self, rows: Side, inv_tau: float | Tensor, upstream: Upstream) -> tuple[Tensor, Tensor]:
        """Gradient of sum_i d_neg_lse_i nu_i with respect to u (M, D), always wanted, and k (0-d)."""

    @abstractmethod
    def cross_neg_lse_backward(
        self, rows: Side, cols: Side, inv_tau: float | Tensor, of_rows: Upstream, of_cols: Upstream
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Gradient of the sum over both sides of d_neg_lse_i nu_i with respect to the rows' u, the columns' u and k;
        None where not wanted."""

    @abstractmethod
    def neg_lse_sum(self, rows: Side, inv_tau: float | Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """sum_i weights_i nu_i (0-d), over the rows that have a nu, with its gradient with respect to u and k."""

    @abstractmethod
    def nt_xent_rows_backward(
        self,
        d_neg_lse: Tensor,
        d_pos: Tensor,
        z_i: Tensor,
        z_j: Tensor,
        inv_tau: float | Tensor,
        neg_lse: Tensor,
        normalize: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of sum_i d_neg_lse_i nu_i + d_pos_i pi_i with respect to z_i, z_j and k."""

    @abstractmethod
    def nt_xent_scalar(
        self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool, mean: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sum or mean of the losses (0-d) with its gradient with respect to z_i, z_j and k."""

    @abstractmethod
    def nt_xent_value(self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool, mean: bool) -> Tensor:
        """Sum or mean of the losses (0-d)."""

    @abstractmethod
    def info_nce_scalar(
        self,
        z_i: Tensor,
        z_j: Tensor,
        inv_tau: float | Tensor,
        normalize: bool,
        both: bool,
        mean: bool,
        needs_i: bool,
        needs_j: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """Sum or mean of the N losses (0-d) of queries z_i (N, D) that pick their keys z_j (N, D): row n of each is a
        pair, and the other keys are negatives. `both`: half of that, and half of the losses of keys that pick their
        queries. With its gradient with respect to z_i, z_j and k; None where not needed."""

    @abstractmethod
    def info_nce_value(
        self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool, both: bool, mean: bool
    ) -> Tensor:
        """The loss of `info_nce_scalar` (0-d)."""

    @abstractmethod
    def softplus(
        self,
        rows: Side,
        cols: Side | None,
        inv_tau: float | Tensor,
        bias: float | Tensor,
        positives: bool,
        weights: SumWeights | None = None,
    ) -> PairSums:
        """Sums of log(1 + exp(x)), x = k u_i . v_j + b, over the rows of other groups. `positives`, of two sides: and
        of log(1 + exp(-x)) over those of the same group. Values and gradients come from one pass."""

    @abstractmethod
    def sigmoid_scalar(
        self,
        z_i: Tensor,
        z_j: Tensor,
        inv_tau: float | Tensor,
        bias: float | Tensor,
        normalize: bool,
        two_views: bool,
        mean: bool,
        needs_i: bool,
        needs_j: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
        """SigLIP's loss of pairs (z_i, z_j), or NT-Logistic's of `two_views` (0-d): the sum over all pairs, or 1 / N or
        1 / 2N of it. With its gradient with respect to z_i, z_j, k and b; None where not needed."""

    @abstractmethod
    def sigmoid_value(
        self,
        z_i: Tensor,
        z_j: Tensor,
        inv_tau: float | Tensor,
        bias: float | Tensor,
        normalize: bool,
        two_views: bool,
        mean: bool,
    ) -> Tensor:
        """The loss of `sigmoid_scalar` (0-d)."""
