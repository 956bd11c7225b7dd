"""Losses of two towers as modules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..common import in_double
from ..distributed import Group
from ..losses import clip, info_nce
from ..options import HARDNESS_MODES, BackendName, HardnessMode, Reduction
from ..validation import check_choice, check_in_range
from .base import TemperatureLoss


class InfoNCELoss(TemperatureLoss):
    r"""InfoNCE from queries to keys as a module; see `info_nce` for the formula and the options that are named there.

    Its call takes query, key, and optionally explicit negatives (K, D) or (N, K, D) and `ids`. The other arguments are
    as of `NTXentLoss`.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.InfoNCELoss(temperature=1.0)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(0.7437)
    """

    _shown = ("in_batch_negatives", "label_smoothing", "hardness_mode", "hardness_strength")

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        in_batch_negatives: bool | None = None,
        label_smoothing: float = 0.0,
        hardness_mode: HardnessMode = "all_negatives",
        hardness_strength: float = 0.0,
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
        check_choice("hardness_mode", hardness_mode, HARDNESS_MODES)
        hardness_strength = check_in_range(
            "hardness_strength", hardness_strength, 0, math.inf, with_low=True, with_high=False
        )
        self.in_batch_negatives = in_batch_negatives
        self.label_smoothing = label_smoothing
        self.hardness_mode = hardness_mode
        self.hardness_strength = hardness_strength

    def forward(self, query: Tensor, key: Tensor, negatives: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        return info_nce(
            query,
            key,
            self.temperature,
            negatives=negatives,
            ids=ids,
            in_batch_negatives=self.in_batch_negatives,
            label_smoothing=self.label_smoothing,
            hardness_mode=self.hardness_mode,
            hardness_strength=self.hardness_strength,
            **self._options,
        )


class _AtMost(torch.autograd.Function):
    """min(x, bound), whose gradient can always bring x back: only what would take it further beyond is stopped."""

    @staticmethod
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.clamp_max(bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0] > inputs[1])

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, None]:
        (beyond,) = ctx.saved_tensors
        return torch.where(beyond & (d_x < 0), 0, d_x), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, bound: float) -> tuple[Tensor, int | None]:
        return _AtMost.apply(x, bound), in_dims[0]  # entry by entry


class CLIPLoss(TemperatureLoss):
    r"""CLIP's loss as a module, which holds its own logit scale; see `clip`.

    Args:
        temperature: 1 / logit scale; where it is learnt, its first value.
        label_smoothing: in [0, 1).
        max_logit_scale: the scale is kept below it, as CLIP was trained. Beyond it a gradient that would make it larger
            stops, and one that makes it smaller goes on. None: no bound.
        learn_temperature: make the temperature a parameter, `log_temperature`, which is minus the logarithm of the
            scale; on by default, as in CLIP.
        reduction, normalize, backend, group: as of `NTXentLoss`.

    Its call takes image and text features and `ids`.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.CLIPLoss(temperature=1.0)
        >>> loss(torch.eye(4), torch.eye(4)).detach()  # log(e + 3) - 1
        tensor(0.7437)
    """

    _shown = ("label_smoothing", "max_logit_scale")

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        label_smoothing: float = 0.0,
        max_logit_scale: float | None = 100.0,
        reduction: Reduction = "mean",
        normalize: bool = True,
        backend: BackendName = "auto",
        group: Group | None = None,
        learn_temperature: bool = True,
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
        if max_logit_scale is not None:
            max_logit_scale = check_in_range(
                "max_logit_scale", max_logit_scale, 0, math.inf, with_low=False, with_high=False
            )
        self.label_smoothing = label_smoothing
        self.max_logit_scale = max_logit_scale

    @property
    def logit_scale(self) -> float | Tensor:
        """1 / temperature, below its bound: a float, or a 0-d tensor of `temperature`'s dtype."""
        bound = self.max_logit_scale
        if self.learn_temperature:
            log_temperature = in_double(self.log_temperature)
        elif isinstance(self._temperature, Tensor):
            log_temperature = in_double(self._temperature).log()
        else:
            return min(1 / self._temperature, math.inf if bound is None else bound)
        if bound is None:
            return torch.exp(-log_temperature)
        # The logarithm is bounded, since the scale may overflow, and its gradient with it.
        return bound * torch.exp(_AtMost.apply(-log_temperature - math.log(bound), 0.0))

    def forward(self, image_features: Tensor, text_features: Tensor, ids: Tensor | None = None) -> Tensor:
        return clip(
            image_features,
            text_features,
            logit_scale=self.logit_scale,
            ids=ids,
            label_smoothing=self.label_smoothing,
            **self._options,
        )
