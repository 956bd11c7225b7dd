"""Writes metrics.json for programs and report.html for people. The page is one file and needs no network."""

from __future__ import annotations

import base64
import html
import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..files import write_whole
from .evaluate import ACCURACIES, MEASURES, NAMES, REPRESENTATIONS, Evaluation, Scores, why
from .figures import CAPTION_LENGTH, MOST_CAPTIONS, colour_key, draw_curves, draw_embedding, draw_views
from .output import printable, write_text
from .page import PAGE
from .train import Trainer

_MEASURES = {
    "knn": ("k-NN accuracy", "Share of test images whose nearest training images, by angle, vote for the right class. "
            "Nothing is trained: the measure shows whether similar images lie close together. Higher is better."),
    "linear probe": ("Linear probe accuracy", "Share of test images that a linear classifier on the frozen features "
                     "gets right. The measure shows how well planes separate the classes. Higher is better."),
    "effective rank": ("Effective rank", "Number of directions that the features effectively use around their mean, "
                       "however small their spread. A collapse to one point shows in the uniformity instead."),
    "alignment": ("Alignment", "Mean squared distance between the embeddings of two views of the same test image: 0 if "
                  "the views coincide, 2 by chance. Lower is better, unless uniformity gets worse in return."),
    "uniformity": ("Uniformity", "How evenly the embeddings cover the sphere: 0 if all are one point, about -4 if they "
                   "are spread evenly. Lower is better."),
}  # fmt: skip


# If all embeddings were equally far apart, this uniformity would mean a squared distance of 0.05. Between two random
# embeddings, the squared distance is 2 on average.
COLLAPSED = -0.1
OPEN_NOTES = 5  # longer lists of notes on the data are folded away

_PICTURES: dict[str, tuple[str, Callable[[Trainer, Evaluation], bytes]]] = {
    "curves": ("Training curves", lambda trainer, _: draw_curves(
        trainer.history, trainer.steps_per_epoch, trainer.config.learn_temperature
    )),
    "embedding": ("Two maps of the test images", lambda trainer, found: draw_embedding(found, trainer.images)),
    "views": ("Images and their random views", lambda trainer, _: draw_views(trainer.config, trainer.images)),
}  # fmt: skip

# Each picture as the bytes of a PNG file, or the reason why there is none.
Pictures = dict[str, "bytes | str"]


def write_report(trainer: Trainer, evaluation: Evaluation, command: Sequence[str]) -> dict[str, Any]:
    """Write metrics.json and report.html, then each picture, then both files again, with the pictures in the report.

    A picture that cannot be drawn is left out, and the report says why. If drawing kills the process, metrics.json and
    a report without pictures have already been written.

    Args:
        trainer: the finished run.
        evaluation: the run's scores and test features.
        command: the command line that started the run, shown in the report.

    Returns:
        The content of metrics.json.

    Raises:
        OSError: the folder is not writable.
    """
    write_pages(trainer, evaluation, command)
    pictures: Pictures = {}
    for name, (_, draw) in _PICTURES.items():
        try:
            png = pictures[name] = draw(trainer, evaluation)
        except Exception as error:
            pictures[name] = why(error)
            evaluation = replace(evaluation, notes=[*evaluation.notes, f"Not drawn: {name}.png ({why(error)})."])
        else:
            write_whole(trainer.config.out / f"{name}.png", lambda file, png=png: file.write(png))  # type: ignore[misc]
    return write_pages(trainer, evaluation, command, pictures)


def write_pages(
    trainer: Trainer, evaluation: Evaluation, command: Sequence[str], pictures: Pictures | None = None
) -> dict[str, Any]:
    """Write metrics.json and report.html (without pictures if `pictures` is None). Return metrics.json's content."""
    metrics: dict[str, Any] = _for_json(collect_metrics(trainer, evaluation, command))
    out = trainer.config.out
    if pictures is None:
        pictures = dict.fromkeys(_PICTURES, "the process ended before it was drawn")
        for name in _PICTURES:  # an earlier run may have left pictures here
            (out / f"{name}.png").unlink(missing_ok=True)
    write_text(out / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    write_text(out / "report.html", render(metrics, trainer, evaluation, pictures))
    return metrics


def _for_json(value: Any) -> Any:
    """Return the value for JSON: numbers that are not finite become null, and lone surrogates question marks."""
    if isinstance(value, dict):
        return {printable(key): _for_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_for_json(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int)) else printable(value)


def collect_metrics(trainer: Trainer, evaluation: Evaluation, command: Sequence[str]) -> dict[str, Any]:
    """Return all measurements, and the settings and versions that are needed to repeat them."""
    steps = trainer.step
    return {
        "command": list(command),
        "config": trainer.config.to_dict(),
        "settings": trainer.settings,
        "versions": {
            "fastntxent": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scikit-learn": _version("scikit-learn"),
        },
        "machine": {
            "device": str(trainer.device),
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "ranks": trainer.ranks.world,
        },
        "data": {
            "name": trainer.images.name,
            "title": trainer.images.title or trainer.images.name,
            "train_images": len(trainer.images.train_images),
            "test_images": len(trainer.images.test_images),
            "image_shape": list(trainer.images.train_images.shape[1:]),
            "checksum": trainer.images.fingerprint(),
            "notes": list(trainer.images.notes),
        },
        "evaluation": evaluation.to_dict() | {"remarks": remarks(evaluation.scores)},
        "verification": _verification(trainer),
        "timing": {
            "steps": steps,
            "training_seconds": trainer.seconds,
            "images_per_step": trainer.batch,
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


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def remarks(scores: Scores) -> list[str]:
    """Return a line with advice for each sign that the encoder has learnt nothing; an empty list if there is none."""
    found = []
    worse: dict[str, list[str]] = {}
    for measure in ACCURACIES:
        values = scores.get(measure, {})
        if values.get("trained", 1.0) < 1:
            for other in REPRESENTATIONS[1:]:
                if values.get(other, -1.0) >= values["trained"]:
                    worse.setdefault(NAMES[other], []).append(MEASURES[measure])
    if worse:
        listed = ", or than ".join(f"{other} by {' and '.join(measures)}" for other, measures in worse.items())
        found.append(
            f"The trained encoder is no better than {listed}. More epochs, a larger batch, a lower temperature or "
            "a different augmentation (--augment) may help."
        )
    uniformity = scores.get("uniformity", {}).get("trained", -math.inf)
    ranks = scores.get("effective rank", {})
    if uniformity > COLLAPSED:
        found.append(
            f"The embeddings have collapsed: a uniformity of {uniformity:.2f} means that nearly all images map to one "
            "point. A lower --lr, a larger batch or a different augmentation (--augment) may help."
        )
    elif ranks.get("trained", math.inf) < 1.5 < 2 < ranks.get("raw pixels", 0):
        found.append(
            f"The features have collapsed: an effective rank of {ranks['trained']:.1f} means that they lie on a line. "
            "A lower --lr, a larger batch or a different augmentation (--augment) may help."
        )
    return found


def render(metrics: dict[str, Any], trainer: Trainer, evaluation: Evaluation, pictures: Pictures) -> str:
    """Return the page. Text from outside (paths, class names, the command) is escaped."""
    judged, timing, data = metrics["evaluation"], metrics["timing"], metrics["data"]
    channels, height, width = data["image_shape"]
    return PAGE.substitute(
        {name: _image(alt, pictures[name]) for name, (alt, _) in _PICTURES.items()},
        title=_escape(f"SimCLR on {data['title']}"),
        summary=_summary(metrics),
        remarks="".join(f"<p class=remark>{_escape(remark)}</p>" for remark in judged["remarks"]),
        scores=_scores_table(judged["scores"]),
        notes="".join(f"<p>{_escape(note)}</p>" for note in judged["notes"]),
        measures="".join(
            f"<dt>{title}</dt><dd>{text}</dd>" for key, (title, text) in _MEASURES.items() if key in judged["scores"]
        ),
        key=_colour_key(trainer, evaluation) if isinstance(pictures["embedding"], bytes) else "",
        verification=_verification_text(metrics["verification"]),
        command=" ".join(f"<span>{_escape(argument)}</span>" for argument in metrics["command"]),
        folder=_escape(repr(str(trainer.config.out))),
        channels=channels,
        height=height,
        width=width,
        training_seconds=f"{timing['training_seconds']:.1f}",
        evaluation_seconds=f"{timing['evaluation_seconds']:.1f}",
        settings=_pairs_table(metrics["settings"]),
        environment=_pairs_table(
            metrics["versions"] | metrics["machine"] | {key: data[key] for key in data if key != "notes"}
        ),
        data_notes=_data_notes(data["notes"]),
    )


def _summary(metrics: dict[str, Any]) -> str:
    timing, scores = metrics["timing"], metrics["evaluation"]["scores"]
    measure = next((measure for measure in ACCURACIES if measure in scores), "")
    tiles = [
        (f"{100 * scores[measure][name]:.1f} %", f"{MEASURES[measure]}, {name}")
        for name in REPRESENTATIONS
        if name in scores.get(measure, {})
    ]
    tiles.append((f"{timing['steps']:,}", f"steps of {timing['images_per_step']} images"))
    tiles.append((f"{timing['images_per_second']:,.0f}", "training images per second"))
    return "".join(f"<div><b>{_escape(value)}</b><span>{_escape(name)}</span></div>" for value, name in tiles)


def _scores_table(scores: Scores) -> str:
    columns = [name for name in REPRESENTATIONS if any(name in values for values in scores.values())]
    if not columns:
        return "<p>Nothing was measured.</p>"
    head = "".join(f"<th>{name}</th>" for name in columns)
    rows = []
    for measure, values in scores.items():
        cells = "".join(f"<td>{_score(measure, values.get(name))}</td>" for name in columns)
        rows.append(f"<tr><th>{_MEASURES[measure][0]}</th>{cells}</tr>")
    return _table("scores", f"<tr><th></th>{head}</tr>{''.join(rows)}")


def _score(measure: str, value: float | None) -> str:
    if value is None:
        return "&ndash;"
    if measure in ACCURACIES:
        return f"{100 * value:.1f} %"
    return f"{value:.{1 if measure == 'effective rank' else 2}f}"


def _colour_key(trainer: Trainer, evaluation: Evaluation) -> str:
    """Return the map's legend in HTML, for phones and for class names that the picture shortens or cannot draw."""
    groups = colour_key(evaluation, trainer.images)
    if len(groups) > MOST_CAPTIONS:
        return ""
    as_drawn = all(len(caption) <= CAPTION_LENGTH and caption.isascii() for caption, _, _ in groups)
    entries = "".join(
        f'<li><i style="background:{colour}"></i>{_escape(caption)}</li>' for caption, colour, _ in groups
    )
    return f'<ul class="key{" phone" if as_drawn else ""}">{entries}</ul>'


def _data_notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    entries = "".join(f"<li>{_escape(note)}</li>" for note in notes)
    opened = " open" if len(notes) <= OPEN_NOTES else ""
    return f"<details{opened}><summary>Notes on the data ({len(notes)})</summary><ul>{entries}</ul></details>"


def _verification_text(verification: dict[str, Any] | None) -> str:
    if verification is None:
        return "<p>The loss was not verified in this run; <code>--verify-every K</code> verifies it every K steps.</p>"
    rows = "".join(
        f"<tr><th>{part}</th><td>{verification[f'max_{part}_error']:.2g}</td>"
        f"<td>{verification[f'min_{part}_budget']:.2g}</td></tr>"
        for part in ("loss", "gradient")
    )
    checks = verification["checks"]
    return (
        f"<p>{checks} time{'' if checks == 1 else 's'} during training, the loss and its gradient were recomputed with "
        "the dense formula in float64 on the current embeddings. Every error was within its budget; otherwise "
        "the run would have stopped.</p>"
        + _table("scores", f"<tr><th></th><th>largest relative error</th><th>smallest budget</th></tr>{rows}")
    )


def _pairs_table(pairs: dict[str, Any]) -> str:
    rows = (
        f"<tr><th>{_escape(key)}</th><td>{'&ndash;' if value in (None, '') else _escape(value)}</td></tr>"
        for key, value in pairs.items()
    )
    return _table("pairs", "".join(rows))


def _table(kind: str, rows: str) -> str:
    return f"<div class=scroll><table class={kind}>{rows}</table></div>"


def _image(alt: str, picture: bytes | str) -> str:
    if isinstance(picture, str):
        return f"<p>{alt}: not drawn ({_escape(picture)}).</p>"
    return f'<img src="data:image/png;base64,{base64.b64encode(picture).decode("ascii")}" alt="{alt}">'


def _escape(value: object) -> str:
    return html.escape(printable(value))
