"""Decodes an image file to 8-bit RGB pixels: the centre square, resized and turned upright."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .notes import one_line
from .optional import require

Array = np.ndarray[Any, Any]

# A JPEG is decoded at the smallest scale (1, 1/2, 1/4, 1/8) at which its sides are at least _DRAFT times the result's
# side. With a factor of 2, the result differs from that of a full decode by at most 2 of 255 levels, and by 0.2 on
# average. This was measured on images of 1,000 to 4,000 pixels a side, resized to 32, 64 and 224.
_DRAFT = 2
# Pillow's names for the operations that turn an image upright, by EXIF orientation.
_ORIENTATION = 0x0112
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip
_REASON_LENGTH = 120


class BadFile(NamedTuple):
    """A file or folder that could not be read, and the reason."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{one_line(self.path)} ({self.reason})"


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Silence warnings in this block. Pillow warns about large images and odd metadata, which are acceptable here.

    Warning filters are shared by all threads, so enter this block around the decoding threads, not inside them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def try_decode(path: str, size: int) -> Array | BadFile:
    """Return `decode(path, size)`, or a BadFile if it raises."""
    try:
        return decode(path, size)
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, MemoryError, ...
        return BadFile(path, reason(error))


def decode(path: str, size: int) -> Array:
    """Return the image's centre square, upright and resized, as uint8 (3, size, size)."""
    image_module = require("PIL.Image")
    with image_module.open(path) as image:
        drafted = image.draft("RGB", (_DRAFT * size, _DRAFT * size))
        pixels = eight_bits(image).convert("RGB")
        turn = _TURNS.get(_orientation(image))
    # The exact size of a JPEG that is decoded at a smaller scale may be a fraction: the image then ends inside the last
    # row or column of pixels. A crop computed from the rounded size would be shifted.
    width, height = drafted[1][2:] if drafted else pixels.size
    side = min(width, height)
    box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    square = pixels.resize((size, size), image_module.BICUBIC, box)
    if turn:
        square = square.transpose(getattr(image_module, turn))
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def eight_bits(image: Any) -> Any:
    """Convert a Pillow image with more than 8 bits per channel to mode "L". Return any other image unchanged.

    Pillow's own conversion would clip values above 255.

    Raises:
        ValueError: 32-bit integers outside 0..65535, or floating-point values outside [0, 1].
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):
            raise ValueError(f"its floating-point values must lie in [0, 1], got [{low:g}, {high:g}]")
        scaled = (values * np.float32(255)).round()
    else:
        if not (low >= 0 and high <= 65535):
            raise ValueError(f"its integers must lie in 0..65535, got {low}..{high}")
        scaled = sixteen_to_eight(values)
    return require("PIL.Image").fromarray(scaled.astype(np.uint8))


def sixteen_to_eight(values: Array) -> Array:
    """Return integers in 0..65535 divided by 257 and rounded."""
    return (values.astype(np.uint32) + 128) // 257


def _orientation(image: Any) -> int:
    """Return the EXIF orientation of a loaded image, or 1 (upright) if its EXIF cannot be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # the pixels are still good, and viewers show them
        return 1


def reason(error: BaseException) -> str:
    """Return the reason why a file cannot be read, in a few words."""
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image of a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(one_line(error).split())
    if isinstance(error, MemoryError):
        text = "not enough memory"
    return text[:_REASON_LENGTH] or type(error).__name__
