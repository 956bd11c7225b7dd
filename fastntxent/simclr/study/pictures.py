"""Draws the nearest images and the clusters, for raw pixels and for the trained encoder, as PNG."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ... import retrieve
from ...algebra import unit_rows
from ..data import ImageData
from ..figures import BLUE, INK, ORANGE, new_figure
from ..sources import require

Features = dict[str, tuple[Tensor, Tensor]]  # training and test features, by representation

SHOWN = {"raw pixels": "raw pixels", "trained": "the trained encoder"}
QUERIES, NEAREST = 8, 8
DPI = 72

Cell = tuple[Tensor, str]  # an image (C, H, W) in [0, 1], and the colour of its frame


def draw_neighbours(features: Features, data: ImageData, path: Path) -> None:
    """Draw test images with their nearest training images. An orange frame marks an image of another class."""
    queries = _hard_queries(features["raw pixels"], data)
    boards = {}
    for name, title in SHOWN.items():
        known, unknown = features[name]
        nearest = retrieve(unknown[queries], known, min(NEAREST, len(known))).indices
        wrong = data.train_labels[nearest] != data.test_labels[queries, None]
        boards[f"nearest by {title}"] = [
            [(data.test_images[query] / 255, BLUE)]
            + [
                (data.train_images[index] / 255, ORANGE if is_wrong else "white")
                for index, is_wrong in zip(found.tolist(), wrong_ones.tolist(), strict=True)
            ]
            for query, found, wrong_ones in zip(queries.tolist(), nearest, wrong, strict=True)
        ]
    _draw(boards, path)


def _hard_queries(raw: tuple[Tensor, Tensor], data: ImageData) -> Tensor:
    """Return the indices of test images on which raw pixels do worst, one for each of the first QUERIES classes."""
    found = data.train_labels[retrieve(raw[1], raw[0], min(NEAREST, len(raw[0]))).indices]
    hits = (found == data.test_labels[:, None]).sum(dim=1)
    rows = []
    for label in range(min(QUERIES, len(data.class_names))):
        members = (data.test_labels == label).nonzero().squeeze(1)
        rows.append(members[hits[members].argmin()])
    return torch.stack(rows)


def draw_clusters(features: Features, clusters: dict[str, Tensor], data: ImageData, path: Path) -> None:
    """Draw one row of test images per cluster, from the image nearest to its centre to the farthest."""
    boards = {}
    for name, title in SHOWN.items():
        u = unit_rows(features[name][1])
        rows = []
        for index in clusters[name].unique().tolist():
            members = (clusters[name] == index).nonzero().squeeze(1)
            order = members[(u[members] @ u[members].sum(dim=0)).argsort(descending=True)]
            chosen = order[torch.linspace(0, len(order) - 1, NEAREST + 2).long()]
            rows.append([(image / 255, "white") for image in data.test_images[chosen]])
        boards[f"clusters of {title}"] = rows
    _draw(boards, path)


def _draw(boards: dict[str, list[list[Cell]]], path: Path) -> None:
    """Draw boards (grids of images) side by side. Each board is drawn as one large image, because hundreds of axes
    would take a minute."""
    rows = max(map(len, boards.values()))
    figure = new_figure(12, 0.55 * rows + 0.4)
    for axes, (title, board) in zip(figure.subplots(1, len(boards)), boards.items(), strict=True):
        axes.imshow(torch.cat([torch.cat([_framed(*cell) for cell in row], dim=1) for row in board]).numpy())
        axes.set_title(title, fontsize=10, color=INK)
        axes.axis("off")
    figure.savefig(path, dpi=DPI)


def _framed(image: Tensor, colour: str) -> Tensor:
    """Return the image (H, W, 3) in a frame of this colour, with a white margin."""
    width = max(1, image.shape[-1] // 14)
    frame = torch.tensor(require("matplotlib.colors").to_rgb(colour))
    picture = image.permute(1, 2, 0).expand(-1, -1, 3)
    for edge in (frame, torch.ones(3)):
        height, length = picture.shape[:2]
        board = edge.expand(height + 2 * width, length + 2 * width, 3).clone()
        board[width:-width, width:-width] = picture
        picture = board
    return picture
