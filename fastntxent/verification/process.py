"""The child process that checks a backend, seen from its parent."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .verdict import Verdict

MODULE = "fastntxent.verification.child"
DEADLINE = 180.0  # seconds; Triton compiles its kernels the first time
# The one variable that the child sees otherwise: a child must not start children.
VERIFY = "FASTNTXENT_VERIFY"


def check(request: Mapping[str, Any], deadline: float = DEADLINE) -> Verdict:
    """Check a backend in a child process.

    Args:
        request: as `child.main` takes it.
        deadline: seconds after which the child is killed.

    Returns:
        The verdict. Whatever the child does, this process goes on.
    """
    started = time.perf_counter()
    lines, ended, errors = _run(request, deadline)
    seconds = time.perf_counter() - started
    for line in lines:
        if "verdict" in line:
            return Verdict.from_dict({**line["verdict"], "seconds": seconds})
    cases = [line["case"] for line in lines if "case" in line]
    case, checks = (cases[-1], len(cases) - 1) if cases else ("the start", 0)
    return Verdict(*_explain(ended, errors, deadline), case, checks, seconds)


def measure(request: Mapping[str, Any], deadline: float = DEADLINE) -> dict[str, Any] | None:
    """Time backends in a child process; None if it gave no times."""
    lines, _, _ = _run(request, deadline)
    return next((line["times"] for line in lines if "times" in line), None)


def _explain(ended: int | str | None, errors: str, deadline: float) -> tuple[Any, str]:
    """Status and detail of a child that has left no verdict."""
    if ended is None:
        return "no answer", f"killed after {deadline:g} s"
    if isinstance(ended, str):
        return "not available", ended
    said = f": {errors}" if errors else ""
    if ended < 0:
        with contextlib.suppress(ValueError):
            return "crashed", f"{signal.Signals(-ended).name}{said}"
    return "crashed", f"exit status {ended}{said}"


def _run(request: Mapping[str, Any], deadline: float) -> tuple[list[dict[str, Any]], int | str | None, str]:
    """The child's lines; how it ended (exit status, None if it was killed at the deadline, or why it could not be
    started); and the last line it wrote to stderr."""
    if not sys.executable:
        return [], "this Python has no interpreter of its own to start a child with", ""
    with tempfile.TemporaryDirectory(prefix="fastntxent-") as folder:
        report, errors = Path(folder, "report"), Path(folder, "stderr")
        environment = {
            **os.environ,
            VERIFY: "never",
            "PYTHONPATH": os.pathsep.join(
                path for path in sys.path if path
            ),  # the child imports what this process does
        }
        with errors.open("wb") as stderr:
            try:
                child = subprocess.Popen(
                    [sys.executable, "-m", MODULE, str(report), json.dumps(request)],
                    stdin=subprocess.DEVNULL,
                    stdout=stderr,
                    stderr=stderr,
                    cwd=Path(__file__).parents[2],  # where "-m" finds this package and nothing else
                    env=environment,
                    start_new_session=True,  # its own children die with it, and Ctrl-C is the parent's to handle
                )
            except OSError as error:
                return [], f"a child process cannot be started: {error}", ""
            try:
                ended: int | None = child.wait(deadline)
            except subprocess.TimeoutExpired:
                ended = None
            finally:
                _kill(child)
        return _lines(report), ended, _last_line(errors)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End the child and what it has started; a no-op if it has ended."""
    if child.poll() is not None:
        return
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process that the kernel does not let go of
        child.wait(5)


def _lines(report: Path) -> list[dict[str, Any]]:
    """What the child has reported, as far as it got."""
    lines = []
    if report.exists():
        for text in report.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # the last line of a child that was killed
                lines.append(json.loads(text))
    return lines


def _last_line(path: Path) -> str:
    said = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return said[-1][:300] if said else ""
