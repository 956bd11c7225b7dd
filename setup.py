"""Builds the native extensions. Everything else is in pyproject.toml.

`fastntxent._cpu` is C++17 for GCC or Clang and builds without PyTorch. `csrc/cpu/kernels.cpp` is compiled once per
instruction set, and one set is chosen at run time to suit the processor. If the build fails, the install continues
without the extension: `pip install -v` shows the reason, and `fastntxent.backends()` lists the backend as unavailable.

`fastntxent._cuda` is built with ninja if nvcc is found, for every architecture in `CUDA_CODE` that this nvcc supports.
The build needs neither a GPU nor PyTorch. FASTNTXENT_CUDA=0 skips it, and FASTNTXENT_CUDA=1 makes a failure an error.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from multiprocessing.pool import ThreadPool
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CPU = Path("csrc/cpu")
CUDA = Path("csrc/cuda")
SHARED = sorted(Path("csrc").glob("*.h"))  # used by both extensions
CUDA_CODE = ("80", "86", "89", "90", "100", "103", "110", "120")  # and PTX for the oldest that nvcc supports
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]
INSTRUCTION_SETS = {
    "baseline": [],  # called "neon" on aarch64, "portable" elsewhere
    **({"avx2": ["-mavx2", "-mfma"], "avx512": AVX512} if X86 else {}),
}
# These sets multiply bfloat16 rows without widening them. GCC before 11 does not know the flags.
BFLOAT_SETS = {
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
FLAGS = ["-std=c++17", "-O3", "-g0", "-Wall", "-Wextra", "-fvisibility=hidden"]
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler lacks OpenMP; our own threads replace it


LIMITED_API = ("Py_LIMITED_API", "0x030A0000")


def find_nvcc() -> str | None:
    """Return the path of nvcc in CUDA_HOME (or CUDA_PATH) if that is set, else on PATH. None if there is no nvcc."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


class BuildExt(build_ext):
    def run(self) -> None:
        # A library left by an earlier build must not be mistaken for a new one.
        if self.inplace or self.editable_mode:
            for ext in self.extensions:
                Path("fastntxent", Path(self.get_ext_filename(ext.name)).name).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "fastntxent._cuda":
            self.build_cuda(ext)
        else:
            self.build_cpu(ext)

    def build_cpu(self, ext: Extension) -> None:
        """Compile the kernels once per instruction set, then the rest, and link everything."""
        # If this build fails, the kernels of an earlier build must not remain.
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        try:
            for name, flags in INSTRUCTION_SETS.items():
                ext.extra_objects += self.compile_kernels(ext, name, flags)
            if X86:
                self.add_bfloat_sets(ext)
            super().build_extension(ext)
        except Exception as error:
            self.announce(f"fastntxent: no CPU kernels ({error}); plain PyTorch is used instead", logging.WARNING)

    def compile_kernels(self, ext: Extension, name: str, flags: list[str]) -> list[str]:
        return self.compiler.compile(
            [str(CPU / "kernels.cpp")],
            output_dir=str(Path(self.build_temp) / name),
            extra_postargs=[*FLAGS, *flags],
            depends=ext.depends,
        )

    def add_bfloat_sets(self, ext: Extension) -> None:
        """Compile the kernels that multiply bfloat16 rows, if the compiler supports them."""
        try:
            objects = [self.compile_kernels(ext, name, flags) for name, flags in BFLOAT_SETS.items()]
        except Exception as error:
            self.announce(f"fastntxent: no CPU kernels for AVX512_BF16 and AMX ({error})", logging.WARNING)
            return
        ext.extra_objects += [path for paths in objects for path in paths]
        ext.define_macros.append(("FNTX_BFLOAT", "1"))

    def build_cuda(self, ext: Extension) -> None:
        """Compile changed sources with nvcc, in parallel on all processors, and link the extension."""
        wanted = os.environ.get("FASTNTXENT_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            raise ValueError(f"FASTNTXENT_CUDA must be 'auto', '0' or '1', got {wanted!r}")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)
        if wanted == "0":
            return
        try:
            nvcc = find_nvcc()
            if nvcc is None:
                raise RuntimeError("there is no nvcc in CUDA_HOME (or CUDA_PATH) or, if neither is set, on PATH")
            ninja = shutil.which("ninja")
            if ninja is None:
                raise RuntimeError("ninja is not on PATH: pip install ninja")
            target.parent.mkdir(parents=True, exist_ok=True)
            objects = Path("build/cuda").resolve()  # persists, unlike build_temp of an editable install
            objects.mkdir(parents=True, exist_ok=True)
            macros = [f"-D{name}={value}" for name, value in ext.define_macros]
            includes = [f"-I{folder}" for folder in self.include_dirs]
            plan = objects / "build.ninja"
            plan.write_text(ninja_file(nvcc, [*macros, *includes], map(Path, ext.sources), objects, target))
            run([ninja, "-f", str(plan)])
        except Exception as error:
            if wanted == "1":
                raise RuntimeError(f"FASTNTXENT_CUDA=1, but the CUDA kernels cannot be built: {error}") from error
            self.announce(f"fastntxent: no CUDA kernels ({error})", logging.WARNING)


def ninja_file(nvcc: str, flags: list[str], sources: Iterable[Path], objects: Path, target: Path) -> str:
    """Return the content of build.ninja. Header dependencies come from the depfiles that nvcc writes."""

    def escaped(text: object, special: str = r"[$]") -> str:
        return re.sub(f"({special})", r"$\1", str(text))

    def path(of: Path) -> str:
        return escaped(of, r"[$ :]")

    compiler = [nvcc, "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *flags]
    lines = [
        f"builddir = {path(objects)}",  # ninja keeps its log here
        f"nvcc = {escaped(shlex.join(compiler))}",
        "rule compile",
        "  command = $nvcc $code -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {escaped(shlex.quote(nvcc))} -shared -cudart static $in -o $out",
    ]
    made = []
    for source in sources:
        made.append(path(objects / f"{source.stem}.o"))
        lines += [f"build {made[-1]}: compile {path(source)}"]
        if source.suffix == ".cu":
            lines += [f"  code = --threads 0 {escaped(shlex.join(gencode(nvcc)))}"]
    return "\n".join([*lines, f"build {path(target)}: link {' '.join(made)}", ""])


def gencode(nvcc: str) -> list[str]:
    """Return nvcc's flags for machine code and PTX: machine code for each architecture in `CUDA_CODE` that nvcc
    supports, and PTX for the oldest of these."""
    with tempfile.TemporaryDirectory() as folder, ThreadPool() as pool:
        probe = Path(folder) / "probe.cu"
        probe.write_text("__global__ void probe() {}\n")

        def compiles(code: str) -> bool:
            flags = [f"-gencode=arch=compute_{code},code=sm_{code}", "-cubin", "-o", str(probe.with_suffix(f".{code}"))]
            return subprocess.run([nvcc, *flags, str(probe)], capture_output=True).returncode == 0

        codes = [code for code, known in zip(CUDA_CODE, pool.map(compiles, CUDA_CODE), strict=True) if known]
    if not codes:
        raise RuntimeError(f"{nvcc} supports none of {', '.join(f'sm_{code}' for code in CUDA_CODE)}")
    images = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in codes]
    return [*images, f"-gencode=arch=compute_{codes[0]},code=compute_{codes[0]}"]


def run(command: list[str]) -> None:
    """Run a command; if it fails, raise RuntimeError with its output."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")


setup(
    ext_modules=[
        Extension(
            "fastntxent._cpu",
            [str(CPU / name) for name in ("dispatch.cpp", "loss.cpp", "memory.cpp", "module.cpp", "team.cpp")],
            # These files also go into a source archive.
            depends=[str(path) for path in (CPU / "kernels.cpp", *sorted(CPU.glob("*.h")), *SHARED)],
            define_macros=[LIMITED_API, *([("FNTX_X86", "1")] if X86 else [])],
            extra_compile_args=[*FLAGS, *OPENMP],
            extra_link_args=OPENMP,
            py_limited_api=True,
            optional=True,
        ),
        Extension(
            "fastntxent._cuda",
            [str(path) for path in (*sorted(CUDA.glob("*.cu")), CUDA / "launch.cpp", CUDA / "module.cpp")],
            depends=[str(path) for path in (*sorted(CUDA.glob("*.h")), *sorted(CUDA.glob("host/*")), *SHARED)],
            define_macros=[LIMITED_API],
            py_limited_api=True,
            optional=True,
        ),
    ],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
