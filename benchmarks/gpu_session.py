"""The checks on a machine with a GPU, in stages that can be resumed: python -m benchmarks.gpu_session

Each part that runs writes a JSON record and a log to OUT/DEVICE. A part whose record has the same sources and device
is not run again, unless its tool was missing. The exit status is 0 if everything that could run has passed, 1 if a part
failed or took too long, 2 for a wrong command line or a missing GPU, and 3 if the time of --seconds ran out. After 3,
the same command resumes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fastntxent.devices import present_devices
from fastntxent.verification.store import model_of

from . import machine
from .gpu_stages import LIMIT, Part, PartRecord, rehearsals, stages

ROOT = Path(__file__).parent.parent
STATES = ("passed", "failed", "no answer", "missing")


class Session:
    """Runs parts one after the other, and stores their records.

    Args:
        out: folder for this device.
        seconds: time limit. After this time no part starts, and a part that is still running is stopped and counts as
            not run.
        again: repeat parts that already have a record.
        rehearsal: whether this is a rehearsal. The records store this, so that a rehearsal is not taken for a real run.
    """

    def __init__(self, out: Path, seconds: float, again: bool = False, rehearsal: bool = False) -> None:
        self.out = out
        self.ends = time.monotonic() + seconds
        self.again = again
        self.rehearsal = rehearsal
        device = model_of(present_devices()[-1])._asdict()
        self.key = {"device": device, "sources": sources(ROOT), "rehearsal": rehearsal}

    def run(self, plan: Mapping[str, Sequence[Part]], limit: float = LIMIT) -> list[PartRecord]:
        """Return the record of every part.

        The status is "not run" if the session's time ended first, and "no answer" if the part took more than `limit`
        seconds.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        records = []
        for stage, parts in plan.items():
            for part in parts:
                record = self._known(stage, part) or self._run(stage, part, limit)
                records.append(record)
                print(line(record), flush=True)
        return records

    def _path(self, stage: str, part: Part, suffix: str) -> Path:
        return self.out / f"{stage}-{part.name}{suffix}"

    def _known(self, stage: str, part: Part) -> PartRecord | None:
        """Return the record from an earlier run of the same sources on this device, if there is one."""
        if self.again:
            return None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(self._path(stage, part, ".record.json").read_text())
            if record["key"] == self.key and record["status"] in ("passed", "failed", "no answer"):
                return {**record, "before": True}
        return None

    def _run(self, stage: str, part: Part, limit: float) -> PartRecord:
        record: PartRecord = {"stage": stage, "part": part.name, "seconds": 0.0, "said": ""}
        if part.needs and not shutil.which(part.needs):
            return self._keep(part, {**record, "status": "missing", "said": f"{part.needs} is not on PATH"})
        left = self.ends - time.monotonic()
        if left <= 0:
            return {**record, "status": "not run"}
        print(f"{stage} {part.name}: {' '.join(part.command)}", flush=True)
        if part.makes:
            part.makes.unlink(missing_ok=True)  # may be left over from an earlier run
        started = time.monotonic()
        status = self._command(stage, part, min(limit, left))
        record["seconds"] = round(time.monotonic() - started, 1)
        if status is None and left < limit:
            return {**record, "status": "not run"}
        record["exit"], record["said"] = status, _last_line(self._path(stage, part, ".log"))
        if status is None:
            return self._keep(part, {**record, "status": "no answer", "said": f"stopped after {limit:g} s"})
        if status == 0 and part.makes and not part.makes.exists():
            return self._keep(part, {**record, "status": "failed", "said": f"{part.makes.name} was not written"})
        return self._keep(part, {**record, "status": "failed" if status else "passed"})

    def _command(self, stage: str, part: Part, seconds: float) -> int | None:
        """Return the command's exit status, or None if it took too long."""
        with contextlib.ExitStack() as files:
            log = files.enter_context(self._path(stage, part, ".log").open("wb"))
            stdout = files.enter_context(part.makes.open("wb")) if part.makes and part.stdout else log
            child = subprocess.Popen(
                part.command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, **part.environment},
                start_new_session=True,
            )
            try:
                return child.wait(seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                if child.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(child.pid, signal.SIGKILL)
                    child.wait()

    def _keep(self, part: Part, record: PartRecord) -> PartRecord:
        record |= {"command": part.command, "key": self.key, "machine": machine.provenance()}
        if part.makes and part.makes.suffix == ".json":
            with contextlib.suppress(OSError, ValueError):
                record["result"] = json.loads(part.makes.read_text())
        self._path(record["stage"], part, ".record.json").write_text(json.dumps(record, indent=1) + "\n")
        return record


def sources(root: Path) -> str:
    """Return a hash of the sources of the package and its kernels.

    Built files are left out, because the first stage changes them.
    """
    digest = hashlib.sha256()
    for path in sorted(path for part in ("csrc", "fastntxent") for path in (root / part).rglob("*")):
        if path.suffix in (".py", ".json", ".h", ".cpp", ".cu"):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def line(record: PartRecord) -> str:
    """Return the record as a line of text."""
    before = " (earlier)" if record.get("before") else ""
    said = f"  {record['said']}" if record["status"] != "passed" and record["said"] else ""
    return f"{record['stage']:10}{record['part']:28}{record['status'] + before:20}{record['seconds']:8.1f} s{said}"


def exit_status(records: Sequence[PartRecord]) -> int:
    """Return the exit status for these records; the module's docstring explains it."""
    found = {record["status"] for record in records}
    if found & {"failed", "no answer"}:
        return 1
    return 3 if "not run" in found else 0


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1][:200] if lines else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the selected stages and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_session",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = list(stages("", Path(), ROOT))
    parser.add_argument("--stage", nargs="+", choices=names, default=names, metavar="STAGE", help=", ".join(names))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu; with --rehearse: runs/gpu-rehearsal")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop after this time; the same command resumes"
    )
    parser.add_argument("--again", action="store_true", help="repeat parts that already have a record")
    parser.add_argument("--rehearse", action="store_true", help="run the parts that work without a GPU")
    given = parser.parse_args(argv)
    if not given.rehearse and not torch.cuda.is_available():
        print("error: there is no GPU here; --rehearse runs the parts that work without one", file=sys.stderr)
        return 2
    base = given.out or ROOT / ("runs/gpu-rehearsal" if given.rehearse else "benchmarks/results/gpu")
    out = base.absolute() / model_of(present_devices()[-1]).file_name.removesuffix(".json")
    plan = (rehearsals if given.rehearse else stages)(sys.executable, out, ROOT)
    session = Session(out, given.seconds, given.again, given.rehearse)
    records = session.run({name: plan[name] for name in names if name in given.stage})
    counts = {state: sum(record["status"] == state for record in records) for state in (*STATES, "not run")}
    print(
        "",
        *map(line, records),
        f"\n{', '.join(f'{n} {state}' for state, n in counts.items() if n)}; in {out}",
        sep="\n",
    )
    return exit_status(records)


if __name__ == "__main__":
    sys.exit(main())
