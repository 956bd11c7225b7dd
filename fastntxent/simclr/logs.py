"""The logs that a run writes while it trains: log.csv always, TensorBoard and Weights & Biases on request."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from .config import Config
from .output import first_line, printable
from .sources import require

CSV = "log.csv"
COLUMNS = ("step", "seconds", "loss", "lr", "temperature", "alignment", "uniformity", "images_per_second")

Row = Mapping[str, float]


class LogError(ValueError):
    """A requested log cannot be opened. No training step was taken."""


class Log(Protocol):
    def write(self, row: Row) -> None:
        """Log one row of COLUMNS."""
        ...

    def close(self) -> None: ...


class CSVLog:
    """log.csv, with one row per measurement. Every row is flushed, so the file can be followed live."""

    def __init__(self, path: Path, earlier: Iterable[Row]) -> None:
        path.unlink(missing_ok=True)  # do not write through a link
        self._file = path.open("x", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._writer.writeheader()
        self._writer.writerows(earlier)
        self._file.flush()

    def write(self, row: Row) -> None:
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardLog:
    def __init__(self, folder: Path, step: int) -> None:
        writer = require("torch.utils.tensorboard", install="tensorboard").SummaryWriter
        self._writer = writer(str(folder), purge_step=step)

    def write(self, row: Row) -> None:
        for name in COLUMNS[2:]:
            self._writer.add_scalar(name, row[name], int(row["step"]))

    def close(self) -> None:
        self._writer.close()


class WandbLog:
    def __init__(self, project: str, folder: Path, settings: Mapping[str, Any], run_id: str) -> None:
        wandb = require("wandb", install="wandb")
        self._run = wandb.init(
            project=project, dir=str(folder), name=printable(folder.name), id=run_id, resume="allow",
            config=dict(settings),
        )  # fmt: skip

    def write(self, row: Row) -> None:
        self._run.log({name: row[name] for name in COLUMNS[1:]}, step=int(row["step"]))

    def close(self) -> None:
        self._run.finish()


def check_logs(config: Config) -> None:
    """Raise a readable ImportError if a package for a requested log is missing."""
    if config.tensorboard:
        require("torch.utils.tensorboard", install="tensorboard")
    if config.wandb:
        require("wandb", install="wandb")


def open_logs(config: Config, settings: Mapping[str, Any], step: int, run_id: str, earlier: Iterable[Row]) -> list[Log]:
    """Return the open logs of a run.

    Args:
        config: the settings, which select the logs.
        settings: the resolved settings, for the logs that record them.
        step: the current step. TensorBoard drops what an interrupted run has logged for this step and later ones.
        run_id: an id that a run shares with the runs that resume it.
        earlier: the rows of earlier steps, which are written to log.csv again.

    Raises:
        LogError: TensorBoard or Weights & Biases cannot be opened.
        OSError: log.csv cannot be written.
    """
    logs: list[Log] = [CSVLog(config.out / CSV, earlier)]
    name = "--tensorboard"
    try:
        if config.tensorboard:
            logs.append(TensorBoardLog(config.out / "tensorboard", step))
        name = "--wandb"
        if config.wandb:
            logs.append(WandbLog(config.wandb, config.out, settings, run_id))
    except Exception as error:  # no login, no network, a file in the folder's place, ...
        for log in logs:
            log.close()
        raise LogError(f"{name} cannot be used: {type(error).__name__}: {first_line(error)}") from error
    return logs
