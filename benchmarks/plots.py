"""Plots of time and memory against N, as SVG. The same results give the same bytes."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .competitors import COMPETITORS, OURS
from .tables import SuiteRecord, digits

D = 128
MARKERS = "osD^vP*Xh"
Lines = dict[str, list[tuple[float, float]]]


def draw(times: SuiteRecord, memory: SuiteRecord, folder: Path) -> None:
    """Write time.svg and memory.svg to the folder."""
    results = sorted((result for result in times["results"] if result["d"] == D), key=lambda result: result["n"])
    lines: Lines = {
        name: [(r["n"], r["losses"][name]["both"]["p50"]) for r in results if name in r["losses"]]
        for name in COMPETITORS
    }
    floor = [(result["n"], result["floor_ms"]) for result in results]
    _plot(lines, floor, "forward and backward, ms", folder / "time.svg")

    rows = sorted((row for row in memory["results"] if row["d"] == D), key=lambda row: row["n"])
    # A few pages are noise, and a logarithmic axis has no zero.
    lines = {
        name: [(r["n"], r["extra_bytes"] / 2**20) for r in rows if r["loss"] == name and r["extra_bytes"] > 2**16]
        for name in COMPETITORS
    }
    _plot(lines, [], "peak memory beside the inputs, MiB", folder / "memory.svg")


def _plot(lines: Lines, floor: list[tuple[float, float]], title: str, path: Path) -> None:
    with matplotlib.rc_context({"svg.hashsalt": "fastntxent", "font.size": 10}):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for marker, (name, points) in zip(MARKERS, lines.items(), strict=False):
            if points:
                ours = name in OURS
                style = {"linewidth": 2.5 if ours else 1.2, "markersize": 6 if ours else 5}
                label = f"fastntxent {name}" if ours else name
                axes.plot(*zip(*points, strict=True), marker=marker, label=label, **style)
        if floor:
            axes.plot(*zip(*floor, strict=True), "--", color="grey", label="floor: the GEMM's rate")
        axes.set(xscale="log", yscale="log", xlabel=f"N (samples; D = {D})", title=title)
        sizes = sorted({n for points in lines.values() for n, _ in points})
        axes.set_xticks(sizes, map(str, sizes))
        axes.xaxis.minorticks_off()
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: digits(y)))
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
