"""Image files as tensors, all in memory or decoded on demand."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from .folder import Files, Folder
from .labels import require_held_out
from .notes import MANY, listed, one_line
from .optional import require
from .pixels import Array, BadFile, try_decode, without_warnings
from .tally import Tally, allocate

IN_MEMORY = ("auto", "yes", "no")
MEMORY_LIMIT = 512 * 2**20
# Number of files in one task of a thread. Handing out small files one by one would cost as much as decoding them.
_GROUP = 16


@dataclass(frozen=True)
class ImagesOnDisk:
    """Image files as uint8 images (N, 3, size, size), decoded each time they are indexed.

    Args:
        root, paths: the folder, and the files below it.
        size: side in pixels.
        threads: number of decoding threads; 0: decode in the calling thread, as a DataLoader worker always does.
        tally: histogram and checksum of all images, if known.
    """

    root: str
    paths: tuple[str, ...] = field(repr=False)
    size: int
    threads: int = 0
    tally: Tally | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.paths), 3, self.size, self.size))

    def __getitem__(self, indices: Any, /) -> Tensor:
        """Return the images that a tensor of indices, a mask or a slice selects.

        Raises:
            ValueError: a file can no longer be read.
        """
        chosen = torch.arange(len(self.paths))[indices]
        images = torch.empty((chosen.numel(), *self.shape[1:]), dtype=torch.uint8)
        paths = [os.path.join(self.root, self.paths[index]) for index in chosen.flatten().tolist()]
        threads = 0 if get_worker_info() else self.threads
        with without_warnings():
            for image, decoded in zip(images, decode_all(paths, self.size, threads), strict=True):
                if isinstance(decoded, BadFile):
                    raise ValueError(f"a file can no longer be read as an image: {decoded}")
                image.copy_(torch.from_numpy(decoded))
        return images.view(*chosen.shape, *self.shape[1:])


@dataclass(frozen=True)
class Loaded:
    """The images and labels of a folder, with notes for the user."""

    train_images: Tensor | ImagesOnDisk
    train_labels: Tensor
    test_images: Tensor | ImagesOnDisk
    test_labels: Tensor
    notes: tuple[str, ...]


def default_threads() -> int:
    """Return the number of cores that this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


def keep_in_memory(in_memory: str, count: int, image_bytes: int) -> bool:
    """Return whether to keep `count` decoded images in memory."""
    return in_memory == "yes" or (in_memory == "auto" and count * image_bytes <= MEMORY_LIMIT)


def load_files(folder: Folder, size: int, in_memory: str, threads: int, skip_bad: bool, progress: bool) -> Loaded:
    """Decode every file once, to keep it in memory or to check that it can be read.

    The held-out part is chosen among all files, so leaving out bad files moves no image to the other part.

    Raises:
        ValueError: some files cannot be read and `skip_bad` is off, or too few are left.
    """
    require("PIL.Image")  # otherwise every file would count as bad
    train, test = folder.train, folder.test
    if test is None:
        mask = require_held_out(one_line(folder.root), train.labels)
        train, test = _choose(train, ~mask), _choose(train, mask)
    count = len(train.paths) + len(test.paths)
    keep = keep_in_memory(in_memory, count, 3 * size * size)
    bad = list(folder.unreadable)
    images: list[Tensor | ImagesOnDisk] = []
    labels = []
    with without_warnings(), progress_bar(count if progress else None, "reading images") as advance:
        for part in (train, test):
            read, good = _read(folder, part, size, keep, threads, bad, advance)
            images.append(read)
            labels.append(part.labels[torch.tensor(good).long()])
    note = told_bad(sorted(bad), count, one_line(folder.root), skip_bad)
    if len(images[0]) < 2 or len(images[1]) < 2:
        raise ValueError(
            f"{one_line(folder.root)} must hold at least 2 images in each part, got {len(images[0])} for "
            f"training and {len(images[1])} for testing{'; ' if note else ''}{note}"
        )
    return Loaded(images[0], labels[0], images[1], labels[1], (*folder.notes, *([note] if note else [])))


def _choose(files: Files, mask: Tensor) -> Files:
    return Files(tuple(files.paths[index] for index in mask.nonzero().flatten().tolist()), files.labels[mask])


def _read(
    folder: Folder, part: Files, size: int, keep: bool, threads: int, bad: list[BadFile], advance: Callable[[], object]
) -> tuple[Tensor | ImagesOnDisk, list[int]]:
    """Return the readable images of a part with their indices in the part, and append unreadable files to `bad`."""
    root = os.path.abspath(folder.root)  # the working directory may change before the files are read again
    kept = allocate((len(part.paths), 3, size, size), one_line(root)) if keep else None
    tally = Tally(3)
    good: list[int] = []
    paths = [os.path.join(root, path) for path in part.paths]
    for place, decoded in enumerate(decode_all(paths, size, threads)):
        advance()
        if isinstance(decoded, BadFile):
            bad.append(decoded._replace(path=part.paths[place]))
            continue
        if kept is None:
            tally.add(torch.from_numpy(decoded)[None])
        else:
            kept[len(good)] = torch.from_numpy(decoded)
        good.append(place)
    if kept is not None:
        return kept[: len(good)], good
    return ImagesOnDisk(root, tuple(part.paths[place] for place in good), size, threads, tally), good


def decode_all(paths: Sequence[str], size: int, threads: int) -> Iterator[Array | BadFile]:
    """Yield decoded files in order. Threads, if there are any, run a bounded number of files ahead."""
    groups = [paths[start : start + _GROUP] for start in range(0, len(paths), _GROUP)]

    def decode_group(group: Sequence[str]) -> list[Array | BadFile]:
        return [try_decode(path, size) for path in group]

    if threads == 0 or len(groups) < 2:
        for path in paths:
            yield try_decode(path, size)
        return
    pool = ThreadPoolExecutor(threads)
    try:
        running: deque[Future[list[Array | BadFile]]] = deque()
        for group in groups:
            running.append(pool.submit(decode_group, group))
            if len(running) > 2 * threads:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def told_bad(bad: Sequence[object], count: int, where: str, skip_bad: bool) -> str:
    """Return one line about the files that could not be read, or an empty string if there are none.

    Raises:
        ValueError: there are such files and `skip_bad` is off.
    """
    if not bad:
        return ""
    if skip_bad:
        return f"left out {len(bad)} of {count} images that cannot be read: {listed(bad, MANY)}"
    raise ValueError(
        f"{len(bad)} of {count} images of {where} cannot be read: {listed(bad, MANY)}; "
        f"{'it' if len(bad) == 1 else 'they'} can be skipped with --skip-bad (skip_bad=True)"
    )


@contextlib.contextmanager
def progress_bar(total: int | None, what: str) -> Iterator[Callable[[], object]]:
    """Show a progress bar on stderr, and yield a function that advances the bar by one.

    There is no bar if `total` is None or tqdm is missing.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        total = None
    if total is None:
        yield lambda: None
        return
    interval = 0.1 if sys.stderr.isatty() else 10  # keep log files short
    with tqdm(total=total, unit="image", dynamic_ncols=True, desc=what, mininterval=interval) as bar:
        yield bar.update
