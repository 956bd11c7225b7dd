"""Labels of any kind as class numbers 0..C-1, and the choice of images held out for testing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .notes import distinct, listed

# The class number of an image without a label.
UNLABELLED = -1

Array = np.ndarray[Any, Any]


def label_tensors(
    parts: Sequence[tuple[str, Array | None, int]], class_names: Sequence[object] = ()
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Return class numbers for the labels of every part, and the names of the classes.

    Args:
        parts: one tuple for each part (training, test): its name in messages, its labels (N,), (N, 1) or None, and N.
        class_names: the names of the classes. An integer label is an index into them; a string label is one of them.
            Without names, the classes are the sorted values that occur in any part. An integer -1 and an empty string
            always mean "no label".

    Returns:
        One int64 tensor (N,) for each part, with values in 0..C-1, or -1 for no label; and C printable names.

    Raises:
        ValueError: the labels have the wrong shape or type, or are not among `class_names`.
    """
    columns = [None if labels is None else _column(name, labels, count) for name, labels, count in parts]
    # The values become Python integers, because no NumPy dtype holds both int64 and uint64.
    uniques = [None if column is None else np.unique(column, return_inverse=True) for column in columns]
    found = {value for unique in uniques if unique is not None for value in unique[0].tolist()}
    kinds = {type(value) for value in found}
    if len(kinds) > 1:
        raise ValueError(f"{' and '.join(name for name, *_ in parts)} must be all numbers or all strings, got both")
    found -= {UNLABELLED, ""}
    if not class_names:
        names: Sequence[object] = sorted(found)
        numbers = {value: number for number, value in enumerate(names)}
    elif kinds == {str}:
        names = class_names
        numbers = {str(name): number for number, name in enumerate(class_names)}
    else:
        names = class_names
        numbers = {number: number for number in range(len(class_names))}
    unknown = sorted(found - numbers.keys())
    if unknown:
        expected = f"0 to {len(class_names) - 1}, or -1 for no label" if kinds != {str} else listed(names)
        raise ValueError(
            f"{parts[0][0]} must be among the {len(class_names)} class names ({expected}), got {listed(unknown)}"
        )
    tensors = []
    for (_, _, count), unique in zip(parts, uniques, strict=True):
        if unique is None:
            tensors.append(torch.full((count,), UNLABELLED))
            continue
        table = np.array([numbers.get(value, UNLABELLED) for value in unique[0].tolist()], np.int64)
        tensors.append(torch.from_numpy(table[unique[1].reshape(-1)]))
    return tensors, distinct(names)


def _column(name: str, labels: Array, count: int) -> Array:
    """Return the labels as an (N,) array of integers or strings."""
    kind = labels.dtype.kind
    shape = labels.shape
    if shape == (count, 1):
        labels = labels[:, 0]
    elif shape != (count,):
        one_hot = " (one column for each class? pass the argmax)" if len(shape) == 2 and len(labels) == count else ""
        raise ValueError(f"{name} must be {count} integers or strings, got {labels.dtype} of shape {shape}{one_hot}")
    if kind == "f":
        whole = np.isfinite(labels) & (labels == np.floor(labels)) & (np.abs(labels) < 2.0**53)
        if not whole.all():
            raise ValueError(f"{name} must be {count} whole numbers or strings, got {labels[~whole][0]:g} among them")
        return labels.astype(np.int64)
    if kind == "b":
        return labels.astype(np.int64)
    if kind == "S":
        return np.array([value.decode("utf-8", "surrogateescape") for value in labels.tolist()], np.str_)
    if kind not in "iuU":
        raise ValueError(f"{name} must be {count} integers or strings, got {labels.dtype}")
    return labels


def held_out(labels: Tensor) -> Tensor:
    """Return a mask of a fifth of every class, the same in every run. Unlabelled images count as one more class."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    order = order[labels[order].argsort(stable=True)]  # class by class, each in the order of the permutation
    counts = labels.unique(return_counts=True)[1]
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    place = torch.arange(len(labels)) - first
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[order] = place < torch.repeat_interleave(counts // 5, counts)
    return mask


def require_held_out(name: str, labels: Tensor) -> Tensor:
    """Return the mask of `held_out`; ValueError if it selects fewer than two images."""
    mask = held_out(labels)
    if mask.sum() < 2:
        raise ValueError(f"{name}: {len(labels)} images are too few to hold out a fifth of each class for testing")
    return mask
