"""What a run measures of itself."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor


class TrainingError(RuntimeError):
    """Training cannot go on: the loss failed its verification, or is no longer finite."""


class History:
    """What was measured, as columns of plain numbers: `steps` for every step, the others now and then."""

    def __init__(self, columns: dict[str, dict[str, list[float]]] | None = None) -> None:
        self.columns = columns or {
            "steps": {"loss": [], "lr": [], "temperature": []},
            "measured": {"step": [], "seconds": [], "images_per_second": [], "alignment": [], "uniformity": []},
            "verified": {},
        }
        self._pending: list[tuple[Tensor, float, Tensor | float]] = []

    def record(self, loss: Tensor, lr: float, temperature: Tensor | float) -> None:
        """Note a step; tensors stay where they are, so that no step waits for the device."""
        self._pending.append((loss, lr, temperature))

    def flush(self, step: int) -> float:
        """Turn what was noted into numbers; returns the newest loss."""
        steps = self.columns["steps"]
        for loss, lr, temperature in self._pending:
            value = float(loss)
            if not math.isfinite(value):
                raise TrainingError(f"the loss is {value} at step {len(steps['loss'])}; a lower --lr may help")
            steps["loss"].append(value)
            steps["lr"].append(lr)
            steps["temperature"].append(float(temperature))
        self._pending.clear()
        assert len(steps["loss"]) == step
        return steps["loss"][-1] if step else math.nan

    def log(self, table: str, **values: float) -> None:
        """Append one row to a table."""
        for name, value in values.items():
            self.columns[table].setdefault(name, []).append(value)

    def row(self, index: int) -> dict[str, float]:
        """A row of `measured`, with what `steps` has of its step."""
        measured = {name: column[index] for name, column in self.columns["measured"].items()}
        at = int(measured["step"])
        return measured | {name: column[at] for name, column in self.columns["steps"].items()}

    def measured(self) -> Iterator[dict[str, float]]:
        """The rows of `measured`."""
        return map(self.row, range(len(self.columns["measured"]["step"])))
