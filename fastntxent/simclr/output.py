"""The folder of a run: locked by one process, checked to be writable before training, with files written atomically."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..files import PARTIAL, write_whole

# The files that a run writes. Existing files of these names are replaced.
FILES = (
    "checkpoint.pt", "config.toml", "log.csv", "curves.png", "embedding.png", "views.png", "metrics.json",
    "report.html",
)  # fmt: skip
LOCK = ".lock"
_PROBE = ".probe"


def printable(text: object) -> str:
    """Return the text with question marks for characters that UTF-8 cannot encode. (File names may hold any bytes.)"""
    return str(text).encode("utf-8", "replace").decode("utf-8")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without the advice that PyTorch adds below it, or the error's type
    if the message is empty."""
    lines = printable(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def last_line(error: BaseException) -> str:
    """Return the last line of an error's message, where a DataLoader worker's original error is, or the error's type if
    the message is empty."""
    return printable(error).strip().rpartition("\n")[2] or type(error).__name__


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically."""
    write_whole(path, lambda file: file.write(printable(text).encode()))


def check_output_file(path: Path, overwrite: bool, needed: int) -> None:
    """Check, before any work, that a command's `--out` file can be written.

    Args:
        needed: upper bound on the file's size in bytes.

    Raises:
        FileExistsError: the file exists and `overwrite` is off.
        ValueError: the file cannot be written, or its disk has too little space.
    """
    if path.is_dir():
        raise ValueError(f"--out {printable(path)} is a folder; give the file to write")
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"--out {printable(path)} exists: replace it with --overwrite, or choose another --out")
    _check_writable(path.parent, path, needed)


def _check_writable(folder: Path, out: Path, needed: int) -> None:
    """Check that files can be written into a folder; `out` is what the user passed as `--out`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{_PROBE}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}"
        try:
            with probe.open("xb") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ValueError(f"--out {printable(out)} cannot be written to: {error.strerror}") from error
    if free < needed:
        raise ValueError(
            f"--out {printable(out)} has {free / 2**20:.0f} MiB of free disk space, but up to "
            f"{needed / 2**20:.0f} MiB are needed"
        )


class OutputFolder:
    """The folder `--out`, and the lock that lets only one run at a time write into it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / LOCK, thread_local=False)

    def check(self, needed: int) -> None:
        """Check, before any training, that the run's files can be written.

        Args:
            needed: upper bound on the bytes that will be written.

        Raises:
            ValueError: the folder cannot be created or is not writable, or its disk has too little space.
        """
        _check_writable(self.path, self.path, needed)
        for name in FILES:
            if (self.path / name).is_dir():
                raise ValueError(f"--out {printable(self.path)} cannot be written to: its {name} is a folder")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock in this block. Blocks of the same OutputFolder may be nested.

        Raises:
            BlockingIOError: another run holds the lock.
        """
        try:
            with contextlib.suppress(NotImplementedError):  # a file system without locks
                self._lock.acquire(timeout=0)
        except Timeout as error:
            raise BlockingIOError(
                f"another run is writing to --out {printable(self.path)}: wait until it ends, or choose another --out"
            ) from error
        try:
            self._remove_partials()
            yield
        finally:
            self._lock.release()

    def _remove_partials(self) -> None:
        """Remove partial files of killed runs. Where the file system has locks, no other run is writing here now."""
        for name in (*FILES, _PROBE):  # the folder may hold the user's own .partial files
            for left in self.path.glob(f"{name}.*{PARTIAL}"):
                left.unlink(missing_ok=True)
