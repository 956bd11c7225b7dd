"""CLIP's loss as a module, of two towers or several, which holds its own logit scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..algebra import in_double
from ..losses import clip, multi_clip
from ..losses.false_negatives import Limits
from ..losses.info_nce_loss import check_positives
from ..options import Positives, SeveralForm
from ..validation import check_parameter, check_weights
from .base import LossOptions, TemperatureLoss, Unpack


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
        positives, form: as in `clip`.
        label_smoothing: in [0, 1).
        margin, relative_margin, ceiling: as in `nt_xent`.
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

    _shown: tuple[str, ...] = (
        "positives",
        "form",
        "label_smoothing",
        "margin",
        "relative_margin",
        "ceiling",
        "max_logit_scale",
    )

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        positives: Positives = "pair",
        form: SeveralForm = "out",
        label_smoothing: float = 0.0,
        margin: float | None = None,
        relative_margin: float | None = None,
        ceiling: float | None = None,
        max_logit_scale: float | None = 100.0,
        learn_temperature: bool = True,
        **options: Unpack[LossOptions],
    ):
        super().__init__(temperature, learn_temperature=learn_temperature, **options)
        self.label_smoothing = check_parameter("label_smoothing", label_smoothing)
        limits = Limits.checked(margin, relative_margin, ceiling, label_smoothing)
        check_positives(positives, form, limits, label_smoothing=label_smoothing)
        self.positives, self.form = positives, form
        self.margin, self.relative_margin, self.ceiling = margin, relative_margin, ceiling
        if max_logit_scale is not None:
            max_logit_scale = check_parameter("max_logit_scale", max_logit_scale)
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

    @property
    def _of_clip(self) -> dict[str, Any]:
        return {
            "logit_scale": self.logit_scale,
            "positives": self.positives,
            "form": self.form,
            "label_smoothing": self.label_smoothing,
            "margin": self.margin,
            "relative_margin": self.relative_margin,
            "ceiling": self.ceiling,
            **self._options,
        }

    def forward(self, image_features: Tensor, text_features: Tensor, ids: Tensor | None = None) -> Tensor:
        return clip(image_features, text_features, ids=ids, **self._of_clip)


class MultiCLIPLoss(CLIPLoss):
    """CLIP's loss of every two of several towers as a module; see `multi_clip`.

    Args:
        weights: one for each pair of towers, as in `multi_clip`.

    Its call takes the features of all towers in a sequence, and `ids`. The other arguments are as of `CLIPLoss`.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.MultiCLIPLoss(temperature=1.0)
        >>> loss([torch.eye(4)] * 3).detach()  # log(e + 3) - 1 of each pair
        tensor(0.7437)
    """

    _shown = (*CLIPLoss._shown, "weights")

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        weights: Sequence[float] | None = None,
        positives: Positives = "pair",
        form: SeveralForm = "out",
        label_smoothing: float = 0.0,
        margin: float | None = None,
        relative_margin: float | None = None,
        ceiling: float | None = None,
        max_logit_scale: float | None = 100.0,
        learn_temperature: bool = True,
        **options: Unpack[LossOptions],
    ):
        super().__init__(
            temperature,
            positives=positives,
            form=form,
            label_smoothing=label_smoothing,
            margin=margin,
            relative_margin=relative_margin,
            ceiling=ceiling,
            max_logit_scale=max_logit_scale,
            learn_temperature=learn_temperature,
            **options,
        )
        self.weights = None if weights is None else check_weights("weights", weights, "a number for each pair")

    def forward(self, features: Sequence[Tensor], ids: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return multi_clip(features, weights=self.weights, ids=ids, **self._of_clip)
