"""The README's tables and the plots, from the committed results."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from .tables import TABLES, Record

SECTIONS = {"time": "cpu", "memory": "memory", "scaling": "scaling", "family": "family", "accuracy": "converged"}


def add_command(commands: argparse._SubParsersAction) -> None:
    """`report` and its options."""
    parser = commands.add_parser("report")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="the suites' JSON files")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--check", action="store_true", help="write nothing; fail unless the README has these tables")


def run(arguments: argparse.Namespace) -> None:
    """Write, or check."""
    try:
        if not arguments.check:
            write(arguments.results, arguments.readme)
        elif stale := stale_sections(arguments.results, arguments.readme):
            raise ValueError(f"{arguments.readme} is not what {arguments.results} makes, in {', '.join(stale)}")
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error


def write(results: Path, readme: Path) -> None:
    """Fill the README's sections and draw the plots."""
    from . import plots  # not above: only drawing needs matplotlib

    text = readme.read_text()
    for section, table in tables(results).items():
        text = replace(text, section, table)
    readme.write_text(text)
    plots.draw(read(results, "cpu"), read(results, "memory"), results)


def stale_sections(results: Path, readme: Path) -> list[str]:
    """The sections of the README that are not what the results make."""
    text = readme.read_text()
    return [section for section, table in tables(results).items() if replace(text, section, table) != text]


def tables(results: Path) -> dict[str, str]:
    """Every section's table."""
    return {section: TABLES[suite](read(results, suite)) for section, suite in SECTIONS.items()}


def read(results: Path, suite: str) -> Record:
    """One suite's record."""
    path = results / f"{suite}.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: python -m benchmarks {suite} --out {path}")
    return json.loads(path.read_text())


def replace(text: str, section: str, table: str) -> str:
    """The text with the table between the section's markers."""
    start, end = f"<!-- figures:{section} -->", f"<!-- /figures:{section} -->"
    text, found = re.subn(f"{start}.*?{end}", lambda _: f"{start}\n\n{table}\n\n{end}", text, flags=re.DOTALL)
    if found != 1:
        raise ValueError(f"the README needs {start} ... {end} once, has it {found} times")
    return text
