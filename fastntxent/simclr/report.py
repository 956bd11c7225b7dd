"""metrics.json for programs and report.html for people; the page needs no file and no network besides itself."""

from __future__ import annotations

import base64
import html
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from .data import ImageData
from .evaluate import REPRESENTATIONS, Evaluation
from .figures import draw_curves, draw_embedding, draw_views
from .page import PAGE
from .sources import require
from .train import Trainer

_MEASURES = {
    "knn": ("k-NN accuracy", "Share of the test images whose nearest training images, by angle, vote for the right "
            "class. No training of any kind: it asks whether like lies near like. Higher is better."),
    "linear probe": ("Linear probe accuracy", "Share of the test images that a linear classifier on frozen features "
                     "gets right. It asks whether classes can be told apart by straight cuts. Higher is better."),
    "effective rank": ("Effective rank", "How many directions the features really use around their mean. It says "
                       "nothing of how far they spread: collapse to a point shows in the uniformity."),
    "alignment": ("Alignment", "Mean squared distance between the embeddings of two views of one test image: 0 if "
                  "views do not matter, 2 by chance. Lower is better, unless uniformity is lost for it."),
    "uniformity": ("Uniformity", "How evenly the embeddings cover the sphere: 0 if all are one point, about -4 if "
                   "spread evenly. Lower is better."),
}  # fmt: skip


def write_report(trainer: Trainer, evaluation: Evaluation, command: Sequence[str]) -> dict[str, Any]:
    """Write curves.png, embedding.png, views.png, metrics.json and report.html into the run's folder.

    Args:
        trainer: the finished run.
        evaluation: its scores and test features.
        command: the command line that started it, for the record.

    Returns:
        What metrics.json holds.
    """
    out, config, data = trainer.config.out, trainer.config, trainer.data
    draw_curves(trainer.history, trainer.steps_per_epoch, config.learn_temperature, out / "curves.png")
    draw_embedding(evaluation, data, out / "embedding.png")
    draw_views(config, data, out / "views.png")
    metrics = collect_metrics(trainer, evaluation, command)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (out / "report.html").write_text(render(metrics, data, out), encoding="utf-8")
    return metrics


def collect_metrics(trainer: Trainer, evaluation: Evaluation, command: Sequence[str]) -> dict[str, Any]:
    """Everything that was measured, and what it takes to measure it again."""
    steps = trainer.step
    return {
        "command": list(command),
        "config": trainer.config.to_dict(),
        "versions": {
            "fastntxent": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scikit-learn": require("sklearn").__version__,
        },
        "machine": {
            "device": str(trainer.device),
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "ranks": trainer.ranks.world,
        },
        "data": {
            "name": trainer.data.name,
            "train_images": len(trainer.data.train_images),
            "test_images": len(trainer.data.test_images),
            "image_shape": list(trainer.data.train_images.shape[1:]),
            "checksum": trainer.data.fingerprint(),
        },
        "evaluation": evaluation.to_dict(),
        "verification": _verification(trainer),
        "timing": {
            "steps": steps,
            "training_seconds": trainer.seconds,
            "images_per_second": steps * trainer.batch / max(trainer.seconds, 1e-9),
            "evaluation_seconds": evaluation.seconds,
        },
        "history": trainer.history.columns,
    }


def _verification(trainer: Trainer) -> dict[str, Any] | None:
    verified = trainer.history.columns["verified"]
    if not verified:
        return None
    worst = {f"max_{name}": max(values) for name, values in verified.items() if name.endswith("_error")}
    budgets = {f"min_{name}": min(values) for name, values in verified.items() if name.endswith("_budget")}
    return {"checks": len(verified["step"]), **worst, **budgets}


def render(metrics: dict[str, Any], data: ImageData, out: Path) -> str:
    """The page. Whatever came from outside (paths, class names, the command) is escaped."""
    scores, timing = metrics["evaluation"]["scores"], metrics["timing"]
    return PAGE.substitute(
        title=_escape(f"SimCLR on {data.name}"),
        summary=_summary(metrics, data),
        scores=_scores_table(scores),
        notes="".join(f"<p>{_escape(note)}</p>" for note in metrics["evaluation"]["notes"]),
        measures="".join(
            f"<dt>{title}</dt><dd>{text}</dd>" for key, (title, text) in _MEASURES.items() if key in scores
        ),
        verification=_verification_text(metrics["verification"]),
        curves=_image(out / "curves.png"),
        embedding=_image(out / "embedding.png"),
        views=_image(out / "views.png"),
        command=_escape(" ".join(metrics["command"])),
        checkpoint=_escape(repr(str(out / "checkpoint.pt"))),
        training_seconds=f"{timing['training_seconds']:.1f}",
        evaluation_seconds=f"{timing['evaluation_seconds']:.1f}",
        settings=_pairs_table(metrics["config"]),
        environment=_pairs_table(metrics["versions"] | metrics["machine"] | metrics["data"]),
    )


def _summary(metrics: dict[str, Any], data: ImageData) -> str:
    timing, config = metrics["timing"], metrics["config"]
    tiles = []
    knn = metrics["evaluation"]["scores"].get("knn")
    if knn:
        tiles = [(f"{100 * knn[name]:.1f} %", f"k-NN accuracy, {name}") for name in REPRESENTATIONS]
    tiles.append((f"{timing['steps']:,}", f"steps of {config['accumulate_batch'] or config['batch_size']} images"))
    tiles.append((f"{timing['images_per_second']:,.0f}", "training images per second"))
    return "".join(f"<div><b>{_escape(value)}</b><span>{_escape(name)}</span></div>" for value, name in tiles)


def _scores_table(scores: dict[str, dict[str, float]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in REPRESENTATIONS)
    rows = []
    for measure, values in scores.items():
        accuracy = measure in ("knn", "linear probe")
        digits = 1 if measure == "effective rank" else 2
        cells = [f"{100 * values[n]:.1f} %" if accuracy else f"{values[n]:.{digits}f}" if n in values else "&ndash;"
                 for n in REPRESENTATIONS]  # fmt: skip
        rows.append(f"<tr><th>{_MEASURES[measure][0]}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table class=scores><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _verification_text(verification: dict[str, Any] | None) -> str:
    if verification is None:
        return "<p>Not asked for in this run; <code>--verify-every K</code> checks every K-th step.</p>"
    rows = "".join(
        f"<tr><th>{part}</th><td>{verification[f'max_{part}_error']:.2g}</td>"
        f"<td>{verification[f'min_{part}_budget']:.2g}</td></tr>"
        for part in ("loss", "gradient")
    )
    return (
        f"<p>{verification['checks']} times during training the loss and its gradient were computed again by the "
        "dense formula in float64, on the embeddings of that very step. Every error was within its budget; had one "
        "not been, the run would have stopped there.</p><table class=scores><tr><th></th><th>largest relative error"
        f"</th><th>smallest budget</th></tr>{rows}</table>"
    )


def _pairs_table(pairs: dict[str, Any]) -> str:
    rows = (f"<tr><th>{_escape(key)}</th><td>{_escape(value)}</td></tr>" for key, value in pairs.items())
    return f"<table>{''.join(rows)}</table>"


def _image(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _escape(value: object) -> str:
    return html.escape(str(value))
