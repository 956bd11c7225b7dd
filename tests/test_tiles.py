"""The tile table of the Triton kernels, the model that predicts their times, and the tuner that writes the table."""

import argparse
import functools
import importlib
import itertools
import json
import math

import pytest
import torch

from benchmarks import chips, gpu, kernels, limits, model, sass, tune
from fastntxent import backends
from tests.tiers import tiered

STATUS = backends()["triton"]
if not STATUS.available:
    pytest.skip(f"needs Triton: {STATUS.reason}", allow_module_level=True)

# Padding rows hold uninitialised memory. NumPy, which runs the interpreted kernels, may warn about it, but no result
# uses it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

config = importlib.import_module("fastntxent.backends.triton.config")
pack = importlib.import_module("fastntxent.backends.triton.pack")
forward = importlib.import_module("fastntxent.backends.triton.forward")

FAMILIES = ["large", "small", *(name for name in config.TABLE if name not in ("large", "small", "interpreter"))]


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("family", [*FAMILIES, "interpreter"])
def test_every_batch_has_tiles_for_forward_and_backward(family, width):
    for n in (1, 1024, 1025, 2048, 2049, 10**7):
        for d in (1, 64, 65, 128, 256, 257, 4096, 10_000):
            DP = pack.padded_features(d)
            tiles = {kernel: config.look_up(family, kernel, width, n, DP) for kernel in config.KERNELS}
            assert tiles["owned"], (n, d)
            assert tiles["fused"] or (tiles["form"] and tiles["gather"]), (n, d)
            for kernel, tile in tiles.items():
                if tile is not None:
                    assert tile.block_m % pack.SPAN == 0, kernel
                    assert tile.block_n % pack.SPAN == 0, kernel
                    assert pack.PADDED_ROWS % tile.block_m == 0, kernel
                    assert pack.PADDED_ROWS % tile.block_n == 0, kernel
                    assert DP % tile.block_d == 0, kernel


def test_look_up_returns_the_first_entry_that_fits():
    rows = config.entries("small", "fused", 2)
    assert config.look_up("small", "fused", 2, 10, 64) == rows[0][2]
    assert config.look_up("small", "fused", 2, 10, 512) is None
    assert config.look_up("gfx942", "direct", 2, 5000, 64) == config.look_up("small", "direct", 2, 5000, 64)


@pytest.mark.parametrize(("n", "blocks", "columns"), [(64, 1, 32), (64, 100, 64), (4096, 2, 128), (4097, 2, 160)])
def test_columns_of_a_part_fill_the_multiprocessors(n, blocks, columns):
    assert config.columns_of_part(32, blocks, n, 32) == columns


def test_panels_leave_few_multiprocessors_idle():
    gather = config.TileConfig(128, 64, 256, 8, 3)
    # Two squares of 22 row blocks times 3 feature blocks make 132 programs, one for each multiprocessor.
    assert config.edge_of_panel(132, 65536, 768, 2, gather) == 2816
    assert config.PANEL >= 2 * 2 * 2816**2
    assert config.edge_of_panel(132, 300, 768, 2, gather) == 512
    assert config.edge_of_panel(132, 200, 768, 2, gather) == 256


@pytest.mark.parametrize("one_side", [True, False])
@pytest.mark.parametrize(("n_rows", "n_cols"), [(1, 1), (8, 8), (9, 9), (16, 16), (41, 41)])
def test_panels_cover_every_square_once_and_write_before_they_add(n_rows, n_cols, one_side):
    panels = importlib.import_module("fastntxent.backends.triton.panels")
    n_cols = n_cols if one_side else 2 * n_cols
    seen: list[tuple[int, int]] = []
    for squares in panels.schedule(n_rows, n_cols, 8, one_side):
        both = [(squares.row_0, squares.col_0), (squares.row_1, squares.col_1)]
        if squares.mirrored:
            assert both[0] == both[1][::-1]
        both = [square for square in both if square[0] < n_rows]
        for row, _ in both:
            assert squares.add == any(row == before for before, _ in seen)
        seen += both
    assert sorted(seen) == [(row, col) for row in range(0, n_rows, 8) for col in range(0, n_cols, 8)]


def test_a_chip_holds_as_many_programs_as_registers_shared_memory_and_threads_allow():
    h100 = chips.CHIPS["sm_90"]
    assert h100.resident(128, 80_000, 8) == 2
    assert h100.resident(129, 80_000, 8) == 1
    assert h100.resident(64, 120_000, 8) == 1
    assert h100.resident(16, 0, 8) == 8
    assert chips.CHIPS["gfx942"].resident(128, 0, 8) is None


def test_the_model_counts_what_the_schedule_does():
    tile = config.TileConfig(128, 128, 64, 8, 3)
    tiles = dict.fromkeys(config.KERNELS, tile)
    M, DP, chip = 65_536, 128, chips.CHIPS["sm_90"]
    u = 2 * M * M * DP
    work = {kernel: model.work_of(kernel, tiles, M, DP, "bf16", chip) for kernel in config.KERNELS}
    assert {kernel: w.flops / u for kernel, w in work.items() if kernel in ("direct", "owned", "fused")} == {
        "direct": 0.5, "owned": 1, "fused": 2
    }  # fmt: skip
    edge = config.edge_of_panel(chip.multiprocessors, M, DP, 2, tile)
    panels = importlib.import_module("fastntxent.backends.triton.panels")
    schedule = list(panels.schedule(M, M, edge, True))
    formed = sum(1 if squares.mirrored else 2 for squares in schedule)
    assert work["gather"].flops == 2 * DP * (2 * len(schedule) * edge**2)
    assert work["form"].flops == work["form"].exps * 2 * DP == 2 * DP * formed * edge**2
    assert work["direct"].exps == M * M / 2
    assert work["gather"].exps == 0
    assert model.work_of("fused", tiles, M, DP, "fp32", chip).flops == 6 * u
    assert work["form"].launches == work["gather"].launches == len(schedule)


@pytest.mark.parametrize("kernel", config.KERNELS)
def test_trips_of_a_kernels_loops_account_for_all_of_its_flops(kernel):
    tile = config.TileConfig(128, 64, 64, 8, 3)
    M, DP, chip = 65_536, 256, chips.CHIPS["sm_90"]
    work = model.work_of(kernel, dict.fromkeys(config.KERNELS, tile), M, DP, "bf16", chip)
    of_iteration = kernels.flops_of_iteration(kernel, tile, DP, "bf16")
    assert math.prod(work.trips) * work.programs * of_iteration == pytest.approx(work.flops, rel=0.02)


def test_trips_are_fitted_to_the_loops_that_the_compiler_left():
    flops, programs = 2 * 64 * 64 * 16, 264

    def work(trips):
        return model.Work(math.prod(trips) * flops * programs, 0, 0, 0, 0, programs, trips)

    assert model.trips_of(work((10.0,)), report_of(loop(PRODUCT))) == (10.0,)
    assert model.trips_of(work((10.0, 1.0)), report_of(loop(PRODUCT))) == (10.0,)
    inner = ".L_x_0:", PRODUCT, "@P0 BRA `(.L_x_0)"
    nested = report_of(listing(".L_x_1:", "FADD R1, R1, R2", *inner, "@P1 BRA `(.L_x_1)", "EXIT"))
    assert model.trips_of(work((10.0,)), nested) == (1.0, 10.0)
    with pytest.raises(AssertionError, match="flops per program, not"):
        model.trips_of(work((10.0, 2.0)), report_of(loop(PRODUCT)))


@pytest.mark.parametrize(("chunks", "trips"), [(2, 0), (8, 1.25), (11, 2)])
def test_trips_of_a_loop_that_ptxas_unrolled_four_times(chunks, trips):
    # As on sm_90 for `owned` with two stages and a tile of 32 rows: each iteration of the innermost loop processes four
    # chunks of the features, and the code after it up to three.
    product = "HMMA.16816.F32.BF16 R24, R4, R8, R24"
    inner = ".L_x_0:", *[product] * 16, "@P0 BRA `(.L_x_0)"
    code = listing(".L_x_1:", "FADD R1, R1, R2", *inner, *[product] * 12, "@P1 BRA `(.L_x_1)", "EXIT")
    report = report_of(code, (32, 32, 32, 4, 2), kernel="owned")
    work = model.Work(2 * 32 * 32 * 32 * 10 * chunks * 264, 0, 0, 0, 0, 264, (10.0, float(chunks)))
    assert model.trips_of(work, report) == (10.0, trips)
    staged = report._replace(tile=(32, 32, 32, 4, 3))  # its chunks are loaded ahead, so it waits for none of them
    waiting, not_waiting = (model.needs(work, each, "bf16")["latency"] for each in (report, staged))
    cycles = (waiting - not_waiting) * chips.CHIPS["sm_90"].rates.cycles / 132
    assert cycles == pytest.approx(10 * max(chunks, 3) * limits.LOAD)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU, where kernels are interpreted")
def test_kernels_that_are_interpreted_are_not_compiled():
    with pytest.raises(TypeError, match="unset TRITON_INTERPRET"):
        tune.compile_tile("sm_90", "owned", "bf16", 64, (64, 64, 64, 4, 2))


def test_quick_cases_cover_every_pair_of_options():
    cases = [
        {"dtype": dtype, "d": d, "variant": variant}
        for (dtype, d), variants in kernels.QUICK.items()
        for variant in variants
        if dtype != "tf32"
    ]
    options = {"dtype": ("bf16", "fp32"), "d": kernels.GENERAL, "variant": kernels.VARIANTS}
    for first, second in itertools.combinations(options, 2):
        met = {(case[first], case[second]) for case in cases}
        assert met == {*itertools.product(options[first], options[second])}


WORK = model.Work(2 * 132 * 10 * 2 * 64 * 64 * 16, 1e9, 0, 1e6, 1e6, 2 * 132, (10.0,))


def test_predicted_time_is_the_longest_limit_and_names_it():
    rates = chips.CHIPS["sm_90"].rates
    report = report_of(loop(PRODUCT, "FADD R1, R1, R2", "MUFU.EX2 R4, R4", "MUFU.EX2 R4, R4"))  # plus a branch: 5 slots
    trips, warps = 10 * 2 * 132, 4
    found = model.needs(WORK, report, "bf16")
    assert found["products"] == pytest.approx(WORK.flops / (limits.GEMM * rates.product))
    assert found["slots"] == pytest.approx((5 * trips + 2 * 132) * warps / 4 / rates.cycles)
    assert found["exps"] == pytest.approx(2 * trips * warps * 32 / rates.exp)
    assert found["floats"] == pytest.approx(trips * warps * 32 / 128 / rates.cycles)
    assert found["shared"] == pytest.approx(trips * warps * (64 + 64) * 32 / 4 / rates.shared)
    assert model.time_of({"slots": 9e-6, "products": 5e-6}, 1) == (9e-6 + limits.LAUNCH, "slots")
    assert model.time_of({"slots": 1e-6, "products": 0.5e-6}, 1) == (1e-6 + limits.LAUNCH, "launches")
    assert model.needs(WORK, report, "bf16", gemm=rates.product / 4)["products"] == pytest.approx(
        4 * WORK.flops / rates.product
    )


def test_a_program_alone_on_its_multiprocessor_runs_its_iterations_one_after_the_other():
    report = report_of(loop(PRODUCT, DRAIN, "BAR.SYNC.DEFER_BLOCKING 0x0", "FADD R1, R1, R2"))
    # Ten iterations, each with its products, instructions and waits, plus one instruction after the loop and the first
    # loads.
    cycles = 10 * (32 + 5 + 2 * limits.SYNC) + 1 + limits.FIRST

    def latency(work, **changes):
        seconds = model.needs(work, report._replace(**changes), "bf16")["latency"]
        return seconds * chips.CHIPS["sm_90"].rates.cycles / 132

    assert latency(WORK) == pytest.approx(cycles, rel=1e-3)
    assert latency(WORK, resident=1) == pytest.approx(2 * cycles, rel=1e-3)
    assert latency(WORK, tile=(64, 64, 128, 4, 2)) == pytest.approx(cycles + 10 * limits.LOAD, rel=1e-3)
    assert latency(WORK._replace(programs=2 * 132 + 1)) == pytest.approx(2 * cycles, rel=1e-3)


def test_least_time_before_compilation_equals_the_limits_that_no_compiler_changes():
    chip, tile = chips.CHIPS["sm_90"], (64, 64, 128, 4, 3)
    bound = model.least(WORK, chip, "bf16", tile)
    found = model.needs(WORK, report_of(loop(PRODUCT), tile), "bf16")
    assert all(seconds == found[name] for name, seconds in bound.items() if name != "exps")
    assert bound["exps"] == WORK.exps / chip.rates.exp
    even, odd = (model.least(WORK._replace(programs=132 + extra), chip, "bf16", tile)["products"] for extra in (0, 1))
    assert odd / even == pytest.approx(2 * 132 / 133)


def report_of(code="", tile=(64, 64, 128, 4, 3), **changes):
    """Return a kernel's report with this machine code."""
    usual = "fused", "sm_90", "bf16", 128, "usual", False, tile
    report = kernels.CompiledKernel(*usual, 50_000, 128, 0, 0, 1, 2, 2, 1, 0)
    return report._replace(disassemble=functools.cache(lambda: sass.parse(code)), **changes)


PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0"
BY_ONE_THREAD = "UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR24], tmem[UR32], idesc[UR33], UPT"
DRAIN = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def loop(*instructions):
    """Return the machine code of a loop."""
    return listing(".L_x_0:", *instructions, "@P0 BRA `(.L_x_0)", "EXIT")


def listing(*lines):
    """Return lines of machine code, labels and instructions, as nvdisasm prints them."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * i:04x}*/  {line} ;" for i, line in enumerate(lines)
    )


def test_loop_beyond_its_limits_of_slots_or_shuffles_is_a_fault(monkeypatch):
    tile = config.look_up("sm_90", "fused", 2, math.inf, 128)
    report = report_of(loop(PRODUCT, PRODUCT, DRAIN, "SHFL.BFLY PT, R5, R4, 0x1, 0x1f", *["FADD R1, R1, R2"] * 3), tile)
    factor = 2**20 / (2 * 64 * 64 * 16 * 2 * tile.num_warps / 4)
    assert report.slots == 8 * tile.num_warps / 4
    assert report.tensor_cycles == pytest.approx(64 * tile.num_warps / 4, rel=0.01)
    monkeypatch.setattr(kernels, "LIMITS", {})
    assert report.faults() == []
    for limit, fault in [
        (kernels.Limit(math.ceil(report.slots * factor), 1, 0), None),
        (kernels.Limit(math.ceil(report.slots * factor) - 1, 1, 0), "slots in the loop"),
        (kernels.Limit(10**6, 0, 0), "1 shuffles in the loop, but the limit is 0"),
    ]:
        monkeypatch.setitem(kernels.LIMITS, ("sm_90", "fused", 128), limit)
        faults = report.faults()
        assert len(faults) == (fault is not None), faults
        assert fault is None or fault in faults[0]
        assert report._replace(shifted=True).faults() == report._replace(tile=(32, 32, 128, 4, 2)).faults() == []


def test_large_batches_of_half_precision_have_limits():
    assert kernels.LIMITS["sm_100", "direct", 128].slots <= 286  # 10 % above the slots of this tile
    for target in ("sm_80", "sm_90", "sm_100"):
        for d in (128, 768):
            tiles = {kernel: config.look_up(target, kernel, 2, math.inf, d) for kernel in config.KERNELS}
            backward = ["fused"] if tiles["fused"] else ["form", "gather"]
            assert all((target, kernel, d) in kernels.LIMITS for kernel in ("direct", *backward))


def test_products_one_after_the_other_are_a_fault():
    assert report_of(loop(PRODUCT, PRODUCT, DRAIN)).faults() == []
    assert report_of(loop(PRODUCT, DRAIN, PRODUCT, DRAIN)).faults() == ["every product waits for the previous one"]


def test_warps_that_repeat_the_products_of_others_are_a_fault():
    def product(name, warps):
        return (
            f"{name} = #ttg.nvidia_mma<{{versionMajor = 3, warpsPerCTA = [{warps}], instrShape = [16, 32, 16]}}>\n"
            f"%s = ttng.warp_group_dot %a, %b, %c : !ttg.memdesc<64x64xf16> -> tensor<64x64xf32, {name}>"
        )

    assert kernels._repeated(product("#mma", "8, 1") + product("#mma1", "4, 2")) == 1
    assert report_of(loop(PRODUCT), repeated=1).faults() == ["1 products in which some warps repeat the work of others"]


def test_iteration_with_tcgen05_has_the_flops_of_its_tile():
    code = loop(BY_ONE_THREAD)
    flops = {kernel: report_of(code, kernel=kernel, target="sm_100").flops for kernel in ("direct", "fused")}
    assert flops == {"direct": 2 * 64 * 64 * 128, "fused": 4 * 64 * 64 * 128}
    gathered = report_of(code, (128, 32, 64, 4, 3), kernel="gather", target="sm_100", dtype="fp32")
    assert gathered.flops == 6 * 128 * 32 * 64


def test_prediction_for_a_measurement_names_its_size_and_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    report = report_of(loop(BY_ONE_THREAD))  # the size of this product is not in the machine code
    monkeypatch.setattr(kernels, "compile_one", lambda *_: report)
    result = {"n": 32_768, "d": 128, "dtype": "bfloat16", "gemm_gflops": 650_000.0}
    predicted = gpu._predicted(result)
    assert predicted["u"] == pytest.approx(1.69, rel=1e-2)
    assert predicted["both"] == pytest.approx(sum(predicted[name] for name in ("direct", "fused", "around")))
    assert 2.5 * predicted["u"] < predicted["both"] < 5 * predicted["u"]
    (line,) = gpu._model_line(result | {"model": predicted})
    assert "N 32768, D 128, bfloat16, the model's triton" in line
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    assert gpu._predicted(result) is None


@pytest.mark.parametrize("kernel", config.KERNELS)
def test_candidates_are_tiles_that_the_kernels_accept(kernel):
    found = list(tune.candidates(kernel, 2, 128))
    assert len(found) == len(set(found)) > 10
    for block_m, block_n, block_d, *_ in found:
        assert pack.PADDED_ROWS % block_m == pack.PADDED_ROWS % block_n == 128 % block_d == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter: a GPU cannot take every tile")
@pytest.mark.parametrize(
    "kernel", tiered(["direct", "owned", "fused", "gather"], slow=lambda kernel: kernel != "owned")
)
def test_tiles_are_timed_in_turns_and_checked(kernel):
    tiles = [(32, 32, 16, 4, 2), (64, 32, 16, 4, 2)]
    found = tune.times(kernel, torch.float32, 16, 80, tiles, seconds=0)
    assert list(found) == tiles
    assert all(s > 0 for s in found.values())


def test_tuner_rejects_a_tile_with_a_different_result(monkeypatch):
    losses, present = forward.losses, config.look_up("interpreter", "owned", 4, 80, 16)

    def wrong_for_others(sides):
        weights, totals = losses(sides)
        return weights, totals + (config.look_up("interpreter", "owned", 4, 80, 16) != present)

    monkeypatch.setattr(forward, "losses", wrong_for_others)
    with pytest.raises(AssertionError):
        tune.times("owned", torch.float32, 16, 80, [(64, 32, 16, 4, 2)], seconds=0)


def test_the_largest_of_equally_fast_tiles_is_taken():
    small, deep, slow = (64, 64, 64, 4, 2), (128, 64, 64, 4, 3), (128, 128, 64, 4, 3)
    assert tune.take([(1.0, small), (1.01, deep), (1.5, slow)]) == deep
    assert tune.take([]) is None


def test_committed_table_has_the_format_that_the_tuner_writes():
    assert tune.dumps(config.TABLE) == (tune.TABLE_PATH).read_text()


def test_new_entries_replace_old_ones_unless_a_rival_kernel_is_faster():
    table = json.loads(tune.dumps(config.TABLE))
    tall, wide = (128, 64, 64, 4, 2), (64, 128, 64, 4, 2)
    best = {
        ("owned", "bf16", 1024, None): (1.0, wide),
        ("owned", "bf16", None, None): (9.0, wide),
        ("direct", "bf16", None, None): (2.0, tall),
        ("direct", "bf16", None, 64): (1.0, wide),
        ("direct", "bf16", 1024, None): (2.0, tall),
        ("direct", "fp32", None, None): (math.inf, None),
    }
    tune.merge(table, "sm_90", "direct", best, "somewhere")
    assert table["sm_90"]["measured"]["direct"] == "somewhere"
    assert table["sm_90"]["direct"]["2"] == [[1024, None, None], [None, 64, wide], [None, None, tall]]
    assert table["sm_90"]["direct"]["4"] == [[None, None, None]]
    assert table["sm_90"]["fused"] == config.TABLE["sm_90"]["fused"]
    tune.merge(table, "sm_90", "direct", best, None)
    assert table["sm_90"]["measured"] == {}, "predicted tiles are not measured"


def test_tuning_writes_its_results_even_if_no_tile_fits(monkeypatch, tmp_path):
    tile = (64, 64, 64, 4, 2)

    def ranked(target, kernel, dtype, DP, M, tiles, most, each, at_once):
        assert next(iter(tiles))
        return [(1e-3 if kernel == "gather" else 2e-3, tile)] if dtype == "bf16" else []

    path = tmp_path / "table.json"
    path.write_text(tune.TABLE_PATH.read_text())
    monkeypatch.setattr(tune, "rank", ranked)
    monkeypatch.setattr(tune, "TABLE_PATH", path)
    arguments = argparse.Namespace(
        predict="sm_80", kernels=["gather", "fused"], most=1, seconds=0, write=True, d=None, tiles=None, workers=1
    )
    results, _ = tune.run(arguments)
    assert len(results) == 2 * 2 * 2 * 4
    table = json.loads(path.read_text())
    assert table["sm_80"]["gather"]["2"][0] == [2048, 64, list(tile)]
    assert all(entry[2] is None for width in ("2", "4") for entry in table["sm_80"]["fused"][width])
    assert path.read_text() == tune.dumps(table)
    arguments.d = [64]
    with pytest.raises(SystemExit, match="leave out --d and --tiles"):
        tune.run(arguments)
    arguments.write, arguments.tiles = False, [(64, 64, 64, 4, 3), (1, 2, 3)]
    with pytest.raises(SystemExit, match=r"no kernel has the candidate 1,2,3 with these options"):
        tune.run(arguments)


@pytest.mark.parametrize(("at_once", "needed"), [(1, 5), (3, 5), (100, 20)])
def test_rank_skips_tiles_that_earlier_batches_beat(monkeypatch, at_once, needed):
    least = {(n,): float(n) for n in range(20)}
    tried = []

    def seconds_if_compiled(target, kernel, dtype, DP, M, tile):
        tried.append(tile)
        return None if tile == (0,) else least[tile] + 2.5

    monkeypatch.setattr(tune, "_size", lambda tile: tile)
    monkeypatch.setattr(tune, "predicted", lambda target, kernel, dtype, DP, M, tile: least[tile])
    monkeypatch.setattr(tune, "seconds_if_compiled", seconds_if_compiled)
    found = tune.rank("sm_90", "owned", "bf16", 64, 512, least, most=2, at_once=at_once)
    assert found == [(3.5, (1,)), (4.5, (2,))]
    assert len(tried) == needed  # the lower bounds of five tiles are below 4.5
