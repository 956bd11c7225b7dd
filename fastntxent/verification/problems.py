"""The calls with which a backend is checked. Each runs on any backend, in the dtype of its input or in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algebra import accumulation_dtype
from ..losses import clip, info_nce, nt_logistic, nt_xent, siglip
from ..opening import open_batch
from ..options import Reduction
from ..primitives import cross_neg_lse, neg_lse
from ..sides import Side


@dataclass(frozen=True)
class Problem:
    """A call whose results are compared.

    Attributes:
        run: takes a backend's name and whether to compute in float64; returns the results by name. The names of
            gradients begin with "d_".
        dtype, rows: dtype and number of rows of the call.
        logit_size: a bound on the magnitude of the logits.
        scales: the size of a result's terms, by the result's name, for the results whose terms may cancel.
    """

    run: Callable[[str, bool], dict[str, Tensor]]
    dtype: torch.dtype
    rows: int
    logit_size: float
    scales: dict[str, float]


def nt_xent_problem(
    views: Sequence[Tensor], temperature: float | Tensor, *, normalize: bool = True, upstream: Tensor | None = None
) -> Problem:
    """NT-Xent and its gradients: the mean loss, or the sum of the rows' losses weighted by `upstream`."""

    def run(backend: str, exact: bool) -> dict[str, Tensor]:
        z_i, z_j, tau = _fresh_leaves((*views, torch.as_tensor(temperature, dtype=torch.float64)), exact)
        reduction: Reduction = "mean" if upstream is None else "none"
        loss = nt_xent(z_i, z_j, tau, reduction=reduction, normalize=normalize, backend=backend)  # type: ignore[arg-type]
        (loss if upstream is None else (loss * upstream.to(loss)).sum()).backward()
        with torch.no_grad():
            value = nt_xent(z_i, z_j, tau, normalize=normalize, backend=backend)  # type: ignore[arg-type]
        return _gradients(loss=loss, value=value, d_z_i=z_i, d_z_j=z_j, d_temperature=tau)

    tau = float(temperature)
    z = torch.cat([view.double() for view in views])
    largest = 1.0 if normalize else float(z.norm(dim=1).max()) ** 2
    weights = 1.0 if upstream is None else float(upstream.abs().sum())
    # The temperature's gradient is a sum of differences of similarities, which can cancel almost completely.
    return Problem(run, views[0].dtype, len(z), largest / tau, {"d_temperature": weights * largest / tau**2})


def towers_problem(views: Sequence[Tensor], temperature: float, *, both: bool) -> Problem:
    """InfoNCE, or CLIP with `both` directions.

    The mean loss is computed with all gradients, with one tower frozen (each in turn), and without gradients.
    """

    def run(backend: str, exact: bool) -> dict[str, Tensor]:
        def loss_of(z_i: Tensor, z_j: Tensor, tau: Tensor) -> Tensor:
            return (clip if both else info_nce)(z_i, z_j, tau, backend=backend)  # type: ignore[arg-type]

        z_i, z_j, tau = _fresh_leaves((*views, torch.tensor(temperature, dtype=torch.float64)), exact)
        loss = loss_of(z_i, z_j, tau)
        loss.backward()
        query, key = _fresh_leaves(views, exact)
        loss_of(query, key.detach(), tau.detach()).backward()
        loss_of(query.detach(), key, tau.detach()).backward()
        with torch.no_grad():
            value = loss_of(z_i, z_j, tau)
        return _gradients(
            loss=loss, value=value, d_z_i=z_i, d_z_j=z_j, d_temperature=tau, d_z_i_alone=query, d_z_j_alone=key
        )

    scales = {"d_temperature": 1 / temperature**2}
    return Problem(run, views[0].dtype, sum(map(len, views)), 1 / temperature, scales)


def sigmoid_problem(views: Sequence[Tensor], temperature: float, bias: float, *, two_views: bool) -> Problem:
    """SigLIP, or NT-Logistic with `two_views`.

    The mean loss is computed with all gradients, with one side frozen (each in turn), and without gradients. With
    reduction "none", the rows' losses are weighted, and SigLIP's rows are in groups.
    """
    n = len(views[0])
    weights = torch.randn(n * (1 + two_views), generator=generator(11), dtype=torch.float64).to(views[0].device)
    groups = torch.arange(n, device=views[0].device) % 7

    def loss_of(backend: str, *given: Tensor, **options: Any) -> Tensor:
        z_i, z_j, tau, b = given
        return (nt_logistic if two_views else siglip)(z_i, z_j, tau, bias=b, backend=backend, **options)  # type: ignore[arg-type]

    def run(backend: str, exact: bool) -> dict[str, Tensor]:
        numbers = [torch.tensor(x, dtype=torch.float64) for x in (temperature, bias)]
        z_i, z_j, tau, b = _fresh_leaves((*views, *numbers), exact)
        loss = loss_of(backend, z_i, z_j, tau, b)
        loss.backward()
        of_rows = _fresh_leaves((*views, *numbers), exact)
        options = {} if two_views else {"ids": groups}
        losses = loss_of(backend, *of_rows, reduction="none", **options)
        (losses * weights.to(losses)).sum().backward()
        first, second = _fresh_leaves(views, exact)
        loss_of(backend, first, second.detach(), tau.detach(), b.detach()).backward()
        loss_of(backend, first.detach(), second, tau.detach(), b.detach()).backward()
        with torch.no_grad():
            value = loss_of(backend, z_i, z_j, tau, b)
        u, v, tau_of_rows, b_of_rows = of_rows
        return _gradients(
            loss=loss, value=value, losses=losses, d_z_i=z_i, d_z_j=z_j, d_temperature=tau, d_bias=b,
            d_z_i_alone=first, d_z_j_alone=second,
            d_z_i_of_rows=u, d_z_j_of_rows=v, d_temperature_of_rows=tau_of_rows, d_bias_of_rows=b_of_rows,
        )  # fmt: skip

    # The terms of the gradients with respect to temperature and bias may cancel. If all terms had the same sign, the
    # gradient of a row's loss with respect to the bias would be at most the loss plus the row's number of positives.
    with torch.no_grad():
        exactly = [z.double() for z in views]
        numbers = [torch.tensor(x, dtype=torch.float64) for x in (temperature, bias)]
        options = {} if two_views else {"ids": groups}
        losses = loss_of("blocked", *exactly, *numbers, reduction="none", **options) + (1 if two_views else n / 7 + 1)
    mean, of_rows = float(losses.mean()), float((losses * weights.abs()).sum())
    scales = {
        "d_bias": mean, "d_temperature": mean / temperature**2,
        "d_bias_of_rows": of_rows, "d_temperature_of_rows": of_rows / temperature**2,
    }  # fmt: skip
    return Problem(run, views[0].dtype, sum(map(len, views)), 1 / temperature + abs(bias), scales)


def limits_problem(views: Sequence[Tensor], temperature: float) -> Problem:
    """NT-Xent without negatives above a ceiling, and limited log-sum-exps of one and of two sides."""
    rows = _unit(torch.cat(list(views)))
    similarities = (rows.double() @ rows.double().T).flatten()
    ordered = similarities[similarities.isfinite()].sort().values
    first = len(ordered) * 6 // 10
    gap = first + int(ordered[first : first + max(len(ordered) // 10, 2)].diff().argmax())
    ceiling = float(ordered[gap : gap + 2].mean())  # in a gap: rounding moves no similarity across the ceiling
    n, device = len(views[0]), views[0].device
    ids, weights = (
        torch.arange(2 * n, device=device) % n,
        torch.randn(2 * n, generator=generator(12)).double().to(device),
    )

    def run(backend: str, exact: bool) -> dict[str, Tensor]:
        z_i, z_j, tau = _fresh_leaves((*views, torch.tensor(temperature, dtype=torch.float64)), exact)
        loss = nt_xent(z_i, z_j, tau, ceiling=ceiling, backend=backend)  # type: ignore[arg-type]
        loss.backward()
        with torch.no_grad():
            value = nt_xent(z_i, z_j, tau, ceiling=ceiling, backend=backend)  # type: ignore[arg-type]
        leaves = rows, rows[:n], rows[n:], torch.tensor(temperature, dtype=torch.float64)
        x, u, v, tau_of_sums = _fresh_leaves(leaves, exact)
        limits = torch.full((2 * n,), ceiling, dtype=accumulation_dtype(x.dtype), device=device)
        batch = open_batch(None, "limits", {"u": x}, ids=ids, normalize=False, backend=backend)
        k = batch.inverse_temperature(tau_of_sums)
        nu = batch.neg_lse(x, ids, k, limits)
        sides = Side(u, ids[:n], limits[:n]), Side(v, ids[n:], limits[n:])
        of_towers = torch.cat(batch.limited_cross_neg_lse(*sides, k))
        ((nu + of_towers) * weights.to(nu)).sum().backward()
        return _gradients(
            loss=loss, value=value, d_z_i=z_i, d_z_j=z_j, d_temperature=tau, neg_lse=nu, of_towers=of_towers,
            d_u=x, d_u_of_towers=u, d_v_of_towers=v, d_temperature_of_sums=tau_of_sums,
        )  # fmt: skip

    size = float(weights.abs().sum())
    scales = {
        "d_temperature": 1 / temperature**2, "d_temperature_of_sums": 2 * size / temperature**2,
        "neg_lse": 1.0, "of_towers": 1.0,  # a sum's relative error is its logarithm's absolute error
    }  # fmt: skip
    return Problem(run, views[0].dtype, 2 * n, 1 / temperature, scales)


def groups_problem(views: Sequence[Tensor], temperature: float) -> Problem:
    """`neg_lse` of rows in groups, some with ids below zero, and of rows without negatives."""
    u = _unit(torch.cat(list(views)))
    ids = torch.arange(len(u), device=u.device) % 11 - 5
    weights = torch.randn(len(u), generator=generator(8), dtype=torch.float64).to(u.device)

    def run(backend: str, exact: bool) -> dict[str, Tensor]:
        x, tau = _fresh_leaves((u, torch.tensor(temperature, dtype=torch.float64)), exact)
        nu = neg_lse(x, ids, tau, backend=backend)  # type: ignore[arg-type]
        alone = neg_lse(x[:3], ids[:3] * 0, tau, backend=backend)  # type: ignore[arg-type]
        (nu * weights.to(nu)).sum().backward()
        return _gradients(neg_lse=nu, without_negatives=alone, d_u=x, d_temperature=tau)

    scale = float(weights.abs().sum()) / temperature**2
    return Problem(run, u.dtype, len(u), 1 / temperature, {"d_temperature": scale})


def cross_problem(views: Sequence[Tensor], temperature: float) -> Problem:
    """`cross_neg_lse` between sides of different lengths."""
    u, v = _unit(views[0]), _unit(torch.cat(list(views))[: len(views[0]) + 9])
    u_ids, v_ids = (torch.arange(len(x), device=x.device) % 7 for x in (u, v))
    weights = [torch.randn(len(x), generator=generator(9), dtype=torch.float64).to(x.device) for x in (u, v)]

    def run(backend: str, exact: bool) -> dict[str, Tensor]:
        x, y, tau = _fresh_leaves((u, v, torch.tensor(temperature, dtype=torch.float64)), exact)
        rows, cols = cross_neg_lse(x, y, u_ids, v_ids, tau, backend=backend)  # type: ignore[arg-type]
        ((rows * weights[0].to(rows)).sum() + (cols * weights[1].to(cols)).sum()).backward()
        return _gradients(rows=rows, cols=cols, d_u=x, d_v=y, d_temperature=tau)

    scale = float(sum(w.abs().sum() for w in weights)) / temperature**2
    return Problem(run, u.dtype, len(u) + len(v), 1 / temperature, {"d_temperature": scale})


def sum_problem(views: Sequence[Tensor], temperature: float) -> Problem:
    """A weighted sum of log-sum-exps and its gradient, from a single call."""
    u = _unit(torch.cat(list(views)))
    ids = torch.arange(len(u), device=u.device) // 2
    weights = torch.randn(len(u), generator=generator(10), dtype=torch.float64).to(u.device)

    def run(backend: str, exact: bool) -> dict[str, Tensor]:
        x, tau = _fresh_leaves((u, torch.tensor(temperature, dtype=torch.float64)), exact)
        batch = open_batch(None, "neg_lse_sum", {"u": x}, ids=ids, normalize=False, backend=backend)
        w = weights.to(accumulation_dtype(x.dtype))
        total = batch.weighted_neg_lse(x, ids, batch.inverse_temperature(tau), w)
        total.backward()
        return _gradients(total=total, d_u=x, d_temperature=tau)

    sizes = float(weights.abs().sum())
    logits = 1 / temperature + math.log(len(u))
    scales = {"total": sizes * logits, "d_temperature": sizes / temperature**2}
    return Problem(run, u.dtype, len(u), 1 / temperature, scales)


def whole_numbers_problem(dtype: torch.dtype, device: torch.device) -> Problem:
    """NT-Xent of rows whose similarities are whole numbers, exact in every dtype, so that rounding hides no error."""
    n, d = 8, 16
    u = torch.randint(-2, 3, (2 * n, d), generator=generator(3)).to(device, dtype)
    return nt_xent_problem((u[:n], u[n:]), 8.0, normalize=False)


def views_of(n: int, d: int, dtype: torch.dtype, device: torch.device, common: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return two noisy views of random directions with different norms. `common`: the weight of a shared direction."""
    random = generator(n * 1000 + d)
    z = torch.randn(n, d, generator=random, dtype=torch.float64)
    noise = torch.randn(2, n, d, generator=random, dtype=torch.float64)
    shared = torch.randn(1, d, generator=random, dtype=torch.float64)
    lengths = torch.rand(2, n, 1, generator=random, dtype=torch.float64) * 3 + 0.2
    z_i, z_j = (((1 - common) * (z + noise) + common * 2 * shared) * lengths).to(device, dtype)
    return z_i, z_j


def generator(seed: int) -> torch.Generator:
    """Return a generator whose numbers are the same on every machine."""
    return torch.Generator().manual_seed(seed)


def _fresh_leaves(tensors: Sequence[Tensor], exact: bool) -> list[Tensor]:
    """Return new leaf tensors with the given values and strides, in float64 if `exact`."""
    dtypes = [torch.float64 if exact else x.dtype for x in tensors]
    copies = [
        torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device).copy_(x)
        for x, dtype in zip(tensors, dtypes, strict=True)
    ]
    return [copy.requires_grad_() for copy in copies]


def _gradients(**results: Tensor) -> dict[str, Tensor]:
    """Return each result without its graph, or, for a name that begins with "d_", the gradient of the given leaf."""
    found = {}
    for name, x in results.items():
        gradient = x.grad if name.startswith("d_") else x.detach()
        assert gradient is not None
        found[name] = gradient
    return found


def _unit(x: Tensor) -> Tensor:
    """Return unit rows in the dtype of x."""
    return F.normalize(x.to(accumulation_dtype(x.dtype)), dim=1).to(x.dtype)
