"""Mistakes that ranks detect: changes in place, backwards out of order or missing, a group that does not exist yet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastntxent
from tests.ranks import on_ranks

N, D = 6, 5
IDS = torch.arange(N) // 2
STRATEGIES = ("all_gather", "ring")


def call(name: str) -> Callable[..., Tensor]:
    """Return a loss of rows (2 N, D) with ids (N,), across all ranks."""

    def loss(z: Tensor, ids: Tensor, **options: object) -> Tensor:
        options = {"normalize": False, "group": "world", **options}
        z_i, z_j = z[:N], z[N:]
        if name.startswith("sup_con"):
            return fastntxent.sup_con(z_i, ids, form=name.removeprefix("sup_con "), **options)
        if name == "info_nce negatives":
            return fastntxent.info_nce(z_i, z_j, negatives=z_j * 0.5, ids=ids, in_batch_negatives=True, **options)
        if name == "nt_xent":
            return fastntxent.nt_xent(z_i, z_j, **options)
        if name == "nt_xent ids smoothing":
            return fastntxent.nt_xent(z_i, z_j, ids=ids, label_smoothing=0.1, **options)
        return fastntxent.clip(z_i, z_j, ids=ids, label_smoothing=0.1, **options)

    return loss


LOSSES = {
    name: call(name)
    for name in (
        "nt_xent", "nt_xent ids smoothing", "clip", "info_nce negatives", "sup_con out", "sup_con in", "sup_con pairs"
    )
}  # fmt: skip


def rows() -> Tensor:
    return torch.randn(2 * N, D, generator=torch.Generator().manual_seed(dist.get_rank()), dtype=torch.double) / 2


def after_a_change(strategy: str) -> dict[tuple[str, str], str]:
    """Change the rows or the ids of each loss in place before the backward. Return "right" or "wrong" for the gradient
    or, if the backward raises, "noticed" or the message of an unexpected error."""
    found = {}
    for name, loss in LOSSES.items():
        for changed in ("rows", "ids"):
            z, ids = rows().requires_grad_(), IDS.clone()
            group = fastntxent.Sharding("world", strategy=strategy)
            (expected,) = torch.autograd.grad(loss(z * 1, ids, group=group), z)
            z_now = z * 1
            value = loss(z_now, ids, group=group)
            with torch.no_grad():
                {"rows": z_now, "ids": ids}[changed].mul_(3)
            try:
                (gradient,) = torch.autograd.grad(value, z)
                found[name, changed] = "right" if torch.equal(gradient, expected) else "wrong"
            except RuntimeError as error:
                found[name, changed] = "noticed" if "modified by an inplace operation" in str(error) else str(error)
    return found


def packed(strategy: str) -> dict[str, bool]:
    """For each loss, return True if two things hold: its saved rows (local or gathered) pass through saved-tensor
    hooks, and hooks that return copies do not change the gradient."""
    found = {}
    for name, loss in LOSSES.items():
        z = rows().requires_grad_()
        shapes: list[tuple[int, ...]] = []

        def pack(t: Tensor, shapes: list = shapes) -> Tensor:
            shapes.append(tuple(t.shape))
            return t.clone()

        group = fastntxent.Sharding("world", strategy=strategy)
        (expected,) = torch.autograd.grad(loss(z, IDS, group=group), z)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            value = loss(z, IDS, group=group)
        (gradient,) = torch.autograd.grad(value, z)
        of_all = 2 if strategy == "all_gather" else 1
        held = {(of_all * N, D), (of_all * 2 * N, D)} & set(shapes)
        found[name] = bool(held) and torch.equal(gradient, expected)
    return found


def negated_rows() -> list[bool]:
    found = []
    for loss in LOSSES.values():
        gradients = []
        for lazy in (False, True):
            z = rows().requires_grad_()
            z_now = torch.complex(torch.zeros_like(z), -z).conj().imag if lazy else z * 1
            gradients.append(torch.autograd.grad(loss(z_now, IDS), z)[0])
        found.append(torch.allclose(*gradients, rtol=1e-12, atol=1e-12))
    return found


def named_world() -> bool:
    group = dist.group.WORLD
    z = rows()
    expected = fastntxent.nt_xent(*z.chunk(2), group=group)
    named = [fastntxent.nt_xent(*z.chunk(2), group=world) for world in ("world", fastntxent.Sharding("world"))]
    return all(torch.equal(value, expected) for value in named) and not torch.equal(
        expected, fastntxent.nt_xent(*z.chunk(2))
    )


def everything() -> dict[object, object]:
    found: dict[object, object] = {("changed", strategy): after_a_change(strategy) for strategy in STRATEGIES}
    found |= {("packed", strategy): packed(strategy) for strategy in STRATEGIES}
    return {**found, "negated": negated_rows(), "world": named_world()}


@pytest.fixture(scope="module")
def of_ranks() -> dict[object, list[object]]:
    first, second = on_ranks(2, everything)
    return {name: [first[name], second[name]] for name in first}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_backward_across_ranks_raises_or_is_right_after_a_change_in_place(of_ranks, strategy):
    for found in of_ranks["changed", strategy]:
        # Changing ids is harmless to a loss that takes no ids (nt_xent). Changing rows is harmless to a loss that saves
        # only copies of them.
        assert {key: what for key, what in found.items() if what not in ("noticed", "right")} == {}
        assert found["sup_con in", "ids"] == found["sup_con out", "rows"] == found["clip", "rows"] == "noticed"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_saved_rows_across_ranks_pass_through_saved_tensor_hooks(of_ranks, strategy):
    for found in of_ranks["packed", strategy]:
        assert found == dict.fromkeys(LOSSES, True)


def raised(of: Callable[[], object]) -> str:
    try:
        of()
    except RuntimeError as error:
        return str(error)
    return ""


def out_of_order() -> list[str]:
    first, second = (fastntxent.nt_xent(*z.requires_grad_().chunk(2), group="world") for z in (rows(), rows()))
    swapped = (second, first) if dist.get_rank() else (first, second)
    found = [raised(swapped[0].backward)]
    z = rows().requires_grad_()
    loss = fastntxent.sup_con(z, IDS.repeat(2), form="pairs", group="world")
    # Rank 1 skips its backward.
    found.append(raised(loss.backward if not dist.get_rank() else lambda: fastntxent.dcl(*z.chunk(2), group="world")))
    found.append(raised(lambda: fastntxent.nt_xent(*z.chunk(2), group="world").backward()))  # the group still works
    z_now = rows().requires_grad_() * 1
    loss = fastntxent.sup_con(z_now, IDS.repeat(2), form="in", normalize=False, group="world")
    if not dist.get_rank():
        with torch.no_grad():
            z_now.zero_()
    return [*found, raised(loss.backward)]


def test_backwards_in_different_orders_raise_an_error_on_every_rank():
    for rank, (swapped, left_out, after, changed) in enumerate(on_ranks(2, out_of_order)):
        assert ("modified by an inplace operation", "raised an error on rank 0")[rank] in changed
        assert "must call losses, and run their backwards, in the same order" in swapped
        found = [f"rank {rank} is in the backward of nt_xent, call {rank + 1}, part 1" for rank in (0, 1)]
        assert "; ".join(found) in swapped
        assert "rank 0 is in the backward of sup_con, call 3, part 2; rank 1 is in a call of dcl" in left_out
        assert after == ""


def ends_early() -> str:
    loss = fastntxent.nt_xent(*rows().requires_grad_().chunk(2), group="world")
    return raised(loss.backward) if not dist.get_rank() else "ended"


def test_rank_that_exits_before_its_backward_raises_an_error_on_the_other():
    waiting, _ = on_ranks(2, ends_early)
    assert "rank 0 of 2 got no answer from the others" in waiting


def test_lazily_negated_rows_across_ranks_equal_materialised_ones(of_ranks):
    assert of_ranks["negated"] == [[True] * len(LOSSES)] * 2


# --- group="world" ---------------------------------------------------------------------------------------------------

MODULES = [
    lambda **kw: fastntxent.NTXentLoss(0.5, **kw),
    lambda **kw: fastntxent.CLIPLoss(0.5, **kw),
    lambda **kw: fastntxent.QueueInfoNCELoss(4, D, 0.5, **kw),
]


@pytest.mark.parametrize("make", MODULES)
def test_world_without_a_process_group_raises_when_the_loss_is_called(make):
    z = torch.randn(2, N, D)
    for group in ("world", fastntxent.Sharding("world")):
        loss = make(group=group)
        with pytest.raises(RuntimeError, match=r"'world' needs .*init_process_group to be called before the loss"):
            loss(*z)


def test_world_is_the_default_group_of_the_call(of_ranks):
    assert of_ranks["world"] == [True, True]


def test_unknown_group_name_raises():
    with pytest.raises(ValueError, match="group must be 'world' if it is a string, got 'all'"):
        fastntxent.NTXentLoss(group="all")
