"""Suite `gpu`: suite `cpu` on a CUDA device, in float32 and bfloat16, with peak memory. On chips that the model
(model.py) covers, the predicted times of the Triton kernels follow the measured times. For bfloat16, the prediction
uses the matrix rate measured in the same run."""

from __future__ import annotations

import argparse
import gc

import torch
from torch import Tensor

from . import model
from .competitors import Loss, load, names
from .timing import TEMPERATURE, Case, Comparison, check, compare, lines, step

GRID = ((256, 128), (1024, 128), (4096, 128), (16384, 128), (32768, 128), (4096, 512), (32768, 768), (4096, 2048))


def run(arguments: argparse.Namespace) -> tuple[list[Comparison], dict[str, str]]:
    """Return the results, and the losses that are missing or failed. bfloat16 runs under autocast, as in training."""
    if not torch.cuda.is_available():
        raise SystemExit("python -m benchmarks gpu: needs a CUDA device and a PyTorch built for it")
    wanted = [(n, d) for d in arguments.d or [128] for n in arguments.n or [256, 1024, 4096, 16384]]
    results, missing = [], {}
    for dtype in (torch.float32, torch.bfloat16):
        for n, d in wanted if arguments.n or arguments.d else GRID:
            case = Case(n, d, "cuda", dtype)
            losses, absent = load(names("cuda", n, arguments.only), TEMPERATURE)
            missing.update(absent)
            losses = {name: _autocast(loss) if dtype == torch.bfloat16 else loss for name, loss in losses.items()}
            peaks = {}
            for name in list(losses):
                try:
                    check(name, losses[name], case)
                    peaks[name] = _peak_bytes(losses[name], case)
                except Exception as error:  # no memory, no kernel for this size, a wrong gradient: reported, not timed
                    missing[f"{name} {case.dtype} {n} {d}"] = f"{type(error).__name__}: {error}".splitlines()[0]
                    del losses[name]
            result = compare(losses, case, arguments.seconds)
            result["device"] = torch.cuda.get_device_name()
            for name, row in result["losses"].items():
                row["extra_bytes"] = peaks[name]
            if "triton" in losses and (predicted := _predicted(result)):
                result["model"] = predicted
            results.append(result)
            print(*lines(result), *_model_line(result), sep="\n", flush=True)
    return results, missing


def _predicted(result: Comparison) -> dict[str, float] | None:
    """Return the model's prediction for this device, or None if the model does not cover the device."""
    target = "sm_{}{}".format(*torch.cuda.get_device_capability())
    if target not in model.TARGETS or torch.version.hip:
        return None
    dtype = "bf16" if result["dtype"] == "bfloat16" else "fp32"
    rate = result["gemm_gflops"] * 1e9 if dtype == "bf16" else None  # not measured for the float32 kernels' products
    return model.predict(target, result["n"], result["d"], dtype, rate)[0]


def _model_line(result: Comparison) -> list[str]:
    if "model" not in result:
        return []
    parts = ", ".join(f"{name} {ms:.3g}" for name, ms in result["model"].items())
    return [f"N {result['n']}, D {result['d']}, {result['dtype']}, the model's triton, ms: {parts}"]


def _autocast(loss: Loss) -> Loss:
    def under_autocast(z_i: Tensor, z_j: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return loss(z_i, z_j)

    return under_autocast


def _peak_bytes(loss: Loss, case: Case) -> int:
    """Return the peak of allocated bytes during a step, beyond the step's inputs."""
    z_i, z_j = case.inputs()
    step(loss, z_i, z_j)
    z_i.grad = z_j.grad = None
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(loss, z_i, z_j)
    return torch.cuda.max_memory_allocated() - before
