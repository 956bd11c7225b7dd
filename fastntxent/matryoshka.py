"""Matryoshka representations: a loss computed on the first features of the embeddings, at several widths."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .distributed import Group
from .modules.base import TypedModule
from .opening import agree_on
from .saved_state import module_of
from .trees import map_tensors, named_tensors
from .validation import check_integer, check_numbers, check_tensor

_Result = TypeVar("_Result")

# The names of tensor arguments whose last dimension does not hold features of an embedding, in this package and in the
# libraries of `compat`.
_WHOLE = frozenset({"logits", "mask", "pair_weights"})


def matryoshka(
    loss: Callable[..., _Result],
    *arguments: Any,
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    **options: Any,
) -> _Result:
    r"""A loss computed on the embeddings' first d features, summed over several widths d.

    .. math:: L = \sum_m w_m \, \text{loss}(z_{:, 1..d_m})

    Kusupati et al., "Matryoshka Representation Learning", 2022. Rows are cut before the loss normalises them. Each
    width whose weight is not 0 takes one call of the loss; half the width costs about half the time.

    Args:
        loss: A loss or module of this package, or any other function of embeddings.
        *arguments: Positional arguments of the loss. Floating-point tensors of at least two dimensions, including those
            inside lists, tuples, mappings and dataclasses, are treated as embeddings (..., D), and the loss gets their
            first d features. This includes the embeddings of a guide or a teacher. Everything else is passed on
            unchanged, and so are the arguments named `pair_weights`, `mask` and `logits`. To keep another tensor uncut,
            bind it with `functools.partial` and pass the result to `matryoshka` as the loss. Do the same with an
            argument of the loss named `weights` or `dims`, because `matryoshka` has arguments of these names.
        dims: The widths, integers from 1 to D.
        weights: One finite number per width, not all 0. None: a weight of 1 each, as in the paper.
        **options: Keyword arguments of the loss, treated like `arguments`.

    Returns:
        The weighted sum of the losses, of the shape and dtype that the loss returns. If the loss returns a tuple, a
        list or a mapping of tensors, each entry is summed separately.

    Raises:
        TypeError: `loss` is not callable or does not return tensors, `dims` or `weights` are not numbers, or an
            embedding is not a dense tensor.
        ValueError: `dims` is empty, a width is below 1 or above D, the number of weights differs from the number of
            widths, a weight is not finite, all weights are 0, or no argument is an embedding.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(4)
        >>> fastntxent.matryoshka(fastntxent.nt_xent, z, z, 1.0, dims=[4, 2], weights=[1.0, 0.0])
        tensor(1.1654)
    """
    if not callable(loss):
        raise TypeError(f"loss must be a function or a module, got {type(loss).__name__}")
    dims, weights = _check(dims, weights)
    names = _names(loss, len(arguments))
    embeddings = [
        x for name, value in [*zip(names, arguments, strict=True), *options.items()] for x in _found(name, value)
    ]
    if not embeddings:
        raise ValueError(
            "matryoshka needs an embedding among the arguments of the loss: a floating-point tensor (..., D)"
        )
    width = min(x.shape[-1] for x in embeddings)
    if max(dims) > width:
        raise ValueError(f"dims must be at most the embeddings' number of features, {width}, got {max(dims)}")
    agree_on(_group(loss, options), "matryoshka", embeddings[0], {"dims": dims, "weights": weights})
    counted = [(dim, weight) for dim, weight in zip(dims, weights, strict=True) if weight]
    results = [
        loss(
            *(_cut(name, value, dim) for name, value in zip(names, arguments, strict=True)),
            **{name: _cut(name, value, dim) for name, value in options.items()},
        )
        for dim, _ in counted
    ]
    return _weighted_sum([weight for _, weight in counted], results)


class MatryoshkaLoss(TypedModule):
    r"""A loss computed on the embeddings' first features, summed over several widths, as a module.

    .. math:: L = \sum_m w_m \, \text{loss}(z_{:, 1..d_m})

    Kusupati et al., "Matryoshka Representation Learning", 2022. Rows are cut before the loss normalises them. Each
    width whose weight is not 0 takes one call of the loss; half the width costs about half the time.

    Call it with the arguments of `loss`. `matryoshka` is the same loss as a function.

    Args:
        loss: The loss, a module.
        dims: The widths, integers from 1 to D.
        weights: One finite number per width, not all 0. None: a weight of 1 each, as in the paper.

    Raises:
        TypeError: `loss` is not a module, or `dims` or `weights` are not numbers.
        ValueError: `dims` is empty, a width is below 1, the number of weights differs from the number of widths, a
            weight is not finite, or all weights are 0.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.MatryoshkaLoss(fastntxent.NTXentLoss(1.0), dims=[4])
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(1.1654)
    """

    def __init__(self, loss: nn.Module, dims: Sequence[int], weights: Sequence[float] | None = None):
        super().__init__()
        if not isinstance(loss, nn.Module):
            raise TypeError(f"loss must be a module, got {type(loss).__name__}; use matryoshka for functions")
        self.dims, self.weights = _check(dims, weights)
        self.loss = loss

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Return the loss, summed over the widths.

        Args:
            *arguments: Positional arguments of the loss. Floating-point tensors of at least two dimensions, including
                those inside lists, tuples, mappings and dataclasses, are treated as embeddings (..., D), and the loss
                gets their first d features. This includes the embeddings of a guide or a teacher. Everything else is
                passed on unchanged, and so are the arguments named `pair_weights`, `mask` and `logits`. To keep another
                tensor uncut, bind it with `functools.partial` and pass the result to `matryoshka` as the loss. Do the
                same with an argument of the loss named `weights` or `dims`, because `matryoshka` has arguments of these
                names.
            **options: Keyword arguments of the loss, treated like `arguments`.

        Returns:
            The weighted sum of the losses, of the shape and dtype that the loss returns.
        """
        return matryoshka(self.loss, *arguments, dims=self.dims, weights=self.weights, **options)

    def extra_repr(self) -> str:
        return f"dims={self.dims}, weights={self.weights}"


def _check(dims: Sequence[int], weights: Sequence[float] | None) -> tuple[list[int], list[float]]:
    if not isinstance(dims, Iterable):
        raise TypeError(f"dims must be a sequence of ints, got {type(dims).__name__}")
    dims = [check_integer("dims", dim, 1) for dim in dims]
    if not dims:
        raise ValueError("dims must have at least one width, got an empty sequence")
    weights = (
        [1.0] * len(dims) if weights is None else check_numbers("weights", weights, "a number for each of the dims")
    )
    if len(weights) != len(dims):
        raise ValueError(f"weights must have one number for each of the {len(dims)} dims, got {len(weights)}")
    if not all(-math.inf < weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(f"weights must be finite and not all 0, got {weights}")
    return dims, weights


def _group(loss: Callable[..., Any], options: Mapping[str, Any]) -> Group | None:
    """Return the group that the loss will use: an option of the call, an option bound by `functools.partial`, or an
    attribute of a module or of another callable object."""
    bound: dict[str, Any] = {}
    while isinstance(loss, functools.partial):
        bound, loss = {**loss.keywords, **bound}, loss.func
    module = module_of(loss)
    owner = loss if module is None else module  # a module that is an empty container is false
    return {"group": getattr(owner, "group", None), **bound, **options}["group"]


def _names(loss: Callable[..., Any], n_arguments: int) -> list[str]:
    """Return the names of the loss's positional arguments, or their positions where the loss does not name them."""
    places = [f"arguments[{place}]" for place in range(n_arguments)]
    if isinstance(loss, functools.partial):
        loss = functools.partial(_named(loss.func), *loss.args, **loss.keywords)
    try:
        parameters = inspect.signature(_named(loss)).parameters.values()
    except (TypeError, ValueError):  # some functions in C have no signature
        return places
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [parameter.name for parameter in parameters if parameter.kind in positional][:n_arguments]
    return names + places[len(names) :]


def _named(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a module, because its __call__ takes any arguments and passes them to forward."""
    return getattr(loss, "forward", loss)


def _is_embeddings(x: Tensor) -> bool:
    return x.is_floating_point() and x.ndim >= 2


def _found(name: str, value: Any) -> list[Tensor]:
    """Return the embeddings in an argument, checked."""
    if name in _WHOLE:
        return []
    embeddings = [(where, x) for where, x in named_tensors(value, name) if _is_embeddings(x)]
    for where, x in embeddings:
        check_tensor(where, x)
    return [x for _, x in embeddings]


def _cut(name: str, value: Any, dim: int) -> Any:
    """Return the argument with all its embeddings cut to their first `dim` features."""
    return value if name in _WHOLE else map_tensors(lambda x: x[..., :dim] if _is_embeddings(x) else x, value)


def _weighted_sum(weights: list[float], results: list[Any]) -> Any:
    """Return the weighted sum of the results, entry by entry."""
    first = results[0]
    if isinstance(first, Tensor):
        return torch.stack([weight * result for weight, result in zip(weights, results, strict=True)]).sum(dim=0)
    if isinstance(first, Mapping):
        return {key: _weighted_sum(weights, [result[key] for result in results]) for key in first}
    if isinstance(first, (list, tuple)):
        entries = [_weighted_sum(weights, list(each)) for each in zip(*results, strict=True)]
        return type(first)(*entries) if hasattr(first, "_fields") else type(first)(entries)
    raise TypeError(f"loss must return a tensor, or a tuple, list or mapping of tensors, got {type(first).__name__}")
