"""Start and watch the child process that checks or times backends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .verdict import Status, Verdict

if TYPE_CHECKING:
    from subprocess import Popen

DEADLINE = 600.0  # seconds for a child in total
SILENCE = 120.0  # seconds for one check: the first includes importing PyTorch, and any may compile Triton kernels
VERIFY = "FASTNTXENT_VERIFY"
# The child gets this process's search path and working directory, so it imports the same modules.
START = (
    "import os, sys; sys.path[:] = sys.argv.pop(1).split(os.pathsep); "
    "from fastntxent.verification.child import main; main(*sys.argv[1:])"
)
# Signals from outside: from a user, a scheduler, or the operating system when memory runs out.
_FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")


class _End(NamedTuple):
    """How a child ended.

    Attributes:
        status: exit status; None if this process killed the child or could not start it.
        killed: seconds that the child, or its last check, had taken when the child was killed.
        lines: the lines of its report.
        said: the last line of its output.
        never_started: the reason why the child was not started; empty if it was started.
    """

    status: int | None = None
    killed: float = 0.0
    lines: Sequence[dict[str, Any]] = ()
    said: str = ""
    never_started: str = ""


def check_in_child(request: Mapping[str, Any], deadline: float = DEADLINE, silence: float = SILENCE) -> Verdict:
    """Check a backend in a child process.

    Args:
        request: the request for `child.main`. An additional key, "parts", is the number of processes that share the
            checks and compile kernels in parallel. If their common verdict is "not available", for example for lack
            of device memory, one process then runs all checks.
        deadline: seconds after which a child is killed.
        silence: seconds that a single check may take before its child is killed.

    Returns:
        The verdict. A child that crashes or hangs does not affect this process.
    """
    started = time.perf_counter()
    request = dict(request)
    parts = request.pop("parts", 1)
    shares = [{**request, "part": [index, parts]} for index in range(parts)]
    stop = threading.Event()
    with ThreadPoolExecutor(parts) as pool:
        try:
            ends = list(pool.map(lambda share: _run_child(share, deadline, silence, stop), shares))
        except BaseException:  # such as Ctrl-C: stop the threads, because leaving the pool waits for them
            stop.set()
            raise
    verdict = _together([_verdict_of(end) for end in ends])
    if parts > 1 and verdict.status == "not available":
        verdict = _verdict_of(_run_child(request, deadline, silence))
    return verdict._replace(seconds=time.perf_counter() - started)


def _together(verdicts: list[Verdict]) -> Verdict:
    """Return the first bad verdict, else the first "not available", else "passed", with the total number of checks."""
    bad = [verdict for verdict in verdicts if not verdict.ok]
    worst = next((verdict for verdict in bad if verdict.status != "not available"), bad[0] if bad else verdicts[0])
    return worst._replace(checks=sum(verdict.checks for verdict in verdicts))


def time_in_child(
    request: Mapping[str, Any], deadline: float = DEADLINE, silence: float = SILENCE
) -> tuple[dict[str, Any] | None, str, Verdict | None]:
    """Time backends in a child process.

    Returns:
        (times, "", None) on success; otherwise None, the backend that was running, and its verdict.
    """
    started = time.perf_counter()
    end = _run_child(request, deadline, silence)
    for line in end.lines:
        if "times" in line:
            return line["times"], "", None
    running = [line["backend"] for line in end.lines if "backend" in line]
    verdict = _verdict_of(end)._replace(checks=0, seconds=time.perf_counter() - started)
    return None, running[-1] if running else "", verdict


def _verdict_of(end: _End) -> Verdict:
    """Return the verdict that the child reported. If it reported none, return one from the way in which it ended."""
    for line in end.lines:
        if "verdict" in line:
            return Verdict.from_dict(line["verdict"])
    cases = [line["case"] for line in end.lines if "case" in line]
    status, detail = _how_it_ended(end)
    if not cases and status != "not available":  # no kernel has run yet
        status, detail = "not available", f"the child process ended before its first check: {detail}"
    return Verdict(status, detail, cases[-1] if cases else "", max(len(cases) - 1, 0))


def _how_it_ended(end: _End) -> tuple[Status, str]:
    """Return status and detail for a child that reported no verdict."""
    if end.never_started:
        return "not available", end.never_started
    if end.status is None:
        return "no answer", f"killed after {end.killed:.0f} s"
    said = f": {end.said}" if end.said else ""
    if end.status < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-end.status).name
            if name in _FROM_OUTSIDE:
                return "not available", f"the child process was ended by {name} from outside; perhaps memory ran out"
            return "crashed", f"{name}{said}"
    return "crashed", f"exit status {end.status}{said}"


def _run_child(
    request: Mapping[str, Any], deadline: float, silence: float, stop: threading.Event | None = None
) -> _End:
    import tempfile  # imported here: `import fastntxent` needs neither this nor subprocess

    if not sys.executable or getattr(sys, "frozen", False):
        return _End(never_started="this program has no Python interpreter to start a child process with")
    try:
        with tempfile.TemporaryDirectory(prefix="fastntxent-", ignore_cleanup_errors=True) as folder:
            return _run_child_in(Path(folder), request, deadline, silence, stop or threading.Event())
    except OSError as error:
        return _End(never_started=f"a child process cannot be started: {error}")


def _run_child_in(
    folder: Path, request: Mapping[str, Any], deadline: float, silence: float, stop: threading.Event
) -> _End:
    import subprocess

    report, errors = folder / "report", folder / "stderr"
    path = os.pathsep.join(entry for entry in sys.path if isinstance(entry, str))
    # After this many seconds the child ends itself, even if this process has died.
    request = {**request, "seconds": deadline + 30}
    with errors.open("wb") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-c", START, path, str(report), json.dumps(request)],
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            env=_environment(folder),
            start_new_session=True,  # so the child is killed with its own children, and only this process gets Ctrl-C
        )
        try:
            status, killed = _wait(child, report, deadline, silence, stop)
        finally:
            _kill(child)
    return _End(status, killed, _lines(report), _last_line(errors))


def _environment(folder: Path) -> dict[str, str]:
    """Return this process's environment without the settings that could change a verdict."""
    environment = {
        **os.environ,
        VERIFY: "never",  # the child must not start checks itself
        "PYTHONWARNINGS": "ignore",  # "error" would turn any warning into a failure
        # A folder without an MPS server: with NVIDIA's MPS, a fault in one client ends every client of the server.
        "CUDA_MPS_PIPE_DIRECTORY": str(folder),
    }
    environment.pop("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", None)  # TF32 would widen the tolerances
    return environment


def _wait(
    child: Popen[bytes], report: Path, deadline: float, silence: float, stop: threading.Event
) -> tuple[int | None, float]:
    """Return (exit status, 0), or (None, seconds) if the child or one check takes too long, or `stop` is set."""
    import subprocess

    started = heard = time.monotonic()
    size = 0
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(0.5), 0.0
        now = time.monotonic()
        with contextlib.suppress(OSError):
            if report.stat().st_size != size:
                size, heard = report.stat().st_size, now
        if now - started > deadline or stop.is_set():
            return None, now - started
        if now - heard > silence:
            return None, now - heard


def _kill(child: Popen[bytes]) -> None:
    """Kill the child and, on POSIX, the processes that it started; a no-op if the child has ended."""
    import subprocess

    if child.poll() is not None:
        return
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # the process may hang in the operating system
        child.wait(5)


def _lines(report: Path) -> list[dict[str, Any]]:
    """Return the complete lines of the child's report."""
    lines = []
    if report.exists():
        for text in report.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # a killed child may leave a partial last line
                lines.append(json.loads(text))
    return lines


def _last_line(path: Path) -> str:
    said = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return said[-1][:300] if said else ""
