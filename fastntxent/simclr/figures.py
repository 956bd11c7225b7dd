"""The three pictures of a run, as PNG, drawn through Matplotlib's object interface: no pyplot, no window."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .augment import PRESETS, two_views
from .config import Config
from .data import ImageData
from .evaluate import Evaluation, why_unusable
from .history import History
from .selection import class_name, shortened
from .sources import UNLABELLED, Array, require
from .stream import stream

INK, BLUE, ORANGE, GREEN, GRID = "#222a33", "#2563a8", "#c2571a", "#2f7d4f", "#dfe3e8"
NO_LABEL = "#b8bec6"
N_SAMPLES = 8
MOST_CAPTIONS = 20  # beyond about 20 classes the colours repeat, so there is no legend
CAPTION_LENGTH = 24
# Differences below this fraction of the largest feature are rounding errors.
LEAST_SPREAD = 1e-6


@contextlib.contextmanager
def _plain_text() -> Iterator[None]:
    """In this block Matplotlib draws text without LaTeX, even if matplotlibrc turns LaTeX on, and gives no warnings."""
    with warnings.catch_warnings(), require("matplotlib").rc_context({"text.usetex": False}):
        warnings.simplefilter("ignore")
        yield


@_plain_text()
def draw_curves(history: History, steps_per_epoch: int, learnt_temperature: bool) -> bytes:
    """Plot loss, alignment, uniformity, learning rate and a learnt temperature against the step."""
    steps, measured = history.columns["steps"], history.columns["measured"]
    every = list(range(len(steps["loss"])))
    panels = [
        ("loss", every, steps["loss"], BLUE),
        ("alignment", measured["step"], measured["alignment"], GREEN),
        ("uniformity", measured["step"], measured["uniformity"], ORANGE),
        ("learning rate", every, steps["lr"], INK),
    ]
    if learnt_temperature:
        panels.append(("temperature", every, steps["temperature"], INK))
    rows = -(-len(panels) // 2)
    figure = new_figure(7.2, 2.1 * rows)
    grid = figure.subplots(rows, 2).flatten()
    for axes, (title, x, y, colour) in zip(grid, panels, strict=False):
        smooth = title == "loss" and len(y) >= 2 * steps_per_epoch
        marker = "o" if len(y) == 1 else ""  # a line needs two points to be seen
        axes.plot(x, y, marker, color=colour, linewidth=0.8 if smooth else 1.4, alpha=0.3 if smooth else 1)
        if smooth:
            # A smaller last batch has fewer negatives and thus a lower loss. Means over epochs do not show these dips.
            axes.plot(*_epoch_means(y, steps_per_epoch), color=colour, linewidth=1.8)
        if not y:
            _say(axes, "not measured")
        axes.set_title(title, fontsize=11, color=INK, loc="left")
        axes.set_xlabel("step", color=INK)
        axes.grid(color=GRID)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return to_png(figure)


def _epoch_means(values: list[float], steps_per_epoch: int) -> tuple[Array, Array]:
    whole = len(values) // steps_per_epoch
    middles = (np.arange(whole) + 0.5) * steps_per_epoch
    return middles, np.reshape(values[: whole * steps_per_epoch], (whole, steps_per_epoch)).mean(1)


@_plain_text()
def draw_embedding(evaluation: Evaluation, data: ImageData) -> bytes:
    """Draw maps of the test images, from raw pixels and from the trained encoder, coloured by class."""
    figure = new_figure(8, 4.6)
    groups = colour_key(evaluation, data)
    for axes, name in zip(figure.subplots(1, 2), ("raw pixels", "trained"), strict=True):
        points, words = lay_out(evaluation.features.get(name))
        if points is None:
            _say(axes, "not drawn")
        else:
            for _, colour, chosen in groups:
                axes.scatter(*points[chosen.numpy()].T, s=9, alpha=0.8, linewidths=0, color=colour)
        axes.set_title("raw pixels" if name == "raw pixels" else "features of the trained encoder", color=INK)
        axes.set_xlabel(words, color=INK, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color(GRID)
    if len(groups) <= MOST_CAPTIONS:
        _add_key(figure, [(shortened(caption, CAPTION_LENGTH), colour) for caption, colour, _ in groups])
    return to_png(figure)


def colour_key(evaluation: Evaluation, data: ImageData) -> list[tuple[str, str, Tensor]]:
    """Return the caption, the colour and the image mask of each class on the map, unlabelled images first."""
    labels = evaluation.labels
    found = labels.unique().tolist()
    palette = require("matplotlib").colormaps["tab10" if len(found) <= 10 else "tab20"]
    to_hex = require("matplotlib.colors").to_hex
    return [
        ("no label", NO_LABEL, labels == label)
        if label == UNLABELLED
        else (class_name(data, label), to_hex(palette(index % palette.N)), labels == label)
        for index, label in enumerate(found)
    ]


def _add_key(figure: Any, captions: list[tuple[str, str]]) -> None:
    """Add a legend with plain-text captions, even if they contain a dollar sign or begin with an underscore."""
    make_line = require("matplotlib.lines").Line2D
    dots = [make_line([], [], marker="o", linestyle="", markersize=6, color=colour) for _, colour in captions]
    longest = max((len(caption) for caption, _ in captions), default=0)
    legend = figure.legend(
        dots, [str(index) for index in range(len(dots))], loc="outside lower center", frameon=False, fontsize=9,
        ncols=max(1, min(5, int(8 / (0.4 + 0.08 * longest)))), handletextpad=0.2,
    )  # fmt: skip
    # The captions replace the numbers afterwards, because Matplotlib drops labels that begin with an underscore.
    for text, (caption, _) in zip(legend.get_texts(), captions, strict=True):
        text.set_parse_math(False)
        text.set_text(caption)


def lay_out(features: Tensor | None) -> tuple[Array | None, str]:
    """Return the positions of images in the plane, (N, 2), and a caption; or None and the reason.

    The method is t-SNE after PCA, or PCA alone if there are too few images or features for t-SNE. Features that differ
    only by rounding become one point. Their map would only show noise, and with a spread of 0 the initial positions
    would be NaN, on which scikit-learn's t-SNE crashes.
    """
    if features is None:
        return None, "there are no features"
    unusable = why_unusable(features)
    if unusable:
        return None, unusable
    rows, columns = features.shape
    x = features.numpy()
    largest = float(np.abs(x).max())
    if np.ptp(x, axis=0).max() <= LEAST_SPREAD * largest:
        return np.zeros((rows, 2)), "all images have the same features"
    x = np.ldexp(x, -math.frexp(largest)[1])  # exact, and squares of small features no longer underflow
    count = min(50, rows, columns)
    points = np.asarray(require("sklearn.decomposition").PCA(count, random_state=0).fit_transform(x))
    plane = np.pad(points, ((0, 0), (0, max(0, 2 - count))))[:, :2]
    if rows < 50 or columns < 3:
        return plane, "two principal components"
    start = (plane / plane[:, 0].std() * 1e-4).astype(np.float32)
    tsne = require("sklearn.manifold").TSNE(2, perplexity=min(30, rows / 4), init=start, random_state=0)
    # Use one thread: more threads do not help with so few points, and cost minutes on a busy machine.
    with require("threadpoolctl").threadpool_limits(1):
        return np.asarray(tsne.fit_transform(points)), "t-SNE"


@_plain_text()
def draw_views(config: Config, data: ImageData) -> bytes:
    """Draw a few test images, each above two of its random views, which the encoder should map to the same point."""
    count = min(N_SAMPLES, len(data.test_images))
    chosen = torch.linspace(0, len(data.test_images) - 1, count, dtype=torch.float64).long()
    images = data.test_images[chosen]
    views = two_views(images, PRESETS[config.preset], stream(config.seed, "figure", 0))
    figure = new_figure(0.8 * count + 0.8, 2.6)
    grid = figure.subplots(3, count, squeeze=False)
    captions = ("image", "view 1", "view 2")
    for row, pictures, caption in zip(grid, (images.float() / 255, *views), captions, strict=True):
        for axes, picture in zip(row, pictures, strict=True):
            _show(axes, picture)
        row[0].set_ylabel(caption, color=INK, rotation=0, ha="right", va="center", labelpad=8)
    return to_png(figure)


def new_figure(width: float, height: float) -> Any:
    """Return a figure of this size in inches, with automatic layout, that can be saved in any format."""
    figure = require("matplotlib.figure").Figure(figsize=(width, height), layout="constrained", facecolor="white")
    # With a canvas attached, savefig does not depend on the user's configured backend.
    require("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def to_png(figure: Any) -> bytes:
    """Return the figure as the bytes of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=200)
    return file.getvalue()


def _say(axes: Any, words: str) -> None:
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color=INK)


def _show(axes: Any, picture: Tensor) -> None:
    channels = len(picture)
    shown = picture if channels in (1, 3) else picture[:3] if channels > 3 else picture[:1]
    axes.imshow(shown.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
