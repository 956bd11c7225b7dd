"""Trains and measures one run of the study. A run that was interrupted continues from its checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint import FILE_NAME
from ..config import Config
from ..data import ImageData
from ..output import write_text
from ..train import Trainer
from .measure import Snapshot, final_quality, quality

RECORD = "measured.json"

Record = dict[str, Any]


def train(config: Config, data: ImageData, measured: Sequence[int]) -> tuple[Record, Trainer]:
    """Train a run to its end and measure it at the given epochs. A finished run is only loaded.

    Args:
        config: the settings. If `config.out` has a checkpoint, the run continues from it; the checkpoint's settings
            must agree.
        data: the images.
        measured: the epochs after which the run is measured, in order; the last is `config.epochs`.

    Returns:
        The content of measured.json (the curves, the measurements at the end, the seconds), and the trainer.

    Raises:
        ValueError: the folder holds a run with different settings.
        TrainingError: see `Trainer.fit`.
    """
    path = config.out / RECORD
    record = recorded(config, RECORD) or {"curves": {"epoch": []}, "end": {}, "seconds": {"wall": 0.0, "cpu": 0.0}}
    trainer = open_trainer(config, data)
    for epoch in measured:
        if epoch in record["curves"]["epoch"]:
            continue
        wall, cpu = time.perf_counter(), time.process_time()
        trainer.fit(epoch * trainer.steps_per_epoch)
        snapshot = Snapshot(trainer.model, config, data)
        for name, value in {"epoch": epoch, **quality(snapshot)}.items():
            record["curves"].setdefault(name, []).append(value)
        if epoch == config.epochs:
            record["end"] = final_quality(snapshot, config.temperature)
        record["seconds"]["wall"] += time.perf_counter() - wall
        record["seconds"]["cpu"] += time.process_time() - cpu
        write(path, record)
    return record, trainer


def open_trainer(config: Config, data: ImageData) -> Trainer:
    """Return the trainer of a run, resumed from its checkpoint if there is one."""
    started = (config.out / FILE_NAME).exists()
    return Trainer(replace(config, resume="auto") if started else config, data)


def recorded(config: Config, name: str) -> Record | None:
    """Return a record of a run that was started earlier, or None if there is none. Call it before the run is opened.

    A checkpoint is written before the measurements of its epoch, so a record without a checkpoint is left from another
    run, and does not count.
    """
    return read(config.out / name) if (config.out / FILE_NAME).exists() else None


def read(path: Path) -> Record | None:
    """Return a record, or None if the file does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write(path: Path, record: Record) -> None:
    """Write a record atomically."""
    write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
