"""The loss of a two-tower student with a teacher, as a module."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..losses import distill
from ..validation import check_temperature
from .base import ModuleOptions, TemperatureLoss, Unpack


class DistillLoss(TemperatureLoss):
    r"""The cross-entropy of a student's softmaxes with a teacher's, as a module.

    .. math::
        L = -\frac{1}{2N} \sum_{i=1}^{N} \sum_{j=1}^{N} [ p^T_{ij} \log p^S_{ij} + q^T_{ij} \log q^S_{ij} ], \quad
        p_{ij} = \frac{e^{s_{ij}/\tau}}{\sum_l e^{s_{il}/\tau}}, \quad
        q_{ij} = \frac{e^{s_{ij}/\tau}}{\sum_l e^{s_{lj}/\tau}}

    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, between two towers. p^S and q^S come from the
    student's similarities and temperature, p^T and q^T from the teacher's. The loss is smallest if the student's
    softmaxes equal the teacher's. It is then the mean entropy of the teacher's softmaxes.

    Call it as `loss(image_features, text_features, teacher_image_features, teacher_text_features)`; `forward` describes
    the arguments. `distill` is the same loss as a function.

    If a function is passed as `teacher=`, omit the teacher's features.

    Args:
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there. With `learn_temperature`, the value is
            read and initialises the parameter.
        teacher_temperature: The teacher's temperature, like `temperature` but without a gradient. None: the student's
            temperature at each call.
        reduction: "mean" over the N samples, "sum", or "none" for one loss per sample.
        normalize: True divides each row by max(||z||, 1e-12) like `torch.nn.functional.normalize` (by max(||z||,
            6.1e-5) in float16). False takes the rows as they are, and their products must not overflow. The teacher's
            features are treated in the same way.
        backend: "auto", which chooses one for the device, or a name from `backends()`.
        group: The ranks that hold the batch: "world" (the default process group, looked up at each call), a process
            group, a one-dimensional DeviceMesh, or a `Sharding`, which adds options. Each rank passes its own samples,
            any number of them, even none. Negatives come from all ranks. "mean" and "sum" cover the whole batch and are
            equal on every rank. Once DistributedDataParallel has averaged the parameters' gradients, these equal the
            gradients of one process with the whole batch. "none" returns this rank's losses. None: this rank's samples
            are the whole batch.
        learn_temperature: Make the temperature a parameter. It is stored as its logarithm, `log_temperature`, so no
            optimiser step can make it negative. Exclude it from weight decay.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a number is out of range, or an option is unknown.

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
        """Return the student's cross-entropy with its teacher.

        Args:
            image_features: (N, D) features of the images, float16, bfloat16, float32 or float64. Row n belongs to
                sample n.
            text_features: (N, D) features of the texts, with the shape, dtype and device of `image_features`. Row n
                belongs to sample n.
            teacher_image_features: (N, E) features of the same images from the teacher, of any floating-point dtype.
                They get no gradient. None where `teacher` is given.
            teacher_text_features: (N, E) features of the same texts from the teacher, like `teacher_image_features`.
            teacher: A function in place of the teacher's features, for similarities that are not products of features.
                `teacher(rows, cols)` gets the indices of images and of texts, two 1-d int64 tensors on the student's
                device, and returns the (len(rows), len(cols)) similarities of each of these images to each of these
                texts, in any floating-point dtype on that device, before the teacher's temperature is applied.
                `normalize` does not affect the similarities. A similarity of -inf gives a pair the probability 0; the
                pair's image and text must each have another pair above -inf. The function must return the same values
                at every call.

        Returns:
            A 0-d tensor, or (N,) for "none"; float64 for float64 features, else float32.
        """
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
