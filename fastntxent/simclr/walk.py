"""Finds the image files below a folder, and records all other entries. No file is opened."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .notes import counted, listed
from .pixels import BadFile, reason

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
# Entries of macOS, Synology, Linux and Windows that are skipped, like names that begin with a dot.
_HIDDEN = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}

Identity = tuple[int, int]
Listing = tuple[list[str], list[str]]


@dataclass
class Walk:
    """The folders below a root. Each path is listed at most once, and everything skipped is recorded."""

    root: str
    hidden: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    odd: list[str] = field(default_factory=list)
    loops: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)
    unreadable: list[BadFile] = field(default_factory=list)
    _listings: dict[str, Listing] = field(default_factory=dict)

    def listing(self, folder: str) -> Listing:
        """Return the sorted names of the folders and the image files in a folder below the root."""
        if folder not in self._listings:
            self._listings[folder] = self._list(folder)
        return self._listings[folder]

    def _list(self, folder: str) -> Listing:
        folders: list[str] = []
        files: list[str] = []
        try:
            with os.scandir(os.path.join(self.root, folder)) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            self.unreadable.append(BadFile(folder or ".", reason(error)))
            return folders, files
        for entry in entries:
            path = os.path.join(folder, entry.name)
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith(".") or entry.name in _HIDDEN:
                self.hidden.append(path)
            elif _is(entry.is_dir):
                folders.append(entry.name)
            elif suffix in IMAGE_SUFFIXES and _is(entry.is_file):
                files.append(entry.name)
            elif suffix in IMAGE_SUFFIXES or not os.path.exists(entry.path):
                self.odd.append(path)  # opening a pipe would wait for its other end
            else:
                self.others[suffix or "no suffix"] += 1
        return folders, files

    def files(self, base: str) -> list[str]:
        """Return every image file below a folder, at any depth, sorted by the parts of its path."""
        outside = _parents(self.root)
        found: list[str] = []
        # The folders that have been read, each with its class. A folder is read once per class, because links between
        # folders could make the number of paths explode.
        read: set[tuple[str, Identity]] = set()
        pending = deque([(base, outside | _identity(self.root) if base else outside)])
        while pending:
            folder, above = pending.popleft()  # the shortest path to a folder comes first
            here = _identity(os.path.join(self.root, folder))
            if here & above:
                self.loops.append(folder)
                continue
            class_name = folder[len(base) :].lstrip(os.sep).split(os.sep)[0]
            once = {(class_name, identity) for identity in here}
            if once & read:
                self.again.append(folder)
                continue
            read |= once
            folders, files = self.listing(folder)
            found += [os.path.join(folder, name) for name in files]
            pending += [(os.path.join(folder, name), above | here) for name in folders]
        return sorted(found, key=lambda path: path.split(os.sep))

    def notes(self) -> list[str]:
        """Return one line for each kind of entry that was skipped."""
        notes = []
        if self.hidden:
            entries = counted(len(self.hidden), "hidden entry", "hidden entries")
            notes.append(f"left out {entries}: {listed(sorted(self.hidden))}")
        if self.others:
            kinds = [f"{suffix} ({count})" for suffix, count in self.others.most_common()]
            files = counted(sum(self.others.values()), "file", "files")
            notes.append(f"left out {files} without an image suffix: {listed(kinds)}")
        if self.odd:
            entries = counted(len(self.odd), "broken link, pipe or device", "broken links, pipes or devices")
            notes.append(f"left out {entries}: {listed(sorted(self.odd))}")
        if self.loops:
            notes.append(
                f"did not follow {counted(len(self.loops), 'link', 'links')} back to a parent folder: "
                f"{listed(sorted(self.loops))}"
            )
        if self.again:
            folders = counted(len(self.again), "folder", "folders")
            notes.append(f"skipped {folders} that links reach a second time: {listed(sorted(self.again))}")
        return notes


def _is(test: Callable[[], bool]) -> bool:
    """Return the result of a directory entry's test, or False if the test fails (a link to itself, a locked folder)."""
    try:
        return test()
    except OSError:
        return False


def _identity(path: str) -> frozenset[Identity]:
    """Return device and inode of a folder, the same for every path to it; an empty set if stat fails."""
    try:
        status = os.stat(path)
    except OSError:
        return frozenset()
    return frozenset({(status.st_dev, status.st_ino)})


def _parents(root: str) -> frozenset[Identity]:
    """Return the identities of the folders above the root: a link to one of these leads back to the root."""
    parents = Path(os.path.realpath(root)).parents
    return frozenset[Identity]().union(*(_identity(str(parent)) for parent in parents))
