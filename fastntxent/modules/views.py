"""Losses of two views of a batch, or of several, as modules."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..distributed import Group
from ..losses import dcl, dclw, debiased, hard_negative, macl, multiview_nt_xent, nt_xent, rince
from ..options import BackendName, Reduction
from ..validation import check_in_range, check_number, check_positive
from .base import TemperatureLoss


class NTXentLoss(TemperatureLoss):
    r"""NT-Xent, the loss of SimCLR, as a module; see `nt_xent` for the formula, shapes, dtypes and errors.

    Args:
        temperature: tau > 0, a float, or a 0-d tensor.
        label_smoothing: in [0, 1).
        reduction: "mean" (the paper's 1/(2N)), "sum" or "none".
        normalize: whether rows are scaled to unit length first.
        backend: "auto", or a name from `backends()`.
        group: the ranks over which the batch is spread, as in `nt_xent`.
        learn_temperature: make the temperature a parameter. It is held as its logarithm, `log_temperature`, so no
            step of an optimiser can make it negative; leave it out of the weight decay.

    Its call takes `ids` too, to leave false negatives out.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.NTXentLoss(temperature=1.0)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(1.1654)
    """

    _shown = ("label_smoothing",)

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        normalize: bool = True,
        backend: BackendName = "auto",
        group: Group | None = None,
        learn_temperature: bool = False,
    ):
        super().__init__(
            temperature,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            group=group,
            learn_temperature=learn_temperature,
        )
        label_smoothing = check_in_range("label_smoothing", label_smoothing, 0, 1, with_low=True, with_high=False)
        self.label_smoothing = label_smoothing

    def forward(self, z_i: Tensor, z_j: Tensor, ids: Tensor | None = None) -> Tensor:
        return nt_xent(z_i, z_j, self.temperature, ids=ids, label_smoothing=self.label_smoothing, **self._options)


class MultiViewNTXentLoss(TemperatureLoss):
    r"""NT-Xent of V views as a module; see `multiview_nt_xent`. Arguments as of `NTXentLoss`; its call takes the views,
    (V, N, D) or a sequence of (N, D), and `ids`.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.MultiViewNTXentLoss(temperature=1.0)
        >>> loss(torch.eye(4).repeat(3, 1, 1))
        tensor(1.4612)
    """

    _shown = ("label_smoothing",)

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        normalize: bool = True,
        backend: BackendName = "auto",
        group: Group | None = None,
        learn_temperature: bool = False,
    ):
        super().__init__(
            temperature,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            group=group,
            learn_temperature=learn_temperature,
        )
        label_smoothing = check_in_range("label_smoothing", label_smoothing, 0, 1, with_low=True, with_high=False)
        self.label_smoothing = label_smoothing

    def forward(self, views: Tensor | Sequence[Tensor], ids: Tensor | None = None) -> Tensor:
        return multiview_nt_xent(
            views, self.temperature, ids=ids, label_smoothing=self.label_smoothing, **self._options
        )


class DCLLoss(TemperatureLoss):
    r"""DCL as a module; see `dcl`. Arguments as of `NTXentLoss`.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.DCLLoss(temperature=1.0)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(0.7918)
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        reduction: Reduction = "mean",
        normalize: bool = True,
        backend: BackendName = "auto",
        group: Group | None = None,
        learn_temperature: bool = False,
    ):
        super().__init__(
            temperature,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            group=group,
            learn_temperature=learn_temperature,
        )

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        return dcl(z_i, z_j, self.temperature, **self._options)


class DCLWLoss(TemperatureLoss):
    r"""DCLW as a module; see `dclw` for `sigma`. The other arguments are as of `NTXentLoss`.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.DCLWLoss(temperature=1.0)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(0.7918)
    """

    _shown = ("sigma",)

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        sigma: float = 0.5,
        reduction: Reduction = "mean",
        normalize: bool = True,
        backend: BackendName = "auto",
        group: Group | None = None,
        learn_temperature: bool = False,
    ):
        super().__init__(
            temperature,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            group=group,
            learn_temperature=learn_temperature,
        )
        sigma = check_number("sigma", sigma)
        check_positive("sigma", sigma)
        self.sigma = sigma

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        return dclw(z_i, z_j, self.temperature, sigma=self.sigma, **self._options)


class DebiasedLoss(TemperatureLoss):
    r"""The debiased contrastive loss as a module; see `debiased` for `tau_plus`. The other arguments are as of
    `NTXentLoss`.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.DebiasedLoss(temperature=1.0, tau_plus=0.1)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(1.0246)
    """

    _shown = ("tau_plus",)

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        tau_plus: float = 0.1,
        reduction: Reduction = "mean",
        normalize: bool = True,
        backend: BackendName = "auto",
        group: Group | None = None,
        learn_temperature: bool = False,
    ):
        super().__init__(
            temperature,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            group=group,
            learn_temperature=learn_temperature,
        )
        tau_plus = check_in_range("tau_plus", tau_plus, 0, 1, with_low=True, with_high=False)
        self.tau_plus = tau_plus

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        return debiased(z_i, z_j, self.temperature, tau_plus=self.tau_plus, **self._options)


class HardNegativeLoss(TemperatureLoss):
    r"""HCL as a module; see `hard_negative` for `tau_plus` and `beta`. The other arguments are as of `NTXentLoss`.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.HardNegativeLoss(temperature=1.0, tau_plus=0.1, beta=1.0)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(1.0246)
    """

    _shown = (
        "tau_plus",
        "beta",
    )

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        tau_plus: float = 0.1,
        beta: float = 1.0,
        reduction: Reduction = "mean",
        normalize: bool = True,
        backend: BackendName = "auto",
        group: Group | None = None,
        learn_temperature: bool = False,
    ):
        super().__init__(
            temperature,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            group=group,
            learn_temperature=learn_temperature,
        )
        tau_plus = check_in_range("tau_plus", tau_plus, 0, 1, with_low=True, with_high=False)
        beta = check_in_range("beta", beta, 0, float("inf"), with_low=True, with_high=False)
        self.tau_plus = tau_plus
        self.beta = beta

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        return hard_negative(z_i, z_j, self.temperature, tau_plus=self.tau_plus, beta=self.beta, **self._options)


class RINCELoss(TemperatureLoss):
    r"""Robust InfoNCE as a module; see `rince` for `q` and `lam`. The other arguments are as of `NTXentLoss`.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.RINCELoss(temperature=1.0, q=1.0, lam=0.5)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(1.6409)
    """

    _shown = (
        "q",
        "lam",
    )

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        q: float = 0.5,
        lam: float = 0.01,
        reduction: Reduction = "mean",
        normalize: bool = True,
        backend: BackendName = "auto",
        group: Group | None = None,
        learn_temperature: bool = False,
    ):
        super().__init__(
            temperature,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            group=group,
            learn_temperature=learn_temperature,
        )
        q = check_in_range("q", q, 0, 1, with_low=False, with_high=True)
        lam = check_in_range("lam", lam, 0, 1, with_low=False, with_high=False)
        self.q = q
        self.lam = lam

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        return rince(z_i, z_j, self.temperature, q=self.q, lam=self.lam, **self._options)


class MACLLoss(TemperatureLoss):
    r"""MACL as a module; see `macl` for `alpha` and `a_0`. The other arguments are as of `NTXentLoss`.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.MACLLoss(temperature=0.5, alpha=1.0)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(1.6934)
    """

    _shown = (
        "alpha",
        "a_0",
    )

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        alpha: float = 0.5,
        a_0: float = 0.0,
        reduction: Reduction = "mean",
        normalize: bool = True,
        backend: BackendName = "auto",
        group: Group | None = None,
        learn_temperature: bool = False,
    ):
        super().__init__(
            temperature,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            group=group,
            learn_temperature=learn_temperature,
        )
        alpha = check_in_range("alpha", alpha, 0, 1, with_low=True, with_high=True)
        a_0 = check_in_range("a_0", a_0, 0, 1, with_low=True, with_high=True)
        self.alpha = alpha
        self.a_0 = a_0

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        return macl(z_i, z_j, self.temperature, alpha=self.alpha, a_0=self.a_0, **self._options)
