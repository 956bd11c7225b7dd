import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import instruction_set
from fastntxent.simclr import Config, ImageData, Trainer

ROOT = Path(__file__).parents[2]


def make_stripes(count, seed):
    """Return noisy 16 x 16 images of three classes, and their labels: stripes across, stripes down, and no stripes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 100, (count, 1, 16, 16), generator=generator)
    images[labels == 0, :, ::4] += 150
    images[labels == 1, :, :, ::4] += 150
    return images.to(torch.uint8), labels


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: two threads gain nothing on such small networks, and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def ctrl_c():
    """Make SIGINT raise KeyboardInterrupt again, because shells start background processes with SIGINT ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="session")
def stripes():
    train, test = make_stripes(83, 0), make_stripes(30, 1)
    return ImageData("stripes", *train, *test, class_names=("across", "down", "plain"))


@pytest.fixture
def make_trainer(stripes, tmp_path):
    """Return a function that makes a trainer, by default on the stripes. An epoch of their 83 images has 3 steps: two
    with 32 images and one with 19.
    """

    def make(folder="run", data=stripes, **options):
        settings = {
            "out": tmp_path / folder, "batch_size": 32, "epochs": 3, "width": 4, "proj_hidden": 16, "proj_dim": 8,
            "device": "cpu", "quiet": True, "augment": "digits", "warmup_epochs": 1.0,
        }  # fmt: skip
        return Trainer(Config(**{**settings, **options}), data)

    return make


@pytest.fixture
def cli():
    """Return a function that runs `python -m fastntxent.simclr` with the given arguments and returns the completed
    process. With `wait=False` it returns the running process, which this fixture kills after the test.
    """
    running = []

    def start(*arguments, wait=True):
        command = [sys.executable, *instruction_set.module("fastntxent.simclr"), *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if not wait:
            running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE))
            return running[-1]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stderr.close()
