"""The arithmetic and checks of the benchmarks, at small sizes."""

import importlib
import json
import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import (
    competitors,
    distributed,
    drop_ins,
    family,
    host,
    instruction_set,
    losses,
    machine,
    memory,
    report,
    tables,
    timing,
)
from fastntxent import backends
from tests.ranks import on_ranks

BUILT = backends()["cpu"]
needs_cpu_kernels = pytest.mark.skipif(not BUILT.available, reason=f"needs the CPU kernels built: {BUILT.reason}")
if BUILT.available:
    _cpu = importlib.import_module("fastntxent._cpu")
ROOT = Path(__file__).parent.parent
# The slowest instruction set of this processor's architecture.
BASELINE = "neon" if platform.machine().lower() in ("aarch64", "arm64") else "portable"
needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")


def made(name: str) -> competitors.Loss:
    ready, missing = competitors.load([name], timing.TEMPERATURE)
    if missing:
        pytest.skip(f"{missing[name]}: pip install '.[bench]'")
    return ready[name]


@pytest.mark.parametrize("name", competitors.names("cpu", 16))
def test_competitors_agree_with_the_oracle(name):
    assert timing.check(name, made(name), timing.Case(48, 16)) < 1e-5


def test_host_times_each_way_to_call_the_loss_with_an_empty_launch():
    with host.empty_launch():
        seconds = host.seconds_of_steps(host.steps("cuda", 8, 4), calls=2, rounds=3)
    assert list(seconds) == ["autograd alone", "nt_xent", "NTXentLoss"]
    assert all(len(of_step) == 3 and min(of_step) > 0 for of_step in seconds.values())


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the compilers that Triton ships for Linux")
def test_host_times_compiled_triton_kernels_without_running_them():
    # This needs a separate process, because this process runs Triton's interpreter.
    code = """
from benchmarks import host
with host.empty_triton():
    seconds = host.seconds_of_steps(host.steps("triton", 256, 4), calls=3, rounds=3)
print(min(seconds["nt_xent"]) > min(seconds["autograd alone"]) > 0)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command, root = [sys.executable, "-c", code], Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"


def test_chunked_agrees_with_the_oracle_over_uneven_chunks():
    timing.check("chunked", partial(losses.chunked, temperature=timing.TEMPERATURE, chunk=7), timing.Case(48, 16))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_agrees_with_the_oracle():
    z_i, z_j = torch.randn(2, 24, 32)  # no gradient: flex_attention has none on a CPU
    try:
        value = losses.FlexAttention(0.1, compiled=False)(z_i, z_j)
    except ImportError as error:
        pytest.skip(f"needs a newer PyTorch: {error}")
    torch.testing.assert_close(value, losses.oracle(z_i, z_j, 0.1))


@pytest.mark.parametrize("wrong", ["value", "gradient"])
def test_check_rejects_a_wrong_loss(wrong):
    def off(z_i, z_j):
        loss = losses.dense(z_i, z_j, timing.TEMPERATURE)
        return loss * 1.001 if wrong == "value" else loss + 0.01 * (z_i - z_i.detach()).sum()

    with pytest.raises(AssertionError, match="eager disagrees with the oracle"):
        timing.check("eager", off, timing.Case(48, 16))


def test_check_rejects_a_different_loss():
    with pytest.raises(AssertionError, match="disagrees"):
        timing.check("eager", partial(losses.one_way, temperature=timing.TEMPERATURE), timing.Case(48, 16))


def test_interleave_makes_every_call_once_per_round():
    turns: dict[str, list[int]] = {"a": [], "b": []}

    def call(name, turn):
        turns[name].append(turn)
        return {"both": float(turn)}

    times = timing.interleave({name: partial(call, name) for name in turns}, seconds=0)
    rounds = list(range(timing.FEWEST))
    assert times == {"a": {"both": rounds}, "b": {"both": rounds}}
    assert turns == {"a": [0, *rounds], "b": [0, *rounds]}


def test_quantiles_are_milliseconds():
    assert timing.quantiles([0.001 * k for k in range(11)]) == {"p20": 2.0, "p50": 5.0, "p80": 8.0}


@pytest.mark.slow
@needs_linux
def test_memory_measures_the_full_matrix_of_eager_but_not_of_blocked():
    matrix = (2 * 2048) ** 2 * 4
    assert memory.measure_in_process("eager", 2048, 32)["extra_bytes"] > 2 * matrix
    assert memory.measure_in_process("blocked", 2048, 32)["extra_bytes"] < matrix / 4


def test_memory_says_why_a_process_failed():
    with pytest.raises(RuntimeError, match="KeyError: 'none-such'"):
        memory.measure_in_process("none-such", 16, 8)


@pytest.fixture(autouse=True)
def small_product(monkeypatch):
    monkeypatch.setitem(machine.GEMM_SIZE, "cpu", 256)


def run(suite, out, *options):
    brief = ["--seconds", "0"] if suite in ("cpu", "drop-ins", "family", "scaling") else []
    cli.main([suite, "--out", str(out), *brief, *options])
    record = json.loads(out.read_text())
    assert record["suite"] == suite
    assert record["machine"]["torch"] == torch.__version__
    assert {"processor", "threads", "time", "packages"} <= set(record["machine"])
    return record


def test_cpu_writes_times_and_speed_ups(tmp_path, capsys):
    options = ["--n", "16", "32", "--d", "8", "--only", "blocked", "eager", "--threads", "1", "2"]
    threads = torch.get_num_threads()
    record = run("cpu", tmp_path / "cpu.json", *options)
    assert [(result["n"], result["d"]) for result in record["results"]] == [(16, 8), (32, 8)]
    result = record["results"][0]
    row = result["losses"]["eager"]
    assert row["both"]["p20"] <= row["both"]["p50"] <= row["both"]["p80"]
    assert row["times_floor"] == pytest.approx(row["both"]["p50"] / result["floor_ms"])
    assert row["over_ours"] == pytest.approx(row["both"]["p50"] / result["losses"]["blocked"]["both"]["p50"])
    assert result["threads"]["1"]["speed_up"] == 1
    assert result["threads"]["2"]["speed_up"] > 0
    assert torch.get_num_threads() == threads
    assert tables.time_table(record) in capsys.readouterr().out


def test_a_missing_library_is_left_out_and_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "info_nce", None)
    record = run("cpu", tmp_path / "cpu.json", "--n", "16", "--d", "8", "--only", "blocked", "info-nce-pytorch")
    assert list(record["results"][0]["losses"]) == ["blocked"]
    assert "info_nce" in record["missing"]["info-nce-pytorch"]
    assert "Not run: info-nce-pytorch." in tables.time_table(record)


@pytest.mark.slow
@needs_linux
def test_memory_writes_a_row_for_every_loss(tmp_path):
    record = run("memory", tmp_path / "memory.json", "--n", "64", "--d", "8", "--only", "blocked", "eager")
    assert [row["loss"] for row in record["results"]] == ["blocked", "eager"]


@pytest.mark.slow
@needs_linux
def test_scaling_compares_with_the_first_size(tmp_path):
    record = run("scaling", tmp_path / "scaling.json", "--n", "64", "128", "--d", "8", "--only", "blocked")
    first, second = record["results"]
    assert first["growth"] == first["growth_normalised"] == 1
    assert second["growth"] == pytest.approx(second["s"] / first["s"] / 4)
    assert len(second["gemm_gflops"]) == 2


@pytest.mark.skipif(machine.processors() < 2, reason="needs two processors")
@pytest.mark.parametrize("name", ["blocked", pytest.param("cpu", marks=needs_cpu_kernels)])
def test_scaling_over_threads_reports_kernel_product_and_predicted_speed_ups(name, tmp_path, capsys):
    options = ["--threads", "1", "2", "--n", "300", "--d", "16", "--only", name]
    record = run("scaling", tmp_path / "scaling.json", *options)
    one, two = record["results"][0]["threads"].values()
    assert (one["speed_up"], one["efficiency"], one["gemm_efficiency"]) == (1, 1, 1)
    assert two["efficiency"] == pytest.approx(two["speed_up"] / 2)
    assert two["gemm_efficiency"] == pytest.approx(two["gemm_speed_up"] / 2)
    if name == "cpu":
        assert (one["predicted_speed_up"], two["predicted_speed_up"] > 1) == (1, True)
    else:
        assert two["predicted_speed_up"] is None
    assert tables.scaling_table(record) in capsys.readouterr().out


def test_scaling_rejects_more_threads_than_processors(capsys):
    count = machine.processors()
    with pytest.raises(SystemExit):
        cli.main(["scaling", "--threads", "1", str(count + 1)])
    assert f"--threads {count + 1}: this process may use {count} processors" in capsys.readouterr().err


def test_similarity_product_is_computed_a_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(machine, "LARGEST_PRODUCT", 5 * 14 * 4)  # 5 of the 14 rows at a time
    shapes = []
    multiply = torch.mm

    def seen(a, b, out):
        shapes.append((a.shape[0], b.shape[1], out.shape[0]))
        return multiply(a, b, out=out)

    monkeypatch.setattr(torch, "mm", seen)
    assert machine.similarities_call(7, 3)() > 0
    assert shapes == [(5, 14, 5), (5, 14, 5), (4, 14, 4)]


BASELINES = ("dense CLIP", "nt_xent", "dense NT-Xent, bfloat16")  # of suite family


@pytest.mark.slow
@needs_linux
def test_family_times_every_loss_against_the_first(tmp_path, capsys):
    record = run("family", tmp_path / "family.json", "--n", "64", "--d", "8")
    assert [row["loss"] for row in record["results"]] == list(family.LOSSES)
    assert [row["over_first"] for row in record["results"] if row["loss"] in BASELINES] == [1, 1, 1]
    assert tables.family_table(record) in capsys.readouterr().out


def test_drop_ins_are_timed_against_equal_plain_formulas(tmp_path, capsys):
    threads = torch.get_num_threads()
    record = run("drop-ins", tmp_path / "drop-ins.json", "--n", "16", "--d", "8")
    assert [row["threads"] for row in record["results"][:: len(drop_ins.pairs(8))]] == sorted({1, threads})
    for row in record["results"]:
        assert row["plain_over_ours"] == pytest.approx(row["plain"]["p50"] / row["ours"]["p50"])
    assert torch.get_num_threads() == threads
    assert tables.drop_ins_table(record) in capsys.readouterr().out


def test_drop_ins_check_rejects_a_different_loss():
    pair = drop_ins.Pair(lambda a, b: (a * b).sum(), lambda a, b: 1.001 * (a * b).sum())
    with pytest.raises(AssertionError):
        drop_ins.check(pair, drop_ins.inputs(pair, 16, 8))


@pytest.mark.slow
@needs_linux
def test_losses_stay_within_their_memory_limits():
    # Besides its inputs (2 x 16 MiB of features), clip stores their gradients and the kernel's copies, but never the
    # 256 MiB of logits. The batch of sup_con has 200,000 positive pairs in ten classes; their terms are computed in
    # tiles.
    assert family.peak("two towers", "clip", 8192, 512) < 128 * 2**20
    assert family.peak("labels", "sup_con pairs", 1024, 128) < 50 * 2**20


@pytest.mark.slow
def test_converged_shows_the_error_of_the_dense_loss(tmp_path):
    record = run("converged", tmp_path / "converged.json", "--n", "64", "--d", "32")
    assert len(record["results"]) == 8
    last = next(row for row in record["results"] if row["stage"] == "1e-6" and row["temperature"] == 0.1)
    assert last["errors"]["blocked"] < 1e-5 < 1e-3 < last["errors"]["eager"]
    assert "lightly" not in last["errors"]  # it would normalise the rows


def test_distributed_sends_the_predicted_bytes_and_times_both_strategies(tmp_path, capsys):
    options = ["--n", "24", "--d", "8", "--ranks", "1", "2", "3", "--rounds", "2"]
    record = run("distributed", tmp_path / "distributed.json", *options)
    assert [(row["ranks"], row["strategy"]) for row in record["results"]] == [
        (ranks, strategy) for ranks in (1, 2, 3) for strategy in distributed.STRATEGIES
    ]
    for row in record["results"]:
        assert row["sent_bytes"] == row["formula_bytes"]
        assert (row["sent_bytes"] > 0) == (row["ranks"] > 1)
        assert row["products_ms"] > 0 < row["waiting_ms"]
        assert row["model_ms"] <= row["model_products_ms"] + row["model_transfers_ms"]
        assert row["over_ours"].keys() == {"gathered", "dense"}
    assert tables.distributed_table(record) in capsys.readouterr().out


def test_distributed_rejects_a_wrong_gradient():
    true = torch.randn(8, 4, dtype=torch.float64)
    distributed._check_rank("ring", true.float(), true)
    with pytest.raises(AssertionError, match="ring disagrees with one process"):
        distributed._check_rank("ring", 1.001 * true.float(), true)


def test_command_line_rejects_an_invalid_number(capsys):
    with pytest.raises(SystemExit):
        cli.main(["model", "--n", "0"])
    assert "argument --n: must be 1 or more, got 0" in capsys.readouterr().err


def test_gpu_suite_run_as_a_module_says_that_it_needs_a_cuda_device():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device")
    command = [sys.executable, "-m", "benchmarks", "gpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "needs a CUDA device" in done.stderr


MACHINE = {"processor": "A CPU", "threads": 2, "vector": "AVX2", "torch": "2.0", "packages": {}, "time": "2026-01-02T"}
SIZE = {"n": 256, "d": 128}


def timed(ms, over_ours):
    return {"both": {"p50": ms}, "times_floor": ms / 2, "over_ours": over_ours}


RESULTS = {
    "cpu": [
        {
            **SIZE,
            "n": n,
            "dtype": "float32",
            "ours": "blocked",
            "floor_ms": 2.0,
            "losses": {
                "blocked": timed(3.14159, 1.0),
                "eager": timed(31.4159, 10.0),
                "info-nce-pytorch": timed(1, 0.3),
            },
        }
        for n in (256, 1024)
    ],
    "memory": [
        {**SIZE, "loss": name, "extra_bytes": size} for name, size in (("blocked", 2**19), ("eager", 3 * 2**21))
    ],
    "scaling": [{**SIZE, "s": 1.5, "growth": 1, "growth_normalised": 1, "times_floor": 1.25, "extra_bytes": 2**25}],
    "schedule": [
        {
            "problem": "two views, N = 256",
            "d": 128,
            "threads": threads,
            "ms": 0.5,
            "edge": 48,
            "tasks": 1066,
            "computing": 0.75,
            "waiting": 0.1,
            "serial": 0.15,
            "balance": 0.9,
            "speed_up": speed_up,
        }
        for threads, speed_up in ((1, 1.0), (2, 1.5))
    ],
    "family": [{**SIZE, "loss": "clip", "over_first": 0.5, "extra_bytes": 2**23, **timed(2, 0.5)}],
    "drop-ins": [
        {
            **SIZE,
            "loss": "open_clip, ClipLoss",
            "threads": 1,
            "plain": {"p50": 3.0},
            "ours": {"p50": 2.0},
            "plain_over_ours": 1.5,
        }
    ],
    "converged": [{**SIZE, "temperature": 0.1, "stage": "start", "errors": {"blocked": 8.8e-8, "eager": 2.1e-7}}],
    "distributed": [
        {
            **SIZE,
            "ranks": 2,
            "cores": 4,
            "strategy": "ring",
            "sent_bytes": 1000,
            "formula_bytes": 1000,
            "both": {"p50": 8.0},
            "model_ms": 5.0,
            "products_ms": 4.0,
            "model_products_ms": 3.0,
            "waiting_ms": 2.0,
            "model_transfers_ms": 1.5,
            "over_ours": {"gathered": 2.5, "dense": 3.5},
        }
    ],
}


@pytest.fixture
def committed(tmp_path):
    """Write synthetic records, and pages with the markers of their sections; return the folder and the benchmarks
    page."""
    for suite, results in RESULTS.items():
        record = {"suite": suite, "machine": MACHINE, "missing": {}, "results": results}
        (tmp_path / f"{suite}.json").write_text(json.dumps(record))
    (tmp_path / "docs").mkdir()
    for page, sections in report.PAGES.items():
        markers = "".join(f"<!-- figures:{section} -->\n<!-- /figures:{section} -->\n" for section in sections)
        (tmp_path / page).write_text(f"before\n{markers}")
    return tmp_path, tmp_path / "docs" / "benchmarks.md"


def test_report_fills_the_pages_and_draws_the_overview(committed):
    results, page = committed
    command = ["report", "--results", str(results), "--root", str(results)]
    sections = "time, memory, scaling, family, accuracy, times, schedule, devices, distributed, drop-ins"
    with pytest.raises(SystemExit, match=sections):
        cli.main([*command, "--check"])
    cli.main(command)
    text = page.read_text()
    assert text.startswith("before\n<!-- figures:time -->\n\n| instruction set | processor | N | D | ours, ms |")
    assert "| AVX2 | A CPU | 256 | 128 | 3.14 | 1.6 | 10 |" in text
    assert "### AVX2\n\n| N | D | `blocked` | eager | info-nce-pytorch\\* |" in text
    assert "| 256 | 128 | 3.14 | 31.4 | 1 | 1.6 | 10 |" in text
    assert "a different loss, for scale" in text
    assert "| two views, N = 256 | 128 | 1 | 1.5 |" in text
    assert "| two views, N = 256 | 128 | 2 | 0.5 | 48 | 1,066 | 75 % | 10 % | 15 % | 0.9 |" in text
    assert "| 256 | 128 | < 1 | 6 |" in text
    assert "| 256 | 128 | 1.5 | 1 | 1 | 1.25 | 32 |" in text
    assert "| clip | 256 | 128 | 2 | 0.5 | 8 |" in text
    assert "| 256 | 128 | 0.1 | eager | 2e-7 |" in text
    assert "A CPU, threads: 2, AVX2, PyTorch 2.0; 2026-01-02." in text
    over_ranks = (results / "docs/distributed.md").read_text()
    assert "| 2 | 512 | 128 | ring | 1,000 | 1 | 8 | 1.6 | 4 | 3 | 2 | 1.5 | 2.5 | 3.5 |" in over_ranks
    assert "| open_clip, ClipLoss | 256 | 128 | 1 | 3 | 2 | 1.5 |" in (results / "docs/migration.md").read_text()
    drawn = (results / "overview.svg").read_bytes()
    cli.main([*command, "--check"])
    cli.main(command)
    assert page.read_text() == text
    assert drawn == (results / "overview.svg").read_bytes()


def test_report_check_finds_a_changed_page(committed):
    results, page = committed
    cli.main(["report", "--results", str(results), "--root", str(results)])
    page.write_text(page.read_text().replace("3.14", "1.34"))
    assert report.stale_sections(results, results) == ["time", "times"]


def test_report_has_rows_for_every_instruction_set(committed):
    results, page = committed
    first = json.loads((results / "cpu.json").read_text())
    (results / "cpu.json").unlink()
    of_set = {"vector": "AVX512", "held": None, "processor": "Another CPU"}
    wide = {**first, "machine": {**MACHINE, **of_set, "instruction_set": "avx512"}}
    held = {**first, "machine": {**MACHINE, "held": "avx2", "instruction_set": "avx2"}, "results": first["results"][:1]}
    (results / "cpu-avx2.json").write_text(json.dumps(held))
    (results / "cpu-avx512.json").write_text(json.dumps(wide))
    cli.main(["report", "--results", str(results), "--root", str(results)])
    text = page.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| AVX")]
    assert [row.split(" | ")[:3] for row in rows] == [
        ["| AVX-512", "Another CPU", "256"],
        ["| AVX-512", "Another CPU", "1024"],
        ["| AVX2", "A CPU", "256"],
    ]
    assert "our kernel: avx512" in text
    assert "our kernel restricted to avx2" in text
    assert text.index("### AVX-512") < text.index("### AVX2")


def test_report_says_how_to_measure_missing_times(committed):
    results, _ = committed
    (results / "cpu.json").unlink()
    with pytest.raises(FileNotFoundError, match="python -m benchmarks cpu --out"):
        report.read_sets(results)
    assert report.table_of(results, "cpu").startswith("Not measured: `python -m benchmarks cpu --out")


def test_report_says_which_marker_or_file_is_missing(committed):
    results, page = committed
    page.write_text(page.read_text().replace("<!-- /figures:memory -->", ""))
    with pytest.raises(SystemExit, match="a page must contain <!-- figures:memory -->"):
        cli.main(["report", "--results", str(results), "--root", str(results), "--check"])
    (results / "scaling.json").unlink()
    assert report.table_of(results, "scaling").startswith("Not measured: `python -m benchmarks scaling --out")
    with pytest.raises(FileNotFoundError, match="python -m benchmarks scaling --out"):
        report.read_suite(results, "scaling")


@pytest.mark.skipif(not (ROOT / "benchmarks" / "results").exists(), reason="needs committed results: make bench")
def test_pages_have_the_tables_of_the_committed_results():
    assert report.stale_sections(ROOT / "benchmarks" / "results", ROOT) == []


@pytest.fixture
def released(monkeypatch):
    """Restore the kernels' instruction set after a test that changes it."""
    before = _cpu.instruction_set()
    monkeypatch.setattr(instruction_set, "held", instruction_set.held)
    yield
    _cpu.use_instruction_set(before)


@needs_cpu_kernels
def test_figures_say_which_instruction_set_the_kernel_was_restricted_to(released, tmp_path, capsys):
    options = ["--n", "16", "--d", "8", "--only", "cpu", "--instruction-set", BASELINE]
    record = run("cpu", tmp_path / "cpu.json", *options)
    assert _cpu.instruction_set() == BASELINE
    assert record["machine"]["held"] == record["machine"]["instruction_set"] == BASELINE
    assert f"our kernel restricted to {BASELINE}" in capsys.readouterr().out


@needs_cpu_kernels
def test_the_instruction_set_in_use_is_printed():
    command = [sys.executable, "-m", "benchmarks.instruction_set"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() in instruction_set.NAMES


def in_use():
    return _cpu.instruction_set()


@needs_cpu_kernels
def test_child_processes_inherit_the_instruction_set(released, tmp_path):
    instruction_set.hold(BASELINE)
    assert on_ranks(1, in_use) == [BASELINE]
    code = "import sys; from fastntxent import _cpu; print(_cpu.instruction_set(), *sys.argv[1:])"
    (tmp_path / "shows.py").write_text(code)
    command = [sys.executable, *instruction_set.module("shows"), "a", "b"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == [BASELINE, "a", "b"]
