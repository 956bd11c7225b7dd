"""Every script in examples/ runs as its reader would run it, and the losses and accuracies that it prints improve."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# Arguments before and after the script's name, the module that it needs besides PyTorch and scikit-learn, and the
# figures that it prints.
RUNS = {
    "simclr.py": ([], "--steps 40 --batch 64", None, {"loss", "linear probe", "temperature"}),
    "sup_con.py": ([], "--steps 40", None, {"loss", "linear probe"}),
    "moco.py": ([], "--steps 60 --queue 256", None, {"loss with a full queue", "linear probe"}),
    "clip_cached.py": ([], "--steps 40 --batch 256", None, {"loss", "retrieval"}),
    "lightning_ddp.py": ([], "--steps 20 --batch 64", "lightning", {"loss"}),
    "accelerate_ddp.py": (TORCHRUN, "--cpu --steps 20 --batch 64", "accelerate", {"loss"}),
    "fsdp2.py": (TORCHRUN, "--steps 20 --batch 64", None, {"loss"}),
    "sentence_transformers_mnrl.py": ([], "--steps 40", "sentence_transformers", {"loss", "retrieval"}),
}
# Some libraries import torchvision whenever it is installed, and fail if it was built for a different PyTorch. No
# example needs torchvision, so this code hides it.
WITHOUT_TORCHVISION = """
import importlib.metadata, sys

found = importlib.metadata.distribution

def distribution(name):
    if name == "torchvision":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)

importlib.metadata.distribution = distribution
sys.modules["torchvision"] = None
"""


@pytest.mark.slow  # every script spends ten seconds on imports
@pytest.mark.parametrize("name", RUNS)
def test_example_learns(name, tmp_path):
    before, after, module, figures = RUNS[name]
    if module is not None and importlib.util.find_spec(module) is None:
        pytest.skip(f"needs {module}: pip install '.[examples]'")
    if name == "fsdp2.py" and torch.__version__.startswith("2.6."):
        pytest.skip("needs a newer PyTorch: fully_shard of 2.6 does not run on CPUs")
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TORCHVISION)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path), os.environ.get("PYTHONPATH", ""))),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # otherwise two ranks would need two GPUs
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, *before, EXAMPLES / name, *after.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = re.findall(r"^(\w[\w ]*): ([\d.]+) -> ([\d.]+)( on 2 ranks)?$", done.stdout, re.MULTILINE)
    assert {label for label, *_ in printed} == figures, done.stdout
    assert len(printed) == len(figures), "only one rank should print"
    for label, first, last, on_ranks in printed:
        if "loss" in label:
            assert float(last) < 0.9 * float(first), done.stdout
            assert bool(on_ranks) == name.endswith(("_ddp.py", "fsdp2.py")), done.stdout
        elif label != "temperature":
            assert float(last) > float(first) + 0.05, done.stdout


def test_examples_are_listed_and_short():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    listed = set(re.findall(r"^\| \[(\w+\.py)\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE))
    assert scripts == set(RUNS) == listed
    for name in scripts:
        assert len((EXAMPLES / name).read_text().splitlines()) < 80, name
