"""More about losses across ranks: reductions, options, wrappers, bytes, memory and errors."""

from __future__ import annotations

import copy
import datetime
import gc
import os
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastntxent
from fastntxent import Sharding, error_budget
from fastntxent.backends.blocked import BlockedBackend
from fastntxent.distributed import positives, schedule, shard
from fastntxent.ops import kernels
from fastntxent.options import STRATEGIES
from tests.ranks import bytes_sent, on_ranks
from tests.test_distributed import (
    CASES,
    RTOL,
    SIZES,
    TAU,
    D,
    assert_close,
    encoder,
    evaluate,
    mine,
    truth,
    whole_batch,
)

WORLD = 2
N = sum(SIZES[WORLD])


def relative(value: Tensor, true: Tensor) -> float:
    return float((value.double() - true).abs().max() / true.abs().max())


# --- two ranks --------------------------------------------------------------------------------------------------------


class Together(nn.Module):
    """Encoder and loss in one module, so DDP averages the gradient of the temperature too."""

    def __init__(self, group: Any):
        super().__init__()
        self.encoder = encoder()
        self.loss = fastntxent.NTXentLoss(TAU, learn_temperature=True, group=group)

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x.flatten(0, 1)).view(*x.shape[:2], D)
        return self.loss(z[0], z[1])


def row_losses_and_gradient(model: nn.Module, x: Tensor, weights: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    z = model(x.flatten(0, 1)).view(*x.shape[:2], D)
    rows = fastntxent.nt_xent(z[0], z[1], TAU, reduction="none", **options)
    (rows * weights.flatten().to(rows)).sum().backward()
    return rows.detach(), next(model.parameters()).grad.clone()


def row_weights() -> Tensor:
    return torch.rand(2, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def compared(x: Tensor) -> dict[str, error_budget.Report]:
    """Return comparisons with the reference: sound ones, and one in which rank 1's gradient has a relative error of
    1e-4."""
    world, right = dist.group.WORLD, BlockedBackend.cross_neg_lse_backward

    def wrong(*args: Any) -> Any:
        d_rows, *rest = right(*args)
        return d_rows * (1 + 1e-4 * dist.get_rank()), *rest

    reports = {
        name: error_budget.compare(*views[:2], TAU, group=world) for name, views in (("float", x), ("half", x.half()))
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockedBackend, "cross_neg_lse_backward", wrong)
        reports["wrong"] = error_budget.compare(x[0], x[1], TAU, backend="blocked", group=world)
    return reports


def error_of_weights(rank: int) -> dict[str, str]:
    """Each rank passes its element of each pair as pair_weights. Return this rank's error for each pair, by name, or
    "none"."""
    weights = torch.rand(300, 300, generator=torch.Generator().manual_seed(0))
    swapped = weights.clone()
    swapped[0, 0], swapped[3, 7] = weights[3, 7], weights[0, 0]
    one, other = torch.tensor([[1.0, 0.5], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.5, 1.0]])
    pairs = {
        "an ulp": (weights, torch.nextafter(weights, weights + (torch.arange(300) == 9))),
        "places": (weights, swapped),
        "short": (one, other),
        "shape": (one, torch.ones(3, 3)),
        "given": (one, None),
        "the same": (one, one.clone()),
        "dtypes": (one.half(), one.double()),
        "zeros": (one, one * torch.tensor([[1.0, 1.0], [-1.0, 1.0]])),
    }
    found = {}
    for name, of_ranks in pairs.items():
        try:
            fastntxent.sup_con(torch.ones(2, D), torch.tensor([0, 1]), pair_weights=of_ranks[rank], group="world")
        except ValueError as error:
            found[name] = str(error)
        else:
            found[name] = "none"
    return found


def two_ranks() -> dict[str, Any]:
    world, rank = dist.group.WORLD, dist.get_rank()
    x, ids = mine(WORLD)
    model = DistributedDataParallel(encoder())
    call = CASES["nt_xent"]
    found: dict[str, Any] = {"plain": evaluate(model, x, ids, call, group=world)}

    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("data",))
    found["mesh"] = evaluate(model, x, ids, call, group=mesh)
    found["bfloat16"] = evaluate(model, x, ids, call, group=Sharding(world, wire_dtype=torch.bfloat16))
    found["blocked"] = evaluate(model, x, ids, call, group=world, backend="blocked")
    found["half"] = fastntxent.nt_xent(*x[:2].bfloat16(), TAU, group=world)
    even = x[:, : min(SIZES[WORLD])]
    same_rows = {check: evaluate(model, even, ids, call, group=Sharding(world, check=check)) for check in (True, False)}
    found["unchecked is the same"] = same_rows[True].same_bits(same_rows[False])

    found["compared"] = compared(x)
    first = sum(SIZES[WORLD][:rank])
    weights = row_weights()[:, first : first + SIZES[WORLD][rank]]
    found["none"] = row_losses_and_gradient(model, x, weights, group=world)

    together = DistributedDataParallel(Together(world))
    together(x).backward()
    found["together"] = [p.grad for p in together.parameters()]

    cached = DistributedDataParallel(encoder())
    loss = fastntxent.cached_backward(cached, x[:2].unbind(), fastntxent.NTXentLoss(TAU, group=world), chunk_size=3)
    found["cached"] = loss, [p.grad for p in cached.parameters()]

    sharded = encoder()
    fully_shard(sharded, mesh=mesh)
    z = sharded(x.flatten(0, 1)).view(*x.shape[:2], D)
    fastntxent.nt_xent(z[0], z[1], TAU, group=mesh).backward()
    found["fsdp"] = [p.grad.full_tensor() for p in sharded.parameters()]

    def step(model: nn.Module, x: Tensor) -> Tensor:
        z = torch.relu(model(x.flatten(0, 1))).view(*x.shape[:2], D)
        return 2 * fastntxent.nt_xent(z[0], z[1], TAU, group=world)

    for name, function in (("eager", step), ("compiled", torch.compile(step, backend="aot_eager"))):
        plain = encoder()
        value = function(plain, x)
        value.backward()
        found[name] = value.detach(), next(plain.parameters()).grad
    found["queues"] = error_of_queues(rank, world)
    found["weights"] = error_of_weights(rank)
    found["widths"] = errors_of_widths(rank)
    found["errors"] = {name: error_of(options) for name, options in DISAGREEMENTS.items()}
    found["empty"] = error_of([{"n": 0}, {"n": 0}])
    found["alone"] = error_of([{"backend": "reference"}] * 2)
    found["after errors"] = evaluate(model, x, ids, call, group=world)
    return found


def error_of_queues(rank: int, world: Any) -> str:
    """Return this rank's error if both queues are full, but the next row goes to a different position on each rank."""
    loss = fastntxent.QueueInfoNCELoss(4, D, group=world)
    for n in (3, 1 + rank):
        loss.queue.push(torch.ones(n, D))
    try:
        loss(torch.ones(2, D), torch.ones(2, D))
    except ValueError as error:
        return str(error)
    return "none"


class HasGroup:
    """A callable object with a group, but not a module."""

    group = "world"

    def __call__(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        return fastntxent.nt_xent(z_i, z_j, group=self.group)


def errors_of_widths(rank: int) -> list[str]:
    """Return this rank's error for each way to give `matryoshka` a loss with a group, if the ranks' widths differ."""
    z, dims, module = torch.eye(2, 4), [[4], [4, 2]][rank], fastntxent.NTXentLoss(group="world")
    calls: list[Callable[[], object]] = [
        lambda: fastntxent.matryoshka(fastntxent.nt_xent, z, z, dims=dims, group="world"),
        lambda: fastntxent.matryoshka(partial(fastntxent.nt_xent, group="world"), z, z, dims=dims),
        lambda: fastntxent.matryoshka(module, z, z, dims=dims),
        lambda: fastntxent.matryoshka(module.forward, z, z, dims=dims),
        lambda: fastntxent.matryoshka(partial(module, z), z, dims=dims),
        lambda: fastntxent.matryoshka(HasGroup(), z, z, dims=dims),
    ]
    messages = []
    for call in calls:
        with pytest.raises(ValueError, match="the same on every rank") as caught:
            call()
        messages.append(str(caught.value))
    return messages


# Keys: what the error must say. Values: what each of the two ranks passes.
DISAGREEMENTS: dict[str, list[dict[str, Any]]] = {
    "features is 3 on rank 0; 4 on rank 1": [{"d": 3}, {"d": 4}],
    "dtype is torch.float32 on rank 0; torch.float64 on rank 1": [{}, {"dtype": torch.float64}],
    "temperature is 0.5 on rank 0; 0.25 on rank 1": [{}, {"temperature": 0.25}],
    "temperature is 0.5 on rank 0; 0.25, requires_grad on rank 1": [
        {},
        {"temperature": torch.tensor(0.25, requires_grad=True)},
    ],
    "z_i.requires_grad is False on rank 0; True on rank 1. z_j.requires_grad is False on rank 0; True on rank 1": [
        {},
        {"requires_grad": True},
    ],
    "z_j.requires_grad is True on rank 0; False on rank 1": [
        {"requires_grad": True},
        {"requires_grad": True, "second_is_frozen": True},
    ],
    "reduction is 'mean' on rank 0; 'none' on rank 1": [{}, {"reduction": "none"}],
    "function is 'nt_xent' on rank 0; 'dcl' on rank 1": [{}, {"function": "dcl"}],
    "ids_given is False on rank 0; True on rank 1": [{}, {"ids": torch.arange(2)}],
    "strategy is 'auto' on rank 0; 'ring' on rank 1": [{}, {"strategy": "ring"}],
}


def error_of(of_ranks: list[dict[str, Any]]) -> str:
    options = dict(of_ranks[dist.get_rank()])
    function = getattr(fastntxent, options.pop("function", "nt_xent"))
    n, d, dtype = options.pop("n", 2), options.pop("d", 3), options.pop("dtype", torch.float32)
    z = torch.randn(n, d, dtype=dtype, requires_grad=options.pop("requires_grad", False))
    z_j = z.detach() if options.pop("second_is_frozen", False) else z
    group = Sharding(dist.group.WORLD, strategy=options.pop("strategy", "auto"))
    try:
        function(z, z_j, **{"temperature": 0.5, **options}, group=group)
    except ValueError as error:
        return str(error)
    return "none"


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return on_ranks(WORLD, two_ranks)


@pytest.mark.parametrize("how", ["plain", "mesh", "blocked", "after errors"])
def test_loss_with_each_kind_of_group_equals_one_process(found, how: str):
    for of_rank in found:
        assert_close(of_rank[how], truth("nt_xent", N))


def test_bfloat16_on_the_wire_equals_the_loss_of_rounded_rows(found):
    first = found[0]["bfloat16"]
    assert first.same_bits(found[1]["bfloat16"])
    expected = truth("nt_xent", N)
    assert 1e-6 < relative(first.d_weight, expected.d_weight) < 2e-2
    # Like the ranks, the float64 loss below computes the negatives from rounded rows and the positives from exact rows.
    # The gradient passes straight through the rounding.
    x, _ = whole_batch(N)
    model = encoder(torch.float64)
    z = model(x[:2].flatten(0, 1).double())
    u = nn.functional.normalize(z, dim=1)
    rounded = u + (u.float().bfloat16().double() - u).detach()
    nu = fastntxent.neg_lse(rounded, torch.arange(N).repeat(2), TAU, backend="reference")
    pos = (u[:N] * u[N:]).sum(dim=1).repeat(2) / TAU
    loss = nn.functional.softplus(nu - pos).mean()
    loss.backward()
    assert relative(first.loss, loss.detach()) < RTOL
    assert relative(first.d_weight, model.weight.grad) < RTOL


def test_half_precision_embeddings_give_a_float32_loss(found):
    x, _ = whole_batch(N)
    expected = fastntxent.nt_xent(*x[:2].bfloat16(), TAU)
    assert found[0]["half"].dtype == torch.float32
    assert relative(found[0]["half"], expected.double()) < RTOL


def test_check_false_gives_the_same_bits_if_ranks_have_equally_many_rows(found):
    assert all(of_rank["unchecked is the same"] for of_rank in found)


def test_reduction_none_gives_local_rows_and_the_gradient_of_the_mean_across_ranks(found):
    x, _ = whole_batch(N)
    rows, gradient = row_losses_and_gradient(encoder(torch.float64), x.double(), row_weights(), backend="reference")
    first = 0
    for of_rank, size in zip(found, SIZES[WORLD], strict=True):
        value, d_weight = of_rank["none"]
        assert relative(value, rows.view(2, N)[:, first : first + size].flatten()) < RTOL
        assert relative(d_weight, gradient / WORLD) < RTOL
        first += size


@pytest.mark.parametrize("how", ["together", "cached", "fsdp"])
def test_wrappers_average_to_the_gradient_of_one_process(found, how: str):
    expected = truth("nt_xent", N)
    for of_rank in found:
        if how == "together":
            d_log_temperature, *gradients = sorted(of_rank[how], key=Tensor.dim)
            assert relative(d_log_temperature, expected.d_temperature * TAU) < RTOL
        elif how == "cached":
            loss, gradients = of_rank[how]
            assert relative(loss, expected.loss) < RTOL
        else:
            gradients = of_rank[how]
        for gradient, true in zip(sorted(gradients, key=Tensor.dim), expected[2:0:-1], strict=True):
            assert relative(gradient, true) < RTOL


def test_loss_in_compiled_code_equals_eager(found):
    for of_rank in found:
        for compiled, eager in zip(of_rank["compiled"], of_rank["eager"], strict=True):
            torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("says", DISAGREEMENTS)
def test_disagreement_raises_an_error_that_names_it_on_every_rank(found, says: str):
    for of_rank in found:
        assert of_rank["errors"][says] == f"these must be the same on every rank: {says}"


def test_queues_at_different_positions_raise_an_error_on_every_rank(found):
    for of_rank in found:
        assert of_rank["queues"] == "these must be the same on every rank: queue_pointer is 0 on rank 0; 1 on rank 1"


@pytest.mark.parametrize("which", ["an ulp", "places", "short"])
def test_pair_weights_with_different_values_raise_an_error_on_every_rank(found, which: str):
    says = r"these must be the same on every rank: pair_weights is (.*) on rank 0; (.*) on rank 1"
    shape = r"a tensor of shape \((\d+), \1\) and checksum -?[0-9a-f]+"
    for of_rank in found:
        match = re.fullmatch(says, of_rank["weights"][which])
        assert match
        assert all(re.fullmatch(shape, one) for one in match.groups())
        assert match[1] != match[2]


def test_pair_weights_with_different_shapes_or_on_one_rank_only_raise_an_error(found):
    for of_rank in found:
        assert re.search(r"shape \(2, 2\) .* on rank 0; .* shape \(3, 3\) .* on rank 1", of_rank["weights"]["shape"])
        assert re.search(r"shape \(2, 2\) .* on rank 0; None on rank 1", of_rank["weights"]["given"])


def test_equal_pair_weights_are_accepted_whatever_their_dtype(found):
    for of_rank in found:
        assert [of_rank["weights"][name] for name in ("the same", "dtypes", "zeros")] == ["none"] * 3


def test_batch_without_rows_on_any_rank_raises_an_error(found):
    assert "must have at least one row on the 2 ranks together" in found[0]["empty"]


def test_reference_backend_rejects_a_group(found):
    assert "'reference' takes no group" in found[1]["alone"]


def test_matryoshka_compares_the_widths_of_all_ranks(found):
    for message in found[0]["widths"]:
        assert "dims is [4] on rank 0; [4, 2] on rank 1" in message


def test_compare_judges_the_batch_of_all_ranks(found):
    x, _ = whole_batch(N)
    for name, dtype in (("float", torch.float32), ("half", torch.float16)):
        report = found[0]["compared"][name]
        assert report.ok, report
        assert report == found[1]["compared"][name]
        alone = error_budget.compare(*x[:2].to(dtype), TAU)
        # The errors of the reference depend on the number of threads, which may differ between this process and ranks.
        assert report.gradient_allowed == pytest.approx(alone.gradient_allowed, rel=0.05)
    assert str(found[0]["compared"]["wrong"]).startswith("BEYOND BUDGET")
    assert found[0]["compared"]["wrong"] == found[1]["compared"]["wrong"]


# --- rows without negatives, and NaN ----------------------------------------------------------------------------------


def none_or_no_number() -> dict[tuple[str, str], tuple[Tensor, Tensor | None]]:
    found = {}
    for case in ("one group", "one stranger", "NaN"):
        x, ids = strangers(case)
        here = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
        for strategy in ("all_gather", "ring"):
            z = x[:, here].clone().requires_grad_()
            group = Sharding(dist.group.WORLD, strategy=strategy)
            losses = fastntxent.nt_xent(z[0], z[1], TAU, ids=ids[here], reduction="none", group=group)
            losses.sum().backward()
            found[case, strategy] = losses.detach().view(2, -1), z.grad
    return found


def strangers(case: str) -> tuple[Tensor, Tensor]:
    """Return two views of six samples, and their ids. All samples share a group, or all but the last do, or none do and
    one row has a NaN."""
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(6) if case == "NaN" else torch.zeros(6, dtype=torch.int64)
    if case != "one group":
        ids[-1] = 7
    if case == "NaN":
        x[0, -1, 0] = torch.nan
    return x, ids


def test_rows_without_negatives_and_nan_rows_equal_one_process():
    of_ranks = on_ranks(2, none_or_no_number)
    for case, strategy in of_ranks[0]:
        losses, gradient = (
            torch.cat(parts, dim=1) for parts in zip(*(found[case, strategy] for found in of_ranks), strict=True)
        )
        if case == "NaN":
            assert losses.isnan().all()
            continue
        x, ids = strangers(case)
        z = x.double().requires_grad_()
        expected = fastntxent.nt_xent(z[0], z[1], TAU, ids=ids, reduction="none", backend="reference")
        expected.sum().backward()
        torch.testing.assert_close(losses.flatten().double(), expected.detach(), rtol=RTOL, atol=0)
        torch.testing.assert_close(gradient.double(), z.grad, rtol=RTOL, atol=1e-6)


# --- a rank that does not answer -------------------------------------------------------------------------------------


SOON = 10.0  # timeout of the group below in seconds, far shorter than the default


def one_of_two_stops(how: str, strategy: str) -> tuple[str, float]:
    z = torch.randn(4, 8, requires_grad=True)
    impatient = dist.new_group(timeout=datetime.timedelta(seconds=SOON))
    group = Sharding(impatient, strategy=strategy, check=False)
    dist.barrier()  # wait here for slow starts, which must not count towards the timeout
    loss = fastntxent.nt_xent(z, z, 0.5, group=group)
    start = time.monotonic()
    if dist.get_rank() == 1:
        if how == "dies":
            os._exit(0)
        dist.barrier()  # until the other rank gives up
        return "", 0.0
    try:
        loss.backward()
    except RuntimeError as error:
        seconds = time.monotonic() - start
        if how == "is late":
            dist.barrier()
        return str(error), seconds
    return "none", 0.0


@pytest.mark.slow
@pytest.mark.parametrize(("how", "strategy"), [("dies", "ring"), ("dies", "all_gather"), ("is late", "all_gather")])
def test_rank_that_does_not_answer_raises_an_error_on_the_others(how: str, strategy: str):
    message, seconds = on_ranks(2, one_of_two_stops, how, strategy)[0]
    assert message.startswith("rank 0 of 2 got no answer from the others")
    assert seconds < 10 * SOON


# --- bytes and memory ------------------------------------------------------------------------------------------------

ROWS, WIDTH = 32, 128  # samples per rank; a width that no other tensor has
CLASSES = 4
OF_VIEWS = ("nt_xent", "clip")
OF_LABELS: dict[str, dict[str, Any]] = {
    "sup_con": {},
    "sup_con in": {"form": "in"},
    "sup_con pairs": {"form": "pairs"},
    "sup_con several labels": {"labels": torch.arange(2 * ROWS)[:, None] % 5 > torch.arange(CLASSES)},
}
LOSSES = (*OF_VIEWS, *OF_LABELS)


def loss_of(name: str, a: Tensor, b: Tensor, group: Sharding) -> Tensor:
    if name in OF_VIEWS:
        return getattr(fastntxent, name)(a, b, 0.5, group=group)
    options = {"labels": torch.arange(ROWS).repeat(2) // 4, **OF_LABELS[name]}
    return fastntxent.sup_con(torch.cat((a, b)), temperature=0.5, group=group, **options)


def measure() -> dict[Any, tuple[int, int]]:
    """For each group size, strategy and loss, return the bytes that this rank sends in a step, and the most bytes of
    rows that it holds while kernels run."""
    measured = {}
    groups = {size: dist.new_group(list(range(size))) for size in (3, 4)}
    held = 0

    def looking(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal held
            rows = [x for x in gc.get_objects() if type(x) is Tensor and x.ndim and x.shape[-1] in (WIDTH, 4 * WIDTH)]
            storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in rows}
            held = max(held, sum(storages.values()))
            return function(*args, **options)

        return call

    gc.freeze()  # skip existing objects in the scans below
    for module, name in ((kernels, "call_kernel"), (positives, "PositiveTiles")):
        setattr(module, name, looking(getattr(module, name)))
    for size, group in groups.items():
        if dist.get_rank() >= size:
            continue
        for strategy in ("all_gather", "ring"):
            for name in LOSSES:
                held = 0
                a, b = torch.randn(2, ROWS, WIDTH).requires_grad_().unbind()
                with bytes_sent() as sent:
                    loss = loss_of(name, a, b, Sharding(group, strategy=strategy))
                    loss.backward()
                measured[size, strategy, name] = sum(sent), held
                del a, b, loss
    return measured


@pytest.fixture(scope="module")
def measured() -> dict[Any, tuple[int, int]]:
    return on_ranks(4, measure)[0]


# Bytes sent, as a share of the bytes of an all-gather with autograd, on three and on four ranks; docs/distributed.md
# quotes these shares.
SENT = {
    ("nt_xent", "all_gather"): (0.521, 0.521),
    ("clip", "all_gather"): (0.519, 0.519),
    ("sup_con", "all_gather"): (0.541, 0.541),
    ("nt_xent", "ring"): (0.774, 0.859),
    ("clip", "ring"): (0.773, 0.773),
    ("sup_con", "ring"): (1.802, 1.887),
    ("sup_con in", "all_gather"): (0.537, 0.537),
    ("sup_con in", "ring"): (1.806, 1.891),
    ("sup_con pairs", "all_gather"): (0.537, 0.537),
    ("sup_con pairs", "ring"): (1.806, 1.891),
    ("sup_con several labels", "all_gather"): (0.563, 0.552),
    ("sup_con several labels", "ring"): (0.817, 0.891),
}


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize(("name", "strategy"), SENT)
def test_a_step_sends_the_documented_share_of_an_all_gather(measured, name: str, strategy: str, size: int):
    # An all-gather with autograd sends at least the rows in the forward, and their gradients (by a reduce-scatter) in
    # the backward.
    with_autograd = 2 * (size - 1) * 2 * ROWS * WIDTH * 4
    sent, _ = measured[size, strategy, name]
    assert sent / with_autograd == pytest.approx(SENT[name, strategy][size - 3], abs=1e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_ring_memory_does_not_depend_on_the_number_of_ranks(measured, name: str):
    (_, of_three), (_, of_four) = (measured[size, "ring", name] for size in (3, 4))
    assert of_four == of_three
    (_, of_three), (_, of_four) = (measured[size, "all_gather", name] for size in (3, 4))
    assert of_four > of_three  # proves that the measurement sees the rows


# --- which rank computes which similarities ---------------------------------------------------------------------------

ROWS_OF_RANKS = (
    [51], [40, 40], [51, 80], [0, 71], [40] * 3, [40, 0, 60], [40] * 4, [30, 61, 0, 20], [6] * 5, [20] * 6,
    [11] * 7, [8] * 8,
)  # fmt: skip


@pytest.mark.parametrize("rows", ROWS_OF_RANKS, ids=str)
@pytest.mark.parametrize("how", ["half_ring", "triangle"])
def test_every_similarity_is_computed_once_and_the_work_is_balanced(how: str, rows: list[int]):
    world, n_rows = len(rows), sum(rows)
    formed = torch.zeros(n_rows, n_rows, dtype=torch.int64)
    of_ranks = []
    for rank in range(world):
        before = formed.sum()
        if how == "half_ring":
            pairs = schedule.half_ring(rank, rows)
            own = schedule.spans(rows)[rank]
            assert all(own.start <= a.start and a.stop <= own.stop for a, _ in pairs)  # only rows of this rank
        else:
            pairs = schedule.triangle(rank, world, n_rows)
        for a, b in pairs:
            formed[a, b] += 1
            if a != b:
                formed.T[a, b] += 1  # the same similarities, with rows and columns exchanged
        of_ranks.append(int(formed.sum() - before))
    assert (formed == 1).all()
    if len(set(rows)) == 1 and rows[0] % 2 == 0:
        assert len(set(of_ranks)) == 1
    elif how == "triangle":  # each rank has two shares of rows, and shares may differ by a row
        assert max(of_ranks) - min(of_ranks) <= 4 * n_rows


# --- one process -----------------------------------------------------------------------------------------------------


def test_group_of_a_wrong_type_raises():
    with pytest.raises(TypeError, match="group must be a ProcessGroup, a DeviceMesh or 'world', got int"):
        fastntxent.nt_xent(torch.eye(3), torch.eye(3), group=3)


def one_rank() -> list[str]:
    module = copy.deepcopy(fastntxent.NTXentLoss(group=dist.group.WORLD))
    assert module(torch.eye(4), torch.eye(4)) == fastntxent.nt_xent(torch.eye(4), torch.eye(4), group=module.group)
    messages = []
    for options in ({"strategy": "star"}, {"wire_dtype": torch.int8}, {"check": "no"}):
        with pytest.raises((ValueError, TypeError)) as caught:
            Sharding(dist.group.WORLD, **options)
        messages.append(str(caught.value))
    with pytest.raises(ValueError, match="one-dimensional DeviceMesh, got 2-d") as caught:
        Sharding(init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b")))
    return messages


def ring_taken() -> dict[tuple[str, int], bool]:
    """For 128 bytes of rows, return whether the ring is used, by strategy and by RING_BYTES."""
    rows = {"z_i": torch.eye(2, 8), "z_j": torch.eye(2, 8)}  # 2 samples of 2 views, 8 features of 4 bytes
    taken = {}
    for limit in (127, 128):
        for strategy in STRATEGIES:
            with mock.patch.object(shard, "RING_BYTES", limit):
                opened = shard.open_shard(Sharding(dist.group.WORLD, strategy=strategy), "nt_xent", rows, 2, {})
            taken[strategy, limit] = opened.ring
    return taken


def test_auto_takes_the_ring_above_its_limit():
    (taken,) = on_ranks(1, ring_taken)
    always = {("ring", limit): True for limit in (127, 128)} | {("all_gather", limit): False for limit in (127, 128)}
    assert taken == always | {("auto", 127): True, ("auto", 128): False}


def test_modules_with_a_group_can_be_copied_and_bad_sharding_options_raise():
    (messages,) = on_ranks(1, one_rank)
    assert messages[0].startswith("strategy must be one of 'auto', 'all_gather', 'ring', got 'star'")
    assert messages[1].startswith("wire_dtype must be None or a floating-point dtype")
    assert messages[2] == "check must be a bool, got 'no'"
