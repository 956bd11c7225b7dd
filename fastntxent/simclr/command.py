"""The command line.

Exit status: 0 success, 1 the run could not continue, 2 the request cannot be carried out, 128 + n stopped by signal n
(130 for Ctrl-C, 143 for SIGTERM).
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from collections.abc import Sequence

from ..distributed.wire import NoAnswerError
from .checkpoint import with_saved_options
from .config import PROGRAM, parse_args
from .config_file import with_config_file
from .embed import main as embed
from .export import main as export
from .history import TrainingError
from .logs import LogError
from .output import printable
from .pipeline import describe, finish, forewarn, prepare, summarise
from .ranks import MISTAKES, Ranks, join
from .stopping import InterruptedRun, kill_workers
from .study.command import main as study
from .train import Trainer

FAILED, MISTAKE, BY_SIGNAL = 1, 2, 128

SUB_COMMANDS = {"study": study, "embed": embed, "export": export}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trainer or a sub-command and return the exit status. On several ranks, exit with that status instead."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # a stream without reconfigure
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # the terminal may support only ASCII
    ranks = join()
    try:
        status = _main(arguments, ranks)
    except SystemExit as error:  # raised by the parser
        if not ranks.group:
            raise
        status = int(error.code or 0)
    except KeyboardInterrupt:  # Ctrl-C between two phases
        print("interrupted", file=sys.stderr)
        status = BY_SIGNAL + signal.SIGINT
    return ranks.end(status)


def _main(arguments: list[str], ranks: Ranks) -> int:
    if arguments and arguments[0] in SUB_COMMANDS:
        name, *rest = arguments
        if ranks.group:
            return ranks.stop(f"error: {name} runs in a single process: start it without torchrun", MISTAKE)
        return SUB_COMMANDS[name](rest)
    with ranks.all_or_none(), ranks.one_voice():
        given = parse_args(arguments)
    with contextlib.ExitStack() as held:
        try:
            with ranks.all_or_none():
                config = with_saved_options(with_config_file(given))
            trainer = prepare(config, ranks)
            with ranks.all_or_none():
                notes = forewarn(trainer) if ranks.first else []
            held.enter_context(trainer.writing())
        except MISTAKES as error:
            return ranks.stop(f"error: {_line(error)}", MISTAKE)
        except KeyboardInterrupt:
            print("interrupted before training", file=sys.stderr)
            return BY_SIGNAL + signal.SIGINT
        if ranks.first and not trainer.config.quiet:
            print(printable(describe(trainer.images)), file=sys.stderr)
        for note in notes:
            print(f"note: {printable(note)}", file=sys.stderr)
        return _train(trainer, arguments)


def _train(trainer: Trainer, arguments: list[str]) -> int:
    """Train, evaluate and report; return the exit status."""
    ranks = trainer.ranks
    try:
        trainer.fit()
    except TrainingError as error:
        return ranks.stop(f"stopped: {_line(error)}", FAILED)
    except InterruptedRun as error:
        return ranks.stop(str(error), BY_SIGNAL + error.number)
    except LogError as error:  # raised on the first rank only
        print(f"error: {_line(error)}", file=sys.stderr)
        return MISTAKE
    except (NoAnswerError, MemoryError) as error:  # raised on this rank, perhaps not on others
        print(f"stopped: {_line(error)}", file=sys.stderr)
        return FAILED
    except OSError as error:
        print(f"stopped: {_line(error)}; the last checkpoint is unchanged", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        kill_workers()
        if ranks.first:
            print(f"interrupted at step {trainer.step}; --resume continues from the last checkpoint", file=sys.stderr)
        return BY_SIGNAL + signal.SIGINT
    ranks.leave()
    if not ranks.first:  # only the first rank evaluates
        return 0
    try:
        metrics = finish(trainer, [*PROGRAM.split(), *map(shlex.quote, arguments)])
    except KeyboardInterrupt:
        print("interrupted after training; --resume evaluates the encoder and writes the report", file=sys.stderr)
        return BY_SIGNAL + signal.SIGINT
    except OSError as error:
        print(f"stopped: the report cannot be written: {_line(error)}", file=sys.stderr)
        return FAILED
    if not trainer.config.quiet:
        print(summarise(metrics, str(trainer.config.out)))
    return 0


def _line(error: Exception) -> str:
    """Return the error's message on one line."""
    words = str(error)
    if isinstance(error, OSError) and error.strerror:
        words = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return printable(" ".join(words.split()))
