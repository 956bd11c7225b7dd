"""The calls that a backend is checked by: each runs on any backend, in its own precision or in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algebra import accumulation_dtype
from ..losses import clip, info_nce, nt_xent
from ..opening import open_batch
from ..options import Reduction
from ..primitives import cross_neg_lse, neg_lse


@dataclass(frozen=True)
class Problem:
    """A call whose results are compared.

    Attributes:
        run: takes a backend's name and whether to compute in float64; returns tensors by name, gradients as d_...
        dtype, rows: of the call.
        logit_size: the largest logit.
        scales: by name, the size of what a result is a difference of, for those that may cancel to nothing.
    """

    run: Callable[[str, bool], dict[str, Tensor]]
    dtype: torch.dtype
    rows: int
    logit_size: float
    scales: dict[str, float]


def nt_xent_problem(
    views: Sequence[Tensor], temperature: float | Tensor, *, normalize: bool = True, upstream: Tensor | None = None
) -> Problem:
    """NT-Xent and its gradients in the views and the temperature: the mean, or a sum of rows weighted by `upstream`."""

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
    # The temperature's gradient is a sum of differences of similarities, which can cancel to nothing.
    return Problem(run, views[0].dtype, len(z), largest / tau, {"d_temperature": weights * largest / tau**2})


def towers_problem(views: Sequence[Tensor], temperature: float, *, both: bool) -> Problem:
    """InfoNCE, or CLIP with `both` directions: the mean with all gradients from one call, with that of either tower
    alone, as where the other is frozen, and without any."""

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


def groups_problem(views: Sequence[Tensor], temperature: float) -> Problem:
    """`neg_lse` of rows in groups, negative ids among them, and of rows that have no negative."""
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
    """A weighted sum of log-sum-exps with its gradient, from one call."""
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
    """Similarities that every dtype holds exactly: a wrong place in a tile is a wrong whole number."""
    n, d = 8, 16
    u = torch.randint(-2, 3, (2 * n, d), generator=generator(3)).to(device, dtype)
    return nt_xent_problem((u[:n], u[n:]), 8.0, normalize=False)


def views_of(n: int, d: int, dtype: torch.dtype, device: torch.device, common: float = 0.0) -> tuple[Tensor, Tensor]:
    """Two noisy views of random directions, with rows of different lengths; `common` is the share of one direction."""
    random = generator(n * 1000 + d)
    z = torch.randn(n, d, generator=random, dtype=torch.float64)
    noise = torch.randn(2, n, d, generator=random, dtype=torch.float64)
    shared = torch.randn(1, d, generator=random, dtype=torch.float64)
    lengths = torch.rand(2, n, 1, generator=random, dtype=torch.float64) * 3 + 0.2
    z_i, z_j = (((1 - common) * (z + noise) + common * 2 * shared) * lengths).to(device, dtype)
    return z_i, z_j


def generator(seed: int) -> torch.Generator:
    """Random numbers that are the same on every machine."""
    return torch.Generator().manual_seed(seed)


def _fresh_leaves(tensors: Sequence[Tensor], exact: bool) -> list[Tensor]:
    """Tensors of their own to differentiate by, with the strides that were given."""
    dtypes = [torch.float64 if exact else x.dtype for x in tensors]
    copies = [
        torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device).copy_(x)
        for x, dtype in zip(tensors, dtypes, strict=True)
    ]
    return [copy.requires_grad_() for copy in copies]


def _gradients(**results: Tensor) -> dict[str, Tensor]:
    """Values as they are, and gradients (named d_...) of the leaves."""
    found = {}
    for name, x in results.items():
        gradient = x.grad if name.startswith("d_") else x.detach()
        assert gradient is not None
        found[name] = gradient
    return found


def _unit(x: Tensor) -> Tensor:
    """Unit rows, in the dtype they come in."""
    return F.normalize(x.to(accumulation_dtype(x.dtype)), dim=1).to(x.dtype)
