"""Kernels proved on their device: what checks find, how a child's end is told, what is kept, what "auto" takes."""

import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch

from fastntxent import backends, nt_xent
from fastntxent.backends import _TABLE, candidates, select, select_for
from fastntxent.verification import checks, policy, process, store
from fastntxent.verification.store import Model, Store
from fastntxent.verification.verdict import Verdict

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
RIGHT = select("cpu", "cpu", torch.float32) if backends()["cpu"].available else select("blocked", "cpu", torch.float32)


# --- what the checks find --------------------------------------------------------------------------------------------


def one_wrong_element(x, call):
    flat = x.reshape(-1)
    finite = flat[flat.isfinite()]
    flat[-1] += 0.01 * (finite.abs().max() if len(finite) else 1) + 1e-3
    return x


def dropped_nan(x, call):
    return torch.nan_to_num(x, nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def another_order(x, call):
    return x * (1 + 1e-6 * (call % 7))


def unwritten_row(x, call):
    if x.ndim:
        x[-1] = torch.empty_like(x[-1])
    else:
        x = torch.empty_like(x)
    return x


METHODS = {
    "nt_xent_scalar": 4, "nt_xent_value": 1, "nt_xent_rows": 2, "nt_xent_rows_backward": 3, "neg_lse": 1,
    "neg_lse_backward": 2, "neg_lse_sum": 3, "cross_neg_lse": 2, "cross_neg_lse_backward": 3,
}  # fmt: skip
BREAKS = {
    one_wrong_element: "wrong", dropped_nan: "wrong", another_order: "not reproducible", unwritten_row: "wrong",
}  # fmt: skip


@pytest.fixture
def broken(monkeypatch):
    """Put the kernels of this machine into the table with one output of one method changed."""

    def put(method, output, change):
        calls = itertools.count()

        def changed(self, *args):
            results = getattr(RIGHT, method)(*args)
            many = isinstance(results, tuple)
            listed = list(results) if many else [results]
            listed[output] = change(listed[output], next(calls))
            return tuple(listed) if many else listed[0]

        kernels = type("Broken", (type(RIGHT),), {method: changed})()
        monkeypatch.setattr(kernels, "dtypes", (torch.float32,))
        monkeypatch.setitem(_TABLE, "broken", _TABLE["blocked"])
        load = backends_module._load
        monkeypatch.setattr(backends_module, "_load", lambda name: kernels if name == "broken" else load(name))
        return kernels

    return put


backends_module = sys.modules["fastntxent.backends"]


@pytest.mark.parametrize("change", BREAKS, ids=lambda change: change.__name__)
@pytest.mark.parametrize(
    ("method", "output"), [(method, output) for method, count in METHODS.items() for output in range(count)]
)
def test_checks_find_every_break_of_every_kernel(broken, monkeypatch, method, output, change):
    kernels = broken(method, output, change)
    monkeypatch.setattr(checks, "_calls", lambda slow, form: [("nt_xent", 33, 64)])

    def run_all():
        for _, run in checks.cases("broken", kernels, CPU):
            run()

    with pytest.raises(checks.FaultError) as caught:
        run_all()
    assert caught.value.status == BREAKS[change], caught.value


def test_checks_pass_sound_kernels():
    for name, run in checks.cases("blocked", select("blocked", "cpu", torch.float32), CPU):
        if "float32" in name:
            run()


def test_checks_leave_the_settings_of_the_process_alone():
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    next(run for _, run in checks.cases("blocked", select("blocked", "cpu", torch.float32), CPU))()
    assert (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory) == before


# --- the child -------------------------------------------------------------------------------------------------------

ENDS = {
    "wrong_element": ("wrong", r"d_z_j is off by 0\.001 of its largest, \S+ allowed"),
    "other_bits": ("not reproducible", r"d_z_j has other bits the second time"),
    "unwritten_row": ("wrong", r"d_z_j has \d+ of \d+ numbers that are NaN, as unwritten memory is"),
    "raises": ("raised an error", r"RuntimeError: an illegal memory access was encountered"),
    "segfault": ("crashed", r"SIGSEGV"),
    "hangs": ("no answer", r"killed after 20 s"),
    "no_import": ("not available", r"no such device here"),
}


@pytest.mark.parametrize("name", ENDS)
def test_child_that_ends_badly_is_told_in_words(name):
    status, words = ENDS[name]
    deadline = 20 if name == "hangs" else 300
    started = time.perf_counter()
    verdict = process.check({"backend": name, "device": "cpu", "module": f"tests.broken.{name}"}, deadline)
    assert verdict.status == status, verdict
    assert re.search(words, verdict.detail), verdict
    assert time.perf_counter() - started < deadline + 10
    if name != "no_import":
        assert verdict.case.startswith("nt_xent: float"), verdict
    loss = nt_xent(torch.randn(4, 8), torch.randn(4, 8), 0.1)
    assert loss.isfinite(), "this process goes on"


def test_child_passes_the_kernels_of_this_machine():
    verdict = process.check({"backend": "blocked", "device": "cpu", "module": None})
    assert verdict.ok, verdict
    assert verdict.checks > 60
    assert str(verdict).startswith(f"passed {verdict.checks} checks in ")


def test_child_that_cannot_be_started(monkeypatch):
    for executable in ("", "/nowhere/python"):
        monkeypatch.setattr(sys, "executable", executable)
        verdict = process.check({"backend": "blocked", "device": "cpu", "module": None})
        assert verdict.status == "not available"


def test_child_times_what_runs():
    code = (
        "import torch, json\n"
        "from fastntxent.verification import timing\n"
        "timing.ROWS, timing.FEATURES, timing.DTYPES = (64, 128), (16,), (torch.float32, torch.float16)\n"
        "print(json.dumps(timing.measure(['blocked', 'reference', 'cuda'], torch.device('cpu'))))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    times = json.loads(found.stdout)
    assert set(times) == {"float32", "float16"}
    for rows in ("64", "128"):
        assert set(times["float32"]["16"][rows]) == {"blocked", "reference"}, "a backend that refuses has no entry"
        assert all(value > 0 for value in times["float32"]["16"][rows].values())


# --- what is kept ----------------------------------------------------------------------------------------------------

MODEL = Model("Some GPU 80GB", "sm_99", "driver 1", "2.13", "3.6")
MODULE = "fastntxent.backends.blocked"
PASSED = Verdict("passed", checks=7, seconds=1.5)


def test_store_keeps_verdicts_by_model_and_kernels(tmp_path):
    kept = Store(MODEL, tmp_path)
    assert kept.verdict("triton", MODULE) is None
    kept.keep("triton", MODULE, PASSED)
    wrong = Verdict("wrong", "off", "a case", 3, 0.5)
    kept.keep("cuda", MODULE, wrong)
    again = Store(MODEL, tmp_path)
    assert again.verdict("triton", MODULE) == PASSED
    assert again.verdict("cuda", MODULE) == wrong
    assert [path.name for path in tmp_path.glob("*.json")] == ["some-gpu-80gb-sm-99.json"]
    for change in ({"driver": "driver 2"}, {"torch": "2.14"}, {"triton": "3.7"}):
        assert Store(Model(**{**MODEL.__dict__, **change}), tmp_path).verdict("triton", MODULE) is None, change
    assert Store(Model("Another GPU", *list(MODEL.__dict__.values())[1:]), tmp_path).verdict("triton", MODULE) is None
    kept.keep("triton", MODULE, Verdict("not available", "memory ran out"))
    assert again.verdict("triton", MODULE) == PASSED, "what says nothing of the kernels is not kept"


def test_store_does_not_know_changed_kernels(tmp_path, monkeypatch):
    Store(MODEL, tmp_path).keep("triton", MODULE, PASSED)
    monkeypatch.setattr(store, "sources_key", lambda module: "other sources")
    assert Store(MODEL, tmp_path).verdict("triton", MODULE) is None


def test_sources_key_follows_every_kernel(tmp_path, monkeypatch):
    for folder in ("backends", "ops", "verification"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "kernel.py").write_text("1")
    (tmp_path / "budget.py").write_text("1")
    (tmp_path / "_cuda.abi3.so").write_text("1")
    monkeypatch.setattr(store, "PACKAGE", tmp_path)
    keys = set()
    for path in [None, *tmp_path.rglob("*.py"), *tmp_path.rglob("*.so")]:
        if path:
            path.write_text("2")
        store.sources_key.cache_clear()
        keys.add(store.sources_key("fastntxent.backends.cuda.backend"))
    store.sources_key.cache_clear()
    assert len(keys) == 6


@pytest.mark.parametrize("damage", ["half", "empty", "list", "version", "entry", "status"])
def test_store_replaces_a_file_that_is_damaged_or_foreign(tmp_path, damage):
    kept = Store(MODEL, tmp_path)
    kept.keep("triton", MODULE, PASSED)
    content = json.loads(kept.path.read_text())
    if damage == "version":
        content["format"] = 99
    if damage == "entry":
        content["verdicts"]["triton"] = [1]
    if damage == "status":
        content["verdicts"]["triton"]["verdict"]["status"] = "perfect"
    text = {"half": json.dumps(content)[:100], "empty": "", "list": "[]"}.get(damage, json.dumps(content))
    kept.path.write_text(text)
    assert kept.verdict("triton", MODULE) is None
    assert kept.times({"triton": MODULE}) is None
    kept.keep("triton", MODULE, PASSED)
    assert Store(MODEL, tmp_path).verdict("triton", MODULE) == PASSED


def test_store_in_a_folder_that_cannot_be_written_keeps_within_the_process(tmp_path, monkeypatch):
    def refuse(path, write):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(store, "write_whole", refuse)
    monkeypatch.setattr(Store, "_complained", False)
    kept = Store(MODEL, tmp_path / "new")
    with pytest.warns(UserWarning, match=r"cannot keep its verdicts .*Read-only.*FASTNTXENT_CACHE names another"):
        kept.keep("triton", MODULE, PASSED)
    kept.keep("cuda", MODULE, PASSED)  # not said again
    assert kept.verdict("triton", MODULE) == PASSED


def test_cache_folder_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTNTXENT_CACHE", str(tmp_path))
    assert store.cache_folder() == tmp_path
    monkeypatch.delenv("FASTNTXENT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    if sys.platform == "linux":
        assert store.cache_folder() == tmp_path / "x" / "fastntxent"


def _verify_with_others(folder, barrier, said):
    os.environ["FASTNTXENT_CACHE"] = str(folder)

    def check(request, deadline=0):
        with (folder / "checked").open("a") as file:
            file.write(f"{request['backend']}\n")
        time.sleep(0.2)
        return PASSED

    policy.process.check = check
    policy.describe = lambda device: MODEL
    barrier.wait()
    said.put(policy.verify(CPU, {"triton": MODULE, "cuda": MODULE})["triton"].status)


def test_eight_processes_check_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, said = context.Barrier(8), context.Queue()
    workers = [context.Process(target=_verify_with_others, args=(tmp_path, barrier, said)) for _ in range(8)]
    for worker in workers:
        worker.start()
    assert [said.get(timeout=60) for _ in workers] == ["passed"] * 8
    for worker in workers:
        worker.join()
    assert sorted((tmp_path / "checked").read_text().split()) == ["cuda", "triton"]


# --- what "auto" takes ------------------------------------------------------------------------------------------------

GPU = torch.device("cuda", 0)
FOUND = {"cuda": "fastntxent.backends.cuda.backend", "triton": "fastntxent.backends.triton.backend"}


@pytest.fixture
def simulated(monkeypatch, tmp_path):
    """A machine with GPUs: the answers of the child processes, and what was asked of them."""

    machine = types.SimpleNamespace(
        verdicts={"cuda": PASSED, "triton": PASSED}, times=None, ends={}, asked=[], models={0: MODEL}
    )

    def check(request, deadline=0):
        machine.asked.append((request["backend"], request["device"]))
        return machine.verdicts[request["backend"]]

    def measure(request):
        names = request["time"]
        machine.asked.append((tuple(names), request["device"]))
        return next(((None, name, machine.ends[name]) for name in names if name in machine.ends), (machine.times, "", None))

    monkeypatch.setenv("FASTNTXENT_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTNTXENT_VERIFY", raising=False)
    monkeypatch.setattr(policy.process, "check", check)
    monkeypatch.setattr(policy.process, "measure", measure)
    monkeypatch.setattr(policy, "describe", lambda device: machine.models[device.index])
    monkeypatch.setattr(policy, "_decided", {})
    monkeypatch.setattr(policy, "_said", set())
    return machine


def choose(device=GPU, rows=1024, features=128, dtype=torch.float32, found=None):
    return policy.choose(device, FOUND if found is None else found, dtype, rows, features)


def test_first_call_checks_once_and_then_never(simulated, capsys):
    assert choose() == "cuda"
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("fastntxent: checking cuda, triton on Some GPU 80GB, once for this device")
    asked = list(simulated.asked)
    assert asked == [("cuda", "cuda:0"), ("triton", "cuda:0"), (("cuda", "triton", "blocked", "reference"), "cuda:0")]
    for rows in (2, 100, 10**6):
        choose(rows=rows)
    policy.forget()  # as in the next process
    simulated.times = {}
    assert choose() == "cuda"
    assert [call for call in simulated.asked[3:] if isinstance(call[0], str)] == []
    assert capsys.readouterr().err == ""


def test_threads_check_once(simulated):
    threads = [threading.Thread(target=choose) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(simulated.asked) == 3


def test_failure_falls_back_and_warns_once(simulated):
    fault = Verdict("wrong", "d_z_j is off", "nt_xent: float32", 3, 1.0)
    simulated.verdicts = {"cuda": fault, "triton": Verdict("crashed", "SIGSEGV", "x", 0, 1.0)}
    with pytest.warns(RuntimeWarning) as caught:
        assert choose() == "blocked"
    assert len(caught) == 2
    assert "backend 'cuda' did not pass on Some GPU 80GB" in str(caught[0].message)
    assert "wrong in nt_xent: float32: d_z_j is off" in str(caught[0].message)
    assert "python -m fastntxent info" in str(caught[0].message)
    policy.forget()
    assert choose() == "blocked", "kept, and said already: an error if it warned again"
    assert len(simulated.asked) == 2


def test_one_that_passed_is_taken_where_the_other_failed(simulated):
    simulated.verdicts = {"cuda": Verdict("no answer", "killed", "x"), "triton": PASSED}
    with pytest.warns(RuntimeWarning, match="backend 'cuda' did not pass"):
        assert choose() == "triton"


def test_never_leaves_auto_as_it_is(simulated, monkeypatch):
    monkeypatch.setenv("FASTNTXENT_VERIFY", "never")
    assert choose() == "blocked"
    assert simulated.asked == []
    policy.forget()
    monkeypatch.setenv("FASTNTXENT_VERIFY", "sometimes")
    with pytest.raises(ValueError, match="FASTNTXENT_VERIFY must be 'auto' or 'never', got 'sometimes'"):
        choose()


def test_nothing_is_checked_while_a_graph_is_captured(simulated, monkeypatch, capsys):
    capturing = True
    monkeypatch.setattr(policy, "_capturing", lambda device: capturing)
    assert choose() == "blocked"
    assert choose() == "blocked"
    assert simulated.asked == []
    assert capsys.readouterr().err.count("fastntxent.verify() before the capture") == 1
    capturing = False
    assert choose() == "cuda"


def test_two_device_models_are_checked_each(simulated):
    other = Model("Older GPU", "sm_80", *list(MODEL.__dict__.values())[2:])
    simulated.models = {0: MODEL, 1: other, 2: MODEL}
    simulated.times = {"float32": {}}
    choose(torch.device("cuda", 0))
    choose(torch.device("cuda", 1))
    checked = [device for backend, device in simulated.asked if backend == "triton"]
    assert checked == ["cuda:0", "cuda:1"]
    choose(torch.device("cuda", 2))
    assert [device for backend, device in simulated.asked if backend == "triton"] == checked, "the first one's model"


def test_choice_follows_what_was_measured(simulated):
    simulated.times = {
        "float32": {
            "128": {
                "256": {"cuda": 0.02, "triton": 0.10, "blocked": 0.40, "reference": 0.01},
                "4096": {"cuda": 0.90, "triton": 0.50, "blocked": 0.80},
            },
            "768": {"256": {"cuda": 0.5, "triton": 0.6, "blocked": 0.3}},
        }
    }
    assert choose(rows=100) == choose(rows=1000) == "cuda", "nearest in octaves; the dense loss is never taken"
    assert choose(rows=1100) == choose(rows=10**6) == "triton"
    assert choose(rows=256, features=512) == "blocked", "correct, and slower"
    assert choose(dtype=torch.float16) == "cuda", "not timed: the first that passed"
    assert policy._decided[GPU].explain(torch.float32, 4096, 128) == (
        "triton",
        "the quickest of those that have passed: triton 0.5 ms, blocked 0.8 ms, cuda 0.9 ms",
    )
    policy.forget()
    asked = len(simulated.asked)
    choose()
    assert len(simulated.asked) == asked, "times are kept too"


def test_no_kernels_to_check(simulated):
    assert choose(found={}) == "blocked"
    assert simulated.asked == []


def test_cpu_tensors_are_not_the_policys_business(monkeypatch):
    monkeypatch.setattr(policy, "choose", None)
    assert select_for("auto", torch.zeros(4, 8), "neg_lse") is select("auto", "cpu", torch.float32)


def test_candidates_are_what_loads_and_takes_the_dtype():
    found = candidates("cuda", torch.float64)
    assert found == {}, "no kernel for a GPU takes float64"
    assert set(candidates("cuda")) <= {"cuda", "triton"}
    assert candidates("cpu") == {}
