"""Checkpoints on disk are always complete, damage to them is detected, and only one run at a time writes them."""

import multiprocessing
import os
import random

import pytest
import torch

from fastntxent.files import write_whole
from fastntxent.simclr.checkpoint import load_checkpoint, save_checkpoint
from fastntxent.simclr.output import OutputFolder, write_text


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 7, "model": {"w": torch.arange(300.0)}, "name": "caf\udce9"})
    return path


def test_checkpoint_round_trips_and_torch_can_load_it(saved):
    state = load_checkpoint(saved)
    assert (state["step"], state["name"]) == (7, "caf\udce9")
    assert torch.equal(state["model"]["w"], torch.arange(300.0))
    assert torch.load(saved, weights_only=True)["step"] == 7


def test_load_checkpoint_refuses_a_file_with_a_flipped_bit(saved):
    sound = saved.read_bytes()
    draw = random.Random(0)
    # Each damaged file has one flipped bit. The bit is in a byte near one end of the file, where the signatures and the
    # checksum are, or in one of 300 random bytes, most of which are contents, directory or padding.
    places = {*range(64), *range(len(sound) - 200, len(sound)), *draw.sample(range(len(sound)), 300)}
    for place in places:
        damaged = bytearray(sound)
        damaged[place] ^= 1 << draw.randrange(8)
        saved.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint\.pt .*(damaged|cannot be read)"):
            load_checkpoint(saved)


@pytest.mark.parametrize("kept", [0, 1, 50, 0.5, 0.99, -1])
def test_load_checkpoint_refuses_a_truncated_or_extended_file(saved, kept):
    sound = saved.read_bytes()
    saved.write_bytes(sound[: int(kept * len(sound)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"checkpoint\.pt"):
        load_checkpoint(saved)
    saved.write_bytes(sound + b"more")
    with pytest.raises(ValueError, match=r"checkpoint\.pt"):
        load_checkpoint(saved)


def test_write_whole_does_not_follow_links(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "out").mkdir()
    for name in ("checkpoint.pt", "checkpoint.pt.partial", "metrics.json", "config.toml"):
        (tmp_path / "out" / name).symlink_to(victim)
    save_checkpoint(tmp_path / "out" / "checkpoint.pt", {"step": 1})
    write_text(tmp_path / "out" / "metrics.json", "{}")
    assert victim.read_text() == "precious"
    assert load_checkpoint(tmp_path / "out" / "checkpoint.pt")["step"] == 1
    assert not (tmp_path / "out" / "checkpoint.pt").is_symlink()


def test_write_whole_leaves_only_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file"
    write_whole(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_whole(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def _write(folder, who, count):
    for _ in range(count):
        save_checkpoint(folder / "checkpoint.pt", {"who": who, "x": torch.full((20_000 * who,), float(who))})


def test_two_writers_never_mix_their_files(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(tmp_path, who, 25)) for who in (1, 2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if (tmp_path / "checkpoint.pt").exists():
            state = load_checkpoint(tmp_path / "checkpoint.pt")
            assert (state["x"] == state["who"]).all()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_locked_folder_refuses_another_run_and_removes_partial_files_of_killed_runs(tmp_path):
    for name in ("checkpoint.pt.1-abc.partial", ".probe.1-abc.partial", "film.mp4.partial"):
        (tmp_path / name).write_bytes(b"half")
    first, second = OutputFolder(tmp_path), OutputFolder(tmp_path)
    with first.locked(), first.locked():
        assert [path.name for path in tmp_path.glob("*.partial")] == ["film.mp4.partial"], "the user's file should stay"
        with pytest.raises(BlockingIOError, match="another run is writing to --out"), second.locked():
            pass
    with second.locked():
        pass


def test_folder_check_reports_why_the_folder_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"--out .*file.* cannot be written to: .*(exists|[Nn]ot a directory)"):
            OutputFolder(path).check(0)
    with pytest.raises(ValueError, match=r"--out .* of free disk space, but up to \d+ MiB are needed"):
        OutputFolder(tmp_path / "new").check(2**60)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="cannot be written to: No space left on device"):
        OutputFolder(tmp_path / "new").check(0)
    assert os.listdir(tmp_path / "new") == []
