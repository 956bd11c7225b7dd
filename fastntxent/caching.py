"""Gradient caching: a batch larger than the encoder's activations fit in memory, with the gradient of the whole.

A contrastive loss does not split over a batch: every row is every other row's negative. But given the loss's
gradient with respect to the *embeddings*, the encoder's part of the chain rule is a sum over rows and does split.
So: encode in chunks without a graph, form the loss and its gradient on all embeddings, then encode each chunk again,
with a graph, and pull its share of that gradient through. Gao et al., "Scaling Deep Contrastive Learning Batch Size
under Memory Limited Setup", 2021.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


def cached_backward(
    encoder: nn.Module,
    views: Iterable[Tensor],
    loss_fn: Callable[..., Tensor],
    *,
    chunk_size: int | Sequence[int],
) -> Tensor:
    """Like `loss = loss_fn(*(encoder(view) for view in views)); loss.backward()`, with `chunk_size` rows at a time.

    The encoder runs twice on every chunk, the second time on the same random numbers (dropout) and from the same
    buffers (BatchNorm's running statistics) as the first, so the second pass repeats the first exactly and its
    buffers end as after one pass. The gradient is the whole batch's, with one exception that lies in the encoder: a
    layer that mixes rows, BatchNorm in training mode above all, sees a chunk where it would have seen the batch.

    Args:
        encoder: a module that maps (n, ...) to (n, D) embeddings. Wrapped in DistributedDataParallel, it synchronises
            its gradients once, in the last chunk.
        views: one input per view of the batch, tensors with the batch along the first dimension. Inputs get no
            gradient.
        loss_fn: takes one (N, D) tensor of embeddings per view and returns a scalar; parameters of its own (a
            learnable temperature) get their gradients too. To scale the loss for half precision, scale it here.
        chunk_size: rows of a view that the encoder sees at once, at least 1; or the rows of each chunk, which add up to
            a view's. Views are never mixed in a chunk. An encoder that mixes rows over the ranks of a batch needs as
            many chunks on each of them: a chunk of a list may be of no rows, and so may the views.

    Returns:
        The loss, a 0-d tensor without a graph. Gradients are accumulated in the parameters' `.grad`, as `backward`
        does.

    Raises:
        TypeError: the encoder is not a module, a view or the loss is not a tensor, or chunk_size is neither an integer
            nor several.
        ValueError: there is no view, a view is empty, chunk_size is below 1, the chunks are not the rows of a view, or
            the loss is not a scalar.

    Activations are held for one chunk; inputs and embeddings for the whole batch. A forward under autocast is under
    autocast in both passes if the call is.

    Example:
        >>> import torch, fastntxent
        >>> encoder, views = torch.nn.Linear(8, 4), torch.randn(2, 6, 8)
        >>> loss = fastntxent.cached_backward(encoder, views.unbind(), fastntxent.NTXentLoss(), chunk_size=4)
        >>> encoder.weight.grad.shape
        torch.Size([4, 8])
    """
    if isinstance(views, Tensor):
        raise TypeError("views must be a sequence of tensors, one per view, got one tensor; pass views.unbind()")
    views = tuple(views)
    _check(encoder, views, chunk_size)
    chunks = [view.split(chunk_size) for view in views]

    start = _Buffers.of(encoder)
    states: list[_RandomState] = []
    embeddings: list[Tensor] = []
    with torch.no_grad():
        for view in chunks:
            parts = []
            for chunk in view:
                states.append(_RandomState.now(chunk))
                parts.append(encoder(chunk))
            embeddings.append(torch.cat(parts))
    with torch.enable_grad():
        leaves = [z.detach().requires_grad_() for z in embeddings]
        loss = loss_fn(*leaves)
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss_fn must return a torch.Tensor, got {type(loss).__name__}")
        if loss.ndim != 0:
            raise ValueError(f"loss_fn must return a scalar, got shape {tuple(loss.shape)}")
        loss.backward()

    start.restore()
    after_loss = _RandomState.now(views[0])
    remaining = len(states)
    for view, leaf in zip(chunks, leaves, strict=True):
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for chunk, d_z in zip(view, gradient.split(chunk_size), strict=True):
            states[len(states) - remaining].restore()
            remaining -= 1
            with _no_sync(encoder, unless=remaining == 0), torch.enable_grad():
                encoder(chunk).backward(d_z)
    after_loss.restore()
    return loss.detach()


def _check(encoder: nn.Module, views: Sequence[Tensor], chunk_size: int | Sequence[int]) -> None:
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder must be a torch.nn.Module, got {type(encoder).__name__}")
    listed = isinstance(chunk_size, Sequence)
    sizes, least = (chunk_size, 0) if isinstance(chunk_size, Sequence) else ((chunk_size,), 1)
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"chunk_size must be an integer, or several, got {type(size).__name__}")
        if size < least:
            raise ValueError(f"chunk_size must be at least {least}, got {size}")
    if len(sizes) == 0:
        raise ValueError("chunk_size must hold the rows of at least one chunk, got none")
    if len(views) == 0:
        raise ValueError("views must hold at least one tensor, got none")
    for index, view in enumerate(views):
        if not isinstance(view, Tensor):
            raise TypeError(f"views[{index}] must be a torch.Tensor, got {type(view).__name__}")
        if view.ndim == 0 or len(view) < least:
            raise ValueError(f"views[{index}] must have at least one row, got shape {tuple(view.shape)}")
        if listed and sum(sizes) != len(view):
            raise ValueError(f"chunk_size must add up to the {len(view)} rows of views[{index}], got {sum(sizes)}")


class _RandomState(NamedTuple):
    """The generators that a forward on a tensor's device draws from."""

    device: torch.device
    cpu: Tensor
    accelerator: Tensor | None

    @classmethod
    def now(cls, like: Tensor) -> _RandomState:
        device = like.device
        accelerator = None
        if device.type != "cpu":
            accelerator = torch.get_device_module(device).get_rng_state(device)
        return cls(device, torch.get_rng_state(), accelerator)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)


class _Buffers(NamedTuple):
    """A module's buffers with a copy of their values."""

    live: list[Tensor]
    values: list[Tensor]

    @classmethod
    def of(cls, module: nn.Module) -> _Buffers:
        live = list(module.buffers())
        return cls(live, [buffer.clone() for buffer in live])

    @torch.no_grad()
    def restore(self) -> None:
        for buffer, value in zip(self.live, self.values, strict=True):
            buffer.copy_(value)


@contextlib.contextmanager
def _no_sync(encoder: nn.Module, *, unless: bool) -> Iterator[None]:
    no_sync = getattr(encoder, "no_sync", None)
    with contextlib.nullcontext() if unless or no_sync is None else no_sync():
        yield
