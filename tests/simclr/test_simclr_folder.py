import os
import pickle
import socket
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from fastntxent.simclr import images, load_data
from fastntxent.simclr.folder import find
from fastntxent.simclr.images import ImagesOnDisk


def load(root, size=16, **options):
    return load_data("folder", root, size, **options)


def write_images(folder, count, size=(20, 24), value=None, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for index in range(count):
        pixels = (
            random.integers(0, 256, (*size, 3), np.uint8) if value is None else np.full((*size, 3), value, np.uint8)
        )
        Image.fromarray(pixels).save(folder / f"{index:03}.png")


@pytest.fixture
def two_classes(tmp_path):
    write_images(tmp_path / "a", 10)
    write_images(tmp_path / "b", 10, seed=1)
    return tmp_path


def count(data):
    return len(data.train_images) + len(data.test_images)


def same(first, second):
    return all(
        torch.equal(getattr(first, part)[:], getattr(second, part)[:])
        for part in ("train_images", "train_labels", "test_images", "test_labels")
    )


def test_folder_takes_class_names_from_its_subfolders(tmp_path):
    write_images(tmp_path / "cat", 10, value=10)
    write_images(tmp_path / "dog", 10, value=200)
    data = load(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.train_images.shape == (16, 3, 16, 16)
    assert data.test_labels.bincount().tolist() == [2, 2]
    assert (data.test_images[data.test_labels == 1] == 200).all()


def test_folder_uses_its_own_split(tmp_path):
    for part, count in (("train", 6), ("test", 3)):
        for name in ("a", "b"):
            write_images(tmp_path / part / name, count)
    data = load(tmp_path)
    assert (len(data.train_images), len(data.test_images)) == (12, 6)
    assert data.train_labels.bincount().tolist() == [6, 6]


def test_folder_without_classes_is_unlabelled(tmp_path):
    write_images(tmp_path, 10)
    data = load(tmp_path)
    assert not data.is_labelled
    assert (len(data.train_images), len(data.test_images)) == (8, 2)
    assert (data.train_labels == -1).all()


def test_folder_keeps_the_aspect_ratio_of_images_it_resizes(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    for index in range(10):
        Image.fromarray(wide).save(tmp_path / f"{index}.png")
    pixels = load(tmp_path).train_images
    assert (pixels[..., 2:-2] == 255).all(), "the centre square should be cropped, not the whole image squeezed"


def test_folder_errors_name_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image under"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="--data folder needs --data-dir"):
        load_data("folder")
    write_images(tmp_path, 10)
    (tmp_path / "004.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"1 of 10 images of .* cannot be read: 004\.png \(not an image of a known"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"--data folder needs a folder as its --data-dir, but .*000\.png is not one"):
        load(tmp_path / "000.png")


# --- skipped entries -------------------------------------------------------------------------------------------------


def test_folder_leaves_hidden_entries_out(two_classes):
    plain = load(two_classes)
    write_images(two_classes / ".ipynb_checkpoints", 3)
    write_images(two_classes / "a" / ".cache" / "deep", 3)
    write_images(two_classes / "__MACOSX" / "a", 3)
    (two_classes / "a" / "._000.png").write_bytes(b"\0\5\x16\7")
    (two_classes / ".DS_Store").write_bytes(b"")
    data = load(two_classes)
    assert data.class_names == ("a", "b")
    assert same(data, plain)
    (note,) = data.notes
    assert note.startswith("left out 5 hidden entries: .DS_Store, .ipynb_checkpoints, __MACOSX, ")


def test_folder_may_itself_be_hidden(tmp_path):
    write_images(tmp_path / ".cache" / "a", 10)
    assert count(load(tmp_path / ".cache")) == 10


def test_folder_takes_upper_case_suffixes_and_counts_other_files(two_classes):
    (two_classes / "a" / "000.png").rename(two_classes / "a" / "000.PNG")
    for name in ("a/notes.txt", "a/more.TXT", "b/README", "b/x.heic"):
        (two_classes / name).write_text("text")
    data = load(two_classes)
    assert count(data) == 20
    assert data.notes == ("left out 4 files without an image suffix: .txt (2), no suffix (1), .heic (1)",)


def test_folder_follows_links_to_folders_and_files(tmp_path):
    write_images(tmp_path / "elsewhere" / "pictures", 10)
    write_images(tmp_path / "root" / "b", 9)
    (tmp_path / "root" / "a").symlink_to(tmp_path / "elsewhere" / "pictures")
    (tmp_path / "root" / "b" / "link.png").symlink_to(tmp_path / "elsewhere" / "pictures" / "000.png")
    data = load(tmp_path / "root")
    assert data.class_names == ("a", "b")
    assert count(data) == 20
    assert data.notes == ()


def test_folder_does_not_follow_loops_of_links(two_classes):
    plain = load(two_classes)
    (two_classes / "a" / "up").symlink_to(two_classes)
    (two_classes / "a" / "here").symlink_to(two_classes / "a")
    (two_classes / "a" / "above").symlink_to(two_classes.parent)
    (two_classes / "b" / "self").symlink_to("self")
    data = load(two_classes)
    assert same(data, plain)
    assert data.notes == (
        "left out 1 broken link, pipe or device: b/self",
        "did not follow 3 links back to a parent folder: a/above, a/here, a/up",
    )


def test_folder_follows_mutual_links_of_two_classes_once(two_classes):
    (two_classes / "a" / "other").symlink_to(two_classes / "b")
    (two_classes / "b" / "other").symlink_to(two_classes / "a")
    assert count(load(two_classes)) == 40


def test_folder_reads_each_folder_once_per_class_if_all_link_to_all(tmp_path):
    names = [f"c{number}" for number in range(9)]  # the links below make 9! paths through all folders
    for name in names:
        write_images(tmp_path / name, 5)
        for other in names:
            (tmp_path / name / f"to_{other}").symlink_to(tmp_path / other)
    data = load(tmp_path)
    assert count(data) == 9 * 9 * 5
    (links_back, again) = data.notes
    assert links_back.startswith("did not follow")
    assert again.startswith("skipped 504 folders that links reach a second time: c0/to_c1/to_c2, c0/to_c1/to_c3")


def test_folder_never_opens_pipes_sockets_or_broken_links(two_classes, monkeypatch):
    os.mkfifo(two_classes / "a" / "pipe.png")
    (two_classes / "a" / "gone.png").symlink_to(two_classes / "nowhere.png")
    (two_classes / "gone_class").symlink_to(two_classes / "nowhere")
    monkeypatch.chdir(two_classes / "b")  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        data = load(two_classes)
    assert count(data) == 20
    assert data.class_names == ("a", "b")
    assert data.notes == (
        "left out 4 broken links, pipes or devices: a/gone.png, a/pipe.png, b/socket.png, gone_class",
    )


def test_folder_is_searched_without_recursion(tmp_path, monkeypatch):
    write_images(tmp_path / "a", 10)
    monkeypatch.chdir(tmp_path / "a")
    for _ in range(120):
        os.mkdir("d")
        os.chdir("d")
    Image.new("RGB", (9, 9)).save("x.png")
    monkeypatch.chdir(tmp_path)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(150)
    try:
        found = find(tmp_path)
    finally:
        sys.setrecursionlimit(limit)
    assert len(found.train.paths) == 11


def test_subfolder_without_an_image_is_not_a_class(two_classes):
    (two_classes / "empty" / "deep").mkdir(parents=True)
    (two_classes / "texts").mkdir()
    (two_classes / "texts" / "x.txt").write_text("")
    data = load(two_classes)
    assert data.class_names == ("a", "b")
    assert data.notes[0] == "left out 2 folders without an image: empty, texts"


def test_folder_gives_loose_images_no_label(two_classes):
    write_images(two_classes, 5)
    data = load(two_classes)
    assert (torch.cat((data.train_labels, data.test_labels)) == -1).sum() == 5
    assert data.notes == (
        "5 images are next to the class folders: 000.png, 001.png, 002.png, 003.png, 004.png",
        "5 of 25 images have no label and are left out of accuracies",
    )


def test_folder_tells_apart_class_names_that_print_alike(tmp_path):
    for name in (b"caf\xe8", b"caf\xe9", b"new\nline"):
        write_images(tmp_path / os.fsdecode(name), 5)
    data = load(tmp_path)
    assert data.class_names == ("caf?", "caf? (2)", "new?line")
    assert data.test_labels.tolist() == [0, 1, 2]


def test_folder_error_lists_what_was_skipped_if_no_image_is_left(tmp_path):
    write_images(tmp_path / ".hidden", 3)
    (tmp_path / "x.heic").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no image under .*left out 1 hidden entry: .hidden; left out 1 file"):
        load(tmp_path)


# --- parts -----------------------------------------------------------------------------------------------------------


def write_parts(root, *parts):
    for part in parts:
        for name in ("a", "b"):
            write_images(root / part / name, 4, value=10 * len(part))


@pytest.mark.parametrize("name", ["test", "val", "validation", "valid", "Test"])
def test_folder_takes_the_test_part_by_any_of_its_names(tmp_path, name):
    write_parts(tmp_path, "train", name)
    data = load(tmp_path)
    assert (len(data.train_images), len(data.test_images)) == (8, 8)
    assert (data.test_images == 10 * len(name)).all()
    assert data.notes == ()


def test_folder_prefers_test_to_val(tmp_path):
    write_parts(tmp_path, "train", "val", "test", "extra")
    write_images(tmp_path, 1)
    data = load(tmp_path)
    assert (data.test_images == 40).all()
    assert data.notes == (
        "did not read val: test is the test part",
        "ignored the entries next to train: extra, 000.png",
    )


def test_folder_prefers_a_test_part_with_labels(tmp_path):
    write_parts(tmp_path, "train", "val")
    write_images(tmp_path / "test", 4)
    data = load(tmp_path)
    assert (data.test_images == 30).all()
    assert data.notes == ("did not read test: val is the test part",)


def test_folder_may_hold_a_class_called_train(tmp_path):
    for name in ("bus", "train"):
        write_images(tmp_path / name, 10)
    data = load(tmp_path)
    assert data.class_names == ("bus", "train")
    assert data.notes == ("read train as a class like bus, because there is no test or val next to it",)


def test_folder_joins_the_classes_of_both_parts(tmp_path):
    write_parts(tmp_path, "train", "test")
    write_images(tmp_path / "test" / "Z", 2)
    data = load(tmp_path)
    assert data.class_names == ("Z", "a", "b")
    assert sorted(set(data.train_labels.tolist())) == [1, 2]
    assert data.notes == ("1 class of the test part is missing from the training part: Z",)


def test_folder_names_the_part_without_an_image(tmp_path):
    write_parts(tmp_path, "train")
    (tmp_path / "test").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no image under .*/test;"):
        load(tmp_path)


# --- bad files -------------------------------------------------------------------------------------------------------


def test_folder_names_all_bad_files_at_once(two_classes):
    for number in range(30):
        (two_classes / "b" / f"bad{number:02}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="30 of 50 images") as caught:
        load(two_classes)
    words = str(caught.value)
    assert "\n" not in words
    assert "b/bad00.png (not an image of a known format), b/bad01.png" in words
    assert "b/bad19.png" in words
    assert "b/bad20.png" not in words
    assert "and 10 more; they can be skipped with --skip-bad" in words


@pytest.mark.parametrize("in_memory", ["yes", "no"])
def test_skip_bad_leaves_out_bad_files_without_changing_the_split(two_classes, in_memory):
    every = load(two_classes, in_memory="yes")
    (two_classes / "a" / "000.png").write_bytes(b"text")
    data = load(two_classes, in_memory=in_memory, skip_bad=True)
    assert data.notes == ("left out 1 of 20 images that cannot be read: a/000.png (not an image of a known format)",)
    kept = [image.numpy().tobytes() for part in (data.train_images, data.test_images) for image in part[:]]
    all_of = [image.numpy().tobytes() for part in (every.train_images, every.test_images) for image in part]
    assert len(kept) == 19
    assert [image for image in all_of if image in kept] == kept
    assert len(data.train_labels) == len(data.train_images)


def test_skip_bad_needs_two_images_in_each_part(tmp_path):
    write_images(tmp_path, 10)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="at least 2 images in each part, got 0 for training and 0 for testing"):
        load(tmp_path, skip_bad=True)


def test_unreadable_folder_counts_as_a_bad_file(two_classes, monkeypatch):
    (two_classes / "a" / "locked").mkdir()
    scan = os.scandir

    def locked(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(ValueError, match=r"cannot be read: a/locked \(Permission denied\)"):
        load(two_classes)
    assert "a/locked (Permission denied)" in load(two_classes, skip_bad=True).notes[0]


def test_missing_pillow_is_an_import_error_not_a_bad_file(two_classes, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match="this needs the package PIL"):
        load(two_classes)


# --- in memory and on disk -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 3])
def test_images_on_disk_equal_the_images_in_memory(two_classes, workers):
    memory = load(two_classes, in_memory="yes", workers=workers)
    disk = load(two_classes, in_memory="no", workers=workers)
    assert isinstance(memory.train_images, torch.Tensor)
    assert isinstance(disk.train_images, ImagesOnDisk)
    assert disk.train_images.shape == memory.train_images.shape == (16, 3, 16, 16)
    assert disk.fingerprint() == memory.fingerprint()
    assert disk.channel_moments() == memory.channel_moments()
    assert same(memory, disk)
    mask = memory.train_labels == 1
    for indices in (
        torch.tensor([5, 0, 5]),
        torch.tensor([-1]),
        mask,
        slice(3, 7),
        torch.tensor([], dtype=torch.int64),
    ):
        assert torch.equal(disk.train_images[indices], memory.train_images[indices])
    with pytest.raises(IndexError):
        disk.train_images[torch.tensor([16])]


def test_images_stay_on_disk_above_the_limit(two_classes, monkeypatch):
    monkeypatch.setattr(images, "MEMORY_LIMIT", 20 * 3 * 16 * 16)
    assert isinstance(load(two_classes).train_images, torch.Tensor)
    monkeypatch.setattr(images, "MEMORY_LIMIT", 20 * 3 * 16 * 16 - 1)
    assert isinstance(load(two_classes).train_images, ImagesOnDisk)


class Rows(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[torch.tensor([index])][0]


def test_images_on_disk_are_read_in_workers(two_classes):
    disk = load(two_classes, in_memory="no").train_images
    assert torch.equal(pickle.loads(pickle.dumps(disk))[:4], disk[:4])
    read = torch.cat(list(DataLoader(Rows(disk), batch_size=5, num_workers=2)))
    assert torch.equal(read, disk[:])


def test_images_on_disk_report_a_file_that_vanished(two_classes):
    disk = load(two_classes, in_memory="no").train_images
    for path in two_classes.glob("*/*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"can no longer be read as an image: .*\.png \(No such file or directory\)"):
        disk[torch.tensor([3])]


def test_threads_keep_the_order_of_the_files(tmp_path):
    for number in range(100):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / f"{number:03}.png")
    data = load(tmp_path, size=8, workers=4)
    read = torch.cat((data.train_images, data.test_images))[:, 0, 0, 0]
    assert sorted(read.tolist()) == list(range(100))
    assert data.train_images[:, 0, 0, 0].tolist() == sorted(data.train_images[:, 0, 0, 0].tolist())


def test_progress_goes_to_stderr(two_classes, capsys):
    load(two_classes, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "reading images: 100%" in err
    load(two_classes)
    assert capsys.readouterr() == ("", "")


def test_title_is_the_name_of_the_folder(two_classes, monkeypatch):
    named = two_classes / os.fsdecode(b"caf\xe9")
    write_images(named, 10)
    assert load(named).title == "caf?"
    monkeypatch.chdir(named)
    assert load_data("folder", ".").title == "caf?"
    assert load_data("folder", ".").train_images.shape == (8, 3, 32, 32)


def test_dark_images_are_noted(tmp_path):
    for number in range(10):
        Image.fromarray(np.full((9, 9), 4000, np.uint16)).save(tmp_path / f"{number}.png")
    data = load(tmp_path, size=8)
    assert data.notes[0].startswith("the images are dark: no value is above 16 of 255.")
