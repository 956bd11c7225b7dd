"""The sub-command `study`, with the same exit statuses as the trainer's command line."""

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
    """Run the study with these command-line arguments. Return the exit status."""
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
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    for section, make in TABLES.items():
        print(f"\n{section}\n\n{make(record)}")
    print(f"\nthe report is {arguments.out}/report.html, with the numbers in {RECORD} beside it")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} study",
        description="Train with each term of the loss alone, with both, and over a sweep of temperatures. Test the "
        "encoder in clustering, retrieval and anomaly detection, and write figures and tables. This takes ten minutes "
        "on a CPU. docs/study.md explains the results. To continue an interrupted study, run the same command again.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/study"), metavar="DIR", help="default: runs/study")
    parser.add_argument("--quick", action="store_true", help="a study on 8 x 8 digits that takes only seconds")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of every run (default: 0)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="fill in the tables of this Markdown page, and "
                        "copy the figures and the record to the folder of the same name beside it")  # fmt: skip
    return parser
