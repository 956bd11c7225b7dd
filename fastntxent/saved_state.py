"""Save and restore the state of random generators, and the state of a module other than its parameters.

State is everything that `vars(module)` reaches through submodules and containers: buffers, tensors, arrays and numbers
among the attributes, and generators of the module. A restore writes the old values into the same tensors and the old
contents into the same containers, because other objects hold references to them (DistributedDataParallel to buffers, an
optimiser to tensors). `module_of` finds the module behind a callable.
"""

from __future__ import annotations

import functools
import operator
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Not searched, because they refer to nothing. A number or string is restored with the module or container that has it.
_WITHOUT_STATE = (int, float, str, type(None), types.FunctionType)
# Attributes of every module that are not searched for state: parameters, hooks and flags. FSDP replaces sharded
# parameters with full ones in a forward, so a restore must leave parameters alone.
_NOT_STATE = vars(nn.Module()).keys() - {"_buffers", "_modules"}


def module_of(function: Callable[..., Any]) -> nn.Module | None:
    """Return the module behind a callable: the callable itself if it is a module, or the module that it is a method of.

    `functools.partial` is unwrapped first. Return None if there is no module.
    """
    while isinstance(function, functools.partial):
        function = function.func
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


class ModuleState:
    """A snapshot of the modules' state, with copies of its tensors but without parameters.

    Args:
        *modules: The modules.
        unless: `StateVersions` from an earlier moment; state that has not changed since then is left out.
    """

    def __init__(self, *modules: nn.Module, unless: StateVersions | None = None) -> None:
        values = (value for value in _reachable(*modules) if unless is None or not unless.unchanged(value))
        with torch.no_grad():
            self._undo = [undo for value in values for undo in _holding(value)]

    def restore(self) -> None:
        """Restore the state, into the same objects."""
        with torch.no_grad():
            for undo in self._undo:
                undo()


class StateVersions:
    """Every object that a `ModuleState` of the modules would hold, with a version that changes when the object is
    written to."""

    def __init__(self, *modules: nn.Module) -> None:
        # Keep the objects too, so that no new object gets the id of one that has been freed.
        self._known = {id(value): (value, _version(value)) for value in _reachable(*modules)}

    def unchanged(self, value: object) -> bool:
        """Return whether the value is one of these objects and has not changed."""
        known = self._known.get(id(value))
        return known is not None and _same(known[1], _version(value))


class RandomState:
    """The state of the global generators: Python's, NumPy's if it is imported, and PyTorch's on the CPU and
    `devices`."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        numpy = _numpy()
        self._undo: list[Callable[[], object]] = [
            functools.partial(random.setstate, random.getstate()),
            functools.partial(torch.set_rng_state, torch.get_rng_state()),
        ]
        if numpy:
            self._undo.append(functools.partial(numpy.random.set_state, numpy.random.get_state()))
        for device in devices:
            generators = torch.get_device_module(device)
            self._undo.append(functools.partial(generators.set_rng_state, generators.get_rng_state(device), device))

    def restore(self) -> None:
        """Restore the generators."""
        for undo in self._undo:
            undo()


def sharing_state(modules: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """Return the modules in groups: two modules that share state other than parameters are in one group."""
    groups: list[tuple[list[nn.Module], set[int]]] = []
    for module in modules:
        members, state = [module], {id(value) for value in _reachable(module) if _is_state(value)}
        for group in [group for group in groups if group[1] & state]:
            groups.remove(group)
            members, state = group[0] + members, group[1] | state
        groups.append((members, state))
    return [members for members, _ in groups]


def _numpy() -> Any:
    return sys.modules.get("numpy")  # if it is not imported, it has no state


def _reachable(*modules: nn.Module) -> Iterator[object]:
    """Yield every object that may hold state, once."""
    seen: dict[int, object] = {}
    pending: list[object] = [*modules]
    for module in modules:
        pending.extend(module.buffers())  # a TorchScript module does not list them among its attributes
    while pending:
        value = pending.pop()
        if id(value) not in seen and not isinstance(value, _WITHOUT_STATE):
            seen[id(value)] = value
            pending.extend(_contents(value))
            yield value


def _contents(value: object) -> Collection[Any]:
    """Return the objects that a module or container refers to."""
    if isinstance(value, nn.Module):
        return [attribute for name, attribute in vars(value).items() if name not in _NOT_STATE]
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return value
    return ()


def _version(value: object) -> object:
    numpy = _numpy()
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value._version
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    if numpy and isinstance(value, numpy.random.RandomState):
        return repr(value.get_state(legacy=False))
    if numpy and isinstance(value, numpy.random.Generator):
        return repr(value.bit_generator.state)
    if numpy and isinstance(value, numpy.ndarray):
        return value.tobytes()
    names = value if isinstance(value, dict) else vars(value) if isinstance(value, nn.Module) else ()
    return (*names, *_contents(value))


def _same(version: object, other: object) -> bool:
    if isinstance(version, Tensor):
        return isinstance(other, Tensor) and torch.equal(version, other)
    if isinstance(version, tuple) and isinstance(other, tuple):
        # Compare the objects in containers and modules by identity; numbers, strings and the state of generators by
        # value.
        return len(version) == len(other) and all(map(_identical_or_equal, version, other))
    return version == other


def _identical_or_equal(a: object, b: object) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, (int, float, str, tuple)) and a == b)


def _is_state(value: object) -> bool:
    """Return whether `_holding` may have anything to restore for the object."""
    numpy = _numpy()
    if isinstance(value, Tensor):
        return not value.requires_grad and not isinstance(value, nn.Parameter)  # neither learnt nor part of a graph
    of_numpy = (numpy.random.RandomState, numpy.random.Generator, numpy.ndarray) if numpy else ()
    return isinstance(value, (nn.Module, dict, list, set, deque, torch.Generator, random.Random, *of_numpy))


def _holding(value: object) -> Iterator[Callable[[], object]]:
    """Yield a function that restores the current state of an object, or nothing if the object has no state."""
    numpy = _numpy()
    if isinstance(value, Tensor):
        if _is_state(value):
            storage = value.data
            yield functools.partial(_refill_tensor, value, storage, _distinct(storage).clone())
    elif isinstance(value, (nn.Module, dict)):
        mapping = vars(value) if isinstance(value, nn.Module) else value
        yield functools.partial(_refill_mapping, mapping, tuple(mapping), tuple(mapping.values()))
    elif isinstance(value, (list, set, deque)):
        yield functools.partial(_refill_collection, value, tuple(value))
    elif isinstance(value, torch.Generator):
        yield functools.partial(value.set_state, value.get_state())
    elif isinstance(value, random.Random):
        yield functools.partial(value.setstate, value.getstate())
    elif numpy and isinstance(value, numpy.random.RandomState):
        yield functools.partial(value.set_state, value.get_state())
    elif numpy and isinstance(value, numpy.random.Generator):
        yield functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    elif numpy and isinstance(value, numpy.ndarray) and value.flags.writeable:
        yield functools.partial(numpy.copyto, value, value.copy())


def _distinct(tensor: Tensor) -> Tensor:
    """Return the tensor, narrowed to one element in each expanded dimension. An expanded dimension has only one element
    in memory, and PyTorch refuses to write to it."""
    if tensor.layout == torch.strided:
        for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            if stride == 0 and size > 1:
                tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _refill_tensor(tensor: Tensor, storage: Tensor, values: Tensor) -> None:
    """Write the values into the tensor's original memory without changing its version counter.

    So a graph that was recorded earlier and saved this tensor can still run its backward.
    """
    _distinct(storage).copy_(values)
    tensor.data = storage


def _refill_mapping(mapping: dict[Any, Any], keys: Collection[Any], values: Collection[Any]) -> None:
    if not (_identical(mapping.keys(), keys) and _identical(mapping.values(), values)):
        mapping.clear()
        for key, value in zip(keys, values, strict=True):
            mapping[key] = value  # not update(): a Counter would count the (key, value) pairs


def _refill_collection(collection: Any, items: Collection[Any]) -> None:
    if not _identical(collection, items):
        collection.clear()
        (collection.update if isinstance(collection, set) else collection.extend)(items)


def _identical(now: Collection[Any], held: Collection[Any]) -> bool:
    return len(now) == len(held) and all(map(operator.is_, now, held))
