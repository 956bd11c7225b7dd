"""The losses of SigLIP and NT-Logistic as modules, whose temperature and bias may be learnt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..losses import nt_logistic, siglip
from ..validation import check_bias, check_flag, check_range
from .base import LossOptions, ModuleOptions, TemperatureLoss, Unpack


class _Biased:
    """A mix-in for logits with a bias. A learnt bias is the parameter `learnt_bias`."""

    learn_bias: bool
    learnt_bias: nn.Parameter
    _bias: float | Tensor

    def _set_bias(self, bias: float | Tensor, learn_bias: bool) -> None:
        bias = check_bias("bias", bias)
        self.learn_bias = check_flag("learn_bias", learn_bias)
        if learn_bias:
            self.learnt_bias = nn.Parameter(torch.tensor(_value(bias, torch.get_default_dtype())))
        else:
            self.__dict__["_bias"] = bias  # bypass nn.Module, which would register a parameter that was passed in

    @property
    def bias(self) -> float | Tensor:
        """b: the value that was given, or the parameter. Can be set."""
        return self.learnt_bias if self.learn_bias else self._bias

    @bias.setter
    def bias(self, value: float | Tensor) -> None:
        value = check_bias("bias", value)
        if self.learn_bias:
            with torch.no_grad():
                self.learnt_bias.fill_(_value(value, self.learnt_bias.dtype))
        else:
            self.__dict__["_bias"] = value


def _value(bias: float | Tensor, dtype: torch.dtype) -> float:
    """Return a bias as a number, checked against the range of the parameter's dtype."""
    value = float(bias.detach()) if isinstance(bias, Tensor) else bias
    check_range("bias", value, dtype)
    return value


class SigLIPLoss(_Biased, TemperatureLoss):
    r"""SigLIP's loss as a module that holds its own temperature and bias.

    .. math::
        L = \frac{1}{N} \sum_{i=1}^{N} \sum_{j=1}^{N} \log(1 + e^{-y_{ij} (s_{ij}/\tau + b)}), \quad
        y_{ij} = 1 \text{ where } id_i = id_j, \text{ else } -1

    Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023. The gradient needs no sum over a row, so for
    "mean" and "sum" the value and the gradients come from one pass over the similarities. With `ids`, a group or
    "none", the backward takes a second pass.

    The module learns the temperature and the bias by default, as SigLIP does.

    Call it as `loss(image_features, text_features, ids=None)`; `forward` describes the arguments. `siglip` is the same
    loss as a function.

    Args:
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there. With `learn_temperature`, the value is
            read and initialises the parameter.
        bias: b, a finite float or a 0-d floating-point tensor, which may require a gradient. With `learn_bias`, the
            initial value of the parameter.
        learn_bias: Make the bias a parameter, `learnt_bias`.
        reduction: "mean" over the N images, "sum", or "none" for one loss per image, which is a sum over all texts.
        normalize: True divides each row by max(||z||, 1e-12) like `torch.nn.functional.normalize` (by max(||z||,
            6.1e-5) in float16). False takes the rows as they are, and their products must not overflow.
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
        >>> loss = fastntxent.SigLIPLoss(temperature=1.0, bias=0.0)
        >>> loss(torch.eye(2), torch.eye(2)).detach()  # log(1 + 1/e) + log(2)
        tensor(1.0064)
    """

    _shown = ("learn_bias",)

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        bias: float | Tensor = -10.0,
        learn_temperature: bool = True,
        learn_bias: bool = True,
        **options: Unpack[LossOptions],
    ):
        super().__init__(temperature, learn_temperature=learn_temperature, **options)
        self._set_bias(bias, learn_bias)

    def forward(self, image_features: Tensor, text_features: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return the loss of two towers.

        Args:
            image_features: (N, D) features of the images, float16, bfloat16, float32 or float64. Row n belongs to
                sample n.
            text_features: (N, D) features of the texts, with the shape, dtype and device of `image_features`. Row n
                belongs to sample n.
            ids: (N,) integers. Images and texts with the same id belong together. None: image n and text n belong
                together, and no others.

        Returns:
            A 0-d tensor, or (N,) for "none"; float64 for float64 features, else float32.
        """
        return siglip(image_features, text_features, self.temperature, bias=self.bias, ids=ids, **self._options)


class NTLogisticLoss(_Biased, TemperatureLoss):
    r"""NT-Logistic, the logistic loss of every pair of rows of two views, as a module.

    .. math::
        \ell_i = \log(1 + e^{-s_{ip(i)}/\tau - b}) + \sum_{j : id_j \ne id_i} \log(1 + e^{s_{ij}/\tau + b})

    See Table 2 of Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020. Here the
    sum is over all negatives, and logits have a bias, which the paper does not have. The rows are [z_i; z_j], and p(i)
    is the other view of row i's sample.

    Call it as `loss(z_i, z_j, ids=None)`; `forward` describes the arguments. `nt_logistic` is the same loss as a
    function.

    Args:
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there. With `learn_temperature`, the value is
            read and initialises the parameter.
        bias: b, a finite float or a 0-d floating-point tensor, which may require a gradient. With `learn_bias`, the
            initial value of the parameter.
        learn_bias: Make the bias a parameter, `learnt_bias`.
        reduction: "mean" over the 2N rows, "sum", or "none" for one loss per row.
        normalize: True divides each row by max(||z||, 1e-12) like `torch.nn.functional.normalize` (by max(||z||,
            6.1e-5) in float16). False takes the rows as they are, and their products must not overflow.
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
        >>> loss = fastntxent.NTLogisticLoss(temperature=1.0)
        >>> loss(torch.eye(2), torch.eye(2))  # log(1 + 1/e) + 2 log(2)
        tensor(1.6996)
    """

    _shown = ("learn_bias",)

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        bias: float | Tensor = 0.0,
        learn_bias: bool = False,
        **options: Unpack[ModuleOptions],
    ):
        super().__init__(temperature, **options)
        self._set_bias(bias, learn_bias)

    def forward(self, z_i: Tensor, z_j: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return the loss of two views.

        Args:
            z_i: (N, D) embeddings of the first view, float16, bfloat16, float32 or float64, with any strides. Row n
                belongs to sample n.
            z_j: (N, D) embeddings of the second view, with the shape, dtype and device of `z_i`. Row n belongs to
                sample n.
            ids: (N,) integers, the group of each sample. Samples of the same group are not negatives of each other,
                which removes false negatives. An id must mean the same on every rank. None: every other sample is a
                negative.

        Returns:
            A 0-d tensor, or (2N,) in the order [z_i; z_j] for "none"; float64 for float64 embeddings, else float32.
        """
        return nt_logistic(z_i, z_j, self.temperature, bias=self.bias, ids=ids, **self._options)
