"""One item of a dataset as uint8 pixels (C, H, W) and a label."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .pixels import Array, eight_bits, reason
from .tally import Tally

Shape = tuple[int, ...]


class Item(NamedTuple):
    """An image and its label, or a problem. `is_bad` means that reading failed, so the item may be left out."""

    image: Array | None
    label: int | str | None = None
    problem: str = ""
    is_bad: bool = False


class Labelled(Protocol):
    """A map-style dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def read_item(dataset: Any, index: int) -> Item:
    """Return an item of a dataset. An error becomes the item's `problem`, so it does not end the worker process."""
    try:
        value = dataset[index]
        image, label = _split(value)
        if _is_pillow(image):  # PIL images are decoded here
            image = _pixels_of_pillow(image)
    except _WrongKindError as error:
        return Item(None, problem=str(error))
    except Exception as error:
        return Item(None, problem=f"{type(error).__name__}: {reason(error)}", is_bad=True)
    try:
        return Item(_pixels(image), _label(label))
    except _WrongKindError as error:
        return Item(None, problem=str(error))


class _WrongKindError(Exception):
    """The item has the wrong type, shape or range, which no setting can fix."""


def _split(value: Any) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)):
        return value, None
    if not value:
        raise _WrongKindError("it must be an image or (image, label, ...), got an empty tuple or list")
    return value[0], value[1] if len(value) > 1 else None


def _is_pillow(image: Any) -> bool:
    return hasattr(image, "convert") and hasattr(image, "mode")


def _pixels_of_pillow(image: Any) -> Array:
    image = eight_bits(image)
    return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))


def _pixels(image: Any) -> Array:
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if not isinstance(image, np.ndarray):
        raise _WrongKindError(
            f"its image is a {type(image).__name__}, but it must be a PIL image, an array or a tensor (the item "
            "itself, or the first element of a tuple)"
        )
    if image.ndim == 2:
        image = image[None]
    elif image.ndim == 3 and image.shape[0] not in (1, 3) and image.shape[2] in (1, 3):
        image = image.transpose(2, 0, 1)
    if image.ndim != 3 or image.shape[0] not in (1, 3) or not image.size:
        raise _WrongKindError(
            f"its image must be (H, W), (H, W, C) or (C, H, W) with 1 or 3 channels, got {image.shape}"
        )
    if image.dtype.kind == "f":
        low, high = image.min(), image.max()
        if not (low >= 0 and high <= 1):
            raise _WrongKindError(
                f"its image is {image.dtype}, so it must lie in [0, 1], got [{low:g}, {high:g}]: leave Normalize out "
                "of the transform"
            )
        image = (image.astype(np.float32) * 255).round().astype(np.uint8)
    elif image.dtype != np.uint8:
        raise _WrongKindError(f"its image must be uint8, or floating-point in [0, 1], got {image.dtype}")
    return np.require(image, requirements=["C", "W"])  # PyTorch warns about arrays that are not writable


def _label(label: Any) -> int | str | None:
    if isinstance(label, (Tensor, np.ndarray)):
        if label.size != 1 if isinstance(label, np.ndarray) else label.numel() != 1:
            raise _WrongKindError(f"its label must be one integer or string, got the shape {tuple(label.shape)}")
        label = label.item()
    if isinstance(label, (float, np.floating)) and float(label).is_integer():
        return int(label)
    if isinstance(label, (int, np.integer)):
        return int(label)
    if label is None or isinstance(label, str):
        return label
    raise _WrongKindError(f"its label must be an integer, string or None, got {label!r:.60} of {type(label).__name__}")


def require_sound(item: Item, index: int, what: str, shape: Shape) -> None:
    """Raise ValueError for an item of the wrong type or size. An item that could not be read passes."""
    if item.image is None and not item.is_bad:
        raise ValueError(f"item {index} of {what}: {item.problem}")
    if item.image is not None and item.image.shape != shape:
        advice = (
            "end the transform with Resize((H, W))"
            if item.image.shape[1:] != shape[1:]
            else "convert all images to RGB or all to grey"
        )
        raise ValueError(
            f"all images must have the same size, but item {index} of {what} is {item.image.shape} and the first is "
            f"{shape} (channels, height, width): {advice}"
        )


@dataclass(frozen=True)
class ImagesOfDataset:
    """Items of a dataset as uint8 images (N, C, H, W), read each time they are indexed.

    Args:
        dataset: the dataset.
        places: indices of the items, int64 (N,).
        image_shape: channels, height and width of each image.
        tally: histogram and checksum of all images, if known.
    """

    dataset: Labelled = field(repr=False)
    places: Tensor = field(repr=False)
    image_shape: Shape
    tally: Tally | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.places), *self.image_shape))

    def __getitem__(self, indices: Any, /) -> Tensor:
        """Return the images that a tensor of indices, a mask or a slice selects.

        Raises:
            ValueError: an item can no longer be read, or its size has changed.
        """
        chosen = self.places[indices]
        images = torch.empty((chosen.numel(), *self.image_shape), dtype=torch.uint8)
        for image, index in zip(images, chosen.flatten().tolist(), strict=True):
            item = read_item(self.dataset, index)
            require_sound(item, index, "the dataset", self.image_shape)
            if item.image is None:
                raise ValueError(f"item {index} of the dataset can no longer be read: {item.problem}")
            image.copy_(torch.from_numpy(item.image))
        return images.view(*chosen.shape, *self.image_shape)
