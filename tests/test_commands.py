"""python -m fastntxent: its output and its exit status."""

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import fastntxent
from fastntxent import backends, commands
from fastntxent.backends import _TABLE, _Entry, checkable
from fastntxent.commands import bench, info
from fastntxent.verification import policy, process
from fastntxent.verification.store import Store, model_of
from fastntxent.verification.verdict import Verdict

ROOT = Path(__file__).parents[1]
HERE = next(name for name, entry in _TABLE.items() if "cpu" in entry.device_types or name == "blocked")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTNTXENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTNTXENT_VERIFY", raising=False)
    monkeypatch.setattr(policy, "_decided", {})
    return tmp_path / "cache"


@pytest.fixture
def answers(monkeypatch):
    """Verdicts that child processes return for each backend: "passed", unless a test puts another verdict here."""
    found: dict[str, Verdict] = {}
    passed = Verdict("passed", checks=3)
    monkeypatch.setattr(process, "check_in_child", lambda request: found.get(request["backend"], passed))
    monkeypatch.setattr(process, "time_in_child", lambda request: (None, "", None))
    return found


def run(capsys, *arguments):
    """Run the command; return the exit status, stdout and stderr."""
    try:
        status: Any = commands.main(arguments)
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr()
    return status, said.out, said.err


# --- info ------------------------------------------------------------------------------------------------------------


def test_info_is_the_default_command_and_lists_backends_and_devices(capsys, cache):
    status, text, errors = run(capsys)
    assert (status, errors) == (0, "")
    assert text == run(capsys, "info")[1]
    first, *lines = text.splitlines()
    assert f"fastntxent {fastntxent.__version__}, torch {torch.__version__}, triton " in first
    for name, backend in backends().items():
        assert any(line.startswith(f"  {name:10}{backend.reason or backend.details or 'available'}") for line in lines)
    assert re.search(r"^cpu: .+, driver .+\n  cpu +not checked yet", text, re.MULTILINE)
    assert "  auto, every size: cpu (the first backend that loads here)" in lines or not backends()["cpu"].available
    assert f"verdicts are stored in {cache}" in lines
    assert f"FASTNTXENT_CACHE={cache}" in lines


def test_info_as_json_has_versions_environment_cache_backends_and_devices(capsys, cache):
    status, text, _ = run(capsys, "info", "--json")
    found = json.loads(text)
    assert status == 0
    assert set(found) == {"versions", "environment", "cache", "backends", "devices"}
    assert found["environment"] == {"FASTNTXENT_CACHE": str(cache), "FASTNTXENT_VERIFY": None}
    assert found["backends"] == {name: json.loads(json.dumps(b._asdict())) for name, b in backends().items()}
    assert found["devices"]["cpu"]["verdicts"]["blocked"] == "not checked yet"


def test_info_checks_nothing_and_writes_nothing(capsys, cache, monkeypatch):
    monkeypatch.setattr(process, "_run_child", None)
    assert run(capsys, "info")[0] == 0
    assert not cache.exists()


def test_info_says_which_backend_auto_chooses_on_a_gpu_and_why(monkeypatch):
    gpu = torch.device("cuda", 0)
    found = {"cuda": "fastntxent.backends.cuda.backend", "triton": "fastntxent.backends.triton.backend"}
    monkeypatch.setattr(info, "candidates", lambda kind: found)
    monkeypatch.setattr(policy, "model_of", lambda device: model_of(torch.device("cpu")))
    taken = info._auto(gpu)["bfloat16, 768 features, 4096 rows"]
    assert taken == {"backend": "blocked", "why": "until the first call on this device has checked the kernels"}
    wrong = Verdict("wrong", "off", "a case")
    policy._decided[gpu] = policy.Decision({"cuda": wrong, "triton": Verdict("passed", checks=3)}, None)
    kept = Store(model_of(torch.device("cpu")))
    kept.keep("triton", found["triton"], Verdict("passed", checks=3))
    kept.keep_times({"triton": found["triton"]}, {"bfloat16": {"768": {"4096": {"triton": 0.5, "blocked": 2.0}}}})
    auto = info._auto(gpu)
    assert auto["bfloat16, 128 features, 256 rows"] == {
        "backend": "triton",
        "why": "the fastest at the nearest timed size: triton 0.5 ms, blocked 2 ms",
    }
    assert auto["float32, 128 features, 256 rows"]["why"] == "it has passed, but nothing was timed at this size"
    monkeypatch.setenv("FASTNTXENT_VERIFY", "never")
    assert info._auto(gpu)["float32, 128 features, 256 rows"]["why"].startswith("FASTNTXENT_VERIFY=never")


def test_info_reports_the_error_of_a_device_that_does_not_answer(capsys, monkeypatch):
    def dead(device):
        if device.type == "cuda":
            raise RuntimeError("CUDA unknown error\nthis may be due to an incorrectly set up environment")
        return model_of(device)

    monkeypatch.setattr(info, "model_of", dead)
    monkeypatch.setattr(info, "present_devices", lambda: [torch.device("cpu"), torch.device("cuda", 0)])
    status, text, _ = run(capsys, "info")
    assert status == 0
    assert "cuda:0: CUDA unknown error this may be due to" in text
    assert json.loads(run(capsys, "info", "--json")[1])["devices"]["cuda:0"]["error"].startswith("CUDA unknown error")


def test_backends_shows_a_verdict(monkeypatch):
    assert {status.verdict for name, status in backends().items() if name in ("cpu", "blocked", "reference")} == {None}
    package = sys.modules["fastntxent.backends"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    model = model_of(torch.device("cpu"))
    monkeypatch.setattr(policy, "model_of", lambda device: model)
    assert package._verdict("triton") == "not checked yet"
    assert package._verdict("blocked") is None
    policy._decided[torch.device("cuda", 0)] = policy.Decision(
        {"triton": Verdict("crashed", "SIGSEGV", "a case")}, None
    )
    assert package._verdict("triton") == "crashed in a case: SIGSEGV"

    def forked():
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "current_device", forked)
    assert package._verdict("triton").startswith("unknown: ")
    assert "forked subprocess" in package._verdict("triton")


# --- verify ----------------------------------------------------------------------------------------------------------


def test_verify_passes_here_and_stores_the_verdict(capsys, cache):
    status, text, errors = run(capsys, "verify", "--backend", HERE, "--device", "cpu")
    assert status == 0, text
    assert re.search(
        rf"^cpu: .+\n  {HERE:10}passed \d+ checks in .+ s\n  stored in {cache}/.+\.json$", text, re.MULTILINE
    )
    assert errors.startswith(f"fastntxent: checking {HERE} on ")
    status, again, errors = run(capsys, "verify", "--backend", HERE, "--device", "cpu")
    assert (status, again, errors) == (0, text, ""), "the stored verdict should be used"
    assert f"  {HERE:10}passed " in run(capsys, "info")[1].partition("driver")[2]


def test_verify_says_that_the_verdict_cannot_be_stored(capsys, answers, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("FASTNTXENT_CACHE", str(file))
    with pytest.warns(UserWarning, match="cannot store") if not Store._complained else nullcontext():
        status, text, _ = run(capsys, "verify", "--device", "cpu", "--backend", "blocked")
    assert status == 0
    assert f"  not stored: {file} is not writable" in text


def test_verify_checks_again_only_with_refresh(capsys, answers):
    assert run(capsys, "verify", "--device", "cpu")[0] == 0
    answers["blocked"] = Verdict("wrong", "d_z_j is off", "a case", 3)
    assert run(capsys, "verify", "--device", "cpu")[0] == 0
    status, text, _ = run(capsys, "verify", "--device", "cpu", "--refresh")
    assert status == 1
    assert "  blocked   wrong in a case: d_z_j is off" in text
    status, text, _ = run(capsys, "verify", "--json")
    assert status == 1
    assert json.loads(text)["cpu"]["blocked"] == answers["blocked"].to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wrong_element", "segfault"])
def test_verify_of_a_broken_backend_exits_with_1(capsys, monkeypatch, name):
    monkeypatch.setitem(_TABLE, name, _Entry(f"tests.broken.{name}", ("cpu",), auto="no"))
    possible = {key: module for key, module in checkable("cpu").items() if key in ("blocked", name)}
    assert set(possible) == {"blocked", name}
    monkeypatch.setattr("fastntxent.devices.checkable", lambda kind: possible)
    status, text, _ = run(capsys, "verify", "--device", "cpu")
    assert status == 1
    assert re.search(r"^  blocked   passed", text, re.MULTILINE)
    assert re.search(rf"^  {name:10}(wrong|crashed) in nt_xent: float", text, re.MULTILINE), text


def test_verify_exits_with_1_if_a_backend_cannot_be_checked(capsys, answers):
    answers["blocked"] = Verdict("not available", "memory ran out")
    status, text, _ = run(capsys, "verify", "--backend", "blocked", "--device", "cpu")
    assert status == 1
    assert "  blocked   not available: memory ran out" in text


def test_verify_of_one_backend_skips_devices_that_cannot_run_it(capsys, answers, monkeypatch):
    gpu = torch.device("cuda", 0)
    verified = []

    def verify(device, **options):
        verified.append(device)
        return {}

    monkeypatch.setattr("fastntxent.commands.verify.present_devices", lambda: [torch.device("cpu"), gpu])
    monkeypatch.setattr("fastntxent.commands.verify.checkable", lambda kind: {"cuda": "x"} if kind == "cuda" else {})
    monkeypatch.setattr("fastntxent.commands.verify.model_of", lambda device: model_of(torch.device("cpu")))
    monkeypatch.setattr("fastntxent.commands.verify.verify", verify)
    assert run(capsys, "verify", "--backend", "cuda")[0] == 0
    assert verified == [gpu]


@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="needs a machine without a GPU, where Triton's kernels are interpreted"
)
@pytest.mark.skipif(not backends()["triton"].available, reason="needs Triton")
def test_verify_passes_tritons_kernels_in_the_interpreter(tmp_path):
    # The complete verification: two minutes on one core. Every Python process that this starts imports `sitecustomize`,
    # which makes the interpreter faster.
    (tmp_path / "sitecustomize.py").write_text("from tests import interpreter\ninterpreter.hasten()\n")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT))),
    }
    command = [sys.executable, "-m", "fastntxent", "verify", "--backend", "triton", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads(done.stdout)["cpu"]["triton"]
    assert verdict["status"] == "passed"
    assert verdict["checks"] > 50


# --- bench -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "TIMED_SIZES", ((8, 16), (12, 16)))
    monkeypatch.setattr(bench, "SECONDS_OF_SIZE", 0.05)


def test_bench_prints_a_table(capsys, small):
    status, text, _ = run(capsys, "bench", "--device", "cpu")
    head, names, *lines = text.splitlines()
    assert status == 0
    assert head.startswith("cpu: ")
    assert head.endswith(f", PyTorch {torch.__version__}")
    assert names.split()[:3] == ["dtype", "N", "D"]
    assert {"blocked", "eager", "floor"} <= set(names.split())
    assert [line.split()[:3] for line in lines[:2]] == [["float32", "8", "16"], ["float32", "12", "16"]]


def test_bench_as_json_has_times_and_the_floor(capsys, small):
    status, text, _ = run(capsys, "bench", "--device", "cpu", "--json")
    rows = json.loads(text)["cpu"]["rows"]
    assert status == 0
    assert [(row["dtype"], row["n"], row["d"]) for row in rows] == [("float32", 8, 16), ("float32", 12, 16)]
    for row in rows:
        assert {"blocked", "eager"} <= set(row["milliseconds"])
        assert not {"reference", "triton", "product"} & set(row["milliseconds"])
        assert row["floor"] > 0
        assert all(value > 0 for value in row["milliseconds"].values())


def test_bench_says_why_a_time_is_missing(capsys, small, monkeypatch):
    def none(loss, dynamic):
        def fail(z_i, z_j):
            raise RuntimeError("no C++ compiler\nsecond line")

        return fail

    monkeypatch.setattr(torch, "compile", none)
    _, text, _ = run(capsys, "bench", "--device", "cpu")
    assert "no torch.compile for float32, N = 8, D = 16: RuntimeError: no C++ compiler\n" in text
    row = bench.time_size(torch.device("cpu"), torch.float32, 8, 16, without=["blocked"])
    assert row["missing"]["blocked"] == "it has not passed its checks on this device"
    assert "blocked" not in row["milliseconds"]


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("verify", "--device", "tpu"), "device must be a CPU or a GPU of this machine, got 'tpu'"),
        (("verify", "--device", "cuda:99"), "device must be a CPU or a GPU of this machine, got 'cuda:99'"),
        (("bench", "--device", "mps"), "device must be a CPU or a GPU of this machine, got 'mps'"),
        (("verify", "--device", "cpu", "--backend", "cuda"), "backend must be one that can be checked on cpu"),
    ],
)
def test_invalid_arguments_give_a_one_line_error(capsys, arguments, words):
    status, text, errors = run(capsys, *arguments)
    assert (status, text) == (2, "")
    assert errors.startswith(f"error: {words}")
    assert errors.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_verify_of_a_backend_that_no_device_can_run_is_an_error(capsys):
    status, _, errors = run(capsys, "verify", "--backend", "cuda")
    assert status == 2
    assert errors == "error: --backend cuda cannot be checked on any device of this machine\n"


@pytest.mark.parametrize("arguments", [("prove",), ("verify", "--backend", "reference"), ("info", "--device", "cpu")])
def test_unknown_commands_and_options_print_the_usage(capsys, arguments):
    status, text, errors = run(capsys, *arguments)
    assert (status, text) == (2, "")
    assert "usage: python -m fastntxent" in errors


def test_an_invalid_environment_variable_is_an_error(capsys, monkeypatch):
    monkeypatch.setenv("FASTNTXENT_VERIFY", "perhaps")
    monkeypatch.setattr(info, "candidates", lambda kind: {"cuda": "fastntxent.backends.cuda.backend"})
    status, _, errors = run(capsys, "info")
    assert status == 2
    assert errors == "error: FASTNTXENT_VERIFY must be 'auto' or 'never', got 'perhaps'\n"


def test_help_names_every_command():
    done = subprocess.run([sys.executable, "-m", "fastntxent", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert all(re.search(rf"^ +{name} ", done.stdout, re.MULTILINE) for name in ("info", "verify", "bench"))
