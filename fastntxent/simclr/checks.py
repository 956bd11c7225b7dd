"""Checks of the data sets that callers pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arrays import MIN_SIZE
from .images import IN_MEMORY
from .labels import UNLABELLED


def check_texts(name: str, texts: Any) -> None:
    """Raise TypeError for anything but a tuple or list of strings."""
    if not isinstance(texts, (tuple, list)) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a tuple or list of strings, got {texts!r:.80}")


def check_in_memory(in_memory: str) -> None:
    """Raise ValueError for an unknown value of `in_memory`."""
    if in_memory not in IN_MEMORY:
        raise ValueError(f"in_memory must be one of {', '.join(IN_MEMORY)}, got {in_memory!r}")


def check_images(name: str, images: Any, least: int) -> None:
    """Raise TypeError or ValueError unless `images` holds, or reads on demand, at least `least` images (N, C, H, W)."""
    if isinstance(images, Tensor):
        if images.dtype != torch.uint8 or images.device.type != "cpu":
            raise TypeError(f"{name} must be a uint8 tensor on the CPU, got {images.dtype} on {images.device}")
    elif isinstance(images, np.ndarray) or not all(
        hasattr(images, attribute) for attribute in ("shape", "__len__", "__getitem__")
    ):
        raise TypeError(f"{name} must be a uint8 tensor, got {type(images).__name__}")
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] not in (1, 3) or min(shape[2:]) < MIN_SIZE:
        raise ValueError(
            f"{name} must have the shape (N, C, H, W) with 1 or 3 channels and at least {MIN_SIZE} x {MIN_SIZE} "
            f"pixels, got {shape}"
        )
    if shape[0] < least:
        raise ValueError(f"{name} must hold at least {least} image{'s' if least > 1 else ''}, got {shape[0]}")


def check_labels(name: str, labels: Any, count: int, classes: int) -> None:
    """Raise TypeError or ValueError unless `labels` is an int64 CPU tensor (count,) with values in -1..classes - 1."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.device.type != "cpu":
        kind = f"{labels.dtype} on {labels.device}" if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{name} must be an int64 tensor on the CPU, got {kind}")
    if labels.shape != (count,):
        raise ValueError(f"{name} must have the shape ({count},), one label per image, got {tuple(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < UNLABELLED or high >= classes:
        raise ValueError(
            f"{name} must lie in 0..{classes - 1}, or be -1 for no label, because class_names has {classes} names, "
            f"got {low}..{high}"
        )
