"""A representation put to use without labels: clusters, nearest images, and images unlike any that were seen.

Everything goes by the angle between features, as the loss does; labels only judge the outcome.
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
    """k-means on the unit rows of `known` (10 starts, the best kept); the cluster of each row of `unknown`."""
    kmeans = require("sklearn.cluster").KMeans(count, n_init=10, random_state=0)
    with warnings.catch_warnings():  # fewer distinct rows than clusters: a collapsed encoder is no error
        warnings.simplefilter("ignore", require("sklearn.exceptions").ConvergenceWarning)
        kmeans.fit(unit_rows(known).numpy())
    return torch.from_numpy(kmeans.predict(unit_rows(unknown).numpy())).long()


def clustering_scores(clusters: Tensor, labels: Tensor) -> Scores:
    """Agreement of clusters with classes: normalised mutual information and the adjusted Rand index, both 1 for the
    same partition, the second 0 by chance."""
    metrics = require("sklearn.metrics")
    return {
        "NMI": float(metrics.normalized_mutual_info_score(labels.numpy(), clusters.numpy())),
        "ARI": float(metrics.adjusted_rand_score(labels.numpy(), clusters.numpy())),
    }


def precision(queries: Tensor, labels: Tensor, corpus: Tensor, corpus_labels: Tensor, k: int) -> float:
    """Precision at k: the share of the k nearest rows of the corpus that have the query's class."""
    found = corpus_labels[retrieve(queries, corpus, min(k, len(corpus))).indices]
    return float((found == labels[:, None]).float().mean())


def novelty(bank: Tensor, images: Tensor, k: int) -> Tensor:
    """How unlike the bank a row is: 1 minus its mean similarity to its k nearest rows there."""
    return 1 - retrieve(images, bank, min(k, len(bank))).scores.mean(dim=1)


def auroc(scores: Tensor, is_novel: Tensor) -> float:
    """The probability that a novel image has the higher score than one of the known classes; 0.5 is chance."""
    return float(require("sklearn.metrics").roc_auc_score(is_novel.numpy(), scores.numpy()))
