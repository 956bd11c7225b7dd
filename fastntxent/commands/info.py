"""Show versions, backends, devices and verdicts. For each size, also show which backend "auto" takes, and why."""

from __future__ import annotations

import argparse
import json
import os
import platform
from typing import Any

import torch

from .. import __version__, backends
from ..backends import candidates, checkable, name_of, select
from ..devices import present_devices
from ..verification import policy
from ..verification.process import VERIFY
from ..verification.store import CACHE, cache_folder, model_of
from ..verification.timing import TIMED_DTYPES, TIMED_FEATURES, TIMED_ROWS


def run(given: argparse.Namespace) -> int:
    """Print the result of `collect` as text or JSON."""
    found = collect()
    print(json.dumps(found, indent=1) if given.json else _text(found))
    return 0


def collect() -> dict[str, Any]:
    """Return everything the command prints, as plain values, without checking or timing anything."""
    return {
        "versions": {
            "fastntxent": __version__,
            "torch": torch.__version__,
            "triton": model_of(torch.device("cpu")).triton,
            "python": platform.python_version(),
            "cuda": torch.version.cuda or torch.version.hip or "none",
            "platform": platform.platform(),
        },
        "environment": {name: os.environ.get(name) for name in (CACHE, VERIFY)},
        "cache": str(cache_folder()),
        "backends": {name: status._asdict() for name, status in backends().items()},
        "devices": {str(device): _device(device) for device in present_devices()},
    }


def _device(device: torch.device) -> dict[str, Any]:
    try:
        model = model_of(device)
    except RuntimeError as error:  # a device that fails must not hide the rest of the report
        return {"error": " ".join(str(error).split())}
    verdicts = policy.known_verdicts(device, checkable(device.type))
    return {
        "name": model.name,
        "capability": model.capability,
        "driver": model.driver,
        "verdicts": {name: str(verdicts.get(name, "not checked yet")) for name in checkable(device.type)},
        "auto": _auto(device),
    }


def _auto(device: torch.device) -> dict[str, dict[str, str]]:
    """Return the backend that "auto" takes for each timed size, and why."""
    possible = candidates(device.type)
    if not possible:
        taken = name_of(select("auto", device.type, torch.float32))
        return {"every size": {"backend": taken, "why": "the first backend that loads here"}}
    decision = policy.known_decision(device, possible)
    return {
        f"{str(dtype).removeprefix('torch.')}, {features} features, {rows} rows": dict(
            zip(("backend", "why"), decision.explain(dtype, rows, features), strict=True)
        )
        for dtype in TIMED_DTYPES
        for features in TIMED_FEATURES
        for rows in TIMED_ROWS
    }


def _text(found: dict[str, Any]) -> str:
    versions = found["versions"]
    lines = [", ".join(f"{name} {version}" for name, version in versions.items()), "", "backends"]
    for name, status in found["backends"].items():
        said = status["reason"] if not status["available"] else status["details"] or "available"
        lines.append(f"  {name:10}{said}" + (f"; {status['verdict']}" if status["verdict"] else ""))
    for device, entry in found["devices"].items():
        if "error" in entry:
            lines += ["", f"{device}: {entry['error']}"]
            continue
        lines += ["", f"{device}: {entry['name']}, {entry['capability']}, driver {entry['driver']}"]
        lines += [f"  {name:10}{verdict}" for name, verdict in entry["verdicts"].items()]
        lines += [f"  auto, {size}: {taken['backend']} ({taken['why']})" for size, taken in entry["auto"].items()]
    lines += ["", f"verdicts are stored in {found['cache']}"]
    lines += [f"{name}={value}" for name, value in found["environment"].items() if value]
    return "\n".join(lines)
