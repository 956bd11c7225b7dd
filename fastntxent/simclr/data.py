"""The images of a run. Every source becomes uint8 images (N, C, H, W), in memory or read on demand, with int64 labels.

If a source has no test part, a fifth of its images (of each class, if there are labels) is held out by a fixed
permutation. The split does not depend on the seed of a run, so runs can be compared.
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
# If all values are below this (of 255), the images probably do not have the range that was assumed.
_DARK = 32


class TrainingData(Protocol):
    """The facts about the training images that the trainer needs before it reads them."""

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
        """Return the mean and the standard deviation with which each channel is standardised."""
        ...

    def fingerprint(self) -> str:
        """Return a short string that identifies the images. A resumed run must have the same string."""
        ...


@dataclass(frozen=True)
class ImageData:
    """A data set: images uint8 (N, C, H, W), labels int64 (N,).

    Attributes:
        name: the name of the source.
        train_images, test_images: CPU tensors, or objects that read images when indexed with a tensor of indices, a
            mask or a slice.
        train_labels, test_labels: class numbers 0..C-1, or -1 for an image without a label.
        class_names: C printable names.
        title: the name shown to users; an empty title becomes `name`.
        notes: one line for each thing that was left out or looks like a mistake.

    Raises:
        TypeError, ValueError: an attribute does not match this description.
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
            raise ValueError(f"test_images must have the shape of train_images, {tuple(train)}, got {tuple(test)}")
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
        """Return the data set made from a map-style `torch.utils.data.Dataset`, or from the dataset of a DataLoader.

        An item is an image or a tuple (image, label, ...). An image is a PIL image, or an array or tensor (H, W),
        (H, W, C) or (C, H, W) with 1 or 3 channels, either uint8 or floating-point in [0, 1]. All images have the same
        size. A label is an integer, a string or None. The trainer draws the random views, so leave random transforms
        and Normalize out of the dataset.

        Args:
            train: the dataset; every item is read at least once here.
            test: the dataset of the test part; None: hold out a fifth of each class of `train`.
            name: the name of the data.
            class_names: the names of the classes. An integer label is an index into them; a string label is one of
                them. None: `train.classes` if all labels are indices into it, else the sorted labels.
            in_memory: "yes" keeps the images in memory, "no" reads an item each time it is needed, "auto" means "yes"
                if the images take at most 512 MiB, else "no".
            workers: processes that read the items here, like `num_workers` of a DataLoader.
            skip_bad: leave out items that raise an exception when they are read.

        Raises:
            TypeError, ValueError: the dataset or an item has the wrong type, sizes differ, or items cannot be read.

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
        """Whether the training part has at least two classes, and a test image belongs to one of them."""
        known = self.train_labels[self.train_labels != UNLABELLED].unique()
        return len(known) >= 2 and bool(torch.isin(self.test_labels, known).any())

    @functools.cached_property
    def _tally(self) -> Tally:
        return tally(self.train_images)

    def channel_moments(self) -> tuple[list[float], list[float]]:
        """Return the mean and the standard deviation of each channel of the training images, scaled to [0, 1]."""
        return self._tally.moments()

    def fingerprint(self) -> str:
        """Return a checksum of the training images, which detects that a resumed run was given different data."""
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
        data_dir: the folder of the files, or the .npz file itself; None: the default of the source.
        image_size: side in pixels to which a folder's images are cropped and resized; None: 32. Other sources keep the
            size of their images.
        download: let torchvision download missing files.
        skip_bad: leave out files of a folder that cannot be read as images, with a note.
        in_memory: "yes" keeps a folder's images in memory, "no" decodes each image every time it is needed, "auto"
            means "yes" if the images take at most 512 MiB, else "no". Other sources are always in memory.
        workers: threads that decode the files of a folder, 0 for none; None: one per core, at most 8.
        progress: show a progress bar on stderr while the files of a folder are decoded.

    Raises:
        ValueError: an argument is invalid, or the files do not have the expected content.
        FileNotFoundError: the data does not exist.
        OSError: the data cannot be read.
        ImportError: the source needs a package that is not installed.
    """
    if name not in SOURCES:
        raise ValueError(f"data must be one of {', '.join(SOURCES)}, got {name!r}")
    check_in_memory(in_memory)
    if in_memory == "no" and name != "folder":
        raise ValueError(f"--in-memory no requires --data folder: {name} is always read as a whole")
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
    """Return the data set made of arrays, with a fifth held out if there is no test part."""
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
    """Add notes on missing labels and dark images to the data, and return the data."""
    remarks = []
    labels = torch.cat((data.train_labels, data.test_labels))
    unlabelled = int((labels == UNLABELLED).sum())
    if data.class_names and unlabelled:
        remarks.append(f"{unlabelled} of {len(labels)} images have no label and are left out of accuracies")
    brightest = data._tally.brightest()
    if brightest < _DARK:
        remarks.append(
            f"the images are dark: no value is above {brightest} of 255. 16-bit and int32 images are assumed to span "
            "0 to 65535, and floating-point images 0 to 1"
        )
    object.__setattr__(data, "notes", (*data.notes, *remarks))
    return data
