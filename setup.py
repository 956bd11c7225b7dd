"""The native parts; everything else is in pyproject.toml.

`fastntxent._cpu` is C++17 for GCC or Clang and needs no PyTorch to build. `csrc/cpu/kernels.cpp` is compiled once per
instruction set, and the machine that runs it chooses. Where it cannot be built, the install goes on without it and
`fastntxent.backends()` says so.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CPU = Path("csrc/cpu")
X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = {
    "portable": [],
    **(
        {
            "avx2": ["-mavx2", "-mfma"],
            "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"],
        }
        if X86
        else {}
    ),
}
FLAGS = ["-std=c++17", "-O3", "-g0", "-Wall", "-Wextra", "-fvisibility=hidden"]
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler has none: threads of our own there


class BuildExt(build_ext):
    def build_extension(self, ext: Extension) -> None:
        """Compile the kernels once per instruction set, then the rest, and link all of it."""
        try:
            for name, flags in INSTRUCTION_SETS.items():
                ext.extra_objects += self.compiler.compile(
                    [str(CPU / "kernels.cpp")],
                    output_dir=str(Path(self.build_temp) / name),
                    extra_postargs=[*FLAGS, *flags],
                    depends=ext.depends,
                )
            super().build_extension(ext)
        except Exception as error:
            self.announce(f"fastntxent: no CPU kernels ({error}); plain PyTorch serves instead", level=4)


setup(
    ext_modules=[
        Extension(
            "fastntxent._cpu",
            [str(CPU / name) for name in ("dispatch.cpp", "loss.cpp", "memory.cpp", "module.cpp", "team.cpp")],
            depends=[str(path) for path in (CPU / "kernels.cpp", *sorted(CPU.glob("*.h")))],  # a source archive's, too
            define_macros=[("Py_LIMITED_API", "0x030A0000"), *([("FNTX_X86", "1")] if X86 else [])],
            extra_compile_args=[*FLAGS, *OPENMP],
            extra_link_args=OPENMP,
            py_limited_api=True,
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
