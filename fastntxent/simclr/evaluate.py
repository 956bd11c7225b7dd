"""Evaluates the representation, with the same protocol for the trained encoder, the untrained one and raw pixels.

BatchNorm statistics are first recomputed in one pass over the evaluation's training images without augmentation.
Otherwise the untrained network would use its meaningless initial statistics, and the trained one the statistics of
augmented views.

A failure of the evaluation must not cost the user a finished run. So `check_ready` finds missing packages before
training, and a measure that cannot be computed becomes a note. To bound the memory, images are read in small parts.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import alignment, uniformity
from .augment import PRESETS, two_views
from .build import make_model, pick_device
from .config import Config
from .data import ImageData
from .models import SimCLR
from .output import first_line, printable
from .selection import ROWS, Choice, choose, in_parts, rows_at_once, shortened, slices
from .sources import require
from .stream import stream
from .tally import Images

RAW_SIZE = 32
RAW_VALUES = 1024  # maximum number of values kept from an image larger than RAW_SIZE
POINTS = 1000  # test images on the map of the report
EXACT_VALUES = 2**23  # the effective rank of larger feature matrices is computed without an SVD
WORKING_MIB = 32  # memory for the distances that scikit-learn holds at a time
TOO_LARGE = 1e15  # the sum of squares of larger features may overflow float32
REPRESENTATIONS = ("trained", "untrained", "raw pixels")
NAMES = {"trained": "the trained encoder", "untrained": "the untrained encoder", "raw pixels": "raw pixels"}
MEASURES = {
    "knn": "k-NN accuracy", "linear probe": "linear probe accuracy", "effective rank": "effective rank",
    "alignment": "alignment", "uniformity": "uniformity",
}  # fmt: skip
ACCURACIES = ("knn", "linear probe")
# The modules that the evaluation and the figures import, each with its package.
NEEDED = {
    "numpy": "numpy", "sklearn.decomposition": "scikit-learn", "sklearn.exceptions": "scikit-learn",
    "sklearn.linear_model": "scikit-learn", "sklearn.manifold": "scikit-learn", "sklearn.neighbors": "scikit-learn",
    "threadpoolctl": "threadpoolctl", "matplotlib": "matplotlib", "matplotlib.figure": "matplotlib",
    "matplotlib.backends.backend_agg": "matplotlib",
}  # fmt: skip

Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Evaluation:
    """The scores by measure and representation, and the test features from which the report draws its map.

    Attributes:
        scores: finite numbers; a measure that could not be computed is absent.
        features: features of up to POINTS test images, by representation.
        labels: labels of the same images.
        notes: one line for each thing that was left out, with the reason.
        seconds: duration of the evaluation.
    """

    scores: Scores = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the scores, notes and seconds, for JSON."""
        return {"scores": self.scores, "notes": self.notes, "seconds": self.seconds}


def check_ready(config: Config, data: ImageData) -> list[str]:
    """Check before training that the evaluation will run and the figures can be drawn.

    Returns:
        Notes of one line each, on measures that will be missing and on test images that will be left out of a measure.

    Raises:
        ImportError: a required package is not installed or does not work.
    """
    for module, package in NEEDED.items():
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"the evaluation needs the package {package}: pip install fastntxent[simclr] ({why(error)})"
            ) from error
        except Exception as error:  # a broken installation may raise anything
            raise ImportError(
                f"the evaluation needs the package {package}, but the installed one does not work ({why(error)}): "
                "pip install --force-reinstall fastntxent[simclr]"
            ) from error
    return list(choose(config, data).notes)


def why(error: Exception) -> str:
    """Return the first line of an error's message, cut to 200 characters; the error's type if there is no message."""
    if isinstance(error, MemoryError):
        return "out of memory"
    return shortened(" ".join(printable(first_line(error)).split()) or type(error).__name__, 200)


def evaluate(
    model: SimCLR, config: Config, data: ImageData, untrained: Callable[[], SimCLR] | None = None
) -> Evaluation:
    """Evaluate a trained model on the test images, at most `config.eval_limit` of them.

    The accuracies (k nearest neighbours, linear probe) need labels and are left out without them. Alignment and
    uniformity are measured on the embeddings z of two random views of each test image used. The effective rank and the
    accuracies are measured on the features h, which users of the encoder get. A measure that cannot be computed is left
    out, and a note gives the reason.

    Args:
        model: the trained model; it is not changed.
        config: the run's settings.
        data: the images.
        untrained: a function that returns the model as it was before its first step; None: build that model from the
            settings.
    """
    started = time.perf_counter()
    device = pick_device(config.device)
    choice = choose(config, data)
    judge = _Judge(config, choice, device)
    judge.judge_model("trained", lambda: copy.deepcopy(model))
    judge.judge_model(
        "untrained",
        untrained or (lambda: make_model(config, data, device)),
    )
    with judge.noting("Not evaluated: raw pixels"):
        judge.judge_features("raw pixels", raw_pixels)
    if max(len(data.train_images), len(data.test_images)) > config.eval_limit:
        judge.notes.append(f"At most {config.eval_limit} images of each part (training, test) were used.")
    scores = {measure: values for measure, values in judge.scores.items() if values}
    labels = choice.test.labels[judge.shown]
    return Evaluation(scores, judge.features, labels, judge.notes, time.perf_counter() - started)


class _Judge:
    """Collects the scores of one evaluation, and a note for each score that cannot be computed."""

    def __init__(self, config: Config, choice: Choice, device: torch.device) -> None:
        self.config, self.choice, self.device = config, choice, device
        self.scores: Scores = {measure: {} for measure in MEASURES}
        self.notes = list(choice.notes)
        self.features: dict[str, Tensor] = {}
        count = len(choice.test)
        self.shown = torch.linspace(0, count - 1, min(POINTS, count), dtype=torch.float64).round().long()
        self.train, self.test = choice.train, choice.test
        with self.noting("The images could not be kept in memory"):
            self.train, self.test = choice.train.kept(), choice.test.kept()

    @contextlib.contextmanager
    def noting(self, words: str) -> Iterator[None]:
        """In this block an exception becomes a note that begins with `words`."""
        try:
            yield
        except Exception as error:
            self.notes.append(f"{words} ({why(error)}).")

    def judge_model(self, name: str, make: Callable[[], SimCLR]) -> None:
        with self.noting(f"Not fully evaluated: {NAMES[name]}"):
            model = make()
            recalibrate(model, self.train, self.device)
            self.judge_features(name, lambda images: encode(model.encoder, images, self.device))
            z_i, z_j = embed_views(model, self.test, self.config, self.device)
            self.take("alignment", name, lambda: alignment(z_i, z_j))
            self.take("uniformity", name, lambda: uniformity(torch.cat((z_i, z_j))))

    def judge_features(self, name: str, encode_rows: Callable[[Images], Tensor]) -> None:
        features = encode_rows(self.test)
        self.features[name] = features[self.shown]
        unusable = why_unusable(features)
        if unusable:
            self.notes.append(f"Not evaluated: the features of {NAMES[name]} ({unusable}).")
            return
        self.take("effective rank", name, lambda: effective_rank(features))
        if self.choice.accuracies:
            asked, known = self.choice.asked, self.train.only(self.choice.known)
            unknown = features if asked.all() else features[asked]
            pairs = encode_rows(known), known.labels, unknown, self.test.labels[asked]
            self.take("knn", name, lambda: knn_accuracy(*pairs, k=self.config.knn))
            self.take("linear probe", name, lambda: probe_accuracy(*pairs))

    def take(self, measure: str, name: str, compute: Callable[[], float | Tensor]) -> None:
        words = f"Not measured: {MEASURES[measure]} of {NAMES[name]}"
        with self.noting(words):
            value = float(compute())
            if math.isfinite(value):
                self.scores[measure][name] = value
            else:
                self.notes.append(f"{words} (it is not a finite number).")


def why_unusable(features: Tensor) -> str:
    """Return why features are unusable for the measures and the map; an empty string if they are usable."""
    if features.ndim != 2 or features.shape[1] == 0:
        return f"they must be (N, F), got {tuple(features.shape)}"
    low, high = features.aminmax()
    if not bool(low.isfinite() & high.isfinite()):
        return "they are not all finite numbers"
    if max(-low, high) > TOO_LARGE:
        return f"they are as large as {max(-low, high):.0e}, and their squares overflow"
    return ""


def encode(module: nn.Module, images: Images, device: torch.device) -> Tensor:
    """Return the features of uint8 images, (N, F) float32 on the CPU, in eval mode and without a gradient."""
    module.eval()
    with torch.no_grad():
        return in_parts(images, lambda part: module(part.to(device).float() / 255).float().cpu())


def recalibrate(model: nn.Module, images: Images, device: torch.device) -> None:
    """Set BatchNorm's running statistics to averages over `images`, in place."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    model.eval()  # dropout, for example, must not affect the statistics
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over batches
        norm.training = True  # norm.train() would also switch on a dropout inside it
    with torch.no_grad():
        for rows in slices(len(images), rows_at_once(images)):
            if rows.stop - rows.start > 1:
                model(images[rows].to(device).float() / 255)


def knn_accuracy(known: Tensor, known_labels: Tensor, unknown: Tensor, labels: Tensor, k: int) -> float:
    """Return the accuracy of a distance-weighted vote of the k nearest neighbours by cosine distance."""
    neighbors = require("sklearn.neighbors")
    vote = neighbors.KNeighborsClassifier(min(k, len(known)), weights="distance", metric="cosine", algorithm="brute")
    # By default scikit-learn holds up to 1 GiB of distances, and as much again to sort them.
    with require("sklearn").config_context(working_memory=WORKING_MIB):
        vote.fit(known.numpy(), known_labels.numpy())
        return float(vote.score(unknown.numpy(), labels.numpy()))


def probe_accuracy(known: Tensor, known_labels: Tensor, unknown: Tensor, labels: Tensor) -> float:
    """Return the accuracy of a logistic regression on features standardised with the moments of the training part."""
    linear_model = require("sklearn.linear_model")
    mean, std = known.mean(0), known.std(0).clamp(min=1e-6)
    probe = linear_model.LogisticRegression(C=0.1, max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", require("sklearn.exceptions").ConvergenceWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # overflow, if features hardly vary around a large mean
        probe.fit((known - mean).div_(std).numpy(), known_labels.numpy())
        right = sum(
            int((probe.predict((rows - mean).div_(std).numpy()) == true.numpy()).sum())
            for rows, true in zip(unknown.split(ROWS), labels.split(ROWS), strict=True)
        )
    return right / len(labels)


def effective_rank(features: Tensor) -> float:
    """Return exp of the entropy of the normalised singular values of the centred features (Roy & Vetterli 2007)."""
    if features.numel() <= EXACT_VALUES:
        values = torch.linalg.svdvals(features.double() - features.double().mean(0))
    else:
        # The Gram matrix takes a tenth of the SVD's memory, and gives singular values accurate to 1e-8 of the largest.
        mean = features.mean(0, dtype=torch.float64).expand(features.shape)
        if features.shape[0] < features.shape[1]:
            features, mean = features.T, mean.T
        gram = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
        for part, centre in zip(features.split(ROWS), mean.split(ROWS), strict=True):
            centred = part - centre
            gram.addmm_(centred.T, centred)
        values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = values / values.sum().clamp(min=1e-30)
    return math.exp(float(-torch.special.xlogy(share, share).sum()))


def embed_views(model: SimCLR, images: Images, config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the embeddings of two random views of every image. The views are the same in every call."""
    model.eval()
    z: tuple[list[Tensor], list[Tensor]] = ([], [])
    size = rows_at_once(images, channels=1)  # making views takes several copies of the pixels
    with torch.no_grad():
        for index, block in enumerate(slices(len(images), ROWS)):
            count = block.stop - block.start
            for part in slices(count, size):
                rows = torch.arange(part.start, part.stop)
                pixels = images[slice(block.start + part.start, block.start + part.stop)].to(device)
                generator = stream(config.seed, "evaluation", index)
                both = two_views(pixels, PRESETS[config.preset], generator, rows=rows, batch=count)
                for views, view in zip(z, both, strict=True):
                    views.append(model(view).float())
    return torch.cat(z[0]), torch.cat(z[1])


def raw_pixels(images: Images) -> Tensor:
    """Return pixels as features. Images larger than 32 x 32 are averaged down to at most RAW_VALUES values each.

    That is 32 x 32 pixels in grey and 18 x 18 in RGB. With more values, the probe would take hours and too much memory.
    """

    def pixels(part: Tensor) -> Tensor:
        x = part.float() / 255
        if max(x.shape[2:]) > RAW_SIZE:
            x = F.adaptive_avg_pool2d(x, math.isqrt(RAW_VALUES // x.shape[1]))
        return x.flatten(1)

    return in_parts(images, pixels)
