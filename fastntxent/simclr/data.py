"""The images of a run. Every source ends as uint8 images (N, C, H, W), in memory or read on demand, with int64 labels.

A source without a test part of its own has a fifth of its images held out by a fixed permutation, class by
class where there are labels: the split does not depend on the seed of a run, so runs can be compared.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .arrays import MIN_SIZE, Arrays, check_shapes, image_tensors
from .checks import check_images, check_in_memory, check_labels, check_texts
from .datasets import read_datasets
from .folder import Folder
from .images import default_threads, load_files
from .items import Labelled
from .labels import UNLABELLED, label_tensors, require_held_out
from .notes import distinct, one_line
from .sources import SOURCES, Request
from .tally import Images, Tally, tally

DEFAULT_SIZE = 32
# Below this brightest value of 255, images are probably not in the range that was assumed.
_DARK = 32


class TrainingData(Protocol):
    """What the trainer needs to know of its images before it reads them."""

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        ...

    def channel_moments(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel."""
        ...

    def fingerprint(self) -> str:
        """A short text that changes with the images."""
        ...


@dataclass(frozen=True)
class ImageData:
    """A data set: images uint8 (N, C, H, W), labels int64 (N,).

    Attributes:
        name: the source.
        train_images, test_images: tensors on the CPU, or images that are read when they are indexed, by a tensor of
            places, a mask or a slice.
        train_labels, test_labels: values in 0..C-1, or -1 where there is none.
        class_names: C printable names.
        title: what a person calls the data; `name` if it is empty.
        notes: a line each on what was skipped or left out.

    Raises:
        TypeError, ValueError: an attribute is not as described here.
    """

    name: str
    train_images: Images
    train_labels: Tensor
    test_images: Images
    test_labels: Tensor
    class_names: tuple[str, ...]
    title: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_texts("class_names", self.class_names)
        check_texts("notes", self.notes)
        object.__setattr__(self, "class_names", distinct(self.class_names))
        object.__setattr__(self, "notes", tuple(self.notes))
        object.__setattr__(self, "title", one_line(self.title or self.name))
        check_images("train_images", self.train_images, least=2)
        check_images("test_images", self.test_images, least=1)
        train, test = self.train_images.shape[1:], self.test_images.shape[1:]
        if train != test:
            raise ValueError(f"test_images must be like train_images, {tuple(train)} each, got {tuple(test)}")
        check_labels("train_labels", self.train_labels, len(self.train_images), len(self.class_names))
        check_labels("test_labels", self.test_labels, len(self.test_images), len(self.class_names))

    @classmethod
    def from_datasets(
        cls,
        train: Labelled,
        test: Labelled | None = None,
        *,
        name: str = "dataset",
        class_names: Sequence[str] | None = None,
        in_memory: str = "auto",
        workers: int = 0,
        skip_bad: bool = False,
    ) -> ImageData:
        """The items of a map-style `torch.utils.data.Dataset`, or of the one that a DataLoader reads.

        An item is an image, or a tuple (image, label, ...). An image is a PIL image, a uint8 array or tensor (H, W),
        (H, W, C) or (C, H, W) with 1 or 3 channels, or a floating one with values in [0, 1]; all have one size. A
        label is an integer, a text or None. The views are drawn by the trainer: a random transform does not belong
        into the dataset, and neither does Normalize.

        Args:
            train: the dataset; every item is read once here.
            test: the dataset of the test part; without one, a fifth of each class of `train` is held out.
            name: what the data is called.
            class_names: the names that integer labels index; by default `train.classes` where the labels fit it, else
                the sorted labels.
            in_memory: "yes" to keep the images in memory, "no" to read items whenever they are needed, "auto" for "yes"
                up to 512 MiB.
            workers: processes that read the items here, as `num_workers` of a DataLoader.
            skip_bad: leave out the items whose reading raises an exception.

        Raises:
            TypeError, ValueError: the dataset or an item is of another kind, the sizes differ, or items cannot be read.

        Example:
            >>> images = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
            >>> dataset = [(image, "odd" if i % 2 else "even") for i, image in enumerate(images)]
            >>> data = ImageData.from_datasets(dataset)
            >>> len(data.train_images), len(data.test_images), data.class_names
            (16, 4, ('even', 'odd'))
        """
        check_in_memory(in_memory)
        parts = read_datasets(
            train, test, name=name, class_names=class_names, in_memory=in_memory, workers=workers, skip_bad=skip_bad
        )
        return _with_remarks(cls(name, *parts))

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def image_size(self) -> int:
        return max(self.train_images.shape[2:])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @property
    def is_labelled(self) -> bool:
        """At least two classes to tell apart, in the training part, and a test image of a class that it has."""
        known = self.train_labels[self.train_labels != UNLABELLED].unique()
        return len(known) >= 2 and bool(torch.isin(self.test_labels, known).any())

    @functools.cached_property
    def _tally(self) -> Tally:
        return tally(self.train_images)

    def channel_moments(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over the training images scaled to [0, 1]."""
        return self._tally.moments()

    def fingerprint(self) -> str:
        """A checksum of the training images, to notice that a resumed run was given other data."""
        return f"{tuple(self.train_images.shape)}-{self._tally.checksum:08x}"


def load_data(
    name: str,
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    download: bool = False,
    *,
    skip_bad: bool = False,
    in_memory: str = "auto",
    workers: int | None = None,
    progress: bool = False,
) -> ImageData:
    """Read a data set.

    Args:
        name: a key of `SOURCES`.
        data_dir: where the files are, or the .npz file itself; None for the source's own default.
        image_size: side that a folder's images are resized to, 32 by default; other sources keep theirs.
        download: let torchvision fetch the files if they are missing.
        skip_bad: leave out the files of a folder that cannot be read as images, with a note.
        in_memory: "yes" to keep a folder's images in memory, "no" to decode each whenever it is needed, "auto" for
            "yes" up to 512 MiB. Other sources are always in memory.
        workers: threads that decode the files of a folder, 0 for none; by default one for each core, at most 8.
        progress: show a progress bar on stderr while the files of a folder are decoded.

    Raises:
        ValueError: an unknown name, or files that do not hold what they should.
        FileNotFoundError: nothing where the data should be.
        OSError: the data cannot be read.
        ImportError: the source needs a package that is not installed.
    """
    if name not in SOURCES:
        raise ValueError(f"data must be one of {', '.join(SOURCES)}, got {name!r}")
    check_in_memory(in_memory)
    if in_memory == "no" and name != "folder":
        raise ValueError(f"--in-memory no is for --data folder: {name} is read as a whole")
    size = DEFAULT_SIZE if image_size is None else image_size
    if size < MIN_SIZE:
        raise ValueError(f"image_size must be at least {MIN_SIZE}, got {size}")
    path = None if data_dir is None else Path(data_dir)
    found = SOURCES[name](Request(name, path, download))
    if isinstance(found, Folder):
        threads = default_threads() if workers is None else workers
        loaded = load_files(found, size, in_memory, threads, skip_bad, progress)
        data = ImageData(
            name, loaded.train_images, loaded.train_labels, loaded.test_images, loaded.test_labels, found.class_names,
            os.path.basename(os.path.abspath(found.root)) or str(found.root), loaded.notes,
        )  # fmt: skip
    else:
        data = _bundle(name, found, path.name if name == "npz" and path else name)
    return _with_remarks(data)


def _bundle(name: str, arrays: Arrays, title: str) -> ImageData:
    """The data set of arrays, with a fifth held out where there is no test part."""
    check_shapes(arrays)
    parts = [(arrays.named("labels"), arrays.labels, arrays.images.shape[0])]
    mask = None
    if arrays.test_images is not None:
        parts.append((arrays.named("test_labels"), arrays.test_labels, arrays.test_images.shape[0]))
    labels, class_names = label_tensors(parts, arrays.class_names)
    if arrays.test_images is None:
        mask = require_held_out(arrays.where or name, labels[0])
        labels = [labels[0][~mask], labels[0][mask]]
    train, test = image_tensors(arrays, mask)
    return ImageData(name, train, labels[0], test, labels[1], class_names, title, arrays.notes)


def _with_remarks(data: ImageData) -> ImageData:
    """The data with notes on what is probably not as it was meant."""
    remarks = []
    labels = torch.cat((data.train_labels, data.test_labels))
    unlabelled = int((labels == UNLABELLED).sum())
    if data.class_names and unlabelled:
        remarks.append(f"{unlabelled} of {len(labels)} images have no label and are left out of accuracies")
    brightest = data._tally.brightest()
    if brightest < _DARK:
        remarks.append(
            f"the images are dark: no value is above {brightest} of 255. Images of 16 bits and int32 are taken to span "
            "0 to 65535, floating-point ones 0 to 1"
        )
    object.__setattr__(data, "notes", (*data.notes, *remarks))
    return data
