"""Which cases `make test` leaves to `make test-all`: those that take minutes and repeat what others show in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from allpairspy import AllPairs


def tiered(values: Iterable[Any], slow: Callable[[Any], bool]) -> list[Any]:
    """Return the values of a parametrisation, with the slow ones marked."""
    return [pytest.param(value, marks=pytest.mark.slow) if slow(value) else value for value in values]


def every_pair(*, slow_pairs: bool = False, **axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrise by as few cases as it takes for every two values of two axes to meet.

    With `slow_pairs`, only the cases that bring a value for the first time are not slow.
    """
    names, values = list(axes), [list(axis) for axis in axes.values()]
    cases, met = [], set()
    for case in map(tuple, AllPairs(values)):
        places = {(name, axis.index(value)) for name, axis, value in zip(names, values, case, strict=True)}
        quick = not slow_pairs or not places <= met
        met |= places
        cases.append(pytest.param(*case, marks=[] if quick else pytest.mark.slow))
    return pytest.mark.parametrize(names, cases)
