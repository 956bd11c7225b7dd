"""make gpu: stages that can be stopped and resumed, and how their results reach the docs."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import devices, gpu_session, gpu_stages, report
from benchmarks.gpu_session import Session, exit_status, line
from benchmarks.gpu_stages import Part

ROOT = Path(__file__).parents[1]
FOREVER = float("inf")


def python(code):
    return [sys.executable, "-c", code]


def counting(file, code=""):
    """Return a command that appends a mark to the file and then runs the code."""
    return python(f"open({str(file)!r}, 'a').write('x'); {code or 'pass'}")


def statuses(records):
    return [(record["stage"], record["part"], record["status"]) for record in records]


def test_parts_that_have_run_are_not_run_again(tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    plan = {"a": [Part("one", counting(mark)), Part("two", counting(mark, "raise SystemExit(3)"))]}
    out = tmp_path / "out"
    first = Session(out, FOREVER).run(plan)
    assert statuses(first) == [("a", "one", "passed"), ("a", "two", "failed")]
    assert mark.read_text() == "xx"
    again = Session(out, FOREVER).run(plan)
    assert statuses(again) == statuses(first)
    assert all(record["before"] for record in again)
    assert mark.read_text() == "xx"
    Session(out, FOREVER, again=True).run(plan)
    assert mark.read_text() == "xxxx"
    monkeypatch.setattr(gpu_session, "sources", lambda root: "other sources")
    Session(out, FOREVER).run(plan)
    assert mark.read_text() == "xxxxxx"
    Session(out, FOREVER, rehearsal=True).run(plan)
    assert mark.read_text() == "xxxxxxxx", "a real run must not count as a rehearsal"
    (out / "a-one.record.json").write_text('{"stage": "a"')
    Session(out, FOREVER, rehearsal=True).run(plan)
    assert mark.read_text() == "xxxxxxxxx", "a truncated record must not count"


def test_failure_of_one_part_does_not_stop_the_others(tmp_path, capsys):
    plan = {
        "a": [Part("bad", python("import sys; print('first'); sys.exit('the last line')"))],
        "b": [Part("good", python("pass")), Part("killed", python("import os, signal; os.kill(os.getpid(), 9)"))],
    }
    records = Session(tmp_path, FOREVER).run(plan)
    assert statuses(records) == [("a", "bad", "failed"), ("b", "good", "passed"), ("b", "killed", "failed")]
    assert records[0]["said"] == "the last line"
    assert records[2]["exit"] == -9
    assert exit_status(records) == 1
    assert (tmp_path / "a-bad.log").read_text() == "first\nthe last line\n"
    assert re.search(r"^a +bad +failed +\d+\.\d s  the last line$", capsys.readouterr().out, re.MULTILINE)


def test_part_that_takes_too_long_is_stopped_with_its_child_processes(tmp_path):
    pid = tmp_path / "pid"
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    sleep = f"import subprocess, sys, time; open({str(pid)!r}, 'w').write(str({child}.pid)); time.sleep(600)"
    records = Session(tmp_path, FOREVER).run({"a": [Part("slow", python(sleep))]}, limit=4)
    assert statuses(records) == [("a", "slow", "no answer")]
    assert records[0]["said"] == "stopped after 4 s"
    state = Path(f"/proc/{pid.read_text()}/stat")
    assert not state.exists() or state.read_text().split(")")[1].split()[0] == "Z"


@pytest.mark.slow
def test_session_that_runs_out_of_time_can_be_resumed(tmp_path):
    mark = tmp_path / "mark"
    plan = {
        "a": [
            Part("quick", counting(mark)),
            Part("slow", counting(mark, "import time; time.sleep(5)")),
            Part("last", counting(mark)),
        ]
    }
    records = Session(tmp_path, 2.5).run(plan)
    assert statuses(records) == [("a", "quick", "passed"), ("a", "slow", "not run"), ("a", "last", "not run")]
    assert exit_status(records) == 3
    assert not (tmp_path / "a-slow.record.json").exists(), "a part stopped for lack of time must leave no record"
    records = Session(tmp_path, FOREVER).run(plan)
    assert [status for *_, status in statuses(records)] == ["passed"] * 3
    assert exit_status(records) == 0
    assert mark.read_text() == "xxxx"


def test_missing_tool_is_reported_and_looked_for_again_in_the_next_run(tmp_path, monkeypatch):
    plan = {"profile": [Part("triton", python("pass"), needs="no-such-tool")]}
    records = Session(tmp_path, FOREVER).run(plan)
    assert statuses(records) == [("profile", "triton", "missing")]
    assert line(records[0]).endswith("no-such-tool is not on PATH")
    assert exit_status(records) == 0
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/tool")
    assert statuses(Session(tmp_path, FOREVER).run(plan)) == [("profile", "triton", "passed")]


def test_part_fails_if_it_does_not_write_its_result(tmp_path):
    made, stale = tmp_path / "made.json", tmp_path / "stale.json"
    stale.write_text("[1]")
    plan = {
        "a": [
            Part("out", python("print('[2]'); import sys; print('aside', file=sys.stderr)"), made, stdout=True),
            Part("nothing", python("pass"), stale),
            Part("variable", python("import os; exit(os.environ['TOOLS'] != 'x')"), environment={"TOOLS": "x"}),
        ]
    }  # fmt: skip
    records = Session(tmp_path, FOREVER).run(plan)
    assert [status for *_, status in statuses(records)] == ["passed", "failed", "passed"]
    assert records[0]["result"] == [2]
    assert (tmp_path / "a-out.log").read_text() == "aside\n"
    assert records[1]["said"] == "stale.json was not written"
    kept = json.loads((tmp_path / "a-out.record.json").read_text())
    assert kept["result"] == [2]
    assert set(kept["key"]) == {"device", "sources", "rehearsal"}


def test_stages_name_existing_tests_tools_and_kernels():
    plan = gpu_stages.stages("python", Path("out"), ROOT)
    assert list(plan) == ["build", "verify", "suite", "sanitize", "benchmark", "tune", "profile"]
    assert list(gpu_stages.rehearsals("python", Path("out"), ROOT)) == list(plan)
    for stage, parts in plan.items():
        assert len({part.name for part in parts}) == len(parts), stage
    files = [part.command[-1] for part in plan["suite"]]
    assert files[0] == "tests/test_cuda.py"
    assert {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py")} == set(files) - {"fastntxent"}
    script = (ROOT / "csrc/cuda/sanitize.sh").read_text()
    assert "${TOOLS:-memcheck racecheck synccheck initcheck}" in script
    assert [part.environment["TOOLS"] for part in plan["sanitize"]] == list(gpu_stages.TOOLS)
    kernels = "".join(
        path.read_text()
        for folder in ("fastntxent/backends/triton", "csrc/cuda")
        for path in (ROOT / folder).glob("*.[pc][yu]")
    )
    for kernel in gpu_stages.PROFILED.values():
        assert re.search(rf"(def|__global__ .*) {kernel}\(", kernels)


@pytest.mark.parametrize("stage", ["benchmark", "tune"])
def test_command_line_accepts_the_commands_of_the_stages(stage, monkeypatch):
    from benchmarks import __main__ as cli

    taken: list[Any] = []
    monkeypatch.setattr(cli, "_run_suite", taken.append)
    for part in gpu_stages.stages("python", Path("out"), ROOT)[stage]:
        cli.main(part.command[3:])
    assert len(taken) == len(gpu_stages.stages("python", Path("out"), ROOT)[stage])
    assert all(given.out.parent == Path("out") for given in taken)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_session_without_a_gpu_is_an_error(capsys):
    assert gpu_session.main([]) == 2
    assert capsys.readouterr().err == "error: there is no GPU here; --rehearse runs the parts that work without one\n"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU: with one, run the real session")
def test_rehearsal_runs_every_stage(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # a stage compiles kernels
    assert gpu_session.main(["--rehearse", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    plan = gpu_stages.rehearsals("", tmp_path, ROOT)
    assert re.search(rf"^{sum(map(len, plan.values()))} passed; in ", said, re.MULTILINE), said
    (folder,) = tmp_path.iterdir()
    verified = json.loads((folder / "verify-kernels.record.json").read_text())
    assert verified["result"]["cpu"]["blocked"]["status"] == "passed"
    tuned = json.loads((folder / "tune-owned.record.json").read_text())["result"]["results"]
    assert len(tuned) == 4
    assert all(result["tile"] for result in tuned)
    assert devices.section(tmp_path) == devices.NO_DEVICES, "a rehearsal must not list a device"
    assert gpu_session.main(["--rehearse", "--out", str(tmp_path), "--stage", "verify", "profile"]) == 0
    assert capsys.readouterr().out.count("passed (earlier)") == 6, "each part once when reached and once in the summary"


# --- the list of devices in the docs ----------------------------------------------------------------------------------

KEY = {
    "device": {"name": "Some GPU", "capability": "sm_99", "driver": "driver 1", "torch": "2.13", "triton": "3.9"},
    "sources": "x",
    "rehearsal": False,
}
MACHINE = {
    "processor": "A CPU",
    "threads": 2,
    "vector": "AVX2",
    "torch": "2.13",
    "packages": {},
    "time": "2026-01-02T03:04:05Z",
}


def keep(folder, stage, part, status="passed", result=None, key=KEY):
    folder.mkdir(parents=True, exist_ok=True)
    record = {"stage": stage, "part": part, "status": status, "key": key, "machine": MACHINE}
    if result is not None:
        record["result"] = result
    (folder / f"{stage}-{part}.record.json").write_text(json.dumps(record))


def test_devices_section_lists_no_device_if_nothing_was_verified(tmp_path):
    assert devices.section(tmp_path) == devices.NO_DEVICES
    keep(tmp_path / "gpu" / "one", "suite", "test_cuda")
    assert devices.section(tmp_path) == devices.NO_DEVICES, "no backend was verified"
    keep(tmp_path / "gpu" / "one", "verify", "kernels", result={"cpu": {}}, key={**KEY, "rehearsal": True})
    assert devices.section(tmp_path) == devices.NO_DEVICES


def test_devices_section_lists_the_results_of_each_device(tmp_path):
    folder = tmp_path / "gpu" / "some-gpu"
    verdicts = {"cuda:0": {"cuda": {"status": "passed"}, "triton": {"status": "wrong"}}}
    keep(folder, "verify", "kernels", "failed", verdicts)
    for part, status in (("test_cuda", "passed"), ("test_triton", "failed")):
        keep(folder, "suite", part, status)
    keep(folder, "sanitize", "memcheck", "missing")
    table = devices.section(tmp_path)
    row = "| Some GPU, sm_99 | driver 1 | 2.13 | 3.9 | `cuda` passed, `triton` wrong | 1 of 2 | not run | 2026-01-02 |"
    assert table.splitlines()[-1] == row

    def timed(n, d):
        losses = {name: {"both": {"p50": 3.0}, "times_floor": 2.0, "over_ours": 1.5} for name in ("triton", "eager")}
        result = {"n": n, "d": d, "dtype": "bfloat16", "losses": losses, "ours": "triton", "device": "Some GPU"}
        return {"suite": "gpu", "machine": MACHINE, "missing": {f"cuda {n}": "no memory"}, "results": [result]}

    keep(folder, "benchmark", "4096-128", result=timed(4096, 128))
    keep(folder, "benchmark", "256-128", result=timed(256, 128))
    keep(folder, "benchmark", "256-768", "failed")
    table = devices.section(tmp_path)
    assert [line.split("|")[1:4] for line in table.splitlines() if "bfloat16" in line] == [
        [" 256 ", " 128 ", " bfloat16 "],
        [" 4096 ", " 128 ", " bfloat16 "],
    ]
    assert "Not run: cuda 256, cuda 4096." in table


def test_report_puts_the_devices_into_the_docs(tmp_path):
    assert report.table_of(tmp_path, "devices") == devices.NO_DEVICES
    assert report.PAGES["docs/verification.md"]["devices"] == "devices"
