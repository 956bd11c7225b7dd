"""The arithmetic of the error budget, and the comparison on a live batch."""

import pytest
import torch

from fastntxent import error_budget
from fastntxent.sides import Side
from tests.cases import (
    KERNELS,
    assert_cross_neg_lse_within_budget,
    assert_gradient_within_rounding,
    assert_neg_lse_within_budget,
    blocked,
    converged_batch,
    random_batch,
    start_of_training,
)


def test_errors_are_relative_to_the_truth():
    truth = torch.tensor([3.0, -4.0], dtype=torch.float64)
    errors = error_budget.errors_of(torch.tensor([3.0, -4.4]), truth)
    assert errors.maximum == pytest.approx(0.1)
    assert errors.rms == pytest.approx(0.4 / 5)


def test_errors_of_equal_infinities_are_zero_and_nan_exceeds_every_limit():
    inf = torch.tensor([-torch.inf, 1.0], dtype=torch.float64)
    assert error_budget.errors_of(inf.float(), inf) == (0, 0)
    nan = error_budget.errors_of(torch.tensor([torch.nan, 1.0]), inf)
    assert not nan.within(error_budget.Errors(1e9, 1e9))


def test_errors_of_a_zero_truth_are_infinite_without_a_scale():
    zero = torch.zeros(2, dtype=torch.float64)
    assert error_budget.errors_of(zero, zero) == (0, 0)
    assert error_budget.errors_of(zero + 1, zero) == (torch.inf, torch.inf)
    assert error_budget.errors_of(zero + 1, zero, scale=4.0) == (0.25, 0.25)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_compare_accepts_a_sound_backend_with_tight_budgets(backend, dtype, autocast):
    z_i, z_j, *_ = random_batch(64, 16, 0.1, dtype=dtype)
    z_i[3] = 0
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        report = error_budget.compare(z_i, z_j, 0.1, backend=backend)
    assert report.ok
    assert report.loss_budget < 1e-5
    assert report.gradient_budget < (1e-5 if dtype == torch.float32 else 5 * torch.finfo(dtype).eps)
    assert str(report).startswith("within budget")


def test_compare_rejects_a_gradient_wrong_by_1e_4(monkeypatch):
    original = blocked.BlockedBackend.nt_xent_scalar

    def wrong(*args):
        loss, *gradients = original(*args)
        return loss, *(1.0001 * gradient for gradient in gradients)

    monkeypatch.setattr(blocked.BlockedBackend, "nt_xent_scalar", wrong)
    z_i, z_j, *_ = random_batch(64, 16, 0.1)
    report = error_budget.compare(z_i, z_j, 0.1, backend="blocked")
    assert not report.ok
    assert str(report).startswith("BEYOND BUDGET")


@pytest.fixture
def products_in_tf32(monkeypatch):
    """Make the backend `blocked` compute logits from rows with TF32's 10 bits of mantissa."""

    def rounded(x):
        if isinstance(x, Side):
            return Side(*map(rounded, x))
        rows = isinstance(x, torch.Tensor) and x.dtype == torch.float32 and x.ndim == 2
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32) if rows else x

    def in_tf32(original):
        return lambda *args: original(*map(rounded, args))

    for name in ("nt_xent_scalar", "neg_lse", "cross_neg_lse"):
        monkeypatch.setattr(blocked.BlockedBackend, name, in_tf32(getattr(blocked.BlockedBackend, name)))


@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("loss", [None, 0.7, 1e-3, 1e-6])
def test_gradient_limit_rejects_products_in_tf32(products_in_tf32, loss, temperature):
    shape = 64, 128, temperature
    batch = start_of_training(*shape) if loss is None else converged_batch(*shape, loss)
    with pytest.raises(AssertionError, match="allowed"):
        assert_gradient_within_rounding(batch, "blocked")


@pytest.mark.parametrize("temperature", [0.005, 0.2])
@pytest.mark.parametrize("groups", ["unique", "few"])
def test_neg_lse_limits_reject_products_in_tf32(products_in_tf32, groups, temperature):
    with pytest.raises(AssertionError, match="allowed"):
        assert_neg_lse_within_budget("blocked", 70, groups, temperature)
    with pytest.raises(AssertionError, match="allowed"):
        assert_cross_neg_lse_within_budget("blocked", 33, 100, groups, temperature)
