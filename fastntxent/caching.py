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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .snapshot import RandomState, Signatures, Snapshot
from .validation import check_integer

# The same chunk on the same state may round differently where a graph is recorded, above all in bfloat16. Another draw
# of dropout's masks is an order of magnitude beyond this.
_REPEATS_WITHIN = 0.05


@torch.inference_mode(False)
def cached_backward(
    encoder: nn.Module,
    views: Iterable[Tensor],
    loss_fn: Callable[..., Tensor],
    *,
    chunk_size: int | Sequence[int],
) -> Tensor:
    """Like `loss = loss_fn(*(encoder(view) for view in views)); loss.backward()`, with `chunk_size` rows at a time.

    The encoder runs twice on every chunk, the second time from the same state and on the same random numbers as the
    first, so the second pass repeats the first and both end as after one pass. The gradient is the whole batch's, with
    one exception that lies in the encoder: a layer that mixes rows, BatchNorm in training mode above all, sees a chunk
    where it would have seen the batch.

    - State is put back: registered buffers, the encoder's and its submodules' attributes, and what lists, tuples,
      dictionaries, sets and deques among them hold: tensors, NumPy arrays, numbers, generators. Updates in place and
      by assignment are alike. The objects stay the same ones.
    - Random numbers are repeated of the global generators of PyTorch (on the CPU and on every device of a parameter,
      buffer or view), Python and NumPy, and of generators among the attributes.
    - Not repeated are changes that a forward makes to parameters (a momentum encoder is updated outside), to objects of
      other classes, and outside the encoder, as a hook may. If the second pass's embeddings are far from the first's,
      that is an error.

    Args:
        encoder: a module that maps (n, ...) to (n, D) embeddings. Wrapped in DistributedDataParallel, it synchronises
            its gradients once, in the last chunk; where that does not use all parameters (a tower for each view), it
            needs find_unused_parameters=True. Under `fully_shard` every chunk reduces its gradients, so that no rank
            holds more than its shard of them.
        views: one input per view of the batch, tensors of any dtype with the batch along the first dimension. Inputs
            get no gradient, and the encoder works on copies of them.
        loss_fn: takes one (N, D) tensor of embeddings per view and returns a scalar; parameters of its own (a
            learnable temperature) get their gradients too. To scale the loss for half precision, scale it here.
        chunk_size: rows of a view that the encoder sees at once, at least 1; or the rows of each chunk, which add up to
            a view's. Views are never mixed in a chunk. An encoder that mixes rows over the ranks of a batch needs as
            many chunks on each of them, and so does one under `fully_shard`: a chunk of a list may be of no rows, and
            so may the views.

    Returns:
        The loss, a 0-d tensor without a graph. Gradients are accumulated in the parameters' `.grad`, as `backward`
        does; their hooks see the gradient of one chunk. A frozen encoder runs once, and gets none.

    Raises:
        TypeError: the encoder is not a module or returns no tensor, a view is not a dense tensor, the loss is not a
            tensor, or chunk_size is neither an integer nor several.
        ValueError: there is no view, a view is empty or has a graph, chunk_size is below 1, the chunks are not the rows
            of a view, the loss is not a scalar, the encoder returns another number of rows, has a lazy layer that never
            ran, or is DistributedDataParallel with static_graph=True.
        RuntimeError: nothing requires a gradient, the second pass did not repeat the first, the last chunk under
            DistributedDataParallel does not synchronise all gradients, or the call is within
            `torch.nn.utils.parametrize.cached()`.

        After any error, the encoder's or the loss's own too, the encoder's state and the generators are as before the
        call; gradients may have been accumulated in part.

    Activations are held for one chunk; embeddings for the whole batch; one copy of the state. A forward under autocast
    is under autocast in both passes if the call is.

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
    chunk_size = list(map(int, chunk_size)) if isinstance(chunk_size, Sequence) else int(chunk_size)
    chunks = [view.detach().split(chunk_size) for view in views]
    devices = {tensor.device for tensor in (*encoder.parameters(), *encoder.buffers(), *views)}
    devices -= {device for device in devices if device.type in ("cpu", "meta")}

    start, start_random = Snapshot(encoder), RandomState(devices)
    try:
        leaves, states = _encode(encoder, chunks, devices)
        encoded = Signatures(encoder)
        with torch.enable_grad():
            loss = _checked_loss(loss_fn(*leaves))
            loss.backward()
        if any(leaf.requires_grad for leaf in leaves):
            after_loss, changed_by_loss = RandomState(devices), Snapshot(encoder, unless=encoded)
            start.restore()
            # Before PyTorch 2.10 it may hold the weights as the first pass cast them, without a graph.
            torch.clear_autocast_cache()
            _encode_again(encoder, chunks, leaves, states)
            # DistributedDataParallel's own check, which it would else make in its next forward.
            getattr(encoder, "_check_reducer_finalized", lambda: None)()
            changed_by_loss.restore()
            after_loss.restore()
    except BaseException:
        start.restore()
        start_random.restore()
        raise
    return loss.detach()


_Chunks = Sequence[Sequence[Tensor]]  # of each view


def _encode(
    encoder: nn.Module, chunks: _Chunks, devices: Iterable[torch.device]
) -> tuple[list[Tensor], list[RandomState]]:
    """Each view's embeddings, as leaves for the loss, and the random state before each chunk."""
    leaves, states = [], []
    # Only autograd knows whether an encoder with no parameter to learn is frozen: others may lie beyond its own.
    frozen = not any(parameter.requires_grad for parameter in encoder.parameters())
    for view in chunks:
        parts, learns = [], not frozen
        for chunk in view:
            states.append(RandomState(devices))
            with torch.set_grad_enabled(frozen):
                z = _embed(encoder, chunk)
            learns |= z.requires_grad
            # A copy, as z may be a view of all that the encoder computed, or memory that it writes the next chunk to.
            parts.append(z.detach().clone())
        leaves.append(torch.cat(parts).requires_grad_(learns))
    return leaves, states


def _encode_again(encoder: nn.Module, chunks: _Chunks, leaves: Sequence[Tensor], states: Sequence[RandomState]) -> None:
    """Pull the leaves' gradients through the encoder, chunk by chunk."""
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    for view, leaf in zip(chunks, leaves, strict=True):
        d_leaf = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        rows = [len(chunk) for chunk in view]
        pairs += zip(view, leaf.detach().split(rows), d_leaf.split(rows), strict=True)
    differences, learns = [], False
    for index, ((chunk, first, d_z), state) in enumerate(zip(pairs, states, strict=True)):
        last = index == len(pairs) - 1
        state.restore()
        with _no_sync(encoder, unless=last), torch.enable_grad():
            z = _embed(encoder, chunk)
            differences.append(torch.dist(z.detach().float(), first.float()) / first.float().norm())
            if z.requires_grad:  # not where a tower is frozen
                z.backward(d_z)
            elif last and learns and hasattr(encoder, "no_sync"):
                raise RuntimeError(
                    "encoder synchronises its gradients in the last chunk, which has none: put a view that has a "
                    "gradient last in views"
                )
            learns |= z.requires_grad
    too_far = [value for value in map(float, differences) if value > _REPEATS_WITHIN]  # not NaN, nor of no rows
    if too_far:
        raise RuntimeError(
            f"encoder gave other embeddings in the second pass over the same rows (relative difference "
            f"{max(too_far):.2g}), so the gradient is wrong: it has state or random numbers that cached_backward does "
            "not repeat"
        )


def _embed(encoder: nn.Module, chunk: Tensor) -> Tensor:
    z: Any = encoder(chunk.clone())  # a copy, which the encoder may write to, and an inference tensor no longer
    if not isinstance(z, Tensor):
        raise TypeError(f"encoder must return a torch.Tensor, got {type(z).__name__}")
    if z.ndim == 0 or len(z) != len(chunk):
        raise ValueError(f"encoder must return a row for each of the {len(chunk)} rows, got shape {tuple(z.shape)}")
    return z


def _checked_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a torch.Tensor, got {type(loss).__name__}")
    if loss.ndim != 0:
        raise ValueError(f"loss_fn must return a scalar, got shape {tuple(loss.shape)}")
    return loss


def _check(encoder: nn.Module, views: Sequence[Tensor], chunk_size: int | Sequence[int]) -> None:
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder must be a torch.nn.Module, got {type(encoder).__name__}")
    if any(map(is_lazy, (*encoder.parameters(), *encoder.buffers()))):
        raise ValueError("encoder must have all its parameters, got a lazy layer without: run it once before")
    if hasattr(encoder, "no_sync") and getattr(encoder, "static_graph", False):  # whose first backward synchronises
        raise ValueError("encoder must be DistributedDataParallel without static_graph=True, got it with")
    if getattr(parametrize, "_cache_enabled", 0):
        raise RuntimeError(
            "cached_backward must not be called within torch.nn.utils.parametrize.cached(), which would keep the first "
            "pass's weights, without a graph, for the second"
        )
    listed = isinstance(chunk_size, Sequence)
    sizes, least = (chunk_size, 0) if isinstance(chunk_size, Sequence) else ((chunk_size,), 1)
    for size in sizes:
        check_integer("chunk_size", size, least)
    if len(sizes) == 0:
        raise ValueError("chunk_size must hold the rows of at least one chunk, got none")
    if len(views) == 0:
        raise ValueError("views must hold at least one tensor, got none")
    for index, view in enumerate(views):
        if not isinstance(view, Tensor):
            raise TypeError(f"views[{index}] must be a torch.Tensor, got {type(view).__name__}")
        if view.layout != torch.strided or view.is_nested:
            raise TypeError(
                f"views[{index}] must be a dense (strided) tensor, got layout {view.layout}, nested: {view.is_nested}"
            )
        if view.grad_fn is not None:
            raise ValueError(
                f"views[{index}] must be data without a graph, got the output of {view.grad_fn.name()}, whose inputs "
                "would get no gradient: move what computes it into the encoder, or pass it detached"
            )
        if view.ndim == 0 or len(view) < least:
            raise ValueError(f"views[{index}] must have at least one row, got shape {tuple(view.shape)}")
        if listed and sum(sizes) != len(view):
            raise ValueError(f"chunk_size must add up to the {len(view)} rows of views[{index}], got {sum(sizes)}")


@contextlib.contextmanager
def _no_sync(encoder: nn.Module, *, unless: bool) -> Iterator[None]:
    no_sync = getattr(encoder, "no_sync", None)
    with contextlib.nullcontext() if unless or no_sync is None else no_sync():
        yield
