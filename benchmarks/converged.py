"""Suite `converged`: gradient errors against float64 as training converges."""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import Tensor

from fastntxent import error_budget

from . import losses
from .competitors import OURS, Loss, load, our_loss

STAGES = {"start": None, "0.7": 0.7, "1e-3": 1e-3, "1e-6": 1e-6}  # mean losses
TEMPERATURES = (0.1, 0.01)


def run(arguments: argparse.Namespace) -> tuple[list[dict[str, object]], dict[str, str]]:
    """Return the RMS errors of each backend's and library's float32 gradient, and why others cannot be used here.

    The gradient is with respect to [z_i; z_j], and errors are relative to the RMS of the true gradient.
    """
    from tests import cases  # imported here because it needs pytest

    results: list[dict[str, object]] = []
    missing: dict[str, str] = {}
    for temperature in TEMPERATURES:
        libraries, missing = load([*OURS, "lightly"], temperature)
        for n, d in ((n, d) for d in arguments.d or [128] for n in arguments.n or [512]):
            for stage, value in STAGES.items():
                if value is None:
                    batch = cases.start_of_training(n, d, temperature)
                else:
                    batch = cases.converged_batch(n, d, temperature, value)
                normalize = batch.normalize
                made = {name: our_loss(name, temperature, normalize) for name in OURS if name in libraries}
                made["eager"], truth = (
                    partial(loss, temperature=temperature, normalize=normalize)
                    for loss in (losses.dense, losses.oracle)
                )
                if normalize and "lightly" in libraries:  # it always normalises
                    made["lightly"] = libraries["lightly"]
                errors = _errors(made, truth, batch.z_i, batch.z_j)
                case = {"n": n, "d": d, "stage": stage, "temperature": temperature, "normalize": normalize}
                results.append({**case, "errors": errors})
                print(results[-1], flush=True)
    return results, missing


def _errors(made: dict[str, Loss], truth: Loss, z_i: Tensor, z_j: Tensor) -> dict[str, float]:
    expected = _gradient(truth, z_i.double(), z_j.double())
    return {name: error_budget.errors_of(_gradient(loss, z_i, z_j), expected).rms for name, loss in made.items()}


def _gradient(loss: Loss, z_i: Tensor, z_j: Tensor) -> Tensor:
    z_i, z_j = (z.detach().requires_grad_() for z in (z_i, z_j))
    return torch.cat(torch.autograd.grad(loss(z_i, z_j), (z_i, z_j)))
