"""The runs that make up the study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config

# Temperature of every run outside the sweep. The sweep's run at this temperature is the reference, and its encoder is
# tested in the downstream tasks.
TEMPERATURE = 0.5
OBJECTIVES = ("nt_xent", "alignment", "distribution")
NORMS = ("batch", "none")
# Peak learning rate of the runs without BatchNorm. With the trainer's default of 0.003, alignment alone collapses too
# slowly: after 20 epochs, the kNN accuracy of z is still 26 %, where chance is 10 %. NT-Xent learns with either rate.
LR_WITHOUT_NORM = 0.01


@dataclass(frozen=True)
class Plan:
    """The size of the study.

    Args:
        data: name of the data set.
        epochs: length of the runs that differ in objective, normalisation or temperature.
        measured: the epochs after which these runs are measured, in order, from 0 to `epochs`.
        temperatures: the temperatures of the sweep, with TEMPERATURE among them.
        held_out: groups of classes. For each group, one encoder is trained without the group's images.
        held_out_epochs: length of the held-out runs.
        batch_size: images per step.
    """

    data: str
    epochs: int
    measured: tuple[int, ...]
    temperatures: tuple[float, ...]
    held_out: tuple[tuple[int, ...], ...]
    held_out_epochs: int
    batch_size: int = 256

    def runs(self, out: Path, seed: int) -> dict[str, Config]:
        """Return the settings of each run by name, in running order. Each run has a folder under `out`."""
        options: dict[str, dict[str, Any]] = {}
        for norm in NORMS:
            for objective in OBJECTIVES:
                lr = 0.0 if norm == "batch" else LR_WITHOUT_NORM
                options[objective_run(objective, norm)] = {"objective": objective, "norm": norm, "lr": lr}
        for tau in self.temperatures:
            options.setdefault(temperature_run(tau), {"temperature": tau})
        return {name: self._config(out / name, seed, self.epochs, **extra) for name, extra in options.items()}

    def held_out_runs(self, out: Path, seed: int) -> dict[tuple[int, ...], Config]:
        """Return the settings of each run that leaves out a group of classes, by group."""
        return {
            group: self._config(out / f"without-{'-'.join(map(str, group))}", seed, self.held_out_epochs)
            for group in self.held_out
        }

    def _config(self, out: Path, seed: int, epochs: int, **options: Any) -> Config:
        settings: dict[str, Any] = {"temperature": TEMPERATURE, "warmup_epochs": min(3.0, epochs / 4), **options}
        return Config(
            data=self.data, epochs=epochs, batch_size=self.batch_size, seed=seed, out=out, device="cpu", quiet=True,
            checkpoint_every=0, **settings,
        )  # fmt: skip


def objective_run(objective: str, norm: str) -> str:
    """Return a run's name. NT-Xent with BatchNorm is also a run of the temperature sweep, and is named as such."""
    if (objective, norm) == ("nt_xent", "batch"):
        return temperature_run(TEMPERATURE)
    return objective if norm == "batch" else f"{objective}-without-norm"


def temperature_run(tau: float) -> str:
    """Return the name of a run of the temperature sweep."""
    return f"tau-{tau:g}"


FULL = Plan(
    data="mnist5k",
    epochs=30,
    measured=(0, 1, 2, 4, 7, 10, 15, 20, 25, 30),
    temperatures=(0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0),
    held_out=((0, 1), (2, 3), (4, 5), (6, 7), (8, 9)),
    held_out_epochs=15,
)
# For a first try and for the tests: 8 x 8 digits, a few seconds in total.
QUICK = Plan(
    data="digits", epochs=2, measured=(0, 1, 2), temperatures=(0.1, 0.5), held_out=((0, 1),), held_out_epochs=1
)
