"""Lists of names in one line: what a person is told about files that were left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

FEW = 5
MANY = 20

# Line breaks and other control characters, and the bytes of a file's name that are not UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def one_line(text: object) -> str:
    """The text with a question mark for every character that cannot be printed within a line."""
    return _UNPRINTABLE.sub("?", str(text))


def listed(names: Sequence[object], most: int = FEW) -> str:
    """The first names, separated by commas, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(one_line(name) for name in names[:most]) + more


def counted(count: int, singular: str, plural: str) -> str:
    """The count with the noun, in the number that it takes."""
    return f"{count} {singular if count == 1 else plural}"


def distinct(names: Iterable[object]) -> tuple[str, ...]:
    """The names as printable text, with a number after each that would print like one before it."""
    found: dict[str, None] = {}
    for name in names:
        plain = text = one_line(name)
        number = 2
        while text in found:
            text = f"{plain} ({number})"
            number += 1
        found[text] = None
    return tuple(found)
