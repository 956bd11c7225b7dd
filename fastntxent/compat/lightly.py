"""lightly's contrastive losses: `lightly.loss.NTXentLoss`, `DCLLoss` and `DCLWLoss`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..algebra import row_dots, row_losses
from ..batch import Batch, LocalBatch
from ..losses import dcl, macl, nt_xent
from ..losses.dcl_loss import mises_fisher_weights
from ..modules.base import TypedModule
from ..opening import open_batch
from ..ops import copy_now
from ..sides import Side
from ..validation import check_factor, check_features, check_number, check_parameter, check_rows, check_same, extremes
from ..watching import watch
from .shared import as_scalar, default_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["DCLLoss", "DCLWLoss", "MACLLoss", "MemoryBankModule", "NTXentLoss", "negative_mises_fisher_weights"]


class NTXentLoss(TypedModule):
    """NT-Xent or, with a memory bank, MoCo's loss.

    With a bank, each row of out0 is compared with its row of out1 and with the rows of the bank. The loss is the mean
    over the N rows of out0. Without a bank, the loss is `fastntxent.nt_xent`. A negative temperature is allowed, as in
    lightly, and costs twice the work.

    Args:
        temperature: A float or a one-element tensor, not within 1e-8 of zero. A tensor may be negative only in host
            memory and outside compiled code, where its sign can be read; elsewhere it must be positive.
        memory_bank_size: (size, dim), or 0 for no bank. With an int, dim comes from the first batch.
        gather_distributed: Use the batch of all ranks of the default process group, like `group=` of
            `fastntxent.nt_xent`. The loss is the mean over all ranks' rows, the same on every rank (lightly's is the
            mean over the rank's rows). The gradient is lightly's. A bank stores the rows of all ranks.

    Raises:
        ValueError: the temperature is within 1e-8 of zero, the size is negative or has more than two entries, or
            PyTorch was built without torch.distributed and gather_distributed is set.
        TypeError: the temperature is not a number, or the size is not an int.

    Example:
        >>> import torch
        >>> NTXentLoss(temperature=1.0)(torch.eye(4), torch.eye(4))
        tensor(1.1654)
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ):
        super().__init__()
        self.temperature = temperature
        self.memory_bank = MemoryBankModule(_bank_size(memory_bank_size, "memory_bank_size"), gather_distributed)
        self.gather_distributed = gather_distributed
        value = _checked_value(temperature)
        if value is not None and -1e-8 < value < 1e-8:
            raise ValueError(f"temperature must not be within 1e-8 of zero, got {temperature}")
        _check_distributed(gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Return the loss, a 0-d tensor.

        Args:
            out0: (N, D), one view of each sample, normalised here. If out0 requires a gradient, the rows of out1 are
                added to the memory bank.
            out1: (N, D), the other view, normalised here.
        """
        group = _gathering_group(self.gather_distributed)
        tau = as_scalar(self.temperature)
        has_bank = self.memory_bank.size[0] > 0
        if not (has_bank or _is_negative(tau)):
            _check_outputs(out0, out1, may_be_empty=group is not None)
            return nt_xent(out0, out1, tau, group=group)
        batch = open_batch(
            group, "NTXentLoss", {"out0": out0, "out1": out1}, views=1 if has_bank else 2, temperature=tau
        )
        u0, u1 = batch.unit_rows(out0), batch.unit_rows(out1)
        if has_bank:
            if self.memory_bank.bank.ndim == 2:
                check_features("out0", out0, "the bank's rows", self.memory_bank.bank)
            _, bank = self.memory_bank(u1, update=u0.requires_grad)
            assert bank is not None
            return watch(_against_bank(batch, u0, u1, bank.T.to(u0), tau), tau)
        return watch(batch.reduce(row_losses(*_logits(batch, u0, u1, tau))), tau)


class DCLLoss(TypedModule):
    """Decoupled contrastive loss, optionally with weights on the positives.

    The loss of a single sample, which has no negatives, is 0 (lightly's is -inf).

    Args:
        temperature: A float or a one-element tensor, not zero. A tensor may be negative only in host memory and outside
            compiled code, where its sign can be read; elsewhere it must be positive.
        weight_fn: A function of normalised views, called with (out0, out1) and with (out1, out0). It returns weights
            (N,) of the positives, or a number. None means no weights.
        gather_distributed: Use the batch of all ranks of the default process group, like `group=` of `fastntxent.dcl`.
            The loss is the mean over all ranks' rows, the same on every rank (lightly's is the mean over the rank's
            rows). The gradient is lightly's. weight_fn gets this rank's rows.

    Raises:
        TypeError: the temperature is not a number.
        ValueError: the temperature is zero, or PyTorch was built without torch.distributed and gather_distributed is
            set.

    Example:
        >>> import torch
        >>> DCLLoss(temperature=1.0)(torch.eye(4), torch.eye(4))
        tensor(0.7918)
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        weight_fn: Callable[[Tensor, Tensor], float | Tensor] | None = None,
        gather_distributed: bool = False,
    ):
        super().__init__()
        if _checked_value(temperature) == 0:
            raise ValueError(f"temperature must not be zero, got {temperature}")
        self.temperature = temperature
        self.weight_fn = weight_fn
        self.gather_distributed = gather_distributed
        _check_distributed(gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Return the loss, a 0-d tensor.

        Args:
            out0: (N, D), one view of each sample, normalised here.
            out1: (N, D), the other view, normalised here.
        """
        group = _gathering_group(self.gather_distributed)
        tau = as_scalar(self.temperature)
        if self.weight_fn is None and not _is_negative(tau):
            _check_outputs(out0, out1, may_be_empty=group is not None)
            return dcl(out0, out1, tau, group=group)
        batch = open_batch(
            group, type(self).__name__, {"out0": out0, "out1": out1}, views=2, temperature=tau,
            weighted=self.weight_fn is not None,
        )  # fmt: skip
        u0, u1 = batch.unit_rows(out0), batch.unit_rows(out1)
        nu, pos = _logits(batch, u0, u1, tau)
        if self.weight_fn is not None:
            pos_0, pos_1 = pos.chunk(2)
            pos = torch.cat((self._weights(batch, u0, u1) * pos_0, self._weights(batch, u1, u0) * pos_1))
        return watch(batch.reduce(torch.where(nu == -torch.inf, 0, nu - pos)), tau)

    def _weights(self, batch: Batch, u0: Tensor, u1: Tensor) -> float | Tensor:
        assert self.weight_fn is not None
        weights = as_scalar(self.weight_fn(u0, u1))
        if not isinstance(weights, Tensor):
            check_number("weight_fn's result", weights)
        elif weights.shape not in ((), (len(u0),)):
            raise ValueError(f"weight_fn must return a number or {len(u0)} weights, got shape {tuple(weights.shape)}")
        return weights


class DCLWLoss(DCLLoss):
    """`DCLLoss` with negative von Mises-Fisher weights on the positives.

    Args:
        temperature: A float or a one-element tensor, not zero. A tensor may be negative only in host memory and outside
            compiled code, where its sign can be read; elsewhere it must be positive.
        sigma: The spread of the weights.
        gather_distributed: Use the batch of all ranks of the default process group, like `group=` of `fastntxent.dcl`.
            The loss is the mean over all ranks' rows, the same on every rank (lightly's is the mean over the rank's
            rows). The weights are computed over the whole batch (lightly's over the rank's rows). With these weights,
            the gradient is lightly's.

    Raises:
        TypeError: the temperature is not a number.
        ValueError: the temperature is zero, or PyTorch was built without torch.distributed and gather_distributed is
            set.

    Example:
        >>> import torch
        >>> DCLWLoss(temperature=1.0)(torch.eye(4), torch.eye(4))
        tensor(0.7918)
    """

    def __init__(self, temperature: float | Tensor = 0.1, sigma: float = 0.5, gather_distributed: bool = False):
        super().__init__(temperature, partial(negative_mises_fisher_weights, sigma=sigma), gather_distributed)
        self.sigma = sigma

    def _weights(self, batch: Batch, u0: Tensor, u1: Tensor) -> Tensor:
        return mises_fisher_weights(batch, row_dots(u0, u1), self.sigma)


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """Return 2 - N softmax(out0_n . out1_n / sigma), (N,), without a gradient.

    Args:
        out0: (N, D), unit rows.
        out1: (N, D), unit rows.
        sigma: The spread of the weights.

    Returns:
        A tensor (N,), float64 for float64 rows, else float32, without a gradient.

    Example:
        >>> import torch
        >>> negative_mises_fisher_weights(torch.eye(2), torch.eye(2))
        tensor([1., 1.])
    """
    return mises_fisher_weights(LocalBatch(out0, 1, "none", False), row_dots(out0, out1), sigma)


class MACLLoss(TypedModule):
    """Model-aware contrastive loss: the temperature depends on how well the views agree. See `fastntxent.macl`.

    A row's weight 1 / (1 - exp(-loss)) is exact. lightly bounds the weight by adding 1e-8 to its denominator.

    Args:
        temperature: The base temperature, at least 1e-8, a float or a one-element tensor.
        alpha: In [0, 1], how far the temperature follows the agreement of the views. 0 keeps it at the base.
        A_0: In [0, 1], the agreement at which the temperature equals the base.

    Raises:
        TypeError: the temperature, alpha or A_0 is not a number.
        ValueError: the temperature, alpha or A_0 is out of range.

    Example:
        >>> import torch
        >>> MACLLoss(temperature=1.0, alpha=0.0)(torch.eye(4), torch.eye(4))  # l / (1 - e^-l), l = log(e + 6) - 1
        tensor(1.6934)
    """

    def __init__(self, temperature: float | Tensor = 0.1, alpha: float = 0.5, A_0: float = 0.0):
        super().__init__()
        self.temperature = temperature
        self.alpha = check_parameter("alpha", alpha)
        self.A_0 = check_parameter("A_0", A_0)
        value = _checked_value(temperature)
        if value is not None and not value >= 1e-8:
            raise ValueError(f"temperature must be at least 1e-8, got {temperature}")

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        """Return the loss, a 0-d tensor.

        Args:
            z0: (N, D), one view of each sample, normalised here.
            z1: (N, D), the other view, normalised here.
        """
        check_rows("z0", z0)
        check_rows("z1", z1)
        check_same("z0", z0, "z1", z1, "shape", "dtype", "device")
        return macl(z0, z1, as_scalar(self.temperature), alpha=self.alpha, a_0=self.A_0)


class MemoryBankModule(TypedModule):
    """A bank of `size` rows, random at first, in which each batch replaces the oldest rows.

    As in lightly, a batch that reaches the end of the bank is cut off there, and the next batch starts at the
    beginning. The bank is not part of the `state_dict`, as in lightly. (`fastntxent.NegativeQueue` is saved, starts
    empty and loses no row.)

    Args:
        size: A pair (size, dim), or an int, for which dim comes from the first batch. 0 means no bank. From version 1.6
            on, lightly has no default and accepts no int other than 0.
        gather_distributed: Store the rows of all ranks of the default process group.
        feature_dim_first: Return the bank as (dim, size) instead of (size, dim).

    Raises:
        ValueError: the size is negative or has more than two entries, or rows do not have the bank's dim.
        TypeError: the size is not an int, or an update is not a floating-point tensor.

    Example:
        >>> import torch
        >>> bank = MemoryBankModule((4, 2))
        >>> out, held = bank(torch.ones(3, 2), update=True)
        >>> held.shape, bank.bank[:3].sum()
        (torch.Size([2, 4]), tensor(6.))
    """

    def __init__(
        self, size: int | Sequence[int] = 65536, gather_distributed: bool = False, feature_dim_first: bool = True
    ) -> None:
        super().__init__()
        self.size = _bank_size(size, "size")
        self.gather_distributed = gather_distributed
        self.feature_dim_first = feature_dim_first
        self.bank: Tensor
        self.bank_ptr: Tensor
        self.register_buffer("bank", torch.empty(0), persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.int64), persistent=False)
        if len(self.size) == 2:
            self._begin(self.size[1])

    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output unchanged, and the bank as it was before the update (None if its size is 0).

        Args:
            output: (N, dim), the rows of a batch.
            labels: Unused, as in lightly.
            update: Whether to store the rows in the bank.
        """
        if not self.size[0]:
            return output, None
        first_call = self.bank.ndim == 1
        if first_call or update:
            check_rows("output", output, may_be_empty=self.gather_distributed and not first_call)
        if first_call:
            self._begin(output.shape[1])
            self.bank, self.bank_ptr = self.bank.to(output.device), self.bank_ptr.to(output.device)
        held = copy_now(self.bank)
        if update:
            check_features("output", output, "the bank's rows", self.bank)
            self._push(_detached_rows_of_all_ranks(output) if self.gather_distributed else output)
        return output, held.T if self.feature_dim_first else held

    @torch.inference_mode(False)  # a bank created in inference mode could not be updated outside it
    def _begin(self, dim: int) -> None:
        self.bank = F.normalize(torch.randn(self.size[0], dim).type_as(self.bank), dim=-1)

    @torch.no_grad()
    def _push(self, rows: Tensor) -> None:
        """Write rows from the pointer up to the end of the bank. The host does not read the pointer, so it cannot drop
        the rows that do not fit. Instead, positions beyond the end wrap around to the beginning, and there the bank's
        own rows are written back."""
        size = self.size[0]
        rows = rows[:size].to(self.bank)
        places = self.bank_ptr + torch.arange(len(rows), device=rows.device)
        wrapped = places % size
        end = self.bank_ptr + len(rows)
        self.bank[wrapped] = torch.where((places < size).unsqueeze(1), rows, self.bank[wrapped])
        self.bank_ptr.copy_(torch.where(end < size, end, 0))


def _check_outputs(out0: Tensor, out1: Tensor, *, may_be_empty: bool) -> None:
    """Check the views under lightly's names, before a loss checks them under different names."""
    check_rows("out0", out0, may_be_empty=may_be_empty)
    check_rows("out1", out1, may_be_empty=may_be_empty)
    check_same("out0", out0, "out1", out1, "shape", "dtype", "device")


def _check_distributed(gather_distributed: bool) -> None:
    if gather_distributed and not dist.is_available():
        raise ValueError("gather_distributed must be False: this PyTorch was built without torch.distributed, got True")


def _bank_size(size: object, name: str) -> tuple[int, ...]:
    try:
        entries = tuple(map(operator.index, size if isinstance(size, Iterable) else (size,)))
    except TypeError:
        raise TypeError(f"{name} must be an int or a pair (size, dim), got {size!r}") from None
    if any(entry < 0 for entry in entries) or len(entries) not in (1, 2):
        raise ValueError(f"{name} must be an int or a pair (size, dim), without negative numbers, got {size}")
    return entries


def _gathering_group(gather_distributed: bool) -> ProcessGroup | None:
    return default_group() if gather_distributed else None


@torch.no_grad()
def _detached_rows_of_all_ranks(rows: Tensor) -> Tensor:
    return open_batch(default_group(), "MemoryBankModule", {"output": rows}).gather(rows)


def _checked_value(temperature: float | Tensor) -> float | None:
    """Check the temperature and return its value, or None if the host cannot read it."""
    if isinstance(temperature, Tensor):
        check_factor("temperature", temperature, None)
        if temperature.numel() != 1:
            raise ValueError(f"temperature must be a float or have one element, got shape {tuple(temperature.shape)}")
    else:
        temperature = check_number("temperature", temperature, "a float or a tensor of one element")
    return _value(as_scalar(temperature))


def _value(temperature: float | Tensor) -> float | None:
    """Return the temperature, or None if the host cannot read it: on an accelerator, or in traced code."""
    if not isinstance(temperature, Tensor):
        return temperature
    limits = extremes(temperature) if temperature.ndim == 0 else None
    return None if limits is None else limits[0]


def _is_negative(temperature: float | Tensor) -> bool:
    value = _value(temperature)
    return value is not None and value < 0


def _logits(batch: Batch, u0: Tensor, u1: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return nu and the logits of the positives, (2N,) each, for unit rows. The temperature may be negative."""
    u, ids = torch.cat((u0, u1)), batch.sample_ids().repeat(2)
    sims = row_dots(u0, u1).repeat(2)
    if _is_negative(temperature):
        inv_tau = batch.inverse_temperature(-temperature)
        return batch.neg_lse_to(Side(u, ids), Side(-u, ids), inv_tau), -inv_tau * sims
    inv_tau = batch.inverse_temperature(temperature)
    return batch.neg_lse(u, ids, inv_tau), inv_tau * sims


def _against_bank(batch: Batch, u0: Tensor, u1: Tensor, bank: Tensor, temperature: float | Tensor) -> Tensor:
    """Return the reduced loss of rows against their positives and this rank's bank."""
    if _is_negative(temperature):
        u0, temperature = -u0, -temperature
    inv_tau = batch.inverse_temperature(temperature)
    rows, cols = (Side(x, torch.full((x.shape[0],), i, device=u0.device)) for i, x in enumerate((u0, bank)))
    return batch.held_loss(rows, cols, inv_tau, inv_tau * row_dots(u0, u1))
