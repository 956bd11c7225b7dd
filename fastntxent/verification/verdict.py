"""The verdict on a backend on a device."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

Status = Literal["passed", "wrong", "not reproducible", "raised an error", "crashed", "no answer", "not available"]
STATUSES: tuple[Status, ...] = get_args(Status)


class Verdict(NamedTuple):
    """The outcome of checking a backend on a device.

    Attributes:
        status: one of STATUSES. "not available" means that nothing could be checked.
        detail: the error, its size or the reason; empty for "passed".
        case: the check that failed or was running; empty for "passed".
        checks: number of checks that passed.
        seconds: duration of the checks.
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
        """Return the inverse of `to_dict`.

        Raises:
            ValueError, TypeError, KeyError: the values are not a verdict.
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
