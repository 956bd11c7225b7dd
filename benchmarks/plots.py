"""The plot of time and memory against N, as SVG. The same results give the same bytes."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .competitors import COMPETITORS, OURS
from .tables import NAMES, SuiteRecord, digits

D = 128
MARKERS = "osD^vP*Xh<>"
Lines = dict[str, list[tuple[float, float]]]


def draw(times: SuiteRecord, memory: SuiteRecord, folder: Path) -> None:
    """Write overview.svg: time on the left, memory on the right."""
    results = sorted((result for result in times["results"] if result["d"] == D), key=lambda result: result["n"])
    ms: Lines = {
        name: [(r["n"], r["losses"][name]["both"]["p50"]) for r in results if name in r["losses"]]
        for name in COMPETITORS
    }
    floor = [(result["n"], result["floor_ms"]) for result in results]

    rows = sorted((row for row in memory["results"] if row["d"] == D), key=lambda row: row["n"])
    # Points up to 64 KiB are left out: a few pages are noise, and a logarithmic axis has no zero.
    mib: Lines = {
        name: [(r["n"], r["extra_bytes"] / 2**20) for r in rows if r["loss"] == name and r["extra_bytes"] > 2**16]
        for name in COMPETITORS
    }

    with matplotlib.rc_context({"svg.hashsalt": "fastntxent", "font.size": 9}):
        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        shown = [name for name in COMPETITORS if ms[name] or mib[name]]
        _plot(left, ms, shown, "forward and backward, ms")
        left.plot(*zip(*floor, strict=True), "--", color="grey", label="the GEMM's rate")
        _plot(right, mib, shown, "peak memory beyond the inputs, MiB")
        handles = {
            label: handle
            for axes in (left, right)
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / "overview.svg", metadata={"Date": None})


def _plot(axes: Axes, lines: Lines, shown: list[str], title: str) -> None:
    for place, name in enumerate(shown):
        if points := lines[name]:
            ours = name in OURS
            label = f"fastntxent {name}" if ours else NAMES.get(name, name)
            axes.plot(
                *zip(*points, strict=True),
                marker=MARKERS[place],
                label=f"{label} (a different loss)" if COMPETITORS[name].note else label,
                color=f"C{place}",
                linewidth=2.5 if ours else 1.2,
                markersize=6 if ours else 5,
            )
    axes.set(xscale="log", yscale="log", xlabel=f"N (samples; D = {D})", title=title)
    sizes = sorted({n for points in lines.values() for n, _ in points})
    axes.set_xticks(sizes, map(str, sizes))
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: digits(y)))
    axes.grid(alpha=0.3)
