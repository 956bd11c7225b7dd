"""The three pictures of a run. Matplotlib's object interface only: no global state, no window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .augment import PRESETS, two_views
from .config import Config
from .data import ImageData
from .evaluate import Evaluation
from .history import History
from .sources import UNLABELLED, Array, require
from .stream import stream

INK, BLUE, ORANGE, GREEN, GRID = "#222a33", "#2563a8", "#c2571a", "#2f7d4f", "#dfe3e8"
MAX_POINTS = 1000
N_SAMPLES = 10


def draw_curves(history: History, steps_per_epoch: int, learnt_temperature: bool, path: Path) -> None:
    """Loss, alignment, uniformity, learning rate and, where it is learnt, the temperature, against the step."""
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
    figure = new_figure(2.7 * len(panels), 2.6)
    for axes, (title, x, y, colour) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        smooth = title == "loss" and len(y) >= 2 * steps_per_epoch
        axes.plot(x, y, color=colour, linewidth=0.8 if smooth else 1.4, alpha=0.3 if smooth else 1)
        if smooth:
            # A smaller last batch has fewer negatives, hence a lower loss: the mean of an epoch is free of that.
            axes.plot(*_epoch_means(y, steps_per_epoch), color=colour, linewidth=1.8)
        axes.set_title(title, fontsize=11, color=INK, loc="left")
        axes.set_xlabel("step", color=INK)
        axes.grid(color=GRID)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=8)
    figure.savefig(path, dpi=150)


def _epoch_means(values: list[float], steps_per_epoch: int) -> tuple[Array, Array]:
    whole = len(values) // steps_per_epoch
    middles = (np.arange(whole) + 0.5) * steps_per_epoch
    return middles, np.reshape(values[: whole * steps_per_epoch], (whole, steps_per_epoch)).mean(1)


def draw_embedding(evaluation: Evaluation, data: ImageData, path: Path) -> None:
    """Test images as points of a t-SNE map, from raw pixels and from the trained encoder, coloured by class."""
    figure = new_figure(11, 5.2)
    labels = evaluation.labels[:MAX_POINTS]
    for axes, name in zip(figure.subplots(1, 2), ("raw pixels", "trained"), strict=True):
        points = _flatten_to_2d(evaluation.features[name][:MAX_POINTS])
        for index, label in enumerate(labels.unique().tolist()):
            chosen = (labels == label).numpy()
            caption = "no label" if label == UNLABELLED else data.class_names[label]
            axes.scatter(*points[chosen].T, s=9, alpha=0.8, linewidths=0, label=caption, color=_colour(index, label))
        axes.set_title("raw pixels" if name == "raw pixels" else "features of the trained encoder", color=INK)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color(GRID)
    handles, captions = axes.get_legend_handles_labels()
    if len(captions) <= 20:
        figure.legend(handles, captions, loc="outside right center", frameon=False, markerscale=2.5, fontsize=9)
    figure.savefig(path, dpi=130)


def draw_views(config: Config, data: ImageData, path: Path) -> None:
    """A few images, each above two of its random views: what the encoder is asked to map to one place."""
    count = min(N_SAMPLES, len(data.test_images))
    chosen = torch.linspace(0, len(data.test_images) - 1, count).long()
    images = data.test_images[chosen]
    views = two_views(images, PRESETS[config.preset], stream(config.seed, "figure", 0))
    figure = new_figure(1.05 * count + 0.9, 3.5)
    grid = figure.subplots(3, count, squeeze=False)
    captions = ("image", "view 1", "view 2")
    for row, pictures, caption in zip(grid, (images.float() / 255, *views), captions, strict=True):
        for axes, picture in zip(row, pictures, strict=True):
            _show(axes, picture)
        row[0].set_ylabel(caption, color=INK, rotation=0, ha="right", va="center", labelpad=8)
    figure.savefig(path, dpi=110)


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches, laid out by itself, that any format can be saved from."""
    figure = require("matplotlib.figure").Figure(figsize=(width, height), layout="constrained", facecolor="white")
    # Attaching a canvas is what makes savefig independent of the user's configured backend.
    require("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def _show(axes: Any, picture: Tensor) -> None:
    axes.imshow(picture.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _colour(index: int, label: int) -> str:
    palette = require("matplotlib").colormaps["tab10" if index < 10 else "tab20"]
    return "#b8bec6" if label == UNLABELLED else palette(index % 20)


def _flatten_to_2d(features: Tensor) -> Array:
    """t-SNE after PCA, or PCA alone for too few points to have neighbourhoods."""
    decomposition, manifold = require("sklearn.decomposition"), require("sklearn.manifold")
    rows, columns = features.shape
    count = min(50, rows, columns)
    points = decomposition.PCA(count, random_state=0).fit_transform(features.numpy())
    if rows < 50 or columns < 3:
        return np.asarray(np.pad(points, ((0, 0), (0, max(0, 2 - count))))[:, :2])
    tsne = manifold.TSNE(2, perplexity=min(30, rows / 4), init="pca", random_state=0)
    # One thread: so few points gain nothing from more, and lose minutes to them on a busy machine.
    with require("threadpoolctl").threadpool_limits(1):
        return np.asarray(tsne.fit_transform(points))
