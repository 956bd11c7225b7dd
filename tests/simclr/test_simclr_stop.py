"""A signal ends a run after its current step, with a checkpoint, and the run resumes as if nothing had happened."""

import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch

from fastntxent.simclr import InterruptedRun, TrainingError, command
from fastntxent.simclr.checkpoint import load_checkpoint
from fastntxent.simclr.stopping import ignore_signals, kill_workers


def signal_at(trainer, step, *numbers):
    """Send these signals to this process while the trainer runs the step."""
    train_step = trainer._train_step

    def step_and_signal(views):
        if trainer.step == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return train_step(views)

    trainer._train_step = step_and_signal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_after_the_step_and_the_resumed_run_equals_a_whole_one(make_trainer, tmp_path, number):
    whole = make_trainer("whole")
    whole.fit()
    trainer = make_trainer("part", checkpoint_every=0)
    signal_at(trainer, 4, number)
    with pytest.raises(InterruptedRun, match=r"at step 5 of 9; checkpoint saved; .* --resume --out .*part") as caught:
        trainer.fit()
    assert caught.value.number == number
    assert load_checkpoint(tmp_path / "part" / "checkpoint.pt")["step"] == 5
    resumed = make_trainer("part", resume="auto", checkpoint_every=0)
    assert resumed.step == 5
    resumed.fit()
    assert resumed.history.columns["steps"] == whole.history.columns["steps"]
    assert all(map(torch.equal, resumed.model.state_dict().values(), whole.model.state_dict().values()))


def test_second_interrupt_stops_at_once(make_trainer, tmp_path):
    trainer = make_trainer(checkpoint_every=2)
    signal_at(trainer, 3, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.fit()
    assert not isinstance(caught.value, InterruptedRun)
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_in_the_last_step_is_not_lost(make_trainer, tmp_path, number):
    trainer = make_trainer()
    signal_at(trainer, 8, number)
    with pytest.raises(InterruptedRun, match=r"at step 9 of 9; checkpoint saved") as caught:
        trainer.fit()
    assert caught.value.number == number
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 9


def test_signals_after_the_checkpoint_do_not_disturb_the_end_of_the_feed(make_trainer, capfd):
    trainer = make_trainer()
    steps = trainer.feed.steps
    ended = []

    def watched(start, stop):
        try:
            yield from steps(start, stop)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
            ended.append(signal.getsignal(signal.SIGINT))

    trainer.feed.steps = watched
    signal_at(trainer, 4, signal.SIGTERM, signal.SIGTERM)
    with pytest.raises(InterruptedRun, match="at step 5 of 9") as caught:
        trainer.fit()
    assert caught.value.number == signal.SIGTERM
    assert len(ended) == 1
    assert ended[0] is not signal.default_int_handler, "the feed must end before Ctrl-C raises again"
    assert capfd.readouterr().err.count("stopping after this step") == 1


def _hang(ready):
    ignore_signals(0)
    ready.set()
    time.sleep(600)


def test_workers_that_hang_are_killed():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=_hang, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(60)
    worker.terminate()
    before = signal.getsignal(signal.SIGCHLD)
    try:
        kill_workers()
    finally:
        signal.signal(signal.SIGCHLD, before)
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL


def test_interrupt_outside_training_prints_no_traceback(monkeypatch, capsys):
    def interrupted(arguments, ranks):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_main", interrupted)
    assert command.main([]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_fit_leaves_signal_handlers_as_they_were(make_trainer):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    make_trainer().fit()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    noted = []
    earlier = signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
    try:
        trainer = make_trainer("own")
        signal_at(trainer, 1, signal.SIGTERM)
        trainer.fit()
    finally:
        signal.signal(signal.SIGTERM, earlier)
    assert noted == [signal.SIGTERM], "the program's own handler must stay in place"
    assert trainer.step == trainer.last_step


def test_fit_runs_in_another_thread(make_trainer):
    trainer = make_trainer()
    thread = threading.Thread(target=trainer.fit)
    thread.start()
    thread.join()
    assert trainer.step == trainer.last_step


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_cli_stopped_by_a_signal_prints_how_to_continue(cli, tmp_path, number, status):
    process = cli(
        "--data", "digits", "--epochs", "20000", "--width", "4", "--device", "cpu", "--checkpoint-every", "0",
        "--log-every", "1", "--out", tmp_path / "run", wait=False,
    )  # fmt: skip
    log = tmp_path / "run" / "log.csv"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 3):
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    text = errors.decode()
    assert process.returncode == status, text
    assert "Traceback" not in text
    assert f"--resume --out {tmp_path / 'run'}" in text.splitlines()[-1]
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] > 2
    result = cli("--resume", "--out", tmp_path / "run", "--max-steps", 1, "--quiet")
    assert result.returncode == 0, result.stderr
    assert "this run is finished" in result.stderr
    assert (tmp_path / "run" / "report.html").exists()


def test_images_that_can_no_longer_be_read_end_the_run_with_a_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer(checkpoint_every=0)
    steps = trainer.feed.steps

    def broken(start, stop):
        yield from (views for _, views in zip(range(4), steps(start, stop), strict=False))
        raise ValueError("Caught ValueError in DataLoader worker process 0.\nOriginal Traceback\ncat/7.png is gone")

    trainer.feed.steps = broken
    with pytest.raises(
        TrainingError, match=r"the images of step 4 cannot be read: cat/7\.png is gone; checkpoint saved"
    ):
        trainer.fit()
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 4


@pytest.mark.parametrize("error", [MemoryError("no"), torch.OutOfMemoryError("CUDA out of memory. Tried\nadvice")])
@pytest.mark.parametrize("where", ["feed", "step"])
def test_step_that_does_not_fit_in_memory_reports_what_to_change(make_trainer, monkeypatch, error, where):
    def fail(*args, **options):
        raise error

    trainer = make_trainer()
    if where == "feed":
        monkeypatch.setattr("fastntxent.simclr.feed.two_views", fail)
    else:
        monkeypatch.setattr(trainer, "_train_step", fail)
    with pytest.raises(MemoryError, match=r"memory ran out in step 0: .*; try a smaller --batch-size") as caught:
        trainer.fit()
    assert "\n" not in str(caught.value)
