"""lightly's contrastive losses: `lightly.loss.NTXentLoss`, `DCLLoss` and `DCLWLoss`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.base import row_dots, row_losses
from ..common import unit_rows
from ..losses import dcl, info_nce, nt_xent
from ..primitives import cross_neg_lse, neg_lse
from ..validation import check_views
from .shared import require_one_process

__all__ = ["DCLLoss", "DCLWLoss", "MemoryBankModule", "NTXentLoss", "negative_mises_fisher_weights"]


class NTXentLoss(nn.Module):
    """NT-Xent, or with a memory bank MoCo's loss: out0 against out1 and the bank, 1/N, in one direction.

    Without a bank it is `fastntxent.nt_xent`. A negative temperature is taken too, at twice the work.

    Args:
        temperature: not within 1e-8 of zero; a float or a 0-d tensor.
        memory_bank_size: (size, dim), or 0 for none. An int alone finds its dim in the first batch.
        gather_distributed: raises RuntimeError in a group of several processes, for now.

    Raises:
        ValueError: as lightly does, for a temperature within 1e-8 of zero and for a negative size.

    Example:
        >>> import torch
        >>> NTXentLoss(temperature=1.0)(torch.eye(4), torch.eye(4))
        tensor(1.1654)
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ):
        super().__init__()
        self.temperature = temperature
        self.memory_bank = MemoryBankModule(memory_bank_size, gather_distributed)
        self.gather_distributed = gather_distributed
        if abs(temperature) < 1e-8:
            raise ValueError(f"temperature must not be within 1e-8 of zero, got {temperature}")
        _check_distributed(gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        _check_process(self)
        check_views(out0, out1)
        tau = self.temperature
        if self.memory_bank.size[0]:
            u0, u1 = unit_rows(out0), unit_rows(out1)
            _, bank = self.memory_bank(u1, update=out0.requires_grad)
            if _is_negative(tau):
                u0, tau = -u0, -tau
            return info_nce(u0, u1, tau, negatives=bank.T.to(u0), normalize=False)
        if _is_negative(tau):
            return row_losses(*_logits(unit_rows(out0), unit_rows(out1), tau)).mean()
        return nt_xent(out0, out1, tau)


class DCLLoss(nn.Module):
    """Decoupled contrastive loss, with any weight on the positives.

    Args:
        temperature: a float or a 0-d tensor, not zero.
        weight_fn: called with the normalised (out0, out1), and (out1, out0), gives weights (N,) of the positives, or a
            number.
        gather_distributed: raises RuntimeError in a group of several processes, for now.

    A batch of one sample, which has no negatives, is 0 (lightly's is -inf).

    Example:
        >>> import torch
        >>> DCLLoss(temperature=1.0)(torch.eye(4), torch.eye(4))
        tensor(0.7918)
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ):
        super().__init__()
        self.temperature = temperature
        self.weight_fn = weight_fn
        self.gather_distributed = gather_distributed
        _check_distributed(gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        _check_process(self)
        check_views(out0, out1)
        if self.weight_fn is None and not _is_negative(self.temperature):
            return dcl(out0, out1, self.temperature)
        u0, u1 = unit_rows(out0), unit_rows(out1)
        nu, pos = _logits(u0, u1, self.temperature)
        if self.weight_fn is not None:
            pos_0, pos_1 = pos.chunk(2)
            pos = torch.cat((self.weight_fn(u0, u1) * pos_0, self.weight_fn(u1, u0) * pos_1))
        return torch.where(nu == -torch.inf, 0, nu - pos).mean()


class DCLWLoss(DCLLoss):
    """DCL whose positives have a negative von Mises-Fisher weight; the arguments are those of `DCLLoss`.

    Args:
        sigma: the spread of the weights.

    Example:
        >>> import torch
        >>> DCLWLoss(temperature=1.0)(torch.eye(4), torch.eye(4))
        tensor(0.7918)
    """

    def __init__(self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False):
        super().__init__(temperature, partial(negative_mises_fisher_weights, sigma=sigma), gather_distributed)


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """2 - N softmax(out0_n . out1_n / sigma), (N,), of unit rows; no gradient goes through it.

    Example:
        >>> import torch
        >>> negative_mises_fisher_weights(torch.eye(2), torch.eye(2))
        tensor([1., 1.])
    """
    sims = row_dots(out0.detach(), out1.detach())
    return 2 - out0.shape[0] * torch.softmax(sims / sigma, dim=0)


class MemoryBankModule(nn.Module):
    """`size` rows, random at first, that are replaced by those of the batches, oldest first.

    As in lightly a batch that reaches the bank's end is cut there, and the next one goes to the beginning; the bank is
    not part of the `state_dict`. (`fastntxent.NegativeQueue` is, begins empty and loses no row.)

    Args:
        size: (size, dim), 0 for none, or an int that finds its dim in the first batch.
        gather_distributed: raises RuntimeError in a group of several processes, for now.
        feature_dim_first: whether the bank is given as (dim, size).

    Example:
        >>> import torch
        >>> bank = MemoryBankModule((4, 2))
        >>> out, held = bank(torch.ones(3, 2), update=True)
        >>> held.shape, bank.bank[:3].sum()
        (torch.Size([2, 4]), tensor(6.))
    """

    def __init__(
        self, size: int | Sequence[int], gather_distributed: bool = False, feature_dim_first: bool = True
    ) -> None:
        super().__init__()
        self.size = (size,) if isinstance(size, int) else tuple(size)
        if any(entry < 0 for entry in self.size) or len(self.size) not in (1, 2):
            raise ValueError(f"memory bank size must be (size, dim), size or 0, none negative, got {size}")
        self.gather_distributed = gather_distributed
        self.feature_dim_first = feature_dim_first
        self.bank: Tensor
        self.bank_ptr = 0  # in host memory: nothing waits for the device
        self.register_buffer("bank", torch.empty(0), persistent=False)
        if len(self.size) == 2:
            self._begin(self.size[1])

    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and what the bank held before it; `labels` are for lightly's signature alone."""
        if not self.size[0]:
            return output, None
        if update and self.gather_distributed:
            require_one_process("a memory bank with gather_distributed=True")
        if self.bank.ndim == 1:
            self._begin(output.shape[1])
            self.bank = self.bank.to(output.device)
        held = self.bank.clone()
        if update:
            self._push(output)
        return output, held.T if self.feature_dim_first else held

    def _begin(self, dim: int) -> None:
        self.bank = F.normalize(torch.randn(self.size[0], dim), dim=-1)

    @torch.no_grad()
    def _push(self, rows: Tensor) -> None:
        first, size = self.bank_ptr, self.size[0]
        rows = rows[: size - first]
        self.bank[first : first + len(rows)] = rows.to(self.bank)
        self.bank_ptr = (first + len(rows)) % size


def _check_distributed(gather_distributed: bool) -> None:
    if gather_distributed and not dist.is_available():
        raise ValueError("gather_distributed must be False where this PyTorch has no torch.distributed, got True")


def _check_process(loss: NTXentLoss | DCLLoss) -> None:
    if loss.gather_distributed:
        require_one_process(f"{type(loss).__name__} with gather_distributed=True")


def _is_negative(temperature: float | Tensor) -> bool:
    """A tensor is positive: an accelerator's value is not read."""
    return not isinstance(temperature, Tensor) and temperature < 0


def _logits(u0: Tensor, u1: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """nu and the positive's logit, (2N,) each, of unit rows; also at a negative temperature."""
    u = torch.cat((u0, u1))
    ids = torch.arange(len(u0), device=u.device).repeat(2)
    if _is_negative(temperature):
        nu = cross_neg_lse(u, -u, ids, ids, -temperature).rows
    else:
        nu = neg_lse(u, ids, temperature)
    return nu, (row_dots(u0, u1) / temperature).repeat(2)
