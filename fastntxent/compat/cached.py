"""Gradient caching inside a loss, as in sentence-transformers' cached losses: the call embeds features in mini-batches,
and the backward embeds them again.

mini_batched       (model, columns)    -> views of the model's mini-batches
embedded           (views)             -> embeddings from one pass
loss_of_two_passes (views, loss_of)    -> a loss whose backward embeds again
loss_and_gradients (loss, inputs)      -> the loss without its graph; also sets the gradients of the inputs
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..chunked_view import ChunkedView, chunked_views
from ..two_passes import TwoPasses, with_second_pass
from ..validation import check_integer

NO_MODEL = "model must be given to call the loss with features, got None"


def check_mini_batches(size: Any, num_tokens: Any) -> tuple[int, int | None]:
    """Return mini_batch_size and mini_batch_num_tokens as integers of at least 1. The second may be None."""
    if num_tokens is not None:
        num_tokens = check_integer("mini_batch_num_tokens", num_tokens, 1)
    return check_integer("mini_batch_size", size, 1), num_tokens


def check_has_batches(model: object, uncached: str) -> None:
    """Raise if the model begins with the library's StaticEmbedding, whose inputs have no batch dimension."""
    if _has_static_embedding(model):
        raise ValueError(
            f"model must take inputs with a batch dimension, got one that begins with a StaticEmbedding: use {uncached}"
        )


def _has_static_embedding(model: object) -> bool:
    """Return whether the model begins with the library's StaticEmbedding, directly or in one of a router's routes."""
    if not isinstance(model, nn.Sequential) or len(model) == 0:
        return False
    routes = getattr(model[0], "sub_modules", None)
    firsts = [route[0] for route in routes.values()] if routes is not None else [model[0]]
    return any(type(module).__name__ == "StaticEmbedding" for module in firsts)


def mini_batched(
    model: nn.Module,
    columns: Sequence[Any],
    *,
    name: str = "model",
    size: int,
    num_tokens: int | None,
    prepare: Callable[[Any], Any] | None = None,
) -> list[ChunkedView]:
    """Return a `ChunkedView` of each column's features, whose chunks are the mini-batches.

    Args:
        model: The model that embeds the features.
        columns: The features, one dict per column.
        name: The model's name in errors.
        size: The number of rows in a mini-batch.
        num_tokens: The largest number of tokens in a mini-batch. Unless it is None, it is used instead of `size`.
        prepare: A function applied to a mini-batch's features, after trailing padding is removed and before the model
            gets them.
    """
    views = chunked_views(
        model,
        columns,
        chunk_size=size if num_tokens is None else None,
        chunk_tokens=num_tokens,
        lengths="attention_mask",
        output="sentence_embedding",
        names=(name, "sentence_features"),
    )

    def prepared(features: dict[str, Any]) -> Any:
        features = _without_padding(features)
        return features if prepare is None else prepare(features)

    return [dataclasses.replace(view, prepare=prepared) for view in views]


def _without_padding(features: dict[str, Any]) -> dict[str, Any]:
    """Return the features without trailing tokens that are padding in every row."""
    mask = features.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return features
    used = mask.bool().any(0).nonzero()
    width, end = mask.shape[1], int(used.max()) + 1 if len(used) else mask.shape[1]

    def is_of_tokens(value: object) -> bool:
        return isinstance(value, Tensor) and value.ndim in (2, 3) and value.shape[1] == width  # excludes images (4-d)

    return {key: value[:, :end] if is_of_tokens(value) else value for key, value in features.items()}


def with_progress(views: Sequence[ChunkedView], passes: int) -> list[ChunkedView]:
    """Return the same views with a progress bar that counts their mini-batches over all passes."""
    tqdm = importlib.import_module("tqdm")  # a dependency of sentence-transformers
    mini_batches = passes * sum(len(view.sizes) for view in views)
    bar = tqdm.tqdm(total=mini_batches, desc="Embed mini-batches")

    def showing(prepare: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
        def prepare_and_show(features: Any) -> Any:
            bar.update()
            if bar.n == mini_batches:
                bar.close()
            return features if prepare is None else prepare(features)

        return prepare_and_show

    return [dataclasses.replace(view, prepare=showing(view.prepare)) for view in views]


def embedded(views: Sequence[ChunkedView]) -> list[Tensor]:
    """Return each view's embeddings (N, D), from one pass over its mini-batches."""
    # Cloned, because the model's output may be a view that keeps all its activations alive.
    return [torch.cat([view.embed(chunk).clone() for chunk in view.chunks()]) for view in views]


def loss_of_two_passes(views: Sequence[ChunkedView], loss_of: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Return loss_of(embeddings). The views are embedded without a graph here, and again in the loss's backward.

    `loss_of` must set the gradient of every embedding.
    """
    passes = TwoPasses(views)
    try:
        # In float32, so that a GradScaler's factor is applied before gradients are rounded to half precision.
        leaves = [_not_half(column.detach()).requires_grad_() for column in passes.first()]
        loss = loss_of(leaves)
    except BaseException:
        passes.undo()
        raise
    return with_second_pass(loss, passes, [leaf.grad for leaf in leaves])


def _not_half(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def loss_and_gradients(loss: Tensor, inputs: Sequence[Tensor], scalar: float | Tensor) -> Tensor:
    """Set the gradients of the inputs, and return the loss without its graph. The returned loss has a gradient only
    with respect to `scalar`, if `scalar` is a tensor that requires one."""
    of_scalar = [scalar] if isinstance(scalar, Tensor) and scalar.requires_grad else []
    gradients = torch.autograd.grad(loss, [*inputs, *of_scalar], allow_unused=True, materialize_grads=True)
    for x, gradient in zip(inputs, gradients, strict=False):
        x.grad = gradient if x.grad is None else x.grad + gradient
    loss = loss.detach()
    # The scalar gets its gradient in the backward of the returned loss, so a GradScaler's factor applies to it too.
    return loss + gradients[-1] * (of_scalar[0] - of_scalar[0].detach()) if of_scalar else loss
