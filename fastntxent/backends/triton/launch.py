"""The launches of a call and the memory that they share, recorded once for each kind of call and then replayed.

For a small batch the host takes longer than the kernels: it chooses tiles and allocates a dozen tensors, and Triton
looks up each compiled kernel by some thirty arguments. All of that depends only on the shapes, dtypes, strides,
alignments and options of a call. So the second call of a kind is recorded: its launches, and for each pointer its place
in an argument, an output or the workspace. Later calls allocate the outputs and one workspace, and launch the compiled
kernels with the new addresses.

A recording must not replay anything that may differ in the next call:

- A call is not recorded if it passes a kernel a pointer to anything else, such as a copy that PyTorch made, or if one
  of its results is neither an argument nor an output. No other operation may run between the launches
  (tests/test_triton.py checks this).
- Recordings are looked up by a key. The key contains everything that Triton specialises a kernel for: the dtypes,
  whether each address is a multiple of 16, and (through shapes and strides) whether each integer is 1, a multiple of
  16, or beyond 32 bits.
- The key also contains a temperature given as a float. If the temperature changes at every step, no key repeats, so no
  call is recorded.
- A compiled kernel belongs to one device, so the key contains the device.

Calls with a large workspace are not recorded: it is better to free their memory piece by piece, and their kernels take
milliseconds anyway.
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

RECORDS = not INTERPRETED  # under the interpreter, tests change tiles between calls, and recordings would be stale
LARGEST = 32 * 2**20  # the most bytes of a recorded workspace
KEPT = 1024  # the most kinds of call that are remembered, recorded or not
ALIGNED = 16  # bytes; Triton compiles separate kernels for pointers with and without this alignment
_APART = 256  # bytes; aligns the parts of a workspace like separate tensors


class Place(NamedTuple):
    """The target of a pointer. `base` is the index of its tensor: the workspace (0), then arguments, then outputs."""

    base: int
    offset: int
    dtype: torch.dtype


class Work:
    """The memory and the launches of one call."""

    def __init__(self, device: torch.device, recorded: bool = False, direct: bool | None = None):
        self.device, self.recorded = device, recorded
        self.direct = direct  # forces the direct or the shifted regime; None: the temperature decides
        self.size = 0  # bytes of workspace so far
        # The parts of the workspace and their offsets. The references keep two parts from sharing an address.
        self.parts: list[tuple[Tensor, int]] = []
        self.outputs: list[Tensor] = []
        self.launches: list[tuple[Callable[..., Any], list[Any]]] = []

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return an uninitialised tensor that passes values from one kernel to the next."""
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
        """Return an uninitialised float32 tensor that the call will return."""
        output = torch.empty(shape, dtype=torch.float32, device=self.device)
        if self.recorded:
            self.outputs.append(output)
        return output

    def launch(self, kernel: Any, grid: tuple[int, ...], **named: Any) -> None:
        """Launch a kernel with its arguments and Triton's options, all by name.

        Triton gets the arguments by position: binding some forty names would take 3 us longer.
        """
        arguments = [named.pop(name) for name in kernel.arg_names]
        compiled = kernel[grid](*arguments, **NO_CONTRACTION, **named)
        if self.recorded:
            run = (kernel if INTERPRETED else compiled)[(*grid, 1, 1)[:3]]
            self.launches.append((run, arguments))


class Recording:
    """The launches of a call, which can be repeated on other tensors of the same kind."""

    def __init__(self, work: Work, given: Sequence[Tensor], results: Results):
        self.device, self.size = work.device, work.size
        self.shapes = [output.shape for output in work.outputs]
        tensors = {id(x): 1 + index for index, x in reversed(list(enumerate((*given, *work.outputs))))}
        if not all(x is None or id(x) in tensors for x in results):
            raise _NotRecordable
        self.results = [None if x is None else tensors[id(x)] for x in results]
        # Collect the arguments of all launches, each pointer once. Each launch then picks its arguments by index.
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
        """Repeat all launches and return the results."""
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
    """Raised if a result is neither an argument nor an output, or if a pointer is outside these and the workspace."""


def _without_memory(x: Any) -> Any:
    """Return a constant that keeps no memory alive. An empty tensor may be a view, so it is replaced by a new one."""
    return torch.empty(0, dtype=x.dtype, device=x.device) if isinstance(x, Tensor) else x


def _place(x: Tensor, tensors: dict[int, int], parts: list[tuple[Tensor, int]]) -> Place:
    """Return a pointer's place. Arguments and outputs are compared by identity, because two may share an address."""
    if id(x) in tensors:
        return Place(tensors[id(x)], 0, x.dtype)
    for part, start in parts:
        if 0 <= x.data_ptr() - part.data_ptr() < part.nbytes:
            return Place(0, start + x.data_ptr() - part.data_ptr(), x.dtype)
    raise _NotRecordable


def _view(base: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """Return a pointer in the form that the interpreter takes."""
    return base if base.dtype == dtype and not offset else base[offset : offset + dtype.itemsize].view(dtype)


_recordings: dict[Hashable, Recording | bool] = {}  # False: called once so far; True: cannot be recorded


def repeated(method: Callable[Concatenate[_Self, Work, _P], _R]) -> Callable[Concatenate[_Self, _P], _R]:
    """Wrap a method of a backend so that its launches are recorded and replayed.

    The method takes a `Work` as its first argument; its callers do not pass one. During the call, the device of the
    first tensor is the current device, because Triton launches on the current device.
    """

    @functools.wraps(method)
    def call(self: Any, *arguments: Any) -> Any:
        fields = _fields(arguments)
        given = [x for x in fields if isinstance(x, Tensor)]
        with torch.cuda.device_of(given[0]):
            if _warming:
                for direct in (True, False):  # for the launches only; the results are ignored
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
    """Return a context in which every call, in any thread, also launches the kernels that other temperatures need."""
    global _warming
    _warming += 1
    try:
        yield
    finally:
        _warming -= 1


def _fields(arguments: Sequence[Any]) -> list[Any]:
    """Return the arguments of a method, with records expanded into their fields."""
    return [x for argument in arguments for x in (argument if isinstance(argument, tuple) else (argument,))]


def _facts(given: Sequence[Tensor], fields: Sequence[Any]) -> Iterator[Hashable]:
    """Yield everything that a method's launches depend on, except the backend's settings."""
    yield given[0].device
    objects = [id(x) for x in given]
    yield tuple(map(objects.index, objects))  # shows which arguments are the same object
    for x in fields:
        yield (x.shape, x.stride(), x.dtype, x.data_ptr() % ALIGNED) if isinstance(x, Tensor) else x


def _record(key: Hashable, work: Work, given: Sequence[Tensor], results: Results) -> None:
    made_before = _recordings.pop(key, None) is not None
    while len(_recordings) >= KEPT:  # a changing temperature makes every call a new kind
        _recordings.pop(next(iter(list(_recordings))), None)
    _recordings[key] = made_before
    if work.recorded:
        with contextlib.suppress(_NotRecordable):
            _recordings[key] = Recording(work, given, results)
