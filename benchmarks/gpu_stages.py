"""The stages of `make gpu` for a machine with a GPU, and small rehearsals of them for a machine without one.

A stage consists of parts, and each part is one command. A part passes if its command exits with 0 and, if the part
names an output file, has written this file. If the tool that a part needs is not installed, the part's status is
"missing", which does not count as a failure. A part is stopped after LIMIT seconds, just under ten minutes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from .gpu import GRID
from .tune import ROW_CLASSES

PartRecord = dict[str, Any]  # the result of a part, stored in its own JSON file
LIMIT = 590.0  # seconds per part
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Each backend that is profiled, with the name of its kernel that computes the gradient.
PROFILED = {"triton": "_fused_kernel", "cuda": "nt_xent"}


class Part(NamedTuple):
    """A command, and how to tell whether it has passed.

    Attributes:
        name: unique within the stage.
        command: run without a shell.
        makes: the file that the command writes, included in the record if it is JSON. None if the exit status is
            enough.
        stdout: whether the command's stdout is written to that file.
        needs: a tool that must be on PATH; empty for none.
        environment: additional environment variables.
    """

    name: str
    command: list[str]
    makes: Path | None = None
    stdout: bool = False
    needs: str = ""
    environment: dict[str, str] = {}  # noqa: RUF012 (a NamedTuple's default)


def stages(python: str, out: Path, root: Path) -> dict[str, list[Part]]:
    """Return every stage for a machine with a GPU, in order."""
    benchmarks = [python, "-m", "benchmarks"]
    build = [python, "setup.py", "build_ext", "--inplace"]
    verify = [python, "-m", "fastntxent", "verify", "--device", "cuda", "--refresh", "--json"]
    tests = sorted(str(path.relative_to(root)) for path in (root / "tests").rglob("test_*.py"))
    return {
        "build": [Part("kernels", build, needs="nvcc", environment={"FASTNTXENT_CUDA": "1"})],
        "verify": [
            Part("kernels", verify, out / "verify.json", stdout=True),
            Part("info", [python, "-m", "fastntxent", "info", "--json"], out / "info.json", stdout=True),
        ],
        "suite": [
            Part(test.removesuffix(".py").replace("/", "-"), [python, "-m", "pytest", "-q", test])
            for test in [*_first(tests), "fastntxent"]
        ],
        "sanitize": [
            Part(
                tool,
                ["csrc/cuda/sanitize.sh", "device"],
                needs="compute-sanitizer",
                environment={"TOOLS": tool, "PYTHON": python},
            )
            for tool in TOOLS
        ],
        "benchmark": [
            Part(
                f"{n}-{d}",
                [
                    *benchmarks,
                    "gpu",
                    "--n",
                    str(n),
                    "--d",
                    str(d),
                    "--seconds",
                    "10",
                    "--out",
                    f"{out}/gpu-{n}-{d}.json",
                ],
                out / f"gpu-{n}-{d}.json",
            )
            for n, d in GRID
        ],
        "tune": [
            Part(
                kernel,
                [
                    *benchmarks,
                    "tune",
                    "--kernels",
                    kernel,
                    "--most",
                    "8",
                    "--seconds",
                    "8",
                    "--out",
                    f"{out}/{kernel}.json",
                ],
                out / f"{kernel}.json",
            )
            for kernel in ROW_CLASSES
        ],
        "profile": [_profile(python, out, backend, kernel) for backend, kernel in PROFILED.items()],
    }


def rehearsals(python: str, out: Path, root: Path) -> dict[str, list[Part]]:
    """Return small parts for each stage, for a machine without a GPU."""
    benchmarks = [python, "-m", "benchmarks"]
    build = [python, "setup.py", "build_ext", "--build-lib", f"{out}/lib", "--build-temp", f"{out}/temp"]
    verify = [python, "-m", "fastntxent", "verify", "--device", "cpu", "--backend", "blocked", "--refresh", "--json"]
    small = ["--n", "16", "--d", "8", "--seconds", "0.1", "--only", "blocked", "eager", "--out", f"{out}/gpu-16-8.json"]
    predict = [
        *benchmarks,
        "tune",
        "--predict",
        "sm_90",
        "--kernels",
        "owned",
        "--d",
        "64",
        "--tiles",
        "32,128,32,8,2",  # ptxas unrolls its loop
        "--workers",
        "2",
        "--out",
        f"{out}/owned.json",
    ]
    return {
        "build": [Part("kernels", build, environment={"FASTNTXENT_CUDA": "0"})],
        "verify": [
            Part("kernels", verify, out / "verify.json", stdout=True),
            Part("info", [python, "-m", "fastntxent", "info", "--json"], out / "info.json", stdout=True),
        ],
        "suite": [Part("tests-test_sass", [python, "-m", "pytest", "-q", "tests/test_sass.py"])],
        "sanitize": [Part("emulated", ["csrc/cuda/sanitize.sh", "plain"], needs="g++")],
        "benchmark": [Part("16-8", [*benchmarks, "cpu", *small], out / "gpu-16-8.json")],
        "tune": [Part("owned", predict, out / "owned.json")],
        "profile": [Part("one-call", [python, "-m", "benchmarks.one_call", "blocked", "--device", "cpu", "--n", "16"])],
    }


def _first(tests: list[str]) -> list[str]:
    """Return the tests with the kernels' tests first."""
    return sorted(tests, key=lambda test: (Path(test).stem not in ("test_cuda", "test_triton", "test_tiles"), test))


def _profile(python: str, out: Path, backend: str, kernel: str) -> Part:
    report = out / f"{backend}.ncu-rep"
    profiler = ["ncu", "--set", "full", "--target-processes", "all", "--kernel-name", f"regex:{kernel}"]
    once = ["--launch-skip", "2", "--launch-count", "1", "--force-overwrite", "--export", str(report)]
    return Part(backend, [*profiler, *once, python, "-m", "benchmarks.one_call", backend], report, needs="ncu")
