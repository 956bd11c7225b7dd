"""Versions, backends, devices, verdicts, and which backend "auto" takes for which size, and why."""

from __future__ import annotations

import argparse
import json
import os
import platform
from typing import Any

import torch

from .. import __version__, backends
from ..backends import candidates, name_of, select
from ..devices import present
from ..verification import policy
from ..verification.process import VERIFY
from ..verification.store import CACHE, cache_folder, describe
from ..verification.timing import DTYPES, FEATURES, ROWS


def run(given: argparse.Namespace) -> int:
    """Print what there is."""
    found = collect()
    print(json.dumps(found, indent=1) if given.json else _text(found))
    return 0


def collect() -> dict[str, Any]:
    """What the command prints, as plain values. Nothing is checked or timed for it."""
    model = describe(torch.device("cpu"))
    return {
        "versions": {
            "fastntxent": __version__,
            "torch": torch.__version__,
            "triton": model.triton,
            "python": platform.python_version(),
            "cuda": torch.version.cuda or torch.version.hip or "none",
            "platform": platform.platform(),
        },
        "environment": {name: os.environ.get(name) for name in (CACHE, VERIFY)},
        "cache": str(cache_folder()),
        "backends": {name: status._asdict() for name, status in backends().items()},
        "devices": {str(device): _device(device) for device in present()},
    }


def _device(device: torch.device) -> dict[str, Any]:
    model = describe(device)
    possible = candidates(device.type)
    entry: dict[str, Any] = {"name": model.name, "capability": model.capability, "driver": model.driver}
    verdicts = policy.known(device, possible)
    entry["verdicts"] = {name: str(verdicts[name]) if name in verdicts else "not checked yet" for name in possible}
    if not possible:
        entry["auto"] = {"every size": name_of(select("auto", device.type, torch.float32))}
        return entry
    decision = policy.look_up(device, possible)
    entry["auto"] = {
        f"{str(dtype).removeprefix('torch.')}, {features} features, {rows} rows": list(
            decision.explain(dtype, rows, features)
        )
        for dtype in DTYPES
        for features in FEATURES
        for rows in ROWS
    }
    return entry


def _text(found: dict[str, Any]) -> str:
    versions = found["versions"]
    lines = [", ".join(f"{name} {version}" for name, version in versions.items()), "", "backends"]
    for name, status in found["backends"].items():
        said = status["reason"] if not status["available"] else status["details"] or "available"
        lines.append(f"  {name:10}{said}" + (f"; {status['verdict']}" if status["verdict"] else ""))
    for device, entry in found["devices"].items():
        lines += ["", f"{device}: {entry['name']}, {entry['capability']}, driver {entry['driver']}"]
        lines += [f"  {name:10}{verdict}" for name, verdict in entry["verdicts"].items()]
        for size, taken in entry["auto"].items():
            backend, why = (taken, "") if isinstance(taken, str) else taken
            lines.append(f"  auto, {size}: {backend}" + (f" ({why})" if why else ""))
    lines += ["", f"verdicts are kept in {found['cache']}"]
    lines += [f"{name}={value}" for name, value in found["environment"].items() if value]
    return "\n".join(lines)
