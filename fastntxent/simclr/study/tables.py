"""The study's tables in Markdown, and the page that contains them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .plan import NORMS, OBJECTIVES, objective_run, temperature_run
from .runs import write

Record = dict[str, Any]

OBJECTIVE_NAMES = {"nt_xent": "both, L_a + L_d", "alignment": "L_a alone", "distribution": "L_d alone"}
REPRESENTATIONS = ("trained", "untrained", "raw pixels")


def objectives(record: Record) -> str:
    """Return the final measures of each objective, without and with BatchNorm."""
    rows = []
    for norm in reversed(NORMS):
        for objective in OBJECTIVES:
            run = record["runs"][objective_run(objective, norm)]
            rows.append([OBJECTIVE_NAMES[objective], "yes" if norm == "batch" else "no", *_quality(run)])
    start = record["runs"][objective_run("nt_xent", "none")]
    before = record["runs"][objective_run("nt_xent", "batch")]
    rows.insert(0, ["untrained", "no", *_quality(start, 0)])
    rows.insert(1 + len(OBJECTIVES), ["untrained", "yes", *_quality(before, 0)])
    return table(
        "objective|BatchNorm|alignment|uniformity|effective rank of z|of h|kNN of z|of h|linear, h"
        "|contrastive accuracy",
        rows,
        left=2,
    )


def temperatures(record: Record) -> str:
    """Return the final measures of each temperature."""
    rows = []
    for tau in record["plan"]["temperatures"]:
        run = record["runs"][temperature_run(tau)]
        curves, end = run["curves"], run["end"]
        sims = end["similarities"]
        rows.append([
            f"{tau:g}", percent(curves["knn h"][-1]), percent(end["linear"]), percent(curves["knn z"][-1]),
            f"{curves['effective rank z'][-1]:.1f}", f"{curves['effective rank h'][-1]:.1f}",
            *(two(sims[pairs]["mean"]) for pairs in ("positives", "same class", "other classes")),
            two(sims["other classes"]["std"]), two(curves["uniformity"][-1]),
            f"{end['effective negatives']:.0f}",
        ])  # fmt: skip
    negatives = record["runs"][temperature_run(record["plan"]["temperatures"][0])]["end"]["negatives"]
    return table(
        "tau|kNN of h|linear, h|kNN of z|effective rank of z|of h|mean similarity: positives|same class"
        f"|other classes|std of other classes|uniformity|effective negatives, of {negatives}",
        rows,
    )


def uses(record: Record) -> str:
    """Return the clustering and retrieval scores."""
    return table(
        "representation|clusters: NMI|clusters: ARI|retrieval: precision@10",
        [
            [name, *(f"{record['uses'][name][score]:.3f}" for score in ("NMI", "ARI", "precision"))]
            for name in REPRESENTATIONS
        ],
        left=1,
    )


def anomalies(record: Record) -> str:
    """Return the AUROC of every held-out class, and the mean."""
    rows = record["anomalies"]
    means = [[sum(row["AUROC"][name] for row in rows) / len(rows)] for name in REPRESENTATIONS]
    return table(
        "class never seen|" + "|".join(row["class"] for row in rows) + "|mean",
        [
            [name, *(f"{value:.3f}" for value in (*(row["AUROC"][name] for row in rows), *mean))]
            for name, mean in zip(REPRESENTATIONS, means, strict=True)
        ],
        left=1,
    )


def cost(record: Record) -> str:
    """Return a sentence with the number of runs and the time they took."""
    plan, seconds, data = record["plan"], record["seconds"], record["data"]
    return (
        f"{len(record['runs'])} runs of {plan['epochs']} epochs and {len(plan['held_out'])} of "
        f"{plan['held_out_epochs']} on {data['train']:,} images, evaluated on {data['test']:,}: "
        f"{seconds['cpu'] / 60:.1f} minutes of CPU time, {seconds['wall'] / 60:.1f} minutes elapsed. "
        f"PyTorch {record['versions']['torch']}, seed {record['seed']}."
    )


TABLES: dict[str, Callable[[Record], str]] = {
    "objectives": objectives, "temperatures": temperatures, "uses": uses, "anomalies": anomalies, "cost": cost,
}  # fmt: skip


def _quality(run: Record, at: int = -1) -> list[str]:
    curves = run["curves"]
    return [
        small(curves["alignment"][at]), two(curves["uniformity"][at]),
        *(f"{curves[f'effective rank {name}'][at]:.1f}" for name in ("z", "h")),
        *(percent(curves[f"knn {name}"][at]) for name in ("z", "h")),
        percent(run["end"]["linear"]) if at == -1 else "-",
        percent(curves["contrastive accuracy"][at]),
    ]  # fmt: skip


def percent(share: float) -> str:
    """Return a percentage with one decimal, such as "97.3 %"."""
    return f"{100 * share:.1f} %"


def two(value: float) -> str:
    """Return the value with two decimals, without a minus sign before zero."""
    return f"{round(value, 2) + 0:.2f}"


def small(value: float) -> str:
    """Return the value with two decimals; between 0 and 0.01, one significant digit in scientific notation."""
    return two(value) if value == 0 or value >= 0.01 else f"{value:.0e}".replace("e-0", "e-")


def table(head: str, rows: Iterable[list[str]], left: int = 0) -> str:
    """Return a Markdown table. The first `left` columns are text and left-aligned."""
    names = head.split("|")
    rule = "|---" * left + "|---:" * (len(names) - left) + "|"
    lines = [f"| {' | '.join(cells)} |" for cells in (names, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]])


def fill(text: str, record: Record) -> str:
    """Return the text of a page with each table placed between its two markers.

    Raises:
        ValueError: a pair of markers is missing or appears more than once.
    """
    for section, make in TABLES.items():
        start, end = f"<!-- study:{section} -->", f"<!-- /study:{section} -->"
        body = f"{start}\n\n{make(record)}\n\n{end}"
        parts = re.split(f"{start}.*?{end}", text, flags=re.DOTALL)
        if len(parts) != 2:
            raise ValueError(f"the page must contain {start} ... {end} once, but it appears {len(parts) - 1} times")
        text = body.join(parts)
    return text


def publish(record: Record, out: Path, page: Path) -> None:
    """Fill in a page's tables, and copy the record and the figures to the folder of the same name beside the page.

    Raises:
        ValueError: see `fill`; in that case nothing is written.
    """
    text = fill(page.read_text(encoding="utf-8"), record)
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    for figure in (*out.glob("*.svg"), *out.glob("*.png")):
        (folder / figure.name).write_bytes(figure.read_bytes())
    write(folder / "study.json", record)
    page.write_text(text, encoding="utf-8")
