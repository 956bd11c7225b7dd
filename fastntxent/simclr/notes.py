"""Lists of names on one line, for notes about files that were left out, for example."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

FEW = 5
MANY = 20

# Line breaks, other control characters, and bytes of file names that are not UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def one_line(text: object) -> str:
    """Return the text with a question mark for every character that cannot be printed on one line."""
    return _UNPRINTABLE.sub("?", str(text))


def listed(names: Sequence[object], most: int = FEW) -> str:
    """Return the first `most` names, separated by commas, and the number of the remaining names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(one_line(name) for name in names[:most]) + more


def counted(count: int, singular: str, plural: str) -> str:
    """Return the count with the singular or the plural."""
    return f"{count} {singular if count == 1 else plural}"


def distinct(names: Iterable[object]) -> tuple[str, ...]:
    """Return the names as printable text, with a number appended to duplicates."""
    found: dict[str, None] = {}
    for name in names:
        plain = text = one_line(name)
        number = 2
        while text in found:
            text = f"{plain} ({number})"
            number += 1
        found[text] = None
    return tuple(found)
