"""The outcomes of checking a backend on a device."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

Status = Literal["passed", "wrong", "not reproducible", "raised an error", "crashed", "no answer", "not available"]
STATUSES: tuple[Status, ...] = get_args(Status)


class Verdict(NamedTuple):
    """The outcome of checking a backend on a device.

    Attributes:
        status: "passed", or one of the other STATUSES. "not available" means that the checks could not be completed.
        detail: What is wrong and by how much, or why the checks ended; empty for "passed".
        case: The check that failed or was running; empty for "passed".
        checks: The number of checks that passed.
        seconds: The time that the checks took.

    Example:
        >>> import fastntxent
        >>> print(fastntxent.Verdict("passed", checks=12, seconds=3.0))
        passed 12 checks in 3.0 s
    """

    status: Status
    detail: str = ""
    case: str = ""
    checks: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.status == "passed"

    def __str__(self) -> str:
        if self.ok:
            return f"passed {self.checks} checks in {self.seconds:.1f} s"
        where = f" in {self.case}" if self.case else ""
        return f"{self.status}{where}" + (f": {self.detail}" if self.detail else "")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return self._asdict()

    @classmethod
    def from_dict(cls, values: Any) -> Verdict:
        """Return the verdict with these fields, the inverse of `to_dict`.

        Raises:
            ValueError, TypeError, KeyError: the values do not describe a verdict.
        """
        if values["status"] not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {values['status']!r}")
        return cls(
            values["status"],
            str(values["detail"]),
            str(values["case"]),
            int(values["checks"]),
            float(values["seconds"]),
        )


def memory_ran_out(error: Exception) -> bool:
    """Return whether memory ran out, which says nothing about the kernels. Some errors say so only in the message."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or any(
        said in words for said in ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")
    )
