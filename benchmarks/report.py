"""The tables of the docs' pages, and the plot, from the committed results."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from . import devices, instruction_set
from .tables import TABLES, SuiteRecord, all_sets, sets_table

# The sections of each page, and the suite that fills each section. Section "devices" has no suite: it shows the records
# of `make gpu`. Suite "cpu" has one record per instruction set. Section "time" shows our kernel on every set, and
# section "times" shows all losses on every set.
PAGES = {
    "docs/benchmarks.md": {
        "time": "cpu",
        "memory": "memory",
        "scaling": "scaling",
        "family": "family",
        "accuracy": "converged",
        "times": "cpu",
        "schedule": "schedule",
    },
    "docs/verification.md": {"devices": "devices"},
    "docs/distributed.md": {"distributed": "distributed"},
    "docs/migration.md": {"drop-ins": "drop-ins"},
}


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add the command `report` and its options."""
    parser = commands.add_parser("report")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("benchmarks/results"),
        help="folder of the suites' JSON files, and of the plot",
    )
    parser.add_argument("--root", type=Path, default=Path(), help="folder that contains docs/")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if the pages' tables differ from the results"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write or check the report."""
    try:
        if not arguments.check:
            write(arguments.results, arguments.root)
        elif stale := stale_sections(arguments.results, arguments.root):
            raise ValueError(
                f"sections {', '.join(stale)} differ from the results in {arguments.results}: "
                "run python -m benchmarks report"
            )
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error


def write(results: Path, root: Path) -> None:
    """Fill the pages' sections and draw the plot."""
    from . import plots  # imported here because it needs matplotlib

    for page, sections in PAGES.items():
        text = (root / page).read_text()
        for section, suite in sections.items():
            text = replace(text, section, table_of(results, suite, section))
        (root / page).write_text(text)
    plots.draw(read_sets(results)[0], read_suite(results, "memory"), results)


def stale_sections(results: Path, root: Path) -> list[str]:
    """Return the sections that differ from the results."""
    return [
        section
        for page, sections in PAGES.items()
        for section, suite in sections.items()
        if replace((root / page).read_text(), section, table_of(results, suite, section)) != (root / page).read_text()
    ]


def table_of(results: Path, suite: str, section: str = "") -> str:
    """Return a suite's table, or a line with the command that measures it if there are no results."""
    if suite == "devices":
        return devices.section(results)
    try:
        if suite == "cpu":
            return all_sets(read_sets(results)) if section == "times" else sets_table(read_sets(results))
        return TABLES[suite](read_suite(results, suite))
    except FileNotFoundError:
        return f"Not measured: `python -m benchmarks {suite} --out benchmarks/results/{suite}.json`."


def read_suite(results: Path, suite: str) -> SuiteRecord:
    """Return one suite's record."""
    path = results / f"{suite}.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: python -m benchmarks {suite} --out {path}")
    return json.loads(path.read_text())


def read_sets(results: Path) -> list[SuiteRecord]:
    """Return the records of suite `cpu`, in the order of `instruction_set.NAMES`."""
    order = {f"cpu-{name}": place for place, name in enumerate(instruction_set.NAMES)}
    paths = sorted(results.glob("cpu*.json"), key=lambda path: (order.get(path.stem, len(order)), path.name))
    if not paths:
        raise FileNotFoundError(
            f"{results / 'cpu*.json'} is missing: python -m benchmarks cpu --out {results / 'cpu.json'}"
        )
    return [json.loads(path.read_text()) for path in paths]


def replace(text: str, section: str, table: str) -> str:
    """Return the text with the table placed between the section's markers."""
    start, end = f"<!-- figures:{section} -->", f"<!-- /figures:{section} -->"
    text, found = re.subn(f"{start}.*?{end}", lambda _: f"{start}\n\n{table}\n\n{end}", text, flags=re.DOTALL)
    if found != 1:
        raise ValueError(f"a page must contain {start} ... {end} exactly once, but contains it {found} times")
    return text
