"""The benchmark's own arithmetic and checks, at small sizes."""

import json
import subprocess
import sys

import pytest

from benchmarks import memory, timing
from benchmarks.competitors import dense


def test_competitors_agree_with_the_oracle():
    timing.check("eager", dense, 64, 16)


def test_check_rejects_a_wrong_loss():
    with pytest.raises(AssertionError, match="off disagrees with the oracle"):
        timing.check("off", lambda *args: dense(*args) * 1.001, 64, 16)


def test_memory_sees_the_dense_matrix_and_not_the_tiles():
    matrix = (2 * 2048) ** 2 * 4
    assert memory.measure("eager", 2048, 32)["extra_bytes"] > 2 * matrix
    assert memory.measure("blocked", 2048, 32)["extra_bytes"] < matrix / 4


def test_command_writes_json_with_provenance(tmp_path):
    out = tmp_path / "cpu.json"
    command = [sys.executable, "-m", "benchmarks", "cpu", "--n", "32", "--d", "8", "--repeats", "2", "--out", out]
    subprocess.run(command, check=True, capture_output=True)
    record = json.loads(out.read_text())
    assert record["machine"]["torch"]
    row = record["results"][0]["losses"]["blocked"]
    assert row["both"]["p20"] <= row["both"]["p50"] <= row["both"]["p80"]
    assert row["times_floor"] > 0
