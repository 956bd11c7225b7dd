import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from fastntxent.simclr import ImageData, images
from fastntxent.simclr.items import ImagesOfDataset

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 10, 12, 3)).astype(np.uint8)
CHANNELS_FIRST = torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy())
LABELS = [index % 2 for index in range(20)]


class Items(Dataset):
    """A map-style dataset of the given items. An item that is an exception is raised when it is read."""

    classes: list[str]

    def __init__(self, items):
        self.items = list(items)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


def both(data):
    return torch.cat((data.train_images[:], data.test_images[:]))


FORMS = {
    "PIL": Image.fromarray,
    "array (H, W, C)": lambda pixels: pixels,
    "array (C, H, W)": lambda pixels: pixels.transpose(2, 0, 1),
    "tensor (C, H, W)": lambda pixels: torch.from_numpy(pixels.transpose(2, 0, 1).copy()),
    "tensor (H, W, C)": torch.from_numpy,
    "float tensor": lambda pixels: torch.from_numpy(pixels.transpose(2, 0, 1) / np.float32(255)),
    "double array": lambda pixels: pixels / 255,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("in_memory", ["yes", "no"])
def test_from_datasets_takes_images_of_any_form(form, in_memory):
    items = Items((FORMS[form](pixels), label) for pixels, label in zip(PIXELS, LABELS, strict=True))
    data = ImageData.from_datasets(items, items, in_memory=in_memory)
    assert torch.equal(data.train_images[:], CHANNELS_FIRST)
    assert torch.equal(data.test_images[:], CHANNELS_FIRST)
    assert data.train_labels.tolist() == LABELS
    assert isinstance(data.train_images, torch.Tensor) == (in_memory == "yes")


@pytest.mark.parametrize("form", ["PIL", "array", "tensor"])
def test_from_datasets_takes_grey_images(form):
    grey = PIXELS[..., 0]
    made = {"PIL": Image.fromarray, "array": lambda x: x, "tensor": torch.from_numpy}[form]
    data = ImageData.from_datasets(Items(map(made, grey)), Items(map(made, grey)))
    assert torch.equal(data.train_images[:, 0], torch.from_numpy(grey))
    assert not data.is_labelled


def test_from_datasets_scales_16_bit_pillow_images():
    deep = np.random.default_rng(0).integers(0, 65536, (5, 9, 9)).astype(np.uint16)
    data = ImageData.from_datasets(Items(map(Image.fromarray, deep)), Items(map(Image.fromarray, deep)))
    assert np.abs(data.train_images[:, 0].numpy() - deep / 257).max() <= 0.51


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([5, 7] * 10, ("5", "7"), [0, 1]),
        (["cat", "ant"] * 10, ("ant", "cat"), [1, 0]),
        ([torch.tensor(3), torch.tensor([4])] * 10, ("3", "4"), [0, 1]),
        ([np.int64(3), np.array([4])] * 10, ("3", "4"), [0, 1]),
        ([1.0, 0.0] * 10, ("0", "1"), [1, 0]),
        ([None, 2] * 10, ("2",), [-1, 0]),
        ([None, "x"] * 10, ("x",), [-1, 0]),
        ([None] * 20, (), [-1, -1]),
    ],
)
def test_from_datasets_takes_labels_of_any_kind(labels, names, numbers):
    items = Items(zip(CHANNELS_FIRST, labels, ["ignored"] * 20, strict=True))
    data = ImageData.from_datasets(items, items)
    assert data.class_names == names
    assert data.train_labels[:2].tolist() == numbers


def test_from_datasets_takes_class_names_from_the_argument_or_the_dataset():
    items = Items(zip(CHANNELS_FIRST, LABELS, strict=True))
    assert ImageData.from_datasets(items, class_names=["x", "y", "z"]).class_names == ("x", "y", "z")
    items.classes = ["dog", "cat", "ant"]
    assert ImageData.from_datasets(items).class_names == ("dog", "cat", "ant")
    items.classes = ["only one"]
    assert ImageData.from_datasets(items).class_names == ("0", "1")
    with pytest.raises(ValueError, match=r"the labels of train must be among the 1 class names .* got 1"):
        ImageData.from_datasets(items, class_names=["x"])


@pytest.mark.parametrize("in_memory", ["yes", "no"])
@pytest.mark.parametrize("workers", [0, 2])
def test_from_datasets_holds_out_a_fixed_fifth_of_each_class(in_memory, workers):
    labels = torch.tensor(LABELS)
    before = torch.get_rng_state()
    data = ImageData.from_datasets(TensorDataset(CHANNELS_FIRST, labels), in_memory=in_memory, workers=workers)
    assert torch.equal(torch.get_rng_state(), before)
    order = np.random.default_rng(0).permutation(20)
    mask = torch.zeros(20, dtype=torch.bool)
    for label in (0, 1):
        mask[[i for i in order if LABELS[i] == label][:2]] = True
    expected = ImageData("x", CHANNELS_FIRST[~mask], labels[~mask], CHANNELS_FIRST[mask], labels[mask], ("0", "1"))
    assert torch.equal(data.train_images[:], expected.train_images)
    assert torch.equal(data.test_images[:], expected.test_images)
    assert data.test_labels.tolist() == expected.test_labels.tolist()
    assert data.fingerprint() == expected.fingerprint()
    assert data.channel_moments() == expected.channel_moments()


def test_images_of_a_dataset_are_indexed_like_a_tensor(monkeypatch):
    monkeypatch.setattr(images, "MEMORY_LIMIT", 100)
    stored = ImageData.from_datasets(TensorDataset(CHANNELS_FIRST), TensorDataset(CHANNELS_FIRST)).train_images
    assert isinstance(stored, ImagesOfDataset)
    assert stored.shape == CHANNELS_FIRST.shape
    stored = pickle.loads(pickle.dumps(stored))
    for indices in (torch.tensor([5, 0, -1]), torch.tensor(LABELS) == 1, slice(3, 7)):
        assert torch.equal(stored[indices], CHANNELS_FIRST[indices])


def test_images_of_a_dataset_report_an_item_that_changed():
    items = Items(CHANNELS_FIRST)
    images: Any = ImageData.from_datasets(items, in_memory="no").train_images
    first = int(images.places[0])
    items.items[first] = OSError("the disk is gone")
    with pytest.raises(ValueError, match=f"item {first} of the dataset can no longer be read: OSError: the disk"):
        images[:1]
    items.items[first] = CHANNELS_FIRST[0, :, :5]
    with pytest.raises(ValueError, match=f"all images must have the same size, but item {first} of the dataset"):
        images[:1]


@pytest.mark.parametrize("workers", [0, 2])
def test_from_datasets_names_all_bad_items_at_once(workers):
    items: list[Any] = list(zip(CHANNELS_FIRST, LABELS, strict=True))
    items[3], items[11] = KeyError("no such key"), ZeroDivisionError()
    with pytest.raises(ValueError, match="2 of 20 images of mine cannot be read") as caught:
        ImageData.from_datasets(Items(items), name="mine", workers=workers)
    assert "item 3 of train (KeyError: 'no such key'), item 11 of train (ZeroDivisionError" in str(caught.value)
    data = ImageData.from_datasets(Items(items), skip_bad=True, workers=workers)
    assert len(both(data)) == 18
    assert data.notes[0].startswith("left out 2 of 20 images that cannot be read: item 3 of train")


def test_from_datasets_counts_a_truncated_file_as_a_bad_item(tmp_path):
    Image.fromarray(PIXELS[0]).save(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:200])
    items = [*map(Image.fromarray, PIXELS), Image.open(tmp_path / "x.png")]
    with pytest.raises(ValueError, match="1 of 21 images of dataset cannot be read: item 20 of train"):
        ImageData.from_datasets(Items(items))


IMAGE = CHANNELS_FIRST[0]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"image": IMAGE}, "item 4 of train: its image is a dict, but it must be a PIL image, an array or a tensor"),
        (((IMAGE, IMAGE), 0), "item 4 of train: its image is a tuple"),
        ((), "item 4 of train: it must be .* got an empty tuple"),
        (IMAGE.float(), r"item 4 of train: its image is float32, .*\[0, 1\], got .*leave Normalize out"),
        (IMAGE / 128 - 1, r"must lie in \[0, 1\]"),
        (IMAGE * float("nan"), r"must lie in \[0, 1\], got \[nan, nan\]"),
        (IMAGE.long(), "must be uint8, or floating-point in .*, got int64"),
        (IMAGE[None], r"must be \(H, W\), \(H, W, C\) or \(C, H, W\) with 1 or 3 channels, got \(1, 3, 10, 12\)"),
        (torch.zeros(2, 9, 9), "with 1 or 3 channels"),
        ((IMAGE, {"boxes": []}), "its label must be an integer, string or None, got {'boxes': \\[\\]} of dict"),
        ((IMAGE, 0.5), "its label must be an integer"),
        ((IMAGE, torch.zeros(3)), r"its label must be one integer or string, got the shape \(3,\)"),
        (IMAGE[:, :9], r"item 4 of train is \(3, 9, 12\) and the first is \(3, 10, 12\) .*Resize"),
        (IMAGE[:1], r"item 4 of train is \(1, 10, 12\) and the first is \(3, 10, 12\) .*convert all images to RGB"),
    ],
)
@pytest.mark.parametrize("skip_bad", [False, True])
def test_from_datasets_refuses_items_of_the_wrong_kind(item, message, skip_bad):
    items = list(CHANNELS_FIRST)
    items[4] = item
    with pytest.raises(ValueError, match=message):
        ImageData.from_datasets(Items(items), skip_bad=skip_bad)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(CHANNELS_FIRST)


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (Stream(), TypeError, "train must be a map-style dataset, .*, got an IterableDataset"),
        (DataLoader(Stream()), TypeError, "train must be a map-style dataset, .*, got an IterableDataset"),
        (iter(CHANNELS_FIRST), TypeError, r"train must be a map-style dataset, with len\(\) and \[index\], got"),
        ({"a": IMAGE}, TypeError, "map-style dataset, .* got dict"),
        (Items([]), ValueError, "train is empty"),
        (Items([KeyError("x")] * 3), ValueError, "no item of train can be read; the last error is KeyError: 'x'"),
        (Items(list(CHANNELS_FIRST[:4])), ValueError, "4 images are too few to hold out a fifth"),
        (Items(list(CHANNELS_FIRST[:, :, :5])), ValueError, "at least 8 x 8 pixels"),
        (Items([(IMAGE, 1), (IMAGE, "x")]), ValueError, "the labels of train must be all integers or all strings"),
        (Items([(IMAGE, 2**63), (IMAGE, 0)]), ValueError, r"less than 2\^63, got 9223372036854775808"),
        (DataLoader(Items([]), sampler=SubsetRandomSampler([1])), ValueError, "a custom sampler"),
    ],
)
def test_from_datasets_refuses_unusable_datasets(dataset, error, message):
    with pytest.raises(error, match=message):
        ImageData.from_datasets(dataset)


def test_from_datasets_refuses_test_images_of_a_different_size():
    with pytest.raises(ValueError, match=r"item 0 of test is \(3, 9, 12\) and the first is \(3, 10, 12\)"):
        ImageData.from_datasets(Items(CHANNELS_FIRST), Items(CHANNELS_FIRST[:, :, :9]))


def test_from_datasets_reads_the_dataset_of_a_loader():
    subset = Subset(TensorDataset(CHANNELS_FIRST, torch.tensor(LABELS)), range(10))
    data = ImageData.from_datasets(DataLoader(subset, batch_size=4, shuffle=True), DataLoader(subset))
    assert torch.equal(data.train_images[:], CHANNELS_FIRST[:10])


class Random(Items):
    def __getitem__(self, index):
        return torch.randint(0, 256, (3, 9, 9), dtype=torch.uint8)


def test_from_datasets_notes_that_transforms_are_random():
    (note,) = ImageData.from_datasets(Random(range(20))).notes
    assert note.startswith("item 0 of train is a different image each time it is read: leave random transforms out")
