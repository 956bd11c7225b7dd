"""The C++ kernels of csrc/cpu: normalisation, log-sum-exp, loss and every gradient in one call.

With one side, tiles have the same schedule as in blocked.py, but products accumulate in registers. With u = 2 M^2 D
flops, the forward costs u/2 and the backward 3u/2. A bounded workspace stores exponentials of the forward, which saves
up to u/2 in the backward. All other memory is up to three (M, D) matrices for each side, and a tile for each thread.
The number of threads is PyTorch's (`torch.set_num_threads`). Half-precision rows are widened to float32, except that
processors with AVX512_BF16 or AMX multiply bfloat16 rows directly, with float32 sums.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

try:
    # The full name is needed because the package is still loading.
    import fastntxent._cpu as _cpu  # type: ignore[import-not-found]
except ModuleNotFoundError as error:
    raise RuntimeError(
        f"the CPU kernels were not built in {Path(__file__).parents[1]}: either there was no working C++17 compiler at "
        "installation (pip install -v shows why), or this is a checkout that shadows the installed package "
        "(pip install -e . builds them here)"
    ) from error

from ..algebra import accumulation_dtype, direction_weight, loss_weight, norm_eps
from ..sides import Side
from .base import PairSums, SumWeights, Upstream
from .native import (
    BACKWARD,
    DTYPES,
    FORWARD,
    NativeBackend,
    SideArguments,
    address,
    new_gradient,
    new_sums,
    of_backward,
)
from .softplus import sigmoid_weight

# WORKSPACE: bytes of exponentials that a call with one side may keep from its forward to its backward. The exponentials
# of N = 4096 fit. If all exponentials of a call fit, the memory stays reserved for the next call, but the system may
# reclaim it when memory runs short (csrc/cpu/memory.h). A call with two sides has twice as many exponentials per row.
# Its limit, WORKSPACE_AND_ROWS, is for the exponentials and the packed rows together.
WORKSPACE = 144 * 2**20
WORKSPACE_AND_ROWS = 116 * 2**20


LOG_SUM_EXP, SOFTPLUS, SIGMOID = range(3)  # the function that a row sums: `fntx_functions` in csrc/cpu/fastntxent.h
FORMS = {"out": 0, "in": 1, "ratio": 2, "pairs": 3}  # `fntx_forms`


class Limits(NamedTuple):
    """The largest similarity that counts in a row's sum.

    It is given as one number per row (`rows`, `cols`). If both are None, it is `scale` times the row's similarity to
    its positive, plus `shift`.
    """

    rows: Tensor | None = None
    cols: Tensor | None = None
    scale: float = 0.0
    shift: float = 0.0

    @classmethod
    def of(cls, rows: Side, cols: Side | None) -> Limits:
        """Return the limits stored in the sides."""
        given = [None if x is None or x.limits is None else x.limits.contiguous() for x in (rows, cols)]
        return cls(given[0], given[1])

    def arguments(self) -> tuple[int, int, bool, float, float]:
        """Return the arguments in the order in which the extension module takes them."""
        by_positive = self.rows is None and self.cols is None
        return address(self.rows), address(self.cols), by_positive, self.scale, self.shift


class CpuBackend(NativeBackend):
    """The backend that runs the kernels of csrc/cpu on CPU tensors."""

    def details(self) -> str:
        threads = torch.get_num_threads()
        return f"{_cpu.instruction_set()}, {threads} thread{'s' if threads > 1 else ''}"

    def run(
        self,
        phases: int,
        inv_tau: float | Tensor,
        normalize: bool,
        rows: SideArguments,
        *,
        cols: SideArguments | None = None,
        pos: Tensor | None = None,
        d_pos: Tensor | None = None,
        loss: Tensor | None = None,
        weight: float = 1.0,
        cols_weight: float = 0.0,
        d_inv_tau: Tensor | None = None,
        function: int = LOG_SUM_EXP,
        bias: float | Tensor = 0.0,
        d_bias: Tensor | None = None,
        limits: Limits | None = None,
        against: Tensor | None = None,
        d_against: Tensor | None = None,
        classes: Tensor | None = None,
        form: str = "out",
        mean_of_classes: bool = False,
    ) -> None:
        assert not isinstance(inv_tau, Tensor)
        assert not isinstance(bias, Tensor)
        z = rows.first
        _cpu.run(
            phases,
            function,
            DTYPES[z.dtype],
            normalize,
            torch.get_num_threads(),
            z.shape[1],
            inv_tau,
            bias,
            norm_eps(z.dtype),
            rows.addresses(),
            None if cols is None else cols.addresses(),
            address(pos),
            address(d_pos),
            address(loss),
            weight,
            cols_weight,
            address(d_inv_tau),
            address(d_bias),
            None if limits is None else limits.arguments(),
            None if against is None else (address(against), address(d_against)),
            None if classes is None else (address(classes), FORMS[form], mean_of_classes),
            _workspace(rows, cols),
            threading.get_ident() == threading.main_thread().ident,
        )

    def loss_against(
        self, rows: Side, cols: Side, inv_tau: float | Tensor, against: Tensor, mean: bool, needs_rows: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        row_ids, col_ids = self.kernel_ids(rows.ids, cols.ids)
        d_u = new_gradient(rows.u) if needs_rows else None
        loss, d_inv_tau, d_against = new_sums(rows.u), new_sums(rows.u), torch.empty_like(against)
        self.run(
            FORWARD | BACKWARD,
            inv_tau,
            False,
            SideArguments(rows.u, ids=row_ids, d_first=d_u),
            cols=SideArguments(cols.u, ids=col_ids),
            loss=loss,
            weight=1 / rows.u.shape[0] if mean else 1.0,
            d_inv_tau=d_inv_tau,
            against=against.contiguous(),
            d_against=d_against,
        )
        return loss, d_u, d_against, d_inv_tau

    def limited_neg_lse(self, rows: Side, cols: Side | None, inv_tau: float | Tensor) -> tuple[Tensor, Tensor | None]:
        sides = [rows] if cols is None else [rows, cols]
        nus = [new_sums(side.u, side.u.shape[0]) for side in sides]
        ids = self.kernel_ids(*[side.ids for side in sides])
        given = [SideArguments(side.u, None, *each) for side, *each in zip(sides, ids, nus, strict=True)]
        self.run(
            FORWARD, inv_tau, False, given[0], cols=None if cols is None else given[1], limits=Limits.of(rows, cols)
        )
        return nus[0], None if cols is None else nus[1]

    def limited_neg_lse_backward(
        self, rows: Side, cols: Side | None, inv_tau: float | Tensor, of_rows: Upstream, of_cols: Upstream
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        d_rows = new_gradient(rows.u) if of_rows.wanted else None
        d_cols = new_gradient(cols.u) if cols is not None and of_cols.wanted else None
        d_inv_tau = new_sums(of_rows.neg_lse)
        if cols is None:
            (ids,) = self.kernel_ids(rows.ids)
            given, given_cols = of_backward(rows.u, ids, of_rows, d_rows), None
        else:
            row_ids, col_ids = self.kernel_ids(rows.ids, cols.ids)
            given = of_backward(rows.u, row_ids, of_rows, d_rows)
            given_cols = of_backward(cols.u, col_ids, of_cols, d_cols)
        self.run(BACKWARD, inv_tau, False, given, cols=given_cols, d_inv_tau=d_inv_tau, limits=Limits.of(rows, cols))
        return d_rows, d_cols, d_inv_tau

    def limited_nt_xent_scalar(
        self,
        z_i: Tensor,
        z_j: Tensor,
        inv_tau: float | Tensor,
        normalize: bool,
        limit_scale: float,
        limit_shift: float,
        mean: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d_z_i, d_z_j, loss, d_inv_tau = new_gradient(z_i), new_gradient(z_j), new_sums(z_i), new_sums(z_i)
        self.run(
            FORWARD | BACKWARD,
            inv_tau,
            normalize,
            SideArguments(z_i, z_j, d_first=d_z_i, d_second=d_z_j),
            loss=loss,
            weight=loss_weight(z_i, mean),
            d_inv_tau=d_inv_tau,
            limits=Limits(scale=limit_scale, shift=limit_shift),
        )
        return loss, d_z_i, d_z_j, d_inv_tau

    def limited_nt_xent_value(
        self,
        z_i: Tensor,
        z_j: Tensor,
        inv_tau: float | Tensor,
        normalize: bool,
        limit_scale: float,
        limit_shift: float,
        mean: bool,
    ) -> Tensor:
        loss = new_sums(z_i)
        weight, limits = loss_weight(z_i, mean), Limits(scale=limit_scale, shift=limit_shift)
        self.run(FORWARD, inv_tau, normalize, SideArguments(z_i, z_j), loss=loss, weight=weight, limits=limits)
        return loss

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
        loss = new_sums(z_i)
        d_z_i, d_z_j = new_gradient(z_i) if needs_i else None, new_gradient(z_j) if needs_j else None
        d_inv_tau = torch.empty_like(loss)
        weight = direction_weight(z_i, both, mean)
        self.run(
            FORWARD | BACKWARD,
            inv_tau,
            normalize,
            SideArguments(z_i, d_first=d_z_i),
            cols=SideArguments(z_j, d_first=d_z_j),
            loss=loss,
            weight=weight,
            cols_weight=weight if both else 0.0,
            d_inv_tau=d_inv_tau,
        )
        return loss, d_z_i, d_z_j, d_inv_tau

    def info_nce_value(
        self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool, both: bool, mean: bool
    ) -> Tensor:
        loss = new_sums(z_i)
        weight = direction_weight(z_i, both, mean)
        self.run(
            FORWARD,
            inv_tau,
            normalize,
            SideArguments(z_i),
            cols=SideArguments(z_j),
            loss=loss,
            weight=weight,
            cols_weight=weight if both else 0.0,
        )
        return loss

    def sup_con_scalar(
        self, z: Tensor, classes: Tensor, inv_tau: float | Tensor, form: str, normalize: bool, mean: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, d_z, d_inv_tau = new_sums(z), new_gradient(z), new_sums(z)
        self.run(
            FORWARD | BACKWARD,
            inv_tau,
            normalize,
            SideArguments(z, d_first=d_z),
            loss=loss,
            d_inv_tau=d_inv_tau,
            classes=classes.contiguous(),
            form=form,
            mean_of_classes=mean,
        )
        return loss, d_z, d_inv_tau

    def softplus(
        self,
        rows: Side,
        cols: Side | None,
        inv_tau: float | Tensor,
        bias: float | Tensor,
        positives: bool,
        weights: SumWeights | None = None,
    ) -> PairSums:
        one_side = cols is None
        sides = [rows] if cols is None else [rows, cols]
        sums = new_sums(rows.u, rows.u.shape[0])
        of_sums: list[Tensor | None] = [None, None]
        gradients: list[Tensor | None] = [None, None]
        d_inv_tau = d_bias = None
        if weights is not None:
            of_sums = [weights.of_rows.contiguous(), weights.of_cols.contiguous()]
            gradients[0] = new_gradient(rows.u) if weights.wants_rows else None
            gradients[1] = new_gradient(cols.u) if cols is not None and weights.wants_cols else None
            d_inv_tau, d_bias = new_sums(rows.u), new_sums(rows.u)
        ids = self.kernel_ids(*[side.ids for side in sides])
        given = [
            SideArguments(side.u, None, ids[which], None if which else sums, of_sums[which], gradients[which])
            for which, side in enumerate(sides)
        ]
        self.run(
            FORWARD if weights is None else FORWARD | BACKWARD,
            inv_tau,
            False,
            given[0],
            cols=None if one_side else given[1],
            d_inv_tau=d_inv_tau,
            function=SIGMOID if positives else SOFTPLUS,
            bias=bias,
            d_bias=d_bias,
        )
        return PairSums(sums, gradients[0], gradients[1], d_inv_tau, d_bias)

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
        d_z_i, d_z_j = new_gradient(z_i) if needs_i else None, new_gradient(z_j) if needs_j else None
        if two_views:
            rows, cols = SideArguments(z_i, z_j, d_first=d_z_i, d_second=d_z_j), None
        else:
            rows, cols = SideArguments(z_i, d_first=d_z_i), SideArguments(z_j, d_first=d_z_j)
        loss, d_inv_tau, d_bias = new_sums(z_i), new_sums(z_i), new_sums(z_i)
        self.run(
            FORWARD | BACKWARD,
            inv_tau,
            normalize,
            rows,
            cols=cols,
            loss=loss,
            weight=sigmoid_weight(z_i, two_views, mean),
            d_inv_tau=d_inv_tau,
            function=SOFTPLUS if two_views else SIGMOID,
            bias=bias,
            d_bias=d_bias,
        )
        return loss, d_z_i, d_z_j, d_inv_tau, d_bias

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
        loss = new_sums(z_i)
        self.run(
            FORWARD,
            inv_tau,
            normalize,
            SideArguments(z_i, z_j) if two_views else SideArguments(z_i),
            cols=None if two_views else SideArguments(z_j),
            loss=loss,
            weight=sigmoid_weight(z_i, two_views, mean),
            function=SOFTPLUS if two_views else SIGMOID,
            bias=bias,
        )
        return loss

    def kernel_ids(self, *ids: Tensor) -> list[Tensor]:
        # The kernels take ids in [0, 2^31). Renumber the groups if any id lies outside.
        if any(low < 0 or high >= 2**31 for low, high in (each.aminmax() for each in ids)):
            codes = torch.unique(torch.cat([each.to(torch.int64) for each in ids]), return_inverse=True)[1]
            ids = codes.split([len(each) for each in ids])
        return [each.to(torch.int64).contiguous() for each in ids]


def _workspace(rows: SideArguments, cols: SideArguments | None) -> int:
    """Return the bytes of exponentials that a call may keep."""
    if cols is None:
        return WORKSPACE
    packed = 3 * (rows.first.numel() + cols.first.numel()) * accumulation_dtype(rows.first.dtype).itemsize
    return max(WORKSPACE_AND_ROWS - packed, 0)


BACKEND = CpuBackend()
