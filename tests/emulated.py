"""The CUDA kernels on an emulated device: the same sources, built with a host compiler (csrc/cuda/host)."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
# The emulator's fibers use ucontext, which macOS deprecates and Windows lacks.
COMPILER = (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")) if sys.platform == "linux" else None
H100 = 232_448  # bytes of shared memory available to a block
GEFORCE = 101_376


@functools.cache
def emulated_kernels() -> ModuleType:
    """Return the module `_cuda` with the emulated device, built once."""
    assert COMPILER is not None
    folder = tempfile.mkdtemp(prefix="fastntxent-emulated-")
    target = Path(folder) / "_cuda.abi3.so"
    command = [
        *(COMPILER, "-std=c++17", "-O3", "-shared", "-fPIC"),
        *("-DFNTX_EMULATED", "-DPy_LIMITED_API=0x030A0000", f"-I{sysconfig.get_path('include')}"),
        *(SOURCES / "module.cpp", SOURCES / "host" / "launch.cpp", SOURCES / "host" / "emulator.cpp", "-o", target),
    ]
    try:
        subprocess.run(command, check=True)
        spec = importlib.util.spec_from_file_location("_cuda", target)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        shutil.rmtree(folder)
    return module
