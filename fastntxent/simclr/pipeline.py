"""One run, from the settings to the report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from . import encoders
from .build import pick_device
from .config import Config, flag
from .data import ImageData, load_data
from .evaluate import ACCURACIES, REPRESENTATIONS, Evaluation, check_ready, evaluate, why
from .notes import listed
from .output import printable
from .ranks import ALONE, Ranks, launched
from .report import write_pages, write_report
from .train import Trainer, check_folder


def prepare(
    config: Config,
    ranks: Ranks = ALONE,
    data: ImageData | Dataset[Any] | DataLoader[Any] | None = None,
    encoder: nn.Module | None = None,
) -> Trainer:
    """Load the data and return the trainer.

    The user's mistakes are found here, before any training. If one rank raises, all ranks raise.
    """
    with ranks.all_or_none():
        # Quick checks come first, before the images are read.
        config.check()
        pick_device(config.device, ranks)
        if encoder is None:
            encoders.find(config.model)
        if ranks.first:
            check_folder(config)
        if config.download and ranks.group and ranks.local == 0:
            _load(config, ranks)  # downloads; the other ranks of this machine find the files
    with ranks.all_or_none():
        trainer = Trainer(config, _load(config, ranks) if data is None else data, ranks, encoder=encoder)
    if ranks.group:
        # Paths, and how images are read, may differ between machines.
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
            "pixels a side; only the images of a folder are resized"
        )
    return data


def forewarn(trainer: Trainer) -> list[str]:
    """Check before training that the run can be evaluated and reported.

    Returns:
        Notes on behaviour that may surprise the user, one line each.

    Raises:
        ImportError: a package that the evaluation or the report needs is missing.
        ValueError: the data come from a DataLoader, on which an encoder cannot be evaluated.
    """
    data, config, asked = trainer.images, trainer.config, trainer.config.batch
    notes = [*data.notes, *check_ready(config, data)]
    if trainer.batch < asked:
        name = flag("accumulate_batch" if config.accumulate_batch else "batch_size")
        notes.append(f"{name} {asked} exceeds the {trainer.batch} training images: every step uses all of them")
    if config.resume and trainer.step >= trainer.last_step:
        notes.append(f"this run is finished, at step {trainer.step} of {trainer.last_step}: it is evaluated again")
    return notes


def describe(data: ImageData) -> str:
    """Return a line about the data, so that the user notices mistakes: the numbers of images and classes, and the names
    of the first classes."""
    images = f"{len(data.train_images):,} training and {len(data.test_images):,} test images"
    names = f" of {len(data.class_names)} classes ({listed(data.class_names)})" if data.class_names else ""
    return f"{data.title}: {images}{names}"


def finish(trainer: Trainer, command: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate a trained encoder and write the report, even if parts of the report cannot be measured or drawn.

    Args:
        trainer: the finished run.
        command: the command line that started the run, shown in the report.

    Returns:
        The content of metrics.json.

    Raises:
        OSError: the run's folder is not writable.
        ValueError: the data come from a DataLoader, on which an encoder cannot be evaluated.
    """
    data = trainer.images
    # If the evaluation kills the process (out of memory, say), the history and the settings have already been written.
    write_pages(trainer, Evaluation(notes=["The process ended before the encoder was evaluated."]), command)
    try:
        evaluation = evaluate(trainer.model, trainer.config, data, trainer.untrained)
    except Exception as error:
        evaluation = Evaluation(notes=[f"Not evaluated: the encoder ({why(error)})."])
    return write_report(trainer, evaluation, command)


def run(
    config: Config,
    command: Sequence[str] = (),
    *,
    data: ImageData | Dataset[Any] | None = None,
    encoder: nn.Module | None = None,
) -> dict[str, Any]:
    """Train, evaluate and report in one process. For several processes use `torchrun -m fastntxent.simclr`.

    Args:
        config: the settings.
        command: the command line, shown in the report.
        data: the images, as for `Trainer`; None: the data set that the settings name.
        encoder: a module that maps images to features, trained in place; None: the encoder that the settings name.

    Returns:
        The content of metrics.json.

    Raises:
        RuntimeError: torchrun has started several processes.
        ValueError, TypeError, FileNotFoundError, FileExistsError, ImportError: before training, for invalid settings
            or data.
        BlockingIOError: before training, if another run is writing to the folder.
        TrainingError, InterruptedRun: during training; see `Trainer.fit`.
    """
    if launched():
        raise RuntimeError("run() uses a single process: for several, start torchrun -m fastntxent.simclr")
    trainer = prepare(config, data=data, encoder=encoder)
    forewarn(trainer)
    with trainer.writing():
        trainer.fit()
        return finish(trainer, command)


def summarise(metrics: dict[str, Any], out: str) -> str:
    """Return the results in a few lines for the terminal, with question marks for characters that it cannot encode."""
    lines = []
    evaluation = metrics["evaluation"]
    for measure in ACCURACIES:
        scores = evaluation["scores"].get(measure, {})
        if scores:
            values = ", ".join(
                f"{name} {100 * scores[name]:.1f} %" if name in scores else f"{name} -" for name in REPRESENTATIONS
            )
            lines.append(f"{measure + ':':14}{values}")
    lines += evaluation["notes"] + evaluation["remarks"]
    verification = metrics["verification"]
    if verification:
        lines.append(
            f"{'verified:':14}{verification['checks']} times, with relative errors of the loss up to "
            f"{verification['max_loss_error']:.2g} and of the gradient up to {verification['max_gradient_error']:.2g}"
        )
    timing = metrics["timing"]
    lines.append(
        f"{'time:':14}training {timing['training_seconds']:.1f} s, evaluation {timing['evaluation_seconds']:.1f} s"
    )
    lines.append(f"{'report:':14}{Path(out) / 'report.html'}")
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return printable("\n".join(lines)).encode(encoding, "replace").decode(encoding)
