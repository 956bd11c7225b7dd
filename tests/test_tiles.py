"""The table of the Triton kernels' tiles, the model of their times, and the tuner that writes the one by the other."""

import argparse
import importlib
import json
import math

import pytest
import torch

from benchmarks import chips, gpu, kernels, model, tune
from fastntxent import backends

STATUS = backends()["triton"]
if not STATUS.available:
    pytest.skip(f"needs Triton: {STATUS.reason}", allow_module_level=True)

# Rows of padding hold whatever was in memory, and are not used.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

config = importlib.import_module("fastntxent.backends.triton.config")
pack = importlib.import_module("fastntxent.backends.triton.pack")
forward = importlib.import_module("fastntxent.backends.triton.forward")

FAMILIES = ["large", "small", *(name for name in config.TABLE if name not in ("large", "small", "interpreter"))]


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("family", [*FAMILIES, "interpreter"])
def test_every_batch_has_a_tile_for_either_direction(family, width):
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


def test_the_first_entry_that_serves_is_taken():
    rows = config.entries("small", "fused", 2)
    assert config.look_up("small", "fused", 2, 10, 64) == rows[0][2]
    assert config.look_up("small", "fused", 2, 10, 512) is None
    assert config.look_up("gfx942", "direct", 2, 5000, 64) == config.look_up("small", "direct", 2, 5000, 64)


@pytest.mark.parametrize(("n", "blocks", "columns"), [(64, 1, 32), (64, 100, 64), (4096, 2, 128), (4097, 2, 160)])
def test_columns_of_a_part_fill_the_multiprocessors(n, blocks, columns):
    assert config.columns_of_part(32, blocks, n, 32) == columns


def test_panels_leave_few_multiprocessors_idle():
    gather = config.Tile(128, 64, 128, 8, 3)
    assert config.height_of_panel(132, 3072, 768, gather) == 2816  # 22 blocks of rows, 6 of features
    assert config.height_of_panel(132, 256, 768, gather) == 256


def test_a_chip_holds_as_many_programs_as_registers_shared_memory_and_threads_allow():
    h100 = chips.CHIPS["sm_90"]
    assert h100.resident(128, 80_000, 8) == 2
    assert h100.resident(129, 80_000, 8) == 1
    assert h100.resident(64, 120_000, 8) == 1
    assert h100.resident(16, 0, 8) == 8
    assert chips.CHIPS["gfx942"].resident(128, 0, 8) is None


def test_the_model_counts_what_the_schedule_does():
    tile = config.Tile(128, 128, 64, 8, 3)
    tiles = dict.fromkeys(config.KERNELS, tile)
    M, DP, chip = 65_536, 128, chips.CHIPS["sm_90"]
    u = 2 * M * M * DP
    work = {kernel: model.work_of(kernel, tiles, M, DP, "bf16", chip) for kernel in config.KERNELS}
    assert {kernel: w.products / u for kernel, w in work.items()} == {
        "direct": 0.5, "owned": 1, "fused": 2, "form": 1, "gather": 1
    }  # fmt: skip
    assert work["direct"].exps == M * M / 2
    assert work["gather"].exps == 0
    assert model.work_of("fused", tiles, M, DP, "fp32", chip).products == 6 * u
    assert work["form"].launches == work["gather"].launches > 1


def test_the_model_takes_the_longest_resource_and_adds_what_does_not_overlap():
    chip = chips.CHIPS["sm_90"]
    rates = chip.rates
    matrix = model.GEMM * rates.product
    even = chip.multiprocessors * 2.0
    products = model.Work(matrix, 0.5 * rates.exp, 0, 0, 0, even)
    assert model.seconds(products, chip, 2, "bf16") == pytest.approx(1 + model.LAUNCH)
    assert model.seconds(products, chip, 1, "bf16") == pytest.approx(1.5 + model.LAUNCH)
    assert model.seconds(products, chip, 2, "bf16", gemm=matrix / 4) == pytest.approx(4 + model.LAUNCH)
    assert model.seconds(products._replace(programs=even / 2 + 1), chip, 2, "bf16") == pytest.approx(1.985, rel=1e-3)
    assert model.seconds(products._replace(memory=3 * rates.memory), chip, 2, "bf16") == pytest.approx(3, rel=1e-3)


def test_a_prediction_beside_a_measurement_says_what_it_is_of(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    report = kernels.Report("", "sm_90", "bf16", 128, "usual", None, None, 0, 128, 0, 0, 1, 2)
    monkeypatch.setattr(kernels, "compile_one", lambda *_: report)
    result = {"n": 32_768, "d": 128, "dtype": "bfloat16", "gemm_gflops": 650_000.0}
    predicted = gpu._predicted(result)
    assert predicted["u"] == pytest.approx(1.69, rel=1e-2)
    assert predicted["both"] == pytest.approx(sum(predicted[name] for name in ("direct", "fused", "around")))
    assert 2.5 * predicted["u"] < predicted["both"] < 5 * predicted["u"]
    (line,) = gpu._model_line({**result, "model": predicted})
    assert "N 32768, D 128, bfloat16, the model's triton" in line
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    assert gpu._predicted(result) is None


@pytest.mark.parametrize("kernel", config.KERNELS)
def test_candidates_are_tiles_that_the_kernels_take(kernel):
    found = list(tune.candidates(kernel, 2, 128))
    assert len(found) == len(set(found)) > 10
    for block_m, block_n, block_d, *_ in found:
        assert pack.PADDED_ROWS % block_m == pack.PADDED_ROWS % block_n == 128 % block_d == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter: a GPU has tiles that it cannot take")
@pytest.mark.parametrize("kernel", ["direct", "owned", "fused", "gather"])
def test_tiles_are_timed_in_turns_and_checked(kernel):
    tiles = [(32, 32, 16, 4, 2), (64, 32, 16, 4, 2)]
    found = tune.times(kernel, torch.float32, 16, 80, tiles, seconds=0)
    assert list(found) == tiles
    assert all(s > 0 for s in found.values())


def test_a_tile_with_another_result_is_refused(monkeypatch):
    losses, present = forward.Forward.losses, config.look_up("interpreter", "owned", 4, 80, 16)

    def wrong_for_others(self):
        nu, *rest = losses(self)
        return nu + (config.look_up("interpreter", "owned", 4, 80, 16) != present), *rest

    monkeypatch.setattr(forward.Forward, "losses", wrong_for_others)
    with pytest.raises(AssertionError):
        tune.times("owned", torch.float32, 16, 80, [(64, 32, 16, 4, 2)], seconds=0)


def test_the_largest_of_equally_fast_tiles_is_taken():
    small, deep, slow = (64, 64, 64, 4, 2), (128, 64, 64, 4, 3), (128, 128, 64, 4, 3)
    assert tune.take([(1.0, small), (1.01, deep), (1.5, slow)]) == deep
    assert tune.take([]) is None


def test_the_table_is_written_as_it_is_kept():
    assert tune.dumps(config.TABLE) == (tune.TABLE).read_text()


def test_new_entries_take_the_place_of_a_family_s_old_ones_unless_a_rival_is_faster():
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


def test_tuning_writes_what_it_found_also_where_no_tile_fits(monkeypatch, tmp_path):
    tile = (64, 64, 64, 4, 2)

    def ranked(target, kernel, dtype, DP, M, tiles, most):
        assert next(iter(tiles))
        return [(1e-3 if kernel == "gather" else 2e-3, tile)] if dtype == "bf16" else []

    path = tmp_path / "table.json"
    path.write_text(tune.TABLE.read_text())
    monkeypatch.setattr(tune, "rank", ranked)
    monkeypatch.setattr(tune, "TABLE", path)
    arguments = argparse.Namespace(predict="sm_80", kernels=["gather", "fused"], most=1, seconds=0, write=True)
    results, _ = tune.run(arguments)
    assert len(results) == 2 * 2 * 2 * 4
    table = json.loads(path.read_text())
    assert table["sm_80"]["gather"]["2"][0] == [2048, 64, list(tile)]
    assert all(entry[2] is None for width in ("2", "4") for entry in table["sm_80"]["fused"][width])
    assert path.read_text() == tune.dumps(table)
