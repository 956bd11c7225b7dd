import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc/self/status")

# The program reads /proc, because getrusage may report the peak of the parent process.
GROWTH = """
import sys
from pathlib import Path
from fastntxent.simclr import load_data

def mebibytes(what):
    return int(Path("/proc/self/status").read_text().partition(what)[2].split()[0]) / 1024

load_data("folder", sys.argv[1], 8)
before = mebibytes("VmRSS:")
data = load_data(*sys.argv[2:4], 128 if sys.argv[2] == "folder" else None, in_memory=sys.argv[4], workers=2)
print(mebibytes("VmHWM:") - before, len(data.train_images) + len(data.test_images))
"""


@pytest.fixture
def growth(tmp_path):
    """Return a function that measures the peak growth in MiB of a process's memory while it loads data."""
    for number in range(10):
        (tmp_path / "few").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "few" / f"{number}.png")

    def measure(name, path, in_memory, count):
        command = [sys.executable, "-c", GROWTH, tmp_path / "few", name, path, in_memory]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        grown, loaded = done.stdout.split()
        assert int(loaded) == count
        return float(grown)

    return measure


@pytest.mark.parametrize(
    ("in_memory", "least", "most"), [("yes", 140, 200), pytest.param("no", 0, 50, marks=pytest.mark.slow)]
)
def test_loading_a_folder_takes_little_more_memory_than_the_images_it_keeps(tmp_path, growth, in_memory, least, most):
    (tmp_path / "many").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "many" / "0.png")
    content = (tmp_path / "many" / "0.png").read_bytes()
    for number in range(1, 3000):
        (tmp_path / "many" / f"{number}.png").write_bytes(content)
    # 3,000 images of 3 x 128 x 128 bytes: 141 MiB.
    assert least < growth("folder", tmp_path / "many", in_memory, 3000) < most


@pytest.mark.slow
def test_loading_an_npz_of_floats_takes_less_memory_than_the_floats(tmp_path, growth):
    # 4,000 images of 64 x 64: 125 MiB of float64, 16 MiB of bytes.
    np.savez_compressed(tmp_path / "d.npz", images=np.full((4000, 64, 64), 0.5))
    assert growth("npz", tmp_path / "d.npz", "yes", 4000) < 100
