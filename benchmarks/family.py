"""Suite `family`: losses other than NT-Xent in float32, each compared with a baseline. The losses of a comparison are
timed in turn. The peak memory of each is measured in a separate process (Linux).

two towers   CLIP on unit rows, against the dense formula of both directions
labels       the three forms of SupCon with ten classes, against NT-Xent on the same rows
bfloat16     NT-Xent of bfloat16 rows and of the same rows in float32, against the dense formula under autocast
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

import fastntxent
from fastntxent.options import SupConForm

from . import instruction_set, losses, memory
from .competitors import Loss
from .timing import TEMPERATURE, Case, interleave, quantiles, step

CLASSES = 10
FORMS: tuple[SupConForm, ...] = ("out", "in", "pairs")


def _dense_clip(image: Tensor, text: Tensor) -> Tensor:
    targets = torch.arange(len(image))
    one, other = image @ text.T / TEMPERATURE, text @ image.T / TEMPERATURE
    return (F.cross_entropy(one, targets) + F.cross_entropy(other, targets)) / 2


def _clip(image: Tensor, text: Tensor) -> Tensor:
    return fastntxent.clip(image, text, TEMPERATURE, normalize=False)


def _sup_con(form: SupConForm) -> Loss:
    def loss(z_i: Tensor, z_j: Tensor) -> Tensor:
        labels = (torch.arange(len(z_i)) % CLASSES).repeat(2)
        return fastntxent.sup_con(torch.cat((z_i, z_j)), labels, TEMPERATURE, form=form)

    return loss


def _nt_xent(z_i: Tensor, z_j: Tensor) -> Tensor:
    return fastntxent.nt_xent(z_i, z_j, TEMPERATURE)


def _dense_nt_xent(z_i: Tensor, z_j: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return losses.dense(z_i, z_j, TEMPERATURE)


def _nt_xent_in_float32(z_i: Tensor, z_j: Tensor) -> Tensor:
    return _nt_xent(z_i.float(), z_j.float())


# For each comparison: its losses, the baseline first, and its sizes (N, D).
COMPARISONS: dict[str, tuple[dict[str, Loss], list[tuple[int, int]]]] = {
    "two towers": ({"dense CLIP": _dense_clip, "clip": _clip}, [(8192, 512)]),
    "labels": (
        {"nt_xent": _nt_xent, **{f"sup_con {form}": _sup_con(form) for form in FORMS}},
        [(1024, 128), (4096, 128)],
    ),
    "bfloat16": (
        {
            "dense NT-Xent, bfloat16": _dense_nt_xent,
            "nt_xent, bfloat16": _nt_xent,
            "nt_xent, the same in float32": _nt_xent_in_float32,
        },
        [(1024, 128), (4096, 128), (2048, 768)],
    ),
}
LOSSES = {name: loss for compared, _ in COMPARISONS.values() for name, loss in compared.items()}
SAME_LOSS = {"two towers": 1e-4, "bfloat16": 1e-2}  # comparisons of one loss: the largest relative difference


def inputs(kind: str, n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return two views. For two towers they are unit rows, since CLIP normalises its features before the loss."""
    views = Case(n, d, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32).inputs(seed)
    if kind == "two towers":
        image, text = (F.normalize(view.detach(), dim=1).requires_grad_() for view in views)
        return image, text
    return views


def run(arguments: argparse.Namespace) -> tuple[list[dict[str, object]], dict[str, str]]:
    """Return every comparison at its default sizes, or at the sizes given on the command line."""
    results = []
    for kind, (compared, sizes) in COMPARISONS.items():
        if arguments.n or arguments.d:
            sizes = [(n, d) for n in arguments.n or [sizes[0][0]] for d in arguments.d or [sizes[0][1]]]
        for n, d in sizes:
            batch = inputs(kind, n, d)
            if kind in SAME_LOSS:
                values = [float(loss(*batch).detach()) for loss in compared.values()]
                assert all(abs(value / values[0] - 1) < SAME_LOSS[kind] for value in values), values
            calls = {name: lambda _, loss=loss, batch=batch: step(loss, *batch) for name, loss in compared.items()}
            times = {name: phases["both"] for name, phases in interleave(calls, arguments.seconds).items()}
            first = statistics.median(next(iter(times.values())))
            for name, seconds in times.items():
                results.append(
                    {
                        "kind": kind,
                        "loss": name,
                        "n": n,
                        "d": d,
                        "both": quantiles(seconds),
                        "over_first": statistics.median(seconds) / first,
                        "extra_bytes": peak(kind, name, n, d),
                    }
                )
                print(results[-1], flush=True)
    return results, {}


def peak(kind: str, name: str, n: int, d: int) -> int:
    """Return the peak memory of one step in bytes, beyond its inputs, measured in a new process."""
    command = [sys.executable, *instruction_set.module("benchmarks.family"), kind, name, str(n), str(d)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **memory.ALLOCATOR})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def _main(kind: str, name: str, n: int, d: int) -> None:
    step(LOSSES[name], *inputs(kind, 32, d))  # loads libraries and starts threads
    batch = inputs(kind, n, d)
    memory.forget_peak()
    before = memory.resident_peak()
    step(LOSSES[name], *batch)
    print(memory.resident_peak() - before)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
