"""The error budget: how far a result may be from the truth.

The truth is the reference in float64. A result is within budget if its error is at most twice the error of the
reference in the result's own precision, plus a floor for rounding. This must hold for the maximum error, relative to
the maximum of the truth, and for the RMS error, relative to the RMS of the truth.

The floor covers cases where the reference in the same precision happens to be exact. A logit k s, the inverse
temperature k times a similarity s, has a rounding error of about eps k |s|, which becomes the relative error of a
probability. So the floor is a few units of eps (1 + k |s|), with the eps of the dtype in which the result is computed.
The worst test case needed 1.4 units; nearly all needed none. For a gradient that is returned in half precision, the
floor also includes the eps of the half-precision dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .algebra import accumulation_dtype, norm_eps
from .distributed import Group, ShardedBatch
from .losses import nt_xent
from .opening import open_batch
from .ops import autocast_off
from .options import BackendName
from .validation import check_temperature, check_views

REFERENCE_FACTOR = 2.0
FLOOR_ULPS_MAXIMUM = 3.0
FLOOR_ULPS_RMS = 2.0


class Errors(NamedTuple):
    """Relative errors: maximum error divided by the truth's maximum magnitude, and RMS error divided by the truth's
    RMS."""

    maximum: float
    rms: float

    def within(self, limit: Errors) -> bool:
        """Return whether neither error is above its limit; False for NaN."""
        return self.maximum <= limit.maximum and self.rms <= limit.rms


def errors_of(value: Tensor, truth: Tensor, *, scale: float = 0.0) -> Errors:
    """Return the errors of a value against a float64 truth of the same shape; 0 where both are the same infinity.

    Args:
        value: The result, of any floating-point dtype.
        truth: The truth, float64 and of the same shape.
        scale: If the truth is a difference of terms that may cancel, the size of these terms. Errors are relative to
            `scale` if it is larger than the truth.
    """
    difference = torch.where(value == truth, 0.0, value.double() - truth)
    finite = torch.where(truth.isfinite(), truth, 0.0)
    return Errors(*(_ratio(norm(difference), max(norm(finite), scale)) for norm in (_maximum, _rms)))


def allowed(
    reference: Errors, dtype: torch.dtype, logit_size: float, *, output_dtype: torch.dtype | None = None
) -> Errors:
    """Return the largest errors within budget, from the errors of the reference in the same precision.

    Args:
        reference: The errors of the reference backend on the same input.
        dtype: The dtype of the input, which decides the precision of the computation.
        logit_size: The largest magnitude of a logit, |k s|.
        output_dtype: The dtype of the result, if it is narrower than the dtype of the computation.
    """
    unit = torch.finfo(accumulation_dtype(dtype)).eps * (1 + logit_size)
    if dtype == torch.float64:
        unit *= 2  # the truth is computed in float64 too, with similar rounding errors
    rounding = 0.0
    if output_dtype is not None and output_dtype != accumulation_dtype(dtype):
        rounding = torch.finfo(output_dtype).eps
    return Errors(
        REFERENCE_FACTOR * reference.maximum + FLOOR_ULPS_MAXIMUM * unit + rounding,
        REFERENCE_FACTOR * reference.rms + FLOOR_ULPS_RMS * unit + rounding,
    )


@dataclass(frozen=True)
class Report:
    """The result of `compare`: errors and budgets of the mean loss and of its gradient with respect to the
    embeddings."""

    loss: Errors
    loss_allowed: Errors
    gradient: Errors
    gradient_allowed: Errors

    @property
    def ok(self) -> bool:
        return self.loss.within(self.loss_allowed) and self.gradient.within(self.gradient_allowed)

    @property
    def loss_error(self) -> float:
        return self.loss.rms

    @property
    def loss_budget(self) -> float:
        return self.loss_allowed.rms

    @property
    def gradient_error(self) -> float:
        return self.gradient.rms

    @property
    def gradient_budget(self) -> float:
        return self.gradient_allowed.rms

    def __str__(self) -> str:
        verdict = "within budget" if self.ok else "BEYOND BUDGET"
        return (
            f"{verdict}: loss error {self.loss_error:.1e} (allowed {self.loss_budget:.1e}), "
            f"gradient error {self.gradient_error:.1e} (allowed {self.gradient_budget:.1e})"
        )


def compare(
    z_i: Tensor, z_j: Tensor, temperature: float | Tensor, *, backend: BackendName = "auto", group: Group | None = None
) -> Report:
    """Compare a backend's mean NT-Xent and its gradient with the float64 reference on a live batch.

    Each rank runs the reference on the rows of all ranks, which takes O(N^2) float64 memory for N samples in total.

    Args:
        z_i: (N, D) embeddings of the first view, float16, bfloat16, float32 or float64, with any strides. Row n belongs
            to sample n.
        z_j: (N, D) embeddings of the second view, with the shape, dtype and device of `z_i`. Row n belongs to sample n.
        temperature: tau > 0, a float or a 0-d floating-point tensor, whose value is read on any device.
        backend: The backend to judge: "auto", which chooses one for the device, or a name from `backends()`.
        group: The ranks that hold the batch: "world" (the default process group, looked up at each call), a process
            group, a one-dimensional DeviceMesh, or a `Sharding`. The joint result is judged on the rows of all ranks,
            and every rank gets the same report. None: this rank's samples are the whole batch.

    Returns:
        A `Report`. Its `ok` says whether the errors are within budget, and it prints as one line. No gradient reaches
        the embeddings.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, dtypes or devices do not match, the batch is empty, a number is out of range, or an option
            is unknown, differs between ranks or cannot be combined with another.
        RuntimeError: the backend is not available here (the message says why), or a rank of the group does not answer
            or is in a different call.

    Example:
        >>> import torch
        >>> from fastntxent.error_budget import compare
        >>> compare(torch.eye(4), torch.eye(4), 0.5).ok
        True
    """
    check_views(z_i, z_j, may_be_empty=group is not None)
    check_temperature(temperature, z_i)
    tau = temperature.item() if isinstance(temperature, Tensor) else temperature
    batch = open_batch(group, "compare", {"z_i": z_i, "z_j": z_j}, backend=backend, temperature=tau)
    with autocast_off(z_i):
        loss, *d_z = _loss_and_gradients(z_i, z_j, tau, backend, group)
        if isinstance(batch, ShardedBatch):
            # Every rank returns the loss of the whole batch, and a rank's gradient is the gradient of the sum of all
            # ranks' losses. Divide it by the number of ranks.
            d_z = [batch.gather(d.to(loss.dtype)) / len(batch.sizes) for d in d_z]
        z_i, z_j = batch.gather(z_i.detach()), batch.gather(z_j.detach())
        same_loss, *same_d_z = _loss_and_gradients(z_i, z_j, tau, "reference")
        gradient, same_gradient = torch.cat(d_z), torch.cat(same_d_z)
        true_loss, true_gradient = true_loss_and_gradient(z_i, z_j, tau)
    return Report(
        loss=errors_of(loss, true_loss),
        loss_allowed=allowed(errors_of(same_loss, true_loss), z_i.dtype, 1 / tau),
        gradient=errors_of(gradient, true_gradient),
        gradient_allowed=allowed(errors_of(same_gradient, true_gradient), z_i.dtype, 1 / tau, output_dtype=z_i.dtype),
    )


@torch.enable_grad()
def _loss_and_gradients(
    z_i: Tensor, z_j: Tensor, temperature: float, backend: BackendName, group: Group | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    z_i, z_j = (z.detach().clone().requires_grad_() for z in (z_i, z_j))
    loss = nt_xent(z_i, z_j, temperature, backend=backend, group=group)
    d_z_i, d_z_j = torch.autograd.grad(loss, (z_i, z_j))
    return loss.detach(), d_z_i, d_z_j


@torch.enable_grad()
def true_loss_and_gradient(z_i: Tensor, z_j: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the mean loss and its gradient with respect to [z_i; z_j], computed in float64. Only the smallest norm
    that a row is divided by (`norm_eps`) is taken from the views' own dtype."""
    eps = norm_eps(z_i.dtype)
    z_i, z_j = (z.detach().double().requires_grad_() for z in (z_i, z_j))
    u_i, u_j = (F.normalize(z, dim=1, eps=eps) for z in (z_i, z_j))
    loss = nt_xent(u_i, u_j, temperature, normalize=False, backend="reference")
    return loss.detach(), torch.cat(torch.autograd.grad(loss, (z_i, z_j)))


def _ratio(error: float, size: float) -> float:
    return error / size if size > 0 else (0.0 if error == 0 else float("inf"))


def _maximum(x: Tensor) -> float:
    return float(x.abs().max())


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
