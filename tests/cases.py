"""What the tests share: batches at a chosen stage of training, and a backend held against the float64 oracle."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastntxent import backends, budget, nt_xent

blocked = importlib.import_module("fastntxent.backends.blocked")
TILE = blocked._BLOCK_CPU

# Every backend that can be called here runs every case of the suite.
# Those of cuda and triton are in files of their own: they want a GPU, or take a minute for what others do in a second.
_ELSEWHERE = ("cuda", "triton", "reference")
KERNELS = [name for name, status in backends().items() if status.available and name not in _ELSEWHERE]
CUDA_KERNELS = [name for name in ("cuda", "triton", "blocked") if backends()[name].available]
BACKENDS = [*KERNELS, "reference"]

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Batch(NamedTuple):
    """Two views and how their loss is taken."""

    z_i: Tensor
    z_j: Tensor
    temperature: float
    normalize: bool = True

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return self._replace(z_i=change(self.z_i), z_j=change(self.z_j))


def random_batch(n: int, d: int, temperature: float, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Batch:
    """The start of training: two noisy views of random directions, rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    lengths = torch.rand(2, n, 1, generator=generator, dtype=torch.float64) * 3 + 0.2
    z_i, z_j = ((z + noise) * lengths).to(dtype)
    return Batch(z_i, z_j, temperature)


def start_of_training(n: int, d: int, temperature: float, *, seed: int = 0) -> Batch:
    """Directions of which nothing is learnt yet: a sample's two views know nothing of each other."""
    return Batch(*torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed)), temperature)


def converged_batch(n: int, d: int, temperature: float, loss: float, *, seed: int = 0) -> Batch:
    """Float32 embeddings whose mean loss is `loss`.

    A sample's views share a direction, mixed with one direction common to all by a share found by bisection: the
    larger the share, the closer the negatives come to the positives. Unit rows cannot get below a loss of about
    2N exp(-1/tau), so at larger temperatures the rows are longer and stay unnormalised.
    """
    generator = torch.Generator().manual_seed(seed)
    own, common = (
        torch.nn.functional.normalize(torch.randn(rows, d, generator=generator, dtype=torch.float64), dim=1)
        for rows in (n, 1)
    )
    jitter = torch.randn(2, n, d, generator=generator, dtype=torch.float64) * (0.02 / d**0.5)
    normalize = temperature < 1 / 25
    length = 1.0 if normalize else (25 * temperature) ** 0.5

    def views(share: float) -> Tensor:
        rows = torch.nn.functional.normalize((1 - share) * (own + jitter) + share * common, dim=2)
        return length * rows

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        value = float(nt_xent(*views(middle), temperature, normalize=normalize, backend="reference"))
        low, high = (middle, high) if value < loss else (low, middle)
    return Batch(*views(low).float(), temperature, normalize)


class Result(NamedTuple):
    """A loss with everything it can be differentiated by."""

    loss: Tensor
    d_z_i: Tensor
    d_z_j: Tensor
    d_temperature: Tensor


def evaluate(batch: Batch, backend: str, *, upstream: Tensor | None = None, reduction: str = "mean") -> Result:
    """Value and gradients; `upstream` weighs the rows of reduction="none"."""
    z_i, z_j = (z.detach().requires_grad_() for z in (batch.z_i, batch.z_j))
    temperature = torch.tensor(batch.temperature, dtype=torch.float64, requires_grad=True)
    loss = nt_xent(z_i, z_j, temperature, reduction=reduction, normalize=batch.normalize, backend=backend)
    weighted = loss if upstream is None else (loss * upstream.to(loss)).sum()
    return Result(loss.detach(), *torch.autograd.grad(weighted, (z_i, z_j, temperature)))


def assert_within_budget(
    batch: Batch, backend: str, *, upstream: Tensor | None = None, reduction: str = "mean"
) -> None:
    """Loss and gradients of a backend against the oracle, within `fastntxent.budget`."""
    options = {"upstream": upstream, "reduction": reduction}
    check_results(
        evaluate(batch, backend, **options),
        evaluate(batch, "reference", **options),
        evaluate(batch.map(Tensor.double), "reference", **options),
        batch,
        {"mean": 1 / (2 * len(batch.z_i)), "sum": 1.0, "none": upstream}[reduction],
    )


def check_results(result: Result, same_precision: Result, truth: Result, batch: Batch, weights: Tensor | float) -> None:
    """`weights` are those of the row losses."""
    z_i, z_j = (z.double() for z in (batch.z_i, batch.z_j))
    largest = 1.0 if batch.normalize else float(torch.cat((z_i, z_j)).norm(dim=1).max()) ** 2
    # The temperature's gradient is a sum of differences of similarities, which can cancel to nothing: errors are
    # relative to the sum of their sizes, sum_i |w_i| q_i k^2 max |s|.
    losses = nt_xent(z_i, z_j, batch.temperature, reduction="none", normalize=batch.normalize, backend="reference")
    scale = float(((1 - torch.exp(-losses)) * weights).abs().sum()) * largest / batch.temperature**2
    for name, value, same, true in zip(Result._fields, result, same_precision, truth, strict=True):
        name_scale = scale if name == "d_temperature" else 0.0
        errors, reference = (budget.measure(x, true, scale=name_scale) for x in (value, same))
        output_dtype = value.dtype if name in ("d_z_i", "d_z_j") else None
        limit = budget.allowed(reference, batch.z_i.dtype, largest / batch.temperature, output_dtype=output_dtype)
        assert errors.within(limit), f"{name}: {errors}, allowed {limit}, reference {reference}"


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for made in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(made, Tensor):
                self.numel = max(self.numel, made.numel())
        return output
