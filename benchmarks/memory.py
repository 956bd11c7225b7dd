"""Peak memory beside the inputs, each measurement in a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

from .competitors import dense, of_backend
from .timing import TEMPERATURE, inputs, step


def measure(name: str, n: int, d: int) -> dict[str, object]:
    """Run one forward and backward in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", name, str(n), str(d)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output)


def _peak_bytes() -> int:
    """The process's largest resident size so far."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux keeps ru_maxrss across exec: a large parent would hide what is measured here
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _main(name: str, n: int, d: int) -> None:
    loss = dense if name == "eager" else of_backend(name)
    step(loss, *inputs(32, d))  # libraries loaded, threads started
    z_i, z_j = inputs(n, d)
    before = _peak_bytes()
    seconds = step(loss, z_i, z_j)["both"]
    extra = _peak_bytes() - before
    print(json.dumps({"loss": name, "n": n, "d": d, "temperature": TEMPERATURE, "extra_bytes": extra, "s": seconds}))


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
