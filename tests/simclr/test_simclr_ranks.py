"""A run on several ranks gives the results of a run in one process."""

from __future__ import annotations

import copy
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import instruction_set
from fastntxent.simclr import Config, ImageData, Trainer
from fastntxent.simclr.batch_norm import over_ranks, without_sync
from fastntxent.simclr.build import pick_device
from fastntxent.simclr.checkpoint import FILE_NAME, load_checkpoint, with_saved_options
from fastntxent.simclr.objective import build_objective
from fastntxent.simclr.pipeline import prepare
from fastntxent.simclr.ranks import ALONE, Ranks, join
from tests.ranks import on_ranks

run_module = importlib.import_module("fastntxent.simclr.pipeline")

ROOT = Path(__file__).parents[2]
TRAINER = instruction_set.module("fastntxent.simclr")

STEPS = 20
# Curves agree to three digits: ranks add float32 numbers in a different order, and training amplifies the difference.
# In float64 the same runs agree to about 1e-14.
DIGITS = {torch.float32: 5e-4, torch.float64: 1e-9}

# The data set has 83 images. In most runs the ranks therefore get unequal numbers of images, at least in the last batch
# of an epoch.
RUNS: dict[str, dict[str, Any]] = {
    "float32": {"batch_size": 50, "verify_every": 5, "max_steps": STEPS},
    "batch norm": {"batch_size": 32},
    "fewer samples than ranks": {"batch_size": 2},
    "no norm": {"batch_size": 50, "norm": "none"},
    "lars": {"batch_size": 50, "optimizer": "lars"},
    "learnt temperature": {"batch_size": 50, "learn_temperature": True},
    "chunks": {"accumulate_batch": 50, "chunk": 16},
    "own": {"batch_size": 50, "width": 0},
    "own in chunks": {"accumulate_batch": 50, "chunk": 16, "width": 0},
    "alignment": {"batch_size": 50, "objective": "alignment"},
    "distribution": {"batch_size": 50, "objective": "distribution"},
    "resnet18": {"batch_size": 50, "model": "resnet18", "width": 8, "max_steps": 3},
}


class PartlyUsed(nn.Module):
    """A user's encoder with parameters that do not affect its features."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.used = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
            self.classifier = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.used(x)
        return h


def dtype_of(name: str) -> torch.dtype:
    return torch.float32 if name == "float32" else torch.float64


def config_of(name: str, out: Path, **options: Any) -> Config:
    settings = {
        "out": out / name, "epochs": 20, "max_steps": 8, "width": 4, "proj_hidden": 16, "proj_dim": 8,
        "device": "cpu", "quiet": True, "augment": "digits", "warmup_epochs": 1.0, "log_every": 5,
    }  # fmt: skip
    return Config(**{**settings, **RUNS[name], **options})


def trained(name: str, out: Path, data: ImageData, ranks: Ranks = ALONE) -> dict[str, Any]:
    encoder = PartlyUsed() if name.startswith("own") else None
    trainer = Trainer(config_of(name, out), data, ranks, encoder=encoder)
    trainer.model.to(dtype_of(name))
    trainer.fit()
    return outcome(trainer)


def outcome(trainer: Trainer) -> dict[str, Any]:
    return {
        "history": trainer.history.columns,
        "state": trainer.model.state_dict() | trainer.loss.state_dict(),
        "step": trainer.step,
    }


def these() -> Ranks:
    return Ranks(dist.group.WORLD, dist.get_rank(), dist.get_world_size(), dist.get_rank())


# --- on every rank ---------------------------------------------------------------------------------------------------


def all_runs(data: ImageData, out: Path, checkpoint: str) -> dict[str, Any]:
    ranks = these()
    found: dict[str, Any] = {name: trained(name, out, data, ranks) for name in RUNS}
    resumed = Trainer(config_of("float32", out / "resumed", resume=checkpoint), data, ranks)
    started = resumed.step
    resumed.fit()
    found["resumed"] = outcome(resumed) | {"started": started}
    found["normalised"] = normalised(ranks)
    found["odd norms"] = odd_norms(ranks)
    found["half"] = half_normalised(ranks)
    found["errors"] = {name: words(provoke, ranks, data, out) for name, provoke in MISTAKEN.items()}
    found["downloaded"] = downloaded(ranks, data, out)
    return found


def normalised(ranks: Ranks | None) -> list[Tensor | None]:
    """Return the gradients and the running statistics of a model with two BatchNorms. They are computed across ranks,
    of which the first has no rows. If `ranks` is None, they are computed in one process.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Tanh()).double()
    x, weights = torch.randn(11, 3, 2, 2, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    twin: nn.Module = model
    if ranks:
        twin = over_ranks(model, ranks.group)
        here = slice(11 * (ranks.rank - 1) // (ranks.world - 1), 11 * ranks.rank // (ranks.world - 1))
        x, weights = (x[:0], weights[:0]) if ranks.first else (x[here], weights[here])
    for _ in range(2):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        (twin(leaf) * weights).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    if ranks:
        for gradient in gradients:
            dist.all_reduce(gradient)
        return [ranks.gather(leaf.grad), *gradients, *model.buffers()]
    return [leaf.grad, *gradients, *model.buffers()]


class NormAndRelu(nn.BatchNorm2d):
    """A batch norm that does more in its forward, as timm's do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class OddNorms(nn.Module):
    """The kinds of normalisation found in encoders from elsewhere."""

    largest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.shared = self.again = nn.BatchNorm2d(3)
        self.plain = nn.BatchNorm2d(3, affine=False)
        self.averaged = nn.BatchNorm2d(3, momentum=None)
        self.untracked = nn.BatchNorm2d(3, track_running_stats=False)
        self.relu = NormAndRelu(3)
        self.sync = nn.SyncBatchNorm(3)
        self.frozen = nn.BatchNorm2d(3)
        self.frozen.running_mean.add_(0.3)
        self.instance = nn.InstanceNorm2d(3, affine=True, track_running_stats=False)
        self.without_gradient = nn.BatchNorm2d(3).requires_grad_(False)
        self.register_buffer("largest", torch.zeros(()))

    def train(self, mode: bool = True) -> OddNorms:
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        for norm in (
            self.shared, self.plain, self.averaged, self.untracked, self.relu, self.sync, self.frozen, self.instance,
            self.again, self.without_gradient,
        ):  # fmt: skip
            x = norm(torch.tanh(x * 1.7 + 0.1))
        self.largest = self.largest + 1  # a buffer that is replaced, not changed in place
        return F.batch_norm(x, None, None, training=self.training).flatten(1)


def odd_norms(ranks: Ranks | None) -> list[Tensor | None]:
    """Return the gradients, outputs and buffers of a model with unusual norms, computed across ranks, or in one process
    if `ranks` is None.
    """
    torch.manual_seed(0)
    model = OddNorms().double()
    without_sync(model)
    x, weights = torch.randn(11, 3, 2, 4, dtype=torch.float64), torch.randn(11, 24, dtype=torch.float64)
    replica: nn.Module = model
    if ranks:
        replica = over_ranks(model, ranks.group)
        x, weights = ranks.part(x), ranks.part(weights)
    replica.train()
    for _ in range(2):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = replica(leaf)
        (y * weights).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    if ranks:
        for gradient in gradients:
            dist.all_reduce(gradient)
        return [ranks.gather(leaf.grad), ranks.gather(y.detach()), *gradients, *model.buffers()]
    return [leaf.grad, y.detach(), *gradients, *model.buffers()]


def half_rows(rank: int) -> tuple[Tensor, Tensor]:
    """Return rows in half precision, and weights for their outputs."""
    x, weights = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(rank)).bfloat16()
    return x, weights


def half_normalised(ranks: Ranks) -> list[Tensor]:
    """Return BatchNorm's output for half-precision rows, as under autocast, and the gradient of the rows."""
    x, weights = half_rows(ranks.rank)
    y = over_ranks(nn.Sequential(nn.BatchNorm1d(3)), ranks.group)(x.requires_grad_())
    (y * weights).sum().backward()
    return [y.detach(), x.grad]


def words(provoke: Any, ranks: Ranks, *args: Any) -> str:
    try:
        provoke(ranks, *args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def one_cannot(ranks: Ranks, data: ImageData, out: Path) -> None:
    name = "digits" if ranks.first else "npz"
    prepare(config_of("float32", out / "one cannot", data=name), ranks)


def one_breaks(ranks: Ranks, data: ImageData, out: Path) -> None:
    with ranks.all_or_none():
        if not ranks.first:
            raise ZeroDivisionError("by none")


def options_differ(ranks: Ranks, data: ImageData, out: Path) -> None:
    prepare(config_of("float32", out / "options differ", data="digits", log_every=1 + ranks.rank), ranks)


def reference(ranks: Ranks, data: ImageData, out: Path) -> None:
    prepare(config_of("float32", out / "reference", data="digits", loss="reference"), ranks)


MISTAKEN = {f.__name__: f for f in (one_cannot, one_breaks, options_differ, reference)}


def downloaded(ranks: Ranks, data: ImageData, out: Path) -> bool:
    """Check that the other ranks find the file that the first rank of their machine fetches, and return True."""
    there = out / "fetched"

    def load(*args: Any, **options: Any) -> ImageData:
        if ranks.first and not there.exists():
            time.sleep(0.5)
            there.touch()
        assert there.exists()
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "load_data", load)
        prepare(config_of("float32", out / "downloaded", download=True), ranks)
    return True


# --- against one process ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(stripes, tmp_path_factory) -> dict[str, Any]:
    """The same runs in this process, and the path of a checkpoint from the middle of one of them."""
    out = tmp_path_factory.mktemp("alone")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, Any] = {name: trained(name, out, stripes) for name in RUNS}
    trainer = Trainer(config_of("float32", out / "part"), stripes)
    trainer.fit(7)
    torch.set_num_threads(threads)
    found["checkpoint"] = str(trainer.config.out / FILE_NAME)
    return found


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def found(request, stripes, alone, tmp_path_factory) -> list[dict[str, Any]]:
    return on_ranks(request.param, all_runs, stripes, tmp_path_factory.mktemp("ranks"), alone["checkpoint"])


def largest_difference(curve: list[float], expected: list[float]) -> float:
    found, true = (torch.tensor(values, dtype=torch.float64) for values in (curve, expected))
    return float((found - true).abs().max() / true.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_run_across_ranks_equals_the_run_of_one_process(found, alone, name):
    digits, expected = DIGITS[dtype_of(name)], alone[name]
    for of_rank in found:
        for table in ("steps", "measured"):
            for column, curve in expected["history"][table].items():
                if column in ("seconds", "images_per_second"):
                    continue
                assert largest_difference(of_rank[name]["history"][table][column], curve) < digits, (table, column)
        assert of_rank[name]["step"] == expected["step"]
    loss = expected["history"]["steps"]["loss"]
    assert max(loss) - min(loss) > 0.01 * max(map(abs, loss)), "the curve should not be flat"
    for parameter, value in expected["state"].items():
        of_ranks = [of_rank[name]["state"][parameter] for of_rank in found]
        assert all(torch.equal(other, of_ranks[0]) for other in of_ranks), parameter
        torch.testing.assert_close(of_ranks[0], value, rtol=0, atol=100 * digits * max(1, float(value.abs().max())))


def test_verification_checks_the_loss_across_ranks(found):
    for of_rank in found:
        verified = of_rank["float32"]["history"]["verified"]
        assert verified["step"] == [0, 5, 10, 15]
        assert verified == found[0]["float32"]["history"]["verified"]
        assert max(verified["gradient_error"]) < 1e-5


def test_run_of_one_process_continues_on_several_ranks(found, alone):
    for of_rank in found:
        assert of_rank["resumed"]["started"] == 7
        curves = (run["history"]["steps"]["loss"] for run in (of_rank["resumed"], alone["float32"]))
        assert largest_difference(*curves) < DIGITS[torch.float32]


def test_batch_norm_across_ranks_is_exact_with_uneven_rows(found):
    for of_rank in found:
        for value, expected in zip(of_rank["normalised"], normalised(None), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)


def test_every_kind_of_norm_across_ranks_is_exact(found):
    expected = odd_norms(None)
    assert len(expected) > 20
    for of_rank in found:
        for value, truth in zip(of_rank["odd norms"], expected, strict=True):
            torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-11)


def test_sync_batch_norm_becomes_an_ordinary_one_that_can_be_copied():
    model = nn.Sequential(nn.SyncBatchNorm(3, process_group=object()), nn.Flatten())
    sync = model[0]
    x, state = torch.randn(5, 3, 2), {name: value.clone() for name, value in sync.state_dict().items()}
    without_sync(model)
    assert model[0] is sync
    assert not isinstance(sync, nn.SyncBatchNorm)
    torch.testing.assert_close(dict(sync.state_dict()), state)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), nn.BatchNorm1d(3)(x).flatten(1))
    with pytest.raises(ValueError, match="at least 2 dimensions, got 1"):
        sync(x[0, 0])


def test_batch_norm_across_ranks_takes_half_precision(found):
    x, weights = (torch.cat(parts).float() for parts in zip(*map(half_rows, range(len(found))), strict=True))
    y = nn.BatchNorm1d(3)(x.requires_grad_())
    (y * weights).sum().backward()
    for index, expected in enumerate((y.detach(), x.grad)):
        value = torch.cat([of_rank["half"][index] for of_rank in found])
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value.float(), expected, rtol=0.01, atol=0.01)


def test_mistake_on_one_rank_ends_all_ranks_with_its_message(found):
    first, *others = (of_rank["errors"] for of_rank in found)
    assert first["one_cannot"] == "ValueError: rank 1: --data npz needs --data-dir"
    assert first["one_breaks"] == "RuntimeError: rank 1: by none"
    for other in others:
        assert other["one_cannot"] == "ValueError: --data npz needs --data-dir"
        assert other["one_breaks"] == "ZeroDivisionError: by none"


def test_ranks_with_differing_options_get_an_error_that_names_them(found):
    world = len(found)
    for of_rank in found:
        said = of_rank["errors"]["options_differ"]
        assert said.startswith("ValueError: these values must be the same on all ranks, but on ranks 0 to")
        assert said.endswith(f"--log-every is {', '.join(str(1 + rank) for rank in range(world))}")


def test_dense_loss_is_refused_on_several_ranks(found):
    for of_rank in found:
        assert "--loss reference is a dense loss for one process" in of_rank["errors"]["reference"]


def test_first_rank_of_a_machine_downloads_for_the_others(found):
    assert all(of_rank["downloaded"] for of_rank in found)


def test_dense_loss_error_names_the_option_that_was_given():
    with pytest.raises(ValueError, match="--backend reference is a dense loss for one process"):
        build_objective(Config(backend="reference"), object())


@pytest.mark.parametrize("n", [0, 1, 3, 7, 8])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_parts_of_ranks_cover_the_whole_and_are_nearly_even(n, world):
    parts = [Ranks(None, rank, world).part(torch.arange(n)) for rank in range(world)]
    assert torch.equal(torch.cat(parts), torch.arange(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_join_returns_alone_without_torchrun_or_with_one_process(monkeypatch):
    assert join() is ALONE
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join() is ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"run\(\) uses a single process"):
        run_module.run(Config())


def test_pick_device_needs_a_gpu_for_each_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ranks = Ranks(object(), rank=6, world=8, local=2)
    with pytest.raises(ValueError, match=r"--device must be cuda for 8 ranks, one GPU for each, got cuda:1"):
        pick_device("cuda:1", ranks)
    with pytest.raises(
        ValueError,
        match="--device cuda needs a GPU for each rank on a machine, but this machine has 2, and none is left",
    ):
        pick_device("cuda", ranks)
    assert pick_device("cpu", ranks) == torch.device("cpu")


# --- torchrun --------------------------------------------------------------------------------------------------------


def torchrun(world: int, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def device_option(device: str) -> Any:
    enough = device == "cpu" or torch.cuda.device_count() >= 3
    return pytest.param(device, marks=pytest.mark.skipif(not enough, reason="needs three CUDA devices"))


@pytest.mark.slow
@pytest.mark.parametrize("device", [device_option("cpu"), device_option("cuda")])
def test_torchrun_run_continues_on_a_different_number_of_ranks(tmp_path, device):
    options = ["--data", "digits", "--width", "4", "--batch-size", "50", "--device", device, "--amp", "off"]
    options += ["--eval-limit", "40"]
    whole = prepare(with_saved_options({
        "data": "digits", "width": 4, "batch_size": 50, "device": device, "amp": "off", "quiet": True,
        "max_steps": STEPS, "out": tmp_path / "whole",
    }))  # fmt: skip
    whole.fit()

    out = tmp_path / "two"
    process = torchrun(2, *TRAINER, *options, "--max-steps", 10, "--verify-every", 5, "--out", out)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    assert said.count("knn:") == 1, "only one rank should print the summary"
    assert "10/10" in errors, "a progress bar was expected"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["machine"]["ranks"] == 2
    assert metrics["verification"]["checks"] == 2
    assert (out / "report.html").exists()
    assert not [name for name in load_checkpoint(out / FILE_NAME)["model"] if name.startswith("module.")]

    shutil.copytree(out, tmp_path / "three")
    alone = prepare(with_saved_options({"resume": str(out / FILE_NAME), "max_steps": STEPS, "quiet": True}))
    assert alone.step == 10
    alone.fit()
    process = torchrun(3, *TRAINER, "--resume", "--max-steps", STEPS, "--quiet", "--out", tmp_path / "three")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    for path in (out, tmp_path / "three"):
        steps = load_checkpoint(path / FILE_NAME)["history"]["steps"]
        assert len(steps["loss"]) == STEPS
        for name, curve in whole.history.columns["steps"].items():
            assert largest_difference(steps[name], curve) < DIGITS[torch.float32], (path.name, name)


ONE_RANK_IN_ANOTHER_FOLDER = """
import os, sys
from fastntxent.simclr.__main__ import main
if os.environ["RANK"] == "1":
    os.chdir("/")
try:
    main(sys.argv[1:])
finally:
    print("on the way to Python's finalisation, where a thread of gloo may abort the process")
"""


@pytest.mark.slow
def test_torchrun_ends_when_one_rank_finds_no_data(tmp_path, stripes, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ranks.py").write_text(ONE_RANK_IN_ANOTHER_FOLDER)
    np.savez("images.npz", images=stripes.train_images.numpy())
    process = torchrun(2, "ranks.py", "--data", "npz", "--data-dir", "images.npz", "--out", tmp_path / "run")
    said, errors = process.communicate()
    assert process.returncode != 0
    assert said == ""
    mistakes = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert mistakes == ["error: rank 1: --data-dir images.npz does not exist"]


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to_one_rank"),
    [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGTERM, True)],
    ids=["SIGINT", "SIGTERM", "SIGTERM to the last rank"],
)
def test_torchrun_stopped_by_a_signal_leaves_a_checkpoint_and_says_how_to_continue(tmp_path, number, to_one_rank):
    path = tmp_path / FILE_NAME
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # children would inherit an ignored SIGINT
    try:
        process = torchrun(
            2, *TRAINER, "--data", "digits", "--width", 4, "--epochs", 2000, "--checkpoint-every", 0, "--log-every", 1,
            "--device", "cpu", "--quiet", "--out", tmp_path,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, handler)
    log = tmp_path / "log.csv"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 3):
        time.sleep(0.01)
    os.kill(children(process)[-1] if to_one_rank else process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert errors.count(f"saved; continue with python -m fastntxent.simclr --resume --out {tmp_path}") == 1, errors
    state = load_checkpoint(path)
    assert state["step"] > 2
    resumed = prepare(with_saved_options({"resume": str(path), "max_steps": state["step"] + 1}))
    resumed.fit()
    assert len(resumed.history.columns["steps"]["loss"]) == state["step"] + 1
