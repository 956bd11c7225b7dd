"""The logs that a run writes while it trains."""

import csv
import sys
import types
from typing import Any

import pytest

from fastntxent.simclr.command import main
from fastntxent.simclr.logs import COLUMNS


def rows(folder):
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_a_row_for_each_measurement(make_trainer, tmp_path):
    trainer = make_trainer(log_every=2, learn_temperature=True)
    trainer.fit()
    read = rows(tmp_path / "run")
    assert tuple(read[0]) == COLUMNS
    assert [int(row["step"]) for row in read] == [0, 2, 4, 6, 8]
    steps = trainer.history.columns["steps"]
    for row in read:
        for name in ("loss", "lr", "temperature"):
            assert float(row[name]) == steps[name][int(row["step"])]
    seconds = [float(row["seconds"]) for row in read]
    assert seconds == sorted(seconds)
    assert all(float(row["images_per_second"]) > 0 for row in read)


def test_csv_of_a_resumed_run_drops_rows_that_are_measured_again(make_trainer, tmp_path):
    make_trainer(log_every=1, max_steps=4).fit()
    kept = rows(tmp_path / "run")
    with (tmp_path / "run" / "log.csv").open("a") as file:
        file.write("4,9,9,9,9,9,9,9\n5,9,9,9,9,9,9,9\n6,9")  # written after the checkpoint and before the kill
    make_trainer(log_every=1, resume="auto").fit()
    read = rows(tmp_path / "run")
    assert [int(row["step"]) for row in read] == list(range(9))
    assert read[:4] == kept


@pytest.fixture
def fakes(monkeypatch):
    """Install fakes of TensorBoard and Weights & Biases, and return the list in which they record their calls."""
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append(("writer", folder, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def close(self):
            calls.append("closed")

    class Run:
        def log(self, values, step):
            calls.append((values, step))

        def finish(self):
            calls.append("finished")

    def init(**options):
        calls.append(options)
        return Run()

    tensorboard: Any = types.ModuleType("torch.utils.tensorboard")
    tensorboard.SummaryWriter = SummaryWriter
    wandb: Any = types.ModuleType("wandb")
    wandb.init = init
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return calls


def test_tensorboard_gets_every_measurement(make_trainer, tmp_path, fakes):
    trainer = make_trainer(tensorboard=True, log_every=4)
    trainer.fit()
    assert fakes[0] == ("writer", str(tmp_path / "run" / "tensorboard"), 0)
    assert fakes[-1] == "closed"
    losses = [(value, step) for name, value, step in fakes[1:-1] if name == "loss"]
    assert losses == [(trainer.history.columns["steps"]["loss"][step], step) for step in (0, 4, 8)]


def test_wandb_continues_the_same_run_on_resume(make_trainer, tmp_path, fakes):
    make_trainer(wandb="project", log_every=4, max_steps=5).fit()
    make_trainer(wandb="project", log_every=4, resume="auto").fit()
    starts = [call for call in fakes if isinstance(call, dict)]
    assert [start["project"] for start in starts] == ["project", "project"]
    assert starts[0]["id"] == starts[1]["id"]
    assert starts[0]["config"]["lr"] == 0.003, "the learning rate should be resolved"
    assert [call[1] for call in fakes if isinstance(call, tuple)] == [0, 4, 8]
    assert fakes.count("finished") == 2


@pytest.mark.parametrize("option", ["wandb", "tensorboard"])
def test_logger_that_cannot_be_opened_is_reported_in_one_line(tmp_path, fakes, monkeypatch, capsys, option):
    class UsageError(Exception):
        pass

    def refuse(*args, **options):
        raise UsageError("api_key not configured (no-tty)\nrun wandb login")

    module = "wandb" if option == "wandb" else "torch.utils.tensorboard"
    monkeypatch.setattr(sys.modules[module], "init" if option == "wandb" else "SummaryWriter", refuse)
    given = ["--wandb", "project"] if option == "wandb" else ["--tensorboard"]
    assert main(["--data", "digits", "--epochs", "1", "--quiet", "--out", str(tmp_path / "run"), *given]) == 2
    assert capsys.readouterr().err == f"error: --{option} cannot be used: UsageError: api_key not configured (no-tty)\n"
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(("options", "package"), [({"tensorboard": True}, "tensorboard"), ({"wandb": "p"}, "wandb")])
def test_missing_logger_is_reported_before_training(make_trainer, monkeypatch, options, package):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=f"needs the package {package}: pip install {package}"):
        make_trainer(**options)
