"""The child process that checks a backend, seen from its parent."""

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

DEADLINE = 600.0  # seconds for a child in all
SILENCE = 120.0  # seconds for one check; the first one imports PyTorch, and each may have to compile Triton's kernels
VERIFY = "FASTNTXENT_VERIFY"
# The child has this process's search path, and the same working directory: it imports what this process imports.
START = (
    "import os, sys; sys.path[:] = sys.argv.pop(1).split(os.pathsep); "
    "from fastntxent.verification.child import main; main(*sys.argv[1:])"
)
# Signals that come from outside: from a person, a scheduler, or the kernel when memory runs out.
_FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")


class _End(NamedTuple):
    """How a child has ended: its exit status (None if it was killed here, after `killed` seconds), the lines of its
    report, the last line of its stderr, and why there was no child, if there was none."""

    status: int | None = None
    killed: float = 0.0
    lines: Sequence[dict[str, Any]] = ()
    said: str = ""
    never_started: str = ""


def check_in_child(request: Mapping[str, Any], deadline: float = DEADLINE, silence: float = SILENCE) -> Verdict:
    """Check a backend in a child process.

    Args:
        request: as `child.main` takes it; "parts": n shares the checks among n processes, which compile at the same
            time. Where there is no room for so many on the device, one does all of it.
        deadline: seconds after which a child is killed.
        silence: seconds for one check, after which a child is killed.

    Returns:
        The verdict. Whatever a child does, this process goes on.
    """
    started = time.perf_counter()
    request = dict(request)
    parts = request.pop("parts", 1)
    shares = [{**request, "part": [index, parts]} for index in range(parts)]
    stop = threading.Event()
    with ThreadPoolExecutor(parts) as pool:
        try:
            ends = list(pool.map(lambda share: _run_child(share, deadline, silence, stop), shares))
        except BaseException:  # Ctrl-C: the pool is left when its threads end
            stop.set()
            raise
    verdict = _together([_verdict_of(end) for end in ends])
    if parts > 1 and verdict.status == "not available":
        verdict = _verdict_of(_run_child(request, deadline, silence))
    return verdict._replace(seconds=time.perf_counter() - started)


def _together(verdicts: list[Verdict]) -> Verdict:
    """The first that is bad, or says that nothing can be known; else that all have passed."""
    bad = [verdict for verdict in verdicts if not verdict.ok]
    worst = next((verdict for verdict in bad if verdict.status != "not available"), bad[0] if bad else verdicts[0])
    return worst._replace(checks=sum(verdict.checks for verdict in verdicts))


def time_in_child(
    request: Mapping[str, Any], deadline: float = DEADLINE, silence: float = SILENCE
) -> tuple[dict[str, Any] | None, str, Verdict | None]:
    """Time backends in a child process.

    Returns:
        The times; or None, the backend that was running when it went wrong, and its verdict.
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
    """What the child says; of one that has said nothing, how it ended."""
    for line in end.lines:
        if "verdict" in line:
            return Verdict.from_dict(line["verdict"])
    cases = [line["case"] for line in end.lines if "case" in line]
    status, detail = _how_it_ended(end)
    if not cases and status != "not available":  # not the kernels' doing: none has run yet
        status, detail = "not available", f"the child process ended before its first check: {detail}"
    return Verdict(status, detail, cases[-1] if cases else "", max(len(cases) - 1, 0))


def _how_it_ended(end: _End) -> tuple[Status, str]:
    """Status and detail of a child that has left no verdict."""
    if end.never_started:
        return "not available", end.never_started
    if end.status is None:
        return "no answer", f"killed after {end.killed:.0f} s"
    said = f": {end.said}" if end.said else ""
    if end.status < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-end.status).name
            if name in _FROM_OUTSIDE:
                return "not available", f"the child process was ended by {name} from outside, as if memory ran out"
            return "crashed", f"{name}{said}"
    return "crashed", f"exit status {end.status}{said}"


def _run_child(
    request: Mapping[str, Any], deadline: float, silence: float, stop: threading.Event | None = None
) -> _End:
    import tempfile  # not above: `import fastntxent` needs neither

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
    # If this process is gone, nobody kills the child but itself.
    request = {**request, "seconds": deadline + 30}
    with errors.open("wb") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-c", START, path, str(report), json.dumps(request)],
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            env=_environment(folder),
            start_new_session=True,  # its own children die with it, and Ctrl-C is the parent's to handle
        )
        try:
            status, killed = _wait(child, report, deadline, silence, stop)
        finally:
            _kill(child)
    return _End(status, killed, _lines(report), _last_line(errors))


def _environment(folder: Path) -> dict[str, str]:
    """This process's environment, without what would change a verdict."""
    environment = {
        **os.environ,
        VERIFY: "never",  # a child starts no children
        "PYTHONWARNINGS": "ignore",  # "error" would make a fault of any warning
        # A directory without a server: a fault in one client of NVIDIA's MPS ends every client of that server.
        "CUDA_MPS_PIPE_DIRECTORY": str(folder),
    }
    environment.pop("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", None)  # the reference in float32 sets the tolerance
    return environment


def _wait(
    child: Popen[bytes], report: Path, deadline: float, silence: float, stop: threading.Event
) -> tuple[int | None, float]:
    """The exit status; or None and seconds, if the child takes too long, or too long over one check, or is to stop."""
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
    """End the child and what it has started; a no-op if it has ended."""
    import subprocess

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
