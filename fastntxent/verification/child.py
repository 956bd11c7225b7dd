"""The code of the child process that `process` starts: `main(REPORT, REQUEST)`.

REQUEST is JSON:

    {"backend": "triton", "device": "cuda:0", "module": null}            check this backend
    {"time": ["triton", "blocked"], "device": "cuda:0"}                  time these backends

"module" is the backend's module, which is needed only if the table of backends lacks the backend. Optional keys:

    "part": [i, n]    run share i (from 0) of n shares of the checks
    "model"           the properties of the device in the parent process, which must be the same here
    "seconds"         exit after this many seconds

REPORT is a file. This process appends one line of JSON whenever a check or the timing of a call begins, and one line
with the verdict or the times.
"""

from __future__ import annotations

import faulthandler
import json
from collections.abc import Callable
from typing import Any

import torch

from ..backends import add, select
from . import checks, timing
from .store import model_of
from .verdict import Verdict, memory_ran_out


def main(report_path: str, request_text: str) -> None:
    """Check or time as requested, and write the report."""
    request = json.loads(request_text)
    if "seconds" in request:
        faulthandler.dump_traceback_later(request["seconds"], exit=True)
    with open(report_path, "a", encoding="utf-8") as report:

        def tell(**line: Any) -> None:
            print(json.dumps(line), file=report, flush=True)

        device = torch.device(request["device"])
        # With TF32 in the reference, every tolerance would be wider.
        torch.set_float32_matmul_precision("highest")
        if "time" in request:
            tell(**_report_times(request, device, tell))
        else:
            tell(verdict=_report_verdict(request, device, tell).to_dict())


def _report_times(request: dict[str, Any], device: torch.device, tell: Callable[..., None]) -> dict[str, Any]:
    running: dict[str, str] = {}

    def begin(backend: str, case: str) -> None:
        running.update(backend=backend, case=case)
        tell(**running)

    try:
        _use_device(request, device)
    except Exception as error:
        return {"verdict": Verdict("not available", _words(error)).to_dict()}
    try:
        return {"times": timing.time_backends(request["time"], device, begin)}
    except Exception as error:
        return {"verdict": Verdict("raised an error", _words(error), running.get("case", "")).to_dict()}


def _report_verdict(request: dict[str, Any], device: torch.device, tell: Callable[..., None]) -> Verdict:
    name, module = request["backend"], request.get("module")
    part, parts = request.get("part", [0, 1])
    if module:
        add(name, module, (device.type,))
    try:
        backend = select(name, device.type, torch.float32)
        _use_device(request, device)
        listed = list(checks.cases(name, backend, device))
    except Exception as error:
        return Verdict("not available", _words(error))
    # A share is a range of consecutive checks. Neighbouring checks use the same kernels, so only a few kernels are
    # compiled in more than one share.
    share = listed[len(listed) * part // parts : len(listed) * (part + 1) // parts]
    passed, case = 0, ""
    try:
        for case, run in share:
            tell(case=case)
            run()
            passed += 1
    except checks.FaultError as fault:
        return Verdict(fault.status, str(fault), case, passed)
    except Exception as error:
        if memory_ran_out(error):
            return Verdict("not available", f"memory ran out: {_words(error)}", case, passed)
        return Verdict("raised an error", _words(error), case, passed)
    return Verdict("passed", checks=passed)


def _use_device(request: dict[str, Any], device: torch.device) -> None:
    """Make the device current. Raise RuntimeError unless it is the device that the parent sees."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.zeros(1, device=device).item()
    here = model_of(device)._asdict()
    meant = request.get("model", here)
    for key, value in here.items():
        if value != meant.get(key):
            raise RuntimeError(f"the child process has {key} {value!r}, but its parent has {meant.get(key)!r}")


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
