"""The study's measures of a model, on the test images. Labels are used only to score the model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ... import alignment, contrastive_accuracy, effective_rank, uniformity
from ...algebra import unit_rows
from ..build import pick_device
from ..config import Config
from ..data import ImageData
from ..evaluate import embed_views, encode, knn_accuracy, probe_accuracy, recalibrate
from ..models import SimCLR
from ..selection import ROWS

BINS = 50  # of a histogram of similarities, from -1 to 1
NEIGHBOURS = 5

Measures = dict[str, float]


class Snapshot:
    """The outputs of a model at one point of training: the embeddings z of two views of every test image, and the
    features h and embeddings z of the unaugmented training and test images."""

    def __init__(self, model: SimCLR, config: Config, data: ImageData) -> None:
        device = pick_device(config.device)
        model = copy.deepcopy(model)
        recalibrate(model, data.train_images[:], device)
        self.z_i, self.z_j = embed_views(model, data.test_images[:], config, device)
        self.train = {"h": encode(model.encoder, data.train_images[:], device)}
        self.test = {"h": encode(model.encoder, data.test_images[:], device)}
        for part, h in ((self.train, self.train["h"]), (self.test, self.test["h"])):
            with torch.no_grad():
                part["z"] = model.projector(h)
        self.train_labels, self.test_labels = data.train_labels, data.test_labels


def quality(snapshot: Snapshot) -> Measures:
    """Return the measures that are recorded during training.

    The effective rank is computed on the unit rows of the test images, without centring. It is then 1 if all rows have
    collapsed to a point; after centring it would describe the noise that remains.
    """
    z_i, z_j = snapshot.z_i, snapshot.z_j
    measures = {
        "alignment": float(alignment(z_i, z_j)),
        "uniformity": float(uniformity(torch.cat((z_i, z_j)))),
        "contrastive accuracy": float(contrastive_accuracy(z_i, z_j)),
    }
    for name in ("z", "h"):
        known, unknown = snapshot.train[name], snapshot.test[name]
        measures[f"effective rank {name}"] = float(effective_rank(unit_rows(unknown)))
        measures[f"knn {name}"] = knn_accuracy(
            known, snapshot.train_labels, unknown, snapshot.test_labels, k=NEIGHBOURS
        )
    return measures


def final_quality(snapshot: Snapshot, temperature: float) -> dict[str, Any]:
    """Return the further measures of a finished run, besides `quality`."""
    sims = similarities(snapshot.z_i, snapshot.z_j, snapshot.test_labels)
    return {
        "linear": probe_accuracy(snapshot.train["h"], snapshot.train_labels, snapshot.test["h"], snapshot.test_labels),
        "effective negatives": effective_negatives(snapshot.z_i, snapshot.z_j, temperature),
        "negatives": 2 * len(snapshot.z_i) - 2,
        "similarities": {name: _summary(values) for name, values in sims.items()},
    }


def similarities(z_i: Tensor, z_j: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the cosine similarities of positives, of negatives of the same class, and of negatives of other classes.

    Each unordered pair of rows appears once. Memory grows with M^2, which suits a test set but not a training step.
    """
    u = unit_rows(torch.cat((z_i, z_j)))
    n, M = len(z_i), len(u)
    rows, columns = torch.triu_indices(M, M, offset=1)
    sims = (u @ u.T)[rows, columns]
    is_positive = columns - rows == n
    same_class = (labels.repeat(2)[rows] == labels.repeat(2)[columns]) & ~is_positive
    return {
        "positives": sims[is_positive],
        "same class": sims[same_class],
        "other classes": sims[~is_positive & ~same_class],
    }


def effective_negatives(z_i: Tensor, z_j: Tensor, temperature: float) -> float:
    r"""Return the effective number of negatives in a row's gradient, averaged over the rows.

    .. math:: \frac{1}{2N} \sum_i \exp\Big(-\sum_j P_{ij} \log P_{ij}\Big),
        \qquad P_{ij} \propto e^{s_{ij}/\tau} \text{ over the negatives of } i

    This is 2N - 2 if all negatives have the same weight, and 1 if the nearest negative has all the weight.
    """
    u = unit_rows(torch.cat((z_i, z_j))).double()
    n, M = len(z_i), len(u)
    total = 0.0
    for rows in torch.arange(M).split(ROWS):
        logits = u[rows] @ u.T / temperature
        logits.scatter_(1, torch.stack((rows, (rows + n) % M), dim=1), -torch.inf)  # the row itself and its positive
        total += float(torch.special.entr(logits.softmax(dim=1)).sum(dim=1).exp().sum())
    return total / M


def _summary(sims: Tensor) -> dict[str, Any]:
    if len(sims) == 0:  # no two test images share a class, or all of them do
        return {"mean": 0.0, "std": 0.0, "histogram": [0] * BINS}
    histogram = torch.histc(sims.clamp(-1, 1), BINS, -1, 1).long().tolist()
    return {"mean": float(sims.mean()), "std": float(sims.std(correction=0)), "histogram": histogram}
