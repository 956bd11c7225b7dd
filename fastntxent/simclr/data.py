"""Where the images come from. Every source ends as uint8 tensors (N, C, H, W) in memory, with int64 labels.

A source without a test part of its own has a fifth of its images held out by a fixed permutation, class by
class where there are labels: the split does not depend on the seed of a run, so runs can be compared.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .sources import SOURCES, UNLABELLED, Array, Arrays, Request

MIN_SIZE = 8


@dataclass(frozen=True)
class ImageData:
    """A data set in memory: images uint8 (N, C, H, W), labels int64 (N,), -1 where there is none."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    title: str = ""
    notes: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def image_size(self) -> int:
        return max(self.train_images.shape[2:])

    @property
    def is_labelled(self) -> bool:
        """At least two classes to tell apart, in the training part, and a labelled test image."""
        train, test = self.train_labels, self.test_labels
        return bool((test >= 0).any()) and len(train[train >= 0].unique()) >= 2

    def channel_moments(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over the training images scaled to [0, 1]."""
        # From a histogram: exact, and without a float copy of the data.
        levels = torch.arange(256, dtype=torch.float64) / 255
        counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in self.train_images.unbind(1)])
        weights = counts.double() / counts.sum(1, keepdim=True)
        mean = weights @ levels
        std = (weights @ levels.square() - mean.square()).clamp(min=0).sqrt()
        return mean.tolist(), std.clamp(min=1e-3).tolist()

    def fingerprint(self) -> str:
        """A checksum of the training images, to notice that a resumed run was given other data."""
        images = self.train_images
        return f"{tuple(images.shape)}-{zlib.crc32(images.contiguous().numpy().data):08x}"


def load_data(name: str, data_dir: Path | None, image_size: int | None, download: bool) -> ImageData:
    """Read a data set.

    Args:
        name: a key of `SOURCES`.
        data_dir: where the files are, or the .npz file itself; None for the source's own default.
        image_size: side that a folder's images are resized to; other sources keep theirs.
        download: let torchvision fetch the files if they are missing.

    Raises:
        ValueError: an unknown name, or files that do not hold what they should.
        FileNotFoundError: nothing where the data should be.
        ImportError: the source needs a package that is not installed.
    """
    if name not in SOURCES:
        raise ValueError(f"data must be one of {', '.join(SOURCES)}, got {name!r}")
    return _bundle(name, SOURCES[name](Request(name, data_dir, image_size, download)))


def _bundle(name: str, arrays: Arrays) -> ImageData:
    train = _image_tensor("images", arrays.images)
    train_labels = _label_tensor("labels", arrays.labels, len(train))
    if arrays.test_images is None:
        held_out = _held_out(train_labels)
        if held_out.sum() < 2:
            raise ValueError(f"{name}: {len(train)} images are too few to hold a fifth of each class out for testing")
        test, test_labels = train[held_out], train_labels[held_out]
        train, train_labels = train[~held_out], train_labels[~held_out]
    else:
        test = _image_tensor("test_images", arrays.test_images)
        test_labels = _label_tensor("test_labels", arrays.test_labels, len(test))
        if test.shape[1:] != train.shape[1:]:
            raise ValueError(
                f"test_images must be like images, {tuple(train.shape[1:])} each, got {tuple(test.shape[1:])}"
            )
    class_names = arrays.class_names or tuple(str(label) for label in range(int(train_labels.max()) + 1))
    return ImageData(name, train, train_labels, test, test_labels, class_names)


def _image_tensor(name: str, images: Array) -> Tensor:
    """Any of the usual layouts as uint8 (N, C, H, W). Floats are taken as [0, 1] if they lie there, else [0, 255]."""
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"{name} must have the shape (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels, "
            f"got {images.shape}"
        )
    if len(images) < 2 or min(images.shape[2:]) < MIN_SIZE:
        raise ValueError(f"{name} must be at least 2 images of {MIN_SIZE} x {MIN_SIZE} pixels, got {images.shape}")
    if np.issubdtype(images.dtype, np.floating):
        low, high = float(images.min()), float(images.max())
        if not (low >= 0 and high <= 255):
            raise ValueError(f"{name} of a floating dtype must lie in [0, 1] or [0, 255], got [{low:g}, {high:g}]")
        images = (images * 255 if high <= 1 else images).round().astype(np.uint8)
    elif images.dtype != np.uint8:
        raise ValueError(f"{name} must be uint8 or floating, got {images.dtype}")
    return torch.from_numpy(np.ascontiguousarray(images).copy())


def _label_tensor(name: str, labels: Array | None, count: int) -> Tensor:
    if labels is None:
        return torch.full((count,), UNLABELLED)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name} must be {count} integers, got {labels.dtype} of shape {labels.shape}")
    return torch.from_numpy(labels.astype(np.int64))


def _held_out(labels: Tensor) -> Tensor:
    """A mask of a fifth of every class."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = order[labels[order] == label]
        mask[members[: len(members) // 5]] = True
    return mask
