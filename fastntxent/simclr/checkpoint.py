"""Checkpoints: written atomically, read without running code, and rejected if damaged or from a different run."""

from __future__ import annotations

import hashlib
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..files import write_whole
from .config import Config, flag
from .output import printable

FILE_NAME = "checkpoint.pt"
FORMAT = 2

# torch.save writes a zip archive. The archive's comment, which torch.load ignores, holds the checksum of all bytes
# before it. Zip's own checksums are not enough: they do not cover the directory and the padding, and torch.load does
# not verify them.
_MARK = b"fastntxent sha256 "
_COMMENT_SIZE = len(_MARK) + 2 * hashlib.sha256().digest_size
_NO_COMMENT = (0).to_bytes(2, "little")  # the last two bytes of an archive without a comment


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` atomically: a crash at any moment leaves either the old file or the new one."""

    def write(file: BinaryIO) -> None:
        torch.save({"format": FORMAT, **state}, file)
        file.seek(-len(_NO_COMMENT), os.SEEK_END)
        assert file.read() == _NO_COMMENT
        file.seek(-len(_NO_COMMENT), os.SEEK_END)
        file.write(_COMMENT_SIZE.to_bytes(2, "little"))
        size = file.tell()
        file.write(_MARK + _checksum(file, size))

    write_whole(path, write)


def _checksum(file: BinaryIO, size: int) -> bytes:
    """Return the SHA-256 of the first `size` bytes in hexadecimal, and leave the file position after them."""
    digest = hashlib.sha256()
    file.seek(0)
    while size:
        part = file.read(min(size, 2**20))
        if not part:
            break
        digest.update(part)
        size -= len(part)
    return digest.hexdigest().encode()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint, with its tensors on the CPU.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a checkpoint of this trainer, or it is damaged.
        OSError: the file cannot be read.
    """
    name = printable(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint to resume from at {name}")
    with path.open("rb") as file:  # reads this file even if another is renamed to its path
        size = file.seek(0, os.SEEK_END) - _COMMENT_SIZE
        file.seek(max(size, 0))
        comment = file.read()
        marked = comment.startswith(_MARK)
        if marked and comment != _MARK + _checksum(file, size):
            raise ValueError(f"{name} is damaged: its contents do not match its checksum")
        file.seek(0)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # arbitrary bytes can make the unpickler raise anything
            raise ValueError(f"{name} cannot be read as a checkpoint ({type(error).__name__})") from error
    if not (marked and isinstance(state, dict) and state.get("format") == FORMAT):
        raise ValueError(f"{name} is not a checkpoint of this version of the trainer, or is damaged")
    return state


def resume_path(config: Config) -> Path:
    """Return the path of the checkpoint that `--resume` refers to."""
    return config.out / FILE_NAME if config.resume == "auto" else Path(config.resume)


def with_saved_options(given: dict[str, Any]) -> Config:
    """Return the configuration of a command line. With `--resume`, options that are not given come from the checkpoint.

    `--max-steps`, `--out`, `--resume` and `--overwrite` never come from the checkpoint. A resumed run writes to the
    folder of its checkpoint unless `--out` is given.
    """
    config = Config(**given)
    if not config.resume:
        return config
    path = resume_path(config)
    state = load_checkpoint(path)
    if not isinstance(state.get("config"), dict):
        raise ValueError(f"{printable(path)} is not a checkpoint of a run: it holds no settings")
    for part in ("data", "encoder"):
        if state.get(f"own_{part}"):
            raise ValueError(
                f"{printable(path)} belongs to a run whose {part} came from Python: continue it there with "
                "Trainer(Config(..., resume='auto'), ...).fit()"
            )
    saved = Config.from_dict(state["config"])
    here = {"max_steps": config.max_steps, "overwrite": config.overwrite, "out": path.parent}
    return replace(saved, **{**here, **given})


def check_agreement(now: dict[str, Any], saved: dict[str, Any], fingerprint: str, saved_fingerprint: str) -> None:
    """Raise ValueError, naming each difference, if the data or the settings that affect the result have changed."""
    saved = {**Config().to_dict(), **saved}  # defaults for options that are newer than the checkpoint
    differing = [
        f"{flag(option.name)} (checkpoint {saved[option.name]}, now {now[option.name]})"
        for option in fields(Config)
        if option.metadata["same"] and saved[option.name] != now[option.name]
    ]
    if fingerprint != saved_fingerprint:
        differing.append(f"the training images (checkpoint {saved_fingerprint}, now {fingerprint})")
    if differing:
        raise ValueError("cannot resume, because the run would not be the same: " + "; ".join(differing))
