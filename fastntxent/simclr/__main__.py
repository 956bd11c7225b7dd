"""The command line. Exit status: 0 done, 1 the run was stopped, 2 a mistake in what was asked for, 130 interrupted."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from .checkpoint import with_saved_options
from .config import PROGRAM, parse_args
from .history import TrainingError
from .run import finish, prepare, summarise
from .study.command import main as study


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trainer for a command line, or the study; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["study"]:
        return study(arguments[1:])
    given = parse_args(arguments)
    try:
        trainer = prepare(with_saved_options(given))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        trainer.fit()
    except TrainingError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted at step {trainer.step}; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    metrics = finish(trainer, [*PROGRAM.split(), *map(shlex.quote, arguments)])
    if not trainer.config.quiet:
        print(summarise(metrics, str(trainer.config.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
