"""The images that the evaluation uses, and functions that read them a bounded number at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import Config
from .data import ImageData
from .output import printable
from .tally import Images

ROWS = 1024
LEAST_ROWS = 64
KEPT_BYTES = 128 * 2**20  # images from files are kept in memory up to this size; larger selections are read each time


@dataclass(frozen=True)
class Part:
    """A selection of images with their labels. Indexing it returns images."""

    images: Images
    indices: Tensor
    labels: Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.indices), *self.images.shape[1:]))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: Any, /) -> Tensor:
        return self.images[self.indices[rows]]

    def only(self, rows: Tensor) -> Part:
        """Return the selection of these rows (a mask or indices)."""
        return Part(self.images, self.indices[rows], self.labels[rows])

    def kept(self) -> Part:
        """Return the selection. If it comes from files and is small, its images are read into memory here, because the
        evaluation reads them several times."""
        if isinstance(self.images, Tensor) or math.prod(self.shape) > KEPT_BYTES:
            return self
        return Part(in_parts(self, lambda images: images), torch.arange(len(self)), self.labels)


@dataclass(frozen=True)
class Choice:
    """The images that the evaluation uses, and the subset that the accuracies use.

    Attributes:
        train, test: the images.
        known: mask of the training images that have a label.
        asked: mask of the test images whose class has a labelled training image.
        accuracies: whether accuracies can be measured: at least two classes, and a test image of one of them.
        notes: notes of one line each, on measures that will be missing and on images that are left out of a measure.
    """

    train: Part
    test: Part
    known: Tensor
    asked: Tensor
    accuracies: bool
    notes: tuple[str, ...]


def choose(config: Config, data: ImageData) -> Choice:
    """Choose the images to evaluate on, the same in every run. Every class is included if the limit allows it."""
    train = _subset(data.train_images, data.train_labels, config.eval_limit)
    test = _subset(data.test_images, data.test_labels, config.eval_limit)
    known = train.labels >= 0
    classes = train.labels[known].unique()
    asked = torch.isin(test.labels, classes)
    labelled = test.labels >= 0
    notes = []
    unlabelled = [words for words, mask in (("training", known), ("test", labelled)) if not mask.any()]
    if unlabelled:
        which = "The images" if len(unlabelled) == 2 else f"The {unlabelled[0]} images"
        notes.append(f"{which} have no labels, so accuracies are not measured.")
    elif len(classes) < 2:
        notes.append(
            f"All labelled training images are of one class ({class_name(data, int(classes[0]))}), so accuracies are "
            "not measured."
        )
    else:
        left_out = test.labels[labelled & ~asked]
        count = len(left_out)
        if count:
            names = [class_name(data, label) for label in left_out.unique().tolist()]
            listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            notes.append(
                f"{count} test {'image is' if count == 1 else 'images are'} left out of the accuracies: no training "
                f"image among those used is of the same class ({listed})."
            )
        if not asked.any():
            notes.append("No test image is of a class that has a training image, so accuracies are not measured.")
    accuracies = len(classes) >= 2 and bool(asked.any())
    return Choice(train, test, known, asked, accuracies, tuple(notes))


def class_name(data: ImageData, label: int) -> str:
    """Return the name of a class as printable text on one line, cut to 40 characters."""
    name = data.class_names[label] if label < len(data.class_names) else str(label)
    text = "".join(letter if letter.isprintable() else " " for letter in printable(name))
    text = " ".join(text.split())
    return shortened(text, 40) or "(no name)"


def shortened(text: str, length: int) -> str:
    """Return the text, cut to `length` characters with an ellipsis if it is longer."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _subset(images: Images, labels: Tensor, limit: int) -> Part:
    """Return at most `limit` images: one of each class, then labelled images in a fixed order, then unlabelled ones."""
    count = len(images)
    if count <= limit:
        return Part(images, torch.arange(count), labels)
    order = np.random.default_rng(0).permutation(count)
    order = order[np.argsort(labels.numpy()[order] < 0, kind="stable")]
    found, first = np.unique(labels.numpy()[order], return_index=True)
    first = np.sort(first[found >= 0])[:limit]
    others = np.setdiff1d(np.arange(count), first, assume_unique=True)[: limit - len(first)]
    indices = torch.from_numpy(order[np.sort(np.concatenate((first, others)))])
    return Part(images, indices, labels[indices])


def rows_at_once(images: Images, channels: int = 3) -> int:
    """Return the number of images to read at a time: ROWS for images of up to 32 x 32 pixels in `channels` channels,
    fewer for larger images, and at least LEAST_ROWS."""
    return max(LEAST_ROWS, min(ROWS, ROWS * channels * 32 * 32 // math.prod(images.shape[1:])))


def slices(count: int, size: int) -> Iterator[slice]:
    """Return consecutive slices of at most `size` that cover `count` rows."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def in_parts(images: Images, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Return compute(part) for all parts of the images, concatenated in a tensor that is allocated once."""
    result = torch.empty(0)
    for rows in slices(len(images), rows_at_once(images)):
        part = compute(images[rows])
        if rows.start == 0:
            result = torch.empty(len(images), *part.shape[1:], dtype=part.dtype)
        result[rows] = part
    return result
