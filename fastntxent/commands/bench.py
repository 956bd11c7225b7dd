"""Time the backends on this machine against eager PyTorch, torch.compile and a matmul floor (about two minutes).

Prints the median milliseconds of forward plus backward of the mean loss at temperature 0.1. The calls take turns. Each
backend is first compared with the float64 reference, and is left out if its error exceeds the error budget. The floor
is the time of two full similarity matrices (4 M^2 D flops, M = 2N rows) at the rate of a matrix product measured in the
same run. On a GPU, backends that have not passed their checks are left out too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, error_budget
from ..devices import find_device, present_devices, verify
from ..verification.store import model_of
from ..verification.timing import TEMPERATURE, gradient_call, medians_in_turn, nt_xent_on

TIMED_SIZES = ((256, 128), (1024, 128), (4096, 128), (1024, 768))
PRODUCT = 2048  # size of the square matrix product that gives the floor's rate
MOST_TURNS, SECONDS_OF_SIZE = 100, 10.0
Row = dict[str, Any]


def run(given: argparse.Namespace) -> int:
    """Time the requested device, by default the last GPU or else the CPU, and print a table or JSON."""
    devices = [find_device(given.device)] if given.device else present_devices()[-1:]
    found = {}
    for device in devices:
        on_gpu = device.type == "cuda"
        bad = [name for name, verdict in verify(device).items() if not verdict.ok] if on_gpu else []
        dtypes = (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,)
        rows = [time_size(device, dtype, n, d, without=bad) for dtype in dtypes for n, d in TIMED_SIZES]
        found[str(device)] = {"name": model_of(device).name, "torch": torch.__version__, "rows": rows}
        if not given.json:
            print(f"{device}: {model_of(device).name}, PyTorch {torch.__version__}\n{_table(rows)}")
    if given.json:
        print(json.dumps(found))
    return 0


def dense_nt_xent(z_i: Tensor, z_j: Tensor) -> Tensor:
    """Return NT-Xent as it is usually written: cross-entropy on the dense, masked logits."""
    z = F.normalize(torch.cat((z_i, z_j)), dim=1)
    n = len(z_i)
    own = torch.eye(2 * n, dtype=torch.bool, device=z.device)
    logits = (z @ z.T / TEMPERATURE).float().masked_fill(own, -torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))


def time_size(device: torch.device, dtype: torch.dtype, n: int, d: int, without: Sequence[str] = ()) -> Row:
    """Return the milliseconds of each backend, eager PyTorch, torch.compile and the floor at one size.

    "missing" gives the reason for each call that failed, and for each backend in `without`.
    """
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(n, d, generator=generator).to(device, dtype).requires_grad_() for _ in range(2)]
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    for name, status in backends().items():
        serves = status.available and (device.type in status.device_types or "any" in status.device_types)
        # Skip "reference", because "eager" already shows the dense formula. Skip Triton on a CPU, where it would spend
        # minutes in its interpreter.
        if serves and name not in ("reference", *without) and not (name == "triton" and device.type == "cpu"):
            losses[name] = nt_xent_on(name)
    losses |= {"eager": dense_nt_xent, "torch.compile": torch.compile(dense_nt_xent, dynamic=False)}
    calls, missing = {}, dict.fromkeys(without, "it has not passed its checks on this device")
    for name, loss in losses.items():
        try:
            if name in backends():
                report = error_budget.compare(views[0], views[1], TEMPERATURE, backend=name)  # type: ignore[arg-type]
                if not report.ok:
                    raise ValueError(str(report))
            call = gradient_call(loss, views)
            call()
            call()
        except Exception as error:  # wrong results, no compiler, out of memory, an unsupported dtype
            missing[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
            continue
        calls[name] = call
    square = torch.randn(PRODUCT, PRODUCT, device=device, dtype=dtype)
    calls["product"] = lambda: torch.mm(square, square)
    medians = medians_in_turn(calls, device, MOST_TURNS, SECONDS_OF_SIZE)
    rate = 2 * PRODUCT**3 / medians.pop("product")
    return {
        "dtype": str(dtype).removeprefix("torch."), "n": n, "d": d, "milliseconds": medians,
        "floor": 2 * 2 * (2 * n) ** 2 * d / rate, "missing": missing,
    }  # fmt: skip


def _table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["milliseconds"]))
    lines = [["dtype", "N", "D", *names, "floor", "best / floor"]]
    for row in rows:
        times, ours = row["milliseconds"], [v for k, v in row["milliseconds"].items() if k in backends()]
        cells = [f"{times[name]:.3g}" if name in times else "-" for name in names]
        best = f"{min(ours) / row['floor']:.2g}" if ours else "-"
        lines.append([row["dtype"], str(row["n"]), str(row["d"]), *cells, f"{row['floor']:.3g}", best])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    for row in rows:
        text += [
            f"no {name} for {row['dtype']}, N = {row['n']}, D = {row['d']}: {why}"
            for name, why in row["missing"].items()
        ]
    return "\n".join(text)
