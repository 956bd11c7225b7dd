"""open_clip's losses: `open_clip.loss.ClipLoss`, `DistillClipLoss`, `CoCaLoss` and `SigLipLoss`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

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
    """What open_clip's losses of two softmaxes take: options of how a group gathers, which the loss does not see."""

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
            raise ValueError("use_horovod must be False where world_size is not 1: rows travel by torch.distributed")
        return default_group_of("world_size", self.world_size, self.rank)

    def _contrastive(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        ids: Tensor | None = None,
    ) -> Tensor:
        """CLIP's loss of features that are normalised already."""
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
    if logit_scale is None:  # which fastntxent's losses take for their default
        raise TypeError(f"{name} must be a float or a tensor of one element, got None")
    return as_scalar(logit_scale)


class ClipLoss(_OfRanks):
    """CLIP's loss of features that are normalised already, both directions from one pass over the similarities.

    Args:
        local_loss, gather_with_grad: of no consequence: the loss is the whole batch's, on every rank, and its gradient
            is right. open_clip's is with gather_with_grad. Without, the gradient of its features is 1/R of the right
            one of R ranks, and with local_loss also lacks what features are as columns.
        cache_labels: kept for the signature: there are no labels to cache.
        rank, world_size: above 1, the batch is that of all ranks of the default process group, which has so many.
        use_horovod: an argument of open_clip before 4, which is taken from its callers; it must be False for more than
            one process, whose rows travel by torch.distributed.

    Its call takes the features (N, D), `logit_scale` (which multiplies: exp of the model's parameter), `logit_bias`,
    which the softmax cancels, so that its gradient is exactly zero, and `output_dict`, for {"contrastive_loss": loss}.
    A keyword of ours: `ids`, (N,) integers; samples of the same id are no negatives of each other.

    Raises, when called:
        ValueError: rank or world_size is not that of the process group, or horovod is asked for in one.
        RuntimeError: a world_size above 1 without a process group.
        TypeError, ValueError: as `fastntxent.clip`.

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
        loss = self._contrastive(image_features, text_features, logit_scale, logit_bias, ids)
        return {"contrastive_loss": loss} if output_dict else loss


class DistillClipLoss(_OfRanks):
    """CLIP's loss of features that are normalised already, and their cross-entropy with a teacher's softmaxes.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: as of `ClipLoss`.

    Its call takes the student's features (N, D) and `logit_scale`, the teacher's `dist_image_features` and
    `dist_text_features`, (N, E) each, and `dist_logit_scale`, and `output_dict`, for {"contrastive_loss": ...,
    "distill_loss": ...} in place of both losses. Nothing of the teacher gets a gradient, whereas open_clip's gets one
    where its model ran with gradients on.

    Raises, when called: as `ClipLoss`, and as `fastntxent.distill`.

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
    """For a loss of ours that has other names for them."""
    check_rows("image_features", image, may_be_empty=may_be_empty)
    check_rows("dist_image_features", dist_image, may_be_empty=may_be_empty)
    check_rows("dist_text_features", dist_text, may_be_empty=may_be_empty)
    check_same("dist_image_features", dist_image, "dist_text_features", dist_text, "shape", "device")
    check_same("image_features", image, "dist_image_features", dist_image, "device")
    check_row_each("dist_image_features", dist_image, "image_features", image)


class CoCaLoss(_OfRanks):
    """CLIP's loss of features that are normalised already, and the cross-entropy of captions, each with a weight.

    Args:
        caption_loss_weight, clip_loss_weight: what the losses are multiplied by. A clip_loss_weight of 0 forms no
            similarities, and its loss is 0.
        pad_id: the label of tokens that do not count.
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: as of `ClipLoss`.

    Its call takes the features (N, D), the captions' `logits` (N, T, vocabulary) and `labels` (N, T), `logit_scale`,
    and `output_dict`, for {"contrastive_loss": ..., "caption_loss": ...} in place of both losses. Over ranks the
    captions' loss is each rank's own, and it is NaN where all tokens are padding, both as there.

    Raises, when called: as `ClipLoss`.

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
        if self.clip_loss_weight:
            contrastive = self.clip_loss_weight * self._contrastive(image_features, text_features, logit_scale)
        else:
            contrastive = image_features.new_zeros(())
        caption = self.caption_loss_weight * self.caption_loss(logits.transpose(1, 2), labels)
        if output_dict:
            return {"contrastive_loss": contrastive, "caption_loss": caption}
        return contrastive, caption


_EXCHANGES = ("bidir", "shift", "reduce", "gather")


class SigLipLoss(TypedModule):
    """SigLIP's loss of features that are normalised already, in one pass over the similarities.

    Args:
        cache_labels: kept for the signature: there are no labels to cache.
        rank, world_size: above 1, the batch is that of all ranks of the default process group, which has so many.
        dist_impl: "bidir" (the default), "shift", "reduce" or "gather", by which open_clip moves its texts. Of no
            consequence: all of them have one gradient, which this is.
        chunk_size: kept for the signature: no logits are held, whatever it is.

    Its call takes the features (N, D), `logit_scale`, which multiplies (exp of the model's parameter), `logit_bias`,
    which is added (None: 0), and `output_dict`, for {"contrastive_loss": loss}.

    A keyword of ours: `ids`, (N,) integers; samples of the same id are no negatives of each other, but belong together:
    their pairs are positives, as in `fastntxent.siglip`.

    Over ranks the value is the whole batch's on each of them, where open_clip's is each rank's own.

    Raises, when called:
        ValueError: rank or world_size is not that of the process group.
        RuntimeError: a world_size above 1 without a process group.
        TypeError, ValueError: as `fastntxent.siglip`.

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
        group = default_group_of("world_size", self.world_size, self.rank)
        scale, bias = _as_scale("logit_scale", logit_scale), 0.0 if logit_bias is None else as_scalar(logit_bias)
        rows = {"image_features": image_features, "text_features": text_features}
        batch = open_batch(group, "SigLipLoss", rows, ids=ids, normalize=False, logit_scale=scale, logit_bias=bias)
        inv_tau, b = batch.logit_scale(scale), batch.bias(bias, "logit_bias")
        loss = watch(siglip_of_batch(batch, image_features, text_features, inv_tau, b, ids), logit_scale, ids)
        return {"contrastive_loss": loss} if output_dict else loss
