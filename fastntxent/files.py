"""Files written whole or not at all."""

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
        path: the file; if it is a symbolic link, the link itself is replaced.
        write: called with a new file of this call's own beside `path`, open for reading and writing.

    Raises:
        OSError: the file cannot be written; the old one is left as it was.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    try:
        # "x" makes the file or fails: it follows no link and shares no file with another process.
        with partial.open("x+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)  # Windows renames no file that is open
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        # The rename itself must reach the disk before an older file may be relied on to be gone.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
