"""The study's pictures of digits: nearest images and clusters, by raw pixels and by the trained encoder; PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import retrieve
from ...common import unit_rows
from ..data import ImageData
from ..figures import BLUE, INK, ORANGE, new_figure, show_image

Features = dict[str, tuple[Tensor, Tensor]]  # of the training and the test images, by representation

SHOWN = {"raw pixels": "raw pixels", "trained": "the trained encoder"}
QUERIES, NEAREST = 8, 8


def draw_neighbours(features: Features, data: ImageData, path: Path) -> None:
    """Test images and the training images nearest to them, by raw pixels and by the trained encoder; those of another
    class are framed."""
    hard = _hard_queries(features["raw pixels"], data)
    figure = new_figure(12, 0.62 * len(hard) + 0.5)
    for part, name in zip(figure.subfigures(1, 2, wspace=0.04), SHOWN, strict=True):
        known, unknown = features[name]
        nearest = retrieve(unknown[hard], known, min(NEAREST, len(known))).indices
        part.suptitle(f"nearest by {SHOWN[name]}", fontsize=10, color=INK)
        grid = part.subplots(len(hard), nearest.shape[1] + 1, squeeze=False)
        for row, query, found in zip(grid, hard.tolist(), nearest, strict=True):
            show_image(row[0], data.test_images[query] / 255)
            for axes, index in zip(row[1:], found.tolist(), strict=True):
                show_image(axes, data.train_images[index] / 255)
                if data.train_labels[index] != data.test_labels[query]:
                    _frame(axes, ORANGE)
            _frame(row[0], BLUE)
    figure.savefig(path, dpi=80)


def _hard_queries(raw: tuple[Tensor, Tensor], data: ImageData) -> Tensor:
    """For the first classes the test image whose neighbours by raw pixels are most often of another class."""
    found = data.train_labels[retrieve(raw[1], raw[0], min(NEAREST, len(raw[0]))).indices]
    hits = (found == data.test_labels[:, None]).sum(dim=1)
    rows = []
    for label in range(min(QUERIES, len(data.class_names))):
        members = (data.test_labels == label).nonzero().squeeze(1)
        rows.append(members[hits[members].argmin()])
    return torch.stack(rows)


def draw_clusters(features: Features, clusters: dict[str, Tensor], data: ImageData, path: Path) -> None:
    """A row for each cluster: its test images, from those nearest to its middle to the farthest."""
    count = len(data.class_names)
    figure = new_figure(12, 0.55 * count + 0.5)
    for part, name in zip(figure.subfigures(1, 2, wspace=0.04), SHOWN, strict=True):
        u = unit_rows(features[name][1])
        part.suptitle(f"clusters of {SHOWN[name]}", fontsize=10, color=INK)
        for index, row in enumerate(part.subplots(count, NEAREST + 2, squeeze=False)):
            members = (clusters[name] == index).nonzero().squeeze(1)
            order = (u[members] @ u[members].sum(dim=0)).argsort(descending=True)
            chosen = members[order[torch.linspace(0, len(order) - 1, len(row)).long()]].tolist() if len(order) else []
            for axes in row:
                axes.axis("off")  # an empty cluster has nothing to show
            for axes, image in zip(row, chosen, strict=False):
                show_image(axes, data.test_images[image] / 255)
    figure.savefig(path, dpi=80)


def _frame(axes: Any, colour: str) -> None:
    axes.axis("on")
    axes.spines[:].set_visible(True)
    axes.spines[:].set(color=colour, linewidth=2)
