"""The record of a run's measurements."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor


class TrainingError(RuntimeError):
    """Training cannot continue: the loss failed its verification, is not finite or cannot be computed, or images cannot
    be read."""


class History:
    """Measurements as columns of plain numbers: `steps` has every step, the other tables only some."""

    def __init__(self, columns: dict[str, dict[str, list[float]]] | None = None) -> None:
        self.columns = columns or {
            "steps": {"loss": [], "lr": [], "temperature": []},
            "measured": {"step": [], "seconds": [], "images_per_second": [], "alignment": [], "uniformity": []},
            "verified": {},
        }
        self._pending: list[tuple[Tensor, float, Tensor | float]] = []

    def record(self, loss: Tensor, lr: float, temperature: Tensor | float) -> None:
        """Record a step. Tensors stay on their device, so no step waits for the device."""
        self._pending.append((loss, lr, temperature))

    def flush(self, step: int) -> float:
        """Convert the recorded tensors to numbers and return the newest loss; TrainingError if a loss is not finite."""
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
        """Return a row of `measured`, joined with the columns of `steps` at the row's step."""
        measured = {name: column[index] for name, column in self.columns["measured"].items()}
        at = int(measured["step"])
        return measured | {name: column[at] for name, column in self.columns["steps"].items()}

    def measured(self) -> Iterator[dict[str, float]]:
        """Return the rows of `measured`, each as from `row`."""
        return map(self.row, range(len(self.columns["measured"]["step"])))
