"""The two passes of gradient caching: embeddings without a graph, then the encoders' gradients, chunk by chunk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .chunked_view import ChunkedView
from .saved_state import ModuleState, RandomState, StateVersions, sharing_state

# The largest relative difference between a chunk's embeddings in the two passes. The same chunk with the same state may
# round differently when a graph is recorded, above all in bfloat16. Different dropout masks change embeddings by an
# order of magnitude more than this limit.
_REPEATS_WITHIN = 0.05


class TwoPasses:
    """Encodes views twice, the second time from the same state and with the same random numbers.

    The constructor saves the state of the encoders and the generators, from which the second pass starts.
    """

    def __init__(self, views: Sequence[ChunkedView]) -> None:
        self._views = views
        encoders = list({id(view.encoder): view.encoder for view in views}.values())
        tensors = [tensor for view in views for tensor in view.tensors()]
        tensors += [tensor for encoder in encoders for tensor in (*encoder.parameters(), *encoder.buffers())]
        self._devices = {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}
        groups = sharing_state(encoders) if len(encoders) > 1 else [encoders]
        self._start = [(group, ModuleState(*group)) for group in groups]
        self._start_random = RandomState(self._devices)
        self.learnt: set[int] = set()  # ids of the encoders that a gradient has reached

    def first(self) -> list[Tensor]:
        """Return the embeddings (N, D) of each view as a leaf, which requires a gradient if the encoder may get one."""
        self._leaves, self._random = [], []
        for view in self._views:
            leaf, states = _encode(view, self._devices)
            self._leaves.append(leaf)
            self._random.append(states)
        self._encoded = StateVersions(*(encoder for group, _ in self._start for encoder in group))
        return self._leaves

    def second(self, d_leaves: Sequence[Tensor | None]) -> None:
        """Backpropagate the gradients of the embeddings through the encoders.

        An encoder that cannot get a gradient does not run again, unless it shares state with one that can. Changes to
        encoders and generators since the first pass, for example by the loss, are kept.
        """
        learning = {
            id(view.encoder) for view, leaf in zip(self._views, self._leaves, strict=True) if leaf.requires_grad
        }
        # An encoder also runs again if another encoder of its group does, because they share state.
        again = [(group, start) for group, start in self._start if any(id(encoder) in learning for encoder in group)]
        encoders = [encoder for group, _ in again for encoder in group]
        if not encoders:
            return
        random, changed = RandomState(self._devices), ModuleState(*encoders, unless=self._encoded)
        for _, start in again:
            start.restore()
        # Before PyTorch 2.10 autocast's cache may hold weights that the first pass cast without a graph.
        torch.clear_autocast_cache()
        self._encode_again({id(encoder) for encoder in encoders}, d_leaves)
        for encoder in encoders:
            # Run DistributedDataParallel's own check of the backward now. Otherwise it would run in the next forward.
            getattr(encoder, "_check_reducer_finalized", lambda: None)()
        changed.restore()
        random.restore()

    def undo(self) -> None:
        """Restore the state that encoders and generators had before the first pass."""
        for _, start in self._start:
            start.restore()
        self._start_random.restore()

    def _encode_again(self, encoders: set[int], d_leaves: Sequence[Tensor | None]) -> None:
        last_view = {id(view.encoder): view for view in self._views}
        repeats = []
        for view, leaf, d_leaf, states in zip(self._views, self._leaves, d_leaves, self._random, strict=True):
            if id(view.encoder) not in encoders:
                continue
            d_leaf = torch.zeros_like(leaf) if d_leaf is None else d_leaf
            for index, (chunk, state) in enumerate(zip(view.chunks(), states, strict=True)):
                state.restore()
                last = view is last_view[id(view.encoder)] and index == len(states) - 1
                with _no_sync(view.encoder, unless=last), torch.enable_grad():
                    z = view.embed(chunk)
                    repeats.append((view.encoder_name, _distance(view.encoder_name, z, leaf[slice(*chunk)])))
                    if z.requires_grad:  # False for a frozen tower
                        z.backward(d_leaf[slice(*chunk)].to(z.dtype))
                        self.learnt.add(id(view.encoder))
                    elif last and id(view.encoder) in self.learnt and hasattr(view.encoder, "no_sync"):
                        raise RuntimeError(
                            f"{view.encoder_name} synchronises its gradients in its last chunk, but that chunk "
                            "has none: reorder views so that its last view has a gradient"
                        )
        _check_repeated(repeats)


def with_second_pass(loss: Tensor, passes: TwoPasses, d_leaves: Sequence[Tensor | None]) -> Tensor:
    """Return the loss with a backward that starts with the second pass.

    d_leaves: the gradients of the loss with respect to the embeddings of the first pass.
    """
    trigger = torch.empty((), device=loss.device, requires_grad=True)
    result: Tensor = _WithSecondPass.apply(loss, trigger, passes, d_leaves)
    return result


class _WithSecondPass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, trigger: Tensor, passes: TwoPasses, d_leaves: Sequence[Tensor | None]
    ) -> Tensor:
        ctx.passes, ctx.d_leaves = passes, d_leaves
        ctx.autocast = _autocast_now(("cpu", loss.device.type))
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None, None, None]:
        try:
            with ctx.autocast():
                ctx.passes.second([None if d_leaf is None else d_loss * d_leaf for d_leaf in ctx.d_leaves])
        except BaseException:
            ctx.passes.undo()
            raise
        return d_loss, None, None, None


def _autocast_now(device_types: Sequence[str]) -> Callable[[], contextlib.ExitStack]:
    """Return a function that recreates the current autocast settings as a context, since a backward may run outside
    them."""
    settings = [
        (name, torch.get_autocast_dtype(name), torch.is_autocast_enabled(name)) for name in dict.fromkeys(device_types)
    ]
    cache_enabled = torch.is_autocast_cache_enabled()

    def again() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        for setting in settings:
            stack.enter_context(torch.autocast(*setting, cache_enabled=cache_enabled))
        return stack

    return again


def _encode(view: ChunkedView, devices: set[torch.device]) -> tuple[Tensor, list[RandomState]]:
    """Return the embeddings of a view as a leaf for the loss, and the random state before each chunk."""
    # Only autograd knows whether an encoder without trainable parameters is frozen: its output may depend on trainable
    # tensors elsewhere. So such an encoder runs with gradients enabled, and `z.requires_grad` decides.
    frozen = not any(parameter.requires_grad for parameter in view.encoder.parameters())
    parts, states, learns = [], [], not frozen
    for chunk in view.chunks():
        states.append(RandomState(devices))
        with torch.set_grad_enabled(frozen):
            z = view.embed(chunk)
        learns |= z.requires_grad
        # A copy, because z may be a view of a larger output, or memory that the encoder reuses for the next chunk.
        parts.append(z.detach().clone())
    shapes = list({tuple(part.shape[1:]): None for part in parts if len(part)})
    if len(shapes) > 1:
        raise ValueError(f"{view.encoder_name} must return rows of the same shape, got {shapes[0]} and {shapes[1]}")
    leaf = torch.cat(parts)
    if learns and not (leaf.is_floating_point() or leaf.is_complex()):
        raise TypeError(f"{view.encoder_name} must return floating-point embeddings, got {leaf.dtype}")
    return leaf.requires_grad_(learns), states


def _distance(name: str, z: Tensor, first: Tensor) -> Tensor:
    if len(z) and z.shape != first.shape:
        shapes = f"{tuple(first.shape)}, then {tuple(z.shape)}"
        raise RuntimeError(f"{name} must return the same shape in both passes over the same rows, got {shapes}")
    dtype = torch.promote_types(first.dtype, torch.float32)  # complex embeddings stay complex
    first = first.detach().to(dtype)
    return torch.linalg.vector_norm(z.detach().to(dtype) - first) / torch.linalg.vector_norm(first)


def _check_repeated(distances: Sequence[tuple[str, Tensor]]) -> None:
    too_far = [(value, name) for name, value in ((name, float(d)) for name, d in distances) if value > _REPEATS_WITHIN]
    if too_far:  # a NaN, as from a chunk without rows, is not too far
        distance, name = max(too_far)
        raise RuntimeError(
            f"{name} gave different embeddings in the second pass over the same rows (relative difference "
            f"{distance:.2g}), so the gradient is wrong: the encoder has state or random numbers that cached_backward "
            "does not repeat"
        )


@contextlib.contextmanager
def _no_sync(encoder: nn.Module, *, unless: bool) -> Iterator[None]:
    no_sync = getattr(encoder, "no_sync", None)
    with contextlib.nullcontext() if unless or no_sync is None else no_sync():
        yield
