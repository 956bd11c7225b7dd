"""Verdicts and times, stored in one JSON file per device model in the user's cache folder.

Each entry stores the key for which it is valid: kernels, device, driver, PyTorch and Triton. An entry with a different
key counts as absent, and so does a file that is damaged or has a different format. `FASTNTXENT_CACHE` sets the folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from ..files import write_whole
from .verdict import Verdict

FORMAT = 1
CACHE = "FASTNTXENT_CACHE"
PACKAGE = Path(__file__).parents[1]
# While another process checks the same device model, a process waits SAID_AFTER seconds, announces that it is waiting,
# and waits up to PATIENCE seconds more.
PATIENCE = 600.0
SAID_AFTER = 10.0
# Names of Triton's packages, and environment variables that change how it compiles a kernel.
TRITONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows")
TRITON_VARIABLES = (
    "TRITON_INTERPRET",
    "TRITON_PTXAS_PATH",
    "TRITON_DEFAULT_FP_FUSION",
    "DISABLE_LLVM_OPT",
    "DISABLE_PTXAS_OPT",
)


def cache_folder() -> Path:
    """Return the folder of the files: $FASTNTXENT_CACHE if set, else the folder that platformdirs would choose."""
    given = os.environ.get(CACHE)
    if given:
        return Path(given).absolute()
    home = Path(os.path.expanduser("~"))
    if not home.is_absolute():  # no home, as in some containers: use a path that is not writable
        home = Path(os.devnull)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "fastntxent" / "Cache"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "fastntxent"
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else home / ".cache") / "fastntxent"


class Model(NamedTuple):
    """The properties of a device on which kernels may depend, and the versions of the driver, PyTorch and Triton."""

    name: str
    capability: str
    driver: str
    torch: str
    triton: str
    multiprocessors: int = 0  # under MIG or MPS, fewer than the whole device has

    @property
    def file_name(self) -> str:
        """The name of this model's file, valid on any file system."""
        words = re.sub(r"[^a-z0-9]+", "-", f"{self.name} {self.capability}".lower()).strip("-")
        return f"{words[:100]}.json"


@functools.cache
def model_of(device: torch.device) -> Model:
    """Return the model of a device of this machine."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
        return Model(
            properties.name,
            capability or f"sm_{properties.major}{properties.minor}",
            _driver(),
            torch.__version__,
            _triton_version(),
            properties.multi_processor_count,
        )
    return Model(
        _processor(), torch.backends.cpu.get_cpu_capability(), platform.release(), torch.__version__, _triton_version()
    )


def _triton_version() -> str:
    """Return Triton's version, and the variables that change its kernels, such as a switch to the interpreter."""
    if not importlib.util.find_spec("triton"):
        return "none"
    from importlib.metadata import PackageNotFoundError, version

    found = "unknown"
    for name in TRITONS:
        with contextlib.suppress(PackageNotFoundError):
            found = version(name)
            break
    return " ".join([found, *(f"{name}={os.environ[name]}" for name in TRITON_VARIABLES if os.environ.get(name))])


def _driver() -> str:
    """Return the version of the GPU driver, and the CUDA version that the driver's library supports."""
    path = "/sys/module/amdgpu/version" if torch.version.hip else "/proc/driver/nvidia/version"
    said = []
    with contextlib.suppress(OSError):
        said.append(Path(path).read_text().splitlines()[0].strip())
    read = getattr(torch._C, "_cuda_getDriverVersion", None)
    if read:
        said.append(f"CUDA {read()}")
    return ", ".join(said) or "unknown"


def _processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine() or "processor"


@functools.cache
def sources_key(module: str) -> str:
    """Return a hash of the code behind a verdict: the package's backends, operators, checks and tolerances, and this
    backend's compiled kernels or external module."""
    digest = hashlib.sha256()
    folders = [PACKAGE / part for part in ("backends", "ops", "verification")]
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".json"))
    if module.startswith("fastntxent.backends."):
        files += sorted(PACKAGE.glob(f"_{module.split('.')[2]}.*"))  # fastntxent/_cuda.abi3.so
    files.append(PACKAGE / "error_budget.py")
    found = importlib.util.find_spec(module)
    if found and found.origin and Path(found.origin) not in files:
        files.append(Path(found.origin))
    for path in files:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Store:
    """The file of a device model.

    Args:
        model: the device model.
        folder: the folder of the file, or None for `cache_folder()`.
    """

    _complained = False
    # Entries that could not be written, by file. Only this process knows them.
    _unsaved: ClassVar[dict[Path, dict[tuple[str, str], Any]]] = {}

    def __init__(self, model: Model, folder: Path | None = None) -> None:
        self.model = model
        self.path = (folder or cache_folder()) / model.file_name

    def verdict(self, backend: str, module: str) -> Verdict | None:
        """Return the verdict on a backend; None if there is none for these kernels, this driver and this PyTorch."""
        entry = self._read()["verdicts"].get(backend)
        try:
            if entry["key"] != self._key(module):
                return None
            return Verdict.from_dict(entry["verdict"])
        except (TypeError, KeyError, ValueError):
            return None

    def keep(self, backend: str, module: str, verdict: Verdict) -> None:
        """Store a verdict, unless it is "not available", which says nothing about the kernels."""
        if verdict.status != "not available":
            self._update("verdicts", backend, {"key": self._key(module), "verdict": verdict.to_dict()})

    def times(self, modules: dict[str, str]) -> dict[str, Any] | None:
        """Return the times of these backends (modules by name); None if there are none for these exact kernels."""
        entry = self._read()["times"].get("auto")
        try:
            return _checked_times(entry["times"]) if entry["keys"] == self._keys(modules) else None
        except (AttributeError, TypeError, KeyError, ValueError):
            return None

    def keep_times(self, modules: dict[str, str], times: dict[str, Any]) -> None:
        """Store the times of these backends."""
        self._update("times", "auto", {"keys": self._keys(modules), "times": times})

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        """Hold a lock in this block, so that only one process checks this model while the others wait.

        The block runs without the lock if no lock is possible, for example because the folder is not writable. It also
        runs without the lock if another process holds it for more than SAID_AFTER + PATIENCE seconds.
        """
        lock = self._acquire_lock()
        try:
            yield
        finally:
            if lock:
                lock.release()

    def _acquire_lock(self) -> Any:
        from filelock import FileLock, Timeout  # imported here, so that `import fastntxent` does not need it

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{self.path}.lock")
            try:
                lock.acquire(timeout=SAID_AFTER)
            except Timeout:
                print(
                    f"fastntxent: waiting for another process, which is checking {self.model.name}",
                    file=sys.stderr,
                    flush=True,
                )
                lock.acquire(timeout=PATIENCE)
        except Timeout:
            warnings.warn(
                f"another process has held {self.path}.lock for {PATIENCE:g} s: continuing without it", stacklevel=4
            )
            return None
        except (OSError, NotImplementedError):
            return None
        return lock

    def _key(self, module: str) -> dict[str, str]:
        return {**self.model._asdict(), "kernels": sources_key(module)}

    def _keys(self, modules: dict[str, str]) -> dict[str, dict[str, str]]:
        return {name: self._key(module) for name, module in modules.items()}

    def _read(self) -> dict[str, Any]:
        """Return the file's content, with the entries that could not be written.

        A file that is absent, damaged or in a different format counts as empty.
        """
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT or not all(
                isinstance(content[part], dict) for part in ("verdicts", "times")
            ):
                raise ValueError("another format")
        except (OSError, ValueError, KeyError, TypeError):
            content = {"format": FORMAT, "verdicts": {}, "times": {}}
        for (part, name), entry in self._unsaved.get(self.path, {}).items():
            content[part][name] = entry
        return content

    def _update(self, part: str, name: str, entry: dict[str, Any]) -> None:
        content = self._read()
        content["device"] = self.model._asdict()
        content[part][name] = entry
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(content, indent=1) + "\n"
            write_whole(self.path, lambda file: file.write(text.encode()))
            self._unsaved.pop(self.path, None)
        except OSError as error:
            self._unsaved.setdefault(self.path, {})[part, name] = entry
            if not Store._complained:
                Store._complained = True
                warnings.warn(
                    f"fastntxent cannot store its verdicts in {self.path.parent} ({error.strerror or error}), so "
                    f"each process checks the device again; set {CACHE} to another folder",
                    stacklevel=2,
                )


def _checked_times(times: dict[str, Any]) -> dict[str, Any]:
    """Return the times if they are positive numbers by dtype, features, rows and backend; else raise."""
    for of_dtype in times.values():
        for features, of_features in of_dtype.items():
            for rows, of_rows in of_features.items():
                if int(features) < 1 or int(rows) < 1 or not all(float(value) > 0 for value in of_rows.values()):
                    raise ValueError("no times")
    return times
