"""The sub-command `study`. Exit statuses are those of the trainer's command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config import PROGRAM
from ..history import TrainingError
from .conduct import RECORD, conduct
from .plan import FULL, QUICK
from .tables import TABLES, publish


def main(argv: Sequence[str]) -> int:
    """Run the study for a command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.seed < 0:
            raise ValueError(f"--seed must be at least 0, got {arguments.seed}")
        if arguments.page and not arguments.page.is_file():
            raise FileNotFoundError(f"--page {arguments.page} is not a file")
        record = conduct(QUICK if arguments.quick else FULL, arguments.out, arguments.seed)
        if arguments.page:
            publish(record, arguments.out, arguments.page)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from there", file=sys.stderr)
        return 130
    for section, make in TABLES.items():
        print(f"\n{section}\n\n{make(record)}")
    print(f"\n{arguments.out}/report.html shows it, {RECORD} beside it holds the numbers")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} study",
        description="Train with either term of the loss alone, with both, and over a sweep of the temperature; put "
        "the encoder to use for clustering, retrieval and anomaly detection; write figures and tables. Ten minutes "
        "on a CPU. docs/study.md explains what comes out. The same command goes on where it was stopped.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/study"), metavar="DIR", help="default: runs/study")
    parser.add_argument("--quick", action="store_true", help="a few seconds on 8 x 8 digits, to see it work")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all runs (default: 0)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="fill the tables of this page, and put the figures "
                        "and the record in the folder of its name")  # fmt: skip
    return parser
