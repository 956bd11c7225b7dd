"""Downstream tasks without labels: clustering, retrieval, and detection of images unlike the training images.

Features are compared by angle, as in the loss. Labels are used only to score the results.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ... import retrieve
from ...algebra import unit_rows
from ..sources import require

Scores = dict[str, float]


def cluster(known: Tensor, unknown: Tensor, count: int) -> Tensor:
    """Fit k-means to the unit rows of `known` (the best of 10 starts). Return the cluster of each row of `unknown`."""
    kmeans = require("sklearn.cluster").KMeans(count, n_init=10, random_state=0)
    with warnings.catch_warnings():  # a collapsed encoder may give fewer distinct rows than clusters: not an error
        warnings.simplefilter("ignore", require("sklearn.exceptions").ConvergenceWarning)
        kmeans.fit(unit_rows(known).numpy())
    return torch.from_numpy(kmeans.predict(unit_rows(unknown).numpy())).long()


def clustering_scores(clusters: Tensor, labels: Tensor) -> Scores:
    """Return the agreement of clusters with classes: normalised mutual information and adjusted Rand index. Both are 1
    for identical partitions. For random partitions the adjusted Rand index is 0 on average."""
    metrics = require("sklearn.metrics")
    return {
        "NMI": float(metrics.normalized_mutual_info_score(labels.numpy(), clusters.numpy())),
        "ARI": float(metrics.adjusted_rand_score(labels.numpy(), clusters.numpy())),
    }


def precision(queries: Tensor, labels: Tensor, corpus: Tensor, corpus_labels: Tensor, k: int) -> float:
    """Return the mean precision at k: the share of each query's k nearest corpus rows that have its class."""
    found = corpus_labels[retrieve(queries, corpus, min(k, len(corpus))).indices]
    return float((found == labels[:, None]).float().mean())


def novelty(bank: Tensor, images: Tensor, k: int) -> Tensor:
    """Return each image's novelty: 1 minus the mean cosine similarity to the image's k nearest rows of the bank."""
    return 1 - retrieve(images, bank, min(k, len(bank))).scores.mean(dim=1)


def auroc(scores: Tensor, is_novel: Tensor) -> float:
    """Return the probability that a novel image scores higher than an image of a known class; 0.5 is chance."""
    return float(require("sklearn.metrics").roc_auc_score(is_novel.numpy(), scores.numpy()))
