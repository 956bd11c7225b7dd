"""Draws the study's curves, histograms and bar charts as SVG, from the record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..figures import BLUE, GREEN, GRID, INK, ORANGE, new_figure
from ..sources import require
from .measure import BINS
from .plan import NORMS, OBJECTIVES, objective_run, temperature_run

Record = dict[str, Any]

OBJECTIVE_NAMES = {"nt_xent": "both, $L_a + L_d$", "alignment": "$L_a$ alone", "distribution": "$L_d$ alone"}
COLOURS = {"nt_xent": BLUE, "alignment": ORANGE, "distribution": GREEN}
PAIRS = {"positives": BLUE, "same class": GREEN, "other classes": ORANGE}
REPRESENTATIONS = {"trained": BLUE, "untrained": GRID, "raw pixels": "#98a3af"}


def draw(record: Record, folder: Path) -> None:
    """Write the SVG files. The same record always gives the same bytes."""
    figures: dict[str, Callable[[Record], Any]] = {
        "collapse": _collapse, "similarities": _similarities, "temperature": _temperature, "spread": _spread,
        "uses": _uses,
    }  # fmt: skip
    with require("matplotlib").rc_context({"svg.hashsalt": "fastntxent", "font.size": 9}):
        for name, make in figures.items():
            make(record).savefig(folder / f"{name}.svg", metadata={"Date": None})


def _collapse(record: Record) -> Any:
    """Plot measures against the epoch, with a line for each objective: first row without BatchNorm, second with it."""
    columns = ("alignment", "uniformity", "effective rank z", "knn z", "knn h")
    figure = new_figure(12.5, 4.8)
    for norm, row in zip(reversed(NORMS), figure.subplots(2, len(columns), sharex=True), strict=True):
        for axes, measure in zip(row, columns, strict=True):
            for objective in OBJECTIVES:
                curves = record["runs"][objective_run(objective, norm)]["curves"]
                axes.plot(
                    curves["epoch"], curves[measure], color=COLOURS[objective], label=OBJECTIVE_NAMES[objective],
                    linewidth=1.8,
                )  # fmt: skip
            _style(axes, _title(measure))
            if measure == "alignment":
                axes.set_yscale("log")
            if measure.startswith("effective rank"):
                _count_axis(axes, 128)
            if measure.startswith("knn"):
                axes.axhline(1 / _classes(record), color=INK, linewidth=0.8, linestyle=":")
                axes.set_ylim(0, 1)
        row[0].set_ylabel("without BatchNorm" if norm == "none" else "with BatchNorm", color=INK)
    for axes in row:
        axes.set_xlabel("epoch", color=INK)
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.align_ylabels()
    return figure


def _similarities(record: Record) -> Any:
    """Plot histograms of the final similarities, one column per objective."""
    names = {OBJECTIVE_NAMES[objective]: objective_run(objective, "none") for objective in OBJECTIVES}
    return _histograms(record, names)


def _spread(record: Record) -> Any:
    """Plot histograms of the final similarities, one column per temperature."""
    return _histograms(record, {rf"$\tau$ = {tau:g}": temperature_run(tau) for tau in record["plan"]["temperatures"]})


def _histograms(record: Record, names: dict[str, str]) -> Any:
    figure = new_figure(1.5 + 1.75 * max(len(names), 4), 2.5)
    edges = torch.linspace(-1, 1, BINS + 1).numpy()
    for axes, (title, name) in zip(figure.subplots(1, len(names)), names.items(), strict=True):
        for pairs, colour in PAIRS.items():
            counts = torch.tensor(record["runs"][name]["end"]["similarities"][pairs]["histogram"]).float()
            density = (counts / counts.sum().clamp(min=1) * BINS / 2).numpy()
            axes.stairs(density, edges, fill=True, alpha=0.5, color=colour, label=pairs)
        _style(axes, title)
        axes.set_yticks([])
        axes.set_xlim(-1, 1.02)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.supxlabel("cosine similarity", fontsize=9, color=INK)
    return figure


def _temperature(record: Record) -> Any:
    """Plot the final measures against the temperature."""
    taus = record["plan"]["temperatures"]
    ends = [record["runs"][temperature_run(tau)] for tau in taus]

    def last(measure: str) -> list[float]:
        return [run["curves"][measure][-1] for run in ends]

    panels: dict[str, dict[str, list[float]]] = {
        "accuracy of h": {"kNN": last("knn h"), "linear": [run["end"]["linear"] for run in ends]},
        "effective rank": {"z": last("effective rank z"), "h": last("effective rank h")},
        "similarity, mean": {pairs: [run["end"]["similarities"][pairs]["mean"] for run in ends] for pairs in PAIRS},
        "effective negatives": {"": [run["end"]["effective negatives"] for run in ends]},
        "uniformity": {"": last("uniformity")},
    }
    figure = new_figure(12.5, 2.7)
    for axes, (title, lines) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for colour, (label, values) in zip((BLUE, GREEN, ORANGE), lines.items(), strict=False):
            axes.plot(taus, values, "o-", color=colour, label=label, linewidth=1.6, markersize=4)
        _style(axes, title)
        axes.set_xscale("log")
        axes.set_xticks(taus, [f"{tau:g}" for tau in taus], rotation=90)
        axes.xaxis.minorticks_off()
        axes.set_xlabel(r"temperature $\tau$", color=INK)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8)
    _count_axis(figure.axes[list(panels).index("effective negatives")], ends[0]["end"]["negatives"])
    return figure


def _uses(record: Record) -> Any:
    """Plot bars of the clustering and retrieval scores, and of the AUROC of each held-out class."""
    figure = new_figure(12.5, 3)
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.2))
    uses, anomalies = record["uses"], record["anomalies"]
    _bars(left, {f"{score}@10" if score == "precision" else score: {name: uses[name][score] for name in uses}
                 for score in uses["trained"]})  # fmt: skip
    _bars(right, {row["class"]: row["AUROC"] for row in anomalies})
    _style(left, "clusters and nearest images")
    _style(right, "AUROC of a class that training never saw")
    right.axhline(0.5, color=INK, linewidth=0.8, linestyle=":")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def _bars(axes: Any, groups: dict[str, dict[str, float]]) -> None:
    width = 0.8 / len(REPRESENTATIONS)
    for place, (name, colour) in enumerate(REPRESENTATIONS.items()):
        x = [index + (place - 1) * width for index in range(len(groups))]
        axes.bar(x, [values[name] for values in groups.values()], width, color=colour, label=name)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylim(0, 1)


def _style(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)


def _count_axis(axes: Any, most: int) -> None:
    """Make the y axis logarithmic from 1 to `most`, with plain numbers as tick labels."""
    axes.set_yscale("log")
    axes.set_ylim(0.9, 1.2 * most)
    ticks = [10**power for power in range(5) if 10**power <= most]
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.yaxis.minorticks_off()


def _title(measure: str) -> str:
    name, _, of = measure.rpartition(" ")
    return f"{'kNN' if name == 'knn' else name} of {of}" if of in ("z", "h") else measure


def _classes(record: Record) -> int:
    return int(record["data"]["classes"])
