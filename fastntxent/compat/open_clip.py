"""open_clip's `open_clip.loss.ClipLoss`."""

from __future__ import annotations

from torch import Tensor, nn

from ..losses import clip
from .shared import as_scalar, require_one_process

__all__ = ["ClipLoss"]


class ClipLoss(nn.Module):
    """CLIP's loss of features that are normalised already, both directions from one pass over the similarities.

    Args:
        local_loss, gather_with_grad, use_horovod: how a group of processes gathers; of no consequence in one.
        cache_labels: kept for the signature: there are no labels to cache.
        rank, world_size: a world_size above 1 raises RuntimeError, for now.

    Its call takes the features (N, D), `logit_scale` (which multiplies: exp of the model's parameter), `logit_bias`,
    which the softmax cancels, so that its gradient is exactly zero, and `output_dict`, for {"contrastive_loss": loss}.

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
        require_one_process("ClipLoss", world_size)
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
        loss = clip(
            image_features,
            text_features,
            logit_scale=as_scalar(logit_scale),
            logit_bias=None if logit_bias is None else as_scalar(logit_bias),
            normalize=False,
        )
        return {"contrastive_loss": loss} if output_dict else loss
