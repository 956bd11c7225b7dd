"""Conducts the study: trains every run, tests the encoder in downstream tasks, and writes the record and the report."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from ... import __version__
from ..build import make_model
from ..config import Config
from ..data import ImageData, load_data
from ..evaluate import encode, raw_pixels, recalibrate
from ..models import SimCLR
from ..sources import require
from . import downstream, pictures, plots
from .measure import NEIGHBOURS
from .pictures import Features
from .plan import TEMPERATURE, Plan, temperature_run
from .report import write_report
from .runs import Record, open_trainer, recorded, train, write

RECORD = "study.json"
ANOMALIES = "anomaly.json"
RETRIEVED = 10


def conduct(plan: Plan, out: Path, seed: int = 0, say: Callable[[str], None] = print) -> Record:
    """Train the runs that are missing, measure them, and write study.json, the figures and report.html.

    Everything runs on one thread. A network this small gains little from a second thread, and with a single thread the
    results do not depend on the number of cores.

    Args:
        plan: the runs and their settings.
        out: the folder of the study, with a subfolder for each run. An interrupted study is continued.
        seed: the seed of every run.
        say: called with one line of progress at a time.

    Returns:
        The content of study.json.

    Raises:
        ValueError: `out` holds one of the runs with different settings, for example another seed.
        ImportError: a package is missing.
        TrainingError: see `Trainer.fit`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with require("threadpoolctl").threadpool_limits(1):
            return _conduct(plan, out, seed, say)
    finally:
        torch.set_num_threads(threads)


def _conduct(plan: Plan, out: Path, seed: int, say: Callable[[str], None]) -> Record:
    data = load_data(plan.data, None, 32, False)
    runs = {}
    for name, config in plan.runs(out, seed).items():
        say(f"{name}: {plan.epochs} epochs")
        runs[name], trainer = train(config, data, plan.measured)
        if name == temperature_run(TEMPERATURE):
            reference = trainer
    say("clustering and retrieval")
    wall, cpu = time.perf_counter(), time.process_time()
    features = representations(reference.model, reference.config, data)
    clusters = {name: downstream.cluster(*pair, len(data.class_names)) for name, pair in features.items()}
    uses = {name: _scores(*pair, clusters[name], data) for name, pair in features.items()}
    pictures.draw_neighbours(features, data, out / "neighbours.png")
    pictures.draw_clusters(features, clusters, data, out / "clusters.png")
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}

    anomalies: list[Record] = []
    for group, config in plan.held_out_runs(out, seed).items():
        say(f"without {', '.join(map(str, group))}: {plan.held_out_epochs} epochs")
        anomalies += held_out(config, data, group)

    record = {
        "plan": asdict(plan),
        "seed": seed,
        "versions": {"fastntxent": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "data": {
            "name": data.name,
            "train": len(data.train_images),
            "test": len(data.test_images),
            "classes": len(data.class_names),
        },
        "runs": runs,
        "uses": uses,
        "anomalies": anomalies,
        "seconds": {
            clock: sum(part["seconds"][clock] for part in (*runs.values(), *anomalies)) + seconds[clock]
            for clock in ("wall", "cpu")
        },
    }
    record = json.loads(json.dumps(record))  # the same as when read from the file: tuples become lists
    write(out / RECORD, record)
    plots.draw(record, out)
    write_report(record, out)
    return record


def representations(model: SimCLR, config: Config, data: ImageData) -> Features:
    """Return the training and test features of the trained encoder, of the untrained one, and of raw pixels."""
    device = torch.device("cpu")
    found = {}
    for name, candidate in {"trained": model, "untrained": make_model(config, data, device)}.items():
        recalibrate(candidate, data.train_images[:], device)
        found[name] = (
            encode(candidate.encoder, data.train_images[:], device),
            encode(candidate.encoder, data.test_images[:], device),
        )
    found["raw pixels"] = raw_pixels(data.train_images[:]), raw_pixels(data.test_images[:])
    return found


def _scores(known: Tensor, unknown: Tensor, clusters: Tensor, data: ImageData) -> downstream.Scores:
    return {
        **downstream.clustering_scores(clusters, data.test_labels),
        "precision": downstream.precision(unknown, data.test_labels, known, data.train_labels, RETRIEVED),
    }


def held_out(config: Config, data: ImageData, group: tuple[int, ...]) -> list[Record]:
    """Train without a group of classes, then detect each class of the group among test images of known classes.

    Returns:
        One record for each class of the group: its AUROC by representation, and its share of the run time.
    """
    done = recorded(config, ANOMALIES)
    wall, cpu = time.perf_counter(), time.process_time()
    known = without(data, group)
    trainer = open_trainer(config, known)
    trainer.fit()
    if done:
        return done["classes"]
    features = representations(trainer.model, config, known)
    rows: list[Record] = []
    for novel in group:
        chosen = (data.test_labels == novel) | ~torch.isin(data.test_labels, torch.tensor(group))
        is_novel = data.test_labels[chosen] == novel
        rows.append({
            "class": data.class_names[novel],
            "without": [data.class_names[label] for label in group],
            "AUROC": {
                name: downstream.auroc(downstream.novelty(bank, images[chosen], NEIGHBOURS), is_novel)
                for name, (bank, images) in features.items()
            },
        })  # fmt: skip
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    for row in rows:  # the group's classes share one encoder, so divide the time
        row["seconds"] = {"wall": wall / len(group), "cpu": cpu / len(group)}
    write(config.out / ANOMALIES, {"classes": rows})
    return rows


def without(data: ImageData, group: tuple[int, ...]) -> ImageData:
    """Return the data without the training images of these classes. The test images stay complete."""
    kept = ~torch.isin(data.train_labels, torch.tensor(group))
    return replace(data, train_images=data.train_images[kept], train_labels=data.train_labels[kept])
