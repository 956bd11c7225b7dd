"""Time the backends on this machine against eager PyTorch, torch.compile and the floor: about two minutes.

Forward and backward of the mean loss at temperature 0.1, in milliseconds: medians of interleaved repeats, each backend
first held against the float64 reference. The floor is twice the flops of the full similarity matrix, 2 x 2 M^2 D with
M = 2N, at the rate of a matrix product in the same run. On a GPU a backend that has not passed there is left out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, budget, nt_xent
from ..devices import find, present, verify
from ..verification.store import describe
from ..verification.timing import milliseconds

SIZES = ((256, 128), (1024, 128), (4096, 128), (1024, 768))
SECONDS = 10.0  # of one size
Row = dict[str, Any]


def run(given: argparse.Namespace) -> int:
    """Measure, and print a table or JSON."""
    devices = [find(given.device)] if given.device else present()[-1:]
    found = {}
    for device in devices:
        on_gpu = device.type == "cuda"
        bad = [name for name, verdict in verify(device).items() if not verdict.ok] if on_gpu else []
        dtypes = (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,)
        rows = [measure(device, dtype, n, d, without=bad) for dtype in dtypes for n, d in SIZES]
        found[str(device)] = {"name": describe(device).name, "torch": torch.__version__, "rows": rows}
        if not given.json:
            print(f"{device}: {describe(device).name}, PyTorch {torch.__version__}\n{_table(rows)}")
    if given.json:
        print(json.dumps(found))
    return 0


def eager(z_i: Tensor, z_j: Tensor) -> Tensor:
    """NT-Xent as it is usually written: cross-entropy on the dense, masked logits."""
    z = F.normalize(torch.cat((z_i, z_j)), dim=1)
    n = len(z_i)
    logits = (z @ z.T / 0.1).float().masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), -torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))


def measure(device: torch.device, dtype: torch.dtype, n: int, d: int, without: Sequence[str] = ()) -> Row:
    """One size: milliseconds by backend, of eager PyTorch, of torch.compile, and of the floor; and what has none, with
    the reason."""
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(n, d, generator=generator).to(device, dtype).requires_grad_() for _ in range(2)]
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    for name, status in backends().items():
        serves = status.available and (device.type in status.device_types or "any" in status.device_types)
        # The interpreter's minutes say nothing, and the dense reference stands for what "eager" shows.
        if serves and name not in ("reference", *without) and not (name == "triton" and device.type == "cpu"):
            losses[name] = _loss(name)
    losses |= {"eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}
    calls, missing = {}, dict.fromkeys(without, "it has not passed on this device")
    for name, loss in losses.items():
        try:
            if name in backends():
                report = budget.compare(views[0], views[1], 0.1, backend=name)  # type: ignore[arg-type]
                if not report.ok:
                    raise ValueError(str(report))
            call = _call(loss, views)
            call()
            call()
        except Exception as error:  # no compiler, no memory, a dtype that is not taken
            missing[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
            continue
        calls[name] = call
    square = torch.randn(2048, 2048, device=device, dtype=dtype)
    calls["product"] = lambda: torch.mm(square, square)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    while len(taken["product"]) < 3 or (time.perf_counter() - started < SECONDS and len(taken["product"]) < 100):
        for name, call in calls.items():
            taken[name].append(milliseconds(call, device))
    medians = {name: median(values) for name, values in taken.items()}
    rate = 2 * 2048**3 / medians.pop("product")
    return {
        "dtype": str(dtype).removeprefix("torch."), "n": n, "d": d, "milliseconds": medians,
        "floor": 2 * 2 * (2 * n) ** 2 * d / rate, "missing": missing,
    }  # fmt: skip


def _loss(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda z_i, z_j: nt_xent(z_i, z_j, 0.1, backend=name)  # type: ignore[arg-type]


def _call(loss: Callable[[Tensor, Tensor], Tensor], views: list[Tensor]) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(loss(*views), views)


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
        text += [f"no {name} for {row['dtype']}, {row['n']}, {row['d']}: {why}" for name, why in row["missing"].items()]
    return "\n".join(text)
