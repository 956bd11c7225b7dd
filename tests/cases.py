"""Shared by the tests: batches at a chosen stage of training, and comparisons of a backend with the float64 oracle."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.fx.experimental.symbolic_shapes
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastntxent import backends, cross_neg_lse, error_budget, neg_lse, nt_xent, ops
from fastntxent.algebra import accumulation_dtype, norm_eps
from fastntxent.sides import Side
from tests import dense

blocked = importlib.import_module("fastntxent.backends.blocked")
tiling = importlib.import_module("fastntxent.backends.tiling")
TILE = tiling.BLOCK_CPU

# The kernels that run every case on the CPU. cuda and triton have test files of their own: they need a GPU, or run far
# more slowly without one. The reference is left out because the kernels are compared with it.
_ELSEWHERE = ("cuda", "triton", "reference")
KERNELS = [name for name, status in backends().items() if status.available and name not in _ELSEWHERE]
CUDA_KERNELS = [name for name in ("cuda", "triton", "blocked") if backends()[name].available]
BACKENDS = [*KERNELS, "reference"]

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_constants = pytest.mark.skipif(
    not hasattr(torch.fx.experimental.symbolic_shapes, "has_static_value"),
    reason="needs a newer PyTorch, whose compiler distinguishes constant floats from changing ones (2.6 does not)",
)


class Batch(NamedTuple):
    """Two views and the options of their loss."""

    z_i: Tensor
    z_j: Tensor
    temperature: float
    normalize: bool = True

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return self._replace(z_i=change(self.z_i), z_j=change(self.z_j))


def random_batch(n: int, d: int, temperature: float, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Batch:
    """Return a batch as it looks early in training: two noisy views of random directions, with rows of different
    lengths."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    lengths = torch.rand(2, n, 1, generator=generator, dtype=torch.float64) * 3 + 0.2
    z_i, z_j = ((z + noise) * lengths).to(dtype)
    return Batch(z_i, z_j, temperature)


def start_of_training(n: int, d: int, temperature: float, *, seed: int = 0) -> Batch:
    """Return a batch as it comes from an untrained encoder: both views of a sample are independent and random."""
    return Batch(*torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed)), temperature)


def converged_batch(n: int, d: int, temperature: float, loss: float, *, seed: int = 0) -> Batch:
    """Return float32 embeddings whose mean loss is `loss`.

    The views of a sample share a direction. One direction common to all samples is mixed in, with a weight found by
    bisection: the larger the weight, the closer the negatives come to the positives. Unit rows cannot reach a loss
    below about 2N exp(-1/tau), so at larger temperatures the rows are longer and stay unnormalised.
    """
    generator = torch.Generator().manual_seed(seed)
    own, common = (
        F.normalize(torch.randn(rows, d, generator=generator, dtype=torch.float64), dim=1) for rows in (n, 1)
    )
    jitter = torch.randn(2, n, d, generator=generator, dtype=torch.float64) * (0.02 / d**0.5)
    normalize = temperature < 1 / 25
    length = 1.0 if normalize else (25 * temperature) ** 0.5

    def views(share: float) -> Tensor:
        rows = F.normalize((1 - share) * (own + jitter) + share * common, dim=2)
        return length * rows

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        value = float(nt_xent(*views(middle), temperature, normalize=normalize, backend="reference"))
        low, high = (middle, high) if value < loss else (low, middle)
    return Batch(*views(low).float(), temperature, normalize)


class Result(NamedTuple):
    """A loss and its gradients with respect to every differentiable input."""

    loss: Tensor
    d_z_i: Tensor
    d_z_j: Tensor
    d_temperature: Tensor


def evaluate(batch: Batch, backend: str, *, upstream: Tensor | None = None, reduction: str = "mean") -> Result:
    """Return the loss and its gradients; `upstream` is the upstream gradient for reduction="none"."""
    z_i, z_j = (z.detach().requires_grad_() for z in (batch.z_i, batch.z_j))
    temperature = torch.tensor(batch.temperature, dtype=torch.float64, requires_grad=True)
    loss = nt_xent(z_i, z_j, temperature, reduction=reduction, normalize=batch.normalize, backend=backend)
    weighted = loss if upstream is None else (loss * upstream.to(loss)).sum()
    return Result(loss.detach(), *torch.autograd.grad(weighted, (z_i, z_j, temperature)))


def assert_within_budget(
    batch: Batch, backend: str, *, upstream: Tensor | None = None, reduction: str = "mean"
) -> None:
    """Compare a backend's loss and gradients with the oracle, within `fastntxent.error_budget`."""
    options = {"upstream": upstream, "reduction": reduction}
    check_results(
        evaluate(batch, backend, **options),
        evaluate(batch, "reference", **options),
        evaluate(batch.map(Tensor.double), "reference", **options),
        batch,
        {"mean": 1 / (2 * len(batch.z_i)), "sum": 1.0, "none": upstream}[reduction],
    )


def check_results(result: Result, same_precision: Result, truth: Result, batch: Batch, weights: Tensor | float) -> None:
    """Check a result against the error budget; `weights` are the weights of the row losses."""
    z_i, z_j = (z.double() for z in (batch.z_i, batch.z_j))
    largest = 1.0 if batch.normalize else float(torch.cat((z_i, z_j)).norm(dim=1).max()) ** 2
    # The temperature's gradient is a sum of differences of similarities, which can cancel to zero. So its error is
    # taken relative to the sum of the terms' sizes, sum_i |w_i| q_i max |s| / tau^2 with q_i = 1 - exp(-loss_i).
    losses = nt_xent(z_i, z_j, batch.temperature, reduction="none", normalize=batch.normalize, backend="reference")
    scale = float(((1 - torch.exp(-losses)) * weights).abs().sum()) * largest / batch.temperature**2
    for name, value, same, true in zip(Result._fields, result, same_precision, truth, strict=True):
        name_scale = scale if name == "d_temperature" else 0.0
        errors, reference = (error_budget.errors_of(x, true, scale=name_scale) for x in (value, same))
        output_dtype = value.dtype if name in ("d_z_i", "d_z_j") else None
        limit = error_budget.allowed(reference, batch.z_i.dtype, largest / batch.temperature, output_dtype=output_dtype)
        assert errors.within(limit), f"{name}: {errors}, allowed {limit}, reference {reference}"


def assert_arrays_within_budget(
    values: Sequence[Tensor],
    same_precision: Sequence[Tensor],
    truths: Sequence[Tensor],
    dtype: torch.dtype,
    logit_size: float,
    scales: Sequence[float] | None = None,
) -> None:
    """Check each result against the error budget. If the terms of a result may cancel, pass `scales` (see
    `error_budget.errors_of`)."""
    scales = [0.0] * len(values) if scales is None else scales
    for index, (value, same, true, scale) in enumerate(zip(values, same_precision, truths, scales, strict=True)):
        errors, reference = (error_budget.errors_of(x.detach(), true.detach(), scale=scale) for x in (value, same))
        limit = error_budget.allowed(reference, dtype, logit_size, output_dtype=value.dtype)
        assert errors.within(limit), f"result {index}: {errors}, allowed {limit}, reference {reference}"


def assert_within_rounding(value: Tensor, truth: Tensor, logit_size: float, *, times: float = 1.0) -> None:
    """Check a float32 result against the budget's floor alone, multiplied by `times`. The full budget grows with the
    reference's error, so it would not notice an inaccurate formula that the reference uses too."""
    errors = error_budget.errors_of(value.detach(), truth.detach())
    floor = error_budget.allowed(error_budget.Errors(0.0, 0.0), torch.float32, logit_size)
    limit = error_budget.Errors(times * floor.maximum, times * floor.rms)
    assert errors.within(limit), f"{errors}, allowed {limit}"


def assert_gradient_within_rounding(batch: Batch, backend: str) -> None:
    """Check the gradient with respect to the embeddings, with the batch's largest |s| / tau as the logit size. At the
    start of training this is far below 1/tau, the logit of two identical views."""
    z = torch.cat((batch.z_i, batch.z_j)).double()
    u = F.normalize(z, dim=1) if batch.normalize else z
    logit_size = float((u @ u.T).fill_diagonal_(0).abs().max()) / batch.temperature
    value, true = evaluate(batch, backend), evaluate(batch.map(Tensor.double), "reference")
    gradient, true_gradient = (torch.cat((result.d_z_i, result.d_z_j)) for result in (value, true))
    assert_within_rounding(gradient, true_gradient, logit_size)


def towers_result(
    batch: Batch,
    both: bool,
    mean: bool,
    needs: Sequence[bool],
    loss: Callable[..., Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Return a loss of two towers, then its gradients: with respect to each tower whose entry in `needs` is true, then
    with respect to the inverse temperature."""
    z = [z.to(dtype, copy=True).requires_grad_(need) for z, need in zip((batch.z_i, batch.z_j), needs, strict=True)]
    k = torch.tensor(1 / batch.temperature, dtype=accumulation_dtype(dtype)).to(batch.z_i.device).requires_grad_()
    value = loss(*z, k, batch.normalize, both, mean)
    return value.detach(), *torch.autograd.grad(value, [x for x in (*z, k) if x.requires_grad])


def assert_towers_within_budget(
    batch: Batch, backend: str, *, both: bool, mean: bool = True, needs: Sequence[bool] = (True, True)
) -> None:
    """Compare the loss and gradients of `info_nce_scalar` (InfoNCE and CLIP) with the dense formula."""
    eps, options = norm_eps(batch.z_i.dtype), (both, mean, needs)
    losses: list[Tensor] = []

    def formula(z_i: Tensor, z_j: Tensor, k: Tensor, normalize: bool, both: bool, mean: bool) -> Tensor:
        u, v = (F.normalize(z.to(k.dtype), dim=1, eps=eps) if normalize else z.to(k.dtype) for z in (z_i, z_j))
        losses.append(dense.towers(u, v, k, both))
        return losses[-1].mean() if mean else losses[-1].sum()

    def scalar(*arguments: Any) -> Tensor:
        return ops.info_nce_scalar(*arguments, backend)

    value = towers_result(batch, *options, scalar, batch.z_i.dtype)
    same = towers_result(batch, *options, formula, batch.z_i.dtype)
    truth = towers_result(batch, *options, formula, torch.float64)
    longest = [1.0 if batch.normalize else float(z.double().norm(dim=1).max()) for z in (batch.z_i, batch.z_j)]
    largest = longest[0] * longest[1]
    # The gradient with respect to k is a sum of differences of similarities, which can cancel to zero. So its error is
    # taken relative to the sum of the terms' sizes.
    weights = 1 - torch.exp(-losses[-1].detach())
    size = float(weights.mean() if mean else weights.sum()) * largest
    scales = [0.0] * (len(value) - 1) + [size]
    assert_arrays_within_budget(value, same, truth, batch.z_i.dtype, largest / batch.temperature, scales)


def sigmoid_result(
    batch: Batch, bias: float, two_views: bool, needs: Sequence[bool], loss: Callable[..., Tensor], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Return the mean of a sigmoid loss, and its gradients with respect to the rows that need one, k and the bias."""
    z = [z.to(dtype, copy=True).requires_grad_(need) for z, need in zip((batch.z_i, batch.z_j), needs, strict=True)]
    accumulated = accumulation_dtype(dtype)
    numbers = [
        torch.tensor(x, dtype=accumulated).to(batch.z_i.device).requires_grad_() for x in (1 / batch.temperature, bias)
    ]
    value = loss(*z, *numbers, batch.normalize, two_views, True)
    return value.detach(), *torch.autograd.grad(value, [x for x in (*z, *numbers) if x.requires_grad])


def assert_sigmoid_within_budget(
    batch: Batch, backend: str, *, two_views: bool, bias: float, needs: Sequence[bool] = (True, True)
) -> None:
    """Compare the loss and gradients of `sigmoid_scalar` (NT-Logistic and SigLIP) with the dense formula."""
    eps, options = norm_eps(batch.z_i.dtype), (bias, two_views, needs)

    def formula(z_i: Tensor, z_j: Tensor, k: Tensor, b: Tensor, normalize: bool, two_views: bool, _: bool) -> Tensor:
        rows = [F.normalize(z.to(k.dtype), dim=1, eps=eps) if normalize else z.to(k.dtype) for z in (z_i, z_j)]
        losses = dense.nt_logistic(torch.stack(rows), 1 / k, b) if two_views else dense.siglip(*rows, 1 / k, b)
        return losses.mean()

    def scalar(*arguments: Any) -> Tensor:
        return ops.sigmoid_scalar(*arguments, backend)

    value = sigmoid_result(batch, *options, scalar, batch.z_i.dtype)
    same = sigmoid_result(batch, *options, formula, batch.z_i.dtype)
    truth = sigmoid_result(batch, *options, formula, torch.float64)
    with torch.no_grad():
        k, b = (torch.tensor(x) for x in (1 / batch.temperature, bias))
        alone = ops.sigmoid_scalar(
            batch.z_i, batch.z_j, k, b.to(batch.z_i.device), batch.normalize, two_views, True, backend
        )
    longest = [1.0 if batch.normalize else float(z.double().norm(dim=1).max()) for z in (batch.z_i, batch.z_j)]
    largest = max(longest) ** 2 if two_views else longest[0] * longest[1]
    # The gradients with respect to k and the bias are sums of terms of both signs. So the bias's error is taken
    # relative to the sum of the sizes of its terms, and k's error relative to this sum times the largest |s|. The loss
    # bounds the sum, because the slope of a softplus is less than its value. Each row is allowed 1 more for its
    # positive.
    size = float(truth[0]) + 1
    scales = [0.0] * (len(value) - 2) + [size * largest, size]
    logit_size = largest / batch.temperature + abs(bias)
    assert_arrays_within_budget(value, same, truth, batch.z_i.dtype, logit_size, scales)
    assert_arrays_within_budget([alone], same[:1], truth[:1], batch.z_i.dtype, logit_size)


def softplus_result(
    batch: Sequence[Tensor], numbers: Sequence[float], weights: Tensor, sums: Callable[..., Tensor], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Return the softplus sums of a batch (u, v, u_ids, v_ids), then the gradients of their weighted sum with respect
    to u, v, the inverse temperature and the bias. If there is only one side, v is None and has no gradient."""
    u, v = (None if x is None else x.to(dtype, copy=True).requires_grad_() for x in batch[:2])
    accumulated = accumulation_dtype(dtype)
    k, b = (torch.tensor(x, dtype=accumulated).to(batch[0].device).requires_grad_() for x in numbers)
    found = sums(Side(u, batch[2]), None if v is None else Side(v, batch[3]), k, b)
    leaves = [x for x in (u, v, k, b) if x is not None]
    return found.detach(), *torch.autograd.grad((found * weights.to(found)).sum(), leaves)


def assert_softplus_within_budget(
    backend: str,
    M: int,
    K: int | None,
    groups: str,
    *,
    k: float = 5.0,
    bias: float = -2.0,
    dtype: torch.dtype = torch.float32,
    d: int = 16,
    positives: bool = False,
    device: str = "cpu",
) -> None:
    """Compare the backend with the dense formula, on M random unit rows and K columns, or on one side if K is None."""
    generator = torch.Generator().manual_seed(2)
    rows = [F.normalize(torch.randn(n, d, generator=generator), dim=1).to(device, dtype) for n in (M, K or 0)]
    ids = [x.to(device) for x in group_ids(groups, M, K or 0)]
    batch = rows[0], None if K is None else rows[1], *ids
    weights = torch.randn(M, generator=generator, dtype=torch.float64).to(device)

    def formula(rows: Side, cols: Side | None, k: Tensor, b: Tensor) -> Tensor:
        u, v = (side.u.to(k.dtype) for side in (rows, cols or rows))
        return dense.softplus_sums(u, v, rows.ids, (cols or rows).ids, k, b, positives)

    def of_backend(*given: Any) -> Tensor:
        return ops.softplus_sums(*given, positives=positives, backend=backend)

    value, same, truth = (
        softplus_result(batch, (k, bias), weights, *each)
        for each in ((of_backend, dtype), (formula, dtype), (formula, torch.float64))
    )
    # Weights of both signs cancel, so gradients are judged by the size of their terms, with |s| about D^-1/2. The slope
    # of a softplus is less than its value; with positives, each row is allowed 1 more.
    size = float((truth[0].abs() * weights.abs()).sum()) + positives * float(weights.abs().sum())
    of_sides = [k * size / (d**0.5 * n) for n in (M, K) if n is not None]
    assert_arrays_within_budget(value, same, truth, dtype, k + abs(bias), [0.0, *of_sides, size / d**0.5, size])


def group_ids(name: str, M: int, K: int = 0) -> tuple[Tensor, Tensor]:
    """Return ids of M rows and of K columns."""
    generator = torch.Generator().manual_seed(2)
    few = torch.randint(0, 3, (M + K,), generator=generator)
    ids = {
        "samples": torch.cat((torch.arange(M), torch.arange(K))),
        "unique": torch.randperm(M + K, generator=generator, dtype=torch.int32),
        "one": torch.zeros(M + K, dtype=torch.int8),
        "few": few.to(torch.int16),
        "sorted": torch.arange(M + K) // 5,
        "negative": -few * 2**40,
    }[name]
    return ids[:M], ids[M:]


def neg_lse_result(
    u: Tensor, ids: Tensor, temperature: float, weights: Tensor, backend: str, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Return neg_lse, and the gradients of its weighted sum with respect to u and the temperature."""
    u = u.to(dtype, copy=True).requires_grad_()
    tau = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    nu = neg_lse(u, ids, tau, backend=backend)
    return nu.detach(), *torch.autograd.grad(_weighted(nu, weights), (u, tau))


def assert_neg_lse_within_budget(
    backend: str, M: int, groups: str, temperature: float, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """Compare a backend's neg_lse of random unit rows of 16 features with the oracle's, and return the backend's
    result."""
    generator = torch.Generator().manual_seed(2)
    u = F.normalize(torch.randn(M, 16, generator=generator), dim=1).to(device, dtype)
    ids = group_ids(groups, M)[0].to(device)
    weights = torch.randn(M, generator=generator, dtype=torch.float64).to(device)
    value, same, truth = (
        neg_lse_result(u, ids, temperature, weights, *each)
        for each in ((backend, dtype), ("reference", dtype), ("reference", torch.float64))
    )
    assert torch.equal(value[0] == -math.inf, truth[0] == -math.inf)
    # The temperature's gradient is a sum of w_i E_i[s] / tau^2, with E_i[s] the mean similarity under row i's softmax.
    # Weights of both signs cancel, so the gradient is judged by the size of its terms, with |s| about D^-1/2 = 1/4.
    scales = 0.0, 0.0, float(weights.abs().sum()) / (4 * temperature**2)
    assert_arrays_within_budget(value, same, truth, dtype, 1 / temperature, scales)
    return value


def cross_result(
    batch: Sequence[Tensor], temperature: float, weights: Sequence[Tensor], backend: str, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Return cross_neg_lse of (u, v, u_ids, v_ids), and the gradients of its weighted sum with respect to u, v and the
    temperature."""
    u, v = (rows.to(dtype, copy=True).requires_grad_() for rows in batch[:2])
    tau = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    nus = cross_neg_lse(u, v, *batch[2:], tau, backend=backend)
    total = sum(map(_weighted, nus, weights))
    return nus.rows.detach(), nus.cols.detach(), *torch.autograd.grad(total, (u, v, tau))


def assert_cross_neg_lse_within_budget(
    backend: str, M: int, K: int, groups: str, temperature: float, *, d: int = 16, device: str = "cpu"
) -> None:
    """Compare a backend's cross_neg_lse of random unit rows and columns with the oracle's, in float32."""
    generator = torch.Generator().manual_seed(2)
    rows = [F.normalize(torch.randn(n, d, generator=generator), dim=1) for n in (M, K)]
    batch = [x.to(device) for x in (*rows, *group_ids(groups, M, K))]
    weights = [torch.randn(n, generator=generator, dtype=torch.float64).to(device) for n in (M, K)]
    value, same, truth = (
        cross_result(batch, temperature, weights, *each)
        for each in ((backend, torch.float32), ("reference", torch.float32), ("reference", torch.float64))
    )
    for given, true in zip(value[:2], truth[:2], strict=True):
        assert torch.equal(given == -math.inf, true == -math.inf)
    # A relative error of a sum is an absolute error of its logarithm. The logarithm can be near 0, so its error is
    # taken relative to 1. Weights of both signs cancel, so gradients are judged by the size of their terms, with |s|
    # about D^-1/2 = 1/4.
    size = float(sum(w.abs().sum() for w in weights)) / temperature
    scales = 1, 1, size / (4 * M), size / (4 * K), size / (4 * temperature)
    assert_arrays_within_budget(value, same, truth, torch.float32, 1 / temperature, scales)


def drift(backend: str, device: str = "cpu") -> float:
    """Return the relative error of a float32 gradient whose sums run over 8,192 columns. The columns share a direction,
    so the terms do not cancel, and a sum that rounds toward zero loses a little at every step."""
    generator = torch.Generator().manual_seed(3)
    u, v = (F.normalize(torch.randn(n, 64, generator=generator) + 1, dim=1).to(device) for n in (32, 8192))
    ids = torch.arange(32, device=device), torch.arange(32, 32 + 8192, device=device)

    def gradient(name: str, dtype: torch.dtype) -> Tensor:
        rows = u.to(dtype, copy=True).requires_grad_()
        nu, _ = cross_neg_lse(rows, v.to(dtype), *ids, 0.5, backend=name)
        return torch.autograd.grad(nu.sum(), rows)[0].double()

    value, true = gradient(backend, torch.float32), gradient("reference", torch.float64)
    return float((value - true).norm() / true.norm())


def _weighted(nu: Tensor, weights: Tensor) -> Tensor:
    return (torch.where(nu == -math.inf, 0, nu) * weights.to(nu.dtype)).sum()


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that an operation creates."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for made in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(made, Tensor):
                self.numel = max(self.numel, made.numel())
        return output
