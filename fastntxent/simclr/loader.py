"""A user's DataLoader as training data: checks of its batches, and the facts about them that the model needs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .output import last_line
from .stopping import ignore_signals, read

_EXPECTED = (
    "a batch of the DataLoader must be images (N, C, H, W) or (images, labels, ...), or two views of each image, "
    "(view_1, view_2, ...) or ((view_1, view_2), labels, ...)"
)


class LoaderData:
    """The batches of a DataLoader: images (uint8 or in [0, 1]), which are augmented, or pairs of views, which are not.

    Args:
        loader: a DataLoader with a length. On several ranks, each rank passes its own loader, and all loaders have the
            same length.

    Raises:
        TypeError: the loader has no length, or its batches are neither images nor pairs of views.
        ValueError: the loader is empty, or would yield a batch of one image; or its first batch cannot be read, or has
            images outside [0, 1].
    """

    name = title = "a DataLoader"
    notes: tuple[str, ...] = ()

    def __init__(self, loader: DataLoader[Any]) -> None:
        try:
            self.steps_per_epoch = len(loader)
        except TypeError as error:
            raise TypeError(f"data must be a DataLoader with a length, which the schedule needs: {error}") from error
        if not self.steps_per_epoch:
            raise ValueError("data must be a DataLoader with at least one batch, got an empty one")
        self.loader = loader
        items: Any = loader.dataset if isinstance(loader.dataset, IterableDataset) else loader.sampler
        if loader.batch_size and not loader.drop_last and len(items) % loader.batch_size == 1:
            raise ValueError(
                "data must be a DataLoader without a batch of one image, which has no negatives, but the last of its "
                f"{len(items)} images is alone in its batch: set drop_last=True"
            )
        loader.worker_init_fn = functools.partial(ignore_signals, then=loader.worker_init_fn)
        images = self.images_of(_first_batch(loader))
        first = images[0] if isinstance(images, tuple) else images
        self.are_views = isinstance(images, tuple)
        self.batch = len(first)
        channels, height, width = first.shape[1:]
        self.image_shape = (channels, height, width)

    def images_of(self, batch: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Return the images of a batch as uint8, or its two views as float32, not rescaled."""
        parts = list(batch) if isinstance(batch, Sequence) else [batch]
        if parts and isinstance(parts[0], Sequence) and len(parts[0]) == 2:
            parts = list(parts[0])
        if not (parts and _is_image_batch(parts[0])):
            raise TypeError(f"{_EXPECTED}, got {_describe(batch)}")
        images = parts[0]
        if len(images) < 2:
            raise ValueError(f"a batch of the DataLoader must hold at least 2 images, got {len(images)}")
        if len(parts) == 1 or not _is_image_batch(parts[1]):
            return _as_bytes(images)
        if images.shape != parts[1].shape or not (images.is_floating_point() and parts[1].is_floating_point()):
            raise TypeError(
                "the two views of a DataLoader's batch must be floating-point and of the same shape, got "
                f"{_describe(parts)}"
            )
        return images.float(), parts[1].float()

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch to the sampler, the batch sampler and the dataset, if they have a `set_epoch`."""
        for part in (self.loader.sampler, self.loader.batch_sampler, self.loader.dataset):
            getattr(part, "set_epoch", lambda _: None)(epoch)

    def channel_moments(self) -> tuple[list[float], list[float]]:
        """Return mean 0 and standard deviation 1, so the loader's images are not standardised."""
        return [0.0] * self.image_shape[0], [1.0] * self.image_shape[0]

    def fingerprint(self) -> str:
        """Return a short description of the images, without a pass over them."""
        return f"{self.steps_per_epoch} batches of {self.image_shape}"


def _first_batch(loader: DataLoader[Any]) -> Any:
    try:
        return next(read(loader))
    except StopIteration:
        raise ValueError("data must be a DataLoader with at least one batch, but it yielded none") from None
    except Exception as error:  # from the user's code
        raise ValueError(f"the first batch of the DataLoader cannot be read: {last_line(error)}") from error


def _is_image_batch(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.shape[1] in (1, 3)


def _as_bytes(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise TypeError(f"the images of the DataLoader must be uint8 or floating-point, got {images.dtype}")
    if not (float(images.min()) >= 0 and float(images.max()) <= 1):
        raise ValueError(
            f"floating-point images of the DataLoader must lie in [0, 1], got [{float(images.min()):g}, "
            f"{float(images.max()):g}]: leave normalisation to the encoder"
        )
    return (images * 255).round().to(torch.uint8)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"{type(value).__name__} of ({', '.join(map(_describe, value))})"
    return type(value).__name__
