"""Installation: the contents and requirements of the wheel and the source archive, and the build of the kernels."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastntxent

CHECKOUT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, "."]
    # nvcc would take minutes, and no test looks for CUDA kernels in the wheel.
    environment = {**os.environ, "FASTNTXENT_CUDA": "0"}
    subprocess.run(command, check=True, cwd=CHECKOUT, env=environment)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(wheel.namelist())
    sources = {str(p.relative_to(CHECKOUT)) for p in (CHECKOUT / "fastntxent").rglob("*.py")}
    assert sources <= names
    assert "fastntxent/py.typed" in names
    metadata = f"fastntxent-{fastntxent.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} <= {"fastntxent", metadata}
    assert any(name.endswith("LICENSE") for name in names)


@pytest.mark.slow
def test_wheel_requires_only_torch(wheel):
    (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    required = re.findall(r"^Requires-Dist: (.*)$", wheel.read(metadata).decode(), re.MULTILINE)
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.6"]


def test_source_archive_holds_every_file_that_git_tracks(tmp_path):
    listed = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True)
    if listed.returncode or not (CHECKOUT / ".git").exists():
        pytest.skip("needs a git checkout")
    tracked = {name for name in listed.stdout.splitlines() if (CHECKOUT / name).exists()} - {".gitignore"}
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "-e", tmp_path, "sdist", "-d", tmp_path]
    subprocess.run(command, check=True, cwd=CHECKOUT)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked <= names
    assert not {name for name in names if name.endswith((".so", ".pyc"))}


def test_failed_build_is_announced(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, tmp_path / name)
    for folder in ("fastntxent", "csrc"):
        shutil.copytree(CHECKOUT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    environment = {**os.environ, "FASTNTXENT_CUDA": "0", "CC": "false", "CXX": "false"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    built = subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "fastntxent: no CPU kernels" in built.stdout + built.stderr
    assert not list(tmp_path.glob("fastntxent/*.so"))


def test_failed_build_leaves_no_kernels_of_an_earlier_build(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fastntxent/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(CHECKOUT / name, tmp_path / name)
    left = tmp_path / "build" / "lib" / "fastntxent" / f"_cpu.abi3{sysconfig.get_config_var('SHLIB_SUFFIX')}"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of an earlier build")
    environment = {**os.environ, "FASTNTXENT_CUDA": "0", "CC": "false", "CXX": "false"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", "build/lib"]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True)
    assert not left.exists()


def test_build_does_not_require_torch():
    # If it did, an isolated build would download several gigabytes for a second copy of torch.
    (requires,) = re.findall(r"^requires = (.*)$", (CHECKOUT / "pyproject.toml").read_text(), re.MULTILINE)
    assert "setuptools" in requires
    assert "torch" not in requires


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell to run a stand-in for nvcc")
@pytest.mark.parametrize(
    ("known", "built"), [("8[069]|90|100", ["80", "86", "89", "90", "100"]), ("90", ["90"]), ("75", [])]
)
def test_cuda_kernels_are_built_for_the_chips_that_nvcc_supports(tmp_path, known, built):
    for folder in ("fastntxent", "csrc"):
        shutil.copytree(CHECKOUT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, tmp_path / name)
    tools = tmp_path / "cuda" / "bin"
    tools.mkdir(parents=True)
    # The stand-in lists more chips than it compiles for, as nvcc 11.8 does with sm_90a.
    nvcc = f'case "$*" in --list*) echo sm_80 sm_90 sm_120 ;; esac; echo "$*" | grep -Eq "code=sm_({known})( |$)"'
    for name, script in (("nvcc", nvcc), ("ninja", "exit 1")):
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    environment = {**os.environ, "FASTNTXENT_CUDA": "1", "CUDA_HOME": str(tools.parent), "CC": "false", "CXX": "false"}
    environment["PATH"] = f"{tools}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    if built:
        plan = (tmp_path / "build" / "cuda" / "build.ninja").read_text()
        assert re.findall(r"code=sm_(\w+)", plan) == 3 * built  # three sources
        assert f"arch=compute_{built[0]},code=compute_{built[0]}" in plan
    else:
        assert "supports none of sm_80, sm_86" in done.stdout + done.stderr


@pytest.mark.parametrize("wanted", ["0", "auto"])
def test_build_without_cuda_deletes_the_cuda_library_of_an_earlier_build(tmp_path, wanted):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fastntxent/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(CHECKOUT / name, tmp_path / name)
    left = tmp_path / "fastntxent" / "_cuda.abi3.so"
    left.write_bytes(b"of another build")
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    environment = {**os.environ, "FASTNTXENT_CUDA": wanted, "CUDA_HOME": str(nvcc.parent.parent)}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True)
    assert not left.exists()
