"""Arrays of images, in any usual layout and dtype, as uint8 tensors (N, C, H, W)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .pixels import sixteen_to_eight
from .tally import BLOCK_BYTES, allocate

MIN_SIZE = 8

Array = np.ndarray[Any, Any]


class Rows(Protocol):
    """An array that is read a block of rows at a time."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def blocks(self) -> Iterator[Array]: ...


@dataclass(frozen=True)
class InMemory:
    """The rows of an array in memory."""

    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def blocks(self) -> Iterator[Array]:
        step = rows_per_block(self.shape, self.dtype)
        for start in range(0, len(self.array), step):
            yield self.array[start : start + step]


class Arrays(NamedTuple):
    """A data set as it was read, before its shapes and dtypes are checked.

    `where` names the file or folder in messages; it may be empty.
    """

    images: Rows
    labels: Array | None = None
    test_images: Rows | None = None
    test_labels: Array | None = None
    class_names: tuple[object, ...] = ()
    notes: tuple[str, ...] = ()
    where: str = ""

    def named(self, array: str) -> str:
        """Return the name of an array for messages."""
        return f"{self.where}: {array}" if self.where else array


def rows_per_block(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Return the number of rows in a block."""
    return max(1, BLOCK_BYTES // max(1, int(np.prod(shape[1:], dtype=object)) * dtype.itemsize))


def image_tensors(arrays: Arrays, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the training images and the test images.

    Args:
        arrays: the images, all of the same size. If the training and the test images are both floating-point, or both
            uint16, they are assumed to share one range of values.
        mask: boolean mask that selects the held-out images if there is no test part, else None.

    Raises:
        ValueError: a shape, dtype or range is not valid for images, or the result does not fit in memory.
    """
    named = _named(arrays)
    layouts = [_layout(name, rows.shape) for name, rows in named]
    train = layouts[0]
    conversions = _conversions(named)
    if mask is not None:
        kept, held_out = (_target(named[0][0], train, int(chosen.sum())) for chosen in (~mask, mask))
        _fill(arrays.images, train, conversions[0], [(~mask, kept), (mask, held_out)])
        return kept, held_out
    tensors = []
    for (name, rows), layout, convert in zip(named, layouts, conversions, strict=True):
        ready = _without_copy(rows, layout)
        if ready is None:
            ready = _target(name, layout, rows.shape[0])
            _fill(rows, layout, convert, [(torch.ones(len(ready), dtype=torch.bool), ready)])
        tensors.append(ready)
    return tensors[0], tensors[1]


def image_blocks(arrays: Arrays) -> tuple[tuple[int, int, int], Iterator[Tensor]]:
    """Return the shape (C, H, W) of each image in `arrays.images`, and an iterator over uint8 tensors, one per block.

    Raises:
        ValueError: a shape, dtype or range is not valid for images.
    """
    name, rows = _named(arrays)[0]
    layout = _layout(name, rows.shape, least=1)
    return layout.shape, _converted(rows, layout, _conversions(_named(arrays))[0])


def check_shapes(arrays: Arrays) -> None:
    """Raise ValueError unless the arrays are images of the same size, with the same number of channels."""
    named = _named(arrays)
    shapes = [_layout(name, rows.shape).shape for name, rows in named]
    if shapes[0] != shapes[-1]:
        raise ValueError(f"{named[1][0]} must have the same channels and size as images, {shapes[0]}, got {shapes[1]}")


def _named(arrays: Arrays) -> list[tuple[str, Rows]]:
    """Return the arrays of images, with their names for messages."""
    test = [] if arrays.test_images is None else [(arrays.named("test_images"), arrays.test_images)]
    return [(arrays.named("images"), arrays.images), *test]


class _Layout(NamedTuple):
    """Channels, height and width of an image, and whether the array has the channels last."""

    shape: tuple[int, int, int]
    channels_last: bool


def _layout(name: str, shape: tuple[int, ...], least: int = 2) -> _Layout:
    layout = None
    if len(shape) == 3:
        layout = _Layout((1, shape[1], shape[2]), False)
    elif len(shape) == 4 and shape[1] in (1, 3):
        layout = _Layout((shape[1], shape[2], shape[3]), False)
    elif len(shape) == 4 and shape[3] in (1, 3):
        layout = _Layout((shape[3], shape[1], shape[2]), True)
    if layout is None:
        raise ValueError(
            f"{name} must have the shape (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels, got {shape}"
        )
    if shape[0] < least or min(layout.shape[1:]) < MIN_SIZE:
        images = "2 images" if least == 2 else "1 image"
        raise ValueError(f"{name} must hold at least {images} of at least {MIN_SIZE} x {MIN_SIZE} pixels, got {shape}")
    return layout


def _target(name: str, layout: _Layout, count: int) -> Tensor:
    return allocate((count, *layout.shape), name)


def _without_copy(rows: Rows, layout: _Layout) -> Tensor | None:
    """Return the rows as a tensor that shares their memory, or None if they need a conversion or a copy."""
    if not isinstance(rows, InMemory) or layout.channels_last:
        return None
    array = rows.array
    if array.dtype != np.uint8 or not array.flags.c_contiguous or not array.flags.writeable:
        return None
    return torch.from_numpy(array).view(-1, *layout.shape)


def _fill(
    rows: Rows, layout: _Layout, convert: Callable[[Array], Array], targets: Sequence[tuple[Tensor, Tensor]]
) -> None:
    """Write the rows that each mask selects, in order, to the tensor paired with the mask."""
    start = 0
    filled = [0] * len(targets)
    for images in _converted(rows, layout, convert):
        for number, (mask, target) in enumerate(targets):
            chosen = images[mask[start : start + len(images)]]
            target[filled[number] : filled[number] + len(chosen)] = chosen
            filled[number] += len(chosen)
        start += len(images)


def _converted(rows: Rows, layout: _Layout, convert: Callable[[Array], Array]) -> Iterator[Tensor]:
    """Yield the rows as uint8 tensors (N, C, H, W)."""
    for block in rows.blocks():
        converted = convert(block).astype(np.uint8, copy=False)
        if layout.channels_last:
            converted = converted.transpose(0, 3, 1, 2)
        if not converted.flags.writeable:  # otherwise PyTorch would warn
            converted = converted.copy()
        yield torch.from_numpy(np.ascontiguousarray(converted)).view(-1, *layout.shape)


def _conversions(named: Sequence[tuple[str, Rows]]) -> list[Callable[[Array], Array]]:
    """Return the conversion of each array's values to 0..255. Floating-point arrays share one range, and so do uint16
    arrays."""
    ranges = {name: _range(rows) for name, rows in named if rows.dtype != np.uint8 and rows.dtype.kind in "fiu"}
    floats = [ranges[name] for name, rows in named if rows.dtype.kind == "f"]
    deep = [ranges[name] for name, rows in named if _is_deep(rows)]
    conversions: list[Callable[[Array], Array]] = []
    for name, rows in named:
        kind = rows.dtype.kind
        if kind == "f":
            low, high = ranges[name]
            if not (low >= 0 and high <= 255):
                raise ValueError(f"{name} of a floating dtype must lie in [0, 1] or [0, 255], got [{low:g}, {high:g}]")
            conversions.append(_scaled if max(top for _, top in floats) <= 1 else _rounded)
        elif _is_deep(rows) and max(top for _, top in deep) > 255:
            conversions.append(sixteen_to_eight)
        elif kind in "iu":
            low, high = ranges.get(name, (0, 255))
            if not (low >= 0 and high <= 255):
                raise ValueError(f"{name} of {rows.dtype} must lie in 0..255 (or be uint16), got {low}..{high}")
            conversions.append(_same)
        elif kind == "b":
            conversions.append(_black_and_white)
        else:
            raise ValueError(f"{name} must be integers, booleans or floats, got {rows.dtype}")
    return conversions


def _is_deep(rows: Rows) -> bool:
    return rows.dtype.kind == "u" and rows.dtype.itemsize == 2


def _range(rows: Rows) -> tuple[Any, Any]:
    """Return the smallest and the largest value; both are NaN if any value is NaN."""
    ends = [(block.min(), block.max()) for block in rows.blocks()]
    return np.min([low for low, _ in ends]), np.max([high for _, high in ends])


def _same(block: Array) -> Array:
    return block


def _black_and_white(block: Array) -> Array:
    return block.astype(np.uint8) * np.uint8(255)


def _rounded(block: Array) -> Array:
    return block.round()


def _scaled(block: Array) -> Array:
    wide = block if block.dtype.itemsize > 2 else block.astype(np.float32)
    return (wide * 255).round()
