"""The command line.

Exit status: 0 success, 1 a backend did not pass, 2 the request cannot be carried out, 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..options import BACKENDS
from . import bench, info, verify

PROGRAM = "python -m fastntxent"


def main(arguments: Sequence[str]) -> int:
    """Run a command line and return the exit status."""
    given = _parser().parse_args(list(arguments) or ["info"])
    try:
        status: int = given.run(given)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Inspect, verify and benchmark fastntxent on this machine.",
        epilog=f"{PROGRAM}.simclr trains an encoder.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, module in {"info": info, "verify": verify, "bench": bench}.items():
        assert module.__doc__
        summary = module.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        command.add_argument("--json", action="store_true", help="print JSON to stdout")
        if module is not info:
            default = "every device" if module is verify else "the last GPU, or the CPU if there is none"
            command.add_argument("--device", metavar="DEV", help=f"cpu, cuda or cuda:1 (default: {default})")
        if module is verify:
            command.add_argument(
                "--backend",
                choices=[name for name in BACKENDS if name not in ("auto", "reference")],
                help="check only this backend",
            )
            command.add_argument("--refresh", action="store_true", help="check again, ignoring stored verdicts")
        command.set_defaults(run=module.run)
    return parser
