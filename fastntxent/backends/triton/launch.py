"""Launches and the memory between them: worked out once for calls of a kind, then repeated.

For a small batch the host takes longer than the kernels: it chooses tiles, makes a dozen tensors, and Triton finds each
compiled kernel anew from some thirty arguments. All of that follows from the shapes, dtypes, strides, alignments and
options of a call. So the second call of a kind is recorded: its launches, with the place of each pointer in an
argument, an output or the workspace. Later ones make the outputs and one workspace, and hand the compiled kernels new
addresses.

Nothing is repeated that may differ in the next call:

- A pointer to anything else, as to a copy that PyTorch made, keeps a call from being recorded, and so does a result
  that is no output. No other operation may come between launches (tests/test_triton.py).
- The key has what Triton compiles a kernel for: dtypes, which addresses are multiples of 16, and by shapes and strides
  which integers are 1, multiples of 16, or beyond 32 bits. It has the temperature too, as a float: a schedule's is
  never the same twice, so nothing is recorded.
- A compiled kernel belongs to one device, and so does a key.

Calls with a large workspace are not recorded. Theirs is freed piece by piece, and their kernels take milliseconds.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from .tiles import INTERPRETED, NO_CONTRACTION

Results = tuple[Tensor | None, ...]
_Self = TypeVar("_Self")
_P = ParamSpec("_P")
_R = TypeVar("_R")

RECORDS = not INTERPRETED  # the interpreter's tests change the tables between calls
LARGEST = 32 * 2**20  # bytes of a workspace that is made at once
KEPT = 1024  # recordings
ALIGNED = 16  # bytes: Triton compiles a kernel for pointers that are multiples of it, and another for any
_APART = 256  # bytes: the parts of a workspace are aligned as tensors are


class Place(NamedTuple):
    """Where a pointer points to: `base` counts the workspace, arguments and outputs."""

    base: int
    offset: int
    dtype: torch.dtype


class Work:
    """The memory and the launches of one call."""

    def __init__(self, device: torch.device, recorded: bool = False, direct: bool | None = None):
        self.device, self.recorded = device, recorded
        self.direct = direct  # whose kernels to launch, of the two regimes; None: those that the temperature asks for
        self.size = 0  # bytes of workspace so far
        self.parts: list[tuple[Tensor, int]] = []  # and where each begins. Held here, no two have the same address
        self.outputs: list[Tensor] = []
        self.launches: list[tuple[Callable[..., Any], list[Any]]] = []

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor for what one kernel leaves to the next, not yet written."""
        part = torch.empty(shape, dtype=dtype, device=self.device)
        if self.recorded:
            self.parts.append((part, self.size))
            self.size += -(-part.nbytes // _APART) * _APART
            if self.size > LARGEST:
                self.recorded = False
                self.parts.clear()
                self.launches.clear()
        return part

    def output(self, *shape: int) -> Tensor:
        """A float32 tensor that the call returns, not yet written."""
        output = torch.empty(shape, dtype=torch.float32, device=self.device)
        if self.recorded:
            self.outputs.append(output)
        return output

    def launch(self, kernel: Any, grid: tuple[int, ...], **named: Any) -> None:
        """Launch a kernel with its arguments and Triton's options, all by name. Triton itself is given the arguments in
        order: binding some forty names takes it 3 us longer."""
        arguments = [named.pop(name) for name in kernel.arg_names]
        compiled = kernel[grid](*arguments, **NO_CONTRACTION, **named)
        if self.recorded:
            run = (kernel if INTERPRETED else compiled)[(*grid, 1, 1)[:3]]
            self.launches.append((run, arguments))


class Recording:
    """The launches of a call, to be repeated on other tensors like its own."""

    def __init__(self, work: Work, given: Sequence[Tensor], results: Results):
        self.device, self.size = work.device, work.size
        self.shapes = [output.shape for output in work.outputs]
        tensors = {id(x): 1 + index for index, x in reversed(list(enumerate((*given, *work.outputs))))}
        if not all(x is None or id(x) in tensors for x in results):
            raise _NotRecordable
        self.results = [None if x is None else tensors[id(x)] for x in results]
        # What launches are given, each pointer once, and what each of them takes of it.
        told = [x for _, arguments in work.launches for x in arguments]
        places = {id(x): _place(x, tensors, work.parts) for x in told if isinstance(x, Tensor) and x.numel()}
        self.places = list(dict.fromkeys(places.values()))
        self.constants = [_without_memory(x) for x in told if id(x) not in places]
        pointers, constants = self.places.index, itertools.count(len(self.places))
        self.launches = [
            (
                run,
                operator.itemgetter(*[pointers(places[id(x)]) if id(x) in places else next(constants) for x in taken]),
            )
            for run, taken in work.launches
        ]

    def repeat(self, given: Sequence[Tensor]) -> Results:
        """Launch it all, and return the results."""
        workspace = torch.empty(self.size, dtype=torch.uint8, device=self.device)
        outputs = [torch.empty(shape, dtype=torch.float32, device=self.device) for shape in self.shapes]
        tensors = (workspace, *given, *outputs)
        values: list[Any]
        if INTERPRETED:
            values = [_view(tensors[base], offset, dtype) for base, offset, dtype in self.places]
        else:
            addresses = [x.data_ptr() for x in tensors]
            values = [addresses[base] + offset for base, offset, _ in self.places]
        values += self.constants
        for run, taken in self.launches:
            run(*taken(values))
        return tuple(None if index is None else tensors[index] for index in self.results)


class _NotRecordable(Exception):  # noqa: N818
    """A pointer or a result that is neither an argument, nor an output, nor in the workspace."""


def _without_memory(x: Any) -> Any:
    """A constant that holds no memory: an empty tensor is a view of something."""
    return torch.empty(0, dtype=x.dtype, device=x.device) if isinstance(x, Tensor) else x


def _place(x: Tensor, tensors: dict[int, int], parts: list[tuple[Tensor, int]]) -> Place:
    """A pointer's place. Arguments and outputs are known as objects: two may have one address."""
    if id(x) in tensors:
        return Place(tensors[id(x)], 0, x.dtype)
    for part, start in parts:
        if 0 <= x.data_ptr() - part.data_ptr() < part.nbytes:
            return Place(0, start + x.data_ptr() - part.data_ptr(), x.dtype)
    raise _NotRecordable


def _view(base: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """A pointer as the interpreter takes it."""
    return base if base.dtype == dtype and not offset else base[offset : offset + dtype.itemsize].view(dtype)


_recordings: dict[Hashable, Recording | bool] = {}  # False: such a call was made once; True: it cannot be repeated


def repeated(method: Callable[Concatenate[_Self, Work, _P], _R]) -> Callable[Concatenate[_Self, _P], _R]:
    """A backend's method, given a `work`, that repeats what it recorded. It runs on its first tensor's device: Triton
    launches on the current one."""

    @functools.wraps(method)
    def call(self: Any, *arguments: Any) -> Any:
        fields = _fields(arguments)
        given = [x for x in fields if isinstance(x, Tensor)]
        with torch.cuda.device_of(given[0]):
            if _warming:
                for direct in (True, False):  # launches alone: where the other regime is right, results are not written
                    method(self, Work(given[0].device, direct=direct), *arguments)  # type: ignore[call-arg]
            key = (method.__name__, self.setting(given[0].dtype), *_facts(given, fields)) if RECORDS else None
            if isinstance(recording := _recordings.get(key), Recording):
                results = recording.repeat(given)
            else:
                work = Work(given[0].device, recorded=recording is False)
                returned: Any = method(self, work, *arguments)  # type: ignore[call-arg]
                results = returned if isinstance(returned, tuple) else (returned,)
                if key is not None and recording is not True:
                    _record(key, work, given, results)
        return results if len(results) > 1 else results[0]

    return cast("Callable[Concatenate[_Self, _P], _R]", call)


_warming = 0


@contextlib.contextmanager
def warming() -> Iterator[None]:
    """A block in which every call, of any thread, also launches what it would at any other temperature."""
    global _warming
    _warming += 1
    try:
        yield
    finally:
        _warming -= 1


def _fields(arguments: Sequence[Any]) -> list[Any]:
    """The arguments of a method, those that are records field by field."""
    return [x for argument in arguments for x in (argument if isinstance(argument, tuple) else (argument,))]


def _facts(given: Sequence[Tensor], fields: Sequence[Any]) -> Iterator[Hashable]:
    """What the launches of a method follow from, beside the backend's setting."""
    yield given[0].device
    objects = [id(x) for x in given]
    yield tuple(map(objects.index, objects))  # which are one and the same
    for x in fields:
        yield (x.shape, x.stride(), x.dtype, x.data_ptr() % ALIGNED) if isinstance(x, Tensor) else x


def _record(key: Hashable, work: Work, given: Sequence[Tensor], results: Results) -> None:
    made_before = _recordings.pop(key, None) is not None
    while len(_recordings) >= KEPT:  # a temperature that changes makes a kind of call of each
        _recordings.pop(next(iter(list(_recordings))), None)
    _recordings[key] = made_before
    if work.recorded:
        with contextlib.suppress(_NotRecordable):
            _recordings[key] = Recording(work, given, results)
