"""Files that are written completely or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that a crash at any moment leaves either the old file or the new one.

    Args:
        path: The file. If it is a symbolic link, the link itself is replaced.
        write: A function that is called with a new temporary file beside `path`, open for reading and writing.

    Raises:
        OSError: the file cannot be written, and the old one stays as it was; or the folder cannot be synced after the
            new file has replaced the old one.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    try:
        # "x" creates the file or fails, so it follows no link and never opens another process's file.
        with partial.open("x+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)  # after closing the file, since Windows does not rename open files
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        # Sync the folder too: the rename itself must reach the disk before callers rely on it.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
