"""Losses across ranks: values and parameter gradients, compared with the whole batch in one process in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastntxent
from fastntxent import Sharding
from tests.ranks import on_ranks
from tests.tiers import tiered

FEATURES, D, VIEWS = 6, 16, 3
TAU = 0.2
SIZES = {1: [7], 2: [5, 8], 3: [4, 0, 6], 4: [3, 6, 0, 2]}  # world size: samples of each rank
RTOL = 1e-5

# Each case takes embeddings (VIEWS, n, D), ids (n,), a learnt temperature, and the options `group` and `backend`.
Call = Callable[..., Tensor]


def of_views(name: str, **fixed: Any) -> Call:
    return lambda z, ids, tau, **kw: getattr(fastntxent, name)(z[0], z[1], tau, **fixed, **kw)


def info_nce(z: Tensor, ids: Tensor, tau: Tensor, *, negatives: bool = False, **kw: Any) -> Tensor:
    return fastntxent.info_nce(z[0], z[1], tau, negatives=z[2] if negatives else None, **kw)


def distill(z: Tensor, ids: Tensor, tau: Tensor, *, frozen: bool = False, **kw: Any) -> Tensor:
    """The teacher's rows are narrower than the student's."""
    teacher = z[2, :, :10], (z[0] + z[2])[:, :10]
    return fastntxent.distill(z[0].detach() if frozen else z[0], z[1], *teacher, tau, **kw)


def distill_called(z: Tensor, ids: Tensor, tau: Tensor, *, frozen: bool = False, **kw: Any) -> Tensor:
    """The teacher is a function of the sample indices in the whole batch."""
    return fastntxent.distill(
        *(z[0], z[1].detach() if frozen else z[1]),
        teacher=lambda rows, cols: torch.cos(2.0 * rows[:, None] + 3.0 * cols),
        temperature=tau,
        **kw,
    )


def guided(z: Tensor, ids: Tensor, tau: Tensor, *, negatives: bool = False, **kw: Any) -> Tensor:
    """The guide's rows are narrower than the embeddings."""
    guide = z[2, :, :10].detach(), (z[0] + z[2])[:, :10]
    given = {"negatives": z[2], "guide_negatives": z[1, :, :10].detach()} if negatives else {}
    return fastntxent.guided_info_nce(z[0], z[1], *guide, tau, **given, **kw)


def sup_con(z: Tensor, ids: Tensor, tau: Tensor, *, several: bool = False, **kw: Any) -> Tensor:
    """SupCon of all views; with `several`, a row with id i has i labels, possibly none."""
    labels = torch.arange(3) < ids[:, None] if several else ids
    return fastntxent.sup_con(z.flatten(0, 1), labels.repeat(VIEWS, *[1] * (labels.ndim - 1)), tau, **kw)


def weighted_sup_con(z: Tensor, ids: Tensor, tau: Tensor, **kw: Any) -> Tensor:
    """SupCon of all views, with pair weights whose last row is 0."""
    weights = torch.tensor([[1.0, 0.5, 0.0, 0.2], [0.1, 2.0, 0.7, 0.0], [0.0, 0.3, 0.4, 0.0], [0.0, 0.0, 0.0, 0.0]])
    return fastntxent.sup_con(z.flatten(0, 1), ids.repeat(VIEWS) % 4, tau, pair_weights=weights.to(z.device), **kw)


def queue(z: Tensor, ids: Tensor, tau: Tensor, **kw: Any) -> Tensor:
    """Two steps: in the second, the queue holds the keys of the first. Query and key come from different views."""
    loss = fastntxent.QueueInfoNCELoss(20, D, **kw)
    loss.__class__ = _WithTemperature
    loss.given = tau
    return loss(z[0], z[1].detach(), ids) + loss(z[1], z[2], ids)


class _WithTemperature(fastntxent.QueueInfoNCELoss):
    given: Tensor

    @property
    def temperature(self) -> Tensor:
        return self.given


PER_ROW = "nt_xent temperature per row"

CASES: dict[str, Call] = {
    "nt_xent": of_views("nt_xent"),
    "nt_xent sum": of_views("nt_xent", reduction="sum"),
    "nt_xent rows as they are": of_views("nt_xent", normalize=False),
    "nt_xent ids": lambda z, ids, tau, **kw: fastntxent.nt_xent(z[0], z[1], tau, ids=ids, **kw),
    "nt_xent smoothing": lambda z, ids, tau, **kw: fastntxent.nt_xent(
        z[0], z[1], tau, ids=ids, label_smoothing=0.1, **kw
    ),
    PER_ROW: lambda z, ids, tau, **kw: fastntxent.nt_xent(z[0], z[1], tau * (1 + ids.repeat(2) / 9), **kw),
    "nt_xent terms": lambda z, ids, tau, **kw: fastntxent.nt_xent_terms(z[0], z[1], tau, **kw).distribution,
    "multiview": lambda z, ids, tau, **kw: fastntxent.multiview_nt_xent(z, tau, **kw),
    "dcl": of_views("dcl"),
    "dclw": of_views("dclw"),
    "debiased": of_views("debiased", tau_plus=0.1),
    "hard_negative": of_views("hard_negative", tau_plus=0.1, beta=0.5),
    "rince": of_views("rince"),
    "macl": of_views("macl"),
    "sup_con": lambda z, ids, tau, **kw: fastntxent.sup_con(z[0], ids, tau, **kw),
    "sup_con in": functools.partial(sup_con, form="in"),
    "sup_con in sum": functools.partial(sup_con, form="in", reduction="sum"),
    "sup_con pairs": functools.partial(sup_con, form="pairs"),
    "sup_con pairs rows as they are": functools.partial(sup_con, form="pairs", normalize=False),
    "sup_con several labels": functools.partial(sup_con, several=True),
    "sup_con weights": weighted_sup_con,
    "sup_con weights sum": functools.partial(weighted_sup_con, reduction="sum", normalize=False),
    "clip": of_views("clip"),
    "clip smoothing": lambda z, ids, tau, **kw: fastntxent.clip(z[0], z[1], tau, ids=ids, label_smoothing=0.1, **kw),
    "info_nce": info_nce,
    "info_nce smoothing": functools.partial(info_nce, label_smoothing=0.1),
    "info_nce negatives": functools.partial(info_nce, negatives=True, in_batch_negatives=True, hardness_strength=0.3),
    "info_nce negatives smoothing": functools.partial(info_nce, negatives=True, label_smoothing=0.2),
    "nt_xent margin": of_views("nt_xent", margin=0.1),
    "nt_xent ceiling ids": lambda z, ids, tau, **kw: fastntxent.nt_xent(*z[:2], tau, ids=ids, ceiling=0.2, **kw),
    "clip margin": of_views("clip", margin=0.1),
    "info_nce negatives margin": functools.partial(
        info_nce, negatives=True, in_batch_negatives=True, relative_margin=0.3
    ),
    "sup_con ceiling": functools.partial(sup_con, ceiling=0.2),
    "clip same_id out": lambda z, ids, tau, **kw: fastntxent.clip(*z[:2], tau, ids=ids, positives="same_id", **kw),
    "info_nce same_id in": lambda z, ids, tau, **kw: fastntxent.info_nce(
        z[0], z[1], tau, ids=ids, positives="same_id", form="in", **kw
    ),
    "clip same_id in frozen": lambda z, ids, tau, **kw: fastntxent.clip(
        z[0].detach(), z[1], tau, ids=ids, positives="same_id", form="in", **kw
    ),
    "multi_clip": lambda z, ids, tau, **kw: fastntxent.multi_clip(list(z), tau, **kw),
    "distill": functools.partial(distill, teacher_temperature=0.3),
    "distill teacher at the student's temperature": distill,
    "distill sum": functools.partial(distill, teacher_logit_scale=4.0, reduction="sum"),
    "distill rows as they are": functools.partial(distill, normalize=False, teacher_temperature=2.0),
    "distill frozen": functools.partial(distill, frozen=True),
    "distill sharp teacher": functools.partial(distill, teacher_temperature=1e-6),
    "distill called": functools.partial(distill_called, teacher_temperature=0.3),
    "distill called, teacher at the student's temperature": functools.partial(
        distill_called, reduction="sum", normalize=False
    ),
    "distill called frozen": functools.partial(distill_called, frozen=True),
    "guided": guided,
    "guided keys alone": functools.partial(guided, contrast_anchors=False, contrast_positives=False, reduction="sum"),
    "guided negatives": functools.partial(guided, negatives=True, margin=0.1, margin_strategy="relative"),
    "guided rows as they are": functools.partial(guided, normalize=False, margin=-0.1),
    "siglip": of_views("siglip", bias=-2.0),
    "siglip ids": lambda z, ids, tau, **kw: fastntxent.siglip(z[0], z[1], tau, bias=tau - 2, ids=ids, **kw),
    "siglip frozen": lambda z, ids, tau, **kw: fastntxent.siglip(z[0].detach(), z[1], tau, bias=tau - 2, **kw),
    "nt_logistic": of_views("nt_logistic", bias=-1.0),
    "nt_logistic ids": lambda z, ids, tau, **kw: fastntxent.nt_logistic(z[0], z[1], tau, bias=tau - 1, ids=ids, **kw),
    "queue": queue,
}


class Result(NamedTuple):
    loss: Tensor
    d_weight: Tensor
    d_bias: Tensor
    d_temperature: Tensor

    def same_bits(self, other: Result) -> bool:
        return all(torch.equal(a, b) for a, b in zip(self, other, strict=True))


def whole_batch(n: int) -> tuple[Tensor, Tensor]:
    """Return inputs (VIEWS, n, FEATURES) and ids (n,)."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(1, n, FEATURES, generator=generator) + torch.randn(VIEWS, n, FEATURES, generator=generator)
    return x, torch.randint(0, 4, (n,), generator=generator)


def encoder(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(FEATURES, D).to(dtype)


def evaluate(model: nn.Module, x: Tensor, ids: Tensor, call: Call, **options: Any) -> Result:
    model.zero_grad()
    tau = torch.tensor(TAU, dtype=x.dtype, requires_grad=True)
    z = model(x.flatten(0, 1)).view(*x.shape[:2], D)
    loss = call(z, ids, tau, **options)
    loss.backward()
    return Result(loss.detach(), *(p.grad.clone() for p in (*model.parameters(), tau)))


def truth(name: str, n: int) -> Result:
    x, ids = whole_batch(n)
    return evaluate(encoder(torch.float64), x.double(), ids, CASES[name], backend="reference")


def mine(world: int) -> tuple[Tensor, Tensor]:
    """Return this rank's part of the whole batch."""
    sizes = SIZES[world]
    first = sum(sizes[: dist.get_rank()])
    here = slice(first, first + sizes[dist.get_rank()])
    x, ids = whole_batch(sum(sizes))
    return x[:, here], ids[here]


def assert_close(result: Result, expected: Result, rtol: float = RTOL) -> None:
    for name, value, true in zip(Result._fields, result, expected, strict=True):
        error = (value.double() - true).abs().max() / true.abs().max()
        assert error <= rtol, f"{name}: relative error {error:.2e}"


# --- every loss ------------------------------------------------------------------------------------------------------


def every_case(world: int) -> dict[tuple[str, str], tuple[Result, ...]]:
    model = DistributedDataParallel(encoder())
    x, ids = mine(world)
    # DDP rebuilds its buckets after the first backward, which changes the order of its sums.
    evaluate(model, x, ids, CASES["nt_xent"], group=dist.group.WORLD)
    results = {}
    for strategy in ("all_gather", "ring"):
        group = Sharding(dist.group.WORLD, strategy=strategy)
        for name, call in CASES.items():
            results[name, strategy] = tuple(evaluate(model, x, ids, call, group=group) for _ in range(2))
            if name == PER_ROW:  # a rank's gradient covers only its own rows: average as DDP would
                for result in results[name, strategy]:
                    dist.all_reduce(result.d_temperature)
                    result.d_temperature.div_(world)
    return results


@pytest.fixture(scope="module", params=tiered(SIZES, slow=lambda ranks: ranks != 3))
def results(request: pytest.FixtureRequest) -> tuple[int, list[dict]]:
    return request.param, on_ranks(request.param, every_case, request.param)


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_process(results, name: str, strategy: str):
    world, of_ranks = results
    expected = truth(name, sum(SIZES[world]))
    first = of_ranks[0][name, strategy][0]
    assert_close(first, expected)
    for of_rank in of_ranks:
        for repeat in of_rank[name, strategy]:  # the same bits on every rank and in every run
            assert repeat.same_bits(first)


# --- few rows --------------------------------------------------------------------------------------------------------


def few_rows(sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Return the losses of FEW on at most one row per rank, and their gradients with respect to this rank's z_i.

    With so few rows, a gradient that is sent in the backward may be an expanded tensor of one element, which PyTorch
    counts as contiguous despite its stride.
    """
    first = sum(sizes[: dist.get_rank()])
    here, found = slice(first, first + sizes[dist.get_rank()]), []
    for name in FEW:
        z_i, z_j = torch.randn(2, sum(sizes), D, generator=torch.Generator().manual_seed(0))
        z_i, z_j = (z[here].clone().requires_grad_() for z in (z_i, z_j))
        loss = CASES[name](torch.stack((z_i, z_j)), torch.arange(sum(sizes))[here], torch.tensor(TAU), group="world")
        loss.backward()
        found.append((loss.detach(), z_i.grad))
    return found


FEW = ("siglip", "siglip ids", "nt_logistic", "clip", "clip margin", "clip same_id out", "nt_xent margin")


@pytest.mark.parametrize("sizes", [[1, 1], [0, 1], [1, 0]])
def test_ranks_with_one_row_equal_one_process(sizes: list[int]):
    z_i, z_j = torch.randn(2, sum(sizes), D, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind()
    of_ranks = on_ranks(2, few_rows, sizes)
    for index, name in enumerate(FEW):
        loss = CASES[name](torch.stack((z_i, z_j)), torch.arange(sum(sizes)), torch.tensor(TAU))
        (expected,) = torch.autograd.grad(loss, z_i)
        for of_rank in of_ranks:
            torch.testing.assert_close(of_rank[index][0], loss.detach())
        gradient = torch.cat([of_rank[index][1] for of_rank in of_ranks])
        torch.testing.assert_close(gradient / 2, expected)  # DDP averages across the two ranks
