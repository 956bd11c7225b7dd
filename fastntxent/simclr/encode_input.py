"""The input of the sub-command `embed`: folders and image files, or the images of an .npz file, read one by one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .arrays import image_blocks
from .folder import find
from .images import decode_all
from .labels import UNLABELLED, label_tensors
from .notes import distinct, one_line
from .npz import open_npz
from .optional import require
from .pixels import BadFile, without_warnings

Size = tuple[int, int, int]


class Input(NamedTuple):
    """Images that have been found but not read yet.

    Attributes:
        names: a path or a number for each image.
        labels: class numbers int64 (N,), in 0..C-1, or -1 for no class.
        class_names: C names; empty if the input has no classes.
        notes: one line for each kind of entry that was left out or looks like a mistake.
        unreadable: folders that could not be listed.
        shape: channels, height and width of every image.
        where: the input's name in messages.
        read: to be called once; returns an iterator over the images in order, each a uint8 tensor of `shape` or a
            BadFile.
    """

    names: Sequence[str]
    labels: Tensor
    class_names: tuple[str, ...]
    notes: tuple[str, ...]
    unreadable: tuple[BadFile, ...]
    shape: Size
    where: str
    read: Callable[[], Iterator[Tensor | BadFile]]


def images_of(paths: Sequence[Path], size: int | None, default_size: int, threads: int) -> Input:
    """Find the images of folders and files, or of one .npz file.

    Args:
        size: side in pixels to which image files are cropped and resized; None: `default_size`.
        threads: number of decoding threads.

    Raises:
        FileNotFoundError: a path does not exist, or there is no image.
        ValueError: a path is neither a folder nor a regular file; or an .npz file is damaged, is not the only input, or
            is combined with `size`.
        OSError: a file cannot be read.
    """
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{one_line(path)} does not exist")
        if not (path.is_dir() or path.is_file()):
            raise ValueError(f"{one_line(path)} is neither a folder nor a file")
    if any(path.suffix.lower() == ".npz" and path.is_file() for path in paths):
        if len(paths) > 1:
            raise ValueError(f"an .npz file must be the only input, got {', '.join(map(one_line, paths))}")
        if size is not None:
            raise ValueError("--image-size is for image files: the images of an .npz file keep their size")
        return _of_npz(paths[0])
    return _of_files(paths, size or default_size, threads)


def _of_npz(path: Path) -> Input:
    arrays = open_npz(path)
    shape, blocks = image_blocks(arrays)
    count = arrays.images.shape[0]
    (labels,), class_names = label_tensors([(arrays.named("labels"), arrays.labels, count)], arrays.class_names)
    unread = () if arrays.test_images is None else ("did not read the test images: to embed them, use a separate file",)

    def read() -> Iterator[Tensor | BadFile]:
        for block in blocks:
            yield from block

    names = [str(number) for number in range(count)]
    return Input(names, labels, class_names, (*arrays.notes, *unread), (), shape, one_line(path), read)


def _of_files(paths: Sequence[Path], size: int, threads: int) -> Input:
    require("PIL.Image")  # otherwise every file would count as bad
    names: list[str] = []
    files: list[str] = []
    classes: list[str | None] = []
    notes: list[str] = []
    unreadable: list[BadFile] = []
    for path in paths:
        if path.is_file():
            names.append(path.name if len(paths) == 1 else str(path))
            files.append(str(path))
            classes.append(None)
            continue
        folder = find(path)
        notes += folder.notes
        unreadable += folder.unreadable
        for part in (folder.train, folder.test):
            if part is not None:
                names += [name if len(paths) == 1 else os.path.join(path, name) for name in part.paths]
                files += [os.path.join(path, name) for name in part.paths]
                classes += [None if n == UNLABELLED else folder.class_names[n] for n in part.labels.tolist()]
    known = sorted({name for name in classes if name is not None})
    numbers = {name: number for number, name in enumerate(known)}
    labels = torch.tensor([UNLABELLED if name is None else numbers[name] for name in classes], dtype=torch.int64)

    def read() -> Iterator[Tensor | BadFile]:
        with without_warnings():
            for name, decoded in zip(names, decode_all(files, size, threads), strict=True):
                yield decoded._replace(path=name) if isinstance(decoded, BadFile) else torch.from_numpy(decoded)

    where = ", ".join(map(one_line, paths[:3])) + (", ..." if len(paths) > 3 else "")
    return Input(
        names, labels, distinct(known), tuple(dict.fromkeys(notes)), tuple(unreadable), (3, size, size), where, read
    )
