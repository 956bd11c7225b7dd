"""The command line. Exit status: 0 done, 1 the run was stopped, 2 a mistake in what was asked for, 130 interrupted."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from ..distributed.wire import NoAnswerError
from .checkpoint import with_saved_options
from .config import PROGRAM, parse_args
from .embed import main as embed
from .export import main as export
from .history import TrainingError
from .ranks import MISTAKES, Ranks, join
from .run import finish, forewarn, prepare, summarise
from .study.command import main as study

SUB_COMMANDS = {"study": study, "embed": embed, "export": export}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trainer or a sub-command for a command line; returns the exit status, unless it is one rank of many."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    ranks = join()
    try:
        status = _main(arguments, ranks)
    except SystemExit as error:  # of the parser
        if not ranks.group:
            raise
        status = int(error.code or 0)
    return ranks.end(status)


def _main(arguments: list[str], ranks: Ranks) -> int:
    if arguments and arguments[0] in SUB_COMMANDS:
        name, *rest = arguments
        if ranks.group:
            return ranks.stop(f"error: {name} is of one process: start it without torchrun", 2)
        return SUB_COMMANDS[name](rest)
    with ranks.all_or_none(), ranks.one_voice():
        given = parse_args(arguments)
    try:
        with ranks.all_or_none():
            config = with_saved_options(given)
        trainer = prepare(config, ranks)
    except MISTAKES as error:
        return ranks.stop(f"error: {error}", 2)
    note = forewarn(trainer)
    if note and ranks.first:
        print(note, file=sys.stderr)
    try:
        trainer.fit()
    except TrainingError as error:
        return ranks.stop(f"stopped: {error}", 1)
    except NoAnswerError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if ranks.first:
            print(f"interrupted at step {trainer.step}; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    ranks.leave()
    if not ranks.first:  # judging takes one process
        return 0
    metrics = finish(trainer, [*PROGRAM.split(), *map(shlex.quote, arguments)])
    if not trainer.config.quiet:
        print(summarise(metrics, str(trainer.config.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
