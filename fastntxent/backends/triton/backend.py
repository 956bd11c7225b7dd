"""The backend that calls the kernels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..base import KernelBackend, loss_weight, norm_eps
from . import config
from .backward import Backward, survey
from .forward import Forward
from .pack import Packed
from .tiles import INTERPRETED

if not INTERPRETED and not torch.cuda.is_available():
    raise RuntimeError("no CUDA device here; under TRITON_INTERPRET=1 the kernels run on CPU tensors, slowly")


Method = TypeVar("Method", bound=Callable[..., Any])


def _on_its_device(method: Method) -> Method:
    """Triton launches on the current device: make it that of the first tensor."""

    @functools.wraps(method)
    def run(self: KernelBackend, tensor: Tensor, *rest: Any) -> Any:
        with torch.cuda.device_of(tensor):
            return method(self, tensor, *rest)

    return cast(Method, run)


class TritonBackend(KernelBackend):
    """The kernels of this package."""

    device_types = ("cuda", "cpu") if INTERPRETED else ("cuda",)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)

    def forms(self, device: torch.device, dtype: torch.dtype) -> Sequence[str]:
        return config.forms(device, dtype)

    def forced(self, form: str) -> contextlib.AbstractContextManager[None]:
        return config.forced(form)

    @_on_its_device
    def neg_lse(self, u: Tensor, ids: Tensor, inv_tau: Tensor) -> Tensor:
        (nu,) = Forward([_rows(u, ids)], inv_tau).run()
        return nu

    @_on_its_device
    def neg_lse_backward(
        self, d_neg_lse: Tensor, u: Tensor, ids: Tensor, inv_tau: Tensor, neg_lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = _rows(u, ids)
        weights = survey([rows], [d_neg_lse], [neg_lse])
        d_u, _, d_inv_tau, _ = Backward(Forward([rows], inv_tau), weights, [neg_lse]).run(0)
        return d_u, d_inv_tau

    @_on_its_device
    def cross_neg_lse(
        self, u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows, cols = Forward([_rows(u, u_ids), _rows(v, v_ids)], inv_tau).run()
        return rows, cols

    @_on_its_device
    def cross_neg_lse_backward(
        self,
        d_rows: Tensor,
        d_cols: Tensor,
        u: Tensor,
        v: Tensor,
        u_ids: Tensor,
        v_ids: Tensor,
        inv_tau: Tensor,
        rows_neg_lse: Tensor,
        cols_neg_lse: Tensor,
        needs_u: bool,
        needs_v: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        sides, nus = [_rows(u, u_ids), _rows(v, v_ids)], [rows_neg_lse, cols_neg_lse]
        backward = Backward(Forward(sides, inv_tau), survey(sides, [d_rows, d_cols], nus), nus)
        d_u = d_v = None
        if needs_v:
            d_v, _, d_inv_tau, _ = backward.run(1)
        if needs_u or not needs_v:  # either side's sum is the temperature's gradient
            d_u, _, d_inv_tau, _ = backward.run(0)
        return d_u if needs_u else None, d_v, d_inv_tau

    @_on_its_device
    def nt_xent_rows(self, z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
        rows = _views(z_i, z_j, normalize)
        (nu,) = Forward([rows], inv_tau).run()
        return nu, inv_tau * rows.sim_pos[: rows.n]

    @_on_its_device
    def nt_xent_rows_backward(
        self,
        d_neg_lse: Tensor,
        d_pos: Tensor,
        z_i: Tensor,
        z_j: Tensor,
        inv_tau: Tensor,
        neg_lse: Tensor,
        normalize: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, d_pos = _views(z_i, z_j, normalize), d_pos.contiguous()
        weights = survey([rows], [d_neg_lse], [neg_lse], d_pos)
        d_z_i, d_z_j, d_inv_tau, _ = Backward(Forward([rows], inv_tau), weights, [neg_lse]).run(0, d_pos=d_pos)
        return d_z_i, d_z_j, d_inv_tau

    @_on_its_device
    def nt_xent_value(self, z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool, mean: bool) -> Tensor:
        _, _, totals = Forward([_views(z_i, z_j, normalize)], inv_tau).losses()
        return totals.sum() * loss_weight(z_i, mean)

    @_on_its_device
    def nt_xent_scalar(
        self, z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool, mean: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        forward = Forward([_views(z_i, z_j, normalize)], inv_tau)
        nu, weights, totals = forward.losses()
        weight = loss_weight(z_i, mean)
        d_z_i, d_z_j, d_inv_tau, loss = Backward(forward, weights, [nu]).run(
            0, d_pos=weights.of_sides[0], weight=weight, pos_factor=-weight, totals=totals
        )
        return loss, d_z_i, d_z_j, d_inv_tau


def _views(z_i: Tensor, z_j: Tensor, normalize: bool) -> Packed:
    return Packed(z_i, z_j, normalize=normalize, eps=norm_eps(z_i.dtype), tf32=_takes_tf32(z_i))


def _rows(u: Tensor, ids: Tensor) -> Packed:
    return Packed(u, ids=ids, normalize=False, eps=norm_eps(u.dtype), tf32=_takes_tf32(u))


def _takes_tf32(rows: Tensor) -> bool:
    """Whether PyTorch's own products of such rows are in TF32. Triton has it on NVIDIA's chips."""
    if rows.dtype != torch.float32 or torch.version.hip:
        return False
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    if precision == "none":  # an older PyTorch, or nothing said of this backend
        return torch.get_float32_matmul_precision() != "highest"
    return bool(precision == "tf32")


BACKEND = TritonBackend()
