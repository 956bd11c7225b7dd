"""What a newcomer does in the first hour, with nothing but the documentation.

The newcomer has a folder of images that is as messy as real folders, and writes an encoder. A run is stopped twice and
ends on two ranks. The trained encoder is then used for search, classification and export.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from benchmarks import instruction_set
from fastntxent import simclr
from fastntxent.simclr import Config, Trainer, load_encoder

Image = pytest.importorskip("PIL.Image")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: pipes, links, file names with any bytes")

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"

EACH = 40  # pictures per class, a fifth of which are held out
CLASSES = ("red cats", "$\\frac{$", os.fsdecode(b"caf\xe9"))
PRINTED = ["$\\frac{$", "caf?", "red cats"]

# The batch norms of this encoder contain an activation and a dropout, as timm's do.
ENCODER = """
from torch import nn


class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.drop = nn.Dropout2d(0.1)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def net(channels, image_size, features=24):
    return nn.Sequential(
        nn.Conv2d(channels, 12, 3, 2, 1, bias=False),
        BatchNormAct2d(12),
        nn.Conv2d(12, features, 3, 2, 1, bias=False),
        BatchNormAct2d(features),
        nn.AdaptiveAvgPool2d(1),
    )
"""

# 96 training images: 3 steps per epoch.
SETTINGS = """
data = "folder"
data-dir = "photos"
skip-bad = true
image_size = 24
model = "my_net:net"
epochs = 30
batch_size = 32
log_every = 5
eval-limit = 100
"""
STEPS = 90


def picture(label: int, random: np.random.Generator) -> np.ndarray:
    """Return a picture (H, W, 3) of noise with stripes across, down or diagonal."""
    height, width = random.integers(30, 50, 2)
    y, x = np.mgrid[:height, :width]
    where = (y, x, x + y)[label] + random.integers(9)
    pixels = random.integers(0, 110, (height, width, 3))
    pixels[where % random.integers(5, 9) < 2] += random.integers(80, 145, 3)
    return pixels.astype(np.uint8)


def save(pixels: np.ndarray, place: Path, index: int) -> None:
    """Save a picture in one of the formats found in real folders."""
    image = Image.fromarray(pixels)
    path = place / f"img {index:02}"
    if index % 8 == 0:
        exif = Image.Exif()
        exif[0x0112] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(f"{path}.jpg", exif=exif)
    elif index % 8 == 1:
        image.convert("CMYK").save(f"{path}.JPG")
    elif index % 8 == 2:
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(f"{path}.png")
    elif index % 8 == 3:
        image.save(f"{path}.gif", save_all=True, append_images=[image.rotate(90)])
    else:
        image.save(f"{path}.png")


def odd_folder(root: Path, elsewhere: Path) -> None:
    """Make three class folders of pictures, one of them a link, and the stray entries that real folders collect."""
    random = np.random.default_rng(0)
    cats = root / CLASSES[0]
    places = (cats, elsewhere / "third", root / CLASSES[2])
    for label, place in enumerate(places):
        place.mkdir(parents=True)
        for index in range(EACH):
            save(picture(label, random), place, index)
    (root / CLASSES[1]).symlink_to(places[1])

    sound = (cats / "img 04.png").read_bytes()
    (cats / "broken.png").write_bytes(sound[:700])
    (places[1] / "empty.jpeg").touch()
    for hidden in (root / ".ipynb_checkpoints", cats / ".ipynb_checkpoints"):
        hidden.mkdir()
        (hidden / "img 04-checkpoint.png").write_bytes(sound)
    (cats / "._x.png").write_bytes(b"\0\5\x16\7Mac OS X")
    for place in (root, cats):
        (place / ".DS_Store").write_bytes(b"Bud1")
        (place / "Thumbs.db").write_bytes(b"\xd0\xcf")
    (cats / "notes.txt").write_text("of the cats")
    (root / "empty class").mkdir()
    (cats / "loop").symlink_to(root)
    (root / "a").symlink_to(root / "b")
    (root / "b").symlink_to(root / "a")
    os.mkfifo(cats / "pipe.png")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def stop(process: subprocess.Popen[bytes], log: Path, row: int, number: int) -> tuple[int, list[str]]:
    """Send signal `number` once the log has a row for step `row`. Return the step at which the run stopped, and the
    arguments that resume it.
    """
    while process.poll() is None and (not log.exists() or f"\n{row}," not in log.read_text()):
        time.sleep(0.01)
    process.send_signal(number)
    errors = process.communicate()[1].decode()
    assert process.returncode == 128 + number, errors
    found = re.search(rf"interrupted at step (\d+) of {STEPS}; checkpoint saved; continue with (.*)", errors)
    assert found, errors
    python, *arguments = shlex.split(found[2])
    assert python == "python"
    assert arguments[:2] == ["-m", "fastntxent.simclr"]
    return int(found[1]), arguments[2:]


def metrics(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def log_of(run: Path) -> dict[str, list[float]]:
    with open(run / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def snippets(page: Path, word: str) -> list[str]:
    found = [code for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) if word in code]
    assert found, f"{page.name} has no code with {word}"
    return found


class Place(NamedTuple):
    folder: Path
    said: str
    """The stderr of the run."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with pictures, an encoder, settings and a finished run in `runs/mine`, and the stderr of that run."""
    folder = tmp_path_factory.mktemp("newcomer")
    odd_folder(folder / "photos", folder / "elsewhere")
    (folder / "my_net.py").write_text(ENCODER)
    (folder / "mine.toml").write_text(SETTINGS)
    command = [sys.executable, *instruction_set.module("fastntxent.simclr"), "--config", "mine.toml"]
    done = subprocess.run(
        [*command, "--out", "runs/mine"], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "report:" in done.stdout
    return Place(folder, done.stderr)


@pytest.fixture
def here(home, monkeypatch):
    monkeypatch.chdir(home.folder)
    monkeypatch.syspath_prepend(home.folder)  # python -m finds the encoder in the current directory by itself
    yield home.folder
    sys.modules.pop("my_net", None)


@pytest.mark.slow
def test_bad_files_end_the_run_and_are_all_named(cli, here):
    done = cli("--data", "folder", "--data-dir", "photos", "--out", "runs/bad")
    assert done.returncode == 2
    assert done.stdout == ""
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"2 of {3 * EACH + 2} images of photos cannot be read" in error
    assert "red cats/broken.png (image file is truncated)" in error
    assert "$\\frac{$/empty.jpeg (not an image" in error
    assert "--skip-bad" in error
    assert "Traceback" not in done.stderr
    assert not Path("runs/bad/checkpoint.pt").exists()


@pytest.mark.slow
def test_run_notes_what_it_left_out(home):
    notes = [line.removeprefix("note: ") for line in home.said.splitlines() if line.startswith("note: ")]
    said = "\n".join(notes)
    assert len(notes) == 6, said
    for words in (
        r"1 folder without an image: empty class",
        r"5 hidden entries: .*\.ipynb_checkpoints.*\._x\.png",
        r"without an image suffix: \.db \(2\), \.txt \(1\)",
        r"broken links, pipes or devices: a, b, red cats/pipe\.png",
        r"link back to a parent folder: red cats/loop",
        rf"2 of {3 * EACH + 2} images that cannot be read: .*empty\.jpeg .*broken\.png",
    ):
        assert re.search(words, said), said
    data = metrics(home.folder / "runs/mine")["data"]
    assert data["notes"] == notes
    assert data["train_images"] + data["test_images"] == 3 * EACH
    assert data["test_images"] == 3 * (EACH // 5)


def test_run_writes_the_files_that_the_page_lists(here):
    run = Path("runs/mine")
    table = (ROOT / "docs/trainer.md").read_text().split("## What a run writes")[1].split("\n## ")[0]
    files = re.findall(r"`([\w.]+\.(?:toml|csv|pt|json|html|png))`", table)
    assert len(files) == 8
    assert [name for name in files if not (run / name).exists()] == []
    page = (run / "report.html").read_text()
    assert "cannot be read" in page
    scores = metrics(run)["evaluation"]["scores"]
    assert scores["knn"]["trained"] >= 0.8, "stripes across, down and diagonal are easy to tell apart"
    log = log_of(run)
    assert log["step"] == [*range(0, STEPS, 5), STEPS - 1]
    assert log["seconds"] == sorted(log["seconds"])


@pytest.mark.slow
def test_run_stopped_twice_continues_on_two_ranks_without_a_gap(cli, here):
    again = Path("runs/again")
    log = again / "log.csv"
    process = cli("--config", "runs/mine/config.toml", "--out", again, wait=False)
    first, go_on = stop(process, log, 10, signal.SIGTERM)
    second, go_on = stop(cli(*go_on, wait=False), log, 30, signal.SIGINT)
    assert 10 < first < 30 < second < STEPS
    stopped = log_of(again)

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [*instruction_set.module("fastntxent.simclr"), *go_on]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report:") == 1, "only one rank should print the summary"

    whole, parts = (metrics(Path("runs/mine")), metrics(again))
    assert parts["machine"]["ranks"] == 2
    assert parts["timing"]["steps"] == STEPS
    for name, curve in whole["history"]["steps"].items():
        ours = parts["history"]["steps"][name]
        assert len(ours) == STEPS
        assert ours[:second] == curve[:second], "on the same device a resumed run should repeat every bit"
    # Each rank draws its own dropout masks, so from here on the curves agree only up to the noise of dropout.
    losses = [np.array(run["history"]["steps"]["loss"]) for run in (whole, parts)]
    fell = losses[0][0] - losses[0][-9:].mean()
    for part in (slice(second, second + 9), slice(-9, None)):
        assert abs(losses[0][part].mean() - losses[1][part].mean()) < 0.2 * fell
    ended = log_of(again)
    assert ended["step"] == log_of(Path("runs/mine"))["step"]
    assert ended["seconds"] == sorted(ended["seconds"])
    for name, column in stopped.items():
        assert ended[name][: len(column)] == column, "rows in the log should not change"


def test_pages_code_searches_and_classifies_an_embedded_folder(cli, here, capsys):
    done = cli("embed", "photos", "--checkpoint", "runs/mine", "--out", "features.npz", "--skip-bad")
    assert done.returncode == 0, done.stderr
    assert "red cats/broken.png" in done.stderr
    with np.load("features.npz") as file:
        assert file["features"].shape == (3 * EACH, 24)
        assert file["features"].dtype == np.float32
        assert file["class_names"].tolist() == PRINTED
        assert np.bincount(file["labels"]).tolist() == [EACH] * 3
        paths = [str(path) for path in file["paths"]]
    assert len(set(paths)) == 3 * EACH
    assert sum((Path("photos") / path).is_file() for path in paths) >= 2 * EACH, (
        "files should be found, except those of the class caf?"
    )

    for code in snippets(ROOT / "docs/encoder.md", "zero_shot_classify"):
        exec(code, {})
    said = capsys.readouterr().out
    assert [line.split(" is near ")[0] for line in said.splitlines() if " is near " in line] == paths[:3]
    assert float(said.split("accuracy: ")[1]) >= 0.8


def test_exported_encoder_gives_the_features_of_the_loaded_encoder(cli, here):
    done = cli("export", "--checkpoint", "runs/mine", "--out", "encoder.pt2")
    assert done.returncode == 0, done.stderr
    exported = torch.export.load("encoder.pt2").module()
    encoder = load_encoder("runs/mine")
    assert (encoder.channels, encoder.image_size, encoder.feature_dim) == (3, 24, 24)
    for count in (1, 5):
        images = torch.rand(count, 3, 24, 24)
        with torch.no_grad():
            torch.testing.assert_close(exported(images), encoder(images))


def test_pages_code_trains_on_a_data_loader(here):
    (code,) = snippets(ROOT / "docs/trainer.md", "DataLoader")
    names: dict = {}
    exec(code, names)
    assert names["features"].shape == (8, 32)
    assert Path("runs/python/log.csv").exists()


class Stripes(Dataset):
    """A newcomer's dataset: floating-point images with text labels."""

    def __len__(self):
        return 60

    def __getitem__(self, index):
        image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(index)) * 0.5
        image[:, ::4] += 0.5 * (index % 2)
        return image, ("plain", "across")[index % 2]


def test_trainer_takes_a_dataset_and_load_encoder_returns_the_trained_encoder(here):
    my_net = importlib.import_module("my_net")
    config = Config(epochs=2, batch_size=16, temperature=0.2, out=Path("runs/dataset"), quiet=True)
    trainer = Trainer(config, Stripes(), encoder=my_net.net(3, 16))
    trainer.fit()
    assert trainer.data.class_names == ("across", "plain")
    with pytest.raises(ValueError, match="encoder=module"):
        load_encoder("runs/dataset")
    encoder = load_encoder("runs/dataset", encoder=my_net.net(3, 16))
    images = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(encoder(images), trainer.model.encoder.eval()(images))


@pytest.mark.slow
def test_resumed_finished_run_is_evaluated_again_with_the_same_scores(cli, here):
    shutil.copytree("runs/mine", "runs/judged")
    assert cli("--resume", "--out", "runs/judged", "--quiet").returncode == 0
    before, after = (metrics(Path(run))["evaluation"]["scores"] for run in ("runs/mine", "runs/judged"))
    assert after == before


def test_pages_call_only_functions_that_exist():
    pages = [README, *(ROOT / "docs").glob("*.md")]
    named = {name for page in pages for name in re.findall(r"fastntxent\.simclr\.(\w+)\(", page.read_text())}
    assert named
    assert [name for name in sorted(named) if not callable(getattr(simclr, name, None))] == []
