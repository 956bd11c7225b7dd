"""The kernels of csrc/cpu: exponential, instruction sets, threads, workspace, and behaviour inside a host process."""

import importlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.instruction_set import NAMES
from fastntxent import backends, clip, cross_neg_lse, neg_lse, nt_xent
from tests.cases import assert_cross_neg_lse_within_budget, assert_within_budget, evaluate, random_batch

BUILT = backends()["cpu"]
needs_cpu_kernels = pytest.mark.skipif(not BUILT.available, reason=f"needs the CPU kernels built: {BUILT.reason}")
pytestmark = needs_cpu_kernels

if BUILT.available:
    _cpu = importlib.import_module("fastntxent._cpu")
    cpu = importlib.import_module("fastntxent.backends.cpu")


def has_instruction_set(name):
    before = _cpu.instruction_set()
    try:
        _cpu.use_instruction_set(name)
    except ValueError:
        return False
    _cpu.use_instruction_set(before)
    return True


@pytest.fixture(params=NAMES)
def instruction_set(request):
    if not has_instruction_set(request.param):
        pytest.skip(f"needs a machine with {request.param}")
    before = _cpu.instruction_set()
    _cpu.use_instruction_set(request.param)
    yield request.param
    _cpu.use_instruction_set(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_instruction_set_that_the_machine_lacks_is_rejected():
    before = _cpu.instruction_set()
    for name in (*NAMES, "another"):
        if not has_instruction_set(name):
            with pytest.raises(ValueError, match=f"this machine has no instruction set '{name}'"):
                _cpu.use_instruction_set(name)
            assert _cpu.instruction_set() == before


# Flags of /proc/cpuinfo. AMX is not listed, because Linux may refuse permission to use it.
FLAGS = {
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl", "fma"},
    "avx512_bf16": {"avx512f", "avx512dq", "avx512bw", "avx512vl", "fma", "avx512_bf16"},
}


@pytest.mark.parametrize("name", FLAGS)
def test_instruction_set_that_the_machine_has_can_be_used(name):
    # If the first products of a set are wrong, the set counts as missing and its other tests are skipped. This test
    # fails instead.
    path = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.*)$", path.read_text(), re.MULTILINE) if path.exists() else None
    if flags is None or not FLAGS[name] <= set(flags[1].split()):
        pytest.skip(f"needs a machine with {name}, on Linux")
    assert has_instruction_set(name)


@pytest.mark.skipif(os.environ.get("CI") != "true", reason="needs CI=true, where the kernels must have been built")
def test_kernels_were_built():
    assert BUILT.available, BUILT.reason


# --- the exponential -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="needs a long double wider than double")
@pytest.mark.parametrize(("dtype", "code"), [(np.float32, 2), (np.float64, 3)])
def test_exp2_is_accurate_to_about_one_unit_in_the_last_place(instruction_set, dtype, code):
    limit = 1.4 if instruction_set == "portable" else 1.1
    rng = np.random.default_rng(0)
    reach = 125 if dtype == np.float32 else 1000
    grid = np.concatenate((np.linspace(-1, 1, 200_001), rng.uniform(-reach, reach, 400_000), [0, 0.5, -0.5, 1, -1]))
    x = np.ascontiguousarray(grid, dtype=dtype)
    y = np.empty_like(x)
    _cpu.exp2(code, x.ctypes.data, y.ctypes.data, len(x))
    exact = np.exp2(x.astype(np.longdouble))
    unit = np.spacing(exact.astype(dtype)).astype(np.longdouble)
    assert float(np.max(np.abs(y.astype(np.longdouble) - exact) / unit)) < limit
    assert y[np.flatnonzero(x == 0)[0]] == 1


@pytest.mark.parametrize("size", [1, 3, 15, 16, 17])
def test_exp2_propagates_nan(instruction_set, size):
    x, y = torch.full((size,), torch.nan), torch.empty(size)
    _cpu.exp2(2, x.data_ptr(), y.data_ptr(), size)
    assert y.isnan().all()


# --- instruction sets, tiles, threads --------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.005, 0.1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (5, 3), (24, 16), (33, 48), (97, 130)])
def test_instruction_sets_within_budget(instruction_set, n, d, dtype, temperature):
    assert_within_budget(random_batch(n, d, temperature, dtype=dtype), "cpu")


@pytest.mark.parametrize("temperature", [0.005, 0.1])
@pytest.mark.parametrize("n", [23, 24, 25, 47, 48, 49, 95, 96, 97, 143, 145, 191, 193, 400])
def test_tile_edges_within_budget(n, temperature):
    generator = torch.Generator().manual_seed(n)
    upstream = torch.randn(2 * n, generator=generator, dtype=torch.float64)
    assert_within_budget(random_batch(n, 20, temperature), "cpu")
    assert_within_budget(random_batch(n, 20, temperature), "cpu", reduction="none", upstream=upstream)


@pytest.mark.parametrize("d", [129, 255, 256, 257, 700])
def test_long_rows_within_budget(instruction_set, d):
    assert_within_budget(random_batch(40, d, 0.1), "cpu")


@pytest.mark.parametrize("temperature", [0.005, 0.1])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_any_number_of_threads_within_budget_and_same_bits_each_time(threads, count, temperature):
    threads(count)
    batch = random_batch(300, 40, temperature)
    assert_within_budget(batch, "cpu")
    first = evaluate(batch, "cpu")
    for _ in range(10):
        for a, b in zip(evaluate(batch, "cpu"), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("temperature", [0.005, 0.1])
@pytest.mark.parametrize("count", [2, 3, 16])
@pytest.mark.parametrize(("rows", "cols"), [(60, 4200), (4200, 60)])
def test_few_rows_against_many_columns_within_budget_and_same_bits(threads, count, rows, cols, temperature):
    threads(count)
    assert_cross_neg_lse_within_budget("cpu", rows, cols, "few", temperature)
    u, v = torch.randn(rows, 16, requires_grad=True), torch.randn(cols, 16, requires_grad=True)
    ids = torch.arange(rows), torch.arange(cols)

    def found():
        nus = cross_neg_lse(u, v, *ids, temperature)
        return *nus, *torch.autograd.grad(nus[0].sum() + nus[1].sum(), (u, v))

    first = found()
    for _ in range(5):
        assert all(map(torch.equal, found(), first))


@pytest.mark.parametrize("tiles", [0, 1, 5])
def test_workspace_does_not_change_the_result(monkeypatch, tiles):
    batch = random_batch(200, 40, 0.1)
    whole = evaluate(batch, "cpu")
    monkeypatch.setattr(cpu, "WORKSPACE", tiles * 48 * 48 * 4)
    for a, b in zip(evaluate(batch, "cpu"), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert_within_budget(batch, "cpu")


@pytest.mark.parametrize("tiles", [0, 1, 5])
def test_workspace_of_two_towers_does_not_change_the_result(monkeypatch, tiles):
    z_i, z_j = random_batch(200, 40, 0.1)[:2]
    z_i, z_j = z_i.requires_grad_(), z_j.requires_grad_()

    def loss_and_gradients():
        loss = clip(z_i, z_j, 0.1, backend="cpu")
        return loss.detach(), *torch.autograd.grad(loss, (z_i, z_j))

    whole = loss_and_gradients()
    packed = 3 * 2 * z_i.numel() * 4
    monkeypatch.setattr(cpu, "WORKSPACE_AND_ROWS", packed + tiles * 48 * 48 * 4)
    for a, b in zip(loss_and_gradients(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_forward_gives_a_logit_the_same_bits_from_both_sides():
    u = torch.nn.functional.normalize(torch.randn(300, 33), dim=1)
    both = neg_lse(u[[0, 299]], torch.arange(2), 0.01, backend="cpu")
    assert both[0] == both[1]


def test_ids_of_any_size_and_integer_dtype_form_the_same_groups():
    u = torch.nn.functional.normalize(torch.randn(50, 8), dim=1)
    ids = torch.arange(50) % 7
    expected = neg_lse(u, ids, 0.1, backend="cpu")
    for other in (ids - 3, ids * 2**40, ids.to(torch.int32), ids.to(torch.uint8), -ids):
        assert torch.equal(neg_lse(u, other, 0.1, backend="cpu"), expected)


# --- behaviour inside a host process ----------------------------------------------------------------------------------


def test_calls_from_several_python_threads_give_the_same_bits():
    batches = [random_batch(150 + 10 * index, 40, 0.1, seed=index) for index in range(4)]
    expected = [evaluate(batch, "cpu") for batch in batches]
    wrong = []

    def work(index):
        for _ in range(20):
            result = evaluate(batches[index], "cpu")
            if not all(torch.equal(a, b) for a, b in zip(result, expected[index], strict=True)):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_other_python_threads_run_during_a_call():
    z_i, z_j, *_ = random_batch(3000, 128, 0.1)
    done = threading.Event()
    ticks = []

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.perf_counter()
    nt_xent(z_i.requires_grad_(), z_j.requires_grad_(), 0.1, backend="cpu")
    end = time.perf_counter()
    done.set()
    ticker.join()
    assert sum(start < t < end for t in ticks) > 3


def run_python(code, **options):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], text=True, **options)


@pytest.mark.parametrize("before", ["fastntxent.nt_xent(*z, 0.1)", "pass"], ids=["used", "only imported"])
def test_forked_child_computes_the_same_gradient(before):
    # The child computes only a mean loss, which takes the scalar path. Other paths use PyTorch's own parallel
    # operators, which hang in a forked child.
    code = f"""
        import os, torch, fastntxent
        z = torch.randn(2, 200, 64, requires_grad=True)
        torch.mm(torch.randn(600, 600), torch.randn(600, 600))
        {before}
        child = os.fork()
        if child == 0:
            fastntxent.nt_xent(*z.detach(), 0.1, backend="cpu")
            gradient, = torch.autograd.grad(fastntxent.nt_xent(*z, 0.1, backend="cpu"), z)
            torch.save(gradient, "gradient")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        expected, = torch.autograd.grad(fastntxent.nt_xent(*z, 0.1, backend="cpu"), z)
        assert torch.equal(torch.load("gradient"), expected)
    """
    with tempfile.TemporaryDirectory() as folder:
        process = run_python(code, cwd=folder)
        try:
            assert process.wait() == 0
        finally:
            process.kill()


def test_ctrl_c_ends_a_long_call():
    code = """
        import signal, torch, fastntxent
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the parent process may have set it to be ignored
        z = torch.randn(2, 300_000, 64)  # takes minutes
        print("ready", flush=True)
        fastntxent.nt_xent(*z, 0.1, backend="cpu")
    """
    process = run_python(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert "KeyboardInterrupt" in errors
    assert process.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_daemon_thread_in_a_kernel_lets_the_process_end(threads):
    # The interpreter shuts down while the thread runs a backward kernel. Deleting `slow` delays the shutdown until the
    # kernel has ended. `slow` is in sys.modules because the thread keeps the globals of __main__ alive. Outside the
    # kernel, in PyTorch's own code, the thread would abort the process.
    code = f"""
        import sys, threading, time, types, torch, fastntxent, fastntxent._cpu as kernels
        torch.set_num_threads({threads})
        z = torch.randn(2, 12000, 64, requires_grad=True)
        loss = fastntxent.nt_xent(*z, 0.1, reduction="none", backend="cpu").sum()
        start = time.perf_counter()
        loss.backward(retain_graph=True)
        took = time.perf_counter() - start
        class Slow:
            def __del__(self, sleep=time.sleep, seconds=1 + 2 * took):
                sleep(seconds)
        sys.modules["slow"] = types.SimpleNamespace(slow=Slow())
        inside, run = threading.Event(), kernels.run
        def announce(*arguments):
            inside.set()
            return run(*arguments)
        kernels.run = announce
        threading.Thread(target=loss.backward, daemon=True).start()
        inside.wait()
        time.sleep(min(0.1, took / 4))
    """
    process = run_python(code, stderr=subprocess.PIPE)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors


@pytest.mark.parametrize(("n", "d"), [(2**31, 1), (2**62, 1), (1, 2**60)])
def test_call_that_is_too_large_for_the_kernels_raises_value_error(n, d):
    z, inv_tau = torch.zeros(1, 1).expand(n, d), torch.ones(())
    with pytest.raises(ValueError, match=rf"at most 2147483647 rows.*got {2 * n} rows of {d} features"):
        torch.ops.fastntxent.nt_xent_value(z, z, inv_tau, True, True, "cpu")


def test_failed_allocation_raises_memory_error():
    code = """
        import resource, torch, fastntxent
        z = torch.randn(2, 40000, 128)
        fastntxent.nt_xent(*z[:, :500], 0.1, backend="cpu")
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 60 * 2**20,) * 2)
        try:
            fastntxent.nt_xent(*z, 0.1, backend="cpu")
        except MemoryError as error:
            assert "memory for 80000 rows of 128 features" in str(error)
            raise SystemExit(0)
        raise SystemExit(1)
    """
    assert run_python(code).wait() == 0


def test_module_uses_the_stable_abi():
    assert ".abi3." in _cpu.__file__
