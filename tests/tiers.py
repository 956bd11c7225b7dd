"""Marks slow cases, which `make test` skips and `make test-all` runs. Most of them have a faster case that
runs the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest
from allpairspy import AllPairs


def tiered(values: Iterable[Any], slow: Callable[[Any], bool]) -> list[Any]:
    """Return the values for `parametrize`, with the slow ones marked slow."""
    return [pytest.param(value, marks=pytest.mark.slow) if slow(value) else value for value in values]


def every_pair(*, slow_pairs: bool = False, **axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrise with a few cases that together cover every pair of values from two different axes.

    With `slow_pairs`, a case is marked slow if each of its values already appears in an earlier case.
    """
    names, values = list(axes), [list(axis) for axis in axes.values()]
    cases: list[Any] = []
    met: set[tuple[str, int]] = set()
    for case in map(tuple, AllPairs(values)):
        places = {(name, axis.index(value)) for name, axis, value in zip(names, values, case, strict=True)}
        quick = not slow_pairs or not places <= met
        met |= places
        cases.append(pytest.param(*case, marks=[] if quick else pytest.mark.slow))
    return pytest.mark.parametrize(names, cases)


def every_case(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrise with all cases. They are marked slow, except for a few that together cover every pair of values."""
    values = [list(axis) for axis in axes.values()]
    quick = set(map(tuple, AllPairs(values)))
    cases = [pytest.param(*case, marks=[] if case in quick else pytest.mark.slow) for case in product(*values)]
    return pytest.mark.parametrize(list(axes), cases)
