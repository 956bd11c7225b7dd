"""Makes the backward of a loss raise if a temperature, ids, labels or another argument besides the rows was changed in
place after the call. Works in eager mode on plain tensors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor

from .ops import unobserved, watched_by_autograd

_Loss = TypeVar("_Loss", bound=Callable[..., Any])
_WATCHED = (
    *("temperature", "logit_scale", "ids", "u_ids", "v_ids", "labels", "indexes", "pair_weights"),
    *("teacher_image_features", "teacher_text_features", "teacher_temperature", "teacher_logit_scale"),
    *("guide_query", "guide_key", "guide_negatives"),
)


def watched(loss: _Loss) -> _Loss:
    """Make a loss's backward raise if its temperature, ids, labels, weights, teacher or guide were changed in place
    after the call.

    PyTorch's own losses do the same. Autograd itself watches the rows.
    """
    names = list(inspect.signature(loss).parameters)
    places = [(names.index(name), name) for name in _WATCHED if name in names]

    @functools.wraps(loss)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = loss(*args, **kwargs)
        given = [args[place] if place < len(args) else kwargs.get(name) for place, name in places]
        if isinstance(result, Tensor):
            return watch(result, *given)
        return type(result)(*(watch(x, *given) for x in result))  # a named tuple

    return cast(_Loss, call)


def watch(result: Tensor, *given: object) -> Tensor:
    """Return the result, whose backward raises if one of the given tensors was changed in place in the meantime."""
    tensors = [x for x in given if isinstance(x, Tensor)]
    if tensors and unobserved([result, *tensors]) and result.grad_fn is not None:
        # Inference tensors have no version.
        tensors = [x for x in tensors if not (x.is_inference() or watched_by_autograd(result, x))]
        if tensors:
            versions = [x._version for x in tensors]
            result.grad_fn.register_prehook(functools.partial(_check_versions, tensors, versions))
    return result


def _check_versions(tensors: list[Tensor], versions: list[int], _: object) -> None:
    """Raise if a tensor has changed, with the message of PyTorch's own check of saved tensors."""
    for x, version in zip(tensors, versions, strict=True):
        if x._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{x.type()} {list(x.shape)}] is at version {x._version}; expected version {version} instead"
            )
