"""Statistics and a checksum of all training images, gathered a block at a time."""

from __future__ import annotations

import zlib
from typing import Any, Protocol

import torch
from torch import Tensor

BLOCK_BYTES = 2**24


class Images(Protocol):
    """Images (N, C, H, W) indexed by a tensor of indices, a mask or a slice: a Tensor, or images read on demand."""

    @property
    def shape(self) -> torch.Size: ...

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Any, /) -> Tensor: ...


class Tally:
    """Histogram of each channel of uint8 images (N, C, H, W), and checksum of all their pixels in order."""

    def __init__(self, channels: int) -> None:
        self.counts = torch.zeros(channels, 256, dtype=torch.int64)
        self.checksum = 0

    def add(self, images: Tensor) -> None:
        """Add more images."""
        for counts, channel in zip(self.counts, images.unbind(1), strict=True):
            counts += torch.bincount(channel.flatten(), minlength=256)
        self.checksum = zlib.crc32(images.contiguous().numpy().data, self.checksum)

    def moments(self) -> tuple[list[float], list[float]]:
        """Return the mean and the standard deviation (at least 1e-3) of each channel, scaled to [0, 1]. Both are
        computed in float64 from the histogram."""
        levels = torch.arange(256, dtype=torch.float64) / 255
        weights = self.counts.double() / self.counts.sum(1, keepdim=True)
        mean = weights @ levels
        std = (weights @ levels.square() - mean.square()).clamp(min=0).sqrt()
        return mean.tolist(), std.clamp(min=1e-3).tolist()

    def brightest(self) -> int:
        """Return the largest value."""
        return int(self.counts.sum(0).nonzero().max())


def rows_per_block(shape: torch.Size) -> int:
    """Return the number of images of this shape in a block."""
    return max(1, BLOCK_BYTES // (shape[1] * shape[2] * shape[3]))


def tally(images: Images) -> Tally:
    """Return the tally of images. Images read on demand keep the tally of their first reading."""
    known = getattr(images, "tally", None)
    if isinstance(known, Tally):
        return known
    result = Tally(images.shape[1])
    step = rows_per_block(images.shape)
    for start in range(0, len(images), step):
        result.add(images[start : start + step])
    return result


def allocate(shape: tuple[int, ...], what: str) -> Tensor:
    """Return an uninitialised uint8 tensor; ValueError if it does not fit in memory."""
    try:
        return torch.empty(shape, dtype=torch.uint8)
    except (RuntimeError, MemoryError) as error:
        count = torch.Size(shape).numel()
        raise ValueError(
            f"{what}: {shape[0]} images take {count / 2**30:.1f} GiB, which cannot be allocated"
        ) from error
