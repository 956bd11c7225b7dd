"""Gradient caching inside a loss, as in sentence-transformers' cached losses: its call embeds features in mini-batches,
and its backward embeds them again.

mini_batched       (model, columns)    -> views of the model's mini-batches
embedded           (views)             -> embeddings from one pass
loss_of_two_passes (views, loss_of)    -> a loss that embeds twice
loss_and_gradients (loss, inputs)      -> the loss without its graph, and gradients in its inputs
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

NO_MODEL = "model must be given where a call brings features and not embeddings, got None"


def check_mini_batches(size: Any, num_tokens: Any) -> tuple[int, int | None]:
    """Return mini_batch_size and mini_batch_num_tokens as integers of at least 1, the second one possibly None."""
    if num_tokens is not None:
        num_tokens = check_integer("mini_batch_num_tokens", num_tokens, 1)
    return check_integer("mini_batch_size", size, 1), num_tokens


def check_has_batches(model: object, uncached: str) -> None:
    """Refuse a model whose inputs have no batch dimension: one that begins with the library's StaticEmbedding."""
    if _has_static_embedding(model):
        raise ValueError(
            f"model must take inputs with a batch dimension, got one that begins with a StaticEmbedding: use {uncached}"
        )


def _has_static_embedding(model: object) -> bool:
    """Whether the model begins with the library's StaticEmbedding, in one of a router's routes or by itself."""
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
    """Return a view of each column of features, in mini-batches of `size` rows, or of `num_tokens` in its place.

    prepare: turns a mini-batch's features, without the padding of its end, into what the model takes.
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
    """Return the features without the columns that are padding in every row, at the end of the texts."""
    mask = features.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return features
    used = mask.bool().any(0).nonzero()
    width, end = mask.shape[1], int(used.max()) + 1 if len(used) else mask.shape[1]

    def is_of_tokens(value: object) -> bool:
        return isinstance(value, Tensor) and value.ndim in (2, 3) and value.shape[1] == width  # not images' channels

    return {key: value[:, :end] if is_of_tokens(value) else value for key, value in features.items()}


def with_progress(views: Sequence[ChunkedView], passes: int) -> list[ChunkedView]:
    """Return the same views, under a bar of how many of their mini-batches have run, over all passes."""
    tqdm = importlib.import_module("tqdm")  # of sentence-transformers' own dependencies
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
    # Copies, as what a model returns may be a view of all its activations.
    return [torch.cat([view.embed(chunk).clone() for chunk in view.chunks()]) for view in views]


def loss_of_two_passes(views: Sequence[ChunkedView], loss_of: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Return loss_of(embeddings), where the views are embedded without a graph here and again in its backward.

    loss_of: gives each of the embeddings its gradient.
    """
    passes = TwoPasses(views)
    try:
        # In float32, so that a GradScaler's factor meets gradients that half precision has not rounded yet.
        leaves = [_not_half(column.detach()).requires_grad_() for column in passes.first()]
        loss = loss_of(leaves)
    except BaseException:
        passes.undo()
        raise
    return with_second_pass(loss, passes, [leaf.grad for leaf in leaves])


def _not_half(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def loss_and_gradients(loss: Tensor, inputs: Sequence[Tensor], scalar: float | Tensor) -> Tensor:
    """Give the inputs their gradients of the loss, and return it with a graph of `scalar` alone, if that is learnt."""
    of_scalar = [scalar] if isinstance(scalar, Tensor) and scalar.requires_grad else []
    gradients = torch.autograd.grad(loss, [*inputs, *of_scalar], allow_unused=True, materialize_grads=True)
    for x, gradient in zip(inputs, gradients, strict=False):
        x.grad = gradient if x.grad is None else x.grad + gradient
    loss = loss.detach()
    # Its gradient is not formed here: that of the returned loss, a GradScaler's factor for one, is still to come.
    return loss + gradients[-1] * (of_scalar[0] - of_scalar[0].detach()) if of_scalar else loss
