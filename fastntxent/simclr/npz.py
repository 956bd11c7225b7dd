"""Arrays of an .npz file, read a block at a time. Pickled objects, which could run code, are never read."""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from .arrays import Array, Arrays, rows_per_block
from .notes import listed, one_line
from .pixels import reason

# Each row has the names of six arrays: images and labels for training, for testing and for validation. The first row
# has this package's names, the second MedMNIST's, and the third Keras's.
KEYS = (
    ("images", "labels", "test_images", "test_labels", "val_images", "val_labels"),
    ("train_images", "train_labels", "test_images", "test_labels", "val_images", "val_labels"),
    ("x_train", "y_train", "x_test", "y_test", "x_val", "y_val"),
)
_CLASS_NAMES = "class_names"


def open_npz(path: Path) -> Arrays:
    """Return the arrays of an .npz file, found by their usual names.

    If there are no test images, the validation images take their place.

    Raises:
        ValueError: the file is damaged, is not an .npz file, or has no array of images.
    """
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise ValueError(f"--data npz needs an .npz file as its --data-dir, but {one_line(path)} is {kind}")
    members = _members(path)
    plain = {name.lower(): name for name in members}
    keys = next((keys for keys in KEYS if keys[0] in plain), None)
    if keys is None:
        raise ValueError(
            f"{one_line(path)} must hold an array `images` (or train_images, or x_train), found "
            f"{listed(list(members)) or 'nothing'}"
        )
    images, labels, test_images, test_labels, val_images, val_labels = (plain.get(key) for key in keys)
    notes = []
    if test_images is None:
        if test_labels is not None:
            raise ValueError(f"{one_line(path)} holds {test_labels}, but no {keys[2]}")
        test_images, test_labels, val_images, val_labels = val_images, val_labels, None, None
    if test_images is not None and (labels is None) != (test_labels is None):
        missing, there = (keys[1], test_labels) if labels is None else (keys[3], labels)
        notes.append(f"found {there} but no {missing}: accuracies need the labels of both parts")
    used = {images, labels, test_images, test_labels, plain.get(_CLASS_NAMES)}
    unused = [name for name in members if name not in used]
    if unused:
        notes.append(f"did not read {listed(unused)}")

    def whole(name: str | None) -> Array | None:
        return None if name is None else members[name].read()

    assert images is not None
    class_names = whole(plain.get(_CLASS_NAMES))
    return Arrays(
        members[images],
        whole(labels),
        None if test_images is None else members[test_images],
        whole(test_labels),
        () if class_names is None else _texts(f"{one_line(path)}: class_names", class_names),
        tuple(notes),
        one_line(path),
    )


def _texts(what: str, names: Array) -> tuple[str, ...]:
    if names.ndim != 1 or names.dtype.kind not in "US" or not names.size:
        raise ValueError(f"{what} must be strings (C,), got {names.dtype} of shape {names.shape}")
    return tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in names.tolist())


@dataclass(frozen=True)
class Member:
    """One array of an .npz file. Its values are read only by `blocks` and `read`."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool
    offset: int

    def blocks(self) -> Iterator[Array]:
        """Yield blocks of rows, read from the file. An array in Fortran order is a single block.

        Raises:
            ValueError: the file is damaged.
        """
        if self.is_fortran:
            yield self.read()
            return
        step = rows_per_block(self.shape, self.dtype)
        with _words(self.path), _open(self.path, self.name) as file:
            file.read(self.offset)
            for start in range(0, self.shape[0], step):
                shape = (min(step, self.shape[0] - start), *self.shape[1:])
                yield self._block(file, shape)
            file.read(1)  # reading past the last byte checks the checksum

    def read(self) -> Array:
        """Return the whole array."""
        with _words(self.path), _open(self.path, self.name) as file:
            file.read(self.offset)
            values = self._block(file, self.shape[::-1] if self.is_fortran else self.shape)
            file.read(1)
        return values.transpose() if self.is_fortran else values

    def _block(self, file: IO[bytes], shape: tuple[int, ...]) -> Array:
        count = math.prod(shape)
        content = file.read(count * self.dtype.itemsize)
        # Convert to native byte order.
        return np.frombuffer(content, self.dtype, count).reshape(shape).astype(self.dtype.newbyteorder("="), copy=False)


def _members(path: Path) -> dict[str, Member]:
    """Return every array of a file, by name."""
    with path.open("rb") as file:
        start = file.read(6)
    if not start:
        raise ValueError(f"{one_line(path)} is empty, not an .npz file")
    if start == b"\x93NUMPY":
        raise ValueError(
            f"{one_line(path)} is an .npy file, one array without a name: use np.savez(path, images=..., labels=...)"
        )
    members = {}
    with _words(path), zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if b"PK\1\2" in info.comment + info.extra:  # a damaged length makes one entry contain the next
                raise ValueError("its directory is damaged")
            name = info.filename.removesuffix(".npy")
            with archive.open(info) as file:  # also checks the name against its copy beside the data
                if name != info.filename:
                    members[name] = _header(path, name, file, info.file_size)
    return members


def _header(path: Path, name: str, file: IO[bytes], size: int) -> Member:
    """Return the array whose header begins at the file's position; ValueError if the header does not match the file."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"array {name} has the unknown format {version}")
    if dtype.hasobject or dtype.itemsize == 0:
        raise ValueError(f"array {name} holds {dtype}, not plain numbers or text")
    offset = file.tell()
    if offset + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"array {name} does not have the size given in its header")
    return Member(path, name, shape, dtype, is_fortran, offset)


@contextlib.contextmanager
def _open(path: Path, name: str) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        yield file


@contextlib.contextmanager
def _words(path: Path) -> Iterator[None]:
    """In this block, turn any error into a ValueError that names the file. Damaged files raise errors of many types."""
    try:
        yield
    except Exception as error:
        # NumPy's own message advises allow_pickle=True, which can run code from the file.
        why = "a header is too long" if "allow_pickle" in str(error) else reason(error)
        raise ValueError(f"{one_line(path)} cannot be read as an .npz file of plain arrays: {why}") from error
