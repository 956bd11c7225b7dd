"""Verification of kernels on their device: checks, child processes, the store of verdicts, and the choice of "auto"."""

import importlib
import itertools
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fastntxent
from fastntxent import backends, nt_xent
from fastntxent.backends import _TABLE, candidates, select, select_for
from fastntxent.verification import checks, policy, process, store
from fastntxent.verification.store import Model, Store
from fastntxent.verification.verdict import Verdict
from tests.tiers import tiered

ROOT = Path(__file__).parents[1]
if backends()["triton"].available:
    config = importlib.import_module("fastntxent.backends.triton.config")
CPU = torch.device("cpu")
RIGHT: Any = select("cpu" if backends()["cpu"].available else "blocked", "cpu", torch.float32)


# --- faults that the checks find -------------------------------------------------------------------------------------


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
    "neg_lse_backward": 2, "neg_lse_sum": 3, "cross_neg_lse": 2, "cross_neg_lse_backward": 3, "info_nce_scalar": 4,
    "info_nce_value": 1, "sigmoid_scalar": 5, "sigmoid_value": 1, "softplus": 5, "limited_nt_xent_scalar": 4,
    "limited_nt_xent_value": 1, "limited_neg_lse": 2, "limited_neg_lse_backward": 3,
}  # fmt: skip
BREAKS = {
    one_wrong_element: "wrong", dropped_nan: "wrong", another_order: "not reproducible", unwritten_row: "wrong",
}  # fmt: skip


@pytest.fixture
def broken(monkeypatch):
    """Return a function that registers this machine's kernels as "broken", with one output of one method changed."""

    def put(method, output, change):
        calls = itertools.count()

        def changed(self, *args):
            results = getattr(RIGHT, method)(*args)
            many = isinstance(results, tuple)
            listed = list(results) if many else [results]
            if listed[output] is not None:  # None is a gradient that is not needed
                listed[output] = change(listed[output], next(calls))
            return (
                listed[0] if not many else type(results)._make(listed) if hasattr(results, "_make") else tuple(listed)
            )

        kernels = type("Broken", (type(RIGHT),), {method: changed})()
        monkeypatch.setattr(kernels, "dtypes", (torch.float32,))
        monkeypatch.setitem(_TABLE, "broken", _TABLE["blocked"])
        load = backends_module._load
        monkeypatch.setattr(backends_module, "_load", lambda name: kernels if name == "broken" else load(name))
        return kernels

    return put


backends_module = sys.modules["fastntxent.backends"]


def run_checks(kernels):
    for _, run in checks.cases("broken", kernels, CPU):
        run()


OUTPUTS = [(method, output) for method, count in METHODS.items() for output in range(count)]
CORRUPTED = [(*place, change) for place in OUTPUTS for change in BREAKS]


@pytest.mark.parametrize(  # for each output, one break is a quick case
    "corrupted",
    tiered(CORRUPTED, slow=lambda case: (OUTPUTS.index(case[:2]) - list(BREAKS).index(case[2])) % len(BREAKS) != 0),
    ids=lambda case: f"{case[0]} {case[1]} {case[2].__name__}",
)
def test_checks_find_every_break_of_every_kernel(broken, monkeypatch, corrupted):
    method, output, change = corrupted
    kernels = broken(method, output, change)
    monkeypatch.setattr(checks, "_small_calls", lambda slow, form: [("nt_xent", 33, 64)])
    with pytest.raises(checks.FaultError) as caught:
        run_checks(kernels)
    assert caught.value.status == BREAKS[change], caught.value


# Kinds of calls of info_nce_scalar(z_i, z_j, inv_tau, normalize, both, mean, needs_i, needs_j). For each kind: a
# function that recognises such a call by its arguments, and the output to corrupt.
TOWERS = {
    "one direction": (lambda args: not args[4], 1),
    "both directions": (lambda args: args[4], 1),
    "keys frozen": (lambda args: not args[7], 1),
    "queries frozen": (lambda args: not args[6], 2),
    "logits beyond exp": (lambda args: args[2] > 100, 2),
}


@pytest.mark.parametrize("where", TOWERS)
def test_checks_find_two_tower_losses_that_are_wrong_only_in_some_calls(broken, monkeypatch, where):
    wrong, output = TOWERS[where]
    kernels = broken("info_nce_value", 0, lambda x, call: x)
    monkeypatch.setattr(checks, "_small_calls", lambda slow, form: [])

    def changed(self, *args):
        results = RIGHT.info_nce_scalar(*args)
        if wrong(args) and results[output] is not None:
            one_wrong_element(results[output], 0)
        return results

    monkeypatch.setattr(type(kernels), "info_nce_scalar", changed)
    with pytest.raises(checks.FaultError, match="d_z_"):
        run_checks(kernels)


def test_checks_pass_sound_kernels():
    for name, run in checks.cases("blocked", select("blocked", "cpu", torch.float32), CPU):
        if "float32" in name:
            run()


def tiles_of(family, width):
    """Return every reachable tile of the table, as (kernel, block_m, block_n, warps, stages)."""
    found = set()
    for kernel in (*config.KERNELS, *config.VARIANTS.values()):
        for rows, *_ in config.entries(family, kernel, width):
            for DP in (64, 128, 256, 768):
                tile = config.look_up(family, kernel, width, rows, DP)
                panels = config.look_up(family, "fused", width, rows, DP) is None
                if tile and (kernel not in ("form", "gather", "form_pairs") or panels):
                    found.add((kernel, *tile[:2], tile.num_warps, tile.num_stages))
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter, which a machine without a GPU has")
@pytest.mark.skipif(not backends()["triton"].available, reason="needs Triton")
@pytest.mark.parametrize(
    "family",
    tiered(["sm_80", "sm_90", "sm_100", "gfx942", "small", "large"], slow=lambda name: name not in ("sm_90", "small")),
)
def test_checks_reach_every_tile_of_the_table(family, monkeypatch):
    # Kernels are recorded instead of run. Which kernels and tiles are launched does not depend on results.
    from triton.runtime.interpreter import InterpretedFunction

    launched: dict[str, set] = {}
    shifted: dict[tuple, set] = {}
    seen: set[tuple] = set()

    def note(kernel, grid):
        def launch(*arguments, **options):
            options.update(zip(kernel.arg_names, arguments, strict=True))
            name = kernel.fn.__name__.strip("_").removesuffix("_kernel")
            name = "sums" if name == "pairs" and not options["GRADIENT"] else name
            if name in (*config.KERNELS, *config.VARIANTS.values()) and not options.get("LIMITED"):
                tile = (name, options["BLOCK_M"], options["BLOCK_N"], options["num_warps"], options["num_stages"])
                launched.setdefault(dtype, set()).add(tile)
                if "SHIFTED" in options:
                    shifted.setdefault((dtype, *tile), set()).add(options["SHIFTED"])
            seen.add((name, options.get("ONE_SIDE"), options.get("LOSS"), options.get("ON_DEVICE")))

        return launch

    monkeypatch.setattr(InterpretedFunction, "__getitem__", note)
    monkeypatch.setattr(config, "family", lambda device: family)
    monkeypatch.setattr(config, "multiprocessors", lambda device: 132)
    calls = checks._small_calls
    monkeypatch.setattr(checks, "_small_calls", lambda slow, form: calls(False, form))
    monkeypatch.setattr(checks, "check_problem", lambda problem, name: problem.run(name, False))
    monkeypatch.setattr(checks, "_keeps_nan", lambda problem, name: problem.run(name, False))
    kernels = select("triton", "cpu", torch.float32)
    monkeypatch.setattr(type(kernels), "dtypes", (torch.bfloat16, torch.float32))
    for case, run in checks.cases("triton", kernels, CPU):
        dtype = "bfloat16" if "bfloat16" in case else "float32"
        run()
    for dtype, width in (("bfloat16", 2), ("float32", 4)):
        assert tiles_of(family, width) <= launched[dtype]
    assert all(both == {False, True} for both in shifted.values()), "each tile should run in both regimes"
    assert {("direct", one_side, None, False) for one_side in (True, False)} <= seen
    assert {("finish", None, loss, False) for loss in (True, False)} <= seen


@pytest.mark.parametrize("multiprocessors", [20, 28, 108, 132, 148, 188])
def test_checks_fill_every_device(multiprocessors, monkeypatch):
    # Each multiprocessor should get three blocks of 32 rows (csrc/cuda/arguments.h); it runs one or two at a time.
    properties = types.SimpleNamespace(multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    calls = checks._large_calls(torch.device("cuda", 0))
    assert {call for call, *_ in calls} == {"nt_xent", "two sides"}
    for call, n, _ in calls:
        rows = n + 9 if call == "two sides" else 2 * n  # rows of the larger side
        assert 4 * math.ceil(rows / 128) >= 3 * multiprocessors


def test_checks_leave_the_settings_of_the_process_alone():
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    next(run for _, run in checks.cases("blocked", select("blocked", "cpu", torch.float32), CPU))()
    assert (torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory) == before


# --- the child process -----------------------------------------------------------------------------------------------

ENDS = {
    "wrong_element": ("wrong", r"d_z_j is off by 0\.001 of its largest value; at most \S+ is allowed"),
    "other_bits": ("not reproducible", r"d_z_j differs bitwise in the second call"),
    "unwritten_row": ("wrong", r"d_z_j has \d+ of \d+ elements that are NaN, as in unwritten memory"),
    "raises": ("raised an error", r"RuntimeError: an illegal memory access was encountered"),
    "segfault": ("crashed", r"SIGSEGV"),
    "hangs": ("no answer", r"killed after 20 s"),
    "no_import": ("not available", r"no such device here"),
    "hidden_order": ("not reproducible", r"d_z_j differs bitwise in the second call"),
    "no_memory": ("not available", r"memory ran out: RuntimeError: CUDA error: out of memory"),
    "ended": ("not available", r"ended by SIGKILL from outside"),
    "no_start": ("not available", r"ended before its first check: exit status 3"),
}


USUAL_ENDS = ("raises", "segfault")


@pytest.mark.parametrize("name", tiered(ENDS, slow=lambda name: name not in USUAL_ENDS))
def test_child_that_fails_gives_a_verdict_that_says_how(name):
    status, words = ENDS[name]
    deadline = 20 if name == "hangs" else 300
    started = time.perf_counter()
    verdict = process.check_in_child({"backend": name, "device": "cpu", "module": f"tests.broken.{name}"}, deadline)
    assert verdict.status == status, verdict
    assert re.search(words, verdict.detail), verdict
    assert time.perf_counter() - started < deadline + 10
    if name not in ("no_import", "no_start"):
        assert verdict.case.startswith("nt_xent: float"), verdict
    loss = nt_xent(torch.randn(4, 8), torch.randn(4, 8), 0.1)
    assert loss.isfinite(), "the parent process should survive"


@pytest.mark.slow
def test_child_passes_the_kernels_of_this_machine():
    verdict = process.check_in_child({"backend": "blocked", "device": "cpu", "module": None})
    assert verdict.ok, verdict
    assert verdict.checks > 60
    assert str(verdict).startswith(f"passed {verdict.checks} checks in ")


def test_child_that_cannot_be_started_makes_the_backend_not_available(monkeypatch):
    for executable in ("", "/nowhere/python"):
        monkeypatch.setattr(sys, "executable", executable)
        verdict = process.check_in_child({"backend": "blocked", "device": "cpu", "module": None})
        assert verdict.status == "not available"


@pytest.mark.slow
def test_child_that_is_silent_for_too_long_is_killed():
    started = time.perf_counter()
    verdict = process.check_in_child({"backend": "hangs", "device": "cpu", "module": "tests.broken.hangs"}, silence=15)
    assert verdict.status == "no answer", verdict
    assert time.perf_counter() - started < 60


@pytest.mark.slow
def test_child_without_a_parent_ends_itself_at_its_deadline(tmp_path):
    request = {"backend": "hangs", "device": "cpu", "module": "tests.broken.hangs", "seconds": 8}
    command = [sys.executable, "-c", process.START, os.pathsep.join(sys.path), tmp_path / "report", json.dumps(request)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr


@pytest.mark.slow
def test_children_share_the_checks(monkeypatch):
    whole = process.check_in_child({"backend": "blocked", "device": "cpu", "module": None})
    shared = process.check_in_child({"backend": "blocked", "device": "cpu", "module": None, "parts": 3})
    assert shared.ok
    assert shared.checks == whole.checks
    late = {"backend": "segfault", "device": "cpu", "module": "tests.broken.segfault", "parts": 2}
    assert process.check_in_child(late).status == "crashed"

    asked = []

    def no_room(request, deadline, silence, stop=None):
        asked.append(request.get("part"))
        verdict = Verdict("not available", "busy") if asked[-1] == [1, 2] else Verdict("passed", checks=4)
        return process._End(0, lines=[{"verdict": verdict.to_dict()}])

    monkeypatch.setattr(process, "_run_child", no_room)
    assert process.check_in_child({"parts": 2}).ok, "parts should run in turn if only one fits"
    assert asked[-1] is None
    assert len(asked) == 3


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs POSIX's signals")
def test_interrupt_ends_the_children():
    code = (
        "import os, signal, threading\n"
        "from fastntxent.verification import process\n"
        "threading.Timer(6, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "try:\n"
        "    request = {'backend': 'hangs', 'device': 'cpu', 'module': 'tests.broken.hangs', 'parts': 2}\n"
        "    process.check_in_child(request)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "interrupted\n", done.stderr
    assert time.perf_counter() - started < 60


def test_child_imports_what_its_parent_does(tmp_path, monkeypatch):
    (tmp_path / "kernels_of_mine.py").write_text(
        "from tests.broken import Broken\ndef change(d_z):\n    raise RuntimeError('mine')\nBACKEND = Broken(change)\n"
    )
    (tmp_path / "json.py").write_text("raise RuntimeError('a file of the working directory')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, ""])
    for name in ("PYTHONWARNINGS", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"):
        monkeypatch.setenv(name, "error" if name == "PYTHONWARNINGS" else "1")
    verdict = process.check_in_child({"backend": "mine", "device": "cpu", "module": "kernels_of_mine"})
    assert verdict.detail.startswith("RuntimeError: mine"), verdict


def test_child_environment_has_no_shared_mps_server_and_no_verification(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    environment = process._environment(tmp_path)
    assert environment["CUDA_MPS_PIPE_DIRECTORY"] == str(tmp_path)
    assert environment["FASTNTXENT_VERIFY"] == "never"
    assert "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE" not in environment


def test_child_on_another_device_or_version_gives_no_verdict_on_the_kernels():
    model = {**store.model_of(CPU)._asdict(), "torch": "1.0"}
    verdict = process.check_in_child({"backend": "blocked", "device": "cpu", "module": None, "model": model})
    assert verdict.status == "not available"
    assert re.search(r"the child process has torch '\S+', but its parent has '1.0'", verdict.detail)


def test_frozen_program_without_an_interpreter_cannot_check(monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    verdict = process.check_in_child({"backend": "blocked", "device": "cpu", "module": None})
    assert verdict.status == "not available"
    assert "no Python interpreter" in verdict.detail


def test_missing_temporary_folder_makes_the_backend_not_available(monkeypatch):
    def none(*args, **kwargs):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.TemporaryDirectory", none)
    verdict = process.check_in_child({"backend": "blocked", "device": "cpu", "module": None})
    assert verdict.status == "not available"
    assert "No usable temporary directory" in verdict.detail


@pytest.mark.parametrize(
    ("name", "status"),
    [("segfault", "crashed"), ("raises", "raised an error"), ("raises_later", "raised an error")],
)
def test_timing_names_the_backend_that_fails(name, status):
    code = (
        "import sys\n"
        "from fastntxent.backends import add\n"
        "from fastntxent.verification import child, timing\n"
        "import torch\n"
        f"add({name!r}, 'tests.broken.{name}', ('cpu',))\n"
        "timing.TIMED_ROWS, timing.TIMED_FEATURES, timing.TIMED_DTYPES = (64, 128), (16,), (torch.float32,)\n"
        "child.main(*sys.argv[1:])\n"
    )
    start = process.START
    try:
        process.START = f"import os, sys; sys.path[:] = sys.argv.pop(1).split(os.pathsep)\n{code}"
        times, running, verdict = process.time_in_child({"time": [name, "blocked"], "device": "cpu"})
    finally:
        process.START = start
    assert times is None
    assert running == name
    assert verdict.status == status
    assert verdict.case == "timing, float32, 64 rows of 16 features"


def test_timing_skips_backends_that_cannot_run():
    code = (
        "import torch, json\n"
        "from fastntxent.verification import timing\n"
        "timing.TIMED_ROWS, timing.TIMED_FEATURES = (64, 128), (16,)\n"
        "timing.TIMED_DTYPES = (torch.float32, torch.float16)\n"
        "print(json.dumps(timing.time_backends(['blocked', 'reference', 'cuda'], torch.device('cpu'))))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    times = json.loads(found.stdout)
    assert set(times) == {"float32", "float16"}
    for rows in ("64", "128"):
        assert set(times["float32"]["16"][rows]) == {"blocked", "reference"}, "a refusing backend has no entry"
        assert all(value > 0 for value in times["float32"]["16"][rows].values())


# --- stored verdicts and times ---------------------------------------------------------------------------------------

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
        assert Store(Model(**{**MODEL._asdict(), **change}), tmp_path).verdict("triton", MODULE) is None, change
    assert Store(Model("Another GPU", *list(MODEL)[1:]), tmp_path).verdict("triton", MODULE) is None
    kept.keep("triton", MODULE, Verdict("not available", "memory ran out"))
    assert again.verdict("triton", MODULE) == PASSED, "this verdict says nothing about the kernels"


def test_store_has_no_verdict_for_changed_kernels(tmp_path, monkeypatch):
    Store(MODEL, tmp_path).keep("triton", MODULE, PASSED)
    monkeypatch.setattr(store, "sources_key", lambda module: "other sources")
    assert Store(MODEL, tmp_path).verdict("triton", MODULE) is None


def test_sources_key_changes_with_every_source_file(tmp_path, monkeypatch):
    for folder in ("backends", "ops", "verification"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "kernel.py").write_text("1")
    (tmp_path / "error_budget.py").write_text("1")
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
def test_store_replaces_a_damaged_file_or_one_of_another_format(tmp_path, damage):
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


def test_store_in_an_unwritable_folder_keeps_verdicts_in_the_process(tmp_path, monkeypatch):
    def refuse(path, write):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(store, "write_whole", refuse)
    monkeypatch.setattr(Store, "_complained", False)
    kept = Store(MODEL, tmp_path / "new")
    with pytest.warns(UserWarning, match=r"cannot store its verdicts .*Read-only.*FASTNTXENT_CACHE to another"):
        kept.keep("triton", MODULE, PASSED)
    kept.keep("cuda", MODULE, PASSED)  # no second warning
    assert kept.verdict("triton", MODULE) == PASSED


def test_store_returns_verdicts_that_it_could_not_write(tmp_path, monkeypatch):
    monkeypatch.setattr(Store, "_complained", True)
    monkeypatch.setattr(Store, "_unsaved", {})
    file = tmp_path / "file"
    file.write_text("a cache folder that is a file")
    with Store(MODEL, file).checking():
        Store(MODEL, file).keep("triton", MODULE, PASSED)
    assert Store(MODEL, file).verdict("triton", MODULE) == PASSED
    assert Store(MODEL, tmp_path / "other").verdict("triton", MODULE) is None


@pytest.mark.parametrize(
    "times", [None, [1], {"float32": 3}, {"float32": {"wide": {"256": {}}}}, {"f": {"1": {"1": {"c": -1}}}}]
)
def test_store_ignores_invalid_times(tmp_path, times):
    kept = Store(MODEL, tmp_path)
    kept.keep_times({"triton": MODULE}, times)
    assert kept.times({"triton": MODULE}) is None
    good = {"float32": {"128": {"256": {"triton": 0.5}, "1024": {}}}}
    kept.keep_times({"triton": MODULE}, good)
    assert kept.times({"triton": MODULE}) == good


def test_waiting_for_another_process_prints_a_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, "SAID_AFTER", 0.1)
    monkeypatch.setattr(store, "PATIENCE", 0.3)
    with Store(MODEL, tmp_path).checking(), pytest.warns(UserWarning, match="continuing without it"):
        assert Store(MODEL, tmp_path)._acquire_lock() is None
    assert "waiting for another process, which is checking Some GPU 80GB" in capsys.readouterr().err


def test_model_distinguishes_interpreted_kernels_from_compiled_ones(monkeypatch):
    monkeypatch.setattr(store, "TRITONS", ("no such package", "pytest"))
    for name in store.TRITON_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    plain = store._triton_version()
    assert plain == pytest.__version__
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert store._triton_version() == f"{plain} TRITON_INTERPRET=1"
    monkeypatch.setattr(store, "TRITONS", ())
    assert store._triton_version() == "unknown TRITON_INTERPRET=1"


def test_store_keeps_separate_verdicts_for_a_partition_of_a_device(tmp_path):
    Store(MODEL, tmp_path).keep("triton", MODULE, PASSED)
    assert Store(MODEL._replace(multiprocessors=14), tmp_path).verdict("triton", MODULE) is None


def test_file_is_closed_before_it_is_renamed(tmp_path, monkeypatch):
    # Windows cannot rename an open file.
    files = importlib.import_module("fastntxent.files")
    opened: list[Any] = []
    replace = os.replace

    def renamed(source, target):
        assert opened[0].closed
        replace(source, target)

    def write(file):
        opened.append(file)
        file.write(b"whole")

    monkeypatch.setattr(os, "replace", renamed)
    files.write_whole(tmp_path / "file", write)
    assert (tmp_path / "file").read_bytes() == b"whole"

    def fail(file):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_whole(tmp_path / "file", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_cache_folder_is_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTNTXENT_CACHE", "here")
    assert store.cache_folder() == tmp_path / "here"
    monkeypatch.setenv("FASTNTXENT_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if sys.platform == "linux":
        assert store.cache_folder() == tmp_path / "home" / ".cache" / "fastntxent"


def test_user_without_a_home_folder_is_warned_that_nothing_is_stored(monkeypatch):
    monkeypatch.delenv("FASTNTXENT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(Store, "_complained", False)
    monkeypatch.setattr(Store, "_unsaved", {})
    with pytest.warns(UserWarning, match="cannot store its verdicts"):
        Store(MODEL).keep("triton", MODULE, PASSED)


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

    patch = pytest.MonkeyPatch()
    patch.setattr(process, "check_in_child", check)
    patch.setattr(policy, "model_of", lambda device: MODEL)
    barrier.wait()
    said.put(policy.find_verdicts(CPU, {"triton": MODULE, "cuda": MODULE})["triton"].status)


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


# --- the choice of "auto" --------------------------------------------------------------------------------------------

GPU = torch.device("cuda", 0)
FOUND = {"cuda": "fastntxent.backends.cuda.backend", "triton": "fastntxent.backends.triton.backend"}


@pytest.fixture
def simulated(monkeypatch, tmp_path):
    """A simulated machine with GPUs. A test sets the results that its child processes return, and `asked` lists the
    requests to them."""

    machine = types.SimpleNamespace(
        verdicts={"cuda": PASSED, "triton": PASSED}, times=None, ends={}, asked=[], models={0: MODEL}
    )

    def check(request, deadline=0):
        machine.asked.append((request["backend"], request["device"]))
        return machine.verdicts[request["backend"]]

    def measure(request):
        names = request["time"]
        machine.asked.append((tuple(names), request["device"]))
        return next(
            ((None, name, machine.ends[name]) for name in names if name in machine.ends), (machine.times, "", None)
        )

    monkeypatch.setenv("FASTNTXENT_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTNTXENT_VERIFY", raising=False)
    monkeypatch.setattr(process, "check_in_child", check)
    monkeypatch.setattr(process, "time_in_child", measure)
    monkeypatch.setattr(policy, "model_of", lambda device: machine.models[device.index])
    monkeypatch.setattr(policy, "_decided", {})
    monkeypatch.setattr(policy, "_said", set())
    return machine


def choose(device=GPU, rows=1024, features=128, dtype=torch.float32, found=None):
    return policy.choose_backend(device, FOUND if found is None else found, dtype, rows, features)


def test_first_call_checks_and_later_calls_do_not(simulated, capsys):
    assert choose() == "cuda"
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("fastntxent: checking cuda, triton on Some GPU 80GB, once for this device")
    asked = list(simulated.asked)
    assert asked == [("cuda", "cuda:0"), ("triton", "cuda:0"), (("cuda", "triton", "blocked", "reference"), "cuda:0")]
    for rows in (2, 100, 10**6):
        choose(rows=rows)
    policy.forget()  # as in a new process
    simulated.times = {}
    assert choose() == "cuda"
    assert [call for call in simulated.asked[3:] if isinstance(call[0], str)] == []
    assert capsys.readouterr().err == ""


def test_without_times_small_batches_go_to_cuda_and_large_ones_to_triton(simulated):
    assert [choose(rows=rows) for rows in (2, 8192, 8193, 10**6)] == ["cuda", "cuda", "triton", "triton"]
    policy.forget()
    simulated.verdicts["triton"] = Verdict("wrong", "off", "a case")
    Store(MODEL).keep("triton", FOUND["triton"], simulated.verdicts["triton"])
    assert choose(rows=10**6) == "cuda", "triton failed, so cuda should be chosen"


def test_float64_call_does_not_change_the_choice_for_other_dtypes(simulated, monkeypatch):
    monkeypatch.setattr(backends_module, "candidates", lambda kind, dtype=None: {} if dtype == torch.float64 else FOUND)
    monkeypatch.setattr(backends_module, "select", lambda name, kind, dtype: name)

    def chosen(dtype) -> Any:
        return select_for("auto", types.SimpleNamespace(device=GPU, dtype=dtype, ndim=2, shape=(64, 8)))

    assert chosen(torch.float64) == "auto", "no kernel takes float64, so the table should decide"
    assert simulated.asked == [], "a float64 call should check nothing"
    assert chosen(torch.float32) == "cuda"
    assert chosen(torch.float64) == "auto"


def test_size_of_a_call_counts_both_views(simulated, monkeypatch):
    asked, z, ids = [], torch.randn(2, 64, 8), torch.arange(64)
    monkeypatch.setattr(backends_module, "_CHECKED", {"cpu"})
    monkeypatch.setattr(backends_module, "candidates", lambda *_: FOUND)

    def choose_blocked(device, found, dtype, rows, features):
        asked.append(rows)
        return "blocked"

    monkeypatch.setattr(policy, "choose_backend", choose_blocked)
    blocked = select("blocked", "cpu", torch.float32)
    monkeypatch.setattr(backends_module, "select", lambda *_: blocked)
    nt_xent(*z, 0.1)
    nt_xent(*z, 0.1, ceiling=0.9)
    nt_xent(*z, 0.1, reduction="none")
    fastntxent.nt_logistic(*z, 0.1)
    assert asked == [128] * 4
    asked.clear()
    fastntxent.clip(*z, 0.1)
    fastntxent.siglip(*z, 0.1)
    fastntxent.neg_lse(z[0], ids, 0.1)
    assert asked == [64] * 3


def test_failure_to_check_a_backend_is_printed_once(simulated, capsys):
    simulated.verdicts = {"cuda": Verdict("not available", "RuntimeError: all devices are busy"), "triton": PASSED}
    assert choose() == "triton"
    policy.forget()
    assert choose() == "triton"
    said = capsys.readouterr().err
    assert said.count("backend 'cuda' could not be checked on Some GPU 80GB and is not used in this process") == 1
    assert "all devices are busy" in said
    assert [name for name, _ in simulated.asked if name == "cuda"] == ["cuda"] * 2, "this verdict should not be stored"


@pytest.mark.parametrize("status", ["crashed", "no answer", "raised an error"])
def test_backend_that_fails_in_timing_is_not_chosen(simulated, status):
    simulated.times = {"float32": {"128": {"256": {"triton": 0.2, "blocked": 0.5}}}}
    simulated.ends = {"cuda": Verdict(status, "SIGSEGV", "timing, float32, 16384 rows of 128 features")}
    with pytest.warns(RuntimeWarning, match=f"backend 'cuda' did not pass .*: {status} in timing, float32, 16384 rows"):
        assert choose() == "triton"
    assert simulated.asked[-1] == (("triton", "blocked", "reference"), "cuda:0")
    policy.forget()
    asked = len(simulated.asked)
    assert choose() == "triton"
    assert len(simulated.asked) == asked, "verdict and times should be stored"


@pytest.mark.parametrize("culprit", ["blocked", "cuda"])
def test_failed_timing_keeps_the_verdicts(simulated, culprit):
    status = "crashed" if culprit == "blocked" else "not available"
    simulated.ends = {culprit: Verdict(status, "x")}
    assert choose() == "cuda"
    assert len(simulated.asked) == 3


def test_warning_turned_into_an_error_fails_only_one_call(simulated):
    simulated.verdicts = {"cuda": Verdict("wrong", "off", "x"), "triton": PASSED}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="did not pass"):
            choose()
    asked = len(simulated.asked)
    assert choose() == "triton"
    assert len(simulated.asked) == asked


def test_first_call_after_verify_checks_nothing(simulated, monkeypatch, capsys):
    simulated.times = {"float32": {"128": {"256": {"cuda": 0.2, "triton": 0.5, "blocked": 0.4}}}}
    monkeypatch.setattr("fastntxent.devices.find_device", lambda device: GPU)
    monkeypatch.setattr("fastntxent.devices.checkable", lambda kind: {**FOUND, "blocked": MODULE})
    monkeypatch.setattr("fastntxent.devices.candidates", lambda kind: FOUND)
    simulated.verdicts["blocked"] = PASSED
    assert {name: verdict.status for name, verdict in fastntxent.verify().items()} == dict.fromkeys(
        ("cuda", "triton", "blocked"), "passed"
    )
    assert len(simulated.asked) == 4
    assert capsys.readouterr().err.count("\n") == 1
    assert choose() == "cuda"
    assert len(simulated.asked) == 4
    assert capsys.readouterr().err == ""
    simulated.times = {"float32": {"128": {"256": {"cuda": 0.9, "triton": 0.5, "blocked": 0.4}}}}
    fastntxent.verify(refresh=True)
    assert choose() == "blocked", "a refresh should check and time again"
    fastntxent.verify(backend="triton", refresh=True)
    assert simulated.asked[-1][0] == "triton", "a single backend should not be timed"
    with pytest.raises(TypeError, match="refresh must be a bool, got 'no'"):
        fastntxent.verify(refresh="no")


def test_verdicts_are_known_in_this_process_if_none_can_be_stored(simulated, monkeypatch):
    monkeypatch.setattr(store, "write_whole", lambda path, write: (_ for _ in ()).throw(OSError(30, "Read-only")))
    monkeypatch.setattr(Store, "_complained", True)
    monkeypatch.setattr(Store, "_unsaved", {})
    choose()
    assert set(policy.known_verdicts(GPU, FOUND)) == {"cuda", "triton"}
    policy.forget()
    asked = [name for name, _ in simulated.asked if isinstance(name, str)]
    choose()
    assert [name for name, _ in simulated.asked if isinstance(name, str)] == asked


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
    assert choose() == "blocked", "the verdict should be stored, and a second warning would be an error"
    assert len(simulated.asked) == 2


def test_backend_that_passed_is_chosen_if_the_other_failed(simulated):
    simulated.verdicts = {"cuda": Verdict("no answer", "killed", "x"), "triton": PASSED}
    with pytest.warns(RuntimeWarning, match="backend 'cuda' did not pass"):
        assert choose() == "triton"


def test_verify_set_to_never_chooses_blocked_without_checks(simulated, monkeypatch):
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


def test_each_device_model_is_checked_once(simulated):
    other = Model("Older GPU", "sm_80", *list(MODEL)[2:])
    simulated.models = {0: MODEL, 1: other, 2: MODEL}
    simulated.times = {"float32": {}}
    choose(torch.device("cuda", 0))
    choose(torch.device("cuda", 1))
    checked = [device for backend, device in simulated.asked if backend == "triton"]
    assert checked == ["cuda:0", "cuda:1"]
    choose(torch.device("cuda", 2))
    assert [device for backend, device in simulated.asked if backend == "triton"] == checked, (
        "devices of one model should be checked once"
    )


def test_choice_follows_the_measured_times(simulated):
    simulated.times = {
        "float32": {
            "128": {
                "256": {"cuda": 0.02, "triton": 0.10, "blocked": 0.40, "reference": 0.01},
                "4096": {"cuda": 0.90, "triton": 0.50, "blocked": 0.80},
            },
            "768": {"256": {"cuda": 0.5, "triton": 0.6, "blocked": 0.3}},
        }
    }
    assert choose(rows=100) == choose(rows=1000) == "cuda", (
        "the nearest size in octaves decides; the dense loss is never picked"
    )
    assert choose(rows=1100) == choose(rows=10**6) == "triton"
    assert choose(rows=256, features=512) == "blocked", "both kernels are correct but slower"
    assert choose(dtype=torch.float16) == "cuda", "without times, the first that passed should be chosen"
    assert policy._decided[GPU].explain(torch.float32, 4096, 128) == (
        "triton",
        "the fastest at the nearest timed size: triton 0.5 ms, blocked 0.8 ms, cuda 0.9 ms",
    )
    policy.forget()
    asked = len(simulated.asked)
    choose()
    assert len(simulated.asked) == asked, "times should be stored too"


def test_choice_in_a_captured_graph_follows_the_times_of_replays(simulated, monkeypatch):
    size = {"cuda": 0.5, "triton": 0.4, "blocked": 0.8, "cuda replayed": 0.1, "triton replayed": 0.3, "reference": 0.1}
    other = {"cuda": 0.5, "triton": 0.4}
    simulated.times = {"float32": {"128": {"256": size, "16384": other}}}
    assert choose(rows=256) == "triton"
    monkeypatch.setattr(policy, "_capturing", lambda device: True)
    assert choose(rows=256) == "cuda"
    assert choose(rows=16384) == "triton", "no replay was timed at this size"
    monkeypatch.setattr(policy, "_capturing", lambda device: False)
    assert choose(rows=256) == "triton"


def test_times_include_replays_if_a_call_can_be_captured(monkeypatch):
    from fastntxent.verification import timing

    assert timing.replay_of(lambda: None, CPU) is None
    monkeypatch.setattr(timing, "replay_of", lambda call, device: call)
    for name, value in {"TIMED_ROWS": (64,), "TIMED_FEATURES": (16,), "TIMED_DTYPES": (torch.float32,)}.items():
        monkeypatch.setattr(timing, name, value)
    (entry,) = timing.time_backends(["blocked", "reference"], CPU)["float32"]["16"].values()
    assert set(entry) == {"blocked", "blocked replayed", "reference", "reference replayed"}
    assert all(value > 0 for value in entry.values())


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), "CUBLAS_STATUS_ALLOC_FAILED"],
    ids=["OutOfMemoryError", "MemoryError", "cuBLAS"],
)
def test_timing_leaves_out_calls_for_which_memory_runs_out(monkeypatch, error):
    from fastntxent.verification import timing

    def replay_of(call, device):
        raise RuntimeError(error) if isinstance(error, str) else error

    monkeypatch.setattr(timing, "replay_of", replay_of)
    for name, value in {"TIMED_ROWS": (64,), "TIMED_FEATURES": (16,), "TIMED_DTYPES": (torch.float32,)}.items():
        monkeypatch.setattr(timing, name, value)
    (entry,) = timing.time_backends(["blocked", "reference"], CPU)["float32"]["16"].values()
    assert set(entry) == {"blocked", "reference"}
    monkeypatch.setattr(timing, "milliseconds", replay_of)
    (entry,) = timing.time_backends(["blocked", "reference"], CPU)["float32"]["16"].values()
    assert entry == {}


def test_choice_without_kernels_to_check_is_the_blocked_backend(simulated):
    assert choose(found={}) == "blocked"
    assert simulated.asked == []


def test_policy_is_not_asked_about_cpu_tensors(monkeypatch):
    monkeypatch.setattr(policy, "choose_backend", None)
    assert select_for("auto", torch.zeros(4, 8)) is select("auto", "cpu", torch.float32)


def test_candidates_load_and_support_the_dtype():
    found = candidates("cuda", torch.float64)
    assert found == {}, "no GPU kernel takes float64"
    assert set(candidates("cuda")) <= {"cuda", "triton"}
    assert candidates("cpu") == {}


@pytest.mark.skipif(sys.platform == "win32", reason="needs a C++ compiler that torch.compile finds")
def test_compiled_code_chooses_when_it_runs(monkeypatch):
    # A compiled graph runs once before it is captured in a CUDA graph, and that run must make the choice.
    compiling, chosen = [], []

    def take(device, found, dtype, rows, features):
        compiling.append(torch.compiler.is_compiling())
        chosen.append((rows, features))
        return "blocked"

    monkeypatch.setattr(backends_module, "_CHECKED", {"cpu"})
    monkeypatch.setattr(backends_module, "candidates", lambda kind, dtype=None: FOUND)
    monkeypatch.setattr(policy, "choose_backend", take)
    compiled = torch.compile(lambda z_i, z_j: nt_xent(z_i, z_j, 0.1), backend="aot_eager", fullgraph=True)
    z_i, z_j = torch.randn(2, 6, 8).requires_grad_()
    for _ in range(2):
        compiled(z_i, z_j).backward()
    assert chosen == [(12, 8)] * 2, "each run should choose once, with real sizes, and never during tracing"
    assert not any(compiling)
