"""Is the representation any good? The same protocol for the trained encoder, the untrained one and raw pixels.

Both encoders get their BatchNorm statistics from one pass over the plain training images first: an untrained
network is otherwise judged with the meaningless statistics it was created with, a trained one with those of
augmented views.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import alignment, uniformity
from .augment import PRESETS, two_views
from .build import make_model, pick_device
from .config import Config
from .data import ImageData
from .models import SimCLR
from .sources import require
from .stream import stream
from .tally import Images

ROWS = 1024
RAW_SIZE = 32
REPRESENTATIONS = ("trained", "untrained", "raw pixels")

Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Evaluation:
    """What was measured, by measure and representation, with the test features the figures are drawn from."""

    scores: Scores
    features: dict[str, Tensor]
    labels: Tensor
    notes: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The numbers and notes, for JSON."""
        return {"scores": self.scores, "notes": self.notes, "seconds": self.seconds}


def evaluate(model: SimCLR, config: Config, data: ImageData) -> Evaluation:
    """Judge a trained model on the test images.

    Accuracies (k nearest neighbours, linear probe) need labels and are left out where there are none. Alignment and
    uniformity are those of the embeddings z of two random views of every test image; the effective rank, and the
    accuracies, are of the features h that a user of the encoder sees.
    """
    started = time.perf_counter()
    device = pick_device(config.device)
    train = _subset(data.train_images, data.train_labels, config.eval_limit)
    test = _subset(data.test_images, data.test_labels, config.eval_limit)
    models = {"trained": copy.deepcopy(model), "untrained": make_model(config, data, device)}
    features: dict[str, tuple[Tensor, Tensor]] = {}
    scores: Scores = {name: {} for name in ("knn", "linear probe", "effective rank", "alignment", "uniformity")}
    notes = []
    for name, candidate in models.items():
        recalibrate(candidate, train[0], device)
        features[name] = (
            encode(candidate.encoder, train[0], device),
            encode(candidate.encoder, test[0], device),
        )
        z_i, z_j = embed_views(candidate, test[0], config, device)
        scores["alignment"][name] = float(alignment(z_i, z_j))
        scores["uniformity"][name] = float(uniformity(torch.cat((z_i, z_j))))
    features["raw pixels"] = raw_pixels(train[0]), raw_pixels(test[0])

    for name, (known, unknown) in features.items():
        scores["effective rank"][name] = effective_rank(unknown)
        if data.is_labelled:
            labelled = (
                known[train[1] >= 0],
                train[1][train[1] >= 0],
                unknown[test[1] >= 0],
                test[1][test[1] >= 0],
            )
            scores["knn"][name] = knn_accuracy(*labelled, k=config.knn)
            scores["linear probe"][name] = probe_accuracy(*labelled)
    if not data.is_labelled:
        notes.append("The images carry no labels, so accuracies could not be measured.")
        del scores["knn"], scores["linear probe"]
    if max(len(data.train_images), len(data.test_images)) > config.eval_limit:
        notes.append(f"At most {config.eval_limit} images of either part were used.")
    test_features = {name: pair[1] for name, pair in features.items()}
    return Evaluation(scores, test_features, test[1], notes, time.perf_counter() - started)


def encode(module: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """Features of uint8 images, (N, F) float32 on the CPU, in eval mode and without a gradient."""
    module.eval()
    with torch.no_grad():
        return torch.cat([module(part.to(device).float() / 255).float().cpu() for part in images.split(ROWS)])


def recalibrate(model: nn.Module, images: Tensor, device: torch.device) -> None:
    """Set BatchNorm's running statistics to averages over `images`, in place."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a plain average over batches
    model.train()
    with torch.no_grad():
        for part in images.split(ROWS):
            if len(part) > 1:
                model(part.to(device).float() / 255)


def knn_accuracy(known: Tensor, known_labels: Tensor, unknown: Tensor, labels: Tensor, k: int) -> float:
    """Accuracy of a distance-weighted vote of the k nearest neighbours by cosine distance."""
    neighbors = require("sklearn.neighbors")
    vote = neighbors.KNeighborsClassifier(min(k, len(known)), weights="distance", metric="cosine", algorithm="brute")
    vote.fit(known.numpy(), known_labels.numpy())
    return float(vote.score(unknown.numpy(), labels.numpy()))


def probe_accuracy(known: Tensor, known_labels: Tensor, unknown: Tensor, labels: Tensor) -> float:
    """Accuracy of a logistic regression on features standardised by the training part."""
    linear_model, exceptions = require("sklearn.linear_model"), require("sklearn.exceptions")
    mean, std = known.mean(0), known.std(0).clamp(min=1e-6)
    probe = linear_model.LogisticRegression(C=0.1, max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
        probe.fit(((known - mean) / std).numpy(), known_labels.numpy())
    return float(probe.score(((unknown - mean) / std).numpy(), labels.numpy()))


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the normalised singular values of the centred features (Roy & Vetterli 2007)."""
    values = torch.linalg.svdvals(features.double() - features.double().mean(0))
    share = values / values.sum().clamp(min=1e-30)
    return math.exp(float(-torch.special.xlogy(share, share).sum()))


def embed_views(model: SimCLR, images: Tensor, config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """The embeddings of two random views of every image, the same views in every call."""
    model.eval()
    z: tuple[list[Tensor], list[Tensor]] = ([], [])
    with torch.no_grad():
        for index, part in enumerate(images.split(ROWS)):
            generator = stream(config.seed, "evaluation", index)
            for views, view in zip(z, two_views(part.to(device), PRESETS[config.preset], generator), strict=True):
                views.append(model(view).float())
    return torch.cat(z[0]), torch.cat(z[1])


def raw_pixels(images: Tensor) -> Tensor:
    """Pixels as features; large images are averaged down to 32 x 32, or the probe would take hours."""
    x = images.float() / 255
    if max(x.shape[2:]) > RAW_SIZE:
        x = F.adaptive_avg_pool2d(x, RAW_SIZE)
    return x.flatten(1)


def _subset(images: Images, labels: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """At most `limit` images, labelled ones first, the same ones in every run."""
    if len(images) <= limit:
        return images[:], labels
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    order = order[(labels[order] < 0).int().argsort(stable=True)][:limit]
    return images[order], labels[order]
