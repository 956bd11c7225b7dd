"""The resolved settings of a run: "auto" and other defaults that affect the result are replaced by their values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..backends import name_of, select
from .build import AMP_DTYPES
from .models import DEFAULT_WIDTH

if TYPE_CHECKING:
    from .config import Config
    from .train import Trainer


def resolve(config: Config, trainer: Trainer) -> dict[str, Any]:
    """Return the settings by name, as plain values. With the same data and encoder they reproduce the run."""
    chosen = config.to_dict()
    if trainer.data.name != config.data:
        chosen["data"] = f"{trainer.data.name} (from Python)"
    if trainer.has_own_encoder:
        chosen["model"] = "a module (from Python)"
    chosen |= {
        "image_size": max(trainer.data.image_shape[1:]),
        "workers": trainer.feed.workers,
        "augment": config.preset,
        "width": config.width or DEFAULT_WIDTH.get(config.model, 0),
        "backend": _backend(trainer),
        "lr": trainer.peak_lr,
        "warmup_epochs": config.warmup,
        "device": trainer.device.type if trainer.ranks.group else str(trainer.device),
        "amp": next(name for name, dtype in AMP_DTYPES.items() if dtype == trainer.model.amp_dtype),
    }
    if config.accumulate_batch:
        chosen["chunk"] = config.chunk or config.batch_size
    return chosen


def _backend(trainer: Trainer) -> str:
    """Return the backend's name. On an accelerator "auto" stays, because the choice depends on a call's size."""
    asked: str = trainer.loss.backend
    if trainer.device.type != "cpu":
        return asked
    return name_of(select(asked, "cpu", trainer.model.amp_dtype or torch.float32))
