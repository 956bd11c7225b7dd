"""One run from settings to report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .config import Config
from .data import load_data
from .evaluate import REPRESENTATIONS, evaluate
from .report import write_report
from .train import Trainer


def prepare(config: Config) -> Trainer:
    """Load the data and build the trainer: whatever a user can get wrong is found out here, before any training."""
    config.check()
    return Trainer(config, load_data(config.data, config.data_dir, config.image_size, config.download))


def finish(trainer: Trainer, command: Sequence[str] = ()) -> dict[str, Any]:
    """Judge a trained encoder and write the report; returns what metrics.json holds."""
    evaluation = evaluate(trainer.model, trainer.config, trainer.data)
    return write_report(trainer, evaluation, command)


def run(config: Config, command: Sequence[str] = ()) -> dict[str, Any]:
    """Train, judge and report.

    Args:
        config: the settings.
        command: the command line, for the record in the report.

    Returns:
        What metrics.json holds.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, ImportError: before training, for settings that cannot work.
        TrainingError: during training, as `Trainer.fit` says.
    """
    trainer = prepare(config)
    trainer.fit()
    return finish(trainer, command)


def summarise(metrics: dict[str, Any], out: str) -> str:
    """The outcome in a few lines for the terminal."""
    lines = []
    scores = metrics["evaluation"]["scores"]
    for measure in ("knn", "linear probe"):
        if measure in scores:
            values = ", ".join(f"{name} {100 * scores[measure][name]:.1f} %" for name in REPRESENTATIONS)
            lines.append(f"{measure + ':':14}{values}")
    lines += metrics["evaluation"]["notes"]
    verification = metrics["verification"]
    if verification:
        lines.append(
            f"{'verified:':14}{verification['checks']} times, largest relative error of the loss "
            f"{verification['max_loss_error']:.2g}, of the gradient {verification['max_gradient_error']:.2g}"
        )
    timing = metrics["timing"]
    lines.append(
        f"{'time:':14}training {timing['training_seconds']:.1f} s, evaluation {timing['evaluation_seconds']:.1f} s"
    )
    lines.append(f"{'report:':14}{out}/report.html")
    return "\n".join(lines)
