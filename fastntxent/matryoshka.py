"""Matryoshka representations: a loss of the first features of the embeddings, at several widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .modules.base import TypedModule
from .opening import agree_on
from .validation import check_integer, check_number


def matryoshka(
    loss: Callable[..., Tensor],
    *arguments: Any,
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    **options: Any,
) -> Tensor:
    r"""A loss of the embeddings' first d features, summed over several widths d.

    .. math:: L = \sum_m w_m \, \text{loss}(z_{:, 1..d_m})

    Kusupati et al., "Matryoshka Representation Learning", 2022. Rows are cut before the loss normalises them. Each
    width is one pass: half the width costs half the time.

    Args:
        loss: a loss or a module of this package, or any other that takes embeddings.
        arguments, options: of the loss. Floating-point tensors of two dimensions or more, also in lists and tuples, are
            embeddings, (..., D), of which the first d features are passed on, a guide's or a teacher's too; everything
            else as it is.
        dims: the widths, integers from 1 to D.
        weights: a finite number for each. None: 1 each, as in the paper.

    Returns:
        What the loss returns, in sum.

    Raises:
        TypeError: dims or weights are no numbers.
        ValueError: no dims, one below 1 or beyond D, another number of weights, a weight that is not finite, or no
            embeddings among the arguments.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(4)
        >>> fastntxent.matryoshka(fastntxent.nt_xent, z, z, 1.0, dims=[4, 2], weights=[1.0, 0.0])
        tensor(1.1654)
    """
    dims, weights = _check(dims, weights)
    embeddings = _embeddings((arguments, options))
    widths = [x.shape[-1] for x in embeddings]
    if not widths:
        raise ValueError("matryoshka needs embeddings among the arguments of the loss: tensors (..., D) of floats")
    if max(dims) > min(widths):
        raise ValueError(f"dims must be at most the embeddings' number of features, {min(widths)}, got {max(dims)}")
    group = options.get("group", getattr(loss, "group", None))
    agree_on(group, "matryoshka", embeddings[0], {"dims": dims, "weights": weights})
    losses = [
        weight * loss(*_cut(arguments, dim), **_cut(options, dim))
        for dim, weight in zip(dims, weights, strict=True)
        if weight
    ]
    return torch.stack(losses).sum(dim=0)


class MatryoshkaLoss(TypedModule):
    """A loss of the embeddings' first features, at several widths; see `matryoshka`.

    Args:
        loss: the loss, a module.
        dims, weights: as in `matryoshka`.

    Its call takes what the loss takes.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.MatryoshkaLoss(fastntxent.NTXentLoss(1.0), dims=[4])
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(1.1654)
    """

    def __init__(self, loss: nn.Module, dims: Sequence[int], weights: Sequence[float] | None = None):
        super().__init__()
        if not isinstance(loss, nn.Module):
            raise TypeError(f"loss must be a module, got {type(loss).__name__}; see matryoshka for functions")
        self.dims, self.weights = _check(dims, weights)
        self.loss = loss

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        return matryoshka(self.loss, *arguments, dims=self.dims, weights=self.weights, **options)

    def extra_repr(self) -> str:
        return f"dims={self.dims}, weights={self.weights}"


def _check(dims: Sequence[int], weights: Sequence[float] | None) -> tuple[list[int], list[float]]:
    dims = [check_integer("dims", dim, 1) for dim in dims]
    if not dims:
        raise ValueError("dims must have at least one width, got none")
    weights = [1.0] * len(dims) if weights is None else [check_number("weights", weight) for weight in weights]
    if len(weights) != len(dims):
        raise ValueError(f"weights must be one for each of the {len(dims)} dims, got {len(weights)}")
    if not all(-math.inf < weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(f"weights must be finite, and one of them not 0, got {weights}")
    return dims, weights


def _is_embeddings(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.ndim >= 2


def _embeddings(x: Any) -> list[Tensor]:
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, (list, tuple)):
        return [z for each in x for z in _embeddings(each)]
    return [x] if _is_embeddings(x) else []


def _cut(x: Any, dim: int) -> Any:
    """The same with the first features of all embeddings."""
    if isinstance(x, dict):
        return {name: _cut(value, dim) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        cut = [_cut(each, dim) for each in x]
        return type(x)(*cut) if hasattr(x, "_fields") else type(x)(cut)
    return x[..., :dim] if _is_embeddings(x) else x
