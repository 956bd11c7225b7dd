"""open_clip's `open_clip.loss.ClipLoss`."""

from __future__ import annotations

from torch import Tensor

from ..losses import clip
from ..modules.base import TypedModule
from .shared import as_scalar, default_group_of

__all__ = ["ClipLoss"]


class ClipLoss(TypedModule):
    """CLIP's loss of features that are normalised already, both directions from one pass over the similarities.

    Args:
        local_loss, gather_with_grad: of no consequence: the loss is the whole batch's, on every rank, and its gradient
            is right. open_clip's is with gather_with_grad. Without, the gradient of its features is 1/R of the right
            one of R ranks, and with local_loss also lacks what features are as columns.
        cache_labels: kept for the signature: there are no labels to cache.
        rank, world_size: above 1, the batch is that of all ranks of the default process group, which has so many.
        use_horovod: not there: rows travel by torch.distributed.

    Its call takes the features (N, D), `logit_scale` (which multiplies: exp of the model's parameter), `logit_bias`,
    which the softmax cancels, so that its gradient is exactly zero, and `output_dict`, for {"contrastive_loss": loss}.

    Raises, when called:
        ValueError: rank or world_size is not that of the process group, or horovod is asked for in one.
        RuntimeError: a world_size above 1 without a process group.
        TypeError, ValueError: as `fastntxent.clip`.

    Example:
        >>> import torch
        >>> ClipLoss()(torch.eye(4), torch.eye(4), logit_scale=1.0)  # log(e + 3) - 1
        tensor(0.7437)
    """

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

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        if self.use_horovod and self.world_size > 1:
            raise ValueError("use_horovod must be False where world_size is not 1: rows travel by torch.distributed")
        if logit_scale is None:  # which fastntxent.clip takes for its default
            raise TypeError("logit_scale must be a float or a tensor of one element, got None")
        group = default_group_of("world_size", self.world_size, self.rank)
        loss = clip(
            image_features,
            text_features,
            logit_scale=as_scalar(logit_scale),
            logit_bias=None if logit_bias is None else as_scalar(logit_bias),
            normalize=False,
            group=group,
        )
        return {"contrastive_loss": loss} if output_dict else loss
