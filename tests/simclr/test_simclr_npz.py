import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch

from fastntxent.simclr import load_data


def load(path):
    return load_data("npz", path)


@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_npz_takes_every_layout(tmp_path, layout, dtype):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 12, 10)).astype(np.uint8)
    channels = pixels[:, :1] if layout == "NHW" else pixels
    stored = {"NHW": channels[:, 0], "NHWC": channels.transpose(0, 2, 3, 1), "NCHW": channels}[layout]
    images = stored / np.float32(255) if dtype == np.float32 else stored
    np.savez(tmp_path / "d.npz", images=images, labels=np.arange(20) % 2, test_images=images[:4])
    data = load(tmp_path / "d.npz")
    assert torch.equal(data.train_images, torch.from_numpy(channels))
    assert torch.equal(data.test_images, torch.from_numpy(channels[:4]))
    assert not data.is_labelled, "the test images came without labels"


IMAGES = np.zeros((10, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": IMAGES}, r"must hold an array `images` \(or train_images, or x_train\), found pictures"),
        ({"images": IMAGES[0]}, r"got \(8, 8\)"),
        ({"images": np.zeros((10, 8, 8, 5), np.uint8)}, "1 or 3 channels"),
        ({"images": np.zeros((10, 4, 4), np.uint8)}, "8 x 8 pixels"),
        ({"images": IMAGES.astype(np.int64) - 1}, r"images of int64 must lie in 0..255 \(or be uint16\), got -1..-1"),
        ({"images": IMAGES - 1.5}, r"must lie in \[0, 1\] or \[0, 255\], got \[-1.5, -1.5\]"),
        ({"images": np.full((10, 8, 8), np.nan)}, "must lie in"),
        (
            {"images": IMAGES, "labels": np.zeros(9, int)},
            "labels must be 10 integers or strings, got int64 of",
        ),
        ({"images": IMAGES, "labels": np.full(10, 0.5)}, "labels must be 10 whole numbers or strings, got 0.5"),
        ({"images": IMAGES, "labels": np.arange(10)}, "too few to hold out a fifth"),
        (
            {"images": IMAGES, "test_images": np.zeros((10, 9, 9), np.uint8)},
            "test_images must have the same channels and size as images",
        ),
        ({"images": np.array([None] * 10)}, "cannot be read as an .npz file of plain arrays"),
    ],
)
def test_npz_refuses_arrays_that_are_not_a_data_set(tmp_path, arrays, message):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "d.npz")


def test_npz_refuses_a_file_of_a_different_kind(tmp_path):
    (tmp_path / "d.npz").write_bytes(b"text")
    with pytest.raises(ValueError, match="cannot be read as an"):
        load(tmp_path / "d.npz")


RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (20, 3, 12, 10)).astype(np.uint8)


def loaded(tmp_path, **arrays):
    np.savez(tmp_path / "d.npz", **arrays)
    return load(tmp_path / "d.npz")


@pytest.mark.parametrize("dtype", [np.int8, np.int16, ">i4", np.int64, np.uint16, ">u2", np.uint32, np.uint64])
def test_npz_takes_integers_of_every_kind(tmp_path, dtype):
    pixels = np.minimum(PIXELS, 127) if dtype == np.int8 else PIXELS
    data = loaded(tmp_path, images=pixels.astype(dtype), test_images=pixels[:4])
    assert torch.equal(data.train_images, torch.from_numpy(pixels))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ">f4", np.float64, np.longdouble])
@pytest.mark.parametrize("top", [1, 255])
def test_npz_takes_floats_of_every_kind(tmp_path, dtype, top):
    stored = (PIXELS * np.float64(top / 255)).astype(dtype)
    data = loaded(tmp_path, images=stored, test_images=stored[:2])
    assert torch.equal(data.train_images, torch.from_numpy(PIXELS))


def test_npz_takes_boolean_images_as_black_and_white(tmp_path):
    data = loaded(tmp_path, images=PIXELS > 99, test_images=PIXELS[:4] > 99)
    assert torch.equal(data.train_images, torch.from_numpy(np.where(PIXELS > 99, 255, 0).astype(np.uint8)))


def test_npz_scales_16_bit_images_of_both_parts_alike(tmp_path):
    deep = RANDOM.integers(0, 65536, (10, 8, 8)).astype(np.uint16)
    dark = np.full((2, 8, 8), 200, np.uint16)
    data = loaded(tmp_path, images=deep, test_images=dark)
    assert torch.equal(data.train_images[:, 0], torch.from_numpy((deep / 257).round().astype(np.uint8)))
    assert (data.test_images == 1).all(), "the test images should be scaled like the training images, by 65535"


def test_npz_takes_the_range_of_floats_from_both_parts(tmp_path):
    data = loaded(tmp_path, images=PIXELS.astype(np.float32), test_images=np.ones((2, 3, 12, 10), np.float32))
    assert (data.test_images == 1).all()


def test_npz_holds_out_a_fixed_fifth_of_each_class(tmp_path):
    labels = np.arange(20) % 2
    data = loaded(tmp_path, images=PIXELS, labels=labels)
    order = np.random.default_rng(0).permutation(20)
    mask = np.zeros(20, bool)
    for label in (0, 1):
        mask[[i for i in order if labels[i] == label][:2]] = True
    assert torch.equal(data.train_images, torch.from_numpy(PIXELS[~mask]))
    assert torch.equal(data.test_images, torch.from_numpy(PIXELS[mask]))
    assert data.train_labels.tolist() == labels[~mask].tolist()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_correctly_in_small_blocks_and_in_fortran_order(tmp_path, save, monkeypatch):
    monkeypatch.setattr("fastntxent.simclr.arrays.BLOCK_BYTES", 1000)  # a block is one float64 image
    save(tmp_path / "d.npz", images=np.asfortranarray(PIXELS), test_images=PIXELS[:7].astype(np.float64))
    data = load(tmp_path / "d.npz")
    assert torch.equal(data.train_images, torch.from_numpy(PIXELS))
    assert torch.equal(data.test_images, torch.from_numpy(PIXELS[:7]))


LABELS = np.arange(20) % 2


@pytest.mark.parametrize(
    ("keys", "notes"),
    [
        (("images", "labels", "test_images", "test_labels"), ()),
        (("train_images", "train_labels", "test_images", "test_labels"), ()),
        (("x_train", "y_train", "x_test", "y_test"), ()),
        (("X_train", "y_train", "X_test", "y_test"), ()),
        (("train_images", "train_labels", "val_images", "val_labels"), ()),
        (("train_images", "train_labels", "test_images", "test_labels", "val_images"), ("did not read val_images",)),
        (("images", "labels", "test_images", "test_labels", "train_images"), ("did not read train_images",)),
    ],
)
def test_npz_finds_arrays_by_their_usual_names(tmp_path, keys, notes):
    arrays = (PIXELS, LABELS[:, None], PIXELS[:4], LABELS[:4], PIXELS[:2])
    data = loaded(tmp_path, **dict(zip(keys, arrays, strict=False)))
    assert torch.equal(data.test_images, torch.from_numpy(PIXELS[:4]))
    assert data.test_labels.tolist() == [0, 1, 0, 1]
    assert data.is_labelled
    assert data.notes == notes


def test_npz_takes_any_integers_as_labels(tmp_path):
    data = loaded(
        tmp_path,
        images=PIXELS,
        labels=np.where(LABELS, 10**12, -4),
        test_images=PIXELS[:3],
        test_labels=np.array([7, 10**12, -1]),
    )
    assert data.class_names == ("-4", "7", "1000000000000")
    assert data.train_labels.tolist() == [0, 2] * 10
    assert data.test_labels.tolist() == [1, 2, -1]
    assert data.notes == ("1 of 23 images have no label and are left out of accuracies",)


def test_npz_may_hold_class_names(tmp_path):
    data = loaded(tmp_path, images=PIXELS, labels=LABELS, class_names=np.array(["zebra", "ant", "bee"]))
    assert data.class_names == ("zebra", "ant", "bee")
    assert data.test_labels.bincount().tolist() == [2, 2]
    with pytest.raises(ValueError, match=r"d.npz: labels must be among the 1 class names \(0 to 0, .*\), got 1"):
        loaded(tmp_path, images=PIXELS, labels=LABELS, class_names=np.array(["zebra"]))
    with pytest.raises(ValueError, match=r"d.npz: class_names must be strings \(C,\), got int64"):
        loaded(tmp_path, images=PIXELS, labels=LABELS, class_names=np.arange(2))


@pytest.mark.parametrize(("given", "missing"), [("labels", "test_labels"), ("test_labels", "labels")])
def test_npz_notes_labels_of_only_one_part(tmp_path, given, missing):
    labels = {"labels": LABELS, "test_labels": LABELS[:4]}
    data = loaded(tmp_path, images=PIXELS, test_images=PIXELS[:4], **{given: labels[given]})
    assert data.notes[0] == f"found {given} but no {missing}: accuracies need the labels of both parts"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": PIXELS, "test_labels": LABELS}, "d.npz holds test_labels, but no test_images"),
        (
            {"images": PIXELS, "labels": LABELS, "test_images": PIXELS[:4], "test_labels": LABELS},
            "d.npz: test_labels must be 4",
        ),
        ({"images": PIXELS, "labels": np.int64(3)}, r"d.npz: labels must be 20 .* of shape \(\)"),
        ({"images": PIXELS, "labels": np.zeros(0)}, r"d.npz: labels must be 20 .* of shape \(0,\)"),
        ({"images": PIXELS, "labels": np.zeros((20, 14))}, r"of shape \(20, 14\) \(one column for each class"),
        ({"images": np.float64(1)}, r"d.npz: images must have the shape .* got \(\)"),
        ({"images": np.zeros((20, 28, 28, 28))}, r"d.npz: images must have the shape"),
        ({"images": PIXELS.astype(np.uint32) * 257}, r"of uint32 must lie in 0..255 \(or be uint16\)"),
        ({"images": PIXELS * 1j}, "must be integers, booleans or floats, got complex128"),
        ({"images": PIXELS.astype("M8[s]")}, "must be integers, booleans or floats, got datetime64"),
        ({"images": np.full((20, 8, 8), np.inf)}, r"must lie in \[0, 1\] or \[0, 255\], got \[inf, inf\]"),
        ({"x": np.zeros(3), "y\n": np.zeros(3)}, r"found x, y\?"),
        ({}, "found nothing"),
    ],
)
def test_npz_error_names_what_is_wrong(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path, **arrays)


def sound():
    buffer = io.BytesIO()
    np.savez(buffer, images=PIXELS, labels=LABELS)
    return buffer.getvalue()


def with_field(field, value):
    """Return a sound file with this 16-bit field set to `value` in the local and central headers of every entry."""
    content = bytearray(sound())
    for signature, at in ((b"PK\3\4", 0), (b"PK\1\2", 2)):
        start = content.find(signature)
        while start >= 0:
            struct.pack_into("<H", content, start + field + at, value)
            start = content.find(signature, start + 4)
    return bytes(content)


def with_header(header):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header)
    return buffer.getvalue()


def flipped():
    content = bytearray(sound())
    content[2000] ^= 255
    return bytes(content)


def npy():
    buffer = io.BytesIO()
    np.save(buffer, PIXELS)
    return buffer.getvalue()


DAMAGED = {
    "truncated": sound()[:4000],
    "flipped": flipped(),
    "encrypted": with_field(6, 1),
    "unknown compression": with_field(8, 77),
    "empty": b"",
    "text": b"text",
    "pickle": pickle.dumps([1, 2]),
    "npy": npy(),
    "huge": with_header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 8, 8)}"),
    "overflow": with_header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (4294967296, 4294967296, 1)}"),
    "negative": with_header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (-8, -8, 8)}"),
    "long header": with_header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (1,)}" + b" " * 20000),
    "no header": with_header(b"{"),
    "object": with_header(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_npz_reports_a_damaged_file_in_one_line(tmp_path, kind):
    (tmp_path / "d.npz").write_bytes(DAMAGED[kind])
    with pytest.raises(ValueError, match=r"d\.npz") as caught:
        load(tmp_path / "d.npz")
    assert "allow_pickle" not in str(caught.value)
    assert "\n" not in str(caught.value)


def outcome(path):
    """Return the data's fingerprint and labels. On an error, return the file's name if the message contains it, or else
    the message.
    """
    try:
        data = load(path)
    except ValueError as error:
        return path.name if path.name in str(error) else str(error)
    return data.fingerprint(), data.train_labels.tolist()


def test_npz_notices_flipped_bits_that_matter(tmp_path):
    path = tmp_path / "d.npz"
    path.write_bytes(sound())
    whole = np.fromfile(path, np.uint8)
    expected = outcome(path)
    sampled = [*range(0, 300), *range(300, len(whole) - 300, 101), *range(len(whole) - 300, len(whole))]
    found = []
    for at in sampled:
        content = whole.copy()
        content[at] ^= 1 << at % 8
        content.tofile(path)
        found.append(outcome(path))
    assert set(map(str, found)) <= {"d.npz", str(expected)}, "an unnoticed flip may change a date, but not the data"
    assert found.count("d.npz") > 300


class Evil:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.mkdir, (self.flag,)


@pytest.mark.parametrize("key", ["images", "labels", "class_names", "unused"])
def test_npz_never_runs_code(tmp_path, key):
    arrays = {"images": PIXELS, "labels": LABELS, key: np.array([Evil(str(tmp_path / "ran"))], dtype=object)}
    with pytest.raises(ValueError, match=f"array {key} holds object, not plain numbers or text"):
        loaded(tmp_path, **arrays)
    assert not (tmp_path / "ran").exists()


def test_npz_must_be_a_regular_file(tmp_path):
    with pytest.raises(ValueError, match=r"--data npz needs an .npz file as its --data-dir, but .* is a folder"):
        load(tmp_path)
    os.mkfifo(tmp_path / "d.npz")
    with pytest.raises(ValueError, match=r"d\.npz is not a regular file"):
        load(tmp_path / "d.npz")
    with pytest.raises(FileNotFoundError, match=r"gone\.npz does not exist"):
        load(tmp_path / "gone.npz")


def test_npz_title_is_the_name_of_its_file(tmp_path):
    assert loaded(tmp_path, images=PIXELS).title == "d.npz"
