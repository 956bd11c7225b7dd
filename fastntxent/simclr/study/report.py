"""Writes report.html, one self-contained file with the study's tables and figures. docs/study.md discusses them."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from string import Template
from typing import Any

from ..page import STYLE
from .tables import TABLES

PAGE = Template(
    """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
"""
    + STYLE
    + """\
  table { display: block; overflow-x: auto; }
</style>
</head>
<body>
<h1>$title</h1>
<p>$cost</p>
$sections
</body>
</html>
"""
)

# For each section: its heading, its table, and its figures with their captions.
SECTIONS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Each term alone, and both together", "objectives", {
        "collapse.svg": "Measures on the test images during training. Alignment alone ends at uniformity 0 and "
        "a very low effective rank, which is collapse. Distribution alone spreads the images out, but its alignment "
        "stays near chance.",
        "similarities.svg": "Similarities of pairs after training, without BatchNorm.",
    }),
    ("The temperature", "temperatures", {
        "temperature.svg": "Measures at the end of training against the temperature.",
        "spread.svg": "Cosine similarities of pairs after training, one histogram for each temperature. The "
        "larger the temperature, the more pairs of the same class stand out from pairs of other classes.",
    }),
    ("Clusters and nearest images", "uses", {
        "uses.svg": "The trained encoder, compared with the untrained encoder and with raw pixels.",
        "clusters.png": "Each row shows test images of one k-means cluster, from the most to the least typical.",
        "neighbours.png": "Test images on which raw pixels do worst, and the training images nearest to each. An "
        "orange frame marks an image of another class.",
    }),
    ("Classes that training never saw", "anomalies", {}),
)  # fmt: skip


def write_report(record: dict[str, Any], out: Path) -> None:
    """Write report.html beside the figures."""
    sections = []
    for heading, section, figures in SECTIONS:
        parts = [f"<h2>{heading}</h2>", html_table(TABLES[section](record))]
        parts += [
            f'<figure><img src="{_data_uri(out / name)}" alt="{name}"><figcaption>{caption}</figcaption></figure>'
            for name, caption in figures.items()
        ]
        sections.append("\n".join(parts))
    page = PAGE.substitute(
        title=f"What the loss does, on {html.escape(record['data']['name'])}",
        cost=html.escape(TABLES["cost"](record)),
        sections="\n\n".join(sections),
    )
    (out / "report.html").write_text(page, encoding="utf-8")


def html_table(markdown: str) -> str:
    """Return a Markdown table from `tables.table` as HTML."""
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines())
    lines = [_row("th", head), *(_row("td", row) for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def _row(tag: str, cells: list[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _data_uri(path: Path) -> str:
    kind = "image/svg+xml" if path.suffix == ".svg" else "image/png"
    return f"data:{kind};base64," + base64.b64encode(path.read_bytes()).decode("ascii")
