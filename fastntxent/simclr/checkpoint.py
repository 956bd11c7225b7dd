"""Checkpoints: written whole or not at all, read without running code, refused where they do not fit."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from .config import Config, flag

FILE_NAME = "checkpoint.pt"
FORMAT = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` so that a crash at any moment leaves either the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    if os.name == "posix":
        # The rename itself must reach the disk before an older file may be relied on to be gone.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def first_line(error: Exception) -> str:
    """An error's message without the advice and traces that PyTorch adds below it."""
    return str(error).partition("\n")[0] or type(error).__name__


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no checkpoint of this trainer.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint to resume from at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a file of other bytes can end the unpickler in any way
        raise ValueError(f"{path} cannot be read as a checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this version of the trainer")
    return state


def resume_path(config: Config) -> Path:
    """The checkpoint that `--resume` means."""
    return config.out / FILE_NAME if config.resume == "auto" else Path(config.resume)


def with_saved_options(given: dict[str, Any]) -> Config:
    """The configuration of a command line: with `--resume`, what it leaves open comes from the checkpoint.

    What says how far to run and where to write (`--max-steps`, `--out`, `--resume`, `--overwrite`) does not; a
    resumed run writes beside its checkpoint unless `--out` says otherwise.
    """
    config = Config(**given)
    if not config.resume:
        return config
    path = resume_path(config)
    saved = Config.from_dict(load_checkpoint(path)["config"])
    here = {"max_steps": config.max_steps, "overwrite": config.overwrite, "out": path.parent}
    return replace(saved, **{**here, **given})


def check_agreement(config: Config, saved: dict[str, Any], fingerprint: str, saved_fingerprint: str) -> None:
    """Raise ValueError naming every setting, the data included, in which a resumed run would differ."""
    saved = Config.from_dict(saved).to_dict()  # with the defaults of options that are younger than the checkpoint
    now = config.to_dict()
    differing = [
        f"{flag(option.name)} (checkpoint {saved[option.name]}, now {now[option.name]})"
        for option in fields(Config)
        if option.metadata["same"] and saved[option.name] != now[option.name]
    ]
    if fingerprint != saved_fingerprint:
        differing.append(f"the training images (checkpoint {saved_fingerprint}, now {fingerprint})")
    if differing:
        raise ValueError("cannot resume, the run would not be the same: " + "; ".join(differing))
