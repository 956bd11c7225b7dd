"""One run from settings to report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from .config import Config, flag
from .data import ImageData, load_data
from .evaluate import REPRESENTATIONS, evaluate
from .ranks import ALONE, Ranks, launched
from .report import write_report
from .train import Trainer


def prepare(
    config: Config,
    ranks: Ranks = ALONE,
    data: ImageData | Dataset[Any] | DataLoader[Any] | None = None,
    encoder: nn.Module | None = None,
) -> Trainer:
    """Load the data and build the trainer: whatever a user can get wrong is found out here, before any training, and
    what is wrong on one rank ends all of them."""
    with ranks.all_or_none():
        config.check()
        if config.download and ranks.group and ranks.local == 0:
            _load(config, ranks)  # the other ranks of this machine find it there
    with ranks.all_or_none():
        trainer = Trainer(config, _load(config, ranks) if data is None else data, ranks, encoder=encoder)
    if ranks.group:
        # What another machine may call otherwise, and how its ranks read the images.
        places = ("data_dir", "out", "resume", "in_memory", "workers")
        options = {flag(name): value for name, value in config.to_dict().items() if name not in places}
        read = {"the training images": trainer.data.fingerprint(), "the step of the checkpoint": trainer.step}
        ranks.require_same(options | read)
    return trainer


def _load(config: Config, ranks: Ranks) -> ImageData:
    data = load_data(
        config.data, config.data_dir, config.image_size, config.download,
        skip_bad=config.skip_bad, in_memory=config.in_memory, workers=config.workers,
        progress=ranks.first and not config.quiet,
    )  # fmt: skip
    if config.image_size not in (None, data.image_size):
        raise ValueError(
            f"--image-size is {config.image_size}, but the images of --data {config.data} have {data.image_size} "
            "pixels; only those of a folder are resized"
        )
    return data


def forewarn(trainer: Trainer) -> list[str]:
    """What a person may not expect of the run, a line each."""
    notes = list(trainer.data.notes)
    config, asked = trainer.config, trainer.config.batch
    if trainer.batch < asked and isinstance(trainer.data, ImageData):
        name = flag("accumulate_batch" if config.accumulate_batch else "batch_size")
        notes.append(f"{name} {asked} is more than the {trainer.batch} training images: every step takes all of them")
    if config.resume and trainer.step >= trainer.last_step:
        notes.append(f"this run is finished, at step {trainer.step} of {trainer.last_step}: it is judged again")
    return notes


def finish(trainer: Trainer, command: Sequence[str] = ()) -> dict[str, Any]:
    """Judge a trained encoder and write the report; returns what metrics.json holds."""
    evaluation = evaluate(trainer.model, trainer.config, trainer.data)
    return write_report(trainer, evaluation, command)


def run(config: Config, command: Sequence[str] = ()) -> dict[str, Any]:
    """Train, judge and report, in one process; over several, `torchrun -m fastntxent.simclr` does.

    Args:
        config: the settings.
        command: the command line, for the record in the report.

    Returns:
        What metrics.json holds.

    Raises:
        RuntimeError: torchrun has started several processes.
        ValueError, FileNotFoundError, FileExistsError, ImportError: before training, for settings that cannot work.
        TrainingError: during training, as `Trainer.fit` says.
    """
    if launched():
        raise RuntimeError("run() is of one process: over several start torchrun -m fastntxent.simclr")
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
