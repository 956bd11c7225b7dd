"""PyTorch datasets as images (N, C, H, W), kept in memory or read item by item on demand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from .images import keep_in_memory, told_bad
from .items import ImagesOfDataset, Item, Labelled, Shape, read_item, require_sound
from .labels import Array, label_tensors, require_held_out
from .notes import one_line
from .tally import Tally, allocate

Images = Tensor | ImagesOfDataset


def read_datasets(
    train: Labelled,
    test: Labelled | None,
    *,
    name: str,
    class_names: Sequence[str] | None,
    in_memory: str,
    workers: int,
    skip_bad: bool,
) -> tuple[Images, Tensor, Images, Tensor, tuple[str, ...], str, tuple[str, ...]]:
    """Read every item. Return training images and labels, test images and labels, class names, title and notes."""
    named = {"train": _unwrap(train, "train")}
    if test is not None:
        named["test"] = _unwrap(test, "test")
    shape, notes = _first_image(named["train"])
    count = sum(len(dataset) for dataset in named.values())
    keep = keep_in_memory(in_memory, count, math.prod(shape))
    scans = [_scan(dataset, what, torch.arange(len(dataset)), shape, keep, workers) for what, dataset in named.items()]
    note = told_bad([bad for scan in scans for bad in scan.bad], count, one_line(name), skip_bad)
    notes += [note] if note else []
    columns = [
        (f"the labels of {what}", _column(what, scan.labels), len(scan.labels))
        for what, scan in zip(named, scans, strict=True)
    ]
    names = class_names if class_names is not None else _own_names(named["train"], columns)
    labels, found_names = label_tensors(columns, tuple(names))
    if test is None:
        scan = scans[0]
        mask = require_held_out(one_line(name), labels[0])
        labels = [labels[0][~mask], labels[0][mask]]
        if scan.images is not None:
            held_out = scan.images[mask]
            images: list[Images] = [_compact(scan.images, ~mask), held_out]
        else:
            # The tally must cover only the training images. The first reading could not tell which these are, so they
            # are read again.
            again = _scan(named["train"], "train", scan.places[~mask], shape, False, workers)
            told_bad(again.bad, count, one_line(name), False)
            images = [
                ImagesOfDataset(named["train"], scan.places[~mask], shape, again.tally),
                ImagesOfDataset(named["train"], scan.places[mask], shape),
            ]
    else:
        images = [
            scan.images if scan.images is not None else ImagesOfDataset(dataset, scan.places, shape, scan.tally)
            for dataset, scan in zip(named.values(), scans, strict=True)
        ]
    return images[0], labels[0], images[1], labels[1], found_names, name, tuple(notes)


def _unwrap(dataset: Any, what: str) -> Labelled:
    """Return the map-style dataset that was passed, or the dataset of a DataLoader that was passed.

    Raises:
        TypeError: there is no map-style dataset.
        ValueError: the DataLoader has a custom sampler, or the dataset is empty.
    """
    loader = dataset if isinstance(dataset, DataLoader) else None
    dataset = dataset if loader is None else loader.dataset
    if isinstance(dataset, IterableDataset):
        raise TypeError(f"{what} must be a map-style dataset, because images are read by index, got an IterableDataset")
    if loader is not None and (
        type(loader.sampler) not in (RandomSampler, SequentialSampler)
        or type(loader.batch_sampler) not in (BatchSampler, type(None))
    ):
        raise ValueError(f"{what} is a DataLoader with a custom sampler: pass its dataset, or a Subset of it")
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or isinstance(dataset, (dict, str)):
        raise TypeError(f"{what} must be a map-style dataset, with len() and [index], got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError(f"{what} is empty")
    return dataset


def _first_image(dataset: Labelled) -> tuple[Shape, list[str]]:
    """Return the shape of the first readable image, and a note if a second reading gives a different image."""
    item = Item(None)
    for index in range(len(dataset)):
        item = read_item(dataset, index)
        if item.image is not None:
            again = read_item(dataset, index).image
            same = again is not None and np.array_equal(item.image, again)
            notes = [] if same else [
                f"item {index} of train is a different image each time it is read: leave random transforms out of the "
                "dataset, since the trainer draws the views"
            ]  # fmt: skip
            return item.image.shape, notes
        require_sound(item, index, "train", ())
    raise ValueError(f"no item of train can be read; the last error is {item.problem}")


@dataclass
class _Scan:
    """The indices (`places`), labels and images (or their tally) of the readable items, and the unreadable items."""

    places: Tensor
    labels: list[int | str | None]
    images: Tensor | None
    tally: Tally
    bad: list[str]


def _scan(dataset: Labelled, what: str, places: Tensor, shape: Shape, keep: bool, workers: int) -> _Scan:
    images = allocate((len(places), *shape), what) if keep else None
    scan = _Scan(places, [], images, Tally(shape[0]), [])
    good: list[int] = []
    for index, item in zip(places.tolist(), _items(dataset, what, places, workers), strict=True):
        require_sound(item, index, what, shape)
        if item.image is None:
            scan.bad.append(f"item {index} of {what} ({item.problem})")
            continue
        image = torch.from_numpy(item.image)
        if images is None:
            scan.tally.add(image[None])
        else:
            images[len(good)] = image
        good.append(index)
        scan.labels.append(item.label)
    scan.places = torch.tensor(good, dtype=torch.int64)
    scan.images = None if images is None else images[: len(good)]
    return scan


@dataclass(frozen=True)
class _Items:
    """A dataset whose items are read by `read_item`, for the workers of a DataLoader."""

    dataset: Labelled

    def __getitem__(self, index: int) -> Item:
        return read_item(self.dataset, index)


def _as_it_is(item: Any) -> Any:
    return item


def _items(dataset: Labelled, what: str, places: Tensor, workers: int) -> Iterator[Item]:
    if workers == 0:
        yield from (read_item(dataset, index) for index in places.tolist())
        return
    loader: DataLoader[Item] = DataLoader(
        _Items(dataset),  # type: ignore[arg-type]
        batch_size=None,
        sampler=places.tolist(),
        num_workers=workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # otherwise the loader would advance the global generator
    )
    try:
        yield from loader
    except RuntimeError as error:  # a worker was killed
        raise ValueError(f"the workers that read {what} ended: {one_line(error)}") from error


def _column(what: str, labels: Sequence[int | str | None]) -> Array | None:
    """Return the labels as an array, with -1 or an empty string for missing labels; None if all are missing."""
    kinds = {type(label) for label in labels} - {type(None)}
    if not kinds:
        return None
    if len(kinds) > 1:
        raise ValueError(f"the labels of {what} must be all integers or all strings, got both")
    if kinds == {str}:
        return np.array([label or "" for label in labels])
    numbers = [-1 if label is None else int(label) for label in labels]
    try:
        return np.array(numbers, np.int64)
    except OverflowError as error:
        raise ValueError(f"the labels of {what} must be less than 2^63, got {max(numbers, key=abs)}") from error


def _own_names(dataset: Labelled, columns: Sequence[tuple[str, Array | None, int]]) -> Sequence[str]:
    """Return the dataset's `classes`, as in torchvision, if all labels index them; otherwise ()."""
    names = getattr(dataset, "classes", ())
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return ()
    found = [labels for _, labels, _ in columns if labels is not None]
    fit = all(labels.dtype.kind == "i" and labels.min() >= -1 and labels.max() < len(names) for labels in found)
    return names if fit and found else ()


def _compact(images: Tensor, mask: Tensor) -> Tensor:
    """Return the images that the mask selects, moved to the front of the same memory."""
    places = mask.nonzero().flatten()
    for start in range(0, len(places), 1024):
        block = places[start : start + 1024]  # images move to the front: none is overwritten before it is read
        images[start : start + len(block)] = images[block]
    return images[: len(places)]
