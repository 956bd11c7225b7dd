"""Trees of tensors, as an encoder takes or returns them: mappings, lists, tuples and dataclasses. Any other object is a
leaf."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor


def named_tensors(tree: object, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the tree, paired with the Python expression that reaches it from `name`."""
    if isinstance(tree, Tensor):
        yield name, tree
    for key, item in _items(tree):
        yield from named_tensors(item, f"{name}.{key}" if _is_dataclass(tree) else f"{name}[{key!r}]")


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Return the tree with function(tensor) in place of each tensor.

    Containers on the path to a replaced tensor are copied, so the given tree does not change. A copy has the type of
    the original, except that a read-only mapping becomes a dict. All other parts stay the same objects.
    """
    if isinstance(tree, Tensor):
        return function(tree)
    old = _items(tree)
    new = [(key, map_tensors(function, item)) for key, item in old]
    unchanged = all(item is before for (_, item), (_, before) in zip(new, old, strict=True))
    return tree if unchanged else _rebuilt(tree, new)


def is_container(tree: object) -> bool:
    """Return whether the object is searched for tensors."""
    return isinstance(tree, (Mapping, list, tuple)) or _is_dataclass(tree)


def part(tree: Any, key: Any) -> Any:
    """Return the item of the tree with this key, or the attribute of the tree with this name."""
    if isinstance(key, str) and not isinstance(tree, Mapping):
        return getattr(tree, key)
    return tree[key]


def _is_dataclass(tree: object) -> bool:
    # Hugging Face's outputs are both mappings and dataclasses.
    return dataclasses.is_dataclass(tree) and not isinstance(tree, (type, Mapping))


def _items(tree: Any) -> list[tuple[Any, Any]]:
    if isinstance(tree, Mapping):
        return list(tree.items())
    if _is_dataclass(tree):
        return [(field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree)]
    if isinstance(tree, (list, tuple)):
        return list(enumerate(tree))
    return []


def _rebuilt(tree: Any, items: list[tuple[Any, Any]]) -> Any:
    """Return a container like the tree with these items in place of its own."""
    if type(tree) is dict or (isinstance(tree, Mapping) and not isinstance(tree, MutableMapping)):
        return dict(items)
    if isinstance(tree, tuple):
        values = [item for _, item in items]
        return tree._make(values) if hasattr(tree, "_make") else type(tree)(values)  # named tuples have _make
    # A copy keeps the other attributes. The constructor is not called, because it may have any signature.
    rebuilt = copy.copy(tree)
    for key, item in items:
        if _is_dataclass(tree):
            object.__setattr__(rebuilt, key, item)  # works for frozen dataclasses too
        else:
            rebuilt[key] = item
    return rebuilt
