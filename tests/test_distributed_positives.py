"""SupCon across ranks, row by row: all kinds of labels, tiles, rounding, accuracy and errors."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

import fastntxent
from fastntxent import Sharding, ops
from fastntxent.distributed import wire
from fastntxent.opening import open_batch
from fastntxent.ops import positives
from tests.ranks import on_ranks
from tests.test_positives import converged

ROWS = [4, 0, 7]
N, D, TAU = sum(ROWS), 5, 0.3
CONVERGED_TAU = 0.055
STRATEGIES = ("all_gather", "ring")
FORMS = ("out", "in", "pairs")
RTOL = {torch.float32: 1e-5, torch.float64: 1e-12}

LABELS = {
    "everywhere": torch.tensor([0, 1, 0, 1, 1, 1, 0, 0, 1, 0, 1], dtype=torch.int32),
    "some alone": torch.tensor([3, 3, 9, -5, 9, 2, 2, 4, 3, 7, 2]),
    "on one rank each": torch.tensor([0, 1, 0, 1, 2, 2, 3, 3, 3, 2, 2]),
    "all the same": torch.zeros(N, dtype=torch.int8),
    "all alone": torch.arange(N),
}
SEVERAL = torch.rand(N, 3, generator=torch.Generator().manual_seed(1)) < 0.4
SEVERAL[[0, 5]] = False  # rows without any class

# Values: form and labels.
CALLS = {f"{form}, {name}": (form, labels) for form, (name, labels) in itertools.product(FORMS, LABELS.items())}
CALLS |= {"out, several": ("out", SEVERAL), "out, several integers": ("out", SEVERAL * torch.tensor([1, 2, -1]))}


class Found(NamedTuple):
    losses: Tensor
    d_z: Tensor
    d_temperature: Tensor


def batch() -> tuple[Tensor, Tensor]:
    """Return rows of different lengths, and a weight for each row's loss."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(N, D, generator=generator, dtype=torch.float64)
    return z * torch.linspace(0.5, 2, N, dtype=z.dtype)[:, None], torch.rand(
        N, generator=generator, dtype=torch.float64
    )


def evaluate(form: str, labels: Tensor, z: Tensor, weights: Tensor, **options: Any) -> Found:
    z = z.clone().requires_grad_()
    tau = torch.tensor(TAU, dtype=z.dtype, requires_grad=True)
    losses = fastntxent.sup_con(z, labels, tau, form=form, reduction="none", **options)
    (losses * weights).sum().backward()
    return Found(losses.detach(), z.grad, tau.grad)


def on_each_rank() -> dict[str, Any]:
    world, rank = dist.group.WORLD, dist.get_rank()
    here = slice(sum(ROWS[:rank]), sum(ROWS[: rank + 1]))
    z, weights = (x[here] for x in batch())
    found: dict[str, Any] = {}
    for strategy, (name, (form, labels)) in itertools.product(STRATEGIES, CALLS.items()):
        group = Sharding(world, strategy=strategy)
        for dtype in RTOL:
            found[name, strategy, dtype] = evaluate(form, labels[here], z.to(dtype), weights.to(dtype), group=group)
        group = Sharding(world, strategy=strategy, wire_dtype=torch.bfloat16)
        found["bfloat16", name, strategy] = evaluate(form, labels[here], z, weights, group=group)
    positives._TILE_CPU, usual = (3, 4), positives._TILE_CPU
    for strategy, form in itertools.product(STRATEGIES, ("in", "pairs")):
        labels = LABELS["everywhere"][here]
        found["tiles", form, strategy] = evaluate(form, labels, z, weights, group=Sharding(world, strategy=strategy))
    positives._TILE_CPU = usual
    for strategy, form in itertools.product(STRATEGIES, ("in", "pairs")):
        z, labels = (x.tensor_split((50, 50))[rank] for x in converged())
        z.requires_grad_()
        group = Sharding(world, strategy=strategy)
        fastntxent.sup_con(z, labels, CONVERGED_TAU, form=form, reduction="sum", group=group).backward()
        found["converged", form, strategy] = z.grad / len(ROWS)
    for strategy in STRATEGIES:
        rows = batch()[0][here].requires_grad_()
        opened = open_batch(Sharding(world, strategy=strategy), "positive_lse", {"rows": rows})
        ids = LABELS["some alone"][here]
        square_of_lse(opened.positive_lse(rows, ids, torch.tensor(0.5, dtype=rows.dtype))).backward()
        found["alone", strategy] = rows.grad
    for name, x in summed(rank).items():
        found[name] = wire.all_reduce(world, x)
    for name, of_ranks in DISAGREEMENTS.items():
        rows = torch.zeros(ROWS[rank], D)
        try:
            fastntxent.sup_con(rows, **{"labels": LABELS["everywhere"][here], **of_ranks[rank]}, group=world)
        except ValueError as error:
            found[name] = str(error)
    return found


def square_of_lse(lse: Tensor) -> Tensor:
    """Sum the squares over the rows that have a positive. The upstream gradient of the other rows is 0 * inf = NaN."""
    return torch.where(lse.isinf(), 0, lse.square()).sum()


def summed(rank: int) -> dict[str, Tensor]:
    """Return tensors to sum across ranks: one number, fewer numbers than ranks, a number of elements that is not a
    multiple of the number of ranks, a non-contiguous tensor, and integers."""
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(rank))
    return {"one": x[0, 0], "few": x[0, :2], "more": x, "transposed": x.T, "integers": (100 * x).long()}


several = torch.ones(N, 3, dtype=torch.bool)
DISAGREEMENTS: dict[str, list[dict[str, Any]]] = {
    "form is 'in' on rank 0, 2; 'pairs' on rank 1": [{"form": "in"}, {"form": "pairs"}, {"form": "in"}],
    "n_classes is 3 on rank 0; 2 on rank 1, 2": [
        {"labels": several[: ROWS[0]]},
        {"labels": several[: ROWS[1], :2]},
        {"labels": several[: ROWS[2], :2]},
    ],
    "n_classes is 3 on rank 0; None on rank 1, 2": [{"labels": several[: ROWS[0]]}, {}, {}],
}


@pytest.fixture(scope="module")
def of_ranks() -> list[dict[str, Any]]:
    return on_ranks(len(ROWS), on_each_rank)


def together(of_ranks: list[dict[str, Any]], *key: object) -> Found:
    """Concatenate the rows of all ranks, and check that the temperature's gradient is the same on each."""
    parts = [found[key if len(key) > 1 else key[0]] for found in of_ranks]
    for part in parts:
        assert torch.equal(part.d_temperature, parts[0].d_temperature)
    losses, d_z = (torch.cat(x) for x in list(zip(*parts, strict=True))[:2])
    return Found(losses, d_z, parts[0].d_temperature * len(ROWS))  # from the ranks' mean to their sum


def assert_close(found: Found, expected: Found, rtol: float) -> None:
    for name, value, true in zip(Found._fields, found, expected, strict=True):
        assert (value.double() - true).abs().max() <= rtol * true.abs().max(), name


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CALLS)
def test_sup_con_rows_across_ranks_equal_one_process(of_ranks, name: str, strategy: str, dtype: torch.dtype):
    form, labels = CALLS[name]
    found = together(of_ranks, name, strategy, dtype)
    assert found.losses.dtype == found.d_z.dtype == dtype
    assert_close(found, evaluate(form, labels, *batch(), backend="reference"), RTOL[dtype])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("form", ["in", "pairs"])
def test_sup_con_across_ranks_in_several_tiles_equals_one_process(of_ranks, form: str, strategy: str):
    expected = evaluate(form, LABELS["everywhere"], *batch(), backend="reference")
    assert_close(together(of_ranks, "tiles", form, strategy), expected, RTOL[torch.float64])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CALLS)
def test_sup_con_with_bfloat16_on_the_wire_equals_the_loss_of_rounded_rows(of_ranks, name: str, strategy: str):
    form, labels = CALLS[name]
    z, weights = batch()
    z.requires_grad_()
    tau = torch.tensor(TAU, dtype=z.dtype, requires_grad=True)
    u = normalize(z, dim=1)
    rounded = u + (u.bfloat16().double() - u).detach()
    options = {"form": form, "reduction": "none", "normalize": False, "backend": "reference"}
    losses = fastntxent.sup_con(rounded, labels, tau, **options)
    (losses * weights).sum().backward()
    found = together(of_ranks, "bfloat16", name, strategy)
    assert_close(found, Found(losses.detach(), z.grad, tau.grad), RTOL[torch.float64])
    exact = together(of_ranks, name, strategy, torch.float64)
    if exact.d_z.any():  # otherwise the gradient is 0 with rounded rows too
        assert (found.d_z - exact.d_z).abs().max() > 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("form", ["in", "pairs"])
def test_sup_con_gradient_across_ranks_keeps_its_accuracy_when_converged(of_ranks, form: str, strategy: str):
    z, labels = converged()
    z = z.double().requires_grad_()
    loss = fastntxent.sup_con(z, labels, CONVERGED_TAU, form=form, reduction="sum", backend="reference")
    loss.backward()
    assert loss < 120 * 1e-5
    found = torch.cat([found["converged", form, strategy] for found in of_ranks])
    assert (found - z.grad).norm() < 1e-5 * z.grad.norm()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_positive_lse_across_ranks_equals_one_process_if_rows_lack_a_positive(of_ranks, strategy: str):
    rows, ids = batch()[0].requires_grad_(), LABELS["some alone"]
    square_of_lse(ops.positive_lse(rows, rows, ids, ids, torch.tensor(0.5, dtype=rows.dtype), same=True)).backward()
    found = torch.cat([found["alone", strategy] for found in of_ranks])
    torch.testing.assert_close(found, rows.grad)


@pytest.mark.parametrize("name", summed(0))
def test_all_reduce_adds_in_the_order_of_the_ranks(of_ranks, name: str):
    x = [summed(rank)[name] for rank in range(len(ROWS))]
    for found in of_ranks:
        assert torch.equal(found[name], x[0] + x[1] + x[2])


@pytest.mark.parametrize("says", DISAGREEMENTS)
def test_sup_con_with_different_forms_or_class_counts_on_ranks_raises(of_ranks, says: str):
    for found in of_ranks:
        assert found[says] == f"these must be the same on every rank: {says}"
