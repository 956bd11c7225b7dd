"""open_clip's losses: `open_clip.loss.ClipLoss`, `DistillClipLoss`, `CoCaLoss` and `SigLipLoss`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..algebra import accumulation_dtype
from ..losses import clip
from ..losses.distill_loss import distill_terms
from ..losses.siglip_loss import siglip_of_batch
from ..modules.base import TypedModule
from ..opening import open_batch
from ..validation import check_choice, check_row_each, check_rows, check_same
from ..watching import watch
from .shared import as_scalar, default_group_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss"]


class _OfRanks(TypedModule):
    """Base class of the losses that include CLIP's loss, with open_clip's options for gathering across ranks."""

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__()
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def _group(self) -> ProcessGroup | None:
        if self.use_horovod and self.world_size > 1:
            raise ValueError("use_horovod must be False if world_size is above 1: rows are sent by torch.distributed")
        return default_group_of("world_size", self.world_size, self.rank)

    def _contrastive(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        ids: Tensor | None = None,
    ) -> Tensor:
        """Return CLIP's loss of normalised features."""
        group = self._group()
        return clip(
            image_features,
            text_features,
            logit_scale=_as_scale("logit_scale", logit_scale),
            logit_bias=None if logit_bias is None else as_scalar(logit_bias),
            ids=ids,
            normalize=False,
            group=group,
        )


def _as_scale(name: str, logit_scale: float | Tensor) -> float | Tensor:
    if logit_scale is None:  # fastntxent's losses would use their default
        raise TypeError(f"{name} must be a float or a tensor of one element, got None")
    return as_scalar(logit_scale)


class ClipLoss(_OfRanks):
    """CLIP's loss of normalised features, in both directions from one pass over the similarities.

    Args:
        local_loss: No effect. The loss covers the whole batch, is the same on every rank, and has the exact gradient.
        gather_with_grad: No effect. In open_clip, False makes the gradient of the features 1/R of the exact gradient on
            R ranks. With local_loss, False instead leaves out the part that features get as columns.
        cache_labels: No effect: there are no labels to cache.
        rank: This process's rank in the default process group.
        world_size: 1, or the size of the default process group. Above 1 the batch is spread across that group's ranks.
        use_horovod: An argument of open_clip before version 4. It must be False if world_size is above 1.

    Raises:
        TypeError: when called, an argument has the wrong type or dtype.
        ValueError: when called, rank or world_size does not match the process group, or use_horovod is set with several
            processes, or shapes, dtypes or devices do not match.
        RuntimeError: when called, world_size is above 1 and there is no process group.

    Example:
        >>> import torch
        >>> ClipLoss()(torch.eye(4), torch.eye(4), logit_scale=1.0)  # log(e + 3) - 1
        tensor(0.7437)
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        *,
        ids: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss, a 0-d tensor, or {"contrastive_loss": loss} with `output_dict`.

        Args:
            image_features: (N, D), normalised by the caller.
            text_features: (N, D), normalised by the caller.
            logit_scale: Factor of the similarities, the exp of the model's parameter; a float or a one-element tensor.
            logit_bias: Added to the logits; a float, a one-element tensor or None. It cancels in the softmax, so its
                gradient is exactly zero.
            output_dict: Return a dict.
            ids: (N,) integers, an extension of this package: samples with the same id are not negatives of each other.
        """
        loss = self._contrastive(image_features, text_features, logit_scale, logit_bias, ids)
        return {"contrastive_loss": loss} if output_dict else loss


class DistillClipLoss(_OfRanks):
    """CLIP's loss of normalised features, and the cross-entropy of their softmaxes with a teacher's.

    Args:
        local_loss: No effect. The loss covers the whole batch, is the same on every rank, and has the exact gradient.
        gather_with_grad: No effect. In open_clip, False makes the gradient of the features 1/R of the exact gradient on
            R ranks. With local_loss, False instead leaves out the part that features get as columns.
        cache_labels: No effect: there are no labels to cache.
        rank: This process's rank in the default process group.
        world_size: 1, or the size of the default process group. Above 1 the batch is spread across that group's ranks.
        use_horovod: An argument of open_clip before version 4. It must be False if world_size is above 1.

    Raises:
        TypeError: when called, an argument has the wrong type or dtype.
        ValueError: when called, rank or world_size does not match the process group, or use_horovod is set with several
            processes, or shapes, dtypes or devices do not match.
        RuntimeError: when called, world_size is above 1 and there is no process group.

    Example:
        >>> import torch
        >>> z = torch.eye(4)
        >>> DistillClipLoss()(z, z, 1.0, z, z, 1.0)  # log(e + 3) - 1, and the entropy of softmax([1, 0, 0, 0])
        (tensor(0.7437), tensor(1.2683))
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Return both losses, (contrastive, distillation), or {"contrastive_loss": ..., "distill_loss": ...}.

        The teacher gets no gradient. In open_clip it gets a gradient if its model ran with gradients enabled.

        Args:
            image_features: The student's features (N, D), normalised by the caller.
            text_features: The student's features (N, D), normalised by the caller.
            logit_scale: Factor of the student's similarities; a float or a one-element tensor.
            dist_image_features: The teacher's features (N, E), normalised by the caller.
            dist_text_features: The teacher's features (N, E), normalised by the caller.
            dist_logit_scale: Factor of the teacher's similarities; a float or a one-element tensor.
            output_dict: Return a dict.
        """
        group = self._group()
        _check_teacher(image_features, dist_image_features, dist_text_features, may_be_empty=group is not None)
        contrastive, distilled = distill_terms(
            type(self).__name__,
            image_features,
            text_features,
            dist_image_features,
            dist_text_features,
            logit_scale=_as_scale("logit_scale", logit_scale),
            teacher_logit_scale=_as_scale("dist_logit_scale", dist_logit_scale),
            normalize=False,
            group=group,
        )
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distilled}
        return contrastive, distilled


def _check_teacher(image: Tensor, dist_image: Tensor, dist_text: Tensor, *, may_be_empty: bool) -> None:
    """Check the features under open_clip's names, before `distill_terms` checks them under different names."""
    check_rows("image_features", image, may_be_empty=may_be_empty)
    check_rows("dist_image_features", dist_image, may_be_empty=may_be_empty)
    check_rows("dist_text_features", dist_text, may_be_empty=may_be_empty)
    check_same("dist_image_features", dist_image, "dist_text_features", dist_text, "shape", "device")
    check_same("image_features", image, "dist_image_features", dist_image, "device")
    check_row_each("dist_image_features", dist_image, "image_features", image)


class CoCaLoss(_OfRanks):
    """CLIP's loss of normalised features, and the cross-entropy of captions, each with a weight.

    Args:
        caption_loss_weight: Factor of the caption loss.
        clip_loss_weight: Factor of the contrastive loss. If it is 0, no similarities are formed, and the contrastive
            loss is 0.
        pad_id: Label of tokens that do not count.
        local_loss: No effect. The loss covers the whole batch, is the same on every rank, and has the exact gradient.
        gather_with_grad: No effect. In open_clip, False makes the gradient of the features 1/R of the exact gradient on
            R ranks. With local_loss, False instead leaves out the part that features get as columns.
        cache_labels: No effect: there are no labels to cache.
        rank: This process's rank in the default process group.
        world_size: 1, or the size of the default process group. Above 1 the contrastive loss covers the batch of all
            ranks of that group.
        use_horovod: An argument of open_clip before version 4. It must be False if world_size is above 1.

    Raises:
        TypeError: when called, an argument has the wrong type or dtype.
        ValueError: when called, rank or world_size does not match the process group, or use_horovod is set with several
            processes, or shapes, dtypes or devices do not match.
        RuntimeError: when called, world_size is above 1 and there is no process group.

    Example:
        >>> import torch
        >>> z, logits, labels = torch.eye(4), torch.zeros(4, 2, 3), torch.ones(4, 2, dtype=torch.int64)
        >>> CoCaLoss(2.0, 1.0)(z, z, logits, labels, logit_scale=1.0)  # log(e + 3) - 1, and 2 log 3
        (tensor(0.7437), tensor(2.1972))
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)
        self.caption_loss_weight = caption_loss_weight
        self.clip_loss_weight = clip_loss_weight
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Return both losses, (contrastive, caption), or {"contrastive_loss": ..., "caption_loss": ...}.

        As in open_clip, the caption loss covers this rank's captions only, and it is NaN if all tokens are padding.

        Args:
            image_features: (N, D), normalised by the caller.
            text_features: (N, D), normalised by the caller.
            logits: The captions' logits (N, T, vocabulary).
            labels: The captions' tokens (N, T).
            logit_scale: Factor of the similarities; a float or a one-element tensor.
            output_dict: Return a dict.
        """
        if self.clip_loss_weight:
            contrastive = self.clip_loss_weight * self._contrastive(image_features, text_features, logit_scale)
        else:
            contrastive = image_features.new_zeros((), dtype=accumulation_dtype(image_features.dtype))
        caption = self.caption_loss_weight * self.caption_loss(logits.transpose(1, 2), labels)
        if output_dict:
            return {"contrastive_loss": contrastive, "caption_loss": caption}
        return contrastive, caption


_EXCHANGES = ("bidir", "shift", "reduce", "gather")


class SigLipLoss(TypedModule):
    """SigLIP's loss of normalised features, in one pass over the similarities.

    With a world_size above 1 the loss covers the whole batch and is the same on every rank. open_clip's loss covers
    only the rank's images.

    Args:
        cache_labels: No effect: there are no labels to cache.
        rank: This process's rank in the default process group.
        world_size: 1, or the size of the default process group. Above 1 the batch is spread across that group's ranks.
        dist_impl: "bidir" (the default), "shift", "reduce" or "gather". No effect: it selects how open_clip exchanges
            texts, and every choice has the same gradient.
        chunk_size: No effect: logits are never stored.

    Raises:
        TypeError: when called, an argument has the wrong type or dtype.
        ValueError: when called, rank or world_size does not match the process group, or shapes, dtypes or devices do
            not match.
        RuntimeError: when called, world_size is above 1 and there is no process group.

    Example:
        >>> import torch
        >>> SigLipLoss()(torch.eye(2), torch.eye(2), logit_scale=1.0, logit_bias=0.0)  # log(1 + 1/e) + log(2)
        tensor(1.0064)
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ):
        super().__init__()
        if dist_impl is not None:
            check_choice("dist_impl", dist_impl, _EXCHANGES)
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        *,
        ids: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss, a 0-d tensor, or {"contrastive_loss": loss} with `output_dict`.

        Args:
            image_features: (N, D), normalised by the caller.
            text_features: (N, D), normalised by the caller.
            logit_scale: Factor of the similarities, the exp of the model's parameter; a float or a one-element tensor.
            logit_bias: Added to the logits; a float, a one-element tensor, or None for 0.
            output_dict: Return a dict.
            ids: (N,) integers, an extension of this package: pairs of samples with the same id are positives.
        """
        group = default_group_of("world_size", self.world_size, self.rank)
        scale, bias = _as_scale("logit_scale", logit_scale), 0.0 if logit_bias is None else as_scalar(logit_bias)
        rows = {"image_features": image_features, "text_features": text_features}
        batch = open_batch(group, "SigLipLoss", rows, ids=ids, normalize=False, logit_scale=scale, logit_bias=bias)
        inv_tau, b = batch.logit_scale(scale), batch.bias(bias, "logit_bias")
        loss = watch(siglip_of_batch(batch, image_features, text_features, inv_tau, b, ids), logit_scale, ids)
        return {"contrastive_loss": loss} if output_dict else loss
