"""One view of a batch in gradient caching: its encoder, its inputs, and the chunks that its rows are cut into."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .trees import is_container, map_tensors, named_tensors, part
from .validation import check_flag, check_integer

Output: TypeAlias = "str | int | Callable[[Any], Tensor] | None"
Lengths: TypeAlias = "str | Callable[[Any], Tensor | Sequence[int]]"


@dataclass(frozen=True)
class ChunkedView:
    """A view of the batch. Each tensor of `inputs` has the batch along its first dimension, or is 0-d."""

    encoder: nn.Module
    encoder_name: str
    inputs: Any
    sizes: Sequence[int]  # the number of rows of each chunk
    unpack: bool
    encoder_kwargs: Mapping[str, Any]
    output: Output
    prepare: Callable[[Any], Any] | None = None  # converts a chunk's inputs to the encoder's inputs

    def chunks(self) -> list[tuple[int, int]]:
        """Return the first row and the end (exclusive) of each chunk."""
        return list(itertools.pairwise(itertools.accumulate(self.sizes, initial=0)))

    def embed(self, chunk: tuple[int, int]) -> Tensor:
        """Return the embeddings (n, D) of a chunk's rows."""
        begin, end = chunk

        # Copy the inputs, so that the encoder may write to them, and so that none of them is an inference tensor.
        inputs = map_tensors(lambda x: (x[begin:end] if x.ndim else x).detach().clone(), self.inputs)
        if self.prepare is not None:
            inputs = self.prepare(inputs)
        if self.unpack and isinstance(inputs, Mapping):
            returned: Any = self.encoder(**inputs, **self.encoder_kwargs)
        elif self.unpack and isinstance(inputs, (list, tuple)):
            returned = self.encoder(*inputs, **self.encoder_kwargs)
        else:
            returned = self.encoder(inputs, **self.encoder_kwargs)
        return self._embeddings_of(returned, end - begin)

    def _embeddings_of(self, returned: Any, rows: int) -> Tensor:
        name, z = self.encoder_name, returned
        if callable(self.output):
            name, z = f"output, called with the result of {name},", self.output(returned)
        elif self.output is not None:
            name, z = f"{name}, at output={self.output!r},", self._output_of(returned)
        if not isinstance(z, Tensor):
            hint = "" if self.output is not None else "; use output= to select the embeddings"
            raise TypeError(f"{name} must return a torch.Tensor, got {type(z).__name__}{hint}")
        if z.layout != torch.strided or z.is_nested or z.is_meta:
            got = "a nested tensor" if z.is_nested else "a tensor on the meta device" if z.is_meta else z.layout
            raise TypeError(f"{name} must return a dense (strided) tensor with values, got {got}")
        if z.ndim == 0 or len(z) != rows:
            raise ValueError(f"{name} must return {rows} embeddings, one per input row, got shape {tuple(z.shape)}")
        return z

    def _output_of(self, returned: Any) -> Any:
        try:
            return part(returned, self.output)
        except (AttributeError, IndexError, KeyError, TypeError):
            raise ValueError(
                f"output must be a function, or a key, index or attribute of the output of {self.encoder_name} "
                f"({_with_keys(returned)}), got {self.output!r}"
            ) from None

    def tensors(self) -> list[Tensor]:
        """Return every tensor that the encoder gets."""
        return [tensor for _, tensor in named_tensors((self.inputs, dict(self.encoder_kwargs)), "")]


def chunked_views(
    encoder: nn.Module | Sequence[nn.Module],
    views: Iterable[Any],
    *,
    chunk_size: Any,
    chunk_tokens: int | None,
    lengths: Lengths | Sequence[Lengths],
    unpack: bool = False,
    encoder_kwargs: Any = None,
    output: Any = None,
    names: tuple[str, str] = ("encoder", "views"),
) -> list[ChunkedView]:
    """Return the views of a `cached_backward` call, with its arguments checked.

    names: the names of `encoder` and `views` in error messages.
    """
    encoder_name, views_name = names
    if isinstance(views, Tensor):
        raise TypeError(
            f"{views_name} must be a sequence of tensors, one per view, got one tensor; pass views.unbind()"
        )
    if isinstance(views, Mapping):
        raise TypeError(f"{views_name} must be a sequence, one element per view, got one {type(views).__name__}")
    if not isinstance(views, Iterable):
        raise TypeError(f"{views_name} must be a sequence, one element per view, got {type(views).__name__}")
    check_flag("unpack", unpack)
    views = tuple(views)
    encoders = _check_encoders(encoder_name, encoder, len(views))
    sizes = _check_chunk_size(chunk_size, len(views), chunk_tokens)
    if len(views) == 0:
        raise ValueError(f"{views_name} must hold at least one view, got an empty sequence")
    kwargs = _one_each("encoder_kwargs", {} if encoder_kwargs is None else encoder_kwargs, len(views))
    outputs, all_lengths = _one_each("output", output, len(views)), _one_each("lengths", lengths, len(views))
    found = []
    for index, view in enumerate(views):
        name = f"{views_name}[{index}]"
        rows = _check_view(name, view, may_be_empty=isinstance(sizes[index], list))
        if unpack and isinstance(view, Mapping):
            _check_names(name, view)
        _check_kwargs(kwargs[index])
        if chunk_tokens is not None:
            of_chunks = _pack(_lengths(name, view, rows, all_lengths[index]), chunk_tokens)
        else:
            of_chunks = _cut(name, rows, sizes[index])
        found.append(ChunkedView(*encoders[index], view, of_chunks, unpack, kwargs[index], outputs[index]))
    return found


def _one_each(name: str, value: Any, n_views: int) -> Sequence[Any]:
    """Return the elements of a list or tuple, one per view, or any other value repeated for every view."""
    if not isinstance(value, (list, tuple)):
        return [value] * n_views
    if len(value) != n_views:
        raise ValueError(f"{name} must hold an element for each of the {n_views} views, got {len(value)}")
    return value


def _check_encoders(encoder_name: str, encoder: Any, n_views: int) -> list[tuple[nn.Module, str]]:
    """Return the encoder of each view, with its name."""
    several = isinstance(encoder, (list, tuple, nn.ModuleList))
    modules = list(encoder) if several else [encoder]
    names = [f"{encoder_name}[{index}]" for index in range(len(modules))] if several else [encoder_name]
    for name, module in zip(names, modules, strict=True):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
        if _has_no_forward(module):
            raise TypeError(f"{name} must have a forward, got {type(module).__name__}, which has none")
        if any(map(is_lazy, (*module.parameters(), *module.buffers()))):
            raise ValueError(f"{name} must be initialised, got a lazy layer without parameters: run it once first")
        if any(parameter.is_meta for parameter in module.parameters()):
            raise ValueError(f"{name} must have its parameters in memory, got some on the meta device")
        # With a static graph, DistributedDataParallel synchronises in its first backward, even inside no_sync.
        if hasattr(module, "no_sync") and getattr(module, "static_graph", False):
            raise ValueError(f"{name} must not be DistributedDataParallel with static_graph=True")
    if several and len(modules) != n_views:
        raise ValueError(f"{encoder_name} must hold a module for each of the {n_views} views, got {len(modules)}")
    return list(zip(modules, names, strict=True)) if several else [(encoder, encoder_name)] * n_views


def _has_no_forward(module: nn.Module) -> bool:
    of_class, of_base = (
        # Not getattr, which fails on the classes of torch.jit.
        [inspect.getattr_static(cls, name, None) for name in ("forward", "__call__")]
        for cls in (type(module), nn.Module)
    )
    return of_class == of_base and "forward" not in vars(module)


def _check_chunk_size(chunk_size: Any, n_views: int, chunk_tokens: int | None) -> Sequence[int | list[int]]:
    """Return, for each view, the number of rows per chunk, or the list of each chunk's number of rows."""
    if (chunk_size is None) == (chunk_tokens is None):
        raise TypeError("either chunk_size or chunk_tokens must be given, but not both")
    if chunk_tokens is not None:
        check_integer("chunk_tokens", chunk_tokens, 1)
        return [1] * n_views
    if not isinstance(chunk_size, Sequence):
        check_integer("chunk_size", chunk_size, 1)
        return [int(chunk_size)] * n_views
    per_view = len(chunk_size) > 0 and all(isinstance(sizes, (list, tuple)) for sizes in chunk_size)
    found = []
    for sizes in _one_each("chunk_size", chunk_size, n_views) if per_view else [chunk_size]:
        for size in sizes:
            check_integer("chunk_size", size, 0)
        if len(sizes) == 0:
            raise ValueError("chunk_size must list the number of rows of at least one chunk, got an empty list")
        found.append(list(map(int, sizes)))
    return found if per_view else found * n_views


def _check_view(name: str, view: Any, *, may_be_empty: bool) -> int:
    """Check a view, and return its number of rows."""
    tensors = list(named_tensors(view, name))
    if not tensors:
        no_tensors = " without tensors" if is_container(view) else ""
        raise TypeError(f"{name} must be a torch.Tensor, got {type(view).__name__}{no_tensors}")
    for path, tensor in tensors:
        if tensor.layout != torch.strided or tensor.is_nested:
            raise TypeError(
                f"{path} must be a dense (strided) tensor, got layout {tensor.layout}, nested: {tensor.is_nested}"
            )
        if tensor.is_meta:
            raise ValueError(f"{path} must have values, got a tensor on the meta device")
        _check_no_graph(path, tensor)
    tensors = [(path, tensor) for path, tensor in tensors if tensor.ndim > 0] or tensors
    (first, tensor), *others = tensors
    if tensor.ndim == 0 or (len(tensor) == 0 and not may_be_empty):
        raise ValueError(f"{first} must have at least one row, got shape {tuple(tensor.shape)}")
    for path, other in others:
        if len(other) != len(tensor):
            raise ValueError(
                f"{path} must have as many rows as {first}, {len(tensor)}, got shape {tuple(other.shape)}; pass "
                "inputs without a batch dimension in encoder_kwargs"
            )
    return len(tensor)


def _check_no_graph(name: str, tensor: Tensor) -> None:
    if tensor.grad_fn is not None:
        raise ValueError(
            f"{name} must be data without a graph, got the output of {tensor.grad_fn.name()}, whose inputs "
            "would get no gradient: move the computation into the encoder, or detach the view"
        )


def _check_names(name: str, arguments: Mapping[Any, Any]) -> None:
    for key in arguments:
        if not isinstance(key, str):
            raise TypeError(f"{name} must have argument names as its keys, got {key!r}")


def _check_kwargs(kwargs: Any) -> None:
    if not isinstance(kwargs, Mapping):
        raise TypeError(f"encoder_kwargs must be a mapping, got {type(kwargs).__name__}")
    _check_names("encoder_kwargs", kwargs)
    for path, tensor in named_tensors(dict(kwargs), "encoder_kwargs"):
        _check_no_graph(path, tensor)


def _cut(name: str, rows: int, size: int | list[int]) -> list[int]:
    """Return the number of rows of each chunk: as listed, or `size` each, with the remainder in the last."""
    if isinstance(size, list):
        if sum(size) != rows:
            raise ValueError(f"chunk_size must add up to the {rows} rows of {name}, got {sum(size)}")
        return size
    return [min(size, rows - begin) for begin in range(0, rows, size)]


def _lengths(name: str, view: Any, rows: int, lengths: Lengths) -> list[int]:
    """Return the number of tokens of each row."""
    if callable(lengths):
        found: Any = lengths(view)
    else:
        try:
            mask = part(view, lengths)
        except (AttributeError, IndexError, KeyError, TypeError):
            raise ValueError(
                f"{name} has no {lengths!r} to count tokens with: lengths must be the key of a mask, or a function "
                "that takes a view and returns the length of each row"
            ) from None
        if not isinstance(mask, Tensor) or mask.ndim == 0 or len(mask) != rows:
            got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"lengths must be the key of a mask with {name}'s {rows} rows, got {lengths!r}, {got}")
        found = mask.bool().reshape(rows, math.prod(mask.shape[1:])).sum(1)
    if isinstance(found, Tensor):
        found = found.tolist()
    if not isinstance(found, Iterable):
        raise TypeError(f"lengths must give a number for each of the {rows} rows of {name}, got {type(found).__name__}")
    found = list(found)
    if len(found) != rows:
        raise ValueError(f"lengths must give a number for each of the {rows} rows of {name}, got {len(found)}")
    for length in found:
        check_integer("lengths", length, 0)
    return found


def _with_keys(returned: Any) -> str:
    """Return the type of an object, with its keys or its length, for an error message."""
    name = type(returned).__name__
    if isinstance(returned, Mapping):
        return f"{name} with the keys {', '.join(map(repr, returned))}"
    return f"{name} of length {len(returned)}" if isinstance(returned, (list, tuple)) else name


def _pack(lengths: Sequence[int], budget: int) -> list[int]:
    """Return the number of rows of each chunk: as many as fit into the token budget, but at least one."""
    sizes, used = [0], 0
    for length in lengths:
        if sizes[-1] and used + length > budget:
            sizes.append(0)
            used = 0
        sizes[-1] += 1
        used += length
    return sizes
