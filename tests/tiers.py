"""Which cases `make test` leaves to `make test-all`: those that take minutes and repeat what others show in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from allpairspy import AllPairs


def tiered(values: Iterable[Any], slow: Callable[[Any], bool]) -> list[Any]:
    """Return the values of a parametrisation, with the slow ones marked."""
    return [pytest.param(value, marks=pytest.mark.slow) if slow(value) else value for value in values]


def every_pair(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrise by the fewest cases in which every two values of two axes meet."""
    names, values = list(axes), [list(axis) for axis in axes.values()]
    return pytest.mark.parametrize(names, [tuple(case) for case in AllPairs(values)])
