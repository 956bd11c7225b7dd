"""The budget's own arithmetic, and the comparison of a live batch."""

import pytest
import torch

from fastntxent import budget
from tests.cases import KERNELS, blocked, random_batch


def test_measure_is_relative_to_the_truth():
    truth = torch.tensor([3.0, -4.0], dtype=torch.float64)
    errors = budget.measure(torch.tensor([3.0, -4.4]), truth)
    assert errors.maximum == pytest.approx(0.1)
    assert errors.rms == pytest.approx(0.4 / 5)


def test_measure_of_infinities_and_nan():
    inf = torch.tensor([-torch.inf, 1.0], dtype=torch.float64)
    assert budget.measure(inf.float(), inf) == (0, 0)
    nan = budget.measure(torch.tensor([torch.nan, 1.0]), inf)
    assert not nan.within(budget.Errors(1e9, 1e9))


def test_measure_of_zero_truth():
    zero = torch.zeros(2, dtype=torch.float64)
    assert budget.measure(zero, zero) == (0, 0)
    assert budget.measure(zero + 1, zero) == (torch.inf, torch.inf)
    assert budget.measure(zero + 1, zero, scale=4.0) == (0.25, 0.25)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_compare_accepts_a_sound_backend_with_tight_budgets(backend, dtype, autocast):
    z_i, z_j, *_ = random_batch(64, 16, 0.1, dtype=dtype)
    z_i[3] = 0
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        report = budget.compare(z_i, z_j, 0.1, backend=backend)
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
    report = budget.compare(z_i, z_j, 0.1, backend="blocked")
    assert not report.ok
    assert str(report).startswith("BEYOND BUDGET")
