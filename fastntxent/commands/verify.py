"""Check the kernels on this machine's devices, and store the verdicts that backend="auto" relies on.

Exit status: 0 every backend that can run has passed, 1 a backend has not passed, 2 the request cannot be carried out.
"""

from __future__ import annotations

import argparse
import json

from ..backends import checkable
from ..devices import find_device, present_devices, verify
from ..verification.store import Store, model_of


def run(given: argparse.Namespace) -> int:
    """Check the requested backends and devices, and print the verdicts."""
    devices = [find_device(given.device)] if given.device else present_devices()
    if given.backend and not given.device:
        devices = [device for device in devices if given.backend in checkable(device.type)]
        if not devices:
            raise ValueError(f"--backend {given.backend} cannot be checked on any device of this machine")
    found = {}
    for device in devices:
        verdicts = verify(device, backend=given.backend, refresh=given.refresh)
        found[str(device)] = verdicts
        if not given.json:
            print(f"{device}: {model_of(device).name}")
            for name, verdict in verdicts.items():
                print(f"  {name:10}{verdict}")
            path = Store(model_of(device)).path
            if path.exists():
                print(f"  stored in {path}")
            elif any(verdict.status != "not available" for verdict in verdicts.values()):
                print(f"  not stored: {path.parent} is not writable")
    if given.json:
        print(json.dumps({device: {n: v.to_dict() for n, v in verdicts.items()} for device, verdicts in found.items()}))
    return int(not all(verdict.ok for verdicts in found.values() for verdict in verdicts.values()))
