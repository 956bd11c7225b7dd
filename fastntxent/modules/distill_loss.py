"""The loss of a student of two towers with a teacher as a module."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..losses import distill
from ..validation import check_temperature
from .base import ModuleOptions, TemperatureLoss, Unpack


class DistillLoss(TemperatureLoss):
    r"""A student's cross-entropy with a teacher's softmaxes as a module; see `distill`.

    Args:
        temperature: the student's; where it is learnt, its first value.
        teacher_temperature: the teacher's; None: the student's, at each call.
        reduction, normalize, backend, group, learn_temperature: as of `NTXentLoss`.

    Its call takes the student's image and text features and the teacher's, or `teacher=`, a function of image and text
    numbers, in place of the teacher's.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(4)
        >>> fastntxent.DistillLoss(temperature=1.0)(z, z, z, z)  # the entropy of softmax([1, 0, 0, 0])
        tensor(1.2683)
    """

    _shown = ("teacher_temperature",)

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        teacher_temperature: float | Tensor | None = None,
        **options: Unpack[ModuleOptions],
    ):
        super().__init__(temperature, **options)
        if teacher_temperature is not None:
            teacher_temperature = check_temperature(teacher_temperature, name="teacher_temperature")
        self.teacher_temperature = teacher_temperature

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        teacher_image_features: Tensor | None = None,
        teacher_text_features: Tensor | None = None,
        *,
        teacher: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        return distill(
            image_features,
            text_features,
            teacher_image_features,
            teacher_text_features,
            self.temperature,
            teacher=teacher,
            teacher_temperature=self.teacher_temperature,
            **self._options,
        )
