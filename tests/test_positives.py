"""Operators that sum over positive pairs: tiles, two sides, range, accuracy, registration."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastntxent import error_budget, ops, sup_con
from fastntxent.algebra import row_losses
from fastntxent.backends.reference import BACKEND as REFERENCE
from fastntxent.ops import positives
from fastntxent.sides import Side
from tests.cases import assert_within_rounding


def lse(u, v, u_ids, v_ids, inv_tau, nu, same, backend):
    return (REFERENCE if backend == "reference" else ops).positive_lse(u, v, u_ids, v_ids, inv_tau, same=same)


def positive_sum(u, v, u_ids, v_ids, inv_tau, nu, same, backend):
    return (REFERENCE if backend == "reference" else ops).positive_sum(u, v, u_ids, v_ids, inv_tau, nu, same=same)


OPERATORS = {"lse": lse, "sum": positive_sum}


def results(operator, sides, inv_tau, same, backend, dtype=torch.float64):
    u, v, u_ids, v_ids = sides
    u = u.to(dtype, copy=True).requires_grad_()
    v, v_ids = (u, u_ids) if same else (v.to(dtype, copy=True).requires_grad_(), v_ids)
    k = torch.tensor(inv_tau, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    nu = torch.linspace(-2, 3, len(u), dtype=k.dtype)
    nu[::3] = -math.inf  # rows without negatives
    nu.requires_grad_()
    value = operator(u, v, u_ids, v_ids, k, nu, same, backend)
    weights = torch.linspace(-1, 2, len(u), dtype=k.dtype)
    total = (torch.where(value.isinf(), 0, value) * weights).sum()
    wanted = [u, k, nu] if same else [u, v, k, nu]
    return [value.detach(), *torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)]


def sides(M, K, groups, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u, v = (F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1) for n in (M, K))
    ids = {
        "few": torch.randint(-1, 2, (M + K,), generator=generator),
        "many": torch.randint(0, (M + K) // 3 + 1, (M + K,), generator=generator, dtype=torch.int32),
        "one": torch.zeros(M + K, dtype=torch.int8),
        "unique": torch.randperm(M + K, generator=generator) * 2**40,
        "one large": (torch.rand(M + K, generator=generator) < 0.7) * torch.arange(M + K),
    }[groups]
    return u, v, ids[:M], ids[M:]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("groups", ["few", "many", "one", "unique", "one large"])
@pytest.mark.parametrize("tile", [(1, 1), (3, 4), (4, 100), None])
@pytest.mark.parametrize(("M", "K"), [(1, 1), (5, 9), (12, 8), (13, 30)])
def test_positives_equal_the_dense_formula(monkeypatch, M, K, tile, groups, operator):
    if tile is not None:
        monkeypatch.setattr(positives, "_TILE_CPU", tile)
    for same in (False, True):
        drawn = sides(M, K, groups)
        value, expected = (
            results(OPERATORS[operator], drawn, 3.0, same, backend) for backend in ("blocked", "reference")
        )
        for v, e in zip(value, expected, strict=True):
            torch.testing.assert_close(v, e, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("M", [positives._TILE_CPU[0] + delta for delta in (-1, 0, 1)])
@pytest.mark.parametrize("inv_tau", [0.1, 14.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_positives_at_tile_edges_within_budget(dtype, inv_tau, M, operator):
    u, v, u_ids, v_ids = sides(M, 2 * M, "few", d=16)
    rounded = u.to(dtype).double(), v.to(dtype).double(), u_ids, v_ids
    truth = results(OPERATORS[operator], rounded, inv_tau, False, "reference")
    same, value = (
        results(OPERATORS[operator], rounded, inv_tau, False, backend, dtype) for backend in ("reference", "blocked")
    )
    for v, s, t in zip(value, same, truth, strict=True):
        scale = M if t.ndim == 0 else 0.0  # d_k is a sum of similarities of both signs
        limit = error_budget.allowed(error_budget.errors_of(s, t, scale=scale), dtype, inv_tau, output_dtype=v.dtype)
        errors = error_budget.errors_of(v, t, scale=scale)
        assert errors.within(limit), f"{errors}, allowed {limit}"


@pytest.mark.parametrize("operator", OPERATORS)
def test_positives_row_without_a_positive_has_no_gradient(operator):
    u = torch.randn(3, 2, requires_grad=True)
    value = OPERATORS[operator](
        u, u, torch.arange(3), torch.arange(3), torch.tensor(1.0), torch.zeros(3), True, "blocked"
    )
    assert torch.equal(value, torch.full((3,), -math.inf if operator == "lse" else 0.0))
    (gradient,) = torch.autograd.grad(torch.where(value.isinf(), 0, value.square()).sum(), u)
    assert torch.equal(gradient, torch.zeros(3, 2))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("same", [True, False])
def test_positives_gradient_equals_finite_differences(operator, same):
    u, v, u_ids, v_ids = sides(5, 6, "few", d=3)
    k, nu = torch.tensor(2.0, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)

    def call(u, v, k, nu):
        right, right_ids = (u, u_ids) if same else (v, v_ids)
        value = OPERATORS[operator](u, right, u_ids, right_ids, k, nu, same, "blocked")
        return torch.where(value.isinf(), 0, value)

    assert torch.autograd.gradcheck(call, (u.requires_grad_(), v.requires_grad_(), k, nu.requires_grad_()))


@pytest.mark.parametrize("name", ["positive_lse", "positive_sum"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_positives_operators_pass_opcheck(name, dtype):
    u, v, u_ids, v_ids = sides(6, 7, "one")
    u, v = (x.to(dtype).requires_grad_() for x in (u, v))
    acc = torch.promote_types(dtype, torch.float32)
    args = [u, v, u_ids, v_ids, torch.tensor(2.0, dtype=acc, requires_grad=True)]
    if name == "positive_sum":
        args.append(torch.randn(6, dtype=acc, requires_grad=True))
    operator = getattr(torch.ops.fastntxent, name)
    torch.library.opcheck(operator.default, (*args, False))
    torch.library.opcheck(operator.float, (*args[:4], 2.0, *args[5:], False))


def converged():
    """Return the rows of two views that nearly agree, far from their negatives, and the labels. The loss is about 1e-6
    at a temperature of 0.055.
    """
    generator = torch.Generator().manual_seed(0)
    centres = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0][:60]
    z = centres.repeat(2, 1) + 0.02 * torch.randn(120, 64, generator=generator, dtype=torch.float64)
    return z.float(), torch.arange(60).repeat(2)


@pytest.mark.parametrize("form", ["in", "pairs"])
def test_positives_gradient_keeps_its_accuracy_when_converged(form):
    z, labels = converged()

    def gradient(z, backend):
        z = z.clone().requires_grad_()
        loss = sup_con(z, labels, 0.055, form=form, backend=backend)
        return loss.detach(), torch.autograd.grad(loss, z)[0]

    loss, value = gradient(z, "auto")
    true_loss, true = gradient(z.double(), "reference")
    assert 1e-7 < float(true_loss) < 1e-5
    for result, truth in ((loss, true_loss), (value, true)):
        assert_within_rounding(result, truth, 1 / 0.055)


def test_positive_sum_of_single_pairs_is_nt_xent():
    u = F.normalize(torch.randn(20, 5, dtype=torch.float64), dim=1)
    ids, k = torch.arange(10).repeat(2), torch.tensor(4.0, dtype=torch.float64)
    nu = REFERENCE.neg_lse(Side(u, ids), k)
    value = ops.positive_sum(u, u, ids, ids, k, nu, same=True)
    torch.testing.assert_close(value, row_losses(*REFERENCE.nt_xent_rows(*u.chunk(2), k, False)))
