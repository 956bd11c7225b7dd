"""The child process: `python -m fastntxent.verification.child REPORT REQUEST`.

REQUEST is JSON:

    {"backend": "triton", "device": "cuda:0", "module": null}            check it
    {"time": ["triton", "blocked"], "device": "cuda:0"}                  time these

`module` is where a backend lies that is not in the table. REPORT is a file that gets a line of JSON for each check as
it begins, and one for the verdict or the times.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from ..backends import add, select
from . import checks, timing
from .verdict import Verdict


def main(report_path: str, request: dict[str, Any]) -> None:
    """Do what the request asks for, and report it."""
    with open(report_path, "a", encoding="utf-8") as report:

        def tell(**line: Any) -> None:
            print(json.dumps(line), file=report, flush=True)

        device = torch.device(request["device"])
        if "time" in request:
            tell(times=timing.measure(request["time"], device))
        else:
            tell(verdict=_check(request, device, lambda case: tell(case=case)).to_dict())


def _check(request: dict[str, Any], device: torch.device, tell: Any) -> Verdict:
    name, module = request["backend"], request.get("module")
    if module:
        add(name, module, (device.type,))
    try:
        backend = select(name, device.type, torch.float32)
        torch.zeros(1, device=device).item()
    except Exception as error:
        return Verdict("not available", _words(error))
    passed, case = 0, ""
    try:
        for case, run in checks.cases(name, backend, device):
            tell(case)
            run()
            passed += 1
    except checks.FaultError as fault:
        return Verdict(fault.status, str(fault), case, passed)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return Verdict("not available", f"memory ran out: {_words(error)}", case, passed)
    except Exception as error:
        return Verdict("raised an error", _words(error), case, passed)
    return Verdict("passed", checks=passed)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
