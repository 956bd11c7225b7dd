"""The interface of a backend: the primitive `neg_lse` with its gradient, and the losses built on it.

The only O(M^2 D) work is in neg_lse, in the softplus sums of sigmoid losses, and in their gradients. A backend whose
kernels compute only neg_lse and its gradient is a `ComposedBackend` (composed.py), which builds the rest in tensor
code. A backend whose kernels also compute losses derives from `KernelBackend`.

Symbols (M = 2N rows, k = 1/tau, [z_i; z_j] stacked; p(i) is the other view of row i's sample; eps is `norm_eps`):

    u_i   = z_i / max(|z_i|, eps)                                    unit rows
    nu_i  = log sum over {j : id_j != id_i} of exp(k u_i . u_j)      neg_lse, -inf where the sum is empty
    pi_i  = k u_i . u_p(i)                                           pos
    loss_i = log(1 + exp(nu_i - pi_i))                               NT-Xent, the positive in the denominator
    q_i   = sigmoid(nu_i - pi_i) = d loss_i / d nu_i = - d loss_i / d pi_i

The sum in nu_i never contains the positive, so nothing is added and then subtracted again. The gradient therefore keeps
its relative accuracy however small the loss becomes.
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
    """Inputs of a side's backward: the upstream gradient of its nu (M,), nu itself (M,), and whether d/du is wanted."""

    d_neg_lse: Tensor
    neg_lse: Tensor
    wanted: bool = True


class SumWeights(NamedTuple):
    """Weights of the softplus sums of the rows (M,) and of the columns (K,), and which gradients are wanted.

    If there is only one side, `of_cols` is not used.
    """

    of_rows: Tensor
    of_cols: Tensor
    wants_rows: bool = True
    wants_cols: bool = True


class PairSums(NamedTuple):
    """The rows' softplus sums (M,) and, if weights were given, the gradients of the weighted total of all sums.

    This total includes the columns' sums. A gradient that is not wanted is None.
    """

    rows: Tensor
    d_rows: Tensor | None = None
    d_cols: Tensor | None = None
    d_inv_tau: Tensor | None = None
    d_bias: Tensor | None = None


class Backend(ABC):
    """One implementation of the core of the losses.

    Methods allocate their results and neither change nor alias their arguments. `inv_tau` is a Python number or a 0-d
    tensor on an accelerator. The host never reads that tensor. `reference`, which autograd differentiates, also takes a
    tensor on the CPU.
    """

    device_types: tuple[str, ...] = ("any",)
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES

    def details(self) -> str | None:
        """Return a description of the hardware that the backend uses, or None if there is nothing to report."""
        return None

    def forms(self, device: torch.device, dtype: torch.dtype) -> Sequence[str]:
        """Return the names of the kernels' forms, each of which is meant for calls of a certain size.

        With the form "", the size of the call selects the form.
        """
        return ("",)

    def forced(self, form: str) -> contextlib.AbstractContextManager[None]:
        """Return a context in which every call uses this form, so that small inputs can check every form."""
        assert not form
        return contextlib.nullcontext()

    def warming(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which every call also launches the kernels that other temperatures need.

        Results do not change.
        """
        return contextlib.nullcontext()

    @abstractmethod
    def neg_lse(self, rows: Side, inv_tau: float | Tensor) -> Tensor:
        """Return nu of the rows (M,) in the accumulation dtype."""

    @abstractmethod
    def cross_neg_lse(self, rows: Side, cols: Side, inv_tau: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return nu of the M rows against the K columns (M,), and nu of the columns against the rows (K,)."""

    @abstractmethod
    def nt_xent_rows(self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
        """Return nu and pi of every row, (M,) each, in the order [z_i; z_j]."""


class KernelBackend(Backend):
    """A backend that computes gradients itself. The registered operators call it on detached tensors.

    All results are in the accumulation dtype.
    """

    @abstractmethod
    def neg_lse_backward(self, rows: Side, inv_tau: float | Tensor, upstream: Upstream) -> tuple[Tensor, Tensor]:
        """Return the gradient of sum_i d_neg_lse_i nu_i with respect to u (M, D) and k (0-d).

        `upstream.wanted` must be True.
        """

    @abstractmethod
    def cross_neg_lse_backward(
        self, rows: Side, cols: Side, inv_tau: float | Tensor, of_rows: Upstream, of_cols: Upstream
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Return the gradient of sum_i d_neg_lse_i nu_i over both sides, with respect to the rows, the columns and k.

        A side's gradient is None if it is not wanted.
        """

    @abstractmethod
    def neg_lse_sum(self, rows: Side, inv_tau: float | Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return sum_i weights_i nu_i (0-d) over rows that have negatives, and its gradient with respect to u and k."""

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
        """Return the gradient of sum_i d_neg_lse_i nu_i + d_pos_i pi_i with respect to z_i, z_j and k."""

    @abstractmethod
    def nt_xent_scalar(
        self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool, mean: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the sum or mean of the losses (0-d), and its gradient with respect to z_i, z_j and k."""

    @abstractmethod
    def nt_xent_value(self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool, mean: bool) -> Tensor:
        """Return the sum or mean of the losses (0-d)."""

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
        """Return InfoNCE or CLIP (0-d) and its gradient with respect to z_i, z_j and k.

        InfoNCE is the sum or mean of N losses: query z_i[n] picks its key z_j[n], and the other keys are its negatives.
        With `both` (CLIP) the result is the mean of this loss and the loss in the other direction, in which keys pick
        their queries. A gradient that is not needed is None.
        """

    @abstractmethod
    def info_nce_value(
        self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool, both: bool, mean: bool
    ) -> Tensor:
        """Return the loss of `info_nce_scalar` (0-d)."""

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
        """Return each row's sum of log(1 + exp(x)) over the columns of other groups, where x = k u_i . v_j + b.

        With `positives` (two sides only) the sum also includes log(1 + exp(-x)) over the columns of the same group. If
        `weights` are given, the same pass computes the gradients too. Without `cols` the rows are compared among
        themselves.
        """

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
        """Return SigLIP, or NT-Logistic if `two_views` (0-d), and its gradient with respect to z_i, z_j, k and b.

        The loss is a sum over all pairs. With `mean` it is divided by N (SigLIP) or 2N (NT-Logistic). A gradient that
        is not needed is None.
        """

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
        """Return the loss of `sigmoid_scalar` (0-d)."""
