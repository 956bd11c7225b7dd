"""The input of each training step: two views of every image in this rank's part of the batch.

`OwnOrder` draws the batches from a data set. A generator seeded by (seed, epoch) gives the image order, and one seeded
by (seed, step) gives the views. `LoaderOrder` takes the batches of a user's DataLoader in the loader's order.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Generator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .augment import PRESETS, two_views
from .config import Config
from .data import ImageData
from .images import default_threads
from .loader import LoaderData
from .ranks import Ranks
from .stopping import ignore_signals, read
from .stream import stream
from .tally import Images


class Views(NamedTuple):
    """This rank's part of one step.

    Attributes:
        first, second: two views of each image, (N, C, H, W), with values in [0, 1]. A DataLoader that makes its own
            views may use other values.
        chunks: sizes of the consecutive chunks in which the N images are encoded; one chunk without --accumulate-batch.
    """

    first: Tensor
    second: Tensor
    chunks: list[int]


class Feed(Protocol):
    """The steps of a run.

    Attributes:
        batch: images per step, on all ranks together; the last step of an epoch may have fewer.
        steps_per_epoch: steps in one pass over the images.
        workers: worker processes that read images ahead of the step.
    """

    batch: int
    steps_per_epoch: int
    workers: int

    def steps(self, start: int, stop: int) -> Generator[Views, None, None]:
        """Yield the steps `start` to `stop - 1`."""
        ...


def make_feed(config: Config, data: ImageData | LoaderData, ranks: Ranks, device: torch.device) -> Feed:
    """Return the feed of a run; ValueError if the settings do not suit the data."""
    if isinstance(data, LoaderData):
        return LoaderOrder(config, data, ranks, device)
    return OwnOrder(config, data, ranks, device)


class _Pixels(Dataset[Any]):
    """Images for worker processes, as arrays. Arrays travel through a pipe, whereas tensors would need more shared
    memory than many containers have."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, indices: Tensor) -> Any:
        return self.images[indices].numpy()


def _as_it_is(pixels: Any) -> Any:
    return pixels


class OwnOrder:
    """Batches of a data set, the same for any number of ranks."""

    def __init__(self, config: Config, data: ImageData, ranks: Ranks, device: torch.device) -> None:
        self.config = config
        self.images = data.train_images
        self.ranks = ranks
        self.device = device
        n = len(self.images)
        self.batch = min(config.batch, n)
        # A last batch of one image is dropped: it has no negatives, and no variance for BatchNorm.
        self.steps_per_epoch = n // self.batch + (n % self.batch >= 2)
        on_disk = not isinstance(self.images, Tensor)
        self.workers = (default_threads() if on_disk else 0) if config.workers is None else config.workers

    def steps(self, start: int, stop: int) -> Generator[Views, None, None]:
        """Yield the steps `start` to `stop - 1`. They depend only on the settings and the data."""
        reader: DataLoader[Any] = DataLoader(
            _Pixels(self.images),
            sampler=(self._indices(step)[self._rows(step)] for step in range(start, stop)),
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # otherwise the loader would draw from the global one
            collate_fn=_as_it_is,
        )
        for step, images in zip(range(start, stop), read(reader), strict=True):
            preset, generator = PRESETS[self.config.preset], stream(self.config.seed, "views", step)
            pixels = torch.from_numpy(images).to(self.device, non_blocking=True)
            n, rows = len(self._indices(step)), self._rows(step)
            views = two_views(pixels, preset, generator, rows=rows, batch=n)
            yield Views(*views, [len(part) for part in self._parts(n)])

    def _indices(self, step: int) -> Tensor:
        """Return the indices of a step's images, over all ranks."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[position * self.batch : (position + 1) * self.batch]

    @functools.lru_cache(maxsize=2)  # noqa: B019  # the reader may be one epoch ahead of the step
    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.images), generator=stream(self.config.seed, "order", epoch))

    def _rows(self, step: int) -> Tensor:
        """Return the indices of this rank's images within the batch of a step."""
        return torch.cat(self._parts(len(self._indices(step))))

    def _parts(self, n: int) -> list[Tensor]:
        """Return, for each chunk of a batch of n images, the indices of the images that this rank encodes."""
        config = self.config
        chunk = even_chunk(n, config.chunk or config.batch_size) if config.accumulate_batch else n
        return [self.ranks.part(places) for places in torch.arange(n).split(chunk)]


class LoaderOrder:
    """Batches of a DataLoader, one loader per rank.

    A resumed run sees the batches of an uninterrupted run only if the loader yields the same batches again.
    """

    def __init__(self, config: Config, data: LoaderData, ranks: Ranks, device: torch.device) -> None:
        if config.accumulate_batch:
            raise ValueError("--accumulate-batch needs a data set; a DataLoader determines its batches itself")
        self.config = config
        self.data = data
        self.ranks = ranks
        self.device = device
        self.batch = data.batch * ranks.world
        self.steps_per_epoch = data.steps_per_epoch
        self.workers = data.loader.num_workers

    def steps(self, start: int, stop: int) -> Generator[Views, None, None]:
        """Yield the steps `start` to `stop - 1`. If `start` lies within an epoch, the earlier batches of that epoch are
        read and dropped."""
        step = start
        while step < stop:
            epoch, done = divmod(step, self.steps_per_epoch)
            self.data.set_epoch(epoch)
            for batch in itertools.islice(read(self.data.loader), done, self.steps_per_epoch):
                if step == stop:
                    return
                yield self._views(batch, step)
                step += 1
            if step % self.steps_per_epoch:
                raise ValueError(
                    f"the DataLoader must yield {self.steps_per_epoch} batches per epoch, as its length says, but "
                    f"ended after {step % self.steps_per_epoch}"
                )

    def _views(self, batch: Any, step: int) -> Views:
        images = self.data.images_of(batch)
        if isinstance(images, tuple):
            first, second = (view.to(self.device, non_blocking=True) for view in images)
        else:
            generator = stream(self.config.seed, f"views of rank {self.ranks.rank}", step)
            first, second = two_views(images.to(self.device), PRESETS[self.config.preset], generator)
        return Views(first, second, [len(first)])


def even_chunk(n: int, chunk: int) -> int:
    """Return the largest chunk size up to `chunk` that leaves no chunk of one row, which BatchNorm cannot use.

    If there is none (as for chunks of 2 and an odd n), return the next larger size that works.
    """
    chunk = min(chunk, n)
    sizes = itertools.chain(range(chunk, 1, -1), range(chunk, n + 1))
    return next(size for size in sizes if n % size != 1)
