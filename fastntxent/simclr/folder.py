"""The layout of a folder of images: its training and test parts, and its classes as in torchvision's ImageFolder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .labels import UNLABELLED
from .notes import counted, distinct, listed, one_line
from .pixels import BadFile
from .walk import Walk

TEST_NAMES = ("test", "val", "validation", "valid")


@dataclass(frozen=True)
class Files:
    """The image files of one part: sorted paths below the root, and class numbers, int64 (N,), with -1 for no class."""

    paths: tuple[str, ...]
    labels: Tensor


@dataclass(frozen=True)
class Folder:
    """The image files of a folder. `test` is None if the folder has no test part."""

    root: Path
    train: Files
    test: Files | None
    class_names: tuple[str, ...]
    notes: tuple[str, ...]
    unreadable: tuple[BadFile, ...]


@dataclass(frozen=True)
class _Part:
    """Image files below `base`, each with the name of its class folder, or None if it lies directly in `base`."""

    base: str
    paths: list[str]
    classes: list[str | None]

    @property
    def names(self) -> set[str]:
        return {name for name in self.classes if name is not None}


def find(root: Path) -> Folder:
    """Find the images of a folder: class/**/x.png or x.png, either directly or below train/ and test/ (or val/, ...).

    Raises:
        FileNotFoundError: a part has no image.
    """
    walk = Walk(str(root))
    train_base, test_base, notes = _bases(walk)
    parts = [_part(walk, base) for base in (train_base, test_base) if base is not None]
    notes += [note for part in parts for note in _notes(walk, part)]
    names = set[str]().union(*(part.names for part in parts))
    new = sorted(names - parts[0].names)
    if new and len(new) < len(names):
        classes = counted(len(new), "class of the test part is", "classes of the test part are")
        notes.append(f"{classes} missing from the training part: {listed(new)}")
    notes += walk.notes()
    for part in parts:
        if not part.paths and not walk.unreadable:
            raise FileNotFoundError(
                f"no image under {one_line(root / part.base)}; expected class_name/*.png or *.png (or jpg, bmp, webp, "
                f"...){''.join(f'; {note}' for note in notes)}"
            )
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(sorted(names))}
    numbers[None] = UNLABELLED
    files = [Files(tuple(part.paths), torch.tensor([numbers[name] for name in part.classes]).long()) for part in parts]
    test = files[1] if len(files) == 2 else None
    return Folder(root, files[0], test, distinct(sorted(names)), tuple(notes), tuple(walk.unreadable))


def _bases(walk: Walk) -> tuple[str, str | None, list[str]]:
    """Return the folders of the training part and the test part below the root, with notes on the choice."""
    folders, files = walk.listing("")
    named = {name.lower(): name for name in folders}  # "test" wins over "Test"
    train = named.get("train")
    tests = [named[name] for name in TEST_NAMES if name in named]
    if train is None:
        return "", None, []
    beside = [name for name in folders if name != train and name not in tests]
    if beside and not tests and not walk.listing(train)[0]:
        return "", None, [f"read {train} as a class like {listed(beside)}, because there is no test or val next to it"]
    notes = []
    # Prefer a folder that shares classes with train: ImageNet's test folder has no labels, but its val folder has.
    classes = set(walk.listing(train)[0])
    labelled = (name for name in tests if classes & set(walk.listing(name)[0]))
    test = next(labelled, tests[0] if tests else None)
    unused = [name for name in tests if name != test]
    if unused:
        notes.append(f"did not read {listed(unused)}: {test} is the test part")
    if beside or files:
        notes.append(f"ignored the entries next to {train}: {listed([*beside, *files])}")
    return train, test, notes


def _part(walk: Walk, base: str) -> _Part:
    paths = walk.files(base)
    below = [os.path.relpath(path, base).split(os.sep) if base else path.split(os.sep) for path in paths]
    return _Part(base, paths, [parts[0] if len(parts) > 1 else None for parts in below])


def _notes(walk: Walk, part: _Part) -> list[str]:
    """Return notes on empty folders and unclassified images of a part."""
    notes = []
    inside = [os.path.join(part.base, name) for name in walk.listing(part.base)[0] if name not in part.names]
    empty = [path for path in inside if path not in walk.loops]
    if empty:
        notes.append(f"left out {counted(len(empty), 'folder', 'folders')} without an image: {listed(empty)}")
    loose = [path for path, name in zip(part.paths, part.classes, strict=True) if name is None]
    if loose and part.names:
        images = counted(len(loose), "image is", "images are")
        notes.append(f"{images} next to the class folders: {listed(loose)}")
    return notes
